"""README's first table, from the pages on SmolLM2: `python -m benchmarks.evidence.readme` writes it again."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.real.render import between, table

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [ROOT / "docs" / "results" / f"evidence-{name}.md" for name in ("text", "text-rivals")]
MARK = "first-screen"
_DISTILLED = re.compile(r".*distilled, density 0\.1,")


def cells_of(page: str) -> list[list[str]]:
    """The rows of the page's first table without its header, emphasis taken away."""
    lines = page.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| model |"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
    return rows


def first_page() -> str:
    """The text of the first page that has a distilled patch; of the first without one."""
    pages = [file.read_text(encoding="utf-8") for file in PAGES if file.exists()]
    return next((page for page in pages if any(map(_DISTILLED.match, (row[0] for row in cells_of(page))))), pages[0])


def first_table(page: str) -> str:
    """Base, tuned, the best plain interpolation, the default patch, and that distilled where the page has it.

    Raises ValueError where the page lacks one of them.
    """
    rows = {row[0]: row[1:4] for row in cells_of(page)}
    weight = next((name.removeprefix("interpolate ") for name in rows if name.startswith("interpolate ")), "")
    default = next((name for name in rows if name.endswith("(default)")), "")
    lines = {
        "base": "base: before fine-tuning",
        "tuned": "tuned: after it",
        f"interpolate {weight}": f"plain interpolation: base + {weight} · (tuned − base)",
        default: "patched by tailorcli: a tenth of the entries changed",
    }
    if distilled := next(filter(_DISTILLED.match, rows), ""):
        lines[distilled] = "a tenth of the entries, distilled (`--distill`)"
    if missing := lines.keys() - rows.keys():
        raise ValueError(f"the page has no row for: {', '.join(lines[name] for name in missing)}")
    shown = [[title, *rows[name]] for name, title in lines.items()]
    shown[-1] = [f"**{cell}**" for cell in shown[-1]]
    seeds = re.search(r"Mean over (\d+) seeds", page)
    if seeds is None:
        raise ValueError("the page does not say over how many seeds it is")
    return f"""{table(["SmolLM2-135M-Instruct, fine-tuned on one new task", "old tasks", "new task", "H"], shown)}

Percent right on held-out text, means of {seeds[1]} fine-tunes. H, their harmonic mean, needs both."""


def main() -> None:
    """Write the table into README."""
    text = first_table(first_page())
    README.write_text(between(README.read_text(encoding="utf-8"), MARK, text), encoding="utf-8")


if __name__ == "__main__":
    main()
