"""A run's tensors divided over ranks, and what each rank did put together again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from time import perf_counter
from typing import Any

from tailorcli.distributed import gathered, mine, ranks
from tailorcli.patchfile.records import TensorRecord
from tailorcli.runs.plan import TensorPlan

Work = tuple[float, float]  # of a tensor's Hessians, once for all that share them; and of the tensor itself


def own_tensors(tensors: Sequence[TensorPlan], work: Callable[[TensorPlan], Work]) -> list[TensorPlan]:
    """Those of ``tensors`` that this rank works on, in order; all of them where it is alone.

    What shares Hessians stays together, so that these are prepared once. ``work`` is in any unit.
    """
    if ranks().alone:
        return list(tensors)
    groups = hessian_groups(tensors)
    chosen = mine([work_of_group(group, work) for group in groups])
    return [tensor for position in sorted(chosen) for tensor in groups[position]]


def spread_tensors(tensors: Sequence[TensorPlan], work: Callable[[TensorPlan], Work], size: int) -> dict[str, int]:
    """Which of ``size`` ranks works on each tensor, where one group of tensors that share Hessians waits for the next.

    A group's tensors go to as many ranks as there are, the heaviest first, each to the rank that has least of the
    group, and of those to the one that has least of all.
    """
    owners: dict[str, int] = {}
    loads = [0.0] * size
    for group in hessian_groups(tensors):
        own = [0.0] * size
        weights = [sum(work(tensor)) for tensor in group]
        for position in sorted(range(len(group)), key=lambda place: (-weights[place], place)):
            rank = min(range(size), key=lambda each: (own[each], loads[each], each))
            owners[group[position].name] = rank
            own[rank] += weights[position]
            loads[rank] += weights[position]
    return owners


def hessian_groups(tensors: Sequence[TensorPlan]) -> list[list[TensorPlan]]:
    """``tensors`` in groups of neighbours that share their Hessians; one that has none is by itself."""
    found = groupby(enumerate(tensors), lambda entry: entry[1].shared_hessians or entry[0])
    return [[tensor for _, tensor in group] for _, group in found]


def work_of_group(group: Sequence[TensorPlan], work: Callable[[TensorPlan], Work]) -> float:
    """The Hessians' work once, and that of each tensor."""
    once, _ = work(group[0])
    return once + sum(each for _, each in map(work, group))


def joined_records(records: dict[str, TensorRecord], earlier: Collection[str]) -> dict[str, TensorRecord]:
    """The records of all ranks; of ``earlier`` tensors every rank has them already."""
    each = gathered({name: record for name, record in records.items() if name not in earlier})
    return records | {name: record for part in each for name, record in part.items()}


def shares_of_ranks(tensors: Sequence[TensorPlan], started: float) -> tuple[dict[str, Any], ...]:
    """What each rank did: how many tensors, their bytes in the base, and seconds since ``started``, its perf_counter.

    ``tensors`` are this rank's. Empty where it is alone.
    """
    here = ranks()
    if here.alone:
        return ()
    nbytes = sum(tensor.nbytes for tensor in tensors)
    seconds = round(perf_counter() - started, 3)
    return tuple(gathered({"rank": here.rank, "tensors": len(tensors), "bytes": nbytes, "seconds": seconds}))
