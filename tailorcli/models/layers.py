"""What a module is to the method: linear layers, convolutions, embeddings, norms, and what their inputs are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tailorcli.core.unfold import unfold

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_UNFOLD_ENTRIES = 1 << 24  # of a convolution's unfolded inputs at a time
Call = Callable[[], Any]


@dataclass
class Layer:
    """One weight that can be calibrated: the modules that hold it and how they use it, and then its Hessian.

    ``find_layers`` fills the first five; calibration the others, and of a bare parameter ``role`` to ``transposed``.
    """

    name: str  # the parameter's name in the model
    role: str  # linear, embedding or norm; for a bare parameter empty until its first use
    modules: list[nn.Module]  # none for a bare parameter
    size: int  # input channels I
    transposed: bool = False
    group: str | None = None  # the Hessian that it uses, once known
    reason: str = ""  # why it has none
    note: str = ""  # what a user should know of its statistics
    experts: list[str] = field(default_factory=list)  # the Hessians of a bare parameter of three dimensions
    pooled: list[int] = field(default_factory=list)  # those of them that stand for too few tokens of their own


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Every weight that can be calibrated, by parameter name; biases go with their weights and are left out.

    A tied embedding is one (its input role, docs/concepts/additions.md), whichever of its modules is found first.
    """
    by_parameter: dict[int, Layer] = {}
    layers: dict[str, Layer] = {}
    for module_name, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{short}" if module_name else short
            known = by_parameter.get(id(parameter))
            role = _role(module)
            if known is not None:
                if role and known.role == role:
                    known.modules.append(module)
                elif role == "embedding" and known.role == "linear":  # its output layer was defined before it
                    by_parameter[id(parameter)] = layers[known.name] = _make_layer(known.name, role, module, parameter)
            elif short == "bias" and role in ("linear", "norm") and f"{module_name}.weight" in layers:
                continue  # handled with its weight, but where that is tied to another
            elif parameter.is_floating_point():
                held = short == "weight" and role
                layer = _make_layer(name, role, module, parameter) if held else Layer(name, "", [], 0)
                by_parameter[id(parameter)] = layers[name] = layer
    return layers


_LAST = re.compile(r"(o|out|c|wo|w2|fc2|dense|down)(_?(proj|lin|projection))?")


def likely_input(layer: Layer) -> tuple[str, int]:
    """What layers that share an input have in common, guessed before the model has run.

    They lie in one module and have as many channels; the layer that ends a module, by its name, sees another input.
    """
    module, _, name = layer.name.rpartition(".")[0].rpartition(".")
    return (f"{module}.{name}" if _LAST.fullmatch(name) else module), layer.size


def _role(module: nn.Module) -> str:
    """linear, embedding, norm, or nothing."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return "linear" if isinstance(weight, Tensor) and weight.dim() == 2 else ""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "linear" if module.groups == 1 and module.padding_mode == "zeros" else ""
    if isinstance(module, nn.Embedding):  # a subclass may work its rows out inside: its table is watched in use
        return "embedding" if type(module).forward is nn.Embedding.forward else ""
    one_dimensional = isinstance(weight, Tensor) and weight.dim() == 1
    if isinstance(module, nn.LayerNorm) or ("Norm" in type(module).__name__ and _eps(module) is not None):
        return "norm" if one_dimensional and not _takes_more(module) else ""
    return ""


def _takes_more(module: nn.Module) -> bool:
    """Whether a norm takes more than its inputs, as a gate: what its scale multiplies is watched in use, too."""
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(each.kind == each.POSITIONAL_OR_KEYWORD for each in parameters) > 1


def _eps(module: nn.Module) -> float | None:
    for name in _EPS_NAMES:
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _make_layer(name: str, role: str, module: nn.Module, weight: Tensor) -> Layer:
    transposed = role == "embedding" or type(module).__name__ == "Conv1D"
    size = weight.shape[0] if transposed or weight.dim() == 1 else weight[0].numel()
    return Layer(name, role, [module], size, transposed)


def normalised(module: nn.Module, inputs: Tensor, centred: bool) -> Tensor:
    """What a norm multiplies by its scale: x, ``centred`` minus its mean, over its root mean square."""
    x = inputs.to(torch.float32)
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + (_eps(module) or 0.0))


def layer_rows(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """What a linear layer multiplies, (N, I); a convolution's unfolded inputs come a few samples at a time."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        yield inputs.flatten(0, -2) if inputs.dim() > 1 else inputs.unsqueeze(0)
        return
    spatial = len(module.kernel_size)
    batched = inputs if inputs.dim() == spatial + 2 else inputs.unsqueeze(0)
    grown = 1
    for size, step in zip(module.kernel_size, module.stride, strict=True):
        grown *= -(-size // step)
    step = max(1, _UNFOLD_ENTRIES // max(1, grown * batched[0].numel()))
    for start in range(0, len(batched), step):
        part = batched[start : start + step]
        yield unfold(part, module.kernel_size, module.stride, _padding(module), module.dilation)


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """Zeros before and after each spatial dimension; what ``same`` cannot halve comes after."""
    if module.padding == "valid":
        return [(0, 0) for _ in module.kernel_size]
    if module.padding == "same":
        totals = [spread * (size - 1) for size, spread in zip(module.kernel_size, module.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(amount), int(amount)) for amount in module.padding]


def detect_norm(module: nn.Module, inputs: Tensor, call: Call) -> bool | None:
    """Whether a norm takes the mean off its inputs (..., I); None where it is no norm over their last dimension.

    The module is asked, not its name: ``call`` gives its outputs.
    """
    if type(module).forward is nn.LayerNorm.forward:
        return True
    weight, bias = module.get_parameter("weight").to(torch.float32), getattr(module, "bias", None)
    output = call()
    if inputs.shape[-1:] != weight.shape or output.shape != inputs.shape:
        return None
    for centred, offset in ((True, 0.0), (False, 0.0), (False, 1.0), (True, 1.0)):
        expected = normalised(module, inputs, centred) * (weight + offset)  # NaN is reported at the end, with the name
        expected = expected if bias is None else expected + bias.to(torch.float32)
        if torch.allclose(expected, output.to(torch.float32), rtol=2e-2, atol=1e-3, equal_nan=True):
            return centred
    return None


def reason_against(layer: Layer, module: nn.Module, inputs: Tensor, centred: bool | None) -> str:
    """Why a layer's inputs cannot be used, if they cannot; ``centred`` is what ``detect_norm`` found of a norm."""
    if layer.role != "norm" or centred is not None:
        return ""
    if inputs.shape[-1:] != module.get_parameter("weight").shape:
        return f"{type(module).__name__} does not normalise the last dimension of its inputs"
    return f"{type(module).__name__} is neither a layer norm nor a root-mean-square norm of its inputs"


def is_convolution(module: nn.Module) -> bool:
    """Whether a linear layer's inputs have to be unfolded first."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
