"""The pages are true: each command has one with all its options, and every link meets its target."""

import re
from pathlib import Path

import pytest
from helpers import run

from tailorcli.cli import app

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]


def name_of(page):
    return str(page.relative_to(ROOT))


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
