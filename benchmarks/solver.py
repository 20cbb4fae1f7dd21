"""The joint solver against the sequential sweep: the same layer, mask, Hessian and damping.

Three solvers, one after another in each round:
- joint        ``decorate_joint``. Its time is the solve alone: it needs no factor of H.
- sequential   ``decorate_sequential``, ours: the inverse's factor from H by a triangular inverse, then the sweep over
               columns that lie in memory as contiguous rows.
- published    SparseGPT's sweep as it is usually written: Cholesky, ``cholesky_inverse``, Cholesky of the inverse,
               then columns as strided slices of the (O, I) weights. Checked to give our sweep's result to rounding.
The time of a sequential solver is its factor and its sweep. All are float32. H has eigenvalues j^-power in a
random orthogonal basis; delta is normal; the mask takes the highest hybrid scores (omega 0.5). The error is
||(W - W_tuned) X||^2 / ||delta X||^2 = tr(E H E^T) / tr(delta H delta^T).

What arithmetic asks for is counted beside it: joint's multiply-adds are O I^2 (the right side e H) and n^3 / 6 for a
row of n kept entries (its Cholesky), the sweep's O I^2 / 2 and I^3 / 3 (the factor of H^-1, once for all rows).

A second table splits joint: each row by Cholesky of its gathered system ("direct"), or all rows by conjugate
gradients, over densities; where they cross, n^3 = constant I^4 gives the switch that ``core.solvers`` should use.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import (
    describe,
    environment,
    interleaved,
    markdown,
    parser,
    ratio,
    say,
    use_threads,
    verdict,
    write_json,
)
from benchmarks.synthetic import correlated_hessian
from tailorcli.core import (
    Decoration,
    count_kept,
    decorate_joint,
    decorate_sequential,
    inverse_factor,
    select_mask,
    solvers,
)
from tailorcli.core.figures import quadratic_form
from tailorcli.core.hessian import factorise, prepare
from tailorcli.core.tailor import fused_score
from tailorcli.device import exact_float32
from tailorcli.options import PatchOptions

_DEFAULTS = PatchOptions()
DAMPING, OMEGA, BLOCK = _DEFAULTS.effective_damping, _DEFAULTS.omega, _DEFAULTS.block_size
TOLERANCE, MAX_ITERATIONS = _DEFAULTS.tolerance, _DEFAULTS.max_iterations
SPEEDUP_TARGET, ERROR_TARGET = 3.0, 0.75
EVEN_DENSITY, EVEN_ERROR = 0.1, 0.7  # where joint may take as long as the sweep, for so much of its error
CROSSOVER_DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Layer:
    """One linear layer's problem: what to compensate, over which entries, under which Hessian."""

    delta: Tensor  # (O, I)
    mask: Tensor  # (O, I) bool
    hessian: Tensor  # (I, I), undamped
    amount: float  # what damping adds to its diagonal


def make_layer(size: int, density: float, power: float, device: torch.device, rows: int | None = None) -> Layer:
    """A layer with ``rows`` outputs (as many as inputs without it) whose mask keeps ``density`` of its entries."""
    hessian = correlated_hessian(size, power, device=str(device))
    generator = torch.Generator().manual_seed(1)
    delta = 0.002 * torch.randn(rows or size, size, generator=generator).to(device)
    prepared = prepare(hessian, DAMPING, sensitivity=True, sequential=False)
    assert prepared.inverse_diagonal is not None
    score = fused_score(delta, prepared.inverse_diagonal.unsqueeze(0), OMEGA)
    mask = select_mask(score, count_kept(density, delta.numel()))
    return Layer(delta, mask, hessian, prepared.amount)


def decorate(layer: Layer) -> Decoration:
    """``decorate_joint`` with the command's default tolerance and cap."""
    return decorate_joint(
        layer.delta,
        layer.mask,
        layer.hessian,
        layer.amount,
        tolerance=TOLERANCE,
        max_iterations=MAX_ITERATIONS,
    )


def joint(layer: Layer) -> Tensor:
    """The decorator by ``decorate_joint``, from H as it is."""
    return decorate(layer).decorator


def sequential(layer: Layer) -> Tensor:
    """The decorator by our sweep, from H as it is: factor, then sweep."""
    upper = inverse_factor(factorise(layer.hessian, DAMPING))
    return decorate_sequential(layer.delta, layer.mask, upper, BLOCK).decorator


def published(layer: Layer) -> Tensor:
    """The decorator by SparseGPT's sweep in its usual layout, with put-back entries going to base (delta 0)."""
    num_columns = layer.delta.shape[1]
    damped = layer.hessian.clone()
    damped.diagonal().add_(layer.amount)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)  # H^-1 = upper^T upper
    swept = layer.delta.clone()
    for i1 in range(0, num_columns, BLOCK):
        i2 = min(i1 + BLOCK, num_columns)
        block, kept, factor = swept[:, i1:i2].clone(), layer.mask[:, i1:i2], upper[i1:i2, i1:i2]
        final, errors = torch.zeros_like(block), torch.zeros_like(block)
        for i in range(i2 - i1):
            column = block[:, i]
            final[:, i] = torch.where(kept[:, i], column, 0.0)
            error = (column - final[:, i]) / factor[i, i]
            block[:, i:] -= error.unsqueeze(1).matmul(factor[i, i:].unsqueeze(0))
            errors[:, i] = error
        swept[:, i1:i2] = final
        swept[:, i2:] -= errors.matmul(upper[i1:i2, i2:])
    return torch.where(layer.mask, swept - layer.delta, 0.0)


def layer_error(layer: Layer, decorator: Tensor) -> float:
    """||(W - W_tuned) X||^2 / ||delta X||^2 of the weights that a decorator gives."""
    off = torch.where(layer.mask, decorator, -layer.delta)
    return quadratic_form(off, layer.hessian) / quadratic_form(layer.delta, layer.hessian)


SOLVERS: dict[str, Callable[[Layer], Tensor]] = {"joint": joint, "sequential": sequential, "published": published}


def compare(size: int, density: float, power: float, rounds: int, device: torch.device) -> dict[str, Any]:
    """Times and errors of the three solvers on one layer."""
    layer = make_layer(size, density, power, device)
    decorators = {name: solve(layer) for name, solve in SOLVERS.items()}
    ours, theirs = decorators["sequential"], decorators["published"]
    disagreement = float((ours - theirs).norm() / theirs.norm())
    if disagreement > 1e-3:
        raise RuntimeError(f"the two sweeps differ by {disagreement:.1e} at I = {size}, density {density:g}")
    errors = {name: layer_error(layer, decorator) for name, decorator in decorators.items()}
    errors["none"] = layer_error(layer, torch.zeros_like(layer.delta))
    del decorators, ours, theirs
    seconds = interleaved({name: _synced(solve, layer) for name, solve in SOLVERS.items()}, rounds)
    return {
        "size": size,
        "density": density,
        "multiply_adds": multiply_adds(layer),
        "seconds": {name: median(times) for name, times in seconds.items()},
        "speedup_over_sequential": ratio(seconds["sequential"], seconds["joint"]),
        "speedup_over_published": ratio(seconds["published"], seconds["joint"]),
        "errors": errors,
        "error_ratio": errors["joint"] / errors["sequential"],
        "sweeps_differ_by": disagreement,
    }


def multiply_adds(layer: Layer) -> dict[str, float]:
    """What joint by Cholesky and the sweep have to multiply and add on one layer."""
    rows, columns = layer.delta.shape
    kept = layer.mask.sum(1, dtype=torch.float64)
    return {
        "right side": float(rows * columns**2),
        "rows": float((kept**3).sum() / 6),
        "sweep": rows * columns**2 / 2 + columns**3 / 3,
    }


def _synced(solve: Callable[[Layer], Tensor], layer: Layer) -> Callable[[], None]:
    """A call that ends when the device has finished."""

    def call() -> None:
        solve(layer)
        if layer.delta.device.type == "cuda":
            torch.cuda.synchronize()

    return call


def split_joint(size: int, density: float, power: float, rounds: int, rows: int) -> dict[str, Any]:
    """Joint forced either way on the same ``rows`` rows; both times include the right side, one product with H."""
    layer = make_layer(size, density, power, torch.device("cpu"), rows)

    def forced(direct: bool) -> int:
        with patch.object(solvers, "_worth_solving_directly", lambda kept: [direct] * kept.shape[0]):
            return decorate(layer).iterations

    iterations = forced(direct=False)
    seconds = interleaved({"direct": lambda: forced(True), "iterated": lambda: forced(False)}, rounds)
    return {
        "size": size,
        "density": density,
        "kept_a_row": density * size,
        "iterations": iterations,
        "direct_ms_a_row": 1e3 * median(seconds["direct"]) / rows,
        "iterated_ms_a_row": 1e3 * median(seconds["iterated"]) / rows,
        "direct_over_iterated": ratio(seconds["direct"], seconds["iterated"]),
    }


def crossover(splits: list[dict[str, Any]]) -> dict[str, float] | None:
    """Where direct and iterated take equally long: n, and the constant 10^5 n^3 / I^4; None if it was not bracketed."""
    for below, above in pairwise(splits):
        low, high = log(below["direct_over_iterated"]), log(above["direct_over_iterated"])
        if low <= 0 < high:
            share = -low / (high - low)
            n = exp(log(below["kept_a_row"]) * (1 - share) + log(above["kept_a_row"]) * share)
            return {"size": below["size"], "kept_a_row": n, "constant": 1e5 * n**3 / below["size"] ** 4}
    return None


def render(figures: dict[str, Any]) -> str:
    """The tables, and how the targets came out."""
    times = ("I = O, density", "joint", "sequential", "published", "seq./joint", "publ./joint")
    errors = ("error none", "seq.", "joint", "joint/seq.")
    parts = [markdown((*times, *errors), [_comparison_row(found) for found in figures["comparisons"]])]
    if figures["splits"]:
        columns = ("I, density", "n a row", "direct ms a row", "iterated", "iterations", "direct/iterated", "fastest")
        parts.append(markdown(columns, [_split_row(found) for found in figures["splits"]]))
    for found in figures["crossovers"]:
        parts.append(
            f"I = {found['size']}: both take equally long at n = {found['kept_a_row']:.0f}, "
            f"n^3 = {found['constant']:.2f}e-5 I^4"
        )
    parts.append(_targets(figures["comparisons"]))
    parts.append(
        f"power-law spectrum 1/j^{figures['power']:g}, damping {DAMPING}, tolerance {TOLERANCE:g}, "
        f"median of {figures['rounds']} rounds, device {figures['device']}; {describe(figures['environment'])}"
    )
    return "\n\n".join(parts)


def _comparison_row(found: dict[str, Any]) -> list[str]:
    seconds, errors = found["seconds"], found["errors"]
    return [
        f"{found['size']}, {found['density']:g}",
        *(f"{seconds[name]:.2f} s" for name in SOLVERS),
        f"{found['speedup_over_sequential']:.2f}",
        f"{found['speedup_over_published']:.2f}",
        *(f"{errors[name]:.4f}" for name in ("none", "sequential", "joint")),
        f"{found['error_ratio']:.2f}",
    ]


def _split_row(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['size']}, {found['density']:g}",
        f"{found['kept_a_row']:.0f}",
        f"{found['direct_ms_a_row']:.3f}",
        f"{found['iterated_ms_a_row']:.3f}",
        str(found["iterations"]),
        f"{found['direct_over_iterated']:.2f}",
        "direct" if found["direct_over_iterated"] <= 1 else "iterated",
    ]


def _targets(comparisons: list[dict[str, Any]]) -> str:
    """One line a target, by density, over all sizes."""
    lines = []
    for density in dict.fromkeys(found["density"] for found in comparisons):
        at = [found for found in comparisons if found["density"] == density]
        ours = min(found["speedup_over_sequential"] for found in at)
        theirs = min(found["speedup_over_published"] for found in at)
        error = max(found["error_ratio"] for found in at)
        lines.append(
            f"density {density:g}: joint >= {SPEEDUP_TARGET:g}x faster than the published sweep "
            f"{verdict(theirs >= SPEEDUP_TARGET)} ({theirs:.1f}x), than our own {verdict(ours >= SPEEDUP_TARGET)} "
            f"({ours:.1f}x); error <= {ERROR_TARGET:g}x the sequential {verdict(error <= ERROR_TARGET)} ({error:.2f}x)"
        )
    lines += [_count(found) for found in comparisons if found["density"] == EVEN_DENSITY]
    return "\n".join(lines)


def _count(found: dict[str, Any]) -> str:
    """Joint's time and error beside the sweep's, and what either has to work out."""
    count, share = found["multiply_adds"], 1.0 / found["speedup_over_sequential"]
    own = count["right side"] + count["rows"]
    return (
        f"I = O = {found['size']}, density {found['density']:g}: joint in at most the sweep's time "
        f"{verdict(share <= 1.0)} ({share:.2f}x), at most {EVEN_ERROR:g} of its error "
        f"{verdict(found['error_ratio'] <= EVEN_ERROR)} ({found['error_ratio']:.2f}); of {own / 1e9:.2f}e9 "
        f"multiply-adds {count['right side'] / 1e9:.2f}e9 are the right side and {count['rows'] / 1e9:.2f}e9 the rows' "
        f"Cholesky, the sweep has {count['sweep'] / 1e9:.2f}e9: {own / count['sweep']:.2f} times as many"
    )


def parse() -> argparse.Namespace:
    options = parser("benchmarks.solver", __doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048], help="I = O")
    options.add_argument("--densities", type=float, nargs="+", default=[0.01, 0.1, 0.5])
    options.add_argument("--power", type=float, default=1.0, help="eigenvalues of H fall as j^-power")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--split-rows", type=int, default=256, help="rows in the second table; 0 leaves it out")
    options.add_argument("--device", default="cpu", help="cpu or cuda (without the second table)")
    return options.parse_args()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything for all sizes and densities."""
    device = torch.device(args.device)
    comparisons, splits, crossovers = [], [], []
    with exact_float32():
        for size in args.sizes:
            for density in args.densities:
                say(f"I = O = {size}, density {density:g}")
                comparisons.append(compare(size, density, args.power, args.rounds, device))
            if args.split_rows and device.type == "cpu":
                say(f"I = {size}: direct and iterated")
                found = [
                    split_joint(size, density, args.power, args.rounds, args.split_rows)
                    for density in sorted({*CROSSOVER_DENSITIES, *args.densities})
                ]
                splits += found
                crossovers += [point] if (point := crossover(found)) else []
    return {
        "power": args.power,
        "rounds": args.rounds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "environment": environment(),
        "comparisons": comparisons,
        "splits": splits,
        "crossovers": crossovers,
    }


def main() -> None:
    """Measure, print the tables, write the JSON."""
    args = parse()
    use_threads(args.threads)
    figures = measure(args)
    write_json(args.json, figures)
    print(render(figures))


if __name__ == "__main__":
    main()
