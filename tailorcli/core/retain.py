"""The retain term (Eq. 4): fit the new task, and leave what the base does on retained data as it is.

With H from the tuned model on the new task and H_r from the base on data that stand for what it must not forget,

    minimise   (d - delta) H (d - delta)^T + beta s d H_r d^T   subject to   d = 0 where the mask is False,

s = mean(diag H) / mean(diag H_r), so that beta has no unit. Up to a constant this is (d - goal) A (d - goal)^T with
A = H + beta s H_r and goal = delta H A^-1: the problem of Eq. 5 with another Hessian and another delta. So scores,
mask and solvers stay what they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tailorcli.core.chunks import row_chunks
from tailorcli.core.hessian import (
    PreparedHessian,
    RetainTerm,
    combine_hessians,
    dead_channels,
    diagonal_of,
    prepare_with_factor,
)
from tailorcli.core.precision import hessian_unit, in_units


def retain_scale(hessian: Tensor, retained: Tensor, weight: float) -> float:
    """Beta s: what H_r is multiplied by beside H; zero where the retained data never reach the layer."""
    mean = float(diagonal_of(retained).mean())
    return weight * float(diagonal_of(hessian).mean()) / mean if mean > 0 else 0.0


def prepare_retaining(
    hessian: Tensor, retained: Tensor, weight: float, damping: float, *, sensitivity: bool, sequential: bool
) -> PreparedHessian:
    """``hessian.prepare`` for A = H + beta s H_r, with what the goal and the figures need of H and H_r beside it.

    Raises NumericalError where no damping makes A positive definite.
    """
    units = hessian_unit(hessian), hessian_unit(retained)  # s takes care that they need not be the same
    hessian, retained = in_units(hessian, units[0]), in_units(retained, units[1])
    system = combine_hessians((hessian, retained), (1.0, retain_scale(hessian, retained, weight)))
    prepared, factor = prepare_with_factor(system, damping, sensitivity=sensitivity, sequential=sequential)
    mean, mean_new = float(diagonal_of(system).mean()), float(diagonal_of(hessian).mean())
    share = mean_new / mean if mean > 0 else 1.0
    term = RetainTerm(hessian, retained, prepared.damping * mean_new, share, factor, units[1])
    return replace(prepared, retain_term=term, unit=units[0])


def retained_goal(delta: Tensor, prepared: PreparedHessian) -> Tensor:
    """Where the retain term wants every entry to go without a mask: delta (H + a I) (A + b I)^-1, rows (O, I).

    ``a`` and ``b`` are what damping adds, so that weight zero gives delta. A channel that no data reach goes as far as
    a diagonal H and H_r that are alike would take it, 1 / (1 + beta), which is what damping alone says of it.
    """
    term = prepared.retain_term
    assert term is not None
    dead = dead_channels(prepared.hessian)
    if term.factor is None:
        left = (term.hessian + term.amount) / (prepared.hessian + prepared.amount)  # (I,)
        return delta * left.masked_fill(dead, term.share)
    goal = torch.empty_like(delta)
    for rows in row_chunks(*delta.shape):
        target = delta[rows] @ term.hessian  # in float32 on a GPU, too: masks follow from it
        target.add_(delta[rows], alpha=term.amount)  # (R, I)
        # The factor is that of A with its channels reversed.
        solved = torch.cholesky_solve(target.flip(1).T, term.factor.chol)  # (I, R)
        goal[rows] = solved.T.flip(1)
    if bool(dead.any()):
        goal[:, dead] = term.share * delta[:, dead]
    return goal
