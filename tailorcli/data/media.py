"""Images and sound, read from files."""

from __future__ import annotations

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


def read_image(path: Path, where: str) -> Any:
    """A picture in RGB, upright as its camera noted. Raises DataError with the record that names it."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(f"{where} has images, and Pillow is not installed", "pip install pillow") from error
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
            with Image.open(file) as image:
                width, height = image.size  # as the header says: nothing is decoded yet
                if width * height > _MOST_PIXELS:
                    raise ValueError(f"it has {width:,} x {height:,} pixels, more than {_MOST_PIXELS:,}: shrink it")
                if image.format == "EPS":
                    raise ValueError("it is a program (EPS), which would have to be run")
                return ImageOps.exif_transpose(image).convert("RGB")  # as transformers reads images
    except Exception as error:  # whatever a decoder raises: for a broken file, or one too large to be real
        raise DataError(f"{where}: cannot read the image {path}: {error}", "paths start at the data file") from error


def read_wav(path: Path, rate: int, where: str) -> np.ndarray:
    """Mono sound as float32 (samples,) in [-1, 1]. Raises DataError if it is no PCM WAV of ``rate`` Hz."""
    import numpy as np

    try:
        with open_regular(path) as stream, wave.open(stream, "rb") as file:
            channels, width, found = file.getnchannels(), file.getsampwidth(), file.getframerate()
            held = os.fstat(stream.fileno()).st_size
            if held > _MOST_SOUND:
                raise wave.Error(f"it has {held:,} bytes, more than {_MOST_SOUND:,}: cut it into pieces")
            frame = channels * width
            raw = file.readframes(min(file.getnframes(), held // frame))  # a header may claim any number
            raw = raw[: len(raw) // frame * frame]
    except (OSError, EOFError, wave.Error, RuntimeError, ValueError) as error:  # the last two from a header's sizes
        raise DataError(
            f"{where}: cannot read the sound {path}: {error or 'it ends early'}", "convert it to PCM WAV"
        ) from error
    if found != rate or width not in (1, 2, 4):
        raise DataError(
            f"{where}: {path} has {found} Hz and {8 * width} bits, the model expects {rate} Hz and 16 bits",
            f"convert it, for example with ffmpeg -i IN -ar {rate} -c:a pcm_s16le OUT.wav",
        )
    if width == 1:
        values = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128.0) / 128.0
    else:
        values = np.frombuffer(raw, f"<i{width}").astype(np.float32) / float(1 << (8 * width - 1))
    return np.asarray(values.reshape(-1, channels).mean(1), dtype=np.float32)
