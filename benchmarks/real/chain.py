"""The command line under test, run as a user runs it, each step in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailorcli import __version__

SAMPLES = 128
SEQ_LEN = 256
DEFAULT_PATCH = ("joint", "0.1")  # solver and density


@dataclass(frozen=True)
class Step:
    """One command of a chain: `output` is the file or folder it makes, `source` says which models it starts from."""

    label: str
    arguments: tuple[str, ...]
    output: str
    source: str

    @property
    def command_line(self) -> str:
        """The command as one would type it in the cache folder."""
        return " ".join(("tailorcli", *self.arguments))


def steps(pair_key: str) -> list[Step]:
    """Return the chain in order; paths are relative to the cache folder."""
    chain = [
        calibrate_step("calibrate", "tuned", "train.jsonl", "stats", pair_key),
        Step("score", ("score", "base", "tuned", "--stats", "stats", "-o", "score.json"), "score.json", pair_key),
    ]
    chain += [patch_step(solver, density, pair_key) for solver, density in patches()]
    chain.append(Step("inspect", ("inspect", patch_folder(*DEFAULT_PATCH), "--json"), "inspect.json", pair_key))
    return chain


def calibrate_step(label: str, tuned: str, data: str, stats: str, source: str, options: tuple[str, ...] = ()) -> Step:
    """Return the step that measures the Hessians of a tuned model on its own data."""
    size = ("--num-samples", str(SAMPLES), "--seq-len", str(SEQ_LEN))
    return Step(label, ("calibrate", tuned, *options, "--data", data, "-o", stats, *size), stats, source)


def patch_step(solver: str, density: str, pair_key: str) -> Step:
    """Return the step that patches the base with `tuned`."""
    output = patch_folder(solver, density)
    options = ("--stats", "stats", "-o", output, "--solver", solver, "--density", density)
    return Step(output, ("patch", "base", "tuned", *options), output, pair_key)


def patches() -> list[tuple[str, str]]:
    """Return (solver, density) of every patched model."""
    same_mask = [(solver, "0.1") for solver in ("none", "sequential", "joint")]
    return same_mask + [("joint", density) for density in ("0.01", "0.02", "0.05", "0.2")]


def patch_folder(solver: str, density: str) -> str:
    """Return the folder of a patched model inside the cache."""
    return f"patched-{solver}-{density}"


def report_totals(cache: Path, folders: Iterable[str]) -> dict[str, Any]:
    """Return the totals of each patched model's report, by folder."""
    files = {folder: cache / folder / "tailor_report.json" for folder in folders}
    return {folder: json.loads(file.read_text(encoding="utf-8"))["totals"] for folder, file in files.items()}


def run_chain(cache: Path, chain: list[Step], fresh: bool) -> list[dict[str, Any]]:
    """Run the steps that have not run yet; return the figures of all of them, in order.

    A step runs again when its source, its arguments or the tool's version changed, when its output
    is gone, when a step that makes something it reads ran after it, or when `fresh` is set.
    """
    (cache / "steps").mkdir(exist_ok=True)
    records = {step.output: record_file(cache, step) for step in chain}
    figures = []
    for step in chain:
        key = [step.source, __version__, *step.arguments]
        record = record_file(cache, step)
        inputs = [records[name] for name in step.arguments if name in records and name != step.output]
        stale = fresh or not (cache / step.output).exists() or any(_newer(file, record) for file in inputs)
        value = None if stale else load_cached(record, key)
        if value is None:
            record.unlink(missing_ok=True)
            value = _run_step(step, cache)
            store(record, key, value)
        figures.append(value)
    return figures


def record_file(cache: Path, step: Step) -> Path:
    """Return the file that holds the figures of a step that has run; each run writes it anew."""
    return cache / "steps" / f"{step.label}.json"


def _newer(first: Path, second: Path) -> bool:
    """Whether the first file was written after the second."""
    return second.exists() and first.stat().st_mtime_ns > second.stat().st_mtime_ns


def load_cached(file: Path, key: list[str]) -> Any:
    """Return the value that was stored in a JSON file under this very key, or None."""
    if not file.exists():
        return None
    stored = json.loads(file.read_text(encoding="utf-8"))
    return stored["value"] if stored["key"] == key else None


def store(file: Path, key: list[str], value: Any) -> None:
    """Write a value and its key to a JSON file, whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps({"key": key, "value": value}), encoding="utf-8")
    partial.replace(file)


def _run_step(step: Step, cache: Path) -> dict[str, Any]:
    """Run one command with its measuring process around it; stop the benchmark if it fails."""
    print(f"  {step.command_line}", file=sys.stderr, flush=True)
    output = cache / step.output
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
    record = cache / "steps" / "figures.partial"
    wrapper = [sys.executable, str(Path(__file__).with_name("step.py")), str(record), "--"]
    command = [sys.executable, "-m", "tailorcli", *step.arguments]
    # In the cache folder, the only tailorcli that Python can find is the installed one.
    done = subprocess.run(wrapper + command, cwd=cache, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise SystemExit(f"exit status {done.returncode} from: {step.command_line}")
    if step.arguments[0] == "inspect":
        output.write_bytes(done.stdout)
    figures = json.loads(record.read_text(encoding="utf-8"))
    record.unlink()
    return {"label": step.label, "command": step.command_line, **figures}
