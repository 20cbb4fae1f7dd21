"""Patch a model in the order in which it runs: each layer is fitted from the inputs that the patched model gives it.

Three models go in step, block by block (``models.lockstep``): the tuned one on the samples of its statistics, the base
on those that it retains, and on both the model that is being patched. A block is first patched by itself, as without
propagation. Then its linear layers are fitted to the outputs of the unpatched models (``core.propagation``) in the
order in which they are called, those that share their input together, and the patched model goes on through the
result. What is no linear layer, and a layer whose inputs in two models cannot be told to be of the same tokens, keeps
its plain patch.

Several ranks have the three models each, and divide the batches. A group's moments are summed over all; each rank
patches, fits and writes the tensors that are its own, and all put the values of all into their patched model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailorcli.adapters.checkpoint import config_folder
from tailorcli.calibration.gathering import NotInOnePassError
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import torch_dtype
from tailorcli.core.figures import LayerFigures, figures_after_fit
from tailorcli.core.products import exact_product
from tailorcli.core.propagation import (
    Moments,
    accumulate_moments_,
    complete_,
    no_moments,
    propagated_errors,
    solve_propagated,
)
from tailorcli.core.tailor import LayerResult
from tailorcli.data.samples import count_tokens, fitted_on, make_batches
from tailorcli.distributed import first_of_all, gathered, mine, now_on, ranks, told
from tailorcli.errors import NumericalError, TailorError
from tailorcli.models.layers import Layer, find_layers
from tailorcli.models.lockstep import Lane, Lockstep
from tailorcli.models.places import Place
from tailorcli.models.running import (
    first_tensor,
    forward,
    identity_of_input,
    last_logits_only,
    samples_in,
    to_device,
)
from tailorcli.models.spill import Spill
from tailorcli.patching.cost import COMPARED
from tailorcli.patching.measuring import KINDS, NEW, RETAINED, Measuring
from tailorcli.patching.run import Run
from tailorcli.patching.sharing import join_moments, of_all, shared, summed_pairs
from tailorcli.patching.stream import tailored
from tailorcli.patching.three_models import PartModel, PatchedView, ThreeModels, is_linear
from tailorcli.runs.loop import LastPrepared
from tailorcli.runs.plan import TensorPlan
from tailorcli.system import give_back_memory

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

    Result = tuple[TensorPlan, LayerResult | None, str]


@dataclass(eq=False)
class _Batch:
    """One batch on its way: through its unpatched ``model`` in ``lane``, and through the patched one in ``mate``.

    Some go through the ``other`` unpatched model as well, in ``rival``, only to be measured.
    """

    kind: str
    model: PartModel
    other: PartModel
    number: int  # among those of all ranks
    lane: Lane
    mate: Lane
    rival: Lane | None = None
    tokens: int | None = None  # of its hidden states, as they went into the block where it is


@dataclass
class _Pending:
    """A linear layer that has its plain patch and waits to be fitted again; ``result`` is None but on its own rank."""

    layer: Layer
    tensor: TensorPlan
    result: LayerResult | None
    digest: str


@dataclass
class _Apart:
    """The sum of ||W_base x_base - W_tuned x_tuned||^2 over so many tokens: how far a layer's two outputs are apart."""

    total: float = 0.0
    tokens: int = 0

    @property
    def energy(self) -> float | None:
        """Twice the mean over the tokens; None without any."""
        return 2.0 * self.total / self.tokens if self.tokens else None


@dataclass
class _Group:
    """Linear layers that see the very same input, by the names of their modules."""

    layers: dict[str, _Pending]
    moments: dict[str, Moments] = field(default_factory=dict)  # by kind of data
    apart: dict[tuple[str, str], _Apart] = field(default_factory=dict)  # by kind of data and layer
    aligned: bool = True  # the two models' inputs are of the same tokens


def patch_propagated(
    tensors: Iterable[TensorPlan],
    run: Run,
    scratch: Path,
    measuring_of: Callable[[PartModel, PartModel], Measuring] | None = None,
    owners: Mapping[str, int] | None = None,
) -> None:
    """Patch and write each of ``tensors`` once; hidden states wait in ``scratch`` where they outgrow the memory.

    ``owners`` are the ranks that patch each, where there are several. ``measuring_of`` the tuned model and the base
    measures their statistics on the way. Raises TailorError, and NotInOnePassError where these cannot be used as they
    are measured.
    """
    with ExitStack() as stack:
        chosen, inputs = list(tensors), run.inputs
        copies = {copy: tensor.name for tensor in chosen for copy in tensor.copies}
        view = stack.enter_context(closing(PatchedView(inputs.base, config_folder(inputs.tuned), copies)))
        models = ThreeModels.of(run, view)
        for model in models.each:
            if not model.waits_at_head():
                stack.enter_context(last_logits_only(model.network))
        measuring = None if measuring_of is None else measuring_of(models.tuned, models.base)
        propagation = Propagation(chosen, run, scratch, models, measuring, owners)
        propagation.through_the_models()
    propagation.finish()  # without the models


class Propagation:
    """A propagating patch under way; ``patch_propagated`` runs it."""

    def __init__(
        self,
        tensors: list[TensorPlan],
        run: Run,
        scratch: Path,
        models: ThreeModels,
        measuring: Measuring | None = None,
        owners: Mapping[str, int] | None = None,
    ) -> None:
        assert run.inputs.stats is not None
        assert run.inputs.retain_stats is not None
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._owners = {tensor.name: 0 for tensor in tensors} if owners is None else owners
        self._changed: set[str] = set()  # tensors that a rank has patched
        self._run = run
        self._stats, self._retain_stats = run.inputs.stats, run.inputs.retain_stats
        self._device = run.device
        self._timer = run.timer
        self._sums = torch.float64 if self._stats.options.deterministic else torch.float32
        self._models = models
        self._measuring = measuring
        self._layers = find_layers(models.patched.network)
        self._loaded: str | None = None  # the block that is
        self._hessians: LastPrepared[tuple[Tensor, Tensor]] = LastPrepared()  # of the layers that share their input
        self._reader = ThreadPoolExecutor(1, "hessians")
        self._ahead: tuple[tuple[str, str], Future[list[Tensor]]] | None = None  # of the group that is next
        self._seen: set[str] = set()  # tensors of the parts that were loaded
        self._groups: dict[str, _Group] = {}  # that are not fitted yet, by the layer that is called first
        if measuring is None:
            self._groups |= _each_alone(self._load(""))
        else:  # as the base has it, until it is measured
            models.patched.load("")
        self._spill = Spill.measured(run.device, scratch)
        kinds = (
            (NEW, self._stats, models.tuned, models.base),
            (RETAINED, self._retain_stats, models.base, models.tuned),
        )
        every: list[tuple[str, PartModel, PartModel, Inputs, bool]] = []
        for kind, stats, model, other in kinds:
            samples = fitted_on(stats.samples()) if run.holds_out else stats.samples()
            batches = list(make_batches(samples, stats.options.together))
            spread = _spread([samples_in(batch) for batch in batches])
            every += [(kind, model, other, *pair) for pair in zip(batches, spread, strict=True)]
        found: list[tuple[str, PartModel, PartModel, int, int]] = []  # a batch's lanes are two or three
        calls: list[tuple[Callable[[], Any], int]] = []  # through the unpatched models
        behind: list[tuple[Callable[[], Any], int]] = []
        for number in mine([count_tokens(batch) * (3 if compared else 2) for *_, batch, compared in every]):
            kind, model, other, batch, compared = every[number]
            further = (models.patched, *((other,) if compared else ()))
            call = self._call(model.network, batch)
            calls.append((call if measuring is None else measuring.watched(kind, call), samples_in(batch)))
            behind += [(self._call(one.network, batch), samples_in(batch)) for one in further]
            found.append((kind, model, other, number, len(further)))
        others = [models.base.stations, models.patched.stations]
        self._lockstep = Lockstep(models.tuned.stations, [*calls, *behind], others)
        self._lockstep.passed = {name for name in models.tuned.stations if self._block_of(name) not in ("", name)}
        self._batches: dict[Lane, _Batch] = {}  # by each of its lanes
        first, lanes = self._lockstep.lanes[: len(calls)], iter(self._lockstep.lanes[len(calls) :])
        for lane, (kind, model, other, number, count) in zip(first, found, strict=True):
            mate, *rivals = (next(lanes) for _ in range(count))
            batch_of = _Batch(kind, model, other, number, lane, mate, rivals[0] if rivals else None)
            self._batches |= dict.fromkeys((lane, mate, *rivals), batch_of)

    def through_the_models(self) -> None:
        """Take all batches through the models, and fit the layers that they reach."""
        measuring = self._measuring
        if measuring is None:
            self._lockstep.run(lambda lane: None, self._visit, self._spill, first_of_all)
            return
        own = {
            kind: [b.lane for lane, b in self._batches.items() if lane is b.lane and b.kind == kind] for kind in KINDS
        }
        with measuring.running(own):
            self._lockstep.run(self._start_measured, self._visit, self._spill)
        left = [tensor for tensor in self._tensors.values() if tensor.name not in self._seen]
        for tensor in measuring.settle(left, None):
            self._tensors[tensor.name] = tensor

    def finish(self) -> None:
        """Write the layers that this data never reaches, and the tensors that no model loads."""
        for group in self._groups.values():
            self._finish_group(group)
        left = [tensor for tensor in self._tensors.values() if tensor.name not in self._seen and self._is_own(tensor)]
        for tensor, result, digest in tailored(left, self._run):
            self._write(tensor, result, digest)

    def _is_own(self, tensor: TensorPlan) -> bool:
        return self._owners[tensor.name] == ranks().rank

    def _start_measured(self, lane: Lane) -> None:
        """The patched model starts behind the others: with what these have measured of what lies before its blocks."""
        assert self._measuring is not None
        if lane is not self._batches[lane].lane:
            self._patch_outside()
        self._measuring.turn(lane)

    def _patch_outside(self) -> None:
        """Patch what lies outside the blocks once the unpatched models have passed it, before the patched one does."""
        measuring = self._measuring
        if measuring is None or not (passed := measuring.passed()):
            return
        left = [tensor for tensor in self._tensors.values() if tensor.name not in self._seen]
        chosen = measuring.settle(left, passed)
        for tensor in chosen:
            self._tensors[tensor.name] = tensor
        self._seen |= {tensor.name for tensor in chosen}
        results = self._patch_alone(chosen)
        view, patched = self._models.view, self._models.patched
        for name, value in view.values.items():
            place = patched.places.get(name)
            if place is None or len(place.parameters) != 1 or place.part is not None or place.transposed:
                raise NotInOnePassError(f"{name} is not one parameter of the model")
            with torch.no_grad():
                patched.network.get_parameter(place.parameters[0]).copy_(value)
        view.values.clear()
        self._groups |= _each_alone(self._sort_out(results, patched.places))

    def _call(self, network: Any, batch: Inputs) -> Callable[[], Any]:
        return lambda: forward(network, to_device(batch, self._device))

    def _load(self, part: str) -> dict[str, _Pending]:
        """Patch a part's tensors by themselves, load them, and write those that stay so; gives the others by module."""
        chosen = self._tensors_of(part)
        self._seen |= {tensor.name for tensor in chosen}
        results = self._patch_alone(chosen)
        places = self._models.patched.load(part)
        self._models.view.values.clear()
        return self._sort_out(results, places)

    def _tensors_of(self, part: str) -> list[TensorPlan]:
        """The tensors of a part in the plan's order."""
        names = {name for name in self._models.patched.parts.tensors[part] if name in self._tensors}
        return [tensor for tensor in self._tensors.values() if tensor.name in names]

    def _patch_alone(self, chosen: Sequence[TensorPlan]) -> list[Result]:
        """Patch tensors by themselves, or take their values from an interrupted run, into the view.

        Of another rank's tensors the results have the value in the view alone.
        """
        results: dict[str, Result] = {}
        if self._restore(chosen):
            return []
        values: dict[str, Tensor] = {}
        for tensor, result, digest in tailored([tensor for tensor in chosen if self._is_own(tensor)], self._run):
            if result is not None and result.patched is not None and not _is_frozen(result):
                values[tensor.name] = result.patched
            results[tensor.name] = (tensor, result, digest)
        changed = of_all(values)
        self._changed |= changed
        for tensor in chosen:
            if tensor.name in changed:
                value = shared(values.pop(tensor.name, None), tensor, self._owners[tensor.name], self._device)
                self._models.view.values[tensor.name] = value
        return [results.get(tensor.name, (tensor, None, "")) for tensor in chosen]

    def _sort_out(self, results: Iterable[Result], places: Mapping[str, Place]) -> dict[str, _Pending]:
        """Write what stays as it is patched; gives the layers that are fitted again, by module."""
        pending: dict[str, _Pending] = {}
        for tensor, result, digest in results:
            layer = self._layer_of(tensor, places.get(tensor.name))
            if layer is not None and tensor.name in self._changed:
                pending[layer.name.removesuffix(".weight")] = _Pending(layer, tensor, result, digest)
            elif self._is_own(tensor):
                self._write(tensor, result, digest)
        return pending

    def _restore(self, chosen: Sequence[TensorPlan]) -> bool:
        """Take the values of a part that an interrupted run has written whole; a part of it is worked out again."""
        if not all(self._run.is_done(tensor.name) for tensor in chosen):
            return False
        values = {tensor.name: self._run.written(tensor.name) for tensor in chosen if tensor.action == "patch"}
        self._models.view.values |= {name: value for name, value in values.items() if value is not None}
        return all(value is not None for value in values.values())

    def _layer_of(self, tensor: TensorPlan, place: Place | None) -> Layer | None:
        """The linear layer whose weight a tensor is, whole, if it can be fitted again."""
        if place is None or len(place.parameters) != 1 or not tensor.retained_hessians:
            return None
        layer = self._layers.get(place.parameters[0])
        if layer is None or not is_linear(layer):
            return None
        return layer if tuple(self._parameter(layer).shape) == tensor.shape else None

    def _parameter(self, layer: Layer) -> Tensor:
        parameter: Tensor = self._models.patched.network.get_parameter(layer.name)
        return parameter

    def _block_of(self, station: str) -> str:
        return self._models.patched.parts.part_of(f"{station}.weight")

    def _visit(self, station: str, waiting: list[Lane]) -> None:
        """Take all batches that wait at a block into it, or those that wait at a linear layer through it."""
        if self._block_of(station) == station:
            self._start_block(station, waiting)
        elif station in self._groups:
            group = self._groups.pop(station)
            self._accumulate_group(group, station, waiting)
            self._finish_group(group)
            give_back_memory()  # every batch has freed what it held since the last group: a sixth of the peak
        with self._timer.stage("run"):  # as a whole: copies of one batch go on beside the work on the next
            for lane in waiting:
                if lane is self._batches[lane].lane:
                    self._run_through(station, lane)
            self._patch_outside()
            for lane in waiting:
                if lane is not self._batches[lane].lane:
                    self._run_through(station, lane)

    def _start_block(self, block: str, waiting: list[Lane]) -> None:
        """Load a block, and tell by a run of one batch in which order its layers are called, and which together."""
        if self._loaded is not None:
            self._models.drop(self._loaded)
            if self._measuring is not None:
                self._measuring.forget(self._loaded)
        if not self._seen.isdisjoint(self._models.patched.parts.tensors[block]):
            raise TailorError(f"the model calls its block {block} more than once", "pass --no-propagate")
        self._models.load_unpatched(block)
        if self._measuring is not None:
            self._measure(block, waiting)
        pending = self._load(block)
        self._loaded = block
        for lane in waiting:
            batch = self._batches[lane]
            if lane is batch.lane:
                batch.tokens = math.prod(lane.held[0].shape[:-1])
        leaders = self._leaders(list(pending), waiting)
        for name, leader in leaders.items():
            self._groups.setdefault(leader, _Group({})).layers[name] = pending.pop(name)
        self._lockstep.passed -= set(leaders.values())
        for layer in pending.values():
            self._write_plain(layer)

    def _leaders(self, names: list[str], waiting: list[Lane]) -> dict[str, str]:
        """Layers that are called once, in the order of the calls, each with the first of those that see the same.

        The rank that has the first of the batches that wait here tells it the others.
        """
        mates = [lane for lane in waiting if lane is self._batches[lane].mate] if names else []
        numbers = gathered(min((self._batches[lane].number for lane in mates), default=None))
        known = [number for number in numbers if number is not None]
        if not known:
            return {}
        source, seen = numbers.index(min(known)), dict[str, list[Tensor]]()  # in the order of the calls
        if source == ranks().rank:
            network = self._models.patched.network
            with self._moved(mates[0]), self._timer.stage("run"), _watching(network, names, seen):
                mates[0].compute()
        leaders: dict[tuple[int, ...], str] = {}
        alike = {n: leaders.setdefault(identity_of_input(x[0]), n) for n, x in seen.items() if len(x) == 1}
        return told(alike, source)

    def _measure(self, block: str, waiting: list[Lane]) -> None:
        """Take a block's statistics, and plan its tensors by them, but where an interrupted run has written them."""
        measuring = self._measuring
        assert measuring is not None
        chosen = self._tensors_of(block)
        if self._restore(chosen):
            return
        measuring.measure(block, waiting, self._spill, advance=False)
        for name in [tensor.name for tensor in chosen]:
            del self._tensors[name]
        self._tensors |= {tensor.name: tensor for tensor in measuring.plan(chosen)}

    @contextmanager
    def _moved(self, *lanes: Lane) -> Iterator[None]:
        """The hidden states of lanes are on the device within."""
        for lane in lanes:
            lane.move(self._spill.back)
        yield
        for lane in lanes:
            lane.move(self._spill.out)

    def _accumulate_group(self, group: _Group, station: str, waiting: list[Lane]) -> None:
        """Fold what goes into a group's layers in the patched model beside the same in the unpatched ones."""
        batches = [batch for lane in waiting if (batch := self._batches[lane]).lane is lane]
        mates = sum(self._batches[lane].mate is lane for lane in waiting)
        own = len(batches) == mates and all(batch.mate.wanted == station and _are_aligned(batch) for batch in batches)
        group.aligned = all(gathered(own))
        if group.aligned:
            self._read_ahead(group)
        with self._timer.stage("moments"):
            for batch in batches if group.aligned else ():
                rivals = [batch.rival] if batch.rival is not None and batch.rival.wanted == station else []
                rivals = [rival for rival in rivals if rival.held[0].shape == batch.lane.held[0].shape]
                with self._moved(batch.lane, batch.mate, *rivals):
                    unpatched, patched = (lane.held[0].flatten(0, -2) for lane in (batch.lane, batch.mate))
                    found = group.moments.setdefault(
                        batch.kind, no_moments(patched.shape[-1], self._device, self._sums)
                    )
                    accumulate_moments_(found, patched, unpatched)
                    for rival in rivals:
                        self._measure_apart(group, batch, rival)
            if group.aligned and not ranks().alone:
                join_moments(group.moments, self._device, self._sums)
                energies = summed_pairs({key: (found.total, found.tokens) for key, found in group.apart.items()})
                group.apart = {key: _Apart(*found) for key, found in energies.items()}

    def _measure_apart(self, group: _Group, batch: _Batch, rival: Lane) -> None:
        """Add how far a batch's outputs of a group's layers in the two unpatched models are apart."""
        for name in group.layers:
            first, second = (
                exact_product(lane.held[0].flatten(0, -2), _weight_of(model.stations[name]).T)
                for lane, model in ((batch.lane, batch.model), (rival, batch.other))
            )
            apart = group.apart.setdefault((batch.kind, name), _Apart())
            apart.total += float((first - second).square().sum(dtype=torch.float64))
            apart.tokens += len(first)

    def _run_through(self, station: str, lane: Lane) -> None:
        """Run a lane through a linear layer, or into a block, and on to where it waits next."""
        lane.move(self._spill.back)
        batch = self._batches[lane]
        model = {batch.lane: batch.model, batch.mate: self._models.patched}.get(lane, batch.other)
        module = model.stations[station]
        if module is model.head:  # no one reads its logits
            assert isinstance(module, nn.Linear)
            lane.set_result(nn.functional.linear(lane.held[0][..., -1:, :], module.weight, module.bias))
        else:
            lane.run_inside()
        if self._measuring is not None:
            self._measuring.turn(lane)
        lane.advance()
        lane.move(self._spill.out)

    def _finish_group(self, group: _Group) -> None:
        """Fit layers again, put them into the patched model, and write them."""
        sound = group.aligned and {*group.moments} == {NEW, RETAINED}
        for moments in group.moments.values():
            complete_(moments)
        fitted: dict[str, Tensor] = {}
        for layer in group.layers.values():
            if not sound:
                self._write_plain(layer)
            elif layer.result is not None:
                fitted[layer.tensor.name] = self._fit(layer, layer.result, group)
        for layer in group.layers.values() if sound else ():
            owner = self._owners[layer.tensor.name]
            value = shared(fitted.pop(layer.tensor.name, None), layer.tensor, owner, self._device)
            with torch.no_grad():
                self._parameter(layer.layer).copy_(value)
        group.moments.clear()
        self._hessians = LastPrepared()

    def _fit(self, layer: _Pending, plain: LayerResult, group: _Group) -> Tensor:
        """Fit a layer again, from its ``plain`` patch on, and write it. Raises NumericalError, which names it."""
        now_on(layer.tensor.name)
        try:
            result, facts = self._solve_layer(layer, plain, group)
        except NumericalError as error:
            raise NumericalError(f"tensor {layer.tensor.name!r}: {error.message}", error.hint) from error
        assert result.patched is not None
        self._write(layer.tensor, result, layer.digest, facts)
        return result.patched

    def _solve_layer(self, layer: _Pending, plain: LayerResult, group: _Group) -> tuple[LayerResult, dict[str, Any]]:
        """The fitted layer with its figures, and what its record says besides."""
        tensor, mask = layer.tensor, plain.mask
        new, retained = group.moments[NEW], group.moments[RETAINED]
        name = layer.layer.name.removesuffix(".weight")
        energy, drift_energy = (group.apart.get((kind, name), _Apart()).energy for kind in (NEW, RETAINED))
        assert plain.patched is not None
        with self._timer.stage("load"):
            base = self._weight(self._run.inputs.base, self._models.base, tensor.name)
            tuned = self._weight(self._run.inputs.tuned, self._models.tuned, tensor.name)
        with self._timer.stage("solve"):
            found = solve_propagated(
                *(base, tuned, plain.patched, mask, new, retained),
                retain_weight=self._run.options.retain_weight,
                damping=self._run.options.effective_damping,
                transposed=tensor.transposed,
                tolerance=self._run.options.tolerance,
                max_iterations=self._run.options.max_iterations,
            )
        patched = self._run.inputs.base.rounded(tensor.name, found.patched, mask)
        with self._timer.stage("measure"):
            unpatched = self._unpatched_figures(tensor, plain.figures, (base, tuned, patched))
            errors = propagated_errors(
                *(base, tuned, patched, mask, new, retained),
                output_energy=energy,
                drift_energy=drift_energy,
                transposed=tensor.transposed,
            )
        figures = replace(unpatched, **asdict(errors), iterations=found.iterations, residual=found.residual)
        facts = {"propagated": True, "input_shift": new.shift, "retained_input_shift": retained.shift}
        facts |= {f"{name}_unpatched_inputs": getattr(unpatched, name) for name in asdict(errors)}
        return LayerResult(patched, mask, figures), facts

    def _weight(self, source: Checkpoint, model: PartModel, name: str) -> Tensor:
        """A tensor of a checkpoint on the device: as its ``model`` has it where that is to the bit, else read again."""
        place, dtype = model.places.get(name), torch_dtype(source.tensors[name].dtype)
        if place is not None and len(place.parameters) == 1 and place.part is None and not place.transposed:
            held: Tensor = model.network.get_parameter(place.parameters[0]).detach()
            if held.dtype == dtype and tuple(held.shape) == source.tensors[name].shape and held.device.type != "meta":
                return held
        pinned = self._device.type == "cuda"
        return source.read(name, pinned).to(self._device, non_blocking=pinned)

    def _unpatched_figures(
        self, tensor: TensorPlan, plain: LayerFigures, values: tuple[Tensor, Tensor, Tensor]
    ) -> LayerFigures:
        """The figures of the plain patch, with what the fit has changed: on the inputs of the unpatched models.

        ``values`` are the tensor's in the base, in tuned and patched.
        """
        names = _both_hessians(tensor)
        found = self._hessians.of(names, lambda: self._unpack(names))
        assert found is not None
        hessian, retained = found
        return figures_after_fit(plain, *values, hessian, retained, tensor.transposed)

    def _unpack(self, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
        """Two Hessians of the unpatched models' inputs, (I, I) on the device."""
        ahead, self._ahead = self._ahead, None
        packed = ahead[1].result() if ahead is not None and ahead[0] == names else self._read_hessians(names)
        both = zip((self._stats, self._retain_stats), names, packed, strict=True)
        first, second = (source.unpack(name, stored.to(self._device)) for source, name, stored in both)
        return first, second

    def _read_hessians(self, names: tuple[str, str]) -> list[Tensor]:
        pinned, sources = self._device.type == "cuda", (self._stats, self._retain_stats)
        return [source.load(name, pinned) for source, name in zip(sources, names, strict=True)]

    def _read_ahead(self, group: _Group) -> None:
        """Begin to read the Hessians of a group's first layer, beside a GPU's work on its moments."""
        own = [layer.tensor for layer in group.layers.values() if layer.result is not None]
        if own and self._device.type == "cuda":
            names = _both_hessians(own[0])
            self._ahead = names, self._reader.submit(self._read_hessians, names)

    def _write_plain(self, layer: _Pending) -> None:
        if self._is_own(layer.tensor):
            self._write(layer.tensor, layer.result, layer.digest)

    def _write(
        self, tensor: TensorPlan, result: LayerResult | None, digest: str, facts: dict[str, Any] | None = None
    ) -> None:
        """Write a tensor, but where an interrupted run has."""
        if not self._run.is_done(tensor.name):
            self._run.write(tensor, result, digest, facts)


def _both_hessians(tensor: TensorPlan) -> tuple[str, str]:
    """A tensor's Hessians: of the new task's data and of the retained."""
    assert tensor.hessian is not None
    return tensor.hessian, tensor.retained_hessians[0]


def _each_alone(pending: Mapping[str, _Pending]) -> dict[str, _Group]:
    """Layers outside the blocks: each waits by itself."""
    return {name: _Group({name: layer}) for name, layer in pending.items()}


def _spread(sizes: list[int]) -> list[bool]:
    """Which of batches with so many samples are compared: some ``COMPARED`` samples, from all over them."""
    share = min(1.0, COMPARED / max(1, sum(sizes)))
    seen, taken, chosen = 0, 0, []
    for size in sizes:
        chosen.append(taken <= seen * share)
        seen += size
        taken += size if chosen[-1] else 0
    return chosen


def _are_aligned(batch: _Batch) -> bool:
    """Whether two models' inputs are of the same tokens; rows of tokens that were routed here may not be."""
    shape = batch.mate.held[0].shape
    rows = math.prod(shape[:-1])
    same = batch.lane.held[0].shape == shape
    return same and (len(shape) > 2 or batch.tokens is None or rows == batch.tokens)


def _weight_of(module: nn.Module) -> Tensor:
    """A linear layer's weight as (O, I), also of one that holds it as (I, O)."""
    weight = module.get_parameter("weight")
    return weight if isinstance(module, nn.Linear) else weight.T


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
