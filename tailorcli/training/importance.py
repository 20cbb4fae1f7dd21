"""The folder that ``probe`` writes: Model-Dowser's score of every entry that was probed, and a manifest.

Scores are in bfloat16, two bytes an entry, so that any share can be trained without probing again; a mask is made of
them for each share, and is held as bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tailorcli.checkpoint.header import TensorInfo, read_header
from tailorcli.errors import CheckpointError, OutputError, TailorError
from tailorcli.files import PathLike, as_output_error, given_path, read_json, write_text_atomically
from tailorcli.guard import entries
from tailorcli.system import sync_path
from tailorcli.typed import field_of, read_object, read_text

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "importance.json"
SCORES = "scores.safetensors"
FORMAT_VERSION = 1
_AGAIN = "probe again: tailorcli probe BASE -o IMPORTANCE"


class ImportanceError(TailorError):
    """An importance folder is missing, damaged, or was made of another base."""


class Importance:
    """An opened importance folder; ``digests`` tell the values of what was probed, ``reasons`` why the rest was not."""

    def __init__(self, path: Path, manifest: dict[str, Any], infos: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.manifest = manifest
        self.infos = infos
        self.digests: dict[str, str] = {
            name: field_of(manifest["parameters"], name, read_text) for name in manifest["parameters"]
        }
        self.reasons: dict[str, str] = {
            name: field_of(manifest["unscored"], name, read_text) for name in manifest["unscored"]
        }
        self.fingerprint: str = field_of(field_of(manifest, "base", read_object), "fingerprint", read_text)

    @classmethod
    def open(cls, path: PathLike) -> Self:
        """Open the folder ``path``. Raises ImportanceError where it is missing, unfinished or damaged."""
        folder = given_path(path)
        if not (folder / MANIFEST).exists():
            raise ImportanceError(f"{folder} holds no importance ({MANIFEST} is missing)", _AGAIN)
        try:
            manifest = read_json(folder / MANIFEST)
            if manifest.get("format_version") != FORMAT_VERSION:
                found = manifest.get("format_version")
                raise ImportanceError(f"{folder / MANIFEST} has format_version {found!r}", _AGAIN)
            for name in ("parameters", "unscored"):
                field_of(manifest, name, read_object)
            infos, _ = read_header(folder / SCORES)
            opened = cls(folder, manifest, infos)
        except (CheckpointError, ValueError, KeyError) as error:
            raise ImportanceError(f"{folder} is damaged: {error}", _AGAIN) from error
        sound = all(name in infos and infos[name].dtype == "BF16" for name in opened.digests)
        if not sound:
            raise ImportanceError(f"{folder} is damaged: {SCORES} lacks scores that {MANIFEST} names", _AGAIN)
        return opened

    def read(self, name: str) -> Tensor:
        """The scores of a parameter, float32 in its shape. Raises ImportanceError for such as are no scores."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / SCORES, "pt") as file:
                score: Tensor = file.get_tensor(name).float()
        except (SafetensorError, OSError) as error:
            raise ImportanceError(f"{self.path / SCORES} cannot be read: {error}", _AGAIN) from error
        if not bool((score >= 0).all()) or not bool(score.isfinite().all()):
            raise ImportanceError(f"{self.path} is damaged: the scores of {name!r} are no finite numbers", _AGAIN)
        return score

    def bits(self, name: str, parameter: Tensor | None, ratio: float) -> Tensor:
        """The mask of a parameter's ``ratio`` lowest scores as bits, (ceil(numel / 8),) uint8.

        ``parameter`` holds the base's values; without it they are known to be those. Raises ImportanceError where the
        scores are of another base.
        """
        from tailorcli.core.dowser import least_important, packed
        from tailorcli.training.choice import sample_digest

        if parameter is not None and sample_digest(parameter) != self.digests[name]:
            what = f"{self.path} was made of another base, or in float16: parameter {name!r} has other values"
            raise ImportanceError(what, f"{_AGAIN}, of this one")
        return packed(least_important(self.read(name), ratio))


def prepare(folder: Path, overwrite: bool) -> None:
    """See that ``folder`` may take an importance: it is new, empty, or an earlier one that is given up.

    Raises OutputError.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} exists and is a file", "choose another folder for -o")
    present = [entry.name for entry in entries(folder)] if folder.exists() else []
    ours = (MANIFEST, SCORES, MANIFEST + ".part", SCORES + ".part")
    foreign = [name for name in present if name not in ours]
    if foreign:
        raise OutputError(f"{folder} holds other files ({foreign[0]}, ...)", "choose another folder for -o")
    if MANIFEST in present and not overwrite:
        raise OutputError(f"{folder} already holds an importance", "choose another folder, or pass --overwrite")


def write(folder: Path, scores: Mapping[str, Tensor], manifest: dict[str, Any]) -> None:
    """Write scores, then the manifest, without which the folder is no importance. Raises OutputError."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = folder / (SCORES + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.to(torch.bfloat16).contiguous() for name, value in scores.items()}, part)
        sync_path(part)
        (folder / MANIFEST).unlink(missing_ok=True)  # an earlier one is whole until now
        part.replace(folder / SCORES)
        text = json.dumps({"format_version": FORMAT_VERSION} | manifest, indent=1) + "\n"
        write_text_atomically(folder / MANIFEST, text)
    except OSError as error:
        raise as_output_error(folder, error) from error
    except SafetensorError as error:  # which tells of a full disk, too
        raise OutputError(
            f"cannot write {part}: {error}", "free some space, or choose another folder for -o"
        ) from error
