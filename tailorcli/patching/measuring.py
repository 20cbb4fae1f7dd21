"""Both models' statistics while a patch goes on, and what its plan becomes once those of a part are measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tailorcli.patching.planner import replanned
from tailorcli.runs.plan import TensorPlan

if TYPE_CHECKING:
    from tailorcli.calibration.gathering import Gathering
    from tailorcli.models.lockstep import Lane
    from tailorcli.models.spill import Spill
    from tailorcli.patching.run import Run

KINDS = NEW, RETAINED = "new", "retained"  # data of the new task, and of what the base must keep


class Measuring:
    """The statistics of the tuned model on new data, and of the base on retained data, measured part by part.

    They are those of ``run``'s inputs. ``sides`` are one or two, by the kind of their data.
    """

    def __init__(self, run: Run, sides: Mapping[str, Gathering]) -> None:
        self._run = run
        self._sides = dict(sides)

    @contextmanager
    def running(self, lanes: Mapping[str, Sequence[Lane]]) -> Iterator[None]:
        """Watch what lies outside the blocks while these lanes, by kind, go through the unpatched models."""
        with ExitStack() as stack:
            for kind, side in self._sides.items():
                stack.enter_context(side.running(lanes[kind]))
            yield

    def turn(self, lane: Lane) -> None:
        """A lane, of whatever model, is about to be advanced."""
        for side in self._sides.values():
            side.turn(lane)

    def watched(self, kind: str, call: Callable[[], Any]) -> Callable[[], Any]:
        """A lane's whole run of the model, so that uses of bare parameters outside the blocks count."""
        return self._sides[kind].call(call)

    def measure(self, block: str, waiting: Sequence[Lane], spill: Spill, *, advance: bool, counts: bool = True) -> None:
        """Take a block's statistics, where it ``counts``, from lanes that wait there; with ``advance`` these go on."""
        for side in self._sides.values():
            own = side.own(waiting)
            if counts:
                side.measure(block, own, spill, advance)
                continue
            for lane in own:
                side.pass_by(lane, spill)

    def passed(self) -> set[str]:
        """Layers outside the blocks that batches have newly passed. Raises NotInOnePassError.

        What data of one kind reach and those of the other do not, as pictures, is patched by what there is.
        """
        return set().union(*[side.passed() for side in self._sides.values()])

    def settle(self, tensors: Sequence[TensorPlan], layers: Collection[str] | None) -> list[TensorPlan]:
        """Those of ``tensors`` that these layers outside the blocks hold, or all, planned by their statistics."""
        names = set().union(*[side.settle(layers) for side in self._sides.values()])
        return self.plan([tensor for tensor in tensors if layers is None or not names.isdisjoint(tensor.names)])

    def plan(self, tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
        """Tensors in the order of work, by the statistics that are there."""
        inputs = self._run.inputs
        assert inputs.stats is not None
        return replanned(tensors, inputs.base, inputs.tuned, inputs.stats, self._run.options, inputs.retain_stats)

    def forget(self, part: str) -> None:
        """Give up a part's Hessians."""
        for side in self._sides.values():
            side.forget(part)
