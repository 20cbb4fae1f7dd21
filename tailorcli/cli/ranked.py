"""The command line under torchrun: one of its processes speaks, all work on one command, and end with one error."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import typer

from tailorcli._version import __version__
from tailorcli.cli.output import say, say_error
from tailorcli.distributed import Ended, Failure, joined, launched
from tailorcli.errors import RankError, TailorError
from tailorcli.files import pieces_digest
from tailorcli.system import usable_cores, variable_of_parent

_QUIET_END_SECONDS = 2.0  # torchrun ends the others as soon as one rank ends: the one that speaks goes first
_errors: IO[str] | None = None  # where a rank that is mute may tell an error that it alone knows


def prepare() -> None:
    """Before anything is imported or shown: this process's share of the cores, and silence but for the first rank.

    Raises SystemExit where the launcher says nonsense.
    """
    global _errors
    try:
        here = launched()
    except RankError as error:
        say_error(error.message, error.hint)
        raise SystemExit(1) from None
    if here.alone:
        return
    # Torchrun sets one thread a process where the user says nothing; on a CPU that would leave most cores idle.
    given = os.environ.get("OMP_NUM_THREADS")
    by_torchrun = given == "1" and "TORCHELASTIC_RUN_ID" in os.environ and not variable_of_parent("OMP_NUM_THREADS")
    if given is None or by_torchrun:
        os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // here.local_size))
    if not here.first:
        _errors = sys.stderr
        sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # for good


def run_alone(command: Callable[..., Any], given: dict[str, Any]) -> Any:
    """A command that is done in a moment, or that cannot be divided: the first rank does it."""
    return command(**given) if launched().first else None


def run_joined(command: Callable[..., Any], given: dict[str, Any], interrupted: str) -> Any:
    """The command as one of the ranks. What it raises, or another rank, is told once.

    Raises typer.Exit for a result that is none of success.
    """
    if launched().alone:
        return command(**given)
    try:
        with joined(_facts(given), partial(_tell, interrupted=interrupted)):
            try:
                return command(**given)
            except typer.Exit as ended:  # such as a difference that verify found: all ranks have it
                code = ended.exit_code
    except Ended as ended:
        _end_now(ended.code)
    raise typer.Exit(code)


def leave(code: object) -> None:
    """At the end of the program: a rank that failed without a word lets the one go first that speaks."""
    with suppress(RankError):
        here = launched()
        if code and not here.alone:
            if not here.first:
                time.sleep(_QUIET_END_SECONDS)
            _end_now(code if isinstance(code, int) else 1)


def _end_now(code: int) -> NoReturn:
    """End without waiting for threads of torch that wait for a rank which is no more."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, SystemExit):
            stream.flush()
    os._exit(code)


def _facts(given: dict[str, Any]) -> dict[str, object]:
    """What must be the same on all ranks: versions, the command, and what its files are."""
    from importlib.metadata import version  # takes a tenth of what it takes to start a command

    facts: dict[str, object] = {
        "tailorcli": __version__,
        **{package: version(package) for package in ("torch", "transformers")},
        "Python": sys.version.split()[0],
        "the command": " ".join(sys.argv[1:]),
    }
    for value in given.values():
        for path in value if isinstance(value, list) else [value]:
            if path == Path("-"):
                raise RankError("standard input reaches one process alone", "write it to a file, and pass that")
            if isinstance(path, Path):
                facts[str(path)] = pieces_digest(path)
    return facts


def _tell(error: BaseException, failure: Failure, interrupted: str) -> None:
    with _speaking() as stream:
        if isinstance(error, typer.BadParameter):
            error.show(file=stream)
        elif isinstance(error, TailorError):
            say_error(error.message, error.hint)
        elif isinstance(error, KeyboardInterrupt):
            say(interrupted if failure.kind == "interrupt" else failure.message, err=True)
        else:
            at = f", at {failure.on}" if failure.on else ""
            print(f"rank {failure.rank} of {launched().size}{at}:", file=stream)
            traceback.print_exception(error, file=stream)
    _tell_torchrun(failure)


@contextmanager
def _speaking() -> Iterator[IO[str]]:
    """Standard error of this process, also where it is mute."""
    stream = _errors or sys.stderr
    with redirect_stderr(stream):
        yield stream
    stream.flush()


def _tell_torchrun(failure: Failure) -> None:
    """Its own table of failures shows what is written here."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    text = f"{failure.message}; try: {failure.hint}" if failure.hint else failure.message
    message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
    with suppress(OSError):
        Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
