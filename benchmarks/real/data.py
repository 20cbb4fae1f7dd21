"""The texts of the benchmark, all of them from the standard library of the running Python.

New task: records of the Unicode character database, six characters to a record, in a format of
our own. Old tasks: English prose (the help topics of `pydoc`) and Python source code. Each has a
training, a validation and a test part that share no character, help topic or source file.
"""

from __future__ import annotations

import json
import random
import sys
import sysconfig
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedTokenizerBase

OLD_TASKS = ("english", "python")
NEW_TASK = "unicode"
CHARACTERS_PER_RECORD = 6
WINDOW = 256


def unicode_line(code: int) -> str:
    """Return one character as a line: code point, name, category, direction and both cases."""
    char = chr(code)
    cases = [f"U+{ord(c):04X}" if len(c) == 1 and c != char else "-" for c in (char.lower(), char.upper())]
    return (
        f"U+{code:04X} => {unicodedata.name(char)} | category {unicodedata.category(char)}"
        f" | direction {unicodedata.bidirectional(char)} | lower {cases[0]} | upper {cases[1]}"
    )


def named_characters() -> list[int]:
    """Return the code points whose name says more than the code point itself, in order.

    Ideographs and Hangul syllables are left out: their names are computed from the code point.
    """
    named = []
    for code in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        if name and not name.endswith(f"{code:X}") and not name.startswith("HANGUL SYLLABLE"):
            named.append(code)
    return named


def split(items: list[str], rng: random.Random) -> dict[str, list[str]]:
    """Shuffle and split into training (50%), validation (15%) and test (35%) texts."""
    shuffled = list(items)
    rng.shuffle(shuffled)
    first, second = int(0.50 * len(shuffled)), int(0.65 * len(shuffled))
    return {"train": shuffled[:first], "validation": shuffled[first:second], "test": shuffled[second:]}


def _unicode_records(rng: random.Random) -> dict[str, list[str]]:
    lines = split([unicode_line(code) for code in named_characters()], rng)
    step = CHARACTERS_PER_RECORD
    return {
        part: ["\n".join(of_part[i : i + step]) + "\n" for i in range(0, len(of_part), step)]
        for part, of_part in lines.items()
    }


def _python_sources() -> list[str]:
    """Return the modules at the top of the standard library, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]


def load_texts(seed: int) -> dict[str, dict[str, list[str]]]:
    """Return the texts as task -> part -> list of documents; the same seed gives the same split."""
    english = [text for _, text in sorted(topics.items())]
    return {
        "english": split(english, random.Random(seed)),
        "python": split(_python_sources(), random.Random(seed)),
        NEW_TASK: _unicode_records(random.Random(seed)),
    }


def windows(texts: list[str], tokenizer: PreTrainedTokenizerBase, count: int) -> torch.Tensor:
    """Join documents and cut them into at most `count` windows of WINDOW tokens, shape (B, WINDOW).

    A document gives at most an eighth of the tokens, so that a long one does not make up the
    whole task. Nothing is padded.
    """
    wanted = count * WINDOW
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"][: wanted // 8]
        if len(ids) >= wanted:
            break
    whole = min(count, len(ids) // WINDOW)
    if whole == 0:
        raise SystemExit(f"the texts are too short for one window of {WINDOW} tokens")
    return torch.tensor(ids[: whole * WINDOW]).view(whole, WINDOW)


def held_out(
    texts: dict[str, dict[str, list[str]]], tokenizer: PreTrainedTokenizerBase, counts: dict[str, int]
) -> dict[str, dict[str, torch.Tensor]]:
    """Return part -> task -> windows, for every task and each part of `counts` in its order."""
    return {
        part: {task: windows(parts[part], tokenizer, count) for task, parts in texts.items()}
        for part, count in counts.items()
    }


def write_jsonl(texts: list[str], path: Path) -> None:
    """Write one {"text": ...} object to a line."""
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
