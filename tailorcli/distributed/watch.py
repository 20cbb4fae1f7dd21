"""Each rank tells the others that it works, and at what; whoever fails, ends or stops ends all, with one error.

A thread of every rank puts a beat into the store that torchrun's agent holds, and reads that of the next rank. A rank
is given up whose process is gone, whose beats stop, or which neither works, reads nor writes while others wait for it.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from tailorcli.distributed.launch import Ranks
from tailorcli.errors import RankError, TailorError, first_line
from tailorcli.system import bytes_moved, is_running

BEAT_SECONDS = 2.0
LOST_BEATS = 10  # own beats without a new one of another rank: it is stopped, or its machine is gone
IDLE_SECONDS = 45.0  # a rank that is waited for and does nothing at all
_MOVED_BYTES = 1 << 20  # read or written: a rank that does more than look at the others
_TOLD_SECONDS = 8.0  # for whoever was first to say what happened, before another does
_END_SECONDS = 20.0  # for a rank to unwind, before it is ended as it is


class Ended(KeyboardInterrupt):
    """The job is over for this rank: ``code`` is its exit code. Like Ctrl-C, so that nothing takes it for an error."""

    def __init__(self, code: int = 1) -> None:
        super().__init__()
        self.code = code


@dataclass(frozen=True)
class Failure:
    """What ended a job: ``kind`` is error, usage, bug, gone, interrupt or terminated."""

    rank: int
    kind: str
    message: str
    hint: str
    by: int  # the rank that found it, and tells it
    on: str = ""  # what the rank was working on

    @property
    def code(self) -> int:
        """The exit code of every rank."""
        return {"usage": 2, "interrupt": 130, "terminated": 143}.get(self.kind, 1)

    def error(self, size: int) -> RankError:
        """The failure as an error; it names the rank where it is of one tensor, and not what all ranks alike do."""
        where = f"rank {self.rank} of {size}, at {self.on}: " if self.kind == "error" and self.on else ""
        return RankError(where + self.message, self.hint)


class Watch:
    """The beats of one rank, and its eye on the others. Use ``start`` and ``stop``, in the main thread."""

    def __init__(self, here: Ranks, store: Any, ends_itself: bool) -> None:
        """``store`` is a connection of this watch's own; ``ends_itself``: the process may be ended as it is."""
        self.here = here
        self.failure: Failure | None = None
        self._store = store
        self._ends_itself = ends_itself
        self._on, self._waits_for = "", ""
        self._waiting_since: float | None = None
        self._beats = 0
        self._seen: dict[int, tuple[int, int]] = {}  # of a rank: its last beat, and our own count then
        self._first_on = ""  # what the first rank was at, which may hold the store
        self._news, self._stopping = threading.Event(), threading.Event()
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._peers: dict[int, int] = {}  # ranks on this machine: their processes

    def start(self) -> None:
        """Say that this rank is here, and take over what Ctrl-C and SIGTERM do."""
        self._put(f"here/{self.here.rank}", {"host": platform.node(), "pid": os.getpid()})
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._thread.start()

    def stop(self) -> None:
        """No more beats; the signals are as they were."""
        self._stopping.set()
        self._news.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=BEAT_SECONDS)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def is_here(self, rank: int) -> bool:
        """Whether a rank has come."""
        return bool(self._store.check([f"here/{rank}"]))

    def now_on(self, name: str) -> None:
        """Say that this rank works on ``name`` now. Raises Ended when the job is over."""
        self._on = name
        with suppress(RuntimeError):  # a store that is gone is the thread's to find
            self._store.set(f"on/{self.here.rank}", name)  # at once: a process that is killed says nothing more
        self.check()

    def waits(self, what: str) -> None:
        """Say that this rank waits for the others."""
        self._waits_for, self._waiting_since = what, time.monotonic()

    def goes_on(self) -> None:
        """Say that this rank waits no more."""
        self._waiting_since = None

    def check(self) -> None:
        """Raise Ended when the job is over."""
        if self.failure is not None:
            raise Ended(self.failure.code)

    def leave(self) -> None:
        """Say that this rank has done its part and ends."""
        with suppress(RuntimeError):
            self._store.set(f"left/{self.here.rank}", "1")

    def have_left(self) -> bool:
        """Whether all ranks have done their part."""
        return all(self._store.check([f"left/{rank}"]) for rank in range(self.here.size))

    # What happened

    def lost(self) -> None:
        """A connection to another rank broke: wait until it is known why. Raises Ended, or nothing if it is not."""
        until = time.monotonic() + BEAT_SECONDS * (LOST_BEATS + 2)
        while time.monotonic() < until:
            self.check()
            time.sleep(0.05)

    def settle(self, error: BaseException) -> tuple[Failure, bool]:
        """What ended the job, as all ranks agree, and whether this one is to tell it.

        Whoever does not tell waits until it is told.
        """
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        own = self._own_failure(error)
        with suppress(RuntimeError):
            self._store.set(f"ended/{self.here.rank}", "1")
        if own is not None:
            self._claim(own)
        assert self.failure is not None
        if self.failure.by == self.here.rank:
            return self.failure, True
        return self.failure, not self._is_told()

    def told(self) -> None:
        """The failure is told."""
        with suppress(RuntimeError):
            self._store.set("told", "1")

    def wait_for_ends(self) -> None:
        """Wait a moment until all ranks know: the store may go with the first machine of which a rank ends."""
        assert self.failure is not None
        gone = self.failure.rank if self.failure.kind == "gone" else -1
        ends = [f"ended/{rank}" for rank in range(self.here.size) if rank != gone]
        until = time.monotonic() + 3 * BEAT_SECONDS
        with suppress(RuntimeError):
            while time.monotonic() < until and not self._store.check(ends):
                time.sleep(0.05)

    def _own_failure(self, error: BaseException) -> Failure | None:
        """What this rank has to say; None where what ended it is known, or was another's doing."""
        if self.failure is not None and isinstance(error, Ended):
            return None
        rank, on = self.here.rank, self._on
        if self._signal == signal.SIGTERM:  # as torchrun does where another rank on this machine failed: which?
            self._news.set()
            until = time.monotonic() + BEAT_SECONDS
            while self.failure is None and time.monotonic() < until:
                time.sleep(0.05)
            if self.failure is not None:
                return None
            return Failure(rank, "terminated", "it was ended from outside (SIGTERM)", "", rank, on)
        if isinstance(error, KeyboardInterrupt):
            return Failure(rank, "interrupt", "interrupted", "", rank, on)
        if isinstance(error, TailorError):
            return Failure(rank, "error", error.message, error.hint, rank, on)
        name, said = type(error).__name__, first_line(error) if isinstance(error, Exception) else ""
        kind = "usage" if getattr(error, "exit_code", 0) == 2 else "bug"  # what a parser of command lines raises
        return Failure(rank, kind, name if said in ("", name) else f"{name}: {said}", "", rank, on)

    def _claim(self, failure: Failure) -> None:
        """Make this the failure of the job, or take over that which came first."""
        try:
            stored = self._store.compare_set("failed", "", json.dumps(asdict(failure)))
            self.failure = Failure(**json.loads(stored))
        except RuntimeError:  # the store is gone, with the rank or the machine that held it: one in each machine tells
            teller = self.here.rank if self.here.local_rank in (0, 1) else -1
            self.failure = Failure(**{**asdict(failure), "by": teller})

    def _is_told(self) -> bool:
        until = time.monotonic() + _TOLD_SECONDS
        with suppress(RuntimeError):
            while time.monotonic() < until:
                if self._store.check(["told"]):
                    return True
                time.sleep(0.05)
            return bool(self._store.add("tellers", 1) != 1)
        return self.here.local_rank != 0

    # The thread

    def _run(self) -> None:
        work = time.process_time(), bytes_moved()
        active = time.monotonic()
        tick = 0.0
        while not self._stopping.is_set():
            now = time.monotonic()
            used = time.process_time(), bytes_moved()
            # The thread itself takes a millisecond a beat.
            if self._waiting_since is not None or used[0] - work[0] > 0.2 or used[1] - work[1] > _MOVED_BYTES:
                work, active = used, now
            try:
                self._beat(now - active)
                if now - tick >= BEAT_SECONDS or self._signal is not None:
                    tick = now
                    self._look()
            except RuntimeError as error:
                self._store_is_gone(error)
            if self.failure is not None:
                self._interrupt()
                return
            self._news.wait(BEAT_SECONDS)
            self._news.clear()
            self._stopping.wait(0.05)  # at most so often

    def _beat(self, idle: float) -> None:
        self._beats += 1
        self._put(f"beat/{self.here.rank}", {"beat": self._beats, "idle": idle})

    def _look(self) -> None:
        """Look for a failure that others found, and at the next rank, at the first and at those on this machine."""
        if self._store.check(["failed"]):
            self.failure = Failure(**self._get("failed"))
            self._end_stopped(self.failure)
            return
        for rank in sorted({0, (self.here.rank + 1) % self.here.size} - {self.here.rank}):
            if self._store.check([f"beat/{rank}"]):
                self._judge(rank, self._get(f"beat/{rank}"))
        self._first_on = self._on_of(0)
        for rank, pid in self._neighbours().items():
            if not (is_running(pid) or self._store.check([f"left/{rank}"]) or self._store.check([f"ended/{rank}"])):
                self._accuse(rank, f"is gone (process {pid} on {platform.node()})", "it may have run out of memory")

    def _judge(self, rank: int, beat: dict[str, Any]) -> None:
        before = self._seen.get(rank)
        if before is None or before[0] != beat["beat"]:
            self._seen[rank] = (beat["beat"], self._beats)
        elif self._beats - before[1] >= LOST_BEATS and not self._store.check([f"left/{rank}"]):
            seconds = round(LOST_BEATS * BEAT_SECONDS)
            self._accuse(rank, f"has not answered for {seconds} seconds", "see whether its process, or machine, is up")
        waited = 0.0 if self._waiting_since is None else time.monotonic() - self._waiting_since
        if min(waited, beat["idle"]) > IDLE_SECONDS:
            what = f"has neither worked, read nor written for {round(beat['idle'])} seconds, and the others wait for it"
            self._accuse(rank, what, "see whether the files that it reads and writes can be reached from its machine")

    def _accuse(self, rank: int, what: str, hint: str) -> None:
        on = self._on_of(rank)
        at = f"; it was at {on}" if on else ""
        message = f"rank {rank} of {self.here.size} {what}{at}"
        self._claim(Failure(rank, "gone", message, hint, self.here.rank, on))
        assert self.failure is not None
        self._end_stopped(self.failure)

    def _store_is_gone(self, error: RuntimeError) -> None:
        if self._stopping.is_set() or self.failure is not None:
            return
        on = self._first_on
        at = f"; rank 0 was at {on}" if on else ""
        message = f"rank 0 of {self.here.size}, or torchrun on its machine, is gone{at}"
        self._claim(Failure(0, "gone", message, f"it may have run out of memory ({first_line(error)})", -1, on))

    def _end_stopped(self, failure: Failure) -> None:
        """A process on this machine that was given up cannot end itself: torchrun would wait for it half a minute."""
        pid = self._neighbours().get(failure.rank)
        if failure.kind == "gone" and pid is not None and failure.rank != self.here.rank:
            with suppress(OSError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def _neighbours(self) -> dict[int, int]:
        """The processes of the other ranks on this machine."""
        if self.here.local_size > 1 and len(self._peers) < self.here.local_size - 1:
            first = self.here.rank - self.here.local_rank
            for rank in range(first, first + self.here.local_size):
                if rank not in (self.here.rank, *self._peers) and self._store.check([f"here/{rank}"]):
                    found = self._get(f"here/{rank}")
                    if found["host"] == platform.node():
                        self._peers[rank] = found["pid"]
        return self._peers

    def _on_of(self, rank: int) -> str:
        return self._store.get(f"on/{rank}").decode() if self._store.check([f"on/{rank}"]) else ""

    def _interrupt(self) -> None:
        """End what the main thread does; where it does not end in time, end the process."""
        if not self._stopping.is_set() and self._signal is None and self._handlers:
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            else:  # Windows
                signal.raise_signal(signal.SIGINT)
        if not self._stopping.wait(_END_SECONDS) and self._ends_itself and self.failure is not None:
            self.give_up(self.failure)

    give_up: Callable[[Failure], None] = staticmethod(lambda failure: os._exit(failure.code))

    def _on_signal(self, number: int, frame: object) -> None:
        if self._signal is None:  # but once: what follows cleans up
            self._signal = number
            raise Ended(128 + number)

    def _put(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key))
