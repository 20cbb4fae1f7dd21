"""The kept entries of a patch as what is trained: their values in float32, their gradients, and nothing besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tailorcli.core.distillation import adam_step_, root_mean_square
from tailorcli.models.places import Place


@dataclass
class Entries:
    """The K kept entries of one tensor, float32 on the device: values, summed gradient and Adam's two moments.

    ``positions`` are their places in the flattened parameter that holds the tensor: 20 bytes an entry in all, where a
    parameter has fewer than 2^31 entries. ``scale`` is the root mean square of how far the patch moved them, the unit
    of the learning rate; ``stored`` is the dtype in which the values will be written.
    """

    name: str
    parameter: str
    positions: Tensor  # (K,), int32, or int64 in a parameter that has more entries
    values: Tensor  # (K,)
    scale: float
    stored: torch.dtype = torch.float32
    gradient: Tensor = field(init=False)
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.gradient, self.first, self.second = (torch.zeros_like(self.values) for _ in range(3))

    def step(self, number: int, rate: float) -> None:
        """One step of Adam of ``rate`` in units of ``scale``; the gradient starts from zero again."""
        adam_step_(self.values, self.gradient, self.first, self.second, number, rate * self.scale)
        self.gradient.zero_()


class Trained:
    """A network in which only kept entries can move; everything else in it stays as it is, bit for bit."""

    def __init__(self, network: Any, entries: list[Entries]) -> None:
        self.network = network
        self.entries = entries
        parameters = dict(network.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self._by_parameter: dict[str, list[Entries]] = {}
        for each in entries:
            self._by_parameter.setdefault(each.parameter, []).append(each)
        self._parameters = {name: parameters[name] for name in self._by_parameter}
        self._hooks = []
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._taker(self._by_parameter[name])))
        self.put()

    @staticmethod
    def _taker(entries: list[Entries]) -> Any:
        def take(parameter: Tensor) -> None:
            """Keep the kept entries' part of a gradient and free the rest at once, inside backward."""
            assert parameter.grad is not None
            flat = parameter.grad.reshape(-1)
            for each in entries:
                each.gradient.add_(flat.index_select(0, each.positions))
            parameter.grad = None

        return take

    def put(self) -> None:
        """Write the values into the network, in its dtype."""
        with torch.no_grad():
            for name, entries in self._by_parameter.items():
                flat = self._parameters[name].data.view(-1)
                for each in entries:
                    flat[each.positions] = each.values.to(flat.dtype)

    def step(self, number: int, rate: float) -> None:
        """One step of Adam on all entries, written into the network."""
        for each in self.entries:
            each.step(number, rate)
        self.put()

    def state(self) -> dict[str, Tensor]:
        """Values and moments by tensor, to go on from later."""
        parts = ("values", "first", "second")
        return {f"{part} {each.name}": getattr(each, part) for each in self.entries for part in parts}

    def values(self) -> dict[str, Tensor]:
        """A copy of the values by tensor, on the CPU and in the dtype in which they will be written."""
        copies = {}
        for each in self.entries:
            copy = each.values.to(each.stored)
            copies[f"values {each.name}"] = (copy.clone() if copy is each.values else copy).cpu()
        return copies

    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Put back what ``values`` gave."""
        for each in self.entries:
            each.values.copy_(values[f"values {each.name}"])
        self.put()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up an earlier ``state``."""
        for each in self.entries:
            for part in ("values", "first", "second"):
                getattr(each, part).copy_(state[f"{part} {each.name}"])
        self.put()

    def close(self) -> None:
        """Let the network go."""
        while self._hooks:
            self._hooks.pop().remove()


def positions_in(place: Place, shape: tuple[int, ...], kept: Tensor) -> Tensor:
    """Where entries of a checkpoint tensor lie in its flattened parameter: (K,) from flat positions ``kept`` (K,).

    One that is ``transposed`` there is a matrix.
    """
    if place.transposed:
        rows, columns = shape
        kept = (kept % columns) * rows + kept // columns
    return kept + place.start


def entries_of(name: str, place: Place, base: Tensor, mask: Tensor, values: Tensor, device: torch.device) -> Entries:
    """The entries of one tensor: ``base`` and ``mask`` in its shape, ``values`` (K,) of the kept ones in order."""
    kept = mask.reshape(-1).nonzero().squeeze(1)  # (K,)
    start = values.float()
    scale = root_mean_square(start - base.reshape(-1)[kept].float())
    positions = positions_in(place, tuple(base.shape), kept)
    if place.start + base.numel() < 1 << 31:
        positions = positions.int()
    return Entries(name, place.parameters[0], positions.to(device), start.to(device), scale, base.dtype)
