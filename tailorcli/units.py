"""Sizes and shares as people write and read them."""

from __future__ import annotations

import re

from rich.filesize import decimal

from tailorcli.errors import OptionsError


def counted(number: int, thing: str) -> str:
    """A number of things in words: 1 sample, 2,048 samples."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def format_share(value: float | None) -> str:
    """A share as a percentage, three digits; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if value >= 0.001 or value == 0 else f"{100 * value:.1g}%"


def format_bytes(count: float) -> str:
    """Bytes in decimal units, as file managers and transformers count."""
    return decimal(int(count))


_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B)\s*$", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in a size such as ``5GB`` (decimal, as transformers counts) or ``512MiB`` (binary).

    Raises OptionsError, also without a unit: a 5 is hardly meant as five bytes.
    """
    match = _SIZE.match(text)
    if match is None or len(text) > 40:  # more digits than that would leave the floats
        raise OptionsError(f"not a size with its unit: {text!r}", "write it like 5GB, 500MB or 512MiB")
    number, unit, binary = match.groups()
    power = " KMGT".index((unit or " ").upper())
    return int(float(number) * (1024 if binary else 1000) ** power)
