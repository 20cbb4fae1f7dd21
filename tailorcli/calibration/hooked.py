"""Layers that modules hold: hooks fold what goes into each, once for those that share their inputs.

A short run first finds out which modules are called and which of them see the very same input tensors (q, k and v;
gate and up): those share one Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from tailorcli.calibration.accumulators import Accumulator, Accumulators
from tailorcli.device import StageTimer, free_memory
from tailorcli.errors import DeviceError, TailorError
from tailorcli.models.layers import Call, Layer, detect_norm, is_convolution, layer_rows, normalised, reason_against
from tailorcli.models.running import first_tensor, identity_of_input

_REMEMBERED = 64  # inputs kept alive in the trial run: within so many calls, layers are found to share one
_NOT_CALLED = "its module is not called when the model runs on this data"


@dataclass
class _SharedInput:
    """An input that one layer of a group has folded in; it is held, or its address could come again."""

    inputs: Tensor
    identity: tuple[int, ...]
    awaited: set[str]  # the other layers of the group, until they have seen it, too


class HookedLayers:
    """Folds what goes into ``layers`` from whatever runs inside its contexts.

    Without a trial every layer has a Hessian of its own.
    """

    def __init__(
        self, layers: Sequence[Layer], accumulators: Accumulators, device: torch.device, timer: StageTimer, share: bool
    ) -> None:
        self.layers = list(layers)
        self._accumulators = accumulators
        self._device = device
        self._timer = timer
        self._centred: dict[str, bool | None] = {}  # layers that were called: whether a norm takes the mean off
        self._members: dict[str, list[str]] = {}  # of a group: the layers that were called in the trial
        self._shared: dict[str, list[_SharedInput]] = {}  # of a group: what not all its layers have seen yet
        self.calls = 0  # of modules, with a batch that counts
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
            self._check(layer, module, inputs, call)
            key = identity_of_input(inputs)
            if key not in alive:
                alive[key] = (next(numbers), inputs)
                if len(alive) > _REMEMBERED:
                    del alive[next(iter(alive))]
            seen.setdefault(layer.name, []).append(alive[key][0])

        with self._hooked(note):
            yield
        # In the order of their calls: a group has the name of the first that is called.
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
            self._members.setdefault(layer.group, []).append(layer.name)

    def groups(self) -> list[tuple[str, str | None, bool]]:
        """What the trial found: the layers in the order of their calls, each with its group, and whether it ran."""
        ran = {name for members in self._members.values() for name in members}
        return [(layer.name, layer.group, layer.name in ran) for layer in self.layers]

    def group_as(self, found: Sequence[tuple[str, str | None, bool]]) -> None:
        """Take over what another rank's trial found."""
        by_name = {layer.name: layer for layer in self.layers}
        self.layers = [by_name[name] for name, _, _ in found]
        self._members = {}
        for name, group, ran in found:
            by_name[name].group = group
            if ran and group is not None:
                self._members.setdefault(group, []).append(name)

    def reasons(self) -> dict[str, str]:
        """Why layers cannot have a Hessian, as far as what ran here showed."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason}

    def join_reasons(self, found: Mapping[str, str]) -> None:
        """Take over what ran on another rank showed."""
        for layer in self.layers:
            layer.reason = layer.reason or found.get(layer.name, "")
            if layer.reason:
                layer.group = None

    def allocate(self) -> None:
        """Make room for the Hessians of all groups. Raises DeviceError when they do not fit beside the model."""
        groups = {layer.group: layer for layer in self.layers if layer.group in self._members}
        width = self._accumulators.itemsize
        needed = sum(width * layer.size ** (2 if layer.role == "linear" else 1) for layer in groups.values())
        free = free_memory(self._device)
        if free is not None and needed > free:
            raise DeviceError(
                f"the Hessians need {needed / 1e9:.1f} GB on {self._device}, {free / 1e9:.1f} GB are free",
                "calibrate fewer tensors at a time with --include, pass --blockwise always, or use another --device",
            )
        for layer in groups.values():
            self._accumulator(layer)

    @contextmanager
    def folding(self, samples: Callable[[], int]) -> Iterator[None]:
        """Fold the inputs of every layer that runs here into its Hessian; ``samples()`` are those of its batch.

        Of a batch of 0 samples nothing is folded. Raises TailorError where layers that shared their inputs in the
        trial do not share them here.
        """

        def fold(layer: Layer, module: nn.Module, inputs: Tensor, call: Call) -> None:
            if samples() == 0:
                return
            self.calls += 1
            if layer.name not in self._centred:
                self._check(layer, module, inputs, call)
            if layer.reason:
                layer.group = None
            if layer.group is None or self._is_folded(layer, inputs):
                return
            with self._timer.queued("hessian"):
                self._add(self._accumulator(layer), layer, module, inputs, samples())

        with self._hooked(fold):
            yield
        self._require_all_seen()

    def settle(self) -> None:
        """Say of each layer that nothing reached that it has no Hessian."""
        for layer in self.layers:
            if layer.group is None or not self._accumulators.tokens_of(layer.group):
                layer.group, layer.reason = None, layer.reason or _NOT_CALLED

    def _check(self, layer: Layer, module: nn.Module, inputs: Tensor, call: Call) -> None:
        """Find out how a layer takes its inputs, at its first call."""
        centred = detect_norm(module, inputs, call) if layer.role == "norm" else None
        self._centred[layer.name] = centred
        layer.reason = layer.reason or reason_against(layer, module, inputs, centred)

    def _accumulator(self, layer: Layer) -> Accumulator:
        assert layer.group is not None
        return self._accumulators.get(layer.group, layer.role == "linear", layer.size)

    def _is_folded(self, layer: Layer, inputs: Tensor) -> bool:
        """Whether another layer of the group has folded this input; the first that sees it is to do it for all."""
        assert layer.group is not None
        others = {name for name in self._members.get(layer.group, ()) if name != layer.name}
        if not others:
            return False
        identity = identity_of_input(inputs)
        waiting = self._shared.setdefault(layer.group, [])
        for shared in waiting:
            if shared.identity == identity and layer.name in shared.awaited:
                shared.awaited.remove(layer.name)
                if not shared.awaited:
                    waiting.remove(shared)
                return True
        waiting.append(_SharedInput(inputs, identity, others))
        return False

    def _require_all_seen(self) -> None:
        """Whatever one layer of a group has folded in, the others have seen by now."""
        for group, waiting in self._shared.items():
            if waiting:
                other = next(iter(sorted(waiting[0].awaited)))
                first = group if other != group else next(n for n in self._members[group] if n != other)
                raise TailorError(
                    f"{other} and {first} shared their input in a trial run and do not now",
                    "calibrate them one at a time with --include",
                )

    def _add(self, accumulator: Accumulator, layer: Layer, module: nn.Module, inputs: Tensor, samples: int) -> None:
        """Fold a layer's inputs: rows (..., I), or ids for an embedding."""
        if layer.role == "linear":
            for rows in layer_rows(module, inputs):
                accumulator.add_rows(rows)
        elif layer.role == "embedding":
            accumulator.add_ids(inputs, samples)
        else:
            accumulator.add_channels(normalised(module, inputs, bool(self._centred[layer.name])).flatten(0, -2))

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
