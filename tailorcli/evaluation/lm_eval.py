"""The H-score (Eq. 32) of results that lm-evaluation-harness wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailorcli.errors import DataError, OptionsError
from tailorcli.evaluation.metrics import check_roles, summarise
from tailorcli.files import PathLike, read_json
from tailorcli.typed import read_number

# What is taken where --metric does not say: the first of these that a task has.
METRICS = ("acc_norm", "acc", "exact_match", "em", "f1", "pass@1")


@dataclass(frozen=True)
class Result:
    """A task's metric in percent, and its standard error where the file has one."""

    metric: str  # with its filter, as in the file: "acc,none"
    value: float
    stderr: float | None


@dataclass(frozen=True)
class ResultsRow:
    """One result file: its tasks, and what ``metrics.summarise`` makes of them, each value with its standard error."""

    file: str
    model: str
    tasks: dict[str, Result]
    summary: dict[str, tuple[float, float | None]]


@dataclass(frozen=True)
class HarnessReport:
    """The result files, one row each."""

    origin: tuple[str, ...]
    target: tuple[str, ...]
    rows: tuple[ResultsRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        rows = [
            {
                "file": row.file,
                "model": row.model,
                "summary": {key: {"value": value, "stderr": error} for key, (value, error) in row.summary.items()},
                "tasks": {name: asdict(result) for name, result in row.tasks.items()},
            }
            for row in self.rows
        ]
        return {"command": "hscore", "origin": list(self.origin), "target": list(self.target), "results": rows}


def read_results(
    files: Sequence[PathLike],
    origin: Sequence[str],
    target: Sequence[str],
    metrics: Sequence[str] = (),
) -> HarnessReport:
    """Averages and H of result files over ``origin`` (old) and ``target`` (new) tasks or groups.

    ``metrics`` holds METRIC, or TASK=METRIC for one task; a metric may name its filter ("exact_match,strict-match").
    Standard errors are propagated to first order, tasks taken as independent; None where a task has none.
    Raises OptionsError, DataError.
    """
    if not files:
        raise OptionsError("there is no result file", "pass one or more RESULTS.json of lm-evaluation-harness")
    check_roles([*origin, *target], origin, target)
    if not origin:
        raise OptionsError("no task is named", "name the old tasks by --origin and the new ones by --target")
    wanted = wanted_metrics(metrics, [*origin, *target])
    rows = tuple(_row(Path(file), origin, target, wanted) for file in files)
    return HarnessReport(tuple(origin), tuple(target), rows)


def wanted_metrics(metrics: Sequence[str], tasks: list[str]) -> dict[str, str]:
    """Task -> the metric that is asked for; under "" that of all others. Raises OptionsError."""
    found: dict[str, str] = {}
    for text in metrics:
        task, equals, metric = text.rpartition("=")
        if equals and task not in tasks:
            raise OptionsError(
                f"--metric {text!r} is for a task that is not named", f"the tasks are {', '.join(tasks)}"
            )
        if not metric or task in found:
            raise OptionsError(f"--metric {text!r} says nothing new", "pass METRIC once, or TASK=METRIC once a task")
        found[task] = metric
    return found


def _row(file: Path, origin: Sequence[str], target: Sequence[str], wanted: Mapping[str, str]) -> ResultsRow:
    if file.is_dir():
        raise DataError(f"{file} is a folder", f"pass a file of it, such as {file}/results_*.json")
    content = read_json(file)
    known = {}
    for part in ("groups", "results"):
        if isinstance(content.get(part), dict):
            known.update(content[part])
    if not known:
        raise DataError(f'{file} has no "results"', "pass what lm_eval --output_path wrote: results_*.json")
    tasks = {}
    for task in (*origin, *target):
        if not isinstance(known.get(task), dict):
            raise DataError(f"{file} has no task {task!r}", f"it has {', '.join(sorted(known))}")
        tasks[task] = result_of(file, task, known[task], wanted, content.get("higher_is_better"))
    values = {name: result.value for name, result in tasks.items()}
    summary = {key: float(value) for key, value in summarise(values, origin, target).items()}
    errors = _errors(tasks, origin, target, summary)
    name = content.get("model_name")
    return ResultsRow(
        str(file),
        name if isinstance(name, str) and name else file.stem,
        tasks,
        {key: (value, errors[key]) for key, value in summary.items()},
    )


def result_of(file: PathLike, task: str, figures: dict[str, Any], wanted: Mapping[str, str], better: Any) -> Result:
    """The metric of one task. Raises DataError where it is missing, ambiguous, or no share."""
    there = {
        key: value
        for key, value in figures.items()
        if type(value) in (int, float) and "_stderr" not in key and key not in ("samples", "sample_len")
    }
    asked = wanted.get(task, wanted.get(""))
    names = METRICS if asked is None else (asked,)
    hint = f"it has {', '.join(sorted(there)) or 'none'}; choose one by --metric {task}=METRIC"
    found = next((keys for name in names if (keys := [k for k in there if k == name or _plain(k) == name])), [])
    if not found:
        raise DataError(f"{file}: task {task!r} has no metric {' or '.join(names)}", hint)
    if len(found) > 1:
        raise DataError(f"{file}: task {task!r} has {names[0] if asked else _plain(found[0])} of several filters", hint)
    key = found[0]
    try:
        value = float(read_number(there[key]))
    except ValueError as error:
        raise DataError(f"{file}: {key} of task {task!r}: {error}", hint) from error
    if isinstance(better, dict) and isinstance(better.get(task), dict) and better[task].get(_plain(key)) is False:
        raise DataError(f"{file}: of {key} of task {task!r} less is better, which has no place in an average", hint)
    if not 0 <= value <= 1:
        raise DataError(f"{file}: {key} of task {task!r} is {value}, no share between 0 and 1", hint)
    name, comma, filtered = key.partition(",")
    stderr = figures.get(f"{name}_stderr{comma}{filtered}")
    try:
        return Result(key, 100 * value, 100 * float(read_number(stderr)))
    except ValueError:  # "N/A" where it was not worked out
        return Result(key, 100 * value, None)


def _plain(key: str) -> str:
    return key.partition(",")[0]


def _errors(
    tasks: dict[str, Result], origin: Sequence[str], target: Sequence[str], summary: Mapping[str, float]
) -> dict[str, float | None]:
    """Standard errors of the summary, to first order, of independent tasks."""
    old, new, everything = (_mean_error([tasks[n] for n in ns]) for ns in (origin, target, (*origin, *target)))
    if old is None or new is None:
        return {"origin": old, "target": new, "average": None, "arithmetic_mean": None, "h_score": None}
    a, b = summary["origin"], summary["target"]
    total = max(a + b, 1e-12)
    # H is 2ab/(a + b); its derivatives are 2b²/(a + b)² by a and 2a²/(a + b)² by b.
    return {
        "origin": old,
        "target": new,
        "average": everything,
        "arithmetic_mean": math.hypot(old, new) / 2,
        "h_score": math.hypot(2 * b**2 / total**2 * old, 2 * a**2 / total**2 * new),
    }


def _mean_error(results: list[Result]) -> float | None:
    errors = [result.stderr for result in results]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None
