"""What the benchmarks share: interleaved timing, facts about the machine, tables, JSON.

Times on one machine drift with its load, so what is compared runs turn by turn within one run, and each figure is
the median over the rounds; a ratio is the median of the ratios of each round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

# Starts a command and prints its exit code, seconds and ru_maxrss. A process of its own, because a child's ru_maxrss
# begins at the resident memory of the process that forked it: here 10 MB, not a benchmark with torch loaded.
_LAUNCHER = """
import json, os, sys, time
started = time.perf_counter()
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[2:]], os.environ)
_, status, usage = os.wait4(pid, 0)
facts = {"code": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - started, "peak": usage.ru_maxrss}
facts["processor"] = usage.ru_utime + usage.ru_stime
open(sys.argv[1], "w").write(json.dumps(facts))
"""


@dataclass(frozen=True)
class Finished:
    """A command that has run: what it printed, seconds from start to end, peak resident memory in bytes.

    ``processor_seconds`` are those of all its threads together: other work on the machine changes them less.
    """

    stdout: str
    seconds: float
    peak_bytes: int
    stderr: str = ""
    processor_seconds: float = 0.0


def run_python(arguments: Sequence[str], scratch: Path) -> Finished:
    """Run ``python ARGUMENTS`` in a process of its own; a failure raises with its standard error."""
    facts_file = scratch / "launcher.json"
    command = [sys.executable, "-S", "-c", _LAUNCHER, str(facts_file), *arguments]
    # An installation has its bytecode: what is compiled in the round that does not count is kept, as there.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    if facts["code"] != 0:
        raise RuntimeError(f"{' '.join(arguments)} exited with {facts['code']}:\n{done.stderr}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(done.stdout, facts["seconds"], facts["peak"] * unit, done.stderr, facts["processor"])


def seconds_of(action: Callable[[], object]) -> float:
    """How long one call takes."""
    gc.collect()
    started = perf_counter()
    action()
    return perf_counter() - started


def interleaved(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action in each round, turn by turn, after one round that does not count."""
    for action in actions.values():
        action()
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            found[name].append(seconds_of(action))
    return found


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over the rounds of ``over / under``."""
    return median(a / b for a, b in zip(over, under, strict=True))


def environment() -> dict[str, Any]:
    """Versions, threads and processor: what a figure depends on."""
    import torch

    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": processor(),
        "python": platform.python_version(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cache_root() -> Path:
    """The folder of weights and results, unless an option says another."""
    return Path(os.environ.get("TAILORCLI_CACHE") or Path.home() / ".cache" / "tailorcli")


def describe(facts: dict[str, Any]) -> str:
    """One line on the environment."""
    return (
        f"torch {facts['torch']}, {facts['threads']} threads on {facts['cores']} cores ({facts['processor']}), "
        f"OMP_WAIT_POLICY {facts['wait_policy']}, Python {facts['python']}, load average {facts['load_average']}"
    )


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    """A Markdown table, padded so that it also reads well in a terminal; columns to the right, but those of text."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(columns))]
    rule = ["-" * width if i in text else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [
        [
            cell.ljust(width) if i in text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (aligned[0], rule, *aligned[1:]))


def verdict(ok: bool) -> str:
    """How a target's outcome reads in a table."""
    return "met" if ok else "missed"


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="also write every figure here")
    made.add_argument("--threads", type=int, help="torch threads (torch's own choice without it)")
    return made


def use_threads(count: int | None) -> None:
    """Set torch's threads here and in the commands that are started from here."""
    import torch

    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
        torch.set_num_threads(count)


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write all figures to ``path``, where one was given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def kept_figures(file: Path) -> dict[str, Any]:
    """The figures that an earlier run left in ``file``; none where it is not there."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def whole_numbers(values: Iterable[float]) -> list[float]:
    """Numbers for a file, those that are whole without a fraction, which is shorter."""
    return [int(value) if value == int(value) else float(value) for value in values]


def say(text: str) -> None:
    """A note on standard error, so that the table stays the last thing on standard output."""
    print(text, file=sys.stderr, flush=True)
