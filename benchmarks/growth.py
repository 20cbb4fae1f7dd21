"""How cost grows: with layers, width, density and samples; measured exponents beside the expected ones.

An exponent is the slope of a straight line through log(cost) over log(size), so twice the size costs 2^exponent as
much. Costs are processor seconds, the least of some rounds, which other work on the machine disturbs little, and
peak memory. Whole commands are counted less the same command with next to nothing to do.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    cache_root,
    describe,
    environment,
    kept_figures,
    markdown,
    parser,
    say,
    use_threads,
    write_json,
)
from benchmarks.pages import publish
from benchmarks.peers.environments import measured
from benchmarks.solver import DAMPING, OMEGA, joint, make_layer
from benchmarks.synthetic import LlamaShape, write_inputs, write_pair, write_samples, write_tokenizer
from tailorcli import PatchOptions, patch_checkpoint
from tailorcli.core import count_kept, select_mask
from tailorcli.core.figures import quadratic_form
from tailorcli.core.hessian import prepare
from tailorcli.core.tailor import fused_score
from tailorcli.device import exact_float32

PAGE = Path(__file__).parents[1] / "docs" / "results" / "growth.md"
LAYERS, WIDTHS = (4, 16, 64), (512, 1024, 2048, 4096)
DENSITIES, SAMPLES = (0.01, 0.03, 0.1, 0.3, 1.0), (32, 128, 512)
AXES = ("layers", "hidden", "density", "samples")
HEAD = """# How cost grows

Written by `python -m benchmarks.growth`. An exponent of 1 means that twice the size costs twice as
much, of 2 four times, of 0 nothing. *Measured* is the slope through all sizes of a row; *last step* is that between
the two largest, where what does not grow with the size matters least.
"""
TEXTS = {
    "layers": """A whole `patch` and its peak memory, over depth. Work is one tensor after another: time grows in
proportion, memory not at all.""",
    "hidden": """One square layer, over its width I = O, at density 0.1. Scoring and choosing look at each entry once;
the factorisation and the error's products are cubic. The solver's own systems have n = density · I unknowns a row:
I · n³ / 3 multiply-adds where each row is solved directly, which is I⁴, beside a right side of I³. Larger
products come nearer to the processor's rate: what is measured falls short of what is counted.""",
    "density": """The joint solver on one layer of I = O = 1024, and a patch file. The right side costs the same at
any density; the systems grow with its cube until iterating for all rows at once is cheaper, and from there with the
iterations alone.
At density 1 there is nothing to solve, and that is left out of the solver's exponents.""",
    "samples": """A whole `calibrate`, over the samples of 64 tokens that it reads. The pass is in proportion, what
begins and ends it is not; memory and what is stored depend on the model alone.""",
}


@dataclass(frozen=True)
class Series:
    """One cost over the sizes of an axis; the exponents are those of the first ``fitted`` sizes."""

    axis: str
    what: str
    unit: str
    expected: str
    sizes: list[float]
    costs: list[float]
    fitted: int

    def exponents(self) -> tuple[float, float]:
        """The slope through all sizes, and that of the last step."""
        sizes, costs = self.sizes[: self.fitted], self.costs[: self.fitted]
        return slope(sizes, costs), slope(sizes[-2:], costs[-2:])


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Of the least-squares line through log(cost) over log(size)."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def least_seconds(action: Callable[[], object], rounds: int) -> float:
    """Processor seconds of the fastest call."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        action()
        found.append(time.process_time() - started)
    return min(found)


def _choose(delta: Tensor, inverse_diagonal: Tensor, count: int) -> Tensor:
    return select_mask(fused_score(delta, inverse_diagonal, OMEGA), count)


def over_widths(widths: Sequence[int], rounds: int) -> list[Series]:
    """The stages of one square layer."""
    costs: dict[str, list[float]] = {"factorise": [], "score and choose": [], "solve": [], "measure": []}
    for size in widths:
        say(f"I = O = {size}")
        layer = make_layer(size, 0.1, 1.0, torch.device("cpu"))
        prepared = prepare(layer.hessian, DAMPING, sensitivity=True, sequential=False)
        assert prepared.inverse_diagonal is not None
        diagonal, count = prepared.inverse_diagonal.unsqueeze(0), count_kept(0.1, layer.delta.numel())
        actions: dict[str, Callable[[], object]] = {
            "factorise": partial(prepare, layer.hessian, DAMPING, sensitivity=True, sequential=False),
            "score and choose": partial(_choose, layer.delta, diagonal, count),
            "solve": partial(joint, layer),
            "measure": partial(quadratic_form, layer.delta, layer.hessian),
        }
        for name, action in actions.items():
            costs[name].append(least_seconds(action, rounds))
    expected = {"factorise": "3", "score and choose": "2", "solve": "3 to 4", "measure": "3"}
    sizes = [float(size) for size in widths]
    return [Series("hidden", name, "s", expected[name], sizes, found, len(sizes)) for name, found in costs.items()]


def over_densities(densities: Sequence[float], rounds: int, scratch: Path) -> list[Series]:
    """The joint solver, and the bytes of a patch file."""
    base, tuned = write_pair(scratch / "densities", LlamaShape(2, 256, 704, 1024))
    seconds, megabytes = [], []
    for density in densities:
        say(f"density {density:g}")
        layer = make_layer(1024, density, 1.0, torch.device("cpu"))
        seconds.append(least_seconds(partial(joint, layer), rounds))
        file = scratch / f"patch{density:g}.safetensors"
        patch_checkpoint(
            base, tuned, None, None, PatchOptions(solver="none", omega=1, density=density), patch_file=file
        )
        megabytes.append(file.stat().st_size / 1e6)
    below = sum(density < 1 for density in densities)  # at 1 the change is tuned's own
    sizes = list(densities)
    return [
        Series("density", "solve", "s", "0 to 3", sizes, seconds, below),
        Series("density", "patch file", "MB", "1", sizes, megabytes, len(sizes)),
    ]


def _tailorcli(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tailorcli", *map(str, arguments), "--quiet"]


def _less(costs: Sequence[dict[str, Any]], nothing: dict[str, Any]) -> list[float]:
    """Processor seconds less those of a run with next to nothing to do, and never below a hundredth of a second."""
    return [max(0.01, cost["cpu_seconds"] - nothing["cpu_seconds"]) for cost in costs]


def _least(command: list[str], scratch: Path, rounds: int) -> dict[str, Any]:
    """The run that took the fewest processor seconds."""
    return min((measured(command, scratch) for _ in range(rounds)), key=lambda run: float(run["cpu_seconds"]))


def over_layers(depths: Sequence[int], rounds: int, scratch: Path) -> list[Series]:
    """A whole patch, less its plan."""
    found = []
    for depth in depths:
        say(f"{depth} layers")
        made = write_inputs(scratch / f"depth{depth}", LlamaShape(depth, 256, 704, 1024))
        given: list[str | Path] = [
            "patch",
            made.base,
            made.tuned,
            "--stats",
            made.stats,
            "-o",
            scratch / "out",
            "--overwrite",
        ]
        found.append(_least(_tailorcli(*given), scratch, rounds))
        if depth == depths[0]:
            nothing = _least(_tailorcli(*given, "--dry-run"), scratch, rounds)
    return _of_commands("layers", "patch", depths, found, nothing)


def over_samples(counts: Sequence[int], rounds: int, scratch: Path) -> list[Series]:
    """A whole calibration, less one of a single sample."""
    folder, vocab = scratch / "samples", 1024
    _, tuned = write_pair(folder, LlamaShape(4, 256, 704, vocab))
    write_tokenizer(tuned, vocab)
    write_samples(folder / "data.jsonl", vocab, max(counts), 70, 80)
    found = []
    for count in (1, *counts):
        say(f"{count} samples")
        given: list[str | Path] = [
            "calibrate",
            tuned,
            "--data",
            folder / "data.jsonl",
            "-o",
            scratch / "stats",
            "--overwrite",
        ]
        words = [*given, "--num-samples", str(count), "--seq-len", "64", "--blockwise", "never"]
        found.append(_least(_tailorcli(*words), scratch, rounds))
    return _of_commands("samples", "calibrate", counts, found[1:], found[0])


def _of_commands(
    axis: str, command: str, sizes: Sequence[int], found: Sequence[dict[str, Any]], nothing: dict[str, Any]
) -> list[Series]:
    at = [float(size) for size in sizes]
    peaks = [run["peak_bytes"] / 1e6 for run in found]
    return [
        Series(axis, f"{command}, less its start", "s", "1", at, _less(found, nothing), len(at)),
        Series(axis, f"{command}, peak memory", "MB", "0", at, peaks, len(at)),
    ]


def section(axis: str, rows: Sequence[Series]) -> str:
    """An axis of the page."""
    sizes = max((series.sizes for series in rows), key=len)
    table = []
    for series in rows:
        shown = [f"{cost:.3g} {series.unit}" for cost in series.costs]
        shown += [""] * (len(sizes) - len(shown))
        table.append([series.what, *shown, *(f"{value:.2f}" for value in series.exponents()), series.expected])
    columns = ["", *(f"{axis} {size:g}" for size in sizes), "measured", "last step", "expected"]
    return f"## {axis.capitalize()}\n\n{TEXTS[axis]}\n\n{markdown(columns, table)}"


def parse() -> argparse.Namespace:
    """The options."""
    made = parser("benchmarks.growth", __doc__)
    made.add_argument("--only", nargs="*", choices=AXES, default=AXES, metavar="AXIS", help="all; none: the page alone")
    made.add_argument("--cache", type=Path, default=cache_root(), help="folder for figures (%(default)s)")
    made.add_argument("--page", type=Path, default=PAGE, help="the page to write (%(default)s)")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    return made.parse_args()


def main() -> None:
    """Measure the axes asked for, and write the page of all that are in the cache."""
    args = parse()
    use_threads(args.threads)
    args.cache.mkdir(parents=True, exist_ok=True)
    kept = args.cache / "growth.json"
    found = kept_figures(kept)
    with TemporaryDirectory(prefix="tailorcli-") as name, exact_float32():
        scratch = Path(name)
        work: dict[str, Callable[[], list[Series]]] = {
            "layers": lambda: over_layers(LAYERS, args.rounds, scratch),
            "hidden": lambda: over_widths(args.widths, args.rounds),
            "density": lambda: over_densities(DENSITIES, args.rounds, scratch),
            "samples": lambda: over_samples(SAMPLES, args.rounds, scratch),
        }
        for axis in args.only:
            found[axis] = {"series": [asdict(series) for series in work[axis]()], "environment": environment()}
            write_json(kept, found)
    parts = [HEAD]
    for axis in AXES:
        if axis in found:
            rows = [Series(**series) for series in found[axis]["series"]]
            parts.append(f"{section(axis, rows)}\n\n- {describe(found[axis]['environment'])}\n")
    publish("\n".join(parts), args.page)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
