"""`python -m benchmarks.leads.trained_long TASK...`: fine-tunes trained too little, enough and too long.

Of each: what `--teacher-weight auto` picks and what that is worth, whether propagation helps and `--check-propagation`
sees it, and whether what `--target` says of the old task is so. TASK is one of the benchmark `quick`; seed 0, short
distillations, figures of validation data that picked nothing. Writes tables of docs/results/research.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.common import cache_root, say
from benchmarks.leads.__main__ import DOCUMENT
from benchmarks.leads.runs import accuracy
from benchmarks.leads.short import h_of
from benchmarks.quick import data as quick_data
from benchmarks.quick.model import TUNED, train
from benchmarks.real.model import Recipe
from benchmarks.real.render import between, table
from tailorcli import (
    CalibrateOptions,
    DistillOptions,
    PatchOptions,
    Stats,
    calibrate_model,
    distill_checkpoint,
    patch_checkpoint,
    patch_to_target,
)
from tailorcli.demo.text import TaskText, encode, samples, write_jsonl

WINDOW = quick_data.WINDOW
SAMPLES, COUNTS = 64, (64, 16, 4)  # of each kind
DISTILL = DistillOptions(steps=40, batch_size=4)
HELD = 120  # windows of validation text: every other one picks the teacher's weight, the rest is what is measured on
Figures = dict[str, Any]


@dataclass(frozen=True)
class FineTune:
    """How long a fine-tune is trained, and on how many characters (all without)."""

    steps: int
    characters: int | None = None


FINE_TUNES = {
    "too little": FineTune(20),
    "enough": FineTune(TUNED.steps),
    "too long": FineTune(60, 4_000),
}


class Pair:
    """One fine-tune of quick's first base, in a folder of its own."""

    def __init__(self, task: str, name: str, tasks: dict[str, TaskText], cache: Path) -> None:
        self.task, self.name = task, name
        self.base, self.folder = cache / "seed0" / "base", cache / "trained-long" / f"{task}-{name.replace(' ', '-')}"
        self.tuned, self.data, self.held = self.folder / "tuned", self.folder / "new.jsonl", self.folder / "held.jsonl"
        how = FINE_TUNES[name]
        text = tasks[task].train[: how.characters]
        if how == FineTune(TUNED.steps):
            self.tuned = cache / "seed0" / task
        elif not self.tuned.exists():
            recipe = Recipe(steps=how.steps, batch=TUNED.batch, learning_rate=TUNED.learning_rate, warmup=TUNED.warmup)
            network = LlamaForCausalLM.from_pretrained(self.base)
            train(network, [text], recipe, 0, self.tuned)
        write_jsonl(self.data, samples(text, WINDOW, 512))
        windows = samples(tasks[task].validation, WINDOW, HELD)
        write_jsonl(self.held, windows[::2])
        old = {each: samples(tasks[each].validation, WINDOW, HELD // 2) for each in quick_data.OLD_TASKS}
        self.texts = {
            each: torch.cat([encode([text]) for text in chosen])
            for each, chosen in {**old, "new": windows[1::2]}.items()
        }

    def accuracies(self, model: Path) -> dict[str, float]:
        """Percentages of next bytes guessed right: old, new."""
        network = LlamaForCausalLM.from_pretrained(model).eval()
        found = {name: accuracy(network, ids) for name, ids in self.texts.items()}
        return {"old": mean(found[name] for name in quick_data.OLD_TASKS), "new": found["new"]}

    def stats(self, count: int, weight: float | str | None = None) -> Path:
        """Statistics of tuned on the new task's data, or of the model at a teacher's weight."""
        folder = self.folder / f"stats-{count}-{weight or 1}"
        if not folder.exists():
            options = CalibrateOptions(count, WINDOW, batch_size=32, teacher_weight=weight)
            more: dict[str, Any] = {} if weight is None else {"base": self.base, "teacher_data": self.held}
            calibrate_model(self.tuned, self.data, folder, options, **more)
        return folder

    def retained(self, count: int) -> Path:
        """Statistics of the base on what it writes itself."""
        folder = self.base.parent.parent / "trained-long" / f"base-stats-{count}"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            calibrate_model(self.base, None, folder, CalibrateOptions(count, WINDOW, batch_size=32, synthetic=True))
        return folder

    def teacher(self) -> Figures:
        """What auto picks, and the distilled patch's accuracies with and without it."""
        found: Figures = {name: self.accuracies(getattr(self, name)) for name in ("base", "tuned")}
        for weight in (None, "auto"):
            stats = self.stats(SAMPLES, weight)
            opened = Stats.open(stats)
            opened.close()
            if weight == "auto":
                found["weight"] = opened.teacher_weight
                if opened.teacher_weight == 1.0:
                    found["auto"] = found["1"]
                    break
            out = self.folder / f"distilled-{weight or 1}"
            options = PatchOptions(propagate=False, overwrite=True)
            distill_checkpoint(self.base, self.tuned, out, stats, self.retained(SAMPLES), options, DISTILL)
            found[str(weight or 1)] = self.accuracies(out)
        return found

    def propagation(self, count: int) -> Figures:
        """The plain patch and the propagated one, and which of them ``--check-propagation`` keeps."""
        stats, retain = self.stats(count), self.retained(count)
        found: Figures = {}
        for name, propagate in (("plain", False), ("propagated", True)):
            out = self.folder / name
            options = PatchOptions(propagate=propagate, overwrite=True)
            patch_checkpoint(self.base, self.tuned, out, stats, options, retain=retain)
            found[name] = self.accuracies(out)
        checked = PatchOptions(check_propagation=True, overwrite=True)
        report = patch_checkpoint(self.base, self.tuned, self.folder / "checked", stats, checked, retain=retain)
        assert report.propagation is not None
        return found | {"kept": report.propagation["kept"], "held_out": report.propagation["held_out"]}

    def target(self, asked: str) -> Figures:
        """What ``--target`` reached by its own measure, and the accuracies of what it wrote."""
        out, told = self.folder / "aimed", list[str]()
        options = PatchOptions(propagate=False, overwrite=True)
        given = (self.base, self.tuned, out, self.stats(SAMPLES), self.retained(SAMPLES), asked, options, DISTILL)
        report = patch_to_target(*given, tell=told.append)
        assert report.target is not None
        kept = (report.distillation or report.target)["kept"]  # of what was trained, or of a closed form
        return {"kept": kept, "density": report.target["density"], "told": told, **self.accuracies(out)}


def teacher_rows(found: dict[str, Figures]) -> list[list[str]]:
    """A row a fine-tune: H of both ends and of the distilled patch at weight 1 and at what auto picked."""
    rows = []
    for name, of in found.items():
        one = of.get("teacher")
        if one is None:
            continue
        cells = [f"{h_of(one[each]):.1f}" for each in ("base", "tuned", "1", "auto")]
        news = [f"{one[each]['new']:.1f}" for each in ("tuned", "1", "auto")]
        rows.append([name, *cells, *news, f"{one['weight']:g}"])
    return rows


def propagation_rows(found: dict[str, Figures]) -> list[list[str]]:
    """A row a fine-tune and number of samples: H plain and propagated, both on held-out samples, what was kept."""
    rows = []
    for name, of in found.items():
        for count in COUNTS:
            one = of.get(f"propagation {count}")
            if one is None:
                continue
            h = [h_of(one[each]) for each in ("plain", "propagated")]
            held = [sum(one["held_out"][each].values()) for each in ("plain", "propagated")]
            kept = "propagated" if one["kept"] else "plain"
            cells = [*(f"{value:.1f}" for value in h), *(f"{value:.3f}" for value in held), kept]
            rows.append([f"{name}, {count} samples", *cells])
    return rows


def target_rows(found: dict[str, Figures]) -> list[list[str]]:
    """A row a fine-tune: the density that was picked, and shares of old and new by its measure and by the tasks."""
    rows = []
    for name, of in found.items():
        for asked in ("old=99", "new=97"):
            one = of.get(f"target {asked}")
            if one is None:
                continue
            ends = of["teacher"]
            said = [f"{100 * one['kept'][kind]:.1f}" for kind in ("old", "new")]
            real = [100 * one[kind] / ends[end][kind] for kind, end in (("old", "base"), ("new", "tuned"))]
            rows.append([f"{name}, {asked}", f"{one['density']:g}", *said, *(f"{value:.1f}" for value in real)])
    return rows


TABLES: dict[str, tuple[list[str], Callable[[dict[str, Figures]], list[list[str]]]]] = {
    "trained-teacher": (
        [
            *("fine-tune", "base: H", "tuned: H", "distilled, weight 1: H", "auto: H"),
            *("tuned: new", "weight 1: new", "auto: new", "auto's weight"),
        ],
        teacher_rows,
    ),
    "trained-propagation": (
        ["fine-tune", "plain: H", "propagated: H", "plain: held out", "propagated: held out", "kept"],
        propagation_rows,
    ),
    "trained-target": (
        ["fine-tune, asked", "density", "old, said, %", "new, said, %", "old, tasks, %", "new, tasks, %"],
        target_rows,
    ),
}


def write(found: dict[str, Figures]) -> None:
    """Write the tables of what was measured."""
    document = DOCUMENT.read_text(encoding="utf-8")
    for mark, (header, rows_of) in TABLES.items():
        rows = rows_of(found)
        if rows:
            text = table(header, rows)
            print(text)
            document = between(document, mark, text)
    DOCUMENT.write_text(document, encoding="utf-8")


def main() -> None:
    """Measure what is asked for and write the tables."""
    described = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leads.trained_long", description=described)
    parser.add_argument("tasks", nargs="*", help="new tasks of quick")
    parser.add_argument("--fine-tunes", nargs="*", default=list(FINE_TUNES), choices=FINE_TUNES)
    parser.add_argument("--parts", nargs="*", default=["teacher", "propagation"], help="and target (%(default)s)")
    parser.add_argument("--cache", type=Path, default=cache_root() / "quick", help="of the evidence (%(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="takes every figure, and has those of earlier runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Figures] = {}
    if options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))
    texts = quick_data.load_tasks() if options.tasks else {}
    for task in options.tasks:
        for name in options.fine_tunes:
            pair = Pair(task, name, texts, options.cache)
            of = found.setdefault(f"{task}, trained {name}", {})
            jobs: dict[str, Callable[[], Figures]] = {}
            if "teacher" in options.parts:
                jobs["teacher"] = pair.teacher
            if "propagation" in options.parts:
                for count in COUNTS:
                    jobs[f"propagation {count}"] = lambda pair=pair, count=count: pair.propagation(count)  # type: ignore[misc]
            if "target" in options.parts:
                for asked in ("old=99", "new=97"):
                    jobs[f"target {asked}"] = lambda pair=pair, asked=asked: pair.target(asked)  # type: ignore[misc]
            for key, job in jobs.items():
                if key not in of:
                    of[key] = job()
                    say(f"{task}, trained {name}, {key}: {json.dumps(of[key])}")
                    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write(found)


if __name__ == "__main__":
    main()
