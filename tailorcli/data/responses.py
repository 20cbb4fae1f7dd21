"""Which tokens of a model's inputs are the answers of a record."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from tailorcli.data.chat import ChatTemplate
from tailorcli.data.messages import word_places
from tailorcli.data.multimodal import Multimodal
from tailorcli.data.tokens import TextTokens
from tailorcli.data.turns import answer_places, answered, common, labelled, marked, tokens_at
from tailorcli.errors import OnceNotes

if TYPE_CHECKING:
    from tailorcli.data.records import Record
    from tailorcli.data.samples import Inputs


@dataclass(frozen=True)
class Responses:
    """Finds the answers in what a tokenizer, a chat template and a processor have made of a record."""

    tokens: TextTokens
    chat: ChatTemplate
    media: Multimodal
    notes: OnceNotes

    def runs(self, record: Record, inputs: Inputs) -> list[tuple[int, int]]:
        """The runs of ``inputs``' tokens that are the record's responses, each with what ends it.

        Of messages those that the assistant writes, calls of tools and thoughts included. None where a record has no
        response, or all that is predicted is one. Raises DataError.
        """
        with self.tokens.uncounted():
            return self._runs(record, inputs)

    def _runs(self, record: Record, inputs: Inputs) -> list[tuple[int, int]]:
        if "input_ids" in record.fields:
            return labelled(record.fields.get("labels", ()), inputs["input_ids"].shape[1])
        response = str(record.fields.get("response", ""))
        record = self.chat.framed(record)
        if "text" in record.fields or "input_ids" not in inputs or "decoder_input_ids" in inputs:
            return []
        ids = inputs["input_ids"][0].tolist()
        if self.media.takes_media and record.has_media:
            if "messages" in record.fields:
                return self._answers_beside_media(record, ids)
            if self.media.takes_suffix:
                prefix = self.media.seen_ahead(inputs)
                return [(prefix, len(ids))] if response and prefix < len(ids) else []
            size = len(self.tokens.of(record, response, False)) + len(self.tokens.added[1])
            length = self.media.uncut.get(record.where, len(ids))
            return [(length - size, len(ids))] if response and 0 <= length - size < len(ids) else []
        if "messages" in record.fields:
            return self._answers(record, ids)
        if "prompt" not in record.fields:
            return []
        text = self.chat.text_of(record)
        places = [(len(record.fields["prompt"]), len(text))]
        return list(self._runs_at(record, ids, text, places, plain=True))

    def following(self, record: Record, inputs: Inputs) -> int | None:
        """The token that is written behind what a decoder reads, which is none of the inputs: the end of an answer.

        None for other models, and where the response gives no token. Raises DataError.
        """
        if "decoder_input_ids" not in inputs:
            return None
        width = inputs["decoder_input_ids"].shape[1]
        with self.tokens.uncounted():
            ids = self.tokens.of(record, record.written, most=width + 1, target=True)
        ids = ids[1:] if ids[:1] == [self.tokens.start_token] else ids
        return ids[width - 1] if len(ids) >= width else None

    def _answers(self, record: Record, ids: list[int]) -> list[tuple[int, int]]:
        """The tokens of the assistant's turns, in the text that the chat template makes of a conversation."""
        messages, text = self.chat.form_of(record)
        places = answer_places(messages, text, partial(self.chat.rendered, record))
        if places is None:
            places = list(word_places(messages, text))
        if len(places) < len(answered(messages)):
            what = f"the chat template leaves out an assistant's turn of {record.where}, and maybe of others"
            self.notes.make("turns", f"{what}: nothing is learnt of it")
        return list(self._runs_at(record, ids, text, places, plain=False))

    def _runs_at(
        self, record: Record, ids: list[int], text: str, places: list[tuple[int, int]], *, plain: bool
    ) -> Iterator[tuple[int, int]]:
        """The tokens of ``ids`` that hold these places of a text, by characters."""
        if getattr(self.tokens.tokenizer, "is_fast", False) and not plain:
            how = {"add_special_tokens": False, "return_offsets_mapping": True}
            offsets = self.tokens.tokenizer(text, **how)["offset_mapping"][: len(ids)]
            yield from tokens_at(places, offsets)
            return
        for start, stop in places:
            before, after = (self.tokens.of(record, text[:place], plain, len(ids) + 1) for place in (start, stop))
            first, last = (common(ids, part) for part in (before, after))
            if last > first:
                yield first, last

    def _answers_beside_media(self, record: Record, ids: list[int]) -> list[tuple[int, int]]:
        """The tokens of the assistant's turns, each told by the whole conversation with another one in its place."""
        whole = self.media.with_media(record, sys.maxsize)["input_ids"][0].tolist()
        messages = record.fields["messages"]
        numbers = answered(messages)
        inside = []
        for number in numbers:
            turns = marked(messages, [number])
            other = self.media.with_media(replace(record, fields={**record.fields, "messages": turns}), sys.maxsize)
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
