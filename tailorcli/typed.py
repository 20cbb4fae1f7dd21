"""Readers of single values from a file that anyone may have written: each gives the value, or raises ValueError.

JSON from the standard library can be what nothing later on expects: NaN and infinity, numbers that no float holds,
half a character, lists inside lists without end, True where a count is due.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_MOST_ENTRIES = 1 << 62
_MOST_DIMENSIONS = 64
_LARGEST = 1e300  # so that sums over tensors stay finite, too
_DEEPEST = 64  # levels of a JSON value: far from where a function that calls itself would end
Reader = Callable[[Any], Any]


def require_sound(value: Any) -> None:
    """``value`` is JSON of few levels whose texts can be printed. Its numbers may be any: some configs name infinity.

    Raises ValueError that says what is not.
    """
    _walk(value, lambda number: None)


def require_plain(value: Any) -> None:
    """``value`` is JSON that can be written and printed again: finite numbers, encodable text, few levels.

    Raises ValueError that says what is not.
    """
    _walk(value, read_number)


def plain(value: Any) -> Any:
    """What JSON gives back of a value that it can write: lists for tuples, texts for the members of enums."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, str) else value


def _walk(value: Any, check_number: Callable[[Any], object]) -> None:
    """Check every text, every number and the depth; level by level, since a value may be nested without end."""
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
        below: list[Any] = []
        for node in level:
            if isinstance(node, str):
                read_text(node)
            elif isinstance(node, dict):
                for key in node:
                    read_text(key)
                below += node.values()
            elif isinstance(node, list):
                below += node
            elif node is not None and not isinstance(node, bool):
                check_number(node)
        level, depth = below, depth + 1


def wrong(value: Any, expected: str) -> ValueError:
    """The error for a value that is not what was expected."""
    return ValueError(f"it is {ascii(value)[:60]}, expected {expected}")


def read_text(value: Any) -> str:
    """Text that UTF-8 can hold: no lone surrogate. Raises ValueError."""
    if not isinstance(value, str):
        raise wrong(value, "text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise wrong(value, "text without lone surrogates") from error
    return value


def read_count(value: Any) -> int:
    """A whole number from 0 to 2^62. Raises ValueError."""
    if type(value) is not int or not 0 <= value < _MOST_ENTRIES:
        raise wrong(value, "a whole number, 0 or more")
    return value


def read_number(value: Any) -> float:
    """A finite number, as it is written: whole ones stay so. Raises ValueError."""
    if type(value) not in (int, float) or not -_LARGEST <= value <= _LARGEST:  # NaN fails every comparison
        raise wrong(value, "a finite number")
    return value  # type: ignore[no-any-return]


def read_amount(value: Any) -> float:
    """A finite number from 0. Raises ValueError."""
    if read_number(value) < 0:
        raise wrong(value, "a number, 0 or more")
    return value  # type: ignore[no-any-return]


def read_flag(value: Any) -> bool:
    """True or False. Raises ValueError."""
    if type(value) is not bool:
        raise wrong(value, "true or false")
    return value


def read_shape(value: Any) -> tuple[int, ...]:
    """The sizes of a tensor. Raises ValueError."""
    shape: tuple[int, ...] = list_of(read_count)(value)
    if len(shape) > _MOST_DIMENSIONS or math.prod(shape) >= _MOST_ENTRIES:
        raise wrong(value, "the shape of a tensor")
    return shape


def list_of(read: Reader) -> Reader:
    """A reader of lists, which become tuples."""

    def read_list(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise wrong(value, "a list")
        return tuple(read(entry) for entry in value)

    return read_list


def maybe(read: Reader) -> Reader:
    """A reader that also takes null."""
    return lambda value: None if value is None else read(value)


def one_of(*choices: str) -> Reader:
    """A reader of one of these words."""

    def read_choice(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise wrong(value, " or ".join(choices))
        return value

    return read_choice


def read_index(value: Any, below: int) -> int:
    """A whole number from 0 to ``below`` - 1. Raises ValueError."""
    if read_count(value) >= below:
        raise wrong(value, f"a whole number below {below}")
    return value  # type: ignore[no-any-return]


def read_object(value: Any) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    if not isinstance(value, dict):
        raise wrong(value, "an object")
    return value


def field_of(value: Any, key: str, read: Reader) -> Any:
    """What ``read`` makes of one field of a JSON object. Raises ValueError that names the field."""
    if key not in read_object(value):
        raise ValueError(f"it lacks {key!r}")
    try:
        return read(value[key])
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
