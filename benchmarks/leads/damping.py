"""Lead D: how much damping, for every beta. It pulls the fit of the new task to delta, the retained part to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.leads.bench import Bench
from benchmarks.leads.frontiers import compare
from benchmarks.leads.layers import Variant

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)


def report(benches: Mapping[str, Sequence[Bench]]) -> str:
    """H along beta for every damping."""
    return compare(benches, [Variant(f"damping {damping:g}", damping=damping) for damping in DAMPINGS])
