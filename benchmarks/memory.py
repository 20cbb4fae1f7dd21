"""Peak resident memory of ``tailorcli patch`` over the depth of the model.

Llama-shaped synthetic pairs that differ in nothing but their number of layers are patched, each by a process of its
own; the peak is the kernel's ru_maxrss of that process. Targets: the peaks lie within 5% of each other, and below
1.5 GB + 6 times the largest tensor in float32. A last case of few layers has a vocabulary so large that the largest
tensor is what counts. The baseline of the ratios is the shallowest model. Beside each peak stands the plan's own
estimate (``patch --dry-run --json``).

The inputs lie in a temporary folder, one case at a time; the deepest default case takes about 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import (
    describe,
    environment,
    markdown,
    parser,
    run_python,
    say,
    use_threads,
    verdict,
    write_json,
)
from benchmarks.synthetic import DTYPES, Inputs, LlamaShape, parameters, write_inputs

SPREAD_TARGET = 1.05
FIXED_BYTES, PER_LARGEST = 1.5e9, 6


def limit_bytes(shape: LlamaShape) -> float:
    """The target: 1.5 GB + 6 times the largest tensor in float32."""
    return FIXED_BYTES + PER_LARGEST * 4 * max(parameter.numel for parameter in parameters(shape))


def measure_case(shape: LlamaShape, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Write one pair, patch it ``--rounds`` times, take its files away."""
    say(f"{shape.layers} layers, vocabulary {shape.vocab}: writing the pair")
    inputs = write_inputs(scratch / "inputs", shape, args.dtype)
    output = scratch / "patched"
    estimate = json.loads(run_python([*_command(inputs, output, args), "--dry-run"], scratch).stdout)
    runs = []
    for number in range(args.rounds):
        say(f"{shape.layers} layers: patching, {number + 1} of {args.rounds}")
        runs.append(run_python(_command(inputs, output, args), scratch))
        shutil.rmtree(output)
    shutil.rmtree(scratch / "inputs")
    return {
        "shape": asdict(shape),
        "checkpoint_bytes": estimate["write_bytes"],
        "peaks": [run.peak_bytes for run in runs],
        "peak_bytes": median(run.peak_bytes for run in runs),
        "estimated_bytes": estimate["peak_memory_bytes"],
        "limit_bytes": limit_bytes(shape),
        "seconds": median(run.seconds for run in runs),
    }


def _command(inputs: Inputs, output: Path, args: argparse.Namespace) -> list[str]:
    paths = [str(inputs.base), str(inputs.tuned), "--stats", str(inputs.stats), "-o", str(output)]
    return ["-m", "tailorcli", "patch", *paths, "--solver", args.solver, "--device", "cpu", "--json"]


def spread(cases: Sequence[dict[str, Any]]) -> float:
    """The largest peak over the smallest, over the cases that differ in depth alone."""
    peaks = [case["peak_bytes"] for case in cases if case["shape"]["vocab"] == cases[0]["shape"]["vocab"]]
    return float(max(peaks) / min(peaks))


def render(figures: dict[str, Any]) -> str:
    """The table, and how the targets came out."""
    cases = figures["cases"]
    columns = ("layers, vocabulary", "checkpoint", "peak", "peak / shallowest", "limit", "plan's estimate", "seconds")
    table = markdown(columns, [_row(case, cases[0]["peak_bytes"]) for case in cases])
    within = all(max(case["peaks"]) <= case["limit_bytes"] for case in cases)
    covered = all(max(case["peaks"]) <= case["estimated_bytes"] for case in cases)
    shape = cases[0]["shape"]
    return "\n".join(
        (
            table,
            "",
            f"peaks within 5% over the depth: {verdict(figures['spread'] <= SPREAD_TARGET)} "
            f"(largest / smallest {figures['spread']:.3f})",
            f"every peak below 1.5 GB + 6x the largest tensor in float32: {verdict(within)}",
            f"every peak below the plan's own estimate: {'yes' if covered else 'no'}",
            f"hidden {shape['hidden']}, intermediate {shape['intermediate']}, {figures['dtype']}, solver "
            f"{figures['solver']}, median of {figures['rounds']} rounds; {describe(figures['environment'])}",
        )
    )


def _row(case: dict[str, Any], baseline: float) -> list[str]:
    shape = case["shape"]
    return [
        f"{shape['layers']}, {shape['vocab']}",
        _megabytes(case["checkpoint_bytes"]),
        _megabytes(case["peak_bytes"]),
        f"{case['peak_bytes'] / baseline:.3f}",
        _megabytes(case["limit_bytes"]),
        _megabytes(case["estimated_bytes"]),
        f"{case['seconds']:.1f}",
    ]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def parse() -> argparse.Namespace:
    options = parser("benchmarks.memory", __doc__)
    options.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--intermediate", type=int, default=1408)
    options.add_argument("--vocab", type=int, default=4096)
    options.add_argument("--large-vocab", type=int, default=131072, help="of the last case; 0 leaves it out")
    options.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    options.add_argument("--solver", choices=("joint", "sequential", "none"), default="joint")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--dir", type=Path, help="where the temporary folder goes")
    return options.parse_args()


def main() -> None:
    """Measure, print the table, write the JSON."""
    args = parse()
    use_threads(args.threads)
    shapes = [LlamaShape(layers, args.hidden, args.intermediate, args.vocab) for layers in args.layers]
    if args.large_vocab:
        shapes.append(LlamaShape(min(args.layers), args.hidden, args.intermediate, args.large_vocab))
    with TemporaryDirectory(prefix="tailorcli-memory-", dir=args.dir) as scratch:
        cases = [measure_case(shape, args, Path(scratch)) for shape in shapes]
    figures = {
        "dtype": args.dtype,
        "solver": args.solver,
        "rounds": args.rounds,
        "environment": environment(),
        "cases": cases,
        "spread": spread(cases),
    }
    write_json(args.json, figures)
    print(render(figures))


if __name__ == "__main__":
    main()
