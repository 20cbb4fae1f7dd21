"""Run Model Tailor on a real multimodal model, start to end: `python -m benchmarks.multimodal`.

Assembles a LLaVA from published weights, teaches it to answer questions on pictures, fine-tunes it on a second task,
runs the installed command line on the pair and measures what each result still answers. Everything lies in a cache; a
rerun reuses what is there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from benchmarks.multimodal import data, measure, model, render, steps
from benchmarks.multimodal.data import COUNTS, NEW_TASK, OLD_TASK
from benchmarks.real.chain import report_totals, run_chain
from benchmarks.real.measure import TaskScores, evaluate_all
from benchmarks.real.model import PACKAGE, VERSION, discard_other, make_base
from benchmarks.real.setting import default_cache, environment, parse, say

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "multimodal.md"
README = Path(__file__).resolve().parents[2] / "README.md"

Items = dict[str, dict[str, list[data.Item]]]


def main() -> None:
    """Run everything that has not run yet and write multimodal.json, the document and the README's table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multimodal", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pair-only", action="store_true", help="stop when base and tuned are made")
    options = parse(parser, DOCUMENT, default_cache().with_name("multimodal"))
    cache = options.cache

    say("fetching the pictures")
    items = data.load(cache)
    pair_key = make_pair(cache, items)
    if options.pair_only:
        return
    say("running the command line")
    figures = run_chain(cache, steps.steps(pair_key), options.fresh)
    say("evaluating")
    candidates = steps.unpatched(cache, pair_key) | steps.patched(cache, pair_key)
    questions = measure.held_out(items, AutoProcessor.from_pretrained(cache / "base"), COUNTS)
    scores = evaluate_all(
        candidates,
        questions,
        COUNTS,
        cache / "scores",
        (NEW_TASK,),
        options.fresh,
        old_tasks=(OLD_TASK,),
        score=measure.score_answers,
    )
    results = collect_results(cache, figures, scores)
    (cache / "multimodal.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.document.parent.mkdir(exist_ok=True)
    options.document.write_text(render.render(results), encoding="utf-8")
    README.write_text(render.update_readme(README.read_text(encoding="utf-8"), results), encoding="utf-8")
    say(f"wrote {cache / 'multimodal.json'}, {options.document} and the table in {README.name}")


def make_pair(cache: Path, items: Items) -> str:
    """Make `base` and `tuned` unless they are there; return what identifies the pair."""
    keys = identities()
    for name, key in keys.items():
        discard_other(cache / name, cache / f"{name}.json", key)
    # As the pair takes long, what it starts from is only made where it is still to be trained.
    if not (cache / "base").exists():
        say("assembling the model")
        start = model.assemble(make_base(default_cache()), model.make_tower(cache), cache / "assembled")
        say(f"making base: {OLD_TASK}")
        old = items[OLD_TASK]
        model.train(start, old["train"], model.BASE_RECIPE, cache / "base", old[data.CAPTIONS])
    say(f"making tuned: {NEW_TASK}")
    model.train(cache / "base", items[NEW_TASK]["train"], model.TUNED_RECIPE, cache / "tuned")
    return keys["tuned"]


def identities() -> dict[str, str]:
    """Return what each trained model depends on: weights, data, sizes and recipes."""
    facts = {
        "weights": [PACKAGE, VERSION, *model.TOWER],
        "data": data.identity(),
        "pixels": model.PIXELS,
        "captions": asdict(model.ALIGN_RECIPE),
        "base": asdict(model.BASE_RECIPE),
    }
    return {"base": json.dumps(facts), "tuned": json.dumps({**facts, "tuned": asdict(model.TUNED_RECIPE)})}


def collect_results(
    cache: Path, figures: list[dict[str, Any]], scores: dict[str, dict[str, TaskScores]]
) -> dict[str, Any]:
    """Put everything that the document says into one JSON object."""
    totals = report_totals(cache, steps.patched_folders())
    return {
        "environment": environment(),
        "recipes": {
            "captions": asdict(model.ALIGN_RECIPE),
            "base": asdict(model.BASE_RECIPE),
            "tuned": asdict(model.TUNED_RECIPE),
        },
        "steps": figures,
        "totals": totals,
        "scores": scores,
        "figures": {
            label: {part: measure.figures(of_part) for part, of_part in parts.items()}
            for label, parts in scores.items()
        },
    }


if __name__ == "__main__":
    main()
