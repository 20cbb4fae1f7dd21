"""Hooks that accumulate a Hessian for every parameter while a model runs; one for each *distinct* input.

What a module is decides, not the model's name: linear layers (also transposed ones), embeddings, norms. A short
run first finds out which modules are called and which of them see the very same input tensor (q, k and v; gate
and up): those share one Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailorcli.core.hessian import accumulate_, accumulate_diagonal_, diagonal_of, pack_triangle
from tailorcli.device import StageTimer
from tailorcli.errors import DeviceError, NumericalError, TailorError
from tailorcli.stats import HessianInfo, TensorStats

BIAS_HESSIAN = "bias"  # a bias multiplies the constant 1: H = (2/N) sum 1 = 2 for every one of them
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


@dataclass
class Layer:
    """One weight that can be calibrated: the modules that hold it and how they use it."""

    name: str  # the parameter's name in the model
    role: str  # linear, embedding or norm
    modules: list[nn.Module]
    size: int  # input channels I
    transposed: bool = False
    unit_offset: bool = False  # a norm that multiplies by 1 + weight
    group: str | None = None  # the Hessian that it uses, once known
    reason: str = ""  # why it has none


@dataclass
class Accumulator:
    """One Hessian under way."""

    hessian: Tensor  # (I, I) or (I,)
    tokens: int = 0
    layers: list[Layer] = field(default_factory=list)
    last_input: int = 0  # address of the input folded in last, to check that sharing holds


def find_layers(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Weights that can be calibrated, by parameter name; and the reason for each parameter that cannot.

    A tied embedding is found first as an embedding (its input role, docs/method.md) and stays one.
    """
    by_parameter: dict[int, Layer] = {}
    layers: dict[str, Layer] = {}
    others: dict[str, str] = {}
    for module_name, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{short}" if module_name else short
            known = by_parameter.get(id(parameter))
            if known is not None:
                if known.role == _role(module):
                    known.modules.append(module)
                continue
            role = _role(module)
            if short == "weight" and role and parameter.is_floating_point():
                layer = _make_layer(name, role, module, parameter)
                by_parameter[id(parameter)] = layers[name] = layer
            elif short == "bias" and role in ("linear", "norm"):
                continue  # handled with its weight: the module is called or it is not
            else:
                others[name] = f"{type(module).__name__}.{short} is no linear layer, embedding or norm"
    return layers, others


def _role(module: nn.Module) -> str:
    """linear, embedding, norm, or nothing."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        weight = getattr(module, "weight", None)
        return "linear" if isinstance(weight, Tensor) and weight.dim() == 2 else ""
    if isinstance(module, nn.Embedding):
        return "embedding"
    weight = getattr(module, "weight", None)
    one_dimensional = isinstance(weight, Tensor) and weight.dim() == 1
    if isinstance(module, nn.LayerNorm) or ("RMSNorm" in type(module).__name__ and _eps(module) is not None):
        return "norm" if one_dimensional else ""
    return ""


def _eps(module: nn.Module) -> float | None:
    for name in _EPS_NAMES:
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _make_layer(name: str, role: str, module: nn.Module, weight: Tensor) -> Layer:
    transposed = role == "embedding" or type(module).__name__ == "Conv1D"
    size = weight.shape[0] if transposed or weight.dim() == 1 else weight.shape[1]
    return Layer(name, role, [module], size, transposed)


def normalised(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a norm multiplies by its scale: x minus its mean, over its deviation; or x over its root mean square."""
    x = inputs.to(torch.float32)
    if isinstance(module, nn.LayerNorm):
        return torch.nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + (_eps(module) or 0.0))


class Collector:
    """Hooks on a model's layers; ``run`` feeds it, ``results`` gives the packed Hessians.

    ``wanted`` are the layers to calibrate. Call ``discover`` with a short batch before ``run``.
    """

    def __init__(self, model: nn.Module, wanted: Sequence[Layer], device: torch.device, timer: StageTimer) -> None:
        self.model = model
        self.layers = list(wanted)
        self.accumulators: dict[str, Accumulator] = {}
        self._device = device
        self._timer = timer
        self._mask: Tensor | None = None  # (B, T) bool; None where nothing is padding
        self._shape: tuple[int, int] = (0, 0)
        get_head = getattr(model, "get_output_embeddings", None)
        self._head = get_head() if callable(get_head) else None

    def discover(self, input_ids: Tensor) -> None:
        """Run a short batch (B, T) and group the layers by the very inputs that they see."""
        seen: dict[str, list[tuple[int, ...]]] = {}
        alive: list[Tensor] = []  # keeps addresses unique
        self._shape = (input_ids.shape[0], input_ids.shape[1])

        def note(layer: Layer, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
            alive.append(inputs)
            layer.reason = layer.reason or self._unsuitable(layer, module, inputs, output)
            seen.setdefault(layer.name, []).append(_identity(inputs))

        self._forward(input_ids, None, after=note)
        # In the order of their calls: of a group, the first that is called folds the inputs of all.
        order = {name: position for position, name in enumerate(seen)}
        self.layers.sort(key=lambda layer: order.get(layer.name, len(order)))
        groups: dict[tuple[Any, ...], str] = {}
        for layer in self.layers:
            if layer.name not in seen:
                layer.reason = layer.reason or "its module is not called when the model runs on this data"
            if layer.reason:
                continue
            key = tuple(seen[layer.name]) if layer.role == "linear" else (layer.name,)
            layer.group = groups.setdefault(key, layer.name)

    def _unsuitable(self, layer: Layer, module: nn.Module, inputs: Tensor, output: Tensor) -> str:
        """Why a layer's inputs cannot be used, if they cannot."""
        if _token_rows(inputs, self._shape, ids=layer.role == "embedding") is None:
            return f"its inputs, of shape {list(inputs.shape)}, are not laid out token by token"
        if layer.role == "embedding" and not _looks_up(module.get_parameter("weight"), inputs, output):
            return f"{type(module).__name__} does not look its inputs up in its table"
        if layer.role != "norm" or isinstance(module, nn.LayerNorm):
            return ""
        unscaled, weight = normalised(module, inputs), module.get_parameter("weight").to(torch.float32)
        for offset in (0.0, 1.0):
            expected = unscaled * (weight + offset)  # NaN here is told at the end, with the layer's name
            if torch.allclose(expected, output.to(torch.float32), rtol=2e-2, atol=1e-3, equal_nan=True):
                return ""
        return f"{type(module).__name__} is not the root-mean-square norm that its name says"

    def allocate(self) -> None:
        """Make room for the Hessians. Raises DeviceError when they do not fit beside the model."""
        sizes = {layer.group: layer for layer in self.layers if layer.group}
        needed = sum(4 * layer.size ** (2 if layer.role == "linear" else 1) for layer in sizes.values())
        free = free_memory(self._device)
        if free is not None and needed > free:
            raise DeviceError(
                f"the Hessians need {needed / 1e9:.1f} GB on {self._device}, {free / 1e9:.1f} GB are free",
                "calibrate fewer tensors at a time with --include, or use another --device",
            )
        for layer in self.layers:
            if layer.group is None:
                continue
            if layer.group not in self.accumulators:
                shape = (layer.size, layer.size) if layer.role == "linear" else (layer.size,)
                zeros = torch.zeros(shape, dtype=torch.float32, device=self._device)
                self.accumulators[layer.group] = Accumulator(zeros)
            self.accumulators[layer.group].layers.append(layer)

    def run(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Run one batch (B, T) and fold every layer's inputs into its Hessian; padding never counts."""
        self._mask = None if attention_mask is None else attention_mask.bool()
        self._shape = (input_ids.shape[0], input_ids.shape[1])
        self._forward(input_ids, attention_mask, before=self._fold)

    def _fold(self, layer: Layer, module: nn.Module, inputs: Tensor) -> None:
        if layer.group is None:
            return
        accumulator = self.accumulators[layer.group]
        if accumulator.layers[0] is not layer:
            if accumulator.last_input != inputs.data_ptr():
                first = accumulator.layers[0].name
                raise TailorError(
                    f"{layer.name} and {first} shared their input in a trial run and do not now",
                    "calibrate them one at a time with --include",
                )
            return
        accumulator.last_input = inputs.data_ptr()
        with self._timer.stage("hessian"):
            rows = _token_rows(inputs, self._shape, ids=layer.role == "embedding")
            if rows is None:
                raise TailorError(f"{layer.name}: its inputs changed their layout to {list(inputs.shape)}")
            if self._mask is not None:
                rows = rows[self._mask.reshape(-1)]
            self._add(accumulator, layer, module, rows)

    def _add(self, accumulator: Accumulator, layer: Layer, module: nn.Module, rows: Tensor) -> None:
        """Fold rows of tokens: (N, ..., I), or ids (N,) for an embedding."""
        if layer.role == "linear":
            accumulator.tokens = accumulate_(accumulator.hessian, rows.flatten(0, -2), accumulator.tokens)
            return
        if layer.role == "embedding":
            squares, count = torch.bincount(rows, minlength=layer.size), rows.numel()  # one-hot inputs
        else:
            unscaled = normalised(module, rows).flatten(0, -2)
            squares, count = unscaled.square().sum(0), unscaled.shape[0]
        accumulator.tokens = accumulate_diagonal_(accumulator.hessian, squares, count, accumulator.tokens)

    def _forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        before: Callable[[Layer, nn.Module, Tensor], None] | None = None,
        after: Callable[[Layer, nn.Module, Tensor, Tensor], None] | None = None,
    ) -> None:
        """One forward pass with hooks; the output head gets the last position alone, since no one reads logits."""
        handles = []

        def make_pre_hook(layer: Layer) -> Callable[..., Any]:
            def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                inputs = _first_tensor(args, kwargs)
                if before is not None:
                    before(layer, module, inputs)

            return pre_hook

        def make_hook(layer: Layer) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                if after is not None and isinstance(output, Tensor):
                    after(layer, module, _first_tensor(args, kwargs), output)

            return hook

        for layer in self.layers:
            for module in layer.modules:
                handles.append(module.register_forward_pre_hook(make_pre_hook(layer), with_kwargs=True))
                handles.append(module.register_forward_hook(make_hook(layer), with_kwargs=True))
        if isinstance(self._head, nn.Linear) and after is None:
            handles.append(self._head.register_forward_pre_hook(_last_position))
        try:
            with torch.no_grad():
                self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def results(self) -> list[tuple[str, HessianInfo, Tensor]]:
        """Every Hessian, packed. Raises NumericalError, naming a tensor, if the activations were not finite."""
        packed = []
        for name, accumulator in self.accumulators.items():
            diagonal = diagonal_of(accumulator.hessian)
            if not bool(diagonal.isfinite().all()):
                raise NumericalError(
                    f"NaN or infinity in the activations that reach {name}",
                    "check the model on this data; --dtype float32 helps where float16 overflows",
                )
            full = accumulator.hessian.dim() == 2
            info = HessianInfo(
                size=diagonal.numel(),
                kind="full" if full else "diagonal",
                tokens=accumulator.tokens,
                mean_diagonal=float(diagonal.mean()),
                dead=int((diagonal == 0).sum()),
            )
            values = pack_triangle(accumulator.hessian) if full else accumulator.hessian
            packed.append((name, info, values))
            accumulator.hessian = torch.empty(0)  # packed: the square is not needed any more
        return packed


def stats_of(layer: Layer) -> TensorStats:
    """The manifest's entry for a layer's weight."""
    return TensorStats(layer.group, layer.role, layer.transposed, layer.reason)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, where the system tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _last_position(_: nn.Module, args: tuple[Any, ...]) -> Any:
    """Give the output head only the last token of each sample."""
    if args and isinstance(args[0], Tensor) and args[0].dim() == 3:
        return (args[0][:, -1:], *args[1:])
    return None


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The module's input: its first tensor argument."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("a calibrated module was called without a tensor")


def _looks_up(table: Tensor, ids: Tensor, output: Tensor) -> bool:
    """Whether the output is the table's rows of these ids, as they are or all times one number.

    Some embeddings of positions are called with a mask or with hidden states, and work the positions out inside.
    """
    if ids.is_floating_point() or ids.dtype == torch.bool or output.shape != (*ids.shape, table.shape[1]):
        return False
    if bool((ids < 0).any()) or int(ids.max()) >= table.shape[0]:
        return False
    rows, found = table[ids].to(torch.float32), output.to(torch.float32)
    energy = float(rows.square().sum())
    scale = float((rows * found).sum()) / energy if energy > 0 else 1.0
    return torch.allclose(found, scale * rows, rtol=2e-2, atol=1e-3 * float(rows.abs().max()), equal_nan=True)


def _identity(tensor: Tensor) -> tuple[int, ...]:
    """What tells one live tensor from another, and from itself after a change in place."""
    return (tensor.data_ptr(), *tensor.shape, *tensor.stride(), tensor._version)


def _token_rows(inputs: Tensor, shape: tuple[int, int], *, ids: bool) -> Tensor | None:
    """Inputs with one row a token, (B * T, ...), or None where their leading dimensions are not B and T.

    Positions, which have no batch dimension of their own, are repeated for every sample.
    """
    batch, length = shape
    features = 0 if ids else 1
    if ids and inputs.dim() == 1 and inputs.shape[0] == length:
        inputs = inputs.unsqueeze(0)
    if inputs.dim() >= 2 + features and inputs.shape[1] == length:
        if inputs.shape[0] == 1 and batch > 1:
            inputs = inputs.expand(batch, *inputs.shape[1:])
        if inputs.shape[0] == batch:
            return inputs.flatten(0, 1)
    if inputs.dim() == 1 + features and inputs.shape[0] == batch * length:
        return inputs
    return None
