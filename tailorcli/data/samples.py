"""Records as a model takes them: token ids drawn with a seed, and batches of one length."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.data.forms import HINT
from tailorcli.data.records import Record, Records, media_digest
from tailorcli.errors import DataError
from tailorcli.guard import path_text
from tailorcli.options import CalibrateOptions

SEEN = "cross_attention_mask"  # (1, T, images, tiles): which pictures each token sees, in Llama 3.2 Vision

if TYPE_CHECKING:
    import torch

    # What a model is called with, by argument name; each holds one sample, batch dimension included.
    Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Samples:
    """The model's inputs of each drawn sample, and the facts about the drawing that go into the manifest.

    ``told`` is what there is to tell of the data beside them (``told.facts_of``).
    """

    inputs: list[Inputs]
    facts: dict[str, Any]
    told: dict[str, Any] = field(default_factory=dict)
    responses: list[list[tuple[int, int]]] | None = None  # runs of tokens of each sample, where records have any
    following: list[int | None] | None = None  # the token behind what each sample's decoder reads, where there is one

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, those of images included; an input without tokens counts as one."""
        return sum(count_tokens(inputs) for inputs in self.inputs)


def count_tokens(inputs: Inputs) -> int:
    """Tokens that a model's inputs hold, the decoder's included; samples where there are none."""
    counts = [inputs[name].numel() for name in ("input_ids", "decoder_input_ids") if name in inputs]
    return sum(counts) or max((len(value) for value in inputs.values()), default=0)


def draw_samples(
    path: Path,
    records: Records,
    encode: Callable[[Record, int], Inputs | None],
    options: CalibrateOptions,
    responses_of: Callable[[Record, Inputs], list[tuple[int, int]]] | None = None,
    following_of: Callable[[Record, Inputs], int | None] = lambda record, inputs: None,
) -> Samples:
    """Draw up to ``num_samples`` of the records of ``path``, in the order of the seed, as ``encode`` makes them.

    ``responses_of`` says which runs of a sample's tokens are its response, ``following_of`` which token its decoder
    writes last. Records that give no token (None) are
    passed over. Raises DataError if none is left.
    """
    chosen: list[Inputs] = []
    responses: list[list[tuple[int, int]]] = []
    following: list[int | None] = []
    used: list[Record] = []
    if options.text_mode == "chunk" and records.is_plain_text:
        pool = [chunk for record in records for chunk in _chunks(encode(record, sys.maxsize), options.length)]
        random.Random(options.seed).shuffle(pool)
        chosen = pool[: options.num_samples]
        available = len(pool)
    else:
        order = list(range(len(records)))
        random.Random(options.seed).shuffle(order)
        available = len(records)
        wanted = options.num_samples
        while order and len(chosen) < options.num_samples:
            some, order = order[:wanted], order[wanted:]
            for record in records.take(some):
                inputs = encode(record, options.length)
                if inputs is not None:
                    chosen.append(inputs)
                    used.append(record)
                    following.append(following_of(record, inputs))
                    responses.append([] if responses_of is None else responses_of(record, inputs))
                if len(chosen) == options.num_samples:
                    break
            wanted *= 2  # where many give no token, do not go through the data for every few of them
    if not chosen:
        raise DataError(f"{path}: no record gives a single token", HINT)
    facts = {
        "file": path_text(path),
        "blake2b": records.digest,
        "records": available,
        "samples": len(chosen),
        "tokens": sum(count_tokens(inputs) for inputs in chosen),
        "seed": options.seed,
        "seq_len": options.length,
        "text_mode": options.text_mode,
        "inputs": inputs_digest(chosen, responses),
    }
    if (media := media_digest(used)) is not None:
        facts["media"] = media
    known = following if any(token is not None for token in following) else None
    return Samples(chosen, facts, responses=responses if any(responses) else None, following=known)


def inputs_digest(samples: Sequence[Inputs], responses: Sequence[Sequence[tuple[int, int]]]) -> str:
    """A hash of what the model is given: columns, tokenizer and chat template decide it, not the data file alone."""
    import torch

    digest = hashlib.blake2b(json.dumps(list(responses)).encode(), digest_size=16)
    for inputs in samples:
        for name, value in sorted(inputs.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            values = value.contiguous().reshape(-1)  # a mask of sound is every so many of another's values
            digest.update(values.view(torch.uint8).numpy().tobytes())  # NumPy knows no bfloat16
    return digest.hexdigest()


def _chunks(inputs: Inputs | None, seq_len: int) -> list[Inputs]:
    """One long text cut into samples of ``seq_len`` tokens."""
    if inputs is None:
        return []
    ids = inputs["input_ids"]
    return [{"input_ids": ids[:, start : start + seq_len]} for start in range(0, ids.shape[1], seq_len)]


def make_batches(samples: list[Inputs], batch_size: int) -> Iterator[Inputs]:
    """Batches of samples whose inputs have equal shapes, the largest first.

    So nothing is ever padded, and no padding can count, whatever a model makes of its inputs inside.
    """
    for places in batch_places(samples, batch_size):
        yield join([samples[place] for place in places])


def batch_places(samples: list[Inputs], batch_size: int) -> Iterator[list[int]]:
    """Which samples go into each batch: their positions."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, inputs in enumerate(samples):
        alike.setdefault(tuple((name, value.shape) for name, value in sorted(inputs.items())), []).append(place)
    for group in sorted(alike.values(), key=lambda group: -sum(v.numel() for v in samples[group[0]].values())):
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def join(samples: list[Inputs]) -> Inputs:
    """One batch of samples whose inputs have equal shapes."""
    import torch

    return {name: torch.cat([inputs[name] for inputs in samples]) for name in samples[0]}


def lengthened(inputs: Inputs, ids: torch.Tensor, kind: int = 0) -> Inputs:
    """The inputs with their tokens (1, T) replaced by these (1, T'), which begin with them.

    Whatever has an entry for each token goes with them: further ones are of a ``kind`` and see what the last one saw.
    """
    import torch

    more = ids.shape[1] - inputs["input_ids"].shape[1]
    found = inputs | {"input_ids": ids}
    for name in (name for name in inputs if name.endswith(("token_type_ids", "position_mask"))):
        value = kind if name.endswith("token_type_ids") else 0  # Kosmos-2 marks its images' places
        found[name] = torch.nn.functional.pad(inputs[name], (0, more), value=value)
    if SEEN in inputs:
        last = inputs[SEEN][:, -1:]
        found[SEEN] = torch.cat([inputs[SEEN], last.expand(-1, more, *last.shape[2:])], dim=1)
    return found


HELD_OUT_EVERY = 10  # every tenth sample tells what those between them gave


def held_out(samples: list[Inputs]) -> list[Inputs]:
    """Every tenth sample, the first among them; samples lie in a drawn order."""
    return samples[::HELD_OUT_EVERY]


def fitted_on(samples: list[Inputs]) -> list[Inputs]:
    """The samples that are not ``held_out``; all of them where that leaves none."""
    return [sample for number, sample in enumerate(samples) if number % HELD_OUT_EVERY] or samples
