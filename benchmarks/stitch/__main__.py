"""Stitch two fine-tunes of one real model, and tailor a LoRA adapter: `python -m benchmarks.stitch`.

Takes the base and the first fine-tune of benchmarks.real, fine-tunes the base on a second task and with LoRA, runs
the installed command line and measures what each result knows of the old and of both new tasks. Everything lies in
the same cache; a rerun reuses what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import say
from benchmarks.real import data, model
from benchmarks.real.chain import run_chain
from benchmarks.real.data import NEW_TASK, OLD_TASKS
from benchmarks.real.measure import TaskScores, evaluate_all, summarise
from benchmarks.real.setting import COUNTS, SEED, TRAIN_RECORDS, Texts, environment, make_pair, parse, tokenizer_of
from benchmarks.stitch import bytecode, lora, render
from benchmarks.stitch.candidates import adapted, stitched
from benchmarks.stitch.steps import ADAPTER, ADAPTER_PATCH, BYTECODE, NEW_TASKS, TASKS, UNICODE, steps

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "results" / "stitching.md"
SUMMARY = DOCUMENT.parent / "what-to-expect.md"
TUNED_RECIPE = model.Recipe(seed=SEED)
LORA_RECIPE = model.Recipe(seed=SEED, learning_rate=lora.LEARNING_RATE)


def main() -> None:
    """Run everything that has not run yet and write stitch.json, the document and its short table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stitch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models-only", action="store_true", help="stop when the fine-tuned models are made")
    options = parse(parser, DOCUMENT)
    cache = options.cache

    texts = {**data.load_texts(SEED), bytecode.TASK: bytecode.load_listings(SEED)}
    keys = make_models(cache, texts)
    if options.models_only:
        return
    say("running the command line")
    chain = steps(keys)
    figures = run_chain(cache, chain, options.fresh)
    say("evaluating")
    windows = data.held_out(texts, tokenizer_of(cache / "base"), COUNTS)
    folder, source = cache / "scores-stitch", "".join(keys[task.tuned] for task in TASKS)
    both = evaluate_all(stitched(cache, chain, source), windows, COUNTS, folder, NEW_TASKS, options.fresh)
    one_task = {part: {task: tasks[task] for task in (*OLD_TASKS, NEW_TASK)} for part, tasks in windows.items()}
    models = adapted(cache, chain, keys[ADAPTER])
    single = evaluate_all(models, one_task, COUNTS, folder, fresh=options.fresh)
    # Two of them on every task, for the table of both tasks.
    everywhere = {label: models[label] for label in (ADAPTER, ADAPTER_PATCH)}
    both |= evaluate_all(everywhere, windows, COUNTS, folder / "all", NEW_TASKS, options.fresh)
    results = {
        "environment": environment(),
        "weights": f"{model.PACKAGE} {model.VERSION}",
        "recipe": asdict(TUNED_RECIPE),
        "lora": {**asdict(LORA_RECIPE), "rank": lora.RANK, "alpha": lora.ALPHA},
        "steps": figures,
        "bytes": sizes(cache),
        "stitched": with_summaries(both, NEW_TASKS),
        # The full fine-tune stands beside its LoRA counterpart, on the tasks that both have.
        "adapted": with_summaries(
            {**{label: both[label] for label in ("base", UNICODE.tuned)}, **single}, (UNICODE.name,)
        ),
    }
    (cache / "stitch.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.document.parent.mkdir(exist_ok=True)
    options.document.write_text(render.render(results), encoding="utf-8")
    SUMMARY.write_text(render.update_summary(SUMMARY.read_text(encoding="utf-8"), results), encoding="utf-8")
    say(f"wrote {cache / 'stitch.json'}, {options.document} and the table in {SUMMARY.name}")


def make_models(cache: Path, texts: Texts) -> dict[str, str]:
    """Make the base and the three fine-tunes unless they are there; return what identifies each fine-tune."""
    keys = {UNICODE.tuned: make_pair(cache, texts)}
    base = cache / "base"
    tokenizer = tokenizer_of(base)
    digest = hashlib.sha256(json.dumps(texts[bytecode.TASK]).encode()).hexdigest()
    keys[BYTECODE.tuned] = model.identity(TUNED_RECIPE, text=digest)
    keys[ADAPTER] = model.identity(LORA_RECIPE, rank=str(lora.RANK), alpha=str(lora.ALPHA))
    for name in (BYTECODE.tuned, ADAPTER):
        model.discard_other(cache / name, cache / f"{name}.json", keys[name])
    data.write_jsonl(texts[bytecode.TASK]["train"], cache / BYTECODE.data)
    say(f"making {BYTECODE.tuned}")
    windows = data.windows(texts[bytecode.TASK]["train"], tokenizer, TRAIN_RECORDS)
    model.make_tuned(base, windows, TUNED_RECIPE, cache / BYTECODE.tuned)
    say(f"making {ADAPTER}")
    windows = data.windows(texts[UNICODE.name]["train"], tokenizer, TRAIN_RECORDS)
    lora.make_adapter(base, windows, LORA_RECIPE, cache / ADAPTER)
    return keys


def sizes(cache: Path) -> dict[str, int]:
    """Return the bytes of a checkpoint's weights, of each patch file and of the adapter's weights."""
    files = {"checkpoint": "base/model.safetensors", **{task.name: task.patch_file for task in TASKS}}
    files[ADAPTER] = f"{ADAPTER}/adapter_model.safetensors"
    return {name: (cache / file).stat().st_size for name, file in files.items()}


def with_summaries(scores: dict[str, dict[str, TaskScores]], new_tasks: tuple[str, ...]) -> dict[str, Any]:
    """Return the scores of every model, and old average, new average and H of each part."""
    summary = {
        label: {part: summarise(of_part, new_tasks) for part, of_part in parts.items()}
        for label, parts in scores.items()
    }
    return {"scores": scores, "summary": summary}


if __name__ == "__main__":
    main()
