"""Fine-tune, patch and score; what each row reached lies in a file of its own, made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import mean
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch

from benchmarks.common import run_python
from benchmarks.evidence.pairs import Pair
from benchmarks.real.setting import say
from benchmarks.sparse.masks import RULES, masked_by
from benchmarks.sparse.setting import (
    BASE,
    MASKS,
    OURS,
    PATCHES,
    ROWS,
    TRAINING,
    TUNED_AT,
    Part,
    Row,
    depths_of,
    pairs_of,
)
from tailorcli import (
    CalibrateOptions,
    Checkpoint,
    EvaluateOptions,
    calibrate_model,
    evaluate_models,
    patch_checkpoint,
)
from tailorcli.evaluation.metrics import TaskScores, h_score
from tailorcli.files import write_text_atomically
from tailorcli.training.finetune import finetune_model
from tailorcli.training.probe import probe_model
from tailorcli.training.settings import FinetuneOptions, ProbeOptions

VALIDATION, TEST = "validation", "test"
WARMUP = 0.05
MEASURED_STEPS = 3  # of a run that is made for its memory

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


def run_part(part: Part, cache: Path, seeds: int, tasks: Sequence[str], rendered: Callable[[], None]) -> None:
    """Every cell of a part that is missing: the rates, then the tables; ``rendered`` after each.

    What a run that is cut short needs most comes first: the first seed at all depths, then the other seeds depth by
    depth; our patch of what forgets less by itself, and other masks in SPIDER's place, come last.
    """
    pairs = pairs_of(part, cache, tasks, seeds)
    for task, group in groupby(pairs, key=lambda pair: pair.name):
        first, *others = (Bench(part, pair, cache) for pair in group)
        picks = first.picks()
        depths = sorted(first.depths, key=lambda name: name != TUNED_AT)
        order = [(first, depth) for depth in depths] + [(bench, depth) for depth in depths for bench in others]
        for rows in ([row for row in ROWS if row not in OURS[1:]], ROWS):
            for bench, depth in order:
                say(f"{part.name}, {task}, seed {bench.pair.seed}: {depth}")
                bench.run(depth, [(row, picks[row]) for row in rows], TEST)
                if depth == TUNED_AT and rows is ROWS:
                    bench.run(depth, [(Row(mask), picks[Row("spider")]) for mask in MASKS], TEST)
                rendered()
        first.measure_memory()
        rendered()
        for bench in (first, *others):
            bench.forget()


class Bench:
    """The runs of one pair, in a folder of its own."""

    def __init__(self, part: Part, pair: Pair, cache: Path) -> None:
        self.part, self.pair = part, pair
        self.folder = folder_of(cache, pair.name, pair.seed)
        self.depths = depths_of(pair.base)
        self.costs: dict[str, float] = {}

    def picks(self) -> dict[Row, float]:
        """The rate of every row: that with the best H on the validation part, with all layers."""
        rates = self.part.rates
        self.run(TUNED_AT, [(row, rate) for rate in rates for row in ROWS], VALIDATION, keep=True)
        found = {(cell.row, cell.rate): cell for cell in read_cells(self.folder) if VALIDATION in cell.scores}
        return {row: max(rates, key=lambda rate: found[row, rate].h(VALIDATION)) for row in ROWS}

    def run(self, depth: str, wanted: Sequence[tuple[Row, float]], part: str, *, keep: bool = False) -> None:
        """Make and score what is missing of ``wanted`` on a ``part`` of the tasks; ``keep`` patches and statistics."""
        self._score(self.pair.base, "", BASE, 0.0, part, 0.0, None)
        missing = [(row, rate) for row, rate in wanted if part not in self._known(depth, row, rate)]
        for (fine, rate), rows in grouped(missing):
            model, seconds, peak = self._fine_tuned(depth, fine, rate)
            for row in rows:
                if not row.patch:
                    self._score(model, depth, row, rate, part, seconds, peak)
                    continue
                patched, more, peak_of_patch = self._patched(model, row.patch)
                self._score(patched, depth, row, rate, part, seconds + more, peak_of_patch)
            for made in () if keep else self._models(depth).glob(f"{fine}-{rate:g}-*/"):
                shutil.rmtree(made)

    def forget(self) -> None:
        """Remove all models; their scores stay."""
        shutil.rmtree(self.folder / "models", ignore_errors=True)

    def _models(self, depth: str) -> Path:
        return self.folder / "models" / slug(depth)

    def _file(self, depth: str, row: Row, rate: float) -> Path:
        return self.folder / "cells" / f"{slug(depth)}_{slug(row.title)}_{rate:g}.json"

    def _known(self, depth: str, row: Row, rate: float) -> dict[str, Any]:
        """The scores that are there, by part."""
        file = self._file(depth, row, rate)
        return dict(json.loads(file.read_text(encoding="utf-8"))["scores"]) if file.exists() else {}

    def _fine_tuned(self, depth: str, fine: str, rate: float) -> tuple[Path, float, int | None]:
        """A fine-tune of the base, unless it is there, with its cost."""
        output = self._models(depth) / f"{fine}-{rate:g}"
        options = FinetuneOptions(
            method="spider" if fine in MASKS else fine,
            steps=self.part.steps,
            batch_size=self.part.batch,
            seq_len=self.part.seq_len,
            learning_rate=rate,
            warmup=WARMUP,
            last_layers=self.depths[depth],
            seed=self.pair.seed,
            save_every=10**6,
            dtype=self.part.dtype,
        )
        importance, before = self._importance() if fine == "dowser" else (None, 0.0)
        with masked_by(RULES[fine]) if fine in MASKS else nullcontext():
            seconds, peak = self._once(
                output,
                lambda: finetune_model(self.pair.base, self.pair.train, output, options, importance, self._training()),
            )
        return output, seconds + before, peak

    def _training(self) -> Path:
        file = self.folder / "training.yaml"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(file, TRAINING)
        return file

    def _patched(self, tuned: Path, patch: str) -> tuple[Path, float, int | None]:
        """A patch of the base with what ``tuned`` learnt, unless it is there, with its cost and that of statistics."""
        options = PATCHES[patch]
        output = tuned.with_name(f"{tuned.name}-{patch}")
        stats, before = self._stats(tuned, own=False) if options.needs_hessians else (None, 0.0)
        retain, more = self._stats(self.pair.base, own=True) if patch == "ours" else (None, 0.0)
        graft = self.pair.train if patch == "graft" else None
        seconds, peak = self._once(
            output,
            lambda: patch_checkpoint(self.pair.base, tuned, output, stats, options, retain=retain, graft_data=graft),
        )
        return output, seconds + before + more, peak

    def _importance(self) -> tuple[Path, float]:
        folder = self.folder / "importance"
        options = ProbeOptions(seq_len=min(256, self.part.seq_len))
        return folder, self._once(folder, lambda: probe_model(self.pair.base, folder, options))[0]

    def _stats(self, model: Path, *, own: bool) -> tuple[Path, float]:
        """Statistics of a model on the training data, or on what it writes itself."""
        folder = self.folder / "stats-base" if own else model.with_name(f"{model.name}-stats")
        options = CalibrateOptions(
            num_samples=self.part.samples,
            seq_len=min(256, self.part.seq_len) if own else self.part.seq_len,
            batch_size=256 if torch.cuda.is_available() else 16,
            synthetic=own,
        )
        data = self.pair.retain_starts if own else self.pair.train
        return folder, self._once(folder, lambda: calibrate_model(model, data, folder, options))[0]

    def _once(self, output: Path, make: Callable[[], object]) -> tuple[float, int | None]:
        """Make ``output`` unless it is there whole, and what that took: seconds and peak bytes on a GPU."""
        note = output.with_name(f"{output.name}.cost.json")
        if not (note.exists() and output.exists()):
            shutil.rmtree(output, ignore_errors=True)
            shutil.rmtree(output.with_name(output.name + ".finetune"), ignore_errors=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            say(f"  {output.name}")
            write_text_atomically(note, json.dumps(measured(make)))
        seconds, peak = json.loads(note.read_text(encoding="utf-8"))
        return seconds, peak

    def _score(
        self, model: Path, depth: str, row: Row, rate: float, part: str, seconds: float, peak: int | None
    ) -> None:
        """Score a model on a part of the tasks, unless that is done, and note it."""
        known = self._known(depth, row, rate)
        if part in known:
            return
        found = evaluate_models(
            [model],
            self.pair.specs(part),
            EvaluateOptions(
                batch_size=512 if torch.cuda.is_available() else 32,
                max_new_tokens=self.pair.answer_length,
                limit=self.part.items,
            ),
            origin=self.pair.origin,
            target=self.pair.target,
        )
        [scores] = found.scores.values()
        known[part] = {task: [one.correct.tolist(), one.count.tolist()] for task, one in scores.items()}
        facts = {
            "depth": depth,
            "layers": self.depths.get(depth, 0),
            "row": [row.fine, row.patch],
            "rate": rate,
            "moved": share_moved(self.pair.base, model),
            "seconds": seconds,
            "peak": peak,
            "scores": known,
        }
        file = self._file(depth, row, rate)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(facts) + "\n")

    def measure_memory(self) -> None:
        """Peak memory of a process of each fine-tune at each depth, where no GPU told it."""
        file, found = self.folder / "memory.json", {}
        if torch.cuda.is_available() or file.exists():
            return
        scratch = self._models("memory")
        scratch.mkdir(parents=True, exist_ok=True)
        importance, _ = self._importance()
        for depth, layers in ((TUNED_AT, self.depths[TUNED_AT]),):
            for row in (row for row in ROWS if not row.patch):
                output = scratch / f"{slug(depth)}-{row.fine}"
                arguments = ["finetune", str(self.pair.base), "--data", str(self.pair.train), "--method", row.fine]
                arguments += ["--steps", str(MEASURED_STEPS), "--batch-size", str(self.part.batch)]
                arguments += ["--seq-len", str(self.part.seq_len), "--last-layers", str(layers)]
                arguments += [
                    "--training-args",
                    str(self._training()),
                    "--dtype",
                    self.part.dtype,
                    "-o",
                    str(output),
                    "--json",
                ]
                arguments += ["--importance", str(importance)] if row.fine == "dowser" else []
                peak = run_python(["-m", "tailorcli", *arguments], scratch).peak_bytes
                found[f"{depth}: {row.title}"] = peak
        write_text_atomically(file, json.dumps(found) + "\n")
        shutil.rmtree(scratch)


def grouped(wanted: Iterable[tuple[Row, float]]) -> Iterator[tuple[tuple[str, float], list[Row]]]:
    """Rows by the fine-tune and rate that they need, in the order in which those come."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row, rate in wanted:
        found.setdefault((row.fine, rate), []).append(row)
    yield from found.items()


def measured(make: Callable[[], object]) -> tuple[float, int | None]:
    """Seconds and, on a GPU, peak bytes of a call; on a CPU, which others use too, the seconds are of its own work."""
    on_gpu = torch.cuda.is_available()
    clock = perf_counter if on_gpu else process_time
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = clock()
    make()
    return clock() - started, torch.cuda.max_memory_allocated() if on_gpu else None


def share_moved(base: Path, model: Path) -> float:
    """The share of entries in which a model differs from the base."""
    with Checkpoint.open(base) as one, Checkpoint.open(model) as other:
        changed = sum(int((one.read(name) != other.read(name)).count_nonzero()) for name in one.tensors)
        return changed / sum(info.numel for info in one.tensors.values())


def folder_of(cache: Path, task: str, seed: int) -> Path:
    """Where the runs of a task with a seed lie."""
    return cache / "sparse" / f"{task}-{seed}"


def slug(text: str) -> str:
    """A name as part of a file's."""
    return text.replace(" ", "-").replace("(", "").replace(")", "")


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


def _scores(correct: Sequence[float], count: Sequence[float]) -> TaskScores:
    return TaskScores(np.array(correct, float), np.array(count, float), np.full(len(count), np.nan))
