"""What the pages that benchmarks write have in common: prose in lines that a screen holds."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

WIDTH = 100  # tests/test_docs.py holds every page to it
_ITEM = re.compile(r"\s*([-*]|\d+\.) ")
_VERBATIM = ("|", "#", "<!--", "![")
# What Markdown takes for a list item, a quotation or a heading where a line begins with it.
_MARKS = re.compile(r" (?=([-+*>]|\d+[.)]|#+)( |$))")


def reflow(page: str) -> str:
    """A Markdown page with paragraphs and list items in lines of ``WIDTH``; tables, code and headings as they are."""
    done: list[str] = []
    block: list[str] = []  # lines of one paragraph or item
    fenced = False

    def close() -> None:
        if block:
            done.append(_filled(block))
            block.clear()

    for line in page.splitlines():
        fence = line.startswith("```")
        fenced = fenced != fence
        code = fence or fenced or (line.startswith("    ") and not block)
        if code or not line.strip() or line.startswith(_VERBATIM):
            close()
            done.append(line)
            continue
        if _ITEM.match(line):
            close()
        block.append(line)
    close()
    return "\n".join(done) + "\n"


def _filled(block: list[str]) -> str:
    """One paragraph or list item; no line but the first begins with a mark."""
    item = _ITEM.match(block[0])
    first = item[0] if item else re.match(r"\s*", block[0])[0]  # type: ignore[index]  # it matches nothing, too
    words = " ".join(" ".join(block)[len(first) :].split())
    kept = _MARKS.sub("\0", words)
    text = textwrap.fill(
        kept,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return text.replace("\0", " ")


def publish(page: str, file: Path) -> None:
    """Write a page, reflowed, and print it."""
    file.write_text(reflow(page), encoding="utf-8")
    print(page)
