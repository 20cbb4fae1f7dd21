"""What a run will do with each tensor, worked out from headers before any work."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailorcli.checkpoint.layout import ShardLayout
from tailorcli.patchfile.records import AT_BASE, PATCHED, TensorRecord
from tailorcli.typed import plain

RUNTIME_BYTES = 400 << 20  # the interpreter with torch loaded
BARE_BYTES = 100 << 20  # with NumPy alone


@dataclass(frozen=True)
class TensorPlan:
    """One tensor's treatment: ``patch`` with a Hessian (or by salience alone), or ``base`` with a reason."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    action: str  # "patch" or "base"
    reason: str = ""
    hessian: str | None = None
    role: str = ""
    transposed: bool = False
    experts: tuple[str, ...] = ()  # a Hessian for each slice of a tensor that fuses experts, instead of one
    retained_hessians: tuple[str, ...] = ()  # one for each of `hessians`; empty without a retain term
    note: str = ""  # why it has none, where others do
    method: str = ""  # how it is patched, of merges and of what is no Model Tailor
    task_hessians: tuple[str, ...] = ()  # of merged tasks, one of each, where it is solved or measured with them
    held_bytes: int = 0  # of memory while it is worked on
    weight: float | None = None  # the share of the way that its entries go, where tensors differ in that
    copies: tuple[str, ...] = ()  # further names under which the very same tensor is stored
    by_statistics: bool = False  # it stays at base for what statistics say, or are expected to say, of it

    @property
    def names(self) -> tuple[str, ...]:
        """Every name under which it is stored."""
        return (self.name, *self.copies)

    @property
    def numel(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def shared_hessians(self) -> tuple[str, ...]:
        """The Hessians that are prepared once for it and for those beside it that use the same; experts' are not."""
        own = (self.hessian, *self.retained_hessians) if self.hessian is not None else ()
        return self.task_hessians or own

    @property
    def hessians(self) -> tuple[str, ...]:
        """Every Hessian that it uses."""
        return self.experts or ((self.hessian,) if self.hessian is not None else ())

    def to_record(self, *, patched: bool, **figures: Any) -> TensorRecord:
        """What a report says of it, with ``figures`` and whatever else is named as in ``TensorRecord``."""
        found: dict[str, Any] = {
            "name": self.name,
            "status": PATCHED if patched else AT_BASE,
            "reason": self.reason,
            "role": self.role,
            "shape": self.shape,
            "dtype": self.dtype,
            "hessian": self.hessian,
        }
        return TensorRecord(**found | figures)

    def to_dict(self) -> dict[str, Any]:
        """Plain values of all but ``by_statistics``; ``retained_hessians`` is called ``retain``, as in reports."""
        found = {"retain" if name == "retained_hessians" else name: value for name, value in asdict(self).items()}
        del found["by_statistics"]
        return {name: plain(value) for name, value in found.items()}


@dataclass(frozen=True)
class TrainingPlan:
    """What training the kept entries will take at its fullest; on a CPU both kinds of memory are its own."""

    steps: int  # at most
    device: str
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class SearchPlan:
    """What a search for a target tries: a closed form at each density, then some trainings at one of them."""

    target: str
    densities: tuple[float, ...]  # rising; the other figures of a plan are of the last
    trainings: int  # at most

    def __str__(self) -> str:
        tried = f"closed forms at densities {self.densities[0]:g} to {self.densities[-1]:g}"
        return f"{tried}, then at most {self.trainings} trainings"


@dataclass(frozen=True)
class Plan:
    """All tensors in the order of work (those that share a Hessian side by side) and what the run will cost."""

    tensors: tuple[TensorPlan, ...]
    layout: ShardLayout
    read_bytes: int
    write_bytes: int
    patch_bytes: int  # of a patch file, at most
    peak_bytes: int
    propagates: bool = False  # the models are run over the statistics' samples
    training: TrainingPlan | None = None  # of the kept entries, once they are there
    search: SearchPlan | None = None  # before it

    @property
    def patched(self) -> list[TensorPlan]:
        """Tensors that will be patched."""
        return [tensor for tensor in self.tensors if tensor.action == "patch"]

    @property
    def left_at_base(self) -> list[TensorPlan]:
        """Tensors that stay as they are in the base."""
        return [tensor for tensor in self.tensors if tensor.action != "patch"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--dry-run --json``."""
        return {
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "shards": self.layout.sizes,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "patch_bytes": self.patch_bytes,
            "peak_memory_bytes": self.peak_bytes,
            "propagates": self.propagates,
            **({"training": asdict(self.training)} if self.training is not None else {}),
            **({"search": plain(asdict(self.search))} if self.search is not None else {}),
        }


_CARD_BYTES = 1 << 14  # of a model card
_REPORT_BYTES = 3072  # of a tensor's record in the report that a patch file carries, without the names in it


def most_patch_bytes(
    kept: Iterable[tuple[TensorPlan, int]], tensors: Iterable[TensorPlan], side_files: Iterable[Path | bytes]
) -> int:
    """An upper bound for a patch file: so many kept entries of tensors, a report of all, and side files."""
    header = (1 << 16) + _CARD_BYTES
    entries = sum(n * t.nbytes // max(t.numel, 1) + t.numel // 8 + 2048 for t, n in kept)
    report = sum(_REPORT_BYTES + 8 * len(tensor.name) for tensor in tensors)
    return header + entries + report + sum(_size(source) for source in side_files)


def _size(source: Path | bytes) -> int:
    if isinstance(source, bytes):
        return len(source)
    return source.stat().st_size if source.is_file() else 0


def group_by_hessian(tensors: list[TensorPlan]) -> list[TensorPlan]:
    """File order, but tensors that share a Hessian follow the first of them."""
    groups: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        key = f"hessian {tensor.hessian} {tensor.retained_hessians}" if tensor.hessian else f"tensor {tensor.name}"
        groups.setdefault(key, []).append(tensor)
    return [tensor for group in groups.values() for tensor in group]
