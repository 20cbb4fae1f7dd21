"""Samples that a model writes itself: for what it must not forget, where its training data are not at hand.

Each starts from a random token of the vocabulary and is continued by the model's own sampling (Model-Dowser, "Synthetic
Prompt Generation"); or from a record's pictures or prompt, for what the model does with those.
"""

from __future__ import annotations

import base64
import inspect
import random
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.data.forms import PROMPTS, RESPONSES
from tailorcli.data.messages import images_in_order
from tailorcli.data.records import Record, Records, check_record, read_records
from tailorcli.data.samples import Samples, batch_places, join, lengthened
from tailorcli.device import is_out_of_memory
from tailorcli.distributed import gathered, mine, now_on
from tailorcli.errors import CheckpointError, DataError, NumericalError, first_line, note
from tailorcli.guard import path_text
from tailorcli.models.generation import (
    TOGETHER,
    Answered,
    GivenTokens,
    end_token_ids,
    media_token_ids,
    samples_together,
    sampling_generation,
)
from tailorcli.models.running import in_dtype_of, to_device
from tailorcli.options import CalibrateOptions, DataColumns
from tailorcli.terminal import Progress

if TYPE_CHECKING:
    import torch

    from tailorcli.data.encoder import Encoder
    from tailorcli.data.samples import Inputs


@dataclass(frozen=True)
class Start:
    """What a sample begins with: a record, and the model's inputs for it."""

    record: Record
    inputs: Inputs
    text: str = ""  # of the inputs, as the chat template frames it
    kind: int = 0  # of the tokens that are written behind it

    @property
    def is_asked(self) -> bool:
        """Whether it is a prompt, which the model answers to its end of text."""
        fields = self.record.fields
        return "text" not in fields and bool(fields.get("prompt") or "messages" in fields)

    @property
    def has_text(self) -> bool:
        """Whether the sample's text has begun; behind images alone it begins with a random token."""
        return self.is_asked or bool(self.record.fields.get("text"))


_writing = threading.Lock()  # torch has one generator for all threads, and none else can be had to sample by
_HINT = "calibrate on data of your own that stand for what it must not forget: --data FILE"


def read_starts(path: Path, columns: DataColumns = DataColumns()) -> Records:
    """Records of what samples shall begin with: images, a prompt (its response is left out), messages, or both.

    Of messages the last of the assistant's turns is left out: the model writes another one.

    Raises DataError with file and line.
    """
    return read_records(path, check=_check_start, columns=columns)


def _check_start(where: str, value: Any, folder: Path) -> Record:
    hint = 'give it "images", "prompt", "messages" or "text"'
    if isinstance(value, dict) and any(name in value for name in PROMPTS):
        value = {name: entry for name, entry in value.items() if name not in RESPONSES}
        value["response"] = ""
    record = check_record(where, value, folder)
    if record.has_sound:
        raise DataError(f"{where} has audio, from which no sample of the model's own can begin", hint)
    if "text" in record.fields:
        return record
    if "input_ids" in record.fields:
        raise DataError(f"{where} has token ids, from which no sample of the model's own can begin", hint)
    if "messages" not in record.fields:
        return record
    asked = _asked(record.fields["messages"])
    if not asked:
        raise DataError(
            f"{where}: its messages have no turn before the assistant's, which the model would answer", hint
        )
    fields = {name: entry for name, entry in record.fields.items() if name not in ("prompt", "response")}
    return replace(record, fields=fields | {"messages": asked})


def _asked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages before the last that the assistant writes; all where it has yet to answer."""
    last = len(messages)
    while last and messages[last - 1].get("role") == "assistant":
        last -= 1
    return messages[:last] if any(message.get("role") != "system" for message in messages[:last]) else []


def encode_starts(records: Sequence[Record], encoder: Encoder, options: CalibrateOptions) -> list[Start]:
    """The starts of as many samples as are asked for, in the order of the seed; each leaves room for a token.

    Raises DataError where no record gives one.
    """
    order = list(records)
    random.Random(options.seed).shuffle(order)
    starts: list[Start] = []
    before = len(encoder.cuts)
    for record in order[: options.num_samples]:
        inputs, text = encoder.start(record, max(1, options.length - 1))
        if inputs is not None:
            starts.append(Start(record, inputs, text, encoder.media.written_kind))
    if not starts:
        raise DataError(f"{records[0].where}: no record gives a single token to start from", "see --data")
    if cut := len(encoder.cuts) - before:
        note(f"{cut:,} of {len(starts):,} starts are longer than --seq-len {options.length} and are cut: pass more")
    return starts


def with_source(samples: Samples, path: Path, records: Records) -> Samples:
    """The samples, with the file of their starts among their facts."""
    facts = {"file": path_text(path), "blake2b": records.digest, "records": len(records)}
    return replace(samples, facts=samples.facts | facts)


def write_samples(
    network: Any,
    tokenizer: Any,
    options: CalibrateOptions,
    device: torch.device,
    bar: Progress,
    starts: Sequence[Start] = (),
    media_ids: Sequence[int] = (),
) -> Samples:
    """Let ``network`` write ``num_samples`` texts of ``seq_len`` tokens each, the first of them drawn at random.

    With ``starts`` the samples begin with these, in turns; one that holds text needs no first token, and a prompt is
    answered to the model's end of text. Elsewhere the token that ends a text ends no sample: what the model goes on
    with is a new text, as in its training. Sampled at temperature 1 from the whole vocabulary, behind ``starts``
    without the tokens that stand for parts of an image (``media_ids`` and those that the model's config names).
    The same seed, device and versions give the same samples, on any number of ranks: each batch has a seed of its own,
    and is written by one of them.
    Raises DataError for a tokenizer of special tokens alone, NumericalError where the model cannot be sampled from.
    """
    import torch

    barred = sorted({*media_ids, *media_token_ids(network)}) if starts else []
    # Of several ranks all write as many at a time as the smallest can: the batches are the same on each.
    together = min(gathered(samples_together(network, device, options.length)))
    first = _plain_tokens(tokenizer, network.get_input_embeddings().weight.shape[0])
    own = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with _writing, own, torch.no_grad():
        torch.manual_seed(options.seed)
        chosen = first[torch.randint(len(first), (options.num_samples, 1))]  # (B, 1)
        begun = [_begun(starts, number, token) for number, token in enumerate(chosen)]
        asked = [number for number in range(len(begun)) if starts and starts[number % len(starts)].is_asked]
        others = sorted(set(range(len(begun))).difference(asked))
        batches = [
            (batch, ends)
            for numbers, ends in ((others, []), (asked, end_token_ids(network)))
            for batch in _batches(begun, numbers, together)
        ]
        found: dict[int, Inputs] = {}
        for position in mine([len(numbers) for numbers, _ in batches]):
            numbers, ends = batches[position]
            now_on(f"samples {numbers[0]} to {numbers[-1]} that the model writes")
            torch.manual_seed(random.Random(f"{options.seed} {numbers[0]}").getrandbits(63))
            batch = [begun[number] for number in numbers]
            for number, ids in zip(numbers, _continued(network, batch, options, device, barred, ends), strict=True):
                length = begun[number]["input_ids"].shape[1]
                kind = starts[number % len(starts)].kind if starts else 0
                found[number] = lengthened(begun[number], _ended(ids, length, ends), kind)
                bar.update(max(0, options.length - length))
    now_on("")
    joint = {number: sample for each in gathered(found) for number, sample in each.items()}
    samples = [joint[number] for number in range(len(begun))]
    facts = {
        "file": None,
        "synthetic": True,
        "samples": len(samples),
        "tokens": sum(sample["input_ids"].numel() for sample in samples),
        "seed": options.seed,
        "seq_len": options.length,
    }
    return Samples(samples, facts)


def _batches(begun: Sequence[Inputs], numbers: Sequence[int], together: int) -> Iterator[list[int]]:
    """The samples that are written at a time: texts by their lengths, those beside pictures where shapes are equal."""
    texts = [number for number in numbers if begun[number].keys() == {"input_ids"}]
    texts.sort(key=lambda number: begun[number]["input_ids"].shape[1])
    for first in range(0, len(texts), together):
        yield texts[first : first + together]
    others = sorted(set(numbers).difference(texts))
    for places in batch_places([begun[number] for number in others], TOGETHER):
        yield [others[place] for place in places]


def _begun(starts: Sequence[Start], number: int, token: torch.Tensor) -> Inputs:
    """What the sample of a number begins with: a start, a random token (1,) or both."""
    import torch

    ids = token.clone().unsqueeze(0)
    if not starts:
        return {"input_ids": ids}
    start = starts[number % len(starts)]
    if start.has_text:
        return start.inputs
    return lengthened(start.inputs, torch.cat([start.inputs["input_ids"], ids], 1), start.kind)


def _ended(ids: torch.Tensor, length: int, ends: Sequence[int]) -> torch.Tensor:
    """The token ids (T,) of one sample as (1, T'), to the first end of text behind its first ``length`` tokens."""
    import torch

    found = torch.isin(ids[length:], torch.tensor(ends, dtype=ids.dtype)).nonzero()
    return ids[: length + int(found[0]) + 1 if len(found) else len(ids)].unsqueeze(0)


def to_records(samples: Samples, starts: Sequence[Start], tokenizer: Any) -> list[dict[str, Any]]:
    """The samples as records of data files: what was asked or shown, and what was written."""
    records: list[dict[str, Any]] = []
    for number, inputs in enumerate(samples.inputs):
        start = starts[number % len(starts)] if starts else None
        begun = start.inputs["input_ids"].shape[1] if start is not None else 0
        written = tokenizer.decode(inputs["input_ids"][0, begun:].tolist(), clean_up_tokenization_spaces=False)
        if start is None:
            records.append({"text": written})
            continue
        fields = start.record.fields
        images = [_as_text(image) for image in images_in_order(start.record)]
        record: dict[str, Any] = {"images": images} if images else {}
        if start.is_asked:
            records.append(record | {"prompt": start.text, "response": written})
        else:
            records.append(record | {"text": fields.get("text", "") + written})
    return records


def _as_text(image: Path | bytes) -> str:
    """An image as a data file names it."""
    if isinstance(image, bytes):
        return f"data:;base64,{base64.b64encode(image).decode('ascii')}"
    return str(image.resolve())


def require_writer(network: Any, begun: Collection[str] = ("input_ids",)) -> None:
    """Raises CheckpointError for a model that continues no text, or none of samples that begin with these inputs."""
    name = type(network).__name__
    if not getattr(network, "can_generate", lambda: False)() or getattr(network.config, "is_encoder_decoder", False):
        raise CheckpointError(f"{name} continues no text, so that it cannot write its own samples", _HINT)
    parameters = inspect.signature(network.generate).parameters.values()
    needed = [each for each in parameters if each.default is each.empty and each.kind == each.POSITIONAL_OR_KEYWORD]
    missing = [each.name for each in needed if each.name not in begun]
    if missing:  # BLIP-2 and InstructBLIP write to a picture alone
        what = f"{name} writes no text without {missing[0]}, so that it cannot write its own samples of text alone"
        raise CheckpointError(what, _HINT)


def _plain_tokens(tokenizer: Any, rows: int) -> torch.Tensor:
    """The ids of the vocabulary that are no special tokens and have an embedding."""
    import torch

    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    plain = [token for token in ids if token < rows]
    if not plain:
        raise DataError("the tokenizer has no ordinary tokens to start samples from", _HINT)
    return torch.tensor(plain)


def _continued(
    network: Any,
    begun: Sequence[Inputs],
    options: CalibrateOptions,
    device: torch.device,
    barred: Sequence[int],
    ends: Sequence[int],
) -> torch.Tensor:
    """Token ids (B, T) on the CPU: what each of B samples begins with, continued to ``seq_len``.

    All of it is read at once where the samples are equally long, else as much as the shortest has. Behind one of the
    ``ends`` a row may hold anything.
    """
    import torch

    rows = [inputs["input_ids"][0] for inputs in begun]
    shortest, longest = min(map(len, rows)), max(map(len, rows))
    inputs = join([{**each, "input_ids": each["input_ids"][:, :shortest]} for each in begun])
    missing = options.length - shortest
    if missing <= 0:
        return inputs["input_ids"]
    require_writer(network, inputs)
    given = in_dtype_of(network, to_device(inputs, device))
    how: dict[str, Any] = {"attention_mask": torch.ones_like(given["input_ids"])}
    if longest > shortest:
        how["logits_processor"] = [GivenTokens(rows, device)]
    if ends:
        how["stopping_criteria"] = [Answered(rows, ends, device)]
    try:
        with sampling_generation(network, missing, barred, static=inputs.keys() == {"input_ids"}) as settings:
            written: torch.Tensor = network.generate(**given, **how, generation_config=settings)
    except Exception as error:  # whatever a model's own code raises
        if is_out_of_memory(error):
            raise
        what = f"the model cannot be sampled from: {first_line(error)}"
        raise NumericalError(what, f"pass --dtype float32, or {_HINT}") from error
    return written.cpu()
