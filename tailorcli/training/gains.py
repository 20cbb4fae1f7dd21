"""What goes into Model-Dowser's scores: each layer's inputs, and the gradients at its outputs, folded to one product.

``scores_of`` makes scores of that, and says why other parameters have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailorcli.core import dowser
from tailorcli.errors import NumericalError
from tailorcli.models.layers import Layer, find_layers
from tailorcli.models.running import differentiable, output_head

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

Calls = dict[str, list["Call"]]


@dataclass
class Gain:
    """The gains of one weight, and over how many tokens they were summed."""

    total: Tensor  # (O, I), float32
    tokens: int = 0


class Call:
    """One call of a layer: its inputs (N, I), and the absolute gradients at its outputs (N, O), summed over draws."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs.detach()
        self.backward: Tensor | None = None

    def take(self, gradient: Tensor) -> None:
        """Add the gradient of one draw."""
        if self.backward is None:
            self.backward = gradient.abs().float()
        else:
            self.backward += gradient.abs()


def scored_layers(network: Any) -> dict[str, Layer]:
    """The linear layers that are scored, by their weight's name: all but the output layer."""
    head = output_head(network)
    own = set() if head is None else {id(value) for value in head.parameters()}
    parameters = dict(network.named_parameters())
    return {
        name: layer
        for name, layer in find_layers(network).items()
        if layer.role == "linear" and parameters[name].dim() == 2 and id(parameters[name]) not in own
    }


def is_product(layer: Layer, args: tuple[Any, ...], output: Any) -> bool:
    """Whether a layer gives what goes in times its whole weight: scores are of that, and of no other use.

    A subclass may give more than that (a router its choice, too), or use each part of its rows on other inputs.
    """
    if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return False
    weight = layer.modules[0].get_parameter("weight")
    return output.shape == (*args[0].shape[:-1], weight.shape[1 if layer.transposed else 0])


@contextmanager
def noting(layers: Mapping[str, Layer], calls: Calls) -> Iterator[None]:
    """While it lasts every call of a layer whose outputs have a graph is noted, with the gradients that come there."""

    def note(name: str) -> Callable[..., None]:
        def take(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if is_product(layers[name], args, output) and output.requires_grad:
                call = Call(args[0])
                output.register_hook(call.take)
                calls.setdefault(name, []).append(call)

        return take

    found = [(name, module) for name, layer in layers.items() for module in layer.modules]
    handles = [module.register_forward_hook(note(name)) for name, module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(network: Any) -> Iterator[None]:
    """While it lasts no parameter asks for a gradient: a graph is of activations alone."""
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    network.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(flags[name])


def answers(network: Any, inputs: Inputs) -> Tensor:
    """The model's answers f, with their graph: its logits, or what else it gives. Raises DataError."""
    outputs = differentiable(network, inputs)
    logits = getattr(outputs, "logits", None)
    found: Tensor = logits if logits is not None else outputs[0]
    return found


def fold(gains: dict[str, Gain], calls: Mapping[str, Sequence[Call]]) -> None:
    """Add the product of each call to the gains of its weight.

    Raises NumericalError for gradients that are no numbers.
    """
    for name, seen in calls.items():
        for call in seen:
            if call.backward is None:
                continue
            rows = call.inputs.flatten(0, -2)
            gain = dowser.gains(call.backward.flatten(0, -2), rows)
            if not bool(gain.isfinite().all()):
                raise NumericalError(f"the gradients at {name!r} are no finite numbers", "pass --dtype float32")
            if name not in gains:
                gains[name] = Gain(torch.zeros_like(gain))
            gains[name].total += gain
            gains[name].tokens += len(rows)


def score_of(weight: Tensor, gain: Gain, draws: int, *, transposed: bool) -> Tensor:
    """The scores of one weight, in its shape and on the CPU."""
    total = gain.total.T if transposed else gain.total
    return dowser.scores(weight, total, gain.tokens * draws).cpu()


def scores_of(network: Any, gains: Mapping[str, Gain], draws: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The scores by parameter, in its shape and on the CPU, and why other parameters have none."""
    layers, parameters = find_layers(network), dict(network.named_parameters())
    scores = {
        name: score_of(parameter, gains[name], draws, transposed=layers[name].transposed)
        for name, parameter in parameters.items()
        if name in gains
    }
    return scores, reasons_of(network, scores)


def reasons_of(network: Any, scored: Mapping[str, Any]) -> dict[str, str]:
    """Why each parameter that is not among the scored has no scores."""
    layers, unscored = find_layers(network), {}
    for name, parameter in network.named_parameters():
        if name in scored:
            continue
        if name in layers and layers[name].role == "linear" and parameter.dim() == 2:
            unscored[name] = "its layer was not run on these samples, gives no plain product, or is the output layer"
        elif parameter.dim() == 3:
            unscored[name] = "it has three dimensions, as experts in one tensor have: one mask would not suit them"
        else:
            unscored[name] = "it is no weight of a linear layer"
    return unscored
