"""What is distilled besides plain decoders: FP8 and grown vocabularies, other families, experts, adapters."""

import json
from contextlib import closing

import pytest
import torch
from families import make_family_pair
from helpers import (
    bits,
    folder_digest,
    make_adapter,
    make_model,
    make_pair,
    make_tokenizer,
    perturb,
    quantise,
    read_tensors,
    write_data,
)

from tailorcli import DistillOptions, PatchOptions, Stats, calibrate_model, distill_checkpoint
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.models.naming import open_for
from tailorcli.options import CalibrateOptions

DISTILL = DistillOptions(steps=4, batch_size=4)
OPTIONS = PatchOptions(density=0.2, propagate=False)
FEW = CalibrateOptions(num_samples=12, seq_len=64)


def calibrated(folder, tuned="tuned", base=None):
    """``folder`` with statistics of both models on its data."""
    calibrate_model(folder / tuned, folder / "data.jsonl", folder / "stats", FEW, base=base)
    calibrate_model(folder / "base", folder / "data.jsonl", folder / "retain", FEW)
    return folder


def distilled(folder, output, options=OPTIONS, tuned="tuned"):
    return distill_checkpoint(
        folder / "base", folder / tuned, output, folder / "stats", folder / "retain", options, DISTILL
    )


def is_better(report):
    found = report.distillation
    objective = [a + b for a, b in zip(found["new"], found["retained"], strict=True)]
    return objective[found["steps"].index(found["best"])] < objective[0]


@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_fp8_pairs_are_trained_as_what_they_stand_for_and_stored_in_either_form(tmp_path, form):
    folder = make_pair(tmp_path)
    for name in ("base", "tuned"):
        quantise(folder / name, "block")
    report = distilled(calibrated(folder), tmp_path / "out", PatchOptions(0.2, propagate=False, fp8_output=form))
    assert is_better(report)
    name = "model.layers.0.mlp.up_proj.weight"
    with open_checkpoint(folder / "base", form) as base, open_checkpoint(tmp_path / "out", form) as out:
        assert out.output_tensors[name].dtype == ("F8_E4M3" if form == "fp8" else "BF16")
        changed = out.read(name).float() != base.read(name).float()
    assert 0 < int(changed.sum()) <= round(0.2 * changed.numel())
    found = report.distillation
    assert found["rounded_new"] != found["new"][found["steps"].index(found["best"])]  # what rounding costs is told


def test_a_grown_vocabulary_keeps_its_new_rows_and_the_rest_is_trained(tmp_path):
    folder = make_pair(tmp_path)
    model = perturb(make_model())
    model.resize_token_embeddings(107)
    model.save_pretrained(folder / "tuned")
    make_tokenizer().save_pretrained(folder / "tuned")
    report = distilled(calibrated(folder), tmp_path / "out", PatchOptions(0.2, resized_vocab=True))
    assert is_better(report)
    base, tuned, out = (read_tensors(path) for path in (folder / "base", folder / "tuned", tmp_path / "out"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert bits(out[name][100:]) == bits(tuned[name][100:])
        assert 0 < int((out[name][:100] != base[name]).sum()) <= round(0.2 * tuned[name].numel())


# Of each family how many of the patched tensors are left as they were, and why.
LEFT = {"t5": 0, "llava": 0, "mixtral": 0, "whisper": 0}


def taught(folder, when, tuned="tuned"):
    """The last hidden states of tuned on its samples, the model whole or block by block."""
    from tailorcli.training.run import _teach

    with closing(Stats.open(folder / "stats")) as stats:
        samples = stats.samples()
    with open_checkpoint(folder / "base") as base, open_for(base, folder / tuned) as model:
        how = (CalibrateOptions(blockwise=when), torch.device("cpu"), None, lambda _: None, torch.clone)
        return _teach(base, model, samples, *how)


def assert_the_same_block_by_block(folder, tuned="tuned"):
    whole, parts = taught(folder, "never", tuned), taught(folder, "always", tuned)
    for one, other in zip(whole.states, parts.states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.head(whole.states[0]), parts.head(parts.states[0]))


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family != "whisper" else pytest.mark.slow) for family in LEFT]
)
def test_whatever_the_closed_form_patches_is_trained_or_named(tmp_path, family):
    folder = calibrated(make_family_pair(tmp_path, family))
    report = distilled(folder, tmp_path / "out")
    assert is_better(report)
    untrained = report.distillation["untrained"]
    assert len(untrained) == LEFT[family], untrained
    base, out = read_tensors(folder / "base"), read_tensors(tmp_path / "out")
    for record in report.tensors:
        moved = int((out[record.name] != base[record.name]).sum())
        assert moved <= record.kept
    assert json.loads((tmp_path / "out" / "tailor_report.json").read_text())["distillation"]["untrained"] == untrained
    assert_the_same_block_by_block(folder)


def test_an_adapter_is_a_teacher_too(tmp_path):
    folder = make_adapter(tmp_path)
    write_data(folder / "data.jsonl")
    report = distilled(calibrated(folder, "adapter", folder / "base"), tmp_path / "out", tuned="adapter")
    assert is_better(report)
    assert torch.equal(
        read_tensors(tmp_path / "out")["model.norm.weight"], read_tensors(folder / "base")["model.norm.weight"]
    )
    assert_the_same_block_by_block(folder, "adapter")


def test_a_teacher_that_does_not_fit_goes_block_by_block_and_nothing_changes(tmp_path, monkeypatch, caplog):
    import tailorcli.models.blockwise as module

    folder = calibrated(make_pair(tmp_path))
    distilled(folder, tmp_path / "whole")
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    monkeypatch.setattr(module, "MOST_LANES", 5)  # so that the blocks are read three times
    distilled(folder, tmp_path / "parts")
    assert "block by block" in caplog.text
    assert folder_digest(tmp_path / "parts") == folder_digest(tmp_path / "whole")
