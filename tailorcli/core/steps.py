"""One step of the conjugate gradients that ``gradients`` takes, in torch; ``kernels`` has the same for a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """Where the descent of R rows is; ``step_`` changes all but ``kept``, ``weight`` and ``goal``, in place.

    With halves x and r are those of the scaled system, x / D^-1/2 and r D^-1/2, in which the preconditioner is 1, and
    directions are ``length`` times ``p``, so that float16 holds them.
    """

    p: Tensor  # (R, I) directions
    x: Tensor  # (R, I) solution
    r: Tensor  # (R, I) residual
    kept: Tensor  # (R, I) bool
    weight: Tensor  # (I,) D with halves; else D^-1, the preconditioner
    length: Tensor  # (R,)
    rz: Tensor  # (R,) the residual's square in the preconditioner's norm
    rr: Tensor  # (R,) and in the plain one
    goal: Tensor  # (R,) a row with rr at most this has converged

    def of_rows(self, chosen: Tensor) -> State:
        """Those of some rows."""
        return State(*(item if item is self.weight else item[chosen] for item in self))


def step_(q: Tensor, state: State) -> None:
    """One step along ``state.p`` for every row that is above its goal, given ``q`` = p A, which is used up."""
    p, x, r, kept, weight, length, rz, rr, goal = state
    halves = p.dtype == torch.float16
    along = p.to(torch.float32) if halves else p
    live = rr > goal
    q.mul_(kept)
    curvature = (along * q).sum(1)
    step = torch.where(live & (curvature > 0), rz / (length * curvature), 0.0).unsqueeze(1)  # (R, 1)
    x.addcmul_(along, step)
    r.addcmul_(q, step, value=-1.0)
    square = torch.mul(r, r, out=q)
    plain = square.sum(1)
    weighted = square.mul_(weight).sum(1)
    rz_next, rr_next = (plain, weighted) if halves else (weighted, plain)
    if halves:  # a row that goes no further, as halves are not quite positive definite, waits for its true residual
        rr_next = torch.where(curvature > 0, rr_next, 0.0)
    further = torch.where(live & (rz > 0), length * rz_next / rz, 0.0)
    if halves:
        longer = torch.where(rz_next > 0, rz_next.sqrt(), 1.0)
        following = torch.addcmul(r / longer.unsqueeze(1), along, (further / longer).unsqueeze(1))
        p.copy_(torch.where(live.unsqueeze(1), following, along))
        length.copy_(torch.where(live, longer, length))
    else:
        kept_on = torch.where(live, further, 1.0).unsqueeze(1)  # a row that has converged keeps its direction
        p.mul_(kept_on).addcmul_(torch.mul(r, weight, out=q), live.unsqueeze(1).to(q.dtype))
    rz.copy_(torch.where(live, rz_next, rz))
    rr.copy_(torch.where(live, rr_next, rr))
