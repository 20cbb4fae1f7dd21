"""Lead C: does a variant move the whole frontier at density 0.1, or only along it? Every one with several betas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean

from benchmarks.leads.bench import Bench, Figures
from benchmarks.leads.layers import KINDS, Layer, Variant, read_layers
from benchmarks.leads.render import header_of, spread
from benchmarks.real.render import table
from tailorcli.evaluation.metrics import frontier_area

BETAS = (0.0, 0.03, 0.1, 0.3, 1.0)
MEASURED = "a budget by measured loss"
VARIANTS = (
    Variant("as `patch` does it"),
    Variant("three exchange rounds", exchanges=3),
    Variant("shrinking masks", shrinks=True),
    Variant("weight 0.8", weight=0.8),
    Variant("weight 1.2", weight=1.2),
    Variant(MEASURED),
)
_LEAST = 0.02  # density of a kind of tensor


def frontier_of(bench: Bench, variant: Variant) -> dict[float, Figures]:
    """The figures for every beta."""
    if variant.name == MEASURED:
        variant = replace(variant, densities=measured_densities(bench))
    return {beta: bench.variant(replace(variant, name=f"{variant.name}, beta {beta:g}", beta=beta)) for beta in BETAS}


def measured_densities(bench: Bench) -> tuple[tuple[str, float], ...]:
    """A density for every kind of tensor, by what twice the entries of that kind alone take off the loss.

    The loss is that of held-out new text and of written samples. Were it a_k log(density_k) for every kind of n_k
    entries, the best densities under one budget would be proportional to a_k / n_k.
    """
    plain = Variant("as `patch` does it")
    before = bench.variant(plain)
    gains, sizes = {}, {}
    layers = list(read_layers(bench.pair, bench.folder, plain.beta, plain.damping))
    for kind in KINDS:
        more = replace(plain, name=f"{kind} at density 0.2", densities=((kind, 2 * plain.density),))
        after = bench.variant(more)
        gain = before.held_loss + before.written_loss - after.held_loss - after.written_loss
        gains[kind], sizes[kind] = max(gain, 0.0), entries(layers, kind)
    return tuple(shared_out(gains, sizes, plain.density).items())


def entries(layers: Sequence[Layer], kind: str) -> int:
    """How many entries the tensors of a kind have."""
    return sum(math.prod(layer.shape) for layer in layers if kind in layer.name)


def shared_out(gains: Mapping[str, float], sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """Densities proportional to gain / size, from ``_LEAST`` to 1, that spend the budget of ``density``."""
    budget = density * sum(sizes.values())

    def at(factor: float) -> dict[str, float]:
        return {kind: min(1.0, max(_LEAST, factor * gains[kind] / sizes[kind])) for kind in gains}

    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        spent = sum(sizes[kind] * value for kind, value in at(middle).items())
        low, high = (middle, high) if spent <= budget else (low, middle)
    return {kind: round(value, 4) for kind, value in at(low).items()}


def area(bench: Bench, points: Mapping[float, Figures]) -> float:
    """The area under a frontier between base and tuned."""
    base, tuned = bench.between(0.0), bench.between(1.0)
    every = [base, tuned, *points.values()]
    return frontier_area([p.old for p in every], [p.new for p in every], (base.old, tuned.old), (base.new, tuned.new))


def report(benches: Mapping[str, Sequence[Bench]]) -> str:
    """The table of all variants."""
    return compare(benches, VARIANTS)


def compare(benches: Mapping[str, Sequence[Bench]], variants: Sequence[Variant]) -> str:
    """For every variant and new task: H at each beta, the best of them, and the area."""
    rows = []
    for variant in variants:
        cells = [variant.name]
        for seeds in benches.values():
            found = [frontier_of(bench, variant) for bench in seeds]
            h = {beta: mean(points[beta].h for points in found) for beta in BETAS}
            best = max(h, key=lambda beta: h[beta])
            cells.append(" ".join(f"{value:.1f}" for value in h.values()))
            cells.append(f"{spread([points[best].h for points in found])} ({best:g})")
            areas = [area(bench, points) for bench, points in zip(seeds, found, strict=True)]
            cells.append(spread(areas, 3))
        rows.append(cells)
    return table(header_of("variant", benches, ("H at each beta", "best H (beta)", "area")), rows)
