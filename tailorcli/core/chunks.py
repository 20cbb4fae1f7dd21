"""Go over a large array in pieces: small temporaries that stay in the processor's cache, a core for each piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

_CPU_CHUNK = 1 << 18  # entries of an elementwise step on a CPU
_GPU_CHUNK = 1 << 26
_WORTH_THREADS = 32  # chunks from which on starting threads costs less than it saves
Result = TypeVar("Result")


def row_slices(num_rows: int, num_columns: int, entries: int) -> Iterator[slice]:
    """Slices of rows that hold about ``entries`` entries each, and one row at least."""
    step = max(1, entries // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def chunk_rows(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows small enough that elementwise temporaries stay small (and in cache on a CPU)."""
    entries = _CPU_CHUNK if matrix.device.type == "cpu" else _GPU_CHUNK
    return row_slices(matrix.shape[0], matrix.shape[1], entries)


@contextmanager
def one_torch_thread_each() -> Iterator[int]:
    """A torch thread a Python thread: small steps side by side, instead of all threads on each small step.

    Gives the number of threads that torch had, and sets it again afterwards.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def map_rows(matrix: Tensor, work: Callable[[slice], Result]) -> list[Result]:
    """``work`` on every slice of ``chunk_rows``, in order of the results; side by side on a CPU.

    The slices do not depend on the number of threads, so the results do not either.
    """
    slices = list(chunk_rows(matrix))
    if matrix.device.type != "cpu":
        return [work(rows) for rows in slices]
    with one_torch_thread_each() as threads:
        if threads == 1 or len(slices) < _WORTH_THREADS:
            return [work(rows) for rows in slices]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, slices))
