"""A batch's way through a model in pieces, so that gradients go back through it with one block in memory at a time.

Where the model calls a block its graph is cut: the block is run without one, its inputs are kept, and what it gives
begins a new graph. Backward takes the cuts from the last to the first, each with the gradients of all draws: the block
is run again, now with a graph, and what comes out at its inputs goes back through the code before it to earlier cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from tailorcli.training.gains import Call

Gradients = list[Tensor | None]  # one for each tensor


class _Root(torch.autograd.Function):
    """What a graph begins with; its gradient is taken there, and its memory is not held."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, None


class _Sink(torch.autograd.Function):
    """What a graph ends with: a number for a tensor, whose gradient is put into ``cell`` before backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, cell: list[Tensor]) -> Tensor:
        ctx.cell = cell
        return value.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return ctx.cell.pop(), None


@dataclass
class Cut:
    """A place at which the graph was cut: a block, or a layer outside all blocks."""

    name: str
    inputs: list[Tensor]  # of a block, that have a graph, as ``again`` takes them; of a layer its rows
    again: Callable[[list[Tensor]], list[Tensor]] | None  # runs the block; None of a layer
    sinks: list[tuple[Tensor, list[Tensor]]]  # the ends of the graph before it
    roots: list[GradientEdge] = field(default_factory=list)
    arrived: dict[int, Gradients] = field(default_factory=dict)  # by draw: at each of the roots


class Tape:
    """The cuts of one batch, in the order in which it came to them; ``keep`` and ``back`` say where tensors wait."""

    def __init__(self, keep: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        self._keep, self._back = keep, back
        self._token = torch.zeros((), requires_grad=True)
        self._cuts: list[Cut] = []

    def root(self, value: Tensor) -> Tensor:
        """A tensor of numbers as the beginning of a graph; any other as it is."""
        if not value.is_floating_point():
            return value
        with torch.enable_grad():
            begun: Tensor = _Root.apply(self._token, value.detach())  # type: ignore[no-untyped-call]
        return begun

    def layer(self, name: str, rows: Tensor, output: Tensor) -> Tensor:
        """Cut behind a layer outside all blocks; its outputs with a new graph."""
        cut = Cut(name, [self._keep(rows.detach())], None, [self._sink(output)])
        begun = self.root(output)
        cut.roots.append(get_gradient_edge(begun))
        self._cuts.append(cut)
        return begun

    def block(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block without a graph and cut there; what it gives, with a new graph.

        A block into which no graph goes is run alone.
        """
        flat, shape = tree_flatten((args, kwargs))
        places = [number for number, value in enumerate(flat) if isinstance(value, Tensor) and value.requires_grad]
        with torch.no_grad():
            outputs, kind = tree_flatten(forward(*args, **kwargs))
        if not places:
            return tree_unflatten(outputs, kind)
        sinks = [self._sink(flat[place]) for place in places]
        kept = [self._keep(flat[place].detach()) for place in places]
        numbers = [number for number, value in enumerate(outputs) if _is_real(value)]
        held = [None if place in places else value for place, value in enumerate(flat)]

        def again(values: list[Tensor]) -> list[Tensor]:
            filled = list(held)
            for place, value in zip(places, values, strict=True):
                filled[place] = value
            given, named = tree_unflatten(filled, shape)
            found = tree_flatten(forward(*given, **named))[0]
            return [found[number] for number in numbers]

        cut = Cut(name, kept, again, sinks)
        for number in numbers:
            outputs[number] = self.root(outputs[number])
            cut.roots.append(get_gradient_edge(outputs[number]))
        self._cuts.append(cut)
        return tree_unflatten(outputs, kind)

    def _sink(self, value: Tensor) -> tuple[Tensor, list[Tensor]]:
        cell: list[Tensor] = []
        with torch.enable_grad():
            return _Sink.apply(value, cell), cell  # type: ignore[no-untyped-call]

    def begin(self, outputs: Tensor, signs: Iterator[Tensor]) -> None:
        """Take each draw's gradient at the model's ``outputs`` back to the cuts that they come from."""
        for draw, gradient in enumerate(signs):
            self._spread([outputs], [gradient], draw)

    def rewind(self, block: str, layer: Callable[[str, Call], None]) -> None:
        """Go back through the last cuts up to a call of ``block``, which is loaded; with "" through all that are left.

        ``layer`` is told of each layer outside the blocks that is passed.
        """
        while self._cuts:
            cut = self._cuts.pop()
            if cut.again is not None:
                self._through_block(cut)
                if cut.name == block:
                    return
                continue
            call = Call(self._back(cut.inputs[0]))
            for draw, arrived in cut.arrived.items():
                gradient = self._brought(arrived)[0]
                if gradient is not None:
                    call.take(gradient)
                    self._send(cut, [gradient], draw)
            layer(cut.name, call)

    def _through_block(self, cut: Cut) -> None:
        """Run a block again with its graph, and take what has arrived behind it to before it, draw by draw."""
        assert cut.again is not None
        if not cut.arrived:
            return
        with torch.enable_grad():
            leaves = [self._back(value).detach().requires_grad_() for value in cut.inputs]
            outputs = cut.again([leaf * 1 for leaf in leaves])  # no leaves themselves: a block may write into them
        for draw, arrived in cut.arrived.items():
            gradients = self._brought(arrived)
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
            if not pairs:
                continue
            ends, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(ends, leaves, given, retain_graph=True, allow_unused=True)
            self._send(cut, list(found), draw)

    def _brought(self, arrived: Gradients) -> Gradients:
        return [None if gradient is None else self._back(gradient) for gradient in arrived]

    def _send(self, cut: Cut, gradients: Gradients, draw: int) -> None:
        """Take the gradients before a cut back to the cuts before that."""
        ends: list[Tensor] = []
        for (end, cell), gradient in zip(cut.sinks, gradients, strict=True):
            if gradient is not None:
                cell.append(gradient)
                ends.append(end)
        if ends:
            self._spread(ends, [torch.ones_like(end) for end in ends], draw)

    def _spread(self, ends: Sequence[Tensor], gradients: Sequence[Tensor], draw: int) -> None:
        """Add what reaches each earlier root to what has arrived there."""
        edges = [edge for cut in self._cuts for edge in cut.roots]
        if not edges:
            return
        found = iter(torch.autograd.grad(ends, edges, gradients, retain_graph=True, allow_unused=True))
        for cut in self._cuts:
            reached = [next(found) for _ in cut.roots]
            if all(gradient is None for gradient in reached):
                continue
            before = self._brought(cut.arrived.get(draw, [None] * len(reached)))
            both = [_sum(one, other) for one, other in zip(before, reached, strict=True)]
            cut.arrived[draw] = [None if gradient is None else self._keep(gradient) for gradient in both]


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other
