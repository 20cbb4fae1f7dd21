"""A LoRA adapter folder, seen as the checkpoint that merging it into its base would give.

Nothing is merged on disk: ``AdaptedCheckpoint.read`` forms W_base + scale * B A for one tensor at a time. The result
is not rounded to the base's dtype, since a fine-tuned change is often smaller than a step of bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tailorcli.adapters.config import CONFIG_FILE, read_settings
from tailorcli.adapters.fit import WEIGHTS_FILE, Formula, LoadedNames, fit_adapter
from tailorcli.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint, side_files
from tailorcli.checkpoint.header import TensorInfo, torch_dtype
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.errors import CheckpointError, NumericalError, OptionsError
from tailorcli.files import PathLike
from tailorcli.hub import local_folder

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 22  # entries converted to another dtype at a time
_VOCABULARY = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", *_VOCABULARY)


class AdaptedCheckpoint(Checkpoint):
    """The tuned model that an adapter makes of ``base``: the base's names, order and shapes; see the module.

    A formed tensor's TensorInfo says F32 (F64 for an F64 base), whatever the base's dtype, and no place in a file.
    The base stays open as long as this is in use and belongs to the caller.
    """

    def __init__(
        self, path: Path, base: Checkpoint, formulas: Mapping[str, Formula], saved: Mapping[str, TensorInfo]
    ) -> None:
        tensors = {}
        for name, info in base.tensors.items():
            if name in formulas:
                wide = "F64" if info.dtype == "F64" else "F32"
                nbytes = info.numel * (8 if wide == "F64" else 4)
                tensors[name] = TensorInfo(name, wide, info.shape, path / WEIGHTS_FILE, 0, nbytes)
            else:
                tensors[name] = saved.get(name, info)
        super().__init__(path, tensors, [*base.shards, path / WEIGHTS_FILE])
        self.base = base
        self._formulas = formulas
        self._saved = saved

    @property
    def changed(self) -> set[str]:
        """Names of the tensors that the adapter forms or brings along; all others are the base's own."""
        return {*self._formulas, *self._saved}

    def read_cost(self, name: str) -> int:
        """Bytes that ``read`` takes from the disk: of a formed tensor those of W and of the adapter's parts."""
        formula = self._formulas.get(name)
        parts = [self.tensors[name]] if formula is None else [formula.weight, *formula.parts]
        return sum(part.nbytes for part in parts)

    def read(self, name: str, pinned: bool = False) -> torch.Tensor:
        """One tensor on the CPU, in memory of its own: formed in float32 (float64), or as it is stored.

        Raises NumericalError for NaN or infinity in the adapter.
        """
        formula = self._formulas.get(name)
        if formula is None:
            return super().read(name, pinned)
        formed = self._form(self.tensors[name], formula)
        return formed.pin_memory() if pinned else formed

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``start`` on; a formed tensor is formed for it as a whole."""
        if info.name not in self._formulas:
            super().read_into(info, buffer, start)
            return
        import torch

        raw = self.read(info.name).view(-1).view(torch.uint8)
        buffer[:] = raw[start : start + len(buffer)].numpy().data

    def fingerprint(self) -> str:
        """A hash over the base's fingerprint, samples of the adapter's tensors, and how they act on which tensor."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(self.base.fingerprint().encode(), digest_size=16)
            for name in sorted(self.changed):
                formula = self._formulas.get(name) or Formula(self._saved[name])
                facts = [name, formula.scale, formula.transposed, formula.rows]
                parts = [formula.weight, *formula.parts]
                digest.update(json.dumps([facts, [[part.name, part.dtype, part.shape] for part in parts]]).encode())
                for part in parts:
                    if part.file == self.path / WEIGHTS_FILE:
                        digest.update(self.sample_bytes(part))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def is_untrained(self) -> bool:
        """Whether the adapter changes nothing, as a new one: every scale or B A is zero, and nothing else is in it."""
        plain = all(f.parts == [f.down, f.up] and f.weight.file != f.parts[0].file for f in self._formulas.values())
        if self._saved or not plain:
            return False
        # Any tensor that was trained ends the search, usually the first.
        scaled = (f for f in self._formulas.values() if f.scale)
        return not any(all(bool(self._load(part).any()) for part in f.parts) for f in scaled)

    def _form(self, info: TensorInfo, formula: Formula) -> torch.Tensor:
        """W + scale * B A and its kin, at the precision of ``info``."""
        import torch

        dtype = torch.float64 if info.dtype == "F64" else torch.float32
        weight = self._load(formula.weight, dtype)
        parts = {part.name: self._load(part, dtype) for part in formula.parts}
        for name, part in parts.items():
            if not bool(part.isfinite().all()):
                raise NumericalError(f"NaN or infinity in tensor {name!r} of {self.path}", "check this adapter")
        if formula.down is not None and formula.up is not None:
            down, up = parts[formula.down.name], parts[formula.up.name]  # (R, I), (O, R)
            left, right = (down.T, up.T) if formula.transposed else (up, down)
            weight.addmm_(left, right, alpha=formula.scale)
        if formula.magnitude is not None:
            inputs = 0 if formula.transposed else 1
            norm = torch.linalg.vector_norm(weight, dim=inputs, keepdim=True)
            weight.mul_(parts[formula.magnitude.name].unsqueeze(inputs) / norm)
        if formula.shift is not None:
            weight.add_(parts[formula.shift.name], alpha=formula.scale)
        if formula.row_values is not None:
            weight[list(formula.rows)] = parts[formula.row_values.name]
        return weight

    def _load(self, info: TensorInfo, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A stored tensor in ``dtype``, piece by piece, so that no second copy of it is held."""
        import torch

        stored = torch_dtype(info.dtype)
        assert stored is not None  # an adapter's other dtypes are refused when it is opened
        result = torch.empty(info.numel, dtype=dtype or stored)
        raw = torch.empty(min(_PIECE, info.numel) * stored.itemsize, dtype=torch.uint8)
        for start in range(0, info.numel, _PIECE):
            count = min(_PIECE, info.numel - start)
            piece = raw[: count * stored.itemsize]
            super().read_into(info, piece.numpy().data, start * stored.itemsize)
            result[start : start + count] = piece.view(stored)
        return result.view(info.shape)


def is_adapter(path: PathLike) -> bool:
    """Whether a folder holds a PEFT adapter and no full weights."""
    folder = Path(path)
    try:
        full = any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
        return (folder / CONFIG_FILE).is_file() and not full
    except OSError:  # whoever opens the folder says what is wrong with it
        return False


def open_tuned(
    path: PathLike, base: Checkpoint, form: str = "fp8", loaded_names: LoadedNames | None = None
) -> Checkpoint:
    """The tuned model in ``path``: a full checkpoint, or an adapter on ``base``, which must stay open meanwhile.

    ``form`` is for FP8 weights (see DequantizedCheckpoint). ``loaded_names`` gives names of the base or the adapter
    those that the loaded model has, by which PEFT names its tensors. Reads headers alone. Raises CheckpointError with
    what is wrong and where, for an adapter also where it does not fit ``base`` or is of a kind that is not read.
    """
    if not is_adapter(path):
        return open_checkpoint(path, form)
    folder = Path(path)
    if base.dequantized:
        what = f"the adapter {folder} is to be merged into quantised weights ({base.path})"
        raise CheckpointError(what, "pass the base as it was before it was quantised")
    formulas, saved = fit_adapter(folder, base, read_settings(folder), loaded_names)
    return AdaptedCheckpoint(folder, base, formulas, saved)


def named_base(adapter: Path) -> Path:
    """The folder that an adapter's config names as its base, or the Hub's model of that name.

    Raises CheckpointError where there is none.
    """
    named = read_settings(adapter).base_name
    try:
        if named and (found := local_folder(named)).is_dir():
            return found
    except (OptionsError, CheckpointError):  # no path at all; or not to be had from the Hub
        pass
    nowhere = "which is no local folder and not to be had from the Hub"
    what = f"names {reprlib.repr(named)}, {nowhere}" if named else "names none"
    raise CheckpointError(
        f"{adapter} is an adapter: its base is needed, and {CONFIG_FILE} {what}", "pass its base: --base BASE"
    )


def tokenizer_folder(tuned: Checkpoint) -> Path:
    """Where the tuned model's tokenizer lies: with an adapter if it was saved there, else with its base."""
    if isinstance(tuned, AdaptedCheckpoint) and not _has_tokenizer(tuned.path):
        return tuned.base.path
    return tuned.path


def config_folder(tuned: Checkpoint) -> Path:
    """Where the config of the tuned model, and of an output patched with it, lies: with an adapter, its base's."""
    return tuned.base.path if isinstance(tuned, AdaptedCheckpoint) else tuned.path


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() and any((folder / name).is_file() for name in _VOCABULARY)


def tuned_side_files(tuned: Checkpoint) -> dict[Path, Path]:
    """The side files of a patched model: where each goes in its folder, and where it is copied from.

    For an adapter they are its base's, but for the tokenizer (all of its files) and the chat template that lie with
    the adapter.
    """
    if not isinstance(tuned, AdaptedCheckpoint):
        # An adapter's config beside full weights stayed there when it was merged into them.
        own = [relative for relative in side_files(tuned.path) if relative.name != CONFIG_FILE]
        return {relative: tuned.path / relative for relative in own}
    base = tuned.base.path
    files = {relative: base / relative for relative in side_files(base) if relative.name != CONFIG_FILE}
    own = [relative for relative in side_files(tuned.path) if relative.parts[0] in (*_TOKENIZER, *_TEMPLATES)]
    if _has_tokenizer(tuned.path):
        files = {relative: source for relative, source in files.items() if relative.parts[0] not in _TOKENIZER}
    else:
        own = [relative for relative in own if relative.parts[0] in _TEMPLATES]
    return files | {relative: tuned.path / relative for relative in own}
