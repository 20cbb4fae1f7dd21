"""Models, tokenizers and processors through transformers, from local folders alone, with errors that a user can read.

Besides the demo, this is the only place that imports transformers.
"""

from __future__ import annotations

import platform
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tailorcli._version import __version__
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES
from tailorcli.checkpoint.quantized import refuse_scales
from tailorcli.data.encoder import Encoder
from tailorcli.device import Held
from tailorcli.errors import CheckpointError, first_line, note
from tailorcli.files import require_files
from tailorcli.models.config import num_positions, read_config, require_buildable
from tailorcli.options import LoadOptions

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
HOLLOW_HINT = (
    "DeepSpeed ZeRO-3 saved it without gathering its weights: set stage3_gather_16bit_weights_on_model_save, or make "
    "the checkpoint with zero_to_fp32.py"
)


def load_encoder(folder: Path, model: Path, has_media: bool, options: LoadOptions) -> Encoder:
    """What turns records into inputs: the tokenizer in ``folder``, or its processor where the data has images or sound.

    ``model`` is the folder whose config says whether there is a decoder to feed. Raises CheckpointError where the
    folder has none that loads.
    """
    import transformers

    start = None
    read_config(model)
    require_files(folder)
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(
                model, local_files_only=True, trust_remote_code=options.trust_remote_code
            )
        except Exception as error:  # transformers raises whatever its parts raise
            raise cannot_load(model, read_config(model), error, options) from error
    if getattr(config, "is_encoder_decoder", False):
        tokens = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
        start = next((token for token in tokens if isinstance(token, int)), 0)
    kinds = ("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor") if has_media else ("AutoTokenizer",)
    if has_media and any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        kinds = kinds[:1]  # a processor of images alone would leave out the text beside them
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
    hint = f"save it there: {'processor' if has_media else 'tokenizer'}.save_pretrained(DIR)"
    if "torchvision" in str(problem).lower():
        hint = "install what it needs: pip install torchvision"
    elif isinstance(problem, ImportError):
        hint = "install the packages that it needs"
    raise CheckpointError(f"transformers cannot load {what} from {folder}: {first_line(problem)}", hint) from problem


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


def load_model(checkpoint: Checkpoint, config: dict[str, Any], options: LoadOptions, folder: Path | None = None) -> Any:
    """The model in its own class, with every weight from the checkpoint; quantised ones as what they stand for.

    ``config`` is read from ``folder``, which is the checkpoint's own unless it is given. Raises CheckpointError where
    transformers cannot load it or weights are missing.
    """
    import torch

    # An adapter that was merged into these very weights may lie beside them: transformers would apply it again.
    beside = (checkpoint.path / "adapter_config.json").exists()
    wrapped = any(unwrapped(name) != name for name in checkpoint.tensors)
    if checkpoint.dequantized or not checkpoint.is_found or wrapped or beside:
        from tailorcli.models.parts import load_from_view  # which imports this module

        return load_from_view(checkpoint, config, options, folder)
    path = checkpoint.path
    model_class = model_class_of(config, options)
    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    own = described(checkpoint, config, options, folder)
    with one_at_a_time():
        try:
            network, info = model_class.from_pretrained(
                path,
                config=own,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=options.trust_remote_code,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises whatever its parts raise
            raise cannot_load(path, config, error, options) from error
    require_all(path, info.get("missing_keys") or ())
    refuse_scales(checkpoint, info.get("unexpected_keys") or ())  # it would run the codes as if they were weights
    return prepared(network)


def require_all(path: Path, missing: Iterable[object]) -> None:
    """Raise CheckpointError where a checkpoint lacks weights of its model."""
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


def unwrapped(name: str) -> str:
    """A tensor's name without what torch's wrappers put into it: compiled, sharded and parallel modules."""
    words = name.removeprefix("module.").split(".")
    return ".".join(word for word in words if word not in _WRAPPERS)


def expected_names(network: Any, names: Iterable[str]) -> dict[str, str]:
    """The parameter in which each checkpoint tensor should be found, by transformers' conversion tables.

    A first guess: where this version of transformers has no such tables, the name itself.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return {name: unwrapped(name) for name in names}
    mapping = get_model_conversion_mapping(network)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    held = dict.fromkeys((*dict(network.named_parameters(remove_duplicate=False)), *network.state_dict()), True)
    found = {}
    for name in names:
        plain = name if name in held else unwrapped(name)
        renamed, _ = rename_source_key(plain, renamings, converters, network.base_model_prefix, held)
        if renamed not in held and plain in held:
            renamed = plain
        elif renamed not in held:
            bare, _ = rename_source_key(plain, [], [], network.base_model_prefix, held)
            renamed = bare if bare in held else renamed
        found[name] = renamed
    return found


def aliases(network: Any) -> dict[str, str]:
    """Further names of tied parameters, each with the name that ``named_parameters`` gives it first."""
    parameters = dict(network.named_parameters())
    first = {id(value): name for name, value in parameters.items()}
    every = dict(network.named_parameters(remove_duplicate=False))
    return {name: first[id(value)] for name, value in every.items() if name not in parameters}


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


def cannot_load(path: Path, config: dict[str, Any], error: Exception, options: LoadOptions) -> CheckpointError:
    """The user's error for a model that transformers refuses."""
    hint = "see that its config.json belongs to these weights and names an architecture of transformers"
    if "auto_map" in config and not options.trust_remote_code:
        hint = "pass --trust-remote-code if you trust its code"
    elif isinstance(error, ImportError):
        hint = "install the packages that it needs"
    elif "auto_map" in config:
        hint = "see that its own code fits this version of transformers, and its config.json these weights"
    return CheckpointError(f"transformers cannot load {path}: {first_line(error)}", hint)


def _hold_quiet() -> Callable[[], object]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def put_back() -> None:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

    return put_back


quiet_transformers = Held(_hold_quiet)
"""No progress bars and no warnings of transformers between ours."""

_building = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Within it a model is built, quietly, by one thread at a time.

    While it is, transformers replaces its ``tie_weights`` and torch's default dtype for the whole process: calls that
    overlapped left the one that ties nothing behind, and every later model without its output layer.
    """
    with _building, quiet_transformers():
        yield


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
