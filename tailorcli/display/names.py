"""Tensor names for people: which layer and which kind a tensor is, in number order, without what all have in common."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tailorcli.terminal import printable

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<number>\d+)\.(?P<kind>.*)$")
_OTHER = 1 << 30  # the number of what lies in no layer: last

Item = TypeVar("Item")


@dataclass(frozen=True, order=True)
class Place:
    """Where a tensor is: its stack of layers (``model.layers``), the layer's number, and its kind (``mlp.up_proj``)."""

    stack: str
    number: int | None
    kind: str


def place_of(name: str) -> Place:
    """The place that a tensor's name tells: its first number is the layer's, what lies in none has no stack."""
    match = _LAYER.match(name)
    if match is None:
        return Place("", None, _kind(name))
    return Place(match["stack"], int(match["number"]), _kind(match["kind"]))


def _kind(name: str) -> str:
    """Without ".weight" and with ``*`` for further numbers, such as an expert's."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removesuffix(".weight"))


def number_order(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names by the numbers in them: layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def without_common_start(names: Sequence[str]) -> str:
    """The dotted start to cut off: of all names that lie in layers, if they agree (``model.layers.``), else of all."""
    stacks = {place_of(name).stack for name in names if place_of(name).number is not None}
    if len(stacks) == 1:
        return f"{stacks.pop()}."
    return _common(name.removesuffix(".weight") for name in names)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names as tables show them, in number order: what the layers' names all begin with is cut."""
    ordered = sorted(names, key=number_order)
    start = without_common_start(ordered)
    return {name: printable(name.removeprefix(start).removesuffix(".weight")) for name in ordered}


def _common(names: Iterable[str]) -> str:
    """The dotted start that all names share."""
    split = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return "".join(f"{part}." for part in common)


def stack_titles(stacks: Iterable[str]) -> dict[str, str]:
    """A few words for each stack of layers; none where there is but one: ``vision_tower``, ``language_model``."""
    found = sorted({stack for stack in stacks if stack})
    if len(found) < 2:
        return dict.fromkeys(found, "")
    start = _common(f"{stack}." for stack in found)
    rests = {stack: f"{stack}.".removeprefix(start).strip(".").split(".") for stack in found}
    titles: dict[str, str] = {}
    for stack, parts in rests.items():
        others = [rest for other, rest in rests.items() if other != stack]
        length = next((n for n in range(1, len(parts)) if all(rest[:n] != parts[:n] for rest in others)), len(parts))
        titles[stack] = ".".join(parts[:length])
    return titles


def by_kind(
    items: Iterable[Item], name_of: Callable[[Item], str], is_vector: Callable[[Item], bool]
) -> dict[str, list[Item]]:
    """Items gathered by kind of layer, in the order of the first of each; "norms" and "biases" are a kind of vectors.

    A kind is called by its last words, as many as tell it from others: ``q_proj``, ``mlp.down_proj``.
    """
    gathered: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: number_order(name_of(item))):
        place = place_of(name_of(item))
        kind = place.kind
        if is_vector(item):
            kind = "biases" if kind.rpartition(".")[2] == "bias" else "norms"
        gathered[place.stack, kind].append(item)
    titles = stack_titles(stack for stack, _ in gathered)
    short = {stack: _last_words(kind for other, kind in gathered if other == stack) for stack, _ in gathered}
    named: dict[str, list[Item]] = defaultdict(list)
    for (stack, kind), group in gathered.items():
        named[printable(f"{titles.get(stack, '')} {short[stack][kind]}".strip())] += group
    return dict(sorted(named.items(), key=lambda entry: entry[0].endswith(("norms", "biases"))))


def _last_words(kinds: Iterable[str]) -> dict[str, str]:
    """Each kind by as many of its last dotted parts as tell it from the others."""
    found = list(dict.fromkeys(kinds))
    split = {kind: kind.split(".") for kind in found}
    short: dict[str, str] = {}
    for kind, parts in split.items():
        least = 2 if parts[-1] in ("bias", "*") and len(parts) > 1 else 1
        ends = (parts[-n:] for n in range(least, len(parts) + 1))
        unique = (
            end for end in ends if end[0] != "*" and sum(other[-len(end) :] == end for other in split.values()) == 1
        )
        short[kind] = ".".join(next(unique, parts))
    return short


def by_layer(items: Iterable[Item], name_of: Callable[[Item], str], most: int | None = None) -> dict[str, list[Item]]:
    """Items gathered by layer, stack by stack in number order; what lies in no layer comes last as "other".

    With ``most``, a stack of more layers is gathered in so many runs of them: "0-2", "3-5".
    """
    gathered: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in items:
        place = place_of(name_of(item))
        gathered[(place.stack, place.number) if place.number is not None else ("", _OTHER)].append(item)
    titles = stack_titles(stack for stack, _ in gathered)
    named: dict[str, list[Item]] = {}
    for stack in sorted({stack for stack, _ in gathered if stack}):
        numbers = sorted(number for other, number in gathered if other == stack)
        for run in _runs(numbers, most):
            label = str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
            named[printable(f"{titles[stack]} {label}".strip())] = [item for n in run for item in gathered[stack, n]]
    if ("", _OTHER) in gathered:
        named["other"] = gathered["", _OTHER]
    return named


def _runs(numbers: list[int], most: int | None) -> list[list[int]]:
    if most is None or len(numbers) <= most:
        return [[number] for number in numbers]
    size = -(-len(numbers) // most)
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
