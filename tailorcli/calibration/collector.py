"""A Hessian for every parameter, accumulated while a model runs; one for each *distinct* input.

What a module is decides, not the model's name: linear layers (also transposed ones), convolutions, embeddings and
norms are hooked (``hooked``). Parameters that none of them holds are told by the operations that they enter
(``bare``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from tailorcli.calibration.accumulators import Accumulators
from tailorcli.calibration.bare import BareParameters
from tailorcli.calibration.hooked import HookedLayers
from tailorcli.calibration.stats import HessianInfo
from tailorcli.core.hessian import pack_triangle
from tailorcli.device import StageTimer
from tailorcli.distributed import gathered, ranks
from tailorcli.models.layers import Layer


class Collector:
    """Accumulates the Hessians of ``wanted`` layers from whatever runs inside its contexts.

    Run a short batch inside ``trial``, then ``allocate``, then each batch inside ``folding``; ``results`` gives the
    packed Hessians, which are float32 and summed in ``dtype``. Without a trial, or without ``share``, every layer has a
    Hessian of its own. Nothing may be padded: every row counts. Of several ranks each uses its own, or ``joint``: all
    do the same in the same order, and what they find is put together.
    """

    def __init__(
        self,
        wanted: Sequence[Layer],
        model: nn.Module,
        device: torch.device,
        timer: StageTimer,
        share: bool = True,
        dtype: torch.dtype = torch.float32,
        joint: bool = False,
    ) -> None:
        self.model = model
        self.batch_size = 1  # samples of the batch that runs now; of one that does not count 0
        self._joint = joint and not ranks().alone
        self._accumulators = Accumulators(device, dtype)
        hooked = [layer for layer in wanted if layer.modules]
        self._hooked = HookedLayers(hooked, self._accumulators, device, timer, share)
        self._bare = BareParameters([layer for layer in wanted if not layer.modules], model, self._accumulators, timer)
        self.allocate = self._hooked.allocate
        self.resume = self._accumulators.resume

    @contextmanager
    def trial(self, reached: bool = True) -> Iterator[None]:
        """Find out from what runs here which layers share their inputs.

        Joint ranks take what the first one found that was ``reached`` by a batch.
        """
        with self._hooked.trial():
            yield
        if self._joint:
            found = gathered(self._hooked.groups() if reached else None)
            self._hooked.group_as(next(groups for groups in found if groups is not None))

    @contextmanager
    def folding(self) -> Iterator[None]:
        """Fold the inputs of every layer that runs here, one batch, into its Hessian."""
        with self.folding_layers(), self.folding_products():
            yield

    def folding_layers(self) -> AbstractContextManager[None]:
        """The part of ``folding`` that holds for all threads: hooks on modules."""
        return self._hooked.folding(lambda: self.batch_size)

    def folding_products(self) -> AbstractContextManager[object]:
        """The part of ``folding`` that holds for one thread: a watch on torch's functions."""
        return self._bare.folding(lambda: self.batch_size)

    @property
    def calls(self) -> int:
        """How often its layers were used in batches that count."""
        return self._hooked.calls + self._bare.calls

    def results(self) -> Iterator[tuple[str, HessianInfo, Tensor | None]]:
        """Every Hessian, packed, one at a time; of ``joint`` ones a rank has some, and None for the others.

        Raises NumericalError if the activations were not finite.
        """
        if self._joint:
            yield from self._joint_results()
            return
        for name, info, hessian in self.unpacked():
            yield name, info, pack_triangle(hessian) if info.kind == "full" else hessian

    def _joint_results(self) -> Iterator[tuple[str, HessianInfo, Tensor | None]]:
        found = (self._accumulators.counts(), self._hooked.reasons(), self._bare.uses())
        for counts, reasons, uses in gathered(found):
            self._accumulators.join_counts(counts)
            self._hooked.join_reasons(reasons)
            self._bare.join_uses(uses)
        yield from self._accumulators.give_joint(self._settled())

    def unpacked(self) -> Iterator[tuple[str, HessianInfo, Tensor]]:
        """``results`` as they were summed: of a full Hessian (I, I) the lower triangle is valid."""
        yield from self._accumulators.give(self._settled())

    def _settled(self) -> set[str | None]:
        """The Hessians that layers use, now that all samples are through."""
        self._hooked.settle()
        self._bare.settle()
        layers = [*self._hooked.layers, *self._bare.layers.values()]
        return {layer.group for layer in layers} | {name for layer in layers for name in layer.experts}
