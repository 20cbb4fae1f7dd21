"""Running Hessians by name: made as they are needed, folded into, and given up."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorcli.calibration.stats import HessianInfo
from tailorcli.core.hessian import accumulate_, accumulate_diagonal_, diagonal_of, pack_triangle, unpack_triangle
from tailorcli.distributed import now_on, ranks, shares, summed_at
from tailorcli.errors import NumericalError


@dataclass
class Accumulator:
    """A running Hessian, (I, I) or (I,), and the tokens averaged so far."""

    hessian: Tensor
    tokens: int = 0

    def add_rows(self, rows: Tensor) -> None:
        """Fold the inputs (N, I) of a linear layer, in any float dtype."""
        self.tokens = accumulate_(self.hessian, rows, self.tokens)

    def add_channels(self, rows: Tensor) -> None:
        """Fold the inputs (N, I) of a scale, in any float dtype: each channel stands alone."""
        squares = rows.to(self.hessian.dtype).square().sum(0)
        self.tokens = accumulate_diagonal_(self.hessian, squares, rows.shape[0], self.tokens)

    def add_ids(self, ids: Tensor, samples: int) -> None:
        """Fold one-hot inputs, given by the rows that they look up; ``samples`` are those of the batch."""
        # Positions, also relative ones, have no batch dimension of their own: they count for every sample.
        shared = ids.dim() == 1 or ids.shape[0] == 1 or _are_relative(ids)
        repeats = samples if shared else 1
        squares = torch.bincount(ids.flatten(), minlength=len(self.hessian)) * repeats
        self.tokens = accumulate_diagonal_(self.hessian, squares, ids.numel() * repeats, self.tokens)


class Accumulators:
    """The Hessians of a model, or of one of its blocks, by name; among ranks, those of this rank's samples.

    Once ``counts`` of all ranks are joined, tokens are those of all, and ``give_joint`` gives the Hessians of all.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._device = device
        self._dtype = dtype  # of the sums
        self._by_name: dict[str, Accumulator] = {}
        self._totals: dict[str, int] = {}  # tokens of all ranks, once they are known

    def counts(self) -> dict[str, tuple[int, ...]]:
        """Of each Hessian its shape and, last, the tokens of this rank."""
        return {name: (*found.hessian.shape, found.tokens) for name, found in self._by_name.items()}

    def join_counts(self, counts: Mapping[str, tuple[int, ...]]) -> None:
        """Take the next rank's counts into the totals; a Hessian that only it has is one of no token here."""
        for name, (*shape, tokens) in counts.items():
            self.get(name, len(shape) == 2, shape[0])
            self._totals[name] = self._totals.get(name, 0) + tokens

    @property
    def itemsize(self) -> int:
        """Bytes of a number while it is summed."""
        return self._dtype.itemsize

    def get(self, name: str, full: bool, size: int) -> Accumulator:
        """The Hessian of that name, of no token yet where it is new."""
        if name not in self._by_name:
            zeros = torch.zeros((size, size) if full else (size,), dtype=self._dtype, device=self._device)
            self._by_name[name] = Accumulator(zeros)
        return self._by_name[name]

    def tokens_of(self, name: str) -> int:
        """Tokens folded into a Hessian so far, by all ranks once they are joined; 0 where there is none."""
        if name in self._totals:
            return self._totals[name]
        return self._by_name[name].tokens if name in self._by_name else 0

    def pool(self, name: str, parts: Sequence[str], size: int) -> None:
        """Make the Hessian (I, I) of that name the mean over the tokens of ``parts``."""
        found = [self._by_name[part] for part in parts if part in self._by_name]
        mean = self.get(name, True, size)
        mean.tokens = sum(part.tokens for part in found)
        for part in found:
            if part.tokens:
                mean.hessian.add_(part.hessian, alpha=part.tokens / mean.tokens)
        if self._totals:
            self._totals[name] = sum(self.tokens_of(part) for part in parts)

    def resume(self, name: str, info: HessianInfo, packed: Tensor) -> None:
        """Go on with a Hessian that was packed before: its block is called again."""
        hessian = packed.to(self._device, self._dtype)
        full = unpack_triangle(hessian, info.size) if info.kind == "full" else hessian
        self._by_name[name] = Accumulator(full, info.tokens)

    def give(self, used: Container[str | None]) -> Iterator[tuple[str, HessianInfo, Tensor]]:
        """Give up every Hessian in float32, one at a time, those in ``used``.

        Of a full one the lower triangle is valid. Raises NumericalError if the activations were not finite.
        """
        for name in list(self._by_name):
            accumulator = self._by_name.pop(name)
            if name in used:
                hessian = accumulator.hessian
                yield name, _info(name, hessian.dim() == 2, accumulator.tokens, diagonal_of(hessian)), hessian.float()

    def give_joint(self, used: Container[str | None]) -> Iterator[tuple[str, HessianInfo, Tensor | None]]:
        """``give`` for ranks whose counts are joined: every Hessian is that of all tokens, packed, on one of the ranks.

        The others have None, and no more than its size and tokens. Raises NumericalError as ``give``.
        """
        names = [name for name in self._totals if name in used]  # in the same order on all ranks
        found = [self._by_name[name] for name in names]
        self._by_name.clear()
        divided = shares([each.hessian.numel() for each in found], ranks().size)
        owners = {position: rank for rank, positions in enumerate(divided) for position in positions}
        for position, name in enumerate(names):
            now_on(name)
            accumulator, found[position] = found[position], Accumulator(torch.empty(0))
            total, full = self._totals[name], accumulator.hessian.dim() == 2
            size = len(accumulator.hessian)
            packed = pack_triangle(accumulator.hessian) if full else accumulator.hessian
            packed.mul_(accumulator.tokens / max(total, 1))  # running means, each with the weight of its tokens
            del accumulator
            summed_at(packed, owners[position])
            if owners[position] != ranks().rank:
                yield name, HessianInfo(size, "full" if full else "diagonal", total), None
                continue
            rows = torch.arange(size, device=packed.device)
            diagonal = packed[rows * (rows + 3) // 2] if full else packed
            yield name, _info(name, full, total, diagonal), packed.float()
        now_on("")


def _info(name: str, full: bool, tokens: int, diagonal: Tensor) -> HessianInfo:
    """What a Hessian is. Raises NumericalError if its diagonal is not finite."""
    if not bool(diagonal.isfinite().all()):
        raise NumericalError(
            f"NaN or infinity in the activations that reach {name}",
            "check the model on this data; --dtype float32 helps where float16 overflows",
        )
    return HessianInfo(
        size=diagonal.numel(),
        kind="full" if full else "diagonal",
        tokens=tokens,
        mean_diagonal=float(diagonal.mean()),
        dead=int((diagonal == 0).sum()),
    )


def _are_relative(ids: Tensor) -> bool:
    """Whether ids (places, places) depend on the distance of two places alone, as those of T5's table do."""
    return ids.dim() == 2 and ids.shape[0] == ids.shape[1] and torch.equal(ids[1:, 1:], ids[:-1, :-1])
