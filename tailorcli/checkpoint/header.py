"""What the header of a safetensors file says: names, dtypes, shapes and places of tensors."""

from __future__ import annotations

import json
import math
import os
import reprlib
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.errors import CheckpointError
from tailorcli.files import open_regular, unreadable
from tailorcli.typed import require_sound

if TYPE_CHECKING:
    import torch

# Bits of one element, and the torch dtype of the same layout where there is one.
DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}


PATCHABLE_DTYPES = ("F32", "BF16", "F16", "F64")


_MAX_HEADER = 100_000_000  # bytes; the format's own limit


_MAX_DIMENSIONS = 64  # what torch can hold


_MAX_SIZE = 1 << 62  # of anything in a header, so that no product of sizes leaves 64 bits


def bits_of(dtype: str) -> int:
    """Bits of one element of a dtype by its safetensors name; 0 for an unknown one."""
    return DTYPES[dtype][0] if dtype in DTYPES else 0


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a safetensors dtype such as ``BF16``; None where torch has none of that layout."""
    import torch

    torch_name = DTYPES[name][1]
    return getattr(torch, torch_name) if torch_name is not None else None


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its dtype by its safetensors name, its shape, its bytes in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int  # from the start of the file
    nbytes: int

    @property
    def numel(self) -> int:
        """Entries."""
        return math.prod(self.shape)


def header_entry(dtype: str, shape: Sequence[int], start: int, stop: int) -> dict[str, Any]:
    """One tensor's entry in a header; its bytes are those from ``start`` to ``stop`` behind the header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def build_header(entries: Mapping[str, Any], room: int = 0) -> bytes:
    """What a safetensors file begins with, its length and ``entries`` as JSON, up to the first byte of the data.

    It is padded with blanks to a multiple of 8 bytes, and to ``room`` bytes where it is shorter than those.
    """
    text = json.dumps(entries, separators=(",", ":")).encode()
    size = max(8 + len(text), room)
    text = text.ljust(size + -size % 8 - 8)
    return struct.pack("<Q", len(text)) + text


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata that a safetensors file declares, every claim checked against its size.

    Raises CheckpointError.
    """
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise damaged(file, f"its header claims {length} bytes, the file has {size}")
            text = stream.read(length)
    except OSError as error:
        raise unreadable(file, error) from error
    header = _parse_header(file, text)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise damaged(file, "its __metadata__ is not an object")
    try:
        require_sound(metadata)
    except ValueError as error:
        raise damaged(file, f"its __metadata__ is no plain text: {error}") from error
    start = 8 + length
    infos = [_parse_entry(file, name, entry, start) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    position = start
    for info in infos:
        if info.offset != position:
            raise damaged(file, f"tensor {info.name!r} starts at byte {info.offset}, expected {position}")
        position += info.nbytes
    if position != size:
        what = "truncated" if position > size else "longer than its header says"
        raise damaged(file, f"it is {what}: expected {position} bytes, got {size}")
    return {info.name: info for info in infos}, {str(k): str(v) for k, v in metadata.items()}


def _parse_header(file: Path, text: bytes) -> dict[str, Any]:
    """The header's JSON object. A name that occurs twice is refused: which of them counts would be a guess."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise damaged(file, f"its header has {name!r} twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise damaged(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise damaged(file, "its header is not a JSON object")
    return header


def _parse_entry(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One entry of the header, with absurd values refused."""
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise damaged(file, f"the tensor name {name!r} is no text")
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(file, f"tensor {name!r} has the unknown dtype {reprlib.repr(dtype)}")
    if not _are_sizes(shape) or math.prod(size or 1 for size in shape) >= _MAX_SIZE:
        raise damaged(file, f"tensor {name!r} has the shape {reprlib.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise damaged(file, f"tensor {name!r} has the data_offsets {reprlib.repr(offsets)}")
    nbytes = offsets[1] - offsets[0]
    expected = -(-math.prod(shape) * DTYPES[dtype][0] // 8)
    if nbytes != expected:
        raise damaged(file, f"tensor {name!r} has {nbytes} bytes, its shape and dtype need {expected}")
    return TensorInfo(name, dtype, tuple(shape), file, start + offsets[0], nbytes)


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item < _MAX_SIZE for item in value)


SAVE_AGAIN = "download it or save it again: its files come from different versions, or some are unfinished"


def damaged(file: Path, why: str) -> CheckpointError:
    """The user's error for a file whose bytes contradict its header."""
    return CheckpointError(
        f"{file} is not a sound safetensors file: {why}", "download or save it again; an unfinished copy looks so"
    )
