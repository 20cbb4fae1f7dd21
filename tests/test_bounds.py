"""Files that would take for ever or all of the memory: one error each, within seconds."""

import json
import os
import shutil
import struct
import time
import wave
import zlib
from contextlib import contextmanager

import pytest
from helpers import make_adapter, make_tokenizer, refused, run

from tailorcli import Checkpoint, Stats, calibrate_model, patch_checkpoint
from tailorcli.adapters.checkpoint import open_tuned
from tailorcli.adapters.patterns import first_matches
from tailorcli.calibration.stats import MANIFEST
from tailorcli.data.encoder import Encoder
from tailorcli.data.media import read_image, read_wav
from tailorcli.data.records import Record
from tailorcli.data.timed import within
from tailorcli.data.tokens import TextTokens
from tailorcli.errors import CheckpointError, DataError, StatsError
from tailorcli.models.config import require_buildable, require_counts

SECONDS = 20  # on a busy machine; each takes a second or two, and without its bound minutes or all of the memory


@contextmanager
def soon(seconds=SECONDS):
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


@pytest.fixture
def pair(llama_pair, tmp_path):
    for name in ("base", "tuned", "stats"):
        shutil.copytree(llama_pair / name, tmp_path / name)
    shutil.copy(llama_pair / "data.jsonl", tmp_path)
    return tmp_path


def edit(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("layers", [10**9, 10**400, 50_000, float("inf"), [10**9]])
def test_a_config_cannot_count_more_layers_than_its_weights_have(pair, layers):
    edit(pair / "tuned" / "config.json", lambda config: config.update(num_hidden_layers=layers))
    with soon():
        refused(
            *("calibrate", pair / "tuned", "--data", pair / "data.jsonl", "-o", pair / "out"),
            mentions=[pair / "tuned", "" if layers is list else "num_hidden_layers"],
        )
        task = f"t={pair / 'data.jsonl'}:text"
        refused("evaluate", pair / "tuned", "--task", task, mentions=["num_hidden_layers"])


def test_the_counts_of_real_configs_pass(tmp_path):
    config = {
        **{"num_hidden_layers": 61, "n_routed_experts": 256, "num_attention_heads": 128, "rope_theta": 1e7},
        **{"vocab_size": 262_144, "max_position_embeddings": 1 << 23, "head_dim": 128, "layer_norm_eps": 1e-6},
        **{"id2label": {str(i): f"LABEL_{i}" for i in range(200_000)}, "label2id": {"LABEL_9": 200_000}},
        **{"vision_config": {"depth": 32, "spatial_merge_size": 2}, "depths": [2, 2, 18, 2], "image_token_id": 151_655},
        **{"max_window_layers": 70, "layer_types": ["full_attention"] * 61, "decoder_layerdrop": 0.0},
        **{"layer_rope_theta": [5e5, 0], "stage_out_channels": [512, 2048], "encoder_hash_byte_group_vocab": 500_002},
    }
    require_counts(tmp_path, config, 1 << 17)
    require_buildable(tmp_path, config, 512)


@pytest.mark.parametrize("count", [10**12, -1, True, 39, 41, 1e9])
def test_statistics_cannot_count_more_samples_than_they_hold(pair, count):
    held = json.loads((pair / "stats" / MANIFEST).read_text())["samples"]["count"]
    edit(pair / "stats" / MANIFEST, lambda manifest: manifest["samples"].update(count=count))
    with soon(), pytest.raises(StatsError, match="cannot read the samples"):
        Stats.open(pair / "stats").samples()
    edit(pair / "stats" / MANIFEST, lambda manifest: manifest["samples"].update(count=held))
    assert len(Stats.open(pair / "stats").samples()) == held


ENDLESS = ["(a+)+b", "(.*a){25}$x", "([a-z._]*)*!", "(a|a)(a|a)" * 20 + "!"]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_regular_expression_that_never_ends_is_given_up(pattern, monkeypatch):
    monkeypatch.setattr("tailorcli.adapters.patterns._SECONDS", 1.0)
    with soon():
        try:
            found = first_matches([pattern], ["a" * 60 + ".q_proj" * 3])
        except TimeoutError:
            return
        assert list(found.values()) == [None]  # one of these ends in some version of Python


def test_patterns_match_as_peft_matches_them():
    import re

    names = [f"model.layers.{i}.{part}_proj" for i in range(12) for part in ("self_attn.q", "mlp.down")]
    patterns = [
        "layers.1.mlp.down_proj",
        r".*layers\.(1[0-9]|2)\..*q_proj",
        "down_proj",
        "layers.[34].self_attn.q_proj",
    ]
    found = first_matches(patterns, names)
    for name in names:
        assert found[name] == next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)


def test_an_adapter_whose_pattern_never_ends_is_refused(tmp_path, monkeypatch):
    pair = make_adapter(tmp_path)
    monkeypatch.setattr("tailorcli.adapters.patterns._SECONDS", 1.0)
    config = pair / "adapter" / "adapter_config.json"
    for key in ("rank_pattern", "alpha_pattern"):
        edit(config, lambda settings, key=key: settings.update({key: {"([a-z]|[a-z0-9._]*)*!": 4}}))
        with Checkpoint.open(pair / "base") as base, soon(), pytest.raises(CheckpointError, match="does not end"):
            open_tuned(pair / "adapter", base)
        edit(config, lambda settings, key=key: settings.update({key: {}}))


LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


def test_a_chat_template_that_loops_is_stopped(monkeypatch):
    import threading

    monkeypatch.setattr("tailorcli.data.chat.SECONDS", 0.5)
    record = Record("d.jsonl:1", {"messages": [{"role": "user", "content": "hello"}]})
    before = threading.active_count()
    with soon(), pytest.raises(DataError, match=r"d\.jsonl:1.*does not end within"):
        Encoder(make_tokenizer(LOOP)).encode(record, 16)
    for _ in range(100):  # the thread ends, too: it is stopped, not left behind
        time.sleep(0.05)
        if threading.active_count() == before:
            break
    assert threading.active_count() == before
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert Encoder(make_tokenizer(plain)).encode(record, 16)["input_ids"].shape == (1, 5)


def test_a_limit_hands_on_what_a_call_gives_or_raises():
    assert within(5.0, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 / 0)
    with pytest.raises(TimeoutError):
        within(0.2, lambda: [None for _ in iter(int, 1)])


def test_a_long_line_is_cut_before_it_is_tokenised(pair, monkeypatch):
    monkeypatch.setattr("tailorcli.data.tokens._LONG", 4096)
    tokenizer, lengths = make_tokenizer(), []
    encoder = Encoder(lambda text, **how: (lengths.append(len(text)), tokenizer(text, **how))[1])
    text = "abcdefgh " * 100_000
    monkeypatch.setattr(TextTokens, "unframed", lambda self, text: text)
    cut = encoder.encode(Record("d:1", {"text": text}), 32)["input_ids"]
    assert cut.tolist() == [tokenizer(text[:32])["input_ids"]]
    assert lengths == [4096]
    assert encoder.cuts == [(len(text), 32)]  # here one token is one character
    assert encoder.tokens.exceed(Record("d:1", {}), [text], 32)
    assert not encoder.tokens.exceed(Record("d:1", {}), [text[:5000]], 5000)
    blank = Encoder(lambda text, **how: {"input_ids": list(range(text.count("x")))})  # drops what it does not know
    assert blank.encode(Record("d:1", {"text": "-" * 50_000 + "x" * 7}), 32)["input_ids"].shape == (1, 7)


def test_a_line_of_fifty_megabytes_is_calibrated_on_within_seconds(pair):
    (pair / "long.jsonl").write_text(json.dumps({"text": "word " * 10_000_000}) + "\n")
    with soon(60):
        run("calibrate", pair / "tuned", "--data", pair / "long.jsonl", "-o", pair / "out", "--seq-len", 64)
    with soon(60):
        task = f"t={pair / 'choices.jsonl'}:choice"
        record = {"prompt": "word " * 10_000_000, "choices": ["a", "b"], "answer": 0}
        (pair / "choices.jsonl").write_text(json.dumps(record) + "\n")
        refused("evaluate", pair / "tuned", "--task", task, mentions=["none of its 1 items"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "extra.txt"])
def test_a_pipe_in_a_model_s_folder_is_refused_and_not_waited_for(pair, name):
    (pair / "tuned" / name).unlink(missing_ok=True)
    os.mkfifo(pair / "tuned" / name)
    with soon():
        refused(
            *("calibrate", pair / "tuned", "--data", pair / "data.jsonl", "-o", pair / "out"),
            mentions=[pair / "tuned" / name, "a pipe or a device"],
        )
        refused(
            *("patch", pair / "base", pair / "tuned", "--stats", pair / "stats", "-o", pair / "out"),
            mentions=[pair / "tuned" / name, "a pipe or a device"],
        )


def test_pipes_and_devices_are_no_data_weights_or_statistics(pair):
    os.mkfifo(pair / "pipe.jsonl")
    (pair / "zero.jsonl").symlink_to("/dev/zero")
    with soon():
        for name in ("pipe.jsonl", "zero.jsonl"):
            data = pair / name
            command = ("calibrate", pair / "tuned", "--data", data, "-o", pair / "out")
            refused(*command, mentions=[data, "pipe or a device"])
        (pair / "stats" / MANIFEST).unlink()
        os.mkfifo(pair / "stats" / MANIFEST)
        refused("inspect", pair / "stats", mentions=["a pipe or a device"])
        (pair / "tuned" / "model.safetensors").unlink()
        os.mkfifo(pair / "tuned" / "model.safetensors")
        refused("inspect", pair / "tuned", mentions=["a pipe or a device"])


def png(path, width, height):
    """A picture of one colour: as small a file as there can be for so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" * (1 + -(-width // 8))
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def test_an_image_too_large_to_decode_is_refused_by_its_header(tmp_path):
    png(tmp_path / "large.png", 13_000, 13_000)
    png(tmp_path / "small.png", 40, 30)
    with soon(2), pytest.raises(DataError, match=r"13,000 x 13,000 pixels") as error:
        read_image(tmp_path / "large.png", "d:1")
    assert str(tmp_path / "large.png") in error.value.message
    assert read_image(tmp_path / "small.png", "d:1").size == (40, 30)


def test_an_image_is_a_file_of_pixels(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with soon():
        for name, why in (("pipe.png", "pipe or a device"), ("program.png", "EPS"), ("a\0.png", "can have this name")):
            with pytest.raises(DataError, match=why):
                read_image(tmp_path / name, "d:1")


def test_a_sound_holds_what_its_file_holds(tmp_path):
    file = tmp_path / "s.wav"
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(2)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(b"\1\0" * 200)
    assert read_wav(file, 16_000, "d:1").shape == (100,)
    whole = file.read_bytes()
    at = whole.index(b"data") + 4
    file.write_bytes(whole[:at] + struct.pack("<I", 0xFFFFFFF0) + whole[at + 4 : -3])  # claims 4 GB, ends in a frame
    assert read_wav(file, 16_000, "d:1").shape == (99,)
    os.mkfifo(tmp_path / "pipe.wav")
    for name in ("pipe.wav", "a\0.wav", "\ud800.wav"):
        with soon(), pytest.raises(DataError, match="cannot read the sound"):
            read_wav(tmp_path / name, 16_000, "d:1")


def test_what_is_whole_still_passes(pair):
    calibrate_model(pair / "tuned", pair / "data.jsonl", pair / "new")
    assert patch_checkpoint(pair / "base", pair / "tuned", pair / "out", pair / "new").totals["kept"] > 0
