"""What docstrings show and promise: their examples run, and what raises says so."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import tailorcli

PACKAGE = Path(tailorcli.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
# Their docstrings are the commands' help.
COMMANDS = ("calibrating", "checking", "patching", "showing", "measure", "patchfiles", "training")
WITH_EXAMPLES = [file for file in FILES if ">>> " in (PACKAGE / file).read_text(encoding="utf-8")]


def raises(function):
    """The errors that a function raises by name, without those of functions inside it."""
    found, waiting = [], [function]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.Raise) and node.exc is not None:
                found.append(ast.unparse(node.exc).partition("(")[0])
            if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
                waiting.append(node)
    return found


@pytest.fixture(scope="module")
def nodes():
    """All of each file's syntax tree."""
    return {file: list(ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))) for file in FILES}


def documented(nodes):
    """Every public function and method that has a docstring."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node):
            yield node


def test_the_examples_stand_where_they_help():
    wanted = {"core/tailor.py", "core/scores.py", "checkpoint/layout.py", "patchfile/coding.py"}
    assert wanted <= {file.as_posix() for file in WITH_EXAMPLES}


@pytest.mark.parametrize("file", WITH_EXAMPLES, ids=str)
def test_the_examples_run(file):
    module = importlib.import_module(".".join(("tailorcli", *file.with_suffix("").parts)))
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_what_raises_says_so(nodes):
    silent, told = [], 0
    for file in FILES:
        for function in documented(nodes[file]):
            if raises(function) and file.as_posix() not in {f"cli/{name}.py" for name in COMMANDS}:
                said = "raise" in (ast.get_docstring(function) or "").lower()
                told += said
                silent += [] if said else [f"{file}: {function.name}"]
    assert not silent
    assert told > 100


def test_no_docstring_begins_with_the_same(nodes):
    for file in FILES:
        for node in nodes[file]:
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                assert not (ast.get_docstring(node) or "").startswith("The same"), file
