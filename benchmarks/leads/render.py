"""Cells that the tables of the leads have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev

from benchmarks.leads.bench import Figures

COLUMNS = ("old", "new", "H")


def header_of(first: str, tasks: Iterable[str], columns: Sequence[str] = COLUMNS) -> list[str]:
    """The header of a table with the same columns for every new task."""
    return [first, *(f"{task}: {column}" for task in tasks for column in columns)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean over seeds with their standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def figure_cells(found: Mapping[str, Sequence[Figures]]) -> list[str]:
    """Old, new and H of every new task."""
    cells = []
    for seeds in found.values():
        old, new = mean(one.old for one in seeds), mean(one.new for one in seeds)
        cells += [f"{old:.1f}", f"{new:.1f}", spread([one.h for one in seeds])]
    return cells
