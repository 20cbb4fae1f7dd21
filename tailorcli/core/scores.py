"""Which entries to keep: salience (Eq. 10), sensitivity (Eq. 9), their fusion (Eq. 11), the mask (Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tailorcli.core.chunks import in_shares

_TIE_CHUNK = 1 << 18  # entries searched for ties at a time
_GPU_CHUNK = 1 << 26  # entries whose places, or digits, are worked out at a time on a GPU: they take 8 bytes each
_BOUNDING = 1 << 16  # entries of the sample that bounds a threshold
_PIECE = 1 << 17  # entries that are compared at a time, in the processor's cache


def salience(delta: Tensor) -> Tensor:
    """How far fine-tuning moved each entry, |delta|, Eq. 10; same shape as ``delta``."""
    return delta.abs()


def sensitivity(delta: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """What putting an entry back costs the new task, delta^2 / (2 [H^-1]_jj), Eq. 9.

    ``inverse_diagonal`` broadcasts against ``delta``; infinity (a dead channel) gives zero.
    """
    return delta.square() / (2.0 * inverse_diagonal)


def minmax(score: Tensor, low: float, high: float) -> Tensor:
    """The score moved to [0, 1] by the tensor's own minimum and maximum; a constant score becomes zero."""
    if not high > low:
        return torch.zeros_like(score)
    return (score - low) / (high - low)


def fuse(normalised_salience: Tensor, normalised_sensitivity: Tensor, omega: float) -> Tensor:
    """The hybrid score, Eq. 11: ``omega`` weighs the min-max normalised salience."""
    return omega * normalised_salience + (1.0 - omega) * normalised_sensitivity


def count_kept(density: float, num_entries: int) -> int:
    """How many entries a mask of this density keeps: exactly round(density * numel)."""
    return round(density * num_entries)


def select_mask(score: Tensor, count: int) -> Tensor:
    """A bool mask of exactly ``count`` True entries, the highest scores, ties to the lowest index.

    ``score`` must be finite and not negative. Linear in the number of entries: it finds the threshold by
    selection, never by sorting.

    >>> select_mask(torch.tensor([[1.0, 3.0], [3.0, 3.0]]), 2).tolist()
    [[False, True], [True, False]]
    """
    flat = score.reshape(-1)
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= flat.numel():
        return torch.ones_like(score, dtype=torch.bool)
    threshold = _kth_largest(flat, count)
    mask = _at_least(flat, threshold)
    surplus = int(mask.count_nonzero()) - count  # ties beyond the count: the last of them go
    stop = flat.numel()
    step = _TIE_CHUNK if flat.device.type == "cpu" else _GPU_CHUNK
    while surplus > 0:
        start = max(0, stop - step)
        ties = (flat[start:stop] == threshold).nonzero().squeeze(1)[-surplus:]
        mask[start + ties] = False
        surplus -= ties.numel()
        stop = start
    return mask.view(score.shape)


def _kth_largest(flat: Tensor, count: int) -> Tensor:
    """The ``count``-th largest value: between two bounds, else by NumPy's selection on the CPU, elsewhere by radix."""
    if flat.device.type == "cpu":
        values: np.ndarray = flat.numpy()
        least = _kth_largest_in_pieces(values, count) if values.size > 2 * _BOUNDING else None
        return torch.tensor(np.partition(values, values.size - count)[values.size - count] if least is None else least)
    found = _kth_largest_between(flat, count)
    return _kth_largest_by_radix(flat, count) if found is None else found


def _at_least(flat: Tensor, threshold: Tensor) -> Tensor:
    """``flat >= threshold``; on a CPU by NumPy, whose comparisons take a fifteenth of the time of torch's."""
    if flat.device.type != "cpu":
        return flat >= threshold
    return torch.from_numpy(np.greater_equal(flat.numpy(), threshold.numpy()))


def bounds_of_rank(sample: np.ndarray, share: float, deviations: float) -> tuple[float, float]:
    """Two values of ``sample`` (S,) between which lies what the ``share`` of all entries is above; or an infinity.

    ``deviations`` are of its rank in a sample, to both sides.
    """
    spread = deviations * (sample.size * share * (1.0 - share)) ** 0.5 + 1.0
    low = int((1.0 - share) * sample.size - spread)  # ranks from the smallest on
    high = int((1.0 - share) * sample.size + spread) + 1
    found = np.partition(sample, [rank for rank in (low, high) if 0 <= rank < sample.size] or [0])
    return float(found[low]) if low >= 0 else -np.inf, float(found[high]) if high < sample.size else np.inf


def _kth_largest_in_pieces(values: np.ndarray, count: int) -> float | None:
    """The ``count``-th largest value among the few between two bounds; None where the sample misses it."""
    stride = max(1, values.size // _BOUNDING) | 1  # odd, so that it does not stay in one column
    lower, upper = bounds_of_rank(values[::stride], count / values.size, 4.0)

    def scan(starts: Sequence[int]) -> list[tuple[int, np.ndarray]]:
        found = []
        for start in starts:
            piece = values[start : start + _PIECE]
            above = piece > upper
            found.append((int(np.count_nonzero(above)), piece[(piece >= lower) != above]))
        return found

    pieces = in_shares(scan, range(0, values.size, _PIECE))
    between = np.concatenate([found for _, found in pieces])
    rank = count - sum(above for above, _ in pieces)  # among those between the bounds
    if not 1 <= rank <= between.size:
        return None
    return float(np.partition(between, between.size - rank)[between.size - rank])


def _kth_largest_between(flat: Tensor, count: int) -> Tensor | None:
    """The ``count``-th largest value among the few entries between two bounds that a sample gives.

    None where the sample misses it: entries that are no sample of all others, or many that are alike.
    """
    stride = max(1, flat.numel() // _BOUNDING) | 1  # odd, so that it does not stay in one column
    sample = flat[::stride].sort(descending=True).values
    share = count / flat.numel()
    spread = 6.0 * (sample.numel() * share * (1.0 - share)) ** 0.5 + 1.0  # six deviations of the rank in a sample
    first, last = int(share * sample.numel() - spread), int(share * sample.numel() + spread)
    upper = sample[first] if first > 0 else flat.max()
    lower = sample[last] if last < sample.numel() else flat.min()
    above, least = (flat > upper).count_nonzero(), (flat >= lower).count_nonzero()
    size = int(least - above)  # of those between the bounds, counted before they are gathered
    rank = count - int(above)
    if not 1 <= rank <= size or size > flat.numel() // 4 + _BOUNDING:
        return None
    inside = [piece[(piece >= lower) & (piece <= upper)] for piece in torch.split(flat, _GPU_CHUNK)]
    return torch.cat(inside).sort(descending=True).values[rank - 1]


def _kth_largest_by_radix(flat: Tensor, count: int) -> Tensor:
    """Selection by counting digits of the bit pattern, which orders floats that are not negative.

    Three passes of 11, 11 and 10 bits; each keeps only the entries that share the digits found so far.
    """
    pieces: Sequence[Tensor] = torch.split(flat.to(torch.float32).view(torch.int32), _GPU_CHUNK)
    for shift, bits in ((21, 11), (10, 11), (0, 10)):
        last = (1 << bits) - 1
        counts = sum(torch.bincount((piece >> shift) & last, minlength=1 << bits) for piece in pieces)
        assert isinstance(counts, Tensor)
        digit, count = digit_of_rank(counts, count)
        pieces = [piece[((piece >> shift) & last) == digit] for piece in pieces]
    return torch.cat(list(pieces))[0].view(torch.float32)


def digit_of_rank(counts: Tensor, rank: int) -> tuple[int, int]:
    """The digit of the ``rank``-th largest entry (from 1), and its rank among the entries of that digit."""
    at_least = counts.flip(0).cumsum(0).flip(0)  # entries whose digit is this one or higher
    digit = int((at_least >= rank).nonzero()[-1])
    return digit, rank - int(at_least[digit] - counts[digit])
