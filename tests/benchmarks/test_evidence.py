"""The benchmark of the evidence: its curves and pictures on points made by hand, and `quick` in a reduced form."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence import __main__ as program
from benchmarks.evidence import pairs, pictures, render, run, stored, summary
from benchmarks.quick import data as quick_data
from benchmarks.quick import model as quick_model
from benchmarks.real.model import Recipe
from tailorcli import PatchOptions, patch_checkpoint
from tailorcli.demo.text import build_tokenizer
from tailorcli.evaluation.metrics import Roles
from tailorcli.patchfile.records import TensorRecord
from tailorcli.patchfile.report import REPORT_FILE, PatchReport, load_report
from tailorcli.sweep.outcome import Point, SweepReport
from tailorcli.sweep.settings import Setting


def point(setting, old, new, label=None):
    """A point whose label, unless it is an end, says nothing of its options."""
    figures = {"origin": old, "target": new, "h_score": 2 * old * new / (old + new)}
    of_part = {name: np.full(5, value) for name, value in figures.items()}
    parts = {"test": of_part, "validation": of_part}
    if setting is None:
        return Point(label, label, None, parts, {}, 0.0)
    return Point(f"point {hash(setting)}", setting.family, setting.resolved.to_dict(), parts, {}, 1.0)


def setting_of(retained=False, **options):
    return Setting(PatchOptions(**options), retained)


def group_of(*seeds, own=()):
    pair = pairs.Pair("new", 0, *(Path(),) * 5, {}, ("old",), ("new",), 8)
    ends = [point(None, 60.0, 20.0, "base"), point(None, 30.0, 60.0, "tuned")]
    reports = [SweepReport([*ends, *points], Roles(("old",), ("new",)), (), {}, {}, "", 0.0) for points in seeds]
    return summary.Group("new", tuple(run.Outcome(pair, report, tuple(own)) for report in reports))


def labelled(setting, old, new):
    """A point under its setting's own label."""
    return replace(point(setting, old, new), label=setting.label)


def test_our_settings_stand_against_each_method_at_its_best():
    settings = {
        setting_of(method="interpolate", weight=0.5): (50.0, 50.0),
        setting_of(method="interpolate", weight=0.7): (40.0, 55.0),
        setting_of(method="graft"): (56.0, 52.0),
        setting_of(solver="sequential"): (55.0, 45.0),
        setting_of(True, retain_weight=0.3): (45.0, 55.0),
        setting_of(True, retain_weight=1.0): (58.0, 53.0),
        setting_of(True, retain_weight=1.0, density=0.5): (59.0, 58.0),
    }
    points = [labelled(setting, *figures) for setting, figures in settings.items()]
    picked = replace(points[-2], family=run.PICKED, label=run.PICKED)
    group = group_of(points, points, own=[picked])
    assert [title for title, *_ in group.ours()] == [
        *("default", "retain weight picked on written samples", "picked on validation data")
    ]
    assert run.PICKED not in group.families()
    all_of_them = "ahead of *interpolate 0.5*, *graft, density 0.1*, *sequential, density 0.1*."
    assert render.verdict(group).splitlines()[:3] == [
        "- The default is behind *interpolate 0.5*, *graft, density 0.1*; level with *sequential, density 0.1*.",
        f"- With the retain weight picked on written samples it is {all_of_them}",
        f"- The setting picked on validation data (retain weight 1) is {all_of_them}",
    ]
    short = render.short_table(group)
    lines = [line.split(" | ")[0].removeprefix("| ") for line in short.splitlines()[2:]]
    assert lines == [
        *("base", "tuned", "interpolate 0.5", "graft, density 0.1", "sequential, density 0.1 (the paper)"),
        "**density 0.1: default (retain weight 0.3)**",
        "**density 0.1: retain weight picked on written samples; picked on validation data (retain weight 1)**",
        "joint, propagated, density 0.5, retain weight 1",
    ]
    differences = render.difference_table(group, group.ours())
    assert "minus | default | 95% | each seed | retain weight picked on written samples" in differences


def test_the_bar_is_measured_against_each_method_at_its_best():
    settings = {
        setting_of(method="interpolate", weight=0.5): (50.0, 50.0),
        setting_of(method="lines", alpha=0.5): (52.0, 48.0),
        setting_of(solver="sequential"): (55.0, 45.0),
        setting_of(True, retain_weight=0.3): (45.0, 55.0),
        run.distilled(0.1): (59.7, 57.6),
        run.distilled(0.02): (50.0, 49.0),
    }
    points = [labelled(setting, *figures) for setting, figures in settings.items()]
    group = group_of(points, points)
    assert [title for title, *_ in group.distilled()] == ["distilled", "distilled, density 0.02"]
    assert render.bar(group, 99.0, 97.0).splitlines() == [
        "- A higher H than every other method at its best, at density 0.1: met.",
        "- At least 99% of the old: met (99.5%).",
        "- At least 97% of the new: missed (96.0%).",
        "- At density 0.02 a higher H than *interpolate 0.5*: missed (-0.51, -0.51 to -0.51).",
    ]
    assert group.share(summary.DISTILLED, run.distilled(0.1).label, "gain")[0] == pytest.approx(94.0)
    worse = {**settings, setting_of(method="fapm", density=0.5): (60.0, 60.0)}
    points = [labelled(setting, *figures) for setting, figures in worse.items()]
    assert "missed against *fapm, density 0.5*" in render.bar(group_of(points), 99.0, 97.0)
    page = render.section("quick", group, "", "x.png")
    assert f"| {run.distilled(0.1).label} | 59.7 | 57.6 |" in render.grid_table(group)
    assert "### The bar" in page
    assert "| distilled | 95% | each seed | distilled, density 0.02" in page
    assert "**density 0.1: distilled**" in render.short_table(group)
    assert "**distilled, density 0.02**" in render.short_table(group)


def test_what_is_distilled_on_many_samples_has_its_own_column_and_bar():
    few, other = labelled(run.distilled(0.1), 59.0, 59.0), labelled(setting_of(method="fapm"), 50.0, 50.0)
    many = run.on_many(labelled(run.distilled(0.1), 59.8, 59.4), 2048)
    group = group_of([few, many, other, labelled(setting_of(True, retain_weight=0.3), 45.0, 55.0)])
    assert [title for title, *_ in group.distilled()] == ["distilled", "distilled, 2,048 samples"]
    assert render.bar(group, 99.0, 97.0).splitlines()[3:] == [
        "- A higher H than every other method at its best, at density 0.1, 2,048 samples: met.",
        "- At least 99% of the old, 2,048 samples: met (99.7%).",
        "- At least 97% of the new, 2,048 samples: met (99.0%).",
    ]
    assert "The default, distilled on 2,048 samples, is ahead of *fapm" in render.verdict(group)


def test_what_was_propagated_before_it_was_distilled_says_so_where_nothing_else_was_measured():
    first, other = labelled(run.distilled(0.1, propagate=True), 59.0, 59.0), labelled(setting_of(method="fapm"), 50, 50)
    less = labelled(run.distilled(0.02, propagate=True), 52.0, 52.0)
    now = labelled(run.distilled(0.1), 60.0, 59.4)
    rest = [other, *(labelled(one, 50, 50) for one in (setting_of(method="interpolate", weight=0.5), setting_of(True)))]
    assert [title for title, *_ in group_of([first, now, less, *rest]).distilled()] == [
        *("distilled", "distilled, density 0.02, propagated first")
    ]
    group = group_of([first, less, *rest])
    told = render.bar(group, 99.0, 97.0)
    assert "at density 0.1, propagated first: met." in told
    assert "of the old, propagated first: " in told
    assert "At density 0.02, propagated first, a higher H than *interpolate 0.5*: met" in told
    assert "The default, distilled, propagated first, is ahead of" in render.verdict(group)


def test_a_distilled_patch_is_found_whatever_its_number_of_steps():
    points = [labelled(run.distilled(0.1, 100), 60.0, 60.0), labelled(setting_of(method="fapm"), 50.0, 50.0)]
    [(title, family, label)] = group_of(points).distilled()
    assert (title, family) == ("distilled", summary.DISTILLED)
    assert label.endswith("distill steps 100")
    assert "- A higher H than every other method at its best, at density 0.1: met." in render.bar(
        group_of(points), 99.0, 97.0
    )


DENSITIES = [setting_of(solver="sequential", density=d) for d in (0.5, 0.02, 0.1)]
OMEGAS = [setting_of(True, omega=o) for o in (1.0, 0.0, 0.5)]


def test_curves_are_found_by_the_options_and_averaged_over_the_seeds():
    other = [
        *(
            setting_of(solver="sequential", density=0.3, omega=0.1),
            setting_of(solver="sequential", density=0.4, weight=0.5),
        ),
        *(setting_of(True, retain_weight=0.1), setting_of(True, omega=0.2, retain_weight=0.1)),
        setting_of(True, omega=0.3, propagate=False),
        *(setting_of(density=0.2), setting_of(method="magnitude", density=0.2)),
    ]
    settings = [*DENSITIES, *OMEGAS, *other]
    first = [point(s, 40.0 + i, 30.0 + i) for i, s in enumerate(settings)]
    second = [
        replace(p, figures=point(s, 42.0 + i, 32.0 + i).figures)
        for i, (s, p) in enumerate(zip(settings, first, strict=True))
    ]
    own = [replace(point(setting_of(True, omega=0.7), 1.0, 1.0), family=run.OWN_DATA)]
    along_density, along_omega = summary.curves_of(group_of(first, second, own=own))
    assert (along_density.family, along_density.option) == ("sequential", "density")
    assert along_density.values == (0.02, 0.1, 0.5)
    assert along_density.figures["origin"] == (42.0, 43.0, 41.0)
    assert along_density.figures["target"] == (32.0, 33.0, 31.0)
    assert along_density.best == 1
    assert (along_omega.family, along_omega.option) == (summary.PROPAGATED, "omega")
    assert along_omega.values == (0.0, 0.5, 1.0)
    assert along_omega.figures["origin"] == (45.0, 46.0, 44.0)


@pytest.mark.parametrize("grid", ["text", run.SMALL, "multimodal"])
def test_grids_without_curves_have_no_picture(tmp_path, grid):
    points = [point(s, 40.0, 30.0) for s in run.GRIDS[grid].settings()]
    assert pictures.curves_part(grid, group_of(points), tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_the_quick_grid_has_all_four_curves():
    points = [point(s, 40.0, 30.0) for s in run.GRIDS["quick"].settings()]
    curves = {(c.family, c.option): c.values for c in summary.curves_of(group_of(points))}
    assert len(curves) == 4
    for family in ("sequential", summary.PROPAGATED):
        assert {0.1} < set(curves[family, "density"])
        assert curves[family, "omega"] == (0.0, 0.5, 1.0)
    labels = [setting.label for setting in run.GRIDS["quick"].settings()]
    assert len(set(labels)) == len(labels)
    assert {summary.DEFAULT, summary.PAPER} <= set(labels)


def test_the_density_and_omega_picture_says_what_is_seen(tmp_path):
    pytest.importorskip("matplotlib")
    figures = [(40.0, 50.0), (58.0, 25.0), (50.0, 48.0), (52.0, 44.0), (50.0, 46.0), (51.0, 45.0)]
    points = [point(s, *f) for s, f in zip([*DENSITIES, *OMEGAS], figures, strict=True)]
    text = pictures.curves_part("quick", group_of(points), tmp_path)
    assert (tmp_path / "density-omega-quick-new.png").read_bytes().startswith(b"\x89PNG")
    assert "(density-omega-quick-new.png)" in text
    assert "at density 0.1 with *sequential* (49.0, lowest 34.9)" in text
    assert "at omega 0 with *joint, propagated* (47.9, lowest 47.7)" in text
    assert "+2.0 and -2.0 with *joint, propagated*" in text


def made_report(layers):
    """A report with a decoder, a smaller stack of layers of a vision tower, an embedding and a tensor left at base."""

    def tensor(name, numel, tuned, before, after):
        distances = {"distance_tuned": tuned, "distance_before": before, "distance_after": after}
        errors = {"kind": "full", "error_before": 0.5, "error_after": 0.25}
        return TensorRecord(name, "patched", (numel,), "F32", **distances, **errors)

    decoder = [
        tensor(f"model.layers.{i}.mlp.{kind}.weight", 64, 10.0 + i, 2.0, 3.0)
        for i in range(layers)
        for kind in ("up", "down")
    ]
    tower = [tensor(f"tower.encoder.layer.{i}.fc.weight", 8, 100.0, 50.0, 60.0) for i in range(layers)]
    rest = [
        tensor("model.embed_tokens.weight", 9999, 7.0, 7.0, 7.0),
        TensorRecord("model.layers.0.bias", "base", (4,), "F32"),
    ]
    return PatchReport("patch", {}, {}, [*tower, *decoder, *rest], {}, 0.0)


@pytest.mark.parametrize("layers", [2, 30])
def test_the_decorator_picture_is_of_the_decoder(tmp_path, layers):
    pytest.importorskip("matplotlib")
    found = pictures.decoration_of(summary.PAPER, made_report(layers))
    assert found.layers == tuple(str(i) for i in range(layers))
    assert found.tuned[:2] == (20.0, 22.0)
    assert (found.before[0], found.after[0]) == (4.0, 6.0)
    pictures.plot_decorations([found, replace(found, label=summary.DEFAULT)], tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    if layers == 2:
        text = pictures.decorations_seen([found], 0)
        assert "from 19% to 29% of the tuned model's with *sequential, density 0.1* (layer error 0.50 to 0.25)" in text


SMALL = {"HIDDEN": 128, "INTERMEDIATE": 344, "LAYERS": 2, "HEADS": 4} | {
    "BASE": Recipe(steps=400, batch=8, learning_rate=3e-3, warmup=20),
    "TUNED": Recipe(steps=110, batch=8, learning_rate=2e-3, warmup=10),
}
TINY = {"HIDDEN": 32, "INTERMEDIATE": 48, "LAYERS": 1, "HEADS": 4} | {
    "BASE": Recipe(steps=20, batch=4, learning_rate=3e-3, warmup=2),
    "TUNED": Recipe(steps=10, batch=4, learning_rate=2e-3, warmup=2),
}
NO_FURTHER = {"dare": (), "magnitude": (), "graft": (), "graft_steps": 0, "own_data": ()}
PLAIN = tuple((solver, 0.1, 1.0) for solver in ("none", "sequential", "joint"))
OURS = {"propagated": ((0.1, 0.3, 0.1),), "retained": ((0.1, 0.3, 0.1),)}
GRID = run.Grid(weights=(0.5,), plain=PLAIN, samples=32, **OURS, **NO_FURTHER)
RIVALS = {"lines": (0.4,), "dg_hard": (1.0,), "fapm": (0.3,), "distilled": (0.02, 0.1)}
FEW = run.Grid(
    **{"weights": (0.5,), "plain": (PLAIN[1],), "propagated": OURS["propagated"], "retained": (), "samples": 8},
    **{"distill_steps": 30, "seq_len": 64, "many": (0.1,), "many_samples": 16},
    **(NO_FURTHER | RIVALS),
)


def quick_pair(folder, monkeypatch, sizes, counts):
    """The pair of one seed and of the task that forgets most, with a smaller network, fewer steps and samples."""
    monkeypatch.setattr(pairs, "SEEDS", (0,))
    for module in (quick_data, quick_model):
        monkeypatch.setattr(module, "NEW_TASKS", ("unicode",))
    monkeypatch.setattr(quick_data, "COUNTS", counts)
    for name, value in sizes.items():
        monkeypatch.setattr(quick_model, name, value)
    [pair] = pairs.quick(folder)
    return pair


def check_reports(pair, folder, monkeypatch):
    """The pictures' reports are made once, and again from other statistics; returns them."""
    reports = [pictures.make_report(pair, setting, folder) for setting in pictures.DECORATED]

    def refuse(*_, **__):
        raise AssertionError("patched again")

    assert sorted(path.name for path in (folder / "reports").iterdir()) == ["joint-retained.json", "sequential.json"]
    monkeypatch.setattr(pictures, "patch_checkpoint", refuse)
    assert [pictures.make_report(pair, setting, folder) for setting in pictures.DECORATED] == reports
    (folder / "stats-written").rename(folder / "stats-of-another")
    shutil.copytree(folder / "stats", folder / "stats-written")
    with pytest.raises(AssertionError, match="patched again"):  # from other statistics
        pictures.make_report(pair, pictures.DECORATED[1], folder)
    return reports


def test_a_page_of_kept_results_alone_says_where_none_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "DOCS", tmp_path)
    with pytest.raises(SystemExit, match=r"evidence-quick\.jsonl is not there: .* text and text-small alone"):
        program._kept("quick", None)


@pytest.mark.slow
def test_quick_goes_through_on_a_tiny_network(tmp_path, monkeypatch):
    """Every step of it, on models that have learned next to nothing: `make test-slow` looks at the figures."""
    pair = quick_pair(tmp_path, monkeypatch, TINY, {"validation": 4, "test": 8})
    folder = tmp_path / "unicode-0"
    outcome = run.run_pair(pair, FEW, folder)
    points = {point.label: point for point in outcome.report.points}
    results = stored.read_results(tmp_path)
    [again] = stored.outcomes_of(results, FEW)  # from the results alone
    stored.write_kept(results, {"cores": 2}, tmp_path / "data" / "kept.jsonl")
    assert stored.read_kept(tmp_path / "data" / "kept.jsonl") == (results, {"cores": 2})
    assert [(p.label, p.family, p.seconds) for p in again.report.points] == [
        (p.label, p.family, p.seconds) for p in outcome.report.points
    ]
    for first, second in zip(outcome.report.points, again.report.points, strict=True):
        for name in ("origin", "target", "h_score"):
            np.testing.assert_array_equal(first.figures["test"][name], second.figures["test"][name])
    assert stored.names_missing([again], FEW) == []
    assert "graft, density 0.1" in stored.names_missing([again], run.GRIDS["quick"])
    released, swept = "tailor-released, density 0.1", "sequential, density 0.1"
    tenth, fiftieth = (run.distilled(density, 30).label for density in (0.1, 0.02))
    later = {"lines, alpha 0.4, beta 0.6", "dg-hard, threshold scale 1", "fapm, density 0.3"}
    many = f"{tenth}, 16 samples"
    ours = {summary.DEFAULT, tenth, fiftieth, many}
    assert set(points) == {"base", "tuned", "interpolate 0.5", released, swept, *later, *ours}
    assert points[fiftieth].patch_bytes < points[tenth].patch_bytes  # mostly reports here
    for point in points.values():
        for part in ("test", "validation"):
            assert 0 <= point.at(part, "origin") <= 100
            assert 0 <= point.at(part, "target") <= 100
    paper, ours = check_reports(pair, folder, monkeypatch)
    assert paper.totals["error_after"] < paper.totals["error_before"]
    assert ours.options["propagate"]


def test_results_of_a_pair_that_was_trained_again_are_not_mixed_with_those_of_before():
    def result(seed, label, correct):
        scores = {"test/old": {"correct": [correct], "count": [9]}}
        return stored.Result("unicode", seed, "sweep", ("old",), ("new",), label, {}, 1.0, None, scores)

    earlier = [result(seed, label, 1) for seed in (0, 1) for label in ("base", "tuned", "graft")]
    more = [result(0, "tuned", 1), result(0, "dare", 2)]  # of the same fine-tune
    again = [result(1, "tuned", 3), result(1, "dare", 3)]
    assert {(one.seed, one.label) for one in stored.joined(earlier, more + again)} == {
        *((0, label) for label in ("base", "tuned", "graft", "dare")),
        *((1, label) for label in ("tuned", "dare")),
    }


def test_text_has_a_second_new_task_and_one_trained_too_long(tmp_path, monkeypatch):
    """Its data and its pairs, with a tokenizer of bytes and without its models."""
    made = []

    def make_tuned(base, windows, recipe, folder):
        made.append((folder.name, len(windows), recipe.steps))
        return folder

    monkeypatch.setattr(pairs, "SEEDS", (0, 1))
    monkeypatch.setattr(pairs.real_model, "make_base", lambda cache: tmp_path)
    monkeypatch.setattr(pairs.real_model, "make_tuned", make_tuned)
    monkeypatch.setattr(pairs, "tokenizer_of", lambda base: build_tokenizer())
    found = pairs.text(tmp_path)
    assert [(pair.name, pair.seed) for pair in found] == [
        (name, seed) for name in ("unicode", "licences", "licences-overtrained") for seed in (0, 1)
    ]
    short, long = (next(one for one in made if one[0] == f"{name}-tuned0") for name in list(pairs.FINE_TUNES)[1:])
    assert long[1] < short[1] / 4
    assert long[2] > short[2]
    for pair in found:
        for part in ("test", "validation"):
            for spec in pair.specs(part):
                file = Path(spec.partition("=")[2].rpartition(":")[0])
                assert len(file.read_text().splitlines()) >= 60
        assert set(pair.kinds) == {*pair.origin, *pair.target}
    every = pairs.text_data.load_texts()
    for parts in (every[task] for task in pairs.text_data.NEW_TASKS):
        assert len(set.union(*map(set, parts.values()))) == sum(len(set(texts)) for texts in parts.values())


@pytest.mark.slow
def test_quick_in_a_reduced_form(tmp_path, monkeypatch):
    """A network of a seventh of the size, half the steps of half the batch, one seed, the task that forgets most.

    What is asserted held in each of six seeds; behind it, the least and the most that was seen.
    """
    pair = quick_pair(tmp_path, monkeypatch, SMALL, {"validation": 16, "test": 60})
    folder = tmp_path / "unicode-0"
    outcome = run.run_pair(pair, GRID, folder)
    points = {p.label: p for p in outcome.report.points}
    old, new, h = ({k: p.at("test", name) for k, p in points.items()} for name in ("origin", "target", "h_score"))
    joint, default = "joint, density 0.1", summary.DEFAULT
    assert old["tuned"] < old["base"] - 15  # 28.3 to 33.7
    assert new["tuned"] > new["base"] + 15  # 31.9 to 35.0
    assert new[joint] > new["none, density 0.1"] + 4  # 9.3 to 12.0
    assert old[default] > old[joint] + 10  # 18.7 to 24.9
    assert h[default] > h["tuned"] + 5  # 10.8 to 19.0
    assert h[default] > h["interpolate 0.5"] + 2  # 4.7 to 7.7
    assert h[default] > h["sequential, density 0.1"] + 3  # 5.6 to 8.4
    assert h[default] > h["joint, retained, density 0.1, retain weight 0.3"] + 1  # 2.8 to 5.7
    assert h[default] > h["tailor-released, density 0.1"] + 5  # 11.3 to 14.4

    patch_checkpoint(pair.base, pair.tuned, tmp_path / "joint", folder / "stats")
    paper, _ = check_reports(pair, folder, monkeypatch)
    bare, swept = (paper.totals[name] for name in ("error_before", "error_after"))
    solved = load_report(tmp_path / "joint" / REPORT_FILE).totals["error_after"]
    assert solved < 0.6 * swept  # 0.38 to 0.41
    assert swept < 0.8 * bare  # 0.64 to 0.69
