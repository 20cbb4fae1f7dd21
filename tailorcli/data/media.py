"""Images and sound, read from files."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.errors import DataError

if TYPE_CHECKING:
    import numpy as np


def read_image(path: Path, where: str) -> Any:
    """A picture in RGB, upright as its camera noted. Raises DataError with the record that names it."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(f"{where} has images, and Pillow is not installed", "pip install pillow") from error
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")  # as transformers reads images
    except Exception as error:  # whatever a decoder raises: for a broken file, or one too large to be real
        raise DataError(f"{where}: cannot read the image {path}: {error}", "paths start at the data file") from error


def read_wav(path: Path, rate: int, where: str) -> np.ndarray:
    """Mono sound as float32 (samples,) in [-1, 1]. Raises DataError if it is no PCM WAV of ``rate`` Hz."""
    import numpy as np

    try:
        with wave.open(str(path), "rb") as file:
            channels, width, found = file.getnchannels(), file.getsampwidth(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
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
