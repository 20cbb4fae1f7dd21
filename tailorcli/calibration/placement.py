"""Whether a model is calibrated whole or block by block: by the memory that it and its Hessians need."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from tailorcli.calibration.passes import Run
from tailorcli.distributed import gathered
from tailorcli.models.names import expected_names
from tailorcli.models.places import guessed_places
from tailorcli.models.skeleton import empty_model
from tailorcli.units import format_bytes

_MARGIN = 0.8  # of the free memory that a model and its Hessians may fill before it goes block by block


def skeleton_for_blocks(run: Run, config: dict[str, Any], announce: Callable[[str], None] | None) -> Any:
    """The model without its weights if it goes block by block: as asked for, or as it does not fit; else None.

    Where it does not fit one rank, all go block by block.
    """
    network = _skeleton(run, config, announce)
    blockwise = any(gathered(network is not None))
    return empty_model(run.stored, config, run.options) if blockwise and network is None else network


def _skeleton(run: Run, config: dict[str, Any], announce: Callable[[str], None] | None) -> Any:
    import torch

    from tailorcli.device import free_memory
    from tailorcli.models.lockstep import find_blocks

    say = announce or (lambda message: None)
    free, host = free_memory(run.device), free_memory(torch.device("cpu"))
    # Small is small without a closer look: float32 doubles bfloat16, and Hessians are a few times more.
    small = free is None or host is None or run.stored.nbytes * 64 < min(free, host)
    if small and run.options.blockwise != "always":
        return None
    network = empty_model(run.stored, config, run.options)
    if small:
        return network
    assert free is not None
    assert host is not None
    weights = sum(parameter.nbytes for parameter in network.parameters())
    hessians = _hessian_bytes(run, network)
    disk = shutil.disk_usage(run.writer.folder).free
    if hessians // 2 > disk:
        have = f"{format_bytes(disk)} are free in {run.writer.folder}"
        say(f"the statistics take up to {format_bytes(hessians // 2)} of disk, {have}: --include takes fewer tensors")
    if run.options.blockwise != "auto":
        return network if run.options.blockwise == "always" else None
    if not find_blocks(network) or (weights + hessians <= free * _MARGIN and weights <= host * _MARGIN):
        return None
    needed = format_bytes(weights + hessians)
    say(
        f"the model and its Hessians need up to {needed}, {format_bytes(free)} are free on {run.device}: block by block"
    )
    return network


def _hessian_bytes(run: Run, network: Any) -> int:
    """Bytes of all full Hessians at most: those of layers that seem to share an input count once."""
    from tailorcli.models.layers import find_layers, likely_input

    places = guessed_places(expected_names(network, run.stored.tensors))
    layers = run.wanted(find_layers(network).values(), places)
    parameters = dict(network.named_parameters())
    linear = [layer for layer in layers if layer.role == "linear"]
    shared = {likely_input(layer) for layer in linear}
    experts = [parameters[layer.name] for layer in layers if parameters[layer.name].dim() == 3 and not layer.modules]
    full = sum(4 * size**2 for _, size in shared)
    full += int(sum(4 * parameter.shape[0] * max(parameter.shape[1:]) ** 2 for parameter in experts))
    return full * run.sums.itemsize // 4
