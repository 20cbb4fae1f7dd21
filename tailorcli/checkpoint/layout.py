"""Where every tensor of a new checkpoint goes: shards, offsets and headers, before a byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailorcli.checkpoint.folder import SINGLE_FILE, Checkpoint
from tailorcli.checkpoint.header import TensorInfo, build_header, header_entry


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in the output: a shard's name and the bytes from ``offset`` of it."""

    shard: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ShardLayout:
    """Every shard's header, and every tensor's slot."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    slots: dict[str, Slot]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(self.sizes.values())


def split_shards(sizes: Sequence[tuple[str, int]], max_shard_size: int) -> list[list[str]]:
    """Names in order, cut into shards of at most ``max_shard_size`` bytes; a larger tensor gets a shard alone.

    >>> split_shards([("a", 3), ("b", 2), ("c", 2), ("d", 9), ("e", 1)], max_shard_size=5)
    [['a', 'b'], ['c'], ['d'], ['e']]
    """
    shards: list[list[str]] = []
    filled = 0
    for name, nbytes in sizes:
        if not shards or filled + nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def plan_layout(base: Checkpoint, max_shard_size: int | None) -> ShardLayout:
    """Where each tensor goes: the base's own sharding, or a new one under ``max_shard_size`` bytes a shard.

    Shards of the base of which the output has no tensor are left out, and the others numbered anew.
    """
    by_file: dict[str, list[str]] = {}
    if max_shard_size is None:
        for info in base.output_tensors.values():
            by_file.setdefault(info.file.relative_to(base.path).as_posix(), []).append(info.name)
        if len(by_file) < len(base.shards):
            by_file = _named(list(by_file.values()))
    else:
        by_file = _named(
            split_shards([(info.name, info.nbytes) for info in base.output_tensors.values()], max_shard_size)
        )
    headers, sizes, slots = {}, {}, {}
    for file_name, tensor_names in by_file.items():
        header, placed = _lay_out([base.output_tensors[name] for name in tensor_names])
        headers[file_name] = header
        for info, offset in placed:
            slots[info.name] = Slot(file_name, offset, info.nbytes)
        sizes[file_name] = len(header) + sum(info.nbytes for info, _ in placed)
    return ShardLayout(headers, sizes, slots)


def _named(shards: list[list[str]]) -> dict[str, list[str]]:
    """The names in each shard by that of its file."""
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return dict(zip(names if count > 1 else [SINGLE_FILE], shards, strict=True))


def _lay_out(infos: Sequence[TensorInfo]) -> tuple[bytes, list[tuple[TensorInfo, int]]]:
    """A shard's header, and each tensor's offset in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, []
    for info in infos:
        entries[info.name] = header_entry(info.dtype, info.shape, position, position + info.nbytes)
        starts.append(position)
        position += info.nbytes
    header = build_header(entries)
    return header, [(info, len(header) + start) for info, start in zip(infos, starts, strict=True)]
