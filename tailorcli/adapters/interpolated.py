"""The model between base and tuned, seen as a checkpoint: base + weight * (tuned - base), formed tensor by tensor.

Tuned may have been trained too long to be the best teacher of its own task; a point on the way to it need not have.
Nothing is written: ``InterpolatedCheckpoint.read`` forms one tensor at a time.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from tailorcli.adapters.checkpoint import config_folder
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, TensorInfo

if TYPE_CHECKING:
    import torch


class InterpolatedCheckpoint(Checkpoint):
    """base + weight * (tuned - base) under tuned's names, in float32 (float64 where either is), not rounded.

    Beyond 1, ``weight`` goes on past tuned. Tensors that hold no weights are tuned's. Both checkpoints stay open as
    long as this is in use and belong to the caller; the config is that by which tuned runs.
    """

    is_found = False

    def __init__(self, base: Checkpoint, tuned: Checkpoint, weight: float) -> None:
        self.base = base
        self.tuned = tuned
        self.weight = weight
        self.absent = tuned.absent
        self.dequantized = tuned.dequantized
        self._formed = {
            name
            for name, info in tuned.tensors.items()
            if info.dtype in PATCHABLE_DTYPES
            and name in base.tensors
            and base.tensors[name].shape == info.shape
            and base.tensors[name].dtype in PATCHABLE_DTYPES
            and name not in tuned.scales
        }
        tensors = {name: self._info(info) for name, info in tuned.tensors.items()}
        super().__init__(config_folder(tuned), tensors, [*base.shards, *tuned.shards])

    def _info(self, info: TensorInfo) -> TensorInfo:
        if info.name not in self._formed:
            return info
        wide = "F64" if "F64" in (info.dtype, self.base.tensors[info.name].dtype) else "F32"
        return replace(info, dtype=wide, offset=0, nbytes=info.numel * (8 if wide == "F64" else 4))

    @property
    def scales(self) -> frozenset[str]:
        """Those of tuned."""
        return self.tuned.scales

    def read_cost(self, name: str) -> int:
        """Bytes that ``read`` takes from the disk."""
        return self.tuned.read_cost(name) + (self.base.read_cost(name) if name in self._formed else 0)

    def read(self, name: str, pinned: bool = False) -> torch.Tensor:
        """One tensor on the CPU, in memory of its own."""
        import torch

        if name not in self._formed:
            return self.tuned.read(name, pinned)
        dtype = torch.float64 if self.tensors[name].dtype == "F64" else torch.float32
        formed = self.base.read(name).to(dtype).lerp_(self.tuned.read(name).to(dtype), self.weight)
        return formed.pin_memory() if pinned else formed

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``start`` on; it is formed for that as a whole."""
        import torch

        if info.name not in self._formed:
            self.tuned.read_into(self.tuned.tensors[info.name], buffer, start)
            return
        raw = self.read(info.name).view(-1).view(torch.uint8)
        buffer[:] = raw[start : start + len(buffer)].numpy().data

    def fingerprint(self) -> str:
        """A hash of both fingerprints and the weight."""
        facts = f"{self.base.fingerprint()} {self.tuned.fingerprint()} {self.weight!r}"
        return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


def interpolated(base: Checkpoint, tuned: Checkpoint, weight: float | None) -> Checkpoint:
    """The view of the model at ``weight`` on the way from base to tuned; tuned itself for 1 or None."""
    return tuned if weight in (None, 1.0) else InterpolatedCheckpoint(base, tuned, float(weight or 0.0))


def original(tuned: Checkpoint) -> Checkpoint:
    """The checkpoint of which ``tuned`` may be such a view."""
    return tuned.tuned if isinstance(tuned, InterpolatedCheckpoint) else tuned
