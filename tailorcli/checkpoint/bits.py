"""Entries as integers of their width: what is copied, compared or counted to the bit needs no arithmetic on them.

NumPy does that, which is imported in a tenth of a second where torch takes two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.header import TensorInfo, bits_of
from tailorcli.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bits = NDArray[np.unsignedinteger[Any]]  # flat

# Infinity among the integers of a dtype's width: below it lie the finite numbers' magnitudes, above it the NaNs'.
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF << 52}
_STEP = 1 << 18  # entries at a time: what is made of them stays in the processor's cache
STEP_BYTES = 1 << 19  # the same in bytes, where more than one array of them is worked on


def bit_type(dtype: str) -> str:
    """NumPy's name of the integers that are as wide as an entry of a safetensors dtype: ``<u2`` of ``BF16``.

    Raises ValueError for a dtype whose entries are no whole bytes.
    """
    if bits_of(dtype) % 8 or not bits_of(dtype):
        raise ValueError(f"the entries of {dtype} are no whole bytes")
    return f"<u{bits_of(dtype) // 8}"


def bit_type_of(info: TensorInfo) -> str:
    """``bit_type`` of a tensor. Raises CheckpointError."""
    try:
        return bit_type(info.dtype)
    except ValueError as error:
        raise CheckpointError(f"tensor {info.name!r}: {error}", "leave it out with --exclude") from error


def is_finite(bits: Bits, dtype: str) -> bool:
    """Whether no entry is NaN or infinite; where the dtype has neither, True."""
    return dtype not in _INFINITY or _largest(bits) < _INFINITY[dtype]


def has_nan(bits: Bits, dtype: str) -> bool:
    """Whether an entry is NaN; where the dtype has none that is known here, False."""
    return dtype in _INFINITY and _largest(bits) > _INFINITY[dtype]


def _largest(bits: Bits) -> int:
    """The largest magnitude: of the entries without their signs; 0 of none."""
    without_sign = bits.dtype.type((1 << 8 * bits.dtype.itemsize - 1) - 1)
    pieces = (bits[start : start + _STEP] for start in range(0, bits.size, _STEP))
    return max((int((piece & without_sign).max()) for piece in pieces), default=0)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, up to 32 MB, for the next array of a loop that makes many.

    Glibc hands it back and asks for it again each time, until an array as large has been freed once: one that nobody
    has written to costs nothing. In a process that has just begun that takes a quarter of the time of ``verify``.
    """
    import numpy as np

    np.empty(1 << 24, np.uint8)


def number(bits: Bits, dtype: str) -> float:
    """The first entry of F16, BF16, F32 or F64 as a number."""
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return float((bits[:1].astype("<u4") << 16).view("<f4")[0])
    return float(bits[:1].view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])[0])
