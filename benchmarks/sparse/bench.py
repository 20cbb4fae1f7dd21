"""Fine-tune, patch and score one pair; what is there is not made again."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from benchmarks.common import run_python, say
from benchmarks.evidence.pairs import Pair
from benchmarks.sparse.cells import TEST, VALIDATION, cell_file, folder_of, read_cells, slug
from benchmarks.sparse.masks import RULES, masked_by
from benchmarks.sparse.setting import BASE, MASKS, PATCHES, TRAINING, TUNED_AT, Part, Row, depths_of
from tailorcli import (
    CalibrateOptions,
    Checkpoint,
    EvaluateOptions,
    calibrate_model,
    evaluate_models,
    patch_checkpoint,
)
from tailorcli.files import write_text_atomically
from tailorcli.training.finetune import finetune_model
from tailorcli.training.probe import probe_model
from tailorcli.training.settings import FinetuneOptions, ProbeOptions

WARMUP = 0.05
MEASURED_STEPS = 3  # of a run that is made for its memory


@dataclass(frozen=True)
class Unit:
    """One fine-tune, and the rows that stand on it."""

    depth: str
    fine: str
    rate: float
    rows: tuple[Row, ...]


class Bench:
    """The runs of one pair, in a folder of its own. Two units of it can be made at a time, after ``prepare``."""

    def __init__(self, part: Part, pair: Pair, cache: Path) -> None:
        self.part, self.pair = part, pair
        self.folder = folder_of(cache, pair.name, pair.seed)
        self.depths = depths_of(pair.base)

    def validated(self, depth: str) -> dict[Row, dict[float, float]]:
        """H on the validation part at a depth, by row and rate."""
        found: dict[Row, dict[float, float]] = {}
        for cell in read_cells(self.folder):
            if cell.depth == depth and VALIDATION in cell.scores:
                found.setdefault(cell.row, {})[cell.rate] = cell.h(VALIDATION)
        return found

    def units(self, depth: str, wanted: Iterable[tuple[Row, float]], part: str) -> list[Unit]:
        """The ``wanted`` rows and rates without scores on a ``part`` of the tasks, by the fine-tune that they need."""
        missing = [(row, rate) for row, rate in wanted if part not in self._known(depth, row, rate)]
        return [Unit(depth, *fine, tuple(rows)) for fine, rows in grouped(missing)]

    def prepare(self, rows: Sequence[Row]) -> None:
        """Score the base, and make what several units of ``rows`` share."""
        self._score(self.pair.base, "", BASE, 0.0, 0.0, None)
        if any(row.patch == "ours" for row in rows):
            self._stats(self.pair.base, own=True)
        if any(row.fine == "dowser" for row in rows):
            self._importance()
        self._training()

    def make(self, unit: Unit) -> None:
        """Fine-tune, patch and score; the patches and their statistics are removed, the fine-tune is kept."""
        model, seconds, peak = self._fine_tuned(unit.depth, unit.fine, unit.rate)
        for row in unit.rows:
            if not row.patch:
                self._score(model, unit.depth, row, unit.rate, seconds, peak)
                continue
            patched, more, peak_of_patch = self._patched(model, row.patch)
            self._score(patched, unit.depth, row, unit.rate, seconds + more, peak_of_patch)
        for made in self._models(unit.depth).glob(f"{unit.fine}-{unit.rate:g}-*/"):
            shutil.rmtree(made)

    def forget(self) -> None:
        """Remove all models; their scores stay."""
        shutil.rmtree(self.folder / "models", ignore_errors=True)

    def _models(self, depth: str) -> Path:
        return self.folder / "models" / slug(depth)

    def _known(self, depth: str, row: Row, rate: float) -> dict[str, Any]:
        """The scores that are there, by part."""
        file = cell_file(self.folder, depth, row, rate)
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
            batch_size=(256 if own else 64) if torch.cuda.is_available() else 16,
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

    def _score(self, model: Path, depth: str, row: Row, rate: float, seconds: float, peak: int | None) -> None:
        """Score a model on test data, and on validation data where a rate is picked, unless that is done; note it."""
        known = self._known(depth, row, rate)
        picking = self.pair.seed == 0 and row != BASE and row.fine not in MASKS
        wanted = [part for part in ((VALIDATION, TEST) if picking else (TEST,)) if part not in known]
        if not wanted:
            return
        for part in wanted:
            known[part] = self._scores(model, part)
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
        file = cell_file(self.folder, depth, row, rate)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(facts) + "\n")

    def _scores(self, model: Path, part: str) -> dict[str, list[list[float]]]:
        found = evaluate_models(
            [model],
            self.pair.specs(part),
            EvaluateOptions(
                batch_size=128 if torch.cuda.is_available() else 32,
                max_new_tokens=self.pair.answer_length,
                limit=self.part.items,
            ),
            origin=self.pair.origin,
            target=self.pair.target,
        )
        [scores] = found.scores.values()
        return {task: [one.correct.tolist(), one.count.tolist()] for task, one in scores.items()}

    def measure_memory(self, rows: Iterable[Row]) -> None:
        """Peak memory of a process of each fine-tune of ``rows``, with all layers, where no GPU told it."""
        file = self.folder / "memory.json"
        if torch.cuda.is_available() or file.exists():
            return
        scratch = self._models("memory")
        scratch.mkdir(parents=True, exist_ok=True)
        found = {f"{TUNED_AT}: {row.title}": self._peak_of(row.fine, scratch) for row in rows if not row.patch}
        write_text_atomically(file, json.dumps(found) + "\n")
        shutil.rmtree(scratch)

    def _peak_of(self, fine: str, scratch: Path) -> int:
        part, output = self.part, scratch / fine
        told = {
            "--data": self.pair.train,
            "--method": fine,
            "--steps": MEASURED_STEPS,
            "--batch-size": part.batch,
            "--seq-len": part.seq_len,
            "--last-layers": self.depths[TUNED_AT],
            "--training-args": self._training(),
            "--dtype": part.dtype,
            "--output": output,
        }
        if fine == "dowser":
            told["--importance"] = self._importance()[0]
        words = [str(word) for option in told.items() for word in option]
        return run_python(["-m", "tailorcli", "finetune", str(self.pair.base), *words, "--json"], scratch).peak_bytes


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
    gc.collect()  # of what ran before
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = clock()
    make()
    return clock() - started, torch.cuda.max_memory_allocated() - before if on_gpu else None


def share_moved(base: Path, model: Path) -> float:
    """The share of entries in which a model differs from the base."""
    with Checkpoint.open(base) as one, Checkpoint.open(model) as other:
        changed = sum(int((one.read(name) != other.read(name)).count_nonzero()) for name in one.tensors)
        return changed / sum(info.numel for info in one.tensors.values())
