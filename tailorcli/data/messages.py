"""The messages of a record in the forms that chat templates and processors take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tailorcli.data.records import MEDIA_KEYS, Record, content_parts, named_in
from tailorcli.data.turns import Messages, is_answer
from tailorcli.errors import DataError
from tailorcli.files import parse_json

MEDIA_HINTS = {
    kind: f'write {{"type": "{kind}", "path": "FILE"}}, relative to the data file; nothing is downloaded'
    for kind in MEDIA_KEYS
}
NAMES = {"image": "image", "audio": "sound"}  # what an error calls them


def words_of(messages: Messages) -> list[str]:
    """The texts of messages, in either form."""
    plain = [message["content"] for message in messages if isinstance(message.get("content"), str)]
    parts = [part for message in messages for part in content_parts(message)]
    return plain + [part["text"] for part in parts if isinstance(part.get("text"), str)]


def other_forms(messages: Messages) -> Iterator[Messages]:
    """Messages in forms that other templates take: some refuse a form that they do not know, some drop it silently.

    A turn without content (one that calls a tool) has an empty one; the arguments of a call are objects, not JSON; the
    text is a list of parts, or a string.
    """
    messages = [{**message, "content": ""} if message.get("content") is None else message for message in messages]
    yield messages
    yield (messages := [_with_read_calls(message) for message in messages])
    yield [as_parts(message) for message in messages]
    yield [
        {**m, "content": "".join(str(part.get("text", "")) for part in content_parts(m))} if content_parts(m) else m
        for m in messages
    ]


def as_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose text is a list of one part."""
    text = message.get("content")
    return {**message, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else message


def _with_read_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls of tools have their arguments as objects, which some data holds as JSON."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    ready = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with suppress(ValueError):
                call = {**call, "function": {**function, "arguments": parse_json(function["arguments"])}}
        ready.append(call)
    return {**message, "tool_calls": ready}


def with_read_media(
    message: dict[str, Any],
    record: Record,
    beside: dict[str, Iterator[Path | bytes]],
    readers: dict[str, Callable[[Path | bytes], Any]],
) -> dict[str, Any]:
    """A message whose images and sounds are read: a template would look for their paths in the working directory.

    Parts that name no file take the next of those ``beside`` the messages, of their kind; there are ``readers`` for
    the kinds that the model takes. Raises DataError.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return {**message, "content": [{"type": "text", "text": content or ""}]}
    ready = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            ready.append(part)
        elif isinstance(kind, str) and kind in readers:
            ready.append({"type": kind, kind: readers[kind](_named_by(part, record, kind, beside[kind]))})
        else:  # a template would pass over it
            hint = MEDIA_HINTS.get(str(kind), MEDIA_HINTS["image"])
            raise DataError(f"{record.where}: its messages hold a part of type {kind!r}", hint)
    return {**message, "content": ready}


def images_in_order(record: Record) -> list[Path | bytes]:
    """The images of a record, files or their bytes, as they follow each other in its messages. Raises DataError."""
    beside = iter(record.images)
    parts = [part for message in record.fields.get("messages", ()) for part in content_parts(message)]
    return [_named_by(part, record, "image", beside) for part in parts if part.get("type") == "image"] + [*beside]


def _named_by(part: dict[str, Any], record: Record, kind: str, beside: Iterator[Path | bytes]) -> Path | bytes:
    """The file or the bytes that a part of this kind holds, or the next beside the messages."""
    media = named_in(part)
    if media is None:
        media = next(beside, None)
    elif isinstance(media, str) and "://" not in media:
        media = record.folder / media
    if not isinstance(media, bytes | Path):
        article = "a" if kind == "audio" else "an"
        what = f"{record.where}: {article} {NAMES[kind]} part names {media!r}, expected a file"
        raise DataError(what, MEDIA_HINTS[kind])
    return media


def word_places(messages: Messages, text: str) -> Iterator[tuple[int, int]]:
    """Where the words of the assistant's turns stand in the text of a conversation, by characters."""
    place = 0
    for message in messages:
        for words in (each for each in words_of([message]) if each.strip()):
            found = text.find(words.strip(), place)
            if found < 0:
                continue
            place = found + len(words.strip())
            if is_answer(message):
                yield found, place
