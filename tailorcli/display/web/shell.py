"""One self-contained page: its parts as HTML, its pictures and tables as data, the libraries that draw them inside.

Vega-Lite draws, DataTables sorts and filters. Nothing is fetched: a policy in the page forbids the browser to. All
text goes in escaped, and the data as JSON in which no tag can begin.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from tailorcli._version import __version__
from tailorcli.errors import OptionsError, OutputError
from tailorcli.files import write_text
from tailorcli.guard import PAGE_MARK
from tailorcli.terminal import printable

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
_EXPORTS = re.compile(r"export\s*\{([^{}]*)\};?\s*(?=$|/[*/])", re.MULTILINE)


@dataclass(frozen=True)
class Tile:
    """A figure in large type, what it is, and a note below."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of plain values; a column is (title, how it is shown: text, count, percent, number, command)."""

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Any]]
    filters: Sequence[int] = ()  # columns to choose a value of


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading: a sentence, and a picture, a table, a command or facts."""

    title: str
    said: str = ""
    chart: Mapping[str, Any] | None = None
    table: Table | None = None
    command: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    wide: bool = True  # or beside the next one, where there is room


@dataclass(frozen=True)
class Page:
    """A page: what it is of, three sentences, the figures that matter, and its sections."""

    title: str
    kind: str
    said: Sequence[str]
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()


def require_libraries() -> None:
    """Whether what draws a page is there, before the work. Raises OptionsError."""
    missing = [name for name in ("vl_convert", "itables") if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionsError(f"--html needs {' and '.join(missing)}", "pip install 'tailorcli[html]'")


def write_page(page: Page, file: Path) -> None:
    """Write the page, whole or not at all. Raises OutputError, OptionsError."""
    write_text(file, render(page))


def render(page: Page) -> str:
    """The page's HTML. Raises OptionsError without the libraries that draw it."""
    require_libraries()
    css, own = (files("tailorcli.display.web").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    vega, table_script, table_style = _libraries()
    body = "\n".join(
        [
            f'<header><p class="kind">{_text(page.kind)}</p><h1>{_text(page.title)}</h1>',
            *(f"<p>{_text(sentence)}</p>" for sentence in page.said),
            "</header>",
            _tiles(page.tiles),
            *_sections(page.sections),
            f"<footer>Made by tailorcli {_text(__version__)}. Nothing on this page comes from a network.</footer>",
        ]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{PAGE_MARK} {_text(__version__)}">
<title>{_text(page.title)}</title>
<style>{_style(table_style)}</style>
<style>{_style(css)}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="data">{data_of(page)}</script>
<script>{_script(vega)}</script>
<script type="module">{_script(table_script)}
{_script(own)}</script>
</body>
</html>
"""


def _tiles(tiles: Sequence[Tile]) -> str:
    if not tiles:
        return ""
    shown = (
        f'<div class="tile"><b>{_text(tile.value)}</b><span>{_text(tile.label)}</span><small>{_text(tile.note)}</small>'
        "</div>"
        for tile in tiles
    )
    return f'<div class="tiles">{"".join(shown)}</div>'


def _sections(sections: Sequence[Section]) -> Iterable[str]:
    charts = tables = 0
    for section in sections:
        parts = [f'<section class="{"wide" if section.wide else "half"}"><h2>{_text(section.title)}</h2>']
        if section.said:
            parts.append(f"<p>{_text(section.said)}</p>")
        if section.chart is not None:
            parts.append(f'<div class="chart" data-chart="{charts}"></div>')
            charts += 1
        if section.table is not None:
            parts.append(f'<div class="filters" id="filters-{tables}"></div>')
            parts.append(
                f'<div class="table"><table data-table="{tables}" class="display compact nowrap"></table></div>'
            )
            tables += 1
        if section.command is not None:
            parts.append(
                f'<div class="command"><button type="button" class="copy">Copy</button>'
                f"<pre>{escape(section.command)}</pre></div>"
            )
        if section.facts:
            rows = (f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in section.facts.items())
            parts.append(f"<dl>{''.join(rows)}</dl>")
        yield "".join([*parts, "</section>"])


def _text(text: str) -> str:
    return escape(printable(text))


def data_of(page: Page) -> str:
    """The page's pictures and tables as JSON that can stand in a script: nothing in it ends that or begins a tag."""
    charts = [section.chart for section in page.sections if section.chart is not None]
    tables = [section.table for section in page.sections if section.table is not None]
    plain = [{"columns": t.columns, "rows": t.rows, "filters": list(t.filters)} for t in tables]
    text = json.dumps({"charts": charts, "tables": plain}, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script(text: str) -> str:
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _style(text: str) -> str:
    return text.replace("</style", "<\\/style")


@cache
def _libraries() -> tuple[str, str, str]:
    """The scripts of Vega-Lite and of DataTables, and the latter's style, as their Python packages bring them."""
    import vl_convert

    folder = files("itables").joinpath("html")
    script = folder.joinpath("dt_bundle.js").read_text("utf-8")
    found = list(_EXPORTS.finditer(script))
    if not found:
        raise OutputError("this version of itables brings DataTables in another form", "pip install 'itables<3'")
    exports = found[-1]
    pairs = (part.split(" as ") for part in exports[1].split(","))
    named = ",".join(f'"{pair[-1].strip()}":{pair[0].strip()}' for pair in pairs)
    script = f"{script[: exports.start()]};const tableLibrary={{{named}}};{script[exports.end() :]}"
    vega = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub asks for what may be left out
    return vega, script, folder.joinpath("dt_bundle.css").read_text("utf-8")
