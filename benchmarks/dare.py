"""DARE against mergekit's: the same pair, turn by turn in one run, each command a process of its own.

mergekit is installed from PyPI into a virtual environment of its own, which stays in the cache. The pair is that of
``benchmarks.real``. Targets: at most half of mergekit's time and peak memory (the kernel's ru_maxrss), and results that
are equal in distribution: the share of changed entries and the mean change of every tensor, and the scale. mergekit
divides by the share of |delta| that its draw has kept where DARE divides by the density, which is the same on average.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import describe, environment, markdown, parser, ratio, say, use_threads, verdict, write_json
from benchmarks.peers.environments import MERGEKIT, measured, programs_of
from benchmarks.real.setting import default_cache

TARGET = 0.5  # of mergekit's time, and of its memory
WORST_Z = 4.5  # of some hundreds of tensors, by chance alone once in some hundred runs


@dataclass(frozen=True)
class Moments:
    """What one result changed in one tensor; sums run over its entries, of which ``moved`` differ in tuned."""

    entries: int
    moved: int
    changed: int
    change: float  # sum of out - base
    square: float  # of its square
    along: float  # of its product with delta
    delta: float  # sums of delta, of its square, and of the square where out differs from base
    delta_square: float
    delta_square_kept: float


def commands(pair: tuple[Path, Path], density: float, mergekit: Path, scratch: Path) -> dict[str, list[str]]:
    """The two commands, each with its output folder last but for ours' switches."""
    base, tuned = pair
    config = {
        "merge_method": "dare_linear",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"weight": 1.0, "density": density}}],
        "dtype": "bfloat16",
    }
    file = scratch / "config.yml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    switches = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card", "--random-seed", "0"]
    ours = ["-o", str(scratch / "ours"), "--method", "dare", "--density", str(density), "--overwrite", "--json"]
    return {
        "tailorcli": [sys.executable, "-m", "tailorcli", "patch", str(base), str(tuned), *ours],
        "mergekit": [str(mergekit), str(file), str(scratch / "mergekit"), *switches],
    }


def moments(base: Path, tuned: Path, out: Path) -> dict[str, Moments]:
    """What ``out`` changed in every tensor, in float64."""
    from tailorcli import Checkpoint

    found = {}
    with Checkpoint.open(base) as before, Checkpoint.open(tuned) as after, Checkpoint.open(out) as result:
        for name in before.tensors:
            start = before.read(name).double()
            delta, change = after.read(name).double() - start, result.read(name).double() - start
            kept = change != 0
            found[name] = Moments(
                delta.numel(),
                int(delta.count_nonzero()),
                int(kept.sum()),
                float(change.sum()),
                float(change.square().sum()),
                float((change * delta).sum()),
                float(delta.sum()),
                float(delta.square().sum()),
                float(delta[kept].square().sum()),
            )
    return found


def compared(ours: dict[str, Moments], theirs: dict[str, Moments], density: float) -> dict[str, float]:
    """The largest differences of any tensor, in standard deviations of such a difference."""
    shares, means = [0.0], [0.0]
    for name, a in ours.items():
        b = theirs[name]
        if a.moved * density >= 100:  # fewer are not near the normal distribution
            shares.append(abs(a.changed - b.changed) / math.sqrt(2 * a.moved * density * (1 - density)))
            means.append(abs(a.change - b.change) / math.sqrt(2 * a.delta_square * (1 / density - 1)))
    return {"tensors": len(shares) - 1, "worst_share": max(shares), "worst_mean": max(means)}


def totals(found: dict[str, Moments]) -> dict[str, float]:
    """Over all tensors: the share changed of what tuned changed, the scale of the kept, the mean and the square."""

    def total(key: str) -> float:
        return float(sum(getattr(m, key) for m in found.values()))

    return {
        "share": total("changed") / total("moved"),
        "scale": total("along") / total("delta_square_kept"),
        "mean": total("change") / total("entries"),
        "mean_of_delta": total("delta") / total("entries"),
        "square": total("square") / total("delta_square"),
    }


def render(figures: dict[str, Any]) -> str:
    """The tables."""
    runs, sums, gap = figures["runs"], figures["totals"], figures["compared"]
    rows, ratios = [], {}
    for key in ("seconds", "peak_bytes"):
        ours, theirs = ([run[key] for run in runs[name]] for name in ("tailorcli", "mergekit"))
        ratios[key] = ratio(ours, theirs)
        unit, shown = ("seconds", 1.0) if key == "seconds" else ("peak memory, MB", 1e6)
        met = verdict(ratios[key] <= TARGET)
        values = [f"{median(values) / shown:.{1 if shown == 1.0 else 0}f}" for values in (ours, theirs)]
        rows.append([unit, *values, f"{ratios[key]:.2f}", f"at most {TARGET:g}: {met}"])
    spread = [
        [
            name,
            f"{one['share']:.5f}",
            f"{one['scale']:.3f}",
            f"{one['mean']:.3e}",
            f"{one['mean_of_delta']:.3e}",
            f"{one['square']:.3f}",
        ]
        for name, one in sums.items()
    ]
    worst = f"{gap['worst_share']:.1f} in the share changed, {gap['worst_mean']:.1f} in the mean change"
    same = max(gap["worst_share"], gap["worst_mean"]) <= WORST_Z
    return "\n\n".join(
        [
            markdown(["", "tailorcli", "mergekit", "ratio", "target"], rows, (0, 4)),
            markdown(["", "changed, share", "scale", "mean change", "mean delta", "change² / delta²"], spread),
            f"Density {figures['density']:g}, {figures['bytes'] / 1e6:.0f} MB in bfloat16, {MERGEKIT}, "
            f"{len(runs['mergekit'])} rounds. The largest difference of {gap['tensors']} tensors, in standard "
            f"deviations: {worst}; at most {WORST_Z:g}: {verdict(same)}.",
            describe(figures["environment"]),
        ]
    )


def main() -> None:
    """Measure and print."""
    made = parser("benchmarks.dare", __doc__)
    made.add_argument("--cache", type=Path, default=default_cache(), help="folder with base and tuned (%(default)s)")
    made.add_argument("--density", type=float, default=0.1)
    made.add_argument("--rounds", type=int, default=5)
    args = made.parse_args()
    use_threads(args.threads)
    pair = (args.cache / "base", args.cache / "tuned")
    if not all((folder / "config.json").exists() for folder in pair):
        raise SystemExit(f"{args.cache} holds no pair: make it with python -m benchmarks.real")
    with TemporaryDirectory(prefix="tailorcli-") as name:
        scratch = Path(name)
        both = commands(pair, args.density, programs_of(MERGEKIT, args.cache.parent) / "mergekit-yaml", scratch)
        runs: dict[str, list[dict[str, float]]] = {key: [] for key in both}
        for number in range(args.rounds + 1):
            say(f"round {number} of {args.rounds}")
            for key, command in both.items():
                figures = measured(command, scratch)
                if number:  # the first reads the files into the system's cache
                    runs[key].append(figures)
        found = {key: moments(*pair, scratch / folder) for key, folder in (("tailorcli", "ours"), ("mergekit",) * 2)}
    results = {
        "environment": environment(),
        "density": args.density,
        "bytes": sum(file.stat().st_size for file in pair[0].glob("*.safetensors")),
        "runs": runs,
        "totals": {key: totals(one) for key, one in found.items()},
        "compared": compared(found["tailorcli"], found["mergekit"], args.density),
        "tensors": {key: {n: asdict(m) for n, m in one.items()} for key, one in found.items()},
    }
    write_json(args.json, results)
    print(render(results))


if __name__ == "__main__":
    main()
