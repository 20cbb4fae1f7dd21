"""`python -m benchmarks.leads.short PAIR...`: short runs of distillation, one thing changed in each.

PAIR is TASK-SEED of the benchmark `quick`. A run starts from the plain closed form, on statistics that
`python -m benchmarks.evidence quick` made; it ends with its last state, without a choice of the best. Divergences are
of samples that no run is trained on, accuracies of validation data. Writes tables of docs/results/research.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.common import cache_root, say
from benchmarks.leads.__main__ import DOCUMENT
from benchmarks.leads.forms import measured
from benchmarks.leads.runs import Ground, Run
from benchmarks.real.render import between, table
from tailorcli import h_score

FIRST = Run()
MASKS = ("the paper's score", "|delta|", "random", "both", "|goal|", "the paper's score of delta")
LEADS: dict[str, dict[str, Run]] = {
    "start": {
        f"density {density:g}: {mask}": Run(density=density, mask=mask)
        for density, masks in {0.02: MASKS, 0.05: MASKS[:3], 0.1: (*MASKS[:2], "both")}.items()
        for mask in masks
    },
    "seeds": {
        f"density {density:g}: {mask}": Run(density=density, mask=mask)
        for density in (0.02, 0.1)
        for mask in ("the paper's score", "both")
    },
    "losses": {
        "KL(teacher ‖ patched), B 2": FIRST,
        "KL(patched ‖ teacher), B 2": Run(loss="reverse"),
        "both by halves, B 2": Run(loss="both"),
        "tokens weighed by the teacher's confidence, B 2": Run(loss="confident"),
        "B by both divergences at the start": Run(weight="start"),
        "B by both divergences of the last steps": Run(weight="running"),
    },
    "temperature": {
        "temperature 1": FIRST,
        **{f"temperature {heat:g}": Run(retained=f"written at {heat:g}") for heat in (0.5, 0.7, 1.3)},
        "samples of the old tasks": Run(retained="own"),
    },
    "forms": {
        "whole": FIRST,
        "block by block": Run(form="blocks"),
        "low rank at equal bytes": Run(form="low rank"),
    },
    "frontier": {
        "B 2": FIRST,
        **{f"B {weight:g}": Run(weight=weight) for weight in (0.5, 1.0, 4.0)},
        "density 0.2": Run(density=0.2),
        "density 1": Run(density=1.0),
        "densities by what training wants": Run(budget="wanted"),
        "rate 0.2": Run(rate=0.2),
        "three times the steps": Run(steps=180),
        "three times the samples": Run(count=144),
        "three times both": Run(steps=180, count=144),
        "retained: samples of the old tasks": Run(retained="own"),
    },
}
COLUMNS = ("mean H", "old kept, %", "new kept, %", "KL new", "KL retained")


def rows_of(lead: str, found: dict[str, dict[str, dict[str, float]]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: H on each pair, then means over the pairs; ``found`` holds figures by pair and run."""
    runs = LEADS[lead]
    pairs = [pair for pair, of in found.items() if any(str(run) in of for run in runs.values())]
    rows = []
    for name, run in runs.items():
        every = [found[pair].get(str(run)) for pair in pairs]
        cells = [f"{h_of(one):.1f}" if one else "–" for one in every]
        known = [one for one in every if one]
        if len(known) == len(every):
            cells.append(f"{mean(h_of(one) for one in known):.2f}")
            for part, end in (("old", "base"), ("new", "tuned")):
                shares = [100 * one[part] / found[pair][end][part] for pair, one in zip(pairs, known, strict=True)]
                cells.append(f"{mean(shares):.1f}")
            cells += [f"{mean(one[kind] for one in known):.3f}" for kind in ("kl_new", "kl_retained")]
        else:
            cells += ["–"] * len(COLUMNS)
        if known:
            rows.append([name.replace("|", r"\|"), *cells])
    return ["run", *(f"{pair}: H" for pair in pairs), *COLUMNS], rows


def h_of(figures: dict[str, float]) -> float:
    """The H-score of old and new."""
    return h_score(figures["old"], figures["new"])


def write(found: dict[str, dict[str, dict[str, float]]], leads: Sequence[str]) -> None:
    """Write the tables of some leads."""
    document = DOCUMENT.read_text(encoding="utf-8")
    for lead in leads:
        header, rows = rows_of(lead, found)
        if len(rows) > 1:  # one alone compares nothing
            text = table(header, rows)
            print(lead, text, sep="\n")
            document = between(document, f"short-{lead}", text)
    DOCUMENT.write_text(document, encoding="utf-8")


def measure(pairs: Sequence[str], leads: Sequence[str], cache: Path, file: Path) -> dict[str, Any]:
    """Every run of the leads on every pair that ``file`` has not yet; it takes each figure as it comes."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
    for pair in pairs:
        of_pair = found.setdefault(pair, {})
        wanted = {str(run): run for lead in leads for run in LEADS[lead].values() if str(run) not in of_pair}
        if not wanted:
            continue
        ground = Ground.of(pair, cache)
        for end in ("base", "tuned"):
            of_pair[end] = ground.accuracies(ground.network(end))
        for key, run in wanted.items():
            of_pair[key] = measured(ground, run)
            say(f"{pair}: {key}: H {h_of(of_pair[key]):.2f} {of_pair[key]}")
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def main() -> None:
    """Measure the leads on the pairs and write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leads.short", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("pairs", nargs="*", help="TASK-SEED of the benchmark quick")
    parser.add_argument("--leads", nargs="*", default=list(LEADS), choices=LEADS)
    parser.add_argument("--cache", type=Path, default=cache_root() / "quick", help="of the evidence (%(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="takes every figure, and has those of earlier runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write(measure(options.pairs, options.leads, options.cache, options.json), options.leads)


if __name__ == "__main__":
    main()
