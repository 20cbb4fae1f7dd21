"""What a patch will need: bytes to read, memory of the largest tensor."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.options import KeepOptions, PatchOptions
from tailorcli.runs.divided import Work
from tailorcli.runs.plan import TensorPlan

if TYPE_CHECKING:
    from tailorcli.patching.inputs import PatchInputs

_CHUNK_BYTES = 64 << 20
COMPARED = 32  # samples of each kind on which propagation runs both unpatched models, to say how far they are apart
_WORK_BYTES = 12 * _CHUNK_BYTES  # the solver's work arrays, bounded by the row chunks in core.solvers


_PER_BYTE, _PER_ENTRY = 64, 200  # multiplications in the time of reading a byte; of scoring and choosing an entry

# glibc maps larger arrays, whose memory goes back at once. Smaller ones lie on its heap, and before its version 2.38 an
# aligned one never fits the hole that one of the same size has left.
_MAPPED = 32 << 20

_TRANSFORMERS_BYTES = 300 << 20  # and what graft needs besides


def most_kept(tensors: list[TensorPlan], options: KeepOptions) -> list[tuple[TensorPlan, int]]:
    """How many entries of each tensor are kept, at most; of a draw, all but surely: six deviations above its mean."""
    if options.is_dense:
        return [(tensor, tensor.numel) for tensor in tensors]
    if options.counts_first:  # the widest entries first
        left, most = round(options.density * sum(tensor.numel for tensor in tensors)), []
        for tensor in sorted(tensors, key=lambda t: t.nbytes / t.numel, reverse=True):
            most.append((tensor, min(left, tensor.numel)))
            left -= most[-1][1]
        return most
    spread = 6.0 * (options.density * (1.0 - options.density)) ** 0.5 if options.method == "dare" else 0.0
    return [(t, min(t.numel, round(options.density * t.numel + spread * t.numel**0.5))) for t in tensors]


def training_bytes(tensors: list[TensorPlan], base: Checkpoint, tuned: Checkpoint, options: PatchOptions) -> int:
    """Bytes that graft holds at its fullest, but for a batch's activations: the model, both weights, gradients, S."""
    if options.method != "graft":
        return 0
    patched = [tensor for tensor in tensors if tensor.action == "patch"]
    held = sum(2 * tensor.nbytes + tuned.tensors[tensor.name].nbytes + 4 * tensor.numel for tensor in patched)
    work = [4 * tensor.numel for tensor in patched]
    chosen = 4 * (sum(work) if options.threshold == "global" else max(work))  # S again, its copies, the mask
    return _TRANSFORMERS_BYTES + base.nbytes + held + max(chosen, 4 * max(work))


def propagation_bytes(
    tensors: list[TensorPlan],
    base: Checkpoint,
    stats: Stats | None,
    retain_stats: Stats | None,
    share: float = 1.0,
    on_heap: bool = True,
) -> int:
    """Bytes that propagation holds besides: a block of three models and its patch, moments, hidden states.

    ``share`` is that of the samples that a process takes; ``on_heap``, whether the C library hands out the memory of
    hidden states, or a GPU's allocator does.
    """
    blocks: dict[str, int] = {}
    for info in base.tensors.values():
        block = re.sub(r"(\.\d+)\..*", r"\1", info.name)  # up to its first number
        blocks[block] = blocks.get(block, 0) + info.nbytes
    known = [source for source in (stats, retain_stats) if source is not None]
    sizes = {h: source.hessians[h] for source in known for t in tensors for h in t.hessians if h in source.hessians}
    moments = [4 * info.size**2 for info in sizes.values() if info.kind == "full"]
    widest = max((info.size for info in sizes.values() if info.kind == "full"), default=0)
    embedding = max((t.nbytes // t.shape[0] for t in tensors if t.role == "embedding" and len(t.shape) == 2), default=0)
    width = max((t.shape[-1] for t in tensors if t.role == "embedding" and len(t.shape) == 2), default=1)
    tokens = [int(source.manifest["data"].get("tokens", 0)) for source in known]
    counts = [max(1, source.sample_count) for source in known]
    passes = sum(number * (2 + min(1.0, COMPARED / count)) for number, count in zip(tokens, counts, strict=True))
    # Of each token, in two models, and of some in a third: what a block holds while it waits within (its input, the
    # residual stream, what its norm makes of that, queries, keys and values, or what the widest layer takes).
    hidden = int(share * passes * (5 * embedding + embedding * widest // width))
    sizes_at_once = [source.manifest["options"]["batch_size"] for source in known]  # samples
    rows = max((n // c * b for n, c, b in zip(tokens, counts, sizes_at_once, strict=True)), default=0)
    if on_heap and embedding * rows < _MAPPED:
        hidden *= 2  # measured: 1.5 with 16 samples at a time, up to 2 with 64
    return _TRANSFORMERS_BYTES + 5 * max(blocks.values()) + 10 * max(moments, default=0) + hidden


def pair_bytes(tensors: list[TensorPlan], tuned: Checkpoint) -> int:
    """Bytes to read of base and tuned for the tensors that change."""
    return sum(tensor.nbytes + tuned.read_cost(tensor.name) for tensor in tensors if tensor.action == "patch")


def bytes_to_read(tensors: list[TensorPlan], tuned: Checkpoint, stats: Stats | None, retain_stats: Stats | None) -> int:
    """Bytes to read in all: every base tensor, tuned's where one changes, each Hessian in use once."""
    total = sum(tensor.nbytes for tensor in tensors)
    total += sum(tuned.read_cost(tensor.name) for tensor in tensors if tensor.action == "patch")
    used = {hessian for tensor in tensors for hessian in tensor.hessians}
    total += sum(stats.nbytes(name) for name in used if stats is not None)
    return total + sum(
        retain_stats.nbytes(name)
        for name in {h for t in tensors for h in t.retained_hessians}
        if retain_stats is not None
    )


def work_of(tensor: TensorPlan, inputs: PatchInputs, options: PatchOptions) -> Work:
    """How much work its Hessians are, once for all tensors that share them, and it is itself: in multiplications.

    A byte that is read or written counts as some of them.
    """
    if tensor.action != "patch":
        return 0.0, float(_PER_BYTE * tensor.nbytes)
    each = float(_PER_BYTE * (2 * tensor.nbytes + inputs.tuned.read_cost(tensor.name)) + _PER_ENTRY * tensor.numel)
    if options.method == "dg-hard":
        each += 20.0 * tensor.numel * min(tensor.shape[-2:], default=0)
    stats = inputs.stats
    full = [stats.hessians[h].size for h in tensor.hessians if stats.hessians[h].kind == "full"] if stats else []
    if not full:
        return 0.0, each
    kinds = 2 if tensor.retained_hessians else 1
    prepared = sum(size**3 + kinds * _PER_BYTE * 2.0 * size**2 for size in full)
    per_channel = {"none": 2, "sequential": 4, "joint": 16}[options.solver]
    each += per_channel * tensor.numel * max(full)
    return (0.0, each + prepared) if tensor.experts else (prepared, each)


def working_set(tensor: TensorPlan, tuned: Checkpoint, stats: Stats | None, options: PatchOptions) -> int:
    """Bytes held while one tensor is worked on: both weights, delta, score and its copy, result, Hessian, work."""
    if tensor.action != "patch":
        return 1 << 24
    full = tensor.numel * 4
    weights = tensor.nbytes + tuned.tensors[tensor.name].nbytes
    # The fullest moment is either the selection (delta, score, its copy) or the assembly (delta, decorator,
    # result); a result of the tensor before, and its mask, may still wait to be written.
    arrays = max(3 * full, 2 * full + tensor.nbytes) + full // 4 + tensor.nbytes + tensor.numel
    if tensor.retained_hessians:  # the goal and the target values of every entry
        arrays += 2 * full
    if options.method == "dg-hard":  # the SVD's copy, its two factors and their product, and LAPACK's work space
        arrays += 4 * full + 32 * min(tensor.shape[-2:], default=0) ** 2
    hessian = 0
    sizes = [stats.hessians[h].size for h in tensor.hessians if stats.hessians[h].kind == "full"] if stats else []
    if sizes:
        square = 4 * max(sizes) ** 2
        hessian = square // 2 + square + 2 * square  # packed, unpacked, damped copy and factor
        if tensor.retained_hessians:  # another of each, their sum
            hessian += square // 2 + 2 * square
    work = min(_WORK_BYTES, 12 * full) if hessian else min(_CHUNK_BYTES, full) * 2  # or the measuring of its chunks
    return weights + arrays + hessian + work
