"""Images and sound, read from files, or from the bytes that a record holds."""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.errors import DataError
from tailorcli.files import open_regular

if TYPE_CHECKING:
    import numpy as np

_MOST_PIXELS = 89_478_485  # Pillow warns beyond: a quarter of a gigabyte, some copies of which are needed
_MOST_SOUND = 1 << 28  # bytes: more than two hours at 16 kHz


# How the formats begin whose bytes a record may hold as base64 without saying so: PNG, JPEG, GIF, WebP and WAV, BMP,
# TIFF.
_BEGINNINGS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_SHORTEST = 60  # characters of a file as base64; a file's name may be anything


def content_of(value: Any) -> str | bytes:
    """What a record gives for an image or a sound: the name of a file, or the bytes of one.

    Bytes stand as they are, as base64 (with "data:...;base64," before it or not), or in the object that ``datasets``
    makes of them, {"bytes": ..., "path": ...}. Raises ValueError that says what else it is.
    """
    if isinstance(value, dict):
        found = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if found is None:
            raise ValueError(f"it is an object with {sorted(map(str, value))}, expected bytes or a path")
        return content_of(found) if isinstance(found, bytes) or value.get("bytes") is None else _from_base64(found)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"it is a {type(value).__name__}, expected the name of a file, or its bytes")
    if value.startswith("data:"):
        head, comma, body = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError("it is a data: address without base64")
        return _from_base64(body)
    if "://" in value:
        raise ValueError(f"it is the address {value}, and nothing is downloaded")
    if len(value) >= _SHORTEST and "." not in value[-6:]:
        try:
            content = _from_base64(value)
        except ValueError:
            return value
        return content if content.startswith(_BEGINNINGS) else value
    return value


def _from_base64(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"its bytes are a {type(value).__name__}, expected base64")
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"it is not base64: {error}") from error


def read_image(source: Path | bytes, where: str) -> Any:
    """A picture in RGB, upright as its camera noted, of a file or its bytes.

    Raises DataError with the record that names it.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(f"{where} has images, and Pillow is not installed", "pip install pillow") from error
    try:
        file: Any = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
            with Image.open(file) as image:
                width, height = image.size  # as the header says: nothing is decoded yet
                if width * height > _MOST_PIXELS:
                    raise ValueError(f"it has {width:,} x {height:,} pixels, more than {_MOST_PIXELS:,}: shrink it")
                if image.format == "EPS":
                    raise ValueError("it is a program (EPS), which would have to be run")
                return ImageOps.exif_transpose(image).convert("RGB")  # as transformers reads images
    except Exception as error:  # whatever a decoder raises: for a broken file, or one too large to be real
        which = f"of {len(source):,} bytes" if isinstance(source, bytes) else source
        raise DataError(f"{where}: cannot read the image {which}: {error}", "paths start at the data file") from error


def read_wav(source: Path | bytes, rate: int, where: str) -> np.ndarray:
    """Mono sound as float32 (samples,) in [-1, 1], of a file or its bytes.

    Raises DataError if it is no PCM WAV of ``rate`` Hz.
    """
    import numpy as np

    which = f"of {len(source):,} bytes" if isinstance(source, bytes) else source
    try:
        opened: Any = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
        with opened as stream, wave.open(stream, "rb") as file:
            channels, width, found = file.getnchannels(), file.getsampwidth(), file.getframerate()
            held = len(source) if isinstance(source, bytes) else os.fstat(stream.fileno()).st_size
            if held > _MOST_SOUND:
                raise wave.Error(f"it has {held:,} bytes, more than {_MOST_SOUND:,}: cut it into pieces")
            frame = channels * width
            raw = file.readframes(min(file.getnframes(), held // frame))  # a header may claim any number
            raw = raw[: len(raw) // frame * frame]
    except (OSError, EOFError, wave.Error, RuntimeError, ValueError) as error:  # the last two from a header's sizes
        what = f"{where}: cannot read the sound {which}: {error or 'it ends early'}"
        hint = "paths start at the data file" if isinstance(error, OSError) else "convert it to PCM WAV"
        raise DataError(what, hint) from error
    if found != rate or width not in (1, 2, 4):
        raise DataError(
            f"{where}: the sound {which} has {found} Hz and {8 * width} bits, the model expects {rate} Hz and 16 bits",
            f"convert it, for example with ffmpeg -i IN -ar {rate} -c:a pcm_s16le OUT.wav",
        )
    if width == 1:
        values = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128.0) / 128.0
    else:
        values = np.frombuffer(raw, f"<i{width}").astype(np.float32) / float(1 << (8 * width - 1))
    return np.asarray(values.reshape(-1, channels).mean(1), dtype=np.float32)
