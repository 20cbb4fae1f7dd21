"""Optimisers that a Trainer may have: what they hold, and whether they move weights outside of their steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tailorcli.errors import OptionsError

# Their steps leave an entry without gradient and decay alone.
KEEPS_WITHOUT_GRADIENT = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
_OF_THE_MODEL = {"model", "params", "optimizer_dict"}  # what optimisers are given that part a model by themselves


def name_of(optim: Any) -> str:
    """The name of an optimiser in TrainingArguments."""
    return str(getattr(optim, "value", optim))


def refuse_outside_steps(method: str, optim: Any, optimiser: Any = None) -> None:
    """Raise OptionsError for an optimiser that moves weights where ``method`` cannot hold them: by name, or itself."""
    found = _moving_outside_steps(optim, optimiser)
    if found and method != "full":
        what = f"optim {found} moves weights outside of its steps, where {method} cannot hold them"
        raise OptionsError(what, "take another, such as adamw_torch")


def _moving_outside_steps(optim: Any, optimiser: Any) -> str:
    """Its name, or its class, where it works inside backward, or moves weights between training and use; else empty.

    ``optimiser`` is None where a Trainer has yet to make it. One that is schedule-free has ``train`` and ``eval``, by
    which the Trainer knows it; one that works inside backward has a method for that, or steps that do nothing.
    """
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    name = name_of(optim)
    if name.endswith("layerwise") or name in ("lomo", "adalomo") or name.startswith("schedule_free"):
        return name
    optimiser = getattr(optimiser, "optimizer", optimiser)  # accelerate's wrapper has both methods of every one
    switches = all(callable(getattr(optimiser, method, None)) for method in ("train", "eval"))
    inside = hasattr(optimiser, "fused_backward") or isinstance(optimiser, LayerWiseDummyOptimizer)
    return type(optimiser).__name__ if switches or inside else ""


def optimiser_bytes(
    arguments: Any, network: Any, shapes: Iterable[Sequence[int]], dtype: torch.dtype
) -> tuple[type | None, int | None]:
    """The optimiser's class and the bytes that it holds of parameters of these shapes: those of one step, on no device.

    None for what is not known: of one that parts the model by itself, or that cannot step without a device. Raises
    what transformers raises for arguments that it refuses.
    """
    from transformers import Trainer

    if name_of(arguments.optim).endswith("layerwise"):  # asked for, it hangs hooks on the model
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
