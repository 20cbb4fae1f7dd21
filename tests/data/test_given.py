"""What a model is given of a record: response spans, what a tokenizer adds by itself, targets, starts, splits."""

import json

import pytest
from families import make_family_pair, tokenizer_with
from helpers import make_pair, make_tokenizer, refused, run
from PIL import Image
from tokenizers.processors import TemplateProcessing

from tailorcli.calibration.synthetic import encode_starts, read_starts
from tailorcli.data.encoder import Encoder
from tailorcli.data.records import read_records
from tailorcli.errors import DataError
from tailorcli.models.loading import load_encoder
from tailorcli.options import CalibrateOptions
from tailorcli.training.examples import IGNORED, encode_example

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def adding(before="", after=""):
    """A tokenizer that puts these special tokens before and after a text."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = tokenizer_with(("<a>", "<b>"), **names)
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<a>", "<b>")]
    single = " ".join(filter(None, (before, "$A", after)))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=known)
    return tokenizer


def one(tmp_path, record):
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    return read_records(tmp_path / "d.jsonl")[0]


@pytest.mark.parametrize(
    ("prompt", "response", "seq_len", "counted"),
    [
        ("Q:A:", "The answer", 99, ["The answer"]),
        ("Q:A:", "The answer", 16, "prefix"),
        ("A very long prompt that is cut A:", "The answer", 16, []),
    ],
)
def test_the_response_beside_pictures_is_the_response_also_where_it_is_cut(
    tmp_path, prompt, response, seq_len, counted
):
    pair = make_family_pair(tmp_path, "llava")
    Image.new("RGB", (28, 28)).save(tmp_path / "i.png")
    record = one(tmp_path, {"images": ["i.png"], "prompt": prompt, "response": response})
    encoder = load_encoder(pair / "base", pair / "base", True, CalibrateOptions())
    inputs = encoder.encode(record, seq_len)
    ids = inputs["input_ids"][0].tolist()
    found = [
        "".join(encoder.tokenizer.convert_ids_to_tokens(ids[a:b])) for a, b in encoder.responses.runs(record, inputs)
    ]
    if counted == "prefix":
        assert len(found) == 1
        assert 0 < len(found[0]) < len(response)
        assert response.startswith(found[0])
    else:
        assert found == counted


@pytest.mark.parametrize(("before", "after"), [("<s>", ""), ("<a> <b>", ""), ("<s>", "</s>"), ("", "<a> </s>")])
def test_what_a_tokenizer_adds_is_there_once(tmp_path, before, after):
    tokenizer = adding(before, after)
    encoder, marks = Encoder(tokenizer), (before.replace(" ", ""), after.replace(" ", ""))
    plain, marked = (encoder.tokens.of(one(tmp_path, {"text": "x"}), text) for text in ("hi", "hi".join(marks)))
    assert plain == marked == tokenizer("hi")["input_ids"]


def test_an_unknown_token_may_be_what_is_added(tmp_path):
    tokenizer = tokenizer_with(bos_token="</s>", eos_token="</s>")
    tokenizer.unk_token = "</s>"
    number = tokenizer.convert_tokens_to_ids("</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", number)])
    assert Encoder(tokenizer).tokens.of(one(tmp_path, {"text": "x"}), "</s>hi") == tokenizer("hi")["input_ids"]


def test_an_answer_of_a_translator_is_in_its_own_tokens(tmp_path):
    """As Marian and NLLB have them; a question has no line end that only a text going on would need."""
    tokenizer, asked = make_tokenizer(), []
    original = type(tokenizer).__call__

    class Watched(type(tokenizer)):
        def __call__(self, text=None, text_target=None, **given):
            asked.append((text, text_target))
            return original(self, text=text, text_target=text_target, **given)

    tokenizer.__class__ = Watched
    record = one(tmp_path, {"question": "why", "answer": "so"})
    inputs = Encoder(tokenizer, start_token=0).encode(record, 99)
    assert ("why", None) in asked
    assert asked[-1] == (None, "so")
    assert inputs["decoder_input_ids"].shape == (1, 2)


def starts_of(tmp_path, tokenizer, record, **options):
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    records = read_starts(tmp_path / "d.jsonl")
    settings = CalibrateOptions(num_samples=1, synthetic=True, **options)
    [start] = encode_starts(records, Encoder(tokenizer), settings)
    return tokenizer.decode(start.inputs["input_ids"][0]).replace(" ", ""), start.text


def test_a_model_goes_on_from_a_question_as_its_template_frames_it(tmp_path):
    question = {"instruction": "who", "output": "left out"}
    assert starts_of(tmp_path, make_tokenizer(TEMPLATE), question) == ("<user>who|<assistant>",) * 2
    assert starts_of(tmp_path, make_tokenizer(), question)[0].strip() == "who<unk>"  # its line end is no character
    assert starts_of(tmp_path, make_tokenizer(TEMPLATE), {"prompt": "who"})[0] == "who"  # as it stands


def test_a_model_answers_the_last_question_of_messages(tmp_path):
    turns = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]
    first = ("<user>who|<assistant>",) * 2
    assert starts_of(tmp_path, make_tokenizer(TEMPLATE), {"messages": turns}) == first
    assert starts_of(tmp_path, make_tokenizer(TEMPLATE), {"messages": turns[:1]}) == first
    further = {"messages": [*turns, {"role": "user", "content": "why"}], "response": "left out"}
    assert (
        starts_of(tmp_path, make_tokenizer(TEMPLATE), further) == ("<user>who|<assistant>me|<user>why|<assistant>",) * 2
    )
    shared = {"conversations": [{"from": "human", "value": "who"}, {"from": "gpt", "value": "me"}]}
    assert starts_of(tmp_path, make_tokenizer(TEMPLATE), shared) == first
    with pytest.raises(DataError, match="no turn before the assistant's"):
        starts_of(tmp_path, make_tokenizer(TEMPLATE), {"messages": [{"role": "system", "content": "be"}, turns[1]]})
    with pytest.raises(DataError, match="no chat template"):
        starts_of(tmp_path, make_tokenizer(), {"messages": turns})


def test_a_model_goes_on_from_what_was_before_a_prompt(tmp_path):
    record = {"prompt": "who", "history": [["how", "so"]], "system": "be"}
    framed = "<system>be|<user>how|<assistant>so|<user>who|<assistant>"
    assert starts_of(tmp_path, make_tokenizer(TEMPLATE), record) == (framed,) * 2
    refusing = "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(DataError, match='has "system" and "history" beside its prompt'):
        starts_of(tmp_path, make_tokenizer(refusing), record)


def test_nothing_is_written_behind_the_end_of_a_text(tmp_path, caplog):
    assert starts_of(tmp_path, adding("<s>", "</s>"), {"prompt": "who"})[0] == "<s>who"
    assert starts_of(tmp_path, adding("<s>", "</s>"), {"prompt": "who</s>"})[0] == "<s>who</s>"
    assert "are cut" not in caplog.text
    assert starts_of(tmp_path, adding(), {"prompt": "a long one"}, seq_len=5)[0] == "alo"
    assert "1 of 1 starts are longer than --seq-len 5" in caplog.text


def test_turns_in_a_table_are_turns(tmp_path):
    asked, answered = ([{"role": role, "content": role[0]}] for role in ("user", "assistant"))
    (tmp_path / "t.csv").write_text("prompt,completion\n" + ",".join(_cell(json.dumps(e)) for e in (asked, answered)))
    [record] = read_records(tmp_path / "t.csv")
    assert record.fields["messages"] == [*asked, *answered]


def _cell(text):
    return '"' + text.replace('"', '""') + '"'


def test_a_file_without_a_split_brings_no_test_data_in(tmp_path, caplog):
    for name in ("train", "test", "extra"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert [record.fields["text"] for record in read_records(tmp_path)] == ["extra", "train"]
    assert "what names no split, is taken, test is left" in caplog.text


@pytest.mark.parametrize("what", ["columns", "template"])
def test_statistics_of_other_inputs_are_not_taken_for_these(tmp_path, what):
    """All samples are cut to one length, so that their tokens count the same."""
    pair = make_pair(tmp_path)
    rows = [f"{'body words ' * 9}{n},{'text words ' * 9}{n}" for n in range(8)]
    (tmp_path / "x.csv").write_text("\n".join(["body,text", *rows]))
    turns = [
        [{"role": "user", "content": f"{'asked ' * 9}{n}"}, {"role": "assistant", "content": "x"}] for n in range(8)
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    few = ("--num-samples", 4, "--seq-len", 16, "--no-retain", "--keep-stats", tmp_path / "kept")
    given = ("patch", pair / "base", pair / "tuned", *few)
    if what == "columns":
        run(*given, "--data", tmp_path / "x.csv", "--text-column", "body", "-o", tmp_path / "one")
        refused(*given, "--data", tmp_path / "x.csv", "-o", tmp_path / "two", mentions=["holds statistics of"])
        return
    for name in ("base", "tuned"):
        make_tokenizer(TEMPLATE).save_pretrained(pair / name)
    run(*given, "--data", tmp_path / "m.jsonl", "-o", tmp_path / "one")
    for name in ("base", "tuned"):
        make_tokenizer(TEMPLATE.replace("<{{", "[{{")).save_pretrained(pair / name)
    refused(*given, "--data", tmp_path / "m.jsonl", "-o", tmp_path / "two", mentions=["holds statistics of other data"])


def test_a_record_that_is_cut_on_both_sides_is_one(tmp_path):
    encoder = Encoder(make_tokenizer(), start_token=0)
    record = one(tmp_path, {"prompt": "p" * 30, "response": "r" * 20})
    encoder.encode(record, 8)
    assert encoder.cuts == [(50, 16)]


def test_chunks_are_of_plain_text(tmp_path):
    pair = make_pair(tmp_path)
    given = ("calibrate", pair / "base", "-o", tmp_path / "stats", "--text-mode", "chunk")
    refused(*given, "--data", pair / "data.jsonl", mentions=["is for plain text"])
    refused(*given, "--synthetic", mentions=["not for what the model writes"])


def test_a_long_record_that_is_cut_counts_once_also_where_its_response_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("tailorcli.data.tokens._LONG", 8)
    monkeypatch.setattr("tailorcli.data.tokens._PER_TOKEN", 1)
    encoder = Encoder(make_tokenizer())
    record = one(tmp_path, {"prompt": "p" * 250, "response": "r" * 50})
    inputs = encoder.encode(record, 10)
    assert encoder.responses.runs(record, inputs) == []
    assert encoder.cuts == [(300, 10)]


# --- records that are prepared for a model --------------------------------------------------------------------------

PREPARED = {"input_ids": [5, 6, 7, 8, 0], "labels": [-100, 6, -100, 8, -100], "attention_mask": [1, 1, 1, 1, 0]}


def test_tokens_are_taken_as_they_are_without_what_was_padded(tmp_path):
    encoder, record = Encoder(make_tokenizer()), one(tmp_path, PREPARED)
    for length, expected in ((99, [(1, 2), (3, 4)]), (3, [(1, 2)])):
        inputs = encoder.encode(record, length)
        assert inputs["input_ids"].tolist() == [[5, 6, 7, 8][:length]]
        assert encoder.responses.runs(record, inputs) == expected
    alone = one(tmp_path, {"input_ids": [5, 6]})
    assert encoder.responses.runs(alone, encoder.encode(alone, 9)) == []


def test_a_text_beside_tokens_is_what_counts(tmp_path):
    tokenizer = make_tokenizer()
    record = one(tmp_path, PREPARED | {"text": "ab"})
    assert tokenizer.decode(Encoder(tokenizer).encode(record, 9)["input_ids"][0]).replace(" ", "") == "ab"
    pair = one(tmp_path, PREPARED | {"prompt": "a", "response": "b"})
    assert encode_example(pair, Encoder(tokenizer), 9)["labels"].ne(IGNORED).sum() == 1


def test_the_labels_say_what_is_learnt(tmp_path):
    encoder = Encoder(make_tokenizer())
    assert encode_example(one(tmp_path, PREPARED), encoder, 9)["labels"].tolist() == [[IGNORED, 6, IGNORED, 8]]
    assert encode_example(one(tmp_path, {"input_ids": [5, 6]}), encoder, 9)["labels"].tolist() == [[5, 6]]
    assert encode_example(one(tmp_path, PREPARED | {"labels": [-100] * 5}), encoder, 9) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1]}, '"labels" has 1 numbers, and "input_ids" 5'),
        ({"input_ids": "5 6"}, '"input_ids" is'),
        ({"input_ids": [5, 6.5, 7, 8, 9]}, '"input_ids" is'),
        ({"input_ids": [5, -6, 7, 8, 9]}, '"input_ids" has -6'),
        ({"input_ids": [5, 60_000, 7, 8, 9]}, "has the token 60,000"),
        ({"pixel_values": [[0.0]]}, '"input_ids" and "pixel_values"'),
    ],
)
def test_tokens_that_are_none_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        Encoder(make_tokenizer()).encode(one(tmp_path, PREPARED | change), 9)
    with pytest.raises(DataError, match="encoder-decoder"):
        Encoder(make_tokenizer(), start_token=0).encode(one(tmp_path, PREPARED), 9)
