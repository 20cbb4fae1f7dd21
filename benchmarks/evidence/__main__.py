"""Measure what each method gives back: `python -m benchmarks.evidence [quick] [text] [multimodal]`.

Trains or fetches the models of several seeds, calibrates, sweeps over the settings of every method and writes
docs/results/evidence-PART.md with its pictures, the tables of what-to-expect.md and README's. Everything lies in a
cache; a rerun goes on from there. Scores of text and text-small are kept item by item in docs/results/data, to which
later runs add theirs: their pages are made again without any model by `--page-only`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import cache_root, say
from benchmarks.evidence import pairs, pictures, readme, render, summary
from benchmarks.evidence.run import GRIDS, SMALL, Outcome, first_of, run_all, samples_of
from benchmarks.evidence.stored import (
    Result,
    joined,
    machine_of,
    names_missing,
    outcomes_of,
    read_kept,
    read_results,
    write_kept,
)
from benchmarks.multimodal.data import COUNTS
from benchmarks.multimodal.model import BASE_RECIPE, PATCH, PIXELS, TUNED_RECIPE
from benchmarks.pages import reflow
from benchmarks.real.model import Recipe
from benchmarks.real.render import between
from benchmarks.real.setting import environment
from tailorcli.display.plots import plot_frontiers
from tailorcli.files import write_text_atomically
from tailorcli.options import DISTILL_STEPS, DistillOptions


def recipe_of(recipe: Recipe) -> str:
    """How long and how fast a model was trained, in words."""
    return f"{recipe.steps} steps of {recipe.batch}, learning rate {recipe.learning_rate:g}"


DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
SUMMARY = DOCS / "what-to-expect.md"
PARTS = {"quick": pairs.quick, "text": pairs.text, SMALL: pairs.text, "multimodal": pairs.multimodal}
LATEST = {"lines", "dg-hard", "fapm"}
KEPT = ("text", SMALL)  # whose pairs are run a few at a time; of the others it would be megabytes
SETTINGS = {
    "quick": """Byte-level Llamas of 3 million parameters, trained 700 steps on Python source and English prose, then
200 steps on the new task; accuracy is the share of next bytes guessed right.""",
    "text": """SmolLM2-135M-Instruct in bfloat16, fine-tuned for 60 steps on records of Unicode characters, or on
licences (*licences-overtrained* for 80 steps at a higher rate on a few of them, which is too long).

Accuracy is the share of next tokens guessed right (texts of 32 tokens, 300 a task), and of 300 cities put on the right
one of four continents.""",
    SMALL: """The models and tasks of *text*, with samples, lengths and steps that two cores can bear.""",
    "multimodal": f"""A LLaVA in bfloat16 of SmolLM2-135M-Instruct, a vision tower of the shape of DINOv2-small and a
new projector, on pictures of {PIXELS} by {PIXELS} pixels ({(PIXELS // PATCH) ** 2} tokens).

- **Base**: first the projector alone on captions, then projector and language model ({recipe_of(BASE_RECIPE)}; half of
  them questions on coloured shapes (easy-VQA, its three kinds in equal numbers), half what a photo shows (CIFAR-10)).
- **Tuned**: {recipe_of(TUNED_RECIPE)} on "What is this?" of Fashion-MNIST.
- **Accuracy**: the share of {COUNTS["test"]} questions a task that are answered exactly, greedily from the whole
  vocabulary.
- **Samples of the base**: written behind questions of the old tasks' kind on pictures of something else (emoji):
  neither the right answers nor the old tasks' pictures were used.""",
}


def main() -> None:
    """Run the benchmarks that are asked for, and write the document from all that the cache holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help=f"{', '.join(PARTS)}; all but {SMALL} without")
    parser.add_argument("--jobs", type=int, default=1, help="pairs at a time, each in a process of its own")
    parser.add_argument("--cache", type=Path, default=cache_root(), help="folder for weights and results (%(default)s)")
    parser.add_argument("--stored", type=Path, help="measure nothing: pages from FOLDER/PART/TASK-SEED/sweep")
    parser.add_argument("--page-only", action="store_true", help="measure nothing: the pages of docs/results/data")
    options = parser.parse_args()
    parts = options.parts or [part for part in PARTS if (_file(part).exists() if options.page_only else part != SMALL)]
    sections = []
    for part in PARTS:
        if part not in parts:
            continue
        cache = options.cache.expanduser().resolve() / part
        cache.mkdir(parents=True, exist_ok=True)
        make = partial(pairs.quick, jobs=options.jobs) if part == "quick" else PARTS[part]
        if options.stored is not None or options.page_only:
            name = part if part == SMALL else f"{part}-rivals"
            results, machine = _kept(part, None if options.stored is None else options.stored / part)
            _write(part, name, outcomes_of(results, GRIDS[part]), None, machine)
            sections.append(f"evidence-{name}.md")
            continue
        made = make(cache)
        machine = environment()
        write_text_atomically(cache / "machine.json", json.dumps(machine, indent=1) + "\n")
        # The first grid is what a run that is cut short has a page of.
        for grid in dict.fromkeys((first_of(GRIDS[part]), GRIDS[part])):
            _write(part, part, run_all(part, made, cache, grid, options.jobs), cache, machine)
            _kept(part, cache)
        sections.append(f"evidence-{part}.md")
    readme.main()
    say(f"wrote {', '.join(sections)}, the pictures, the tables in {SUMMARY.name} and README's")


def _file(part: str) -> Path:
    """Where a benchmark's results are kept beside the pages."""
    return DOCS / "data" / f"evidence-{part}.jsonl"


def _kept(part: str, folder: Path | None) -> tuple[list[Result], dict[str, Any]]:
    """All results of a benchmark that were ever kept, with those of ``folder``; and the machine."""
    file = _file(part)
    earlier, machine = read_kept(file)
    if folder is None:
        if not earlier:
            raise SystemExit(f"{file} is not there: --page-only makes pages of {' and '.join(KEPT)} alone, once run")
        return earlier, machine
    results, machine = joined(earlier, read_results(folder)), machine_of(folder) or machine
    if part in KEPT:
        write_kept(results, machine, file)
    return results, machine


def _write(part: str, name: str, outcomes: list[Outcome], cache: Path | None, machine: dict[str, Any]) -> None:
    """The page of a benchmark, its pictures, and its short tables where the summary has room for them.

    Stored results have a ``name`` of their own. Without a ``cache``, in which the models lie, there is no picture of
    what compensation moves.
    """
    missing = names_missing(outcomes, GRIDS[part])
    families = {point.family for outcome in outcomes for point in outcome.report.points}
    others = "the methods of 2025 and 2026" if families & LATEST else "distilled patches"
    texts, short = [_head(part, name, machine, missing, others)], []
    for group in summary.groups_of(outcomes):
        picture = f"frontier-{name}-{group.name}.png"
        plot_frontiers(summary.averaged(group), DOCS / picture)
        first = group.outcomes[0].pair
        drawn = [pictures.curves_part(part, group, DOCS)]
        if cache is not None:
            drawn.append(pictures.decorations_part(part, group, cache / f"{first.name}-{first.seed}", DOCS))
        texts.append(render.section(part, group, SETTINGS[part], picture, *drawn))
        short.append(f"**{part}, {group.name}**\n\n{render.short_table(group)}")
    file = DOCS / f"evidence-{name}.md"
    file.write_text(reflow("\n\n".join(texts)), encoding="utf-8")
    text = SUMMARY.read_text(encoding="utf-8")
    if f"evidence-{name}:begin" in text:
        SUMMARY.write_text(between(text, f"evidence-{name}", "\n\n".join(short)), encoding="utf-8")


def _head(part: str, name: str, machine: dict[str, Any], missing: list[str], others: str) -> str:
    ran_on = ", ".join(filter(None, (machine["gpu"], machine["processor"])))
    grid, steps = GRIDS[part], DistillOptions().for_samples(GRIDS[part].many_samples).steps
    title, how = f"The evidence: {part}", f"`make evidence` (`python -m benchmarks.evidence {part}`)"
    if part == SMALL:
        title, how = "The evidence: text, on two cores", f"`python -m benchmarks.evidence {part}`"
    if name != part:
        title = f"{title}, with {others}"
        source = "--stored FOLDER` from results that were stored before"
        if part in KEPT:
            source = "--page-only` from the results in `data/`"
        how = f"`python -m benchmarks.evidence {part} {source}"
    many = f"- **{samples_of(grid.many_samples)}** is the same on so many of each kind, for the {steps} steps "
    many += "that they get.\n"
    lacking = ""
    if missing:
        distilled = [f"*{label}*" for label in missing if summary.DISTILLED in label]
        among = f", {', '.join(distilled)} among them" if distilled else ""
        count = f"{len(missing)} settings of the grid{among}"
        lacking = f"- **Not measured** on every task in this run, which was cut short: {count}."
    return f"""# {title}

Written by {how}; every figure is from its last run.

- **Ran on**: {ran_on}, {machine["cores"]} cores, torch {machine["torch"]},
  transformers {machine["transformers"]}, tailorcli {machine["tailorcli"]}.
- **Figures**: settings are picked on validation data, figures are of test data. Old and new are averages in percent,
  H is their harmonic mean (Eq. 32), intervals are a bootstrap over the test items.
- **old kept** and **new kept** are the shares of the base's old and of the tuned model's new performance, the paper's
  measure; **gain kept** is that of what fine-tuning gained on the new task.
- **distilled** is the default with its kept entries trained (`--distill`), at one default for all
  ({grid.distill_steps or DISTILL_STEPS} steps, rate {DistillOptions().rate:g}, B {DistillOptions().weight:g}).
{many if grid.many else ""}- **retained** is the retain term on samples that the base wrote itself
  ({grid.samples} of them), **retained on old samples** on some of the old tasks' own training data; its weight is
  `--retain-weight`.
- **patch, s** was taken on a busy machine: compare it within a table only. **patch, MB** is the patch file's size.
{lacking}

What the words mean: [glossary](../concepts/glossary.md)."""


if __name__ == "__main__":
    main()
