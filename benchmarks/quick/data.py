"""The texts: two old tasks and two new ones, from the standard library and from torch's own headers.

Old tasks: Python source and English prose, as in the demo. New tasks: C++ headers (those that torch installs) and the
names of Unicode characters. Each has a training, a validation and a test part that share no document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from tailorcli.demo.text import TaskText, build_tasks, samples, split_documents, write_jsonl

OLD_TASKS = ("python", "english")
NEW_TASKS = ("cpp", "unicode")
WINDOW = 128  # bytes of a sample
COUNTS = {"validation": 80, "test": 240}  # samples of a task
HEADERS = ("c10", "torch/csrc")  # folders of torch's headers


def load_tasks() -> dict[str, TaskText]:
    """Return every task's text in its three parts; the same versions of Python and torch give the same."""
    return {**build_tasks(), "cpp": split_documents("cpp", headers())}


def headers() -> Iterator[tuple[str, str]]:
    """Read torch's C++ headers, a document a file, without the licence lines that many of them share."""
    root = Path(torch.__file__).with_name("include")
    for path in sorted(path for folder in HEADERS for path in (root / folder).rglob("*.h")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii():
            yield path.relative_to(root).as_posix(), text.rstrip() + "\n\n"


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
