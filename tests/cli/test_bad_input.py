"""What users get wrong, through the command line: one error that names the culprit and what to try, exit code 1,
and nothing left behind that loads as a finished result."""

import errno
import json
import os
import pickle
import shlex
import shutil
import struct
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_nothing_loads,
    folder_digest,
    invoke,
    make_model,
    make_pair,
    make_tokenizer,
    perturb,
    refused,
    run,
)
from launcher import completed
from safetensors.torch import load_file, save_file

from tailorcli import (
    CalibrateOptions,
    Checkpoint,
    FinetuneOptions,
    PatchFile,
    PatchOptions,
    Stats,
    TailorError,
    apply_patch,
    calibrate_model,
    distill_checkpoint,
    evaluate_models,
    finetune_model,
    patch_checkpoint,
    probe_model,
    run_sweep,
    tailor,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def pair(llama_pair, tmp_path):
    """A copy of the tiny pair with its data and statistics, to damage."""
    for name in ("base", "tuned", "stats"):
        shutil.copytree(llama_pair / name, tmp_path / name)
    shutil.copy(llama_pair / "data.jsonl", tmp_path)
    return tmp_path


def patch_command(pair, *extra):
    return ["patch", pair / "base", pair / "tuned", "--stats", pair / "stats", "-o", pair / "out", *extra]


def score_command(pair, *extra):
    return ["score", pair / "base", pair / "tuned", "--stats", pair / "stats", *extra]


def calibrate_command(pair, *extra, data="data.jsonl"):
    return ["calibrate", pair / "tuned", "--data", pair / data, "-o", pair / "out", *extra]


def edit_tensors(folder, change):
    """Change the dict of a checkpoint's tensors, or put what ``change`` returns in its stead."""
    tensors = load_file(folder / WEIGHTS)
    result = change(tensors)
    save_file(result if result is not None else tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(path, change):
    value = json.loads(path.read_text())
    result = change(value)
    path.write_text(json.dumps(result if result is not None else value))


# --- checkpoints that cannot be read --------------------------------------------------------------------------


def shard(folder):
    """Save the checkpoint again in two shards; returns their names."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = {"a.safetensors": {NORM: tensors.pop(NORM)}, "b.safetensors": tensors}
    for name, part in parts.items():
        save_file(part, folder / name)
    weight_map = {tensor: name for name, part in parts.items() for tensor in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def lie(folder, header):
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)


def no_shard(folder):
    shard(folder)
    (folder / "a.safetensors").unlink()


def outside(folder):
    shard(folder)
    shutil.move(folder / "a.safetensors", folder.parent / "a.safetensors")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: "../a.safetensors"}))


def disagreeing(folder):
    shard(folder)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: "b.safetensors"}))


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("x")


def only_a_pickle(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def an_adapter(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


DAMAGES = {
    "missing": (shutil.rmtree, "not there"),
    "a file": (a_file, "is a file, not a folder"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"neither {WEIGHTS} nor {INDEX}"),
    "a folder for a file": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "Is a directory"),
    "no safetensors": (lambda folder: (folder / WEIGHTS).write_text("<html>404</html>"), f"{WEIGHTS} is not a sound"),
    "truncated": (lambda folder: os.truncate(folder / WEIGHTS, 50_000), "truncated: expected"),
    "lying": (lambda folder: lie(folder, {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), "need 12"),
    "header of a list": (lambda folder: lie(folder, ["F32"]), "not a JSON object"),
    "index is no JSON": (lambda f: (shard(f), (f / INDEX).write_text("{")), f"{INDEX} is not JSON"),
    "index without map": (lambda f: (shard(f), (f / INDEX).write_text("{}")), "has no weight_map"),
    "a missing shard": (no_shard, "'a.safetensors', which is missing"),
    "a shard outside": (outside, "no .safetensors file inside its folder"),
    "index and shard disagree": (disagreeing, NORM),
    "a pickle": (only_a_pickle, "pickled weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_every_command(pair, damage):
    break_it, why = DAMAGES[damage]
    break_it(pair / "tuned")
    mentions = [pair / "tuned", why]
    out = pair / "out"
    refused(*patch_command(pair), mentions=mentions, output=out)
    refused(*patch_command(pair, "--dry-run"), mentions=mentions, output=out)
    refused(*score_command(pair), mentions=mentions)
    refused("patch", pair / "tuned", pair / "base", "--stats", pair / "stats", "-o", out, mentions=mentions, output=out)
    refused(*calibrate_command(pair), mentions=mentions, output=out)
    if damage != "a file":  # inspect reads files, too
        why = "does not exist" if damage == "missing" else why
        refused("inspect", pair / "tuned", mentions=[pair / "tuned", why])


def test_hints_say_how_to_convert_and_to_merge(pair):
    only_a_pickle(pair / "tuned")
    assert "safe_serialization=True" in refused(*patch_command(pair))
    an_adapter(pair / "base")
    assert "merge_and_unload" in refused(*patch_command(pair))


class Bomb:
    """Unpickling it touches a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickles_are_never_loaded(pair):
    marker = pair / "executed"
    bomb = pickle.dumps(Bomb(marker))
    beside = ["training_args.bin", "pytorch_model.bin", "optimizer.pt", "data.pkl", "pytorch_model-00001-of-00001.bin"]
    for folder in ("base", "tuned"):
        for name in beside:
            (pair / folder / name).write_bytes(bomb)
        weight_map = {"weight_map": {NORM: "pytorch_model-00001-of-00001.bin"}}
        (pair / folder / "pytorch_model.bin.index.json").write_text(json.dumps(weight_map))
    assert invoke(*calibrate_command(pair)).exit_code == 0
    assert invoke(*score_command(pair)).exit_code == 0
    shutil.rmtree(pair / "out")
    assert invoke(*patch_command(pair)).exit_code == 0
    assert invoke("inspect", pair / "tuned").exit_code == 0
    assert not list((pair / "out").glob("*.bin*"))  # nor handed on
    for folder in ("base", "tuned"):
        (pair / folder / WEIGHTS).unlink()
    shutil.rmtree(pair / "out")
    refused(*patch_command(pair), mentions=["pickled"], output=pair / "out")
    refused(*calibrate_command(pair), mentions=["pickled"], output=pair / "out")
    refused("inspect", pair / "tuned", mentions=["pickled"])
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()  # or the test shows nothing


# --- a base and a tuned that do not belong together -----------------------------------------------------------


def grow(tensors, *names, rows=8):
    for name in names:
        tensors[name] = torch.cat([tensors[name], torch.zeros(rows, *tensors[name].shape[1:])])


def drop(name):
    def change(tensors):
        del tensors[name]

    return change


VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
MISMATCHES = {
    "a tensor only in base": (drop(DOWN), [f"only in base: {DOWN}"], "saved in full"),
    "a tensor only in tuned": (lambda t: t.update(extra=torch.ones(3)), ["only in tuned: extra"], "saved in full"),
    "a prefix": (
        lambda t: {f"base.{name}": value for name, value in t.items()},
        ["only in base: ", "and 18 more", "only in tuned: base."],
        "same architecture",
    ),
    "a head only in base": (drop("lm_head.weight"), ["lm_head.weight"], "ties its embeddings"),
    "a shape": (lambda t: t.update({DOWN: t[DOWN][:, :40].clone()}), [DOWN, "[32, 48]", "[32, 40]"], "architecture"),
    "a transposed tensor": (lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), [DOWN, "[48, 32]"], "architecture"),
    "a grown vocabulary": (
        lambda t: grow(t, *VOCABULARY),
        [VOCABULARY[1], "[108, 32]"],
        "--resized-vocab",
    ),
    "a grown table": (lambda t: grow(t, VOCABULARY[0]), [VOCABULARY[0], "[108, 32]"], "resized vocabulary"),
    "wider layers": (
        lambda t: grow(t, *(n for n in t if "gate_proj" in n or "up_proj" in n)),
        ["[48, 32]", "[56, 32]"],
        "one architecture",
    ),
    "a dtype": (lambda t: t.update({NORM: t[NORM].bfloat16()}), [NORM, "F32", "BF16", "1 tensors"], "--allow-dtype"),
    "all dtypes": (lambda t: {n: v.half() for n, v in t.items()}, ["F32", "F16", "21 tensors"], "--allow-dtype"),
    "integers": (lambda t: t.update({NORM: t[NORM].int()}), [NORM, "I32"], "--allow-dtype-mismatch"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_pair_that_does_not_match(pair, case):
    change, mentions, hint = MISMATCHES[case]
    edit_tensors(pair / "tuned", change)
    shown = refused(*patch_command(pair), mentions=mentions, output=pair / "out")
    assert hint in shown
    assert ("resized vocabulary" in shown) == (case in ("a grown vocabulary", "a grown table"))
    refused(*score_command(pair), mentions=mentions)


def test_base_and_tuned_must_differ(pair):
    plain = ["--solver", "none", "--omega", "1", "-o", pair / "out"]
    refused("patch", pair / "base", pair / "base", *plain, mentions=["identical", pair / "base"], output=pair / "out")
    shutil.copytree(pair / "base", pair / "copy")
    shard(pair / "copy")
    refused("patch", pair / "base", pair / "copy", *plain, mentions=["identical", pair / "copy"], output=pair / "out")
    shutil.rmtree(pair / "copy")
    shutil.copytree(pair / "base", pair / "copy")

    def one_bit(tensors):  # where no fingerprint looks
        tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[1100] += 1.0

    edit_tensors(pair / "copy", one_bit)
    result = invoke("patch", pair / "base", pair / "copy", *plain)
    assert result.exit_code == 0, result.stderr


def test_swapped_arguments_are_noticed(pair):
    swapped = ["patch", pair / "tuned", pair / "base", "--stats", pair / "stats", "-o", pair / "out"]
    shown = refused(*swapped, mentions=["calibrated on the model given as BASE"], output=pair / "out")
    assert f"{pair / 'base'} {pair / 'tuned'}" in shown


def test_statistics_of_another_model(pair):
    poison(pair / "tuned", NORM, 1.5)
    shown = refused(
        *patch_command(pair), mentions=[pair / "stats", "another model", pair / "tuned"], output=pair / "out"
    )
    assert f"tailorcli calibrate {pair / 'tuned'}" in shown


def test_no_statistics_given(pair):
    command = ["patch", pair / "base", pair / "tuned", "-o", pair / "out"]
    for extra in ([], ["--solver", "none"], ["--omega", "1"]):
        shown = refused(*command, *extra, mentions=["no statistics given"], output=pair / "out")
        assert "--stats" in shown


def test_arguments_of_the_wrong_kind(pair):
    command = ["patch", pair / "base", pair / "tuned", "-o", pair / "out", "--stats"]
    refused(*command, pair / "tuned", mentions=[pair / "tuned", "no statistics"], output=pair / "out")
    refused(*command, pair / "stats" / "manifest.json", mentions=["no statistics"], output=pair / "out")
    refused("score", pair / "stats", pair / "tuned", "--stats", pair / "stats", mentions=[pair / "stats"])
    refused("calibrate", pair / "stats", "--data", pair / "data.jsonl", "-o", pair / "out", mentions=[pair / "stats"])
    refused("inspect", pair / "data.jsonl", mentions=[pair / "data.jsonl"])
    refused("inspect", pair / "stats" / "manifest.json", mentions=["manifest.json", "no report"])
    refused("inspect", pair / "tuned" / WEIGHTS, mentions=[WEIGHTS])
    refused("inspect", pair, mentions=[pair])


# --- statistics that are damaged ------------------------------------------------------------------------------


def manifest(pair, change):
    edit_json(pair / "stats" / "manifest.json", change)


STATS_DAMAGES = {
    "no manifest": (lambda p: (p / "stats" / "manifest.json").unlink(), "manifest.json is missing"),
    "no Hessians": (lambda p: (p / "stats" / "hessians.safetensors").unlink(), "hessians.safetensors"),
    "truncated": (lambda p: os.truncate(p / "stats" / "hessians.safetensors", 20_000), "truncated"),
    "no JSON": (lambda p: (p / "stats" / "manifest.json").write_text("{"), "manifest.json is not JSON"),
    "a list": (lambda p: manifest(p, lambda m: [m]), "JSON object"),
    "another version": (lambda p: manifest(p, lambda m: m.update(format_version=99)), "format_version 99"),
    "no model": (lambda p: manifest(p, lambda m: m.pop("model") and None), "malformed"),
    "no tensors": (lambda p: manifest(p, lambda m: m.update(tensors={})), "does not mention tensor"),
    "one tensor less": (lambda p: manifest(p, lambda m: m["tensors"].pop(DOWN) and None), DOWN),
    "one Hessian less": (lambda p: manifest(p, lambda m: m["hessians"].pop(DOWN) and None), DOWN),
    "an unknown field": (lambda p: manifest(p, lambda m: m["tensors"][DOWN].update(new=1)), "malformed"),
    "a wrong type": (lambda p: manifest(p, lambda m: m["hessians"][DOWN].update(size="48")), DOWN),
    "a wrong size": (lambda p: manifest(p, lambda m: m["tensors"][DOWN].update(hessian=VOCABULARY[1])), DOWN),
}


@pytest.mark.parametrize("damage", STATS_DAMAGES)
def test_damaged_statistics(pair, damage):
    break_it, why = STATS_DAMAGES[damage]
    break_it(pair)
    mentions = [pair / "stats", why]
    refused(*patch_command(pair), mentions=mentions, output=pair / "out")
    refused(*score_command(pair), mentions=mentions)


# --- data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "mentions"),
    [
        ("none.jsonl", None, ["none.jsonl", "No such file"]),
        ("folder.jsonl", "folder", ["folder.jsonl", "holds no data files"]),
        ("d.xlsx", b"x", ["d.xlsx", "unknown suffix"]),
        ("d.parquet", b"PAR1", ["d.parquet", "cannot read"]),
        ("d.jsonl", b"", ["d.jsonl holds no records"]),
        ("d.jsonl", b'{"text": "a"}\n{"text": 5}\n', ["d.jsonl:2", "expected a string"]),
        ("d.jsonl", b'{"text": "a"}\n\n{"text"\n', ["d.jsonl:3 is not JSON"]),
        ("d.json", b'[{"text": "a"}, ["b"]]', ["d.json, record 1"]),
        ("d.json", b'{"text": "a"}', ["d.json holds a dict"]),
        ("d.txt", b"caf\xe9", ["d.txt is not UTF-8"]),
        ("d.txt", b"\n\n", ["d.txt holds no records"]),
        ("d.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}', ["d.jsonl:1", "chat template"]),
        ("d.jsonl", b'{"text": "\\ud800"}', ["d.jsonl:1"]),
    ],
)
def test_bad_data(pair, name, content, mentions):
    if content == "folder":
        (pair / name).mkdir()
    elif content is not None:
        (pair / name).write_bytes(content)
    refused(*calibrate_command(pair, data=name), mentions=mentions, output=pair / "out")


def test_bad_data_does_not_cost_the_old_statistics(pair):
    (pair / "d.jsonl").write_text('{"text": 5}')
    before = folder_digest(pair / "stats")
    refused("calibrate", pair / "tuned", "--data", pair / "d.jsonl", "-o", pair / "stats", "--overwrite")
    assert folder_digest(pair / "stats") == before


def test_samples_longer_than_the_model_s_positions_are_cut(gpt2_pair, tmp_path):
    """A table of 64 positions, a sample of 200 tokens: cut to what the model can see, and recorded."""
    (tmp_path / "d.txt").write_text("abcdefghij" * 20)
    calibrate_model(gpt2_pair / "tuned", tmp_path / "d.txt", tmp_path / "out")
    with_facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert with_facts["data"]["seq_len"] == 64
    assert with_facts["data"]["tokens"] == 64
    assert with_facts["options"]["seq_len"] == 2048


# --- models that transformers cannot load ---------------------------------------------------------------------


def test_a_folder_without_config(pair):
    (pair / "tuned" / "config.json").unlink()
    refused(*calibrate_command(pair), mentions=[pair / "tuned", "config.json"], output=pair / "out")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"architectures": 5}', '{"model_type": "llama", "architectures": {"a": 1}}']
)
def test_a_broken_config(pair, text):
    (pair / "tuned" / "config.json").write_text(text)
    refused(*calibrate_command(pair), mentions=[pair / "tuned"], output=pair / "out")


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ""),
        ({"num_hidden_layers": 3}, "it lacks tensor model.layers.2"),
        ({"num_hidden_layers": 300}, "its config.json describes"),
        ({"num_hidden_layers": 3000}, "num_hidden_layers is 3000"),
        ({"hidden_size": 64}, "has shape [100, 32], its config.json asks for [100, 64]"),
        ({"vocab_size": 120}, "[120, 32]"),
        ({"intermediate_size": "many"}, ""),
        ({"model_type": "unheard_of", "architectures": ["UnheardOf"]}, ""),
        ({"architectures": ["PreTrainedModel"]}, "PreTrainedModel"),
    ],
)
def test_a_config_of_another_model(pair, change, mention):
    edit_json(pair / "tuned" / "config.json", lambda config: config.update(change))
    refused(*calibrate_command(pair), mentions=[pair / "tuned", mention], output=pair / "out")


def test_no_tokenizer(pair):
    for file in (pair / "tuned").glob("tokenizer*"):
        file.unlink()
    shown = refused(*calibrate_command(pair), mentions=[pair / "tuned", "tokenizer"], output=pair / "out")
    assert "tokenizer.save_pretrained" in shown


def test_a_broken_tokenizer(pair):
    (pair / "tuned" / "tokenizer.json").write_text("{}")
    refused(*calibrate_command(pair), mentions=[pair / "tuned", "tokenizer"], output=pair / "out")


def test_a_tokenizer_of_another_model(pair):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["é", "ü", "<extra>", "ñ", "ø"])  # ids 97 to 101 of a model with 100 rows
    tokenizer.save_pretrained(pair / "tuned")
    (pair / "d.txt").write_text("abc ø\n")
    refused(*calibrate_command(pair, data="d.txt"), mentions=["id 101", "100 embedding rows"], output=pair / "out")


# --- numbers --------------------------------------------------------------------------------------------------


def poison(folder, name, value):
    def change(tensors):
        tensors[name].view(-1)[7] = value

    edit_tensors(folder, change)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["base", "tuned"])
def test_nan_and_infinity_in_weights(pair, where, value):
    poison(pair / where, DOWN, value)
    plain = ["--omega", "1", "--solver", "none"]
    words = [DOWN, "NaN or infinity", f"{where} weights"]
    command = ["patch", pair / "base", pair / "tuned", "-o", pair / "out"]
    refused(*command, *plain, mentions=words, output=pair / "out")
    refused("score", pair / "base", pair / "tuned", "--omega", "1", mentions=words)
    if where == "base":
        shutil.rmtree(pair / "out")
        for solver in ("none", "sequential", "joint"):
            refused(*patch_command(pair, "--solver", solver, "--overwrite"), mentions=words, output=pair / "out")


def test_nan_in_a_tensor_that_stays_at_base(pair):
    poison(pair / "base", DOWN, float("nan"))
    refused(*patch_command(pair, "--exclude", "*down*"), mentions=[DOWN, "NaN", pair / "base"], output=pair / "out")


@pytest.mark.parametrize("how", [("--propagate",), ("--no-propagate", "--distill"), ("--data",)])
def test_nan_in_a_tensor_that_stays_at_base_is_told_before_the_long_work(pair, monkeypatch, how):
    import tailorcli.patching.onepass
    import tailorcli.patching.propagate
    import tailorcli.training.run

    def unused(tensors):
        tensors["of.no.model"] = torch.tensor([1.0, float("nan")])

    stats = ["--stats", pair / "stats", "--retain", pair / "retain", *how]
    if how == ("--data",):
        stats = ["--data", pair / "data.jsonl", "--num-samples", "8", "--seq-len", "16"]
    for name in ("base", "tuned"):
        edit_tensors(pair / name, unused)
        if how != ("--data",):
            where = pair / ("stats" if name == "tuned" else "retain")
            shutil.rmtree(where, ignore_errors=True)
            calibrate_model(pair / name, pair / "data.jsonl", where, CalibrateOptions(8, 16))
    for module, work in (
        (tailorcli.patching.propagate, "patch_propagated"),
        (tailorcli.patching.onepass, "patch_propagated"),
        (tailorcli.training.run.Teaching, "distill"),
    ):
        monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("it was worked on before"))
    command = ["patch", pair / "base", pair / "tuned", *stats, "--exclude", "of.no*", "-o", pair / "out"]
    refused(*command, mentions=["of.no.model", "NaN", pair / "base"], output=pair / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"),
        ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"),
    ],
)
def test_nan_and_infinity_in_activations(pair, name, reached, value):
    poison(pair / "tuned", name, value)
    refused(*calibrate_command(pair), mentions=["NaN or infinity in the activations", reached], output=pair / "out")


def test_activations_that_overflow_in_half_precision(tmp_path):
    folder = make_pair(tmp_path)

    def blow_up(tensors):
        for projection in ("gate", "up", "down"):
            tensors[f"model.layers.0.mlp.{projection}_proj.weight"].mul_(1e8).clamp_(-6e4, 6e4)

    edit_tensors(folder / "tuned", blow_up)
    shown = refused(*calibrate_command(folder, "--dtype", "float16"), mentions=["activations"], output=folder / "out")
    assert "--dtype float32" in shown


def edit_hessian(pair, change):
    """Change the stored triangle of the Hessian of DOWN, 48 channels."""
    path = pair / "stats" / "hessians.safetensors"
    stored = load_file(path)
    change(stored[DOWN])
    save_file(stored, path)


OFF_DIAGONAL = 1  # of a packed triangle: row 1, column 0


@pytest.mark.parametrize("extra", [[], ["--solver", "sequential"], ["--solver", "none"], ["--omega", "1"]])
def test_an_indefinite_hessian(pair, extra):
    edit_hessian(pair, lambda packed: packed[OFF_DIAGONAL].fill_(1e6))
    words = [DOWN, "not positive definite", "damping tried: 0.02, 0.2, 2, 20"]
    shown = refused(*patch_command(pair, "--damping", "0.02", *extra), mentions=words, output=pair / "out")
    assert "--damping" in shown.partition("try:")[2]


def test_an_indefinite_hessian_that_more_damping_mends_is_reported(pair):
    def spoil(packed):
        size = 48
        diagonal = torch.arange(size) * (torch.arange(size) + 3) // 2
        packed[OFF_DIAGONAL] = 5 * packed[diagonal].mean()

    edit_hessian(pair, spoil)
    result = invoke(*patch_command(pair))
    assert result.exit_code == 0, result.stderr
    assert f"damped further than asked: {DOWN}" in result.stderr
    report = json.loads((pair / "out" / "tailor_report.json").read_text())
    record = next(tensor for tensor in report["tensors"] if tensor["name"] == DOWN)
    assert record["damped_further"]
    assert record["damping"] == 10.0


@pytest.mark.parametrize("index", [0, OFF_DIAGONAL])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("extra", [[], ["--omega", "1"], ["--omega", "1", "--density", "0.9"]])
def test_nan_and_infinity_in_a_hessian(pair, index, value, extra):
    edit_hessian(pair, lambda packed: packed[index].fill_(value))
    refused(*patch_command(pair, *extra), mentions=[DOWN], output=pair / "out")


def test_an_all_zero_hessian_is_no_division_by_zero(pair):
    edit_hessian(pair, lambda packed: packed.zero_())
    for solver in ("joint", "sequential", "none"):
        result = invoke(*patch_command(pair, "--solver", solver, "--overwrite"))
        assert result.exit_code == 0, result.stderr
        assert all(tensor.isfinite().all() for tensor in load_file(pair / "out" / WEIGHTS).values())


def test_a_result_that_overflows_half_precision(tmp_path):
    """float16 weights near the largest number, and a Hessian that asks one entry to stand for all others."""
    folder = make_pair(tmp_path, dtype=torch.float16)

    def far_apart(sign):
        def change(tensors):
            tensors[DOWN].fill_(sign * 65000.0)

        return change

    edit_tensors(folder / "tuned", far_apart(1))
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    edit_tensors(folder / "base", far_apart(-1))
    edit_hessian(folder, lambda packed: packed.fill_(1.0))
    result = invoke(*patch_command(folder, "--damping", "0.001"))
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    assert DOWN in result.stderr
    assert "overflow" in result.stderr
    assert_nothing_loads(folder / "out")


# --- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--density", ["-0.1", "1.1", "10", "nan", "inf", "-inf"]),
        ("--omega", ["-0.1", "1.1", "nan", "inf"]),
        ("--damping", ["-0.1", "nan", "inf"]),
        ("--tolerance", ["0", "1", "-1", "nan", "inf"]),
        ("--block-size", ["0", "-5"]),
        ("--max-iterations", ["0"]),
        ("--max-shard-size", ["0", "-5GB", "much", "5XB", "1e3", "inf", "9" * 400, " ", "5", "5000000000", "5I"]),
        ("--device", ["gpu", "cuda:99", "cuda:-1", "meta", "tpu", ""]),
    ],
)
def test_options_of_patch_out_of_range(pair, option, values):
    before = sorted(pair.iterdir())
    for value in values:
        command = [*patch_command(pair), option, value]
        shown = refused(*command)
        if option != "--device":
            assert option.strip("-").split("-")[-1] in shown
    assert sorted(pair.iterdir()) == before


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--num-samples", ["0", "-1"]),
        ("--seq-len", ["0", "-1"]),
        ("--batch-size", ["0", "-1"]),
        ("--device", ["gpu", "cuda:99"]),
    ],
)
def test_options_of_calibrate_out_of_range(pair, option, values):
    for value in values:
        refused(*calibrate_command(pair, option, value))
    assert not (pair / "out").exists()


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        (patch_command, "--solver", ["", "Joint", "cg"]),
        (calibrate_command, "--dtype", ["", "int8", "fp32"]),
        (calibrate_command, "--text-mode", ["", "word"]),
    ],
)
def test_words_that_are_no_choice(pair, command, option, values):
    before = sorted(pair.iterdir())
    for value in values:
        result = invoke(*command(pair, option, value))
        assert isinstance(result.exception, SystemExit)
        assert result.exit_code == 2
        assert option in result.stderr
        assert f"'{value}' is not one of" in " ".join(result.stderr.replace("│", " ").split())
    assert sorted(pair.iterdir()) == before


def test_options_that_contradict(pair):
    refused(*patch_command(pair, "--resume", "--overwrite"), mentions=["exclude each other"])
    refused(*patch_command(pair, "--include", "nothing*"), mentions=["no tensor would be patched"], output=pair / "out")
    refused(*calibrate_command(pair, "--include", "nothing*"), mentions=["no tensor"], output=pair / "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent(pair):
    for command in (patch_command(pair), score_command(pair), calibrate_command(pair)):
        shown = refused(*command, "--device", "cuda", mentions=["cuda was asked for", "sees 0 CUDA devices"])
        assert "--device cpu" in shown
    assert not (pair / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["patch"],
        ["patch", "a", "b"],
        ["patch", "a", "b", "-o", "c", "--density", "much"],
        ["patch", "a", "b", "-o", "c", "--no-such-option"],
        ["score", "a"],
        ["calibrate", "a", "-o", "b"],
        ["calibrate", "a", "--data", "d", "-o", "b", "--num-samples", "1.5"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["no-such-command"],
        ["--no-such-option"],
    ],
)
def test_usage_errors_exit_with_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert "Traceback" not in result.output


# --- the output -----------------------------------------------------------------------------------------------


def test_an_output_that_exists(pair):
    (pair / "out").mkdir()
    (pair / "out" / "notes.txt").write_text("mine")
    shown = refused(*patch_command(pair), mentions=[pair / "out", "exists"])
    assert "--overwrite" in shown
    refused(*patch_command(pair, "--resume"), mentions=["no run that could be resumed"])
    refused(*calibrate_command(pair), mentions=["notes.txt"])
    assert [entry.name for entry in (pair / "out").iterdir()] == ["notes.txt"]


def test_an_output_that_is_a_file_or_below_one(pair):
    (pair / "out").write_text("mine")
    for flags in ([], ["--overwrite"], ["--resume"]):
        refused(*patch_command(pair, *flags), mentions=[pair / "out", "file"])
    refused(*calibrate_command(pair, "--overwrite"), mentions=[pair / "out", "file"])
    below = ["patch", pair / "base", pair / "tuned", "--stats", pair / "stats", "-o", pair / "out" / "below"]
    refused(*below, mentions=[pair / "out" / "below"])
    refused("score", pair / "base", pair / "tuned", "--omega", "1", "-o", pair / "out" / "r.json", mentions=["r.json"])
    assert (pair / "out").read_text() == "mine"


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize(
    "output", ["base", "tuned", "stats", ".", "tuned/patched", "stats/out", "link", "base/../tuned"]
)
def test_an_output_that_would_replace_or_enter_an_input(pair, output, flags):
    (pair / "link").symlink_to(pair / "tuned")
    before = folder_digest(pair)
    command = ["patch", pair / "base", pair / "tuned", "--stats", pair / "stats", "-o", pair / output, *flags]
    refused(*command, mentions=["input"])
    refused(*command, "--dry-run", mentions=["input"])
    assert folder_digest(pair) == before


def test_overwrite_spares_what_is_not_ours(pair):
    shutil.copytree(pair / "base", pair / "out")
    before = folder_digest(pair / "out")
    refused(*patch_command(pair, "--overwrite"), mentions=[pair / "out", "did not write"])
    assert folder_digest(pair / "out") == before
    only_a_pickle(pair / "out")
    before = folder_digest(pair / "out")
    refused(*patch_command(pair, "--overwrite"), mentions=[pair / "out", "did not write"])
    assert folder_digest(pair / "out") == before
    refused("calibrate", pair / "tuned", "--data", pair / "data.jsonl", "-o", pair / "out", "--overwrite")
    assert folder_digest(pair / "out") == before


# --- a full disk ----------------------------------------------------------------------------------------------


def test_too_little_room_is_noticed_beforehand(pair, monkeypatch):
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    for flags in ([], ["--dry-run"]):
        refused(*patch_command(pair, *flags), mentions=["not enough disk", pair / "out", "1,000 are free"])
    assert not (pair / "out").exists()


def fail_after(count, name, monkeypatch, error=errno.ENOSPC):
    """From its ``count``-th call on, a function of os finds the disk full."""
    original, calls = getattr(os, name), []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > count:
            raise OSError(error, os.strerror(error))
        return original(*arguments)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize(
    ("call", "count"),
    [("pwrite", 0), ("pwrite", 1), ("pwrite", 10), ("fdatasync", 0), ("fsync", 0), ("fsync", 1), ("fsync", 3)],
)
def test_a_disk_that_fills_up_and_resume(pair, monkeypatch, call, count):
    with monkeypatch.context() as patched:
        patched.setattr("tailorcli.checkpoint.journal._SYNC_BYTES", 9_000)  # journal often
        fail_after(count, call, patched)
        shown = refused(*patch_command(pair), mentions=["no space left", pair / "out"], output=pair / "out")
        assert "--resume" in shown
    result = invoke(*patch_command(pair, "--resume"))
    assert result.exit_code == 0, result.stderr
    patch_checkpoint(pair / "base", pair / "tuned", pair / "whole", pair / "stats")
    assert folder_digest(pair / "out") == folder_digest(pair / "whole")


def test_a_disk_that_fails_in_another_way(pair, monkeypatch):
    fail_after(5, "pwrite", monkeypatch, errno.EIO)
    refused(*patch_command(pair), mentions=["cannot write", "Input/output error"], output=pair / "out")


def test_side_files_that_do_not_fit(pair, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        refused(*patch_command(pair), mentions=["no space left"], output=pair / "out")
    assert invoke(*patch_command(pair, "--resume")).exit_code == 0
    with Checkpoint.open(pair / "out") as checkpoint:
        assert len(checkpoint.tensors) == 21


# --- what an interrupted run left, damaged --------------------------------------------------------------------


def interrupted(pair, monkeypatch, writes=8):
    """A run that broke off with some tensors journaled; returns its journal."""
    with monkeypatch.context() as patched:
        patched.setattr("tailorcli.checkpoint.journal._SYNC_BYTES", 1)
        fail_after(writes, "pwrite", patched)
        refused(*patch_command(pair), output=pair / "out")
    journal = pair / "out" / ".tailorcli" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == writes + 1
    return journal


@pytest.mark.parametrize("text", ["", "{", "[]\n", "{}\n", "null\n", '{"identity": 5}\n', "\xff\n"])
def test_a_damaged_journal(pair, monkeypatch, text):
    journal = interrupted(pair, monkeypatch)
    journal.write_bytes(text.encode("latin-1"))
    shown = refused(*patch_command(pair, "--resume"), mentions=[pair / "out"], output=pair / "out")
    assert "--overwrite" in shown


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"name": "ghost", "record": {}}', '{"name": 5, "record": 5}'])
def test_a_damaged_line_in_the_journal(pair, monkeypatch, line):
    journal = interrupted(pair, monkeypatch)
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n")
    shown = refused(*patch_command(pair, "--resume"), mentions=[pair / "out"], output=pair / "out")
    assert "--overwrite" in shown


@pytest.mark.parametrize("size", [0, 3000])
def test_a_damaged_shard_of_an_interrupted_run(pair, monkeypatch, size):
    """Journaled tensors that are no longer there must not come out as zeros."""
    interrupted(pair, monkeypatch)
    os.truncate(pair / "out" / (WEIGHTS + ".part"), size)
    shown = refused(*patch_command(pair, "--resume"), mentions=[pair / "out"], output=pair / "out")
    assert "--overwrite" in shown


def test_a_missing_shard_of_an_interrupted_run(pair, monkeypatch):
    interrupted(pair, monkeypatch)
    (pair / "out" / (WEIGHTS + ".part")).unlink()
    refused(*patch_command(pair, "--resume"), mentions=[WEIGHTS], output=pair / "out")


@pytest.mark.parametrize(
    "change",
    [
        *(lambda r: [], lambda r: {}, lambda r: r.pop("stages") and None, lambda r: r.update(seconds=-1)),
        *(lambda r: r["stages"].update(read="long"), lambda r: r.update(inputs={}), lambda r: r.update(identity=[])),
        *(lambda r: r.update(peak_memory_bytes="much"), lambda r: r.update(python=3)),
    ],
)
def test_a_damaged_run_record(pair, change):
    assert invoke(*patch_command(pair)).exit_code == 0
    edit_json(pair / "out" / "tailor_run.json", change)
    refused(*patch_command(pair, "--resume"), mentions=[pair / "out"])
    if isinstance(json.loads((pair / "out" / "tailor_run.json").read_text()), list):
        refused("inspect", pair / "out", mentions=["tailor_run.json", "JSON object"])
    else:  # inspect asks it for nothing but the time
        assert json.loads(run("inspect", pair / "out", "--json").stdout)["kind"] == "patched"


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("inputs"),
        lambda r: r.pop("options"),
        lambda r: r.pop("command"),
        lambda r: r.update(totals={}),
        lambda r: r.update(tensors=[5]),
        lambda r: r.update(tensors=[{}]),
        lambda r: r.update(inputs=[]),
        lambda r: r["tensors"][0].pop("shape"),
        lambda r: r["options"].pop("density"),
        lambda r: r.update(format_version=9),
    ],
)
def test_a_damaged_report(pair, change):
    assert invoke("score", *patch_command(pair)[1:5], "-o", pair / "r.json").exit_code == 0
    edit_json(pair / "r.json", lambda report: change(report) and None)
    refused("inspect", pair / "r.json", mentions=["r.json"])


# --- the installed command ------------------------------------------------------------------------------------


def command_line(*arguments, **options):
    done = completed(("-m", "tailorcli", *arguments), **options)
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""
    return done


def test_errors_of_the_installed_command(pair):
    os.truncate(pair / "tuned" / WEIGHTS, 10_000)
    done = command_line(*patch_command(pair))
    assert done.returncode == 1
    assert done.stderr.count(b"error: ") == 1
    assert b"truncated" in done.stderr
    assert command_line("patch", "a").returncode == 2
    assert not (pair / "out").exists()


def test_a_limit_of_the_file_size_in_the_middle_of_a_calibration(pair):
    """A real failure of the disk, which the library that writes the Hessians reports in its own way."""
    limit = 20_000
    assert (pair / "stats" / "hessians.safetensors").stat().st_size > limit
    done = command_line(*calibrate_command(pair), file_limit=limit)
    assert done.returncode == 1, done.stderr
    assert b"hessians.safetensors" in done.stderr
    assert_nothing_loads(pair / "out")
    assert invoke(*calibrate_command(pair)).exit_code == 0


def test_other_models_of_one_architecture_are_told_apart(pair):
    """The statistics of one fine-tune do not pass for those of its sister."""
    sister = perturb(make_model(), seed=9)
    sister.save_pretrained(pair / "sister")
    command = ["patch", pair / "base", pair / "sister", "--stats", pair / "stats", "-o", pair / "out"]
    refused(*command, mentions=["another model", pair / "sister"], output=pair / "out")


def test_commands_that_are_shown_can_be_copied_whatever_the_paths_hold(tmp_path):
    odd = make_pair(tmp_path / "a [red] b")
    sampled = ("--num-samples", 4, "--seq-len", 16)
    calibrated = run("calibrate", odd / "tuned", "--data", odd / "data.jsonl", "-o", odd / "st at", *sampled)
    probed = run("probe", odd / "base", "-o", odd / "i m", "--num-samples", 2, "--seq-len", 8)
    out = ("-o", odd / "o", "--patch-file", odd / "p q.safetensors")
    patched = run("patch", odd / "base", odd / "tuned", "--stats", odd / "st at", *out)
    swapped = refused("patch", odd / "tuned", odd / "base", "--stats", odd / "st at", "-o", odd / "n")
    unmeasured = refused("patch", odd / "base", odd / "tuned", "-o", odd / "n")
    told = calibrated.stderr + probed.stderr + patched.stdout + patched.stderr + swapped + unmeasured
    shown = [
        line.partition("tailorcli ")[2] for line in told.splitlines() if "a [red] b" in line and "tailorcli " in line
    ]
    assert len(shown) == 7
    for command in shown:
        assert any(str(odd) in word and word.count("a [red] b") == 1 for word in shlex.split(command)), command


@pytest.fixture(params=["loop", "below a loop", "long"])
def no_path(request, tmp_path):
    """A path that the system cannot look for."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    return {"loop": loop, "below a loop": loop / "x", "long": tmp_path / ("x" * 300)}[request.param]


@pytest.mark.parametrize("option", ["-o", "--stats"])
def test_a_path_that_cannot_be_looked_for_is_one_error(pair, tmp_path, no_path, option):
    place = no_path
    given = {"-o": tmp_path / "out", "--stats": pair / "stats"} | {option: place}
    words = [word for pair_of_words in given.items() for word in pair_of_words]
    assert place.name in refused("patch", pair / "base", pair / "tuned", *words)
    refused("evaluate", pair / "base", "--task", f"t={place}:text", mentions=["t", "no path"])


def test_a_path_that_cannot_be_looked_for_is_one_error_in_python(pair, tmp_path, no_path):
    base, tuned, stats, data = (pair / name for name in ("base", "tuned", "stats", "data.jsonl"))
    out, file = tmp_path / "out", tmp_path / "p.safetensors"
    patch_checkpoint(base, tuned, None, stats, patch_file=file)
    tasks = ([f"old={data}:text", f"new={data}:text"], tmp_path / "swept")
    roles = {"origin": ["old"], "target": ["new"]}
    calls = [
        lambda: calibrate_model(no_path, data, out),
        lambda: calibrate_model(tuned, no_path, out),
        lambda: calibrate_model(tuned, data, no_path),
        lambda: patch_checkpoint(base, no_path, out, stats),
        lambda: patch_checkpoint(base, tuned, no_path, stats),
        lambda: patch_checkpoint(base, tuned, out, no_path),
        lambda: patch_checkpoint(base, tuned, out, options=PatchOptions(method="graft"), graft_data=no_path),
        lambda: distill_checkpoint(base, tuned, no_path, stats, stats),
        lambda: tailor(base, tuned, out, data, keep_stats=no_path),
        lambda: apply_patch(base, no_path, out),
        lambda: apply_patch(base, file, no_path),
        lambda: evaluate_models([no_path], tasks[0]),
        lambda: evaluate_models([file], tasks[0], base=no_path),
        lambda: run_sweep(base, tuned, [], *tasks, stats=no_path, **roles),
        lambda: probe_model(base, no_path),
        lambda: finetune_model(base, data, no_path),
        lambda: finetune_model(base, data, out, FinetuneOptions(method="dowser"), importance=no_path),
        lambda: Stats.open(no_path),
        lambda: PatchFile.open(no_path),
        lambda: Checkpoint.open(no_path),
    ]
    for call in calls:
        with pytest.raises(TailorError):
            call()


def test_an_output_whose_name_leaves_no_room_for_what_a_run_goes_on_from_is_one_error(pair, tmp_path):
    with pytest.raises(TailorError, match="no path"):
        tailor(pair / "base", pair / "tuned", tmp_path / ("x" * 250), pair / "data.jsonl")
