"""Models without weights, in no memory: what a config describes, before anything of its size is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES
from tailorcli.errors import CheckpointError, note
from tailorcli.models.calling import cannot_load, one_at_a_time, quiet_transformers
from tailorcli.models.config import num_positions, require_buildable
from tailorcli.models.names import aliases, expected_names
from tailorcli.options import LoadOptions

HOLLOW_HINT = (
    "DeepSpeed ZeRO-3 saved it without gathering its weights: set stage3_gather_16bit_weights_on_model_save, or make "
    "the checkpoint with zero_to_fp32.py"
)


def model_class_of(config: dict[str, Any], options: LoadOptions) -> Any:
    """The class that a config names, or the automatic one for code of the model's own."""
    import transformers

    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    automatic = transformers.AutoModelForCausalLM
    if options.trust_remote_code and isinstance(config.get("auto_map"), dict):
        own = {
            auto: str(code).rpartition(".")[2]
            for auto, code in config["auto_map"].items()
            if auto.startswith("AutoModel") and hasattr(transformers, auto)
        }
        # That of the class which was saved; of several alike the one that has a head.
        ranked = sorted(own, key=lambda auto: (own[auto] != name, auto != automatic.__name__, auto == "AutoModel"))
        if ranked:
            return getattr(transformers, ranked[0])
    return getattr(transformers, name, automatic)


def described(checkpoint: Checkpoint, config: dict[str, Any], options: LoadOptions, folder: Path | None = None) -> Any:
    """The configuration by which the model is run here, which is its own but for three things, each told in a note.

    A quantization that its weights no longer have (it stays behind where an adapter was merged in full precision)
    is left out, and so are a kernel for its attention that this machine lacks and the tie of tables that are stored
    with different values. ``folder`` is where the configuration lies, if that is another model's. Raises
    CheckpointError.
    """
    import torch
    import transformers

    path, trust = folder or checkpoint.path, {"trust_remote_code": options.trust_remote_code}
    require_buildable(path, config, len(checkpoint.tensors))
    with quiet_transformers():
        try:
            found = transformers.AutoConfig.from_pretrained(path, local_files_only=True, **trust)
            parts = [found, *(getattr(found, name, None) for name in getattr(found, "sub_configs", ()))]
            dtypes = {info.dtype for info in checkpoint.tensors.values()}
            plain = dtypes <= {*PATCHABLE_DTYPES, "BOOL", "I64"}  # nothing packed or in eight bits
            for part in parts if plain else ():
                if getattr(part, "quantization_config", None) is not None:
                    del part.quantization_config
                    if not checkpoint.dequantized:
                        note(f"{path} is stored in full precision: its config's quantization_config is left out")
            asked = {getattr(part, "_attn_implementation", None) for part in parts} - {None, "eager", "sdpa"}
            if asked:
                try:
                    _on_meta(model_class_of(config, options), found, trust, torch)
                except Exception:  # whatever transformers, or a kernel's own package, makes of its absence
                    found._attn_implementation = None
                    name = sorted(map(str, asked))[0]
                    note(f"{path} asks for {name}, which is not installed: torch's own attention stands in for it")
            if _might_be_untied(checkpoint, parts):
                network = _on_meta(model_class_of(config, options), found, trust, torch)
                if other := _untied(checkpoint, network):
                    for part in parts:
                        part.tie_word_embeddings = False
                    note(f"{checkpoint.path} stores {other} with values of its own: its config's tie is left out")
        except Exception as error:  # transformers raises whatever its parts raise
            raise cannot_load(path, config, error, options) from error
    return found


def _might_be_untied(checkpoint: Checkpoint, configs: Iterable[Any]) -> bool:
    """Whether a config ties tables of which two are stored, by their shapes: a quick look, before a model is built."""
    tying = [one for one in configs if getattr(one, "tie_word_embeddings", False)]
    rows = {getattr(one, "vocab_size", None) for one in tying}
    tables = Counter(info.shape for info in checkpoint.tensors.values() if len(info.shape) > 1)
    return any(count > 1 and shape[0] in rows for shape, count in tables.items())


def _untied(checkpoint: Checkpoint, network: Any) -> str:
    """The name of a tensor that ``network`` ties to another with other values, as transformers unties it; or none.

    None, too, where a further tied table is not stored: it would be without values if the tie were left out.
    """
    tied = aliases(network)
    stored = {parameter: name for name, parameter in expected_names(network, checkpoint.tensors).items()}
    if not all(alias in stored and first in stored for alias, first in tied.items()):
        return ""
    pairs = [(stored[alias], stored[first]) for alias, first in tied.items()]
    return next((name for name, other in pairs if not checkpoint.are_equal(name, other)), "")


def empty_on_meta(
    checkpoint: Checkpoint, config: dict[str, Any], options: LoadOptions, folder: Path | None = None
) -> Any:
    """The model without weights, in no memory at all. Raises CheckpointError.

    ``config`` is read from ``folder``, which is the checkpoint's own unless it is given.
    """
    import torch

    own = described(checkpoint, config, options, folder)
    with one_at_a_time():
        try:
            trust = {"trust_remote_code": options.trust_remote_code}
            return _on_meta(model_class_of(config, options), own, trust, torch)
        except Exception as error:  # transformers raises whatever its parts raise
            raise cannot_load(checkpoint.path, config, error, options) from error


def _on_meta(model_class: Any, config: Any, trust: dict[str, bool], torch: Any) -> Any:
    """A model of this config that takes no memory and has no weights."""
    import transformers

    with torch.device("meta"):
        automatic = not issubclass(model_class, transformers.PreTrainedModel)
        return model_class.from_config(config, **trust) if automatic else model_class(config)


def require_all(path: Path, missing: Iterable[object]) -> None:
    """Raise CheckpointError where a checkpoint lacks weights of its model."""
    names = sorted(map(str, missing))
    if names:
        raise CheckpointError(
            f"{path} does not fit its config.json: it lacks tensor {names[0]} ({len(names)} such)",
            "a model with random weights in it would give meaningless statistics; save the checkpoint again",
        )


def check_shapes(
    checkpoint: Checkpoint, config: dict[str, Any], options: LoadOptions, folder: Path | None = None
) -> None:
    """The config describes a model of these weights' shapes and size: asked of a model without memory.

    transformers would fill what is missing with random numbers before it says so, however large it is. ``config`` is
    read from ``folder``, which is the checkpoint's own unless it is given. Raises CheckpointError.
    """
    path = checkpoint.path
    empty = empty_on_meta(checkpoint, config, options, folder)
    if getattr(empty.config, "quantization_config", None) is not None:
        return  # stored in other shapes on purpose
    hollow = next((info.name for info in checkpoint.tensors.values() if 0 in info.shape), None)
    hint = "save model and config again, together" if hollow is None else HOLLOW_HINT
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        info = checkpoint.tensors.get(name)
        if info is not None and info.shape != tuple(parameter.shape):
            shapes = f"has shape {list(info.shape)}, its config.json asks for {list(parameter.shape)}"
            raise CheckpointError(f"{path} does not fit its config.json: tensor {name!r} {shapes}", hint)
    asked, held = empty.num_parameters(), sum(info.numel for info in checkpoint.tensors.values())
    if asked > 2 * held:
        numbers = f"it holds {held:,} parameters, its config.json describes {asked:,}"
        raise CheckpointError(f"{path} does not fit its config.json: {numbers}", hint)


def most_tokens(checkpoint: Checkpoint, config: dict[str, Any], options: LoadOptions) -> int:
    """Tokens that a sample may have: the positions that the config names, or those that a table of them has left.

    A table with a row for padding (RoBERTa's and its kin's) counts from the row after it, so that the first
    ``padding_idx`` + 1 rows are no token's position. Raises CheckpointError.
    """
    limit = num_positions(config)
    for name, module in empty_on_meta(checkpoint, config, options).named_modules():
        padding, rows = getattr(module, "padding_idx", None), getattr(module, "num_embeddings", None)
        if "position" in name.rpartition(".")[2] and isinstance(padding, int) and isinstance(rows, int):
            limit = min(limit, rows - padding - 1)
    return limit


def prepared(network: Any) -> Any:
    """A model made ready to be watched: no caches, and experts called one by one rather than all in one kernel."""
    for module in network.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    if hasattr(network, "set_experts_implementation") and _has_fused_experts(network):
        with quiet_transformers():
            network.set_experts_implementation("eager")
    return network.eval()


def _has_fused_experts(network: Any) -> bool:
    return any(parameter.dim() == 3 for parameter in network.parameters())
