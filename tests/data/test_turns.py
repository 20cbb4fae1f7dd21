"""Which tokens of a conversation the assistant writes, whatever the chat template does with its turns."""

from pathlib import Path

import pytest
from helpers import make_tokenizer

from tailorcli.data.encoder import Encoder
from tailorcli.data.messages import word_places
from tailorcli.data.records import Record, check_record
from tailorcli.data.turns import answered

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HEADLESS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
# Thoughts are written of the last answer alone, which has the marks of them even without any; so does Qwen3's.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think>"
    "{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENED = THINKING.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
STRICT = (
    "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty turn') }}{% endif %}{% endfor %}" + PLAIN
)
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}[{{ m.tool_calls[0].function.name }}]{% else %}"
    "{{ m.content }}{% endif %}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAST = "{% for m in messages %}{% if m.role == 'user' or loop.last %}<{{ m.role }}>{{ m.content }}</>{% endif %}"
LAST += "{% endfor %}"


def turns(*texts, **last):
    """User and assistant in turn; ``last`` is more of the last message."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    messages[-1] |= last
    return messages


def weighed(first, last):
    """Two answers, each with more of its own."""
    messages = turns("hi", "hey", "bye", "so long")
    return [messages[0], messages[1] | first, messages[2], messages[3] | last]


CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}
CALLING = [
    {"role": "user", "content": "how warm?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "seven"},
]
CASES = {
    "every turn": (PLAIN, turns("hi", "hey", "bye", "so long"), "hey</>|so long</>"),
    "a template without a head": (HEADLESS, turns("hi", "hey", "bye", "so long"), "hey</>|so long</>"),
    "thoughts of the last alone": (
        THINKING,
        turns("hi", "hey", "bye", "so long", reasoning_content="hm"),
        "hey</>|<think>hm</think>so long</>",
    ),
    "thoughts that are not there": (THINKING, turns("hi", "hey", "bye", "so long"), "hey</>|<think></think>so long</>"),
    "thoughts that the head opens": (OPENED, turns("hi", "hey", "bye", "so long"), "hey</>|</think>so long</>"),
    "a template that refuses an empty turn": (STRICT, turns("hi", "hey", "bye", "so long"), "hey</>|so long</>"),
    "the same words twice": (PLAIN, turns("hey", "hey", "hey</>", "hey"), "hey</>|hey</>"),
    "a question at the end": (PLAIN, turns("hi", "hey", "bye"), "hey</>"),
    "an answer at the start": (PLAIN, turns("hi", "hey", "bye", "so long")[1:], "hey</>|so long</>"),
    "a call of a tool": (CALLS, CALLING, "[look]</>|seven</>"),
    "a turn that is left out": (LAST, turns("hi", "hey", "bye", "so long"), "so long</>"),
    "no answer": (PLAIN, turns("hi"), ""),
    "a first turn of weight 0": (PLAIN, weighed({"weight": 0}, {"weight": 1}), "so long</>"),
    "a last turn of weight 0": (PLAIN, weighed({"weight": None}, {"weight": 0.0}), "hey</>"),
    "a turn that is not to be trained": (
        THINKING,
        weighed({"train": False}, {"train": True}),
        "<think></think>so long</>",
    ),
    "turns that are all not to be learnt": (PLAIN, weighed({"train": False}, {"weight": 0}), ""),
}


@pytest.mark.parametrize("case", CASES)
def test_the_turns_of_the_assistant_are_found(case, caplog):
    template, messages, expected = CASES[case]
    tokenizer = make_tokenizer(template)
    encoder, record = Encoder(tokenizer), Record("here", {"messages": messages})
    inputs = encoder.encode(record, 1000)
    ids = inputs["input_ids"][0].tolist()
    runs = encoder.responses.runs(record, inputs)
    assert "|".join("".join(tokenizer.convert_ids_to_tokens(ids[first:last])) for first, last in runs) == expected
    assert ("leaves out an assistant's turn of here" in caplog.text) == ("left out" in case)
    for length in range(1, len(ids)):  # the same runs, as far as they reach
        cut = encoder.encode(record, length)
        within = [(first, min(last, length)) for first, last in runs if first < length]
        assert encoder.responses.runs(record, cut) == within


def test_many_turns_are_found_without_writing_the_conversation_for_each(monkeypatch):
    tokenizer = make_tokenizer(PLAIN)
    record = Record("here", {"messages": turns(*("word " * (number % 3) + "x" for number in range(200)))})
    encoder = Encoder(tokenizer)
    inputs = encoder.encode(record, 100_000)
    written = []
    render = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *args, **given: written.append(1) or render(*args, **given)
    )
    assert len(encoder.responses.runs(record, inputs)) == 100
    assert len(written) <= 5


def test_turns_that_are_not_to_be_learnt_are_so_too_where_words_alone_tell_the_turns():
    messages = weighed({"weight": 0}, {})
    assert list(word_places(messages, "hi, hey, bye, so long")) == [(14, 21)]


def test_turns_of_sharegpt_keep_whether_they_are_learnt():
    said = [("human", "hi", {}), ("gpt", "hey", {"train": False}), ("human", "bye", {}), ("gpt", "so", {"weight": 1})]
    record = check_record(
        "here", {"conversations": [{"from": who, "value": text, **more} for who, text, more in said]}, Path()
    )
    assert answered(record.fields["messages"]) == [3]
