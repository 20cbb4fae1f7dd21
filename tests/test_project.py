"""The shape of the project: imports point one way, start-up is light, the documents are true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tailorcli"


def imports_of(room):
    """What a room imports of the others, at any depth of its code: ``core`` and ``core.unfold`` for the latter."""
    files = (PACKAGE / room).rglob("*.py") if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    names = {module.removeprefix("tailorcli.") for module in modules if module.startswith("tailorcli.")}
    return {name for name in names if name.split(".")[0] != room}


def test_imports_run_one_way():
    """The rules are the list in CONTRIBUTING.md; a room stands above all that it imports, so there is no circle."""
    block = re.search(r"```rooms\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL).group(1)
    rules = {room.strip(): allowed.split() for room, allowed in (line.split("->") for line in block.splitlines())}
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
    assert set(rules) == rooms, "give a new room its line"
    for room, allowed in rules.items():
        imported = imports_of(room)
        assert all(above.split(".")[0] in list(rules)[: list(rules).index(room)] for above in allowed), room
        for name in imported:
            assert any(name == rule or name.startswith(f"{rule}.") for rule in allowed), f"{room} imports {name}"
        for rule in allowed:
            assert any(name == rule or name.startswith(f"{rule}.") for name in imported), f"{room} needs no {rule}"


def test_no_file_imports_one_that_imports_it():
    """At any depth of its code, and through any number of others: the files of a room stand above one another, too."""
    files = {f"tailorcli.{'.'.join(p.relative_to(PACKAGE).with_suffix('').parts)}": p for p in PACKAGE.rglob("*.py")}
    files = {name: path for name, path in files.items() if path.name != "__init__.py"}
    imported = {}
    for name, path in files.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        found = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        imported[name] = ({node.module for node in nodes} | found) & files.keys()
    while free := [name for name, others in imported.items() if not others & imported.keys()]:
        for name in free:
            del imported[name]
    assert not imported, "these, or what they import, import one another"


def test_core_is_pure():
    """Torch, NumPy, the standard library and the errors: no files, no logging."""
    allowed = {
        "torch",
        "numpy",
        "tailorcli.errors",
        "__future__",
        "collections",
        "contextlib",
        "dataclasses",
        "typing",
        "functools",
        "itertools",
        "math",
        "threading",
    }
    allowed |= {"concurrent", "triton"}
    for file in (PACKAGE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                known = module in allowed or module.split(".")[0] in allowed or module.startswith("tailorcli.core")
                assert known, f"core/{file.name} imports {module}"


@pytest.mark.parametrize("statement", ["import tailorcli", "import tailorcli.cli", "import tailorcli.training"])
def test_heavy_imports_wait(statement):
    """What takes long to import is only imported when a command runs: --help stays quick."""
    code = f"{statement}; import sys; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


HEAVY = ["torch", "transformers", "numpy", "safetensors", "matplotlib", "tqdm", "datasets", "pyarrow", "lm_eval"]


def test_every_public_name_is_there_and_documented():
    import tailorcli
    from tailorcli import core

    for module in (tailorcli, core):
        for name in module.__all__:
            value = getattr(module, name)
            assert name.startswith("__") or value.__doc__, f"{module.__name__}.{name} has no docstring"
    with pytest.raises(AttributeError):
        _ = tailorcli.nothing_of_this_name
