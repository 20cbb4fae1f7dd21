"""A table that the model ties to another and that both checkpoints store twice is one tensor to every method."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers import broken_off, make_pair, read_tensors, run
from safetensors.torch import load_file, save_file

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.writer import CheckpointWriter
from tailorcli.models.naming import tied_copies
from tailorcli.patchfile.writer import PatchWriter

EMBEDDING = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
HEAD = "lm_head.weight"


def store_twice(folder, kind="llama", change=lambda value: value):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {HEAD: change(tensors[EMBEDDING[kind]].clone())}, file, {"format": "pt"})


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pairs(request, tmp_path_factory):
    """The same tied pair stored once and twice, with its statistics."""
    kind = request.param
    made = []
    for name in ("once", "twice"):
        folder = make_pair(tmp_path_factory.mktemp(name), kind, tied=True)
        for part in ("base", "tuned") if name == "twice" else ():
            store_twice(folder / part, kind)
        how = ["--data", folder / "data.jsonl", "--num-samples", 12, "-o"]
        run("calibrate", folder / "tuned", *how, folder / "stats")
        run("calibrate", folder / "base", *how, folder / "retained")
        made.append(folder)
    return kind, *made


def ways(folder):
    given = ["--stats", folder / "stats"]
    return {
        "tailor": given,
        "by its name": [*given, "--include", "*embed*", "--include", "*wte*"],
        "dare": ["--method", "dare", "--density", 0.5],
        "one threshold": ["--method", "magnitude", "--threshold", "global"],
        "graft": ["--method", "graft", "--graft-data", folder / "data.jsonl", "--graft-steps", 3],
        "retained": [*given, "--retain", folder / "retained", "--no-propagate"],
        "propagated": [*given, "--retain", folder / "retained"],
    }


@pytest.mark.parametrize("way", ways(Path()))
def test_it_is_patched_as_if_it_were_stored_once(pairs, tmp_path, way):
    kind, once, twice = pairs
    found = []
    for folder, out in ((once, tmp_path / "once"), (twice, tmp_path / "twice")):
        run("patch", folder / "base", folder / "tuned", *ways(folder)[way], "-o", out)
        found.append(read_tensors(out))
    assert found[1].keys() - found[0].keys() == {HEAD}
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert torch.equal(found[1][HEAD], found[0][EMBEDDING[kind]])
    assert not torch.equal(found[1][HEAD], read_tensors(twice / "base")[HEAD])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", [HEAD, "*e*e*.weight"])
def test_a_glob_for_one_of_its_names_is_for_both(pairs, tmp_path, name):
    kind, _, twice = pairs
    run("patch", twice / "base", twice / "tuned", "--stats", twice / "stats", "--exclude", name, "-o", tmp_path / "out")
    out, base = read_tensors(tmp_path / "out"), read_tensors(twice / "base")
    for each in (HEAD, EMBEDDING[kind]):
        assert torch.equal(out[each], base[each])
    only = ["--method", "magnitude", "--include", HEAD]
    run("patch", twice / "base", twice / "tuned", *only, "-o", tmp_path / "only")
    out = read_tensors(tmp_path / "only")
    changed = {each for each, value in out.items() if not torch.equal(value, base[each])}
    assert changed == {HEAD, EMBEDDING[kind]}


def test_score_patch_file_apply_and_verify_know_both_names(pairs, tmp_path):
    kind, _, twice = pairs
    given = [twice / "base", twice / "tuned", "--stats", twice / "stats"]
    assert run("score", *given, "--json").stdout.count(f'"name": "{HEAD}"') == 1
    run("patch", *given, "-o", tmp_path / "out", "--patch-file", tmp_path / "a.safetensors")
    run("apply", twice / "base", tmp_path / "a.safetensors", "-o", tmp_path / "applied")
    out, applied = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "applied")
    assert all(torch.equal(value, applied[name]) for name, value in out.items())
    run(
        "merge-multi", twice / "base", tmp_path / "a.safetensors", "--tuned", twice / "tuned", "-o", tmp_path / "merged"
    )
    merged = read_tensors(tmp_path / "merged")
    assert torch.equal(merged[HEAD], merged[EMBEDDING[kind]])


@pytest.mark.parametrize("after", [1, 2, 3, 5])
@pytest.mark.parametrize("writer", [CheckpointWriter, PatchWriter])
def test_a_run_broken_off_between_its_names_is_resumed_to_the_same_bytes(pairs, tmp_path, after, writer):
    from tailorcli import PatchOptions, patch_checkpoint

    _, _, twice = pairs
    given = (twice / "base", twice / "tuned")
    options = {"method": "dare", "density": 0.5}
    files = {name: tmp_path / f"{name}.safetensors" for name in ("whole", "part")}
    patch_checkpoint(*given, tmp_path / "whole", options=PatchOptions(**options), patch_file=files["whole"])
    with broken_off(writer, after):
        patch_checkpoint(*given, tmp_path / "part", options=PatchOptions(**options), patch_file=files["part"])
    patch_checkpoint(*given, tmp_path / "part", options=PatchOptions(**options, resume=True), patch_file=files["part"])
    for end in ("/model.safetensors", ".safetensors"):
        assert (tmp_path / f"whole{end}").read_bytes() == (tmp_path / f"part{end}").read_bytes()


def test_copies_that_differ_in_either_are_two_tensors(tmp_path):
    folder = make_pair(tmp_path, tied=True)
    store_twice(folder / "base")
    store_twice(folder / "tuned", change=lambda value: value * 1.5)
    with Checkpoint.open(folder / "base") as base, Checkpoint.open(folder / "tuned") as tuned:
        assert tied_copies(base, tuned) == {}
    store_twice(folder / "tuned")
    with Checkpoint.open(folder / "base") as base, Checkpoint.open(folder / "tuned") as tuned:
        assert tied_copies(base, tuned) == {EMBEDDING["llama"]: (HEAD,)}


def test_the_model_that_is_patched_has_both_names_whichever_it_ties_to_the_other(pairs, tmp_path, monkeypatch):
    kind, once, twice = pairs
    run("patch", once / "base", once / "tuned", *ways(once)["propagated"], "-o", tmp_path / "once")
    model = {"llama": transformers.LlamaForCausalLM, "gpt2": transformers.GPT2LMHeadModel}[kind]
    monkeypatch.setattr(model, "_tied_weights_keys", {EMBEDDING[kind]: HEAD})
    run("patch", twice / "base", twice / "tuned", *ways(twice)["propagated"], "-o", tmp_path / "twice")
    found = read_tensors(tmp_path / "twice")
    assert all(torch.equal(value, found[name]) for name, value in read_tensors(tmp_path / "once").items())
