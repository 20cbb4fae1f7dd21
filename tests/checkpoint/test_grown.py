"""A tuned model with new tokens: the common rows are patched, the new ones taken over."""

import pytest
import torch
from helpers import bits, broken_off, make_model, make_pair, make_tokenizer, perturb, read_tensors, run
from transformers import AutoModelForCausalLM

from tailorcli import (
    CalibrateOptions,
    PatchOptions,
    TailorError,
    calibrate_model,
    patch_checkpoint,
    patch_to_target,
    score_checkpoint,
    verify_checkpoint,
)
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.grown import grow_vocabulary
from tailorcli.checkpoint.writer import CheckpointWriter

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def grown_pair(tmp_path_factory):
    folder = make_pair(tmp_path_factory.mktemp("grown"))
    model = perturb(make_model())
    model.resize_token_embeddings(107)
    model.save_pretrained(folder / "tuned")
    make_tokenizer().save_pretrained(folder / "tuned")
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats", CalibrateOptions())
    return folder


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("solver", ["joint", "none"])
def test_common_rows_are_patched_and_new_rows_are_tuned_s(grown_pair, tmp_path, density, solver):
    folder = grown_pair
    options = PatchOptions(density=density, solver=solver, resized_vocab=True)
    report = patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "out", folder / "stats", options)
    assert verify_checkpoint(tmp_path / "out", folder / "base").ok  # the rows that both have
    base, tuned, out = (read_tensors(path) for path in (folder / "base", folder / "tuned", tmp_path / "out"))
    records = {record["name"]: record for record in report.to_dict()["tensors"]}
    for name in TABLES:
        assert bits(out[name][100:]) == bits(tuned[name][100:])
        changed = out[name][:100] != base[name]
        assert int(changed.sum()) <= round(density * tuned[name].numel())
        assert bool(changed.any()) == (density > 0)
        assert "7 rows are new" in records[name]["note"]
        assert records[name]["zero_delta"] == int((base[name] == tuned[name][:100]).sum())  # new rows are tuned, too
    if density == 1.0:
        assert all(bits(out[name]) == bits(tuned[name]) for name in out)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 107
    assert model(input_ids=torch.tensor([[106, 3]])).logits.shape == (1, 2, 107)


def flip_a_bit(folder, name):
    with Checkpoint.open(folder) as opened:
        info = opened.tensors[name]
    with info.file.open("r+b") as stream:
        stream.seek(info.offset)
        (byte,) = stream.read(1)
        stream.seek(info.offset)
        stream.write(bytes([byte ^ 1]))


def test_tables_that_stay_at_base_still_get_their_new_rows(grown_pair, tmp_path):
    folder = grown_pair
    options = PatchOptions(exclude=("*embed*", "lm_head*"), resized_vocab=True)
    patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "out", folder / "stats", options)
    assert verify_checkpoint(tmp_path / "out", folder / "base").ok
    flip_a_bit(tmp_path / "out", "lm_head.weight")
    found = verify_checkpoint(tmp_path / "out", folder / "base")
    assert [problem["tensor"] for problem in found.problems] == ["lm_head.weight"]
    flip_a_bit(tmp_path / "out", "lm_head.weight")
    base, tuned, out = (read_tensors(path) for path in (folder / "base", folder / "tuned", tmp_path / "out"))
    for name in TABLES:
        assert bits(out[name]) == bits(torch.cat([base[name], tuned[name][100:]]))


def test_a_run_with_new_rows_resumes_and_scores(grown_pair, tmp_path):
    folder = grown_pair
    options = PatchOptions(resized_vocab=True)
    report = score_checkpoint(folder / "base", folder / "tuned", folder / "stats", options)
    assert {r["status"] for r in report.to_dict()["tensors"]} == {"patched"}
    inputs = folder / "base", folder / "tuned"
    patch_checkpoint(*inputs, tmp_path / "whole", folder / "stats", options)
    with broken_off(CheckpointWriter, after=5):
        patch_checkpoint(*inputs, tmp_path / "out", folder / "stats", options)
    again = PatchOptions(resized_vocab=True, resume=True)
    patch_checkpoint(*inputs, tmp_path / "out", folder / "stats", again)
    whole, resumed = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "out")
    assert all(bits(resumed[name]) == bits(value) for name, value in whole.items())


def refused(match, *arguments, **options):
    with pytest.raises(TailorError, match=match) as caught:
        patch_checkpoint(*arguments, options=PatchOptions(omega=1, solver="none", **options))
    assert caught.value.hint


def test_what_is_no_grown_vocabulary_is_refused(grown_pair, tmp_path):
    base, tuned, out = grown_pair / "base", grown_pair / "tuned", tmp_path / "out"
    with pytest.raises(TailorError) as caught:
        patch_checkpoint(base, tuned, out, options=PatchOptions(omega=1, solver="none"))
    assert "--resized-vocab" in caught.value.hint
    refused("that is no vocabulary that grew", tuned, base, out, resized_vocab=True)
    plain = make_pair(tmp_path / "plain")
    refused("no tensor of tuned has more rows", plain / "base", plain / "tuned", out, resized_vocab=True)
    options = PatchOptions(omega=1, solver="none", resized_vocab=True)
    with pytest.raises(TailorError, match="patch file"):
        patch_checkpoint(base, tuned, None, options=options, patch_file=tmp_path / "p.safetensors")
    with pytest.raises(TailorError, match="--target keeps patch files"):
        patch_to_target(base, tuned, out, base, base, "old=99", PatchOptions(resized_vocab=True))
    assert not out.exists()


def test_pieces_of_a_grown_tensor_join_at_any_cut(grown_pair):
    with Checkpoint.open(grown_pair / "base") as base, Checkpoint.open(grown_pair / "tuned") as tuned:
        grown = grow_vocabulary(base, tuned)
        info = grown.tensors[TABLES[0]]
        whole = bits(grown.read(TABLES[0]))
        for size in (1, 100, 12799, 12800, 12801, 1 << 20):
            if size > 1:
                assert b"".join(bytes(piece) for piece in grown.pieces(info, size)) == whole
        grown.close()


@pytest.mark.parametrize("how", [(), ("--method", "magnitude"), ("--method", "magnitude", "--threshold", "global")])
def test_the_density_is_one_of_the_common_rows(tmp_path, how):
    """Rows that are tuned's own take nothing of what may change in the others."""
    folder = make_pair(tmp_path / "pair")
    model = AutoModelForCausalLM.from_pretrained(folder / "tuned")
    model.resize_token_embeddings(400)
    model.save_pretrained(folder / "tuned")
    given = () if how else ("--solver", "none", "--omega", 1)
    run("patch", folder / "base", folder / "tuned", "--resized-vocab", *how, *given, "-o", tmp_path / "out")
    base, out = (read_tensors(path) for path in (folder / "base", tmp_path / "out"))
    common = {name: (base[name], out[name][: len(base[name])]) for name in base}
    moved = {name: int((one != other).sum()) for name, (one, other) in common.items()}
    if "global" in how:
        assert sum(moved.values()) == round(0.1 * sum(value.numel() for value in base.values()))
    else:
        assert all(count == round(0.1 * base[name].numel()) for name, count in moved.items())
