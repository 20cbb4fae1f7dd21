"""How a patch file writes a mask down: as bits, or as the gaps between kept entries, whichever is smaller.

- ``bits``: one bit an entry in row-major order, the first entry in the lowest bit of the first byte.
- ``gaps8``: a byte v < 255 skips v entries and keeps the next one; 255 skips 255 entries and keeps none.
- ``gaps4``: the same with 4 bits, 15 in place of 255; the low half of a byte comes first.

Any of them may be followed by up to 7 bytes that keep nothing: zeros for bits, 255 for gaps. At density d
a coding costs 1 bit an entry, about 8 d and about 4 d / (1 - (1 - d)^15): bits win above a quarter or so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

CODINGS = ("bits", "gaps4", "gaps8")
PADDING = 7  # bytes that may follow, so that what comes next in the file is aligned
_ESCAPES = {"gaps4": 15, "gaps8": 255}
_CHUNK = 1 << 20  # entries worked on at a time: bounds the index arrays
_BYTES = 1 << 16  # of codes worked on at a time: what is made of them stays in the processor's cache
_WORD = 2  # bytes whose codes are looked up at once

Mask = NDArray[np.bool_]
Codes = NDArray[np.uint8]
Gaps = NDArray[np.uint32]
Places = NDArray[np.int64]
Entries = NDArray[np.unsignedinteger[Any]]


def kept_places(mask: Mask) -> Iterator[Places]:
    """The positions of the kept entries of a flat mask, in order, chunk by chunk."""
    for start in range(0, mask.size, _CHUNK):
        places = np.flatnonzero(mask[start : start + _CHUNK])
        if places.size:
            yield places + start


def encode(mask: Mask, visit: Callable[[Places], None] | None = None) -> tuple[str, Codes]:
    """The smallest coding of a flat bool mask (numel,): its name and its bytes.

    ``visit`` is called with the positions of the kept entries, in order, chunk by chunk.

    >>> mask = np.zeros(1000, dtype=np.bool_)
    >>> mask[[3, 4, 300]] = True  # gaps of 3, 0 and 295 = 255 + 40 entries
    >>> coding, codes = encode(mask)
    >>> coding, codes.tolist()
    ('gaps8', [3, 0, 255, 40])
    """
    gaps: list[Gaps] = []  # the number of entries left out before each kept one
    last = -1
    for places in kept_places(mask):
        if visit is not None:
            visit(places)
        gaps.append((np.diff(places, prepend=last) - 1).astype(np.uint32))
        last = int(places[-1])
    kept = sum(part.size for part in gaps)
    skipped = {coding: sum(int((part // escape).sum()) for part in gaps) for coding, escape in _ESCAPES.items()}
    sizes = {
        "bits": -(-mask.size // 8),
        "gaps4": -(-(kept + skipped["gaps4"]) // 2),
        "gaps8": kept + skipped["gaps8"],
    }
    coding = min(CODINGS, key=lambda name: sizes[name])
    if coding == "bits":
        return coding, np.packbits(mask, bitorder="little")
    codes = np.empty(kept + skipped[coding], dtype=np.uint8)
    filled = 0
    for part in gaps:
        coded = _codes_of(part, _ESCAPES[coding])
        codes[filled : filled + coded.size] = coded
        filled += coded.size
    return coding, _pair_up(codes) if coding == "gaps4" else codes


def pad_byte(coding: str) -> int:
    """The byte that may be appended to a mask's bytes without keeping anything."""
    return 0 if coding == "bits" else 255


def check(coding: str, data: Codes, num_entries: int) -> int:
    """How many entries a coded mask keeps. Raises ValueError where it does not fit ``num_entries``."""
    if coding == "bits":
        needed = -(-num_entries // 8)
        if not needed <= data.size <= needed + PADDING:
            raise ValueError(f"its mask has {data.size} bytes for {num_entries} entries, expected {needed}")
        beyond = int(np.bitwise_count(data[needed:]).sum()) if data.size > needed else 0
        if beyond or (num_entries % 8 and data[needed - 1] >> (num_entries % 8)):
            raise ValueError(f"its mask keeps entries beyond the last of {num_entries}")
        return sum(int(np.bitwise_count(data[i : i + _CHUNK]).sum()) for i in range(0, data.size, _CHUNK))
    keeping = data[: len(data.tobytes().rstrip(b"\xff"))]  # bytes of nothing but escapes at the end reach no entry
    counts = np.zeros(256, np.int64)
    for start in range(0, keeping.size, _BYTES):
        counts += np.bincount(keeping[start : start + _BYTES], minlength=256)
    kept, reached = (int(counts @ each) for each in _OF_BYTES[coding])
    if coding == "gaps4" and keeping.size and keeping[-1] >= 0xF0:
        reached -= 15  # its last half byte is an escape, too
    if reached > num_entries:
        raise ValueError(f"its mask keeps an entry {reached - 1}, the tensor has {num_entries}")
    return kept


def decode(coding: str, data: Codes) -> Iterator[Places]:
    """The positions of the kept entries, in order, chunk by chunk. The bytes must have passed ``check``.

    >>> codes = np.array([3, 0, 255, 40], dtype=np.uint8)
    >>> [places.tolist() for places in decode("gaps8", codes)]
    [[3, 4, 300]]
    """
    if coding == "bits":
        for start in range(0, data.size, _BYTES):
            mask = np.unpackbits(data[start : start + _BYTES], bitorder="little").view(np.bool_)
            yield np.flatnonzero(mask) + 8 * start
        return
    table = _of_words(coding)
    whole = data if data.size % _WORD == 0 else np.append(data, np.uint8(pad_byte(coding)))
    words = whole.view("<u2")
    before = -1  # the last entry that the codes before have reached
    for start in range(0, words.size, _BYTES // _WORD):
        some = words[start : start + _BYTES // _WORD]
        entries = table.entries.take(some)
        reached = np.cumsum(entries)
        places = np.repeat(reached - entries + before, table.num_codes)
        places += table.within.take(some).view(table.within_type)
        yield places.compress(table.keeps.take(some).view(np.bool_))
        before += int(reached[-1])


def cut_in_steps(
    parts: Iterator[tuple[Places, Entries]], num_entries: int, step: int
) -> Iterator[list[tuple[Places, Entries]]]:
    """Of each ``step`` entries in turn the kept ones: places counted from the first of them, and what belongs to each.

    ``parts`` gives places in order, chunk by chunk, and as many values for them.
    """
    places, values = np.empty(0, np.int64), None
    for start in range(0, num_entries, step):
        found = []
        while True:
            cut = int(np.searchsorted(places, start + step))
            if cut and values is not None:
                found.append((places[:cut] - start, values[:cut]))
                places, values = places[cut:], values[cut:]
            following = None if places.size else next(parts, None)
            if following is None:
                break
            places, values = following
        yield found


def decode_mask(coding: str, data: Codes, num_entries: int) -> Mask:
    """The flat bool mask (num_entries,)."""
    mask = np.zeros(num_entries, dtype=np.bool_)
    for places in decode(coding, data):
        mask[places] = True
    return mask


def _codes_of(gaps: Gaps, escape: int) -> Codes:
    """Each gap as its escapes followed by the rest."""
    escapes = gaps // escape
    ends = np.cumsum(escapes + 1, dtype=np.int64)
    codes = np.full(int(ends[-1]) if ends.size else 0, escape, dtype=np.uint8)
    codes[ends - 1] = gaps - escapes * escape
    return codes


def _pair_up(codes: Codes) -> Codes:
    """Two codes of 4 bits a byte; an odd one is paired with an escape."""
    if codes.size % 2:
        codes = np.append(codes, np.uint8(15))
    return np.bitwise_or(codes[0::2], np.left_shift(codes[1::2], 4), dtype=np.uint8)


def _single_codes(coding: str, data: Codes) -> Codes:
    """The codes one by one, a byte each."""
    if coding == "gaps8":
        return data
    codes = np.empty(2 * data.size, dtype=np.uint8)
    np.bitwise_and(data, 15, out=codes[0::2])
    np.right_shift(data, 4, out=codes[1::2])
    return codes


def _in_each_byte(coding: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of every byte from 0 to 255: how many entries it keeps, and over how many it goes."""
    codes = _single_codes(coding, np.arange(256, dtype=np.uint8)).reshape(256, -1)
    keeps = codes < _ESCAPES[coding]
    return keeps.sum(1, dtype=np.int64), (codes + keeps).sum(1, dtype=np.int64)


@dataclass(frozen=True)
class _Words:
    """Of every word of two bytes from 0 to 65535, what its codes say; one sum over words in place of one over codes.

    The table is of words and not of bytes because NumPy's sums take ten times as long as what it looks up.
    """

    num_codes: int
    entries: NDArray[np.int64]  # over how many it goes
    within: NDArray[np.uint32]  # after how many of these each code has gone over its own, side by side
    within_type: str
    keeps: NDArray[Any]  # which codes keep the entry that they reach, side by side: an integer as wide as as many bools


@cache
def _of_words(coding: str) -> _Words:
    words = np.arange(1 << 8 * _WORD).astype("<u2")
    codes = _single_codes(coding, words.view(np.uint8)).reshape(words.size, -1)  # (words, codes)
    keeps = codes < _ESCAPES[coding]
    within_type = f"<u{4 // codes.shape[1]}"  # four reach 60, two 510
    within = np.cumsum(codes + keeps, axis=1, dtype=np.int64)
    return _Words(
        codes.shape[1],
        within[:, -1].copy(),
        within.astype(within_type).view("<u4").reshape(-1),
        within_type,
        keeps.view(f"<u{codes.shape[1]}").reshape(-1),
    )


_OF_BYTES = {coding: _in_each_byte(coding) for coding in _ESCAPES}
