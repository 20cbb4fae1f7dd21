"""Numbers at the edges: float64 weights, and sizes whose squares would leave float32.

Scores, masks and solvers do not depend on the scale of a Hessian, nor but by a factor on that of a change. So what is
very large or very small is divided by a power of 4 first, which rounds nothing (its root, in a Cholesky factor, is a
power of 2), and the result multiplied by it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_COMFORT = 2.0**30  # from the inverse of this to this, squares times squares times sums stay within float32
_MAX_EXPONENT = 124  # of a unit, so that float32 holds the unit itself


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """What values of these tensors are subtracted and added in: float64 where one of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def gap(one: Tensor, other: Tensor) -> Tensor:
    """``one`` minus ``other`` of one shape, in float32; subtracted in float64 where either is, and rounded once.

    A difference too small for float32 becomes its smallest number rather than zero: it is a change all the same.
    """
    dtype = working_dtype(one, other)
    difference = one.to(dtype) - other.to(dtype)
    if dtype == torch.float32:
        return difference
    rounded = difference.to(torch.float32)
    lost = (rounded == 0) & (difference != 0)
    return torch.where(lost, difference.sign().mul_(torch.finfo(torch.float32).tiny).to(torch.float32), rounded)


def extent(tensor: Tensor) -> float:
    """The largest |entry|, NaN or infinity where there is one; 0 of an empty tensor. No temporary."""
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.stack(tensor.aminmax()).tolist()
    return max(abs(low), abs(high)) if low == low else math.nan


def unit_of(largest: float) -> float:
    """The power of 4 to divide by where the ``largest`` |entry| is far from 1; else, and of zero or infinity, 1.0."""
    if largest == 0.0 or not math.isfinite(largest) or 1.0 / _COMFORT <= largest <= _COMFORT:
        return 1.0
    exponent = 2 * (math.frexp(largest)[1] // 2)
    return 2.0 ** max(-_MAX_EXPONENT, min(exponent, _MAX_EXPONENT))


def in_units(tensor: Tensor, unit: float) -> Tensor:
    """The tensor divided by ``unit``; itself where that is 1."""
    return tensor if unit == 1.0 else tensor / unit


def out_of_units(tensor: Tensor, unit: float) -> Tensor:
    """The tensor times ``unit``; itself where that is 1."""
    return tensor if unit == 1.0 else tensor * unit


def hessian_unit(hessian: Tensor) -> float:
    """The unit of a Hessian (I, I) or (I,): that of its diagonal, which no other entry exceeds."""
    return unit_of(extent(hessian if hessian.dim() == 1 else hessian.diagonal()))
