"""What distillation will need, worked out from headers and samples before any work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import DTYPES, torch_dtype
from tailorcli.data.samples import count_tokens
from tailorcli.models.config import read_config
from tailorcli.models.empty import empty_on_meta
from tailorcli.models.skeleton import run_dtype
from tailorcli.options import CalibrateOptions
from tailorcli.training.activations import blocks_of, kept_bytes, kept_limit
from tailorcli.training.teachers import CPU_LOGITS_BYTES, LOGITS_BYTES, head_of

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

ENTRY_BYTES = 20  # of a kept entry: value, gradient, two moments, place
_LOGITS_ARRAYS = 8  # of a piece's logits: both models', their logarithms, their gradients, the allocator's rest


def training_bytes(
    base: Checkpoint,
    folder: Path,
    kept: Iterable[tuple[str, int]],
    kinds: Sequence[list[Inputs]],
    options: CalibrateOptions,
    batch_size: int,
    on_gpu: bool,
) -> tuple[int, int]:
    """Bytes on the device and in host memory at their fullest; on a CPU both lie in its memory.

    ``folder`` has the config by which the patched model runs, ``kept`` names the tensors with their kept entries, and
    ``kinds`` are the samples of each kind. ``options`` say in which dtype the model runs. Raises CheckpointError, also
    for a model without an output layer over a vocabulary.
    """
    config = read_config(folder)
    network = empty_on_meta(base, config, options, folder)
    dtype = run_dtype(base, network.config, options)
    size = 4 if dtype == torch_dtype("F16") else dtype.itemsize  # what runs in float16 is trained in float32
    entries = {name: count for name, count in kept if count}
    weights = size * sum(parameter.numel() for parameter in network.parameters())
    largest = max((math.prod(base.tensors[name].shape) for name in entries), default=0)
    work = 16 * max(entries.values(), default=0)  # of the tensor that is stepped: places as int64, the spread
    tokens = batch_size * max(count_tokens(sample) for samples in kinds for sample in samples)
    every, one = kept_bytes(network, tokens, size)
    rows, width = head_of(network).weight.shape
    if every > kept_limit(on_gpu=on_gpu):  # a block's input of each, and one block at a time
        every = (len(blocks_of(network)) + 2) * tokens * width * size + 2 * one
    logits = _LOGITS_ARRAYS * min(LOGITS_BYTES if on_gpu else CPU_LOGITS_BYTES, 4 * tokens * rows)
    heads = (2 * size + 4) * rows * width  # the teachers', and the sum of the student's gradient
    device = weights + ENTRY_BYTES * sum(entries.values()) + every + logits + heads + 2 * size * largest + work
    states = size * width * sum(count_tokens(sample) for samples in kinds for sample in samples)
    inputs = sum(value.nbytes for samples in kinds for sample in samples for value in sample.values())
    best = sum(count * _stored_size(base, name) for name, count in entries.items())
    host = states + inputs + best + (weights if on_gpu else 0)  # where it is read into before it goes to the device
    return device, host


def _stored_size(base: Checkpoint, name: str) -> int:
    dtype = base.tensors[name].dtype
    return DTYPES[dtype][0] // 8 if torch_dtype(dtype) is not None else 4
