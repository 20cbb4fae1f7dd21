"""The per-tensor report of a run: its JSON form, its totals, and its table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailorcli.errors import CheckpointError
from tailorcli.files import read_json
from tailorcli.options import DENSE
from tailorcli.patchfile.records import TensorRecord, read_record
from tailorcli.typed import Reader, list_of, one_of, plain, read_number, read_text, require_plain

FORMAT_VERSION = 1
MERGE = "merge-multi"
OPTIONS_SHOWN = {
    "score": ("density", "omega", "damping"),
    "patch": ("density", "omega", "solver", "damping"),
    MERGE: ("method", "tasks", "weights", "damping"),
}
REPORT_FILE = "tailor_report.json"
RUN_FILE = "tailor_run.json"
EVALUATION_FILE = "tailor_evaluation.json"
FINETUNE_FILE = "finetune.json"  # of a fine-tune, in place of the first two


@dataclass(frozen=True)
class PatchReport:
    """What a ``score`` or ``patch`` run did: a record for every tensor of the base, and their totals.

    ``stages`` holds seconds of work by stage and is kept out of the report file, which is the same for the same
    inputs; it goes into the run record.
    """

    command: str
    options: dict[str, Any]
    inputs: dict[str, dict[str, str]]  # base, tuned, stats: path and fingerprint
    tensors: list[TensorRecord]
    stages: dict[str, float]
    seconds: float
    notes: tuple[str, ...] = ()  # what the user should know besides; not in the report file
    distillation: dict[str, Any] | None = None  # options, losses and best step, where the kept entries were trained
    propagation: dict[str, Any] | None = None  # whether it was kept, and both patches' losses, where it was checked
    target: dict[str, Any] | None = None  # what was searched for, and what was tried, where it is the best of a search
    is_earlier: bool = False  # of a run that had finished before this one was asked to go on with it
    ranks: tuple[dict[str, Any], ...] = ()  # what each of several did; not in the report file

    @property
    def totals(self) -> dict[str, Any]:
        """Sums and means over the patched tensors."""
        return totals_of(self.command, self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """What the report file holds: the same for the same inputs."""
        values = {
            "format_version": FORMAT_VERSION,
            "command": self.command,
            "options": self.options,
            "inputs": self.inputs,
            "totals": self.totals,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            **({"distillation": self.distillation} if self.distillation is not None else {}),
            **({"propagation": self.propagation} if self.propagation is not None else {}),
            **({"target": self.target} if self.target is not None else {}),
        }
        return {name: plain(value) for name, value in values.items()}

    def to_json(self) -> str:
        """The report file's text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def totals_of(command: str, tensors: list[TensorRecord]) -> dict[str, Any]:
    """The totals of a command's records."""
    return total_merge_figures(tensors) if command == MERGE else total_figures(tensors)


_SHIFTS = ("input_shift", "retained_input_shift")  # how far patching moves a propagated layer's inputs
_UNPATCHED = "_unpatched_inputs"  # ends a propagated layer's figures on the inputs of the unpatched models


def total_figures(tensors: list[TensorRecord]) -> dict[str, Any]:
    """Entries, shares and errors over the patched tensors.

    The errors are plain means over the tensors with a full Hessian: outputs of different layers have no common
    unit in which they could be added.
    """
    patched = [t for t in tensors if t.patched]
    measured = [t for t in patched if t.kind == "full" and t.error_before is not None]

    def mean(key: str) -> float | None:
        values = [getattr(t, key) for t in measured if getattr(t, key) is not None]
        return sum(values) / len(values) if values else None

    def mean_unpatched(key: str) -> float | None:
        pairs = [(getattr(t, f"{key}{_UNPATCHED}"), getattr(t, key)) for t in measured]
        known = [other if value is None else value for value, other in pairs if (value, other) != (None, None)]
        return sum(known) / len(known) if known else None

    numel, kept = sum(t.numel for t in patched), sum(t.kept for t in patched)
    drift = mean("drift")
    propagated = [t for t in patched if t.propagated]
    sensitivity = sum(t.sensitivity_sum or 0.0 for t in patched)
    sensitivity_kept = sum(t.sensitivity_kept or 0.0 for t in patched)
    # Reports of earlier versions have no other figures of propagated layers than these.
    twice = ("error_before", "error_after", "drift")
    measured_twice = [k for k in twice if any(getattr(t, f"{k}{_UNPATCHED}") is not None for t in propagated)]
    return {
        "tensors_patched": len(patched),
        "tensors_at_base": len(tensors) - len(patched),
        "numel": numel,
        "kept": kept,
        "density": share(kept, numel),
        "numel_at_base": sum(t.numel for t in tensors if not t.patched),
        "zero_delta_share": share(sum(t.zero_delta for t in patched), numel),
        "delta_share_kept": share(sum(t.delta_sq_kept for t in patched), sum(t.delta_sq for t in patched)),
        "sensitivity_share_kept": share(sensitivity_kept, sensitivity),
        "error_before": mean("error_before"),
        "error_after": mean("error_after"),
        **({"drift": drift} if drift is not None else {}),  # with a retain term alone
        **({"propagated": len(propagated)} if propagated else {}),
        **{name: sum(getattr(t, name) for t in propagated) / len(propagated) for name in _SHIFTS if propagated},
        **{f"{name}{_UNPATCHED}": mean_unpatched(name) for name in measured_twice},
        "largest_residual": max((t.residual or 0.0 for t in patched), default=0.0),
        "damped_further": [t.name for t in patched if t.damped_further],
    }


def total_merge_figures(tensors: list[TensorRecord]) -> dict[str, Any]:
    """Entries kept by each task, overlaps and layer errors over the merged tensors.

    ``errors`` holds for each task the plain mean over the tensors with full Hessians.
    """
    merged = [t for t in tensors if t.patched]
    measured = [t.errors for t in merged if t.kind == "full" and t.errors is not None]
    numel, kept = sum(t.numel for t in merged), sum(t.kept for t in merged)
    common = sum(t.kept_by_all for t in merged)
    methods = [str(t.method) for t in merged]
    return {
        "tensors_patched": len(merged),
        "tensors_at_base": len(tensors) - len(merged),
        "numel": numel,
        "kept": kept,
        "density": share(kept, numel),
        "numel_at_base": sum(t.numel for t in tensors if not t.patched),
        "kept_by": [sum(counts) for counts in zip(*(t.kept_by for t in merged), strict=True)],
        "kept_by_all": common,
        "jaccard": share(common, kept),
        "shared": sum(t.shared for t in merged),
        "sign_conflicts": sum(t.sign_conflicts for t in merged),
        "errors": [sum(column) / len(measured) for column in zip(*measured, strict=True)] if measured else None,
        "methods": {method: methods.count(method) for method in dict.fromkeys(methods)},
        "largest_residual": max((t.residual or 0.0 for t in merged), default=0.0),
        "damped_further": [t.name for t in merged if t.damped_further],
    }


def share(part: float | None, whole: float | None) -> float | None:
    """``part / whole``, or None where the whole is zero or unknown."""
    return part / whole if part is not None and whole else None


RETAIN_ROLES = frozenset(("retain", "retain data"))
_MAKE_AGAIN = "make it again: tailorcli score ... -o REPORT.json"


def _what_else(report: dict[str, Any]) -> str:
    """What a JSON file is that is no report of tensors, in words."""
    command = report.get("command")
    if isinstance(command, str) and command.isidentifier():
        return f"the report of {command}: only those of patching and scoring are shown"
    return "no report of tailorcli"


def load_report(path: Path) -> PatchReport:
    """What a report file holds. Raises CheckpointError."""
    return read_report(read_json(path), path)


def read_report(report: dict[str, Any], path: Path) -> PatchReport:
    """The report that was read from ``path``, each of its values checked. Raises CheckpointError.

    Its totals are worked out again from its tensors; it has neither stages nor seconds.
    """
    if not isinstance(report.get("tensors"), list) or "totals" not in report:
        raise CheckpointError(f"{path} is {_what_else(report)}", f"pass a {REPORT_FILE} or what score -o wrote")
    version = report.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        what = f"{path} has format_version {ascii(version)[:60]}, expected {FORMAT_VERSION}"
        raise CheckpointError(what, _MAKE_AGAIN)
    try:
        require_plain(report)
        command = one_of(*OPTIONS_SHOWN)(report.get("command"))
        _check_options(report.get("options"))
        inputs = read_inputs(report.get("inputs"))
        records = [read_record(tensor) for tensor in report["tensors"]]
        distillation = _read_distillation(report.get("distillation"))
        more = (distillation, _read_propagation(report.get("propagation")), _read_target(report.get("target")))
        found = PatchReport(command, report["options"], inputs, records, {}, 0.0, (), *more)
        _check_together(found)
        totals = report["totals"] if isinstance(report["totals"], dict) else {}
        lacking = sorted(found.totals.keys() - totals.keys())
        if lacking:
            raise ValueError(f"its totals lack {lacking[0]!r}")
    except ValueError as error:
        raise CheckpointError(f"{path} is malformed: {str(error)[:300]}", _MAKE_AGAIN) from error
    return found


def _read_distillation(found: Any) -> dict[str, Any] | None:
    """What a report says of distillation. Raises ValueError."""
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError("its distillation is no object")
    curves = [found.get(name) for name in ("steps", "new", "retained")]
    steps = curves[0]
    if not isinstance(steps, list) or not all(isinstance(c, list) and len(c) == len(steps) > 0 for c in curves):
        raise ValueError("its distillation has no curves of one length")
    numbers = [value for curve in curves for value in curve or ()]
    if not all(type(value) in (int, float) for value in numbers) or found.get("best") not in steps:
        raise ValueError("its distillation has a figure of the wrong type")
    by_task = found.get("by_task", [[]] * len(steps))
    if not isinstance(by_task, list) or len(by_task) != len(steps) or not all(isinstance(c, list) for c in by_task):
        raise ValueError("its distillation has no figures of each task at every step")
    return dict(found)


def _read_propagation(found: Any) -> dict[str, Any] | None:
    """What a report says of a propagation that was checked. Raises ValueError."""
    if found is None:
        return None
    held = found.get("held_out") if isinstance(found, dict) else None
    if not isinstance(held, dict) or type(found.get("kept")) is not bool:
        raise ValueError("its propagation is not what a check gives")
    losses = [of.get(kind) if isinstance(of, dict) else None for of in held.values() for kind in ("new", "retained")]
    if not all(type(value) in (int, float) for value in losses):
        raise ValueError("its propagation has a figure of the wrong type")
    return dict(found)


def _read_target(found: Any) -> dict[str, Any] | None:
    """What a report says of a search. Raises ValueError."""
    if found is not None and not isinstance(found, dict):
        raise ValueError("its target is no object")
    return found


_NUMBERS = ("density", "omega", "damping", "weight", "retain_weight")  # options that are read again
_TEXTS = ("method", "solver", "threshold")


def _check_options(options: Any) -> None:
    """The options that a table, a picture or a summary shows. Raises ValueError."""
    if not isinstance(options, dict):
        raise ValueError("it has no options")
    for keys, read in ((_NUMBERS, read_number), (_TEXTS, read_text), (("tasks",), list_of(read_text))):
        for key in keys:
            if key in options:
                _named(f"option {key}", read, options[key])


def read_inputs(value: Any) -> dict[str, dict[str, str]]:
    """The inputs of a run by their roles, base among them: the path and the fingerprint of each. Raises ValueError."""
    if not isinstance(value, dict) or "base" not in value:
        raise ValueError("it does not name its inputs")
    for role, entry in value.items():
        for key in ("path", "fingerprint"):
            _named(f"{key} of the {role}", read_text, entry.get(key) if isinstance(entry, dict) else None)
    return value


def _check_together(report: PatchReport) -> None:
    """Records are those of the command, each name once, with figures of every task. Raises ValueError."""
    if len({record.name for record in report.tensors}) != len(report.tensors):
        raise ValueError("a tensor is there twice")
    merged = report.command == MERGE
    if any(record.of_merge != merged for record in report.tensors):
        raise ValueError(f"a record is not one of {report.command}")
    try:
        options_shown(report)
    except KeyError as error:
        raise ValueError(f"it lacks the option {error}") from error
    tasks = len(report.options["tasks"]) if merged else 0
    for record in report.tensors:
        if merged and record.patched and {len(record.kept_by), len(record.errors or record.kept_by)} != {tasks}:
            raise ValueError(f"tensor {ascii(record.name)[:80]} has not a figure for each of {tasks} tasks")


def _named(what: str, read: Reader, value: Any) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def options_shown(report: PatchReport) -> dict[str, Any]:
    """The options of a report that matter to its reader."""
    options, method = report.options, report.options.get("method", "tailor")
    if report.command != "patch" or method == "tailor":
        shown: tuple[str, ...] = OPTIONS_SHOWN[report.command]
    else:
        shown = {
            "interpolate": ("method",),
            "lines": ("method", "alpha", "beta"),
            "dg-hard": ("method", "threshold_scale"),
            "changed": ("method",),
            "fapm": ("method", "density"),
            "dare": ("method", "density", "seed"),
            "magnitude": ("method", "density", "threshold"),
            "graft": ("method", "density", "threshold", "graft_steps", "graft_rate"),
        }.get(method, ("method", "density", "damping"))
    weight = ("weight",) if options.get("weight", 1.0) != 1.0 else ()
    retained = ("retain_weight",) if is_retained(report.inputs) else ()
    propagated = ("propagate",) if options.get("propagate") else ()
    teacher = ("teacher_weight",) if has_teacher(options) else ()
    dense = {"density": density_of(options)} if method in DENSE and method != "changed" else {}
    return {key: options[key] for key in (*shown, *retained, *propagated, *teacher, *weight)} | dense


def has_teacher(options: Mapping[str, Any]) -> bool:
    """Whether a patch with these options goes towards a model between base and tuned, and not to tuned itself."""
    weight = options.get("teacher_weight")
    return isinstance(weight, (int, float)) and weight != 1


def trained_tasks(distillation: Mapping[str, Any]) -> int:
    """How many new tasks the kept entries were trained on, by what a report says of it."""
    return len(distillation["by_task"][0]) if distillation.get("by_task") else 1


def target_in_words(options: Mapping[str, Any], tuned: str = "the tuned model") -> str:
    """What a patch with these options goes towards, and its figures are measured against: ``tuned``, or its teacher."""
    return (
        f"the model {options['teacher_weight']:g} of the way from the base to {tuned}"
        if has_teacher(options)
        else tuned
    )


def is_dense(report: PatchReport) -> bool:
    """Whether no mask says which weights change."""
    return report.command != MERGE and report.options.get("method") in DENSE


def is_retained(inputs: Iterable[str]) -> bool:
    """Whether these inputs of a patch, by role, hold what the base must keep: statistics of it, or their data alone."""
    return not RETAIN_ROLES.isdisjoint(inputs)


def density_of(options: dict[str, Any]) -> float:
    """The density of a patch with these options of its report: 1 where its method changes every entry."""
    return 1.0 if options.get("method") in DENSE else float(options["density"])
