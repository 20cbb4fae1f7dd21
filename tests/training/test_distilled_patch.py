"""patch --distill from end to end."""

import json
from contextlib import closing
from dataclasses import replace
from shutil import copytree

import pytest
import torch
from helpers import (
    bits,
    count_mapped_files,
    folder_digest,
    invoke,
    make_pair,
    make_tokenizer,
    read_tensors,
    refused,
    run,
    with_statistics,
)

from tailorcli import (
    DistillOptions,
    PatchFile,
    PatchOptions,
    Stats,
    TailorError,
    calibrate_model,
    distill_checkpoint,
    distill_patch,
    patch_checkpoint,
    verify_checkpoint,
)
from tailorcli.guard import lock_file
from tailorcli.options import CalibrateOptions
from tailorcli.patching.aim import plan_target
from tailorcli.patching.distilled import plan_distilled
from tailorcli.runs.again import patch_command

DISTILL = DistillOptions(steps=6, batch_size=4)
OPTIONS = PatchOptions(density=0.2, propagate=False)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request, tmp_path_factory):
    return with_statistics(make_pair(tmp_path_factory.mktemp(request.param), request.param))


# What does not depend on the kind of layers.
ONE_KIND = pytest.mark.parametrize("pair", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)], indirect=True)


def arguments(pair, output):
    return pair / "base", pair / "tuned", output, pair / "stats", pair / "retain"


def distilled(pair, output, options=OPTIONS, **more):
    return distill_checkpoint(*arguments(pair, output), options, DISTILL, **more)


def test_the_same_entries_hold_better_values_and_all_others_are_the_bases(pair, tmp_path):
    report = distilled(pair, tmp_path / "out", patch_file=tmp_path / "p.safetensors")
    found = report.distillation
    objective = [a + DISTILL.weight * b for a, b in zip(found["new"], found["retained"], strict=True)]
    assert found["kept"].keys() == {"old", "new", "old_before", "new_before"}
    assert all(0 < share <= 1 for share in found["kept"].values())
    assert min(objective) < objective[0]
    chosen = replace(OPTIONS, score="sum")
    patch_checkpoint(*arguments(pair, tmp_path / "closed")[:4], chosen, retain=pair / "retain")
    base, closed, out = (read_tensors(p) for p in (pair / "base", tmp_path / "closed", tmp_path / "out"))
    moved = 0
    with PatchFile.open(tmp_path / "p.safetensors") as file:
        for name, value in out.items():
            mask = file.mask(name) if name in file.tensors else torch.zeros(value.shape, dtype=torch.bool)
            assert bits(value[~mask]) == bits(base[name][~mask])
            assert bits(closed[name][~mask]) == bits(base[name][~mask])
            moved += int((value != closed[name]).sum())
    assert moved > 1000
    records = {record.name: record for record in report.tensors}
    for name, value in out.items():  # of what is written, or none: layer errors are not measured again
        if records[name].patched:
            distance = (value.double() - base[name].double()).abs().sum().item()
            assert records[name].distance_after == pytest.approx(distance, rel=1e-4)
            assert (records[name].error_after, records[name].drift) == (None, None)
    assert report.totals["error_after"] is None
    assert 0 < found["began"]["error_after"] < 1
    shown = invoke("inspect", tmp_path / "out", "--plot", tmp_path / "figures.svg")
    assert shown.exit_code == 0
    assert "layer error" not in shown.stdout
    (tmp_path / "figures.svg").unlink()
    assert verify_checkpoint(tmp_path / "out", pair / "base", tmp_path / "p.safetensors").ok
    assert json.loads((tmp_path / "out" / "tailor_report.json").read_text())["distillation"]["best"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "out", "p.safetensors"]


@ONE_KIND
@pytest.mark.parametrize("when", ["the closed form", "the training", "the writing"])
def test_a_run_that_was_broken_off_is_finished_to_the_same_bytes(pair, tmp_path, monkeypatch, when):
    import tailorcli.patching.distilled as module
    import tailorcli.training.run as training

    distilled(pair, tmp_path / "whole")

    def broken(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if when == "the closed form":
            patched.setattr(module, "patch_opened", broken)
        elif when == "the training":
            save = training.save_state
            patched.setattr(training, "SAVING_SHARE", 1e9)  # at every evaluation
            patched.setattr(training, "save_state", lambda path, step, *a: save(path, step, *a) or step < 3 or broken())
        else:
            patched.setattr(module, "write_patched", broken)
        with pytest.raises(KeyboardInterrupt):
            distilled(pair, tmp_path / "out")
    (tmp_path / "out.distill" / "hidden-0-1.part").touch()  # of a kill while hidden states were put into a file
    lock_file(tmp_path / "out.distill" / module.START, folder=False).touch()  # of one while the start was written
    distilled(pair, tmp_path / "out", replace(OPTIONS, resume=True))
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "whole")


@ONE_KIND
def test_what_is_trained_is_chosen_by_the_sum_of_scores_unless_another_is_asked_for(pair, tmp_path):
    closed = {}
    for score in ("paper", "sum"):
        patch_checkpoint(
            *arguments(pair, None)[:4],
            replace(OPTIONS, score=score),
            retain=pair / "retain",
            patch_file=tmp_path / f"{score}.safetensors",
        )
        closed[score] = masks(tmp_path / f"{score}.safetensors")
    assert closed["paper"] != closed["sum"]
    for number, (asked, taken) in enumerate([(None, "sum"), ("paper", "paper"), ("sum", "sum")]):
        file = tmp_path / f"{number}.safetensors"
        report = distilled(pair, None, replace(OPTIONS, score=asked), patch_file=file)
        assert masks(file) == closed[taken]
        told = patch_command(report.options, {"base": "B", "tuned": "T", "stats": "S", "retain": "R"}, distilled={})
        assert ("--score" in told) == (taken == "paper")
    refused(
        *("patch", *arguments(pair, None)[:2], "--method", "dare", "--score", "sum", "-o", tmp_path / "no"),
        mentions=["score sum is for the method tailor"],
    )


@ONE_KIND
def test_training_starts_from_what_is_not_propagated_unless_that_is_asked_for(pair):
    given = arguments(pair, pair / "out")
    usual, asked, searched = (
        plan(*given, *more, DISTILL)
        for plan, more in (
            (plan_distilled, (PatchOptions(),)),
            (plan_distilled, (PatchOptions(propagate=True),)),
            (plan_target, ("old=99", PatchOptions())),
        )
    )
    assert (usual.propagates, asked.propagates, searched.propagates) == (False, True, True)
    roles = {"base": "B", "tuned": "T", "stats": "S", "retain": "R"}
    for propagate in (False, True):
        options = PatchOptions(propagate=propagate).resolved(True, distilled=True).to_dict()
        assert ("--propagate" in patch_command(options, roles, distilled={})) is propagate
        options = PatchOptions(propagate=propagate).resolved(True).to_dict()
        assert ("--no-propagate" in patch_command(options, roles)) is not propagate


def masks(file):
    """Every mask in a patch file, as bits by name."""
    with PatchFile.open(file) as opened:
        return {name: bits(opened.mask(name)) for name in opened.tensors}


def test_any_method_with_a_mask_can_be_distilled(pair, tmp_path):
    options = PatchOptions(density=0.2, method="magnitude")
    found = distilled(pair, tmp_path / "out", options).distillation
    objective = [a + DISTILL.weight * b for a, b in zip(found["new"], found["retained"], strict=True)]
    assert objective[found["steps"].index(found["best"])] < objective[0]


@ONE_KIND
def test_the_command(pair, tmp_path):
    base, tuned, output, stats, retain = arguments(pair, tmp_path / "out")
    how = ("--distill", "--distill-steps", 4, "--no-propagate", "--density", 0.2)
    result = run("patch", base, tuned, "--stats", stats, "--retain", retain, *how, "-o", output)
    assert "held-out divergence" in result.stdout.replace("\n", " ")
    shown = run("inspect", output, "--plot", tmp_path / "out.png").stdout
    assert "held-out divergence, nats a token" in shown
    assert "(kept)" in shown
    assert (tmp_path / "out.png").stat().st_size > 10_000
    refused("patch", base, tuned, "--stats", stats, *how, "-o", tmp_path / "no", mentions=["both statistics"])
    zero = ("--distill", "--distill-steps", 0)
    refused(
        "patch", base, tuned, "--stats", stats, "--retain", retain, *zero, "-o", tmp_path / "no", mentions=["steps"]
    )
    assert not (tmp_path / "no").exists()


@ONE_KIND
def test_a_dry_run_tells_what_training_takes(pair, tmp_path):
    base, tuned, output, stats, retain = arguments(pair, tmp_path / "out")
    how = ("--stats", stats, "--retain", retain, "--distill", "--density", 0.2, "--dry-run", "-o", output)
    assert "at most 400 steps, about" in run("patch", base, tuned, *how).stdout
    found = json.loads(run("patch", base, tuned, *how, "--json").stdout)["training"]
    numel = sum(value.numel() for value in read_tensors(pair / "base").values())
    assert found["device_bytes"] > 4 * numel + 20 * round(0.2 * numel) - 2000
    assert found["host_bytes"] < 1 << 20
    assert not output.exists()


@ONE_KIND
def test_a_patch_file_can_be_distilled_by_itself(pair, tmp_path):
    base, tuned, output, stats, retain = arguments(pair, tmp_path / "out")
    chosen, file = replace(OPTIONS, score="sum"), tmp_path / "closed.safetensors"
    patch_checkpoint(base, tuned, None, stats, chosen, retain=retain, patch_file=file)
    report = distill_patch(file, base, tuned, stats, retain, output, distill=DISTILL)
    distilled(pair, tmp_path / "once")
    once, out = read_tensors(tmp_path / "once"), read_tensors(output)
    assert all(bits(value) == bits(out[name]) for name, value in once.items())
    assert report.distillation["best"] > 0
    assert report.options["retain_weight"] == chosen.retain_weight
    patch_checkpoint(base, tuned, None, stats, PatchOptions(density=0.3), patch_file=tmp_path / "alone.safetensors")
    alone = distill_patch(tmp_path / "alone.safetensors", base, tuned, stats, retain, tmp_path / "a", distill=DISTILL)
    assert alone.options["retain_weight"] == 0.0  # the base lends its samples alone
    assert "--retain-weight 0 " in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(TailorError, match="1 fine-tuned models and 2 statistics"):
        distill_patch(file, base, tuned, [stats, stats], retain, tmp_path / "no")


@ONE_KIND
def test_a_work_path_that_is_taken_is_one_error(pair, tmp_path):
    (tmp_path / "out.distill").write_text("mine")
    with pytest.raises(TailorError, match="no folder of ours"):
        distilled(pair, tmp_path / "out")
    assert (tmp_path / "out.distill").read_text() == "mine"
    (tmp_path / "p.safetensors.distill").mkdir()
    (tmp_path / "p.safetensors.distill" / "notes.txt").write_text("mine")
    with pytest.raises(TailorError, match="no run of ours wrote"):
        distilled(pair, None, patch_file=tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors.distill" / "notes.txt").exists()


@ONE_KIND
def test_a_run_that_had_stopped_early_ends_the_same_when_it_is_taken_up(pair, tmp_path, monkeypatch):
    import tailorcli.patching.distilled as module

    wild = DistillOptions(steps=60, rate=50.0, batch_size=4)

    def run_to(output, **more):
        return distill_checkpoint(*arguments(pair, output), replace(OPTIONS, **more), wild)

    whole = run_to(tmp_path / "whole")
    assert whole.distillation["steps"][-1] < 60

    def broken(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tailorcli.training.run.SAVING_SHARE", 1e9)
        patched.setattr(module, "write_patched", broken)
        with pytest.raises(KeyboardInterrupt):
            run_to(tmp_path / "out")
    again = run_to(tmp_path / "out", resume=True)
    assert again.distillation == whole.distillation
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "whole")


@ONE_KIND
def test_hidden_states_wait_in_files_where_memory_is_short(pair, tmp_path, monkeypatch):
    distilled(pair, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr("tailorcli.training.run.free_memory", lambda _: 4000)
        files = count_mapped_files(patched)
        distilled(pair, tmp_path / "out")
    assert len(files) == 24  # one of each sample: a thousand bytes hold none
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "whole")


@ONE_KIND
def test_responses_alone_may_count(pair, tmp_path):
    base, tuned, output, _, retain = arguments(pair, tmp_path / "out")
    records = [{"prompt": f"What is {n}? ", "response": f"It is {n + 1}."} for n in range(12)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    calibrate_model(tuned, tmp_path / "asked.jsonl", tmp_path / "asked", CalibrateOptions(12))
    with closing(Stats.open(tmp_path / "asked")) as stats:
        for sample, mask in zip(stats.samples(), stats.responses(), strict=True):
            text = make_tokenizer().decode(sample["input_ids"][mask]).replace(" ", "")
            assert text.startswith("Itis")
            assert text.endswith(".")
            assert int(mask.sum()) < sample["input_ids"].numel() / 2
    manifest = json.loads((tmp_path / "asked" / "manifest.json").read_text())
    for wrong in (3, [[]], [[[0]]] * 12, [[[0, -1]]] * 12, [["x"]] * 12):
        damaged = copytree(tmp_path / "asked", tmp_path / "damaged", dirs_exist_ok=True)
        changed = manifest | {"samples": manifest["samples"] | {"responses": wrong}}
        (damaged / "manifest.json").write_text(json.dumps(changed))
        with closing(Stats.open(damaged)) as stats, pytest.raises(TailorError, match="malformed"):
            stats.responses()
    how = ("--retain", retain, "--distill", "--distill-steps", 2, "--no-propagate", "--distill-on", "responses")
    run("patch", base, tuned, "--stats", tmp_path / "asked", *how, "-o", output)
    refused("patch", base, tuned, "--stats", pair / "stats", *how, "-o", tmp_path / "no", mentions=["has a response"])


def test_tied_tables_in_half_precision(tmp_path):
    folder = with_statistics(make_pair(tmp_path, dtype=torch.bfloat16, tied=True))
    report = distilled(folder, tmp_path / "out")
    base, out = read_tensors(folder / "base"), read_tensors(tmp_path / "out")
    assert out["model.embed_tokens.weight"].dtype == torch.bfloat16
    moved = int((out["model.embed_tokens.weight"] != base["model.embed_tokens.weight"]).sum())
    assert 0 < moved <= 0.2 * 3200
    found = report.distillation
    assert found["rounded_new"] == pytest.approx(found["new"][found["steps"].index(found["best"])], rel=0.05)
