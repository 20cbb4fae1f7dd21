"""What a report says of one tensor, and the checks of every value that is read back from a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATCHED, AT_BASE = "patched", "base"  # the two states of a tensor
_MOST_ENTRIES = 1 << 62
_MOST_DIMENSIONS = 64
_LARGEST = 1e300  # so that sums over tensors stay finite, too
_DEEPEST = 32  # levels of a JSON value
Reader = Callable[[Any], Any]


def require_plain(value: Any, depth: int = 0) -> None:
    """``value`` is JSON that can be written and printed again: finite numbers, encodable text, few levels.

    Raises ValueError that says what is not.
    """
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    if isinstance(value, str):
        read_text(value)
    elif isinstance(value, dict):
        for key, entry in value.items():
            read_text(key)
            require_plain(entry, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            require_plain(entry, depth + 1)
    elif value is not None and not isinstance(value, bool):
        read_number(value)


def _wrong(value: Any, expected: str) -> ValueError:
    return ValueError(f"it is {ascii(value)[:60]}, expected {expected}")


def read_text(value: Any) -> str:
    """Text that UTF-8 can hold: no lone surrogate. Raises ValueError."""
    if not isinstance(value, str):
        raise _wrong(value, "text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _wrong(value, "text without lone surrogates") from error
    return value


def read_count(value: Any) -> int:
    """A whole number from 0 to 2^62. Raises ValueError."""
    if type(value) is not int or not 0 <= value < _MOST_ENTRIES:
        raise _wrong(value, "a whole number, 0 or more")
    return value


def read_number(value: Any) -> float:
    """A finite number, as it is written: whole ones stay so. Raises ValueError."""
    if type(value) not in (int, float) or not -_LARGEST <= value <= _LARGEST:  # NaN fails every comparison
        raise _wrong(value, "a finite number")
    return value  # type: ignore[no-any-return]


def read_amount(value: Any) -> float:
    """A finite number from 0. Raises ValueError."""
    if read_number(value) < 0:
        raise _wrong(value, "a number, 0 or more")
    return value  # type: ignore[no-any-return]


def read_flag(value: Any) -> bool:
    """True or False. Raises ValueError."""
    if type(value) is not bool:
        raise _wrong(value, "true or false")
    return value


def read_shape(value: Any) -> tuple[int, ...]:
    """The sizes of a tensor. Raises ValueError."""
    shape: tuple[int, ...] = list_of(read_count)(value)
    if len(shape) > _MOST_DIMENSIONS or math.prod(shape) >= _MOST_ENTRIES:
        raise _wrong(value, "the shape of a tensor")
    return shape


def list_of(read: Reader) -> Reader:
    """A reader of lists, which become tuples."""

    def read_list(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise _wrong(value, "a list")
        return tuple(read(entry) for entry in value)

    return read_list


def maybe(read: Reader) -> Reader:
    """A reader that also takes null."""
    return lambda value: None if value is None else read(value)


def one_of(*choices: str) -> Reader:
    """A reader of one of these words."""

    def read_choice(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise _wrong(value, " or ".join(choices))
        return value

    return read_choice


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
        raise _wrong(value, "the record of a tensor")
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
