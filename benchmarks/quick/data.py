"""The texts: two old tasks and three new ones, from the standard library and from what is installed with torch.

Old tasks: Python source and English prose, as in the demo. New tasks: C++ headers (those that torch installs), the
names of Unicode characters, and the law of software licences. Each has a training, a validation and a test part that
share no document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch

from tailorcli.demo.text import TaskText, build_tasks, samples, split_documents, write_jsonl

OLD_TASKS = ("python", "english")
NEW_TASKS = ("cpp", "unicode", "licences")
WINDOW = 128  # bytes of a sample
COUNTS = {"validation": 80, "test": 240}  # samples of a task
HEADERS = ("c10", "torch/csrc")  # folders of torch's headers
LICENSED = ("torch", "numpy", "matplotlib", "pillow")  # packages that carry the licences of much else
SHORTEST = 80  # characters of a paragraph; shorter ones are titles and lines of copyright


def load_tasks() -> dict[str, TaskText]:
    """Return every task's text in its three parts; the same versions of Python and torch give the same."""
    more = {"cpp": headers(), "licences": licences()}
    return {**build_tasks(), **{name: split_documents(name, documents) for name, documents in more.items()}}


def headers() -> Iterator[tuple[str, str]]:
    """Read torch's C++ headers, a document a file, without the licence lines that many of them share."""
    root = Path(torch.__file__).with_name("include")
    for path in sorted(path for folder in HEADERS for path in (root / folder).rglob("*.h")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii():
            yield path.relative_to(root).as_posix(), text.rstrip() + "\n\n"


def licences() -> Iterator[tuple[str, str]]:
    """Read the paragraphs of the licences that packages come with, a document each; those of one wording once."""
    seen: set[str] = set()
    for package in LICENSED:
        try:
            listed = files(package) or []
        except PackageNotFoundError:
            continue
        for file in sorted(str(name.locate()) for name in listed if re.search("licen|notice|copying", name.name, re.I)):
            for block in re.split(r"\n\s*\n", Path(file).read_text(encoding="utf-8", errors="replace")):
                text = " ".join(block.split())
                wording = re.sub("[^a-z]", "", text.lower())
                if len(text) >= SHORTEST and text.isascii() and wording not in seen:
                    seen.add(wording)
                    yield wording, text + "\n\n"


def write_parts(tasks: dict[str, TaskText], folder: Path) -> None:
    """Write each task's samples as JSON lines, as the commands read them: FOLDER/TASK-PART.jsonl."""
    for name, task in tasks.items():
        for part, count in COUNTS.items():
            write_jsonl(folder / f"{name}-{part}.jsonl", samples(getattr(task, part), WINDOW, count))
        write_jsonl(folder / f"{name}-train.jsonl", samples(task.train, WINDOW, 4096))
    old = [text for name in OLD_TASKS for text in samples(tasks[name].train, WINDOW, 256)]
    write_jsonl(folder / "old-train.jsonl", old)


def read_texts(file: Path) -> list[str]:
    """Return the texts of a file that ``write_parts`` wrote."""
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
