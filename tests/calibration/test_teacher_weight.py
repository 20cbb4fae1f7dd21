"""The model between base and tuned as the teacher: a view, its statistics, its choice, and patches towards it."""

import json

import pytest
import torch
from families import make_family_pair
from helpers import folder_digest, make_adapter, make_pair, read_tensors, refused, run, write_data
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from tailorcli import (
    CalibrateOptions,
    PatchOptions,
    Stats,
    TailorError,
    calibrate_model,
    patch_checkpoint,
    score_checkpoint,
)
from tailorcli.adapters.interpolated import InterpolatedCheckpoint
from tailorcli.calibration.teacher import TEMPERATURES, choose, choose_teacher
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.quantized import open_checkpoint


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def middle(pair, tmp_path_factory):
    """A real checkpoint at 0.6 of the way, in float32, to compare the view with."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("middle") / "model"
    base, tuned = (LlamaForCausalLM.from_pretrained(pair / name, dtype=torch.bfloat16) for name in ("base", "tuned"))
    other = dict(tuned.named_parameters())
    network = LlamaForCausalLM.from_pretrained(pair / "base", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(base.get_parameter(name).float().lerp(other[name].float(), 0.6))
    network.save_pretrained(folder)
    return folder


def test_the_view_reads_as_the_interpolated_model(pair, middle):
    with Checkpoint.open(pair / "base") as base, Checkpoint.open(pair / "tuned") as tuned:
        view = InterpolatedCheckpoint(base, tuned, 0.6)
        for name, value in read_tensors(middle).items():
            assert torch.equal(view.read(name), value)
            buffer = bytearray(8)
            view.read_into(view.tensors[name], memoryview(buffer), 4)
            assert bytes(buffer) == value.reshape(-1).numpy().tobytes()[4:12]
        assert view.fingerprint() != InterpolatedCheckpoint(base, tuned, 0.7).fingerprint()


def test_the_view_of_tensors_of_many_kinds(tmp_path):
    """What is wider in the base, what has another shape there, what is no weight, codes, and what scales them."""
    codes = torch.full((2, 2), 2.0).to(torch.float8_e4m3fn)
    base = {"wide": torch.full((4,), 1.0, dtype=torch.float64), "grown": torch.zeros(2), "step": torch.tensor([1])}
    tuned = {"wide": torch.full((4,), 3.0), "grown": torch.ones(3), "step": torch.tensor([5])}
    base |= {"m.weight": codes, "m.weight_scale": torch.full((2, 1), 1.0)}
    tuned |= {"m.weight": codes, "m.weight_scale": torch.full((2, 1), 3.0)}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    with open_checkpoint(tmp_path / "base") as first, open_checkpoint(tmp_path / "tuned") as last:
        view = InterpolatedCheckpoint(first, last, 0.25)
        assert torch.equal(view.read("wide"), torch.full((4,), 1.5, dtype=torch.float64))
        assert (view.tensors["wide"].dtype, view.tensors["wide"].nbytes) == ("F64", 32)
        assert torch.equal(view.read("grown"), torch.ones(3))
        assert view.read("step").item() == 5
        assert torch.equal(view.read("m.weight"), torch.full((2, 2), 2.0 * 1.5))  # of what the codes stand for
        assert torch.equal(view.read("m.weight_scale"), torch.full((2, 1), 3.0))
        assert [view.read_cost(name) for name in ("wide", "grown")] == [4 * 8 + 4 * 4, 3 * 4]


def test_statistics_and_patches_follow_the_weight(pair, tmp_path, caplog):
    options = CalibrateOptions(num_samples=8, seq_len=24)
    base, tuned, data = pair / "base", pair / "tuned", pair / "data.jsonl"
    run("calibrate", tuned, "--base", base, "--data", data, "--teacher-weight", 0.6, "-o", tmp_path / "at")
    calibrate_model(tuned, data, tmp_path / "own", options)
    stats = Stats.open(tmp_path / "at")
    assert stats.teacher_weight == 0.6
    stats.close()
    dense = ("--density", 1, "--no-propagate")
    result = run("patch", base, tuned, "--stats", tmp_path / "at", *dense, "-o", tmp_path / "out")
    assert "100.0%" in result.stdout
    first, last, out = (read_tensors(folder) for folder in (base, tuned, tmp_path / "out"))
    for name, value in out.items():  # density 1 gives the teacher itself, rounded to the base's dtype
        assert torch.equal(value, first[name].float().lerp(last[name].float(), 0.6).bfloat16())
    report = json.loads((tmp_path / "out" / "tailor_report.json").read_text())
    assert report["options"]["teacher_weight"] == 0.6
    patch_checkpoint(base, tuned, tmp_path / "one", tmp_path / "own", PatchOptions(density=0.2))
    assert "teacher_weight" not in json.loads((tmp_path / "one" / "tailor_report.json").read_text())["options"]
    patch_checkpoint(base, tuned, tmp_path / "two", tmp_path / "own", PatchOptions(density=0.2, teacher_weight=1.0))
    assert folder_digest(tmp_path / "one") == folder_digest(tmp_path / "two")
    run("patch", base, tuned, "--stats", tmp_path / "own", "--teacher-weight", 0.5, "-o", tmp_path / "three")
    assert "measured at teacher weight 1" in caplog.text
    run("patch", base, tuned, "--stats", tmp_path / "at", "--teacher-weight", 1, "-o", tmp_path / "four")
    assert "--teacher-weight 1 " in (tmp_path / "four" / "README.md").read_text()  # or it would be that of "at"


def test_propagation_and_distillation_go_to_the_same_teacher(pair, tmp_path):
    from tailorcli import DistillOptions, distill_checkpoint

    base, tuned, data = pair / "base", pair / "tuned", pair / "data.jsonl"
    options = CalibrateOptions(num_samples=12, seq_len=24, teacher_weight=0.5)
    calibrate_model(tuned, data, tmp_path / "at", options, base=base)
    calibrate_model(base, None, tmp_path / "retain", CalibrateOptions(12, 24, synthetic=True))
    found = PatchOptions(density=1.0)
    report = patch_checkpoint(base, tuned, tmp_path / "p", tmp_path / "at", found, retain=tmp_path / "retain")
    assert report.totals["propagated"] > 0
    distill = DistillOptions(steps=2, batch_size=4)
    again = distill_checkpoint(
        base, tuned, tmp_path / "d", tmp_path / "at", tmp_path / "retain", PatchOptions(propagate=False), distill
    )
    assert again.options["teacher_weight"] == 0.5


def test_the_weight_is_picked_where_the_loss_is_least_and_noise_picks_nothing():
    found = choose(lambda w: [(w - 0.5) ** 2 + shift for shift in (0.1, 0.2, 0.3)])
    assert found.weight == 0.5
    assert choose(lambda w: [(w - 1.4) ** 2 + shift for shift in (0.1, 0.2)]).weight == 1.4
    assert choose(lambda w: [(w - 1.0) ** 2] * 2).weight == 1.0
    noisy = choose(lambda w: [0.1 * (w - 1), -0.1 * (w - 1) + 0.0001 * (w - 1)])
    assert noisy.weight == 1.0


def test_a_model_too_sure_of_itself_is_judged_at_its_own_temperature(pair, tmp_path):
    def picked(sharper):
        with Checkpoint.open(pair / "base") as base, Checkpoint.open(sharper) as tuned:
            return choose_teacher(base, tuned, samples, CalibrateOptions(), torch.device("cpu"))

    from transformers import LlamaForCausalLM

    network = LlamaForCausalLM.from_pretrained(pair / "tuned", dtype=torch.float32)
    start = torch.randint(90, (64, 1), generator=torch.Generator().manual_seed(0))
    texts = network.generate(start, do_sample=True, max_new_tokens=24, pad_token_id=0, top_k=0)
    samples = [{"input_ids": text[None]} for text in texts]  # of which tuned knows most
    usual = picked(pair / "tuned")
    with torch.no_grad():
        network.lm_head.weight.mul_(3.0)  # guesses the same, three times as sure
    network.save_pretrained(tmp_path / "sure")
    found = picked(tmp_path / "sure")
    assert found.losses[1.0] == pytest.approx(usual.losses[1.0], rel=1e-3)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_decoders_last_token_counts(tmp_path, caplog, name, kept):
    """The loss is transformers' own over all labels, the end of the answer included; of samples that were kept, too."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder = make_family_pair(tmp_path / "pair", name)
    records = [{"prompt": f"Q{i}", "response": "z" * i + "a</s>"} for i in range(4)]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    how = ("--num-samples", 4, "--seq-len", 16)
    if kept:
        run("calibrate", folder / "tuned", "--data", data, *how, "-o", tmp_path / "stats")
        more = ("--stats", tmp_path / "stats", "-o", tmp_path / "out")
        shown = run("patch", folder / "base", folder / "tuned", "--teacher-weight", "auto", *more)
    else:
        more = ("--base", folder / "base", "--teacher-weight", "auto", "-o", tmp_path / "stats")
        shown = run("calibrate", folder / "tuned", "--data", data, *how, *more)
    network = AutoModelForSeq2SeqLM.from_pretrained(folder / "tuned", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tuned")
    by_temperature = dict.fromkeys(TEMPERATURES, 0.0)
    for record in records:
        ids, labels = (tokenizer(record[key], return_tensors="pt")["input_ids"] for key in ("prompt", "response"))
        assert labels[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            logits = network(input_ids=ids, labels=labels).logits[0]
        if labels[0, 0] == network.config.decoder_start_token_id:
            labels, logits = labels[:, 1:], logits[: labels.shape[1] - 1]
        for temperature in by_temperature:
            by_temperature[temperature] += float(cross_entropy(logits / temperature, labels[0])) / len(records)
    assert f" 1: {min(by_temperature.values()):.4f}" in shown.stdout + shown.stderr + caplog.text


def test_auto_is_worked_out_first_and_told(pair, tmp_path):
    base, tuned, data = pair / "base", pair / "tuned", pair / "data.jsonl"
    how = ("--num-samples", 6, "--seq-len", 16, "--teacher-weight", "auto", "--base", base)
    result = run("calibrate", tuned, "--data", data, *how, "--teacher-data", data, "-o", tmp_path / "at")
    assert "teacher weight" in result.stderr
    manifest = json.loads((tmp_path / "at" / "manifest.json").read_text())
    losses = manifest["model"]["teacher_losses"]
    assert {"1", "0.8"} <= losses.keys()
    assert manifest["model"].get("teacher_weight", 1.0) in [float(weight) for weight in losses]


def test_models_between_go_block_by_block_where_they_do_not_fit_and_lose_the_same(pair):
    with Checkpoint.open(pair / "base") as base, Checkpoint.open(pair / "tuned") as tuned:
        samples = [{"input_ids": torch.randint(90, (1, length))} for length in (9, 9, 12)]
        whole, parts = (
            choose_teacher(base, tuned, samples, CalibrateOptions(blockwise=when), torch.device("cpu"))
            for when in ("never", "always")
        )
    assert whole == parts


def test_an_adapter_has_a_model_between_too(tmp_path):
    folder = make_adapter(tmp_path)
    write_data(tmp_path / "data.jsonl")
    base, adapter, stats = folder / "base", folder / "adapter", tmp_path / "at"
    how = ("--data", tmp_path / "data.jsonl", "--num-samples", 6, "--teacher-weight", 0.5, "--base", base)
    run("calibrate", adapter, *how, "-o", stats)
    run("patch", base, adapter, "--stats", stats, "--density", 1, "-o", tmp_path / "half")
    calibrate_model(adapter, tmp_path / "data.jsonl", tmp_path / "own", CalibrateOptions(6), base=base)
    run("patch", base, adapter, "--stats", tmp_path / "own", "--density", 1, "-o", tmp_path / "whole")
    first, half, whole = (read_tensors(f) for f in (base, tmp_path / "half", tmp_path / "whole"))
    for name, value in half.items():
        torch.testing.assert_close(value, first[name].lerp(whole[name], 0.5), rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(value, first[name]) for name, value in half.items())


def test_what_the_teacher_needs_is_asked_for(pair, tmp_path):
    tuned, data, out = pair / "tuned", pair / "data.jsonl", tmp_path / "no"
    refused("calibrate", tuned, "--data", data, "--teacher-weight", 0.5, "-o", out, mentions=["needs the base"])
    refused("calibrate", tuned, "--data", data, "--teacher-weight", -1, "-o", out, mentions=["positive"])
    assert not out.exists()


@pytest.fixture(scope="module")
def found(pair, tmp_path_factory):
    """Statistics of tuned and of the base."""
    folder = tmp_path_factory.mktemp("found")
    calibrate_model(pair / "tuned", pair / "data.jsonl", folder / "stats", CalibrateOptions(6, 16))
    calibrate_model(pair / "base", None, folder / "retain", CalibrateOptions(6, 16, synthetic=True))
    return folder


@pytest.fixture
def better_at_half(monkeypatch):
    """The loss is least at the weight 0.5, whatever the samples; gives the weights that were loaded."""
    import tailorcli.calibration.teacher as module

    tried = []

    def load(view, *_):
        tried.append(view.weight)
        return torch.nn.Identity()

    monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(
        module, "next_token_losses", lambda _, sample, *__: [(tried[-1] - 0.5) ** 2 + sample["input_ids"].numel()]
    )
    return tried


def test_patch_picks_the_weight_first_and_goes_to_it(pair, found, tmp_path, better_at_half, caplog):
    both = (pair / "base", pair / "tuned", "--stats", found / "stats", "--density", 0.3)
    run("patch", *both, "--teacher-weight", "auto", "-o", tmp_path / "auto")
    assert "teacher weight 0.5, by the loss" in caplog.text
    assert len(better_at_half) == len(set(better_at_half))
    run("patch", *both, "--teacher-weight", 0.5, "-o", tmp_path / "half")
    assert folder_digest(tmp_path / "auto") == folder_digest(tmp_path / "half")
    before = len(better_at_half)
    refused("patch", *both, "--teacher-weight", "auto", "-o", tmp_path / "auto", mentions=["not empty"])
    shown = run("patch", *both, "--teacher-weight", "auto", "-o", tmp_path / "dry", "--dry-run")
    assert "the teacher's weight is picked" in shown.stderr
    assert len(better_at_half) == before  # neither has run a model


def test_the_whole_job_picks_it_before_it_calibrates(pair, tmp_path, better_at_half):
    data = ("--data", pair / "data.jsonl", "--num-samples", 6, "--seq-len", 16)
    job = ("patch", pair / "base", pair / "tuned", *data, "--no-propagate")
    shown = run(*job, "--teacher-weight", "auto", "--dry-run", "-o", tmp_path / "auto")
    assert "1. pick the teacher's weight" in shown.stdout
    assert better_at_half == []
    run(*job, "--teacher-weight", "auto", "--teacher-data", pair / "data.jsonl", "-o", tmp_path / "auto")
    run(*job, "--teacher-weight", 0.5, "-o", tmp_path / "half")
    reports = ("tailor_run.json", "tailor_report.json")  # which name the folders of the statistics
    assert folder_digest(tmp_path / "auto", reports) == folder_digest(tmp_path / "half", reports)
    again = run(
        *job, "--teacher-weight", "auto", "--teacher-data", pair / "data.jsonl", "-o", tmp_path / "auto", "--resume"
    )
    assert "already finished" in again.stdout


def test_distillation_takes_a_weight_that_was_picked_with_its_statistics(pair, found, tmp_path, caplog):
    how = CalibrateOptions(6, 16, teacher_weight="auto")
    calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / "at", how, base=pair / "base")
    stats = ("--stats", tmp_path / "at", "--retain", found / "retain", "--no-propagate", "--distill-steps", 1)
    run("patch", pair / "base", pair / "tuned", *stats, "--distill", "--teacher-weight", "auto", "-o", tmp_path / "o")
    assert "which was picked when" in caplog.text


def test_a_weight_is_picked_only_where_there_are_data_of_the_new_task(pair, tmp_path):
    pair_of = ("patch", pair / "base", pair / "tuned", "--method", "magnitude", "-o", tmp_path / "o")
    refused(*pair_of, "--teacher-weight", "auto", mentions=["there are none"])
    with pytest.raises(TailorError, match="by patch alone"):
        score_checkpoint(pair / "base", pair / "tuned", None, PatchOptions(omega=1.0, teacher_weight="auto"))
