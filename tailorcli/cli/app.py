"""The program: its commands in the order of the work, and what they all do about errors, paths and Ctrl-C."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tailorcli._version import __version__
from tailorcli.cli import calibrating, checking, measure, patchfiles, patching, ranked, showing, training
from tailorcli.cli.arguments import flag
from tailorcli.cli.output import say, say_error
from tailorcli.cli.verbosity import is_verbose
from tailorcli.errors import TailorError
from tailorcli.terminal import guard_streams

PATCH = "Patch a model"
MEASURE = "Measure models"
TRAIN = "Fine-tune so that less is forgotten"
FILES = "Patch files"
TRY = "Try it"

app = typer.Typer(
    name="tailorcli",
    epilog="The main job:\n\n  tailorcli calibrate TUNED --data train.jsonl -o stats"
    "\n\n  tailorcli patch BASE TUNED --stats stats -o OUT",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def friendly(command: Callable[..., Any], divided: bool = False) -> Callable[..., Any]:
    """The command with ``~`` expanded in its paths, and a TailorError as one message and exit code 1.

    Anything else is a bug and keeps its traceback. Under torchrun all ranks work on a command that is ``divided``.
    """

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        try:
            expanded = {name: _expanded(value) for name, value in given.items()}
            if not divided:
                return ranked.run_alone(command, expanded)
            return ranked.run_joined(command, expanded, _interrupted(command, given))
        except TailorError as error:
            if is_verbose():
                import traceback

                for line in traceback.format_exc().splitlines():
                    say(line, err=True)
            say_error(error.message, error.hint)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say(_interrupted(command, given), err=True)
            raise typer.Exit(130) from None

    return wrapped


def _expanded(value: Any) -> Any:
    """A path, or a list of them, with a leading ``~`` as the user's folder."""
    if isinstance(value, list):
        return [_expanded(entry) for entry in value]
    if not isinstance(value, Path):
        return value
    try:
        return value.expanduser()
    except RuntimeError:  # no such user: a name that begins with ~
        return value


def _interrupted(command: Callable[..., Any], given: dict[str, Any]) -> str:
    """What Ctrl-C left behind, and what goes on from there."""
    if "resume" in given and not given.get("dry_run"):
        return "interrupted; if it had begun to write, the same command with --resume goes on from there"
    if command is measure.sweep:
        return "interrupted; the same command goes on after the settings that are done"
    return "interrupted"


def _add(command: Callable[..., Any], panel: str, name: str | None = None, *, divided: bool = False) -> None:
    """Make a function a command, with its docstring as the help."""
    app.command(name, help=_help_of(command), rich_help_panel=panel)(friendly(command, divided))


def _help_of(command: Callable[..., Any]) -> str:
    """The docstring, its paragraphs one line each but the examples, which Typer leaves as they are behind a mark."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(
        f"\b\n{text}" if text.startswith("Examples:") else text.replace("\n", " ") for text in paragraphs
    )


_add(showing.demo, TRY)
_add(checking.check, PATCH)
_add(calibrating.calibrate, PATCH, divided=True)
_add(calibrating.score, PATCH, divided=True)
_add(patching.patch, PATCH, divided=True)
_add(showing.inspect_command, PATCH, "inspect")
_add(measure.evaluate, MEASURE, divided=True)
_add(measure.sweep, MEASURE, divided=True)
_add(measure.hscore, MEASURE)
_add(training.probe, TRAIN, divided=True)
_add(training.finetune, TRAIN, divided=True)
_add(patchfiles.apply, FILES, divided=True)
_add(patchfiles.verify, FILES, divided=True)
_add(patchfiles.merge_multi, FILES, "merge-multi", divided=True)


def _show_versions(shown: bool) -> None:
    """Print what a report of a bug should name; importing torch for it would take seconds."""
    if not shown:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    say(f"tailorcli {__version__}")
    for package in ("torch", "transformers"):
        try:
            say(f"{package} {version(package)}")
        except PackageNotFoundError:
            say(f"{package} is not installed")
    say(f"Python {platform.python_version()}")
    raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        flag("--version", callback=_show_versions, is_eager=True, help="Show the versions and exit."),
    ] = False,
) -> None:
    """Fine-tune a large model, then get back what it forgot (Model Tailor, ICML 2024).

    Keeps the tenth of the fine-tuned entries that matters most, makes up for the rest, and puts that back to the base.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The console script."""
    # Read by OpenMP when torch loads: threads that wait sleep rather than spin. Spinning takes the cores from the
    # threads that read and write, and from whatever else the machine does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    guard_streams()
    ranked.prepare()
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun: there is nothing to tell
        sys.exit(130)
    except SystemExit as ended:
        ranked.leave(ended.code)
        raise
    finally:
        sys.stdout.flush()  # here, where a failure is an exit code and no traceback
