"""A checkpoint under other names: those of its counterpart, which stores the same tensors in another layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class RenamedCheckpoint(Checkpoint):
    """``stored`` with the tensor names of another checkpoint: ``names`` maps each of them to the name in its files.

    ``absent`` are names that the other checkpoint has besides, of tensors that no model needs.
    """

    def __init__(self, stored: Checkpoint, names: Mapping[str, str], absent: frozenset[str]) -> None:
        tensors = {name: replace(stored.tensors[own], name=name) for name, own in names.items()}
        super().__init__(stored.path, tensors, stored.shards)
        self.stored = stored
        self.names = names
        self.absent = absent
        self.dequantized = stored.dequantized

    def read_cost(self, name: str) -> int:
        """Bytes that ``read`` takes from the disk."""
        return self.stored.read_cost(self.names[name])

    def read(self, name: str, pinned: bool = False) -> Tensor:
        """One tensor, as its checkpoint reads it."""
        return self.stored.read(self.names[name], pinned)

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``start`` on."""
        self.stored.read_into(self.stored.tensors[self.names[info.name]], buffer, start)

    def fingerprint(self) -> str:
        """That of the checkpoint under its own names."""
        return self.stored.fingerprint()

    def close(self) -> None:
        """Close the files."""
        self.stored.close()
