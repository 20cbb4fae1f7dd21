"""Calibration data: the tokens of every format, sampling, batching, and errors that say where."""

import base64
import json
import random
import re
import wave
from types import SimpleNamespace

import pytest
import torch
from helpers import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorcli.data.encoder import Encoder
from tailorcli.data.records import Record, check_record, read_records
from tailorcli.data.samples import draw_samples, inputs_digest, lengthened, make_batches
from tailorcli.data.tokens import first_tokens
from tailorcli.errors import DataError
from tailorcli.models.loading import load_encoder
from tailorcli.options import CalibrateOptions
from tailorcli.training.examples import encode_example

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def ids(text):
    """One token a character, as the tiny tokenizer has them."""
    return [ord(character) - 32 + 2 for character in text]


def text_of(token_ids):
    return "".join(chr(token + 32 - 2) for token in token_ids)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Write a data file: text as it is, bytes as they are, a list as .jsonl or .json."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8", newline="")
        elif name.endswith("l"):
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(json.dumps(content))
        return path

    return write


def draw(path, tokenizer, **options):
    options = CalibrateOptions(**options)
    records = read_records(path, options.text_mode)
    return draw_samples(path, records, Encoder(tokenizer).encode, options)


def drawn_ids(samples):
    return [sample["input_ids"][0].tolist() for sample in samples.inputs]


def texts(path, tokenizer, **options):
    """What was drawn, as sorted text."""
    return sorted(text_of(sample) for sample in drawn_ids(draw(path, tokenizer, **options)))


# --- tokens ---------------------------------------------------------------------------------------------------

RECORDS = [
    {"text": "plain text", "other": 5},
    {"prompt": "2+2=", "response": "4"},
    {"prompt": "2+3=", "completion": "5"},
]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_text_and_prompt_with_response_or_completion(write, tokenizer, name):
    assert texts(write(name, RECORDS), tokenizer) == ["2+2=4", "2+3=5", "plain text"]


def test_response_wins_over_completion_and_text_over_all(write, tokenizer):
    records = [
        {"prompt": "a", "response": "b", "completion": "c"},
        {"text": "t", "prompt": "a", "response": "b", "messages": 5},
    ]
    assert texts(write("data.jsonl", records), tokenizer) == ["ab", "t"]


def test_blank_lines_byte_order_mark_and_windows_line_ends(write, tokenizer):
    path = write("data.jsonl", '\ufeff\r\n{"text": "a"}\r\n\r\n  \r\n{"text": "b"}')
    assert texts(path, tokenizer) == ["a", "b"]
    assert texts(write("data.json", '\ufeff[{"text": "a"}]'), tokenizer) == ["a"]
    assert texts(write("data.txt", "\ufeffa\r\nb"), tokenizer) == ["a", "b"]


def test_a_document_a_line(write, tokenizer):
    path = write("data.txt", 'first document\n\n  \nsecond, of {no} "JSON"\nthird')
    assert texts(path, tokenizer) == ["first document", 'second, of {no} "JSON"', "third"]
    assert [record.where.rsplit(":", 1)[1] for record in read_records(path)] == ["1", "4", "5"]


def test_only_a_line_feed_ends_a_document(write):
    path = write("data.txt", "form\x0cfeed and\u2028separator\nnext")
    assert [record.fields["text"] for record in read_records(path)] == ["form\x0cfeed and\u2028separator", "next"]


def test_chunks_cover_the_text_without_overlap(write, tokenizer):
    text = "".join(random.Random(0).choice("abcdefgh \n") for _ in range(997))
    path = write("data.txt", text.replace("\n", "|"))
    drawn = drawn_ids(draw(path, tokenizer, text_mode="chunk", seq_len=100))
    assert sorted(map(len, drawn)) == [97] + [100] * 9
    chunks = [text.replace("\n", "|")[start : start + 100] for start in range(0, 997, 100)]
    assert sorted(map(text_of, drawn)) == sorted(chunks)
    some = draw(path, tokenizer, text_mode="chunk", seq_len=100, num_samples=3)
    assert [text_of(sample) in chunks for sample in drawn_ids(some)] == [True] * 3
    assert some.facts["records"] == 10
    assert some.facts["samples"] == 3


def test_chunks_run_across_lines_and_are_for_txt_alone(write, tokenizer):
    path = write("data.txt", "ab\ncd\nef")
    drawn = drawn_ids(draw(path, tokenizer, text_mode="chunk", seq_len=4))
    assert sorted(map(len, drawn)) == [4, 4]
    assert texts(write("data.jsonl", [{"text": "abcdef"}]), tokenizer, text_mode="chunk", seq_len=4) == ["abcd"]


def test_messages_go_through_the_chat_template(write):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write("data.jsonl", [{"messages": chat}])
    assert texts(path, make_tokenizer(TEMPLATE)) == ["<user>hi<assistant>ho"]


def test_special_tokens_are_added_to_text_and_left_to_the_template(write):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 1)])
    chat = [{"role": "user", "content": "hi"}]
    path = write("data.json", [{"text": "a"}, {"prompt": "b", "response": "c"}, {"messages": chat}])
    drawn = sorted(drawn_ids(draw(path, tokenizer)))
    assert drawn == sorted([[1, *ids("a")], [1, *ids("bc")], ids("<user>hi")])


def test_long_samples_are_cut_on_the_right_and_empty_ones_passed_over(write, tokenizer):
    path = write("data.jsonl", [{"text": ""}, {"text": "abcdefgh"}, {"text": ""}, {"text": "xy"}])
    samples = draw(path, tokenizer, seq_len=5)
    assert sorted(map(text_of, drawn_ids(samples))) == ["abcde", "xy"]
    assert samples.num_tokens == samples.facts["tokens"] == 7
    assert samples.facts["samples"] == 2
    assert samples.facts["records"] == 4


# --- sampling -------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_samples(write, tokenizer):
    path = write("data.jsonl", [{"text": f"number {i}"} for i in range(100)])
    first = draw(path, tokenizer, num_samples=10, seed=3)
    assert first.facts == draw(path, tokenizer, num_samples=10, seed=3).facts
    assert drawn_ids(first) == drawn_ids(draw(path, tokenizer, num_samples=10, seed=3))
    assert drawn_ids(first) != drawn_ids(draw(path, tokenizer, num_samples=10, seed=4))
    assert len({tuple(sample) for sample in drawn_ids(first)}) == 10  # without replacement
    assert drawn_ids(first) == drawn_ids(draw(path, tokenizer, num_samples=20, seed=3))[:10]
    everything = draw(path, tokenizer, num_samples=1000, seed=3)
    assert sorted(map(text_of, drawn_ids(everything))) == sorted(f"number {i}" for i in range(100))


def test_sampling_leaves_the_global_generator_alone(write, tokenizer):
    path = write("data.jsonl", [{"text": f"number {i}"} for i in range(20)])
    random.seed(5)
    state = random.getstate()
    draw(path, tokenizer, num_samples=3)
    assert random.getstate() == state


def test_the_facts_tell_one_file_from_another(write, tokenizer):
    first = draw(write("one.jsonl", [{"text": "a"}]), tokenizer)
    second = draw(write("two.jsonl", [{"text": "b"}]), tokenizer, seq_len=7, seed=1)
    assert first.facts["blake2b"] != second.facts["blake2b"]
    assert first.facts["file"].endswith("one.jsonl")
    assert (second.facts["seq_len"], second.facts["seed"]) == (7, 1)


# --- batches --------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    batch_size=st.integers(1, 7),
)
@settings(deadline=None)
def test_batches_hold_every_sample_once_and_pad_nothing(lengths, batch_size):
    samples = [[100 * i + j + 1 for j in range(length)] for i, length in enumerate(lengths)]
    batches = list(make_batches([{"input_ids": torch.tensor([ids])} for ids in samples], batch_size))
    assert all(1 <= len(batch["input_ids"]) <= batch_size for batch in batches)
    assert sorted(row for batch in batches for row in batch["input_ids"].tolist()) == sorted(samples)
    assert len(batches) == sum(-(-lengths.count(length) // batch_size) for length in set(lengths))


def test_batches_put_like_shapes_together_the_largest_first():
    def sample(length, images=0):
        media = {"pixel_values": torch.zeros(images, 3, 4, 4)} if images else {}
        return {"input_ids": torch.ones(1, length, dtype=torch.long), **media}

    batches = list(make_batches([sample(5), sample(9), sample(5, 1), sample(5), sample(5, 1), sample(5, 2)], 8))
    shapes = [{name: tuple(value.shape) for name, value in batch.items()} for batch in batches]
    assert shapes == [
        {"input_ids": (1, 5), "pixel_values": (2, 3, 4, 4)},
        {"input_ids": (2, 5), "pixel_values": (2, 3, 4, 4)},
        {"input_ids": (1, 9)},
        {"input_ids": (2, 5)},
    ]


# --- errors ---------------------------------------------------------------------------------------------------

MALFORMED = {
    "empty jsonl": ("d.jsonl", "", "d.jsonl holds no records"),
    "blank jsonl": ("d.jsonl", "\n \n", "d.jsonl holds no records"),
    "empty txt": ("d.txt", " \n\n", "d.txt holds no records"),
    "empty list": ("d.json", "[]", "d.json holds no records"),
    "empty json": ("d.json", "", "d.json is not JSON"),
    "no suffix": ("d", "x", "unknown suffix ''"),
    "unknown suffix": ("d.xlsx", "x", "unknown suffix '.xlsx'"),
    "unknown suffix, compressed": ("d.tar.gz", "x", "unknown suffix '.tar.gz'"),
    "not compressed": ("d.jsonl.gz", "x", "cannot read"),
    "not UTF-8": ("d.jsonl", b'{"text": "caf\xe9"}', "d.jsonl is not UTF-8 text (byte 13)"),
    "UTF-16": ("d.txt", "text".encode("utf-16"), "d.txt is not UTF-8"),
    "txt not UTF-8": ("d.txt", b"\xff", "d.txt is not UTF-8"),
    "json not UTF-8": ("d.json", b'["\xff"]', "d.json is not UTF-8"),
    "broken line": ("d.jsonl", '{"text": "a"}\n\n{"text": \n', "d.jsonl:3 is not JSON"),
    "two objects a line": ("d.jsonl", '{"text": "a"}{"text": "b"}', "d.jsonl:1 is not JSON"),
    "nested too deep": ("d.jsonl", '{"text": "a"}\n' + "[" * 100_000, "d.jsonl:2 is not JSON"),
    "a list a line": ("d.jsonl", '{"text": "a"}\n["b"]', "d.jsonl:2 is a list"),
    "a string a line": ("d.jsonl", '"b"', "d.jsonl:1 is a str"),
    "null": ("d.jsonl", "null", "d.jsonl:1 is a NoneType"),
    "an object": ("d.json", '{"data": []}', "d.json holds a dict"),
    "a number in a list": ("d.json", '[{"text": "a"}, 5]', "d.json, record 1 is a int"),
    "unknown fields": ("d.jsonl", '{"title": 1, "body": 2}', "d.jsonl:1 has the fields ['body', 'title']"),
    "numbers in place of texts": ("d.jsonl", '{"question": 1, "answer": 2}', '"question" is a int'),
    "no fields": ("d.jsonl", "{}", "d.jsonl:1 has the fields []"),
    "a prompt alone": ("d.jsonl", '{"prompt": "a"}', "d.jsonl:1 has the fields ['prompt']"),
    "text is a number": ("d.jsonl", '{"text": 5}', 'd.jsonl:1: "text" is a int, expected a string'),
    "text is null": ("d.json", '[{"text": null}]', 'd.json, record 0: "text" is a NoneType'),
    "response is a list": ("d.jsonl", '{"prompt": "a", "response": ["b"]}', 'd.jsonl:1: "response" is a list'),
    "completion is null": ("d.jsonl", '{"prompt": "a", "completion": null}', 'd.jsonl:1: "response" is a NoneType'),
    "messages is a string": ("d.jsonl", '{"messages": "hi"}', 'd.jsonl:1: "messages" must be'),
    "no messages": ("d.jsonl", '{"messages": []}', 'd.jsonl:1: "messages" must be'),
    "a message is a string": ("d.jsonl", '{"messages": ["hi"]}', 'd.jsonl:1: "messages" must be'),
    "no role": ("d.jsonl", '{"messages": [{"content": "hi"}]}', 'd.jsonl:1: "messages" must be'),
    "no chat template": ("d.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}', "no chat template"),
    "half a character": ("d.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', "d.jsonl:2"),
    "nothing but empty text": ("d.jsonl", '{"text": ""}\n{"text": ""}', "d.jsonl: no record gives a single token"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_data_names_the_file_and_the_line(write, tokenizer, case):
    name, content, message = MALFORMED[case]
    with pytest.raises(DataError) as caught:
        draw(write(name, content), tokenizer)
    assert message in caught.value.message
    assert name in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_missing_files_and_folders(tmp_path, tokenizer):
    for path, why in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "holds no data files")):
        with pytest.raises(DataError, match=why) as caught:
            draw(path, tokenizer)
        assert str(path) in caught.value.message
        assert caught.value.hint


def test_a_chat_template_that_refuses(write):
    chat = [{"role": "system", "content": "hi"}]
    path = write("d.jsonl", [{"text": "a"}, {"messages": chat}])
    tokenizer = make_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"d\.jsonl:2: .*no system role") as caught:
        draw(path, tokenizer)
    assert caught.value.hint


def test_a_tokenizer_that_breaks_is_an_error_of_the_data(write):
    class Broken:
        chat_template = None

        def __call__(self, *_, **__):
            raise RuntimeError("whatever")

    with pytest.raises(DataError, match=r"d\.jsonl:1.*whatever"):
        draw(write("d.jsonl", [{"text": "a"}]), Broken())


@given(
    content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode),
    name=st.sampled_from(["jsonl", "json", "txt"]),
)
@settings(max_examples=200, deadline=None)
def test_no_data_breaks_the_reader(tmp_path_factory, tokenizer, content, name):
    path = tmp_path_factory.getbasetemp() / f"any.{name}"
    path.write_bytes(content)
    try:
        samples = draw(path, tokenizer)
    except DataError:
        return
    assert samples.num_tokens > 0


PARTS_TEMPLATE = (  # as LLaVA's own: a message's text is looked for in its parts, and a plain string has none
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, PARTS_TEMPLATE])
@pytest.mark.parametrize("content", ["Hi", [{"type": "text", "text": "Hi"}]])
def test_no_template_drops_the_text_of_a_message(write, template, content):
    path = write("data.jsonl", [{"messages": [{"role": "user", "content": content}]}])
    samples = draw(path, make_tokenizer(chat_template=template))
    assert text_of(drawn_ids(samples)[0]) == "<user>Hi"


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A folder with images, and what encodes its records."""
    from families import make_family_pair

    from tailorcli.models.loading import load_encoder

    folder = make_family_pair(tmp_path_factory.mktemp("llava"), "llava")
    return folder, load_encoder(folder / "tuned", folder / "tuned", True, CalibrateOptions())


def encode(llava, record):
    folder, encoder = llava
    (folder / "records.jsonl").write_text(json.dumps(record) + "\n")
    return encoder.encode(read_records(folder / "records.jsonl")[0], 2048)


def user(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


def test_images_beside_messages_go_to_their_parts(llava):
    named = user({"type": "image", "path": "images/1.png"}, {"type": "image", "path": "images/0.png"})
    beside = {"messages": user({"type": "image"}, {"type": "image"}), "images": ["images/1.png", "images/0.png"]}
    expected, found = encode(llava, {"messages": named}), encode(llava, beside)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": user(), "images": ["images/0.png"]}, "no image part"),
        ({"messages": [{"role": "user", "content": "What?"}], "images": ["images/0.png"]}, "no image part"),
        ({"messages": user({"type": "image"})}, "names None"),
        ({"messages": user({"type": "image_url", "image_url": {"url": "images/0.png"}})}, "'image_url'"),
        ({"messages": user({"type": "image", "path": "images/0.png"}, "What?")}, "a part of type None"),
        ({"images": []}, "has the fields"),
        ({"prompt": "a", "images": []}, "has the fields"),
    ],
)
def test_no_image_is_silently_left_out(llava, record, says):
    with pytest.raises(DataError, match=says):
        encode(llava, record)


def test_texts_beside_images_that_no_form_has_are_told(llava, caplog):
    record = {"image": "images/0.png", "width": 28, "caption": "A cup."}
    for known in (record | {"text": "A cup."}, record | {"prompt": "a", "response": "b"}, {"image": "images/0.png"}):
        encode(llava, known)
    assert not caplog.text
    encode(llava, record)
    encode(llava, record | {"question": "What?"})
    assert caplog.text.count("beside it 'caption', which is not read: name the text by --text-column") == 1


@pytest.mark.parametrize("name", ["images", "audio"])
def test_an_address_is_no_file(tmp_path, name):
    """Path makes http:/x.org of it."""
    with pytest.raises(DataError, match=r"address http://x\.org/a, and nothing is downloaded"):
        check_record("d.jsonl:1", {name: "http://x.org/a", "text": "a"}, tmp_path)


def test_images_are_turned_as_their_camera_noted(llava):
    from PIL import Image

    folder, _ = llava
    with Image.open(folder / "images" / "3.png") as upright:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise by a quarter
        upright.transpose(Image.Transpose.ROTATE_90).save(folder / "images" / "turned.png", exif=exif)
    found, expected = (encode(llava, {"images": [f"images/{name}.png"]}) for name in ("turned", "3"))
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_an_image_too_large_to_be_real_is_an_error_of_the_data(llava, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="cannot read the image"):
        encode(llava, {"images": ["images/0.png"]})


# --- calls of tools, special tokens in the text, cuts ---------------------------------------------------------

TOOLS_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ '' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}("
    "{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }}{% endfor %}){% endfor %}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def calling(turn, arguments=None):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments or {"city": "Oslo"}}}
    return [{"role": "user", "content": "Hm?"}, {"role": "assistant", "tool_calls": [call], **turn}]


@pytest.mark.parametrize("turn", [{"content": ""}, {"content": None}, {}], ids=["empty", "null", "absent"])
@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'], ids=["object", "JSON"])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "string"])
def test_tools_and_calls_of_them_reach_the_template(write, turn, arguments, tools):
    tokenizer = make_tokenizer(TOOLS_TEMPLATE)
    path = write("data.jsonl", [{"messages": calling(turn, arguments), "tools": tools}])
    ready = calling({"content": ""})
    assert texts(path, tokenizer) == [tokenizer.apply_chat_template(ready, tools=[TOOL], tokenize=False)]
    assert "weather(city=Oslo)" in texts(path, tokenizer)[0]


def test_a_template_that_leaves_tools_out_is_told_of(write, caplog):
    path = write("data.jsonl", [{"messages": calling({"content": ""}), "tools": [TOOL]}])
    draw(path, make_tokenizer(TEMPLATE))
    assert "does not write the tool 'weather'" in caplog.text


@pytest.mark.parametrize("tools", ["{", '{"a": 1}', 5, ["weather"]])
def test_tools_that_are_none_are_refused(write, tokenizer, tools):
    with pytest.raises(DataError, match=r"data\.jsonl:1: \"tools\"") as caught:
        draw(write("data.jsonl", [{"messages": calling({}), "tools": tools}]), tokenizer)
    assert "function" in caught.value.hint


MOOD = "{{ mood if mood is defined else 'plain' }}:{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("given", [{"mood": "glad", "none": None}, '{"mood": "glad"}'], ids=["object", "JSON"])
def test_what_a_record_gives_the_template_reaches_it(write, given):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [
        {"messages": turns, "chat_template_kwargs": given},
        {"question": "a", "answer": "b", "chat_template_kwargs": given},
        {"messages": turns, "chat_template_kwargs": None},
        {"messages": turns, "chat_template_kwargs": ""},
    ]
    path = write("data.jsonl", records)
    assert texts(path, make_tokenizer(MOOD)) == ["glad:ab", "glad:ab", "plain:ab", "plain:ab"]


@pytest.mark.parametrize("given", ["{", ["a"], 3, {"tokenize": True}, {"tools": []}])
def test_what_the_template_cannot_be_given_is_refused(write, tokenizer, given):
    turns = [{"role": "user", "content": "a"}]
    with pytest.raises(DataError, match=r"data\.jsonl:1: \"chat_template_kwargs\""):
        draw(write("data.jsonl", [{"messages": turns, "chat_template_kwargs": given}]), tokenizer)


def framed():
    """A tokenizer that puts <s> before a text and </s> after it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def test_special_tokens_that_stand_in_the_text_are_not_doubled(write):
    tokenizer = framed()
    expected = tokenizer("ab")["input_ids"]
    assert expected == [tokenizer.bos_token_id, *ids("ab"), tokenizer.eos_token_id]
    records = [{"text": "ab"}, {"text": "<s>ab"}, {"text": "<s>ab</s>"}, {"prompt": "<s>a", "response": "b"}]
    assert drawn_ids(draw(write("data.jsonl", records), tokenizer)) == [expected] * 4
    inside = drawn_ids(draw(write("more.jsonl", [{"text": "a<s>b"}]), tokenizer))
    assert inside == [tokenizer("a<s>b")["input_ids"]]  # only at the ends


def test_cuts_are_counted(write, tokenizer):
    path = write("data.jsonl", [{"text": "abcdefgh"}, {"text": "xy"}, {"text": "abcdef"}])
    encoder, options = Encoder(tokenizer), CalibrateOptions(seq_len=5)
    draw_samples(path, read_records(path), encoder.encode, options)
    assert sorted(encoder.cuts) == [(6, 5), (8, 5)]


RESPONSES = [
    ({"prompt": "Say it: ", "response": "yes, yes"}, ["yes, yes"]),
    ({"text": "no response", "prompt": "x", "response": "y"}, []),
    (
        {
            "messages": [
                {"role": "user", "content": "yes?"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "no?"},
                {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
            ]
        },
        ["yes<e>", "no<e>"],
    ),
]


@pytest.mark.parametrize(("fields", "expected"), RESPONSES)
def test_the_tokens_of_responses_are_found(fields, expected):
    template = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content if m.content is string else m.content[0].text }}<e>"
        "{% endfor %}"
    )
    tokenizer = make_tokenizer(template)
    encoder, record = Encoder(tokenizer), Record("here", fields)
    inputs = encoder.encode(record, 1000)
    runs = encoder.responses.runs(record, inputs)
    assert [
        "".join(tokenizer.convert_ids_to_tokens(inputs["input_ids"][0, first:last].tolist())) for first, last in runs
    ] == expected
    cut = encoder.encode(record, 3)
    assert all(last <= 3 for _, last in encoder.responses.runs(record, cut))


def test_sound_beyond_what_a_model_hears_is_told(tmp_path, caplog):
    from families import RATE, make_family_pair

    folder = make_family_pair(tmp_path, "whisper")  # which hears one second
    encoder = load_encoder(folder / "base", folder / "base", True, CalibrateOptions())
    record, told = {"response": "a"}, []
    for seconds in (1, 2, 2):
        with wave.open(str(folder / "long.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(bytes(2 * RATE * seconds))
        caplog.clear()
        encoder.encode(check_record("d.jsonl:1", record | {"audio": "long.wav"}, folder), 100)
        told.append(caplog.text)
    assert told[0] == told[2] == ""
    assert "the sound of d.jsonl:1" in told[1]
    assert "after 1 s is left out" in told[1]


def test_a_sound_may_be_its_bytes(tmp_path):
    """As an audio column of datasets has them."""
    from families import make_family_pair

    folder = make_family_pair(tmp_path, "whisper")
    encoder = load_encoder(folder / "base", folder / "base", True, CalibrateOptions())
    content = (folder / "audio" / "0.wav").read_bytes()

    def heard(audio):
        record = check_record("d.jsonl:1", {"audio": audio, "response": "a"}, folder)
        return encoder.encode(record, 100)["input_features"]

    for audio in ({"bytes": content, "path": "0.wav"}, {"path": "audio/0.wav"}, base64.b64encode(content).decode()):
        assert heard(audio).equal(heard("audio/0.wav"))
    for audio, says, hint in (
        ({"array": [0.0], "sampling_rate": 16000}, r"\['array', 'sampling_rate'\], expected bytes or a path", "bytes"),
        ({"bytes": b"fLaC"}, "cannot read the sound of 4 bytes", "convert it to PCM WAV"),
        ("none.wav", "cannot read the sound .*none.wav", "paths start at the data file"),
    ):
        with pytest.raises(DataError, match=says) as error:
            heard(audio)
        assert hint in error.value.hint


def test_sound_beside_a_text_is_refused_where_the_processor_takes_none(tmp_path):
    """Voxtral's."""

    class Processor(SimpleNamespace):
        def __call__(self, text):
            raise AssertionError

    processor = Processor(
        tokenizer=make_tokenizer(), feature_extractor=SimpleNamespace(sampling_rate=16000), audio_token="[AUDIO]"
    )
    messages = [{"role": "user", "content": [{"type": "audio", "path": "a.wav"}]}]
    for fields in ({"audio": "a.wav", "response": "a"}, {"messages": messages}):
        record = check_record("d.jsonl:1", fields, tmp_path)
        with pytest.raises(DataError, match="processor takes none beside a text"):
            Encoder(processor, takes_media=True).encode(record, 100)


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    """Qwen2-Audio's processor, which hears one second, and its data's folder."""
    from families import make_family_pair

    folder = make_family_pair(tmp_path_factory.mktemp("hearing"), "qwen2-audio")
    return folder, load_encoder(folder / "base", folder / "base", True, CalibrateOptions())


def heard(encoder, ids):
    """Tokens as text, a run of those of sound as one ~."""
    names = encoder.tokenizer.convert_ids_to_tokens(list(ids))
    return re.sub(r"(<\|AUDIO\|>)+", "~", "".join(names)).replace("<|audio_bos|>~<|audio_eos|>", "[~]")


def chat(*parts):
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "A cat."}]


SOUND, WORDS = "audio/0.wav", {"type": "text", "text": "Who?"}
ASKED = {"from": "human", "value": "<audio>\nWho?"}


@pytest.mark.parametrize(
    ("fields", "text", "learnt"),
    [
        ({"audio": SOUND, "prompt": "Q ", "response": "A."}, "Audio 1: [~]\nQ A.<|im_end|>", "A.<|im_end|>"),
        ({"audio": SOUND, "response": "A."}, "Audio 1: [~]\nA.<|im_end|>", "A.<|im_end|>"),
        (
            {"audio": [SOUND, "audio/1.wav"], "prompt": "Q ", "response": "A."},
            "Audio 1: [~]\nAudio 2: [~]\nQ A.<|im_end|>",
            "A.<|im_end|>",
        ),
        ({"audio": SOUND, "prompt": "Q <|AUDIO|> ", "response": "A."}, "Q ~ A.<|im_end|>", "A.<|im_end|>"),
        ({"audio": SOUND, "text": "<|AUDIO|>So."}, "~So.", "So."),
        (
            {"audios": [SOUND, "audio/1.wav"], "prompt": "Q <audio> <audio>", "response": "A."},
            "Q Audio 1: [~] Audio 2: [~]A.<|im_end|>",
            "A.<|im_end|>",
        ),
        ({"audio": SOUND, "question": "Who?", "answer": "A cat."}, None, "A cat.<|im_end|>\n"),
        ({"audio": SOUND, "instruction": "Who?", "input": "", "output": "A cat."}, None, "A cat.<|im_end|>\n"),
        ({"messages": chat({"type": "audio", "audio": SOUND}, WORDS)}, None, "A cat.<|im_end|>\n"),
        ({"messages": chat({"type": "audio", "path": SOUND, "audio": None}, WORDS)}, None, "A cat.<|im_end|>\n"),
        ({"messages": chat({"type": "audio", "url": SOUND}, WORDS)}, None, "A cat.<|im_end|>\n"),
        ({"audio": SOUND, "messages": chat({"type": "audio"}, WORDS)}, None, "A cat.<|im_end|>\n"),
        ({"audio": SOUND, "question": "<audio>\nWho?", "answer": "A cat."}, None, "A cat.<|im_end|>\n"),
        (
            {"audios": [SOUND], "conversations": [ASKED, {"from": "gpt", "value": "A cat."}]},
            None,
            "A cat.<|im_end|>\n",
        ),
    ],
)
def test_sound_stands_in_a_text(hearing, fields, text, learnt):
    folder, encoder = hearing
    record = check_record("d.jsonl:1", fields, folder)
    inputs = encode_example(record, encoder, 200)
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    framed = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nAudio 1: [~]\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
    )
    assert heard(encoder, ids.tolist()) == (text or framed)
    assert heard(encoder, labels[labels >= 0].tolist()) == learnt
    sounds = fields.get("audio", fields.get("audios", SOUND))
    assert len(inputs["input_features"]) == (len(sounds) if isinstance(sounds, list) else 1)
    assert record.files == [folder / name for name in (sounds if isinstance(sounds, list) else [sounds])]


def test_the_bytes_of_a_sound_may_be_a_part_of_a_message(hearing):
    folder, encoder = hearing
    content = base64.b64encode((folder / SOUND).read_bytes()).decode()
    named = encoder.encode(
        check_record("d:1", {"messages": chat({"type": "audio", "path": SOUND}, WORDS)}, folder), 200
    )
    for part in ({"audio": {"bytes": content, "path": None}}, {"url": f"data:audio/wav;base64,{content}"}):
        record = check_record("d:1", {"messages": chat({"type": "audio"} | part, WORDS)}, folder)
        assert all(value.equal(named[name]) for name, value in encoder.encode(record, 200).items())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"audio": SOUND, "prompt": "<|AUDIO|><|AUDIO|>", "response": "a"}, "has 1 sound, and its text marks 2"),
        ({"audio": [SOUND, SOUND], "prompt": "<|AUDIO|>", "response": "a"}, "has 2 sounds, and its text marks 1"),
        ({"messages": chat({"type": "audio", "path": SOUND}, {"type": "text", "text": "<|AUDIO|>"})}, "text marks 2"),
        ({"prompt": "<|AUDIO|>", "response": "a"}, r"marks a sound with '<\|AUDIO\|>' and names none"),
        ({"messages": chat({"type": "audio"})}, "a sound part names None"),
        ({"messages": chat({"type": "audio", "url": "http://x.org/a.wav"})}, "names 'http://x.org/a.wav'"),
        ({"messages": chat(WORDS), "audio": SOUND}, "no sound part of its messages stands for the sound"),
        ({"audio": "long.wav", "response": "a"}, r"has 1\.5 s, and the model hears 1 s"),
        ({"images": ["a.png"], "response": "a"}, "has images, and this model sees none"),
        ({"messages": chat({"type": "image", "path": "a.png"})}, "a part of type 'image'"),
        ({"audio": SOUND, "prompt": "a" * 200, "response": "a"}, None),
        ({"audio": SOUND, "prompt": "a" * 200 + "<|AUDIO|>", "response": "a"}, "tokens with its sound, more than"),
    ],
)
def test_no_sound_is_silently_left_out(hearing, fields, says):
    folder, encoder = hearing
    with wave.open(str(folder / "long.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(3 * 16000))
    record = check_record("d.jsonl:1", fields, folder)
    if says is None:  # what is cut is the text behind it
        inputs = encoder.encode(record, 100)
        assert inputs["input_ids"].shape == (1, 100)
        assert inputs["input_features"].shape == (1, 16, 100)
        return
    with pytest.raises(DataError, match=says):
        encoder.encode(record, 200)


def test_cutting_a_text_cuts_no_sound():
    """Whatever its numbers: 128 mel bands, and as many tokens."""
    features, mask = torch.ones(1, 8, 30), torch.ones(1, 8)
    inputs = {"input_ids": torch.ones(1, 8), "token_type_ids": torch.ones(1, 8), "input_features": features}
    cut = first_tokens(inputs | {"feature_attention_mask": mask}, 5)
    assert cut["input_ids"].shape == cut["token_type_ids"].shape == (1, 5)
    assert cut["input_features"] is features
    assert cut["feature_attention_mask"] is mask


def test_sound_for_a_model_that_hears_none_is_refused(llava):
    for fields in ({"audio": "a.wav", "prompt": "Q", "response": "a"}, {"messages": chat({"type": "audio"}, WORDS)}):
        with pytest.raises(DataError, match="has audio, and the model's folder holds no feature extractor"):
            encode(llava, fields)


def test_a_row_without_sound_is_text(tmp_path):
    for empty in ("", None, []):
        record = check_record("d.csv:1", {"audio": empty, "prompt": "Q", "response": "a"}, tmp_path)
        assert not record.has_media


def test_pictures_in_bfloat16_have_a_hash():
    """Llama 4's processor makes them so, and NumPy has no such numbers."""
    pixels = torch.arange(6.0).reshape(1, 6).bfloat16()
    assert inputs_digest([{"p": pixels}], []) == inputs_digest([{"p": pixels.clone()}], [])
    assert inputs_digest([{"p": pixels}], []) != inputs_digest([{"p": pixels + 1}], [])


def test_what_has_an_entry_for_each_token_goes_on_with_them():
    """Llama 3.2 Vision's mask of the pictures that a token sees, Kosmos-2's of their places, kinds of tokens."""
    ids = torch.ones(1, 3, dtype=torch.long)
    seen = torch.tensor([0, 0, 1]).reshape(1, 3, 1, 1).expand(1, 3, 2, 4)
    inputs = {"input_ids": ids, "cross_attention_mask": seen, "token_type_ids": ids * 0}
    inputs |= {"image_embeds_position_mask": ids, "pixel_values": torch.zeros(1, 3, 2, 2)}
    found = lengthened(inputs, torch.ones(1, 5, dtype=torch.long), kind=1)
    assert found["cross_attention_mask"].shape == (1, 5, 2, 4)
    assert found["cross_attention_mask"][0, :, 0, 0].tolist() == [0, 0, 1, 1, 1]
    assert found["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert found["image_embeds_position_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert found["pixel_values"].shape == (1, 3, 2, 2)


def test_what_a_model_writes_is_paligemmas_suffix_which_its_prompt_does_not_see(tmp_path):
    from families import make_family_pair

    from tailorcli.training.examples import encode_example

    folder = make_family_pair(tmp_path, "paligemma")
    encoder = load_encoder(folder / "base", folder / "base", True, CalibrateOptions())
    image = {"images": ["images/0.png"]}

    def learnt(**fields):
        record = check_record("here", {**image, **fields}, folder)
        example = encode_example(record, encoder, 64)
        labels = example["labels"][0]
        assert ((labels >= 0) == (example["token_type_ids"][0] == 1)).all()
        whole, answer = (
            encoder.tokenizer.decode(ids).replace(" ", "") for ids in (example["input_ids"][0], labels[labels >= 0])
        )
        assert encoder.responses.runs(record, example) in ([], [(int((labels < 0).sum()), len(labels))])
        return whole, answer

    asked = ("<image>" * 4 + "<bos>Q\nA<eos>", "A<eos>")
    assert learnt(prompt="Q", response="A") == learnt(prompt="<image>Q\n", response="A") == asked
    assert learnt(question="Q", answer="A") == asked
    assert learnt(text="<image>A")[1] == learnt(text="A")[1] == "A<eos>"
    asked_alone, _ = encoder.start(check_record("here", image | {"prompt": "Q", "response": ""}, folder), 64)
    assert not asked_alone["token_type_ids"].any()
    turns = [{"role": "user", "content": [{"type": "image", "path": "images/0.png"}]}]
    with pytest.raises(DataError, match="takes a prompt and what is written behind it"):
        encoder.encode(check_record("here", {"messages": turns}, folder), 64)
