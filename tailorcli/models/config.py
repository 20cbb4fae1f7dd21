"""What a model folder says of itself in its config, before the model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tailorcli.errors import CheckpointError
from tailorcli.files import read_json

_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json", "pass the folder that save_pretrained wrote")
    return read_json(path / "config.json")


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
