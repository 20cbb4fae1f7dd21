"""The command that makes an output again, from the options and the inputs that its report names."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tailorcli.options import CalibrateOptions, DistillOptions, MergeOptions, PatchMethod, PatchOptions
from tailorcli.patchfile.report import is_retained
from tailorcli.terminal import printable

_WIDTH = 88  # columns of a line, so that a page or a card need not scroll
_VALUES = (
    *("method", "density", "omega", "score", "weight", "retain_weight", "solver", "damping", "tolerance"),
    "max_iterations",
    *(
        "block_size",
        "threshold",
        "alpha",
        "beta",
        "threshold_scale",
        "seed",
        "graft_steps",
        "graft_rate",
        "include",
        "exclude",
    ),
    *("teacher_weight", "max_shard_size", "fp8_output", "task", "license"),
)
_FLAGS = ("check_propagation", "allow_dtype_mismatch", "resized_vocab", "trust_remote_code")
_SCORED = ("density", "omega", "score", "retain_weight", "damping", "include", "exclude")  # what ``score`` takes
_SCORED_FLAGS = ("allow_dtype_mismatch", "resized_vocab")
_TUNED = (  # what ``finetune`` takes
    *("method", "update_ratio", "accumulate", "strength", "round_steps", "trainable", "last_layers", "epochs", "steps"),
    *("learning_rate", "batch_size", "gradient_accumulation", "seq_len", "warmup", "weight_decay", "seed", "dtype"),
    *("text_column", "prompt_column", "response_column"),
)
_DATA = "--graft-data"
# How the data of a whole job were drawn and run, as its report says it of them.
_DRAWN = ("num_samples", "seq_len", "seed", "dtype", "text_column", "prompt_column", "response_column")
# What the statistics of a whole job were made of, as its report names it, and what stands there for no file.
NEW, RETAINED, SELF_WRITTEN = "new data", "retain data", "written by the model itself"
NOT_KEPT = "measured for this patch and not kept"  # stands for the folder of statistics that goes at the end


def patch_command(
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    output: str = "OUT",
    *,
    distilled: Mapping[str, Any] | None = None,
    calibration: Mapping[str, str] | None = None,
    command: str = "patch",
) -> list[str]:
    """The words of ``tailorcli patch`` (or ``score``) with these options, as a report has them.

    ``inputs`` maps roles (base, tuned, stats, retain, data, or NEW and RETAINED in place of statistics) to paths or
    names; ``calibration`` says how these were used, as a report has it of NEW. Options at their defaults are left out.
    """
    words = ["tailorcli", command, inputs["base"], inputs["tuned"]]
    if NEW in inputs:  # the whole job
        words += ["--data", inputs[NEW]]
        if inputs.get(RETAINED, SELF_WRITTEN) != SELF_WRITTEN:
            words += ["--retain-data", inputs[RETAINED]]
        words += ["--no-retain"] if RETAINED not in inputs else []
        usual = CalibrateOptions.of_job(distilled=distilled is not None)
        words += _given(calibration or {}, {"num_samples": str(usual.num_samples), "seed": "0"}, _DRAWN)
        words += ["--deterministic"] if (calibration or {}).get("deterministic") else []
    for role, flag in (("stats", "--stats"), ("retain", "--retain"), ("data", _DATA)):
        if role in inputs and not (NEW in inputs and role != "data"):
            words += [flag, inputs[role]]
    if command == "score":
        usual_score = PatchOptions().resolved(is_retained(inputs)).to_dict()
        words += [*_given(options, usual_score, _SCORED), *(_flag(name) for name in _SCORED_FLAGS if options.get(name))]
        return [*words, "-o", "REPORT.json"]
    method = options.get("method", "tailor")
    known = {"method": method} if method in list(PatchMethod) else {}
    retained = is_retained(inputs)
    defaults = PatchOptions(**known).resolved(retained, distilled is not None).to_dict()
    if "score" in defaults:
        options = {"score": "paper", **options}  # which a report leaves unsaid
    defaults |= {"fp8_output": "fp8", "method": "tailor"}
    unused = {"seed"} if NEW in inputs else set()
    unused |= set() if retained else {"retain_weight"}  # which patch refuses
    words += _given(options, defaults, [name for name in _VALUES if name not in unused])
    if options.get("batch_size", 8) != 8:
        words += ["--graft-batch-size", str(options["batch_size"])]
    propagated = options.get("propagate", defaults["propagate"])
    if propagated != defaults["propagate"]:
        words.append("--propagate" if propagated else "--no-propagate")
    words += [_flag(name) for name in _FLAGS if options.get(name)]
    return [*words, *_training(distilled), "-o", output]


def merge_command(
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    output: str = "OUT",
    *,
    distilled: Mapping[str, Any] | None = None,
) -> list[str]:
    """The words of ``tailorcli merge-multi`` with these options and inputs (base, patch 1, tuned 1, ...).

    Where it was ``distilled``, ``samples`` are among the inputs: the statistics of what the base must keep.
    """
    words = ["tailorcli", "merge-multi", inputs["base"]]
    words += [path for role, path in inputs.items() if role.startswith("patch ")]
    for role, flag in (("tuned ", "--tuned"), ("stats ", "--stats")):
        for name, path in inputs.items():
            words += [flag, path] if name.startswith(role) else []
    defaults = MergeOptions().to_dict()
    named = ("method", "damping", "tolerance", "max_iterations", "max_shard_size", "task", "license")
    words += _given(options, defaults, named)
    weights = options.get("weights") or ()
    if len(set(weights)) > 1:
        words += [word for weight in weights for word in ("--weight", number_of(weight))]
    if distilled is not None and "samples" in inputs:
        words += ["--retain", inputs["samples"]]
    return [*words, *_training(distilled), "-o", output]


def finetune_command(options: Mapping[str, Any], defaults: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """The words of ``tailorcli finetune`` with these options and inputs (base, data, importance, training_args)."""
    words = ["tailorcli", "finetune", inputs["base"]]
    for role in ("data", "importance", "training_args"):
        words += [_flag(role), inputs[role]] if role in inputs else []
    words += _given(options, defaults, _TUNED)
    return [*words, *(["--trust-remote-code"] if options.get("trust_remote_code") else []), "-o", "OUT"]


def _training(distilled: Mapping[str, Any] | None) -> list[str]:
    """What asks for distillation with these options, as a report has them; nothing where there was none."""
    if distilled is None:
        return []
    plain = {f"distill_{name}": value for name, value in distilled.items() if name != "seed"}
    ours = {f"distill_{name}": value for name, value in vars(DistillOptions()).items()}
    return ["--distill", *_given(plain, ours, tuple(plain))]


def shell_text(words: list[str]) -> str:
    """Words as a shell takes them, in lines of about 88 columns; an option and its value stay together."""
    parts: list[str] = []
    for number, word in enumerate(words):
        quoted = shlex.quote(printable(word))
        if parts and words[number - 1].startswith("-") and not word.startswith("-"):
            parts[-1] += f" {quoted}"
        else:
            parts.append(quoted)
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) + 3 > _WIDTH:
            lines.append("  ")
        lines[-1] += part if not lines[-1].strip() else f" {part}"
    return " \\\n".join(lines)


def _given(options: Mapping[str, Any], defaults: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """The options that are not at their defaults, each with its value; a list gives its option again and again."""
    for name in names:
        value = options.get(name)
        if value is None or value == defaults.get(name):
            continue
        unit = "B" if name == "max_shard_size" else ""
        for each in value if isinstance(value, (list, tuple)) else (value,):
            yield _flag(name)
            yield f"{number_of(each) if isinstance(each, float) else each}{unit}"


def number_of(value: float) -> str:
    """A number in few digits, and in as many as it needs to be read as the same again."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
