"""What a model folder says of itself in its config, before the model is loaded."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailorcli.checkpoint.folder import CARDS, other_files
from tailorcli.errors import CheckpointError, TailorError
from tailorcli.files import read_bytes, read_json, require_files

_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises CheckpointError where it is missing, not JSON, or names no architecture."""
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json", "pass the folder that save_pretrained wrote")
    require_files(path)
    config = read_json(path / "config.json")
    require_counts(path, config, _MOST_OF_ANYTHING)
    # The class that all others derive from: transformers would make one, and take what it finds there for all of them.
    if config.get("architectures") == ["PreTrainedModel"]:
        what = f"{path / 'config.json'} names PreTrainedModel, which is no architecture"
        raise CheckpointError(what, "download or save it again")
    return config


_COUNTED = re.compile(r"layer|block|depth|stage|expert|head|group|label|class")  # a part of the model, or a name
_BUILT = re.compile(r"layer|block|depth|stage|expert")  # each has tensors of its own, but where they are shared
_NO_COUNT = re.compile(
    r"size|dim|channel|vocab|theta|_ids?$|token|length|factor|offset|2id$|2label$|^task_specific_params$"
)
_MOST_OF_ANYTHING = 1 << 17
_MOST_SHARED = 1024  # layers that one tensor may serve


def require_counts(path: Path, config: dict[str, Any], most: int, names: re.Pattern[str] = _COUNTED) -> None:
    """No count of parts is above ``most``: transformers would build them one by one, without end.

    Raises CheckpointError that names the field.
    """
    for name, value in config.items():
        if _NO_COUNT.search(name):
            continue
        if isinstance(value, dict):
            require_counts(path, value, most, names)
        numbers = value if isinstance(value, list) else [value]
        if names.search(name) and any(type(number) in (int, float) and number > most for number in numbers):
            what = f"{path / 'config.json'}: {name} is {reprlib.repr(value)}, expected {most:,} at most"
            raise CheckpointError(what, "see that it belongs to these weights; download or save it again")


def require_buildable(path: Path, config: dict[str, Any], tensors: int) -> None:
    """A model of so many ``tensors`` can have the layers and experts that the config counts. Raises CheckpointError."""
    require_counts(path, config, max(_MOST_SHARED, tensors), _BUILT)


# Fields of a config that a forward pass does not depend on.
_NO_MATTER = re.compile(
    r"(^|\.)(_\w+|transformers_version|architectures|auto_map|dtype|torch_dtype|use_cache|quantization_config.*|"
    r"\w*dropout\w*|\w*drop|\w*pdrop|initializer_\w+|\w+_token_id|\w+_token_index|task_specific_params.*|id2label.*|label2id.*|"
    r"output_attentions|output_hidden_states|return_dict|vocab_size|router_aux_loss_coef|pretraining_tp|"
    r"do_sample|max_length|min_length|num_beams|temperature|top_k|top_p|repetition_penalty|length_penalty)$"
)


def differing_fields(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The fields in which two configs ask for another forward pass, as "name (value, other value)", sorted."""
    first, second = _flat(one), _flat(other)
    names = sorted(name for name in first.keys() | second.keys() if not _NO_MATTER.search(name))
    told = [(name, first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)]
    return [f"{name} ({_shown(before)}, {_shown(after)})" for name, before, after in told]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name; a field that says nothing (null) is as good as none."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value
    return found


def _shown(value: Any) -> str:
    return "not given" if value is None else reprlib.repr(value)


_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def writes_samples(config: dict[str, Any]) -> bool:
    """Whether a model writes samples of its own, as far as its config tells.

    No encoder-decoder does, no classifier, and none that writes to a picture alone (BLIP, BLIP-2, InstructBLIP).
    """
    if config.get("is_encoder_decoder") or "blip" in str(config.get("model_type")):
        return False
    names = config.get("architectures")
    known = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return not known or any(name.endswith(_WRITERS) for name in known)


def num_positions(config: dict[str, Any]) -> int:
    """Positions that a config names: a longer sample would leave the model's table, or what it was trained for."""
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


def vocabulary_of(folder: Path) -> dict[str, int] | None:
    """Token to id, of the vocabulary and what was added to it; None where that cannot be read."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        content = read_json(file)
        vocab = content["model"]["vocab"]
        found = dict(vocab) if isinstance(vocab, dict) else {str(entry[0]): n for n, entry in enumerate(vocab)}
        return found | {str(token["content"]): token["id"] for token in content.get("added_tokens") or ()}
    except (TailorError, KeyError, TypeError, IndexError, ValueError):
        return None


def moved_tokens(base: Mapping[str, int], tuned: Mapping[str, int]) -> int:
    """How many tokens of both vocabularies have another id in one: a row of a table then stands for different tokens.

    >>> moved_tokens({"a": 0, "b": 1, "c": 2}, {"a": 1, "b": 0, "c": 2, "d": 3})
    2
    """
    return sum(base[token] != tuned[token] for token in base.keys() & tuned.keys())


_NO_TOKENIZER = (
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "training_args.bin",
    ".gitattributes",
    *CARDS,
)
_SAYS_NOTHING = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")  # of config.json; the rest may


def tokenizer_digest(folder: Path, model: Path) -> str:
    """A hash of all that can decide how a model encodes: its config, and every side file but a few of ``folder``.

    ``model`` is the folder of the config: another one where the tokenizer lies with an adapter.
    """
    digest = hashlib.blake2b(_said_of_model(model), digest_size=16)
    for name in other_files(folder):
        if str(name) not in _NO_TOKENIZER:
            digest.update(f"{name}\0".encode())
            digest.update(hashlib.blake2b(read_bytes(folder / name)).digest())
    return digest.hexdigest()


def configs_of(folders: Mapping[str, Path]) -> dict[str, str]:
    """What decides the outputs of models besides their weights: a hash of each one's config, as "ROLE config".

    It is empty where there is no config that can be read.
    """
    return {f"{role} config": config_digest(folder) for role, folder in folders.items()}


def config_digest(folder: Path) -> str:
    """A hash of what config.json says of a model; empty where none can be read."""
    try:
        return hashlib.blake2b(_said_of_model(folder), digest_size=16).hexdigest()
    except TailorError:
        return ""


def _said_of_model(folder: Path) -> bytes:
    """A config without what says nothing of the model, in one form. Raises CheckpointError."""
    config = {key: value for key, value in read_config(folder).items() if key not in _SAYS_NOTHING}
    return json.dumps(config, sort_keys=True).encode()
