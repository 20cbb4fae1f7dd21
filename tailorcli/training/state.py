"""What an interrupted distillation goes on from: the kept entries with their moments, and the best values so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import DTYPES, build_header, header_entry, read_header
from tailorcli.errors import CheckpointError, OutputError
from tailorcli.files import as_output_error
from tailorcli.system import sync_path
from tailorcli.training.distill import History
from tailorcli.training.entries import Trained

if TYPE_CHECKING:
    from torch import Tensor

_STATE, _HISTORY = "state", "history"  # in the metadata


def save_state(path: Path, step: int, history: History, now: Mapping[str, Tensor], best: Mapping[str, Tensor]) -> None:
    """Write it, whole or not at all; one tensor is copied to the CPU at a time. Raises OutputError."""
    import torch

    tensors = {f"now {name}": value for name, value in now.items()}
    tensors |= {f"best {name}": value for name, value in best.items()}
    names = {f"torch.{torch_name}": name for name, (_, torch_name) in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {_STATE: str(step), _HISTORY: json.dumps(history.to_dict())}}
    start = 0
    for name, value in tensors.items():
        entries[name] = header_entry(names[str(value.dtype)], value.shape, start, start + value.nbytes)
        start += value.nbytes
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(build_header(entries))
            for value in tensors.values():
                if value.numel():
                    file.write(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        sync_path(part)
        part.replace(path)
    except OSError as error:
        raise as_output_error(path, error) from error


def load_state(path: Path, trained: Trained) -> dict[str, Any]:
    """Take up a saved state: the arguments with which ``distill`` goes on. Raises OutputError where it is none."""
    try:
        infos, metadata = read_header(path)
        file = Checkpoint(path.parent, infos, [path])
        try:
            trained.load({name.removeprefix("now "): file.read(name) for name in infos if name.startswith("now ")})
            best = {name.removeprefix("best "): file.read(name) for name in infos if name.startswith("best ")}
        finally:
            file.close()
        if best.keys() != {f"values {each.name}" for each in trained.entries}:
            raise ValueError("its values are of other tensors")
        found = History(**json.loads(metadata[_HISTORY]))
        return {"start": int(metadata[_STATE]), "history": found, "best": best}
    except (CheckpointError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise OutputError(f"{path} is no state of this run: {error}", "start anew with --overwrite") from error
