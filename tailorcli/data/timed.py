"""A time limit for code that comes with a model, such as a chat template: it may loop without end."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class _Stopped(BaseException):
    """Raised inside the call: no ``except Exception`` on its way takes it."""


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What ``call`` gives or raises, on a thread of its own. Raises TimeoutError after ``seconds``.

    The thread is stopped at its next step of Python, so a step that never ends in itself (one of C) cannot be: it is
    left behind, and does not keep the process alive. Works from any thread and on every system.
    """
    outcome: list[Any] = []

    def run() -> None:
        with suppress(_Stopped):
            try:
                outcome.extend((True, call()))
            except Exception as error:
                outcome.extend((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:  # the limit, or Ctrl-C on the thread that waits
        if thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stopped))
    if not outcome:
        raise TimeoutError(f"it does not end within {seconds:g} seconds")
    done, value = outcome
    if not done:
        raise value
    return value
