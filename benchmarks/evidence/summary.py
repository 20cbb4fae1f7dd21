"""Seeds put together: every setting's mean figures, what is picked on validation, differences with their intervals."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.evidence.run import OWN_DATA, PICKED, Outcome, distilled
from tailorcli.evaluation.metrics import Array, Estimate, estimate, frontier
from tailorcli.options import PatchOptions
from tailorcli.sweep.outcome import Point, area_figure, members_of
from tailorcli.sweep.settings import Setting

PROPAGATED, RETAINED = "joint, propagated", "joint, retained"
DEFAULT = Setting(PatchOptions(overwrite=True), retained=True).label
PAPER = "sequential, density 0.1"
DISTILLED, AFTER_PROPAGATION = (distilled(0.1, propagate=how).family for how in (None, True))
AT_TENTH, AT_FIFTIETH = "distilled", "distilled, density 0.02"  # titles
FIRST = ", propagated first"  # ends the title of what was measured in no other way
BASELINES = ("interpolate", "lines", "dg-hard", "dare", "magnitude", "fapm", "graft", "tailor-released")
# What a curve over one option holds fixed of the others, at the values of the default and of the paper.
_ALIKE = ("density", "omega", "weight", "damping")
HELD = {"sequential": _ALIKE, PROPAGATED: (*_ALIKE, "retain_weight")}
SHORTEST = 3  # points of a curve


@dataclass(frozen=True)
class Group:
    """All seeds of one new task."""

    name: str
    outcomes: tuple[Outcome, ...]

    def points(self, outcome: Outcome) -> list[Point]:
        """A seed's points, those of the retain term on old samples last."""
        return [*outcome.report.points, *outcome.own]

    @property
    def labels(self) -> list[tuple[str, str]]:
        """(family, label) of every point, in order."""
        return [(point.family, point.label) for point in self.points(self.outcomes[0])]

    def find(self, outcome: Outcome, family: str, label: str) -> Point:
        """One seed's point."""
        return next(p for p in self.points(outcome) if (p.family, p.label) == (family, label))

    def each(self, family: str, label: str, figure: Callable[[Point, Outcome], Array]) -> list[Array]:
        """A figure for every seed."""
        return [figure(self.find(outcome, family, label), outcome) for outcome in self.outcomes]

    def mean(self, family: str, label: str, name: str, part: str = "test") -> Array:
        """The mean over the seeds as a figure; all saw the same items, which are resampled alike."""
        return np.asarray(np.mean(self.each(family, label, lambda point, _: point.figures[part][name]), axis=0))

    def value(self, family: str, label: str, name: str, part: str = "test") -> float:
        """The mean over the seeds."""
        return float(self.mean(family, label, name, part)[0])

    def best(self, family: str, allowed: Callable[[str], bool] = lambda label: True) -> str | None:
        """The family's setting with the highest mean H on validation."""
        labels = [label for of, label in self.labels if of == family and allowed(label)]
        return max(labels, key=lambda label: self.value(family, label, "h_score", "validation"), default=None)

    def share(self, family: str, label: str, name: str) -> Array:
        """Percent kept as a mean over seeds: ``origin`` of base's old performance, ``target`` of tuned's new one.

        Both are the paper's measure; ``gain`` is of what tuned gained on the new task over the base.
        """

        def figure(point: Point, outcome: Outcome) -> Array:
            base, tuned = (p.figures["test"] for p in outcome.report.points[:2])
            own = point.figures["test"]
            if name == "origin":
                return np.asarray(100 * own["origin"] / base["origin"])
            if name == "target":
                return np.asarray(100 * own["target"] / tuned["target"])
            return np.asarray(100 * (own["target"] - base["target"]) / (tuned["target"] - base["target"]))

        return np.asarray(np.mean(self.each(family, label, figure), axis=0))

    def area(self, family: str) -> Estimate:
        """The mean area under the family's frontier on the test tasks."""
        areas = [area_figure(self.points(outcome), family, "test") for outcome in self.outcomes]
        return estimate(np.mean(areas, axis=0))

    def difference(self, first: tuple[str, str], second: tuple[str, str]) -> tuple[Estimate, list[float]]:
        """H of one setting minus that of another: the mean with its interval over the items, and every seed's value."""
        pairs = zip(
            *(self.each(*one, lambda p, _: p.figures["test"]["h_score"]) for one in (first, second)), strict=True
        )
        differences = [a - b for a, b in pairs]
        return estimate(np.mean(differences, axis=0)), [float(d[0]) for d in differences]

    def seconds(self, family: str, label: str) -> float:
        """The median over the seeds of what the patch took."""
        return float(np.median([self.find(outcome, family, label).seconds for outcome in self.outcomes]))

    def patch_bytes(self, family: str, label: str) -> float | None:
        """The median over the seeds of the size of the patch file; None where there is none."""
        sizes = [self.find(outcome, family, label).patch_bytes for outcome in self.outcomes]
        known = [size for size in sizes if size is not None]
        return float(np.median(known)) if known else None

    def families(self) -> list[str]:
        """All families but base and tuned, and but what is picked among another's settings."""
        return list(dict.fromkeys(family for family, label in self.labels if family != label))

    def ours(self) -> list[tuple[str, str, str]]:
        """(title, family, label) of our settings: the closed form at density 0.1 by default and with a picked beta."""
        found = [("default", PROPAGATED, DEFAULT)]
        if (PICKED, PICKED) in self.labels:
            found.append(("retain weight picked on written samples", PICKED, PICKED))
        label = self.best(PROPAGATED, at_tenth)
        if label is not None and label != DEFAULT:
            found.append(("picked on validation data", PROPAGATED, label))
        return found

    def distilled(self) -> list[tuple[str, str, str]]:
        """(title, family, label) of the default distilled: at density 0.1, on more samples, and at density 0.02.

        Whatever its number of steps. Of what was propagated first alone, that, with FIRST in its title.
        """
        kinds = ((AT_TENTH, 0.1, False), (AT_TENTH, 0.1, True), (AT_FIFTIETH, 0.02, False))
        found = []
        for title, density, many in kinds:
            ways = (("", distilled(density)), (FIRST, distilled(density, propagate=True)))
            alike = (
                (f"{title}{_more_samples(one[1])}{ending}", *one)
                for ending, way in ways
                for one in self.labels
                if one[0] == way.family and one[1].startswith(way.label) and bool(_more_samples(one[1])) == many
            )
            found += [*alike][:1]
        return found


def _more_samples(label: str) -> str:
    """The end of a label that says on how many samples, which only those on more have."""
    found = re.search(r", [\d,]+ samples$", label)
    return found[0] if found else ""


def groups_of(outcomes: Sequence[Outcome]) -> list[Group]:
    """One group for every new task."""
    names = dict.fromkeys(outcome.pair.name for outcome in outcomes)
    return [Group(name, tuple(o for o in outcomes if o.pair.name == name)) for name in names]


def at_tenth(label: str) -> bool:
    """Whether a label is of a setting at the default density."""
    return "density 0.1," in f"{label},"


def lines_of(group: Group) -> list[tuple[str, str, str]]:
    """(title, family, label) of the table's lines; what is picked is picked on validation."""
    lines = [("base", "base", "base"), ("tuned", "tuned", "tuned")]
    for family in BASELINES:
        label = group.best(family)
        if label is not None:
            lines.append((label, family, label))
    for family in ("none", "sequential", "joint"):
        label = f"{family}, density 0.1"
        if (family, label) in group.labels:
            lines.append((f"{label} (the paper)" if label == PAPER else label, family, label))
    for family in ("sequential", "joint"):
        label = group.best(family)
        if label is not None and label != f"{family}, density 0.1":
            lines.append((label, family, label))
    lines.append((f"{DEFAULT} (default)", PROPAGATED, DEFAULT))
    lines += [(label, family, label) for family, label in group.labels if family in (DISTILLED, AFTER_PROPAGATION)]
    if (PICKED, PICKED) in group.labels:
        lines.append((PICKED, PICKED, PICKED))
    for family in (PROPAGATED, RETAINED, OWN_DATA):
        for rule in (at_tenth, lambda label: True):
            label = group.best(family, rule)
            if label is not None and all(line[1:] != (family, label) for line in lines):
                lines.append((label.replace(RETAINED, family), family, label))
    return lines


@dataclass(frozen=True)
class Curve:
    """A family's figures along one option, the others at their defaults (Fig. 5): the means over the seeds, on test."""

    family: str
    option: str  # density or omega
    values: tuple[float, ...]  # of the option, ascending
    figures: dict[str, tuple[float, ...]]  # origin, target and h_score at each value

    @property
    def best(self) -> int:
        """The position of the highest H."""
        return max(range(len(self.values)), key=lambda i: self.figures["h_score"][i])


def curves_of(group: Group) -> list[Curve]:
    """The curves of the paper's sweep and of the default that have at least three points."""
    curves = []
    for option in ("density", "omega"):
        for family, held in HELD.items():
            defaults = PatchOptions().resolved(family == PROPAGATED).to_dict()
            fixed = {name: defaults[name] for name in held if name != option}
            found = sorted(
                (float(p.options[option]), p.label)
                for p in group.points(group.outcomes[0])
                if p.family == family and p.options and all(p.options[name] == fixed[name] for name in fixed)
            )
            if len(found) >= SHORTEST:
                names = ("origin", "target", "h_score")
                figures = {name: tuple(group.value(family, label, name) for _, label in found) for name in names}
                curves.append(Curve(family, option, tuple(value for value, _ in found), figures))
    return curves


def averaged(group: Group) -> dict[str, Any]:
    """The points' means over the seeds in the form of a sweep's report, for its picture."""
    families = group.families()
    on = {family: _on_frontier(group, family) for family in families}
    points = []
    for family, label in group.labels:
        if family == PICKED:  # one of another family's
            continue
        means = {name: {"value": group.value(family, label, name)} for name in ("origin", "target", "h_score")}
        options: dict[str, Any] | None = None if family == label else {}
        points.append(
            {"label": _shown(family, label), "family": family, "options": options, "test": means}
            | {"on_frontier": {"test": label in on.get(family, ())}}
        )
    pair = group.outcomes[0].pair
    return {
        "points": points,
        "areas": {"test": {family: group.area(family).to_dict() for family in families}},
        "picked": {family: _shown(family, group.best(family) or "") for family in families},
        "rule": "on validation: the best H",
        "origin": list(pair.origin),
        "target": list(pair.target),
    }


def _shown(family: str, label: str) -> str:
    """A label that no other family has."""
    return label.replace(RETAINED, OWN_DATA) if family == OWN_DATA else label


def _on_frontier(group: Group, family: str) -> list[str]:
    labels = [p.label for p in members_of(group.points(group.outcomes[0]), family)]
    kinds = [family if label not in ("base", "tuned") else label for label in labels]
    where = [
        (group.value(kind, label, "origin"), group.value(kind, label, "target"))
        for kind, label in zip(kinds, labels, strict=True)
    ]
    return [labels[i] for i in frontier(where)]
