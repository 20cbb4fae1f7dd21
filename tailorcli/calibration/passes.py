"""The two ways in which a model runs over its calibration data: whole, or one block after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint
from tailorcli.calibration.expected import require_any
from tailorcli.calibration.stats_writer import StatsWriter
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES
from tailorcli.data.samples import Samples, batch_places, count_tokens, join
from tailorcli.device import StageTimer
from tailorcli.distributed import first_of_all, mine, now_on, ranks
from tailorcli.errors import CheckpointError
from tailorcli.models.loading import load_model
from tailorcli.models.names import aliases, expected_names
from tailorcli.models.parts import Parts, adapt
from tailorcli.models.places import Place, guessed_places, map_names
from tailorcli.models.running import check_ids, forward, samples_in, to_device
from tailorcli.options import CalibrateOptions, matches
from tailorcli.terminal import Progress

if TYPE_CHECKING:
    import torch

    from tailorcli.calibration.collector import Collector
    from tailorcli.data.samples import Inputs
    from tailorcli.models.layers import Layer
    from tailorcli.models.lockstep import Lane
    from tailorcli.models.spill import Spill

_TRIAL_TOKENS = 8  # a short run that finds out which layers share their inputs


@dataclass
class Subject:
    """A model that is calibrated, and what it is run over."""

    stored: Checkpoint  # from which the network is loaded
    tuned: Checkpoint  # the same, but for an adapter
    samples: Samples
    options: CalibrateOptions
    device: torch.device
    timer: StageTimer
    places: dict[str, Place] = field(default_factory=dict, kw_only=True)
    buffers: set[str] = field(default_factory=set, kw_only=True)  # checkpoint tensors that are no parameters
    done: dict[str, int] = field(default_factory=dict, kw_only=True)  # samples and tokens that this rank runs

    @property
    def sums(self) -> torch.dtype:
        """What Hessians are summed in."""
        import torch

        return torch.float64 if self.options.deterministic else torch.float32

    def chosen(self, tensor: str) -> bool:
        """Whether a checkpoint tensor is to be calibrated."""
        patchable = self.stored.tensors[tensor].dtype in PATCHABLE_DTYPES
        return patchable and matches(tensor, self.options.include, self.options.exclude)

    def note_buffers(self, network: Any, expected: dict[str, str]) -> None:
        """Remember which tensors are buffers: they take no part in the method."""
        names = {name for name, _ in network.named_buffers()}
        self.buffers = {tensor for tensor, name in expected.items() if name in names}

    def wanted(self, layers: Iterable[Layer], places: dict[str, Place]) -> list[Layer]:
        """Those of ``layers`` whose weight or bias is chosen; ``places`` are those of the checkpoint tensors."""
        chosen = {parameter for t, place in places.items() if self.chosen(t) for parameter in place.parameters}
        return [layer for layer in layers if layer.name in chosen or _bias(layer.name) in chosen]

    def own_batches(self) -> list[Inputs]:
        """The batches that this rank runs; where there are fewer than ranks, they are made smaller."""
        samples, size = self.samples.inputs, ranks().size
        places = list(batch_places(samples, self.options.together))
        if len(places) < size:
            places = list(batch_places(samples, max(1, len(samples) // size)))
        own = mine([sum(count_tokens(samples[place]) for place in batch) for batch in places])
        self.done = {"samples": sum(len(places[position]) for position in own)}
        batches = [join([samples[place] for place in places[position]]) for position in own]
        self.done["tokens"] = sum(map(count_tokens, batches))
        return batches or [min(samples, key=count_tokens)]  # without samples of its own it keeps step by another's

    def counted(self, batch: Inputs) -> int:
        """The samples of a batch; 0 for another rank's, which this one runs to keep step."""
        return samples_in(batch) if self.done["samples"] else 0


@dataclass
class Run(Subject):
    """What every step of a calibration needs that writes statistics."""

    writer: StatsWriter
    progress: bool

    def write(self, collector: Collector) -> None:
        """Pack all Hessians of a collector, and queue them for the disk: they are written while the pass goes on."""
        for name, info, values in collector.results():
            with self.timer.stage("wait for write"):
                self.writer.write(name, info, values)


def collect_whole(run: Run, config: dict[str, Any]) -> tuple[dict[str, Layer], str]:
    """The ordinary way: the whole model on the device. Gives its layers and the dtype that it ran in."""
    from tailorcli.calibration.collector import Collector
    from tailorcli.models.layers import find_layers
    from tailorcli.models.running import last_logits_only

    with run.timer.stage("load"):
        network = load_model(run.stored, config, run.options)
        expected = expected_names(network, run.stored.tensors)
        run.places = map_names(run.stored, dict(network.named_parameters()), aliases(network), expected)
        if isinstance(run.tuned, AdaptedCheckpoint):
            adapt(network, run.tuned, run.places)
        network = network.to(run.device)
    check_ids(run.samples.inputs, network)
    run.note_buffers(network, expected)
    layers = find_layers(network)
    collector = Collector(
        require_any(run.wanted(layers.values(), run.places)),
        network,
        run.device,
        run.timer,
        dtype=run.sums,
        joint=True,
    )
    with collector.trial():
        for inputs in _trial_inputs(run.samples.inputs):
            forward(network, to_device(inputs, run.device))
    collector.allocate()
    batches = run.own_batches()
    bar = _bar(run, run.done["tokens"])
    with bar, run.timer.stage("run"):
        for number, batch in enumerate(batches):
            now_on(f"batch {number + 1} of {len(batches)}")
            collector.batch_size = run.counted(batch)
            with collector.folding(), last_logits_only(network):
                forward(network, to_device(batch, run.device))
            bar.update(count_tokens(batch))
    run.write(collector)
    return layers, str(next(network.parameters()).dtype).removeprefix("torch.")


def _trial_inputs(samples: list[Inputs]) -> list[Inputs]:
    """One sample of each kind of input, text cut short: enough to see which layers share what."""
    kinds: dict[tuple[str, ...], Inputs] = {}
    for inputs in sorted(samples, key=count_tokens, reverse=True):
        kinds.setdefault(tuple(sorted(inputs)), inputs)
    text = ("input_ids", "decoder_input_ids")
    return [
        {name: value[:, :_TRIAL_TOKENS] for name, value in inputs.items()} if set(inputs) <= set(text) else inputs
        for inputs in kinds.values()
    ]


def _bar(run: Run, total: int) -> Progress:
    return Progress("calibrating", total, "tokens", shown=run.progress)


def collect_blockwise(run: Run, network: Any) -> tuple[dict[str, Layer], str]:
    """Block by block: one block's weights and Hessians at a time, all samples through it before the next.

    ``network`` is the model without its weights. Raises CheckpointError for a model without a list of blocks.
    """
    from tailorcli.calibration.collector import Collector
    from tailorcli.models.layers import find_layers
    from tailorcli.models.lockstep import Lockstep, find_blocks
    from tailorcli.models.running import last_logits_only
    from tailorcli.models.spill import Spill

    blocks = find_blocks(network)
    if not blocks:
        raise CheckpointError(
            f"{run.stored.path} has no list of blocks to go through one by one",
            "pass --blockwise never, on a device or a machine with more memory",
        )
    parts = Parts(network, list(blocks), run.stored, run.tuned, run.device, run.timer)
    layers = find_layers(network)
    run.note_buffers(network, parts.expected)
    run.places = places = parts.load("")  # first: it refuses a checkpoint that lacks what its config asks for
    require_any(run.wanted(layers.values(), guessed_places(parts.expected)))
    check_ids(run.samples.inputs, network)
    held: dict[str, list[Layer]] = {part: [] for part in ("", *blocks)}
    for layer in layers.values():
        held[parts.part_of(layer.name)].append(layer)
    outside = run.wanted(held[""], places)
    around = Collector(outside, network, run.device, run.timer, share=False, dtype=run.sums, joint=True)

    def runner(batch: Inputs) -> Any:
        def call() -> None:
            with around.folding_products():
                forward(network, to_device(batch, run.device))

        return call

    batches = run.own_batches()
    lanes = Lockstep(blocks, [(runner(batch), run.counted(batch)) for batch in batches])
    tokens = {id(lane): count_tokens(batch) for lane, batch in zip(lanes.lanes, batches, strict=True)}
    spill = Spill.measured(run.device, Path(run.writer.folder))

    bar = _bar(run, run.done["tokens"] * len(blocks))

    def visit(block: str, waiting: list[Lane]) -> None:
        now_on(block)
        found = parts.load(block)
        parts.read_behind(block)  # while this one is run
        run.places |= found
        inside = run.wanted(held[block], found)
        collector = Collector(inside, network, run.device, run.timer, dtype=run.sums, joint=True)
        for lane in _through_block(run, collector, inside, around, waiting, spill):
            bar.update(tokens[id(lane)])
        run.write(collector)
        parts.drop(block)

    def start(lane: Lane) -> None:
        around.batch_size = lane.size

    try:
        with bar, run.timer.stage("run"), around.folding_layers(), last_logits_only(network):
            lanes.run(start, visit, spill, first_of_all)
    finally:
        parts.end_reading()
    run.write(around)
    return layers, str(next(network.parameters()).dtype).removeprefix("torch.")


def _through_block(
    run: Run, collector: Collector, layers: list[Layer], around: Collector, waiting: list[Lane], spill: Spill
) -> Iterator[Lane]:
    """Take every waiting lane through the block that is loaded and up to its next; yields each that is done.

    On one of several ranks none may wait, where no batch of its own reaches the block.
    """
    with collector.trial(bool(waiting)):
        if waiting:
            waiting[0].move(spill.back)
            waiting[0].compute()
    _resume_hessians(run, collector, layers)
    collector.allocate()
    for position, lane in enumerate(waiting):
        if position:
            lane.move(spill.back)
        collector.batch_size = around.batch_size = lane.size
        with collector.folding():
            lane.compute()
        for tensor in lane.advance():
            tensor.data = spill.leave(tensor)
        lane.move(spill.out)
        yield lane


def _resume_hessians(run: Run, collector: Collector, layers: list[Layer]) -> None:
    """Take up the Hessians of a block that was run before: the model calls it more than once."""
    for layer in layers:
        if layer.experts:
            raise CheckpointError(
                f"the experts {layer.name} are called by two blocks in turn", "pass --blockwise never"
            )
        if layer.group is not None and (found := run.writer.read(layer.group)) is not None:
            collector.resume(layer.group, *found)


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"
