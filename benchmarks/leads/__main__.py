"""`python -m benchmarks.leads [LEAD]...`: measure what is missing, and write the tables of docs/results/research.md.

On the pairs of the benchmark `quick`; all figures are of validation data: they chose what `patch` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common import cache_root, say
from benchmarks.evidence.pairs import SEEDS, quick
from benchmarks.evidence.run import GRIDS, run_pair
from benchmarks.leads import damping, entries, frontiers, propagation, rule
from benchmarks.leads.bench import Bench
from benchmarks.real.render import between

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "results" / "research.md"
LEADS = {
    "leads": entries.report,
    "rule": rule.report,
    "propagation": propagation.report,
    "frontiers": frontiers.report,
    "damping": damping.report,
}


def main() -> None:
    """Measure the chosen leads on every pair and write their tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leads", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("leads", nargs="*", help=f"which of {', '.join(LEADS)} (all)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="only the first so many (%(default)s)")
    parser.add_argument("--cache", type=Path, default=cache_root(), help="folder for weights and results (%(default)s)")
    options = parser.parse_args()
    if unknown := set(options.leads) - set(LEADS):
        parser.error(f"there is no lead {', '.join(sorted(unknown))}")
    cache = options.cache / "quick"
    benches: dict[str, list[Bench]] = {}
    for pair in quick(cache, SEEDS[: options.seeds]):
        folder = cache / f"{pair.name}-{pair.seed}"
        if not (folder / "stats-written" / "manifest.json").exists():
            run_pair(pair, GRIDS["quick"], folder)
        benches.setdefault(pair.name, []).append(Bench(pair, folder))
    for lead in options.leads or LEADS:
        say(lead)
        with torch.no_grad():
            text = LEADS[lead](benches)
        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(between(document, lead, text), encoding="utf-8")
    say(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
