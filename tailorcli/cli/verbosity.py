"""How much a command says beside its result: ``--quiet`` and ``--verbose`` of the command that is running."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import typer


@dataclass
class _Verbosity:
    quiet: bool = False
    verbose: bool = False


_of_this_run = _Verbosity()


def set_quiet(value: bool) -> bool:
    """Callback of ``--quiet``: parsing a command sets it anew, for the library's notes, too."""
    _of_this_run.quiet = value
    logging.getLogger("tailorcli").setLevel(logging.ERROR if value else logging.NOTSET)
    return value


def set_verbose(value: bool) -> bool:
    """Callback of ``--verbose``. Raises BadParameter beside ``--quiet``."""
    if value and _of_this_run.quiet:
        raise typer.BadParameter("--quiet and --verbose exclude each other")
    _of_this_run.verbose = value
    return value


def is_quiet() -> bool:
    """Whether notes and progress are left out."""
    return _of_this_run.quiet


def is_verbose() -> bool:
    """Whether to show more than most people want to read."""
    return _of_this_run.verbose


def wants_progress(as_json: bool) -> bool:
    """Whether to show progress: not beside JSON, nor with ``--quiet``."""
    return not as_json and not is_quiet()
