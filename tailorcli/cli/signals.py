"""SIGTERM, which batch systems and containers send, ends the program as Ctrl-C does: what is temporary goes with it."""

from __future__ import annotations

import os
import signal
from typing import Any

INTERRUPTED = 128 + signal.SIGINT


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Like Ctrl-C, so that nothing takes it for an error."""


def exit_code(ended: KeyboardInterrupt) -> int:
    """What a shell expects of a program that this ended."""
    return 128 + signal.SIGTERM if isinstance(ended, Terminated) else INTERRUPTED


def unwind_on_sigterm() -> None:
    """Raise Terminated in the main thread when SIGTERM comes; a second one ends the process as it is."""
    here = os.getpid()

    def ended(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != here:  # a worker that was forked off, whose end nobody has to clean up after
            os.kill(os.getpid(), number)
        raise Terminated

    signal.signal(signal.SIGTERM, ended)
