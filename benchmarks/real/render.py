"""docs/results/real-model.md from results.json; every figure in the document comes from there."""

from __future__ import annotations

from typing import Any

from benchmarks.pages import reflow
from benchmarks.real.chain import DEFAULT_PATCH, SAMPLES, SEQ_LEN, patch_folder, patches
from benchmarks.real.data import NEW_TASK, OLD_TASKS, WINDOW
from benchmarks.real.measure import h_difference

_HEAD = """# A real model, start to end

Written by `python -m benchmarks.real`; every figure is from its last run.
"""


def render(results: dict[str, Any]) -> str:
    """Return the document."""
    parts = [
        _HEAD,
        _setting(results),
        "## What the commands cost",
        steps_table(results["steps"]),
        "## How far each layer is from the tuned one",
        _errors_table(results),
        "## What each model knows",
        _scores_table(results),
        "## What follows",
        _verdict(results),
    ]
    return reflow("\n\n".join(part.strip() for part in parts))


def _setting(results: dict[str, Any]) -> str:
    machine, recipe = results["environment"], results["recipe"]
    test = results["scores"]["base"]["test"]
    windows = {task: len(test[task]["correct"]) for task in (*OLD_TASKS, NEW_TASK)}
    counts = ", ".join(f"{task} {count * test[task]['tokens']:,}" for task, count in windows.items())
    return f"""
- **base**: SmolLM2-135M-Instruct from the package {results["weights"]}, converted to bfloat16.
- **tuned**: all of its parameters fine-tuned on records of the Unicode character database:
  {recipe["steps"]} steps of {recipe["batch"]} × {WINDOW} tokens, AdamW, learning rate {recipe["learning_rate"]:g},
  chosen so that it forgets visibly. One seed ({recipe["seed"]}).
- **Old tasks**: English prose (Python's help topics) and Python source (its standard library).
  **New task**: records of characters that the fine-tuning has not seen. All the text comes with Python.
- **Accuracy**: the share of next tokens predicted, on held-out windows of {WINDOW} tokens (test tokens: {counts}).
  H is the harmonic mean of the old tasks' average and the new task (Eq. 32).
- **interpolation w**: base + w (tuned − base), every entry. **scaled w**: base + w (patched − base), where patched is
  the model made with the default options; its kept entries move part of the way, the others stay at base.
- **Calibration**: up to {SAMPLES} samples of at most {SEQ_LEN} tokens from the fine-tuning data.
- **Ran on**: {machine["processor"]}, {machine["cores"]} cores, {machine["memory_bytes"] / 2**30:.0f} GiB;
  Python {machine["python"]}, torch {machine["torch"]}, transformers {machine["transformers"]},
  tailorcli {machine["tailorcli"]}.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table: the first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def steps_table(steps: list[dict[str, Any]]) -> str:
    """Return the table of what each command took."""
    rows = []
    for step in steps:
        figures = (step["seconds"], step["cpu_seconds"], step["peak_bytes"] / 1e6)
        rows.append([f"`{step['command']}`", *(f"{figure:.0f}" for figure in figures)])
    text = table(["command", "seconds", "processor seconds", "peak memory, MB"], rows)
    return f"{text}\n\nEach a process of its own, start-up included; peak memory is its largest resident set."


def _errors_table(results: dict[str, Any]) -> str:
    rows = []
    for solver, density in patches():
        totals = results["totals"][patch_folder(solver, density)]
        share = f"{100 * totals['delta_share_kept']:.1f}"
        rows.append([solver, density, share, f"{totals['error_before']:.3f}", f"{totals['error_after']:.3f}"])
    text = table(["solver", "density", "‖delta‖² kept, %", "error of the mask alone", "after the solver"], rows)
    return f"""
Relative layer error ‖(W − W_tuned)X‖² / ‖delta X‖² over the calibration tokens, the mean of the linear layers;
1 is the base, 0 the tuned model.

{text}
"""


def between(page: str, mark: str, text: str) -> str:
    """Return a page with ``text`` between the comments ``mark:begin`` and ``mark:end``."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    if not after:
        raise ValueError(f"the page lacks {begin} and {end}")
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def _scores_table(results: dict[str, Any]) -> str:
    rows = []
    for label, parts in results["scores"].items():
        total = results["summary"][label]
        figures = ["–"] * 5
        if "test" in parts:
            accuracies = [parts["test"][task]["accuracy"] for task in OLD_TASKS]
            figures = [f"{figure:.2f}" for figure in (*accuracies, *total["test"].values())]
        rows.append([_title(label), *figures, *(f"{figure:.2f}" for figure in total["validation"].values())])
    header = ["model", *OLD_TASKS, "old average", "new", "**H**", "validation: old", "new", "H"]
    return f"""
Accuracy in percent on test text, then on validation text. Of the interpolations, and of the scaled models, only the
one that was best on validation text was tested.

{table(header, rows)}
"""


def _title(label: str) -> str:
    """Return a model's name for the table, such as `joint, density 0.1`."""
    kind, *rest = label.split("-")
    if kind == "patched":
        return f"{rest[0]}, density {rest[1]}"
    return " ".join((kind, *rest))


def _verdict(results: dict[str, Any]) -> str:
    """Compare the families, each at what was best on validation text, by their H-score on the test text."""
    summary, scores = results["summary"], results["scores"]

    def best_of(prefix: str) -> str:
        labels = [str(label) for label in summary if label.startswith(prefix)]
        return max(labels, key=lambda label: float(summary[label]["validation"]["h"]))

    line = best_of("interpolation")
    scaled = best_of("scaled")
    default = patch_folder(*DEFAULT_PATCH)
    rivals = [patch_folder(solver, "0.1") for solver in ("none", "sequential")]
    tailored = best_of("patched")
    drop = summary["base"]["test"]["old"] - summary["tuned"]["test"]["old"]
    gain = summary["tuned"]["test"]["new"] - summary["base"]["test"]["new"]
    pairs = [(default, "tuned"), *((default, rival) for rival in rivals)]
    pairs += [(model, line) for model in (default, tailored, scaled)]
    rows = []
    for first, second in pairs:
        difference, error = h_difference(scores[first]["test"], scores[second]["test"])
        row = [f"{_title(first)} − {_title(second)}", f"{difference:+.2f}", f"{error:.2f}"]
        if row not in rows:
            rows.append(row)
    tested = [label for label in summary if "test" in summary[label]]
    winner = max(tested, key=lambda label: float(summary[label]["test"]["h"]))
    best = ", ".join(f"{_title(label)} ({summary[label]['test']['h']:.2f})" for label in (line, tailored, scaled))
    return f"""
- Fine-tuning cost {drop:.1f} points of the old tasks and brought {gain:.1f} of the new one.
- The highest H-score on the test text is {summary[winner]["test"]["h"]:.2f}, of **{_title(winner)}**.
- The best on validation text were, with H on the test text: {best}.

Differences of H on the test text, with the standard error over its windows (other seeds of the fine-tuning would add
to it):

{table(["difference", "H", "standard error"], rows)}

The layer error is measured on new-task data and says nothing of the old tasks: a model with a smaller one is closer
to the tuned model, in what it has learnt and in what it has forgotten. H weighs old and new alike; one who
wants all of the new task, or all of the old, will choose another row. Interpolation needs no calibration and changes
every entry; a patched or scaled model differs from base only in the kept share.
"""
