"""What the peers run in: a virtual environment for each, made once and kept in the cache; and how they are measured."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import say

MERGEKIT = "mergekit==0.1.5"
LLM_COMPRESSOR = "llmcompressor==0.14.0.1"
STEP = Path(__file__).parents[1] / "real" / "step.py"


class UnavailableError(Exception):
    """A peer that cannot be had here; its message says what was tried and what came of it."""


def programs_of(requirement: str, cache: Path) -> Path:
    """The folder of programs of an environment with this package and the torch that is running, installed if need be.

    Raises UnavailableError where pip cannot install it.
    """
    import torch

    name = requirement.partition("==")[0]
    folder = cache / f"{name}-venv"
    programs, done = folder / "bin", folder / "installed.txt"
    if done.exists() and done.read_text(encoding="utf-8") == requirement:
        return programs
    say(f"installing {requirement} into {folder}")
    venv.create(folder, with_pip=True)
    version = torch.__version__.partition("+")[0]
    for package in (f"torch=={version}", requirement):
        command = [str(programs / "python"), "-m", "pip", "install", "--quiet", package]
        tried = subprocess.run(command, capture_output=True, text=True)
        if tried.returncode:
            raise UnavailableError(f"`pip install {package}`: {last_line(tried.stderr)}")
    done.write_text(requirement, encoding="utf-8")
    return programs


def last_line(text: str) -> str:
    """The last line of a program's words that says anything."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def measured(command: Sequence[str | Path], scratch: Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Seconds, processor seconds and peak memory of a command in a process of its own.

    Raises RuntimeError with what it said where it fails.
    """
    record = scratch / "step.json"
    words = [str(word) for word in command]
    done = subprocess.run(
        [sys.executable, "-S", str(STEP), str(record), "--", *words], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr}")
    return dict(json.loads(record.read_text(encoding="utf-8")))


def rounds_of(count: int) -> range:
    """The numbers of the rounds; 0 is one before the others, which does not count, where there are several."""
    return range(0 if count > 1 else 1, count + 1)
