"""Probe a model that does not fit its device: forward block by block, then backward block by block.

All batches go through a block before the next is loaded, and so they do on the way back, where each block's inputs,
kept on the way there, and the gradients behind it are all that is needed. Every weight is read twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.core import dowser
from tailorcli.device import StageTimer, free_memory
from tailorcli.errors import CheckpointError, note
from tailorcli.models.blockwise import MARGIN
from tailorcli.models.layers import Layer
from tailorcli.models.lockstep import Lane, Lockstep, find_blocks
from tailorcli.models.parts import Parts
from tailorcli.models.running import samples_in, to_device
from tailorcli.models.skeleton import empty_model
from tailorcli.models.spill import Spill
from tailorcli.options import Blockwise, CalibrateOptions
from tailorcli.training.activations import kept_bytes
from tailorcli.training.choice import sample_digest
from tailorcli.training.gains import (
    Call,
    Calls,
    Gain,
    answers,
    fold,
    is_product,
    noting,
    reasons_of,
    score_of,
    scored_layers,
)
from tailorcli.training.tape import Tape
from tailorcli.units import format_bytes

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

_tape: ContextVar[Tape | None] = ContextVar("_tape", default=None)  # of the batch that is on its way there


@dataclass
class Probed:
    """What a probe found: scores on the CPU and digests of what was scored, by parameter, and why the rest was not."""

    scores: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)


def skeleton_for_probe(
    stored: Checkpoint, config: dict[str, Any], options: CalibrateOptions, batch_size: int, device: torch.device
) -> Any:
    """The model without its weights where it is to be probed block by block: as asked for, or as it does not fit.

    Else None. Raises CheckpointError where it is asked for and the model has no list of blocks.
    """
    if options.blockwise == Blockwise.NEVER:
        return None
    free, host = free_memory(device), free_memory(torch.device("cpu"))
    always = options.blockwise == Blockwise.ALWAYS
    if not always and (free is None or host is None or stored.nbytes * 64 < min(free, host)):
        return None
    network = empty_model(stored, config, options)
    if not find_blocks(network):
        if always:
            raise CheckpointError(
                f"{stored.path} has no list of blocks to go through one by one",
                "pass --blockwise never, on a device or a machine with more memory",
            )
        return None
    if always or free is None or host is None:
        return network
    parameters = dict(network.named_parameters())
    weights = sum(parameter.nbytes for parameter in parameters.values())
    gains = 4 * sum(parameters[name].numel() for name in scored_layers(network))
    size = next(iter(parameters.values())).element_size()
    needed = weights + gains + kept_bytes(network, batch_size * options.length, size)[0]
    if needed <= MARGIN * free and weights <= MARGIN * host:
        return None
    note(f"a probe needs up to {format_bytes(needed)}, {format_bytes(free)} are free on {device}: block by block")
    return network


def probe_blocks(
    network: Any,
    stored: Checkpoint,
    batches: Sequence[Inputs],
    draws: int,
    seed: int,
    device: torch.device,
    scratch: Path,
    advance: Callable[[int], object] = lambda _: None,
) -> Probed:
    """The scores of every linear layer but the output layer; equal to those of the whole model to rounding.

    ``network`` has no weights yet: they are read from ``stored``. Kept inputs and gradients that outgrow the memory
    wait in files in ``scratch``. ``advance`` is told of each block that is through, there and back. Raises
    NumericalError for gradients that are no numbers, and CheckpointError.
    """
    blocks = find_blocks(network)
    parts = Parts(network, list(blocks), stored, stored, device, StageTimer(device))
    parts.load("")
    network.requires_grad_(False)
    inside: dict[str, dict[str, Layer]] = {part: {} for part in ("", *blocks)}
    for name, layer in scored_layers(network).items():
        inside[parts.part_of(name)][name] = layer
    spill = Spill.measured(device, scratch)
    tapes = [Tape(spill.out, spill.back) for _ in batches]
    generator = torch.Generator(device).manual_seed(seed)
    visits: list[tuple[str, list[Tape]]] = []

    def runner(tape: Tape, batch: Inputs) -> Callable[[], None]:
        def call() -> None:
            _tape.set(tape)
            with torch.enable_grad():
                inputs = {name: tape.root(value) for name, value in to_device(batch, device).items()}
                outputs = answers(network, inputs)
                tape.begin(outputs, (dowser.random_signs(outputs, generator) for _ in range(draws)))

        return call

    runs = [(runner(tape, batch), samples_in(batch)) for tape, batch in zip(tapes, batches, strict=True)]
    with _cut(network, blocks, inside[""]):
        lanes = Lockstep(blocks, runs)
        tape_of = {id(lane): tape for lane, tape in zip(lanes.lanes, tapes, strict=True)}

        def visit(block: str, waiting: list[Lane]) -> None:
            _load(parts, blocks, block)
            for lane in waiting:
                lane.compute()
                lane.advance()
            parts.drop(block)
            visits.append((block, [tape_of[id(lane)] for lane in waiting]))
            advance(1)

        lanes.run(lambda _: None, visit)
    found, gains = Probed(), dict[str, Gain]()

    def around(name: str, call: Call) -> None:
        fold(gains, {name: [call]})

    left = Counter(block for block, _ in visits)
    for block, passed in reversed(visits):
        _load(parts, blocks, block)
        for tape in passed:
            calls: Calls = {}
            with noting(inside[block], calls):
                tape.rewind(block, around)
            fold(gains, calls)
        left[block] -= 1
        if not left[block]:
            _finish(network, inside[block], gains, draws, found)
        parts.drop(block)
        advance(1)
    for tape in tapes:
        tape.rewind("", around)
    _finish(network, inside[""], gains, draws, found)
    found.unscored = reasons_of(network, found.scores)
    return found


def _load(parts: Parts, blocks: dict[str, nn.Module], block: str) -> None:
    parts.load(block)
    blocks[block].requires_grad_(False)


def _finish(network: Any, layers: dict[str, Layer], gains: dict[str, Gain], draws: int, found: Probed) -> None:
    """Scores of what is loaded now, two bytes an entry as they are stored; their gains are given up."""
    for name, layer in layers.items():
        gain = gains.pop(name, None)
        if gain is not None:
            weight = network.get_parameter(name)
            score = score_of(weight, gain, draws, transposed=layer.transposed)
            found.scores[name] = score.to(torch.bfloat16)
            found.digests[name] = sample_digest(weight)


@contextmanager
def _cut(network: Any, blocks: dict[str, nn.Module], layers: dict[str, Layer]) -> Iterator[None]:
    """While it lasts a batch on its way is cut at every block and layer; embeddings begin a graph."""

    def begin(_: nn.Module, __: Any, output: Any) -> Any:
        tape = _tape.get()
        return output if tape is None or not isinstance(output, Tensor) else tape.root(output)

    def cut(name: str) -> Callable[..., Any]:
        def take(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            tape = _tape.get()
            if tape is None or not is_product(layers[name], args, output) or not output.requires_grad:
                return output
            return tape.layer(name, args[0], output)

        return take

    def through(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            tape = _tape.get()
            return forward(*args, **kwargs) if tape is None else tape.block(name, forward, args, kwargs)

        return run

    handles = [m.register_forward_hook(begin) for m in network.modules() if isinstance(m, nn.Embedding)]
    for name, layer in layers.items():
        handles += [module.register_forward_hook(cut(name)) for module in layer.modules]
    for name, block in blocks.items():
        block.forward = through(name, block.forward)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks.values():
            vars(block).pop("forward", None)
