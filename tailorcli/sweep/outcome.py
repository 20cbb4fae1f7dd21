"""What a sweep has found: points, the frontier of each family, and the setting that is picked of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tailorcli.evaluation.metrics import (
    Array,
    Estimate,
    Roles,
    TaskScores,
    bootstrap,
    estimate,
    frontier,
    frontier_area,
    summarise,
)
from tailorcli.options import EvaluateOptions
from tailorcli.sweep.scoring import Result
from tailorcli.typed import plain

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Point:
    """One evaluated model: a setting, or an end of the way from base to tuned; part -> figure (1 + R,) by name."""

    label: str
    family: str
    options: dict[str, Any] | None  # None: base or tuned
    figures: dict[str, dict[str, Array]]
    scores: dict[str, dict[str, TaskScores]]  # part -> task
    seconds: float  # that the patch took
    patch_bytes: int | None = None  # of its patch file

    def at(self, part: str, name: str) -> float:
        """A figure's value."""
        return float(self.figures[part][name][0])


@dataclass(frozen=True)
class SweepReport:
    """All points of a sweep, base and tuned first; each family's area under its frontier, and the setting picked."""

    points: list[Point]
    roles: Roles
    parts: tuple[str, ...]
    areas: dict[str, dict[str, Estimate]]  # part -> family
    picked: dict[str, str]  # family -> label, by the last of the parts
    rule: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format_version": FORMAT_VERSION,
            "command": "sweep",
            "origin": list(self.roles.origin),
            "target": list(self.roles.target),
            "rule": self.rule,
            "points": [
                {
                    "label": point.label,
                    "family": point.family,
                    "options": plain(point.options),
                    "seconds": point.seconds,
                    "patch_bytes": point.patch_bytes,
                    "on_frontier": {part: point.label in self.frontier_of(point.family, part) for part in self.parts},
                    **{
                        part: {name: estimate(figure).to_dict() for name, figure in point.figures[part].items()}
                        for part in self.parts
                    },
                }
                for point in self.points
            ],
            "areas": {part: {f: e.to_dict() for f, e in found.items()} for part, found in self.areas.items()},
            "picked": self.picked,
        }

    def frontier_of(self, family: str, part: str) -> list[str]:
        """The labels of a family's points, and of base and tuned, that none of them beats, in the order of old."""
        members = members_of(self.points, family)
        order = frontier([(p.at(part, "origin"), p.at(part, "target")) for p in members])
        return [members[i].label for i in order]


def with_figures(results: list[Result], roles: Roles, options: EvaluateOptions) -> list[Point]:
    """The points with their averages and H, resampled alike, so that differences between them are paired."""
    parts = list(results[0].scores)
    figures: list[dict[str, dict[str, Array]]] = [{part: {} for part in parts} for _ in results]
    for part in parts:
        for task in results[0].scores[part]:
            scores = [result.scores[part][task] for result in results]
            for found, figure in zip(figures, bootstrap(scores, task, options.resamples, options.seed), strict=True):
                found[part][task] = figure
        for found in figures:
            found[part] |= summarise(found[part], roles.origin, roles.target)
    return [
        Point(result.label, result.family, result.options, found, result.scores, result.seconds, result.patch_bytes)
        for result, found in zip(results, figures, strict=True)
    ]


def members_of(points: Sequence[Point], family: str) -> list[Point]:
    """A family's points with base and tuned, which every family can reach."""
    return [point for point in points if point.options is None or point.family == family]


def families_of(points: Iterable[Point]) -> list[str]:
    """The families that were swept, in their order."""
    return list(dict.fromkeys(point.family for point in points if point.options is not None))


def areas_of(points: list[Point], part: str) -> dict[str, Estimate]:
    """The area under each family's frontier."""
    return {family: estimate(area_figure(points, family, part)) for family in families_of(points)}


def area_figure(points: Sequence[Point], family: str, part: str) -> Array:
    """The area under a family's frontier as a figure (1 + R,)."""
    members = members_of(points, family)
    old, new = (np.stack([p.figures[part][name] for p in members]) for name in ("origin", "target"))  # (P, 1 + R)
    return np.array([frontier_area(old[:, r], new[:, r], old[:2, r], new[:2, r]) for r in range(old.shape[1])])


def _floor(points: list[Point], part: str, min_old_kept: float) -> float:
    """The least old performance that keeps so many percent of the base's."""
    return min_old_kept / 100 * points[0].at(part, "origin")


def rule_of(points: list[Point], part: str, min_old_kept: float | None) -> str:
    """By what a setting of each family is picked, and for which of them none fulfils it."""
    if min_old_kept is None:
        return "the best H"
    floor = _floor(points, part, min_old_kept)
    kept = {point.family for point in points if point.options is not None and point.at(part, "origin") >= floor}
    missed = [family for family in families_of(points) if family not in kept]
    rule = f"most of the new with {min_old_kept:g}% of the old"
    return rule + (f"; no setting of {', '.join(missed)} keeps that: the one that keeps most" if missed else "")


def pick(points: list[Point], part: str, min_old_kept: float | None) -> dict[str, str]:
    """Each family's setting by the rule; without one that keeps enough, the one that keeps the most."""
    floor = None if min_old_kept is None else _floor(points, part, min_old_kept)
    picked = {}
    for family in families_of(points):
        members = [point for point in points if point.options is not None and point.family == family]
        if floor is None:
            best = max(members, key=lambda point: point.at(part, "h_score"))
        elif enough := [point for point in members if point.at(part, "origin") >= floor]:
            best = max(enough, key=lambda point: point.at(part, "target"))
        else:
            best = max(members, key=lambda point: point.at(part, "origin"))
        picked[family] = best.label
    return picked
