"""What ``--html``, ``--push-to-hub`` and ``--write-card`` do: checked before the work, done after it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from tailorcli.cli.output import say
from tailorcli.guard import check_page_file


def check_push(name: str | None, output: Path | None, dry_run: bool) -> None:
    """Whether OUT will be there to be pushed and the Hub will take it, before the work starts.

    Raises BadParameter without an OUT, OptionsError where the Hub cannot be reached.
    """
    if name is None:
        return
    if output is None:
        raise typer.BadParameter("--push-to-hub uploads OUT: pass -o OUT")
    if not dry_run:
        from tailorcli.runs.push import check_push as check

        check(name)


def push(name: str | None, output: Path | None) -> None:
    """Upload OUT, if that was asked for. Raises OutputError."""
    if name is None or output is None:
        return
    from tailorcli.runs.push import push_folder

    say(f"pushed {output} to {push_folder(output, name)}", err=True)


def write_cards(report: dict[str, Any]) -> None:
    """Put an evaluation into the cards of its models, and say where there was none of ours. Raises OutputError."""
    from tailorcli.runs.evaluated import write_cards as write

    for path, is_written in write(report).items():
        done = f"wrote the table into {Path(path) / 'README.md'}"
        say(done if is_written else f"left {path} alone: it has no card that tailorcli wrote", err=True)


def check_page(html: Path | None, inputs: Iterable[Path | None]) -> None:
    """Whether a page can be written there, and drawn, before the work. Raises OutputError, OptionsError."""
    if html is None:
        return
    from tailorcli.display.web.shell import require_libraries

    check_page_file(html, inputs)
    require_libraries()


def write_page_of(path: Path | None, html: Path | None, evaluation: Path | None = None) -> None:
    """Write the page of a result, if that was asked for. Raises TailorError."""
    if html is None or path is None:
        return
    from tailorcli.display.inspection import inspect_path
    from tailorcli.display.web.pages import page_of
    from tailorcli.display.web.shell import write_page

    write_page(page_of(inspect_path(path), evaluation), html)
    say(f"wrote {html}; open it in a browser", err=True)
