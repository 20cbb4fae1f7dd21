"""Calibration data: read records from a file, draw samples with a seed, put like with like into batches."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.errors import DataError
from tailorcli.files import file_digest
from tailorcli.options import CalibrateOptions

if TYPE_CHECKING:
    import torch

    # What a model is called with, by argument name; each holds one sample, batch dimension included.
    Inputs = dict[str, torch.Tensor]

_FORMATS = ".jsonl, .json or .txt"
FIELDS = 'a record needs "text", or "messages", or "prompt" and "response", with "images" or "audio" as the model takes'
_TEXT_FIELDS = ("text", "prompt", "response", "audio")


@dataclass(frozen=True)
class Record:
    """One record of the file, where it stands, for error messages, and the folder that its paths start from."""

    where: str
    fields: dict[str, Any]
    folder: Path = Path()

    @property
    def images(self) -> list[Path]:
        """The images that go with a text; those of messages stand in the messages."""
        return [self.folder / name for name in self.fields.get("images", ())]

    @property
    def has_media(self) -> bool:
        """Whether anything but text is in it."""
        if "text" in self.fields:  # it wins over messages
            return bool(self.images) or "audio" in self.fields
        parts = [part for message in self.fields.get("messages", ()) for part in content_parts(message)]
        return bool(self.images) or "audio" in self.fields or any(part.get("type") != "text" for part in parts)


def content_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message whose content is a list; none where it is plain text."""
    content = message.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


@dataclass(frozen=True)
class Samples:
    """The model's inputs of each drawn sample, and the facts about the drawing that go into the manifest."""

    inputs: list[Inputs]
    facts: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, those of images included; an input without tokens counts as one."""
        return sum(count_tokens(inputs) for inputs in self.inputs)


def count_tokens(inputs: Inputs) -> int:
    """Tokens that a model's inputs hold, the decoder's included; samples where there are none."""
    counts = [inputs[name].numel() for name in ("input_ids", "decoder_input_ids") if name in inputs]
    return sum(counts) or max((len(value) for value in inputs.values()), default=0)


# Gives a record of the place, value and folder of a JSON value, or refuses it.
Check = Callable[[str, Any, Path], Record]


def read_records(path: Path, text_mode: str = "line", check: Check | None = None) -> list[Record]:
    """Every record of a .jsonl, .json or .txt file. Raises DataError with file and line.

    ``check`` is for records of other fields than calibration takes.
    """
    check = check or check_record
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", "pass --data FILE") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})", f"pass a {_FORMATS} file") from error
    if path.suffix == ".jsonl":
        records = list(_json_lines(path, text, check))
    elif path.suffix == ".json":
        records = list(_json_list(path, text, check))
    elif path.suffix == ".txt":
        documents = [text] if text_mode == "chunk" else text.split("\n")
        lines = ((i + 1, line) for i, line in enumerate(documents) if line.strip())
        records = [Record(f"{path}:{number}", {"text": line}, path.parent) for number, line in lines]
    else:
        raise DataError(f"{path} has the unknown suffix {path.suffix!r}", f"pass a {_FORMATS} file")
    if not records:
        raise DataError(f"{path} holds no records", FIELDS)
    return records


def _json_lines(path: Path, text: str, check: Check) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number} is not JSON: {error}", "one JSON object a line") from error
        yield check(f"{path}:{number}", value, path.parent)


def _json_list(path: Path, text: str, check: Check) -> Iterator[Record]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", "a list of objects, or use .jsonl") from error
    if not isinstance(values, list):
        raise DataError(f"{path} holds a {type(values).__name__}, expected a list of objects", FIELDS)
    for number, value in enumerate(values):
        yield check(f"{path}, record {number}", value, path.parent)


def check_record(where: str, value: Any, folder: Path) -> Record:
    """A record with one of the known sets of fields, each of the right type."""
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, expected an object", FIELDS)
    if "response" not in value and "completion" in value:  # the name that trl uses
        value = {**value, "response": value["completion"]}
    if "images" not in value and "image" in value:
        value = {**value, "images": [value["image"]]}
    if "messages" in value and "text" not in value:
        messages = value["messages"]
        sound = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
        if not sound:
            raise DataError(f'{where}: "messages" must be a list of objects with "role" and "content"', FIELDS)
    elif not ("text" in value or {"prompt", "response"} <= value.keys() or value.get("images") or "audio" in value):
        raise DataError(f"{where} has the fields {sorted(value)}", FIELDS)
    for name in _TEXT_FIELDS:
        if name in value and not isinstance(value[name], str):
            raise DataError(f'{where}: "{name}" is a {type(value[name]).__name__}, expected a string', FIELDS)
    images = value.get("images", [])
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise DataError(f'{where}: "images" must be a list of file names', "paths are relative to the data file")
    return Record(where, value, folder)


def draw_samples(
    path: Path, records: list[Record], encode: Callable[[Record, int], Inputs | None], options: CalibrateOptions
) -> Samples:
    """Draw up to ``num_samples`` of the records of ``path``, in the order of the seed, as ``encode`` makes them.

    Records that give no token (None) are passed over. Raises DataError if none is left.
    """
    chosen: list[Inputs] = []
    if options.text_mode == "chunk" and path.suffix == ".txt":
        pool = _chunks(encode(records[0], sys.maxsize), options.length)
        random.Random(options.seed).shuffle(pool)
        chosen = pool[: options.num_samples]
        available = len(pool)
    else:
        order = list(range(len(records)))
        random.Random(options.seed).shuffle(order)
        available = len(records)
        for position in order:
            inputs = encode(records[position], options.length)
            if inputs is not None:
                chosen.append(inputs)
            if len(chosen) == options.num_samples:
                break
    if not chosen:
        raise DataError(f"{path}: no record gives a single token", FIELDS)
    facts = {
        "file": str(path),
        "blake2b": file_digest(path),
        "records": available,
        "samples": len(chosen),
        "tokens": sum(count_tokens(inputs) for inputs in chosen),
        "seed": options.seed,
        "seq_len": options.length,
        "text_mode": options.text_mode,
    }
    return Samples(chosen, facts)


def _chunks(inputs: Inputs | None, seq_len: int) -> list[Inputs]:
    """One long text cut into samples of ``seq_len`` tokens."""
    if inputs is None:
        return []
    ids = inputs["input_ids"]
    return [{"input_ids": ids[:, start : start + seq_len]} for start in range(0, ids.shape[1], seq_len)]


def make_batches(samples: list[Inputs], batch_size: int) -> Iterator[Inputs]:
    """Batches of samples whose inputs have equal shapes, the largest first.

    So nothing is ever padded, and no padding can count, whatever a model makes of its inputs inside.
    """
    for places in batch_places(samples, batch_size):
        yield join([samples[place] for place in places])


def batch_places(samples: list[Inputs], batch_size: int) -> Iterator[list[int]]:
    """Which samples go into each batch: their positions."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, inputs in enumerate(samples):
        alike.setdefault(tuple((name, value.shape) for name, value in sorted(inputs.items())), []).append(place)
    for group in sorted(alike.values(), key=lambda group: -sum(v.numel() for v in samples[group[0]].values())):
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def join(samples: list[Inputs]) -> Inputs:
    """One batch of samples whose inputs have equal shapes."""
    import torch

    return {name: torch.cat([inputs[name] for inputs in samples]) for name in samples[0]}
