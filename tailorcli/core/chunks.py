"""Go over a large array in pieces: small temporaries that stay in the processor's cache, a core for each piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

_CPU_CHUNK = 1 << 18  # entries of an elementwise step on a CPU
_GPU_CHUNK = 1 << 26
_SOLVER_CHUNK = 1 << 24  # bounds the work space of products and solvers whatever the tensor's size
_WORTH_THREADS = 4  # chunks from which on handing them over costs less than it saves
_SHARES = 4  # pieces of work a thread, so that one that is held up does not hold up all
Item = TypeVar("Item")
Result = TypeVar("Result")


def row_slices(num_rows: int, num_columns: int, entries: int) -> Iterator[slice]:
    """Slices of rows that hold about ``entries`` entries each, and one row at least."""
    step = max(1, entries // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def row_chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of rows that keep a float32 work array near 64 MiB, for matrix products and solvers."""
    return row_slices(num_rows, num_columns, _SOLVER_CHUNK)


def chunk_rows(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows small enough that elementwise temporaries stay small (and in cache on a CPU)."""
    entries = _CPU_CHUNK if matrix.device.type == "cpu" else _GPU_CHUNK
    return row_slices(matrix.shape[0], matrix.shape[1], entries)


_lock = threading.Lock()
_users = 0  # calls within ``one_torch_thread_each``
_before = 1  # torch's threads when the first of them came
_of_thread = threading.local()  # ``held``: whether this Python thread is one of those that share the work already


@contextmanager
def one_torch_thread_each() -> Iterator[int]:
    """A torch thread a Python thread: small steps side by side, instead of all threads on each small step.

    Gives the number of threads to work with: torch's, or 1 within another such context. Torch has its number back
    afterwards, also where calls of several Python threads overlap: each but the first finds it at 1 already.
    """
    global _users, _before  # torch's number of threads is one for the whole process, too
    if getattr(_of_thread, "held", False):
        yield 1
        return
    with _lock:
        own = torch.get_num_threads()
        if _users == 0:
            _before = own
        threads = own if own > 1 else _before
        _users += 1
        _hold_one()
    try:
        yield threads
    finally:
        with _lock:
            _users -= 1
            torch.set_num_threads(threads)
        _of_thread.held = False


def _hold_one() -> None:
    """Let the calling Python thread work with one torch thread."""
    _of_thread.held = True
    torch.set_num_threads(1)


# By their number, each with the threads that it has started: starting them for every step would cost more than it.
_pools: dict[int, tuple[ThreadPoolExecutor, list[threading.Thread]]] = {}


def workers(threads: int) -> ThreadPoolExecutor:
    """The pool of so many Python threads for work within ``one_torch_thread_each``; it stays for the next call."""

    def begin() -> None:
        started.append(threading.current_thread())
        _hold_one()

    with _lock:
        pool, started = _pools.get(threads, (None, []))
        if pool is None or not all(thread.is_alive() for thread in started):  # a forked process has no others' threads
            started = []
            pool = ThreadPoolExecutor(threads, "worker", initializer=begin)
            _pools[threads] = pool, started
        return pool


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``work`` on every item, on a thread each as long as there are any; the results in order."""
    with one_torch_thread_each() as threads:
        if threads == 1 or len(items) < 2:
            return [work(item) for item in items]
        return list(workers(threads).map(work, items))


def in_shares(work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    """``work`` on a few runs of neighbouring items, side by side; all their results in order."""
    step = -(-len(items) // (_SHARES * max(1, torch.get_num_threads())))
    shares = [items[start : start + step] for start in range(0, len(items), max(1, step))]
    return [result for found in side_by_side(work, shares) for result in found]


def map_rows(matrix: Tensor, work: Callable[[slice], Result]) -> list[Result]:
    """``work`` on every slice of ``chunk_rows``, in order of the results; side by side on a CPU.

    The slices do not depend on the number of threads, so the results do not either.
    """
    slices = list(chunk_rows(matrix))
    if matrix.device.type == "cpu" and len(slices) >= _WORTH_THREADS:
        return side_by_side(work, slices)
    with one_torch_thread_each() if matrix.device.type == "cpu" else nullcontext():
        return [work(rows) for rows in slices]
