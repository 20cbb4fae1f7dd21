"""Run the fine-tuned model over calibration data and store a Hessian for every parameter that has one.

In the ordinary way the whole model is in memory; a model that does not fit goes block by block (``blocks``).
"""

from __future__ import annotations

import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.adapter import AdaptedCheckpoint, is_adapter, open_tuned, tokenizer_folder
from tailorcli.adapter_config import CONFIG_FILE, MERGE_HINT, read_settings
from tailorcli.checkpoint import PATCHABLE_DTYPES, Checkpoint, TensorInfo
from tailorcli.data import Samples, count_tokens, draw_samples, make_batches, read_records
from tailorcli.device import StageTimer, device_errors, exact_float32, give_back_memory, resolve_device
from tailorcli.errors import CheckpointError, DataError, OptionsError
from tailorcli.loading import (
    aliases,
    empty_model,
    expected_names,
    load_encoder,
    load_model,
    load_weights,
    num_positions,
    package_versions,
    read_config,
    require_all,
)
from tailorcli.names import Place, map_names
from tailorcli.options import CalibrateOptions
from tailorcli.plan import matches
from tailorcli.report import format_bytes
from tailorcli.stats import HESSIANS, HessianInfo, StatsWriter, TensorStats, prepare_folder

if TYPE_CHECKING:
    import torch

    from tailorcli.blocks import Lane
    from tailorcli.collect import Collector, Layer
    from tailorcli.data import Inputs

_TRIAL_TOKENS = 8  # a short run that finds out which layers share their inputs
_MARGIN = 0.8  # of the free memory that a model and its Hessians may fill before it goes block by block
_NO_CHOICE = "not chosen by --include and --exclude at calibration"


@dataclass(frozen=True)
class CalibrateReport:
    """What a calibration gathered; ``uncalibrated`` maps a tensor's name to the reason, ``notes`` to a remark."""

    output: str
    samples: int
    tokens: int
    hessians: int
    calibrated: int
    uncalibrated: dict[str, str]
    bytes: int
    seconds: float
    stages: dict[str, float]
    blockwise: bool = False
    notes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


@dataclass
class _Run:
    """What every step of a calibration needs."""

    stored: Checkpoint  # from which the network is loaded
    tuned: Checkpoint  # the same, but for an adapter
    samples: Samples
    options: CalibrateOptions
    device: torch.device
    timer: StageTimer
    writer: StatsWriter
    progress: bool
    places: dict[str, Place] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)  # checkpoint tensors that are no parameters

    def chosen(self, tensor: str) -> bool:
        """Whether a checkpoint tensor is to be calibrated."""
        patchable = self.stored.tensors[tensor].dtype in PATCHABLE_DTYPES
        return patchable and matches(tensor, self.options.include, self.options.exclude)

    def note_buffers(self, network: Any, expected: dict[str, str]) -> None:
        """Remember which tensors are buffers: they take no part in the method."""
        names = {name for name, _ in network.named_buffers()}
        self.buffers = {tensor for tensor, name in expected.items() if name in names}

    def wanted(self, layers: dict[str, Layer], names: dict[str, str]) -> list[Layer]:
        """Layers whose weight or bias is chosen; ``names`` gives each tensor's parameter."""
        chosen = {parameter for tensor, parameter in names.items() if self.chosen(tensor)}
        chosen |= {p for t, place in self.places.items() if self.chosen(t) for p in place.parameters}
        return [layer for layer in layers.values() if layer.name in chosen or _bias(layer.name) in chosen]

    def write(self, collector: Collector) -> None:
        """Pack and store all Hessians of a collector."""
        for name, info, values in collector.results():
            with self.timer.stage("write"):
                self.writer.write(name, info, values)


def calibrate_model(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: CalibrateOptions = CalibrateOptions(),
    progress: bool = False,
    base: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] | None = None,
) -> CalibrateReport:
    """Run the checkpoint ``model`` over samples of ``data`` and write the statistics folder ``output``.

    One Hessian H = (2/N) sum x x^T per distinct layer input, over N tokens; nothing is padded. ``model`` is
    the *fine-tuned* checkpoint: its layer inputs on the new task are what Eq. 5 compares. It may be an adapter on
    ``base``, which defaults to the local folder that the adapter itself names. A model that does not fit the device
    is streamed through it block by block, which ``announce`` is told. Raises TailorError.
    """
    started = perf_counter()
    folder = Path(output)
    with ExitStack() as stack:
        stored, tuned = _open(Path(model), base, stack)
        device = resolve_device(options.device)
        prepare_folder(folder, options.overwrite)
        timer = StageTimer(device)
        config = read_config(stored.path)
        with timer.stage("data"):
            samples = _draw(Path(data), stored, tokenizer_folder(tuned), config, options)
        writer = stack.enter_context(StatsWriter(folder, _room(stored, config)))
        run = _Run(stored, tuned, samples, options, device, timer, writer, progress)
        blockwise = options.blockwise == "always"
        if options.blockwise == "auto":
            needed, free = _memory(run, config)
            blockwise = needed > free * _MARGIN
            if blockwise and announce is not None:
                what = f"the model and its Hessians need up to {format_bytes(needed)}, {format_bytes(free)} are free"
                announce(f"{what}: it goes through {device} block by block")
        with exact_float32(), device_errors():
            layers, dtype = (_collect_blockwise if blockwise else _collect_whole)(run, config)
        tensors = {name: _entry(name, run, layers) for name in stored.tensors}
        if any("bias" in entry.hessians for entry in tensors.values()):
            _write_bias(run)
        facts = {
            "model": {"path": str(tuned.path), "fingerprint": tuned.fingerprint(), "run_in": dtype}
            | ({} if stored is tuned else {"base": str(stored.path)}),
            "data": samples.facts,
            "options": options.to_dict() | {"overwrite": False, "blockwise": "always" if blockwise else "never"},
            "versions": package_versions(),
        }
        with timer.stage("write"):
            writer.finish(tensors, facts)
    uncalibrated = {name: entry.reason for name, entry in tensors.items() if not entry.hessians}
    return CalibrateReport(
        output=str(folder),
        samples=len(samples.inputs),
        tokens=samples.num_tokens,
        hessians=writer.count,
        calibrated=len(tensors) - len(uncalibrated),
        uncalibrated=uncalibrated,
        bytes=(folder / HESSIANS).stat().st_size,
        seconds=perf_counter() - started,
        stages=dict(timer.seconds),
        blockwise=blockwise,
        notes={name: entry.note for name, entry in tensors.items() if entry.note},
    )


def _open(model: Path, base: str | os.PathLike[str] | None, stack: ExitStack) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoint from which the network is loaded, and the tuned model: the same, but for an adapter."""
    if not is_adapter(model):
        if base is not None:
            raise OptionsError(f"--base is for adapters, but {model} is none", "leave --base out")
        checkpoint = stack.enter_context(Checkpoint.open(model))
        return checkpoint, checkpoint
    stored = stack.enter_context(Checkpoint.open(_named_base(model) if base is None else base))
    return stored, stack.enter_context(open_tuned(model, stored))


def _named_base(adapter: Path) -> Path:
    """The local folder that an adapter's config names as its base."""
    named = read_settings(adapter).base_name
    try:
        if named and Path(named).is_dir():
            return Path(named)
    except OSError:  # no path at all
        pass
    what = f"names {reprlib.repr(named)}, which is no local folder" if named else "names none"
    raise CheckpointError(
        f"{adapter} is an adapter: its base is needed, and {CONFIG_FILE} {what}", "pass its base: --base BASE"
    )


def _draw(data: Path, stored: Checkpoint, folder: Path, config: dict[str, Any], options: CalibrateOptions) -> Samples:
    """The samples, as the model's own tokenizer or processor makes them; a tokenizer may lie with an adapter."""
    records = read_records(data, options.text_mode)
    has_media = any(record.has_media for record in records)
    seq_len = min(options.seq_len, num_positions(config))
    processor = folder if not has_media or _has_processor(folder) else stored.path
    encoder = load_encoder(processor, stored.path, has_media, options)
    return draw_samples(data, records, encoder.encode, replace(options, seq_len=seq_len))


def _has_processor(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json"))


def _room(stored: Checkpoint, config: dict[str, Any]) -> Iterator[str]:
    """Names that Hessians may get, so many and so long at most."""
    experts = max((value for value in _values(config) if type(value) is int and 1 < value <= 1 << 12), default=1)
    for name, info in stored.tensors.items():
        yield f"{name} and what a longer prefix of the loaded model adds to it"
        if len(info.shape) == 3:
            yield from (f"{name} and a longer prefix {part}" for part in range(info.shape[0] + 1))
    if experts > 1:
        yield from (f"all the tokens of a layer of experts {part}" for part in range(2048))


def _values(config: dict[str, Any]) -> Iterator[Any]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _values(value)
        elif "experts" in name:
            yield value


def _memory(run: _Run, config: dict[str, Any]) -> tuple[int, int]:
    """Bytes that the model and its Hessians need at most, and the bytes that are free on the device."""
    from tailorcli.collect import find_layers, free_memory

    free = free_memory(run.device)
    if free is None or run.stored.nbytes * 64 < free:  # float32 doubles bfloat16, and Hessians are a few times more
        return 0, 1
    network = empty_model(run.stored, config, run.options)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    names = expected_names(network, run.stored.tensors)
    layers = run.wanted(find_layers(network), names)
    shared = {(layer.name.rpartition(".")[0].rpartition(".")[0], layer.size) for layer in layers if _is_full(layer)}
    parameters = dict(network.named_parameters())
    experts = [parameters[layer.name] for layer in layers if parameters[layer.name].dim() == 3 and not layer.modules]
    hessians = sum(4 * size**2 for _, size in shared) + sum(4 * len(p) * max(p.shape[1:]) ** 2 for p in experts)
    return weights + hessians, free


def _is_full(layer: Layer) -> bool:
    return layer.role == "linear"


def _adapt(network: Any, tuned: AdaptedCheckpoint, places: dict[str, Place]) -> None:
    """Overwrite each parameter that the adapter changes, in place and in the network's dtype."""
    import torch

    users = Counter(parameter for place in places.values() for parameter in place.parameters)
    parameters = dict(network.named_parameters())
    for name in sorted(tuned.changed & places.keys()):
        place = places[name]
        if len(place.parameters) != 1 or parameters[place.parameters[0]].shape != tuned.tensors[name].shape:
            reason = place.reason or "transformers holds it fused or split"
            raise CheckpointError(f"the adapter {tuned.path} changes tensor {name!r}, but {reason}", MERGE_HINT)
        parameter = place.parameters[0]
        if users[parameter] > 1:
            other = next(n for n, p in places.items() if parameter in p.parameters and n != name)
            raise CheckpointError(
                f"the adapter {tuned.path} changes tensor {name!r}, which the network ties to {other!r}",
                f"set tie_word_embeddings to false in {tuned.base.path / 'config.json'}, where both are stored",
            )
        with torch.no_grad():
            parameters[parameter].copy_(tuned.read(name))


def _collect_whole(run: _Run, config: dict[str, Any]) -> tuple[dict[str, Layer], str]:
    """The ordinary way: the whole model on the device. Gives its layers and the dtype that it ran in."""
    from tailorcli.collect import Collector, find_layers, last_logits_only

    with run.timer.stage("load"):
        network = load_model(run.stored, config, run.options)
        expected = expected_names(network, run.stored.tensors)
        run.places = map_names(run.stored, dict(network.named_parameters()), aliases(network), expected)
        if isinstance(run.tuned, AdaptedCheckpoint):
            _adapt(network, run.tuned, run.places)
        network = network.to(run.device)
    _check_ids(run.samples, network)
    run.note_buffers(network, expected)
    layers = find_layers(network)
    collector = Collector(_some(run.wanted(layers, {})), network, run.device, run.timer)
    with collector.trial():
        for inputs in _trial_inputs(run.samples.inputs):
            _forward(network, _to(inputs, run.device))
    collector.allocate()
    bar = _bar(run, run.samples.num_tokens)
    with bar, run.timer.stage("run"), collector.folding(), last_logits_only(network):
        for batch in make_batches(run.samples.inputs, run.options.batch_size):
            collector.batch_size = _batch_size(batch)
            _forward(network, _to(batch, run.device))
            bar.update(count_tokens(batch))
    run.write(collector)
    return layers, str(next(network.parameters()).dtype).removeprefix("torch.")


def _some(layers: list[Layer]) -> list[Layer]:
    if not layers:
        raise OptionsError("no tensor of this model can be calibrated", "check --include and --exclude")
    return layers


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


def _forward(network: Any, inputs: Inputs) -> None:
    import torch

    with torch.no_grad():
        network(**inputs)


def _to(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: value.to(device) for name, value in inputs.items()}


def _batch_size(batch: Inputs) -> int:
    """Samples of a batch: those of its text, or else of whatever it holds."""
    return len(
        next((batch[name] for name in ("input_ids", "decoder_input_ids") if name in batch), next(iter(batch.values())))
    )


def _bar(run: _Run, total: int) -> Any:
    from tqdm import tqdm

    shown = None if run.progress else True
    return tqdm(total=total, desc="calibrating", unit="tok", unit_scale=True, disable=shown)


def _collect_blockwise(run: _Run, config: dict[str, Any]) -> tuple[dict[str, Layer], str]:
    """Block by block: one block's weights and Hessians at a time, all samples through it before the next."""
    import torch

    from tailorcli.blocks import Lockstep, Spill, find_blocks
    from tailorcli.collect import Collector, find_layers, free_memory, last_logits_only

    network = empty_model(run.stored, config, run.options)
    blocks = find_blocks(network)
    if not blocks:
        raise CheckpointError(
            f"{run.stored.path} has no list of blocks to go through one by one",
            "pass --blockwise never, on a device or a machine with more memory",
        )
    parts = _Parts(run, network, list(blocks))
    layers = find_layers(network)
    _some(run.wanted(layers, parts.expected))
    run.note_buffers(network, parts.expected)
    parts.load("")
    _check_ids(run.samples, network)
    rest = [layer for layer in run.wanted(layers, {}) if parts.part_of(layer.name) == ""]
    around = Collector(rest, network, run.device, run.timer, share=False)

    def runner(batch: Inputs) -> Any:
        def call() -> None:
            with around.folding_products():
                _forward(network, _to(batch, run.device))

        return call

    batches = list(make_batches(run.samples.inputs, run.options.batch_size))
    lanes = Lockstep(blocks, [(runner(batch), _batch_size(batch)) for batch in batches])
    tokens = {id(lane): count_tokens(batch) for lane, batch in zip(lanes.lanes, batches, strict=True)}
    host = free_memory(torch.device("cpu")) or 1 << 40  # hidden states wait there, whatever the device
    spill = Spill(run.device, Path(run.writer.folder), int(host * 0.25))

    with _bar(run, run.samples.num_tokens * len(blocks)) as bar, run.timer.stage("run"):

        def visit(block: str, waiting: list[Lane]) -> None:
            parts.load(block)
            inside = [layer for layer in run.wanted(layers, {}) if parts.part_of(layer.name) == block]
            collector = Collector(inside, network, run.device, run.timer)
            waiting[0].move(spill.back)
            with collector.trial():
                waiting[0].compute()
            _go_on(run, collector, inside)
            collector.allocate()
            for position, lane in enumerate(waiting):
                if position:
                    lane.move(spill.back)
                collector.batch_size = around.batch_size = lane.size
                with collector.folding():
                    lane.compute()
                for tensor in lane.advance():
                    tensor.data = spill.keep(tensor)
                lane.move(spill.out)
                bar.update(tokens[id(lane)])
            run.write(collector)
            parts.drop(block)

        def start(lane: Lane) -> None:
            around.batch_size = lane.size

        with around.folding_layers(), last_logits_only(network):
            lanes.run(start, visit, spill)
    run.write(around)
    return layers, str(next(network.parameters()).dtype).removeprefix("torch.")


def _go_on(run: _Run, collector: Collector, layers: list[Layer]) -> None:
    """Take up the Hessians of a block that was run before: the model calls it more than once."""
    for layer in layers:
        if layer.experts:
            raise CheckpointError(
                f"the experts {layer.name} are called by two blocks in turn", "pass --blockwise never"
            )
        if layer.group is not None and (found := run.writer.read(layer.group)) is not None:
            collector.resume(layer.group, *found)


class _Parts:
    """A model's weights by the part that holds them: each block, and the rest, under the empty name."""

    def __init__(self, run: _Run, network: Any, blocks: list[str]) -> None:
        self._run = run
        self._network = network
        self._blocks = blocks
        self.expected = expected_names(network, run.stored.tensors)
        self._tied = aliases(network)
        held = {name: self.part_of(name) for name in dict(network.named_parameters())}
        self._parameters = {part: [n for n, p in held.items() if p == part] for part in ("", *blocks)}
        tensors: dict[str, list[str]] = {part: [] for part in ("", *blocks)}
        for tensor, parameter in self.expected.items():
            tensors[self.part_of(self._tied.get(parameter, parameter))].append(tensor)
        self._tensors = tensors
        for name, buffer in network.named_buffers():
            owner = network.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = buffer.to(run.device)

    def part_of(self, parameter: str) -> str:
        """The block in which a parameter lies."""
        return next((block for block in self._blocks if parameter.startswith(f"{block}.")), "")

    def load(self, part: str) -> None:
        """Read the part's weights, prove where each tensor went, and apply an adapter's changes."""
        run, network = self._run, self._network
        with run.timer.stage("load"):
            load_weights(network, {name: run.stored.read(name) for name in self._tensors[part]}, run.device)
            if part == "":
                network.tie_weights()
            every = dict(network.named_parameters())
            inside = {name: every[name] for name in self._parameters[part] if name in every}
            require_all(run.stored.path, [name for name, value in inside.items() if value.device.type == "meta"])
            expected = {name: self.expected[name] for name in self._tensors[part]}
            found = map_names(run.stored, inside, self._tied, expected)
            run.places |= found
            if isinstance(run.tuned, AdaptedCheckpoint):
                _adapt(network, run.tuned, found)

    def drop(self, part: str) -> None:
        """Give up the memory of a part's weights."""
        import torch

        for name in self._parameters[part]:
            owner, _, short = name.rpartition(".")
            module = self._network.get_submodule(owner)
            empty = torch.nn.Parameter(module._parameters[short].to("meta"), requires_grad=False)
            module._parameters[short] = empty
        give_back_memory()


def _write_bias(run: _Run) -> None:
    """The Hessian of all constants."""
    import torch

    from tailorcli.collect import BIAS_HESSIAN

    info = HessianInfo(1, "diagonal", run.samples.num_tokens, 2.0)
    run.writer.write(BIAS_HESSIAN, info, torch.tensor([2.0]))


def _entry(tensor: str, run: _Run, layers: dict[str, Layer]) -> TensorStats:
    """The manifest's entry for a checkpoint tensor."""
    from tailorcli.collect import BIAS_HESSIAN, stats_of

    info, place = run.stored.tensors[tensor], run.places.get(tensor, Place(reason="transformers does not load it"))
    if not matches(tensor, run.options.include, run.options.exclude):
        return TensorStats(None, reason=_NO_CHOICE)
    if info.dtype not in PATCHABLE_DTYPES:
        return TensorStats(None, reason=f"{info.dtype} is no floating-point dtype that can be patched")
    if tensor in run.buffers:
        return TensorStats(None, reason="it is a buffer, no parameter")
    if place.reason:
        return TensorStats(None, reason=place.reason)
    name = place.parameters[0]
    if name not in layers:
        weight = layers.get(name.removesuffix("bias") + "weight") if name.endswith("bias") else None
        if weight is None:
            return TensorStats(None, reason="no layer holds it")
        return TensorStats(BIAS_HESSIAN if weight.group else None, "bias", reason=weight.reason)
    layer = layers[name]
    entry = stats_of(layer)
    if len({layers[n].group if n in layers else None for n in place.parameters}) > 1:
        return TensorStats(None, reason="transformers splits it into layers that do not share their inputs")
    if layer.experts:
        return _expert_entry(entry, place, info)
    return replace(entry, transposed=entry.transposed != place.turned) if place.turned else entry


def _expert_entry(entry: TensorStats, place: Place, info: TensorInfo) -> TensorStats:
    """One expert's tensor of those that transformers fuses, or all of them where the checkpoint fuses them, too."""
    if place.part is None:
        if len(info.shape) == 3:
            return entry
        return TensorStats(None, reason="it holds several experts in a layout that is not known")
    hessian = entry.experts[place.part]
    note = "too few tokens reached this expert: the Hessian of all tokens of its layer serves for it"
    shared = hessian.endswith("[all]")
    return TensorStats(hessian, entry.role, entry.transposed != place.turned, note=note if shared else "")


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _check_ids(samples: Samples, network: Any) -> None:
    """The tokenizer's ids fit the model's embedding: a mismatch would crash far inside the model."""
    import torch

    table = network.get_input_embeddings()
    ids = [inputs["input_ids"] for inputs in samples.inputs if "input_ids" in inputs]
    if not isinstance(table, torch.nn.Embedding) or not ids:
        return
    highest = max(int(tensor.max()) for tensor in ids)
    if highest >= table.num_embeddings:
        raise DataError(
            f"the tokenizer gives token id {highest}, the model has {table.num_embeddings} embedding rows",
            "the model folder holds a tokenizer of another model",
        )
