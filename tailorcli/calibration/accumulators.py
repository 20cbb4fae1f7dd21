"""Running Hessians by name: made as they are needed, folded into, and given up."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorcli.calibration.stats import HessianInfo
from tailorcli.core.hessian import accumulate_, accumulate_diagonal_, diagonal_of, unpack_triangle
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
    """The Hessians of a model, or of one of its blocks, by name."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._device = device
        self._dtype = dtype  # of the sums
        self._by_name: dict[str, Accumulator] = {}

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
        """Tokens folded into a Hessian so far; 0 where there is none."""
        return self._by_name[name].tokens if name in self._by_name else 0

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
            if name not in used:
                continue
            diagonal = diagonal_of(accumulator.hessian)
            if not bool(diagonal.isfinite().all()):
                raise NumericalError(
                    f"NaN or infinity in the activations that reach {name}",
                    "check the model on this data; --dtype float32 helps where float16 overflows",
                )
            full = accumulator.hessian.dim() == 2
            info = HessianInfo(
                size=diagonal.numel(),
                kind="full" if full else "diagonal",
                tokens=accumulator.tokens,
                mean_diagonal=float(diagonal.mean()),
                dead=int((diagonal == 0).sum()),
            )
            yield name, info, accumulator.hessian.to(torch.float32)


def _are_relative(ids: Tensor) -> bool:
    """Whether ids (places, places) depend on the distance of two places alone, as those of T5's table do."""
    return ids.dim() == 2 and ids.shape[0] == ids.shape[1] and torch.equal(ids[1:, 1:], ids[:-1, :-1])
