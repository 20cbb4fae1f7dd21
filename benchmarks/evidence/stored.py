"""Outcomes from the results that a run left, without its models: what was measured on another machine, or cut short."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.pairs import Pair
from benchmarks.evidence.run import OWN_DATA, WRITTEN, Grid, Outcome, distilled, on_many, samples_of
from tailorcli import EvaluateOptions
from tailorcli.evaluation.metrics import Roles, TaskScores, bootstrap, summarise
from tailorcli.sweep import Point, Setting, SweepReport

PARTS = ("test", "validation")


def load_outcomes(folder: Path, grid: Grid) -> list[Outcome]:
    """The outcome of every pair in FOLDER/TASK-SEED/sweep, with the settings of ``grid`` that all seeds have.

    Raises SystemExit where there is none, or where base or tuned is missing.
    """
    found: dict[tuple[str, int], dict[tuple[str, bool], dict[str, Any]]] = {}
    many: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}  # of the sweep on many samples, by label
    roles: dict[tuple[str, int], Roles] = {}
    for place in sorted(folder.glob("*-*/sweep/sweep.json")):
        task, _, seed = place.parent.parent.name.rpartition("-")
        report = json.loads(place.read_text(encoding="utf-8"))
        key = (task, int(seed))
        roles[key] = Roles(tuple(report["origin"]), tuple(report["target"]))
        results = _results_in(place.parent)
        many[key] = {result["label"]: result for result in _results_in(place.parents[1] / "sweep-many")}
        found[key] = {(result["label"], f"test/{WRITTEN}" in result["scores"]): result for result in results}
    if not found:
        raise SystemExit(f"{folder} holds no results: it has the folders TASK-SEED/sweep of a cache")
    common = {
        task: set.intersection(*(set(results) for (other, _), results in found.items() if other == task))
        for task, _ in found
    }
    if not all({("base", False), ("tuned", False)} <= of_task for of_task in common.values()):
        raise SystemExit(f"{folder} has not base and tuned of every pair")
    return [
        _outcome(*key, results, roles[key], grid, common[key[0]], _of_all_seeds(many, key))
        for key, results in sorted(found.items())
    ]


def _results_in(sweep: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((sweep / "settings").glob("*.json"))]


def _of_all_seeds(
    many: Mapping[tuple[str, int], dict[str, dict[str, Any]]], key: tuple[str, int]
) -> dict[str, dict[str, Any]]:
    """The results of a pair that every seed of its task has."""
    seeds = [results for (task, _), results in many.items() if task == key[0]]
    return {label: result for label, result in many[key].items() if all(label in results for results in seeds)}


def _outcome(
    task: str,
    seed: int,
    results: Mapping[tuple[str, bool], dict[str, Any]],
    roles: Roles,
    grid: Grid,
    common: set[tuple[str, bool]],
    many: Mapping[str, dict[str, Any]],
) -> Outcome:
    pair = Pair(task, seed, *(Path(),) * 5, {}, roles.origin, roles.target, 0)

    def point(label: str, family: str, written: bool) -> Point:
        return _point(results[label, written], label, family, roles)

    points = [point(name, name, written=False) for name in ("base", "tuned")]
    for setting in [*grid.settings(), *_propagated_first(grid, grid.distilled)]:
        if (setting.label, setting.retained) in common:
            points.append(point(setting.label, setting.family, setting.retained))
    for setting in [*grid.many_settings(), *_propagated_first(grid, grid.many)]:
        if setting.label in many:
            one = _point(many[setting.label], setting.label, setting.family, roles)
            points.append(on_many(one, grid.many_samples))
    own = [
        point(setting.label, OWN_DATA, written=False)
        for setting in grid.own_settings()
        if (setting.label, False) in common
    ]
    report = SweepReport(points, roles, PARTS, {}, {}, "", 0.0)
    return Outcome(pair, report, tuple(own))


def _propagated_first(grid: Grid, densities: Sequence[float]) -> list[Setting]:
    """What the default was when training began from a propagated patch."""
    return [distilled(density, grid.distill_steps, propagate=True) for density in densities]


def _point(result: dict[str, Any], label: str, family: str, roles: Roles) -> Point:
    scores: dict[str, dict[str, TaskScores]] = {}
    for name, values in result["scores"].items():
        part, _, task = name.partition("/")
        correct, count, loss = (np.array(values[key], float) for key in ("correct", "count", "loss"))
        scores.setdefault(part, {})[task] = TaskScores(correct, count, loss)
    figures = {part: _figures(of_part, roles) for part, of_part in scores.items()}
    options = None if family == label else result["options"]
    return Point(label, family, options, figures, scores, result["seconds"], result["patch_bytes"])


def _figures(scores: Mapping[str, TaskScores], roles: Roles) -> dict[str, Any]:
    """Every task's accuracy and their averages, resampled as a sweep does it."""
    how = EvaluateOptions()
    found: dict[str, Any] = {}
    for task, one in scores.items():
        [found[task]] = bootstrap([one], task, how.resamples, how.seed)
    return found | summarise(found, roles.origin, roles.target)


def machine_of(folder: Path) -> dict[str, Any]:
    """What the results in a folder were measured on, which the run wrote beside them."""
    found: dict[str, Any] = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    return found


def names_missing(outcomes: Sequence[Outcome], grid: Grid) -> list[str]:
    """The labels of the grid's settings that the results of a task lack."""
    have = set.intersection(*({point.label for point in outcome.report.points} for outcome in outcomes))
    wanted = [setting.label for setting in grid.settings()]
    wanted += [f"{setting.label}, {samples_of(grid.many_samples)}" for setting in grid.many_settings()]
    return [label for label in wanted if label not in have]
