"""Products of float32 matrices at a GPU's rate for bfloat16: each factor in two parts, summed in float32.

With a = a_high + a_low, both bfloat16, a b = a_high b_high + a_low b_high + a_high b_low but for 2^-17 of |a| |b|: one
product with three times as many columns, some five times as fast as a float32 one. Where a device or this torch does
not multiply bfloat16 into float32, and on a CPU, products are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tailorcli.core.precision import hessian_unit, in_units, out_of_units

FINEST = 3e-5  # below this tolerance the parts' own rounding would show
_HALF_BLOCK = 2048  # columns per product of a triangle: narrower ones leave most of a GPU idle
_WORTH_PARTS = 256  # rows from which on splitting a matrix for one product pays


@cache
def multiplies_halves(device: torch.device) -> bool:
    """Whether products of bfloat16 and of float16 give float32 sums there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    probes = [torch.ones(16, 16, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float16)]
    try:
        return all(bool(product_of_halves(probe, probe)[0, 0] == 16.0) for probe in probes)
    except (RuntimeError, TypeError, NotImplementedError):  # an older torch
        return False


def product_of_halves(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of halves of one dtype, in float32."""
    if left.device.type == "cuda":
        product: Tensor = torch.mm(left, right, out_dtype=torch.float32)
        return product
    return left.to(torch.float32) @ right.to(torch.float32)  # what a GPU does, for tests


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` with float32 sums; of two halves of one dtype every single product is exact."""
    if are_halves(left, right) and multiplies_halves(left.device):
        return product_of_halves(left, right)
    return left.to(torch.float32) @ right.to(torch.float32)


def are_halves(*tensors: Tensor) -> bool:
    """Whether all are of one dtype of 16 bits."""
    return {tensor.dtype for tensor in tensors} in ({torch.bfloat16}, {torch.float16})


def fold_lower_(mean: Tensor, left: Tensor, right: Tensor, keep: float, share: float) -> None:
    """``mean`` (I, I) becomes keep * mean + share * left^T right, its lower triangle, in place; a factor is (K, I).

    ``left`` and ``right`` are halves of one dtype; sums are float32.
    """
    for start in range(0, mean.shape[0], _HALF_BLOCK):
        stop = min(start + _HALF_BLOCK, mean.shape[0])
        found = product_of_halves(left[:, start:stop].T, right[:, :stop])
        mean[start:stop, :stop].mul_(keep).add_(found, alpha=share)


def left_parts(rows: Tensor) -> Tensor:
    """The parts of ``rows`` (R, I) in float32 side by side, as (R, 3 I) in bfloat16: high, low, high."""
    size = rows.shape[1]
    parts = torch.empty(rows.shape[0], 3 * size, dtype=torch.bfloat16, device=rows.device)
    high = parts[:, :size].copy_(rows)
    parts[:, size : 2 * size] = rows - high
    parts[:, 2 * size :] = high
    return parts


def right_parts(matrix: Tensor) -> Tensor:
    """The parts of ``matrix`` (I, J) in float32 below one another, as (3 I, J) in bfloat16: high, high, low."""
    size = matrix.shape[0]
    parts = torch.empty(3 * size, matrix.shape[1], dtype=torch.bfloat16, device=matrix.device)
    high = parts[:size].copy_(matrix)
    parts[size : 2 * size] = high
    parts[2 * size :] = matrix - high
    return parts


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix`` of float32 (R, I) and (I, J): in parts on a GPU where that is faster."""
    return product_of_halves(left_parts(rows), right_parts(matrix)) if in_parts(rows, matrix) else rows @ matrix


def in_parts(rows: Tensor, matrix: Tensor) -> bool:
    """Whether ``product`` multiplies parts: many float32 rows on a GPU."""
    wide = rows.dtype == matrix.dtype == torch.float32 and rows.shape[0] >= _WORTH_PARTS
    return wide and multiplies_halves(rows.device)


@dataclass(frozen=True)
class System:
    """A = H + amount I, made ready for products; ``hessian`` (I, I) and ``amount`` are divided by ``unit``.

    ``parts`` (3 I, I) are those of H. ``half`` (I, I) is D^-1/2 A D^-1/2 in float16, ``scale`` (I,) is D^-1/2, D the
    diagonal of A: entries of at most 1, so that float16 rounds them eight times as finely as bfloat16 would, and a
    steep spectrum stays positive definite. All three are None where products are float32.
    """

    hessian: Tensor
    amount: float
    unit: float
    parts: Tensor | None = None
    half: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of(cls, hessian: Tensor, amount: float, tolerance: float, halves: bool | None = None) -> System:
        """From an undamped Hessian, to be solved to ``tolerance``; ``halves`` says whether with products of halves.

        Without it they are used where they are fast and fine enough.
        """
        if halves is None:
            halves = tolerance >= FINEST and multiplies_halves(hessian.device)
        unit = hessian_unit(hessian)
        scaled = in_units(hessian, unit)
        if not halves:
            return cls(scaled, amount / unit, unit)
        diagonal = scaled.diagonal() + amount / unit
        scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
        half = (scaled * scale).mul_(scale.unsqueeze(1)).to(torch.float16)
        half.diagonal().fill_(1.0)
        return cls(scaled, amount / unit, unit, right_parts(scaled), half, scale)

    @property
    def exact(self) -> System:
        """With products in float32."""
        return System(self.hessian, self.amount, self.unit)

    def times(self, rows: Tensor) -> Tensor:
        """``rows`` (R, I) times H, undamped and in its own unit."""
        return out_of_units(self.product(rows), self.unit)

    def product(self, rows: Tensor) -> Tensor:
        """``rows`` (R, I) times H / unit."""
        return rows @ self.hessian if self.parts is None else product_of_halves(left_parts(rows), self.parts)
