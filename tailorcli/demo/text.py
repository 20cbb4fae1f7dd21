"""Text for the demo, from the Python standard library: nothing is downloaded.

Two *old* tasks and a *new* one, all of them real text that comes with every Python:

- ``python``: the source files at the top of the standard library;
- ``english``: the prose of the language reference (``pydoc_data.topics``);
- ``unicode``: the Unicode character names (``unicodedata``), in the order of their code points. It looks
  like neither of the others, so a model fine-tuned on it forgets them.

Only ASCII text is kept, so that one character is one byte and one token.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.errors import DataError
from tailorcli.files import parse_json, read_text_file
from tailorcli.typed import field_of, read_text

if TYPE_CHECKING:
    from torch import Tensor

OLD_TASKS = ("python", "english")
NEW_TASK = "unicode"
TASKS = (*OLD_TASKS, NEW_TASK)

#: What each task is made of, for reports.
SOURCES = {
    "python": "source files of the standard library",
    "english": "prose of the Python language reference (pydoc_data.topics)",
    "unicode": "Unicode character names (unicodedata)",
}

PAD = 256  # the one token that is not a byte

_MIN_CHARS = 100_000  # with less, neither the training nor a figure would say much
_NAMES_PER_DOCUMENT = 16
_PARAGRAPHS_PER_DOCUMENT = 12
_PLAIN_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2026", "''\"\"--.")


@dataclass(frozen=True)
class TaskText:
    """The three disjoint splits of one task, each one long string of whole documents."""

    name: str
    train: str
    validation: str
    test: str


def build_tasks() -> dict[str, TaskText]:
    """Read the standard library and split each task by document.

    A document goes to a split by the hash of its name, so the same Python version gives the same splits on
    every machine. Raises DataError where Python comes without the text (a zipped or stripped standard library).
    """
    documents = {
        "python": _python_documents(),
        "english": _english_documents(),
        "unicode": _unicode_documents(),
    }
    return {name: split_documents(name, documents[name]) for name in TASKS}


def samples(text: str, length: int, count: int) -> list[str]:
    """Cut up to ``count`` samples of ``length`` characters, apart from each other, spread over the whole text."""
    available = len(text) // length
    count = min(count, available)
    starts = [i * available // count * length for i in range(count)]
    return [text[start : start + length] for start in starts]


def write_jsonl(path: Path, texts: Iterable[str]) -> None:
    """One ``{"text": ...}`` a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")


def read_jsonl(path: Path) -> list[str]:
    """Read the texts of a file that ``write_jsonl`` wrote. Raises DataError if it is missing or malformed."""
    try:
        return [field_of(parse_json(line), "text", read_text) for line in read_text_file(path).splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a file of the demo ({error})", "run tailorcli demo again") from error


def build_tokenizer() -> Any:
    """One token a byte, with the byte as its id, and a padding token: a fast tokenizer of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The byte-level pre-tokenizer writes each byte as one printable character: the printable ones of Latin-1 stand
    # for themselves, the others take the characters from 256 on, in order.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte) if byte in printable else chr(256 + others.index(byte)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def encode(texts: list[str]) -> Tensor:
    """Token ids (N, T), int64, of ASCII texts of one length: their bytes, which is what the tokenizer gives, too."""
    import torch

    data = bytearray("".join(texts).encode("ascii"))
    return torch.frombuffer(data, dtype=torch.uint8).view(len(texts), -1).long()


def split_documents(name: str, documents: Iterable[tuple[str, str]]) -> TaskText:
    """Divide (key, text) documents by characters: a tenth for validation, 15% for test, the rest to train on.

    Raises DataError for too little text.
    """
    # In the order of their names' hashes: any stretch of it is a fair draw, the same one on every machine.
    ordered = sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest())
    total = sum(len(text) for _, text in ordered)
    parts: dict[str, list[str]] = {"validation": [], "test": [], "train": []}
    position = 0
    for _, text in ordered:
        split = "validation" if position < 0.1 * total else "test" if position < 0.25 * total else "train"
        parts[split].append(text)
        position += len(text)
    if total < _MIN_CHARS:
        raise DataError(
            f"not enough text for the task {name!r} ({SOURCES.get(name, name)}): {total} characters, "
            f"{_MIN_CHARS} needed",
            "run the demo with a Python that has its standard library as .py files",
        )
    return TaskText(name, **{split: "".join(texts) for split, texts in parts.items()})


def _python_documents() -> Iterator[tuple[str, str]]:
    """Read the standard library's own modules (not its packages), one document a file."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.glob("*.py")):
        if path.name.startswith("_sysconfigdata"):  # generated: this machine's build settings
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii():
            yield path.name, text.rstrip() + "\n\n"


def _english_documents() -> Iterator[tuple[str, str]]:
    """Paragraphs of running text from the language reference, a dozen to a document."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    seen: set[str] = set()  # topics quote each other: a repeated paragraph would leak into test
    for topic in sorted(topics):
        paragraphs: list[str] = []
        for block in re.split(r"\n\s*\n", topics[topic].translate(_PLAIN_QUOTES)):
            text = "\n".join(line.strip() for line in block.strip().splitlines())
            if _is_prose(text) and text not in seen:
                seen.add(text)
                paragraphs.append(text)
        for i in range(0, len(paragraphs), _PARAGRAPHS_PER_DOCUMENT):
            chunk = paragraphs[i : i + _PARAGRAPHS_PER_DOCUMENT]
            yield f"{topic}/{i}", "\n\n".join(chunk) + "\n\n"


def _is_prose(text: str) -> bool:
    """Whether a paragraph reads as sentences: no code, grammar, table or heading."""
    if len(text) < 80 or not text.isascii() or text[-1] not in ".:)":
        return False
    if re.search(r"::=|>>>|[|+=*~-]{3}", text):
        return False
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return letters > 0.85 * len(text)


def _unicode_documents() -> Iterator[tuple[str, str]]:
    """Lines such as "U+0416 CYRILLIC CAPITAL LETTER ZHE", 16 consecutive names to a document."""
    lines: list[str] = []
    for code in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        # Names that only repeat the code point, or are computed from it, say nothing.
        if not name or name.startswith("HANGUL SYLLABLE") or name.endswith(f"{code:X}"):
            continue
        lines.append(f"U+{code:04X} {name}\n")
    for i in range(0, len(lines), _NAMES_PER_DOCUMENT):
        yield f"names/{i}", "".join(lines[i : i + _NAMES_PER_DOCUMENT])
