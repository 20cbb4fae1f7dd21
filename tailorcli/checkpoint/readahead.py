"""Read the next tensor's inputs on a thread of its own while the current one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from time import perf_counter
from typing import Generic, TypeVar

Loaded = TypeVar("Loaded")
SPARE_BYTES = 64 << 20  # small tensors may always be read ahead


class ReadAhead(Generic[Loaded]):
    """Yields ``load(0)``, ``load(1)``, ... in order.

    ``sizes`` gives, by position, the bytes held while it is worked on and the bytes that loading it takes. The
    next is only read ahead where both together stay below the fullest single position: it costs no peak memory.
    """

    def __init__(self, load: Callable[[int], Loaded], sizes: Sequence[tuple[int, int]]) -> None:
        self._load = load
        self._count = len(sizes)
        room = max((held for held, _ in sizes), default=0) + SPARE_BYTES
        self._fits = [held + after <= room for (held, _), (_, after) in pairwise(sizes)]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self.seconds = 0.0

    def _timed(self, position: int) -> Loaded:
        started = perf_counter()
        loaded = self._load(position)
        self.seconds += perf_counter() - started
        return loaded

    def __iter__(self) -> Iterator[Loaded]:
        following: Future[Loaded] | None = None
        for position in range(self._count):
            current = following or self._pool.submit(self._timed, position)
            following = None
            loaded = [current.result()]
            del current
            if position + 1 < self._count and self._fits[position]:
                following = self._pool.submit(self._timed, position + 1)
            yield loaded.pop()  # no reference stays here: who takes it decides when it is freed

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
