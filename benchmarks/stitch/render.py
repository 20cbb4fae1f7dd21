"""docs/results/stitching.md from stitch.json; every figure and every verdict in the document comes from there."""

from __future__ import annotations

from typing import Any

from benchmarks.pages import reflow
from benchmarks.real.chain import SAMPLES, SEQ_LEN
from benchmarks.real.data import OLD_TASKS, WINDOW
from benchmarks.real.measure import h_difference
from benchmarks.real.render import between, steps_table, table
from benchmarks.stitch.candidates import ARITHMETIC, PLAIN_AVERAGE
from benchmarks.stitch.steps import (
    ADAPTER,
    ADAPTER_PATCH,
    BYTECODE,
    HALF_DENSITY,
    METHODS,
    NEW_TASKS,
    SINGLE_DENSITY,
    TASKS,
    UNICODE,
    merged_folder,
)

_HEAD = """# Two tasks in one model, and LoRA

Written by `python -m benchmarks.stitch` (`make stitch`); every figure is from its last run.
"""

# Differences up to this many standard errors are called level.
_LEVEL = 2.0


def render(results: dict[str, Any]) -> str:
    """Return the document."""
    parts = [
        _HEAD,
        _setting(results),
        "## Two fine-tunes of one base",
        _stitched_table(results["stitched"]),
        _weights_tried(results["stitched"]),
        "## What follows for two tasks",
        _stitched_verdict(results["stitched"]),
        "## LoRA",
        _adapted(results),
        "## The size of a patch",
        _sizes(results["bytes"]),
        "## What the commands cost",
        steps_table(results["steps"]),
    ]
    return reflow("\n\n".join(part.strip() for part in parts))


def update_summary(page: str, results: dict[str, Any]) -> str:
    """Return docs/results/what-to-expect.md with the short table of this run in its place."""
    return between(page, "stitch", reflow(_short(results)))


def _short(results: dict[str, Any]) -> str:
    """Return the summary's paragraph and table: the baselines and what merges two patches."""
    models = results["stitched"]
    lines = [label for label in _tested(models) if label.startswith((ARITHMETIC, "scaled-"))]
    shown = ["base", *(task.tuned for task in TASKS), PLAIN_AVERAGE]
    shown += [label for label in lines if label.startswith(ARITHMETIC)]
    shown += [merged_folder(method) for method in METHODS]
    shown += [label for label in lines if label.startswith("scaled-")]
    rows = {label: _row(models, label)[:-1] for label in shown}
    best = max(shown, key=lambda label: float(models["summary"][label]["test"]["h"]))
    best_line = max(lines, key=lambda label: float(models["summary"][label]["validation"]["h"]))
    rival = next(label for label in shown if label.startswith(ARITHMETIC))
    scores = models["scores"]
    difference, error = h_difference(scores[best_line]["test"], scores[rival]["test"], NEW_TASKS)
    word = "level with" if abs(difference) <= _LEVEL * error else "ahead of" if difference > 0 else "behind"
    adapted = results["adapted"]["summary"]
    winner = max(
        (label for label in adapted if "test" in adapted[label]), key=lambda label: adapted[label]["test"]["h"]
    )
    lora = f"where *{title(winner)}* has the best H"
    size = results["bytes"]
    share = 100 * max(size[name] for name in NEW_TASKS) / size["checkpoint"]
    return f"""
SmolLM2-135M-Instruct, two full fine-tunes of it ({NEW_TASKS[0]} records and {NEW_TASKS[1]} listings), each made into a
patch file of density {HALF_DENSITY} ({share:.1f}% of the checkpoint) and the two stitched. Next-token accuracy in
percent on held-out text; weights *w* chosen on validation text, one seed, written by `make stitch`.

{_figures_table(_header()[:-1], rows)}

- *scaled w* is base + w · (merged − base); there is no option for it yet.
- The best H here is that of *{title(best)}*.
- *{title(best_line)}*, the line that was best on validation text, is {word} *{title(rival)}* (H {difference:+.2f},
  standard error over the text {error:.2f}; other seeds would add to it).
- The [full page](stitching.md) has every weight that was tried, the single patches, and LoRA, {lora}.
"""


def _setting(results: dict[str, Any]) -> str:
    machine, recipe, lora = results["environment"], results["recipe"], results["lora"]
    test = results["stitched"]["scores"]["base"]["test"]
    counts = ", ".join(f"{task} {len(test[task]['correct']) * test[task]['tokens']:,}" for task in test)
    return f"""
- **base**: SmolLM2-135M-Instruct from the package {results["weights"]}, in bfloat16. Both fine-tunes start from it.
- **Task 1, Unicode**: records of the Unicode character database, the fine-tune of [the real model](real-model.md).
  **Task 2, bytecode**: bytecode listings of functions in the standard library's packages.
- **Full fine-tunes**: all parameters, {recipe["steps"]} steps of {recipe["batch"]} × {WINDOW} tokens, AdamW, learning
  rate {recipe["learning_rate"]:g}, the same for both tasks. **LoRA**: task 1, rank {lora["rank"]}, alpha
  {lora["alpha"]}, on all linear layers but the output, {lora["steps"]} steps, learning rate {lora["learning_rate"]:g}.
  One seed ({recipe["seed"]}).
- **Old tasks**: English prose (Python's help topics) and Python source (the standard library's top-level modules, none
  of which task 2 was made from).
- **Accuracy**: the share of next tokens predicted on held-out windows of {WINDOW} tokens (test tokens: {counts}).
  *old* is the average of the old tasks, *new* that of both new tasks, H the harmonic mean of *old* and *new*.
- **merged, METHOD**: `tailorcli merge-multi` on the two patches of density {HALF_DENSITY}. **plain averaging**: the
  mean of the two tuned checkpoints, every entry. **task arithmetic w**: base + w · (delta of task 1 + delta of task 2);
  it is the same line as base + 2w · (mean of both tuned − base), and at w = 0.5 it is plain averaging. **scaled w**:
  base + w · (merged − base), so that only the entries of the patches move.
- **Chosen on validation text, reported on test text**: the weight w of each line. Densities and methods are the
  defaults or the paper's, and each has its row.
- **Calibration**: up to {SAMPLES} samples of at most {SEQ_LEN} tokens from the fine-tuning data of each task.
- **Ran on**: {machine["processor"]}, {machine["cores"]} cores, {machine["memory_bytes"] / 2**30:.0f} GiB;
  Python {machine["python"]}, torch {machine["torch"]}, transformers {machine["transformers"]},
  tailorcli {machine["tailorcli"]}.
"""


def title(label: str) -> str:
    """Return a model's name for the tables."""
    names = {UNICODE.tuned: "tuned on task 1", BYTECODE.tuned: "tuned on task 2", PLAIN_AVERAGE: "plain averaging"}
    for number, task in enumerate(TASKS, 1):
        names[task.patched] = f"task {number} patched, {SINGLE_DENSITY}"
        names[task.applied] = f"task {number} patched, {HALF_DENSITY}"
    names |= {merged_folder(method): f"merged, {method}" for method in METHODS}
    names |= {ADAPTER: "LoRA", ADAPTER_PATCH: f"LoRA patched, {HALF_DENSITY}"}
    if label in names:
        return names[label]
    line, _, weight = label.rpartition("-")
    if line.startswith("scaled-"):
        return f"{title(line.removeprefix('scaled-'))}, scaled {weight}"
    lines = {ARITHMETIC: "task arithmetic", ADAPTER: "LoRA, scaled"}
    return f"{lines[line]} {weight}" if line in lines else label


def _figures_table(header: list[str], rows: dict[str, list[float]]) -> str:
    """Return a table of models and figures with the highest figure of each column in bold."""
    best = [max(column) for column in zip(*rows.values(), strict=True)]
    cells = [
        [title(label)]
        + [f"**{figure:.2f}**" if figure == top else f"{figure:.2f}" for figure, top in zip(figures, best, strict=True)]
        for label, figures in rows.items()
    ]
    return table(["model", *header], cells)


def _tested(models: dict[str, Any]) -> list[str]:
    return [label for label, parts in models["scores"].items() if "test" in parts]


def _stitched_table(models: dict[str, Any]) -> str:
    rows = {label: _row(models, label) for label in _tested(models)}
    return f"""
Accuracy in percent on test text; the last column is H on validation text. The best of each column is in bold.

{_figures_table(_header(), rows)}
"""


def _header() -> list[str]:
    return ["old", *(f"{number}: {task}" for number, task in enumerate(NEW_TASKS, 1)), "new", "H", "validation H"]


def _row(models: dict[str, Any], label: str) -> list[float]:
    """Return a model's figures under `_header`."""
    test, total = models["scores"][label]["test"], models["summary"][label]["test"]
    new = [test[task]["accuracy"] for task in NEW_TASKS]
    return [total["old"], *new, total["new"], total["h"], models["summary"][label]["validation"]["h"]]


def _lines(models: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return line -> weight -> H on validation text, of every line with more than one weight."""
    lines: dict[str, dict[str, float]] = {}
    for label, parts in models["summary"].items():
        line, _, weight = label.rpartition("-")
        if line.startswith("scaled-") or line in (ARITHMETIC, ADAPTER):
            lines.setdefault(line, {})[weight] = parts["validation"]["h"]
    return lines


def _weights_tried(models: dict[str, Any]) -> str:
    rows = []
    for line, points in _lines(models).items():
        name = title(f"{line}-w")
        rows.append([name, ", ".join(f"{weight}: {h:.2f}" for weight, h in points.items())])
    return f"The weights tried, with H on validation text:\n\n{table(['line', 'w: H'], rows)}"


def _best(models: dict[str, Any], labels: list[str]) -> str:
    """Return the model with the best H on validation text among those that were tested."""
    tested = set(_tested(models)) & set(labels)
    return max((label for label in labels if label in tested), key=lambda label: _validation(models, label))


def _validation(models: dict[str, Any], label: str) -> float:
    return float(models["summary"][label]["validation"]["h"])


def _on_line(models: dict[str, Any], line: str) -> list[str]:
    return [label for label in models["scores"] if label.rpartition("-")[0] == line]


def _differences(models: dict[str, Any], pairs: list[tuple[str, str]], new_tasks: tuple[str, ...]) -> str:
    """Return the table of differences of H on test text, each with a word on it."""
    rows = []
    for first, second in dict.fromkeys(pairs):
        one, other = (models["scores"][label]["test"] for label in (first, second))
        difference, error = h_difference(one, other, new_tasks)
        rows.append(
            [f"{title(first)} − {title(second)}", f"{difference:+.2f}", f"{error:.2f}", _word(difference, error)]
        )
    return table(["difference", "H", "standard error", "the first is"], rows)


def _word(difference: float, error: float) -> str:
    if abs(difference) <= _LEVEL * error:
        return "level"
    return "ahead" if difference > 0 else "behind"


def _stitched_verdict(models: dict[str, Any]) -> str:
    scores, summary = models["scores"], models["summary"]
    tested = _tested(models)
    winner = max(tested, key=lambda label: float(summary[label]["test"]["h"]))
    arithmetic = _best(models, _on_line(models, ARITHMETIC))
    merged = _best(models, [merged_folder(method) for method in METHODS])
    scaled = [_best(models, _on_line(models, f"scaled-{merged_folder(method)}")) for method in METHODS]
    best_scaled = _best(models, scaled)
    pairs = [(merged, label) for label in (UNICODE.tuned, BYTECODE.tuned, PLAIN_AVERAGE, arithmetic)]
    pairs += [(merged_folder(method), PLAIN_AVERAGE) for method in METHODS]
    pairs += [(best_scaled, PLAIN_AVERAGE), (best_scaled, arithmetic)]

    def accuracy(label: str, task: str) -> float:
        return float(scores[label]["test"][task]["accuracy"])

    lost = []
    for task, other in ((UNICODE, BYTECODE), (BYTECODE, UNICODE)):
        old = summary["base"]["test"]["old"] - summary[task.tuned]["test"]["old"]
        gained = accuracy(task.tuned, task.name) - accuracy("base", task.name)
        elsewhere = accuracy(task.tuned, other.name) - accuracy("base", other.name)
        lost.append(
            f"- Fine-tuning on {task.name} moved {task.name} by {gained:+.1f} points, the old tasks by {-old:+.1f} and "
            f"{other.name} by {elsewhere:+.1f}."
        )
    return f"""
{chr(10).join(lost)}
- The highest H on test text is {summary[winner]["test"]["h"]:.2f}, of **{title(winner)}**.
- Of the three merging methods, {title(merged)} was best on validation text; with a weight chosen there too,
  {title(best_scaled)}.
- {_interpolation_sentence(models, [best_scaled, merged], [PLAIN_AVERAGE, arithmetic], NEW_TASKS)}

Differences of H on test text, with the standard error over the windows (other seeds of the fine-tuning would add to
it); *level* means within {_LEVEL:g} standard errors:

{_differences(models, pairs, NEW_TASKS)}

H weighs old and new alike; one who wants more of the one or the other will choose another row. Averaging and task
arithmetic need both full checkpoints and change every entry; a merged model differs from base in at most the kept
share of its entries, and is made from two small files (`average` and `joint` read the tuned checkpoints as well).
"""


def _interpolation_sentence(
    models: dict[str, Any], ours: list[str], plain: list[str], new_tasks: tuple[str, ...]
) -> str:
    """Say how the best of ours stands against the best of the plain ways, each chosen on validation text."""
    mine, rival = _best(models, ours), _best(models, plain)
    difference, error = h_difference(models["scores"][mine]["test"], models["scores"][rival]["test"], new_tasks)
    figures = f"({abs(difference):.2f} in H, standard error {error:.2f})"
    if _word(difference, error) == "behind":
        return f"**Plain interpolation wins here**: {title(rival)} is ahead of {title(mine)} {figures}."
    if _word(difference, error) == "level":
        return f"{title(mine)} and {title(rival)}, which touches every entry, are level {figures}."
    return f"{title(mine)} is ahead of {title(rival)}, the best plain interpolation {figures}."


def _adapted(results: dict[str, Any]) -> str:
    models = results["adapted"]
    summary, only = models["summary"], (UNICODE.name,)
    rows = {}
    for label in _tested(models):
        test = models["scores"][label]["test"]
        old = [test[task]["accuracy"] for task in OLD_TASKS]
        total = summary[label]["test"]
        rows[label] = [*old, total["old"], total["new"], total["h"], _validation(models, label)]
    weight = _best(models, _on_line(models, ADAPTER))
    scaled = _best(models, _on_line(models, f"scaled-{ADAPTER_PATCH}"))
    pairs = [(ADAPTER_PATCH, ADAPTER), (ADAPTER_PATCH, weight), (scaled, weight)]
    drop = summary["base"]["test"]["old"] - summary[ADAPTER]["test"]["old"]
    gain = summary[ADAPTER]["test"]["new"] - summary["base"]["test"]["new"]
    return f"""
The setting of the paper's Table 7: the fine-tune is a LoRA adapter, the patch has density {HALF_DENSITY}. Here H is
over the old tasks and task 1 alone. *LoRA, scaled w* is base + w · (the adapter's update): the adapter file itself
with its scale turned down.

{_figures_table([*OLD_TASKS, "old", UNICODE.name, "H", "validation H"], rows)}

{_weights_tried(models)}

- LoRA moved the old tasks by {-drop:+.1f} points and {UNICODE.name} by {gain:+.1f}.
- {_interpolation_sentence(models, [ADAPTER_PATCH, scaled], [weight, ADAPTER], only)}

{_differences(models, pairs, only)}
"""


def _sizes(sizes: dict[str, int]) -> str:
    whole = sizes["checkpoint"]
    names = {"checkpoint": "checkpoint (weights)", ADAPTER: "LoRA adapter (weights)"}
    rows = [
        [names.get(name, f"patch of {name}, density {HALF_DENSITY}"), f"{size / 1e6:.1f}", f"{100 * size / whole:.1f}"]
        for name, size in sizes.items()
    ]
    return table(["file", "MB", "% of the checkpoint"], rows)
