"""A base whose vocabulary is smaller than the tuned model's: the new rows of its tables are taken from tuned."""

from __future__ import annotations

from dataclasses import replace

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import TensorInfo
from tailorcli.errors import CheckpointError, OptionsError


class GrownCheckpoint(Checkpoint):
    """``base`` with the shapes of ``tuned`` where tuned has more rows; those rows read as tuned's own.

    Tuned minus base is zero there, so that a mask chooses among the common rows, and the new ones stay as they are.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, grown: set[str]) -> None:
        tensors = {
            name: _grown(info, tuned.tensors[name]) if name in grown else info for name, info in base.tensors.items()
        }
        super().__init__(base.path, tensors, base.shards)
        self.grown = grown
        self.stored = base
        self._tuned = tuned

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``start`` on: the base's, then tuned's."""
        common = self.stored.tensors[info.name].nbytes
        own = min(max(common - start, 0), len(buffer))
        if own:
            super().read_into(info, buffer[:own], start)
        if own < len(buffer):
            self._tuned.read_into(self._tuned.tensors[info.name], buffer[own:], start + own)

    def fingerprint(self) -> str:
        """That of the base as it is stored."""
        return self.stored.fingerprint()

    def new_rows(self, name: str) -> int:
        """Rows that are tuned's own."""
        return self.tensors[name].shape[0] - self.stored.tensors[name].shape[0]


def numel_of_base(base: Checkpoint, name: str) -> int:
    """Entries that the base itself has of a tensor, without rows that are tuned's: what a density is a share of."""
    own = base.stored if isinstance(base, GrownCheckpoint) else base
    return own.tensors[name].numel


def _grown(info: TensorInfo, tuned: TensorInfo) -> TensorInfo:
    return replace(info, shape=tuned.shape, nbytes=tuned.nbytes)


def grow_vocabulary(base: Checkpoint, tuned: Checkpoint) -> GrownCheckpoint:
    """``base`` grown to the rows of ``tuned``. Raises an error where tuned has no more rows, or differs otherwise."""
    grown, pairs = set(), set()
    for name, info in base.tensors.items():
        other = tuned.tensors.get(name)
        if other is None or other.shape == info.shape:
            continue
        if info.shape[1:] != other.shape[1:] or not info.shape or other.shape[0] < info.shape[0]:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(info.shape)} in base and {list(other.shape)} in tuned: that is no "
                "vocabulary that grew",
                "pass checkpoints of one architecture and size",
            )
        if info.dtype != other.dtype:
            raise CheckpointError(
                f"tensor {name!r} is {info.dtype} in base and {other.dtype} in tuned: its new rows do not fit",
                "save both in one dtype",
            )
        grown.add(name)
        pairs.add((info.shape[0], other.shape[0]))
    if not grown:
        raise OptionsError("--resized-vocab: no tensor of tuned has more rows than in base", "leave it out")
    if len(pairs) > 1:
        sizes = ", ".join(f"{before} to {after}" for before, after in sorted(pairs))
        raise CheckpointError(
            f"tables of tuned grew by different numbers of rows ({sizes}): that is no resized vocabulary",
            "pass checkpoints of one architecture and size",
        )
    return GrownCheckpoint(base, tuned, grown)
