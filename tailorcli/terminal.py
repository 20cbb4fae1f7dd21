"""What reaches a terminal: text made printable, output that may fail, and progress."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

# Characters that do something to a terminal, or to the order of what it shows, in place of being shown: controls (C0,
# DEL, C1), zero-width space and direction marks, line separators, directional embeddings and isolates, tags, and halves
# of surrogate pairs, which no encoding takes.
_ORDER = "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
_NOT_SHOWN = re.compile(f"[\x00-\x1f\x7f-\x9f{_ORDER}\ud800-\udfff]")
# The same but for what our own layout is made of: line ends, tabs, colours, and the cursor's way up over progress bars.
_NOT_LAYOUT = re.compile(
    rf"\x1b(?!\[[0-9;]*[mABK])|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f{_ORDER}\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""``text`` in one line, with whatever would act on a terminal as an escape: ``\x1b``, ``\n``, ``\u202e``."""
    return _NOT_SHOWN.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


class _Guarded(io.TextIOWrapper):
    """Standard output or error: no controls but those of our layout, and a failed write is no traceback.

    A reader of standard output that has gone (``| head -1``) ends the program quietly; any other failure there is one
    error, since the result is lost. Notes and progress that nobody takes end nothing.
    """

    is_result = False

    def write(self, text: str) -> int:
        try:
            return super().write(_NOT_LAYOUT.sub(_escape, text))
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # so that nothing fails again, such as the flush at the interpreter's end
        os.close(nowhere)
        if not self.is_result:
            return
        if isinstance(error, BrokenPipeError) or error.errno == errno.EINVAL:  # the latter is Windows' name of it
            raise SystemExit(141)  # what a shell shows of a program that SIGPIPE ended
        print(f"error: cannot write to standard output: {error.strerror}", file=sys.stderr)
        raise SystemExit(1)


def guard_streams() -> None:
    """Put standard output and error of this process behind ``_Guarded``; characters they cannot encode are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before we began
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # as long as the process
            continue
        guarded = _Guarded(
            stream.buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=stream.line_buffering
        )
        guarded.is_result = name == "stdout"
        setattr(sys, name, guarded)


SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """How far a long piece of work is, on standard error: a bar on a terminal, elsewhere a line every 30 seconds.

    ``total`` counts in ``unit``, "B" for bytes. Used as a context; ``update`` says what was done since the last call.
    """

    def __init__(self, what: str, total: int, unit: str, *, shown: bool) -> None:
        self._what, self._total, self._unit = printable(what), total, unit
        self._done, self._skipped, self._note, self._started = 0, 0, "", time.monotonic()
        self._bar: Any = None
        self._ended = threading.Event()
        self._lines: threading.Thread | None = None
        if shown and sys.stderr.isatty():
            self._bar = _new_bar(self._what, total, unit)
        elif shown:
            # A thread, since a single large tensor can take minutes.
            self._lines = threading.Thread(target=self._write_lines, name="progress", daemon=True)
            self._lines.start()

    def update(self, count: int = 1) -> None:
        """So much more is done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)

    def start_at(self, count: int) -> None:
        """So much was done by an earlier run: it takes none of this one's time."""
        self._done = self._skipped = count
        if self._bar is not None:
            self._bar.initial = self._bar.n = count
            self._bar.refresh()

    def note(self, text: str) -> None:
        """A few words beside the figures, such as a loss."""
        self._note = printable(text)
        if self._bar is not None:
            self._bar.set_postfix_str(self._note)

    def line(self) -> str:
        """How far it is, in one line."""
        seconds = time.monotonic() - self._started
        share = self._done / self._total if self._total else 0.0
        parts = [f"{self._what}: {share:.0%}, {_count(self._done)} of {_count(self._total)} {self._unit}"]
        parts.append(_clock(seconds))
        done = self._done - self._skipped
        if done > 0 and self._done < self._total:
            parts.append(f"about {_clock(seconds * (self._total - self._done) / done)} left")
        return ", ".join([*parts, *([self._note] if self._note else [])])

    def close(self) -> None:
        """Take the bar away; no more lines."""
        self._ended.set()
        if self._lines is not None:
            self._lines.join()
        if self._bar is not None:
            self._bar.close()

    def _write_lines(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LINES):
            print(self.line(), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _new_bar(what: str, total: int, unit: str) -> Any:
    from tqdm import tqdm

    # No rate: tensors differ in what they take, and a rate that jumps says nothing. The time left is by the whole mean.
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} {unit} [{elapsed}, {remaining} left]{postfix}"
    return tqdm(
        total=total, desc=what, unit=unit, unit_scale=total >= 10_000, bar_format=layout, smoothing=0, leave=False
    )


def _count(number: int) -> str:
    """A count as tqdm writes it: 950, 12.3k, 4.56M."""
    if number < 10_000:
        return f"{number:,}"
    value, units = float(number), iter(("", "k", "M", "G", "T", "P"))
    unit = next(units)
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.3g}{unit}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
