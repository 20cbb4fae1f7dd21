"""The records of data: a file, a folder of files, standard input or a dataset of the Hub, each in a known form."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from tailorcli.data.formats import PlainText
from tailorcli.data.forms import HINT, TOKEN_IDS, formed, is_undesired, renamed
from tailorcli.data.media import content_of
from tailorcli.data.sources import STDIN, open_source
from tailorcli.errors import DataError, note
from tailorcli.files import PathLike, file_digest, parse_json
from tailorcli.options import DataColumns
from tailorcli.units import counted

_IMAGES_HINT = 'an image is a file name, relative to the data file, or its bytes, as base64 or {"bytes": "..."}'
_SOUND_HINT = 'sound is a WAV file, relative to the data file, or its bytes, as base64 or {"bytes": "..."}'
_TOOLS_HINT = 'each is {"type": "function", "function": {"name": ..., "parameters": ...}}'
_TEMPLATE_HINT = 'it is an object of what the chat template knows by name: {"enable_thinking": false}'
_OWN = ("conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message")
_OWN_OF_CALL = ("return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length")
_PLAIN_TEXT = "plain text"
_TEXT_FIELDS = ("text", "prompt", "response")
# Where a part of a message names what it holds.
MEDIA_KEYS = {"image": ("image", "path", "url"), "audio": ("audio", "path", "url", "audio_url")}


@dataclass(frozen=True)
class Record:
    """One record of the data, where it stands, for error messages, and the folder that its paths start from.

    ``turns`` are those before the response, each a text, where a chat template may frame the prompt. ``form`` names
    what it was recognised by.
    """

    where: str
    fields: dict[str, Any]
    folder: Path = Path()
    turns: list[dict[str, Any]] | None = None
    form: str = ""

    @property
    def images(self) -> list[Path | bytes]:
        """The images that go with a text, files or their bytes; those of messages stand in the messages."""
        named = self.fields.get("images", ())
        return [image if isinstance(image, bytes) else self.folder / image for image in named]

    @property
    def sounds(self) -> list[Path | bytes]:
        """The sounds that go with a text, files or their bytes; those of messages stand in the messages."""
        named = self.fields.get("audio", ())
        return [sound if isinstance(sound, bytes) else self.folder / sound for sound in named]

    @property
    def texts(self) -> list[str]:
        """Its plain texts."""
        found = (self.fields.get(name) for name in ("text", "prompt", "response"))
        return [text for text in found if isinstance(text, str)]

    @property
    def written(self) -> str:
        """What a decoder writes for it."""
        written: str = self.fields.get("response", self.fields.get("text", ""))
        return written

    @property
    def template_options(self) -> dict[str, Any]:
        """What the chat template is given beside messages."""
        return {"tools": self.fields.get("tools") or None, **self.fields.get("chat_template_kwargs", {})}

    @property
    def has_media(self) -> bool:
        """Whether anything but text is in it."""
        beside = bool(self.images) or "audio" in self.fields
        return beside or any(part.get("type") != "text" for part in self._parts)

    @property
    def has_sound(self) -> bool:
        """Whether there is sound in it, beside its text or in its messages."""
        return "audio" in self.fields or any(part.get("type") == "audio" for part in self._parts)

    @property
    def _parts(self) -> list[dict[str, Any]]:
        """The parts of its messages, over which a text wins."""
        messages = () if "text" in self.fields else self.fields.get("messages", ())
        return [part for message in messages for part in content_parts(message)]

    @property
    def files(self) -> list[Path]:
        """The files of pictures and sound that it names."""
        found = [each for each in (*self.images, *self.sounds) if isinstance(each, Path)]
        for part in self._parts:
            named = named_in(part)
            found += [self.folder / named] if isinstance(named, str) else []
        return found


def named_in(part: dict[str, Any]) -> Any:
    """What a part of a message names of its kind, an image or a sound; None where it names nothing."""
    keys = MEDIA_KEYS.get(str(part.get("type")), ())
    return next((part[key] for key in keys if part.get(key) is not None), None)


def content_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message whose content is a list; none where it is plain text."""
    content = message.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def media_digest(records: Iterable[Record]) -> str | None:
    """A hash of the pictures and sounds that the records name, None where they name no file.

    What is not there counts as nothing: whoever reads it says so.
    """
    digest, seen = hashlib.blake2b(digest_size=16), set[Path]()
    for file in (file for record in records for file in record.files):
        if file not in seen:
            seen.add(file)
            with suppress(OSError):
                digest.update(file_digest(file).encode())
    return digest.hexdigest() if seen else None


# Gives a record of the place, value and folder of a JSON value, or refuses it.
Check = Callable[[str, Any, Path], Record]


class Records(Sequence[Record]):
    """The records of data, each checked when they are made; they are read anew whenever they are gone through.

    So what is held is what one holds on to, whatever the size of the data. ``forms`` counts the records of each form.
    """

    def __init__(self, name: str, read: Callable[[], Iterator[Record]], digest: Callable[[], str], files: int) -> None:
        """Go through all records once. Raises DataError for the first that is none, or where there are none."""
        self.name, self.num_files = name, files
        self._read, self._digest = read, digest
        self.forms: Counter[str] = Counter()
        self.has_media = self.has_turns = False
        for record in read():
            self.forms[record.form] += 1
            self.has_media = self.has_media or record.has_media
            self.has_turns = self.has_turns or record.turns is not None
        self._count = self.forms.total()
        if not self._count:
            raise DataError(f"{name} holds no records", HINT)

    @property
    def is_plain_text(self) -> bool:
        """Whether they are the lines of .txt files, or these as a whole."""
        return set(self.forms) == {_PLAIN_TEXT}

    @cached_property
    def digest(self) -> str:
        """A hash of the bytes of the data. Raises DataError."""
        try:
            return self._digest()
        except OSError as error:
            raise DataError(f"cannot read {self.name}: {error.strerror or error}", "check the path") from error

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        return self._read()

    @overload
    def __getitem__(self, position: int) -> Record: ...
    @overload
    def __getitem__(self, position: slice) -> list[Record]: ...
    def __getitem__(self, position: int | slice) -> Record | list[Record]:
        places = range(self._count)[position]
        return self.take([places])[0] if isinstance(places, int) else self.take(places)

    def take(self, positions: Sequence[int]) -> list[Record]:
        """The records at these positions, in this order, in one go through the data. Raises DataError."""
        wanted, found = set(positions), dict[int, Record]()
        for place, record in enumerate(self._read()):
            if place in wanted:
                found[place] = record
                if len(found) == len(wanted):
                    break
        if len(found) < len(wanted):
            raise DataError(f"{self.name} was changed while it was read", "run it again when nothing writes to it")
        return [found[place] for place in positions]


def read_records(
    data: PathLike, text_mode: str = "line", check: Check | None = None, columns: DataColumns = DataColumns()
) -> Records:
    """The records of a file, a folder of files, standard input (-) or a dataset of the Hub, NAME[:CONFIG][:SPLIT].

    A path that is there is that path, whatever the Hub has. ``check`` is for records of other fields than calibration
    takes; ``columns`` names those that are not called as usual. Raises DataError with file and line.
    """
    source = open_source(str(data), text_mode == "chunk", columns)
    check = check or check_record

    def records() -> Iterator[Record]:
        undesired = 0
        for where, value, folder in source.read():
            if check is check_record and is_undesired(value):
                undesired += 1
            elif isinstance(value, PlainText):
                yield Record(where, {"text": str(value)}, folder, form=_PLAIN_TEXT)
            elif columns.any and isinstance(value, dict):
                record = check(where, renamed(where, value, columns), folder)
                yield replace(record, form=f"column{'s' if columns.text is None else ''} {columns.shown}")
            else:
                yield check(where, value, folder)
        if undesired:
            note(f"{source.name}: {counted(undesired, 'record')} of completions to avoid (label false) are left out")

    return Records(source.name, records, source.digest, source.files)


def columns_of(data: PathLike, columns: DataColumns) -> DataColumns:
    """The named columns; the usual ones, with a note, where the first record of ``data`` has none of them.

    Standard input is read once, and is taken to have them. Raises DataError.
    """
    if not columns.any or str(data) == STDIN:
        return columns
    _, first, _ = next(open_source(str(data), columns=columns).read(), ("", None, Path()))
    if not isinstance(first, dict) or {columns.text, columns.prompt, columns.response}.intersection(first):
        return columns
    note(f"{data} has no column {columns.shown}: its records are taken by the usual names")
    return DataColumns()


def check_record(where: str, value: Any, folder: Path) -> Record:
    """A record in one of the known forms, each field of the right type. Raises DataError."""
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, expected an object", HINT)
    found = formed(where, value)
    form, fields, turns = ("", value, None) if found is None else found
    if form != TOKEN_IDS:  # its text is what counts: the tokens may be another model's
        fields = {name: entry for name, entry in fields.items() if name != "input_ids"}
    if "images" not in fields and "image" in fields:
        fields = {**fields, "images": [fields["image"]]}
    if fields.get("images") == "":  # a row of a .csv that has none
        fields = {name: entry for name, entry in fields.items() if name != "images"}
    if "audio" not in fields and "audios" in fields:
        fields = {**fields, "audio": fields["audios"]}
    if "audio" in fields and fields["audio"] in ("", None, []):  # a row of a table that has none
        fields = {name: entry for name, entry in fields.items() if name != "audio"}
    if "messages" in fields and "text" not in fields:
        if fields.get("tools"):
            fields = {**fields, "tools": _tools(where, fields["tools"])}
        messages = fields["messages"]
        sound = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
        if not sound:
            raise DataError(f'{where}: "messages" must be a list of objects with "role" and "content"', HINT)
        fields = {**fields, "messages": [_with_bytes(where, message) for message in messages]}
    elif found is None and not (fields.get("images") or "audio" in fields):
        raise DataError(f"{where} has the fields {sorted(map(str, value))}", HINT)
    if "chat_template_kwargs" in fields:
        fields = {**fields, "chat_template_kwargs": _template_options(where, fields["chat_template_kwargs"])}
    for name in _TEXT_FIELDS:
        if name in fields and not isinstance(fields[name], str):
            raise DataError(f'{where}: "{name}" is a {type(fields[name]).__name__}, expected a string', HINT)
    if "images" in fields:
        fields = {**fields, "images": _media(where, "images", fields["images"], _IMAGES_HINT)}
    if "audio" in fields:
        fields = {**fields, "audio": _media(where, "audio", fields["audio"], _SOUND_HINT)}
    media = " and ".join(name for name in ("images", "audio") if fields.get(name))
    form = f"{form} with {media}" if form and media else form or media
    return Record(where, fields, folder, turns, form)


def _media(where: str, name: str, values: Any, hint: str) -> list[str | bytes]:
    """The images or sounds beside a text: files or bytes; of one alone, or of a list that a table writes as JSON."""
    if isinstance(values, str) and values.startswith("["):
        try:
            values = parse_json(values)
        except ValueError as error:
            raise DataError(f'{where}: "{name}" is a list that is not JSON: {error}', hint) from error
    try:
        return [content_of(value) for value in (values if isinstance(values, list) else [values])]
    except ValueError as error:
        raise DataError(f'{where}: "{name}" must be a list of file names, or of bytes: {error}', hint) from error


def _with_bytes(where: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message whose parts of images and sound hold bytes as bytes, in whatever way they are written."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    ready = []
    for part in parts:
        found = part.get("type") if isinstance(part, dict) else None
        kind = "image" if found == "image_url" else found
        keys = MEDIA_KEYS.get(kind, ()) if isinstance(kind, str) else ()
        named = next((key for key in dict.fromkeys((*keys, "image_url")) if keys and _is_bytes(part, key)), None)
        if named is not None:
            value = part[named].get("url") if named == "image_url" and "url" in part[named] else part[named]
            try:
                part = {"type": kind, kind: content_of(value)}
            except ValueError as error:
                which, hint = ("a sound", _SOUND_HINT) if kind == "audio" else ("an image", _IMAGES_HINT)
                raise DataError(f"{where}: {which} part of its messages: {error}", hint) from error
        ready.append(part)
    return {**message, "content": ready}


def _is_bytes(part: dict[str, Any], key: str) -> bool:
    """Whether a part of a message holds bytes under this key; names of files stay as they are."""
    value = part.get(key)
    if isinstance(value, dict) and key == "image_url" and "url" in value:
        value = value["url"]
    return isinstance(value, bytes | dict) or (isinstance(value, str) and value.startswith("data:"))


def _parsed(where: str, name: str, text: str, hint: str) -> Any:
    """What a field holds as JSON, as tables of mixed types hold it."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f'{where}: "{name}" is a string that is not JSON: {error}', hint) from error


def _template_options(where: str, options: Any) -> dict[str, Any]:
    """What a record gives the chat template, as TRL takes it; what a table has no value for is left out."""
    name = "chat_template_kwargs"
    if isinstance(options, str) and options:
        options = _parsed(where, name, options, _TEMPLATE_HINT)
    if not options:
        return {}
    if not isinstance(options, dict):
        raise DataError(f'{where}: "{name}" is a {type(options).__name__}, expected an object', _TEMPLATE_HINT)
    if own := [key for key in options if key in (*_OWN, *_OWN_OF_CALL)]:
        raise DataError(f'{where}: "{name}" has {own[0]!r}, which is set here', "leave it out")
    return {key: value for key, value in options.items() if value is not None}


def _tools(where: str, tools: Any) -> list[Any]:
    """The definitions of tools beside messages: a list, or the same as JSON, as tables of mixed types hold it."""
    if isinstance(tools, str):
        tools = _parsed(where, "tools", tools, _TOOLS_HINT)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f'{where}: "tools" must be a list of objects', _TOOLS_HINT)
    return tools
