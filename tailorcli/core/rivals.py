"""What came after Model Tailor and is compared with it: DG-Hard, FAPM and LiNeS, each on one tensor's change.

DG-Hard (arXiv 2605.20296) drops the singular values of a change that noise alone would have; FAPM (arXiv 2509.08255)
keeps the changes that are large and small beside the weight they fall on; LiNeS (arXiv 2410.17146) lets deep layers
go further than shallow ones.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from tailorcli.core.chunks import map_rows
from tailorcli.core.precision import working_dtype
from tailorcli.core.scores import salience, select_mask
from tailorcli.errors import NumericalError

SMALLEST = 1024  # entries of a matrix; DG-Hard leaves smaller ones and vectors as tuned has them
_LARGEST = 0x7F7FFFFF  # the bit pattern of float32's largest number


# --- DG-Hard ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def marchenko_pastur_median(ratio: float) -> float:
    """The median of the Marchenko-Pastur law of ``ratio`` (0 < ratio <= 1) and variance 1.

    Its distribution function in closed form, halved until it is 1/2. Raises ValueError for another ratio.
    """
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"a ratio above 0 and at most 1, got {ratio}")
    low, high = (1.0 - math.sqrt(ratio)) ** 2, (1.0 + math.sqrt(ratio)) ** 2

    def share_below(x: float) -> float:
        root = math.sqrt((high - x) / (x - low))
        found = math.pi * ratio + math.sqrt((high - x) * (x - low))
        found -= (1.0 + ratio) * math.atan((root**2 - 1.0) / (2.0 * root))
        if ratio < 1.0:
            found += (1.0 - ratio) * math.atan((low * root**2 - high) / (2.0 * (1.0 - ratio) * root))
        return found / (2.0 * math.pi * ratio)

    left, right = low, high
    for _ in range(60):
        middle = (left + right) / 2.0
        if middle in (left, right):
            break
        left, right = (middle, right) if share_below(middle) < 0.5 else (left, middle)
    return (left + right) / 2.0


def hard_threshold(num_rows: int, num_columns: int) -> float:
    """Above how many times the median singular value one is kept: Gavish and Donoho's optimum for unknown noise.

    With b the smaller side over the larger: sqrt(2 (b + 1) + 8 b / ((b + 1) + sqrt(b^2 + 14 b + 1))) over the root of
    the Marchenko-Pastur median; 2.858 for a square. Raises ValueError for an empty matrix.
    """
    if min(num_rows, num_columns) < 1:
        raise ValueError(f"a matrix with entries, got {num_rows} x {num_columns}")
    b = min(num_rows, num_columns) / max(num_rows, num_columns)
    optimum = math.sqrt(2.0 * (b + 1.0) + 8.0 * b / ((b + 1.0) + math.sqrt(b * b + 14.0 * b + 1.0)))
    return optimum / math.sqrt(marchenko_pastur_median(b))


def denoise(delta: Tensor, threshold_scale: float = 1.0) -> Tensor:
    """``delta`` (..., O, I) without the singular values that are not above the threshold; matrices of a stack alike.

    The threshold is ``threshold_scale`` times ``hard_threshold`` times the median of a matrix's singular values. One
    batched SVD in ``delta``'s dtype, on its device. Raises NumericalError where it does not converge.
    """
    try:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)  # (..., O, K), (..., K), (..., K, I)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError("the SVD of the change does not converge", "leave the tensor out: --exclude") from error
    limit = threshold_scale * hard_threshold(delta.shape[-2], delta.shape[-1])
    kept = torch.where(values > limit * values.quantile(0.5, dim=-1, keepdim=True), values, 0.0)
    found: Tensor = left.mul_(kept.unsqueeze(-2)) @ right
    return found


def is_denoised(shape: tuple[int, ...]) -> bool:
    """Whether DG-Hard has singular values of a tensor of this shape to drop: no vector, and not too small."""
    return len(shape) >= 2 and math.prod(shape[-2:] if len(shape) == 3 else shape) >= SMALLEST


def denoised(delta: Tensor, shape: tuple[int, ...], threshold_scale: float) -> Tensor:
    """DG-Hard's change of a tensor of this ``shape``, in that of ``delta``, which holds its entries in float32.

    A matrix as it is; of three dimensions each slice, as of fused experts, of more the first against the others, as
    of a convolution; tuned's change of whatever is smaller. Raises NumericalError.
    """
    if not is_denoised(shape):
        return delta
    stacked = delta.view(shape) if len(shape) == 3 else delta.view(shape[0], -1)
    return denoise(stacked, threshold_scale).view(delta.shape)


def add_change(base: Tensor, change: Tensor, weight: float = 1.0) -> Tensor:
    """The base plus weight * change (O, I), worked out in float32, or float64 where the base is; rounded once."""
    moved = torch.empty_like(base)
    dtype = working_dtype(base)

    def fill(rows: slice) -> None:
        moved[rows] = torch.add(base[rows].to(dtype), change[rows].to(dtype), alpha=weight).to(base.dtype)

    map_rows(base, fill)
    return moved


# --- FAPM ---------------------------------------------------------------------------------------------------------


def fapm_score(delta: Tensor, base: Tensor) -> Tensor:
    """FAPM's score (O, I) in float32: |delta| - mean|W_base| * |delta| / |W_base|, the mean over the tensor.

    Zero where nothing changed; a change of a weight that is zero has float32's lowest number. Where every weight is
    zero, as in a fresh bias, it is |delta|.
    """
    sums = map_rows(base, lambda rows: float(salience(base[rows].to(torch.float64)).sum()))
    mean = sum(sums) / max(base.numel(), 1)
    if mean == 0.0:
        return salience(delta)
    score = torch.empty_like(delta)

    def fill(rows: slice) -> None:
        change, size = salience(delta[rows]), salience(base[rows].to(torch.float32))
        found = torch.where(change > 0, change - mean * (change / size), 0.0)
        score[rows] = found.clamp_(min=torch.finfo(torch.float32).min)

    map_rows(delta, fill)
    return score


def select_signed(score: Tensor, count: int) -> Tensor:
    """``select_mask`` of a float32 ``score`` that may be negative: ``count`` True, ties to the lowest index."""
    above = score > 0
    enough = int(above.count_nonzero())
    if enough >= count:
        return select_mask(score.clamp(min=0.0), count)
    below = salience(score[~above])
    key = (_LARGEST - below.view(torch.int32)).view(torch.float32)  # the nearer to zero from below, the larger
    above[~above] = select_mask(key, count - enough)
    return above


def fapm_mask(delta: Tensor, base: Tensor, count: int) -> Tensor:
    """FAPM's mask (O, I): the ``count`` highest scores, ties to the lowest index."""
    return select_signed(fapm_score(delta, base), count)


# --- LiNeS --------------------------------------------------------------------------------------------------------


def line_weight(alpha: float, beta: float, depth: float) -> float:
    """LiNeS: alpha + beta * (layer - 1) / (L - 1), of which ``depth`` is the fraction: 0 the first layer, 1 the last.

    At the ends it is alpha, and alpha + beta, to the bit.
    """
    return (1.0 - depth) * alpha + depth * (alpha + beta)
