"""The first leads: which entries, how many in which tensor, and what is left at base, each at one setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.leads.bench import Bench
from benchmarks.leads.layers import Variant
from benchmarks.leads.render import figure_cells, header_of
from benchmarks.real.render import table

VARIANTS = (
    Variant("without a retain term", beta=0.0),
    Variant("with one: beta 0.1, damping 0.01"),
    Variant("beta 0.3", beta=0.3),
    Variant("embeddings left at base", at_base=("embed_tokens",)),
    Variant("norms left at base", at_base=("norm",)),
    Variant("salience alone", score="salience"),
    Variant("sensitivity alone", score="sensitivity"),
    Variant("score d² A_jj", score="magnitude"),
    Variant("score of the first gain, (dA)² / A_jj", score="gain"),
    Variant("three exchange rounds", exchanges=3),
    Variant("one budget for all tensors", budget="global"),
    Variant("one budget, three exchange rounds", exchanges=3, budget="global"),
)


def report(benches: Mapping[str, Sequence[Bench]]) -> str:
    """The table of all variants."""
    rows = []
    for variant in VARIANTS:
        found = {name: [bench.variant(variant) for bench in seeds] for name, seeds in benches.items()}
        rows.append([variant.name, *figure_cells(found)])
    return table(header_of("variant", benches), rows)
