"""A model that does not fit its device, run over samples all the same: block by block (``models.lockstep``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.device import StageTimer, free_memory
from tailorcli.models.lockstep import Lane, Lockstep, find_blocks
from tailorcli.models.parts import Parts
from tailorcli.models.skeleton import empty_model
from tailorcli.models.spill import Spill
from tailorcli.options import Blockwise, CalibrateOptions

if TYPE_CHECKING:
    import torch

MARGIN = 0.8  # of the free memory that a model's weights may fill before it goes block by block
MOST_LANES = 256  # samples that go through the blocks together, each in a thread; more read the weights again


def skeleton_if_too_large(
    stored: Checkpoint, config: dict[str, Any], options: CalibrateOptions, device: torch.device
) -> Any:
    """The model without its weights where it is to go block by block, as ``options`` ask or as it does not fit.

    Else None, and so for a model that has no list of blocks. Raises CheckpointError where transformers cannot build it.
    """
    import torch

    if options.blockwise == Blockwise.NEVER:
        return None
    free, host = free_memory(device), free_memory(torch.device("cpu"))
    room = None if free is None or host is None else MARGIN * min(free, host)
    if options.blockwise == Blockwise.AUTO and (room is None or stored.nbytes * 4 < room):  # whatever it runs in
        return None
    network = empty_model(stored, config, options)
    if not find_blocks(network):
        return None
    weights = sum(parameter.nbytes for parameter in network.parameters())
    fits = options.blockwise == Blockwise.AUTO and room is not None and weights <= room
    return None if fits else network


def run_blockwise(
    network: Any,
    stored: Checkpoint,
    tuned: Checkpoint,
    count: int,
    call: Callable[[int], Any],
    device: torch.device,
    scratch: Path,
    advance: Callable[[int], object] = lambda _: None,
) -> list[Any]:
    """What ``call`` gives for each of ``count`` samples by its number; it has to run ``network`` on that sample.

    ``network`` has no weights yet; they are read from ``stored``, or from the adapter ``tuned`` on it, one block at a
    time for all samples. Hidden states that outgrow the memory wait in files in ``scratch``. What lies in no block
    stays in the network. ``advance`` is told of each sample that is through. Raises CheckpointError.
    """
    blocks = find_blocks(network)
    parts = Parts(network, list(blocks), stored, tuned, device, StageTimer(device))
    parts.load("")
    found: list[Any] = [None] * count

    def runner(number: int) -> Callable[[], None]:
        def run() -> None:
            found[number] = call(number)
            advance(1)

        return run

    for start in range(0, count, MOST_LANES):
        spill = Spill.measured(device, scratch)

        def visit(block: str, waiting: list[Lane], spill: Spill = spill) -> None:
            parts.load(block)
            for lane in waiting:
                lane.move(spill.back)
                lane.compute()
                for tensor in lane.advance():
                    tensor.data = spill.leave(tensor)
                lane.move(spill.out)
            parts.drop(block)

        numbers = range(start, min(start + MOST_LANES, count))
        Lockstep(blocks, [(runner(number), 1) for number in numbers]).run(lambda _: None, visit, spill)
    return found
