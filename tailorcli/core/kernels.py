"""The one Triton kernel: a step of conjugate gradients in one pass over its arrays. Import it where Triton is there."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from tailorcli.core.gradients import State

_BLOCK = 4096  # columns at a time


@triton.jit  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]  # noqa: ANN202
    q_at: Any,
    p_at: Any,
    x_at: Any,
    r_at: Any,
    kept_at: Any,
    inverse_at: Any,
    rz_at: Any,
    rr_at: Any,
    goal_at: Any,
    amount: Any,
    columns: tl.constexpr,  # a model has few widths: one compilation each
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rr = tl.load(rr_at + row)
    if rr > tl.load(goal_at + row):
        start = row * columns
        high_at, low_at, again_at = p_at + 3 * start, p_at + 3 * start + columns, p_at + 3 * start + 2 * columns
        bends = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, columns, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < columns
            p = tl.load(high_at + at, mask=inside, other=0.0).to(tl.float32)
            p += tl.load(low_at + at, mask=inside, other=0.0).to(tl.float32)
            q = tl.load(q_at + start + at, mask=inside, other=0.0)
            bends += p * (q + amount * p)
        curvature = tl.sum(bends, axis=0)
        rz = tl.load(rz_at + row)
        step = tl.where(curvature > 0, rz / curvature, 0.0)
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        scaled = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, columns, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < columns
            p = tl.load(high_at + at, mask=inside, other=0.0).to(tl.float32)
            p += tl.load(low_at + at, mask=inside, other=0.0).to(tl.float32)
            q = tl.load(q_at + start + at, mask=inside, other=0.0)
            kept = tl.load(kept_at + start + at, mask=inside, other=0)
            inverse = tl.load(inverse_at + at, mask=inside, other=0.0)
            x = tl.load(x_at + start + at, mask=inside, other=0.0)
            r = tl.load(r_at + start + at, mask=inside, other=0.0)
            r -= step * tl.where(kept != 0, q + amount * p, 0.0)
            tl.store(x_at + start + at, x + step * p, mask=inside)
            tl.store(r_at + start + at, r, mask=inside)
            squares += r * r
            scaled += r * r * inverse
        rz_next = tl.sum(scaled, axis=0)
        further = tl.where(rz > 0, rz_next / rz, 0.0)
        tl.debug_barrier()  # r is read again by other threads than wrote it
        for first in range(0, columns, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < columns
            p = tl.load(high_at + at, mask=inside, other=0.0).to(tl.float32)
            p += tl.load(low_at + at, mask=inside, other=0.0).to(tl.float32)
            inverse = tl.load(inverse_at + at, mask=inside, other=0.0)
            r = tl.load(r_at + start + at, mask=inside, other=0.0)
            p = r * inverse + further * p
            high = p.to(tl.bfloat16)
            low = (p - high.to(tl.float32)).to(tl.bfloat16)
            tl.store(high_at + at, high, mask=inside)
            tl.store(low_at + at, low, mask=inside)
            tl.store(again_at + at, high, mask=inside)
        tl.store(rz_at + row, rz_next)
        tl.store(rr_at + row, tl.sum(squares, axis=0))


def step_(q: Tensor, state: "State", amount: float) -> None:
    """``core.gradients.step_`` on a GPU, where ``state.p`` is in parts; all are contiguous. ``q`` stays as it is."""
    rows, columns = state.x.shape
    kept = state.kept.view(torch.uint8)
    vectors = (state.inverse, state.rz, state.rr, state.goal)
    block = min(_BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _step[(rows,)](q, state.p, state.x, state.r, kept, *vectors, amount, columns, BLOCK=block, num_warps=8)
