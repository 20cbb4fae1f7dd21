"""Write what the reference pages take from the code: option tables from the command line, the API from docstrings.

`python scripts/reference_pages.py` writes docs/reference/; with ``--check`` it writes nothing, and exits with 1 and the
names of the pages that are not as the code has them.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import typer

import tailorcli
from tailorcli import core
from tailorcli.cli import app

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"
BEGIN, END = "<!-- options:begin -->", "<!-- options:end -->"
WIDTH = 100  # of a line of prose
COMMAND = "python scripts/reference_pages.py"

API_HEAD = f"""# Python API

Everything that the command line does is one call of a function below. The names come from
`tailorcli` itself and are loaded when they are first used, so that `import tailorcli` is quick:

    from tailorcli import PatchOptions, calibrate_model, patch_checkpoint

    calibrate_model("tuned", "new_task.jsonl", "stats")
    report = patch_checkpoint("base", "tuned", "patched", "stats", PatchOptions(density=0.05))
    print(report.totals)

What a user can put right raises a `TailorError`, which says what, where, and what to try next. This
page is written from the docstrings by `{COMMAND}`.
"""
GROUPS = {
    "Calibrate and patch": (
        *("tailor", "plan_job", "compare_models"),
        *("calibrate_model", "score_checkpoint", "plan_patch", "patch_checkpoint"),
        *("distill_checkpoint", "plan_distilled", "distill_patch", "patch_to_target"),
    ),
    "Patch files and several tasks": (
        "apply_patch",
        "verify_checkpoint",
        "plan_merge",
        "merge_patches",
        "distill_merge",
    ),
    "Fine-tune": ("finetune_model", "plan_finetune", "probe_model"),
    "Evaluate": (
        *("evaluate_models", "read_tasks", "encode_task", "evaluate_network"),
        *("run_sweep", "settings_of", "read_results", "h_score"),
    ),
    "Look at a path": ("inspect_path",),
}


def main() -> None:
    """Write the pages, or with ``--check`` say which are not as the code has them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page differs")
    check = parser.parse_args().check
    stale = [page for page, text in pages() if not page.exists() or page.read_text(encoding="utf-8") != text]
    if check and stale:
        sys.exit(f"{', '.join(page.name for page in stale)}: not as the code has it; run: {COMMAND}")
    if not check:
        for page, text in pages():
            page.write_text(text, encoding="utf-8")


def pages() -> Iterator[tuple[Path, str]]:
    """Every page with the text that it should have."""
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        page = REFERENCE / "commands" / f"{name}.md"
        text = page.read_text(encoding="utf-8") if page.exists() else f"# tailorcli {name}\n\n{BEGIN}\n{END}\n"
        before, found, rest = text.partition(BEGIN)
        _, closed, after = rest.partition(END)
        if not found or not closed:
            raise SystemExit(f"{page} lacks {BEGIN} and {END}")
        yield page, f"{before}{BEGIN}\n{option_tables(command)}\n{END}{after}"
    yield REFERENCE / "python.md", api_page()


# --- Options ---------------------------------------------------------------------------------------------------------


def option_tables(command: Any) -> str:
    """The arguments of a command, then its options, a table for each panel of its help."""
    shown = [one for one in command.params if not getattr(one, "hidden", False) and one.name != "help"]
    arguments = [one for one in shown if one.param_type_name == "argument"]
    panels: dict[str, list[Any]] = {}
    for one in shown:
        if one.param_type_name == "option":
            panels.setdefault(getattr(one, "rich_help_panel", None) or "Options", []).append(one)
    parts = []
    if arguments:
        rows = [[f"`{metavar_of(one)}`", cell(one.help)] for one in arguments]
        parts.append(table(["argument", "what it is"], rows))
    for panel, options in panels.items():
        rows = [[names_of(one), cell(help_of(one)), type_of(one), default_of(one)] for one in options]
        heading = f"**{panel}**\n\n" if len(panels) > 1 else ""
        parts.append(heading + table(["option", "what it does", "type", "default"], rows))
    return "\n\n".join(parts)


def metavar_of(one: Any) -> str:
    """How an argument stands in the usage line."""
    name: str = one.metavar or one.name.upper()
    return name if one.nargs == 1 else f"{name}..."


def names_of(one: Any) -> str:
    """``--output, -o``, with the opposite of a flag where it has one."""
    names = sorted([*one.opts, *one.secondary_opts], key=lambda name: not name.startswith("--"))
    return ", ".join(f"`{name}`" for name in names)


# A default that the help text itself states, since it depends on other options.
_STATED = re.compile(r"\s*(?:\[default: (.*?)\]|\bDefault (.*?)\.)\s*$", re.DOTALL)


def help_of(one: Any) -> str:
    """What an option's help says, without the default that it states."""
    return re.sub(r"; repeatable\.$", ".", _STATED.sub("", one.help or ""))


def type_of(one: Any) -> str:
    """What an option takes: the choices, or the placeholder of its help."""
    kind = one.type_descriptor.annotation
    if get_origin(kind) in (list, tuple):
        kind = get_args(kind)[0]
    many = ", repeatable" if one.multiple else ""
    if kind is bool:
        return "flag"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind) + many
    names = {Path: "PATH", str: "TEXT", int: "INTEGER", float: "NUMBER"}
    return f"{one.metavar or names.get(kind, 'TEXT')}{many}"


def default_of(one: Any) -> str:
    """The default: of the code, or as the help states it; a flag is off, what has none is left out."""
    if stated := _STATED.search(one.help or ""):
        return cell(stated[1] or stated[2])
    if isinstance(one.show_default, str):
        return cell(one.show_default)
    if one.required:
        return "required"
    value = one.default
    if isinstance(value, Enum):
        value = value.value
    if value is None or value == () or value == []:
        return ""
    if isinstance(value, bool):
        return "on" if value else ""
    return f"`{value}`"


def cell(text: str | None) -> str:
    """Text as one cell of a table."""
    return " ".join((text or "").split()).replace("|", r"\|").replace("<", "&lt;").replace("\\[", "[")


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


# --- The API ---------------------------------------------------------------------------------------------------------


def api_page() -> str:
    """Functions by what they are for, then the classes, then the equations."""
    parts = [API_HEAD.strip()]
    functions = [name for names in GROUPS.values() for name in names]
    classes = [name for name in tailorcli.__all__ if name not in functions and not name.startswith("__")]
    unknown = [name for name in classes if not inspect.isclass(getattr(tailorcli, name))]
    if unknown:
        raise SystemExit(f"scripts/reference_pages.py: give {', '.join(unknown)} a group in GROUPS")
    for title, names in GROUPS.items():
        parts.append(f"## {title}")
        parts += [entry(name, getattr(tailorcli, name)) for name in names]
    options = [name for name in classes if name.endswith("Options")]
    parts.append("## Options")
    parts += [options_entry(name, getattr(tailorcli, name)) for name in options]
    parts.append("## What is returned, and what is read")
    parts += [class_entry(name, getattr(tailorcli, name)) for name in classes if name not in options]
    parts += ["## The equations: `tailorcli.core`", CORE_HEAD.strip(), core_table()]
    return "\n\n".join(parts) + "\n"


CORE_HEAD = """
Pure functions on tensors: nothing is read, written or changed in place but for names that end in
`_`. `tailor_layer` is the whole paper for one tensor. Shapes and units stand in each docstring.
"""


def core_table() -> str:
    """A line for every name of ``tailorcli.core``."""
    rows = []
    for name in core.__all__:
        value = getattr(core, name)
        first = (inspect.getdoc(value) or "").split("\n\n")[0]
        rows.append([f"`{name}`", cell(first).replace("``", "`")])
    return table(["name", "what it is"], rows)


def entry(name: str, function: Any) -> str:
    """A function: its signature, then its docstring."""
    return f"### `{name}`\n\n{code(signature(name, function))}\n\n{prose(function)}"


def options_entry(name: str, options: Any) -> str:
    """A dataclass of options: every field with its type and default."""
    rows = []
    for field in dataclasses.fields(options):
        default = "required" if field.default is dataclasses.MISSING else f"`{shown(field.default)}`"
        rows.append([f"`{field.name}`", f"`{cell(str(field.type))}`", default])
    return f"### `{name}`\n\n{prose(options)}\n\n{table(['field', 'type', 'default'], rows)}"


def class_entry(name: str, kind: Any) -> str:
    """A class: its docstring, and a line for each method and property of its own."""
    rows = []
    for member, value in vars(kind).items():
        found = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        first = (inspect.getdoc(found) or "").split("\n\n")[0]
        if member.startswith("_") or not (inspect.isfunction(found) or isinstance(found, property)) or not first:
            continue
        call = "" if isinstance(found, property) else "()"
        rows.append([f"`{member}{call}`", cell(first).replace("``", "`")])
    methods = f"\n\n{table(['member', 'what it is'], rows)}" if rows else ""
    return f"### `{name}`\n\n{prose(kind)}{methods}"


def signature(name: str, function: Any) -> str:
    """The call, a parameter a line."""
    made = inspect.signature(function)
    lines, keywords = [], False
    for one in made.parameters.values():
        if one.kind is one.KEYWORD_ONLY and not keywords:
            lines.append("    *,")
            keywords = True
        default = "" if one.default is one.empty else f" = {shown(one.default)}"
        lines.append(f"    {one.name}: {one.annotation}{default},")
    return "\n".join([f"{name}(", *lines, f") -> {made.return_annotation}"])


def shown(value: Any) -> str:
    """A default as one would type it; options are their class without arguments."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}()"
    if isinstance(value, Enum):
        return repr(value.value)
    return "sys.maxsize" if value == sys.maxsize else repr(value)


def prose(documented: Any) -> str:
    """A docstring as Markdown, in lines of ``WIDTH``."""
    paragraphs = (inspect.getdoc(documented) or "").replace("``", "`").split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(one.split()), WIDTH, break_on_hyphens=False) for one in paragraphs)


def code(text: str) -> str:
    """An indented block."""
    return textwrap.indent(text, "    ")


if __name__ == "__main__":
    main()
