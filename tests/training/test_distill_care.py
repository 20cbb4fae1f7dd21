"""Distillation and targets: whose state is taken up, what is checked first, what a step consists of."""

import json
import shutil
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import folder_digest, invoke, make_pair, read_tensors, refused, run, with_statistics

from tailorcli import (
    CalibrateOptions,
    Checkpoint,
    DistillOptions,
    PatchFile,
    PatchOptions,
    Stats,
    TailorError,
    calibrate_model,
    distill_checkpoint,
    distill_patch,
    patch_checkpoint,
)
from tailorcli.errors import DataError, OptionsError, OutputError
from tailorcli.patching.aim import patch_to_target
from tailorcli.patching.distilled import plan_distilled
from tailorcli.training.distill import Material, in_steps
from tailorcli.training.run import Teaching
from tailorcli.training.teachers import Teacher

OPTIONS = PatchOptions(propagate=False)
HOW = DistillOptions(steps=8, batch_size=4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return with_statistics(make_pair(tmp_path_factory.mktemp("pair")))


def arguments(pair, output):
    return pair / "base", pair / "tuned", output, pair / "stats", pair / "retain"


def command(pair, output, *more):
    words = ("patch", pair / "base", pair / "tuned", "--stats", pair / "stats", "--retain", pair / "retain")
    return (*words, *(() if output is None else ("-o", output)), *more)


def test_a_state_of_a_run_with_other_options_is_not_taken_up(pair, tmp_path, monkeypatch):
    import tailorcli.training.run as training

    def broken(*_, **__):
        raise KeyboardInterrupt

    other = replace(HOW, rate=0.02)
    distill_checkpoint(*arguments(pair, tmp_path / "whole"), OPTIONS, other)
    save = training.save_state
    with monkeypatch.context() as patched:
        patched.setattr(training, "SAVING_SHARE", 1e9)  # at every evaluation
        patched.setattr(training, "save_state", lambda path, step, *a: save(path, step, *a) or step < 4 or broken())
        with pytest.raises(KeyboardInterrupt):
            distill_checkpoint(*arguments(pair, tmp_path / "out"), OPTIONS, HOW)
    assert (tmp_path / "out.distill" / "state.safetensors").exists()
    shutil.rmtree(tmp_path / "out")
    distill_checkpoint(*arguments(pair, tmp_path / "out"), replace(OPTIONS, resume=True), other)
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "whole")
    assert not (tmp_path / "out.distill").exists()


def test_what_a_run_had_no_time_to_remove_is_removed_when_it_is_asked_for_again(pair, tmp_path, monkeypatch):
    import tailorcli.patching.distilled as module

    def broken():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        remove = module.remove_work
        calls = []
        patched.setattr(
            module, "remove_work", lambda work: calls.append(work) or (broken() if calls[1:] else remove(work))
        )
        with pytest.raises(KeyboardInterrupt):
            distill_checkpoint(*arguments(pair, tmp_path / "out"), OPTIONS, HOW)
    assert (tmp_path / "out.distill").exists()
    assert distill_checkpoint(*arguments(pair, tmp_path / "out"), replace(OPTIONS, resume=True), HOW).is_earlier
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_somebody_else_is_told_of_before_the_work(pair, tmp_path):
    for suffix, how in (("distill", ("--distill",)), ("target", ("--target", "old=90"))):
        out, other = tmp_path / suffix, tmp_path / f"{suffix}.{suffix}"
        other.mkdir()
        (other / "notes.txt").write_text("mine")
        for more in (("--dry-run",), (), ("--resume",)):
            refused(*command(pair, out, *how, *more), mentions=[other])
            assert not out.exists()
        assert (other / "notes.txt").read_text() == "mine"


def test_samples_that_cannot_be_trained_on_are_told_before_the_work(pair, tmp_path):
    data = ("patch", pair / "base", pair / "tuned", "--data", pair / "data.jsonl", "-o", tmp_path / "out")
    for more in (("--dry-run",), ()):
        refused(*data, "--distill", "--distill-on", "responses", *more, mentions=["data.jsonl has a response"])
        refused(*data, "--distill", "--num-samples", 1, *more, mentions=["two samples"])
        refused(
            *command(pair, tmp_path / "out", "--distill", "--distill-on", "responses", *more), mentions=["response"]
        )
    assert list(tmp_path.iterdir()) == []


def test_options_that_would_be_ignored_are_refused(pair, tmp_path):
    for more in (("--distill-steps", 5), ("--num-samples", 5), ("--dtype", "float32")):
        assert invoke(*command(pair, tmp_path / "out", *more)).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_teachers_data_may_have_columns_of_other_names(pair, tmp_path):
    (tmp_path / "faq.tsv").write_text("asked\treply\n" + "".join(f"what {n}?\tthis {n}\n" for n in range(6)))
    more = ("--teacher-weight", "auto", "--teacher-data", tmp_path / "faq.tsv")
    columns = ("--prompt-column", "asked", "--response-column", "reply")
    refused(*command(pair, tmp_path / "out", *more, "--dry-run"), mentions=["faq.tsv"])
    found = json.loads(run(*command(pair, tmp_path / "out", *more, *columns, "--json")).stdout)
    assert found["options"]["teacher_weight"] != 1
    refused(*command(pair, tmp_path / "x", *more[:3], tmp_path / "none.jsonl", "--dry-run"), mentions=["none.jsonl"])


def test_a_finished_search_is_whole_or_says_what_is_missing(pair, tmp_path):
    target = ("--target", "old=50", "--distill-steps", 4)
    shown = run(*command(pair, tmp_path / "out", *target)).stderr
    assert "patching 21 tensors" in shown
    assert "in a search for old=50" in shown
    again = (*target, "--resume")
    assert "already finished" in run(*command(pair, tmp_path / "out", *again)).stdout
    file = tmp_path / "p.safetensors"
    refused(*command(pair, tmp_path / "out", *again, "--patch-file", file), mentions=["p.safetensors is not there"])
    (tmp_path / "out" / "model.safetensors").unlink()
    refused(*command(pair, tmp_path / "out", *again), mentions=["no longer whole"])


def test_a_search_is_taken_up_by_the_same_target_alone(pair, tmp_path, monkeypatch):
    import tailorcli.patching.aim as module

    def broken(*_, **__):
        raise KeyboardInterrupt

    how = replace(HOW, steps=4)
    with monkeypatch.context() as patched:
        patched.setattr(module, "apply_patch", broken)
        with pytest.raises(KeyboardInterrupt):
            patch_to_target(*arguments(pair, tmp_path / "out"), "old=50", OPTIONS, how)
    again = replace(OPTIONS, resume=True)
    with pytest.raises(OutputError, match="other options"):
        patch_to_target(*arguments(pair, tmp_path / "out"), "old=40", again, how)
    report = patch_to_target(*arguments(pair, tmp_path / "out"), "old=50", again, how)
    assert not report.is_earlier
    assert report.target["asked"] == "old=50"


def test_other_samples_and_another_patch_are_another_run(pair, tmp_path):
    base, tuned, _, stats, retain = arguments(pair, None)
    files = [tmp_path / f"{density}.safetensors" for density in (0.1, 0.2)]
    for file, density in zip(files, (0.1, 0.2), strict=True):
        patch_checkpoint(base, tuned, None, None, PatchOptions(density, method="magnitude"), patch_file=file)
    calibrate_model(base, pair / "data.jsonl", tmp_path / "more", CalibrateOptions(6, 24))
    calibrate_model(tuned, pair / "data.jsonl", tmp_path / "new", CalibrateOptions(6, 24))

    def again(file, stats, retain, **more):
        how = {"distill": HOW, "resume": True} | more
        return distill_patch(file, base, tuned, stats, retain, tmp_path / "out", **how)

    assert not again(files[0], stats, retain, resume=False).is_earlier
    assert again(files[0], stats, retain).is_earlier
    for given in (
        (files[1], stats, retain),
        (files[0], tmp_path / "new", retain),
        (files[0], stats, tmp_path / "more"),
    ):
        with pytest.raises(OutputError, match="another run"):
            again(*given)
    with pytest.raises(OutputError, match="another run"):
        again(files[0], stats, retain, distill=replace(HOW, weight=1.0))
    with pytest.raises(OptionsError, match="0 fine-tuned models"):
        distill_patch(files[0], base, [], [], retain, tmp_path / "no")
    for wrong in ((stats, stats), (retain, retain)):
        with pytest.raises(TailorError, match="was calibrated on"):
            distill_patch(files[0], base, tuned, *wrong, tmp_path / "no", distill=HOW)
    calibrate_model(base, pair / "data.jsonl", tmp_path / "one", CalibrateOptions(1, 24))
    with pytest.raises(DataError, match="has 1 sample"):
        distill_patch(files[0], base, tuned, stats, tmp_path / "one", tmp_path / "no", distill=HOW)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("method", ["tailor", "magnitude"])
def test_a_finished_output_is_one_of_the_same_samples_also_where_the_closed_form_needs_none(pair, tmp_path, method):
    options = replace(OPTIONS, method=method)
    base, tuned, output, stats, retain = arguments(pair, tmp_path / "out")
    distill_checkpoint(base, tuned, output, stats, retain, options, HOW)
    again = replace(options, resume=True)
    assert distill_checkpoint(base, tuned, output, stats, retain, again, HOW).is_earlier
    for model, name in ((base, "old"), (tuned, "new")):
        calibrate_model(model, pair / "data.jsonl", tmp_path / name, CalibrateOptions(6, 24))
    for samples in ((stats, tmp_path / "old"), (tmp_path / "new", retain)):
        with pytest.raises(OutputError, match="another run"):
            distill_checkpoint(base, tuned, output, *samples, again, HOW)
    for other, how in ((replace(again, include=("*mlp*",)), HOW), (again, replace(HOW, seed=1))):
        with pytest.raises(OutputError, match="another run"):
            distill_checkpoint(base, tuned, output, stats, retain, other, how)


def test_without_a_number_of_steps_the_kind_of_more_samples_decides_it(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("tailorcli.options.DISTILL_STEPS", 2)
    monkeypatch.setattr("tailorcli.options.DISTILL_SAMPLES", 3)
    calibrate_model(pair / "base", pair / "data.jsonl", tmp_path / "few", CalibrateOptions(3, 24))
    given, few = (*arguments(pair, tmp_path / "out")[:4], tmp_path / "few"), DistillOptions(batch_size=4)
    assert plan_distilled(*given, OPTIONS, few).training.steps == 4  # 2 by the root of 12 / 3
    report = distill_checkpoint(*given, OPTIONS, few, patch_file=tmp_path / "p.safetensors")
    assert (report.distillation["options"]["steps"], report.distillation["steps"]) == (4, [0, 1, 2, 3, 4])
    again = distill_patch(tmp_path / "p.safetensors", *given[:2], *given[3:], tmp_path / "again", distill=few)
    assert again.distillation["options"]["steps"] == 4


def test_a_patch_that_training_makes_no_better_is_written_as_it_is_with_its_report(pair, tmp_path):
    wild = replace(HOW, rate=1e3)
    base, tuned, output, stats, retain = arguments(pair, tmp_path / "out")
    report = distill_checkpoint(*arguments(pair, output), OPTIONS, wild)
    assert report.distillation["best"] == 0
    chosen = replace(OPTIONS, score="sum")
    closed = patch_checkpoint(base, tuned, tmp_path / "closed", stats, chosen, retain=retain)
    assert report.tensors == closed.tensors  # its layer errors, too, which are still true
    assert report.stages.keys() >= closed.stages.keys() | {"distill", "write"}
    found, wanted = (read_tensors(folder) for folder in (output, tmp_path / "closed"))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_what_the_report_says_is_kept_is_what_the_output_keeps(pair, tmp_path):
    """Before: of the patch that training began with. In float16, which is trained in float32 and rounded in the end."""
    options = replace(OPTIONS, density=0.2, score="sum")
    folder = with_statistics(make_pair(tmp_path / "pair", dtype=torch.float16))
    base, tuned, _, stats, retain = arguments(folder, None)
    files = tmp_path / "closed.safetensors", tmp_path / "p.safetensors"
    patch_checkpoint(base, tuned, None, stats, options, retain=retain, patch_file=files[0])
    report = distill_checkpoint(*arguments(folder, None), options, HOW, patch_file=files[1])
    with (
        Checkpoint.open(base) as opened,
        Checkpoint.open(tuned) as other,
        closing(Stats.open(stats)) as new,
        closing(Stats.open(retain)) as old,
    ):
        teaching = Teaching(opened, [(other, new)], old, torch.device("cpu"))
        materials = teaching.materials(HOW)
        shares, apart = [], []
        for path in files:
            with PatchFile.open(path) as file:
                shares.append(teaching.kept(file, materials))
                apart.append(teaching.divergences(file, materials))
    found = report.distillation
    assert found["kept"] == {f"{kind}_before": share for kind, share in shares[0].items()} | shares[1]
    assert shares[0] != shares[1]
    assert {"new": found["new"][0], "retained": found["retained"][0]} == apart[0]
    assert {"new": found["rounded_new"], "retained": found["rounded_retained"]} == apart[1]
    assert found["rounded_new"] != found["new"][found["steps"].index(found["best"])]


def test_another_teacher_is_another_run(pair, tmp_path):
    patch_checkpoint(*arguments(pair, None)[:4], OPTIONS, patch_file=tmp_path / "p.safetensors", retain=pair / "retain")
    given = (tmp_path / "p.safetensors", pair / "base", pair / "tuned", pair / "stats", pair / "retain")
    distill_patch(*given, tmp_path / "out", distill=HOW)
    assert distill_patch(*given, tmp_path / "out", distill=HOW, resume=True).is_earlier
    with pytest.raises(OutputError, match="another run"):
        distill_patch(*given, tmp_path / "out", distill=HOW, resume=True, teacher_weight=0.5)


def samples_of(lengths):
    return [{"input_ids": torch.full((1, length), 3)} for length in lengths]


def test_a_step_has_as_many_samples_as_asked_for_whatever_their_lengths():
    lengths = np.random.default_rng(0).lognormal(3, 0.6, 101).astype(int) + 2
    steps = in_steps(samples_of(lengths), range(101), 8)
    assert [sum(map(len, step)) for step in steps] == [8] * 12 + [5]
    assert sorted(place for step in steps for batch in step for place in batch) == list(range(101))
    assert all(len({lengths[place] for place in batch}) == 1 for step in steps for batch in step)
    assert in_steps(samples_of([9] * 10), range(10), 4) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9]]]


def test_a_sample_without_a_token_that_counts_is_left_out():
    """Of one nothing follows its end, which is all of it; of another no token belongs to a response."""
    samples = samples_of([1, 5, 5, 5, 5])
    responses = [torch.ones_like(s["input_ids"], dtype=torch.bool) for s in samples]
    responses[1][:] = False
    found = Material.split(samples, Teacher([], None, [3]), DistillOptions(batch_size=2), responses)
    used = [place for step in found.train for batch in step for place in batch]
    assert sorted([*used, *(place for batch in found.held for place in batch)]) == [2, 3, 4]
