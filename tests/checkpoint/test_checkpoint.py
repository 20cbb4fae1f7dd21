"""Safetensors headers and indexes: what is sound opens and reads right, whatever lies is refused and named."""

import json
import os
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from helpers import bits, make_model, mutate_bytes, mutate_json
from safetensors.torch import save_file

from tailorcli.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint, side_files
from tailorcli.checkpoint.header import read_header
from tailorcli.errors import CheckpointError, TailorError
from tailorcli.files import read_json


def write_raw(path, header, data=b""):
    """A safetensors file with any header: a dict, or its very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(call, *args, mentions=()):
    """The error of a call that must be refused, with a hint and these words in its message."""
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    for word in mentions:
        assert str(word) in caught.value.message
    assert caught.value.hint
    return caught.value


# --- one file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "float8_e4m3fn"],
)
def test_reads_what_the_safetensors_library_wrote(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(getattr(torch, dtype))
        for name, shape in (("matrix", (3, 5)), ("scalar", ()), ("none", (0, 4)), ("vector", (7,)))
    }
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            found = checkpoint.read(name)
            assert found.shape == tensor.shape
            assert found.dtype == tensor.dtype
            assert bits(found) == bits(tensor)


def test_an_unaligned_header_and_an_empty_file_are_sound(tmp_path):
    data = struct.pack("<2f", 1.5, -2.0)
    file = write_raw(tmp_path / SINGLE_FILE, json.dumps({"a": entry([2], [0, 8])}).encode() + b" ", data)
    assert file.stat().st_size % 8
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read("a").tolist() == [1.5, -2.0]
    assert read_header(write_raw(tmp_path / "empty.safetensors", {})) == ({}, {})
    assert read_header(write_raw(file, {"__metadata__": {"format": "pt"}}))[1] == {"format": "pt"}


def test_a_dtype_that_torch_lacks_is_listed_but_not_read(tmp_path):
    write_raw(tmp_path / SINGLE_FILE, {"packed": entry([4], [0, 2], "F4")}, b"ab")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors["packed"].nbytes == 2
        refusal(checkpoint.read, "packed", mentions=["packed", "F4"])


EIGHT = b"\0" * 8
ONE = entry([2], [0, 8])
HEADERS = {
    "not JSON": (b"{]", b"", "not JSON"),
    "not UTF-8": (b'{"a\xff": {}}', b"", "not JSON"),
    "UTF-16": (json.dumps({"a": ONE}).encode("utf-16"), EIGHT, "not JSON"),
    "nested too deep": (b"[" * 200_000, b"", "not JSON"),
    "a huge number": (b'{"a": ' + b"9" * 5000 + b"}", b"", "not JSON"),
    "a list": ([], b"", "not a JSON object"),
    "null": (b"null", b"", "not a JSON object"),
    "metadata is a list": ({"__metadata__": ["pt"]}, b"", "__metadata__"),
    "entry is a number": ({"a": 5}, b"", "'a'"),
    "entry is null": ({"a": None}, b"", "'a'"),
    "entry is a list": ({"a": [1, 2]}, b"", "'a'"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT, "'a' has the unknown dtype None"),
    "unknown dtype": ({"a": entry([2], [0, 8], "F32X")}, EIGHT, "'a' has the unknown dtype 'F32X'"),
    "dtype is a list": ({"a": entry([2], [0, 8], ["F32"])}, EIGHT, "'a' has the unknown dtype"),
    "dtype is an object": ({"a": entry([2], [0, 8], {})}, EIGHT, "'a' has the unknown dtype"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT, "'a' has the shape None"),
    "shape is a number": ({"a": entry(2, [0, 8])}, EIGHT, "'a' has the shape 2"),
    "negative shape": ({"a": entry([-2], [0, 8])}, EIGHT, "'a' has the shape [-2]"),
    "two negative sizes": ({"a": entry([-1, -2], [0, 8])}, EIGHT, "'a' has the shape"),
    "float shape": ({"a": entry([2.0], [0, 8])}, EIGHT, "'a' has the shape [2.0]"),
    "boolean shape": ({"a": entry([True, 2], [0, 8])}, EIGHT, "'a' has the shape"),
    "absurd shape": ({"a": entry([1 << 63], [0, 8])}, EIGHT, "'a' has the shape"),
    "overflowing shape": ({"a": entry([1 << 61, 1 << 61], [0, 8])}, EIGHT, "'a' has the shape"),
    "absurd shape of nothing": ({"a": entry([0, 1 << 61, 1 << 61], [0, 0])}, b"", "'a' has the shape"),
    "too many dimensions": ({"a": entry([1 << 61] * 100_000, [0, 8])}, EIGHT, "'a' has the shape"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, EIGHT, "'a' has the data_offsets None"),
    "one offset": ({"a": entry([2], [8])}, EIGHT, "'a' has the data_offsets [8]"),
    "three offsets": ({"a": entry([2], [0, 8, 8])}, EIGHT, "'a' has the data_offsets"),
    "float offsets": ({"a": entry([2], [0.0, 8.0])}, EIGHT, "'a' has the data_offsets"),
    "boolean offsets": ({"a": entry([1], [False, True], "U8")}, b"x", "'a' has the data_offsets"),
    "string offsets": ({"a": entry([2], ["0", "8"])}, EIGHT, "'a' has the data_offsets"),
    "negative offsets": ({"a": entry([2], [-8, 0])}, EIGHT, "'a' has the data_offsets"),
    "offsets backwards": ({"a": entry([2], [8, 0])}, EIGHT, "'a' has the data_offsets"),
    "absurd offsets": ({"a": entry([2], [1 << 80, (1 << 80) + 8])}, EIGHT, "'a' has the data_offsets"),
    "wrong number of bytes": ({"a": entry([3], [0, 8])}, EIGHT, "'a' has 8 bytes, its shape and dtype need 12"),
    "beyond the end": ({"a": entry([4], [0, 16])}, EIGHT, "truncated"),
    "far beyond the end": ({"a": entry([1 << 40], [0, 1 << 42])}, EIGHT, "truncated"),
    "starts late": ({"a": entry([1], [4, 8])}, EIGHT, "'a' starts"),
    "a hole": ({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, EIGHT + b"\0" * 4, "'b' starts"),
    "overlapping": ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, EIGHT + b"\0" * 4, "'b' starts"),
    "the same bytes twice": ({"a": ONE, "b": ONE}, EIGHT, "'b' starts"),
    "bytes left over": ({"a": ONE}, EIGHT + b"x", "longer than its header says"),
    "a tensor twice": (b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2), EIGHT, "'a' twice"),
    "a field twice": (b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}', EIGHT, "twice"),
    "a name that is no text": (b'{"\\ud800": %s}' % json.dumps(ONE).encode(), EIGHT, "\\ud800"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_lying_header_is_refused(tmp_path, case):
    header, data, why = HEADERS[case]
    file = write_raw(tmp_path / SINGLE_FILE, header, data)
    started = time.process_time()
    error = refusal(read_header, file, mentions=[file, why])
    assert time.process_time() - started < 2
    assert len(error.message) < 1000
    assert "\n" not in error.message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02\0\0",
        struct.pack("<Q", 0),
        struct.pack("<Q", 0) + b"{}",
        struct.pack("<Q", 1) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        b"PK\x03\x04 a zip archive, as torch.save writes",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1024\n",
        b"<!DOCTYPE html><html>404</html>",
    ],
)
def test_no_safetensors_file_at_all(tmp_path, content):
    (tmp_path / SINGLE_FILE).write_bytes(content)
    refusal(read_header, tmp_path / SINGLE_FILE, mentions=[tmp_path / SINGLE_FILE, "header claims"])


def test_a_header_beyond_the_format_s_limit_is_not_read(tmp_path):
    file = tmp_path / SINGLE_FILE
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(300_000_000)  # sparse: takes no room
    started = time.process_time()
    refusal(read_header, file, mentions=["200000000"])
    assert time.process_time() - started < 1


def test_every_truncation_is_noticed(tmp_path):
    save_file({"a": torch.zeros(3, 4), "b": torch.ones(5)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / SINGLE_FILE).write_bytes(whole[:length])
        refusal(Checkpoint.open, tmp_path, mentions=[SINGLE_FILE])


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / SINGLE_FILE)
    with Checkpoint.open(tmp_path) as checkpoint:
        os.truncate(tmp_path / SINGLE_FILE, 200)
        refusal(checkpoint.read, "a", mentions=[SINGLE_FILE, "'a'"])


def test_unreadable_files(tmp_path):
    refusal(read_header, tmp_path / "missing.safetensors", mentions=["missing.safetensors", "No such file"])
    (tmp_path / SINGLE_FILE).mkdir()
    refusal(Checkpoint.open, tmp_path, mentions=[SINGLE_FILE, "Is a directory"])


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_forbidden_files(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / SINGLE_FILE)
    (tmp_path / SINGLE_FILE).chmod(0)
    refusal(Checkpoint.open, tmp_path, mentions=[SINGLE_FILE, "Permission denied"])
    tmp_path.chmod(0)
    try:
        refusal(Checkpoint.open, tmp_path, mentions=[tmp_path, "Permission denied"])
    finally:
        tmp_path.chmod(0o700)


def test_a_forbidden_folder_is_one_error(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    refusal(Checkpoint.open, tmp_path, mentions=[tmp_path, "Permission denied"])


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[1]", b"5", b"[" * 100_000])
def test_broken_json_names_its_file(tmp_path, text):
    (tmp_path / "some.json").write_bytes(text)
    refusal(read_json, tmp_path / "some.json", mentions=[tmp_path / "some.json"])


# --- shards and their index -----------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of three shards."""
    make_model().save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    return tmp_path / "model"


def change_index(folder, change):
    index = json.loads((folder / INDEX_FILE).read_text())
    index = change(index) or index
    (folder / INDEX_FILE).write_text(json.dumps(index))


def shard_of(folder, name):
    return json.loads((folder / INDEX_FILE).read_text())["weight_map"][name]


def test_sharding_changes_neither_tensors_nor_fingerprint(tmp_path, sharded):
    make_model().save_pretrained(tmp_path / "single")
    with Checkpoint.open(tmp_path / "single") as single, Checkpoint.open(sharded) as other:
        assert len(other.shards) == 3
        assert set(single.tensors) == set(other.tensors)
        assert single.fingerprint() == other.fingerprint()
        assert all(bits(single.read(name)) == bits(other.read(name)) for name in single.tensors)
    with Checkpoint.open(tmp_path / "single") as single:
        info = single.tensors["model.norm.weight"]
    with info.file.open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(b"\x01")
    with Checkpoint.open(tmp_path / "single") as single, Checkpoint.open(sharded) as other:
        assert single.fingerprint() != other.fingerprint()


def test_shards_in_subfolders_and_behind_links_open(sharded, tmp_path):
    file = shard_of(sharded, "model.norm.weight")
    (sharded / "deep").mkdir()
    (sharded / file).rename(tmp_path / "blob")  # as the hub's cache keeps them
    (sharded / "deep" / file).symlink_to(tmp_path / "blob")

    def move(index):
        for name, shard in index["weight_map"].items():
            if shard == file:
                index["weight_map"][name] = f"deep/{file}"

    change_index(sharded, move)
    with Checkpoint.open(sharded) as checkpoint:
        assert checkpoint.read("model.norm.weight").tolist() == [1.0] * 32


def test_a_missing_shard_is_named(sharded):
    file = shard_of(sharded, "model.norm.weight")
    (sharded / file).unlink()
    refusal(Checkpoint.open, sharded, mentions=[INDEX_FILE, file, "missing"])


@pytest.mark.parametrize(
    "outside",
    ["../{}", "/etc/passwd", "a/../../{}", "..", "", ".", "{}.txt", ".hidden/{}", "a\0b.safetensors"],
)
def test_an_index_stays_in_its_folder(sharded, outside):
    (sharded.parent / "evil.safetensors").write_bytes(b"")
    change_index(sharded, lambda index: index["weight_map"].update(extra=outside.format("evil.safetensors")))
    refusal(Checkpoint.open, sharded, mentions=[INDEX_FILE])


def test_a_shard_whose_name_no_disk_can_hold(sharded):
    change_index(sharded, lambda index: index["weight_map"].update(extra="x" * 5000 + ".safetensors"))
    refusal(Checkpoint.open, sharded, mentions=[sharded])


@pytest.mark.parametrize("value", [None, 5, True, ["a"], {"a": 1}])
def test_an_index_names_its_shards_by_strings(sharded, value):
    change_index(sharded, lambda index: index["weight_map"].update(extra=value))
    refusal(Checkpoint.open, sharded, mentions=[INDEX_FILE])


@pytest.mark.parametrize("value", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "x"}, {"weight_map": 5}])
def test_an_index_has_a_weight_map(sharded, value):
    change_index(sharded, lambda _: value)
    (sharded / INDEX_FILE).write_text(json.dumps(value))
    refusal(Checkpoint.open, sharded, mentions=[INDEX_FILE, "weight_map"])


def test_index_and_shards_must_agree(sharded):
    name, other = "model.norm.weight", "model.embed_tokens.weight"
    whole = (sharded / INDEX_FILE).read_text()
    assert shard_of(sharded, name) != shard_of(sharded, other)

    change_index(sharded, lambda index: index["weight_map"].update(ghost=shard_of(sharded, name)))
    refusal(Checkpoint.open, sharded, mentions=["ghost", "no shard holds"])

    (sharded / INDEX_FILE).write_text(whole)
    change_index(sharded, lambda index: index["weight_map"].pop(name) and None)
    refusal(Checkpoint.open, sharded, mentions=[name, shard_of(sharded, "model.layers.1.mlp.down_proj.weight")])

    (sharded / INDEX_FILE).write_text(whole)
    change_index(sharded, lambda index: index["weight_map"].update({name: shard_of(sharded, other)}))
    refusal(Checkpoint.open, sharded, mentions=[name])


def test_a_truncated_shard_is_named(sharded):
    file = sharded / shard_of(sharded, "model.norm.weight")
    os.truncate(file, file.stat().st_size - 1)
    refusal(Checkpoint.open, sharded, mentions=[file, "truncated"])


# --- folders --------------------------------------------------------------------------------------------------


def test_folders_without_weights_are_told_apart(tmp_path):
    refusal(Checkpoint.open, tmp_path / "nowhere", mentions=["nowhere", "not there"])
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    refusal(Checkpoint.open, file, mentions=["GGUF"])
    (tmp_path / "model.safetensors.txt").write_text("no folder")
    refusal(Checkpoint.open, tmp_path / "model.safetensors.txt", mentions=["a file, not a folder"])
    folder = tmp_path / "folder"
    folder.mkdir()
    refusal(Checkpoint.open, folder, mentions=[SINGLE_FILE])
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "safe_serialization" in refusal(Checkpoint.open, folder, mentions=["pickled"]).hint
    (folder / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in refusal(Checkpoint.open, folder, mentions=["adapter"]).hint


def test_side_files_are_what_a_loader_looks_for(tmp_path):
    kept = [
        *("config.json", "chat_template.jinja", "modeling_own.py", "tokenizer.model", "templates/one.jinja"),
        *("generation_config.json", "preprocessor_config.json", "processor_config.json", "vocab.json", "merges.txt"),
        *("special_tokens_map.json", "added_tokens.json", "tokenizer_config.json", "spiece.model", "source.spm"),
        *("video_preprocessor_config.json", "tekken.json", "qwen.tiktoken", "bpe.codes", "sentencepiece.bpe.model"),
        *("additional_chat_templates/tool.jinja", "1_Pooling/config.json", "modules.json", "LICENSE", "README.md"),
    ]
    left = [
        *("model.safetensors", INDEX_FILE, "pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.gguf"),
        *("trainer_state.json", "tailor_run.json", "tailor_report.json", "x.safetensors.part", ".gitattributes"),
        *("optimizer_0/__0_0.distcp", "model.onnx", "onnx/model.onnx_data", "onnx/config.json", "rust_model.ot"),
        *(
            "64.tflite",
            "data.pkl",
            "all_results.json",
            "train.log",
            "stats/manifest.json",
            "stats/hessians.safetensors",
        ),
        *(
            "stats/samples.safetensors",
            "wandb.txt",
            "notes.txt",
            "scheduler.pt",
            "rng_state.pth",
            "events.out.tfevents",
        ),
        *("checkpoint-500/config.json", ".cache/x.json", ".tailorcli/journal.jsonl", "original/params.json"),
    ]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert sorted(map(str, side_files(tmp_path))) == sorted(kept)


# --- anything at all ------------------------------------------------------------------------------------------


def test_no_header_breaks_the_reader(tmp_path):
    """Thousands of damaged files: each opens and reads to its last tensor, or raises CheckpointError, quickly."""
    tensors = {"a": torch.zeros(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    whole = (tmp_path / "whole.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    generator = random.Random(0)
    opened, messages = 0, []
    for number in range(1200):
        file = tmp_path / SINGLE_FILE
        if number % 2:
            file.write_bytes(mutate_bytes(whole, generator, 8 + length))
        else:
            header = json.loads(whole[8 : 8 + length])
            for _ in range(generator.randrange(1, 3)):
                header = mutate_json(header, generator)
            write_raw(file, header, whole[8 + length :])
        started = time.process_time()
        try:
            with Checkpoint.open(tmp_path) as checkpoint:
                checkpoint.fingerprint()
                for name, info in checkpoint.tensors.items():
                    assert checkpoint.read(name).shape == info.shape
            opened += 1
        except TailorError as error:
            messages.append(error.message)
        assert time.process_time() - started < 2, number
    assert 0 < opened < 600
    assert all(SINGLE_FILE in message or "torch cannot hold" in message for message in messages)


def test_no_index_breaks_the_reader(sharded):
    whole = (sharded / INDEX_FILE).read_bytes()
    generator = random.Random(0)
    messages = []
    for number in range(400):
        if number % 2:
            (sharded / INDEX_FILE).write_bytes(mutate_bytes(whole, generator, len(whole)))
        else:
            (sharded / INDEX_FILE).write_text(json.dumps(mutate_json(json.loads(whole), generator)))
        try:
            Checkpoint.open(sharded).close()
        except TailorError as error:
            messages.append(error.message)
    assert len(messages) > 100
    assert all(INDEX_FILE in message for message in messages)


def test_a_name_in_two_shards_that_no_index_tells_apart_is_refused(tmp_path):
    for number in (1, 2):
        save_file({"a": torch.full((2,), number)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="both hold tensor 'a'"):
        Checkpoint.open(tmp_path)
