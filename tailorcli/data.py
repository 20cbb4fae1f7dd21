"""Calibration data: read records from a file, turn them into token ids, draw samples with a seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailorcli.errors import DataError
from tailorcli.options import CalibrateOptions

_FORMATS = ".jsonl, .json or .txt"
_FIELDS = 'a record needs "text", or "messages", or "prompt" and "response"'


@dataclass(frozen=True)
class Record:
    """One record of the file and where it stands, for error messages."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """Token ids of the drawn samples, and the facts about the drawing that go into the manifest."""

    token_ids: list[list[int]]
    facts: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(ids) for ids in self.token_ids)


def read_records(path: Path, text_mode: str = "line") -> list[Record]:
    """Every record of a .jsonl, .json or .txt file. Raises DataError with file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", "pass --data FILE") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})", f"pass a {_FORMATS} file") from error
    if path.suffix == ".jsonl":
        records = list(_json_lines(path, text))
    elif path.suffix == ".json":
        records = list(_json_list(path, text))
    elif path.suffix == ".txt":
        documents = [text] if text_mode == "chunk" else text.split("\n")
        records = [Record(f"{path}:{i + 1}", {"text": line}) for i, line in enumerate(documents) if line.strip()]
    else:
        raise DataError(f"{path} has the unknown suffix {path.suffix!r}", f"pass a {_FORMATS} file")
    if not records:
        raise DataError(f"{path} holds no records", _FIELDS)
    return records


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number} is not JSON: {error}", "one JSON object a line") from error
        yield _checked(f"{path}:{number}", value)


def _json_list(path: Path, text: str) -> Iterator[Record]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", "a list of objects, or use .jsonl") from error
    if not isinstance(values, list):
        raise DataError(f"{path} holds a {type(values).__name__}, expected a list of objects", _FIELDS)
    for number, value in enumerate(values):
        yield _checked(f"{path}, record {number}", value)


def _checked(where: str, value: Any) -> Record:
    """A record with one of the known sets of fields, each of the right type."""
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, expected an object", _FIELDS)
    if "response" not in value and "completion" in value:  # the name that trl uses
        value = {**value, "response": value["completion"]}
    if "text" in value:
        wanted: tuple[str, ...] = ("text",)
    elif "messages" in value:
        messages = value["messages"]
        sound = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
        if not sound:
            raise DataError(f'{where}: "messages" must be a list of objects with "role" and "content"', _FIELDS)
        return Record(where, value)
    elif "prompt" in value and "response" in value:
        wanted = ("prompt", "response")
    else:
        raise DataError(f"{where} has the fields {sorted(value)}", _FIELDS)
    for name in wanted:
        if not isinstance(value[name], str):
            raise DataError(f'{where}: "{name}" is a {type(value[name]).__name__}, expected a string', _FIELDS)
    return Record(where, value)


def draw_samples(path: Path, tokenizer: Any, options: CalibrateOptions) -> Samples:
    """Draw up to ``num_samples`` samples of at most ``seq_len`` tokens, in the order that the seed gives.

    Records that give no token are passed over. Raises DataError if none is left.
    """
    records = read_records(path, options.text_mode)
    chosen: list[list[int]] = []
    if options.text_mode == "chunk" and path.suffix == ".txt":
        ids = _tokenize(records[0], tokenizer)
        pool = [ids[start : start + options.seq_len] for start in range(0, len(ids), options.seq_len)]
        random.Random(options.seed).shuffle(pool)
        chosen = [chunk for chunk in pool if chunk][: options.num_samples]
        available = len(pool)
    else:
        order = list(range(len(records)))
        random.Random(options.seed).shuffle(order)
        available = len(records)
        for position in order:
            ids = _tokenize(records[position], tokenizer)[: options.seq_len]
            if ids:
                chosen.append(ids)
            if len(chosen) == options.num_samples:
                break
    if not chosen:
        raise DataError(f"{path}: no record gives a single token", _FIELDS)
    facts = {
        "file": str(path),
        "blake2b": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
        "records": available,
        "samples": len(chosen),
        "tokens": sum(len(ids) for ids in chosen),
        "seed": options.seed,
        "seq_len": options.seq_len,
        "text_mode": options.text_mode,
    }
    return Samples(chosen, facts)


def _tokenize(record: Record, tokenizer: Any) -> list[int]:
    """Token ids of one record: text as it is, messages through the chat template."""
    fields = record.fields
    special = True
    if "text" in fields:
        text = fields["text"]
    elif "messages" in fields:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{record.where} has messages, and the model's tokenizer has no chat template",
                'give the records a "text" field instead',
            )
        try:
            text = tokenizer.apply_chat_template(fields["messages"], tokenize=False)
        except Exception as error:  # whatever a model's own template raises
            raise DataError(f"{record.where}: the chat template refuses these messages: {error}", _FIELDS) from error
        special = False  # the template writes them
    else:
        text = fields["prompt"] + fields["response"]
    try:
        text.encode("utf-8")  # JSON can escape half a character, of which tokenizers only say that it is no string
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:  # whatever a model's own tokenizer raises
        raise DataError(f"{record.where}: the tokenizer refuses this text: {error}", _FIELDS) from error


def make_batches(token_ids: list[list[int]], batch_size: int) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Batches (input ids, attention mask), padded on the right; samples of like length together to pad less."""
    ordered = sorted(token_ids, key=len, reverse=True)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        width = len(batch[0])
        ids = [sample + [0] * (width - len(sample)) for sample in batch]
        mask = [[1] * len(sample) + [0] * (width - len(sample)) for sample in batch]
        yield ids, mask
