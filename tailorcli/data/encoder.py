"""Records of calibration data as the inputs of a model: by its tokenizer, or by its own processor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tailorcli.data.chat import TEMPLATE_HINT, ChatTemplate
from tailorcli.data.messages import MEDIA_HINTS, NAMES, as_parts
from tailorcli.data.multimodal import Multimodal
from tailorcli.data.records import Record, Records
from tailorcli.data.responses import Responses
from tailorcli.data.tokens import TextTokens, as_inputs, first_tokens
from tailorcli.errors import DataError, OnceNotes

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs


@dataclass(frozen=True)
class Encoder:
    """Turns a record into what the model is called with.

    ``processor`` is a tokenizer for text alone, else whatever the model's folder holds: a processor, an image
    processor, a feature extractor. ``start_token`` is an encoder-decoder's first decoder token.
    """

    processor: Any
    start_token: int | None = None
    takes_media: bool = False
    cuts: list[tuple[int, int]] = field(default_factory=list, compare=False)  # tokens of what was cut, before and after
    _notes: OnceNotes = field(default_factory=OnceNotes, init=False, compare=False)

    @property
    def tokenizer(self) -> Any:
        """What turns text into token ids."""
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def tokens(self) -> TextTokens:
        """What it makes of texts."""
        return TextTokens(self.tokenizer, self.start_token, self.cuts)

    @cached_property
    def media(self) -> Multimodal:
        """What the processor makes of images and sound."""
        return Multimodal(self.processor, self.takes_media, self.tokens, self._notes)

    @cached_property
    def chat(self) -> ChatTemplate:
        """What the chat template makes of messages."""
        render = self.processor if self.takes_media else self.tokenizer
        frames = self.start_token is None
        return ChatTemplate(self.tokenizer, render, self._notes, frames, frames and not self.media.takes_suffix)

    @cached_property
    def responses(self) -> Responses:
        """Where the answers stand in what was made of a record."""
        return Responses(self.tokens, self.chat, self.media, self._notes)

    def encode(self, record: Record, seq_len: int) -> Inputs | None:
        """The model's inputs for one record, of ``seq_len`` tokens at most; None if it gives none. Raises DataError."""
        before = len(self.cuts)
        inputs = self._encode(record, seq_len)
        if len(cut := self.cuts[before:]) > 1:  # on both sides of an encoder-decoder: one record that was cut
            self.cuts[before:] = [(sum(whole for whole, _ in cut), sum(left for _, left in cut))]
        return inputs

    def _encode(self, record: Record, seq_len: int) -> Inputs | None:
        if record.has_sound and not self.media.hears_in_text:
            return self.media.speech(record, seq_len)
        if "input_ids" in record.fields:
            return as_inputs(self.tokens.within(self._given_ids(record), seq_len))
        record = self.chat.framed(record)
        if self.takes_media and record.has_media:
            return self.media.with_media(record, seq_len)
        if record.has_media:
            raise _without_processor(record)
        if self.start_token is not None:
            return self._text_to_text(record, seq_len)
        for kind, name in NAMES.items():
            token = getattr(self.processor, f"{kind}_token", None)
            if self.takes_media and isinstance(token, str) and any(token in value for value in record.texts):
                article = "an" if kind == "image" else "a"
                what = f"{record.where} marks {article} {name} with {token!r} and names none"
                raise DataError(what, MEDIA_HINTS[kind])
        plain = "text" in record.fields or "messages" not in record.fields  # a template writes special tokens itself
        inputs = self.tokens.inputs(record, self.chat.text_of(record), plain, seq_len)
        if inputs is not None and self.media.takes_suffix:  # beside samples with images in a batch it is no prefix
            inputs["token_type_ids"] = inputs["input_ids"].new_ones(inputs["input_ids"].shape)
        return inputs

    def _given_ids(self, record: Record) -> list[int]:
        """The token ids that a record has itself. Raises DataError for those of another kind of model."""
        if self.start_token is not None:
            what = f"{record.where} has token ids, and this model is an encoder-decoder"
            raise DataError(what, 'give it texts: a "prompt" and a "response"')
        ids: list[int] = record.fields["input_ids"]
        known = len(self.tokenizer)
        if ids and max(ids) >= known:
            what = f"{record.where} has the token {max(ids):,}, and the model's tokenizer knows {known:,}"
            raise DataError(what, "these were made for another model: give the texts that they were made of")
        return ids

    def start(self, record: Record, seq_len: int) -> tuple[Inputs | None, str]:
        """The inputs of what a model shall go on from, of ``seq_len`` tokens at most, and its text.

        A question and messages are framed by the chat template, up to where the answer begins; the tokenizer's own end
        of a text is left out. Raises DataError.
        """
        if "messages" in record.fields and "text" not in record.fields:
            return self._asked_by_messages(record, seq_len)
        asked = self.chat.asked(record)
        framed = None if asked is None else self.chat.rendered(record, asked, True)
        if framed is None:
            self.chat.require_whole(record)
        elif not record.has_media:
            return self.tokens.inputs(record, framed, False, seq_len), framed
        else:
            record = replace(record, fields={**record.fields, "prompt": framed, "response": ""})
        inputs = self.encode(replace(record, turns=None), seq_len)
        text = str(record.fields.get("text", record.fields.get("prompt", "")))
        return (None if inputs is None else self.without_end(inputs, text)), text

    def _asked_by_messages(self, record: Record, seq_len: int) -> tuple[Inputs | None, str]:
        """The inputs of messages and of the head of an answer to them, and their text."""
        if not record.has_media:
            text = self.chat.rendered(record, self.chat.form_of(record)[0], True)
        elif not self.takes_media:
            raise _without_processor(record)
        else:
            messages = record.fields["messages"]
            forms = (messages, [*map(as_parts, messages)])
            text = next(filter(None, (self.chat.rendered(record, form, True) for form in forms)), None)
        if text is None:
            raise DataError(
                f"{record.where}: the chat template writes no head of an answer to these messages", TEMPLATE_HINT
            )
        if record.has_media:
            return self.media.with_media(record, seq_len, asked=True), text
        return self.tokens.inputs(record, text, False, seq_len), text

    def without_end(self, inputs: Inputs, text: str) -> Inputs:
        """Inputs of a ``text`` without the end that the tokenizer puts behind it, where nothing would follow."""
        if "decoder_input_ids" in inputs or "input_ids" not in inputs:
            return inputs
        ids = inputs["input_ids"]
        last = self.tokens.added[1]
        has_suffix = self.media.takes_suffix and self.media.seen_ahead(inputs) < ids.shape[1]
        if has_suffix:  # which its processor ends itself
            last = [self.tokenizer.eos_token_id]
        if not last:
            return inputs
        length = ids.shape[1]
        if length <= len(last) or ids[0, -len(last) :].tolist() != last or text.endswith(self.tokens.frame[1]):
            return inputs
        return first_tokens(inputs, length - len(last))

    def frames(self, records: Records) -> bool:
        """Whether the chat template frames the prompts of these records."""
        return records.has_turns and self.chat.frames(records.has_media)

    def _text_to_text(self, record: Record, seq_len: int) -> Inputs | None:
        """The prompt for the encoder, the response for the decoder."""
        if "prompt" not in record.fields:
            raise DataError(
                f'{record.where} has no "prompt": this model is an encoder-decoder',
                'give its records a "prompt", for the encoder, and a "response", for the decoder',
            )
        prompt = record.fields["prompt"]
        if record.turns is not None:
            prompt = prompt.removesuffix("\n")  # which sets an answer that follows in the same text apart
        inputs = self.tokens.inputs(record, prompt, True, seq_len)
        if inputs is None:
            return None
        return inputs | self.tokens.decoder_inputs(record, seq_len)


def _without_processor(record: Record) -> DataError:
    return DataError(
        f"{record.where} has images, and the model's folder holds no processor for them",
        "save it there: processor.save_pretrained(DIR); or give records of text alone",
    )
