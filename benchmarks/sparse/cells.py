"""What each row reached: a small file of its own, written once, that is read back without the models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.common import whole_numbers
from benchmarks.sparse.setting import Row
from tailorcli.evaluation.metrics import TaskScores, h_score
from tailorcli.files import write_text_atomically

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
    machine: str = ""  # that it ran on, in words

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two cells of a part have alike."""
        return (self.task, self.seed, self.depth, self.row, self.rate)

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
    files = sorted((folder / "cells").glob("*.json"))
    cells = [_cell({"task": task, "seed": int(seed)} | json.loads(file.read_text(encoding="utf-8"))) for file in files]
    memory = folder / "memory.json"
    peaks = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
    return [replace(cell, peak=cell.peak or peaks.get(f"{cell.depth}: {cell.row.title}")) for cell in cells]


def read_part(folder: Path) -> list[Cell]:
    """Every cell of a part, in the folder of its cache."""
    machine = _machine_of(folder)
    cells = [cell for place in sorted((folder / "sparse").glob("*-*")) for cell in read_cells(place)]
    return [replace(cell, machine=machine) for cell in cells]


def read_kept(file: Path) -> list[Cell]:
    """The cells of a part that ``write_kept`` left beside the page; none without the file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [_cell(json.loads(line)) for line in lines]


def write_kept(cells: Iterable[Cell], file: Path) -> None:
    """Keep all cells of a part in one file, a line each, so that later runs add to them."""
    file.parent.mkdir(exist_ok=True)
    write_text_atomically(file, "".join(json.dumps(_facts(cell), separators=(",", ":")) + "\n" for cell in cells))


def joined(earlier: Iterable[Cell], later: Iterable[Cell]) -> list[Cell]:
    """Both, in order; where they have the same cell the later is taken, with what the earlier alone has measured."""
    found = {cell.key: cell for cell in earlier}
    for cell in later:
        known = found.get(cell.key, cell)
        found[cell.key] = replace(cell, scores=known.scores | cell.scores, peak=cell.peak or known.peak)
    return [found[key] for key in sorted(found)]


def _cell(facts: dict[str, Any]) -> Cell:
    scores = {
        part: {name: _scores(*arrays) for name, arrays in tasks.items()} for part, tasks in facts["scores"].items()
    }
    return Cell(**facts | {"row": Row(*facts["row"]), "scores": scores})


def _facts(cell: Cell) -> dict[str, Any]:
    """What ``_cell`` reads."""
    scores = {
        part: {name: [whole_numbers(one.correct), whole_numbers(one.count)] for name, one in tasks.items()}
        for part, tasks in cell.scores.items()
    }
    return vars(cell) | {"row": [cell.row.fine, cell.row.patch], "scores": scores}


def _scores(correct: Sequence[float], count: Sequence[float]) -> TaskScores:
    return TaskScores(np.array(correct, float), np.array(count, float), np.full(len(count), np.nan))


def _machine_of(folder: Path) -> str:
    """What a part was measured on, in words, where its run noted it."""
    file = folder / "sparse" / "machine.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    parts = [found[name] for name in ("gpu", "processor") if found.get(name)]
    return ", ".join([*parts, *([f"{found['jobs']} fine-tunes at a time"] if found.get("jobs", 1) > 1 else [])])
