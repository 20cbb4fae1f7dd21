"""Propagation: fit a layer to the unpatched models' outputs, from the inputs that it has in the patched model.

With X the inputs of a layer in the tuned model on the new task and X' those in the model whose earlier layers are
patched already, X_r and X'_r likewise of the base on retained data, the kept entries minimise, row by row,

    ||W X' - W_tuned X||^2 + beta s ||W X'_r - W_base X_r||^2   subject to   W = W_base where the mask is False.

With X' = X and X'_r = X_r that is the retain term's problem (``core.retain``). From a plain patch W_0 on, the change C
of its kept entries solves A_SS C_S = b_S with

    A = H' + beta s H'_r + amount I,
    b = (W_tuned - W_0) H' + W_tuned D + beta s ((W_base - W_0) H'_r + W_base D_r),

H' = (2/N) X' X'^T and D = (2/N) (X - X') X'^T. Damping pulls towards the plain patch, not towards zero.

Either term is worked out from moments alone: with E = W - W_tuned and G = X - X', the gap between the inputs,

    (2/N) ||W X' - W_tuned X||^2 = tr E H' E^T - 2 tr E (W_tuned D)^T + tr W_tuned K W_tuned^T,   K = (2/N) G G^T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorcli.core.chunks import row_chunks
from tailorcli.core.figures import quadratic_form
from tailorcli.core.hessian import accumulate_, combine_hessians, dampen
from tailorcli.core.precision import gap
from tailorcli.core.products import System, fold_lower_, multiplies_halves, product, product_of_halves
from tailorcli.core.retain import retain_scale
from tailorcli.core.solvers import solve_by_chunks
from tailorcli.core.tailor import assemble, is_finite
from tailorcli.errors import NumericalError


@dataclass
class Moments:
    """Of a layer's inputs X' in the patched model, beside X in the unpatched one, over ``tokens`` tokens.

    ``hessian`` is H' and ``gap`` is K, both (I, I) and only their lower triangles before ``complete_``; ``drift`` is D
    (I, I); ``moved`` and ``whole`` are the sums of (x - x')^2 and of x^2.
    """

    hessian: Tensor
    drift: Tensor
    gap: Tensor
    tokens: int = 0
    moved: float = 0.0
    whole: float = 0.0

    @property
    def shift(self) -> float:
        """||X - X'||^2 / ||X||^2: how far patching has moved the inputs."""
        return self.moved / self.whole if self.whole > 0 else 0.0


def no_moments(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Moments:
    """Moments of no token yet, to be summed in ``dtype``."""
    hessian = torch.zeros(size, size, dtype=dtype, device=device)
    return Moments(hessian, torch.zeros_like(hessian), torch.zeros_like(hessian))


def accumulate_moments_(moments: Moments, patched: Tensor, unpatched: Tensor) -> None:
    """Fold inputs X' and X, (N, I) in any float dtype, row for row of the same tokens, into the means, in place."""
    dtype = moments.hessian.dtype
    x, reference = patched.to(dtype), unpatched.to(dtype)  # (N, I) each; squares overflow in halves
    apart = reference - x
    before = moments.tokens
    moments.tokens = accumulate_(moments.hessian, patched, before)
    halves = dtype == torch.float32 and patched.dtype == torch.bfloat16 and multiplies_halves(patched.device)
    if moments.tokens > before and halves:
        _accumulate_in_parts_(moments, patched, apart, before / moments.tokens, 2.0 / moments.tokens)
    elif moments.tokens > before:
        accumulate_(moments.gap, apart, before)
        moments.drift.addmm_(apart.T, x, beta=before / moments.tokens, alpha=2.0 / moments.tokens)
    if moments.tokens > before:
        moments.moved += float(apart.square().sum(dtype=torch.float64))
        moments.whole += float(reference.square().sum(dtype=torch.float64))


def _accumulate_in_parts_(moments: Moments, x: Tensor, apart: Tensor, keep: float, share: float) -> None:
    """Fold D and K with products in bfloat16: ``x`` (N, I) is that already, ``apart`` (N, I) float32 in two parts."""
    high = apart.to(torch.bfloat16)
    low = (apart - high).to(torch.bfloat16)
    fold_lower_(moments.gap, torch.cat((high, low, high)), torch.cat((high, high, low)), keep, share)
    found = product_of_halves(torch.cat((high, low)).T, torch.cat((x, x)))
    moments.drift.mul_(keep).add_(found, alpha=share)


def joined_(moments: Moments, summed: Callable[[Tensor], Tensor]) -> None:
    """Make moments of one process's tokens those of all, in place; ``summed`` adds a tensor up over all, in place.

    The matrices are means over ``tokens``: they are weighed by these, in float32.
    """
    counts = torch.tensor([moments.tokens, moments.moved, moments.whole], dtype=torch.float64)
    counts = summed(counts.to(moments.hessian.device)).cpu()
    total = int(counts[0])
    for matrix in (moments.hessian, moments.drift, moments.gap):
        summed(matrix.mul_(moments.tokens / max(1, total)))
    moments.tokens, moments.moved, moments.whole = total, float(counts[1]), float(counts[2])


def complete_(moments: Moments) -> None:
    """Mirror the lower triangles of H' and K into the upper, in place; what was summed wider becomes float32."""
    for matrix in (moments.hessian, moments.gap):
        lower = matrix.tril_()
        lower += lower.tril(-1).T
    moments.hessian, moments.gap = moments.hessian.to(torch.float32), moments.gap.to(torch.float32)
    moments.drift = moments.drift.to(torch.float32)


@dataclass(frozen=True)
class PropagatedLayer:
    """A propagated tensor in the base's dtype and stored shape, and how well its equations are solved."""

    patched: Tensor
    iterations: int
    residual: float  # ||A_SS C - b|| / ||b||, Frobenius over all rows


def solve_propagated(
    base: Tensor,
    tuned: Tensor,
    plain: Tensor,
    mask: Tensor,
    new: Moments,
    retained: Moments,
    *,
    retain_weight: float,
    damping: float,
    transposed: bool = False,
    tolerance: float = 2e-4,
    max_iterations: int = 300,
) -> PropagatedLayer:
    """Change the kept entries of ``plain`` so that the layer's outputs are the unpatched models', both terms together.

    The four tensors are in the stored orientation, (O, I), or (I, O) with ``transposed``; outside the mask the result
    is the base to the bit. Raises NumericalError where a value overflows.
    """
    share = retain_scale(new.hessian, retained.hessian, retain_weight)
    system = combine_hessians((new.hessian, retained.hessian), (1.0, share))
    amount = dampen(system, damping)
    matrices = [t.T if transposed else t for t in (base, tuned, plain)]  # (O, I) each
    kept = mask.T if transposed else mask

    def right_side(rows: slice) -> Tensor:
        w_base, w_tuned, w_plain = (matrix[rows] for matrix in matrices)
        target = product(gap(w_tuned, w_plain), new.hessian) + product(w_tuned.to(torch.float32), new.drift)
        away = product(gap(w_base, w_plain), retained.hessian) + product(w_base.to(torch.float32), retained.drift)
        return target.add_(away, alpha=share).masked_fill_(~kept[rows], 0.0)

    found = solve_by_chunks(kept, right_side, System.of(system, amount, tolerance), tolerance, max_iterations)
    decorator = found.decorator.T.contiguous() if transposed else found.decorator
    patched = assemble(base, plain, mask, decorator)
    if not is_finite(patched):
        raise NumericalError(f"a propagated value overflows {patched.dtype}", "pass --no-propagate")
    return PropagatedLayer(patched, found.iterations, found.residual)


refit = solve_propagated  # its earlier name


@dataclass(frozen=True)
class PropagatedErrors:
    """How far a layer's outputs in the patched model are from the unpatched models', as shares.

    ``error_*`` is ||W X' - W_tuned X||^2 on the new task's samples over ``output_energy``: ``before`` with tuned's own
    values in the mask, ``after`` as fitted. ``drift`` is ||W X'_r - W_base X_r||^2 on the retained samples over
    ``drift_energy``. The energies are (2/N) ||W_base X_base - W_tuned X_tuned||^2 on the same samples, each model with
    its own inputs: an error of 0 is the tuned model, 1 the base; a drift of 0 is the base, 1 the tuned model. None
    where the two models' inputs could not be compared.
    """

    output_energy: float | None
    error_before: float | None
    error_after: float | None
    drift_energy: float | None
    drift: float | None


def propagated_errors(
    base: Tensor,
    tuned: Tensor,
    patched: Tensor,
    mask: Tensor,
    new: Moments,
    retained: Moments,
    *,
    output_energy: float | None,
    drift_energy: float | None,
    transposed: bool = False,
) -> PropagatedErrors:
    """The errors of a layer on the inputs that it has in the patched model; ``new`` and ``retained`` are complete.

    The four tensors are in the stored orientation, (O, I), or (I, O) with ``transposed``; the energies are those of
    ``PropagatedErrors``.
    """
    matrices = [t.T if transposed else t for t in (base, tuned, patched)]  # (O, I) each
    kept = mask.T if transposed else mask
    before, after, left = 0.0, 0.0, 0.0
    for rows in row_chunks(*kept.shape):
        w_base, w_tuned, w_patched = (matrix[rows] for matrix in matrices)  # (R, I)
        distance = _distances(w_tuned, new)
        before += distance(torch.where(kept[rows], w_tuned, w_base))
        after += distance(w_patched)
        left += _distances(w_base, retained)(w_patched)
    return PropagatedErrors(
        output_energy=output_energy,
        error_before=_share(before, output_energy),
        error_after=_share(after, output_energy),
        drift_energy=drift_energy,
        drift=_share(left, drift_energy),
    )


def _share(part: float, whole: float | None) -> float | None:
    return None if whole is None else part / whole if whole > 0 else 0.0


def _distances(reference: Tensor, moments: Moments) -> Callable[[Tensor], float]:
    """(2/N) ||W X' - W_ref X||^2 as a function of W, both (R, I)."""
    rows = reference.to(torch.float32)
    moved = product(rows, moments.drift)
    fixed = quadratic_form(rows, moments.gap)

    def distance(weight: Tensor) -> float:
        away = gap(weight, reference)
        crossed = float((away * moved).sum(1).sum(dtype=torch.float64))
        return max(0.0, quadratic_form(away, moments.hessian) - 2.0 * crossed + fixed)

    return distance
