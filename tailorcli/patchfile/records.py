"""What a report says of one tensor, and how it is read back, every value checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from tailorcli.typed import (
    Reader,
    list_of,
    maybe,
    one_of,
    read_amount,
    read_count,
    read_flag,
    read_number,
    read_shape,
    read_text,
    wrong,
)

PATCHED, AT_BASE = "patched", "base"  # the two states of a tensor


def _read_retain(value: Any) -> tuple[str, ...]:
    return (read_text(value),) if isinstance(value, str) else list_of(read_text)(value)


@dataclass(frozen=True)
class TensorRecord:
    """What a run did to one tensor of the base; every field is named as in the report file.

    ``error_*`` are relative layer errors, ``*_energy`` and sums as in ``core.figures.LayerFigures``, or, where it was
    propagated, as in ``core.propagation.PropagatedErrors``. The figures of a tensor that stays at base are 0 or None,
    and the file leaves them out. With ``of_merge`` it is a record of
    ``merge-multi``: ``method`` is how the tasks were merged, and ``errors``, ``kept_by`` have a figure for each task.
    """

    name: str
    status: str  # PATCHED or AT_BASE
    shape: tuple[int, ...]
    dtype: str
    reason: str = ""  # why it stays at base
    role: str = ""
    hessian: str | None = None
    kind: str | None = None  # of its Hessian: full, diagonal
    tokens: int | None = None  # behind its Hessian
    experts: tuple[str, ...] = ()  # their Hessians, where it fuses experts
    note: str = ""
    retain: tuple[str, ...] = ()  # the retained data's Hessians

    kept: int = 0
    zero_delta: int = 0
    delta_sq: float = 0.0
    delta_sq_kept: float = 0.0
    distance_tuned: float = 0.0
    distance_before: float = 0.0
    distance_after: float | None = None
    salience_quantiles: tuple[float, ...] = ()
    sensitivity_sum: float | None = None
    sensitivity_kept: float | None = None
    sensitivity_quantiles: tuple[float, ...] | None = None
    dead_channels: int | None = None
    damping: float | None = None
    output_energy: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    drift_energy: float | None = None
    drift: float | None = None
    iterations: int | None = None
    residual: float | None = None
    damped_further: bool | None = None

    propagated: bool = False
    input_shift: float | None = None
    retained_input_shift: float | None = None
    output_energy_unpatched_inputs: float | None = None  # these five are missing in early reports
    error_before_unpatched_inputs: float | None = None
    error_after_unpatched_inputs: float | None = None
    drift_energy_unpatched_inputs: float | None = None
    drift_unpatched_inputs: float | None = None

    of_merge: bool = False
    method: str | None = None
    errors: tuple[float, ...] | None = None
    kept_by: tuple[int, ...] = ()
    kept_by_all: int = 0
    jaccard: float | None = None
    pairs: tuple[float | None, ...] = ()  # the Jaccard index of each two tasks
    shared: int = 0
    sign_conflicts: int = 0

    @property
    def patched(self) -> bool:
        """Whether it differs from the base, or might."""
        return self.status == PATCHED

    @property
    def numel(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    def trained(self, distance: float) -> TensorRecord:
        """The record once other values stand in its entries: the ``distance`` sum |W - W_base| of these.

        It has no layer errors and no drift, which are of the values before: no statistics are read for them again.
        """
        stale: dict[str, Any] = dict.fromkeys(
            ("error_before", "error_after", "drift_energy", "drift", "errors", *_UNPATCHED)
        )
        return replace(self, **stale, distance_after=None if self.of_merge else distance)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report, in its order."""
        keys = [*_MERGED] if self.of_merge else [*_FIRST, *(key for key in _WHERE_ANY if getattr(self, key))]
        if self.patched and self.of_merge:
            keys += [*_MERGE_FIGURES, *(key for key in _MERGE_SOLVED if getattr(self, key) is not None)]
        elif self.patched:
            keys += _FIGURES
        if self.patched and self.propagated:
            keys += [*_PROPAGATED, *(key for key in _UNPATCHED if getattr(self, key) is not None)]
        values = {key: getattr(self, key) for key in keys}
        if len(self.retain) == 1 and not self.of_merge:
            values["retain"] = self.retain[0]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def fields_of(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures of ``core`` as fields of a record: lists become tuples; ``numel`` is told by the shape."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in figures.items() if key != "numel"}


_FIRST = ("name", "status", "reason", "role", "shape", "dtype", "hessian", "kind", "tokens")
_WHERE_ANY = ("experts", "note", "retain")
_SUMS = ("numel", "kept", "zero_delta", "delta_sq", "delta_sq_kept", "distance_tuned", "distance_before")
_FIGURES = (
    *(*_SUMS, "distance_after", "salience_quantiles", "sensitivity_sum", "sensitivity_kept", "sensitivity_quantiles"),
    *("dead_channels", "damping", "output_energy", "error_before", "error_after", "drift_energy", "drift"),
    *("iterations", "residual", "damped_further"),
)
_PROPAGATED = ("propagated", "input_shift", "retained_input_shift")
_UNPATCHED = tuple(  # figures on the inputs of the unpatched models, beside those on the patched model's own
    f"{name}_unpatched_inputs" for name in ("output_energy", "error_before", "error_after", "drift_energy", "drift")
)
_MERGED = ("name", "status", "reason", "method", "role", "shape", "dtype", "hessian", "kind", "errors")
_MERGE_FIGURES = ("numel", "kept", "kept_by", "kept_by_all", "jaccard", "pairs", "shared", "sign_conflicts")
_MERGE_SOLVED = ("iterations", "residual", "damping", "damped_further")
_LATER = {"drift_energy", "drift", "pairs"}  # figures that an early report may lack

_READERS: dict[str, Reader] = {
    "name": read_text,
    "status": one_of(PATCHED, AT_BASE),
    "reason": read_text,
    "role": read_text,
    "shape": read_shape,
    "dtype": read_text,
    "hessian": maybe(read_text),
    "kind": maybe(one_of("full", "diagonal")),
    "tokens": maybe(read_count),
    "experts": list_of(read_text),
    "note": read_text,
    "retain": _read_retain,
    **dict.fromkeys(("numel", "kept", "zero_delta", "kept_by_all", "shared", "sign_conflicts"), read_count),
    **dict.fromkeys(("delta_sq", "delta_sq_kept", "distance_tuned", "distance_before"), read_amount),
    **dict.fromkeys(("distance_after", "damping", "residual", "jaccard"), maybe(read_amount)),
    **dict.fromkeys(("salience_quantiles",), list_of(read_number)),
    **dict.fromkeys(("sensitivity_quantiles", "errors"), maybe(list_of(read_number))),
    **dict.fromkeys(("sensitivity_sum", "sensitivity_kept", "output_energy"), maybe(read_number)),
    **dict.fromkeys(("error_before", "error_after", "drift_energy", "drift"), maybe(read_number)),
    **dict.fromkeys(("input_shift", "retained_input_shift", *_UNPATCHED), maybe(read_number)),
    **dict.fromkeys(("dead_channels", "iterations"), maybe(read_count)),
    "damped_further": maybe(read_flag),
    "propagated": read_flag,
    "method": maybe(read_text),
    "kept_by": list_of(read_count),
    "pairs": list_of(maybe(read_amount)),
}


def read_record(value: Any) -> TensorRecord:
    """The record that ``TensorRecord.to_dict`` wrote; keys of a later version are left out.

    Raises ValueError that names the tensor and the field.
    """
    if not isinstance(value, dict):
        raise wrong(value, "the record of a tensor")
    of_merge = "method" in value
    try:
        read = {key: _read_field(key, entry) for key, entry in value.items() if key in _READERS}
        needed = {*(_MERGED if of_merge else _FIRST)}
        if read.get("status") == PATCHED:
            needed |= {*(_MERGE_FIGURES if of_merge else _FIGURES)} - _LATER
        missing = sorted(needed - read.keys())
        if missing:
            raise ValueError(f"it lacks {missing[0]!r}")
        numel = read.pop("numel", None)
        record = TensorRecord(**read, of_merge=of_merge)
        _check_counts(record, numel)
    except ValueError as error:
        raise ValueError(f"tensor {ascii(value.get('name'))[:80]}: {error}") from error
    return record


def _read_field(key: str, value: Any) -> Any:
    try:
        return _READERS[key](value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _check_counts(record: TensorRecord, numel: int | None) -> None:
    """What is counted of a tensor fits its shape. Raises ValueError."""
    if numel not in (None, record.numel):
        raise ValueError(f"numel is {numel}, its shape has {record.numel}")
    counts = (record.kept, record.zero_delta, record.kept_by_all, record.shared, record.sign_conflicts, *record.kept_by)
    if any(count > record.numel for count in counts):
        raise ValueError(f"a count of it is above its {record.numel} entries")
    if record.patched and record.of_merge and record.method is None:
        raise ValueError("it names no method")
    if record.propagated and None in (record.input_shift, record.retained_input_shift):
        raise ValueError("it is propagated without a shift of its inputs")
