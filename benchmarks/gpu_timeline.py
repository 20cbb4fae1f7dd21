"""When a patch reads, works, waits and writes: its threads' hours, as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any
from unittest.mock import patch

from tailorcli.checkpoint.journal import WriteQueue
from tailorcli.checkpoint.readahead import ReadAhead
from tailorcli.device import StageTimer

WIDTH = 64  # characters, each of an equal part of the whole
SHADES = " .:=#"  # of a part: none, up to a quarter, up to a half, up to three quarters, more
WAITS = ("wait for read", "wait for write")
ROWS = ("read", "work", *WAITS, "write")
Spans = dict[str, list[tuple[float, float]]]


@contextmanager
def watched() -> Iterator[Spans]:
    """The spans of seconds in which each of ``ROWS`` goes on, from the first of them on, of a patch within."""
    spans: Spans = {name: [] for name in ROWS}

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begun = perf_counter()
            try:
                return real(*args)
            finally:
                spans[name].append((begun, perf_counter()))

        return timed

    real_stage = StageTimer.stage

    @contextmanager
    def stage(self: StageTimer, name: str) -> Iterator[None]:
        begun = perf_counter()
        try:
            with real_stage(self, name):
                yield
        finally:
            spans[name if name in WAITS else "work"].append((begun, perf_counter()))

    with ExitStack() as stack:
        stack.enter_context(patch.object(ReadAhead, "_timed", noting("read", ReadAhead._timed)))
        stack.enter_context(patch.object(WriteQueue, "_timed", noting("write", WriteQueue._timed)))
        stack.enter_context(patch.object(StageTimer, "stage", stage))
        yield spans


def totals(spans: Spans) -> dict[str, float]:
    """Seconds of each, and of the whole from the first to the last."""
    every = [span for part in spans.values() for span in part]
    whole = max(end for _, end in every) - min(begun for begun, _ in every)
    return {name: sum(end - begun for begun, end in part) for name, part in spans.items()} | {"whole": whole}


def render(spans: Spans) -> str:
    """A row for each, darker where more of the time goes into it, and its seconds."""
    every = [span for part in spans.values() for span in part]
    first, last = min(begun for begun, _ in every), max(end for _, end in every)
    step = max(1e-9, (last - first) / WIDTH)
    lines = []
    for name, part in spans.items():
        shares = [0.0] * WIDTH
        for begun, end in part:
            low, high = int((begun - first) / step), min(WIDTH - 1, int((end - first) / step))
            for place in range(low, high + 1):
                left, right = first + place * step, first + (place + 1) * step
                shares[place] += max(0.0, min(end, right) - max(begun, left)) / step
        shades = "".join(SHADES[min(4, -int(-4 * min(1.0, share) // 1)) if share > 1e-3 else 0] for share in shares)
        lines.append(f"  {name:<14} |{shades}| {sum(end - begun for begun, end in part):6.1f} s")
    return "\n".join(("```text", *lines, "```"))
