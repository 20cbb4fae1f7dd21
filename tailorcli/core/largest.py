"""Salience alone on a CPU: the mask of the largest changes in one pass over base and tuned, no array of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailorcli.core.chunks import in_shares
from tailorcli.core.precision import working_dtype
from tailorcli.core.scores import bounds_of_rank

_PIECE = 1 << 17  # entries at a time: what is worked out of them stays in the processor's cache
_SAMPLE = 30_000  # entries from which the threshold is bounded: few enough for torch to keep to one thread
_DEVIATIONS = 4.0  # of its rank in a sample: one tensor in 16,000 is worked out the long way
_MOST_BETWEEN = 0.1  # of all entries, which are kept aside with their places


@dataclass(frozen=True)
class Salient:
    """The mask of the largest changes, flat, and the sums over all entries and over the kept ones, in float64."""

    mask: Tensor
    changed: int  # entries that differ
    square: float
    square_kept: float
    total: float  # of |delta|
    total_kept: float


@dataclass
class _Piece:
    """What one pass over a piece found."""

    places: NDArray[np.intp]  # of the entries between the bounds
    changes: NDArray[np.float32]  # and their |delta|
    above: int
    sums: list[float]  # changed entries, squares, squares above, |delta|, |delta| above


def most_salient(base: Tensor, tuned: Tensor, count: int) -> Salient | None:
    """The mask of the ``count`` largest |tuned - base|, ties to the lowest index, as ``select_mask`` gives it.

    Two bounds around the threshold come from a sample; the pass marks what lies above both and puts aside what lies
    between them, among which the threshold then is. None where that is not to be had, or not faster: few entries,
    float64, NaN or infinity, many entries that are alike; whoever asks goes the long way then.
    """
    size = base.numel()
    if size < 2 * _SAMPLE or not 0 < count < size or working_dtype(base, tuned) == torch.float64:
        return None
    ours, theirs = base.reshape(-1), tuned.reshape(-1)
    stride = -(-size // _SAMPLE) | 1  # odd, so that it does not stay in one column
    sample = (theirs[::stride].to(torch.float32) - ours[::stride]).abs_().numpy()
    lower, upper = bounds_of_rank(sample, count / size, _DEVIATIONS)
    mask = np.empty(size, np.bool_)
    pieces = in_shares(lambda starts: _scan(ours, theirs, mask, lower, upper, starts), range(0, size, _PIECE))
    between = sum(piece.changes.size for piece in pieces)
    rank = count - sum(piece.above for piece in pieces)  # among those between the bounds
    sums = np.array([piece.sums for piece in pieces]).sum(0)
    if not 1 <= rank <= between or not np.isfinite(sums).all() or (sums[0] and not sums[1]):
        return None
    changes = np.concatenate([piece.changes for piece in pieces])
    chosen = _largest(changes, rank)
    places = np.concatenate([piece.places for piece in pieces])[chosen]
    mask[places] = True
    more = changes[chosen].astype(np.float64)  # no product: a BLAS would wake a thread that waits busily for 26 ms
    changed, square, square_kept, total, total_kept = sums.tolist()
    square_kept, total_kept = square_kept + float(np.square(more).sum()), total_kept + float(more.sum())
    return Salient(torch.from_numpy(mask), int(changed), square, square_kept, total, total_kept)


def _scan(
    base: Tensor, tuned: Tensor, mask: NDArray[np.bool_], lower: float, upper: float, starts: Sequence[int]
) -> list[_Piece]:
    """Mark what is above ``upper`` in the pieces from ``starts`` on; gives what lies between, and the sums."""
    room = torch.empty(min(_PIECE, base.numel()))
    flags = np.empty(room.numel(), np.bool_)
    found: list[_Piece] = []
    norm = torch.linalg.vector_norm
    most, between = int(_MOST_BETWEEN * _PIECE * len(starts)) + _PIECE, 0
    for start in starts:
        stop = min(start + _PIECE, base.numel())
        change = room[: stop - start].copy_(tuned[start:stop]).sub_(base[start:stop]).abs_()
        values, above, flag = change.numpy(), mask[start:stop], flags[: stop - start]
        # NumPy's comparisons take a fifteenth of the time of torch's.
        changed = int(np.count_nonzero(np.not_equal(values, 0.0, out=flag)))
        np.greater(values, upper, out=above)
        np.not_equal(np.greater_equal(values, lower, out=flag), above, out=flag)
        places = np.flatnonzero(flag)
        piece = _Piece(places + start, values[places], int(np.count_nonzero(above)), [])
        square, total = float(norm(change)) ** 2, float(change.sum())
        kept = torch.threshold_(change, upper, 0.0)
        piece.sums = [float(changed), square, float(norm(kept)) ** 2, total, float(kept.sum())]
        found.append(piece)
        between += places.size
        if between > most:  # so many are alike that the long way is shorter
            piece.sums = [math.nan] * 5
            break
    return found


def _largest(values: NDArray[np.float32], rank: int) -> NDArray[np.intp]:
    """Where the ``rank`` largest of ``values`` are, ties to the lowest index."""
    threshold = np.partition(values, values.size - rank)[values.size - rank]
    larger, equal = np.flatnonzero(values > threshold), np.flatnonzero(values == threshold)
    return np.concatenate((larger, equal[: rank - larger.size]))
