"""What Model Tailor is compared with: interpolation (WiSE-FT), DARE, TIES' trimming, the authors' released code.

None but the last reads a Hessian. Each is a mask and a value for the kept entries; ``tailor.assemble`` does the rest.
What came after it is in ``rivals``, and through ``baseline_layer`` too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tailorcli.core.chunks import map_rows, row_slices
from tailorcli.core.figures import measure
from tailorcli.core.hessian import PreparedHessian
from tailorcli.core.precision import working_dtype
from tailorcli.core.rivals import add_change, denoised, fapm_mask
from tailorcli.core.scores import count_kept, salience, select_mask
from tailorcli.core.solvers import Decoration
from tailorcli.core.tailor import (
    LayerResult,
    NoTimer,
    Timer,
    assemble,
    difference,
    is_finite,
    matrix_shape,
    require_finite,
    require_finite_inputs,
)
from tailorcli.errors import NumericalError

_CHUNK = 1 << 20  # entries drawn or counted at a time
DENSE = ("interpolate", "lines", "dg-hard")  # methods that change every entry
_DELTA_SHARE = 0.8  # of |delta| in the released code's score


def interpolate(base: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """WiSE-FT: base + weight * (tuned - base) on every entry (O, I), rounded once to the base's dtype.

    It is worked out in float32, or float64 where a weight is. ``weight`` 0 and 1 are the two to the bit.
    """
    if weight in (0.0, 1.0):
        return (tuned if weight else base).to(base.dtype, copy=True)
    mixed = torch.empty_like(base)
    dtype = working_dtype(base, tuned)

    def fill(rows: slice) -> None:
        mixed[rows] = torch.lerp(base[rows].to(dtype), tuned[rows].to(dtype), weight)

    map_rows(base, fill)
    return mixed


def random_mask(num_entries: int, density: float, seed: int) -> Tensor:
    """A bool mask (num_entries,) on the CPU, each entry True with probability ``density``: DARE's, without its scale.

    The draws are the raw bits of NumPy's PCG64 with this ``seed`` (any number of bits), which stay the same from
    version to version; 32 of them an entry, so the probability is right to 2^-32.
    """
    generator = np.random.PCG64(seed)
    mask = np.empty(num_entries, dtype=bool)
    limit = round(density * 2**32)
    for start in range(0, num_entries, _CHUNK):
        part = mask[start : start + _CHUNK]
        draws = generator.random_raw((part.size + 1) // 2).astype("<u8").view("<u4")[: part.size]
        np.less(draws, np.uint32(min(limit, 2**32 - 1)), out=part)
        part |= limit == 2**32
    return torch.from_numpy(mask)


def drop_and_rescale(base: Tensor, tuned: Tensor, mask: Tensor, density: float, weight: float = 1.0) -> Tensor:
    """DARE: the masked entries of delta divided by ``density``, so that the mean change stays; the rest is base."""
    return assemble(base, tuned, mask, None, weight / density if density > 0 else 1.0)


def baseline_layer(
    base: Tensor,
    tuned: Tensor,
    *,
    method: str,
    density: float,
    weight: float = 1.0,
    seed: int = 0,
    mask: Tensor | None = None,
    threshold_scale: float = 1.0,
    timer: Timer | None = None,
) -> LayerResult:
    """One tensor by ``interpolate``, ``lines``, ``dg-hard``, ``dare``, ``magnitude``, ``fapm`` or ``changed``.

    Shapes and figures are as in ``tailor_layer``. ``seed`` is the tensor's own, and so is the ``weight`` of
    ``lines``; ``threshold_scale`` is dg-hard's. ``mask``, in the tensor's shape, is taken as it is where it is given.
    Raises NumericalError on NaN or infinity, and where an SVD does not converge.
    """
    timer = timer or NoTimer()
    shape = matrix_shape(base, None)
    base_2d, tuned_2d = base.reshape(shape), tuned.reshape(shape)
    with timer.stage("score"):
        delta = difference(tuned_2d, base_2d)
        require_finite_inputs(delta, base_2d, tuned_2d)
    with timer.stage("select"):
        if mask is not None:
            mask = mask.reshape(shape)
        elif method == "changed":
            mask = changed_mask(base_2d, tuned_2d)
        elif method in DENSE:
            mask = torch.ones_like(delta, dtype=torch.bool)
        elif method == "dare":
            mask = random_mask(delta.numel(), density, seed).to(delta.device).view(shape)
        elif method == "fapm":
            mask = fapm_mask(delta, base_2d, count_kept(density, delta.numel()))
        else:
            mask = select_mask(salience(delta), count_kept(density, delta.numel()))
    with timer.stage("assemble"):
        if method in ("interpolate", "lines"):
            patched = interpolate(base_2d, tuned_2d, weight)
        elif method == "dg-hard":
            patched = _denoised_layer(base_2d, tuned_2d, delta, tuple(base.shape), threshold_scale, weight)
        elif method == "dare":
            patched = drop_and_rescale(base_2d, tuned_2d, mask, density, weight)
        else:
            patched = assemble(base_2d, tuned_2d, mask, None, weight)
        _require_finite_result(patched)
    with timer.stage("measure"):
        moved = weight != 1.0 or method in ("dare", "dg-hard")
        figures = measure(delta, mask, patched=patched, tuned=tuned_2d, moved=moved)
    return LayerResult(patched.view(base.shape), mask.view(base.shape), figures)


def changed_mask(base: Tensor, tuned: Tensor) -> Tensor:
    """Where ``tuned`` in the base's dtype is another number, bit for bit (-0 is not 0): bool, in their shape.

    >>> changed_mask(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, -0.0, 3.0])).tolist()
    [False, True, True]
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
    one, other = (value.to(base.dtype).contiguous().view(whole) for value in (base, tuned))
    return one != other


def _denoised_layer(
    base: Tensor, tuned: Tensor, delta: Tensor, shape: tuple[int, ...], threshold_scale: float, weight: float
) -> Tensor:
    """DG-Hard: base + weight * what is left of ``delta``; where that is all of it, tuned to the bit."""
    left = denoised(delta, shape, threshold_scale)
    return interpolate(base, tuned, weight) if left is delta else add_change(base, left, weight)


def _require_finite_result(patched: Tensor) -> None:
    try:
        require_finite(patched)
    except NumericalError as error:
        hint = "pass a smaller --weight, or a higher --density"
        raise NumericalError(f"a patched value overflows {patched.dtype}", hint) from error


# --- One threshold for all tensors -------------------------------------------------------------------------------

DIGITS = 1 << 16  # of one half of |delta|'s 32 bits, which order it


def no_counts() -> Tensor:
    """A count of zero for every digit."""
    return torch.zeros(DIGITS, dtype=torch.int64)


def digit_counts(delta: Tensor, upper: int | None = None) -> Tensor:
    """How often each value of the upper 16 bits of |delta| occurs, int64 (DIGITS,) on the CPU.

    With ``upper``, of the lower 16 bits instead, among the entries that have these upper ones. ``delta`` is float32.
    """
    total = no_counts().to(delta.device)
    for rows in row_slices(delta.shape[0], delta.shape[1], _CHUNK):
        bits = salience(delta[rows]).reshape(-1).view(torch.int32)
        high = bits >> 16
        digits = high if upper is None else bits[high == upper] & (DIGITS - 1)
        total += torch.bincount(digits, minlength=DIGITS)
    return total.cpu()


def value_of_digits(upper: int, lower: int) -> float:
    """The float32 whose bit pattern these digits are."""
    return float(np.array(upper << 16 | lower, dtype=np.uint32).view(np.float32))


def count_ties(delta: Tensor, threshold: float) -> int:
    """Entries with |delta| equal to the ``threshold``."""
    return sum(map_rows(delta, lambda rows: int((salience(delta[rows]) == threshold).count_nonzero())))


def mask_above(delta: Tensor, threshold: float, ties: int) -> tuple[Tensor, int]:
    """True where |delta| is above the ``threshold``, and at the first ``ties`` entries that equal it.

    Returns also how many of those ``ties`` were not found in this tensor.
    """
    mask = torch.empty_like(delta, dtype=torch.bool)
    left = ties
    for rows in row_slices(delta.shape[0], delta.shape[1], _CHUNK):
        score = salience(delta[rows])
        part = score > threshold
        if left > 0:
            places = (score == threshold).reshape(-1).nonzero().squeeze(1)[:left]
            part.view(-1)[places] = True
            left -= places.numel()
        mask[rows] = part
    return mask, left


# --- The authors' released code ----------------------------------------------------------------------------------


def released_layer(
    base: Tensor,
    tuned: Tensor,
    prepared: PreparedHessian,
    *,
    density: float,
    transposed: bool = False,
    block_size: int = 128,
    weight: float = 1.0,
    timer: Timer | None = None,
) -> LayerResult:
    """One linear layer as the authors' released code patches it (didizhu-zju/Model-Tailor, llava/train/sparsegpt.py).

    It differs from the paper. The score is 0.8 z(|delta|) + 0.2 z(W^2 / U_jj^2), not Eq. 11: z is the z-score of a
    row within a block of ``block_size`` columns, W the tuned weight as the sweep has moved it so far, U the upper
    factor of H^-1 = U^T U, whose squared diagonal is not that of H^-1. Each block has a threshold of its own and
    keeps its top ``density``. And the sweep adds each error times U's row to the columns on its right, where
    Theorem 4.5 subtracts it. Here a block keeps exactly round(density * numel) entries, ties to the lowest index.
    Raises ValueError for a ``prepared`` without an inverse factor, NumericalError on NaN or infinity.
    """
    timer = timer or NoTimer()
    shape = matrix_shape(base, prepared)
    base_2d, tuned_2d = base.reshape(shape), tuned.reshape(shape)
    if prepared.inverse_factor is None:
        raise ValueError("the released sweep needs prepare(..., sequential=True)")
    with timer.stage("score"):
        delta = difference(tuned_2d, base_2d)
        require_finite_inputs(delta, base_2d, tuned_2d)
    with timer.stage("solve"):
        base_rows, delta_rows = (base_2d.T, delta.T) if transposed else (base_2d, delta)  # (O, I)
        swept, kept = released_sweep(base_rows, delta_rows, prepared.inverse_factor, density, block_size)
        decorator, mask = (swept.T, kept.T.contiguous()) if transposed else (swept, kept)
        decoration = Decoration(decorator, iterations=0, residual=0.0)
    with timer.stage("assemble"):
        patched = assemble(base_2d, tuned_2d, mask, decorator, weight)
        _require_finite_result(patched)
    with timer.stage("measure"):
        figures = measure(
            delta,
            mask,
            patched=patched,
            tuned=tuned_2d,
            prepared=prepared,
            transposed=transposed,
            decoration=decoration,
        )
    return LayerResult(patched.view(base.shape), mask.view(base.shape), figures)


def released_sweep(
    base: Tensor, delta: Tensor, upper: Tensor, density: float, block_size: int
) -> tuple[Tensor, Tensor]:
    """The compensation C (O, I), which holds on the mask, and the mask of the released code; see ``released_layer``.

    Raises NumericalError where the score overflows float32.
    """
    size = delta.shape[1]
    work = delta.T.clone(memory_format=torch.contiguous_format)  # (I, O): a column is one contiguous row here
    mask = torch.empty(delta.shape, dtype=torch.bool, device=delta.device)
    for start in range(0, size, block_size):
        stop = min(start + block_size, size)
        block, factor = work[start:stop], upper[start:stop, start:stop]
        moved = (block.T + base[:, start:stop].to(torch.float32)) / factor.diagonal()  # (O, B)
        change, squares = salience(delta[:, start:stop]), moved.square()
        if not is_finite(squares):
            raise NumericalError("the released code's score overflows float32", "leave the tensor out: --exclude")
        score = _DELTA_SHARE * _z_score(change) + (1.0 - _DELTA_SHARE) * _z_score(squares)
        kept = select_mask(score - score.min(), count_kept(density, score.numel()))
        mask[:, start:stop] = kept
        put_back = (~kept).T.to(work.dtype)  # (B, O)
        errors = torch.empty_like(block)
        for j in range(stop - start):
            torch.mul(block[j], put_back[j] / factor[j, j], out=errors[j])
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j])
        work[stop:].addmm_(upper[start:stop, stop:].T, errors)
    return work.T - delta, mask


def _z_score(block: Tensor) -> Tensor:
    """Row by row: minus the mean, over the standard deviation; zero where a row is constant."""
    if block.shape[1] < 2:
        return torch.zeros_like(block)
    deviation, mean = torch.std_mean(block, dim=1, keepdim=True)
    return torch.where(deviation > 0, (block - mean) / deviation, 0.0)
