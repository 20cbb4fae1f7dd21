"""Run the fine-tuned model over calibration data and store a Hessian for every parameter that has one.

In the ordinary way the whole model is in memory; a model that does not fit goes block by block (``blocks``).
"""

from __future__ import annotations

import json
import reprlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import is_adapter, tokenizer_folder
from tailorcli.adapters.config import CONFIG_FILE, read_settings
from tailorcli.calibration.passes import Run, collect_blockwise, collect_whole, guessed_places
from tailorcli.calibration.stats import HESSIANS, HessianInfo, TensorStats, too_few_tokens
from tailorcli.calibration.stats_writer import StatsWriter, prepare_folder
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, TensorInfo
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.data.records import read_records
from tailorcli.data.samples import Samples, draw_samples
from tailorcli.device import StageTimer, device_errors, exact_float32, resolve_device
from tailorcli.errors import CheckpointError, OptionsError, note
from tailorcli.files import PathLike, as_output_error, write_text_atomically
from tailorcli.models.config import processor_folder, read_config
from tailorcli.models.layers import Layer
from tailorcli.models.loading import (
    check_shapes,
    expected_names,
    load_encoder,
    load_model,
    most_tokens,
    package_versions,
)
from tailorcli.models.naming import open_for
from tailorcli.models.places import Place
from tailorcli.models.skeleton import empty_model
from tailorcli.options import CalibrateOptions, matches
from tailorcli.terminal import Progress
from tailorcli.units import format_bytes

if TYPE_CHECKING:
    import torch

    from tailorcli.models.layers import Layer

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


def calibrate_model(
    model: PathLike,
    data: PathLike | None,
    output: PathLike,
    options: CalibrateOptions = CalibrateOptions(),
    progress: bool = False,
    base: PathLike | None = None,
    announce: Callable[[str], None] | None = None,
    held_out: PathLike | None = None,
) -> CalibrateReport:
    """Run the checkpoint ``model`` over samples of ``data`` and write the statistics folder ``output``.

    With ``options.synthetic`` the model writes the samples itself: from random tokens, or, where there are ``data``,
    from the images and prompts of these; half as many further ones, those of the next seed, go to the .jsonl file
    ``held_out``, as a task for evaluate and sweep.

    One Hessian H = (2/N) sum x x^T per distinct layer input, over N tokens; nothing is padded. ``model`` is
    the *fine-tuned* checkpoint: its layer inputs on the new task are what Eq. 5 compares. It may be an adapter on
    ``base``, which defaults to the local folder that the adapter itself names. A model that does not fit the device
    is streamed through it block by block, which ``announce`` is told. Raises TailorError.
    """
    started = perf_counter()
    folder = Path(output)
    _check_source(data, options, held_out)
    with ExitStack() as stack:
        stored, tuned = _open(Path(model), base, stack)
        device = resolve_device(options.device)
        prepare_folder(folder, options.overwrite)
        timer = StageTimer(device)
        config = read_config(stored.path)
        with timer.stage("data"):
            if options.synthetic:
                starts = None if data is None else Path(data)
                kept = None if held_out is None else Path(held_out)
                samples = _self_written(stored, tuned, config, starts, kept, options, device, progress)
            else:
                assert data is not None
                samples = _draw(Path(data), stored, tokenizer_folder(tuned), config, options)
        writer = stack.enter_context(StatsWriter(folder, _longest_hessian_names(stored)))
        run = Run(stored, tuned, samples, options, device, timer, writer, progress)
        with timer.stage("load"):
            check_shapes(stored, config, options)
            skeleton = _skeleton_for_blocks(run, config, announce)
        blockwise = skeleton is not None
        smaller = "a smaller --batch-size or --seq-len" + ("" if blockwise else ", or --blockwise always")
        with exact_float32(), device_errors(smaller):
            layers, dtype = collect_blockwise(run, skeleton) if blockwise else collect_whole(run, config)
        tensors = {name: _entry(name, run, layers) for name in stored.tensors}
        if any("bias" in entry.hessians for entry in tensors.values()):
            _write_bias(run)
        facts: dict[str, Any] = {
            "model": {"path": str(tuned.path), "fingerprint": tuned.fingerprint(), "run_in": dtype}
            | ({} if stored is tuned else {"base": str(stored.path)}),
            "data": samples.facts,
            "options": options.to_dict() | {"overwrite": False, "blockwise": "always" if blockwise else "never"},
            "versions": package_versions(),
        }
        with timer.stage("write"):
            if options.keep_samples:
                facts["samples"] = writer.store_samples(samples.inputs)
            writer.finish(tensors, facts)
    if few := too_few_tokens(writer.infos):
        note(f"{folder}: {few}")
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


def _open(model: Path, base: PathLike | None, stack: ExitStack) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoint from which the network is loaded, and the tuned model: the same, but for an adapter."""
    if not is_adapter(model):
        if base is not None:
            raise OptionsError(f"--base is for adapters, but {model} is none", "leave --base out")
        checkpoint = stack.enter_context(open_checkpoint(model))
        if (model / CONFIG_FILE).exists():
            note(f"{model} holds full weights, which are taken as they are: the adapter beside them is not applied")
        return checkpoint, checkpoint
    stored = stack.enter_context(open_checkpoint(_named_base(model) if base is None else base))
    return stored, stack.enter_context(open_for(stored, model))


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
    seq_len = min(options.length, most_tokens(stored, config, options))
    encoder = load_encoder(processor_folder(folder, stored.path, has_media), stored.path, has_media, options)
    samples = draw_samples(data, records, encoder.encode, replace(options, seq_len=seq_len))
    if encoder.cuts:
        lost = sum(before - after for before, after in encoder.cuts)
        why = f"--seq-len {seq_len}" if seq_len == options.length else f"the model's {seq_len} positions"
        share = f"{lost:,} of their {sum(before for before, _ in encoder.cuts):,} tokens are left out"
        note(f"{data}: {len(encoder.cuts)} of {len(samples.inputs)} samples are longer than {why} and are cut: {share}")
    return samples


def _check_source(data: PathLike | None, options: CalibrateOptions, held_out: PathLike | None) -> None:
    if data is None and not options.synthetic:
        raise OptionsError(
            "no calibration data given", "pass --data FILE, or --synthetic to let the model write its own"
        )
    if held_out is not None:
        if not options.synthetic:
            raise OptionsError("--held-out is for samples that the model writes", "pass --synthetic, or leave it out")
        if Path(held_out).suffix != ".jsonl":
            raise OptionsError(f"--held-out must name a .jsonl file, got {held_out}", "name it written.jsonl")


def _self_written(
    stored: Checkpoint,
    tuned: Checkpoint,
    config: dict[str, Any],
    data: Path | None,
    held_out: Path | None,
    options: CalibrateOptions,
    device: torch.device,
    progress: bool,
) -> Samples:
    """Samples that the model writes itself; it is loaded for that alone, and freed again."""
    from tailorcli.calibration.synthetic import (
        encode_starts,
        read_starts,
        require_writer,
        to_records,
        with_source,
        write_samples,
    )
    from tailorcli.device import free_memory

    if stored is not tuned:
        raise OptionsError(
            "--synthetic is for the model that must not forget, and this is an adapter", "calibrate its base"
        )
    free = free_memory(device)
    if free is not None and stored.nbytes > free:
        raise OptionsError(
            f"{stored.path} takes {format_bytes(stored.nbytes)}, {format_bytes(free)} are free on {device}: it cannot "
            "write samples there",
            "pass --data FILE, which goes block by block",
        )
    options = replace(options, seq_len=min(options.length, most_tokens(stored, config, options)))
    records = [] if data is None else read_starts(data)
    network = load_model(stored, config, options)
    require_writer(network)  # before its tokenizer, which a vision model has none of
    encoder = load_encoder(stored.path, stored.path, any(record.has_media for record in records), options)
    network.to(device)
    further = replace(options, seed=options.seed + 1, num_samples=(options.num_samples + 1) // 2)
    runs = [options] if held_out is None else [options, further]
    total = sum(run.num_samples for run in runs) * (options.length - 1)
    with device_errors("a smaller --seq-len"), Progress("writing", total, "tokens", shown=progress) as bar:
        for run in runs:
            starts = encode_starts(records, encoder, run) if records else []
            found = write_samples(network, encoder.tokenizer, run, device, bar, starts, encoder.media_ids)
            if run is options:
                samples = found
            elif held_out is not None:
                _write_jsonl(to_records(found, starts, encoder.tokenizer), held_out)
    return samples if data is None else with_source(samples, data, len(records))


def _write_jsonl(records: list[dict[str, Any]], file: Path) -> None:
    try:
        write_text_atomically(file, "".join(json.dumps(record) + "\n" for record in records))
    except OSError as error:
        raise as_output_error(file, error) from error


def _longest_hessian_names(stored: Checkpoint) -> Iterator[str]:
    """Upper bounds, to size the header: one name per Hessian that could be written, with the longest prefix.

    A parameter's name may have a prefix that transformers adds to the checkpoint's.
    """
    for name, info in stored.tensors.items():
        yield f"{name} and a prefix such as model.language_model [all]"
        if len(info.shape) == 3:
            yield from (f"{name} and a prefix such as model.language_model [{part}]" for part in range(info.shape[0]))


def _skeleton_for_blocks(run: Run, config: dict[str, Any], announce: Callable[[str], None] | None) -> Any:
    """The model without its weights if it goes block by block: as asked for, or as it does not fit; else None."""
    import torch

    from tailorcli.device import free_memory
    from tailorcli.models.lockstep import find_blocks

    say = announce or (lambda message: None)
    free, host = free_memory(run.device), free_memory(torch.device("cpu"))
    # Small is small without a closer look: float32 doubles bfloat16, and Hessians are a few times more.
    small = free is None or host is None or run.stored.nbytes * 64 < min(free, host)
    if small and run.options.blockwise != "always":
        return None
    network = empty_model(run.stored, config, run.options)
    if small:
        return network
    assert free is not None
    assert host is not None
    weights = sum(parameter.nbytes for parameter in network.parameters())
    hessians = _hessian_bytes(run, network)
    disk = shutil.disk_usage(run.writer.folder).free
    if hessians // 2 > disk:
        have = f"{format_bytes(disk)} are free in {run.writer.folder}"
        say(f"the statistics take up to {format_bytes(hessians // 2)} of disk, {have}: --include takes fewer tensors")
    if run.options.blockwise != "auto":
        return network if run.options.blockwise == "always" else None
    if not find_blocks(network) or (weights + hessians <= free * _MARGIN and weights <= host * _MARGIN):
        return None
    needed = format_bytes(weights + hessians)
    say(
        f"the model and its Hessians need up to {needed}, {format_bytes(free)} are free on {run.device}: block by block"
    )
    return network


def _hessian_bytes(run: Run, network: Any) -> int:
    """Bytes of all full Hessians at most: layers of one module and as many channels are taken to share one."""
    from tailorcli.models.layers import find_layers

    places = guessed_places(expected_names(network, run.stored.tensors))
    layers = run.wanted(find_layers(network).values(), places)
    parameters = dict(network.named_parameters())
    linear = [layer for layer in layers if layer.role == "linear"]
    shared = {(layer.name.rpartition(".")[0].rpartition(".")[0], layer.size) for layer in linear}
    experts = [parameters[layer.name] for layer in layers if parameters[layer.name].dim() == 3 and not layer.modules]
    full = sum(4 * size**2 for _, size in shared)
    return full + int(sum(4 * parameter.shape[0] * max(parameter.shape[1:]) ** 2 for parameter in experts))


def _write_bias(run: Run) -> None:
    """The Hessian of all constants."""
    import torch

    from tailorcli.calibration.stats import BIAS_HESSIAN

    info = HessianInfo(1, "diagonal", run.samples.num_tokens, 2.0)
    run.writer.write(BIAS_HESSIAN, info, torch.tensor([2.0]))


def _entry(tensor: str, run: Run, layers: dict[str, Layer]) -> TensorStats:
    """The manifest's entry for a checkpoint tensor."""
    from tailorcli.calibration.stats import BIAS_HESSIAN

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
        return _expert_entry(layer, entry, place, info)
    return replace(entry, transposed=entry.transposed != place.transposed) if place.transposed else entry


def _expert_entry(layer: Layer, entry: TensorStats, place: Place, info: TensorInfo) -> TensorStats:
    """One expert's tensor of those that transformers fuses, or all of them where the checkpoint fuses them, too."""
    if place.part is None:
        if len(info.shape) == 3:
            return entry
        return TensorStats(None, reason="it holds several experts in a layout that is not known")
    hessian = entry.experts[place.part]
    note = "too few tokens reached this expert: the Hessian of all tokens of its layer serves for it"
    note = note if place.part in layer.pooled else ""
    return TensorStats(hessian, entry.role, entry.transposed != place.transposed, note=note)


def stats_of(layer: Layer) -> TensorStats:
    """The manifest's entry for a layer's weight."""
    return TensorStats(layer.group, layer.role, layer.transposed, layer.reason, list(layer.experts), layer.note)
