"""docs/multimodal.md from multimodal.json; every figure and every verdict in the document comes from there."""

from __future__ import annotations

from typing import Any

from benchmarks.multimodal import steps
from benchmarks.multimodal.data import COUNTS, EASY_VQA, FASHION_PACKAGE, HELD_BACK, NEW_TASK, OLD_TASK
from benchmarks.multimodal.model import PATCH, PIXELS, TOWER
from benchmarks.multimodal.steps import LAYERS, PAPER, PAPER_LAYERS
from benchmarks.real.chain import DEFAULT_PATCH, SAMPLES, patch_folder
from benchmarks.real.measure import h_difference
from benchmarks.real.model import PACKAGE, VERSION
from benchmarks.real.render import between, steps_table, table

_HEAD = """# A model that sees

Written by `python -m benchmarks.multimodal` (`make multimodal`); every figure is from its last run.
"""

_COLUMNS = ("old", "new", "average", "h")
# Differences up to this many standard errors are called level.
_LEVEL = 2.0


def render(results: dict[str, Any]) -> str:
    """Return the document."""
    parts = [
        _HEAD,
        _setting(results),
        "## What the commands cost",
        _cost(results),
        "## How far each layer is from the tuned one",
        _errors_table(results),
        "## What each model answers",
        _scores_table(results),
        "## What follows",
        _verdict(results),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def update_readme(readme: str, results: dict[str, Any]) -> str:
    """Return the README's text with the short table of this run in its place."""
    return between(readme, "multimodal", _short(results))


def _setting(results: dict[str, Any]) -> str:
    machine, recipes = results["environment"], results["recipes"]
    captions, base, tuned = (_recipe(recipes[name]) for name in ("captions", "base", "tuned"))
    return f"""
- **The model**: a LLaVA of SmolLM2-135M-Instruct (package {PACKAGE} {VERSION}), a vision tower of the shape of
  DINOv2-small (package {TOWER[0]} {TOWER[1]}) and a new two-layer projector; pictures of {PIXELS} × {PIXELS} pixels,
  which are {(PIXELS // PATCH) ** 2} tokens. float32.
- **base**: trained on easy-VQA (package {EASY_VQA[0]} {EASY_VQA[1]}): first the projector alone, until its outputs
  come close to the words of captions (shape and colour; {captions}),
  then projector and language model on the questions ({base}).
- **tuned**: base fine-tuned on Fashion-MNIST (Debian's {FASHION_PACKAGE}; {tuned}),
  chosen so that it forgets visibly. AdamW, the tower frozen, the loss on the answers alone, passes in
  bfloat16. One seed ({recipes["tuned"]["seed"]}).
- **Old task**: easy-VQA, questions on the shape, on its colour and for yes or no in equal numbers. **New task**:
  "What is this?" on Fashion-MNIST, ten classes. {COUNTS["test"]} test questions of each task, from its own test set,
  and {COUNTS["validation"]} validation questions, on pictures that were not trained on (of easy-VQA {HELD_BACK} held
  back).
- **Accuracy**: the share of questions whose answer, written greedily from the whole vocabulary, begins with the first
  token of the right one; no two right answers of a task share it. Passes in bfloat16, logits in float32. H is the
  harmonic mean of old and new (Eq. 32). ± is the standard error over the test questions; other seeds of the fine-tuning
  would add to it.
- **interpolation w**: base + w (tuned − base), every entry. **scaled w**: base + w (patched − base), where patched is
  the model made with the default options. **paper's layers**: the sequential solver on the projector and the last
  {PAPER_LAYERS} of {LAYERS} decoder layers only, everything else at base.
- **Calibration**: {SAMPLES} samples, picture and all, from the fine-tuning data.
- **Ran on**: {machine["processor"]}, {machine["cores"]} cores, {machine["memory_bytes"] / 2**30:.0f} GiB;
  Python {machine["python"]}, torch {machine["torch"]}, transformers {machine["transformers"]},
  tailorcli {machine["tailorcli"]}.
"""


def _recipe(recipe: dict[str, Any]) -> str:
    return f"{recipe['steps']} steps of {recipe['batch']}, learning rate {recipe['learning_rate']:g}"


def _cost(results: dict[str, Any]) -> str:
    """Return the commands' table; the many globs of one command are cut short in it."""
    first, last = steps.paper_globs()[1], steps.paper_globs()[-1]
    rows = []
    for step in results["steps"]:
        head, found, tail = step["command"].partition(f" --include {first}")
        command = f"{head}{found} … --include {last}" if tail else step["command"]
        rows.append({**step, "command": command})
    return steps_table(rows)


def _errors_table(results: dict[str, Any]) -> str:
    rows = []
    for folder in steps.patched_folders():
        totals = results["totals"][folder]
        cells = (
            f"{100 * totals['delta_share_kept']:.1f}",
            *(f"{totals[key]:.3f}" for key in ("error_before", "error_after")),
        )
        rows.append([title(folder), *cells])
    text = table(["model", "‖delta‖² kept, %", "error of the mask alone", "after the solver"], rows)
    return f"""
Relative layer error ‖(W − W_tuned)X‖² / ‖delta X‖² over the calibration tokens, the mean of the linear layers that were
patched; 1 is the base, 0 the tuned model.

{text}
"""


def _scores_table(results: dict[str, Any]) -> str:
    figures = results["figures"]
    best = {_best(figures, prefix) for prefix in ("interpolation", "scaled", "patched")}
    rows = []
    for label, parts in figures.items():
        test = ["–"] * len(_COLUMNS)
        if "test" in parts:
            test = [_with_error(parts["test"][key]) for key in _COLUMNS]
        validation = [f"{parts['validation'][key][0]:.1f}" for key in ("old", "new", "h")]
        rows.append([title(label) + (" *" if label in best else ""), *test, *validation])
    header = ["model", f"old ({OLD_TASK})", f"new ({NEW_TASK})", "average", "**H**", "validation: old", "new", "H"]
    return f"""
Accuracy in percent on test questions, then on validation questions. Of the interpolations, and of the scaled models,
only the one that was best on validation questions was tested. \\* marks the best of its family there; the families
are the interpolations, the patched and the scaled models.

{table(header, rows)}
"""


def _with_error(figure: tuple[float, float]) -> str:
    value, error = figure
    return f"{value:.1f} ± {error:.1f}"


def title(label: str) -> str:
    """Return a model's name for the tables, such as `joint, density 0.1`."""
    kind, *rest = label.split("-")
    if label == PAPER:
        return f"paper's layers, density {rest[-1]}"
    if kind == "patched":
        return f"{rest[0]}, density {rest[1]}"
    return " ".join((kind, *rest))


def _best(figures: dict[str, Any], prefix: str | tuple[str, ...]) -> str:
    """Return the model of a family with the highest H on validation questions."""
    labels = [label for label in figures if label.startswith(prefix)]
    return max(labels, key=lambda label: float(figures[label]["validation"]["h"][0]))


def _difference(results: dict[str, Any], first: str, second: str) -> tuple[float, float]:
    """Return H(first) − H(second) on the test questions, with its standard error."""
    one, other = (results["scores"][label]["test"] for label in (first, second))
    return h_difference(one, other, (NEW_TASK,), old_tasks=(OLD_TASK,))


def _verdict(results: dict[str, Any]) -> str:
    """Compare the families, each at what was best on validation questions, by their H on the test questions."""
    figures = results["figures"]
    line, scaled, tailored = (_best(figures, prefix) for prefix in ("interpolation", "scaled", "patched"))
    default = patch_folder(*DEFAULT_PATCH)
    none, sweep = (patch_folder(solver, "0.1") for solver in ("none", "sequential"))
    pairs = [(default, "tuned"), (default, none), (default, sweep), (sweep, PAPER)]
    pairs += [(first, line) for first in dict.fromkeys((default, tailored, scaled))]
    rows = []
    for first, second in pairs:
        difference, error = _difference(results, first, second)
        rows.append([f"{title(first)} − {title(second)}", f"{difference:+.1f}", f"{error:.1f}"])
    base, tuned = figures["base"]["test"], figures["tuned"]["test"]
    return f"""
Fine-tuning cost {base["old"][0] - tuned["old"][0]:.1f} points of the old task and brought
{tuned["new"][0] - base["new"][0]:.1f} of the new one.
{_ranking(results)}

Differences of H on the test questions, with the standard error over them (both models answer the same questions):

{table(["difference", "H", "standard error"], rows)}

The layer error is measured on new-task pictures and says nothing of the old task. H weighs old and new alike; one who
wants all of the new task, or all of the old, will choose another row.
"""


def _ranking(results: dict[str, Any]) -> str:
    """Return a sentence on where the best H is, and on how the best patched or scaled model stands to interpolation."""
    figures = results["figures"]
    tested = [label for label in figures if "test" in figures[label]]
    winner = max(tested, key=lambda label: float(figures[label]["test"]["h"][0]))
    line = _best(figures, "interpolation")
    ours = _best(figures, ("patched", "scaled"))
    difference, error = _difference(results, ours, line)
    word = "level with" if abs(difference) <= _LEVEL * error else "ahead of" if difference > 0 else "behind"
    return (
        f"The highest H on the test questions is {figures[winner]['test']['h'][0]:.1f}, of *{title(winner)}*.\n"
        f"*{title(ours)}*, of the patched and scaled models the best on validation questions, is {word}\n"
        f"*{title(line)}* (H {difference:+.1f}, standard error {error:.1f})."
    )


def _short(results: dict[str, Any]) -> str:
    """Return the README's paragraph and table."""
    figures, commands = results["figures"], {step["label"]: step for step in results["steps"]}
    tested = [label for label in figures if "test" in figures[label]]
    winner = max(tested, key=lambda label: float(figures[label]["test"]["h"][0]))
    rows = []
    for label in tested:
        cells = [title(label), *(f"{figures[label]['test'][key][0]:.1f}" for key in _COLUMNS)]
        rows.append([f"**{cell}**" if label == winner else cell for cell in cells])
    largest = max(error for label in tested for _, error in (figures[label]["test"]["h"],))
    cost, cores = commands[patch_folder(*DEFAULT_PATCH)]["seconds"], results["environment"]["cores"]
    return f"""
Accuracy in percent on {COUNTS["test"]} questions of each task; H is the harmonic mean of old and new, its standard
error at most {largest:.1f}. On {cores} CPU cores `calibrate` took {commands["calibrate"]["seconds"]:.0f} s and
`patch` {cost:.0f} s. One seed; written by `make multimodal`.

{table(["model", "old task", "new task", "average", "H"], rows)}

{_ranking(results)} [In full](docs/multimodal.md).
"""
