"""Run Model Tailor on a real language model, start to end: `python -m benchmarks.real`.

Fetches SmolLM2-135M-Instruct, fine-tunes it on a new task, runs the installed command line on the
pair and measures what each result knows. Everything lies in a cache; a rerun reuses what is there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import say
from benchmarks.real import chain, data, measure, model, render
from benchmarks.real.setting import COUNTS, SEED, environment, make_pair, parse, tokenizer_of

INTERPOLATION_WEIGHTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # from base to tuned
SCALES = (0.5, 0.6, 0.7, 0.8)  # from base to the model patched with the default options
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "results" / "real-model.md"


def main() -> None:
    """Run everything that has not run yet and write results.json and the document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pair-only", action="store_true", help="stop when base and tuned are made")
    options = parse(parser, DOCUMENT)
    cache = options.cache

    texts = data.load_texts(SEED)
    pair_key = make_pair(cache, texts)
    if options.pair_only:
        return
    say("running the command line")
    steps = chain.run_chain(cache, chain.steps(pair_key), options.fresh)
    say("evaluating")
    windows = data.held_out(texts, tokenizer_of(cache / "base"), COUNTS)
    models = measure.evaluate_all(
        all_candidates(cache, pair_key), windows, COUNTS, cache / "scores", fresh=options.fresh
    )
    results = collect_results(cache, steps, models)
    (cache / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.document.parent.mkdir(exist_ok=True)
    options.document.write_text(render.render(results), encoding="utf-8")
    say(f"wrote {cache / 'results.json'} and {options.document}")


def all_candidates(cache: Path, pair_key: str) -> dict[str, measure.Candidate]:
    """Return every model to score: the pair, the points between them, the patched models and the scaled default."""
    base, tuned = cache / "base", cache / "tuned"
    candidates = {path.name: measure.Candidate(partial(measure.load_model, path), pair_key) for path in (base, tuned)}
    for weight in INTERPOLATION_WEIGHTS:
        make = partial(measure.interpolate, base, tuned, weight)
        candidates[f"interpolation-{weight}"] = measure.Candidate(make, pair_key, line="interpolation")
    for patch in chain.patches():
        folder = cache / chain.patch_folder(*patch)
        candidates[folder.name] = measure.Candidate(partial(measure.load_model, folder), pair_key, run_record(folder))
    default = cache / chain.patch_folder(*chain.DEFAULT_PATCH)
    for weight in SCALES:
        make = partial(measure.interpolate, base, default, weight)
        candidates[f"scaled-{weight}"] = measure.Candidate(make, pair_key, run_record(default), line="scaled")
    return candidates


def run_record(folder: Path) -> str:
    """Return the record that `patch` left in a folder."""
    return (folder / "tailor_run.json").read_text(encoding="utf-8")


def collect_results(
    cache: Path, steps: list[dict[str, Any]], models: dict[str, dict[str, measure.TaskScores]]
) -> dict[str, Any]:
    """Put everything that the document says into one JSON object."""
    totals = chain.report_totals(cache, (chain.patch_folder(*patch) for patch in chain.patches()))
    return {
        "environment": environment(),
        "weights": f"{model.PACKAGE} {model.VERSION}",
        "recipe": asdict(model.Recipe(seed=SEED)),
        "steps": steps,
        "totals": totals,
        "scores": models,
        "summary": {
            label: {part: measure.summarise(scores) for part, scores in parts.items()}
            for label, parts in models.items()
        },
    }


if __name__ == "__main__":
    main()
