"""The shape of the project: imports point one way, start-up is light, the documents are true."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tailorcli"

# What each layer may import of the package; core is torch and errors alone.
LAYERS = [
    {"errors"},
    {"core"},
    {"options"},
    {"device"},
    {"checkpoint", "maskcode", "data", "products", "blocks", "merit"},
    {"encoding"},
    {"writer", "report", "adapter_config", "tasks"},
    {"adapter_fit"},
    {"stats", "patchfile", "adapter"},
    {"patchwriter", "vocabulary"},
    {"plan"},
    {"names", "layers", "loading", "outputs", "reading", "mergeplan", "baselines"},
    {"collect", "graft", "synthetic", "parts"},
    {"passes"},
    {"propagate"},
    {"calibrate", "patch", "apply", "inspection"},
    {"merge", "predict"},
    {"evaluate", "harness"},
    {"sweep", "plots", "show", "demo_data"},
    {"demo"},
    {"cli"},
    {"__main__"},
]


def imported_modules(file):
    """Names of the package's own modules that a file imports, at any depth, but for type checking."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "tailorcli":
                names |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
            elif node.module.startswith("tailorcli."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tailorcli.")}
    return names


def test_dependencies_point_one_way():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    homes = {file: file.stem for file in PACKAGE.glob("*.py") if file.stem != "__init__"}
    homes |= dict.fromkeys(PACKAGE.glob("cli/*.py"), "cli")
    assert {*homes.values(), "core"} == set(rank), "give a new module its layer"
    for file, home in homes.items():
        for name in imported_modules(file) - ({"cli"} if home == "cli" else set()):
            assert rank[name] < rank[home], f"{file.name} imports {name}"


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
        "itertools",
    }
    allowed |= {"concurrent"}
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


@pytest.mark.parametrize("statement", ["import tailorcli", "import tailorcli.cli"])
def test_heavy_imports_wait(statement):
    """What takes long to import is only imported when a command runs: --help stays quick."""
    code = f"{statement}; import sys; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


HEAVY = ["torch", "transformers", "numpy", "safetensors", "matplotlib", "tqdm"]


def test_every_public_name_is_there_and_documented():
    import tailorcli
    from tailorcli import core

    for module in (tailorcli, core):
        for name in module.__all__:
            value = getattr(module, name)
            assert name.startswith("__") or value.__doc__, f"{module.__name__}.{name} has no docstring"
    with pytest.raises(AttributeError):
        _ = tailorcli.nothing_of_this_name
