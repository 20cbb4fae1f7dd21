"""Records of calibration data as the inputs of a model: by its tokenizer, or by its own processor."""

from __future__ import annotations

import wave
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.data import FIELDS, Record, content_parts
from tailorcli.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from tailorcli.data import Inputs

_DROPPED = ("attention_mask", "decoder_attention_mask")  # of one sample they hold nothing but ones


@dataclass(frozen=True)
class Encoder:
    """Turns a record into what the model is called with.

    ``processor`` is a tokenizer for text alone, else whatever the model's folder holds: a processor, an image
    processor, a feature extractor. ``start_token`` is an encoder-decoder's first decoder token.
    """

    processor: Any
    start_token: int | None = None
    takes_media: bool = False

    @property
    def tokenizer(self) -> Any:
        """What turns text into token ids."""
        return getattr(self.processor, "tokenizer", self.processor)

    def encode(self, record: Record, seq_len: int) -> Inputs | None:
        """The model's inputs for one record, of ``seq_len`` tokens at most; None if it gives none. Raises DataError."""
        if "audio" in record.fields:
            return self._speech(record, seq_len)
        if self.takes_media and record.has_media:
            return self._with_images(record, seq_len)
        if record.has_media:
            raise DataError(
                f"{record.where} has images, and the model's folder holds no processor for them",
                "save it there: processor.save_pretrained(DIR); or give records of text alone",
            )
        if self.start_token is not None:
            return self._text_to_text(record, seq_len)
        plain = "text" in record.fields or "messages" not in record.fields  # a template writes special tokens itself
        return _as_inputs(self._tokens(record, self._text_of(record), special=plain)[:seq_len])

    def _text_of(self, record: Record) -> str:
        """The text of a record without media, messages through the chat template."""
        fields = record.fields
        if "text" in fields:
            return str(fields["text"])
        if "messages" not in fields:
            return str(fields["prompt"] + fields["response"])
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                f"{record.where} has messages, and the model's tokenizer has no chat template",
                'give the records a "text" field instead',
            )
        try:
            return str(self.tokenizer.apply_chat_template(fields["messages"], tokenize=False))
        except Exception as error:  # whatever a model's own template raises
            raise DataError(f"{record.where}: the chat template refuses these messages: {error}", FIELDS) from error

    def _tokens(self, record: Record, text: str, special: bool = True) -> list[int]:
        try:
            text.encode("utf-8")  # JSON can escape half a character, of which tokenizers only say it is no string
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        except Exception as error:  # whatever a model's own tokenizer raises
            raise DataError(f"{record.where}: the tokenizer refuses this text: {error}", FIELDS) from error

    def _text_to_text(self, record: Record, seq_len: int) -> Inputs | None:
        """The prompt for the encoder, the response for the decoder."""
        if "prompt" not in record.fields:
            raise DataError(
                f'{record.where} has no "prompt": this model is an encoder-decoder',
                'give its records a "prompt", for the encoder, and a "response", for the decoder',
            )
        inputs = _as_inputs(self._tokens(record, record.fields["prompt"])[:seq_len])
        if inputs is None:
            return None
        response = self._tokens(record, record.fields["response"])
        return inputs | {"decoder_input_ids": self._decoder_ids(response, seq_len)}

    def _decoder_ids(self, ids: list[int], seq_len: int) -> Any:
        """What the decoder reads while it writes ``ids``: the same, one place later."""
        import torch

        assert self.start_token is not None
        shifted = ids[:-1] if ids[:1] == [self.start_token] else [self.start_token, *ids[:-1]]
        return torch.tensor([shifted[:seq_len] or [self.start_token]])

    def _speech(self, record: Record, seq_len: int) -> Inputs:
        """Sound for the encoder, the response for the decoder, where the model has one."""
        extractor = getattr(self.processor, "feature_extractor", self.processor)
        rate = getattr(extractor, "sampling_rate", None)
        if rate is None:
            raise DataError(
                f"{record.where} has audio, and the model's folder holds no feature extractor for it", FIELDS
            )
        sound = read_wav(record.folder / record.fields["audio"], rate, record.where)
        inputs = self._call(record, lambda: extractor(sound, sampling_rate=rate, return_tensors="pt"))
        if self.start_token is None:
            return inputs
        response = self._tokens(record, record.fields.get("response", record.fields.get("text", "")))
        return inputs | {"decoder_input_ids": self._decoder_ids(response, seq_len)}

    def _with_images(self, record: Record, seq_len: int) -> Inputs:
        """Images and text through the model's own processor, which puts in as many image tokens as it needs."""
        if "messages" in record.fields:
            messages = [_with_paths(message, record) for message in record.fields["messages"]]
            call = self.processor.apply_chat_template
            inputs = self._call(record, lambda: call(messages, tokenize=True, return_dict=True, return_tensors="pt"))
        else:
            images = [read_image(path, record.where) for path in record.images]
            if not hasattr(self.processor, "tokenizer"):
                return self._call(record, lambda: self.processor(images=images, return_tensors="pt"))
            inputs = self._call_with_text(record, images)
        return self._cut(record, inputs, seq_len)

    def _call_with_text(self, record: Record, images: list[Any]) -> Inputs:
        """Where neither the text nor the processor names the place of the images, they come first, a line each."""
        fields = record.fields
        text = fields["text"] if "text" in fields else fields.get("prompt", "") + fields.get("response", "")
        if not hasattr(self.processor, "num_query_tokens"):  # such a processor puts its query tokens in by itself
            mark = self.image_mark()
            known = (mark.strip(), getattr(self.processor, "image_token", None))
            if not any(isinstance(token, str) and token and token in text for token in known):
                text = mark * len(images) + text
        return self._call(record, lambda: self.processor(images=images, text=text, return_tensors="pt"))

    def image_mark(self) -> str:
        """How a text marks an image's place: as the chat template writes it, or the image token on a line."""
        render = getattr(self.processor, "apply_chat_template", None)
        if getattr(self.processor, "chat_template", None) and render is not None:
            words = {"type": "text", "text": "x"}
            with suppress(Exception):  # whatever a model's own template raises: then there is the token
                bare, marked = (
                    render([{"role": "user", "content": parts}], tokenize=False)
                    for parts in ([words], [{"type": "image"}, words])
                )
                start = next((i for i, (a, b) in enumerate(zip(bare, marked, strict=False)) if a != b), len(bare))
                return str(marked[start : start + len(marked) - len(bare)])
        token = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None)
        return f"{token}\n" if isinstance(token, str) else ""

    def _cut(self, record: Record, inputs: Inputs, seq_len: int) -> Inputs:
        """At most ``seq_len`` tokens, but never fewer than hold all images."""
        length = inputs["input_ids"].shape[1]
        if length <= seq_len:
            return inputs
        token = getattr(self.processor, "image_token_id", None)
        places = (inputs["input_ids"][0] == token).nonzero() if token is not None else None
        if places is None or (len(places) and int(places[-1]) >= seq_len):
            raise DataError(
                f"{record.where} has {length} tokens with its images, more than --seq-len {seq_len}",
                "pass a larger --seq-len, or smaller images",
            )
        alike = {name for name, value in inputs.items() if value.shape[:2] == (1, length)}
        return {name: value[:, :seq_len] if name in alike else value for name, value in inputs.items()}

    def _call(self, record: Record, call: Callable[[], Any]) -> Inputs:
        """A processor's output as tensors with a batch dimension of one sample."""
        import torch

        try:
            made = dict(call())
        except Exception as error:  # whatever a model's own processor raises
            what = str(error).strip().split("\n")[0] or type(error).__name__
            raise DataError(f"{record.where}: the processor refuses this record: {what}", FIELDS) from error
        tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        return {name: value for name, value in tensors.items() if name not in _DROPPED}


def _as_inputs(ids: list[int]) -> Inputs | None:
    import torch

    return {"input_ids": torch.tensor([ids])} if ids else None


def _with_paths(message: dict[str, Any], record: Record) -> dict[str, Any]:
    """A message whose images are read: a template would look for their paths in the working directory."""
    parts = content_parts(message)
    if not parts:
        return {**message, "content": [{"type": "text", "text": message.get("content", "")}]}
    ready = []
    for part in parts:
        if part.get("type") == "text":
            ready.append(part)
            continue
        if part.get("type") != "image":
            raise DataError(f"{record.where}: a part of type {part.get('type')!r} is not read", "text and image are")
        named = next((part[key] for key in ("image", "path", "url") if key in part), None)
        if not isinstance(named, str) or "://" in named:
            raise DataError(
                f"{record.where}: an image part names {named!r}, expected a file",
                'write {"type": "image", "path": "FILE"}, relative to the data file; nothing is downloaded',
            )
        ready.append({"type": "image", "image": read_image(record.folder / named, record.where)})
    return {**message, "content": ready}


def read_image(path: Path, where: str) -> Any:
    """A picture in RGB. Raises DataError with the record that names it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{where} has images, and Pillow is not installed", "pip install 'tailorcli[images]'"
        ) from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: cannot read the image {path}: {error}", "paths start at the data file") from error


def read_wav(path: Path, rate: int, where: str) -> np.ndarray:
    """Mono sound as float32 (samples,) in [-1, 1]. Raises DataError if it is no PCM WAV of ``rate`` Hz."""
    import numpy as np

    try:
        with wave.open(str(path), "rb") as file:
            channels, width, found = file.getnchannels(), file.getsampwidth(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{where}: cannot read the sound {path}: {error}", "convert it to PCM WAV") from error
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
