"""Hooks that accumulate a Hessian for every parameter while a model runs; one for each *distinct* input.

What a module is decides, not the model's name: linear layers (also transposed ones), convolutions, embeddings,
norms. Parameters that none of them holds (fused experts, routers, class tokens) are told by the operations that
they enter (``products``). A short run first finds out which modules are called and which of them see the very same
input tensor (q, k and v; gate and up): those share one Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from tailorcli.calibration.stats import BIAS_HESSIAN, HessianInfo, expert_name
from tailorcli.core.hessian import accumulate_, accumulate_diagonal_, diagonal_of, pack_triangle, unpack_triangle
from tailorcli.device import StageTimer, free_memory
from tailorcli.errors import DeviceError, NumericalError, TailorError
from tailorcli.models.layers import Call, Layer, is_convolution, layer_rows, normalised, unsuitable
from tailorcli.models.products import ProductWatch, Use
from tailorcli.models.running import first_tensor, identity_of_input

_REMEMBERED = 64  # inputs kept alive in the trial run: within so many calls, layers are found to share one


@dataclass
class Accumulator:
    """One Hessian under way."""

    hessian: Tensor  # (I, I) or (I,)
    tokens: int = 0
    layers: list[Layer] = field(default_factory=list)
    last_input: int = 0  # address of the input folded in last, to check that sharing holds


class Collector:
    """Accumulates the Hessians of ``wanted`` layers from whatever runs inside its contexts.

    Run a short batch inside ``trial``, then ``allocate``, then all batches inside ``folding``; ``results`` gives the
    packed Hessians. Without a trial every layer has a Hessian of its own. Nothing may be padded: every row counts.
    """

    def __init__(
        self, wanted: Sequence[Layer], model: nn.Module, device: torch.device, timer: StageTimer, share: bool = True
    ) -> None:
        self.layers = [layer for layer in wanted if layer.modules]
        self.accumulators: dict[str, Accumulator] = {}
        self.batch_size = 1  # samples of the batch that runs now
        self._bare = {layer.name: layer for layer in wanted if not layer.modules}
        self._model = model
        self._device = device
        self._timer = timer
        if not share:
            for layer in self.layers:
                layer.group = layer.name

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Group the layers by the very inputs that they see in what runs here, which may be several passes."""
        seen: dict[str, list[int]] = {}
        alive: dict[tuple[int, ...], tuple[int, Tensor]] = {}  # the last inputs, numbered; held, or addresses recur
        numbers = count()

        def note(layer: Layer, module: nn.Module, inputs: Tensor, call: Call) -> None:
            layer.reason = layer.reason or unsuitable(layer, module, inputs, call)
            layer.checked = True
            key = identity_of_input(inputs)
            if key not in alive:
                alive[key] = (next(numbers), inputs)
                if len(alive) > _REMEMBERED:
                    del alive[next(iter(alive))]
            seen.setdefault(layer.name, []).append(alive[key][0])

        with self._hooked(note):
            yield
        # In the order of their calls: of a group, the first that is called folds the inputs of all.
        order = {name: position for position, name in enumerate(seen)}
        self.layers.sort(key=lambda layer: order.get(layer.name, len(order)))
        groups: dict[tuple[Any, ...], str] = {}
        for layer in self.layers:
            if layer.name not in seen:  # other samples may reach it, as the experts of a list: it stands alone
                layer.group = layer.name
                continue
            if layer.reason:
                continue
            alone = layer.role != "linear" or is_convolution(layer.modules[0])
            layer.group = groups.setdefault((layer.name,) if alone else (*seen[layer.name],), layer.name)

    def allocate(self) -> None:
        """Make room for the Hessians of all groups. Raises DeviceError when they do not fit beside the model."""
        called = [layer for layer in self.layers if layer.group is not None and layer.checked]
        sizes = {layer.group: layer for layer in called}
        needed = sum(4 * layer.size ** (2 if layer.role == "linear" else 1) for layer in sizes.values())
        free = free_memory(self._device)
        if free is not None and needed > free:
            raise DeviceError(
                f"the Hessians need {needed / 1e9:.1f} GB on {self._device}, {free / 1e9:.1f} GB are free",
                "calibrate fewer tensors at a time with --include, pass --blockwise always, or use another --device",
            )
        for layer in called:
            assert layer.group is not None
            self._accumulator(layer.group, layer.role == "linear", layer.size).layers.append(layer)

    def _accumulator(self, name: str, full: bool, size: int) -> Accumulator:
        if name not in self.accumulators:
            zeros = torch.zeros((size, size) if full else (size,), dtype=torch.float32, device=self._device)
            self.accumulators[name] = Accumulator(zeros)
        return self.accumulators[name]

    @contextmanager
    def folding(self) -> Iterator[None]:
        """Fold the inputs of every layer that runs here into its Hessian."""
        with self.folding_layers(), self.folding_products():
            yield

    def folding_layers(self) -> AbstractContextManager[None]:
        """The part of ``folding`` that holds for all threads: hooks on modules."""
        return self._hooked(self._fold)

    def folding_products(self) -> AbstractContextManager[object]:
        """The part of ``folding`` that holds for one thread: a watch on torch's functions."""
        if not self._bare:
            return nullcontext()
        # Parameters as they are now: weights come and go block by block.
        parameters = {name: self._model.get_parameter(name) for name in self._bare}
        owners = {name: self._model.get_submodule(name.rpartition(".")[0]) for name in self._bare}
        tables = {name for name, module in owners.items() if isinstance(module, nn.Embedding)}
        return ProductWatch(parameters, tables, self._fold_use)

    def _fold(self, layer: Layer, module: nn.Module, inputs: Tensor, call: Call) -> None:
        if layer.group is None:
            return
        if not layer.checked:
            layer.checked = True
            layer.reason = unsuitable(layer, module, inputs, call)
            if layer.reason:
                layer.group = None
                return
        accumulator = self._accumulator(layer.group, layer.role == "linear", layer.size)
        if accumulator.layers and accumulator.layers[0] is not layer:
            if accumulator.last_input != inputs.data_ptr():
                first = accumulator.layers[0].name
                raise TailorError(
                    f"{layer.name} and {first} shared their input in a trial run and do not now",
                    "calibrate them one at a time with --include",
                )
            return
        accumulator.last_input = inputs.data_ptr()
        with self._timer.stage("hessian"):
            self._add(accumulator, layer, module, inputs)

    def _add(self, accumulator: Accumulator, layer: Layer, module: nn.Module, inputs: Tensor) -> None:
        """Fold a layer's inputs: rows (..., I), or ids for an embedding."""
        if layer.role == "linear":
            for rows in layer_rows(module, inputs):
                accumulator.tokens = accumulate_(accumulator.hessian, rows, accumulator.tokens)
            return
        if layer.role == "embedding":
            self._add_ids(accumulator, inputs, layer.size)
        else:
            _add_channels(accumulator, normalised(module, inputs, layer.centred).flatten(0, -2))

    def _add_ids(self, accumulator: Accumulator, ids: Tensor, size: int) -> None:
        """Fold one-hot inputs, given by the rows that they look up."""
        # Positions, also relative ones, have no batch dimension of their own: they count for every sample.
        shared = ids.dim() == 1 or ids.shape[0] == 1 or _are_relative(ids)
        repeats = self.batch_size if shared else 1
        squares = torch.bincount(ids.flatten(), minlength=size) * repeats
        accumulator.tokens = accumulate_diagonal_(
            accumulator.hessian, squares, ids.numel() * repeats, accumulator.tokens
        )

    def _fold_use(self, use: Use) -> None:
        """Fold what a bare parameter was multiplied with; its first use says what it is."""
        layer = self._bare[use.parameter]
        if layer.reason:
            return
        if not layer.role:
            layer.role, layer.transposed = use.role, use.transposed
        if (layer.role, layer.transposed) != (use.role, use.transposed):
            layer.reason = "it is used in more than one way"
            return
        if use.inputs is None:
            layer.group = BIAS_HESSIAN
            return
        embedding = layer.role == "embedding"
        parameter = self._model.get_parameter(use.parameter)
        layer.size = parameter.shape[0] if embedding else use.inputs.shape[-1]
        name = use.parameter if use.part is None else expert_name(use.parameter, use.part)
        if use.part is None:
            layer.group = name
        accumulator = self._accumulator(name, layer.role == "linear", layer.size)
        with self._timer.stage("hessian"):
            if embedding:
                self._add_ids(accumulator, use.inputs, layer.size)
            elif layer.role == "linear":
                rows = use.inputs.flatten(0, -2)
                accumulator.tokens = accumulate_(accumulator.hessian, rows, accumulator.tokens)
            else:
                _add_channels(accumulator, use.inputs.flatten(0, -2).to(torch.float32))

    @contextmanager
    def _hooked(self, before: Callable[[Layer, nn.Module, Tensor, Call], None]) -> Iterator[None]:
        """Call ``before`` with each layer's inputs as its module is called, and with a way to make the same call."""
        handles = []

        def make_hook(layer: Layer) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                before(layer, module, first_tensor(args, kwargs), lambda: module.forward(*args, **kwargs))

            return hook

        for layer in self.layers:
            for module in layer.modules:
                handles.append(module.register_forward_pre_hook(make_hook(layer), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def resume(self, name: str, info: HessianInfo, packed: Tensor) -> None:
        """Go on with a Hessian that was packed before: its block is called again."""
        hessian = packed.to(self._device)
        full = unpack_triangle(hessian, info.size) if info.kind == "full" else hessian
        accumulator = self._accumulator(name, info.kind == "full", info.size)
        accumulator.hessian, accumulator.tokens = full, info.tokens

    def results(self) -> Iterator[tuple[str, HessianInfo, Tensor]]:
        """Every Hessian, packed, one at a time. Raises NumericalError if the activations were not finite."""
        for layer in self.layers:
            if layer.group is not None and not self._tokens_of(layer.group):
                layer.group, layer.reason = None, _NOT_CALLED
        for layer in self._bare.values():
            self._settle_bare(layer)
        used = {layer.group for layer in (*self.layers, *self._bare.values())}
        used |= {name for layer in self._bare.values() for name in layer.experts}
        for name in list(self.accumulators):
            accumulator = self.accumulators.pop(name)
            if name not in used:
                continue
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
            yield name, info, pack_triangle(accumulator.hessian) if full else accumulator.hessian

    def _tokens_of(self, name: str) -> int:
        return self.accumulators[name].tokens if name in self.accumulators else 0

    def _settle_bare(self, layer: Layer) -> None:
        """Say what a bare parameter turned out to be; experts with too few tokens get the Hessian of all."""
        if layer.reason:
            layer.group, layer.experts = None, []
        elif not layer.role:
            layer.reason = "no layer holds it, and no product with it was recognised"
        elif layer.group is None:
            self._settle_experts(layer, self._model.get_parameter(layer.name).shape[0])

    def _settle_experts(self, layer: Layer, count: int) -> None:
        """One Hessian an expert, from the tokens routed to it; that of all routed tokens where they are too few.

        Every token goes to the same number of experts, so the mean over experts, weighted by their tokens, is the
        Hessian over the tokens of the layer.
        """
        names = [expert_name(layer.name, part) for part in range(count)]
        tokens = [self._tokens_of(name) for name in names]
        few = [part for part in range(count) if tokens[part] < layer.size]
        pooled = expert_name(layer.name, None)
        if few:
            total = sum(tokens)
            mean = self._accumulator(pooled, True, layer.size)
            for name, seen in zip(names, tokens, strict=True):
                if seen:
                    mean.hessian.add_(self.accumulators[name].hessian, alpha=seen / total)
            mean.tokens = total
            layer.note = (
                f"{len(few)} of {count} experts saw fewer tokens than the {layer.size} that their inputs have channels "
                f"({_listed(few)}): the Hessian of all tokens of the layer serves for them"
            )
        layer.experts = [pooled if part in few else names[part] for part in range(count)]


_NOT_CALLED = "its module is not called when the model runs on this data"


def _add_channels(accumulator: Accumulator, rows: Tensor) -> None:
    """Fold inputs (N, I) of a scale: each channel stands alone."""
    squares = rows.square().sum(0)
    accumulator.tokens = accumulate_diagonal_(accumulator.hessian, squares, rows.shape[0], accumulator.tokens)


def _are_relative(ids: Tensor) -> bool:
    """Whether ids (places, places) depend on the distance of two places alone, as those of T5's table do."""
    return ids.dim() == 2 and ids.shape[0] == ids.shape[1] and torch.equal(ids[1:, 1:], ids[:-1, :-1])


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (", ..." if len(numbers) > 8 else "")
