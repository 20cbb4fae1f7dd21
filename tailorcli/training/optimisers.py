"""Optimisers that a Trainer may have: what they hold, and whether they move weights outside of their steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# Their steps leave an entry without gradient and decay alone.
KEEPS_WITHOUT_GRADIENT = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
_OF_THE_MODEL = {"model", "params", "optimizer_dict"}  # what optimisers are given that part a model by themselves


def optimiser_bytes(
    arguments: Any, network: Any, shapes: Iterable[Sequence[int]], dtype: torch.dtype
) -> tuple[type | None, int | None]:
    """The optimiser's class and the bytes that it holds of parameters of these shapes: those of one step, on no device.

    None for what is not known: of one that parts the model by itself, or that cannot step without a device. Raises
    what transformers raises for arguments that it refuses.
    """
    from transformers import Trainer

    if str(getattr(arguments.optim, "value", arguments.optim)).endswith("layerwise"):  # asked for, it has its hooks
        return None, None
    made, given = Trainer.get_optimizer_cls_and_kwargs(arguments, network)
    given.pop("fused", None)  # a way to compute; it holds the same
    if _OF_THE_MODEL & given.keys():
        return made, None
    parameters = [torch.nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta")) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    try:
        optimiser = made(parameters, **given)
        optimiser.step()
    except Exception:  # whatever kernels raise that are made for one device
        return made, None
    held = [value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor)]
    return made, sum(value.nbytes for value in held if value.dim())
