"""Conjugate gradients on many masked systems at once: each iteration is one product with H for all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tailorcli.core.products import System, joined, left_parts, product_of_halves

_CHECKED = 3  # iterations between two looks at which rows have converged, which a GPU waits for
_STRICTER = 0.95  # a residual worked out step by step is trusted up to this share of the tolerance


class State(NamedTuple):
    """Where the descent of R rows is; ``step_`` changes all but ``kept``, ``inverse`` and ``goal``."""

    p: Tensor  # (R, I) directions, or their parts (R, 3 I) in bfloat16
    x: Tensor  # (R, I) solution
    r: Tensor  # (R, I) residual
    kept: Tensor  # (R, I) bool
    inverse: Tensor  # (I,) of A's diagonal, the preconditioner D^-1
    rz: Tensor  # (R,) r D^-1 r
    rr: Tensor  # (R,) r r
    goal: Tensor  # (R,) a row with rr at most this has converged

    def of_rows(self, chosen: Tensor) -> State:
        """Those of some rows."""
        return State(*(item if item is self.inverse else item[chosen] for item in self))


Step = Callable[[Tensor, State, float], None]


def conjugate_gradients(
    target: Tensor, kept: Tensor, system: System, tolerance: float, max_iterations: int
) -> tuple[Tensor, int, float]:
    """Every row's x with A_SS x_S = b_S on its ``kept`` entries S, b the ``target``, zero elsewhere; all (R, I).

    A row stops where its residual is below ``tolerance`` times its right side, or all do at ``max_iterations``. With
    products in bfloat16 parts the true residual is looked at in the end, and rows that are not there go on from it in
    float32. Returns also the iterations taken and the rows' summed squared residuals.
    """
    goal = tolerance**2 * target.square().sum(1)  # (R,)
    if system.parts is None:
        return _descend(target, kept, system, goal, max_iterations)
    solution, steps, _ = _descend(target, kept, system, _STRICTER**2 * goal, max_iterations)
    residual = _residual(solution, target, kept, system)
    squares = residual.square().sum(1)
    rows = (squares > goal).nonzero().squeeze(1)
    if rows.numel() and steps < max_iterations:
        exact = replace(system, parts=None)
        wanted = _residual(solution[rows], target[rows], kept[rows], exact)
        more, taken, _ = _descend(wanted, kept[rows], exact, goal[rows], max_iterations - steps)
        solution[rows] += more
        squares[rows] = _residual(solution[rows], target[rows], kept[rows], exact).square().sum(1)
        steps += taken
    return solution, steps, float(squares.sum(dtype=torch.float64))


def _residual(solution: Tensor, target: Tensor, kept: Tensor, system: System) -> Tensor:
    """B - A_SS x, worked out from the solution itself."""
    return torch.where(kept, target - system.product(solution).add_(solution, alpha=system.amount), 0.0)


def _descend(
    target: Tensor, kept: Tensor, system: System, goal: Tensor, max_iterations: int
) -> tuple[Tensor, int, float]:
    """Conjugate gradients with a Jacobi preconditioner, until each row's squared residual is at most its ``goal``.

    A row that has converged stops moving, and leaves the products once a quarter of the rows have. Returns the
    solution (R, I), the iterations, and the sum of the rows' squared residuals.
    """
    target, kept = target.contiguous(), kept.contiguous()  # of a stored transpose they are not
    checked = 1 if target.device.type == "cpu" else _CHECKED
    solution = torch.zeros_like(target)
    diagonal = system.hessian.diagonal() + system.amount
    inverse = torch.where(diagonal > 0, 1.0 / diagonal, 0.0)  # Jacobi
    residual_sq, steps = 0.0, 0
    rows = torch.arange(target.shape[0], device=target.device)
    p = target * inverse
    rz, rr = (target * p).sum(1), target.square().sum(1)
    if system.parts is not None:
        p = left_parts(p)
    state = State(p, torch.zeros_like(target), target.clone(), kept, inverse, rz, rr, goal)
    step_ = _step_of(target.device, system.parts is not None)
    while True:
        if steps % checked == 0 or steps >= max_iterations:
            live = state.rr > state.goal
            num_live = int(live.sum())
            if num_live == 0 or steps >= max_iterations:
                solution[rows] = state.x
                return solution, steps, residual_sq + float(state.rr.sum(dtype=torch.float64))
            if num_live <= 0.75 * rows.numel():
                done = ~live
                solution[rows[done]] = state.x[done]
                residual_sq += float(state.rr[done].sum(dtype=torch.float64))
                state, rows = state.of_rows(live), rows[live]
        steps += 1
        q = state.p @ system.hessian if system.parts is None else product_of_halves(state.p, system.parts)
        step_(q, state, system.amount)


def step_(q: Tensor, state: State, amount: float) -> None:
    """One step along ``state.p`` for every row that is above its goal, given ``q`` = p H, which is used up."""
    p, x, r, kept, inverse, rz, rr, goal = state
    in_parts = p.dtype == torch.bfloat16
    along = joined(p) if in_parts else p
    live = rr > goal
    q.add_(along, alpha=amount).mul_(kept)
    curvature = (along * q).sum(1)
    step = torch.where(live & (curvature > 0), rz / curvature, 0.0).unsqueeze(1)  # (R, 1)
    x.addcmul_(along, step)
    r.addcmul_(q, step, value=-1.0)
    z = torch.mul(r, inverse, out=q)
    rz_next = torch.linalg.vecdot(r, z)
    further = torch.where(live, torch.where(rz > 0, rz_next / rz, 0.0), 1.0).unsqueeze(1)
    z.mul_(live.unsqueeze(1))  # a row that has converged keeps its direction
    if in_parts:
        p.copy_(left_parts(z.addcmul_(along, further)))
    else:
        p.mul_(further).add_(z)
    rz.copy_(torch.where(live, rz_next, rz))
    rr.copy_(torch.where(live, torch.linalg.vecdot(r, r), rr))


def _step_of(device: torch.device, in_parts: bool) -> Step:
    """The kernel where it runs, else plain torch, which gives the same to rounding."""
    return _kernel(device) or step_ if in_parts and device.type == "cuda" else step_


@cache
def _kernel(device: torch.device) -> Step | None:
    """The kernel, if Triton is there and gives on a small system what plain torch gives."""
    try:
        from tailorcli.core import kernels
    except ImportError:
        return None
    generator = torch.Generator().manual_seed(0)
    rows, size = 4, 72
    q, start, r = (torch.randn(rows, size, generator=generator).to(device) for _ in range(3))
    inverse, ones = torch.full((size,), 0.5, device=device), torch.ones(rows, device=device)
    goal = torch.tensor([0.0, 0.0, 3.0, 0.0], device=device)  # the third row has converged
    kept = r > 0  # directions and residuals are zero elsewhere, on which the kernel relies
    start, r = start * kept, r * kept
    given = State(left_parts(start), torch.zeros_like(r), r, kept, inverse, 40.0 * ones, 2.0 * ones, goal)
    ours, theirs = (State(*(item.clone() for item in given)) for _ in range(2))
    try:
        step_(q.clone(), ours, 0.1)
        kernels.step_(q.clone(), theirs, 0.1)
        torch.cuda.synchronize(device)
    except Exception:  # no compiler, or whatever Triton raises
        return None
    pairs = [(joined(ours.p), joined(theirs.p)), *zip(ours[1:], theirs[1:], strict=True)]
    return kernels.step_ if all(torch.allclose(a.float(), b.float(), 1e-3, 1e-3) for a, b in pairs) else None
