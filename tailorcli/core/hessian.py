"""Layer Hessians: accumulate them over tokens, damp them, factorise them, store one triangle.

``H = (2/N) sum x x^T`` over the N calibration tokens that reach a layer (padding excluded) is the Hessian
of the layer objective, Eq. 5, for every output row alike. A layer whose inputs are one-hot or
channel-wise (embedding, norm scale, bias) has a diagonal H, held as a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tailorcli.core.precision import hessian_unit, in_units
from tailorcli.core.products import are_halves, fold_lower_, multiplies_halves
from tailorcli.errors import NumericalError

_BLOCK = 512  # columns per product or triangular solve: half the multiply-adds, still large matrix products


def accumulate_(hessian: Tensor, inputs: Tensor, tokens_seen: int) -> int:
    """Fold a batch of layer inputs into the running mean H = (2/N) sum x x^T, in place.

    Only the lower triangle of ``hessian`` (I, I), float32 or float64, is kept up to date: H is symmetric and the other
    half would double the multiply-adds. ``inputs`` (N, I) holds one row a token, in any float dtype; sums and products
    are in the dtype of ``hessian``, but for products of halves on a GPU, which are exact in float32. Returns the number
    of tokens seen, this batch included.
    """
    num_tokens, num_columns = inputs.shape
    if num_tokens == 0:
        return tokens_seen
    total = tokens_seen + num_tokens
    if hessian.dtype == torch.float32 and are_halves(inputs) and multiplies_halves(inputs.device):
        fold_lower_(hessian, inputs, inputs, tokens_seen / total, 2.0 / total)
        return total
    x = inputs.to(hessian.dtype)  # (N, I)
    for start in range(0, num_columns, _BLOCK):
        stop = min(start + _BLOCK, num_columns)
        block = hessian[start:stop, :stop]
        block.addmm_(x[:, start:stop].T, x[:, :stop], beta=tokens_seen / total, alpha=2.0 / total)
    return total


def accumulate_diagonal_(diagonal: Tensor, squares: Tensor, num_tokens: int, tokens_seen: int) -> int:
    """Fold ``squares`` (I,), the sum of x_j^2 over ``num_tokens`` tokens, into a diagonal H, in place."""
    if num_tokens == 0:
        return tokens_seen
    total = tokens_seen + num_tokens
    diagonal.mul_(tokens_seen / total).add_(squares.to(diagonal.dtype), alpha=2.0 / total)
    return total


def pack_triangle(hessian: Tensor) -> Tensor:
    """The lower triangle of ``hessian`` (I, I), row by row, as a vector of I (I + 1) / 2."""
    size = hessian.shape[0]
    if hessian.device.type != "cpu":  # one kernel rather than I of them
        return hessian[torch.ones_like(hessian, dtype=torch.bool).tril()]
    packed = torch.empty(size * (size + 1) // 2, dtype=hessian.dtype, device=hessian.device)
    start = 0
    for row in range(size):
        packed[start : start + row + 1] = hessian[row, : row + 1]
        start += row + 1
    return packed


def unpack_triangle(packed: Tensor, size: int) -> Tensor:
    """The symmetric (I, I) matrix whose lower triangle ``pack_triangle`` stored."""
    hessian = torch.zeros(size, size, dtype=packed.dtype, device=packed.device)
    if hessian.device.type != "cpu":
        hessian.masked_scatter_(torch.ones_like(hessian, dtype=torch.bool).tril(), packed)
    else:
        start = 0
        for row in range(size):
            hessian[row, : row + 1] = packed[start : start + row + 1]
            start += row + 1
    return _mirror_(hessian)


def complete_triangle_(hessian: Tensor) -> Tensor:
    """Mirror the lower triangle of ``hessian`` (I, I) into the upper, in place: as packed and unpacked, to the bit."""
    return _mirror_(hessian.tril_())


def _mirror_(hessian: Tensor) -> Tensor:
    """Fill the upper triangle, which is zero, from the lower one."""
    size = hessian.shape[0]
    for first in range(0, size, _BLOCK):  # block by block: no second (I, I) temporary
        last = min(first + _BLOCK, size)
        hessian[first:last, first:last] += hessian[first:last, first:last].tril(-1).T.clone()
        hessian[first:last, last:] = hessian[last:, first:last].T
    return hessian


def diagonal_of(hessian: Tensor) -> Tensor:
    """The diagonal (I,) of a full or a diagonal Hessian."""
    return hessian if hessian.dim() == 1 else hessian.diagonal()


def dead_channels(hessian: Tensor) -> Tensor:
    """Input channels that no calibration token ever excited, H_jj = 0, as a bool vector (I,)."""
    return diagonal_of(hessian) == 0


def dampen(hessian: Tensor, damping: float) -> float:
    """The number that damping adds to the diagonal: ``damping * mean(diag H)``."""
    return damping * float(diagonal_of(hessian).mean())


def damping_steps(damping: float) -> tuple[float, ...]:
    """The dampings to try, in order, until H is positive definite: the one asked for, then 10 times more."""
    return (damping, max(10 * damping, 1e-3), max(100 * damping, 1e-2), max(1000 * damping, 1e-1))


@dataclass(frozen=True)
class Factor:
    """A Cholesky factor of the damped Hessian, in reversed channel order, and the damping that it took.

    With P the reversal of channels, ``P (H + amount I) P = chol chol^T``. Reversed, because then the upper
    factor U of the *inverse*, H^-1 = U^T U, is P chol^-1 P: the sequential sweep needs U, and the
    sensitivity needs the column norms of U; both come without ever forming H^-1.
    """

    chol: Tensor  # (I, I) lower
    dead: Tensor  # (I,) bool, in the original order
    damping: float  # relative, as used
    amount: float  # absolute, as used


def factorise(hessian: Tensor, damping: float) -> Factor:
    """Cholesky-factorise the damped ``hessian`` (I, I), damping further in named steps if it must.

    A dead channel is decoupled from all others, so its diagonal may be set to anything positive without
    changing the rest. Raises NumericalError if no step of ``damping_steps`` is enough.
    """
    dead = dead_channels(hessian)
    mean = float(hessian.diagonal().mean())
    for attempt in damping_steps(damping):
        amount = attempt * mean
        damped = hessian.flip(0, 1)  # a copy
        damped.diagonal().add_(amount)
        damped.diagonal().masked_fill_(dead.flip(0), mean or 1.0)
        chol, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(chol.diagonal()).all()):
            return Factor(chol=chol, dead=dead, damping=attempt, amount=amount)
        del damped, chol
    tried = ", ".join(f"{step:g}" for step in damping_steps(damping))
    raise NumericalError(
        f"the Hessian is not positive definite (damping tried: {tried})",
        "calibrate with more samples, or pass a larger --damping",
    )


def _inverse_columns(chol: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks (start, stop, chol^-1[start:, start:stop]) of a lower-triangular inverse.

    Rows above ``start`` are zero, so each block solves a smaller system: I^3/3 flops in all, and no (I, I) result.
    """
    size = chol.shape[0]
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        identity = torch.zeros(size - start, stop - start, dtype=chol.dtype, device=chol.device)
        identity.diagonal().fill_(1.0)
        yield start, stop, torch.linalg.solve_triangular(chol[start:, start:], identity, upper=False)


def inverse_diagonal(factor: Factor) -> Tensor:
    """The true diagonal of H^-1 (I,), as Eq. 9 needs it: no (I, I) inverse is formed.

    [H^-1]_jj is the squared norm of column j of the inverse's factor. Dead channels get infinity: putting
    their entries back costs the layer nothing, so their sensitivity is zero.
    """
    diagonal = torch.empty(factor.chol.shape[0], dtype=factor.chol.dtype, device=factor.chol.device)
    for start, stop, columns in _inverse_columns(factor.chol):
        diagonal[start:stop] = columns.square().sum(0)
    return diagonal.flip(0).masked_fill(factor.dead, torch.inf)


def inverse_factor(factor: Factor) -> Tensor:
    """U (I, I), upper triangular, with H^-1 = U^T U, what the sequential sweep reads row by row."""
    inverse = torch.zeros_like(factor.chol)
    for start, stop, columns in _inverse_columns(factor.chol):
        inverse[start:, start:stop] = columns
    return inverse.flip(0, 1)


def combine_hessians(hessians: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum w_i H_i, the Hessian of a weighted sum of objectives; all (I, I), or all diagonals (I,)."""
    combined = hessians[0] * weights[0]
    for hessian, weight in zip(hessians[1:], weights[1:], strict=True):
        combined.add_(hessian, alpha=weight)
    return combined


@dataclass(frozen=True)
class RetainTerm:
    """What a retain term adds to a prepared Hessian A = H + beta s H_r (``core.retain``).

    ``hessian`` is H and ``retained`` H_r, both (I, I) or (I,), H_r divided by ``unit``; ``amount`` is what damping
    adds to H alone; ``share`` is mean(diag H) / mean(diag A), what is left of a change that no data reach; ``factor``
    is that of A, None where it is diagonal.
    """

    hessian: Tensor
    retained: Tensor
    amount: float
    share: float
    factor: Factor | None
    unit: float = 1.0


@dataclass(frozen=True)
class PreparedHessian:
    """A Hessian with all that the tensors which share it need, worked out once.

    ``hessian`` H is (I, I), or (I,) for a diagonal one, divided by ``unit`` (1 but for very large and very small
    ones). The other fields belong to that H: ``inverse_diagonal`` is [(H + amount I)^-1]_jj; ``inverse_factor`` is
    there only for the sequential solver. ``retain_term`` is there only with a retain term; then H is the combined
    Hessian A.
    """

    hessian: Tensor
    inverse_diagonal: Tensor | None
    inverse_factor: Tensor | None
    damping: float
    amount: float
    num_dead: int
    retain_term: RetainTerm | None = None
    unit: float = 1.0

    @property
    def is_diagonal(self) -> bool:
        """Whether each input channel stands alone, so that nothing can be compensated by another."""
        return self.hessian.dim() == 1


def prepare(hessian: Tensor, damping: float, *, sensitivity: bool, sequential: bool) -> PreparedHessian:
    """Damp and factorise ``hessian`` as far as the scores and the solver need it.

    Raises NumericalError where no damping makes it positive definite.
    """
    unit = hessian_unit(hessian)
    scaled = in_units(hessian, unit)
    prepared, _ = prepare_with_factor(scaled, damping, sensitivity=sensitivity, sequential=sequential)
    return replace(prepared, unit=unit)


def prepare_with_factor(
    hessian: Tensor, damping: float, *, sensitivity: bool, sequential: bool
) -> tuple[PreparedHessian, Factor | None]:
    """A Hessian near 1 in size, damped and factorised, and its Cholesky factor (None of a diagonal Hessian).

    Raises NumericalError where no damping makes it positive definite.
    """
    num_dead = int(dead_channels(hessian).sum())
    if hessian.dim() == 1:
        amount = dampen(hessian, damping)
        inverse = (1.0 / (hessian + amount)).masked_fill(dead_channels(hessian), torch.inf)
        return PreparedHessian(hessian, inverse, None, damping, amount, num_dead), None
    factor = factorise(hessian, damping)  # also where only the joint solver follows: it needs H positive definite
    upper = inverse_factor(factor) if sequential else None
    diagonal = inverse_diagonal(factor) if sensitivity else None
    return PreparedHessian(hessian, diagonal, upper, factor.damping, factor.amount, num_dead), factor
