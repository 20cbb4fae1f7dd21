"""What each row reached: a small file of its own, written once, that is read back without the models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.sparse.setting import Row
from tailorcli.evaluation.metrics import TaskScores, h_score

VALIDATION, TEST = "validation", "test"

Scores = dict[str, dict[str, TaskScores]]  # part -> task


@dataclass(frozen=True, eq=False)
class Cell:
    """One row of one table with one seed: what it reached and what it took."""

    task: str
    seed: int
    depth: str
    layers: int  # that were fine-tuned, the last ones; 0 of the base
    row: Row
    rate: float
    scores: Scores
    moved: float  # share of all entries that differ from the base's
    seconds: float  # of everything from the base on; on a CPU those of one core
    peak: int | None  # bytes, where it was measured

    def h(self, part: str) -> float:
        """H in percent on a part of the tasks; all but the new one are old."""
        scores = self.scores[part]
        old = mean(one.accuracy for name, one in scores.items() if name != self.new(scores))
        return h_score(old, scores[self.new(scores)].accuracy)

    def new(self, tasks: Iterable[str]) -> str:
        """Which of the ``tasks`` is the new one."""
        return next(name for name in tasks if self.task.partition("-")[0] == name)


def folder_of(cache: Path, task: str, seed: int) -> Path:
    """Where the runs of a task with a seed lie."""
    return cache / "sparse" / f"{task}-{seed}"


def slug(text: str) -> str:
    """A name as part of a file's, or as an option's value."""
    return text.replace(" ", "-").replace("(", "").replace(")", "")


def cell_file(folder: Path, depth: str, row: Row, rate: float) -> Path:
    """Where what a row reached lies, in a folder that ``folder_of`` names."""
    return folder / "cells" / f"{slug(depth)}_{slug(row.title)}_{rate:g}.json"


def read_cells(folder: Path) -> list[Cell]:
    """All that was measured of one task and seed, in a folder that ``folder_of`` names."""
    task, _, seed = folder.name.rpartition("-")
    cells = []
    for file in sorted((folder / "cells").glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        scores = {
            part: {name: _scores(*arrays) for name, arrays in tasks.items()} for part, tasks in facts["scores"].items()
        }
        how = (facts["depth"], facts["layers"], Row(*facts["row"]), facts["rate"])
        cells.append(Cell(task, int(seed), *how, scores, facts["moved"], facts["seconds"], facts["peak"]))
    memory = folder / "memory.json"
    peaks = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
    return [replace(cell, peak=cell.peak or peaks.get(f"{cell.depth}: {cell.row.title}")) for cell in cells]


def read_part(folder: Path) -> list[Cell]:
    """Every cell of a part, in the folder of its cache."""
    return [cell for place in sorted((folder / "sparse").glob("*-*")) for cell in read_cells(place)]


def machine_of(folder: Path) -> dict[str, Any]:
    """What a part was measured on, where its run noted it."""
    file = folder / "sparse" / "machine.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _scores(correct: Sequence[float], count: Sequence[float]) -> TaskScores:
    return TaskScores(np.array(correct, float), np.array(count, float), np.full(len(count), np.nan))
