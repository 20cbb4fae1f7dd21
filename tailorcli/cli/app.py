"""The program: its commands in the order of the work, and what they all do about errors, paths, Ctrl-C and SIGTERM."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tailorcli._version import __version__
from tailorcli.cli import ranked
from tailorcli.cli.arguments import flag
from tailorcli.cli.output import say, say_error
from tailorcli.cli.signals import exit_code, unwind_on_sigterm
from tailorcli.cli.verbosity import is_verbose
from tailorcli.errors import TailorError
from tailorcli.files import expanded_path
from tailorcli.terminal import guard_streams

PATCH = "Patch a model"
MEASURE = "Measure models"
TRAIN = "Fine-tune so that less is forgotten"
FILES = "Patch files"
TRY = "Try it"


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
        except KeyboardInterrupt as ended:
            say(_interrupted(command, given), err=True)
            raise typer.Exit(exit_code(ended)) from None

    return wrapped


def _expanded(value: Any) -> Any:
    """A path, or a list of them, as ``expanded_path`` gives it; any other value as it is. Raises OptionsError."""
    if isinstance(value, list):
        return [_expanded(entry) for entry in value]
    return expanded_path(value) if isinstance(value, Path) else value


def _interrupted(command: Callable[..., Any], given: dict[str, Any]) -> str:
    """What Ctrl-C or SIGTERM left behind, and what goes on from there."""
    if "resume" in given and not given.get("dry_run"):
        return "interrupted; if it had begun to write, the same command with --resume goes on from there"
    if command.__name__ == "sweep":
        return "interrupted; the same command goes on after the settings that are done"
    return "interrupted"


_NO_NUMBER = {"float_parsing": "a number", "int_parsing": "a whole number"}  # by what pydantic calls it


class _Flags:
    """A command or a group whose options that take no value show none; Typer would show <bool>, also for --help."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Command(_Flags, TyperCommand):
    """A command that says which word is no number, or no choice, in place of what Typer's parser says of it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            found: list[Any] = getattr(error.__cause__, "errors", list)()
            if found and found[0]["type"] in _NO_NUMBER:
                error.message = f"{found[0]['input']!r} is not {_NO_NUMBER[found[0]['type']]}"
            error.message = error.message.removeprefix("Value error, ")
            raise


@dataclass(frozen=True)
class _Entry:
    """A command: the module of this package and the function in it, and the panel of the help where it stands."""

    module: str
    function: str
    panel: str
    divided: bool = False

    def built(self, name: str) -> Any:
        """The command as Typer builds it, with its docstring as the help."""
        function = getattr(import_module(f"tailorcli.cli.{self.module}"), self.function)
        alone = typer.Typer(add_completion=False)
        made = alone.command(name, cls=_Command, help=_help_of(function), rich_help_panel=self.panel)
        made(friendly(function, self.divided))
        return typer.main.get_command(alone)


_ENTRIES = {  # in the order of the help
    "demo": _Entry("showing", "demo", TRY),
    "check": _Entry("checking", "check", PATCH),
    "calibrate": _Entry("calibrating", "calibrate", PATCH, divided=True),
    "score": _Entry("calibrating", "score", PATCH, divided=True),
    "patch": _Entry("patching", "patch", PATCH, divided=True),
    "inspect": _Entry("showing", "inspect_command", PATCH),
    "evaluate": _Entry("measure", "evaluate", MEASURE, divided=True),
    "sweep": _Entry("measure", "sweep", MEASURE, divided=True),
    "hscore": _Entry("measure", "hscore", MEASURE),
    "probe": _Entry("training", "probe", TRAIN, divided=True),
    "finetune": _Entry("training", "finetune", TRAIN, divided=True),
    "apply": _Entry("patchfiles", "apply", FILES, divided=True),
    "verify": _Entry("patchfiles", "verify", FILES, divided=True),
    "merge-multi": _Entry("patchfiles", "merge_multi", FILES, divided=True),
}


class _Commands(Mapping[str, Any]):
    """All commands by name, each built when it is asked for: those that are not take a tenth of a second."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = _ENTRIES[name].built(name)
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_ENTRIES)

    def __len__(self) -> int:
        return len(_ENTRIES)


class _Group(_Flags, TyperGroup):
    """The program, with the commands of ``_ENTRIES``."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**(attributes | {"commands": _Commands()}))


def _help_of(command: Callable[..., Any]) -> str:
    """The docstring, its paragraphs one line each but the examples, which Typer leaves as they are behind a mark."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(
        f"\b\n{text}" if text.startswith("Examples:") else text.replace("\n", " ") for text in paragraphs
    )


app = typer.Typer(
    name="tailorcli",
    cls=_Group,
    epilog="The main job:\n\n  tailorcli check BASE TUNED\n\n  tailorcli patch BASE TUNED --data new_task.jsonl -o OUT",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    unwind_on_sigterm()
    try:
        app()
    except KeyboardInterrupt as ended:  # before a command has begun: there is nothing to tell
        sys.exit(exit_code(ended))
    except SystemExit as ended:
        ranked.leave(ended.code)
        raise
    finally:
        sys.stdout.flush()  # here, where a failure is an exit code and no traceback
