"""Run the fine-tuned model over calibration data and store a Hessian for every parameter that has one.

transformers is imported only here and in the evaluation.
"""

from __future__ import annotations

import os
import platform
import reprlib
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli import __version__
from tailorcli.adapter import AdaptedCheckpoint, is_adapter, open_tuned, tokenizer_folder
from tailorcli.adapter_config import CONFIG_FILE, MERGE_HINT, read_settings
from tailorcli.checkpoint import PATCHABLE_DTYPES, Checkpoint, read_json
from tailorcli.data import Samples, draw_samples, make_batches
from tailorcli.device import StageTimer, device_errors, exact_float32, resolve_device
from tailorcli.errors import CheckpointError, DataError, OptionsError
from tailorcli.names import map_names
from tailorcli.options import CalibrateOptions
from tailorcli.plan import matches
from tailorcli.stats import HESSIANS, HessianInfo, TensorStats, prepare_folder, write_stats

if TYPE_CHECKING:
    import torch

    from tailorcli.collect import Layer

_TRIAL_TOKENS = 8  # a short run that finds out which layers share their inputs


@dataclass(frozen=True)
class CalibrateReport:
    """What a calibration gathered; ``uncalibrated`` maps a tensor's name to the reason."""

    output: str
    samples: int
    tokens: int
    hessians: int
    calibrated: int
    uncalibrated: dict[str, str]
    bytes: int
    seconds: float
    stages: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


def calibrate_model(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: CalibrateOptions = CalibrateOptions(),
    progress: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> CalibrateReport:
    """Run the checkpoint ``model`` over samples of ``data`` and write the statistics folder ``output``.

    One Hessian H = (2/N) sum x x^T per distinct layer input, over N tokens that are not padding. ``model`` is
    the *fine-tuned* checkpoint: its layer inputs on the new task are what Eq. 5 compares. It may be an adapter on
    ``base``, which defaults to the local folder that the adapter itself names. Raises TailorError.
    """
    started = perf_counter()
    folder = Path(output)
    with ExitStack() as stack:
        stored, checkpoint = _open(Path(model), base, stack)
        device = resolve_device(options.device)
        prepare_folder(folder, options.overwrite)
        timer = StageTimer(device)
        config = _read_config(stored.path)
        seen = replace(options, seq_len=min(options.seq_len, _num_positions(config)))
        samples = draw_samples(Path(data), _load_tokenizer(tokenizer_folder(checkpoint), options), seen)
        with timer.stage("load"), quiet_transformers():
            network = _load_model(stored, config, options)
            names = map_names(stored, network)  # checkpoint name -> name in the model, or a reason
            if isinstance(checkpoint, AdaptedCheckpoint):
                _adapt(network, checkpoint, names)
            network = network.to(device).eval()
        with exact_float32(), device_errors():
            tensors, hessians = _collect(network, checkpoint, names, samples, options, device, timer, progress)
        dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
        del network
        facts = {
            "model": {"path": str(checkpoint.path), "fingerprint": checkpoint.fingerprint(), "run_in": dtype}
            | ({} if stored is checkpoint else {"base": str(stored.path)}),
            "data": samples.facts,
            "options": options.to_dict() | {"overwrite": False},
            "versions": package_versions(),
        }
        with timer.stage("write"):
            write_stats(folder, hessians, tensors, facts)
    uncalibrated = {name: entry.reason for name, entry in tensors.items() if entry.hessian is None}
    return CalibrateReport(
        output=str(folder),
        samples=len(samples.token_ids),
        tokens=samples.num_tokens,
        hessians=len(hessians),
        calibrated=len(tensors) - len(uncalibrated),
        uncalibrated=uncalibrated,
        bytes=(folder / HESSIANS).stat().st_size,
        seconds=perf_counter() - started,
        stages=dict(timer.seconds),
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


def _adapt(network: Any, tuned: AdaptedCheckpoint, names: dict[str, tuple[str, str]]) -> None:
    """Overwrite each parameter that the adapter changes, in place and in the network's dtype."""
    import torch

    users = Counter(parameter for parameter, _ in names.values())
    parameters = dict(network.named_parameters())
    for name in sorted(tuned.changed):
        parameter, reason = names[name]
        if not parameter:
            raise CheckpointError(f"the adapter {tuned.path} changes tensor {name!r}, but {reason}", MERGE_HINT)
        if users[parameter] > 1:
            other = next(n for n, (p, _) in names.items() if p == parameter and n != name)
            raise CheckpointError(
                f"the adapter {tuned.path} changes tensor {name!r}, which the network ties to {other!r}",
                f"set tie_word_embeddings to false in {tuned.base.path / 'config.json'}, where both are stored",
            )
        with torch.no_grad():
            parameters[parameter].copy_(tuned.read(name))


def _collect(
    network: Any,
    checkpoint: Checkpoint,
    names: dict[str, tuple[str, str]],
    samples: Samples,
    options: CalibrateOptions,
    device: torch.device,
    timer: StageTimer,
    progress: bool,
) -> tuple[dict[str, TensorStats], list[tuple[str, HessianInfo, torch.Tensor]]]:
    """Run all samples; every checkpoint tensor's entry, and the packed Hessians."""
    import torch
    from tqdm import tqdm

    from tailorcli.collect import BIAS_HESSIAN, Collector, find_layers

    if getattr(network.config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{checkpoint.path} is an encoder-decoder model, which calibrate cannot run yet",
            "patch it without statistics, by salience alone: tailorcli patch BASE TUNED --solver none --omega 1 -o OUT",
        )
    layers, others = find_layers(network)
    parameter_of = {tensor: found for tensor, (found, _) in names.items() if found}
    chosen = {
        parameter
        for tensor, parameter in parameter_of.items()
        if matches(tensor, options.include, options.exclude) and checkpoint.tensors[tensor].dtype in PATCHABLE_DTYPES
    }
    wanted = [layer for layer in layers.values() if layer.name in chosen or _bias(layer) in chosen]
    if not wanted:
        raise OptionsError("no tensor of this model can be calibrated", "check --include and --exclude")
    _check_ids(samples, network)
    collector = Collector(network, wanted, device, timer)
    longest = max(samples.token_ids, key=len)[:_TRIAL_TOKENS]
    collector.discover(torch.tensor([longest], device=device))
    collector.allocate()
    bar = tqdm(
        total=samples.num_tokens, desc="calibrating", unit="tok", unit_scale=True, disable=None if progress else True
    )
    with bar, timer.stage("run"):
        for ids, mask in make_batches(samples.token_ids, options.batch_size):
            padded = any(0 in row for row in mask)
            collector.run(torch.tensor(ids, device=device), torch.tensor(mask, device=device) if padded else None)
            bar.update(sum(map(sum, mask)))
    with timer.stage("pack"):
        hessians = collector.results()
    entries = {}
    for tensor in checkpoint.tensors:
        parameter, reason = names[tensor]
        if not matches(tensor, options.include, options.exclude):
            reason = "not chosen by --include and --exclude at calibration"
        elif checkpoint.tensors[tensor].dtype not in PATCHABLE_DTYPES:
            reason = f"{checkpoint.tensors[tensor].dtype} is no floating-point dtype that can be patched"
        entries[tensor] = TensorStats(None, reason=reason) if reason else _entry(parameter, layers, others)
    if any(entry.hessian == BIAS_HESSIAN for entry in entries.values()):
        hessians.append((BIAS_HESSIAN, HessianInfo(1, "diagonal", samples.num_tokens, 2.0), torch.tensor([2.0])))
    return entries, hessians


def _entry(parameter: str, layers: dict[str, Layer], others: dict[str, str]) -> TensorStats:
    """The manifest's entry for a parameter of the model."""
    from tailorcli.collect import BIAS_HESSIAN, stats_of

    if parameter in layers:
        return stats_of(layers[parameter])
    weight = layers.get(parameter.removesuffix("bias") + "weight") if parameter.endswith("bias") else None
    if weight is not None:
        hessian = BIAS_HESSIAN if weight.group else None
        return TensorStats(hessian, "bias", reason=weight.reason)
    return TensorStats(None, reason=others.get(parameter, "it is a buffer, no parameter"))


def _bias(layer: Layer) -> str:
    return layer.name.removesuffix("weight") + "bias"


def _check_ids(samples: Samples, network: Any) -> None:
    """The tokenizer's ids fit the model's embedding: a mismatch would crash far inside the model."""
    rows = network.get_input_embeddings().weight.shape[0]
    highest = max(max(ids) for ids in samples.token_ids)
    if highest >= rows:
        raise DataError(
            f"the tokenizer gives token id {highest}, the model has {rows} embedding rows",
            "the model folder holds a tokenizer of another model",
        )


def _load_tokenizer(path: Path, options: CalibrateOptions) -> Any:
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=options.trust_remote_code
            )
        except Exception as error:  # transformers raises whatever its parts raise
            raise CheckpointError(
                f"transformers cannot load a tokenizer from {path}: {_first_line(error)}",
                "save it there: tokenizer.save_pretrained(DIR)",
            ) from error


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json", "pass the folder that save_pretrained wrote")
    return read_json(path / "config.json")


def _num_positions(config: dict[str, Any]) -> int:
    """Positions that the model knows: a longer sample would leave its table, or what it was trained for."""
    text_config = config.get("text_config")
    for fields in (config, text_config if isinstance(text_config, dict) else {}):
        for name in ("max_position_embeddings", "n_positions"):
            if type(fields.get(name)) is int and fields[name] > 0:
                return int(fields[name])
    return sys.maxsize


def _load_model(checkpoint: Checkpoint, config: dict[str, Any], options: CalibrateOptions) -> Any:
    """The model in its own class, with every weight from the checkpoint."""
    import torch
    import transformers

    path = checkpoint.path
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    model_class = getattr(transformers, str(name), transformers.AutoModelForCausalLM)
    if options.trust_remote_code and "auto_map" in config:
        model_class = transformers.AutoModelForCausalLM
    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    try:
        _check_shapes(checkpoint, model_class, options)
        network, info = model_class.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever its parts raise
        hint = "see that its config.json belongs to these weights and names an architecture of transformers"
        if "auto_map" in config:
            hint = "pass --trust-remote-code if you trust its code"
        raise CheckpointError(f"transformers cannot load {path}: {_first_line(error)}", hint) from error
    missing = sorted(map(str, info.get("missing_keys") or ()))
    if missing:
        raise CheckpointError(
            f"{path} does not fit its config.json: it lacks tensor {missing[0]} ({len(missing)} such)",
            "a model with random weights in it would give meaningless statistics; save the checkpoint again",
        )
    return network


def _check_shapes(checkpoint: Checkpoint, model_class: Any, options: CalibrateOptions) -> None:
    """The config describes a model of these weights' shapes and size: asked of a model without memory.

    transformers would fill what is missing with random numbers before it says so, however large it is.
    """
    import torch
    import transformers

    path, trust = checkpoint.path, {"trust_remote_code": options.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, **trust)
    if getattr(config, "quantization_config", None) is not None:
        return  # stored in other shapes on purpose
    with torch.device("meta"):
        automatic = not issubclass(model_class, transformers.PreTrainedModel)
        empty = model_class.from_config(config, **trust) if automatic else model_class(config)
    hint = "save model and config again, together"
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        info = checkpoint.tensors.get(name)
        if info is not None and info.shape != tuple(parameter.shape):
            shapes = f"has shape {list(info.shape)}, its config.json asks for {list(parameter.shape)}"
            raise CheckpointError(f"{path} does not fit its config.json: tensor {name!r} {shapes}", hint)
    asked, held = empty.num_parameters(), sum(info.numel for info in checkpoint.tensors.values())
    if asked > 2 * held:
        numbers = f"it holds {held:,} parameters, its config.json describes {asked:,}"
        raise CheckpointError(f"{path} does not fit its config.json: {numbers}", hint)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers between ours; its settings come back after."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def package_versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import torch
    import transformers

    return {
        "tailorcli": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
