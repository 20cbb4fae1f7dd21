"""The frontier and its area, and a sweep over a tiny pair: every setting once, picked by the rule, taken up again."""

import json
import math
import shlex
import shutil

import numpy as np
import pytest
from helpers import make_adapter, make_pair, swap_two_letters, write_data
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tailorcli.sweep.scoring as scoring
from tailorcli import (
    Checkpoint,
    EvaluateOptions,
    PatchOptions,
    TailorError,
    calibrate_model,
    evaluate_models,
    patch_checkpoint,
)
from tailorcli.cli import app
from tailorcli.evaluation.metrics import frontier, frontier_area
from tailorcli.options import PRESETS, CalibrateOptions, DistillOptions
from tailorcli.patching.distilled import distill_checkpoint
from tailorcli.sweep.run import run_sweep
from tailorcli.sweep.settings import Setting, settings_of

ENDS = ((60.0, 20.0), (10.0, 50.0))  # old and new of base and tuned


def test_labels_tell_settings_apart():
    settings = [
        Setting(PatchOptions(), retained=True),
        *(Setting(PatchOptions(**{name: value}), retained=True) for name, value in DIFFERENT.items()),
    ]
    assert len({setting.label for setting in settings}) == len(settings)
    assert settings[0].label == "joint, propagated, density 0.1, retain weight 0.3"
    assert (
        Setting(PatchOptions(propagate=False), retained=True).label == "joint, retained, density 0.1, retain weight 0.3"
    )


DIFFERENT = {
    **{"density": 0.2, "retain_weight": 0.1, "omega": 0.0, "damping": 0.01, "weight": 0.8, "solver": "none"},
    "propagate": False,
}


def test_frontier_keeps_what_nothing_beats():
    points = [(1, 5), (2, 4), (2, 5), (3, 1), (0, 9), (3, 0.5), (2, 5)]
    assert [points[i] for i in frontier(points)] == [(0, 9), (2, 5), (3, 1)]


def area(*points):
    (base, tuned), (new_base, new_tuned) = ENDS
    old = [base, tuned, *(p[0] for p in points)]
    new = [new_base, new_tuned, *(p[1] for p in points)]
    return frontier_area(old, new, *ENDS)


def test_area_of_the_straight_line_is_a_half():
    assert area() == pytest.approx(0.5)
    assert area((40.0, 30.0)) == pytest.approx(0.5)  # a point on it
    assert area((30.0, 15.0)) == pytest.approx(0.5)  # one below is no part of the frontier


def test_area_of_known_shapes():
    assert area((60.0, 50.0)) == pytest.approx(1.0)  # all of both
    assert area((40.0, 50.0)) == pytest.approx(0.5 + 0.5 / 2)
    assert area((80.0, 50.0)) == pytest.approx(1.5)  # more of the old than the base had
    assert area((60.0, 90.0)) == pytest.approx(2.0)
    assert area((30.0, 42.0), (40.0, 32.0), (80.0, 30.0)) == pytest.approx(1.5 * 0.75)  # the last is above both others


def test_area_of_points_beyond_the_ends_is_that_of_their_lines_between_them():
    assert area((10.0, 90.0)) == pytest.approx(0.8)  # (-1/4, 2): its line to the base is at 8/5 over the tuned model
    assert area((0.0, 50.0)) == pytest.approx(0.5)
    assert area((80.0, 0.0)) == pytest.approx(0.6)  # (3/2, -1/4): its line to the tuned model ends at 6/5
    assert area((10.0, 90.0), (80.0, 0.0)) == pytest.approx(0.5 * (2 - 9 / 28) * (3 / 2 - 1 / 4 * 7 / 9))
    assert frontier_area([10.0], [90.0], *ENDS) == 0.0
    assert frontier_area([80.0], [0.0], *ENDS) == 0.0


def test_area_against_sums_over_fine_strips():
    rng = np.random.default_rng(0)
    points = [(float(a), float(b)) for a, b in rng.uniform((20, 10), (60, 50), (9, 2))]
    everything = [(60.0, 10.0), (20.0, 50.0), *points]
    old = np.linspace(20, 60, 4001)
    new = np.zeros_like(old)
    for a in everything:  # the highest of all straight lines between two points: the upper hull
        for b in everything:
            if a[0] < b[0]:
                new = np.maximum(
                    new, np.where((old >= a[0]) & (old <= b[0]), np.interp(old, *zip(a, b, strict=True)), 0)
                )
    highest = max(everything, key=lambda p: p[1])
    new = np.where(old < highest[0], highest[1], new)
    assert area(*points) == pytest.approx(float(((new - 10) / 40).mean()), abs=1e-3)


def test_no_area_where_nothing_was_forgotten():
    assert math.isnan(frontier_area([1, 2], [1, 2], (1, 2), (1, 2)))


def test_settings_are_every_combination_once():
    found = settings_of(
        PatchOptions(), densities=[0.1, 0.2], retain_weights=[0.0, 0.3], methods=["interpolate", "dare"], weights=[0.5]
    )
    assert [s.label for s in found] == [
        *("joint, density 0.1", "joint, propagated, density 0.1, retain weight 0.3"),
        *("joint, density 0.2", "joint, propagated, density 0.2, retain weight 0.3"),
        *("interpolate 0.5", "dare, density 0.1", "dare, density 0.2"),
    ]
    assert len({s.family for s in found}) == 4
    assert len(settings_of(PatchOptions(), densities=[0.1, 0.1])) == 1


def test_settings_that_use_no_statistics_are_there_once_and_have_no_retain_term():
    found = settings_of(
        PatchOptions(), omegas=[0.5, 1.0], solvers=["none"], retain_weights=[0.0, 0.3], distill=DistillOptions(steps=1)
    )
    assert [setting.label for setting in found] == [
        *("none, density 0.1", "none, retained, density 0.1, retain weight 0.3"),
        "none, retained, distilled, density 0.1, retain weight 0.3, distill steps 1",
        *("none, density 0.1, omega 1", "none, distilled, density 0.1, omega 1, distill steps 1"),
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = make_pair(tmp_path_factory.mktemp("sweep"))
    for name, seed in (("old", 1), ("new", 2), ("old-val", 3), ("new-val", 4)):
        write_data(folder / f"{name}.jsonl", count=6, seed=seed)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats", CalibrateOptions(num_samples=8))
    options = CalibrateOptions(num_samples=4, seq_len=16, synthetic=True)
    calibrate_model(folder / "base", None, folder / "retain", options)
    return folder


def tasks(pair, suffix=""):
    return [f"{name}={pair / f'{name}{suffix}.jsonl'}:text" for name in ("old", "new")]


def run(pair, output, settings, **more):
    inputs = {"origin": ["old"], "target": ["new"], "stats": pair / "stats", "retain": pair / "retain"} | more
    return run_sweep(pair / "base", pair / "tuned", settings, tasks(pair), output, **inputs)


SETTINGS = settings_of(
    PatchOptions(), densities=[0.1, 0.5], retain_weights=[0.0, 0.3], methods=["interpolate"], weights=[0.3, 0.7]
)


def test_every_point_is_what_patch_and_evaluate_give(pair, tmp_path):
    report = run(pair, tmp_path / "out", SETTINGS, validation=tasks(pair, "-val"))
    assert [p.label for p in report.points] == ["base", "tuned", *(s.label for s in SETTINGS)]
    setting = SETTINGS[1]
    patch_checkpoint(
        pair / "base", pair / "tuned", tmp_path / "p", pair / "stats", setting.options, retain=pair / "retain"
    )
    for part, suffix in (("test", ""), ("validation", "-val")):
        alone = evaluate_models([tmp_path / "p"], tasks(pair, suffix), origin=["old"], target=["new"])
        point = next(p for p in report.points if p.label == setting.label)
        summary = alone.figures["p"]["summary"]
        for name in ("origin", "target", "h_score"):
            assert point.at(part, name) == summary[name].value
    assert not (tmp_path / "out" / "work").exists()
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert set(written["picked"]) == {"joint", "joint, propagated", "interpolate"}
    for family, label in written["picked"].items():
        members = [p for p in report.points if p.family == family]
        assert label == max(members, key=lambda p: p.at("validation", "h_score")).label


def test_settings_that_differ_have_labels_that_differ():
    close = [PatchOptions(density=0.1), PatchOptions(density=0.10000001), PatchOptions(density=0.1, damping=0.0100001)]
    assert [Setting(one).label for one in close] == [
        *("joint, density 0.1", "joint, density 0.10000001", "joint, density 0.1, damping 0.0100001")
    ]
    assert Setting(PatchOptions(method="lines", alpha=0.7)).label == "lines, alpha 0.7, beta 0.3"


def test_a_distilled_setting_is_what_patch_distill_gives(pair, tmp_path):
    how = DistillOptions(steps=3, batch_size=2)
    plain, distilled = settings_of(PatchOptions(), retain_weights=[0.3], distill=how)
    assert distilled == Setting(plain.options, True, how)
    other = Setting(PatchOptions(method="magnitude", density=0.2), distill=how)
    assert plain.family == "joint, propagated"
    assert distilled.family == "joint, retained, distilled"  # training needs no propagation before it
    assert distilled.label == (
        "joint, retained, distilled, density 0.1, retain weight 0.3, distill steps 3, distill batch size 2"
    )
    assert Setting(PatchOptions(propagate=True), True, how).family == "joint, propagated, distilled"
    assert Setting(PatchOptions(), True, DistillOptions(on="responses")).label.endswith(", distill on responses")
    report = run(pair, tmp_path / "sweep", [plain, distilled, other])
    assert [point.family for point in report.points[3:]] == [distilled.family, "magnitude, distilled"]
    for number, setting in enumerate((distilled, other)):
        out, file = tmp_path / f"out{number}", tmp_path / f"{number}.safetensors"
        inputs = (pair / "base", pair / "tuned", out, pair / "stats", pair / "retain")
        distill_checkpoint(*inputs, setting.options, how, patch_file=file)
        alone = evaluate_models([out], tasks(pair), origin=["old"], target=["new"])
        point = report.points[3 + number]
        for name in ("origin", "target", "h_score"):
            assert point.at("test", name) == alone.figures[out.name]["summary"][name].value
        assert point.patch_bytes == pytest.approx(file.stat().st_size, rel=0.01)  # paths in it differ
    with pytest.raises(TailorError, match="samples of both"):
        run(pair, tmp_path / "other", [other], retain=None)


def test_keep_picks_the_most_of_the_new_that_keeps_enough(pair, tmp_path):
    report = run(pair, tmp_path, SETTINGS, min_old_kept=95.0)
    floor = 0.95 * report.points[0].at("test", "origin")
    for family, label in report.picked.items():
        members = [p for p in report.points if p.family == family]
        enough = [p for p in members if p.at("test", "origin") >= floor]
        if enough:
            assert label == max(enough, key=lambda p: p.at("test", "target")).label
        else:
            assert label == max(members, key=lambda p: p.at("test", "origin")).label


def test_a_rerun_evaluates_only_what_is_new(pair, tmp_path, monkeypatch):
    first = run(pair, tmp_path, SETTINGS[:2])
    seen = []
    real = scoring.score_model
    monkeypatch.setattr(scoring, "score_model", lambda *args: seen.append(args[0]) or real(*args))
    again = run(pair, tmp_path, SETTINGS[:3])
    assert len(seen) == 1
    assert [p.at("test", "h_score") for p in again.points[:4]] == [p.at("test", "h_score") for p in first.points]
    (pair / "old.jsonl").write_text((pair / "old.jsonl").read_text() * 2)  # other data: nothing may be reused
    run(pair, tmp_path, SETTINGS[:1])
    assert len(seen) == 4


def scored_models(monkeypatch):
    """The names of the folders that are evaluated from now on: a list that grows."""
    seen, real = [], scoring.score_model
    monkeypatch.setattr(scoring, "score_model", lambda path, *rest: seen.append(path.name) or real(path, *rest))
    return seen


def test_other_statistics_are_other_results(pair, tmp_path, monkeypatch):
    """The second of the two settings reads the retained statistics, too: what a setting reads decides."""
    run(pair, tmp_path / "o", SETTINGS[:2])
    options = CalibrateOptions(num_samples=5, seed=1)
    calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / "stats", options)
    calibrate_model(pair / "base", pair / "data.jsonl", tmp_path / "retain", options)
    seen = scored_models(monkeypatch)
    run(pair, tmp_path / "o", SETTINGS[:2])
    assert seen == []
    run(pair, tmp_path / "o", SETTINGS[:2], retain=tmp_path / "retain")
    assert seen == ["model"]
    run(pair, tmp_path / "o", SETTINGS[:2], stats=tmp_path / "stats")
    assert seen == ["model"] * 3


def test_weights_that_no_fingerprint_samples_measure_again(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("tailorcli.checkpoint.folder._SAMPLE_BYTES", 8)
    shutil.copytree(pair / "tuned", tmp_path / "tuned")
    given = {"origin": ["old"], "target": ["new"]}
    arguments = (pair / "base", tmp_path / "tuned", [], tasks(pair), tmp_path / "out")
    run_sweep(*arguments, **given)
    before = Checkpoint.open(tmp_path / "tuned").fingerprint()
    weights = load_file(tmp_path / "tuned" / "model.safetensors")
    weights["lm_head.weight"][5] += 1.0
    save_file(weights, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    assert Checkpoint.open(tmp_path / "tuned").fingerprint() == before
    seen = scored_models(monkeypatch)
    run_sweep(*arguments, **given)
    assert seen == ["base", "tuned"]


def test_other_ends_of_a_text_measure_again(pair, tmp_path, monkeypatch):
    """They lie in generation_config.json, and decide what kind generate writes."""
    shutil.copytree(pair / "tuned", tmp_path / "tuned")
    settings = settings_of(PatchOptions(), methods=["interpolate"], weights=[0.5])[1:]
    given = (pair / "base", tmp_path / "tuned", settings, tasks(pair), tmp_path / "o")
    run_sweep(*given, origin=["old"], target=["new"])
    file = tmp_path / "tuned" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 5}))
    seen = scored_models(monkeypatch)
    run_sweep(*given, origin=["old"], target=["new"])
    assert seen == ["base", "tuned", "model"]


@pytest.mark.parametrize("what", ["__version__", "_code_digest"])
def test_another_version_or_other_code_measures_again(pair, tmp_path, monkeypatch, what):
    run(pair, tmp_path, SETTINGS[:1])
    monkeypatch.setattr(scoring, what, "9.9.9" if what == "__version__" else lambda: "changed")
    seen = scored_models(monkeypatch)
    run(pair, tmp_path, SETTINGS[:1])
    assert seen == ["base", "tuned", "model"]


def test_the_code_digest_is_of_every_source_file(tmp_path, monkeypatch):
    for folder in ("core", "sweep"):
        (tmp_path / folder).mkdir()
    for name in ("sweep/scoring.py", "core/scores.py"):
        (tmp_path / name).write_text("x = 1")
    monkeypatch.setattr(scoring, "__file__", str(tmp_path / "sweep" / "scoring.py"))
    first = scoring._code_digest()
    assert scoring._code_digest() == first
    (tmp_path / "core" / "scores.py").write_text("x = 2")
    second = scoring._code_digest()
    (tmp_path / "core" / "new.py").write_text("")
    assert len({first, second, scoring._code_digest()}) == 3


def test_each_model_is_encoded_with_its_own_tokenizer(pair, tmp_path):
    """Tuned's has two letters the other way round; base and tuned get what evaluate gives them, a patch tuned's."""
    make_pair(tmp_path)
    swap_two_letters(tmp_path / "tuned")
    for name in ("old", "new"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"abba baba {name} aabb"}) + "\n")
    settings = settings_of(PatchOptions(omega=1.0, solver="none"), solvers=["none"], omegas=[1.0])
    inputs = {"origin": ["old"], "target": ["new"]}
    report = run_sweep(tmp_path / "base", tmp_path / "tuned", settings, tasks(tmp_path), tmp_path / "o", **inputs)
    patch_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "p", options=settings[0].options)
    alone = evaluate_models([tmp_path / name for name in ("base", "tuned", "p")], tasks(tmp_path)).scores
    for point, name in zip(report.points, ("base", "tuned", "p"), strict=True):
        for task in ("old", "new"):
            assert point.scores["test"][task].loss.tolist() == alone[name][task].loss.tolist(), (name, task)


def test_an_adapter_is_swept_as_the_model_that_it_makes(tmp_path, monkeypatch):
    make_adapter(tmp_path, target_modules=["q_proj", "down_proj"])
    for name, seed in (("old", 1), ("new", 2)):
        write_data(tmp_path / f"{name}.jsonl", count=4, seed=seed)
    settings = settings_of(PatchOptions(omega=1.0, solver="none"), solvers=["none"], omegas=[1.0])
    inputs = {"origin": ["old"], "target": ["new"]}
    arguments = (tmp_path / "base", tmp_path / "adapter", settings, tasks(tmp_path), tmp_path / "o")
    report = run_sweep(*arguments, **inputs)
    merged = evaluate_models([tmp_path / "merged"], tasks(tmp_path)).scores["merged"]
    for task in ("old", "new"):
        assert report.points[1].scores["test"][task].loss == pytest.approx(merged[task].loss, rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["settings", "sweep.json"]
    seen = scored_models(monkeypatch)
    run_sweep(*arguments, **inputs)
    assert seen == []


def test_an_interrupted_sweep_leaves_no_half_written_point(pair, tmp_path, monkeypatch):
    real = scoring.score_model

    def fail(path, *rest):
        if path.name == "model":
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(scoring, "score_model", fail)
    with pytest.raises(KeyboardInterrupt):
        run(pair, tmp_path, SETTINGS)
    assert len(list((tmp_path / "settings").iterdir())) == 2  # base and tuned
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "sweep.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"validation": ["old=x.jsonl:text"]}, "no file"),
        ({"origin": ["elder"]}, "names no task"),
        ({"origin": [], "target": []}, "needs old and new"),
    ],
)
def test_errors(pair, tmp_path, change, words):
    inputs = {"origin": ["old"], "target": ["new"], "stats": pair / "stats"} | change
    with pytest.raises(TailorError, match=words):
        run_sweep(pair / "base", pair / "tuned", SETTINGS[:1], tasks(pair), tmp_path, **inputs)


def test_statistics_that_do_not_fit_are_refused_before_any_model_runs(pair, tmp_path, monkeypatch):
    """Also those that only a later setting has use for."""

    def no_model(*_):
        raise AssertionError("a model was run")

    monkeypatch.setattr(scoring, "score_model", no_model)
    other = make_pair(tmp_path / "other", layers=3)
    calibrate_model(other / "base", other / "data.jsonl", other / "stats", CalibrateOptions(num_samples=4))
    settings = [*settings_of(PatchOptions(), methods=["interpolate"], weights=[0.5]), *SETTINGS]
    with pytest.raises(TailorError, match=r"^joint.*propagated.*statistics"):
        run(pair, tmp_path / "out", settings, retain=other / "stats")
    distilled = [Setting(PatchOptions(), retained=True, distill=DistillOptions(steps=1))]
    with pytest.raises(TailorError, match=r"distilled.*both statistics"):
        run(pair, tmp_path / "out", distilled, retain=None)
    assert not (tmp_path / "out").exists()


def test_what_uses_no_statistics_goes_with_settings_that_do(pair, tmp_path, monkeypatch):
    """Kinds of settings that differ in omega alone are planned each, before any model runs."""
    settings = settings_of(PatchOptions(), omegas=[0.5, 1.0], solvers=["none"], retain_weights=[0.3])
    report = run(pair, tmp_path / "out", settings)
    assert [point.family for point in report.points[2:]] == ["none, retained", "none"]
    wrong = Setting(PatchOptions(solver="none", omega=1.0), retained=True)
    monkeypatch.setattr(scoring, "score_model", None)
    with pytest.raises(TailorError, match="--retain is for the method tailor with statistics"):
        run(pair, tmp_path / "other", [settings[0], wrong])


def test_the_commands_of_a_sweep_make_its_models(pair, tmp_path):
    settings = settings_of(
        PatchOptions(),
        omegas=[1.0],
        solvers=["joint", "none"],
        retain_weights=[0.0, 0.3],
        methods=["dare", "interpolate"],
        weights=[0.3],
        distill=DistillOptions(steps=1, batch_size=2),
    )
    inputs = {name: str(pair / name) for name in ("base", "tuned", "stats", "retain")}
    points = {point.label: point for point in run(pair, tmp_path / "sweep", settings).points}
    for setting in settings:
        _, *words = shlex.split(setting.command(inputs).replace("\\\n", ""))
        made = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "model"), "--overwrite"])
        assert made.exit_code == 0, made.output
        found = evaluate_models([tmp_path / "model"], tasks(pair)).figures["model"]["tasks"]
        for task in ("old", "new"):
            assert points[setting.label].at("test", task) == found[task].value


def test_propagation_is_of_the_settings_that_can_be_propagated(pair, tmp_path):
    settings = settings_of(
        PatchOptions(propagate=True),
        solvers=["joint", "none"],
        retain_weights=[0.0, 0.3],
        methods=["interpolate", "magnitude"],
        weights=[0.5],
    )
    assert [setting.resolved.propagate for setting in settings].count(True) == 1
    report = run(pair, tmp_path, settings)
    [point] = [point for point in report.to_dict()["points"] if "propagated" in point["label"]]
    assert point["options"]["retained"]
    [plain] = [point for point in report.to_dict()["points"] if point["family"] == "interpolate"]
    assert not plain["options"]["retained"]


def test_a_distilled_point_says_how(pair, tmp_path):
    setting = Setting(PatchOptions(propagate=False), retained=True, distill=DistillOptions(steps=1, batch_size=2))
    point = run(pair, tmp_path, [setting]).to_dict()["points"][-1]
    assert (point["options"]["distill"]["steps"], point["options"]["distill"]["batch_size"]) == (1, 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--omega", "0.3", "--method", "interpolate"], "--omega needs --stats"),
        (["--propagate", "--method", "interpolate"], "--propagate is for the joint solver"),
        (["--retain", "RETAIN", "--method", "interpolate"], "--retain is for settings of --stats"),
        (["--retain", "RETAIN", "--stats", "STATS", "--retain-weight", "0"], "--retain is for settings of --stats"),
    ],
)
def test_options_that_would_be_ignored_are_refused(pair, tmp_path, given, said):
    ends = ["--origin", "old", "--target", "new"]
    command = [str(pair / "base"), str(pair / "tuned"), "-o", str(tmp_path / "out"), *ends]
    words = [word for task in tasks(pair) for word in ("--task", task)]
    given = [str(pair / word.lower()) if word.isupper() else word for word in given]
    found = CliRunner().invoke(app, ["sweep", *command, *words, *given])
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.replace("│", " ").split())


def test_a_foreign_folder_is_refused(pair, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(TailorError, match="other files"):
        run(pair, tmp_path, SETTINGS[:1])


def test_different_validation_tasks_are_refused(pair, tmp_path):
    with pytest.raises(TailorError, match="validation file"):
        run(pair, tmp_path, SETTINGS[:1], validation=tasks(pair, "-val")[:1])


def test_command_line(pair, tmp_path):
    specs = [part for spec in tasks(pair) for part in ("--task", spec)]
    arguments = ["sweep", pair / "base", pair / "tuned", "--stats", pair / "stats", "--retain", pair / "retain"]
    arguments += [*specs, "--origin", "old", "--target", "new", "-o", tmp_path / "o", "--density", 0.2, "--limit", 4]
    arguments += ["--method", "interpolate", "--method", "magnitude", "--weight", 0.5]
    arguments += ["--distill", "--distill-steps", 2, "--plot", tmp_path / "f.png"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert "area" in result.output
    assert (tmp_path / "f.png").stat().st_size > 10_000
    result = CliRunner().invoke(app, [str(a) for a in (*arguments[:-2], "--json")])
    report = json.loads(result.stdout)
    families = [p["family"] for p in report["points"][2:]]
    assert families == ["joint, propagated", "joint, retained, distilled", "interpolate", "magnitude"]
    without = [a for a in arguments[:-2] if a not in ("--retain", pair / "retain")]
    result = CliRunner().invoke(app, [str(a) for a in (*without, "--retain-weight", 0.3)])
    assert result.exit_code == 2


def test_default_evaluation_options_are_those_of_evaluate():
    assert run_sweep.__kwdefaults__["options"] == EvaluateOptions()


def test_preset_paper_is_the_papers_own_setting(pair, tmp_path):
    """Its sweep with the true diagonal of the inverse, a tenth of the entries, both scores alike, no retain term."""
    assert PRESETS["paper"] == {
        **{"density": 0.1, "omega": 0.5, "solver": "sequential"},
        **{"damping": 0.01, "block_size": 128},
    }
    inputs = ["patch", str(pair / "base"), str(pair / "tuned"), "--stats", str(pair / "stats")]
    written = {}
    for name, extra in {
        "preset": ["--preset", "paper"],
        "spelt": ["--solver", "sequential", "--density", "0.1", "--omega", "0.5"],
        "denser": ["--preset", "paper", "--density", "0.2"],
    }.items():
        result = CliRunner().invoke(app, [*inputs, "-o", str(tmp_path / name), *extra])
        assert result.exit_code == 0, result.output
        written[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert written["preset"] == written["spelt"] != written["denser"]
    for extra in (["--preset", "papier"], ["--preset", "paper", "--retain", str(pair / "stats")]):
        result = CliRunner().invoke(app, [*inputs, "-o", str(tmp_path / "x"), *extra])
        assert result.exit_code in (1, 2)
        assert not (tmp_path / "x").exists()
