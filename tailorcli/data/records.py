"""Calibration data: read records from a file, draw samples with a seed, put like with like into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailorcli.errors import DataError
from tailorcli.files import parse_json, read_text_file

_FORMATS = ".jsonl, .json or .txt"
FIELDS = 'a record needs "text", or "messages", or "prompt" and "response", with "images" or "audio" as the model takes'
_TOOLS_HINT = 'each is {"type": "function", "function": {"name": ..., "parameters": ...}}'
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


# Gives a record of the place, value and folder of a JSON value, or refuses it.
Check = Callable[[str, Any, Path], Record]


def read_records(path: Path, text_mode: str = "line", check: Check | None = None) -> list[Record]:
    """Every record of a .jsonl, .json or .txt file. Raises DataError with file and line.

    ``check`` is for records of other fields than calibration takes.
    """
    check = check or check_record
    try:
        text = read_text_file(path, "utf-8-sig")  # a byte order mark is no text
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
            value = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}", "one JSON object a line") from error
        yield check(f"{path}:{number}", value, path.parent)


def _json_list(path: Path, text: str, check: Check) -> Iterator[Record]:
    try:
        values = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", "a list of objects, or use .jsonl") from error
    if not isinstance(values, list):
        raise DataError(f"{path} holds a {type(values).__name__}, expected a list of objects", FIELDS)
    for number, value in enumerate(values):
        yield check(f"{path}, record {number}", value, path.parent)


def check_record(where: str, value: Any, folder: Path) -> Record:
    """A record with one of the known sets of fields, each of the right type. Raises DataError."""
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, expected an object", FIELDS)
    if "response" not in value and "completion" in value:  # the name that trl uses
        value = {**value, "response": value["completion"]}
    if "images" not in value and "image" in value:
        value = {**value, "images": [value["image"]]}
    if "messages" in value and "text" not in value:
        if value.get("tools"):
            value = {**value, "tools": _tools(where, value["tools"])}
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


def _tools(where: str, tools: Any) -> list[Any]:
    """The definitions of tools beside messages: a list, or the same as JSON, as tables of mixed types hold it."""
    if isinstance(tools, str):
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise DataError(f'{where}: "tools" is a string that is not JSON: {error}', _TOOLS_HINT) from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f'{where}: "tools" must be a list of objects', _TOOLS_HINT)
    return tools
