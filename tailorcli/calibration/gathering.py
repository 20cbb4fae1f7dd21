"""Statistics that are never written: one block's Hessians at a time, used while they are in memory and given up.

A model goes through its samples block by block, as in ``passes``, but whoever leads it there says when a block is
measured. What lies outside the blocks is measured as the batches pass it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tailorcli.calibration.collector import Collector
from tailorcli.calibration.entries import entry_of
from tailorcli.calibration.passes import Subject
from tailorcli.calibration.stats import BIAS_HESSIAN, HessianInfo, Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.core.hessian import complete_triangle_
from tailorcli.errors import NumericalError, TailorError
from tailorcli.models.layers import Layer, find_layers
from tailorcli.models.lockstep import Lane
from tailorcli.models.parts import Parts
from tailorcli.models.spill import Spill

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs


class NotInOnePassError(TailorError):
    """A model calls its layers in an order in which its statistics cannot be used as they are measured."""


class HeldStats(Stats):
    """Statistics in memory: each Hessian from ``hold`` to ``forget``; what it was stays known.

    ``path`` is what errors name them by.
    """

    def __init__(self, path: Path, subject: Subject) -> None:
        samples = subject.samples
        manifest = {
            "model": {"path": str(subject.tuned.path), "fingerprint": subject.tuned.fingerprint()},
            "data": samples.facts,
            "options": subject.options.to_dict(),
            "samples": {"count": len(samples.inputs)},
        }
        constant = HessianInfo(1, "diagonal", samples.num_tokens, 2.0)
        super().__init__(path, manifest, {}, {BIAS_HESSIAN: constant}, Checkpoint(path, {}, []))
        self._inputs = samples.inputs
        self._always = {BIAS_HESSIAN: torch.tensor([2.0], device=subject.device)}
        self._held: dict[str, Tensor] = {}

    def hold(self, name: str, info: HessianInfo, hessian: Tensor) -> None:
        """Take a Hessian, (I, I) of which the lower triangle is valid and the upper is filled here, or (I,)."""
        self.hessians[name] = info
        self._held[name] = complete_triangle_(hessian) if info.kind == "full" else hessian

    def forget(self, names: Iterable[str]) -> None:
        """Give up the memory of these Hessians."""
        for name in names:
            self._held.pop(name, None)

    def load(self, name: str, pinned: bool = False) -> Tensor:
        """A Hessian (I, I), or its diagonal (I,), on the device where it was measured; it must not be changed."""
        return self._always[name] if name in self._always else self._held[name]

    def unpack(self, name: str, packed: Tensor) -> Tensor:
        """What ``load`` gave. Raises NumericalError where it is not finite."""
        if not bool(packed.isfinite().all()):
            raise NumericalError(f"NaN or infinity in the Hessian {name!r}", "check the model on this data")
        return packed

    def nbytes(self, name: str) -> int:
        """Nothing has to be read."""
        return 0

    def fingerprint(self) -> str:
        """None can be told of what is never there as a whole."""
        return ""

    def samples(self) -> list[Inputs]:
        """The model's inputs of every sample."""
        return self._inputs


class Gathering:
    """One model's statistics on the way through its blocks.

    ``network`` is without its weights but those of the ``parts`` that are loaded, "" among them; where these went is
    in ``subject.places``. Each of its batches is a lane: ``turn`` says whose turn it is before a lane is advanced, so
    that what other batches do is not counted.
    """

    def __init__(self, subject: Subject, stats: HeldStats, network: Any, parts: Parts) -> None:
        self.subject = subject
        self.stats = stats
        self._network = network
        self._parts = parts
        self._layers = find_layers(network)
        self._held: dict[str, list[Layer]] = {part: [] for part in parts.tensors}
        for layer in self._layers.values():
            self._held[parts.part_of(layer.name)].append(layer)
        subject.note_buffers(network, parts.expected)
        outside = subject.wanted(self._held[""], subject.places)
        self._outside = {layer.name: self._collector([layer], share=False) for layer in outside}
        self._measured: set[str] = set()  # blocks
        self._lanes: set[int] = set()  # their ids
        self._settled: dict[str, int] = {}  # layers outside the blocks, with the calls until then
        self._names: dict[str, list[str]] = {}  # of Hessians that are in memory, by part

    @contextmanager
    def running(self, lanes: Sequence[Lane]) -> Iterator[None]:
        """Fold what goes into the layers outside the blocks, of these lanes, while this lasts."""
        self._lanes = {id(lane) for lane in lanes}
        with ExitStack() as stack:
            for collector in self._outside.values():
                collector.batch_size = 0
                stack.enter_context(collector.folding_layers())
            yield

    def call(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """``work``, a lane's whole run of the model, so that uses of bare parameters outside the blocks count."""

        def watched() -> Any:
            with ExitStack() as stack:
                for collector in self._outside.values():
                    stack.enter_context(collector.folding_products())
                return work()

        return watched

    def turn(self, lane: Lane) -> None:
        """A lane is about to be advanced: its own batches count, others do not."""
        self._count(lane.size if id(lane) in self._lanes else 0)

    def _count(self, samples: int) -> None:
        for collector in self._outside.values():
            collector.batch_size = samples

    def own(self, lanes: Iterable[Lane]) -> list[Lane]:
        """Those of ``lanes`` that are measured."""
        return [lane for lane in lanes if id(lane) in self._lanes]

    def measure(self, block: str, lanes: Sequence[Lane], spill: Spill, advance: bool) -> None:
        """Take the block's Hessians from lanes that wait there; with ``advance`` these go on behind it."""
        inside = self.subject.wanted(self._held[block], self.subject.places)
        collector = self._collector(inside, share=True)
        self._measured.add(block)
        for position, lane in enumerate(lanes):
            lane.move(spill.back)
            if position == 0:
                self._count(0)
                with collector.trial():
                    lane.compute()
                collector.allocate()
            collector.batch_size = lane.size
            self._count(lane.size)
            with collector.folding():
                lane.compute()
            if advance:
                self.advance(lane, spill)
            else:
                lane.set_result(None)
                lane.move(spill.out)
        self._hold(block, collector)
        self._enter(self._parts.tensors[block])

    def pass_by(self, lane: Lane, spill: Spill) -> None:
        """Take a lane through its block, whose statistics no one needs, and on."""
        lane.move(spill.back)
        self.turn(lane)
        lane.compute()
        self.advance(lane, spill)

    def advance(self, lane: Lane, spill: Spill) -> None:
        """Let a lane whose block is computed go on to its next."""
        self.turn(lane)
        for tensor in lane.advance():
            tensor.data = spill.leave(tensor)
        lane.move(spill.out)

    def passed(self) -> set[str]:
        """Layers outside the blocks that lanes have newly called. Raises NotInOnePassError for one that was settled."""
        found = {name for name, collector in self._outside.items() if collector.calls > self._settled.get(name, 0)}
        if again := found & self._settled.keys():
            raise NotInOnePassError(f"the model comes back to {min(again)}")
        return found

    def settle(self, layers: Collection[str] | None = None) -> set[str]:
        """Hold the Hessians of layers outside the blocks, or of all that are left; gives the tensors that use them.

        Blocks that no batch has reached are then told, too.
        """
        chosen = self._outside.keys() - self._settled.keys() if layers is None else self._outside.keys() & layers
        for name in chosen:
            self._settled[name] = self._outside[name].calls
            self._hold("", self._outside[name])
        names = {name for name in self._parts.tensors[""] if layers is None or self._owner(name) in chosen}
        for block in set() if layers is not None else self._held.keys() - self._measured - {""}:  # never reached
            inside = self.subject.wanted(self._held[block], self.subject.places)
            self._hold(block, self._collector(inside, share=False))
            names |= {*self._parts.tensors[block]}
        self._enter(names)
        return names

    def _collector(self, layers: Sequence[Layer], share: bool) -> Collector:
        return Collector(layers, self._network, self.subject.device, self.subject.timer, share, self.subject.sums)

    def _owner(self, tensor: str) -> str | None:
        """The layer that a tensor is the weight or the bias of."""
        place = self.subject.places.get(tensor)
        if place is None or not place.parameters:
            return None
        name = place.parameters[0]
        return name if name in self._layers else name.removesuffix("bias") + "weight"

    def forget(self, part: str) -> None:
        """Give up the memory of a part's Hessians."""
        self.stats.forget(self._names.pop(part, []))

    def _hold(self, part: str, collector: Collector) -> None:
        for name, info, hessian in collector.unpacked():
            self.stats.hold(name, info, hessian)
            self._names.setdefault(part, []).append(name)

    def _enter(self, names: Iterable[str]) -> None:
        self.stats.tensors |= {name: entry_of(name, self.subject, self._layers) for name in names}
