"""The second new task: bytecode listings of the standard library's functions.

The code objects are compiled from the source of packages, which lie below the top level of the library; the old task
on Python source takes the modules at the top level, so the two share no file.
"""

from __future__ import annotations

import dis
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

from benchmarks.real.data import split

TASK = "bytecode"
# Packages of every Python from 3.11 on, without those that a distribution may leave out.
PACKAGES = (
    *("asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging"),
    *("multiprocessing", "re", "tomllib", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo"),
)


def listing(code: CodeType) -> str:
    """Return a function's bytecode as text: a line with its name and arguments, then one for each instruction."""
    arguments = ", ".join(code.co_varnames[: code.co_argcount])
    lines = [f"function {code.co_qualname}({arguments})"]
    for instruction in dis.get_instructions(code):
        lines.append(f"{instruction.offset} {instruction.opname} {argument(instruction)}".rstrip())
    return "\n".join(lines) + "\n"


def argument(instruction: dis.Instruction) -> str:
    """Return an instruction's argument as `dis` shows it, but the same in every process."""
    value = instruction.argval
    if isinstance(value, CodeType):  # shown with its address in memory
        return value.co_name
    if isinstance(value, frozenset):  # shown in the order of its hashes
        return f"frozenset({{{', '.join(sorted(map(repr, value)))}}})"
    return instruction.argrepr


def functions(code: CodeType) -> Iterator[CodeType]:
    """Yield the code objects inside a code object, outer before inner."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from functions(constant)


def sources() -> list[Path]:
    """Return the source files of PACKAGES, without tests, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [path for package in PACKAGES for path in sorted((library / package).rglob("*.py"))]
    return [path for path in found if "test" not in path.parts]


def load_listings(seed: int) -> dict[str, list[str]]:
    """Return part -> listings in random order; the parts share no source file and no listing."""
    rng = random.Random(seed)
    parts = split([str(path) for path in sources()], rng)
    seen: set[str] = set()
    listings: dict[str, list[str]] = {}
    for part, files in parts.items():
        texts = []
        for file in files:
            module = compile(Path(file).read_bytes(), Path(file).name, "exec")
            texts += [listing(code) for code in functions(module)]
        fresh = [text for text in dict.fromkeys(texts) if text not in seen]
        seen.update(fresh)
        rng.shuffle(fresh)
        listings[part] = fresh
    return listings
