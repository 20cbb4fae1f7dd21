"""The one Triton kernel: a step of conjugate gradients in one pass over its arrays. Import it where Triton is there."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailorcli.core.steps import State

_BLOCK = 2048  # columns at a time: with 8 warps four rows are under way on a multiprocessor, with more columns one


# Triton reads the annotations, too, and knows none but its own.
@triton.jit  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]  # noqa: ANN202
    q_at,  # noqa: ANN001
    p_at,  # noqa: ANN001
    x_at,  # noqa: ANN001
    r_at,  # noqa: ANN001
    kept_at,  # noqa: ANN001
    weight_at,  # noqa: ANN001
    length_at,  # noqa: ANN001
    rz_at,  # noqa: ANN001
    rr_at,  # noqa: ANN001
    goal_at,  # noqa: ANN001
    columns: tl.constexpr,  # a model has few widths: one compilation each
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(rr_at + row) > tl.load(goal_at + row):
        start = row * columns
        bends = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, columns, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < columns
            p = tl.load(p_at + start + at, mask=inside, other=0.0).to(tl.float32)
            q = tl.load(q_at + start + at, mask=inside, other=0.0)
            bends += p * q  # p is zero where nothing is kept
        curvature = tl.sum(bends, axis=0)
        length = tl.load(length_at + row)
        rz = tl.load(rz_at + row)
        step = tl.where(curvature > 0, rz / (length * curvature), 0.0)
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, columns, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < columns
            p = tl.load(p_at + start + at, mask=inside, other=0.0).to(tl.float32)
            q = tl.load(q_at + start + at, mask=inside, other=0.0)
            kept = tl.load(kept_at + start + at, mask=inside, other=0)
            x = tl.load(x_at + start + at, mask=inside, other=0.0)
            r = tl.load(r_at + start + at, mask=inside, other=0.0)
            weight = tl.load(weight_at + at, mask=inside, other=0.0)
            r -= step * tl.where(kept != 0, q, 0.0)
            tl.store(x_at + start + at, x + step * p, mask=inside)
            tl.store(r_at + start + at, r, mask=inside)
            squares += r * r
            weighted += r * r * weight
        rz_next = tl.sum(squares, axis=0)
        length_next = tl.where(rz_next > 0, tl.sqrt(rz_next), 1.0)
        further = tl.where(rz > 0, length * rz_next / rz, 0.0) / length_next
        tl.debug_barrier()  # r may be read again by other threads than wrote it
        for first in range(0, columns, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < columns
            p = tl.load(p_at + start + at, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(r_at + start + at, mask=inside, other=0.0)
            tl.store(p_at + start + at, (r / length_next + further * p).to(tl.float16), mask=inside)
        tl.store(length_at + row, length_next)
        tl.store(rz_at + row, rz_next)
        # A row that goes no further, as halves are not quite positive definite, waits for its true residual.
        tl.store(rr_at + row, tl.where(curvature > 0, tl.sum(weighted, axis=0), 0.0))


def step_(q: Tensor, state: State) -> None:
    """``core.gradients.step_`` on a GPU; all are contiguous. ``q`` stays as it is."""
    rows, columns = state.x.shape
    arrays = (state.p, state.x, state.r, state.kept.view(torch.uint8), state.weight)
    block = min(_BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        vectors = (state.length, state.rz, state.rr, state.goal)
        _step[(rows,)](q, *arrays, *vectors, columns, BLOCK=block, num_warps=8)
