"""The errors that a user can cause, each with what to try next.

Only these become a clean ``error: ...`` line and exit code 1 in the command line; anything else is a
bug and keeps its traceback.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path


class TailorError(Exception):
    """Something the user can put right: ``message`` says what and where, ``hint`` what to try next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


@cache
def note(message: str) -> None:
    """Tell the user, once, of something that is no error: on standard error, if no handler of logging takes it."""
    logging.getLogger("tailorcli").warning("note: %s", message)


class OnceNotes:
    """Notes of several kinds, each made once: what one record has, many may have."""

    def __init__(self) -> None:
        self._made: set[str] = set()

    def make(self, kind: str, message: str) -> None:
        """``note`` the first message of a kind."""
        if kind not in self._made:
            self._made.add(kind)
            note(message)


def first_line(error: Exception) -> str:
    """What an exception of another library says in its first line, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" :")  # what a colon tells of is below


class OptionsError(TailorError):
    """An option is out of its range or contradicts another one."""


class CheckpointError(TailorError):
    """A checkpoint is missing, damaged, or does not fit its counterpart."""


class StatsError(TailorError):
    """A statistics folder is missing, damaged, or was made from another model."""


class PatchError(TailorError):
    """A patch file is missing, damaged, or was made for another base."""


class DataError(TailorError):
    """Calibration data is missing, empty or malformed."""


class NumericalError(TailorError):
    """NaN or infinity in a tensor, or a Hessian that no damping makes positive definite."""


class OutputError(TailorError):
    """The output folder exists, is not ours, or cannot be written."""


class DeviceError(TailorError):
    """A device was asked for that is not there, or it ran out of memory."""


class RankError(TailorError):
    """The processes of a job differ, or one of them is missing, failed or lost."""


def other_base(name: str, path: Path) -> PatchError:
    """The error for a base of which a tensor is not that which the patch was made for."""
    return PatchError(
        f"the patch is for another base: tensor {name!r} of {path} is not the one that was patched",
        "pass the checkpoint that the patch was made from: tailorcli inspect PATCH names it",
    )
