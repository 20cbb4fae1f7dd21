"""Records of calibration data as the inputs of a model: by its tokenizer, or by its own processor."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from tailorcli.data.forms import HINT, IMAGE_MARK, with_image_parts
from tailorcli.data.media import read_image, read_wav
from tailorcli.data.messages import MEDIA_HINTS, NAMES, as_parts, other_forms, with_read_media, word_places, words_of
from tailorcli.data.records import Record, Records, content_parts
from tailorcli.data.timed import within
from tailorcli.data.turns import answer_places, answered, common, labelled, marked, tokens_at
from tailorcli.errors import DataError, first_line, note

if TYPE_CHECKING:
    from pathlib import Path

    from tailorcli.data.samples import Inputs

# Masks of one sample hold nothing but ones; labels (PaliGemma's) are for a loss that no one asks for.
_DROPPED = ("attention_mask", "decoder_attention_mask", "labels")

_LONG = 1 << 20  # characters of a text beyond which only as many are tokenised as are needed
_PER_TOKEN = 64  # characters, at first: few texts have longer tokens on average
_MARGIN = 64  # tokens at the end of a piece of text that the whole text may have otherwise
_SECONDS = 5.0  # that a chat template may take for one record; milliseconds are usual

_TEMPLATE_HINT = 'give these records in the form that the template asks for, or rendered, as "text"'


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
    _uncut: dict[str, int] = field(default_factory=dict, init=False, compare=False)  # tokens of the last beside images
    told: set[str] = field(default_factory=set, compare=False)  # what a note was made of: once, not for each record

    @property
    def tokenizer(self) -> Any:
        """What turns text into token ids."""
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def takes_suffix(self) -> bool:
        """Whether the processor takes a text's end apart: PaliGemma, whose tokens before it see one another."""
        return self.takes_media and "suffix" in inspect.signature(type(self.processor).__call__).parameters

    @cached_property
    def hears_in_text(self) -> bool:
        """Whether sound stands in the middle of a text, as pictures do, and not for an encoder alone (Whisper)."""
        token = getattr(self.processor, "audio_token", None)
        takes = self.takes_media and "audio" in inspect.signature(type(self.processor).__call__).parameters
        return takes and self.start_token is None and isinstance(token, str)

    @property
    def written_kind(self) -> int:
        """The kind (token_type_ids) of the tokens that a model writes behind a prompt with images."""
        return int(self.takes_suffix)

    def seen_ahead(self, inputs: Inputs) -> int:
        """How many of the first tokens are read by those before them, so that they are not predicted."""
        kinds = inputs.get("token_type_ids") if self.takes_suffix else None
        return 0 if kinds is None else int(kinds.eq(0).sum())

    @cached_property
    def media_ids(self) -> list[int]:
        """The ids of tokens that stand for a part of an image or a sound, which no model writes."""
        if not self.takes_media:
            return []
        ids = [getattr(self.processor, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
        tokens = [getattr(self.processor, f"{kind}_token", None) for kind in ("image", "audio")]
        ids += [self.tokenizer.convert_tokens_to_ids(str(token)) for token in tokens if token is not None]
        return [number for number in ids if isinstance(number, int)]

    def encode(self, record: Record, seq_len: int) -> Inputs | None:
        """The model's inputs for one record, of ``seq_len`` tokens at most; None if it gives none. Raises DataError."""
        before = len(self.cuts)
        inputs = self._encode(record, seq_len)
        if len(cut := self.cuts[before:]) > 1:  # on both sides of an encoder-decoder: one record that was cut
            self.cuts[before:] = [(sum(whole for whole, _ in cut), sum(left for _, left in cut))]
        return inputs

    def _encode(self, record: Record, seq_len: int) -> Inputs | None:
        if record.has_sound and not self.hears_in_text:
            return self._speech(record, seq_len)
        if "input_ids" in record.fields:
            return _as_inputs(self._within(self._given_ids(record), seq_len))
        record = self.framed_by_template(record)
        if self.takes_media and record.has_media:
            return self._with_media(record, seq_len)
        if record.has_media:
            raise _without_processor(record)
        if self.start_token is not None:
            return self._text_to_text(record, seq_len)
        for kind, name in NAMES.items():
            token = getattr(self.processor, f"{kind}_token", None)
            if self.takes_media and isinstance(token, str) and any(token in value for value in _texts(record)):
                article = "an" if kind == "image" else "a"
                what = f"{record.where} marks {article} {name} with {token!r} and names none"
                raise DataError(what, MEDIA_HINTS[kind])
        plain = "text" in record.fields or "messages" not in record.fields  # a template writes special tokens itself
        inputs = _as_inputs(self._within(self.tokens(record, self._text_of(record), plain, seq_len), seq_len))
        if inputs is not None and self.takes_suffix:  # beside samples with images in a batch it is no prefix
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
        asked = self._asked(record)
        framed = None if asked is None else self._rendered(record, asked, True)
        if framed is None:
            self._require_whole(record)
        elif not record.has_media:
            return _as_inputs(self._within(self.tokens(record, framed, False, seq_len), seq_len)), framed
        else:
            record = replace(record, fields={**record.fields, "prompt": framed, "response": ""})
        inputs = self.encode(replace(record, turns=None), seq_len)
        text = str(record.fields.get("text", record.fields.get("prompt", "")))
        return (None if inputs is None else self.without_end(inputs, text)), text

    def _asked_by_messages(self, record: Record, seq_len: int) -> tuple[Inputs | None, str]:
        """The inputs of messages and of the head of an answer to them, and their text."""
        if not record.has_media:
            text = self._rendered(record, self._form_of(record)[0], True)
        elif not self.takes_media:
            raise _without_processor(record)
        else:
            messages = record.fields["messages"]
            text = self._rendered(record, messages, True) or self._rendered(record, [*map(as_parts, messages)], True)
        if text is None:
            raise DataError(
                f"{record.where}: the chat template writes no head of an answer to these messages", _TEMPLATE_HINT
            )
        if record.has_media:
            return self._with_media(record, seq_len, asked=True), text
        return _as_inputs(self._within(self.tokens(record, text, False, seq_len), seq_len)), text

    def without_end(self, inputs: Inputs, text: str) -> Inputs:
        """Inputs of a ``text`` without the end that the tokenizer puts behind it, where nothing would follow."""
        if "decoder_input_ids" in inputs or "input_ids" not in inputs:
            return inputs
        ids = inputs["input_ids"]
        last = self._added[1]
        if self.takes_suffix and self.seen_ahead(inputs) < ids.shape[1]:  # its processor ends a suffix itself
            last = [self.tokenizer.eos_token_id]
        if not last:
            return inputs
        length = ids.shape[1]
        if length <= len(last) or ids[0, -len(last) :].tolist() != last or text.endswith(self._frame[1]):
            return inputs
        return _first_tokens(inputs, length - len(last))

    def framed_by_template(self, record: Record) -> Record:
        """A question and its answer as the turns of a chat, for a model whose template frames them; others stay."""
        asked = self._asked(record)
        if asked is None:
            self._require_whole(record)
            return record
        fields = {name: value for name, value in record.fields.items() if name not in ("prompt", "response")}
        messages = [*asked, {"role": "assistant", "content": record.fields["response"]}]
        return replace(record, fields={**fields, "messages": messages}, turns=None)

    def _asked(self, record: Record) -> list[dict[str, Any]] | None:
        """The turns before the response that the chat template frames, each image in its place; None: it frames none.

        Images that no turn marks come first in the last one, and so does sound.
        """
        if record.turns is None or not self._has_template(record.has_media):
            return None
        if not (record.images or record.sounds):
            return record.turns
        asked = [as_parts({**turn, "content": with_image_parts(turn["content"])}) for turn in record.turns]
        first = [{"type": "audio"} for _ in record.sounds]
        if not any(part["type"] == "image" for turn in asked for part in turn["content"]):
            first = [*({"type": "image"} for _ in record.images), *first]
        asked[-1]["content"] = [*first, *asked[-1]["content"]]
        return asked

    def _require_whole(self, record: Record) -> None:
        """Raise DataError where a prompt that no template frames lacks the turns that the record has before it."""
        before = (record.turns or [])[:-1]
        if not before or record.fields["prompt"].startswith("".join(f"{turn['content']}\n" for turn in before)):
            return
        names = " and ".join(f'"{name}"' for name in ("system", "history") if record.fields.get(name))
        raise DataError(
            f"{record.where} has {names} beside its prompt, and no chat template frames what the model is given",
            f'put the text in front of each "prompt" and leave {names} out',
        )

    def _has_template(self, with_media: bool) -> bool:
        """Whether a chat template frames what the model is given."""
        if self.takes_suffix and with_media:
            return False
        render = self.processor if self.takes_media and with_media else self.tokenizer
        return self.start_token is None and bool(getattr(render, "chat_template", None))

    def frames(self, records: Records) -> bool:
        """Whether the chat template frames the prompts of these records."""
        return records.has_turns and self._has_template(records.has_media)

    def responses(self, record: Record, inputs: Inputs) -> list[tuple[int, int]]:
        """The runs of ``inputs``' tokens that are the record's responses, each with what ends it.

        Of messages those that the assistant writes, calls of tools and thoughts included. None where a record has no
        response, or all that is predicted is one. Raises DataError.
        """
        with self._uncounted():
            return self._responses(record, inputs)

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Texts that are cut here were counted with the record itself."""
        before = len(self.cuts)
        yield
        del self.cuts[before:]

    def _responses(self, record: Record, inputs: Inputs) -> list[tuple[int, int]]:
        if "input_ids" in record.fields:
            return labelled(record.fields.get("labels", ()), inputs["input_ids"].shape[1])
        response = str(record.fields.get("response", ""))
        record = self.framed_by_template(record)
        if "text" in record.fields or "input_ids" not in inputs or "decoder_input_ids" in inputs:
            return []
        ids = inputs["input_ids"][0].tolist()
        if self.takes_media and record.has_media:
            if "messages" in record.fields:
                return self._answers_beside_media(record, ids)
            if self.takes_suffix:
                prefix = self.seen_ahead(inputs)
                return [(prefix, len(ids))] if response and prefix < len(ids) else []
            size = len(self.tokens(record, response, False)) + len(self._added[1])
            length = self._uncut.get(record.where, len(ids))
            return [(length - size, len(ids))] if response and 0 <= length - size < len(ids) else []
        if "messages" in record.fields:
            return self._answers(record, ids)
        if "prompt" not in record.fields:
            return []
        text = self._text_of(record)
        places = [(len(record.fields["prompt"]), len(text))]
        return list(self._runs(record, ids, text, places, plain=True))

    def following(self, record: Record, inputs: Inputs) -> int | None:
        """The token that is written behind what a decoder reads, which is none of the inputs: the end of an answer.

        None for other models, and where the response gives no token. Raises DataError.
        """
        if "decoder_input_ids" not in inputs:
            return None
        width = inputs["decoder_input_ids"].shape[1]
        with self._uncounted():
            ids = self.tokens(record, _written(record), most=width + 1, target=True)
        ids = ids[1:] if ids[:1] == [self.start_token] else ids
        return ids[width - 1] if len(ids) >= width else None

    def _answers(self, record: Record, ids: list[int]) -> list[tuple[int, int]]:
        """The tokens of the assistant's turns, in the text that the chat template makes of a conversation."""
        messages, text = self._form_of(record)
        places = answer_places(messages, text, partial(self._rendered, record))
        if places is None:
            places = list(word_places(messages, text))
        if len(places) < len(answered(messages)):
            what = f"the chat template leaves out an assistant's turn of {record.where}, and maybe of others"
            self._tell("turns", f"{what}: nothing is learnt of it")
        return list(self._runs(record, ids, text, places, plain=False))

    def _runs(
        self, record: Record, ids: list[int], text: str, places: list[tuple[int, int]], *, plain: bool
    ) -> Iterator[tuple[int, int]]:
        """The tokens of ``ids`` that hold these places of a text, by characters."""
        if getattr(self.tokenizer, "is_fast", False) and not plain:
            how = {"add_special_tokens": False, "return_offsets_mapping": True}
            offsets = self.tokenizer(text, **how)["offset_mapping"][: len(ids)]
            yield from tokens_at(places, offsets)
            return
        for start, stop in places:
            before, after = (self.tokens(record, text[:place], plain, len(ids) + 1) for place in (start, stop))
            first, last = (common(ids, part) for part in (before, after))
            if last > first:
                yield first, last

    def _answers_beside_media(self, record: Record, ids: list[int]) -> list[tuple[int, int]]:
        """The tokens of the assistant's turns, each told by the whole conversation with another one in its place."""
        whole = self._with_media(record, sys.maxsize)["input_ids"][0].tolist()
        messages = record.fields["messages"]
        numbers = answered(messages)
        inside = []
        for number in numbers:
            turns = marked(messages, [number])
            other = self._with_media(replace(record, fields={**record.fields, "messages": turns}), sys.maxsize)
            changed = other["input_ids"][0].tolist()
            start, after = common(whole, changed), common(whole[::-1], changed[::-1])
            inside.append((start, max(start, len(whole) - after)))
        ends = numbers and numbers[-1] == len(messages) - 1
        ending = whole[inside[-1][1] :] if ends else []
        found = []
        for start, stop in inside:
            more = common(whole[stop:], ending) if ending else 1
            first, last = start, min(stop + more, len(ids))
            if last > first:
                found.append((first, last))
        return found

    def _within(self, ids: list[int], seq_len: int) -> list[int]:
        """The first ``seq_len`` tokens; what is cut is counted."""
        if len(ids) > seq_len:
            self.cuts.append((len(ids), seq_len))
        return ids[:seq_len]

    def _text_of(self, record: Record) -> str:
        """The text of a record without media, messages through the chat template."""
        fields = record.fields
        if "text" in fields:
            return str(fields["text"])
        if "messages" not in fields:
            return str(fields["prompt"] + fields["response"])
        text = self._form_of(record)[1]
        self._tell_of_tools(record, text)
        return text

    def _form_of(self, record: Record) -> tuple[list[dict[str, Any]], str]:
        """Messages in the form that the chat template takes, and what it makes of them. Raises DataError."""
        fields = record.fields
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                f"{record.where} has messages, and the model's tokenizer has no chat template",
                'give the records a "text" field instead',
            )
        problem: Exception | None = None
        rendered: list[tuple[list[dict[str, Any]], str]] = []
        for messages in (fields["messages"], *other_forms(fields["messages"])):
            try:
                call = partial(self.tokenizer.apply_chat_template, messages, **record.template_options, tokenize=False)
                text = str(within(_SECONDS, call))
            except TimeoutError as error:
                raise _endless(record) from error
            except Exception as error:  # whatever a model's own template raises
                problem = problem or error
            else:
                whole = all(words.strip() in text for words in words_of(messages))
                if whole and not any(str(m["content"]) in text for m in messages if content_parts(m)):
                    return messages, text
                rendered.append((messages, text))
        if not rendered:
            what = f"{record.where}: the chat template refuses these messages: {problem}"
            raise DataError(what, _TEMPLATE_HINT) from problem
        return rendered[0]  # it leaves words out whatever their form: thoughts of earlier turns, for example

    def _rendered(self, record: Record, messages: list[dict[str, Any]], prompted: bool) -> str | None:
        """What the chat template makes of messages, and of the head of an answer to them; None where it refuses."""
        how = {**record.template_options, "tokenize": False, "add_generation_prompt": prompted}
        render = self.processor if self.takes_media and record.has_media else self.tokenizer
        try:
            return str(within(_SECONDS, partial(render.apply_chat_template, messages, **how)))
        except Exception:  # whatever a model's own template raises
            return None

    def _tell_of_tools(self, record: Record, text: str) -> None:
        """Note where a template has left the tools, or the calls of them, out of its text."""
        made = [message.get("tool_calls") for message in record.fields["messages"]]
        calls = [call for some in made if isinstance(some, list) for call in some if isinstance(call, dict)]
        named = [tool.get("function", tool) for tool in (*(record.fields.get("tools") or ()), *calls)]
        lost = [str(f["name"]) for f in named if isinstance(f, dict) and "name" in f and str(f["name"]) not in text]
        if lost:
            what = f"the tool {lost[0]!r} of {record.where}, and maybe in others"
            self._tell("tools", f"the model's chat template does not write {what}: a template with tools does")

    def _tell_of_columns(self, record: Record) -> None:
        """Note the texts that stand beside images or sound in columns which no form of a record has."""
        texts = (name for name, value in record.fields.items() if isinstance(value, str) and value.strip())
        unread = ", ".join(sorted(map(repr, {*texts}.difference(("image", "prompt", "response")))))
        if record.form in _MEDIA_ALONE and unread:
            what = f"{record.where}, and maybe others, has {record.form}, and beside it {unread}, which is not read"
            self._tell("columns", f"{what}: name the text by --text-column, or --prompt-column and --response-column")

    def _tell(self, kind: str, message: str) -> None:
        """Make a note of a kind once."""
        if kind not in self.told:
            self.told.add(kind)
            note(message)

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What the tokenizer itself puts before and after a text, such as its BOS, as text."""
        first, last = ("".join(map(str, self.tokenizer.convert_ids_to_tokens(ids))) for ids in self._added)
        return first, last

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """The ids of what the tokenizer itself puts before and after a text."""
        plain, whole = (self._ids("x", special) for special in (False, True))
        last = len(whole) - len(plain)
        at = next((place for place in range(last + 1) if plain and whole[place : place + len(plain)] == plain), None)
        return ([], []) if at is None else (whole[:at], whole[at + len(plain) :])

    def unframed(self, text: str) -> str:
        """A text without the special tokens at its ends that the tokenizer will add by itself."""
        first, last = self._frame
        text = text.removeprefix(first) if first else text
        return text.removesuffix(last) if last else text

    def tokens(
        self, record: Record, text: str, special: bool = True, most: int = sys.maxsize, target: bool = False
    ) -> list[int]:
        """Token ids of a text of ``record``; with ``special`` it has the tokenizer's own at its ends, once.

        A ``target`` is what an encoder-decoder writes: a translation's side has its own marks, of Marian its own words.
        Of a very long text only the first ``most``; how many are left out is then counted in ``cuts`` by its length.
        Raises DataError.
        """
        try:
            text.encode("utf-8")  # JSON can escape half a character, of which tokenizers only say it is no string
            text = self.unframed(text) if special else text
            piece = self._piece(text, special, most, target)
            if piece is not None:
                self.cuts.append((most * len(text) // piece[1], most))
                return piece[0][:most]
            return self._ids(text, special, target)
        except Exception as error:  # whatever a model's own tokenizer raises
            raise DataError(f"{record.where}: the tokenizer refuses this text: {error}", HINT) from error

    def _ids(self, text: str, special: bool, target: bool = False) -> list[int]:
        given = {"text_target" if target else "text": text}
        return list(self.tokenizer(**given, add_special_tokens=special)["input_ids"])

    def _piece(self, text: str, special: bool, most: int, target: bool = False) -> tuple[list[int], int] | None:
        """The tokens of the beginning of a very long text, more than ``most``, and the characters that make ``most``.

        None for a text that is not long, or has no more tokens.
        """
        room = max(_LONG, _PER_TOKEN * most)
        while len(text) > room:
            ids = self._ids(text[:room], special, target)
            if len(ids) > most + _MARGIN:
                return ids, max(1, room * most // len(ids))
            room *= 4
        return None

    def exceeds(self, record: Record, texts: Iterable[str], limit: int) -> bool:
        """Whether one of these is a very long text of more than ``limit`` tokens. Raises DataError."""
        try:
            return any(len(text) > _LONG and self._piece(text, False, limit) is not None for text in texts)
        except Exception as error:  # whatever a model's own tokenizer raises
            raise DataError(f"{record.where}: the tokenizer refuses this text: {error}", HINT) from error

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
        inputs = _as_inputs(self._within(self.tokens(record, prompt, most=seq_len), seq_len))
        if inputs is None:
            return None
        response = self.tokens(record, record.fields["response"], most=seq_len, target=True)
        return inputs | {"decoder_input_ids": self._decoder_ids(response, seq_len)}

    def _decoder_ids(self, ids: list[int], seq_len: int) -> Any:
        """What the decoder reads while it writes ``ids``: the same, one place later."""
        import torch

        assert self.start_token is not None
        shifted = ids[:-1] if ids[:1] == [self.start_token] else [self.start_token, *ids[:-1]]
        return torch.tensor([self._within(shifted, seq_len) or [self.start_token]])

    def _speech(self, record: Record, seq_len: int) -> Inputs:
        """Sound for the encoder, the response for the decoder, where the model has one. Raises DataError for more."""
        fields, extractor, rate = record.fields, self._extractor, self._rate(record)
        if self.start_token is None and getattr(self.processor, "audio_token", None) is not None:
            what = f"{record.where} has audio, and this model's processor takes none beside a text"
            raise DataError(what, "give records without audio: of such models the text alone is run")
        if "text" not in fields and ("messages" in fields or record.turns or fields.get("prompt", "").strip()):
            what = f"{record.where} has a prompt or messages beside its audio, and a model hears the audio alone"
            raise DataError(what, 'leave all out but "audio" and "response"')
        if len(record.sounds) > 1:
            what = f"{record.where} has {len(record.sounds)} sounds, and this model hears one"
            raise DataError(what, "give each a record of its own")
        if self.start_token is not None and not {"response", "text"} & fields.keys():
            what = f"{record.where} has audio and no response: this model is an encoder-decoder"
            raise DataError(what, 'say what is heard in "response", or name its column by --response-column')
        sound = read_wav(record.sounds[0], rate, record.where)
        most = getattr(extractor, "n_samples", None)  # Whisper's window
        if most is not None and len(sound) > most:
            what = f"the sound of {record.where}, and maybe of others, is longer than the model hears"
            self._tell("sound", f"{what}: what comes after {most / rate:g} s is left out")
        inputs = self._call(record, lambda: extractor(sound, sampling_rate=rate, return_tensors="pt"))
        if self.start_token is None:
            return inputs
        response = self.tokens(record, _written(record), most=seq_len, target=True)
        return inputs | {"decoder_input_ids": self._decoder_ids(response, seq_len)}

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

    def _with_media(self, record: Record, seq_len: int, *, asked: bool = False) -> Inputs:
        """Images, sound and text through the model's own processor, which puts in as many tokens of each as it needs.

        Messages that are ``asked`` end with the head of an answer.
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
                text = str(within(_SECONDS, partial(call, messages, **options, tokenize=False)))
            except TimeoutError as error:
                raise _endless(record) from error
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
            if self.start_token is None:
                return inputs
            written = self.tokens(record, _written(record), most=seq_len, target=True)
            return inputs | {"decoder_input_ids": self._decoder_ids(written, seq_len)}
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
        if self.start_token is not None:  # what is written is the decoder's
            text = "" if "text" in fields else fields.get("prompt", "")
        else:
            text = fields["text"] if "text" in fields else fields.get("prompt", "") + fields.get("response", "")
        text = self.unframed(text[: max(_LONG, _PER_TOKEN * seq_len)])
        media: dict[str, Any] = {"images": images} if images else {}
        if self.hears_in_text:
            if sounds and str(self.processor.audio_token) not in text:
                text = self._mark("audio", len(sounds)) + text
            self._require_marks(record, text, len(sounds))
        if sounds:
            media |= {"audio": sounds, "sampling_rate": self._rate(record)}
        if not images:
            pass
        elif hasattr(self.processor, "num_query_tokens"):  # such a processor puts its query tokens in by itself
            text = text.replace(f"{IMAGE_MARK}\n", "").replace(IMAGE_MARK, "")
        else:
            mark = self.image_mark
            known = (mark.strip(), getattr(self.processor, "image_token", None))
            if IMAGE_MARK not in known:  # LLaVA's, with which data are written for any model
                text = text.replace(IMAGE_MARK, mark.strip())
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
                if any(token in self.media_ids for token in inputs["input_ids"][0].tolist()):
                    return inputs
            raise

    def _call_with_suffix(self, record: Record, images: list[Any]) -> Inputs:
        """A prompt as what the model reads at once, with the images, and what is written behind it as its suffix.

        A text without a prompt is all suffix, but for the marks of its images. The processor ends both itself.
        """
        fields, mark = record.fields, str(self.processor.image_token)
        prompt, written = ("", fields["text"]) if "text" in fields else (fields.get("prompt", ""), _written(record))
        prompt, written = (text.replace(IMAGE_MARK, mark) for text in (prompt, written))
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
                    within(_SECONDS, partial(render, [{"role": "user", "content": parts}], tokenize=False))
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
        self._uncut.clear()
        self._uncut[record.where] = length
        if length <= seq_len:
            return inputs
        media = self.media_ids
        places = [place for place, token in enumerate(inputs["input_ids"][0].tolist()) if token in media]
        if not media or (places and places[-1] >= seq_len):
            its, smaller = ("sound", "shorter sound") if record.has_sound else ("images", "smaller images")
            raise DataError(
                f"{record.where} has {length} tokens with its {its}, more than --seq-len {seq_len}",
                f"pass a larger --seq-len, or {smaller}",
            )
        self.cuts.append((length, seq_len))
        return _first_tokens(inputs, seq_len)

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


def _without_processor(record: Record) -> DataError:
    return DataError(
        f"{record.where} has images, and the model's folder holds no processor for them",
        "save it there: processor.save_pretrained(DIR); or give records of text alone",
    )


def _endless(record: Record) -> DataError:
    what = f"{record.where}: the model's chat template does not end within {_SECONDS:g} seconds"
    return DataError(what, 'give the records rendered, as "text", or mend the template')


_MEDIA_ALONE = ("images", "audio", "images and audio")  # forms of records without a text


def _texts(record: Record) -> list[str]:
    """The plain texts of a record."""
    return [value for name in ("text", "prompt", "response") if isinstance(value := record.fields.get(name), str)]


def _written(record: Record) -> str:
    """What a decoder writes for a record."""
    written: str = record.fields.get("response", record.fields.get("text", ""))
    return written


def _first_tokens(inputs: Inputs, count: int) -> Inputs:
    """Inputs of the first tokens alone: whatever has an entry for each of them is cut, too; sound has none."""
    shape = (1, inputs["input_ids"].shape[1])
    cut = [name for name, value in inputs.items() if value.shape[:2] == shape and "feature" not in name]
    return {name: value[:, :count] if name in cut else value for name, value in inputs.items()}


def _as_inputs(ids: list[int]) -> Inputs | None:
    import torch

    return {"input_ids": torch.tensor([ids])} if ids else None
