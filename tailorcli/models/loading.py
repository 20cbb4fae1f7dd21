"""Models, tokenizers and processors through transformers, from local folders alone; its errors in a user's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.quantized import refuse_scales
from tailorcli.data.encoder import Encoder
from tailorcli.errors import CheckpointError, first_line
from tailorcli.files import require_files
from tailorcli.models.calling import cannot_load, one_at_a_time, quiet_transformers
from tailorcli.models.config import read_config
from tailorcli.models.empty import described, model_class_of, prepared, require_all
from tailorcli.models.names import unwrapped
from tailorcli.models.parts import load_from_view
from tailorcli.options import LoadOptions


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
