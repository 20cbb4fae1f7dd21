"""Where the assistant's turns stand in a conversation that a chat template has written out.

A template may write a turn otherwise by its place: Qwen3's drops the thoughts of earlier ones. So places are taken from
the whole conversation, written once more with a mark in place of each of the assistant's turns, and never from a
shorter one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str | None]  # messages, and whether the next turn's head follows; None: refused

OPEN, _CLOSE = "\ue000", "\ue001"  # characters of private use, which no text has


def answered(messages: Messages) -> list[int]:
    """Which of the messages are the assistant's turns, those to learn."""
    return [number for number, message in enumerate(messages) if is_answer(message)]


def is_answer(message: dict[str, Any]) -> bool:
    """Whether a message is the assistant's and to learn: data leave a turn out by a "weight" of 0, or "train" false."""
    left_out = message.get("weight") == 0 or message.get("train") is False
    return message.get("role") == "assistant" and not left_out


def answer_places(messages: Messages, text: str, render: Render) -> list[tuple[int, int]] | None:
    """Where what the assistant writes begins and ends in ``text``, its ends of turns included, by characters.

    ``text`` is what ``render`` makes of ``messages``. A turn begins behind the head that the template puts before an
    answer, so that thoughts which the template opens by itself are the assistant's own, as where it is asked; where
    the template has no such head, it begins with its words. A turn that the template leaves out has no place. None
    where the turns cannot be told apart.
    """
    numbers = answered(messages)
    if not numbers:
        return []
    written = render(marked(messages, numbers), False)
    between = None if written is None else _between(written, numbers)
    if between is None:
        return None
    known, parts = between
    ending = _ending(messages, known, parts, render)
    head = _head(messages, numbers, render)
    before = [part[: part.rfind(head) + len(head)] if head and head in part else part for part in parts[:-1]]
    inside = _aligned(text, [*before, parts[-1]])
    if inside is None:
        return None
    return [(start, stop + common(part, ending)) for (start, stop), part in zip(inside, parts[1:], strict=True)]


def marked(messages: Messages, numbers: Sequence[int]) -> Messages:
    """The messages with a mark, of the same form, in place of each of these turns."""
    marked = list(messages)
    for number in numbers:
        words = f"{OPEN}{number}{_CLOSE}"
        parts = isinstance(messages[number].get("content"), list)
        marked[number] = {"role": "assistant", "content": [{"type": "text", "text": words}] if parts else words}
    return marked


def _between(written: str, numbers: Sequence[int]) -> tuple[list[int], list[str]] | None:
    """The turns whose marks a text has, and what stands before, between and behind these; None if out of order."""
    known, parts = [], []
    rest = written
    for number in numbers:
        before, mark, after = rest.partition(f"{OPEN}{number}{_CLOSE}")
        if mark:
            known.append(number)
            parts.append(before)
            rest = after
    return None if OPEN in rest or any(OPEN in part for part in parts) else (known, [*parts, rest])


def _aligned(text: str, parts: Sequence[str]) -> list[tuple[int, int]] | None:
    """What stands between these parts of a text, by characters; None where it does not consist of them in order."""
    if not text.startswith(parts[0]) or not all(parts[1:-1]):
        return None
    found, place = [], len(parts[0])
    for part in parts[1:-1]:
        at = text.find(part, place)
        if at < 0:
            return None
        found.append((place, at))
        place = at + len(part)
    if len(parts) > 1:
        stop = len(text) - len(parts[-1])
        if stop < place or not text.endswith(parts[-1]):
            return None
        found.append((place, stop))
    return found


def _head(messages: Messages, numbers: Sequence[int], render: Render) -> str:
    """What the template puts before an answer that is asked for; empty where it puts nothing, or refuses to."""
    asked = messages[: numbers[0]]
    plain, prompted = (render(asked, head) if asked else None for head in (False, True))
    if plain is None or prompted is None or not prompted.startswith(plain):
        return ""
    return prompted[len(plain) :]


def _ending(messages: Messages, known: Sequence[int], parts: Sequence[str], render: Render) -> str:
    """What the template puts behind the last turn of a conversation that ends with it."""
    if not known:
        return ""
    last = known[-1]
    if last == len(messages) - 1:
        return parts[-1]
    shorter = render(marked(messages[: last + 1], [last]), False)
    return "" if shorter is None else shorter.rpartition(_CLOSE)[2]


def common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many characters, or tokens, two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def labelled(labels: Sequence[int], length: int) -> list[tuple[int, int]]:
    """The runs of the first ``length`` tokens that have a label; where none is to be learnt it is -100, or another."""
    runs: list[tuple[int, int]] = []
    for place, label in enumerate(labels[:length]):
        if label < 0:
            continue
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs


def tokens_at(places: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The tokens, by their ``offsets`` in a text, that hold each of these places of it; none has no run."""
    token = 0
    for start, stop in places:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(offsets) and offsets[token][0] < stop:
            token += 1
        if token > first:
            yield first, token
