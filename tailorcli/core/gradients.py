"""Conjugate gradients on many masked systems at once: each iteration is one product with H for all rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from tailorcli.core.products import System, product_of_halves
from tailorcli.core.steps import State, step_

_CHECKED = 3  # iterations between two looks at which rows have converged, which a GPU waits for
_STRICTER = 0.7  # a residual worked out step by step with halves is trusted up to this share of the tolerance
_FIRST = 1e-3  # of the first round with halves: further down its residual is no longer the true one
_ROUNDS = 5  # with halves, each from the true residual, before the rows that are left go on in float32


def conjugate_gradients(
    target: Tensor, kept: Tensor, system: System, tolerance: float, max_iterations: int
) -> tuple[Tensor, int, float]:
    """Every row's x with A_SS x_S = b_S on its ``kept`` entries S, b the ``target``, zero elsewhere; all (R, I).

    A row stops where its residual is below ``tolerance`` times its right side, or all do at ``max_iterations``. With
    products of halves the rows start again from their true residual until that is reached; those that halves do not
    bring on go on in float32. An iteration with halves costs a fifth of one in float32 and counts as half of one for
    the limit. Returns also the iterations taken and the rows' summed squared residuals.
    """
    target, kept = target.contiguous(), kept.contiguous()  # of a stored transpose they are not
    squares = target.square().sum(1)  # (R,)
    goal = tolerance**2 * squares
    if system.half is None:
        solution, steps, squares = _descend(target, kept, system, goal, max_iterations)
        return solution, steps, float(squares.sum(dtype=torch.float64))
    solution, steps, rounds, residual = torch.zeros_like(target), 0, 0, target
    rows = torch.arange(target.shape[0], device=target.device)
    while rows.numel() and steps < 2 * max_iterations:
        rounds += 1
        chosen, everything = (system if rounds <= _ROUNDS else system.exact), rows.numel() == target.shape[0]
        part_kept = kept if everything else kept[rows]
        start, before = solution[rows], squares[rows]
        wanted = goal[rows] * (_STRICTER**2 if chosen is system else 1.0)
        if rounds == 1:
            wanted = torch.maximum(wanted, _FIRST**2 * before)
        most = 2 * max_iterations - steps if chosen is system else max(1, max_iterations - steps // 2)
        more, taken = _descend(residual, part_kept, chosen, wanted, most)[:2]
        steps += taken
        tried = more.add_(start)
        left = torch.where(
            part_kept,
            (target if everything else target[rows]) - chosen.product(tried).add_(tried, alpha=chosen.amount),
            0.0,
        )
        after = left.square().sum(1)
        better = after < before  # not of a row that is no number
        solution[rows] = torch.where(better.unsqueeze(1), tried, start)
        squares[rows] = torch.where(better, after, before)
        open_rows = squares[rows] > goal[rows]
        if chosen is not system:
            break
        if bool((open_rows & ~(after < 0.5 * before)).any()):
            rounds = _ROUNDS
        residual = torch.where(better.unsqueeze(1), left, residual)[open_rows]
        rows = rows[open_rows]
    return solution, steps, float(squares.sum(dtype=torch.float64))


Step = Callable[[Tensor, State], None]


def _descend(
    target: Tensor, kept: Tensor, system: System, goal: Tensor, max_iterations: int
) -> tuple[Tensor, int, Tensor]:
    """Conjugate gradients with a Jacobi preconditioner, until each row's squared residual is at most its ``goal``.

    A row that has converged stops moving, and leaves the products once a quarter of the rows have. Returns the
    solution (R, I), the iterations, and the rows' squared residuals as they were worked out step by step.
    """
    checked = 1 if target.device.type == "cpu" else _CHECKED
    solution, squares, steps = torch.zeros_like(target), torch.zeros_like(goal), 0
    rows = torch.arange(target.shape[0], device=target.device)
    state = _start(target, kept, system, goal)
    step_ = _step_of(state.p)
    while True:
        if steps % checked == 0 or steps >= max_iterations:
            live = state.rr > state.goal
            num_live = int(live.sum())
            finished = num_live == 0 or steps >= max_iterations
            if finished or num_live <= 0.75 * rows.numel():
                done = torch.ones_like(live) if finished else ~live
                solution[rows[done]], squares[rows[done]] = state.x[done], state.rr[done]
                if finished:
                    return (solution if system.scale is None else solution.mul_(system.scale)), steps, squares
                state, rows = state.of_rows(live), rows[live]
        steps += 1
        if system.half is None:
            q = (state.p @ system.hessian).add_(state.p, alpha=system.amount)
        else:
            q = product_of_halves(state.p, system.half)
        step_(q, state)


def _start(target: Tensor, kept: Tensor, system: System, goal: Tensor) -> State:
    """A solution of zero, and the first direction: the steepest descent."""
    diagonal = system.hessian.diagonal() + system.amount
    rr, ones = target.square().sum(1), torch.ones_like(goal)
    x = torch.zeros_like(target)
    if system.scale is None:
        inverse = torch.where(diagonal > 0, 1.0 / diagonal, 0.0)
        p = target * inverse
        return State(p, x, target.clone(), kept, inverse, ones, (target * p).sum(1), rr, goal)
    r = target * system.scale
    rz = r.square().sum(1)
    length = torch.where(rz > 0, rz.sqrt(), ones)
    return State((r / length.unsqueeze(1)).to(torch.float16), x, r, kept, diagonal, length, rz, rr, goal)


def _step_of(p: Tensor) -> Step:
    """The kernel where it runs, else plain torch, which gives the same to rounding."""
    return _kernel(p.device) or step_ if p.dtype == torch.float16 and p.device.type == "cuda" else step_


def _kernel(device: torch.device) -> Step | None:
    """The kernel, if Triton is there and gives on a small system what plain torch gives."""
    return kernel_or_reason(device)[0]


@cache
def kernel_or_reason(device: torch.device) -> tuple[Step | None, str]:
    """The kernel, or None and why it is not used: Triton is not there, does not compile it, or it disagrees."""
    try:
        from tailorcli.core import kernels
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(4, 72, generator=generator) < 0.4
    r = torch.where(kept, torch.randn(4, 72, generator=generator), 0.0)
    p = torch.where(kept, torch.randn(4, 72, generator=generator), 0.0).to(torch.float16)
    q = 2.0 * p.to(torch.float32) + 0.1
    ones, goal = torch.ones(4), torch.tensor([0.0, 0.0, 1e9, 0.0])  # the third row has converged
    squares = r.square().sum(1)
    given = State(p, torch.zeros_like(r), r, kept, torch.full((72,), 0.5), 2.0 * ones, squares, 0.5 * squares, goal)
    ours, theirs = (State(*(item.clone().to(device) for item in given)) for _ in range(2))
    try:
        step_(q.to(device, copy=True), ours)  # which uses it up
        kernels.step_(q.to(device, copy=True), theirs)
        pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
        apart = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in pairs)
    except Exception as error:  # no compiler, or whatever Triton raises
        return None, f"{type(error).__name__}: {str(error).strip()[:500]}"
    return (kernels.step_, "") if apart < 2e-3 else (None, f"it is {apart:.1e} apart from plain torch")
