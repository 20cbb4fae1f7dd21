"""What makes a run resumable: tensors written in the background, and a journal of those that are safely on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

from tailorcli.errors import OutputError
from tailorcli.files import as_output_error, parse_json, read_text_file, write_text_atomically
from tailorcli.system import sync_data, write_at
from tailorcli.typed import field_of, read_object, read_text, require_plain

ANEW = "start anew with --overwrite"


_SYNC_BYTES = 1 << 26  # journal entries wait until this many bytes of theirs are on disk together


class Journal:
    """The tensors that are safely on disk, a line each, behind a first line that identifies the run.

    A line is only written after the bytes that it vouches for; lines wait until many bytes can be synced at once. That
    is done on a thread of its own, while further tensors are written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[str] = []
        self._files: set[int] = set()
        self._nbytes = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncing: Future[None] | None = None

    def start(self, identity: dict[str, Any]) -> None:
        """A new journal with nothing in it."""
        write_text_atomically(self.path, json.dumps({"identity": identity}) + "\n")

    def load(self, identity: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        """The entries of an earlier run of the same ``identity``; ``folder`` is what the error names.

        Raises OutputError for a damaged journal and for one of another identity.
        """
        damaged = OutputError(f"cannot resume in {folder}: its journal is damaged", ANEW)
        try:
            lines = read_text_file(self.path).split("\n")
            earlier = identity_in(lines[0])
            entries = [_entry(line) for line in lines[1:-1]]
        except (OSError, ValueError) as error:
            raise damaged from error
        current = json.loads(json.dumps(identity))  # the same round trip: tuples become lists
        changed = sorted(key for key in {*earlier, *current} if earlier.get(key) != current.get(key))
        if changed:
            details = ", ".join(f"{key}: {earlier.get(key)} then, {current.get(key)} now" for key in changed)
            raise OutputError(f"cannot resume in {folder}: {details}", ANEW)
        # What follows the last newline was cut off in the middle.
        write_text_atomically(self.path, "".join(line + "\n" for line in lines[:-1]))
        return entries

    def add(self, entry: dict[str, Any], nbytes: int, descriptor: int) -> None:
        """Note an entry whose ``nbytes`` were written to the open file ``descriptor``. Raises OutputError."""
        self._lines.append(json.dumps(entry) + "\n")
        self._files.add(descriptor)
        self._nbytes += nbytes
        if self._nbytes >= _SYNC_BYTES:
            self._wait()
            self._syncing = self._pool.submit(self._sync, self._lines, self._files)
            self._lines, self._files, self._nbytes = [], set(), 0

    def sync(self) -> None:
        """Wait until all is on the disk: data first, then the lines that vouch for it. Raises OutputError."""
        self._wait()
        self._sync(self._lines, self._files)
        self._lines, self._files, self._nbytes = [], set(), 0

    def _wait(self) -> None:
        """Wait for what is being synced, and raise what it raised."""
        earlier, self._syncing = self._syncing, None
        if earlier is not None:
            earlier.result()

    def _sync(self, lines: list[str], files: set[int]) -> None:
        try:
            for descriptor in files:
                sync_data(descriptor)
            if lines:
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.writelines(lines)
                    stream.flush()
                    os.fsync(stream.fileno())
        except OSError as error:
            raise as_output_error(self.path, error) from error


def identity_in(line: str) -> dict[str, Any]:
    """Which run's a journal is, by its first line. Raises ValueError."""
    first = parse_json(line)
    require_plain(first)
    return field_of(first, "identity", read_object)  # type: ignore[no-any-return]


def _entry(line: str) -> dict[str, Any]:
    entry = parse_json(line)
    require_plain(entry)
    field_of(entry, "name", read_text), field_of(entry, "record", read_object)
    return read_object(entry)


class WriteQueue:
    """Jobs on a thread of their own, in order; ``submit`` blocks while one runs and another waits."""

    def __init__(self, name: str) -> None:
        self.seconds = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._queue: list[Future[None]] = []

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; raises what an earlier one raised."""
        while len(self._queue) > 1:  # one being written, one waiting: bounds the memory that waits here
            self._queue.pop(0).result()
        self._queue.append(self._pool.submit(self._timed, job))

    def _timed(self, job: Callable[[], None]) -> None:
        started = perf_counter()
        job()
        self.seconds += perf_counter() - started

    def drain(self) -> None:
        """Wait until everything queued is done."""
        while self._queue:
            self._queue.pop(0).result()

    def close(self) -> None:
        """Drop what waits and stop the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def write_all(descriptor: int, piece: memoryview, position: int) -> None:
    """Write all of ``piece`` from byte ``position`` on. Raises OSError."""
    while len(piece):
        count = write_at(descriptor, piece, position)
        piece, position = piece[count:], position + count
