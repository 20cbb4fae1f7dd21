"""The patch decorator (Eq. 12, 13): change the kept entries so that they make up for those put back.

With e = W_base - W_tuned on the entries put back (zero on the kept ones), the decorator C of the kept
entries minimises, row by row,

    (C + e) A (C + e)^T   subject to   C = 0 where the mask is False,   A = H + amount I.

Both solvers take rows (O, I) with O rows, I input columns, and return C in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tailorcli.core.chunks import row_chunks
from tailorcli.core.direct import solve_directly_
from tailorcli.core.gradients import conjugate_gradients
from tailorcli.core.precision import extent, in_units, out_of_units, unit_of
from tailorcli.core.products import System

_SWITCH, _ALWAYS_DIRECT, _MOST_DIRECT = 2e-5, 64, 2048  # see _worth_solving_directly


@dataclass(frozen=True)
class Decoration:
    """The compensation C (O, I), zero where the mask is False, and how well its equations are solved."""

    decorator: Tensor
    iterations: int
    residual: float  # ||A_SS C - b|| / ||b||, Frobenius over all rows
    energy_before: float | None = None  # sum e H e^T, where the solver had it at hand


def decorate_sequential(delta: Tensor, mask: Tensor, upper: Tensor, block_size: int = 128) -> Decoration:
    """The paper's way: SparseGPT's sweep over columns, each error spread over the columns to its right.

    ``upper`` (I, I) has H^-1 = upper^T upper (``inverse_factor``). Entries that are not kept go to base; the
    sign is that of Theorem 4.5, W -= error * H^-1. Updates within a block of columns are immediate, those
    to the right of it are lazy, one matrix product a block. Columns are worked on as contiguous rows.
    """
    decorator = torch.empty_like(delta)
    unit = unit_of(extent(delta))
    for chunk in row_chunks(*delta.shape):
        swept = _sweep(in_units(delta[chunk], unit), mask[chunk], upper, block_size)
        decorator[chunk] = out_of_units(swept, unit)
    return Decoration(decorator, iterations=0, residual=0.0)


def _sweep(delta: Tensor, mask: Tensor, upper: Tensor, block_size: int) -> Tensor:
    """One pass of the sweep over a chunk of rows; returns C = (swept - delta) on the mask."""
    size = delta.shape[1]
    work = delta.T.clone(memory_format=torch.contiguous_format)  # (I, O): a column is one contiguous row here
    put_back = (~mask).T.to(work.dtype)  # (I, O)
    for start in range(0, size, block_size):
        stop = min(start + block_size, size)
        block, factor = work[start:stop], upper[start:stop, start:stop]
        scale = (1.0 / factor.diagonal()).unsqueeze(1)  # (B, 1)
        errors = torch.empty_like(block)
        for j in range(stop - start):
            torch.mul(block[j], put_back[start + j], out=errors[j])
            errors[j].mul_(scale[j])
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1.0)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
    return torch.where(mask, work.T - delta, 0.0)


def decorate_joint(
    delta: Tensor,
    mask: Tensor,
    hessian: Tensor,
    amount: float,
    *,
    tolerance: float = 2e-4,
    max_iterations: int = 300,
) -> Decoration:
    """The exact optimum on the mask: all kept entries of a row at once, A_SS C_S = (e H)_S with e = delta - kept.

    ``hessian`` (I, I) is undamped; ``amount`` is what damping adds to its diagonal. Rows with few kept
    entries are solved directly (Cholesky of the gathered A_SS, on the CPU); the others together by conjugate
    gradients with a Jacobi preconditioner, until each row's residual is below ``tolerance`` times its right
    side, or ``max_iterations``.
    """
    energy = 0.0
    unit = unit_of(extent(delta))
    system = System.of(hessian, amount, tolerance)

    def right_side(chunk: slice) -> Tensor:
        nonlocal energy
        put_back = torch.where(mask[chunk], 0.0, in_units(delta[chunk], unit))  # (R, I): e with its sign turned
        product = system.times(put_back)
        energy += float((product * put_back).sum(1).sum(dtype=torch.float64))
        return torch.where(mask[chunk], product, 0.0)

    found = solve_by_chunks(mask, right_side, system, tolerance, max_iterations)
    return replace(found, decorator=out_of_units(found.decorator, unit), energy_before=energy * unit**2)


def solve_by_chunks(
    mask: Tensor,
    right_side: Callable[[slice], Tensor],
    system: System,
    tolerance: float,
    max_iterations: int,
) -> Decoration:
    """Solve A_SS x_S = b_S for every row of ``mask`` (O, I), so many rows at a time that the work space is bounded.

    ``right_side`` gives b (R, I) in float32 for a slice of rows, zero where the mask is False; A is ``system``. Very
    large and very small numbers are solved in units of their own; rows with a right side that is not finite give NaN.
    """
    solution = torch.zeros_like(mask, dtype=torch.float32)
    iterations, residual_sq, target_sq = 0, 0.0, 0.0
    for chunk in row_chunks(*mask.shape):
        kept = mask[chunk]
        target = right_side(chunk)
        largest = extent(target)
        if not math.isfinite(largest):  # no row's residual would ever tell; who puts the values together does
            solution[chunk] = math.nan
            continue
        unit = unit_of(largest)
        target = in_units(target, unit)
        found, steps, squares = solve_on_mask(target, kept, system, tolerance, max_iterations)
        solution[chunk] = out_of_units(found, unit / system.unit)
        iterations = max(iterations, steps)
        residual_sq += squares * unit**2
        target_sq += sum_of_squares(target) * unit**2
        del target, found
    residual = (residual_sq / target_sq) ** 0.5 if target_sq > 0 else 0.0
    return Decoration(solution, iterations, residual)


def solve_on_mask(
    target: Tensor, kept: Tensor, system: System, tolerance: float, max_iterations: int
) -> tuple[Tensor, int, float]:
    """Every row's x with A_SS x_S = b_S on its kept entries S, zero elsewhere; A is ``system``, b the ``target``.

    All are (R, I). Returns also the iterations taken and the rows' summed squared residual.
    """
    direct = _worth_solving_directly(kept)
    if not any(direct):  # on a GPU always: no copies of the rows
        return conjugate_gradients(target, kept, system, tolerance, max_iterations)
    solution = torch.zeros_like(target)
    failed, direct_sq = solve_directly_(solution, target, kept, system.hessian, system.amount, direct)
    rest = [row for row in range(kept.shape[0]) if not direct[row]] + failed
    part, steps, iterated_sq = conjugate_gradients(target[rest], kept[rest], system, tolerance, max_iterations)
    solution[rest] = part
    return solution, steps, direct_sq + iterated_sq


def _worth_solving_directly(kept: Tensor) -> list[bool]:
    """For each row, whether a Cholesky of its n kept entries beats its iterations.

    n^3/3 operations, at the rate of small factorisations, which grows with n, against 2 I^2 an iteration, of which a
    wider layer takes more. At the default tolerance both took equally long at n = 125, 300 and 640 of I = 512, 1024
    and 2048, one thread on a busy machine, in its own seconds: n^3 = 2e-5 I^4 within an eighth of n. Beyond some
    2000 entries a row it was not measured, and the smallest systems are solved at once in any layer. Not on a GPU,
    where one row at a time leaves it idle.
    """
    if kept.device.type != "cpu":
        return [False] * kept.shape[0]
    counts = kept.sum(1, dtype=torch.float64)
    most = min(max(_ALWAYS_DIRECT, (_SWITCH * kept.shape[1] ** 4) ** (1 / 3)), _MOST_DIRECT)
    return [bool(n) for n in (counts > 0) & (counts <= most)]


def sum_of_squares(rows: Tensor) -> float:
    """Summed in float64 over the rows' sums: without a float64 copy of the array."""
    return float(rows.square().sum(1).sum(dtype=torch.float64))
