"""What there is to do in a job, counted: multiply-adds, entries and bytes of each tensor, by its statistics."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint

_BLOCK = re.compile(r"(.*?\.\d+)\.")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class Piece:
    """One tensor: its entries, the channels I of its Hessian, how many of these it has, and which block it is in.

    ``reached`` is the share of the tokens that pass it: below 1 for one of several experts.
    """

    name: str
    block: str  # "" outside the blocks
    hessian: str  # that of its group; of fused experts the first
    channels: int
    hessians: int  # fused experts have several
    full: bool
    numel: int
    nbytes: int
    reached: float


@dataclass(frozen=True)
class Work:
    """All tensors that have statistics, and the model around them."""

    pieces: tuple[Piece, ...]
    model_bytes: int  # as it is stored
    block_bytes: dict[str, int]
    stats_bytes: int  # triangles, as they are stored
    products: float  # multiply-adds of a token on its way through the blocks

    @classmethod
    def of(cls, model: Checkpoint, stats: Stats, config: dict[str, Any], chosen: Iterable[str] | None = None) -> Work:
        """Count ``chosen`` tensors of a model, or all; ``stats`` may be those that are expected."""
        names = set(model.tensors if chosen is None else chosen)
        share = _share_reached(stats, config)
        pieces: list[Piece] = []
        blocks: dict[str, int] = {}
        products = 0.0
        for name, info in model.tensors.items():
            block = block_of(name)
            blocks[block] = blocks.get(block, 0) + info.nbytes
            entry = stats.tensors.get(name)
            hessians = entry.hessians if entry is not None else []
            reached = share if hessians and hessians[0].endswith("]") else 1.0
            products += info.numel * reached if block and len(info.shape) > 1 else 0.0
            if hessians and name in names:
                first = stats.hessians[hessians[0]]
                sizes = (first.size, len(hessians), first.kind == "full", info.numel, info.nbytes)
                pieces.append(Piece(name, block, hessians[0], *sizes, reached))
        stored = sum(4 * info.stored_numel for info in stats.hessians.values())
        return cls(tuple(pieces), model.nbytes, blocks, stored, products)

    @cached_property
    def groups(self) -> list[list[Piece]]:
        """Tensors that share a Hessian, full ones and others."""
        groups: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            groups.setdefault(piece.hessian, []).append(piece)
        return list(groups.values())

    @cached_property
    def full(self) -> list[Piece]:
        """One tensor of each group that has a full Hessian."""
        return [group[0] for group in self.groups if group[0].full]

    @property
    def hessian_bytes(self) -> int:
        """Bytes of all full Hessians as they are gathered, (I, I) in float32."""
        return sum(4 * piece.hessians * piece.channels**2 for piece in self.full)

    @property
    def widest_bytes(self) -> int:
        """Bytes of the Hessians of the one block that has the most."""
        held: dict[str, int] = {"": 0}
        for piece in self.full:
            held[piece.block] = held.get(piece.block, 0) + 4 * piece.hessians * piece.channels**2
        return max(held.values())

    @property
    def gathered(self) -> float:
        """Multiply-adds of a token that is folded into all Hessians."""
        return sum(piece.hessians * piece.channels**2 * piece.reached for piece in self.full)


def block_of(name: str) -> str:
    """The block that a tensor is in, up to the first number of its name; "" where it has none."""
    found = _BLOCK.match(name)
    return found[1] if found is not None else ""


def _share_reached(stats: Stats, config: dict[str, Any]) -> float:
    """The share of the tokens that reach an expert: so many are chosen of so many."""
    parts: dict[str, set[str]] = {}
    for name in stats.hessians:
        parameter, bracket, part = name.partition("[")
        if bracket and part != "all]":
            parts.setdefault(parameter, set()).add(part)
    most = max((len(found) for found in parts.values()), default=1)
    inner = config.get("text_config")
    for fields in (config, inner if isinstance(inner, dict) else {}):
        for name in _CHOSEN:
            if isinstance(fields.get(name), int):
                return min(1.0, max(1, int(fields[name])) / most)
    return 1.0
