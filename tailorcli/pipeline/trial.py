"""How fast this machine is: one block of the model is run for real, and the rest is counted up (``ranks``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.calibration.stats import HessianInfo, Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.device import StageTimer, exact_float32
from tailorcli.errors import TailorError
from tailorcli.models.config import read_config
from tailorcli.models.parts import Parts
from tailorcli.models.running import forward, to_device
from tailorcli.models.skeleton import empty_model
from tailorcli.options import CalibrateOptions, PatchOptions
from tailorcli.pipeline.ranks import TOGETHER

if TYPE_CHECKING:
    import torch

    from tailorcli.data.samples import Inputs
    from tailorcli.models.layers import Layer
    from tailorcli.models.lockstep import Lane
    from tailorcli.pipeline.work import Work

_TOKENS = 512  # of the trial, on a GPU eight times as many
_ROWS = 128  # of a layer that is solved for
_CHANNELS = 1024  # of a layer that is wide enough to tell the time of others


class _EnoughError(Exception):
    """Ends a run once its first block is measured."""


@dataclass(frozen=True)
class Rates:
    """Seconds of each kind of work on this machine, by one block of the model.

    ``forward`` and ``hessian`` are of a token through all blocks, ``write`` of a token of each of 32 samples, ``load``
    of a byte, ``prepare`` of a channel cubed, ``solve`` of a row times its channels squared.
    """

    forward: float
    hessian: float
    write: float
    load: float
    prepare: float
    solve: float


def measure(stored: Checkpoint, tuned: Checkpoint, options: CalibrateOptions, device: torch.device) -> Rates | None:
    """Run one block of the model that a text passes; None where there is none, or where it takes no text alone."""
    try:
        with exact_float32():
            return _measured(stored, tuned, options, device)
    except (TailorError, RuntimeError, ValueError):  # an estimate is not worth an error: the work itself will tell
        return None


def _measured(stored: Checkpoint, tuned: Checkpoint, options: CalibrateOptions, device: torch.device) -> Rates | None:
    import torch

    from tailorcli.models.lockstep import Lockstep, find_blocks

    network = empty_model(stored, read_config(stored.path), options)
    blocks = find_blocks(network)
    if not blocks:
        return None
    parts = Parts(network, list(blocks), stored, tuned, device, StageTimer(device))
    parts.load("")
    length = min(128, options.length)
    count = max(1, _TOKENS * (8 if device.type == "cuda" else 1) // length)
    shapes = ((count, length), (TOGETHER, 1))
    found: dict[str, float] = {}

    def call(shape: tuple[int, int]) -> Callable[[], Any]:
        inputs: Inputs = {"input_ids": torch.full(shape, 5)}
        return lambda: forward(network, to_device(inputs, device))

    def visit(block: str, waiting: list[Lane]) -> None:
        long, short = waiting
        begun = perf_counter()
        places = parts.load(block)
        nbytes = sum(stored.tensors[name].nbytes for name in places)
        found["load"] = (perf_counter() - begun) / max(1, nbytes)
        alike = sum(type(other) is type(blocks[block]) for other in blocks.values())
        found["forward"] = alike * _seconds(long.compute, device) / (count * length)
        # As long again for what surrounds the blocks when text is written: the growing cache, the draws.
        found["write"] = 2 * alike * _seconds(short.compute, device)
        found.update(_solving(network, block, long, count * length, alike, device))
        raise _EnoughError

    try:
        Lockstep(blocks, [(call(shape), shape[0]) for shape in shapes]).run(lambda lane: None, visit)
    except _EnoughError:
        return Rates(**found)
    return None


def _solving(network: Any, block: str, lane: Lane, tokens: int, alike: int, device: torch.device) -> dict[str, float]:
    """Seconds of gathering the block's Hessians, and of preparing and solving with the smallest full one.

    Where that is narrow for the model, with one as wide as most of the work has.
    """
    from tailorcli.calibration.collector import Collector
    from tailorcli.core.hessian import unpack_triangle
    from tailorcli.models.layers import find_layers

    every = list(find_layers(network).values())
    layers = [layer for layer in every if layer.name.startswith(f"{block}.")]
    collector = Collector(layers, network, device, StageTimer(device))
    with collector.trial():
        lane.compute()
    collector.allocate()

    def fold() -> None:
        with collector.folding():
            lane.compute()

    plain, folded = _seconds(lane.compute, device, 1), _seconds(fold, device, 1)
    matrices = {name for name, parameter in network.named_parameters() if parameter.dim() == 2}  # no fused experts
    found = ((name, info, values) for name, info, values in collector.results() if name in matrices)
    packed = {name: (info, values) for name, info, values in found if values is not None and info.kind == "full"}
    gathering = alike * max(0.0, folded - plain) / tokens
    name, (info, values) = min(packed.items(), key=lambda entry: entry[1][0].size)
    size = min(_CHANNELS, _usual_channels(every))
    if info.size < size:  # as a patch embedding makes it: what a narrow layer takes does not grow by channels
        rows = _noise((2 * size, size), device, 0)
        solved = _solved(rows.T @ rows / len(rows), _noise((_ROWS, size), device, 1), device)
    else:
        weight = network.get_parameter(name).detach().float().reshape(-1, info.size)[:_ROWS]
        solved = _solved(unpack_triangle(values.to(device), info.size), weight, device)
    return {"hessian": gathering} | solved


def _usual_channels(layers: Sequence[Layer]) -> int:
    """Channels of a layer of which as many take as long to prepare as these, of all kinds."""
    sizes = [layer.size for layer in layers if layer.role == "linear"]
    return round(math.cbrt(sum(size**3 for size in sizes) / len(sizes)))


def measure_bare(work: Work, dtype: torch.dtype, device: torch.device, load: float) -> Rates:
    """Rates for a model that is not there, by products of its kind; ``load`` is what a byte is taken to need."""
    import torch

    from tailorcli.core.hessian import accumulate_

    size, tokens = 1024, _TOKENS * (8 if device.type == "cuda" else 1)
    counts = (size, tokens, TOGETHER)
    weight, long, short = (_noise((count, size), device, seed).to(dtype) for seed, count in enumerate(counts))
    hessian = torch.zeros(size, size, device=device)
    with exact_float32(), torch.no_grad():
        product = _seconds(lambda: long @ weight, device) / (tokens * weight.numel())
        few = _seconds(lambda: short @ weight, device) / (TOGETHER * weight.numel())
        gather = _seconds(lambda: accumulate_(hessian, long, 0), device) / (tokens * size**2)
        hessian = hessian + hessian.tril(-1).T
        solving = _solved(hessian, weight.float()[:_ROWS], device)
    return Rates(
        forward=product * work.products,
        hessian=gather * work.gathered,
        write=2 * few * TOGETHER * work.products,
        load=load,
        **solving,
    )


def _noise(shape: Sequence[int], device: torch.device, seed: int) -> torch.Tensor:
    """Normal float32 numbers, not by the generator that the caller draws with, too."""
    import torch

    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def _solved(hessian: torch.Tensor, weight: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Seconds of preparing a Hessian, a channel cubed, and of solving with it, a row times its channels squared."""
    from tailorcli.core.hessian import prepare
    from tailorcli.core.tailor import tailor_layer

    other = weight + 0.02 * weight.std() * _noise(weight.shape, weight.device, 3)
    begun = perf_counter()
    prepared = prepare(hessian, 0.1, sensitivity=True, sequential=False)
    _wait(device)
    preparing = perf_counter() - begun
    settings: dict[str, Any] = {"density": 0.1, "omega": 0.5, "solver": "joint"}
    solving = _seconds(lambda: tailor_layer(weight, other, prepared, **settings), device, 1)
    size = len(hessian)
    return {"prepare": preparing / size**3, "solve": solving / (len(weight) * size**2)}


def _seconds(work: Callable[[], Any], device: torch.device, warm: int = 0) -> float:
    """Seconds of one run; the first of two is not counted where what it compiles or allocates stays."""
    for _ in range(0 if warm else 1):
        work()
    _wait(device)
    begun = perf_counter()
    work()
    _wait(device)
    return perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def picking(rates: Rates, base: Checkpoint, tokens: int) -> float:
    """Seconds of picking a teacher's weight: models between the two are made of both and run."""
    from tailorcli.calibration.teacher import MOST_TRIED

    return MOST_TRIED * (2 * rates.load * base.nbytes + rates.forward * tokens)


def calibrating(rates: Rates, model: Checkpoint, tokens: int, written: tuple[int, int] | None) -> float:
    """Seconds of a calibration; ``written`` are samples and their length where the model writes them first."""
    seconds = rates.load * model.nbytes + (rates.forward + rates.hessian) * tokens
    if written is not None:
        samples, length = written
        seconds += rates.load * model.nbytes + rates.write * -(-samples // TOGETHER) * (length - 1)
    return seconds


def patching(
    rates: Rates, base: Checkpoint, stats: Sequence[Stats], tokens: int, options: PatchOptions, numel: int
) -> float:
    """Seconds of a patch of ``numel`` entries with these statistics, propagated over ``tokens`` where it is."""
    infos: list[HessianInfo] = [info for info in stats[0].hessians.values() if info.kind == "full"] if stats else []
    linear = sum(info.size**2 for info in infos)
    mean = linear / max(1, sum(info.size for info in infos))  # channels of a layer, weighed by them
    once = rates.prepare * sum(info.size**3 for info in infos) + rates.solve * numel * mean
    seconds = 2 * rates.load * base.nbytes + once * len(stats)
    if options.propagate:
        seconds += once + 3 * rates.load * base.nbytes + tokens * (2.3 * rates.forward + 2 * rates.hessian)
    return seconds


def distilling(rates: Rates, steps: int, batch_size: int, tokens: int) -> float:
    """Seconds of training: forward and backward through the model for samples of both kinds, the teachers once.

    ``tokens`` are those of a sample.
    """
    return rates.forward * tokens * batch_size * 2 * 3.5 * steps
