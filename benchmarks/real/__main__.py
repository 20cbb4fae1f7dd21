"""Run Model Tailor on a real language model, start to end: `python -m benchmarks.real`.

Fetches SmolLM2-135M-Instruct, fine-tunes it on a new task, runs the installed command line on the
pair and measures what each result knows. Everything lies in a cache; a rerun reuses what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.real import chain, data, measure, model, render
from tailorcli import __version__

SEED = 0
VALIDATION_WINDOWS = 16
TEST_WINDOWS = 64
TRAIN_RECORDS = 10_000  # all of them
INTERPOLATION_WEIGHTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # from base to tuned
SCALES = (0.5, 0.6, 0.7, 0.8)  # from base to the model patched with the default options
LINES = ("interpolation", "scaled")
DOCUMENT = Path(__file__).parents[2] / "docs" / "real-model.md"
README = Path(__file__).resolve().parents[2] / "README.md"

Texts = dict[str, dict[str, list[str]]]


def main() -> None:
    """Run everything that has not run yet and write results.json and the document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=(__doc__ or "").split("\n")[0])
    default = os.environ.get("TAILORCLI_CACHE") or Path.home() / ".cache" / "tailorcli" / "real"
    parser.add_argument("--cache", type=Path, default=Path(default), help="folder for weights and results")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="Markdown file to write")
    parser.add_argument("--fresh", action="store_true", help="run the commands and evaluations again")
    parser.add_argument("--pair-only", action="store_true", help="stop when base and tuned are made")
    options = parser.parse_args()
    cache = options.cache.expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()

    texts = data.load_texts(SEED)
    pair_key = make_pair(cache, texts)
    if options.pair_only:
        return
    say("running the command line")
    steps = chain.run_chain(cache, pair_key, options.fresh)
    say("evaluating")
    models = evaluate_all(cache, texts, pair_key, options.fresh)
    results = collect_results(cache, steps, models)
    (cache / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.document.parent.mkdir(exist_ok=True)
    options.document.write_text(render.render(results), encoding="utf-8")
    README.write_text(render.update_readme(README.read_text(encoding="utf-8"), results), encoding="utf-8")
    say(f"wrote {cache / 'results.json'}, {options.document} and the table in {README.name}")


def say(message: str) -> None:
    """Report progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def make_pair(cache: Path, texts: Texts) -> str:
    """Make `base` and `tuned` unless they are there; return what identifies the pair."""
    say("making base")
    base = model.make_base(cache)
    recipe = model.Recipe(seed=SEED)
    # The texts come with Python, so another Python trains another model.
    pair_key = json.dumps({**asdict(recipe), "weights": model.VERSION, "python": platform.python_version()})
    marker = cache / "pair.json"
    if not marker.exists() or marker.read_text(encoding="utf-8") != pair_key:
        shutil.rmtree(cache / "tuned", ignore_errors=True)
        marker.write_text(pair_key, encoding="utf-8")
    data.write_jsonl(texts[data.NEW_TASK]["train"], cache / "train.jsonl")
    say("making tuned")
    records = texts[data.NEW_TASK]["train"]
    model.make_tuned(base, data.windows(records, tokenizer_of(base), TRAIN_RECORDS), recipe, cache / "tuned")
    return pair_key


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a checkpoint folder."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def evaluate_all(cache: Path, texts: Texts, pair_key: str, fresh: bool) -> dict[str, dict[str, measure.TaskScores]]:
    """Score every model on validation text, and on test text all but the points of LINES that lost there."""
    base, tuned = cache / "base", cache / "tuned"
    tokenizer = tokenizer_of(base)
    makers = {"base": partial(measure.load_model, base), "tuned": partial(measure.load_model, tuned)}
    for weight in INTERPOLATION_WEIGHTS:
        makers[f"interpolation-{weight}"] = partial(measure.interpolate, base, tuned, weight)
    for patch in chain.patches():
        folder = cache / chain.patch_folder(*patch)
        makers[folder.name] = partial(measure.load_model, folder)
    for weight in SCALES:
        default = cache / chain.patch_folder(*chain.DEFAULT_PATCH)
        makers[f"scaled-{weight}"] = partial(measure.interpolate, base, default, weight)
    (cache / "scores").mkdir(exist_ok=True)
    scores: dict[str, dict[str, measure.TaskScores]] = {label: {} for label in makers}
    for part, count in (("validation", VALIDATION_WINDOWS), ("test", TEST_WINDOWS)):
        tasks = {task: data.windows(texts[task][part], tokenizer, count) for task in texts}
        for label in makers if part == "validation" else contenders(scores):
            say(f"  {label}, {part}")
            file = cache / "scores" / f"{label}-{part}.json"
            key = [pair_key, str(count)]
            if label.startswith(("patched", "scaled")):
                made = label if label.startswith("patched") else chain.patch_folder(*chain.DEFAULT_PATCH)
                key.append((cache / made / "tailor_run.json").read_text(encoding="utf-8"))
            if fresh:
                file.unlink(missing_ok=True)
            scores[label][part] = measure.evaluate(makers[label], tasks, file, key)
    return scores


def contenders(scores: dict[str, dict[str, measure.TaskScores]]) -> list[str]:
    """Return the models to test: of each of LINES only the point with the best H on validation text."""
    points = {line: [label for label in scores if label.startswith(line)] for line in LINES}
    lost: set[str] = set()
    for labels in points.values():
        best = max(labels, key=lambda label: measure.summarise(scores[label]["validation"])["h"])
        lost |= set(labels) - {best}
    return [label for label in scores if label not in lost]


def collect_results(
    cache: Path, steps: list[dict[str, Any]], models: dict[str, dict[str, measure.TaskScores]]
) -> dict[str, Any]:
    """Put everything that the document says into one JSON object."""
    totals = {
        folder: json.loads((cache / folder / "tailor_report.json").read_text(encoding="utf-8"))["totals"]
        for folder in (chain.patch_folder(*patch) for patch in chain.patches())
    }
    return {
        "environment": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tailorcli": __version__,
        },
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


def processor() -> str:
    """Return the processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
