"""patch --target: density and weight picked by the held-out samples."""

import json
from dataclasses import asdict, replace
from shutil import copytree

import pytest
from helpers import bits, folder_digest, invoke, make_pair, quantise, read_tensors, refused, run, with_statistics

from tailorcli import (
    CalibrateOptions,
    DistillOptions,
    PatchFile,
    PatchOptions,
    TailorError,
    calibrate_model,
    distill_patch,
    patch_checkpoint,
)
from tailorcli.guard import lock_file
from tailorcli.patching.aim import ATTEMPTS, Aim, after_miss, patch_to_target, pick_density, search_bytes

FEW = DistillOptions(steps=4, batch_size=4)
OPTIONS = PatchOptions(propagate=False)
TOLD = ("tailor_run.json", "tailor_report.json", "README.md")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return with_statistics(make_pair(tmp_path_factory.mktemp("pair")))


def arguments(pair, output):
    return pair / "base", pair / "tuned", output, pair / "stats", pair / "retain"


@pytest.mark.parametrize(
    "text", ["", "old", "old=", "old=x", "old=0", "old=0.99", "old=101", "both=5", "new=nan", "old=inf"]
)
def test_an_aim_that_is_none_is_refused(text):
    with pytest.raises(TailorError, match="not understood"):
        Aim.parse(text)


def test_the_least_density_that_comes_near_the_new_is_picked():
    asked = []

    def shares_at(density):
        asked.append(density)
        return {"old": 1 - density, "new": 0.9 + density / 2}

    assert pick_density(shares_at, Aim.parse("new=97")) == 0.1
    assert asked == [0.02, 0.05, 0.1]
    assert pick_density(shares_at, Aim.parse("new=90")) == 0.02


def test_the_density_goes_up_to_a_tenth_while_the_new_gains_whatever_the_closed_form_forgets():
    old, new = {0.02: 1, 0.05: 0.99, 0.1: 0.97, 0.2: 0.9, 0.4: 0.8}, {0.02: 0.5, 0.05: 0.8, 0.1: 0.9, 0.2: 0.95, 0.4: 1}
    assert pick_density(lambda d: {"old": old[d], "new": new[d]}, Aim.parse("old=99")) == 0.1
    assert pick_density(lambda d: {"old": 1 - 2 * d, "new": new[d]}, Aim.parse("old=99")) == 0.1
    assert pick_density(lambda d: {"old": 1, "new": min(0.8, new[d])}, Aim.parse("old=99")) == 0.05
    nearly = {0.02: 0.96, 0.05: 0.98, 0.1: 1.0}
    assert pick_density(lambda d: {"old": 1, "new": nearly[d]}, Aim.parse("old=99")) == 0.1


def test_a_miss_moves_the_bases_weight_and_for_the_new_a_low_density_up():
    assert after_miss(Aim.parse("old=99"), 0.1, 1.0) == (0.1, 3.0)
    assert after_miss(Aim.parse("new=97"), 0.02, 1.0) == (0.05, pytest.approx(1 / 3))
    assert after_miss(Aim.parse("new=97"), 0.1, 1.0) == (0.1, pytest.approx(1 / 3))
    assert after_miss(Aim.parse("new=97"), 0.4, 1.0) == (0.4, pytest.approx(1 / 3))


def test_a_search_needs_room_for_a_closed_form_at_every_density_and_all_trainings():
    sizes = {0.02: 120, 0.05: 150, 0.1: 200, 0.2: 300, 0.4: 500}  # a header of 100, and 1000 a density of 1
    assert search_bytes(Aim.parse("new=97"), 120, 500) == sum(sizes.values()) + ATTEMPTS * 500
    assert search_bytes(Aim.parse("old=99"), 120, 200) == 120 + 150 + 200 + ATTEMPTS * 200


def test_what_is_written_is_the_best_of_what_was_tried_and_says_so(pair, tmp_path):
    told = []
    report = patch_to_target(
        *arguments(pair, tmp_path / "out"),
        "old=60",
        OPTIONS,
        FEW,
        patch_file=tmp_path / "p.safetensors",
        tell=told.append,
    )
    found = report.target
    assert found["asked"] == "old=60"
    assert report.distillation["kept"]["old"] >= 0.6
    assert told[-1].startswith("target old=60 reached")
    assert len([line for line in told if line.startswith("trained")]) == 1  # more would move it away from the new
    assert found["density"] == pytest.approx(report.totals["density"], rel=0.1)
    assert json.loads((tmp_path / "out" / "tailor_report.json").read_text())["target"] == found
    with PatchFile.open(tmp_path / "p.safetensors") as file:
        base, out = read_tensors(pair / "base"), read_tensors(tmp_path / "out")
        for name, value in out.items():
            base[name][file.mask(name)] = file.values(name)
            assert bits(value) == bits(base[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "p.safetensors"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "and trained towards both models" in card
    assert f"--density {found['density']:g} " in card  # what was picked, with which it is made again
    assert "--distill --distill-steps 4 --distill-batch-size 4 -o OUT" in card.replace(" \\\n  ", " ")


def test_a_target_out_of_reach_gives_the_nearest_and_tells(pair, tmp_path):
    told, how = [], PatchOptions(method="magnitude")
    report = patch_to_target(*arguments(pair, tmp_path / "out"), "new=100", how, FEW, tell=told.append)
    assert "missed" in told[-1]
    assert len([line for line in told if line.startswith("trained")]) == 3
    assert len(report.target["missed"]) <= 2
    assert report.inputs.keys() == {"base", "tuned", "stats", "retain"}
    again = PatchOptions(method="magnitude", resume=True)
    assert patch_to_target(*arguments(pair, tmp_path / "out"), "new=100", again, FEW).is_earlier
    with pytest.raises(TailorError, match="of another run"):
        patch_to_target(*arguments(pair, tmp_path / "out"), "new=100", again, replace(FEW, rate=0.2))


def test_of_trainings_that_all_miss_the_nearest_is_written(pair, tmp_path, monkeypatch):
    import tailorcli.patching.aim as module

    trained, reached = module._Search._trained, iter((0.5, 0.7, 0.6))
    monkeypatch.setattr(
        module._Search, "_trained", lambda *given: replace(trained(*given), kept={"old": next(reached), "new": 0.9})
    )
    monkeypatch.setattr(module, "pick_density", lambda shares_at, aim: 0.05)
    how = replace(OPTIONS, max_shard_size=20_000)
    report = patch_to_target(*arguments(pair, tmp_path / "out"), "old=99", how, FEW)
    found = report.target
    assert found["weight"] == report.distillation["options"]["weight"] == 3 * FEW.weight
    assert [kept["old"] for kept in found["missed"]] == [0.5]
    assert found["density"] == 0.05 == pytest.approx(report.totals["density"], rel=0.1)
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 1


def test_a_search_patches_and_trains_as_its_two_steps_do_towards_the_teacher_that_is_asked_for(
    pair, tmp_path, monkeypatch
):
    """By default entries are chosen by the sum of scores, as for all training, and closed forms are propagated."""
    import tailorcli.patching.aim as module
    from tailorcli.training.run import Teaching

    asked, ask = [], Teaching.materials
    monkeypatch.setattr(Teaching, "materials", lambda *given: asked.append(given) or ask(*given))
    monkeypatch.setattr(module, "pick_density", lambda shares_at, aim: 0.1)
    base, tuned, output, stats, retain = arguments(pair, tmp_path / "out")
    patch_checkpoint(base, tuned, output, None, PatchOptions(method="magnitude"))  # which lies in the way
    how = PatchOptions(teacher_weight=0.5, overwrite=True)
    report = patch_to_target(*arguments(pair, output), "old=2", how, FEW)
    assert len(asked) == 1  # whatever is measured and trained after it
    closed = tmp_path / "closed.safetensors"
    options = PatchOptions(density=0.1, score="sum", propagate=True, teacher_weight=0.5)
    patch_checkpoint(base, tuned, None, stats, options, patch_file=closed, retain=retain)
    steps = distill_patch(closed, base, tuned, stats, retain, tmp_path / "steps", distill=FEW, teacher_weight=0.5)
    assert folder_digest(output, TOLD) == folder_digest(tmp_path / "steps", TOLD)
    searched = {"asked": "old=2", "density": 0.1, "weight": FEW.weight, "missed": [], "distill": asdict(FEW)}
    assert report.target == searched
    assert report.distillation == steps.distillation
    assert report.options == steps.options


@pytest.mark.parametrize("method", ["tailor", "magnitude"])
def test_a_finished_search_is_one_of_the_same_inputs_and_options(pair, tmp_path, method):
    base, tuned, output, stats, retain = arguments(pair, tmp_path / "out")
    how = PatchOptions(method=method, propagate=False)
    patch_to_target(base, tuned, output, stats, retain, "old=2", how, FEW)
    again = replace(how, resume=True)
    assert patch_to_target(base, tuned, output, stats, retain, "old=2", again, FEW).is_earlier
    other = tmp_path / "other"
    calibrate_model(base, pair / "data.jsonl", other, CalibrateOptions(12, 24))
    for samples, options in ((other, again), (retain, replace(again, exclude=("*norm*",)))):
        with pytest.raises(TailorError, match="of another run"):
            patch_to_target(base, tuned, output, stats, samples, "old=2", options, FEW)


def test_what_has_no_density_to_pick_or_no_patch_file_is_refused(pair, tmp_path):
    what = arguments(pair, tmp_path / "out")
    with pytest.raises(TailorError, match="interpolate keeps every entry"):
        patch_to_target(*what, "old=99", PatchOptions(method="interpolate", weight=0.5), FEW)
    with pytest.raises(TailorError, match="new rows of --resized-vocab"):
        patch_to_target(*what, "old=99", PatchOptions(resized_vocab=True), FEW)
    copytree(pair / "base", tmp_path / "fp8")
    quantise(tmp_path / "fp8", "block")
    with pytest.raises(TailorError, match="are quantised"):
        patch_to_target(tmp_path / "fp8", *what[1:], "old=99", OPTIONS, FEW)
    assert not what[2].exists()


@pytest.mark.parametrize("how", [OPTIONS, PatchOptions(method="magnitude")], ids=["tailor", "magnitude"])
def test_a_closed_form_that_reached_the_target_is_written_where_no_training_does(pair, tmp_path, monkeypatch, how):
    import tailorcli.patching.aim as module

    trained, told = module._Search._trained, []
    missed, closed = {"old": 0.97, "new": 0.95}, {0.02: 0.999, 0.05: 0.995, 0.1: 0.98}
    monkeypatch.setattr(
        module._Search,
        "_trained",
        lambda *given: replace(trained(*given), kept=missed, kept_before={"old": closed[given[2]], "new": 0.9}),
    )
    shares = iter([{"old": old, "new": density} for density, old in closed.items()])
    monkeypatch.setattr("tailorcli.training.run.Teaching.kept", lambda *_: next(shares))
    places = (*arguments(pair, tmp_path / "out"), "old=99", how, FEW)
    file = tmp_path / "p.safetensors"
    report = patch_to_target(*places, patch_file=file, tell=told.append)
    assert told[-1].startswith("target old=99 reached by no training, so that the closed form at density 0.05 is")
    assert report.target["kept"] == {"old": 0.995, "new": 0.05}
    assert report.target["missed"] == [missed] * ATTEMPTS
    assert report.distillation is None
    own = (pair / "stats", pair / "retain") if how.fits_statistics else (None, None)
    plain = replace(how.resolved(True, distilled=True), density=0.05)
    patch_checkpoint(pair / "base", pair / "tuned", tmp_path / "plain", own[0], plain, retain=own[1])
    reports = ("tailor_run.json", "tailor_report.json")
    assert folder_digest(tmp_path / "out", reports) == folder_digest(tmp_path / "plain", reports)
    base, out = read_tensors(pair / "base"), read_tensors(tmp_path / "out")
    with PatchFile.open(file) as opened:
        assert opened.report().target == report.target
        for name in opened.tensors:
            base[name][opened.mask(name)] = opened.values(name)
    assert all(bits(value) == bits(base[name]) for name, value in out.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "p.safetensors", "plain"]
    again = replace(how, resume=True)
    assert patch_to_target(*places[:-2], again, FEW, patch_file=file).is_earlier
    for changed in (replace(FEW, rate=0.2), replace(FEW, weight=5.0)):
        with pytest.raises(TailorError, match="of another run"):
            patch_to_target(*places[:-2], again, changed, patch_file=file)


def test_a_search_for_which_there_is_no_room_is_refused(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("tailorcli.patching.aim.free_bytes", lambda place: 0)
    with pytest.raises(TailorError, match="not enough disk"):
        patch_to_target(*arguments(pair, None), "old=99", OPTIONS, FEW, patch_file=tmp_path / "p.safetensors")
    assert not [*tmp_path.iterdir()]


def test_a_search_that_was_broken_off_is_finished_to_the_same_bytes(pair, tmp_path, monkeypatch):
    import tailorcli.patching.aim as module

    patch_to_target(*arguments(pair, tmp_path / "whole"), "old=60", OPTIONS, FEW)

    def broken(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "apply_patch", broken)
        with pytest.raises(KeyboardInterrupt):
            patch_to_target(*arguments(pair, tmp_path / "out"), "old=60", OPTIONS, FEW)
    (tmp_path / "out.target" / "hidden-0-1.part").touch()  # of a kill while hidden states were put into a file
    lock_file(tmp_path / "out.target" / "closed-1.safetensors", folder=False).touch()  # of one while that was written
    again = replace(OPTIONS, resume=True)
    with pytest.raises(TailorError, match="a search with other options"):
        patch_to_target(*arguments(pair, tmp_path / "out"), "old=60", again, replace(FEW, steps=5))
    patch_to_target(*arguments(pair, tmp_path / "out"), "old=60", again, FEW)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "whole")
    assert patch_to_target(*arguments(pair, tmp_path / "out"), "old=60", again, FEW).is_earlier


def test_the_command(pair, tmp_path):
    base, tuned, output, stats, retain = arguments(pair, tmp_path / "out")
    both = ("--stats", stats, "--retain", retain)
    how = ("--target", "old=60", "--no-propagate", "--distill-steps", 2)
    result = run("patch", base, tuned, *both, *how, "-o", output)
    assert "target old=60" in result.stderr
    refused("patch", base, tuned, "--stats", stats, *how, "-o", tmp_path / "no", mentions=["both statistics"])
    refused("patch", base, tuned, *both, "--target", "half", "-o", tmp_path / "no", mentions=["not understood"])
    assert invoke("patch", base, tuned, *both, *how, "--density", 0.1, "-o", tmp_path / "no").exit_code == 2


def test_without_an_output_there_is_nothing_to_write(tmp_path):
    with pytest.raises(TailorError, match="nothing to write"):
        patch_to_target(tmp_path, tmp_path, None, tmp_path, tmp_path, "old=99")


def test_the_whole_job_searches_as_its_steps_do_and_tells_its_plan(pair, tmp_path):
    base, tuned, output, stats, retain = arguments(pair, tmp_path / "steps")
    how = ("--target", "old=60", "--no-propagate", "--distill-steps", 4, "--distill-batch-size", 4)
    job = ("--data", pair / "data.jsonl", "--num-samples", 12, "--seq-len", 24)
    shown = run("patch", base, tuned, *job, *how, "-o", tmp_path / "out", "--dry-run")
    assert "search for old=60" in shown.stdout
    given = ("patch", base, tuned, "--stats", stats, "--retain", retain, *how, "-o", tmp_path / "out", "--dry-run")
    assert "for old=60: closed forms at densities 0.02 to 0.1" in " ".join(run(*given).stdout.split())
    search = json.loads(run(*given, "--json").stdout)["search"]
    assert search == {"target": "old=60", "densities": [0.02, 0.05, 0.1], "trainings": ATTEMPTS}
    assert list(tmp_path.iterdir()) == []
    told = run("patch", base, tuned, *job, *how, "-o", tmp_path / "out")
    assert "target old=60 reached" in told.stderr
    run("patch", base, tuned, "--stats", stats, "--retain", retain, *how, "-o", output)
    assert folder_digest(tmp_path / "out", TOLD) == folder_digest(output, TOLD)
    assert "already finished" in run("patch", base, tuned, *job, *how, "-o", tmp_path / "out", "--resume").stdout
    another = (*how[:1], "old=61", *how[2:])
    refused("patch", base, tuned, *job, *another, "-o", tmp_path / "out", "--resume", mentions=["another run"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "steps"]
