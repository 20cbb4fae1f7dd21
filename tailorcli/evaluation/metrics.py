"""Figures of merit: task accuracies, their averages, the H-score (Eq. 32), and how sure the items make each of them.

A figure is an array (1 + R,): its value on the items themselves, then on R resamplings of them. Whatever is computed
from figures by ordinary arithmetic is a figure again, and ``estimate`` reads value and interval off it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tailorcli.errors import OptionsError

Array: TypeAlias = NDArray[np.float64]

LEVEL = 0.95  # of the intervals
_PIECE = 1 << 22  # entries of the resampling weights at a time


@dataclass(frozen=True)
class TaskScores:
    """What one model did on the items of one task, each array (n,), item by item.

    ``correct`` counts right tokens of ``count`` scored ones; where an item is right or wrong as a whole, ``count`` is
    1. ``loss`` is the summed negative log-likelihood of the scored tokens in nats, NaN where there is none.
    """

    correct: Array
    count: Array
    loss: Array
    outputs: tuple[str, ...] = ()  # what was written, item by item, where something was

    @property
    def accuracy(self) -> float:
        """Right ones of all that were scored, in percent."""
        return float(100 * self.correct.sum() / self.count.sum())

    @property
    def mean_loss(self) -> float | None:
        """Nats a token, or None where no loss was measured."""
        total = float(self.loss.sum() / self.count.sum())
        return None if math.isnan(total) else total


@dataclass(frozen=True)
class Estimate:
    """A figure's value and its 95% interval; None for what the items do not determine."""

    value: float | None
    interval: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "interval": list(self.interval) if self.interval else None}


def estimate(figure: Array) -> Estimate:
    """Value and percentile interval of a figure (1 + R,); no interval where any resampling gives no number."""
    value = float(figure[0])
    edges = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    sound = len(figure) > 1 and bool(np.isfinite(figure).all())
    low, high = np.quantile(figure[1:], edges) if sound else (math.nan, math.nan)
    return Estimate(value if math.isfinite(value) else None, (float(low), float(high)) if sound else None)


def h_score(origin: float, target: float) -> float:
    """The harmonic mean of the old tasks' average and the new tasks' (Eq. 32); 0 where both are."""
    return float(_harmonic_mean(np.asarray(origin, float), np.asarray(target, float)))


def _harmonic_mean(first: Array, second: Array) -> Array:
    total = first + second
    return np.divide(2 * first * second, total, out=np.zeros_like(total), where=total != 0)


def summarise(figures: Mapping[str, ArrayLike], origin: Sequence[str], target: Sequence[str]) -> dict[str, Array]:
    """The averages over old and new tasks, and what they come to together.

    ``average`` is over all tasks alike, as "Avg" in the paper's tables; ``arithmetic_mean`` and ``h_score`` (Eq. 32)
    are of the two averages.
    """
    values = {name: np.asarray(figures[name], float) for name in (*origin, *target)}
    old, new = (np.mean([values[name] for name in names], axis=0) for names in (origin, target))
    return {
        "origin": old,
        "target": new,
        "average": np.mean(list(values.values()), axis=0),
        "arithmetic_mean": (old + new) / 2,
        "h_score": _harmonic_mean(old, new),
    }


def bootstrap(scores: Sequence[TaskScores], task: str, resamples: int, seed: int = 0) -> list[Array]:
    """Accuracy in percent as a figure (1 + R,), for models that saw the same items of a task.

    Every model gets the same resamplings of the items, so differences between models are paired; they depend on
    ``task`` and ``seed`` alone, not on which other tasks there are. One item has no spread: its figure is NaN but for
    the value.
    """
    items = len(scores[0].count)
    parts = np.stack([np.stack([s.correct, s.count]) for s in scores])  # (M, 2, n)
    sums = np.full((len(scores), 2, 1 + resamples), np.nan)
    sums[:, :, 0] = parts.sum(2)
    generator = np.random.default_rng([seed, zlib.crc32(task.encode())])
    step = max(1, _PIECE // items)
    for start in range(1, 1 + resamples, step) if items > 1 else ():
        stop = min(start + step, 1 + resamples)
        drawn = generator.integers(0, items, (stop - start, items))
        for model in range(len(scores)):
            sums[model, :, start:stop] = parts[model][:, drawn].sum(2)
    return list(100 * sums[:, 0] / sums[:, 1])


@dataclass(frozen=True)
class Roles:
    """Which tasks are old and new, and which of the models are the base and the fine-tuned one."""

    origin: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    base: str | None = None
    tuned: str | None = None


def check_roles(
    tasks: Sequence[str],
    origin: Sequence[str],
    target: Sequence[str],
    base: str | None = None,
    tuned: str | None = None,
) -> Roles:
    """The roles of tasks and models, checked. Raises OptionsError."""
    for option, named in (("origin", origin), ("target", target)):
        for name in named:
            if name not in tasks:
                raise OptionsError(f"--{option} {name!r} names no task", f"the tasks are {', '.join(tasks)}")
        if len(set(named)) < len(named):
            raise OptionsError(f"--{option} names a task twice", "name every task once")
    if both := set(origin) & set(target):
        raise OptionsError(f"task {min(both)!r} is named both old and new", "pass it to --origin or to --target")
    if bool(origin) != bool(target):
        missing = "target" if origin else "origin"
        raise OptionsError(f"no task is named --{missing}", "the H-score needs old tasks (--origin) and new (--target)")
    if base is not None and base == tuned:
        raise OptionsError(f"{base} is named both --base and --tuned", "name two models, or leave one out")
    if (base or tuned) and not origin:
        raise OptionsError("--base and --tuned need old and new tasks", "name them by --origin and --target")
    return Roles(tuple(origin), tuple(target), base, tuned)


def from_error(value: float, stderr: float | None, model: str, task: str, resamples: int, seed: int = 0) -> Array:
    """A figure (1 + R,) in percent of which a value and its standard error are known, but no items.

    Drawn from the normal distribution, kept within 0 and 100; each model's draws are its own. Without a standard error
    it is NaN but for the value.
    """
    generator = np.random.default_rng([seed, zlib.crc32(task.encode()), zlib.crc32(model.encode())])
    draws = np.full(resamples, np.nan) if stderr is None else value + stderr * generator.standard_normal(resamples)
    return np.concatenate([[value], draws.clip(0, 100)])


# Model -> task -> value and standard error in percent, of tasks whose single items are not known.
Measured = Mapping[str, Mapping[str, tuple[float, float | None]]]


def compare(
    scores: Mapping[str, Mapping[str, TaskScores]],
    roles: Roles,
    resamples: int = 2000,
    seed: int = 0,
    measured: Measured | None = None,
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Model -> {"tasks": task -> accuracy, "summary": name -> figure}, of model -> task -> scores on the same items.

    ``measured`` are further tasks; their intervals come from their standard errors, and are not paired between models.

    Beside ``summarise``'s averages the summary holds ``origin_kept`` (share of the base's old performance),
    ``target_kept`` and ``gain_kept`` (share of the tuned model's new performance, and of its gain over the base), and
    ``h_minus_tuned``, each in percent and where the models for it are given.
    """
    names = list(scores)
    figures: dict[str, dict[str, Array]] = {name: {} for name in names}
    for task in scores[names[0]]:
        of_task = bootstrap([scores[name][task] for name in names], task, resamples, seed)
        for name, figure in zip(names, of_task, strict=True):
            figures[name][task] = figure
    for name, tasks in (measured or {}).items():
        for task, (value, stderr) in tasks.items():
            figures[name][task] = from_error(value, stderr, name, task, resamples, seed)
    summaries: dict[str, dict[str, Array]] = {name: {} for name in names}
    if roles.origin and roles.target:
        summaries = {name: summarise(figures[name], roles.origin, roles.target) for name in names}
        _compare_to(summaries, roles)
    return {
        name: {
            "tasks": {task: estimate(figure) for task, figure in figures[name].items()},
            "summary": {key: estimate(figure) for key, figure in summaries[name].items()},
        }
        for name in names
    }


def _compare_to(summaries: dict[str, dict[str, Array]], roles: Roles) -> None:
    """Add what is relative to the base and to the tuned model."""
    base = summaries[roles.base] if roles.base is not None else None
    tuned = summaries[roles.tuned] if roles.tuned is not None else None
    for summary in summaries.values():
        if base is not None:
            summary["origin_kept"] = _share(summary["origin"], base["origin"])
        if tuned is not None:
            summary["target_kept"] = _share(summary["target"], tuned["target"])
            summary["h_minus_tuned"] = summary["h_score"] - tuned["h_score"]
        if base is not None and tuned is not None:
            gain = tuned["target"] - base["target"]
            summary["gain_kept"] = _share(summary["target"] - base["target"], gain)


def _share(part: Array, whole: Array) -> Array:
    """Percent of a whole; NaN where the whole is not positive and a share of it means nothing."""
    return 100 * np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the (old, new) points that no other beats in both, by old from low to high."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    best, kept = -math.inf, []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept[::-1]


def frontier_area(
    old: ArrayLike, new: ArrayLike, old_ends: Sequence[float] | Array, new_ends: Sequence[float] | Array
) -> float:
    """The area under the frontier of points (old, new): 0.5 is the straight line from the base to the tuned model.

    The frontier's upper hull is taken: a straight line joins two points where none between them lies above it. So a
    further setting, however poor, never makes the area smaller.

    Both axes are scaled: old from the tuned model's (0) to the base's (1), new from the base's to the tuned model's;
    ``old_ends`` and ``new_ends`` hold the figures of base and tuned. Left of the first point the new performance stays
    what it is there. More than both, to the right of the base or above the tuned model, counts. Of a setting that keeps
    less of the old than the tuned model, or has less of the new than the base, what lies beyond these does not count,
    only its lines to the others. NaN where fine-tuning forgot or learnt nothing.
    """
    (old_base, old_tuned), (new_base, new_tuned) = old_ends, new_ends
    if not (old_base > old_tuned and new_tuned > new_base):
        return math.nan
    x = (np.asarray(old, float) - old_tuned) / (old_base - old_tuned)
    y = (np.asarray(new, float) - new_base) / (new_tuned - new_base)
    kept = frontier(list(zip(x.tolist(), y.tolist(), strict=True)))
    hull: list[tuple[float, float]] = []
    for here in zip(x[kept].tolist(), y[kept].tolist(), strict=True):
        while len(hull) > 1 and _turns_left(hull[-2], hull[-1], here):
            hull.pop()
        hull.append(here)
    xs, ys = np.array(hull).T  # xs rise, ys fall
    top, right = np.interp(0.0, xs, ys), np.interp(0.0, ys[::-1], xs[::-1])  # where the hull meets both axes
    inside = (xs > 0.0) & (ys > 0.0)
    xs, ys = np.array([0.0, *xs[inside], max(right, 0.0)]), np.array([max(top, 0.0), *ys[inside], 0.0])
    return float((np.diff(xs) * (ys[:-1] + ys[1:]) / 2).sum())


def _turns_left(first: tuple[float, float], second: tuple[float, float], third: tuple[float, float]) -> bool:
    """Whether the second point lies on or below the line from the first to the third."""
    (x1, y1), (x2, y2), (x3, y3) = first, second, third
    return (x2 - x1) * (y3 - y1) - (y2 - y1) * (x3 - x1) >= 0
