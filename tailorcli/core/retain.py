"""The retain term (Eq. 4): fit the new task, and leave what the base does on retained data as it is.

With H from the tuned model on the new task and H_r from the base on data that stand for what it must not forget,

    minimise   (d - delta) H (d - delta)^T + beta s d H_r d^T   subject to   d = 0 where the mask is False,

s = mean(diag H) / mean(diag H_r), so that beta has no unit. Up to a constant this is (d - goal) A (d - goal)^T with
A = H + beta s H_r and goal = delta H A^-1: the problem of Eq. 5 with another Hessian and another delta. So scores,
mask and solvers stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailorcli.core.chunks import row_slices
from tailorcli.core.hessian import Factor, diagonal_of

_CHUNK_ENTRIES = 1 << 24  # 64 MiB a float32 work array


def retain_scale(hessian: Tensor, retained: Tensor, weight: float) -> float:
    """beta s: what ``retained`` H_r is multiplied by beside H; zero where the retained data never reach the layer."""
    mean = float(diagonal_of(retained).mean())
    return weight * float(diagonal_of(hessian).mean()) / mean if mean > 0 else 0.0


def combined_hessian(hessian: Tensor, retained: Tensor, scale: float) -> Tensor:
    """A = H + scale H_r, both (I, I) or both diagonals (I,)."""
    return torch.add(hessian, retained, alpha=scale)


def retained_goal_(delta: Tensor, hessian: Tensor, amount: float, system: Factor | Tensor) -> Tensor:
    """goal = delta (H + amount I) A^-1, in place of ``delta`` (O, I): where the retain term wants every entry.

    ``system`` is the Cholesky factor of the damped A, or the damped diagonal (I,) itself. ``amount`` is what damping
    adds to H alone, so that with weight zero the goal is delta.
    """
    if isinstance(system, Tensor):
        return delta.mul_((hessian + amount) / system)
    for rows in row_slices(*delta.shape, _CHUNK_ENTRIES):
        target = delta[rows] @ hessian
        target.add_(delta[rows], alpha=amount)  # (R, I)
        # The factor is that of A with its channels reversed (``factorise``).
        solved = torch.cholesky_solve(target.flip(1).T, system.chol)  # (I, R)
        delta[rows] = solved.T.flip(1)
    return delta
