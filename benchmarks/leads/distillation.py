"""`python -m benchmarks.leads.distillation`: what the defaults of `patch --distill` were chosen by.

A variant's name says what differs from the first, which is none of today's defaults.

On the first seed of every pair of the benchmark `quick`; all figures are of validation data.
Writes a table of docs/results/research.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

from benchmarks.common import cache_root, say
from benchmarks.evidence.pairs import quick
from benchmarks.evidence.run import SEQ_LEN
from benchmarks.leads.__main__ import DOCUMENT
from benchmarks.quick.data import COUNTS, WINDOW
from benchmarks.real.render import between, table
from benchmarks.real.setting import environment
from tailorcli import CalibrateOptions, EvaluateOptions, PatchOptions, calibrate_model
from tailorcli.demo.demo import run_demo
from tailorcli.demo.text import NEW_TASK, OLD_TASKS, build_tasks, samples, write_jsonl
from tailorcli.options import DistillOptions
from tailorcli.sweep.run import run_sweep
from tailorcli.sweep.settings import Setting

MARK = "distillation"
FIRST = DistillOptions(steps=200, rate=0.1, weight=1.0, batch_size=8)
COUNT = 128  # samples of each kind


@dataclass(frozen=True)
class Variant:
    """One way to distil: on so many samples of each kind, at a density, from a method's patch."""

    how: DistillOptions = FIRST
    count: int = COUNT
    density: float = 0.1
    method: str = "tailor"

    @property
    def setting(self) -> Setting:
        """Of a sweep."""
        options = PatchOptions(density=self.density, method=self.method, overwrite=True)
        return Setting(options, retained=self.method == "tailor", distill=self.how)


def _changed(**values: float) -> DistillOptions:
    return replace(FIRST, **values)  # type: ignore[arg-type]


VARIANTS = {
    "128 samples, 200 steps, rate 0.1, B 1": Variant(),
    "512 samples, 400 steps": Variant(_changed(steps=400), 512),
    **{f"rate {rate:g}": Variant(_changed(rate=rate)) for rate in (0.05, 0.2)},
    "400 steps": Variant(_changed(steps=400)),
    "512 samples": Variant(count=512),
    **{f"B {weight:g}": Variant(_changed(weight=weight)) for weight in (0.5, 2.0)},
    "512 samples, 400 steps, rate 0.05": Variant(_changed(steps=400, rate=0.05), 512),
    "512 samples, 400 steps, batches of 16": Variant(_changed(steps=400, batch_size=16), 512),
    "512 samples, 800 steps": Variant(_changed(steps=800), 512),
    "density 0.02": Variant(density=0.02),
    "density 0.02, 512 samples, 400 steps": Variant(_changed(steps=400), 512, 0.02),
    "from the mask of magnitude": Variant(method="magnitude"),
    "rate 0.03": Variant(_changed(rate=0.03)),
}
PLAIN = {
    **{f"interpolate {w:g}": Setting(PatchOptions(method="interpolate", weight=w)) for w in (0.4, 0.6, 0.8)},
    "not distilled": Setting(PatchOptions(), retained=True),
}
NAMES = ["base", "tuned", *PLAIN, *VARIANTS]


@dataclass(frozen=True)
class Case:
    """A pair with its samples and its validation tasks."""

    name: str
    folder: Path  # of its statistics and results
    base: Path
    tuned: Path
    train: Path
    old: tuple[str, ...]
    new: str
    specs: tuple[str, ...]


def cases(cache: Path, jobs: int, demo: bool) -> list[Case]:
    """The first seed of every task of `quick`, and with ``demo`` its pair."""
    found = []
    for pair in quick(cache / "quick", (0,), jobs):
        specs = tuple(pair.specs("validation"))
        folder = cache / "distillation" / pair.name
        found.append(Case(pair.name, folder, pair.base, pair.tuned, pair.train, pair.origin, pair.target[0], specs))
    if not demo:
        return found
    folder, made = cache / "distillation" / "demo", cache / "distillation" / "pair"
    if not (made / "demo.json").exists():
        say("the demo's pair")
        run_demo(made, progress=False, overwrite=True)
    tasks = build_tasks()
    for name, task in tasks.items():
        write_jsonl(folder / f"{name}.jsonl", samples(task.validation, WINDOW, COUNTS["validation"]))
    write_jsonl(folder / "train.jsonl", samples(tasks[NEW_TASK].train, WINDOW, 4096))
    specs = tuple(f"{name}={folder / f'{name}.jsonl'}:text" for name in tasks)
    return [
        *found,
        Case("demo", folder, made / "base", made / "tuned", folder / "train.jsonl", OLD_TASKS, NEW_TASK, specs),
    ]


def calibrate(case: Case, count: int) -> None:
    """The statistics of so many samples of each kind, unless they are there."""
    for model, data, name, length in (
        (case.tuned, case.train, "stats", SEQ_LEN),
        (case.base, None, "written", WINDOW),
    ):
        folder = case.folder / f"{name}-{count}"
        if not folder.exists():
            options = CalibrateOptions(count, length, batch_size=32, synthetic=data is None, overwrite=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            calibrate_model(model, data, folder, options)


Job = tuple[Case, str, Sequence[Setting], int]


def measure(job: Job) -> dict[str, dict[str, float]]:
    """Old, new, H and seconds by label, of base, tuned and the settings."""
    case, name, settings, count = job
    report = run_sweep(
        *(case.base, case.tuned, settings, case.specs, case.folder / f"sweep-{name}"),
        origin=case.old,
        target=[case.new],
        stats=case.folder / f"stats-{count}",
        retain=case.folder / f"written-{count}",
        options=EvaluateOptions(batch_size=32),
    )
    names = ("origin", "target", "h_score")
    return {p.label: {n: p.at("test", n) for n in names} | {"seconds": p.seconds} for p in report.points}


def rows_of(found: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """A row a variant: H on each pair, the shares of old and new kept in the mean, and seconds."""
    rows = []
    for name in [one for one in NAMES if all(one in of_pair for of_pair in found.values())]:
        every = [of_pair[name] for of_pair in found.values()]
        kept = []
        for end, figure in (("base", "origin"), ("tuned", "target")):
            shares = [100 * of_pair[name][figure] / of_pair[end][figure] for of_pair in found.values()]
            kept.append(f"{mean(shares):.1f}")
        h = [one["h_score"] for one in every]
        seconds = mean(one["seconds"] for one in every)
        rows.append([name, *(f"{value:.1f}" for value in h), f"{mean(h):.2f}", *kept, f"{seconds:.0f}"])
    return rows


def main() -> None:
    """Measure every variant on every pair and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leads.distillation", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="settings at a time, each in a process of its own")
    parser.add_argument("--cache", type=Path, default=cache_root(), help="folder for weights and results (%(default)s)")
    parser.add_argument("--demo", action="store_true", help="on the demo's pair, too")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    parser.add_argument("--render", type=Path, help="measure nothing: write the table from such a file")
    options = parser.parse_args()
    if options.render is not None:
        write(json.loads(options.render.read_text(encoding="utf-8"))["found"])
        return
    found_cases = cases(options.cache.resolve(), options.jobs, options.demo)
    jobs: list[tuple[str, Job]] = []
    for number, name in enumerate(NAMES[2:]):
        setting = PLAIN[name] if name in PLAIN else VARIANTS[name].setting
        count = VARIANTS[name].count if name in VARIANTS else COUNT
        jobs += [(name, (case, str(number), [setting], count)) for case in found_cases]
    found: dict[str, dict[str, dict[str, float]]] = {case.name: {} for case in found_cases}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for count in sorted({job[3] for _, job in jobs}):
            list(pool.map(partial(calibrate, count=count), found_cases))
        begun = {pool.submit(measure, job): (name, job) for name, job in jobs}
        for future in as_completed(begun):
            name, (case, _, settings, _) = begun[future]
            points = future.result()
            found[case.name] |= {end: points[end] for end in ("base", "tuned")} | {name: points[settings[0].label]}
            say(f"{case.name}, {name}: H {found[case.name][name]['h_score']:.2f}")
            if options.json is not None:  # a run that is cut short has what it found
                options.json.write_text(json.dumps({"found": found, "machine": environment()}, indent=1) + "\n")
    write(found)


def write(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Write the table of what was measured on every pair."""
    header = ["distilled", *found, "mean H", "old kept, %", "new kept, %", "s"]
    text = table(header, rows_of(found))
    print(text)
    DOCUMENT.write_text(between(DOCUMENT.read_text(encoding="utf-8"), MARK, text), encoding="utf-8")
    say(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
