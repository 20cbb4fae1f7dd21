"""Records as what a model is trained on: its inputs, and labels that leave out what is not to be learnt.

A record with a response, or with turns of an assistant, is learnt there alone; another on all of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from tailorcli.data.encoder import Encoder
from tailorcli.data.records import Record
from tailorcli.data.samples import SEEN, lengthened
from tailorcli.errors import DataError, note

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

IGNORED = -100  # the label of a token that is not learnt
_SIZES = ("image_sizes", "pixel_attention_mask", "aspect_ratio_mask")  # they say how much of each picture is one


class Prepared(Sequence["Inputs"]):
    """Inputs of examples: their tokens are held, and their pictures and sounds made anew whenever one is asked for.

    A picture takes a megabyte as the model's input, so that those of all records would fill the memory.
    """

    def __init__(self, encoder: Encoder, seq_len: int) -> None:
        self.tokens: list[Inputs] = []  # with labels
        self._encoder, self._seq_len = encoder, seq_len
        self._records: dict[int, Record] = {}  # those with more than tokens

    def add(self, inputs: Inputs, record: Record) -> None:
        """One more."""
        if record.has_media:
            self._records[len(self.tokens)] = record
            inputs = {name: value for name, value in inputs.items() if _is_per_token(name)}
        self.tokens.append(inputs)

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, place: int) -> Inputs: ...
    @overload
    def __getitem__(self, place: slice) -> list[Inputs]: ...
    def __getitem__(self, place: int | slice) -> Inputs | list[Inputs]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        place = range(len(self))[place]
        if place not in self._records:
            return self.tokens[place]
        made = self._encoder.encode(self._records[place], self._seq_len) or {}
        return {name: value for name, value in made.items() if not _is_per_token(name)} | self.tokens[place]


@dataclass(frozen=True)
class Examples:
    """What is trained on: inputs with "labels" for each record, and how many of their tokens are learnt."""

    inputs: Prepared
    learnt: int
    dropped: int  # records without a token to learn

    @property
    def tokens(self) -> list[Inputs]:
        """Of the inputs what stands for tokens."""
        return self.inputs.tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples, those of images included; of sound those of the answers."""
        return sum(inputs.get("input_ids", inputs["labels"]).numel() for inputs in self.tokens)


def encode_examples(
    records: Sequence[Record], encoder: Encoder, seq_len: int, media_ids: Sequence[int] = ()
) -> Examples:
    """Every record as an example of ``seq_len`` tokens at most; ``media_ids`` stand for parts of images.

    Raises DataError where not one of them has a token to learn.
    """
    found = Prepared(encoder, seq_len)
    learnt = cut = 0
    for record in records:
        before = len(encoder.cuts)
        inputs = encode_example(record, encoder, seq_len, media_ids)
        cut += len(encoder.cuts) > before
        if inputs is not None:
            found.add(inputs, record)
            learnt += count_learnt(inputs)
    if not len(found):
        raise DataError(
            f"{records[0].where}: no record has a token to train on",
            'give records a "response" or an assistant\'s turn within --seq-len tokens, or "text"',
        )
    if cut:
        note(f"{cut:,} of {len(records):,} records are longer than --seq-len {seq_len} and are cut")
    if dropped := len(records) - len(found):
        note(f"{dropped:,} of {len(records):,} records have no token to learn within --seq-len {seq_len}: left out")
    return Examples(found, learnt, len(records) - len(found))


def encode_example(record: Record, encoder: Encoder, seq_len: int, media_ids: Sequence[int] = ()) -> Inputs | None:
    """A record as inputs with (1, T) "labels"; None where none of its tokens is learnt.

    A question and its answer stand within the chat template, where there is one. Raises DataError.
    """
    if "audio" not in record.fields or encoder.media.hears_in_text:
        record = encoder.chat.framed(record)
    inputs = encoder.encode(record, seq_len)
    if inputs is None:
        return None
    inputs = _with_labels(inputs, record, encoder, seq_len)
    barred = torch.tensor(sorted({*media_ids, *encoder.media.ids}), dtype=torch.long)
    inputs["labels"][torch.isin(inputs["labels"], barred)] = IGNORED
    return inputs if count_learnt(inputs) else None


def count_learnt(inputs: Inputs) -> int:
    """How many tokens of one or several examples are learnt; a decoder's first one is not predicted."""
    labels = inputs["labels"]
    return int((labels[:, 1:] if "decoder_input_ids" not in inputs else labels).ne(IGNORED).sum())


def _with_labels(inputs: Inputs, record: Record, encoder: Encoder, seq_len: int) -> Inputs:
    """The inputs with (1, T) "labels"; a response is ended by the tokenizer's own end of text."""
    if "decoder_input_ids" in inputs:
        response = record.fields.get("response", record.fields.get("text", ""))
        ids = encoder.tokens.of(record, response, most=seq_len, target=True)
        ids = ids[1:] if ids[:1] == [encoder.start_token] else ids
        width = inputs["decoder_input_ids"].shape[1]
        return inputs | {"labels": torch.tensor([(ids + [IGNORED] * width)[:width]])}
    if "input_ids" not in inputs:
        what = f"{record.where} gives the model no text, and what is learnt is to write text"
        raise DataError(what, "train classifiers and encoders alone with transformers; patch takes what comes of it")
    fields = record.fields
    if "text" in fields or ("input_ids" in fields and "labels" not in fields):
        labels = inputs["input_ids"].clone()
        labels[:, : encoder.media.seen_ahead(inputs)] = IGNORED
        return inputs | {"labels": labels}
    if "messages" in fields or "input_ids" in fields:
        spans = encoder.responses.runs(record, inputs)
    elif "response" not in fields:  # pictures alone, whose marks are no text
        spans = []
    else:
        asked = replace(record, fields={**fields, "response": ""})
        begin = _common(encoder.encode(asked, seq_len), inputs["input_ids"][0])
        inputs = _ended(inputs, encoder, seq_len)
        spans = [(begin, inputs["input_ids"].shape[1])]
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for start, stop in spans:
        labels[:, start:stop] = inputs["input_ids"][:, start:stop]
    return inputs | {"labels": labels}


def _common(inputs: Inputs | None, ids: Tensor) -> int:
    """How many tokens (T,) both begin with."""
    if inputs is None:
        return 0
    other = inputs["input_ids"][0]
    length = min(len(other), len(ids))
    differing = (other[:length] != ids[:length]).nonzero()
    return int(differing[0]) if len(differing) else length


def _ended(inputs: Inputs, encoder: Encoder, seq_len: int) -> Inputs:
    """The inputs with the token that ends a text behind them, where there is one and room."""
    ids, end = inputs["input_ids"], getattr(encoder.tokenizer, "eos_token_id", None)
    length = ids.shape[1]
    if not isinstance(end, int) or int(ids[0, -1]) == end or length >= seq_len:
        return inputs
    return lengthened(inputs, pad(ids, (0, 1), value=end), encoder.media.written_kind)


class Collate:
    """Joins examples to a batch: tokens padded on the right with ``padding``, and all else put together."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, examples: Sequence[Inputs]) -> Inputs:
        """One batch, with an attention mask. Raises DataError for images of shapes that cannot stand together."""
        batch: Inputs = {}
        sized = any(name in example for example in examples for name in _SIZES)
        for name in dict.fromkeys(name for example in examples for name in example):
            try:
                if _is_per_token(name):
                    batch[name] = self._padded(name, [_of(example, name) for example in examples])
                else:
                    values = [example[name] for example in examples if name in example]
                    batch[name] = torch.cat(_filled_up(values) if sized else values)
            except RuntimeError as error:
                what = f"{name} of one batch have different shapes: {error}"
                raise DataError(what, "pass --batch-size 1; --gradient-accumulation makes a step of several") from error
        for name in ("input_ids", "decoder_input_ids"):
            if name in batch:
                ones = [torch.ones_like(example[name]) for example in examples]
                mask = "attention_mask" if name == "input_ids" else "decoder_attention_mask"
                batch[mask] = self._padded(mask, ones)
        return batch

    def _padded(self, name: str, values: Sequence[Tensor]) -> Tensor:
        fill = IGNORED if name == "labels" else self.padding if name.endswith("input_ids") else 0
        width = max(value.shape[1] for value in values)
        rests = [(0, 0) * (value.dim() - 2) + (0, width - value.shape[1]) for value in values]
        return torch.cat([pad(value, rest, value=fill) for value, rest in zip(values, rests, strict=True)])


def _filled_up(values: Sequence[Tensor]) -> list[Tensor]:
    """Pictures of several sizes, or of several numbers of tiles, with zeros behind each, as their processors do it."""
    if len({value.dim() for value in values}) > 1:
        return list(values)
    most = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    rests = [[(0, whole - size) for whole, size in zip(most, value.shape[1:], strict=True)] for value in values]
    return [pad(value, [n for pair in rest[::-1] for n in pair]) for value, rest in zip(values, rests, strict=True)]


def _is_per_token(name: str) -> bool:
    """Whether an input has a value for each token: InstructBLIP has a second text, for its query tokens."""
    known = ("labels", "qformer_attention_mask", SEEN)
    return name in known or name.endswith(("input_ids", "token_type_ids", "position_mask"))


def _of(example: Inputs, name: str) -> Tensor:
    """What an example has by a name; kinds of tokens that it does not name are those of text, 0."""
    return example[name] if name in example else torch.zeros_like(example["input_ids"])
