"""Texts as token ids: the first tokens of long ones, with the special tokens of the tokenizer once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tailorcli.data.forms import HINT
from tailorcli.errors import DataError

if TYPE_CHECKING:
    from tailorcli.data.records import Record
    from tailorcli.data.samples import Inputs

_LONG = 1 << 20  # characters of a text beyond which only as many are tokenised as are needed
_PER_TOKEN = 64  # characters, at first: few texts have longer tokens on average
_MARGIN = 64  # tokens at the end of a piece of text that the whole text may have otherwise


@dataclass(frozen=True)
class TextTokens:
    """What a tokenizer makes of texts; ``cuts`` gets the tokens of each that is cut, before and after.

    ``start_token`` is an encoder-decoder's first decoder token.
    """

    tokenizer: Any
    start_token: int | None
    cuts: list[tuple[int, int]]

    def of(
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

    def exceed(self, record: Record, texts: Iterable[str], limit: int) -> bool:
        """Whether one of these is a very long text of more than ``limit`` tokens. Raises DataError."""
        try:
            return any(len(text) > _LONG and self._piece(text, False, limit) is not None for text in texts)
        except Exception as error:  # whatever a model's own tokenizer raises
            raise DataError(f"{record.where}: the tokenizer refuses this text: {error}", HINT) from error

    def within(self, ids: list[int], seq_len: int) -> list[int]:
        """The first ``seq_len`` tokens; what is cut is counted."""
        if len(ids) > seq_len:
            self.cuts.append((len(ids), seq_len))
        return ids[:seq_len]

    def beginning(self, text: str, most: int) -> str:
        """As much of a text as ``most`` tokens surely need."""
        return text[: max(_LONG, _PER_TOKEN * most)]

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Texts that are cut here were counted with the record itself."""
        before = len(self.cuts)
        yield
        del self.cuts[before:]

    def inputs(self, record: Record, text: str, special: bool, seq_len: int) -> Inputs | None:
        """The first ``seq_len`` tokens of a text of ``record`` as a model's inputs. Raises DataError."""
        return as_inputs(self.within(self.of(record, text, special, seq_len), seq_len))

    def decoder_inputs(self, record: Record, seq_len: int) -> Inputs:
        """What a decoder reads while it writes the response of ``record``: the same, one place later."""
        import torch

        assert self.start_token is not None
        ids = self.of(record, record.written, most=seq_len, target=True)
        shifted = ids[:-1] if ids[:1] == [self.start_token] else [self.start_token, *ids[:-1]]
        return {"decoder_input_ids": torch.tensor([self.within(shifted, seq_len) or [self.start_token]])}

    @cached_property
    def frame(self) -> tuple[str, str]:
        """What the tokenizer itself puts before and after a text, such as its BOS, as text."""
        first, last = ("".join(map(str, self.tokenizer.convert_ids_to_tokens(ids))) for ids in self.added)
        return first, last

    @cached_property
    def added(self) -> tuple[list[int], list[int]]:
        """The ids of what the tokenizer itself puts before and after a text."""
        plain, whole = (self._ids("x", special) for special in (False, True))
        last = len(whole) - len(plain)
        at = next((place for place in range(last + 1) if plain and whole[place : place + len(plain)] == plain), None)
        return ([], []) if at is None else (whole[:at], whole[at + len(plain) :])

    def unframed(self, text: str) -> str:
        """A text without the special tokens at its ends that the tokenizer will add by itself."""
        first, last = self.frame
        text = text.removeprefix(first) if first else text
        return text.removesuffix(last) if last else text


def as_inputs(ids: list[int]) -> Inputs | None:
    """Token ids as a model's inputs, a batch of one; None for no token."""
    import torch

    return {"input_ids": torch.tensor([ids])} if ids else None


def first_tokens(inputs: Inputs, count: int) -> Inputs:
    """Inputs of the first tokens alone: whatever has an entry for each of them is cut, too; sound has none."""
    shape = (1, inputs["input_ids"].shape[1])
    cut = [name for name, value in inputs.items() if value.shape[:2] == shape and "feature" not in name]
    return {name: value[:, :count] if name in cut else value for name, value in inputs.items()}
