"""Read the next tensor's inputs on threads of their own while the current one is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Generic, TypeVar

Loaded = TypeVar("Loaded")
SPARE_BYTES = 64 << 20  # small tensors may always be read ahead


class ReadAhead(Generic[Loaded]):
    """Yields ``load(0)``, ``load(1)``, ... in order, of which up to ``threads`` are worked out side by side.

    ``sizes`` gives, by position, the bytes held while it is worked on and the bytes that loading it takes. The
    next are only read ahead where all together stay below the fullest single position: it costs no peak memory.
    """

    def __init__(self, load: Callable[[int], Loaded], sizes: Sequence[tuple[int, int]], threads: int = 1) -> None:
        self._load = load
        self._sizes = sizes
        self._room = max((held for held, _ in sizes), default=0) + SPARE_BYTES
        self._threads = threads
        self._loading: deque[Future[Loaded]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        self.seconds = 0.0

    def _timed(self, position: int) -> Loaded:
        started = perf_counter()
        loaded = self._load(position)
        self.seconds += perf_counter() - started
        return loaded

    def _begin(self, position: int, following: int) -> None:
        """Begin what may be loaded from ``following`` on while ``position`` is loaded, or worked on."""
        while following < len(self._sizes) and len(self._loading) < self._threads and self._fits(position, following):
            self._loading.append(self._pool.submit(self._timed, following))
            following += 1

    def _fits(self, position: int, following: int) -> bool:
        """Whether ``following`` fits beside each before it, when that is the one worked on."""
        ahead = 0
        for each in range(following, position, -1):
            ahead += self._sizes[each][1]
            if self._sizes[each - 1][0] + ahead > self._room:
                return False
        return True

    def __iter__(self) -> Iterator[Loaded]:
        for position in range(len(self._sizes)):
            if not self._loading:
                self._loading.append(self._pool.submit(self._timed, position))
            self._begin(position, position + len(self._loading))
            loaded = [self._loading.popleft().result()]
            self._begin(position, position + 1 + len(self._loading))
            yield loaded.pop()  # no reference stays here: who takes it decides when it is freed

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
