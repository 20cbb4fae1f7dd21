"""Records with images or sound as the inputs of a model, by its own processor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from tailorcli.data import chat
from tailorcli.data.forms import HINT, MARKS
from tailorcli.data.media import read_image, read_wav
from tailorcli.data.messages import NAMES, with_read_media
from tailorcli.data.timed import within
from tailorcli.data.tokens import TextTokens, first_tokens
from tailorcli.errors import DataError, OnceNotes, first_line

if TYPE_CHECKING:
    from pathlib import Path

    from tailorcli.data.records import Record
    from tailorcli.data.samples import Inputs

# Masks of one sample hold nothing but ones; labels (PaliGemma's) are for a loss that no one asks for.
_DROPPED = ("attention_mask", "decoder_attention_mask", "labels")
_IMAGE = MARKS["image"]
_ALONE = ("images", "audio", "images and audio")  # forms of records without a text


@dataclass(frozen=True)
class Multimodal:
    """A model's own ``processor``, or one part of it where its folder holds no more.

    ``takes_media`` is false of a tokenizer alone, whose model sees and hears nothing here.
    """

    processor: Any
    takes_media: bool
    tokens: TextTokens
    notes: OnceNotes
    uncut: dict[str, int] = field(default_factory=dict, init=False, compare=False)  # tokens of the last beside images

    @cached_property
    def takes_suffix(self) -> bool:
        """Whether the processor takes a text's end apart: PaliGemma, whose tokens before it see one another."""
        return self.takes_media and "suffix" in inspect.signature(type(self.processor).__call__).parameters

    @cached_property
    def hears_in_text(self) -> bool:
        """Whether sound stands in the middle of a text, as pictures do, and not for an encoder alone (Whisper)."""
        token = getattr(self.processor, "audio_token", None)
        takes = self.takes_media and "audio" in inspect.signature(type(self.processor).__call__).parameters
        return takes and self.tokens.start_token is None and isinstance(token, str)

    @property
    def written_kind(self) -> int:
        """The kind (token_type_ids) of the tokens that a model writes behind a prompt with images."""
        return int(self.takes_suffix)

    def seen_ahead(self, inputs: Inputs) -> int:
        """How many of the first tokens are read by those before them, so that they are not predicted."""
        kinds = inputs.get("token_type_ids") if self.takes_suffix else None
        return 0 if kinds is None else int(kinds.eq(0).sum())

    @cached_property
    def ids(self) -> list[int]:
        """The ids of tokens that stand for a part of an image or a sound, which no model writes."""
        if not self.takes_media:
            return []
        ids = [getattr(self.processor, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
        tokens = [getattr(self.processor, f"{kind}_token", None) for kind in ("image", "audio")]
        ids += [self.tokens.tokenizer.convert_tokens_to_ids(str(token)) for token in tokens if token is not None]
        return [number for number in ids if isinstance(number, int)]

    def speech(self, record: Record, seq_len: int) -> Inputs:
        """Sound for the encoder, the response for the decoder, where the model has one. Raises DataError for more."""
        fields, extractor, rate = record.fields, self._extractor, self._rate(record)
        if self.tokens.start_token is None and getattr(self.processor, "audio_token", None) is not None:
            what = f"{record.where} has audio, and this model's processor takes none beside a text"
            raise DataError(what, "give records without audio: of such models the text alone is run")
        if "text" not in fields and ("messages" in fields or record.turns or fields.get("prompt", "").strip()):
            what = f"{record.where} has a prompt or messages beside its audio, and a model hears the audio alone"
            raise DataError(what, 'leave all out but "audio" and "response"')
        if len(record.sounds) > 1:
            what = f"{record.where} has {len(record.sounds)} sounds, and this model hears one"
            raise DataError(what, "give each a record of its own")
        if self.tokens.start_token is not None and not {"response", "text"} & fields.keys():
            what = f"{record.where} has audio and no response: this model is an encoder-decoder"
            raise DataError(what, 'say what is heard in "response", or name its column by --response-column')
        sound = read_wav(record.sounds[0], rate, record.where)
        most = getattr(extractor, "n_samples", None)  # Whisper's window
        if most is not None and len(sound) > most:
            what = f"the sound of {record.where}, and maybe of others, is longer than the model hears"
            self.notes.make("sound", f"{what}: what comes after {most / rate:g} s is left out")
        inputs = self._call(record, lambda: extractor(sound, sampling_rate=rate, return_tensors="pt"))
        if self.tokens.start_token is None:
            return inputs
        return inputs | self.tokens.decoder_inputs(record, seq_len)

    def with_media(self, record: Record, seq_len: int, *, asked: bool = False) -> Inputs:
        """Images, sound and text through the model's own processor, which puts in as many tokens of each as it needs.

        Messages that are ``asked`` end with the head of an answer. Raises DataError.
        """
        if record.images and not self._sees:
            raise DataError(f"{record.where} has images, and this model sees none", "give it text and sound alone")
        if "messages" in record.fields and "text" not in record.fields:
            if self.takes_suffix:
                what = f"{record.where} has messages, and this model takes a prompt and what is written behind it"
                raise DataError(what, 'give it "images", "prompt" and "response"')
            beside = {"image": iter(record.images), "audio": iter(record.sounds)}
            readers: dict[str, Callable[[Path | bytes], Any]] = {}
            if self._sees:
                readers["image"] = partial(read_image, where=record.where)
            if self.hears_in_text:
                readers["audio"] = partial(self._read_sound, record)
            messages = [with_read_media(message, record, beside, readers) for message in record.fields["messages"]]
            for kind, name in NAMES.items():
                if (left := next(beside[kind], None)) is not None:
                    which = f"of {len(left):,} bytes" if isinstance(left, bytes) else left
                    raise DataError(
                        f"{record.where}: no {name} part of its messages stands for the {name} {which}",
                        f'mark its place with a part {{"type": "{kind}"}}',
                    )
            call, options = self.processor.apply_chat_template, record.template_options
            try:  # once for the time it takes: decoding large images may well take longer
                text = str(within(chat.SECONDS, partial(call, messages, **options, tokenize=False)))
            except TimeoutError as error:
                raise chat.endless(record) from error
            except Exception:  # whatever a model's own template raises, it will again
                text = None
            if text is not None and self.hears_in_text:
                parts = [part for message in messages for part in message["content"]]
                self._require_marks(record, text, sum(part["type"] == "audio" for part in parts))
            how = {**options, "tokenize": True, "return_dict": True, "add_generation_prompt": asked}
            inputs = self._call(record, lambda: call(messages, **how, return_tensors="pt"))
        else:
            images = [read_image(path, record.where) for path in record.images]
            if not hasattr(self.processor, "tokenizer"):
                return self._call(record, lambda: self.processor(images=images, return_tensors="pt"))
            sounds = [self._read_sound(record, source) for source in record.sounds]
            inputs = self._cut(record, self._call_with_text(record, images, sounds, seq_len), seq_len)
            if self.tokens.start_token is None:
                return inputs
            return inputs | self.tokens.decoder_inputs(record, seq_len)
        return self._cut(record, inputs, seq_len)

    def _require_marks(self, record: Record, text: str, count: int) -> None:
        """Raise DataError where a text does not mark the places of so many sounds."""
        token = str(self.processor.audio_token)
        if (marks := text.count(token)) != count:
            has = f"{record.where} has {count} {'sound' if count == 1 else 'sounds'}"
            what = f"{has}, and its text marks {marks} with {token!r}"
            raise DataError(what, "each sound needs one mark; of a prompt without any, the sounds come first")

    def _call_with_text(self, record: Record, images: list[Any], sounds: list[Any], seq_len: int) -> Inputs:
        """Where neither the text nor the processor names the place of images or sound, they come first, a line each."""
        fields = record.fields
        self._tell_of_columns(record)
        if self.takes_suffix:
            return self._call_with_suffix(record, images)
        if self.tokens.start_token is not None:  # what is written is the decoder's
            text = "" if "text" in fields else fields.get("prompt", "")
        else:
            text = fields["text"] if "text" in fields else fields.get("prompt", "") + fields.get("response", "")
        text = self.tokens.unframed(self.tokens.beginning(text, seq_len))
        media: dict[str, Any] = {"images": images} if images else {}
        if self.hears_in_text:
            for mark in self._mark("audio", len(sounds)).splitlines():  # the template may count them
                text = text.replace(MARKS["audio"], mark.strip(), 1)
            if sounds and str(self.processor.audio_token) not in text:
                text = self._mark("audio", len(sounds)) + text
            self._require_marks(record, text, len(sounds))
        if sounds:
            media |= {"audio": sounds, "sampling_rate": self._rate(record)}
        if not images:
            pass
        elif hasattr(self.processor, "num_query_tokens"):  # such a processor puts its query tokens in by itself
            text = text.replace(f"{_IMAGE}\n", "").replace(_IMAGE, "")
        else:
            mark = self.image_mark
            known = (mark.strip(), getattr(self.processor, "image_token", None))
            if _IMAGE not in known:  # LLaVA's, with which data are written for any model
                text = text.replace(_IMAGE, mark.strip())
            if not any(isinstance(token, str) and token and token in text for token in known):
                return self._call_marked(record, media, text)
        return self._call(record, lambda: self.processor(**media, text=text, return_tensors="pt"))

    def _call_marked(self, record: Record, media: dict[str, Any], text: str) -> Inputs:
        """A text with a mark in front for each image, or without, where the processor puts them there (Florence-2)."""

        def called(text: str) -> Inputs:
            return self._call(record, lambda: self.processor(**media, text=text, return_tensors="pt"))

        try:
            return called(self.image_mark * len(media["images"]) + text)
        except DataError:
            with suppress(DataError):
                inputs = called(text)
                if any(token in self.ids for token in inputs["input_ids"][0].tolist()):
                    return inputs
            raise

    def _call_with_suffix(self, record: Record, images: list[Any]) -> Inputs:
        """A prompt as what the model reads at once, with the images, and what is written behind it as its suffix.

        A text without a prompt is all suffix, but for the marks of its images. The processor ends both itself.
        """
        fields, mark = record.fields, str(self.processor.image_token)
        prompt, written = ("", fields["text"]) if "text" in fields else (fields.get("prompt", ""), record.written)
        prompt, written = (text.replace(_IMAGE, mark) for text in (prompt, written))
        if "text" in fields and mark in written:
            before, _, written = written.rpartition(mark)
            prompt = before + mark
        if mark not in prompt:
            prompt = mark * len(images) + prompt
        prompt = prompt.removesuffix("\n")  # which the processor puts there
        more = {"suffix": written} if written else {}
        return self._call(record, lambda: self.processor(images=images, text=prompt, **more, return_tensors="pt"))

    @cached_property
    def image_mark(self) -> str:
        """How a text marks an image's place."""
        return self._mark("image", 1)

    def _mark(self, kind: str, count: int) -> str:
        """How a text marks the places of images or sounds: as the chat template writes it, or a token on each line."""
        render = getattr(self.processor, "apply_chat_template", None)
        if getattr(self.processor, "chat_template", None) and render is not None:
            words = {"type": "text", "text": "x"}
            with suppress(Exception):  # whatever a model's own template raises: then there is the token
                bare, marked = (
                    within(chat.SECONDS, partial(render, [{"role": "user", "content": parts}], tokenize=False))
                    for parts in ([words], [*({"type": kind} for _ in range(count)), words])
                )
                start = next((i for i, (a, b) in enumerate(zip(bare, marked, strict=False)) if a != b), len(bare))
                return str(marked[start : start + len(marked) - len(bare)])
        begin = getattr(self.processor, "boi_token", None) if kind == "image" else None
        token = begin or getattr(self.processor, f"{kind}_token", None)
        return f"{token}\n" * count if isinstance(token, str) else ""

    def _cut(self, record: Record, inputs: Inputs, seq_len: int) -> Inputs:
        """At most ``seq_len`` tokens, but never fewer than hold all images and sound."""
        length = inputs["input_ids"].shape[1]
        self.uncut.clear()
        self.uncut[record.where] = length
        if length <= seq_len:
            return inputs
        media = self.ids
        places = [place for place, token in enumerate(inputs["input_ids"][0].tolist()) if token in media]
        if not media or (places and places[-1] >= seq_len):
            its, smaller = ("sound", "shorter sound") if record.has_sound else ("images", "smaller images")
            raise DataError(
                f"{record.where} has {length} tokens with its {its}, more than --seq-len {seq_len}",
                f"pass a larger --seq-len, or {smaller}",
            )
        self.tokens.cuts.append((length, seq_len))
        return first_tokens(inputs, seq_len)

    def _call(self, record: Record, call: Callable[[], Any]) -> Inputs:
        """A processor's output as tensors with a batch dimension of one sample."""
        import torch

        try:
            made = dict(call())
        except Exception as error:  # whatever a model's own processor raises
            what = f"{record.where}: the processor refuses this record: {first_line(error)}"
            raise DataError(what, HINT) from error
        tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        # An empty text has no tokens from which their dtype could be told.
        tensors |= {name: value.long() for name, value in tensors.items() if not value.numel()}
        return {name: value for name, value in tensors.items() if name not in _DROPPED}

    @property
    def _sees(self) -> bool:
        """Whether the model takes images; processors of sound pass over them."""
        return not self.hears_in_text or hasattr(self.processor, "image_processor")

    @property
    def _extractor(self) -> Any:
        """What makes features of sound: Granite Speech's has a name of its own."""
        names = ("feature_extractor", "audio_processor")
        return next((getattr(self.processor, name) for name in names if hasattr(self.processor, name)), self.processor)

    def _rate(self, record: Record) -> int:
        """The samples of sound in a second that the model hears. Raises DataError where it hears none."""
        rate: int | None = getattr(self._extractor, "sampling_rate", None)
        if rate is None:
            raise DataError(f"{record.where} has audio, and the model's folder holds no feature extractor for it", HINT)
        return rate

    def _read_sound(self, record: Record, source: Path | bytes) -> Any:
        """Sound that stands in a text, which might be about any part of it. Raises DataError for one that is cut."""
        rate = self._rate(record)
        sound = read_wav(source, rate, record.where)
        most = getattr(self.processor, "max_audio_len", None)  # seconds, of those that hear in several windows
        most = getattr(self._extractor, "n_samples", None) if most is None else most * rate
        if most is not None and len(sound) > most:
            what = f"a sound of {record.where} has {len(sound) / rate:.1f} s, and the model hears {most / rate:g} s"
            raise DataError(what, "cut it into pieces, or leave the record out")
        if not len(sound):
            raise DataError(f"a sound of {record.where} is empty", "leave the record out")
        return sound

    def _tell_of_columns(self, record: Record) -> None:
        """Note the texts that stand beside images or sound in columns which no form of a record has."""
        texts = (name for name, value in record.fields.items() if isinstance(value, str) and value.strip())
        unread = ", ".join(sorted(map(repr, {*texts}.difference(("image", "prompt", "response")))))
        if record.form in _ALONE and unread:
            what = f"{record.where}, and maybe others, has {record.form}, and beside it {unread}, which is not read"
            hint = "name the text by --text-column, or --prompt-column and --response-column"
            self.notes.make("columns", f"{what}: {hint}")
