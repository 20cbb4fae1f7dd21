"""Parameters that no layer holds (fused experts, routers, class tokens): the products that they enter are folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from tailorcli.calibration.accumulators import Accumulators
from tailorcli.calibration.stats import BIAS_HESSIAN, expert_name
from tailorcli.device import StageTimer
from tailorcli.models.layers import Layer
from tailorcli.models.products import ProductWatch, Use

_SEVERAL_WAYS = "it is used in more than one way"


class BareParameters:
    """Folds what each of ``layers`` is multiplied with; its first use says what it is."""

    def __init__(
        self, layers: Sequence[Layer], model: nn.Module, accumulators: Accumulators, timer: StageTimer
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self._model = model
        self._accumulators = accumulators
        self._timer = timer
        self.calls = 0  # uses, in batches that count

    def folding(self, samples: Callable[[], int]) -> AbstractContextManager[object]:
        """Fold all uses in what this thread runs inside; ``samples()`` are those of its batch, 0 where none count."""
        if not self.layers:
            return nullcontext()
        # Parameters as they are now: weights come and go block by block.
        parameters = {name: self._model.get_parameter(name) for name in self.layers}
        owners = {name: self._model.get_submodule(name.rpartition(".")[0]) for name in self.layers}
        tables = {name for name, module in owners.items() if isinstance(module, nn.Embedding)}
        return ProductWatch(parameters, tables, lambda use: self._fold(use, samples()))

    def _fold(self, use: Use, samples: int) -> None:
        if samples == 0:
            return
        self.calls += 1
        layer = self.layers[use.parameter]
        if layer.reason:
            return
        if not layer.role:
            layer.role, layer.transposed = use.role, use.transposed
        if (layer.role, layer.transposed) != (use.role, use.transposed):
            layer.reason = _SEVERAL_WAYS
            return
        if use.inputs is None:
            layer.group = BIAS_HESSIAN
            return
        embedding = layer.role == "embedding"
        layer.size = self._model.get_parameter(use.parameter).shape[0] if embedding else use.inputs.shape[-1]
        name = use.parameter if use.part is None else expert_name(use.parameter, use.part)
        if use.part is None:
            layer.group = name
        accumulator = self._accumulators.get(name, layer.role == "linear", layer.size)
        with self._timer.queued("hessian"):
            if embedding:
                accumulator.add_ids(use.inputs, samples)
            elif layer.role == "linear":
                accumulator.add_rows(use.inputs.flatten(0, -2))
            else:
                accumulator.add_channels(use.inputs.flatten(0, -2))

    def uses(self) -> dict[str, tuple[str, bool, int, str | None, str]]:
        """Of each parameter that was used here: role, whether it is transposed, its size, Hessian and reason."""
        return {
            name: (layer.role, layer.transposed, layer.size, layer.group, layer.reason)
            for name, layer in self.layers.items()
            if layer.role or layer.reason
        }

    def join_uses(self, found: Mapping[str, tuple[str, bool, int, str | None, str]]) -> None:
        """Take over how another rank's samples used them."""
        for name, (role, transposed, size, group, reason) in found.items():
            layer = self.layers[name]
            layer.reason = layer.reason or reason
            if role and not layer.role:
                layer.role, layer.transposed, layer.size, layer.group = role, transposed, size, group
            elif role and (role, transposed) != (layer.role, layer.transposed):
                layer.reason = layer.reason or _SEVERAL_WAYS

    def settle(self) -> None:
        """Say what each parameter turned out to be; experts with too few tokens get the Hessian of all."""
        for layer in self.layers.values():
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
        tokens = [self._accumulators.tokens_of(name) for name in names]
        layer.pooled = [part for part in range(count) if tokens[part] < layer.size]
        pooled = expert_name(layer.name, None)
        if layer.pooled:
            self._accumulators.pool(pooled, names, layer.size)
            layer.note = (
                f"{len(layer.pooled)} of {count} experts saw fewer tokens than the {layer.size} that their inputs "
                f"have channels ({_listed(layer.pooled)}): the Hessian of all tokens of the layer serves for them"
            )
        layer.experts = [pooled if part in layer.pooled else names[part] for part in range(count)]


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (", ..." if len(numbers) > 8 else "")
