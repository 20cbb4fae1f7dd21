"""Masked systems solved directly: A_SS of each row gathered out of H, factorised by Cholesky; on a CPU.

A row's S is its own, so that nothing of one factor serves another. What counts is memory: an entry of A_SS lies
somewhere in H, which is larger than a core's cache. So rows go in batches; those parts of their systems that come of
the same part of H are gathered together, and of each system, which is symmetric, the lower triangle alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailorcli.core.chunks import side_by_side

_BATCH_ENTRIES = 1 << 19  # of the systems of a batch: they stay in the cache
_MOST_TOGETHER = 32  # rows of a batch, above which gathering gains no more
_STRIP = 16  # rows of a system that are gathered at a time
_SLOW = 128  # up to so many entries a row LAPACK factorises column by column, at a quarter of its later rate
_PANEL = 32  # columns of those that are factorised together


def solve_directly_(
    solution: Tensor, target: Tensor, kept: Tensor, hessian: Tensor, amount: float, chosen: Sequence[bool]
) -> tuple[list[int], float]:
    """Solve A_SS x_S = b_S of the ``chosen`` rows into ``solution``, in place; A = hessian + amount I, b the target.

    ``solution``, ``target`` and ``kept`` are (R, I) on the CPU; ``solution`` is zero there before. Returns the rows
    whose A_SS is numerically singular, which stay zero, and the squared residual of the others. Rows of about equally
    many kept entries are factorised as one batch, filled up with the identity; batches are the same for any number
    of threads.
    """
    within, right, found = kept.numpy(), target.numpy(), solution.numpy()
    entries, width = hessian.reshape(-1).numpy(), hessian.shape[1]
    counts = np.count_nonzero(within, axis=1)
    rows = np.flatnonzero(np.asarray(chosen) & (counts > 0))
    rows = rows[np.argsort(counts[rows], kind="stable")]
    batches: list[NDArray[np.intp]] = []
    while rows.size:
        number = 1
        while number < min(rows.size, _MOST_TOGETHER) and (number + 1) * counts[rows[number]] ** 2 <= _BATCH_ENTRIES:
            number += 1
        batches.append(rows[:number])
        rows = rows[number:]

    def solve(batch: NDArray[np.intp]) -> tuple[list[int], float]:
        sizes = counts[batch]
        row, column = np.nonzero(within[batch])
        held = np.arange(_room_for(int(sizes[-1]))) < sizes[:, None]  # (B, n)
        index = np.zeros(held.shape, np.intp)
        index[held] = column
        wanted = np.zeros(held.shape, np.float32)
        wanted[held] = right[batch[row], column]
        systems = torch.from_numpy(_lower_systems(entries, width, index, sizes))
        systems.diagonal(dim1=1, dim2=2).add_(amount)
        values, sound, squares = _solved(systems, torch.from_numpy(wanted))
        held[~sound] = False
        good = sound[row]
        found[batch[row[good]], column[good]] = values[held]
        return batch[~sound].tolist(), squares

    results = side_by_side(solve, batches)
    return sorted(row for failed, _ in results for row in failed), sum(square for _, square in results)


def _lower_systems(
    entries: NDArray[np.float32], width: int, index: NDArray[np.intp], sizes: NDArray[np.intp]
) -> NDArray[np.float32]:
    """The lower triangles of the matrices (I, I) = ``entries`` at the rows and columns ``index`` (B, n), as (B, n, n).

    Of a row with fewer ``sizes`` than n the rest is the identity; above the diagonal is whatever was there. ``width``
    is I. The array is the thread's own, for its next batch.
    """
    number, size = index.shape
    systems = _room(number * size * size).reshape(number, size, size)
    begins = index * width
    for start in range(0, size, _STRIP):
        stop = min(start + _STRIP, size)
        places = begins[:, start:stop, None] + index[:, None, :stop]
        systems[:, start:stop, :stop] = entries.take(places, mode="clip")  # none is outside; a check takes its time
    for system, own in zip(systems, sizes, strict=True):
        if own < size:
            system[own:] = 0.0
            np.fill_diagonal(system[own:, own:], 1.0)
    return systems


def _room_for(count: int) -> int:
    """The size of the systems of a batch whose largest has ``count`` entries, one at which LAPACK is at its rate."""
    if count <= _SLOW:
        return count
    size = -(-count // 16) * 16
    return size if size % 128 else size + 16  # with powers of two columns push one another out of the cache


_of_thread = threading.local()  # ``room``: an array that is used again, as fresh memory takes as long as filling it


def _room(entries: int) -> NDArray[np.float32]:
    """So many numbers of whatever values, in memory of this thread."""
    if entries > _BATCH_ENTRIES:
        return np.empty(entries, np.float32)
    if not hasattr(_of_thread, "room"):
        _of_thread.room = np.empty(_BATCH_ENTRIES, np.float32)
    room: NDArray[np.float32] = _of_thread.room
    return room[:entries]


def _solved(systems: Tensor, right: Tensor) -> tuple[NDArray[np.float32], NDArray[np.bool_], float]:
    """Solutions (B, n) of A x = ``right`` (B, n), which of them are sound, and the squared residual of these.

    A (B, n, n) is symmetric; its lower triangle is read, and what is above it becomes zero.
    """
    columns = right.unsqueeze(2)  # (B, n, 1)
    values, info = _by_panels(systems, columns) if _PANEL < systems.shape[1] <= _SLOW else _whole(systems, columns)
    lower = systems.tril_()
    left = torch.baddbmm(columns, lower, values, beta=-1.0).baddbmm_(lower.mT, values).squeeze(2)
    left.addcmul_(lower.diagonal(dim1=1, dim2=2), values.squeeze(2), value=-1.0)
    squares = left.square().sum(1)
    sound = (info == 0) & squares.isfinite()
    return values.squeeze(2).numpy(), sound.numpy(), float(squares[sound].sum())


def _whole(systems: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Solutions (B, n, 1) by Cholesky, and for each 0 where it has a factor."""
    solve = torch.linalg.solve_triangular
    factor, info = torch.linalg.cholesky_ex(systems)
    return solve(factor.mT, solve(factor, right, upper=False), upper=True), info


def _by_panels(systems: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """What ``_whole`` gives, by a factor of a few columns at a time, and by products."""
    solve = torch.linalg.solve_triangular
    panels: list[tuple[Tensor, Tensor, Tensor]] = []  # a factor, what is below it as its transpose, and L y = b
    singular = torch.zeros(systems.shape[0], dtype=torch.int32)
    while systems.shape[1] > _PANEL:
        factor, info = torch.linalg.cholesky_ex(systems[:, :_PANEL, :_PANEL])
        below = solve(factor, systems[:, _PANEL:, :_PANEL].mT, upper=False)  # (B, P, rest)
        found = solve(factor, right[:, :_PANEL], upper=False)
        panels.append((factor, below, found))
        singular |= info
        systems = torch.baddbmm(systems[:, _PANEL:, _PANEL:], below.mT, below, alpha=-1.0)
        right = torch.baddbmm(right[:, _PANEL:], below.mT, found, alpha=-1.0)
    values, info = _whole(systems, right)
    for factor, below, found in reversed(panels):
        above = solve(factor.mT, torch.baddbmm(found, below, values, alpha=-1.0), upper=True)
        values = torch.cat((above, values), 1)
    return values, singular | info
