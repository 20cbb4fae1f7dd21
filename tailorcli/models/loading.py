"""Models, tokenizers and processors through transformers, from local folders alone, with errors that a user can read.

Besides the demo, this is the only place that imports transformers.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli._version import __version__
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.data.encoder import Encoder
from tailorcli.errors import CheckpointError, first_line
from tailorcli.models.config import read_config
from tailorcli.options import LoadOptions

if TYPE_CHECKING:
    pass


def load_encoder(folder: Path, model: Path, has_media: bool, options: LoadOptions) -> Encoder:
    """What turns records into inputs: the tokenizer in ``folder``, or its processor where the data has images or sound.

    ``model`` is the folder whose config says whether there is a decoder to feed.
    """
    import transformers

    start = None
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(
                model, local_files_only=True, trust_remote_code=options.trust_remote_code
            )
        except Exception as error:  # transformers raises whatever its parts raise
            raise cannot_load(model, read_config(model), error) from error
    if getattr(config, "is_encoder_decoder", False):
        tokens = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
        start = next((token for token in tokens if isinstance(token, int)), 0)
    kinds = ("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor") if has_media else ("AutoTokenizer",)
    problem: Exception | None = None
    with quiet_transformers():
        for kind in kinds:
            try:
                processor = getattr(transformers, kind).from_pretrained(
                    folder, local_files_only=True, trust_remote_code=options.trust_remote_code
                )
            except Exception as error:  # transformers raises whatever its parts raise
                problem = problem or error
            else:
                media = has_media and not isinstance(processor, transformers.PreTrainedTokenizerBase)
                return Encoder(processor, start, media)
    assert problem is not None
    what = "a processor for images or sound" if has_media else "a tokenizer"
    raise CheckpointError(
        f"transformers cannot load {what} from {folder}: {first_line(problem)}",
        f"save it there: {'processor' if has_media else 'tokenizer'}.save_pretrained(DIR)",
    ) from problem


def model_class_of(config: dict[str, Any], options: LoadOptions) -> Any:
    """The class that a config names, or the automatic one for code of the model's own."""
    import transformers

    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if options.trust_remote_code and "auto_map" in config:
        return transformers.AutoModelForCausalLM
    return getattr(transformers, str(name), transformers.AutoModelForCausalLM)


def load_model(checkpoint: Checkpoint, config: dict[str, Any], options: LoadOptions) -> Any:
    """The model in its own class, with every weight from the checkpoint; quantised ones as what they stand for."""
    import torch

    if checkpoint.dequantized:
        from tailorcli.models.parts import load_from_view  # which imports this module

        return load_from_view(checkpoint, config, options)
    path = checkpoint.path
    model_class = model_class_of(config, options)
    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    with quiet_transformers():
        try:
            network, info = model_class.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=options.trust_remote_code,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises whatever its parts raise
            raise cannot_load(path, config, error) from error
    require_all(path, info.get("missing_keys") or ())
    return prepared(network)


def require_all(path: Path, missing: Iterable[object]) -> None:
    """Refuse a checkpoint that lacks weights of its model."""
    names = sorted(map(str, missing))
    if names:
        raise CheckpointError(
            f"{path} does not fit its config.json: it lacks tensor {names[0]} ({len(names)} such)",
            "a model with random weights in it would give meaningless statistics; save the checkpoint again",
        )


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


def expected_names(network: Any, names: Iterable[str]) -> dict[str, str]:
    """The parameter in which each checkpoint tensor should be found, by transformers' conversion tables.

    A first guess: where this version of transformers has no such tables, the name itself.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return {name: name for name in names}
    mapping = get_model_conversion_mapping(network)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    held = dict.fromkeys((*dict(network.named_parameters(remove_duplicate=False)), *network.state_dict()), True)
    found = {}
    for name in names:
        renamed, _ = rename_source_key(name, renamings, converters, network.base_model_prefix, held)
        if renamed not in held and name in held:
            renamed = name
        elif renamed not in held:
            plain, _ = rename_source_key(name, [], [], network.base_model_prefix, held)
            renamed = plain if plain in held else renamed
        found[name] = renamed
    return found


def aliases(network: Any) -> dict[str, str]:
    """Further names of tied parameters, each with the name that ``named_parameters`` gives it first."""
    parameters = dict(network.named_parameters())
    first = {id(value): name for name, value in parameters.items()}
    every = dict(network.named_parameters(remove_duplicate=False))
    return {name: first[id(value)] for name, value in every.items() if name not in parameters}


def check_shapes(checkpoint: Checkpoint, config: dict[str, Any], options: LoadOptions) -> None:
    """The config describes a model of these weights' shapes and size: asked of a model without memory.

    transformers would fill what is missing with random numbers before it says so, however large it is.
    """
    import torch
    import transformers

    path, trust = checkpoint.path, {"trust_remote_code": options.trust_remote_code}
    model_class = model_class_of(config, options)
    with quiet_transformers():
        try:
            described = transformers.AutoConfig.from_pretrained(path, local_files_only=True, **trust)
            if getattr(described, "quantization_config", None) is not None:
                return  # stored in other shapes on purpose
            with torch.device("meta"):
                automatic = not issubclass(model_class, transformers.PreTrainedModel)
                empty = model_class.from_config(described, **trust) if automatic else model_class(described)
        except Exception as error:  # transformers raises whatever its parts raise
            raise cannot_load(path, config, error) from error
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


def cannot_load(path: Path, config: dict[str, Any], error: Exception) -> CheckpointError:
    """The user's error for a model that transformers refuses."""
    hint = "see that its config.json belongs to these weights and names an architecture of transformers"
    if "auto_map" in config:
        hint = "pass --trust-remote-code if you trust its code"
    return CheckpointError(f"transformers cannot load {path}: {first_line(error)}", hint)


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
