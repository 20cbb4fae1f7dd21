"""The tasks of an evaluation: records of a kind read from a file, and encoded as what a model is asked about each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tailorcli.data.encoder import Encoder
from tailorcli.data.forms import is_pair_of_turns
from tailorcli.data.hub import is_dataset
from tailorcli.data.records import Check, Record, check_record, read_records
from tailorcli.data.turns import OPEN
from tailorcli.errors import DataError, OptionsError, note
from tailorcli.files import expanded_path
from tailorcli.options import EvaluateOptions, is_label

if TYPE_CHECKING:
    from torch import Tensor

    from tailorcli.data.samples import Inputs

Kind = Literal["text", "choice", "choice-raw", "generate"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SPEC = f"write it as NAME=FILE:KIND, with one of the kinds {', '.join(KINDS)}"
_TEXT = 'a record of kind text needs "text", or "messages", or "prompt" and "response"'
_CHOICE = (
    'a record of kind choice needs "prompt", "choices" (a list of texts) and "answer" (an index from 0, or the text)'
)
_GENERATE = 'a record of kind generate needs "prompt" and "response" (a text of one line, or a list of them)'


@dataclass(frozen=True)
class Task:
    """The records of one task's data."""

    name: str
    path: Path
    kind: Kind
    records: tuple[Record, ...]
    digest: str  # of its bytes


@dataclass(frozen=True)
class Row:
    """One sequence for the model, and what it is asked: how likely each of C continuations is at P positions.

    ``places`` (P,) are positions of the outputs, ``wanted`` (C, P) the tokens that should come next there, and
    ``choices`` says for each of them which of its item's choices it is. Nothing is asked of a prompt to go on from.
    """

    inputs: Inputs
    places: Tensor
    wanted: Tensor
    choices: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Item:
    """One record, encoded: ``number`` counts from 0 in its file."""

    number: int
    rows: tuple[Row, ...]
    answer: int = 0  # of the choices, the right one
    lengths: tuple[int, ...] = ()  # what each choice's log-likelihood is divided by
    accepted: tuple[str, ...] = ()  # right answers to a prompt, normalised


@dataclass(frozen=True)
class EncodedTask:
    """A task as one tokenizer makes it; ``left_out`` numbers the records that are too long, or too short to score."""

    name: str
    kind: Kind
    items: tuple[Item, ...]
    left_out: tuple[int, ...]
    decode: Callable[[list[int]], str]

    def without(self, numbers: set[int]) -> EncodedTask:
        """The task without the items of these records, which count as left out."""
        items = tuple(item for item in self.items if item.number not in numbers)
        return replace(self, items=items, left_out=tuple(sorted(numbers.union(self.left_out))))


def parse_task(text: str) -> tuple[str, Path, Kind]:
    """Name, file and kind of a task written as NAME=FILE:KIND. Raises OptionsError."""
    name, equals, rest = text.partition("=")
    file, colon, kind = rest.rpartition(":")
    if not (name and equals and file and colon):
        raise OptionsError(f"not a task: {text!r}", _SPEC)
    if kind not in KINDS:
        raise OptionsError(f"task {name!r} has the unknown kind {kind!r}", _SPEC)
    if not is_label(name):
        raise OptionsError(f"a task's name must be one printable line, got {name!r}", _SPEC)
    return name, expanded_path(file), kind


def read_tasks(specs: Sequence[str], limit: int | None = None) -> list[Task]:
    """The tasks' records, of each file the first ``limit``. Raises OptionsError, DataError with file and line."""
    if not specs:
        raise OptionsError("there is no task", f"pass --task: {_SPEC}")
    if limit is not None and limit < 1:
        raise OptionsError(f"limit must be at least 1, got {limit}", "leave it out for all records")
    tasks: list[Task] = []
    for spec in specs:
        name, path, kind = parse_task(spec)
        if any(task.name == name for task in tasks):
            raise OptionsError(f"two tasks have the name {name!r}", "give each a name of its own")
        if not path.exists() and not is_dataset(str(path)):
            raise DataError(f"task {name!r}: there is no file {path}", _SPEC)
        checks: dict[str, Check] = {"text": _check_text, "generate": _check_generate}
        records = read_records(path, check=checks.get(kind, _check_choice))
        if records.is_plain_text and kind != "text":
            raise DataError(
                f"{path} is plain text, which task {name!r} of kind {kind} cannot use", "pass a .jsonl file"
            )
        tasks.append(Task(name, path, kind, tuple(islice(records, limit)), records.digest))
    return tasks


def _check_text(where: str, value: Any, folder: Path) -> Record:
    record = check_record(where, value, folder)
    if not record.fields.keys() & {"text", "messages", "response", "input_ids"}:
        raise DataError(f"{where} has no text to score", _TEXT)
    if _is_pair(record) and not _response(record):
        raise DataError(f"{where} has an empty response: there is nothing to score", _TEXT)
    return record


def _check_choice(where: str, value: Any, folder: Path) -> Record:
    fields = _fields(where, value, ("prompt", "choices", "answer"), _CHOICE)
    choices, answer = fields["choices"], fields["answer"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f'{where}: "choices" must be a list of texts, none of them empty', _CHOICE)
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise DataError(f'{where}: "choices" must be two or more, and all different', _CHOICE)
    if type(answer) is int and 0 <= answer < len(choices):
        return _media_record(where, fields, folder)
    if not isinstance(answer, str) or answer not in choices:
        raise DataError(f"{where}: the answer {answer!r} is not among its {len(choices)} choices", _CHOICE)
    return _media_record(where, fields | {"answer": choices.index(answer)}, folder)


def _check_generate(where: str, value: Any, folder: Path) -> Record:
    if isinstance(value, dict) and "audio" in value:  # which may be all that there is to answer
        value = {"prompt": "", **value}
    fields = _fields(where, value, ("prompt", "response"), _GENERATE)
    accepted = fields["response"] if isinstance(fields["response"], list) else [fields["response"]]
    if not accepted or not all(isinstance(text, str) and text.strip() for text in accepted):
        raise DataError(f'{where}: "response" must be a text or a list of texts, none of them empty', _GENERATE)
    if any("\n" in text.strip() for text in accepted):
        raise DataError(
            f"{where}: a response has several lines, and what a model writes is read to the first", _GENERATE
        )
    return _media_record(where, fields | {"response": accepted}, folder)


def _fields(where: str, value: Any, needed: tuple[str, ...], hint: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, expected an object", hint)
    if "response" in needed and "response" not in value and "completion" in value:
        value = {**value, "response": value["completion"]}
    for name in needed:
        if name not in value:
            raise DataError(f'{where} has no "{name}"; its fields are {sorted(value)}', hint)
    if not isinstance(value["prompt"], str):
        raise DataError(f'{where}: "prompt" is a {type(value["prompt"]).__name__}, expected a string', hint)
    return {name: value[name] for name in (*needed, "images", "image", "audio", "system", "history") if name in value}


def _media_record(where: str, fields: dict[str, Any], folder: Path) -> Record:
    """The record, with its images, its sound and what was before its prompt checked as calibration checks them."""
    record = check_record(where, fields | {"response": ""}, folder)
    return replace(record, fields=record.fields | {"response": fields.get("response", "")})


def _is_pair(record: Record) -> bool:
    """Whether a response is scored, and not a whole text."""
    fields = record.fields
    return ("audio" in fields and "messages" not in fields) or not fields.keys() & {"text", "messages", "input_ids"}


def _response(record: Record) -> str:
    """What is scored of a pair; of sound its text is the response."""
    response: str = record.fields.get("response", record.fields.get("text", ""))
    return response


def encode_task(task: Task, encoder: Encoder, options: EvaluateOptions, positions: int = sys.maxsize) -> EncodedTask:
    """A task's records as what a model of so many ``positions`` is asked.

    Texts are cut to ``seq_len`` tokens; other items that are longer are left out, since a cut prompt would be another
    question. Raises DataError.
    """
    limit = min(options.seq_len, positions)
    encode: Callable[[int, Record, Encoder, int], Item | None]
    if task.kind == "text":
        encode = _text_item
    elif task.kind == "generate":
        encode = partial(_generate_item, room=options.max_new_tokens)
    else:
        encode = partial(_choice_item, raw=task.kind == "choice-raw")
    before = len(encoder.cuts)
    found = [encode(number, record, encoder, limit) for number, record in enumerate(task.records)]
    if task.kind == "text" and (cut := len(encoder.cuts) - before):
        note(f"task {task.name}: {cut:,} of {len(found):,} texts have more than {limit:,} tokens and are cut")
    items = tuple(item for item in found if item is not None)
    if not items:
        raise DataError(
            f"task {task.name!r}: none of its {len(found)} items can be scored: all have more than {limit} tokens, or "
            "fewer than 2",
            "pass a larger --seq-len" if limit == options.seq_len else "the model knows no more positions",
        )
    left_out = tuple(number for number, item in enumerate(found) if item is None)
    decode = partial(encoder.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return EncodedTask(task.name, task.kind, items, left_out, decode)


def _text_item(number: int, record: Record, encoder: Encoder, limit: int) -> Item | None:
    """The response of a prompt; or every token of a text but the first, and but those that stand for images."""
    import torch

    if _is_pair(record) and not (encoder.media.hears_in_text and "text" in record.fields):
        prompt, response = record.fields.get("prompt", ""), _response(record)
        if encoder.tokens.exceed(record, (prompt, response), limit):
            return None
        row = _continuation(encoder, record, prompt, response, _before(encoder, record, prompt))
        return Item(number, (row,)) if _num_tokens(row.inputs) <= limit else None
    asked = is_pair_of_turns(record.form) or {"input_ids", "labels"} <= record.fields.keys()
    inputs = _with_tokens(record, encoder.encode(record, sys.maxsize if asked else limit))
    if inputs is None or inputs["input_ids"].shape[1] < 2 or (asked and _num_tokens(inputs) > limit):
        return None
    following = inputs["input_ids"][0, 1:]
    scored = ~torch.isin(following, torch.tensor(encoder.media.ids, dtype=following.dtype))
    scored[: max(0, encoder.media.seen_ahead(inputs) - 1)] = False
    if asked:
        answers = torch.zeros_like(scored)
        for start, stop in encoder.responses.runs(record, inputs):
            answers[max(0, start - 1) : stop - 1] = True
        scored &= answers
    places = scored.nonzero()[:, 0]
    return Item(number, (Row(inputs, places, following[places][None]),)) if len(places) else None


def _choice_item(number: int, record: Record, encoder: Encoder, limit: int, *, raw: bool) -> Item | None:
    """The choices of a record; those that differ in their last token alone share a row, and so a forward pass."""
    import torch

    prompt, choices = record.fields["prompt"], record.fields["choices"]
    if encoder.tokens.exceed(record, (prompt, *choices), limit):
        return None
    alone = _before(encoder, record, prompt)
    rows: dict[tuple[int, ...], Row] = {}
    for choice, text in enumerate(choices):
        row = _continuation(encoder, record, prompt, text, alone)
        if _num_tokens(row.inputs) > limit:
            return None
        ids = row.inputs.get("decoder_input_ids")
        read = ids[0] if ids is not None else row.inputs["input_ids"][0, :-1]  # what decides the outputs at places
        key = (int(row.places[0]), *read.tolist())
        if key in rows:
            shared = rows[key]
            wanted = torch.cat([shared.wanted, row.wanted])
            rows[key] = replace(shared, wanted=wanted, choices=(*shared.choices, choice))
        else:
            rows[key] = replace(row, choices=(choice,))
    lengths = tuple(1 if raw else len(text.strip()) for text in choices)
    return Item(number, tuple(rows.values()), record.fields["answer"], lengths)


def _generate_item(number: int, record: Record, encoder: Encoder, limit: int, *, room: int) -> Item | None:
    """The prompt to go on from, if it leaves ``room`` for so many new tokens."""
    import torch

    if encoder.tokens.exceed(record, (record.fields["prompt"],), limit):
        return None
    if record.has_sound and not encoder.media.hears_in_text:
        what = f"{record.where}: kind generate takes no audio with this model"
        raise DataError(what, "score the response with kind text")
    inputs, _ = encoder.start(_joined(record, record.fields["prompt"], ""), sys.maxsize)
    inputs = _with_tokens(record, inputs)
    if inputs is None:
        raise DataError(f"{record.where}: its prompt gives no token to go on from", _GENERATE)
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    if inputs["input_ids"].shape[1] + (room if encoder.start_token is None else 0) > limit:
        return None
    empty = torch.empty(0, dtype=torch.long)
    accepted = tuple(normalise(text) for text in record.fields["response"])
    return Item(number, (Row(inputs, empty, empty[None]),), accepted=accepted)


def _alone(encoder: Encoder, record: Record, prompt: str) -> Inputs | None:
    """The model's inputs for a prompt without a response."""
    return encoder.encode(_joined(record, prompt, ""), sys.maxsize)


def _before(encoder: Encoder, record: Record, prompt: str) -> Inputs | None:
    """The inputs for a prompt with nothing of its response, to tell where that begins.

    Behind the head that a chat template frames it with stands another answer: some write no empty one.
    """
    other = _joined(record, prompt, OPEN)  # which no answer begins with
    framed = encoder.chat.framed(other)
    return _alone(encoder, record, prompt) if framed is other else encoder.encode(other, sys.maxsize)


def _joined(record: Record, prompt: str, response: str) -> Record:
    return replace(record, fields={**record.fields, "prompt": prompt, "response": response})


def _continuation(encoder: Encoder, record: Record, prompt: str, response: str, alone: Inputs | None) -> Row:
    """The tokens of ``response`` after ``prompt``: all from the first that the prompt ``alone`` does not have."""
    import torch

    inputs = _with_tokens(record, encoder.encode(_joined(record, prompt, response), sys.maxsize))
    if inputs is not None and encoder.start_token is not None:
        if "decoder_input_ids" not in inputs:
            what = f"{record.where} has images, and the model is an encoder-decoder"
            raise DataError(what, "evaluate takes images with decoders alone")
        ids = encoder.tokens.of(record, response, target=True)
        ids = ids[1:] if ids[:1] == [encoder.start_token] else ids
        places, wanted = torch.arange(len(ids)), torch.tensor(ids)
    elif inputs is not None:
        whole = inputs["input_ids"][0]
        start = max(1, _common_prefix(whole, alone["input_ids"][0]) if alone is not None else 0)
        places, wanted = torch.arange(start - 1, len(whole) - 1), whole[start:]
        # InstructBLIP's Q-Former reads the text, too, to pick what it sees; it must not read the response. Pixels are
        # the prompt's own, so that an item's choices hold them once.
        given = (alone or {}).items()
        inputs |= {name: value for name, value in given if name.startswith("qformer") or value.is_floating_point()}
    if inputs is None or not len(places):
        raise DataError(f"{record.where}: {response!r} gives no token to score after its prompt", "give it a prompt")
    return Row(inputs, places, wanted[None])


def _with_tokens(record: Record, inputs: Inputs | None) -> Inputs | None:
    """The inputs of a record. Raises DataError where they hold pictures or sound alone, of a model without text."""
    if inputs is None or {"input_ids", "decoder_input_ids"} & inputs.keys():
        return inputs
    what = f"{record.where} gives the model no text, and what is scored is the text that a model writes"
    raise DataError(what, "evaluate takes models that predict tokens: no classifiers, no encoders alone")


def _common_prefix(first: Tensor, second: Tensor) -> int:
    shorter = min(len(first), len(second))
    differ = (first[:shorter] != second[:shorter]).nonzero()
    return int(differ[0]) if len(differ) else shorter


def _num_tokens(inputs: Inputs) -> int:
    """Tokens of one sample, of the encoder or of the decoder, whichever has more."""
    names = ("input_ids", "decoder_input_ids")
    return max(inputs[name].shape[1] for name in names if name in inputs)


def normalise(text: str) -> str:
    """A text as answers are compared: one space between words, no case, no punctuation at the end."""
    plain = " ".join(text.casefold().split())
    return plain.rstrip(" .,;:!?") or plain
