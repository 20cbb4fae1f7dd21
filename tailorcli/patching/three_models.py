"""The three models of propagation: the tuned one, the base, and the one that is being patched, loaded part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailorcli.adapters.checkpoint import AdaptedCheckpoint
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import TensorInfo
from tailorcli.models.config import read_config
from tailorcli.models.layers import Layer, find_layers, is_convolution
from tailorcli.models.lockstep import find_blocks, in_call_order
from tailorcli.models.parts import Parts
from tailorcli.models.places import Place
from tailorcli.models.running import output_head
from tailorcli.models.skeleton import empty_model
from tailorcli.options import CalibrateOptions

if TYPE_CHECKING:
    from tailorcli.device import StageTimer
    from tailorcli.patching.run import Run


@dataclass(frozen=True)
class PartModel:
    """One of the three, without its weights but those of the parts that are loaded."""

    network: Any
    stations: dict[str, nn.Module]  # where its batches may wait: blocks and linear layers
    parts: Parts
    places: dict[str, Place] = field(default_factory=dict)  # where the tensors went of parts that were loaded

    @classmethod
    def of(
        cls,
        stored: Checkpoint,
        tuned: Checkpoint,
        options: CalibrateOptions,
        device: torch.device,
        timer: StageTimer,
    ) -> PartModel:
        """The model of a checkpoint ``stored``, or of an adapter ``tuned`` on it, run as ``options`` say."""
        network = empty_model(stored, read_config(stored.path), options)
        blocks = find_blocks(network)
        parts = Parts(network, list(blocks), stored, tuned, device, timer)
        linear = {layer.name.removesuffix(".weight") for layer in find_layers(network).values() if is_linear(layer)}
        stations = {name: module for name, module in network.named_modules() if name in blocks or name in linear}
        return cls(network, in_call_order(network, stations), parts)

    def load(self, part: str) -> dict[str, Place]:
        """Load a part, and give where each of its tensors went."""
        found = self.parts.load(part)
        self.places.update(found)
        return found

    @property
    def head(self) -> nn.Module | None:
        """Its output layer."""
        return output_head(self.network)

    def waits_at_head(self) -> bool:
        """Whether its batches may wait at its output layer: what goes in is then wanted whole."""
        return self.head in self.stations.values()


class PatchedView(Checkpoint):
    """The base, but with the ``values`` of tensors that are patched in their place, and the config in ``folder``.

    A tensor that is one with another, under a further name, has the value of that: ``copies`` gives its name.
    """

    def __init__(self, base: Checkpoint, folder: Path, copies: Mapping[str, str]) -> None:
        super().__init__(folder, base.tensors, base.shards)
        self._base = base
        self.dequantized = base.dequantized
        self._copies = copies
        self.values: dict[str, Tensor] = {}

    @property
    def scales(self) -> frozenset[str]:
        """Those of the base."""
        return self._base.scales

    def read(self, name: str, pinned: bool = False) -> Tensor:
        """One tensor in its stored dtype, in memory of its own: a value where the value is, else on the CPU."""
        value = self.values.get(self._copies.get(name, name))
        return super().read(name, pinned) if value is None else value.clone()

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``start`` on."""
        value = self.values.get(self._copies.get(info.name, info.name))
        if value is None:
            self._base.read_into(info, buffer, start)
        else:
            raw = value.reshape(-1).view(torch.uint8)[start : start + len(buffer)]
            buffer[:] = raw.cpu().numpy().data


@dataclass(frozen=True)
class ThreeModels:
    """The models that go in step; the unpatched two begin with the weights that lie in no block."""

    tuned: PartModel
    base: PartModel
    patched: PartModel
    view: PatchedView  # from which the patched one is loaded

    @classmethod
    def of(cls, run: Run, view: PatchedView) -> ThreeModels:
        """The models of a patch's inputs, and of the ``view`` of what it makes."""
        inputs, device, timer, trust = run.inputs, run.device, run.timer, run.options.trust_remote_code
        assert inputs.stats is not None
        assert inputs.retain_stats is not None
        stored = inputs.base if isinstance(inputs.tuned, AdaptedCheckpoint) else inputs.tuned
        of_new, of_retained = inputs.stats.run_options(trust), inputs.retain_stats.run_options(trust)
        with timer.stage("load"):
            models = cls(
                PartModel.of(stored, inputs.tuned, of_new, device, timer),
                PartModel.of(inputs.base, inputs.base, of_retained, device, timer),
                PartModel.of(view, view, of_new, device, timer),
                view,
            )
        models.load_unpatched("")
        return models

    @property
    def each(self) -> tuple[PartModel, PartModel, PartModel]:
        """All of them."""
        return self.tuned, self.base, self.patched

    def load_unpatched(self, part: str) -> None:
        """Load a part of the tuned model and of the base."""
        for model in (self.tuned, self.base):
            model.load(part)

    def drop(self, part: str) -> None:
        """Give up a part of all three."""
        for model in self.each:
            model.parts.drop(part)


def is_linear(layer: Layer) -> bool:
    """Whether one module alone holds a layer, as a matrix that multiplies its inputs, whole."""
    return layer.role == "linear" and len(layer.modules) == 1 and not is_convolution(layer.modules[0])
