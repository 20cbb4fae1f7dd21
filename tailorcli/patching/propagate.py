"""Patch a model in the order in which it runs: each layer is fitted from the inputs that the patched model gives it.

Three models go in step, block by block (``blocks``): the tuned one on the samples of its statistics, the base on those
that it retains, and on both the model that is being patched. A block is first patched by itself, as without
propagation. Then its linear layers are fitted to the outputs of the unpatched models (``core.propagation``) in the
order in which they are called, those that share their input together, and the patched model goes on through the result.
What is no linear layer, and a layer whose inputs in two models cannot be told to be of the same tokens, keeps its plain
patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailorcli.adapters.checkpoint import AdaptedCheckpoint
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import TensorInfo
from tailorcli.core.figures import LayerFigures, refit_figures
from tailorcli.core.hessian import unpack_triangle
from tailorcli.core.propagation import Moments, accumulate_moments_, complete_, no_moments, refit
from tailorcli.core.tailor import LayerResult
from tailorcli.data.samples import make_batches
from tailorcli.device import StageTimer, free_memory
from tailorcli.errors import NumericalError, TailorError
from tailorcli.models.config import read_config
from tailorcli.models.layers import Layer, find_layers, is_convolution
from tailorcli.models.lockstep import Lane, Lockstep, find_blocks
from tailorcli.models.parts import Parts
from tailorcli.models.places import Place
from tailorcli.models.running import (
    HIDDEN_SHARE,
    first_tensor,
    forward,
    identity_of_input,
    last_logits_only,
    samples_in,
    to_device,
)
from tailorcli.models.skeleton import empty_model
from tailorcli.models.spill import Spill
from tailorcli.options import CalibrateOptions, PatchOptions
from tailorcli.runs.plan import TensorPlan

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

    Result = tuple[TensorPlan, LayerResult | None, str]

NEW, RETAINED = "new", "retained"


@dataclass
class _Model:
    """One of the three models, without its weights but those of the parts that are loaded."""

    network: Any
    stations: dict[str, nn.Module]  # where its batches may wait: blocks and linear layers
    parts: Parts

    @property
    def head(self) -> nn.Module | None:
        """Its output layer."""
        get_head = getattr(self.network, "get_output_embeddings", None)
        found = get_head() if callable(get_head) else None
        return found if isinstance(found, nn.Linear) else None


class _PatchedView(Checkpoint):
    """The base, but with the ``values`` of tensors that are patched in their place."""

    def __init__(self, base: Checkpoint) -> None:
        super().__init__(base.path, base.tensors, base.shards)
        self.values: dict[str, Tensor] = {}

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``start`` on."""
        value = self.values.get(info.name)
        if value is None:
            super().read_into(info, buffer, start)
        else:
            raw = value.reshape(-1).view(torch.uint8).numpy()
            buffer[:] = raw[start : start + len(buffer)].data


@dataclass
class _Pending:
    """A linear layer that has its plain patch and waits to be fitted again."""

    layer: Layer
    tensor: TensorPlan
    result: LayerResult
    digest: str


@dataclass
class _Group:
    """Linear layers that see the very same input, by the names of their modules."""

    layers: dict[str, _Pending]
    moments: dict[str, Moments] = field(default_factory=dict)  # by kind of data
    aligned: bool = True  # the two models' inputs are of the same tokens


@dataclass
class Propagation:
    """What a propagating patch needs; ``run`` patches and writes every tensor once.

    ``plain`` patches tensors by themselves; ``write`` takes each final result with further facts for its record;
    ``stored`` gives the value of a tensor that an interrupted run has written (None where it cannot), ``done`` says
    which ones those are. Hidden states wait in ``scratch`` where they outgrow the memory.
    """

    base: Checkpoint
    tuned: Checkpoint
    stats: Stats
    retain: Stats
    options: PatchOptions
    device: torch.device
    timer: StageTimer
    scratch: Path
    plain: Callable[[list[TensorPlan]], Iterable[Result]]
    write: Callable[[TensorPlan, LayerResult | None, str, dict[str, Any]], None]
    stored: Callable[[str], Tensor | None]
    done: Container[str]

    def run(self, tensors: Iterable[TensorPlan]) -> None:
        """Patch all of ``tensors``. Raises TailorError."""
        self._tensors = {tensor.name: tensor for tensor in tensors}
        with ExitStack() as stack:
            self._open(stack)
            for name, layer in self._load("").items():
                self._groups[name] = _Group({name: layer})
            host = free_memory(torch.device("cpu")) or 1 << 40
            self._spill = Spill(self.device, self.scratch, int(host * HIDDEN_SHARE))
            self._line_up()
            self._lockstep.run(lambda lane: None, self._visit, self._spill)
        for group in self._groups.values():  # layers that this data never reaches
            self._refit(group)
        left = [tensor for tensor in self._tensors.values() if tensor.name not in self._seen]
        for tensor, result, digest in self.plain(left):
            if tensor.name not in self.done:
                self.write(tensor, result, digest, {})

    def _open(self, stack: ExitStack) -> None:
        """The three models, the unpatched ones with the weights that lie in no block."""
        self._view = _PatchedView(self.base)
        stack.callback(self._view.close)
        stored = self.base if isinstance(self.tuned, AdaptedCheckpoint) else self.tuned
        of_new, of_retained = _options_of(self.stats), _options_of(self.retain)
        with self.timer.stage("load"):
            self._tuned = self._model(stored, self.tuned, of_new)
            self._base = self._model(self.base, self.base, of_retained)
            self._patched = self._model(self._view, self._view, of_new)
        self._layers = {layer.name: layer for layer in find_layers(self._patched.network).values()}
        for model in (self._tuned, self._base):
            model.parts.load("")
        for model in (self._tuned, self._base, self._patched):
            if model.head not in model.stations.values():  # else what it sees is wanted whole
                stack.enter_context(last_logits_only(model.network))

    def _line_up(self) -> None:
        """A lane for every batch in its unpatched model, and its mate in the patched one."""
        runs = [
            (kind, batch, model)
            for kind, stats, reference in ((NEW, self.stats, self._tuned), (RETAINED, self.retain, self._base))
            for batch in make_batches(stats.samples(), _options_of(stats).batch_size)
            for model in (reference, self._patched)
        ]
        calls = [(self._call(model.network, batch), samples_in(batch)) for _, batch, model in runs]
        others = [model.stations for model in (self._base, self._patched)]
        self._lockstep = Lockstep(self._tuned.stations, calls, others)
        self._lockstep.passed = {name for name in self._tuned.stations if self._block_of(name) not in ("", name)}
        lanes = self._lockstep.lanes
        self._mates = {id(lane): mate for lane, mate in zip(lanes[::2], lanes[1::2], strict=True)}
        self._kinds = {id(lane): kind for lane, (kind, _, _) in zip(lanes, runs, strict=True)}
        self._runs = {id(lane): model for lane, (_, _, model) in zip(lanes, runs, strict=True)}

    def __post_init__(self) -> None:
        self._seen: set[str] = set()  # tensors of the parts that were loaded
        self._groups: dict[str, _Group] = {}  # that are not fitted yet, by the layer that is called first
        self._loaded: list[str] = []  # blocks
        self._tokens: dict[int, int] = {}  # of a batch's hidden states, as they go into the block where it is

    def _model(self, stored: Checkpoint, tuned: Checkpoint, options: CalibrateOptions) -> _Model:
        network = empty_model(stored, read_config(stored.path), options)
        blocks = find_blocks(network)
        parts = Parts(network, list(blocks), stored, tuned, self.device, self.timer)
        return _Model(network, _stations(network, blocks), parts)

    def _call(self, network: Any, batch: Inputs) -> Callable[[], Any]:
        return lambda: forward(network, to_device(batch, self.device))

    def _load(self, part: str) -> dict[str, _Pending]:
        """Patch a part's tensors by themselves, load them, and write those that stay so; gives the others by module."""
        names = [name for name in self._patched.parts.tensors[part] if name in self._tensors]
        chosen = [tensor for tensor in self._tensors.values() if tensor.name in set(names)]  # in the plan's order
        self._seen.update(names)
        results: list[Result] = []
        if not self._restore(chosen):
            for tensor, result, digest in self.plain(chosen):
                if result is not None and result.patched is not None and not _is_frozen(result):
                    self._view.values[tensor.name] = result.patched.cpu()
                results.append((tensor, result, digest))
        places = self._patched.parts.load(part)
        self._view.values.clear()
        pending: dict[str, _Pending] = {}
        for tensor, result, digest in results:
            layer = self._layer_of(tensor, places.get(tensor.name))
            if layer is not None and result is not None and not _is_frozen(result):
                pending[layer.name.removesuffix(".weight")] = _Pending(layer, tensor, result, digest)
            elif tensor.name not in self.done:
                self.write(tensor, result, digest, {})
        return pending

    def _restore(self, chosen: list[TensorPlan]) -> bool:
        """Take the values of a part that an interrupted run has written whole; a part of it is worked out again."""
        if not all(tensor.name in self.done for tensor in chosen):
            return False
        values = {tensor.name: self.stored(tensor.name) for tensor in chosen if tensor.action == "patch"}
        self._view.values |= {name: value for name, value in values.items() if value is not None}
        return all(value is not None for value in values.values())

    def _layer_of(self, tensor: TensorPlan, place: Place | None) -> Layer | None:
        """The linear layer whose weight a tensor is, whole, if it can be fitted again."""
        if place is None or len(place.parameters) != 1 or place.part is not None or place.turned:
            return None
        layer = self._layers.get(place.parameters[0])
        if layer is None or not _is_linear(layer) or not tensor.retain or tensor.experts or tensor.role != "linear":
            return None
        return layer if tuple(self._parameter(layer).shape) == tensor.shape else None

    def _parameter(self, layer: Layer) -> Tensor:
        parameter: Tensor = self._patched.network.get_parameter(layer.name)
        return parameter

    def _block_of(self, station: str) -> str:
        return self._patched.parts.part_of(f"{station}.weight")

    def _visit(self, station: str, waiting: list[Lane]) -> None:
        """Take all batches that wait at a block into it, or those that wait at a linear layer through it."""
        if self._block_of(station) == station:
            self._enter(station, waiting)
        elif station in self._groups:
            self._fit(self._groups.pop(station), station, waiting)
        for lane in waiting:
            self._pass(station, lane)

    def _enter(self, block: str, waiting: list[Lane]) -> None:
        """Load a block, and tell by a run of one batch in which order its layers are called, and which together."""
        for name in [name for name in self._loaded if not self._is_inside(name)]:
            for model in (self._tuned, self._base, self._patched):
                model.parts.drop(name)
            self._loaded.remove(name)
        if not self._seen.isdisjoint(self._patched.parts.tensors[block]):
            raise TailorError(f"the model calls its block {block} more than once", "pass --no-propagate")
        pending = self._load(block)
        for model in (self._tuned, self._base):
            model.parts.load(block)
        self._loaded.append(block)
        for lane in waiting:
            self._tokens[id(lane)] = math.prod(lane.held[0].shape[:-1])
        seen: dict[str, list[Tensor]] = {}  # in the order of the calls
        mates = [lane for lane in waiting if id(lane) not in self._mates]  # of the patched model
        if pending and mates:
            with self._moved(mates[0]), self.timer.stage("run"), _watching(self._patched.network, list(pending), seen):
                mates[0].compute()
        leaders: dict[tuple[int, ...], str] = {}
        for name, inputs in seen.items():
            if len(inputs) == 1:
                leader = leaders.setdefault(identity_of_input(inputs[0]), name)
                self._groups.setdefault(leader, _Group({})).layers[name] = pending.pop(name)
        self._lockstep.passed -= set(leaders.values())
        for layer in pending.values():
            self._write_plain(layer)

    def _is_inside(self, block: str) -> bool:
        """Whether a batch waits within a block."""
        return any((lane.wanted or "").startswith(f"{block}.") for lane in self._lockstep.lanes)

    @contextmanager
    def _moved(self, *lanes: Lane) -> Iterator[None]:
        """The hidden states of lanes are on the device within."""
        for lane in lanes:
            lane.move(self._spill.back)
        yield
        for lane in lanes:
            lane.move(self._spill.out)

    def _fit(self, group: _Group, station: str, waiting: list[Lane]) -> None:
        """Fold what goes into a group's layers in the patched model beside the same in the unpatched ones; then fit."""
        lanes = [lane for lane in waiting if id(lane) in self._mates]
        mates = [self._mates[id(lane)] for lane in lanes]
        group.aligned = len(waiting) == 2 * len(lanes) and all(
            mate.wanted == station and self._are_aligned(lane, mate) for lane, mate in zip(lanes, mates, strict=True)
        )
        for lane, mate in zip(lanes, mates, strict=True) if group.aligned else ():
            with self._moved(lane, mate), self.timer.stage("moments"):
                unpatched, patched = (one.held[0].flatten(0, -2) for one in (lane, mate))
                found = group.moments.setdefault(self._kinds[id(lane)], no_moments(patched.shape[-1], self.device))
                accumulate_moments_(found, patched, unpatched)
        self._refit(group)

    def _are_aligned(self, lane: Lane, mate: Lane) -> bool:
        """Whether two models' inputs are of the same tokens; rows of tokens that were routed here may not be."""
        shape = mate.held[0].shape
        rows = math.prod(shape[:-1])
        return lane.held[0].shape == shape and (len(shape) > 2 or rows == self._tokens.get(id(lane), rows))

    def _pass(self, station: str, lane: Lane) -> None:
        """Run a lane through a linear layer, or into a block, and on to where it waits next."""
        lane.move(self._spill.back)
        with self.timer.stage("run"):
            model = self._runs[id(lane)]
            module = model.stations[station]
            if module is model.head:  # no one reads its logits
                assert isinstance(module, nn.Linear)
                lane.set_result(nn.functional.linear(lane.held[0][..., -1:, :], module.weight, module.bias))
            else:
                lane.run_inside()
            lane.advance()
        lane.move(self._spill.out)

    def _refit(self, group: _Group) -> None:
        """Fit layers again, put them into the patched model, and write them."""
        sound = group.aligned and {*group.moments} == {NEW, RETAINED}
        for moments in group.moments.values():
            complete_(moments)
        for layer in group.layers.values():
            if not sound:
                self._write_plain(layer)
                continue
            try:
                result, facts = self._refitted(layer, group.moments[NEW], group.moments[RETAINED])
            except NumericalError as error:
                raise NumericalError(f"tensor {layer.tensor.name!r}: {error.message}", error.hint) from error
            assert result.patched is not None
            with torch.no_grad():
                self._parameter(layer.layer).copy_(result.patched)
            if layer.tensor.name not in self.done:
                self.write(layer.tensor, result, layer.digest, facts)
        group.moments.clear()

    def _refitted(self, layer: _Pending, new: Moments, retained: Moments) -> tuple[LayerResult, dict[str, Any]]:
        tensor = layer.tensor
        base, tuned = (source.read(tensor.name).to(self.device) for source in (self.base, self.tuned))
        assert layer.result.patched is not None
        with self.timer.stage("solve"):
            found = refit(
                *(base, tuned, layer.result.patched, layer.result.mask, new, retained),
                retain_weight=self.options.retain_weight,
                damping=self.options.effective_damping,
                transposed=tensor.transposed,
                tolerance=self.options.tolerance,
                max_iterations=self.options.max_iterations,
            )
        with self.timer.stage("measure"):
            figures = self._figures(layer, base, tuned, found.patched, found.iterations, found.residual)
        facts = {"propagated": True, "input_shift": new.shift, "retained_input_shift": retained.shift}
        return LayerResult(found.patched, layer.result.mask, figures), facts

    def _figures(
        self, layer: _Pending, base: Tensor, tuned: Tensor, patched: Tensor, iterations: int, residual: float
    ) -> LayerFigures:
        """The figures of the plain patch, with what the fit has changed: on the unpatched inputs, as all reports."""
        tensor = layer.tensor
        assert tensor.hessian is not None
        sources = ((self.stats, tensor.hessian), (self.retain, tensor.retain[0]))
        hessians = [unpack_triangle(s.load(name).to(self.device), s.hessians[name].size) for s, name in sources]
        how = (tensor.transposed, iterations, residual)
        return refit_figures(layer.result.figures, base, tuned, patched, hessians[0], hessians[1], *how)

    def _write_plain(self, layer: _Pending) -> None:
        if layer.tensor.name not in self.done:
            self.write(layer.tensor, layer.result, layer.digest, {})


def _options_of(stats: Stats) -> CalibrateOptions:
    """How a model ran when it was calibrated: its dtype and its batches."""
    saved = stats.manifest["options"]
    return CalibrateOptions(dtype=saved["dtype"], batch_size=saved["batch_size"])


def _stations(network: Any, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Where batches may wait for one another: blocks and linear layers, in the order of the modules."""
    linear = {layer.name.removesuffix(".weight") for layer in find_layers(network).values() if _is_linear(layer)}
    return {name: module for name, module in network.named_modules() if name in blocks or name in linear}


def _is_linear(layer: Layer) -> bool:
    """Whether one module alone holds a layer, as a matrix that multiplies its inputs, whole."""
    return layer.role == "linear" and len(layer.modules) == 1 and not is_convolution(layer.modules[0])


def _is_frozen(result: LayerResult) -> bool:
    return result.figures.zero_delta == result.figures.numel


@contextmanager
def _watching(network: Any, names: list[str], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """Note the inputs of the named modules while this lasts, in the order of the calls."""

    def hook_for(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: seen.setdefault(name, []).append(first_tensor(args, kwargs))

    handles = [
        network.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
