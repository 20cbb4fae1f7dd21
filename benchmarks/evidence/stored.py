"""Outcomes from the results that a run left, without its models: what was measured on another machine, or cut short."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import whole_numbers
from benchmarks.evidence.pairs import Pair
from benchmarks.evidence.run import MANY_SWEEP, OWN_DATA, WRITTEN, Grid, Outcome, distilled, on_many, samples_of
from tailorcli import EvaluateOptions
from tailorcli.evaluation.metrics import Roles, TaskScores, bootstrap, summarise
from tailorcli.files import write_text_atomically
from tailorcli.sweep.outcome import Point, SweepReport
from tailorcli.sweep.settings import Setting

PARTS = ("test", "validation")
SWEEPS = ("sweep", MANY_SWEEP)
TUNED = "tuned"  # the label of the fine-tune itself


@dataclass(frozen=True)
class Result:
    """What a sweep found of one setting on one pair: all that a page needs of it."""

    task: str  # the new one
    seed: int
    sweep: str  # of SWEEPS
    origin: tuple[str, ...]
    target: tuple[str, ...]
    label: str
    options: dict[str, Any]
    seconds: float
    patch_bytes: int | None
    scores: dict[str, dict[str, list[float]]]  # "PART/TASK" -> right answers and questions of each item

    @property
    def written(self) -> bool:
        """Whether it was also scored on what the base wrote itself."""
        return f"test/{WRITTEN}" in self.scores

    @property
    def key(self) -> tuple[str, int, str, bool, str]:
        """What no two results of a benchmark have alike."""
        return (self.task, self.seed, self.sweep, self.written, self.label)


def read_results(folder: Path) -> list[Result]:
    """The results of every pair in FOLDER/TASK-SEED, a cache of the benchmark or a part of one."""
    found = []
    for report in sorted(folder.glob("*-*/sweep/sweep.json")):
        pair = report.parents[1]
        task, _, seed = pair.name.rpartition("-")
        roles = json.loads(report.read_text(encoding="utf-8"))
        whose = (tuple(roles["origin"]), tuple(roles["target"]))
        for sweep in SWEEPS:
            for file in sorted((pair / sweep / "settings").glob("*.json")):
                found.append(_result(task, int(seed), sweep, *whose, json.loads(file.read_text(encoding="utf-8"))))
    return found


def _result(
    task: str, seed: int, sweep: str, origin: tuple[str, ...], target: tuple[str, ...], of: dict[str, Any]
) -> Result:
    scores = {name: {kind: values[kind] for kind in ("correct", "count")} for name, values in of["scores"].items()}
    how = (of["label"], of["options"], of["seconds"], of["patch_bytes"])
    return Result(task, seed, sweep, origin, target, *how, scores)


def read_kept(file: Path) -> tuple[list[Result], dict[str, Any]]:
    """The results that ``write_kept`` left beside the page, and the machine; neither without the file."""
    if not file.exists():
        return [], {}
    machine, *lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    found = []
    for facts in lines:
        for values in facts["scores"].values():
            if not isinstance(values["count"], list):
                values["count"] = [values["count"]] * len(values["correct"])
        found.append(Result(**facts | {name: tuple(facts[name]) for name in ("origin", "target")}))
    return found, machine


def write_kept(results: Iterable[Result], machine: Mapping[str, Any], file: Path) -> None:
    """Keep results in one file, a line each behind the machine of the last run, so that later runs add to them."""
    file.parent.mkdir(exist_ok=True)
    lines = (json.dumps(facts, separators=(",", ":")) + "\n" for facts in (machine, *map(_facts, results)))
    write_text_atomically(file, "".join(lines))


def _facts(result: Result) -> dict[str, Any]:
    """What ``read_kept`` reads; of items that all have as many questions their number stands once."""
    scores = {}
    for name, values in result.scores.items():
        correct, count = (whole_numbers(values[kind]) for kind in ("correct", "count"))
        scores[name] = {"correct": correct, "count": count[0] if len(set(count)) == 1 else count}
    return vars(result) | {"scores": scores}


def joined(earlier: Iterable[Result], later: Iterable[Result]) -> list[Result]:
    """Both, in order; where they have the same result the later is taken.

    Of a pair that was trained again, so that its tuned model scores otherwise, the earlier results are left out.
    """
    earlier, later = [*earlier], [*later]
    tuned = {result.key: result.scores for result in later if result.label == TUNED}
    replaced = {
        (one.task, one.seed) for one in earlier if one.label == TUNED and one.scores != tuned.get(one.key, one.scores)
    }
    kept = [one for one in earlier if (one.task, one.seed) not in replaced]
    found = {result.key: result for result in (*kept, *later)}
    return [found[key] for key in sorted(found)]


def outcomes_of(results: Iterable[Result], grid: Grid) -> list[Outcome]:
    """The outcome of every pair, with the settings of ``grid`` that all seeds of its task have.

    Raises SystemExit where there is none, or where base or tuned is missing.
    """
    found: dict[tuple[str, int], dict[tuple[str, bool], Result]] = {}
    many: dict[tuple[str, int], dict[str, Result]] = {}  # of the sweep on many samples, by label
    for result in results:
        key = (result.task, result.seed)
        of_pair, of_many = found.setdefault(key, {}), many.setdefault(key, {})
        if result.sweep == MANY_SWEEP:
            of_many[result.label] = result
        else:
            of_pair[result.label, result.written] = result
    if not found:
        raise SystemExit("there are no results: a cache has them in the folders TASK-SEED/sweep")
    common = {
        task: set.intersection(*(set(results) for (other, _), results in found.items() if other == task))
        for task, _ in found
    }
    if not all({("base", False), ("tuned", False)} <= of_task for of_task in common.values()):
        raise SystemExit("the results lack base or tuned of a pair")
    return [
        _outcome(*key, results, grid, common[key[0]], _of_all_seeds(many, key))
        for key, results in sorted(found.items())
    ]


def _of_all_seeds(many: Mapping[tuple[str, int], dict[str, Result]], key: tuple[str, int]) -> dict[str, Result]:
    """The results of a pair that every seed of its task has."""
    seeds = [results for (task, _), results in many.items() if task == key[0]]
    return {label: result for label, result in many[key].items() if all(label in results for results in seeds)}


def _outcome(
    task: str,
    seed: int,
    results: Mapping[tuple[str, bool], Result],
    grid: Grid,
    common: set[tuple[str, bool]],
    many: Mapping[str, Result],
) -> Outcome:
    first = results["base", False]
    roles = Roles(first.origin, first.target)
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


def _point(result: Result, label: str, family: str, roles: Roles) -> Point:
    scores: dict[str, dict[str, TaskScores]] = {}
    for name, values in result.scores.items():
        part, _, task = name.partition("/")
        correct, count = (np.array(values[kind], float) for kind in ("correct", "count"))
        scores.setdefault(part, {})[task] = TaskScores(correct, count, np.full(len(count), np.nan))
    figures = {part: _figures(of_part, roles) for part, of_part in scores.items()}
    options = None if family == label else result.options
    return Point(label, family, options, figures, scores, result.seconds, result.patch_bytes)


def _figures(scores: Mapping[str, TaskScores], roles: Roles) -> dict[str, Any]:
    """Every task's accuracy and their averages, resampled as a sweep does it."""
    how = EvaluateOptions()
    found: dict[str, Any] = {}
    for task, one in scores.items():
        [found[task]] = bootstrap([one], task, how.resamples, how.seed)
    return found | summarise(found, roles.origin, roles.target)


def machine_of(folder: Path) -> dict[str, Any]:
    """What the results in a folder were measured on, if the run wrote it beside them."""
    file = folder / "machine.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def names_missing(outcomes: Sequence[Outcome], grid: Grid) -> list[str]:
    """The labels of the grid's settings that the results of a task lack."""
    have = set.intersection(*({point.label for point in outcome.report.points} for outcome in outcomes))
    wanted = [setting.label for setting in grid.settings()]
    wanted += [f"{setting.label}, {samples_of(grid.many_samples)}" for setting in grid.many_settings()]
    return [label for label in wanted if label not in have]
