"""What is distilled besides plain decoders: FP8 and grown vocabularies, other families, experts, adapters."""

import json
from contextlib import closing
from unittest.mock import patch

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
    refused,
    write_data,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tailorcli import (
    DistillOptions,
    PatchFile,
    PatchOptions,
    Stats,
    calibrate_model,
    distill_checkpoint,
    patch_checkpoint,
)
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.core.distillation import divergence
from tailorcli.errors import CheckpointError
from tailorcli.models.naming import open_for
from tailorcli.options import CalibrateOptions
from tailorcli.training.run import Teaching

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
    with (
        closing(Stats.open(folder / "stats")) as stats,
        open_checkpoint(folder / "base") as base,
        open_for(base, folder / tuned) as model,
        patch.object(stats, "run_options", lambda trust: CalibrateOptions(blockwise=when)),
    ):
        teaching = Teaching(base, [(model, stats)], stats, torch.device("cpu"))
        return teaching._teach(model, stats, stats.samples(), lambda _: None, torch.clone)


def assert_the_same_block_by_block(folder, tuned="tuned"):
    whole, parts = taught(folder, "never", tuned), taught(folder, "always", tuned)
    for one, other in zip(whole.states, parts.states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.head(whole.states[0]), parts.head(parts.states[0]))
    assert [*whole.ends] == [*parts.ends]


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


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_training_starts_from_the_patched_model_also_where_it_holds_gate_and_up_of_all_experts_in_one(tmp_path, family):
    folder = make_family_pair(tmp_path, family)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats", CalibrateOptions(num_samples=4))
    pair, file = (folder / "base", folder / "tuned"), tmp_path / "p.safetensors"
    patch_checkpoint(*pair, tmp_path / "out", options=PatchOptions(method="magnitude"), patch_file=file)
    with (
        closing(Stats.open(folder / "stats")) as stats,
        open_checkpoint(folder / "base") as base,
        open_for(base, folder / "tuned") as tuned,
        PatchFile.open(file) as opened,
    ):
        trained, untrained, _ = Teaching(base, [(tuned, stats)], stats, torch.device("cpu")).student(opened)
    assert untrained == {}
    patched = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    for name, value in trained.network.named_parameters():
        assert torch.equal(value, patched[name]), name


@pytest.mark.parametrize("when", ["never", "always"])
def test_a_teacher_whose_logits_are_made_in_another_way_is_refused_also_block_by_block(tmp_path, monkeypatch, when):
    folder = calibrated(make_pair(tmp_path))
    forward = LlamaForCausalLM.forward

    def doubled(network, *args, **how):
        found = forward(network, *args, **how)
        found.logits = 2 * found.logits
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(CheckpointError, match="in a way that is not known"):
        taught(folder, when)


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


def test_sound_goes_in_as_the_weights_dtype_takes_it(tmp_path):
    folder = make_family_pair(tmp_path, "whisper", dtype=torch.bfloat16)
    report = distilled(calibrated(folder), tmp_path / "out")
    assert report.distillation["steps"][-1] == DISTILL.steps


def test_what_runs_in_float16_is_trained_in_float32(tmp_path, caplog):
    """Its gradients would vanish; what is written is in float16 as before."""
    folder = calibrated(make_family_pair(tmp_path, "llama", dtype=torch.float16))
    report = distilled(folder, tmp_path / "out")
    assert "trained in float32" in caplog.text
    assert is_better(report)
    assert {value.dtype for value in read_tensors(tmp_path / "out").values()} == {torch.float16}


def test_samples_that_reach_no_kept_entry_only_count(tmp_path):
    """A fine-tune of the projector alone, on records with pictures and a few without."""
    from safetensors.torch import load_file, save_file

    folder = make_family_pair(tmp_path, "llava")
    base, tuned = (load_file(folder / name / "model.safetensors") for name in ("base", "tuned"))
    kept = {name: value if "projector" in name else base[name] for name, value in tuned.items()}
    save_file(kept, folder / "tuned" / "model.safetensors", {"format": "pt"})
    with (folder / "data.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"plain words {number}"}) + "\n" for number in range(4))
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats", CalibrateOptions(24, 64))
    calibrate_model(folder / "base", folder / "data.jsonl", folder / "retain", CalibrateOptions(24, 64))
    report = distilled(folder, tmp_path / "out")
    assert report.distillation["steps"][-1] == DISTILL.steps


def test_an_encoder_decoder_learns_to_end_its_answer(tmp_path):
    """The position that decides whether an answer goes on is trained on, so that it comes nearer to tuned's, too."""
    folder = calibrated(make_family_pair(tmp_path, "t5"))
    options = DistillOptions(steps=60, batch_size=4, weight=0.05)
    start = distill_checkpoint(
        *(folder / "base", folder / "tuned", tmp_path / "start", folder / "stats", folder / "retain"),
        *(OPTIONS, DistillOptions(steps=1, batch_size=4, rate=1e-9)),
    )
    distill_checkpoint(
        *(folder / "base", folder / "tuned", tmp_path / "out", folder / "stats", folder / "retain", OPTIONS, options)
    )
    assert start.distillation["steps"][-1] == 1
    with closing(Stats.open(folder / "stats")) as stats:
        samples = stats.samples()
    tuned, begun, trained = (
        last_position(path, samples) for path in (folder / "tuned", tmp_path / "start", tmp_path / "out")
    )
    assert divergence(tuned, trained).mean() < 0.8 * divergence(tuned, begun).mean()


def last_position(folder, samples):
    """Logits (N, V) behind the last token of each sample."""
    from transformers import AutoModelForSeq2SeqLM

    network = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.stack([network(**sample).logits[0, -1] for sample in samples])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--distill",), "ViTForImageClassification has no linear output layer over its vocabulary"),
        (("--target", "old=99"), "ViTForImageClassification has no linear output layer over its vocabulary"),
        (("--check-propagation",), "ViTForImageClassification has no layer over a vocabulary"),
    ],
)
def test_a_model_without_a_vocabulary_is_refused_before_any_work(tmp_path, asked, says):
    pair = make_family_pair(tmp_path / "vit", "vit")
    data = ("--data", pair / "data.jsonl", "--retain-data", pair / "data.jsonl")
    refused("patch", pair / "base", pair / "tuned", *data, *asked, "-o", tmp_path / "out", mentions=[says])
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]
