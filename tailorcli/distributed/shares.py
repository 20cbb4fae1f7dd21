"""Who does what: work of known weights divided over ranks."""

from __future__ import annotations

from collections.abc import Sequence


def shares(weights: Sequence[int | float], size: int) -> list[list[int]]:
    """The positions in ``weights`` that each of ``size`` ranks takes, each list in ascending order.

    The heaviest goes first, each to the rank that has least so far; equal ones in their order, to the lowest rank. The
    same for the same arguments. Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    taken: list[list[int]] = [[] for _ in range(size)]
    loads: list[int | float] = [0] * size
    for position in sorted(range(len(weights)), key=lambda place: (-weights[place], place)):
        rank = min(range(size), key=lambda each: (loads[each], len(taken[each]), each))
        taken[rank].append(position)
        loads[rank] += weights[position]
    return [sorted(positions) for positions in taken]
