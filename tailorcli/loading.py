"""Models, tokenizers and processors through transformers, from local folders alone, with errors that a user can read.

Besides the demo, this is the only place that imports transformers.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli._version import __version__
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.data.encoder import Encoder
from tailorcli.errors import CheckpointError, first_line
from tailorcli.files import read_json
from tailorcli.options import LoadOptions

if TYPE_CHECKING:
    import torch

_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json", "pass the folder that save_pretrained wrote")
    return read_json(path / "config.json")


def num_positions(config: dict[str, Any]) -> int:
    """Positions that the model knows: a longer sample would leave its table, or what it was trained for."""
    text_config = config.get("text_config")
    for fields in (config, text_config if isinstance(text_config, dict) else {}):
        for name in _POSITIONS:
            if type(fields.get(name)) is int and fields[name] > 0:
                return int(fields[name])
    return sys.maxsize


def processor_folder(folder: Path, stored: Path, has_media: bool) -> Path:
    """Where the tokenizer or processor lies: beside an adapter there may be a tokenizer alone."""
    held = any((folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json"))
    return folder if not has_media or held else stored


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
            raise _cannot_load(model, read_config(model), error) from error
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
    """The model in its own class, with every weight from the checkpoint."""
    import torch

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
            raise _cannot_load(path, config, error) from error
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


def empty_model(checkpoint: Checkpoint, config: dict[str, Any], options: LoadOptions) -> Any:
    """The model without its weights: parameters take no memory, buffers are real."""
    import torch
    import transformers

    model_class = model_class_of(config, options)
    with quiet_transformers():
        try:
            trust = {"trust_remote_code": options.trust_remote_code}
            described = transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, **trust)
            dtype = run_dtype(checkpoint, described, options)
            with _parameters_on_meta(torch):
                if issubclass(model_class, transformers.PreTrainedModel):
                    return prepared(model_class._from_config(described, dtype=dtype))
                return prepared(model_class.from_config(described, dtype=dtype, **trust))
        except Exception as error:  # transformers raises whatever its parts raise
            raise _cannot_load(checkpoint.path, config, error) from error


def run_dtype(checkpoint: Checkpoint, config: Any, options: LoadOptions) -> torch.dtype:
    """The dtype in which the model runs: as asked for, as its config says, or as it is stored."""
    import torch

    if options.dtype != "auto":
        found = getattr(torch, options.dtype)
    else:
        stored = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        first = next((stored[i.dtype] for i in checkpoint.tensors.values() if i.dtype in stored), torch.float32)
        found = getattr(config, "dtype", None) or first
    assert isinstance(found, torch.dtype)
    return found


@contextmanager
def _parameters_on_meta(torch: Any) -> Iterator[None]:
    """Parameters that are made within give up their memory as soon as a module takes them."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = type(parameter)(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def load_weights(network: Any, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Fill the parameters of an empty model that these checkpoint tensors belong to, as transformers converts them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    dtype = next(network.parameters()).dtype
    settings = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=network._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(network),
    )
    with quiet_transformers():
        info, _ = convert_and_load_state_dict_in_model(network, tensors, settings)
    if info.conversion_errors or info.mismatched_keys:
        problem = next(iter((*info.conversion_errors.values(), *map(str, info.mismatched_keys))))
        raise CheckpointError(f"transformers cannot convert a tensor of this checkpoint: {problem}")


def fill_computed(network: Any, names: Iterable[str], device: torch.device) -> None:
    """Work out those empty parameters that a model never stores (sinusoidal positions), as it does on loading."""
    import torch

    patterns = network._keys_to_ignore_on_load_missing or ()
    for name in names:
        if any(re.search(pattern, name) for pattern in patterns):
            module, short = network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            empty = torch.empty_like(module._parameters[short], device=device)
            module._parameters[short] = torch.nn.Parameter(empty, requires_grad=False)
            with torch.no_grad():
                network._init_weights(module)


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
            raise _cannot_load(path, config, error) from error
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


def _cannot_load(path: Path, config: dict[str, Any], error: Exception) -> CheckpointError:
    hint = "see that its config.json belongs to these weights and names an architecture of transformers"
    if "auto_map" in config:
        hint = "pass --trust-remote-code if you trust its code"
    return CheckpointError(f"transformers cannot load {path}: {first_line(error)}", hint)


@contextmanager
def greedy_generation(network: Any, max_new_tokens: int) -> Iterator[Any]:
    """A configuration to generate with: always the likeliest token, whatever the model's own settings ask for."""
    import transformers

    own = network.generation_config
    tokens = {name: value for name, value in own.to_dict().items() if name.endswith("_token_id")}
    config = transformers.GenerationConfig(**tokens, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
    if config.pad_token_id is None:
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    with _generating_by(network, config):
        yield config


@contextmanager
def sampling_generation(
    network: Any, new_tokens: int, barred: Sequence[int] = (), ends: Sequence[int] = ()
) -> Iterator[Any]:
    """A configuration to sample so many tokens with, at temperature 1 from the whole vocabulary.

    The ``barred`` token ids are never drawn; one of the ``ends`` ends a row, which is then filled with zeros.
    """
    import transformers

    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        suppress_tokens=list(barred) or None,
    )
    with _generating_by(network, config):
        yield config


@contextmanager
def _generating_by(network: Any, config: Any) -> Iterator[None]:
    """The network's own configuration, from which comes what a call leaves open, is this one within."""
    own, network.generation_config = network.generation_config, config
    try:
        yield
    finally:
        network.generation_config = own


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
