"""The formats and forms that people's data have: written by the libraries themselves, read as the same records."""

import base64
import csv
import gzip
import io
import json
import os
import subprocess
import sys

import pytest
from helpers import make_tokenizer

from tailorcli.data.encoder import Encoder
from tailorcli.data.hub import parse_dataset
from tailorcli.data.records import read_records
from tailorcli.data.samples import draw_samples
from tailorcli.data.told import facts_of, first_sample, in_words
from tailorcli.errors import DataError
from tailorcli.options import CalibrateOptions, DataColumns

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")

PAIRS = [
    {"prompt": "2+2=", "response": "4"},
    {"prompt": 'a "quoted", one', "response": "of\ntwo lines"},
    {"prompt": "käse", "response": "☃"},
    {"prompt": "long", "response": "x" * 200_000},  # more than the csv module takes by itself
]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def as_jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def as_table(records, **how):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), **how)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def as_parquet(records):
    import pyarrow.parquet

    found = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), found, row_group_size=2)
    return found.getvalue()


WRITERS = {
    ".jsonl": as_jsonl,
    ".json": lambda records: json.dumps(records, indent=2).encode(),
    ".csv": as_table,
    ".tsv": lambda records: as_table(records, dialect="excel-tab"),
    ".parquet": as_parquet,
}
COMPRESSORS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": lambda content: (
        zstandard.ZstdCompressor().compress(content[:9]) + zstandard.ZstdCompressor().compress(content[9:])
    ),  # two frames, as appended files have
}


def fields_of(records, *names):
    return [{name: record.fields[name] for name in names or record.fields} for record in records]


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_records(tmp_path, suffix, compression):
    path = tmp_path / f"data{suffix}{compression}"
    path.write_bytes(COMPRESSORS[compression](WRITERS[suffix](PAIRS)))
    records = read_records(path)
    assert fields_of(records) == PAIRS
    assert fields_of(records) == PAIRS  # read again
    assert fields_of(records.take([2, 0])) == [PAIRS[2], PAIRS[0]]
    assert (len(records), dict(records.forms)) == (4, {"prompt and response": 4})


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("suffix", [*WRITERS, ".txt"])
def test_standard_input_is_told_by_its_beginning(monkeypatch, suffix, compression):
    content = b"a line\nanother\n" if suffix == ".txt" else WRITERS[suffix](PAIRS)
    stream = io.TextIOWrapper(io.BytesIO(COMPRESSORS[compression](content)))
    monkeypatch.setattr(sys, "stdin", stream)
    records = read_records("-")
    expected = [{"text": "a line"}, {"text": "another"}] if suffix == ".txt" else PAIRS
    assert fields_of(records) == fields_of(records) == expected
    assert records[0].where.startswith("standard input")


def test_a_folder_gives_the_records_of_its_files_in_order(tmp_path):
    (tmp_path / "more").mkdir()
    for name, record in (("b.jsonl.gz", PAIRS[1]), ("a.csv", PAIRS[0]), ("more/c.parquet", PAIRS[2])):
        suffix = next(suffix for suffix in WRITERS if suffix in name)
        (tmp_path / name).write_bytes(COMPRESSORS[".gz" if ".gz" in name else ""](WRITERS[suffix]([record])))
    for name in ("README.md", "LICENSE.txt", ".hidden.jsonl", "dataset_infos.json"):
        (tmp_path / name).write_text("{")
    records = read_records(tmp_path)
    assert fields_of(records) == [PAIRS[0], PAIRS[1], PAIRS[2]]
    assert records.num_files == 3
    first = records.digest
    (tmp_path / "a.csv").write_bytes(as_table(PAIRS[1:2]))
    assert read_records(tmp_path).digest != first


def test_of_a_folder_with_splits_the_training_data_is_taken_and_told(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("train-0.jsonl", "train-1.jsonl", "test-0.jsonl", "validation.jsonl")):
        (tmp_path / "data" / name).write_bytes(as_jsonl([{"text": str(number)}]))
    assert fields_of(read_records(tmp_path)) == [{"text": "0"}, {"text": "1"}]
    assert "test and validation is left" in caplog.text


def test_json_lines_under_the_name_json_are_read(tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(as_jsonl(PAIRS))
    assert fields_of(read_records(path)) == PAIRS


def test_a_table_of_turns_images_and_tools_loses_its_nulls(tmp_path):
    tool = {"type": "function", "function": {"name": "weather"}}
    call = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    rows = [
        {"messages": [{"role": "user", "content": "Hi", "tool_calls": None}], "images": None, "tools": None},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": call}], "images": [], "tools": [tool]},
    ]
    path = tmp_path / "d.parquet"
    path.write_bytes(as_parquet(rows))
    first, second = read_records(path)
    assert first.fields == {"messages": [{"role": "user", "content": "Hi"}]}
    assert second.fields["messages"] == [{"role": "assistant", "tool_calls": call}]
    assert second.fields["tools"] == [tool]


def test_json_lines_of_a_table_lose_the_nulls_of_other_forms(tmp_path):
    path = tmp_path / "d.jsonl"
    others = {"text": None, "messages": None, "conversations": None, "conversation": None}
    path.write_bytes(as_jsonl([others | {"prompt": "Q", "response": "A"}]))
    assert fields_of(read_records(path)) == [{"prompt": "Q", "response": "A"}]


# --- forms ----------------------------------------------------------------------------------------------------

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
EARLIER = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
AS_MESSAGES = {
    "prompt and completion of messages": ({"prompt": [USER], "completion": [ASSISTANT]}, [USER, ASSISTANT]),
    "ShareGPT conversations": ({"conversations": [HUMAN, GPT]}, [USER, ASSISTANT]),
    "system beside ShareGPT": ({"conversations": [HUMAN, GPT], "system": "S"}, [SYSTEM, USER, ASSISTANT]),
    "conversations of roles": ({"conversations": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "conversations as JSON": ({"conversations": json.dumps([HUMAN, GPT])}, [USER, ASSISTANT]),
    "calls of tools": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "3"},
            ]
        },
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}],
    ),
    "a pair behind ShareGPT": ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, [USER, ASSISTANT]),
    "a pair of turns": ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER]}, [USER, ASSISTANT]),
    "a pair of whole chats": ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, [USER, ASSISTANT]),
    "whole chats beside a prompt": ({"prompt": "Q", "chosen": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "whole chats beside turns": ({"prompt": [USER], "chosen": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    "system beside messages": ({"messages": [USER, ASSISTANT], "system": "S"}, [SYSTEM, USER, ASSISTANT]),
    "a system of its own": ({"messages": [SYSTEM, USER, ASSISTANT], "system": "T"}, [SYSTEM, USER, ASSISTANT]),
    "system beside turns": ({"prompt": [USER], "completion": [ASSISTANT], "system": "S"}, [SYSTEM, USER, ASSISTANT]),
    "system beside a pair": ({"prompt": [USER], "chosen": [ASSISTANT], "system": "S"}, [SYSTEM, USER, ASSISTANT]),
    "history beside messages": (
        {"messages": [USER, ASSISTANT], "history": [["q", "a"]]},
        [*EARLIER, USER, ASSISTANT],
    ),
    "history behind a system of its own": (
        {"messages": [SYSTEM, USER, ASSISTANT], "system": "T", "history": [["q", "a"]]},
        [SYSTEM, *EARLIER, USER, ASSISTANT],
    ),
    "history beside turns": (
        {"prompt": [USER], "completion": [ASSISTANT], "system": "S", "history": '[["q", "a"]]'},
        [SYSTEM, *EARLIER, USER, ASSISTANT],
    ),
    "history beside a pair": (
        {"prompt": [USER], "chosen": [ASSISTANT], "history": [["q", "a"]]},
        [*EARLIER, USER, ASSISTANT],
    ),
    "messages as JSON": ({"messages": json.dumps([USER, ASSISTANT])}, [USER, ASSISTANT]),
}


def one_record(tmp_path, record, **how):
    path = tmp_path / "d.jsonl"
    path.write_bytes(as_jsonl([record]))
    return read_records(path, **how)[0]


@pytest.mark.parametrize("case", AS_MESSAGES)
def test_turns_of_every_form_become_messages(tmp_path, case):
    record, expected = AS_MESSAGES[case]
    assert one_record(tmp_path, record).fields["messages"] == expected


AS_TEXT = {
    "prompt and completion": ({"prompt": "Q", "completion": "A"}, "QA"),
    "a pair of texts": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "QA"),
    "a pair without a prompt": ({"chosen": "QA", "rejected": "QB"}, "QA"),
    "question and answer": ({"question": "Q", "answer": "A"}, "Q\nA"),
    "instruction and output": ({"instruction": "Q", "output": "A"}, "Q\nA"),
    "instruction, input and output": ({"instruction": "Q", "input": "I", "output": "A"}, "Q\nI\nA"),
    "an empty input": ({"instruction": "Q", "input": "", "output": "A"}, "Q\nA"),
    "instruction, context, response": ({"instruction": "Q", "context": "C", "response": "A"}, "Q\nC\nA"),
    "system and history": (
        {"instruction": "Q", "output": "A", "system": "S", "history": [["q", "a"]]},
        "S\nq\na\nQ\nA",
    ),
    "a pair of instructions": ({"instruction": "Q", "chosen": "A", "rejected": "B"}, "Q\nA"),
}
FRAMED = {
    "question and answer": "<user>Q<assistant>A",
    "instruction, input and output": "<user>Q\nI<assistant>A",
    "system and history": "<system>S<user>q<assistant>a<user>Q<assistant>A",
    "prompt and completion": "QA",  # as it stands: its prompts hold their own frame
}


@pytest.mark.parametrize("case", AS_TEXT)
def test_pairs_of_every_name_become_a_text(tmp_path, case):
    record, expected = AS_TEXT[case]
    assert Encoder(make_tokenizer()).chat.text_of(one_record(tmp_path, record)) == expected


@pytest.mark.parametrize("case", FRAMED)
def test_a_chat_template_frames_a_question_and_its_answer(tmp_path, case):
    encoder = Encoder(make_tokenizer(TEMPLATE))
    ids = encoder.encode(one_record(tmp_path, AS_TEXT[case][0]), 99)["input_ids"][0]
    assert encoder.tokenizer.decode(ids).replace(" ", "").replace("<unk>", "\n") == FRAMED[case]


BESIDE = {
    "system": ({"system": "S"}, "<system>S"),
    "history": ({"history": [["Q", "A"]]}, "<user>Q<assistant>A"),  # words that the prompt has, too
    "system and history": ({"history": [["q", "a"]], "system": "S"}, "<system>S<user>q<assistant>a"),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("response", ["response", "completion", "chosen"])
def test_what_was_before_a_prompt_is_framed_or_refused(tmp_path, response, name):
    beside, framed = BESIDE[name]
    record = one_record(tmp_path, {"prompt": "Q", response: "A"} | beside)
    encoder = Encoder(make_tokenizer(TEMPLATE))
    inputs = encoder.encode(record, 99)
    decoded = encoder.tokenizer.decode(inputs["input_ids"][0]).replace(" ", "")
    assert decoded == f"{framed}<user>Q<assistant>A"
    assert encoder.responses.runs(record, inputs)[-1] == (len(decoded) - 1, len(decoded))
    named = name.replace(" and ", '" and "')
    for start in (None, 5):  # without a template, and with one that an encoder-decoder does not use
        encoder = Encoder(make_tokenizer(TEMPLATE if start else None), start)
        for call in (encoder.encode, encoder.start):
            with pytest.raises(DataError, match=f'd.jsonl:1 has "{named}" beside its prompt') as caught:
                call(record, 99)
            assert f'leave "{named}" out' in caught.value.hint
    for empty in ("", None, []):
        record = one_record(tmp_path, {"prompt": "Q", response: "A", "system": empty, "history": empty})
        assert Encoder(make_tokenizer(TEMPLATE)).chat.text_of(record) == "QA"


def test_named_columns_win_over_the_usual_names(tmp_path):
    record = {"text": "t", "body": "b", "q": "Q", "a": "A", "answer": "no", "input": "no"}
    found = one_record(tmp_path, record, columns=DataColumns(text="body"))
    assert (found.fields["text"], found.form) == ("b", "column body")
    found = one_record(tmp_path, record, columns=DataColumns(prompt="q", response="a"))
    assert Encoder(make_tokenizer()).chat.text_of(found) == "Q\nA"
    assert found.form == "columns q and a"
    found = one_record(tmp_path, {"question": "Q", "a": "A"}, columns=DataColumns(response="a"))
    assert Encoder(make_tokenizer()).chat.text_of(found) == "Q\nA"
    with pytest.raises(DataError, match=r"d\.jsonl:1 has no column 'bodi'; it has a, answer, body"):
        one_record(tmp_path, record, columns=DataColumns(text="bodi"))
    with pytest.raises(DataError, match='"n" is a int, expected a string'):
        one_record(tmp_path, {"n": 5}, columns=DataColumns(text="n"))


REFUSED = {
    "an unknown speaker": ({"conversations": [{"from": "narrator", "value": "x"}]}, "the turn .*narrator"),
    "no value": ({"conversations": [{"from": "human"}]}, "the turn"),
    "no turns": ({"conversations": []}, "must be a list of turns, got \\[\\]"),
    "turns of numbers": ({"conversations": [1]}, "must be a list of turns"),
    "an answer of a number": ({"question": "Q", "answer": 4}, '"answer" is a int'),
    "an odd history": ({"instruction": "a", "output": "b", "history": ["x"]}, '"history" must be'),
    "chosen is a number": ({"prompt": "Q", "chosen": 4}, '"chosen" must be a list of turns'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_form_that_is_broken_names_the_record_and_what_was_expected(tmp_path, case):
    record, message = REFUSED[case]
    with pytest.raises(DataError, match=rf"d\.jsonl:1.*{message}") as caught:
        one_record(tmp_path, record)
    assert caught.value.hint


TABLES = {
    "too few fields": ("d.csv", "prompt,response\na\n", "d.csv:2 has 1 fields, expected 2"),
    "behind two lines in one": ("d.csv", 'prompt,response\n"a\nb",c\nd\n', "d.csv:4 has 1 fields"),
    "an open quote": ("d.csv", 'prompt,response\n"a,b\n', "d.csv:2 is no row"),
    "a name twice": ("d.csv", "text,text\na,b\n", "names a column twice"),
    "semicolons": ("d.csv", "prompt;response\na;b\n", "has no column but 'prompt;response'"),
    "a header alone": ("d.csv", "text\n", "holds no records"),
    "commas in a .tsv": ("d.tsv", "prompt,response\na,b\n", "has no column but 'prompt,response'"),
    "bytes that are no text": ("d.csv", b"text\ncaf\xe9\n", "is not UTF-8 text (byte 8)"),
    "compressed by another name": ("d.jsonl", gzip.compress(b"{}"), "d.jsonl is compressed"),
    "Parquet by another name": ("d.csv", as_parquet(PAIRS[:1]), "d.csv is a Parquet file"),
    "half a .gz": ("d.jsonl.gz", gzip.compress(as_jsonl(PAIRS))[:60], "cannot read"),
    "half a .zst": ("d.jsonl.zst", COMPRESSORS[".zst"](as_jsonl(PAIRS))[:-9], "ends within a frame"),
    "half a .parquet": ("d.parquet", as_parquet(PAIRS)[:-20], "cannot read"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_is_broken_names_the_file_and_the_line(tmp_path, case):
    name, content, message = TABLES[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert message in caught.value.message
    assert name in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "package"), [("d.parquet", "pyarrow"), ("d.jsonl.zst", "zstandard"), ("org/name", "datasets")]
)
def test_a_missing_extra_is_named_and_the_rest_is_read_without(tmp_path, monkeypatch, name, package):
    monkeypatch.chdir(tmp_path)
    for suffix in (".jsonl", ".json", ".csv", ".tsv"):
        (tmp_path / f"plain{suffix}.gz").write_bytes(gzip.compress(WRITERS[suffix](PAIRS)))
    if "/" not in name:
        (tmp_path / name).write_bytes(b"x")
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=f"takes {package}, which is not installed") as caught:
        read_records(name)
    assert "tailorcli[data]" in caught.value.hint
    for file in sorted(tmp_path.glob("plain*")):
        assert fields_of(read_records(file)) == PAIRS


# --- images ---------------------------------------------------------------------------------------------------


def test_images_as_files_bytes_and_objects_of_datasets_are_the_same(tmp_path):
    from PIL import Image

    from tailorcli.data.media import read_image

    Image.new("RGB", (5, 4), (10, 200, 30)).save(tmp_path / "i.png")
    content = (tmp_path / "i.png").read_bytes()
    coded = base64.b64encode(content).decode()
    ways = ["i.png", coded, f"data:image/png;base64,{coded}", {"bytes": coded, "path": None}, {"path": "i.png"}]
    for way in ways:
        for record in ({"images": [way]}, {"image": way}):
            found = one_record(tmp_path, record)
            assert read_image(found.images[0], found.where).getpixel((0, 0)) == (10, 200, 30)
    (tmp_path / "d.parquet").write_bytes(as_parquet([{"image": {"bytes": content, "path": "x.png"}, "text": "t"}]))
    (found,) = read_records(tmp_path / "d.parquet")
    assert found.images == [content]
    assert found.form == "text with images"
    for part in ({"type": "image", "image": {"bytes": coded}}, {"type": "image_url", "image_url": {"url": ways[2]}}):
        found = one_record(tmp_path, {"messages": [{"role": "user", "content": [part]}]})
        assert found.fields["messages"][0]["content"] == [{"type": "image", "image": content}]


@pytest.mark.parametrize("image", [5, {"bytes": 5}, {"name": "x"}, "data:image/png,abc", {"bytes": "no base64!"}])
def test_an_image_that_is_none_is_refused(tmp_path, image):
    with pytest.raises(DataError, match=r'd\.jsonl:1: "images" must be'):
        one_record(tmp_path, {"images": [image], "text": "t"})


def test_the_marks_of_images_in_turns_become_their_parts(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, GPT]
    found = one_record(tmp_path, {"image": "i.png", "conversations": turns})
    assert found.fields["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert found.form == "ShareGPT conversations with images"


# --- datasets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name", ("org/name", None, None)),
        ("squad:train", ("squad", None, "train")),
        ("org/name:en", ("org/name", "en", None)),
        ("org/name:en:test", ("org/name", "en", "test")),
        ("org/name::test", ("org/name", None, "test")),
        ("org/name:train[:10%]", ("org/name", None, "train[:10%]")),
        ("org/name:en:train[5:10]", ("org/name", "en", "train[5:10]")),
    ],
)
def test_a_dataset_is_named_with_its_config_and_split(name, parts):
    assert parse_dataset(name) == parts


def test_a_folder_that_datasets_saved_is_read_with_its_images_as_they_were_stored(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    image = Image.new("RGB", (5, 4), (10, 200, 30))
    rows = {"prompt": ["Q", "R"], "completion": ["A", "B"], "image": [image, None]}
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.Value("string"), "image": datasets.Image()}
    )
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "two")
    for folder in ("one", "two", "two/test"):
        records = read_records(tmp_path / folder)
        assert fields_of(records, "prompt", "response")[-1] == {"prompt": "R", "response": "B"}
        assert len(records) == (1 if "test" in folder else 2)
    first = read_records(tmp_path / "one")[0]
    assert isinstance(first.images[0], bytes)
    assert records[0].images == []


def test_a_dataset_of_the_hub_is_read_from_its_cache(tmp_path):
    """In a process of its own: datasets and huggingface_hub ask where their caches are when they are imported."""
    pytest.importorskip("datasets")
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = tmp_path / "hub" / "datasets--org--name"
    snapshot = folder / "snapshots" / commit
    (snapshot / "data").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for split, count in (("train", 3), ("test", 1)):
        rows = [{"question": f"{split} {number}", "answer": "A", "more": None} for number in range(count)]
        (snapshot / "data" / f"{split}-00000-of-00001.parquet").write_bytes(as_parquet(rows))
    code = (
        "import json, sys; from tailorcli.data.records import read_records\n"
        "for name in sys.argv[1:]: found = read_records(name); print(json.dumps([found.digest, [(r.where, "
        "r.fields['prompt'], sorted(r.fields)) for r in found]]))"
    )
    names = ["org/name", "org/name:test", "org/name:train[1:2]", "org/name:default:test", "org/name"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {key: value for key, value in environment.items() if not key.startswith("HF_DATASETS")}
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [[prompt for _, prompt, _ in records] for _, records in found] == [
        ["train 0\n", "train 1\n", "train 2\n"],
        ["test 0\n"],
        ["train 1\n"],
        ["test 0\n"],
        ["train 0\n", "train 1\n", "train 2\n"],
    ]
    assert found[0][1][2] == ["org/name, record 2", "train 2\n", ["answer", "prompt", "question", "response"]]
    digests = [digest for digest, _ in found]
    assert digests[0] == digests[4]
    assert len(set(digests)) == 4 - (digests[1] == digests[3])


def test_a_name_that_no_path_and_no_dataset_has_is_one_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="org/none:train is no file or folder here") as caught:
        read_records("org/none:train")
    assert "hf download --repo-type dataset org/none" in caught.value.hint
    (tmp_path / "org" / "none:train").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no data files"):  # a path that is there wins
        read_records("org/none:train")


# --- what is told ---------------------------------------------------------------------------------------------


def test_form_records_tokens_and_cuts_are_told_in_a_line_and_the_first_sample_shown(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(as_jsonl([{"question": "2+2", "answer": "4" * 9}, {"text": "abc"}]))
    encoder, options = Encoder(make_tokenizer(TEMPLATE)), CalibrateOptions(seq_len=20)
    records = read_records(path)
    samples = draw_samples(path, records, encoder.encode, options)
    facts = facts_of(records, samples, encoder)
    assert in_words(facts) == (
        f"{path}: 2 records: 1 of question and answer, 1 of text, framed by the chat template; "
        "drawn 2, 23 tokens, 1 cut"
    )
    lines = first_sample(samples, encoder)
    assert lines[0].startswith("input_ids, ")
    assert lines[1].startswith("  | ")


@pytest.mark.parametrize(
    ("record", "label"),
    [
        ({"prompt": "Q", "completion": "A"}, "label"),
        ({"messages": [USER, ASSISTANT]}, "kto_tag"),
        ({"conversations": [HUMAN, GPT]}, "kto_tag"),
    ],
)
def test_completions_to_avoid_are_left_out(tmp_path, caplog, record, label):
    """Unpaired preferences, as KTO is trained on them; a text that has a label of another kind stays."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(as_jsonl([record | {label: wanted} for wanted in (True, False, False)]))
    assert len(read_records(path)) == 1
    assert "2 records of completions to avoid (label false) are left out" in caplog.text
    path.write_bytes(as_jsonl([{"text": "A", "label": False}, record]))
    assert len(read_records(path)) == 2
    path.write_bytes(as_jsonl([record | {label: False}]))
    with pytest.raises(DataError, match="holds no records"):
        read_records(path)
