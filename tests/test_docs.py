"""The pages are true: each command has one with all its options, and every link meets its target."""

import functools
import re
from pathlib import Path

import pytest
import typer
from helpers import run
from launcher import completed

from benchmarks.evidence.readme import first_page, first_table
from benchmarks.pages import reflow
from benchmarks.real.render import between
from tailorcli.cli import app

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(typer.main.get_command(app).commands)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]


def name_of(page):
    return str(page.relative_to(ROOT))


@functools.cache
def options_of(command):
    help_text = re.sub(r"\x1b\[[0-9;]*m", "", run(command, "--help").stdout)
    return set(re.findall(r"--[a-z][a-z-]+", help_text))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page_that_names_all_its_options(command):
    page = (ROOT / "docs" / "reference" / "commands" / f"{command}.md").read_text()
    options = options_of(command) - {"--help"}
    documented = set(re.findall(r"--[a-z][a-z-]+", page))
    assert options <= documented, f"{command}.md lacks {options - documented}"
    everywhere = {option for other in COMMANDS for option in options_of(other)} | {"--version"}
    assert documented <= everywhere, f"{command}.md names {documented - everywhere}"


def test_option_tables_and_the_python_api_are_as_the_code_has_them():
    script = ROOT / "scripts" / "reference_pages.py"
    done = completed((script, "--check"))
    assert done.returncode == 0, done.stderr.decode()


def test_the_readme_is_short_and_its_table_is_the_evidence():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    assert max(map(len, text.splitlines())) < 100
    page = first_page()
    assert between(text, "first-screen", first_table(page)) == text, "run: python -m benchmarks.evidence.readme"
    base, _, interpolated, patched, distilled = re.findall(r"^\| .* \|$", first_table(page), re.MULTILINE)[2:]
    assert base.endswith("| 35.7 | 11.3 | 17.1 |")
    assert interpolated.startswith("| plain interpolation: base + 0.5")
    assert "distilled" in distilled
    assert (patched.count("**"), distilled.count("**")) == (0, 8)
    with pytest.raises(ValueError, match="no row for"):
        first_table(page.replace("| tuned |", "| other |"))


def test_a_page_that_a_benchmark_writes_keeps_its_words_tables_and_code():
    long = {letter: f"{letter} " * 60 for letter in "abcde"}
    prose = f"# {long['a']}\n\n" + "word " * 40 + f"+ 1 - 2\n- item {long['b']}\n\n    code {long['c']}"
    page = f"{prose}\n\n| a | {long['d']}|\n```\n{long['e']}\n```\n"
    shown = reflow(page)
    assert shown.split() == page.split()
    assert reflow(shown) == shown
    lines = shown.splitlines()
    assert all(len(line) <= WIDTH for line in lines if line.startswith(("word", "- item", "  b")))
    assert not any(line.startswith(("+", "- 2")) for line in lines)
    assert f"    code {long['c']}" in lines


def test_every_page_has_its_place_on_the_site():
    config = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/-]+\.md", config))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def anchor_of(heading):
    """The anchor that code hosts and the site give to a heading."""
    words = re.sub(r"[^\w\s-]", "", heading.strip().lower().replace("`", ""))
    return re.sub(r"\s", "-", words)


def anchors_of(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {anchor_of(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_point_to_files_and_headings_that_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name} points to {target}"
        if anchor:
            assert anchor in anchors_of(found), f"{page.name} points to {target}#{anchor}"


PROSE = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which is a list of lines
WIDTH = 100  # of a line of prose
MOST_FIGURES = 3  # in a paragraph: more of them belong into a table or a list


def prose_of(page):
    """(number, line) of every line that is no code, table or picture."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("|", "    ", "<!--", "![")):
            yield number, line


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_no_line_of_prose_is_wider_than_a_screen(page):
    wide = [number for number, line in prose_of(page) if len(line) > WIDTH]
    assert not wide, f"{name_of(page)}: lines {wide} are over {WIDTH} columns"


def paragraphs_of(page):
    """(number of its first line, text) of every paragraph; lists and headings are none."""
    lines, start = [], 0
    for number, line in [*prose_of(page), (0, "")]:
        if line.strip() and not lines:
            start = number
        if line.strip() and (not lines or number == start + len(lines)):
            lines.append(line)
            continue
        if lines and not re.match(r"\s*([-*#!]|\d+\.) ", lines[0]):
            yield start, " ".join(lines)
        lines, start = ([line], number) if line.strip() else ([], 0)


def figures_in(paragraph):
    """The numbers in it that are neither code nor a reference."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv [\d.]+", " ", paragraph)
    text = re.sub(r"\b(Eq\.|Fig\.|Table|Theorem) \d+(\.\d+)?(, \d+| to \d+| and \d+)*", " ", text)
    return re.findall(r"(?<![\w.])[+−-]?\d[\d.,]*(?![\w])", text)


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_no_paragraph_is_full_of_figures(page):
    for number, paragraph in paragraphs_of(page):
        found = figures_in(paragraph)
        assert len(found) <= MOST_FIGURES, f"{name_of(page)}:{number} has {len(found)} figures: {found}"
