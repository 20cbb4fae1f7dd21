"""The folder that ``calibrate`` writes: a manifest, and the Hessians as packed triangles in one safetensors file.

``manifest.json`` maps every tensor of the checkpoint either to a Hessian or to the reason why it has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import read_header
from tailorcli.checkpoint.renamed import RenamedCheckpoint
from tailorcli.errors import CheckpointError, NumericalError, StatsError
from tailorcli.files import PathLike, file_digest, given_path, read_json
from tailorcli.options import Blockwise, CalibrateOptions
from tailorcli.typed import field_of, list_of, maybe, read_index, read_text, require_plain

if TYPE_CHECKING:
    from torch import Tensor

    from tailorcli.data.samples import Inputs

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
HESSIANS = "hessians.safetensors"
SAMPLES = "samples.safetensors"
_AGAIN = "calibrate again"
HEADER_ENTRY = 128  # bytes of a header entry beside its name: dtype, shape, two offsets


@dataclass(frozen=True)
class HessianInfo:
    """One Hessian: its channels I, ``full`` (a packed triangle) or ``diagonal``, the tokens that it averages.

    ``mean_diagonal`` is mean(diag H), twice the mean square of an input; ``dead`` counts channels with H_jj = 0.
    """

    size: int
    kind: str
    tokens: int
    mean_diagonal: float = 0.0
    dead: int = 0

    @property
    def stored_numel(self) -> int:
        """Numbers on disk."""
        return self.size * (self.size + 1) // 2 if self.kind == "full" else self.size

    @property
    def is_sound(self) -> bool:
        """Whether every field has its type and range, as one read from a file may not."""
        counts = all(type(count) is int and 0 <= count < 1 << 48 for count in (self.size, self.tokens, self.dead))
        finite = type(self.mean_diagonal) in (int, float) and abs(self.mean_diagonal) < 1e300
        return counts and finite and self.kind in ("full", "diagonal")


@dataclass(frozen=True)
class TensorStats:
    """What a checkpoint tensor is to the layer it belongs to.

    ``hessian`` names its Hessian, or is None with a ``reason``; a tensor of three dimensions that fuses experts has
    one for each of them, in ``experts``, instead. ``transposed`` says that it is stored as (I, O): Conv1D weights and
    embedding tables. ``role`` is linear, embedding, norm or bias. ``note`` says what a user should know of it.
    """

    hessian: str | None
    role: str = ""
    transposed: bool = False
    reason: str = ""
    experts: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def hessians(self) -> list[str]:
        """Every Hessian that it uses; none where it is uncalibrated."""
        return self.experts or ([self.hessian] if self.hessian is not None else [])

    @property
    def is_sound(self) -> bool:
        """Whether every field has its type, as one read from a file may not."""
        if not isinstance(self.experts, list) or (self.experts and self.hessian is not None):
            return False
        texts = (self.role, self.reason, self.note, self.hessian or "", *self.experts)
        named = self.hessian is None or isinstance(self.hessian, str)
        return named and isinstance(self.transposed, bool) and all(isinstance(text, str) for text in texts)


def _read_runs(value: Any) -> list[tuple[int, int]]:
    """Runs of tokens, each from one place to another. Raises ValueError."""
    runs = list_of(list_of(lambda place: read_index(place, 1 << 40)))(value)
    if not all(len(run) == 2 for run in runs):
        raise ValueError("a run of tokens is no pair")
    return [(run[0], run[1]) for run in runs]


def response_masks(samples: Sequence[Inputs], runs: Sequence[Sequence[tuple[int, int]]] | None) -> list[Tensor | None]:
    """Which tokens of each sample are its response, (1, T) bool, from runs of them; None where there are none."""
    import torch

    masks: list[Tensor | None] = []
    for sample, found in zip(samples, runs or [[]] * len(samples), strict=True):
        mask = torch.zeros(sample["input_ids"].shape, dtype=torch.bool) if found else None
        for first, last in found:
            assert mask is not None
            mask[:, first:last] = True
        masks.append(mask)
    return masks


def too_few_tokens(hessians: Mapping[str, HessianInfo]) -> str:
    """A warning where full Hessians were measured on fewer tokens than they have channels; else empty.

    They tell nothing of some directions of their inputs. Experts have their own notes.
    """
    single = [info for name, info in hessians.items() if not name.endswith("]")]
    thin = [info for info in single if info.kind == "full" and info.tokens < info.size]
    if not thin:
        return ""
    worst = max(thin, key=lambda info: info.size / max(info.tokens, 1))
    more = "take more data, a larger --num-samples or --seq-len"
    return f"{worst.tokens:,} tokens for layers of {worst.size:,} inputs ({len(thin)} Hessians): {more}"


class Stats:
    """An opened statistics folder; Hessians are read one at a time."""

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        tensors: dict[str, TensorStats],
        hessians: dict[str, HessianInfo],
        store: Checkpoint,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.tensors = tensors
        self.hessians = hessians
        self._store = store

    @property
    def files(self) -> list[Path]:
        """What is read of it."""
        return [file for name in (MANIFEST, HESSIANS, SAMPLES) if (file := self.path / name).is_file()]

    @classmethod
    def open(cls, path: PathLike) -> Stats:
        """Open the folder ``path``. Raises StatsError if it is missing, unfinished or inconsistent."""
        folder = given_path(path)
        manifest_path = folder / MANIFEST
        if not manifest_path.exists():
            raise StatsError(
                f"{folder} holds no statistics ({MANIFEST} is missing)",
                "make them: tailorcli calibrate TUNED --data FILE -o STATS",
            )
        try:
            manifest = read_json(manifest_path)
            found = manifest.get("format_version")
            if type(found) is not int or found != FORMAT_VERSION:
                raise StatsError(
                    f"{manifest_path} has format_version {found!r}, expected {FORMAT_VERSION}",
                    "calibrate again with this version of tailorcli",
                )
            tensors = {name: TensorStats(**entry) for name, entry in manifest["tensors"].items()}
            hessians = {name: HessianInfo(**entry) for name, entry in manifest["hessians"].items()}
            field_of(manifest["model"], "fingerprint", read_text)
            infos, _ = read_header(folder / HESSIANS)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise StatsError(f"{manifest_path} is malformed: {error!r}", _AGAIN) from error
        except CheckpointError as error:
            raise StatsError(error.message, _AGAIN) from error
        stats = cls(folder, manifest, tensors, hessians, Checkpoint(folder, infos, [folder / HESSIANS]))
        stats._check()
        return stats

    def _check(self) -> None:
        """Every field has its type; every Hessian that the manifest names is stored, in the size that it says."""
        manifest_path = self.path / MANIFEST
        for key in ("data", "versions"):
            if not isinstance(self.manifest.get(key, {}), dict):
                raise StatsError(f"{manifest_path} is malformed: {key!r} is no object", _AGAIN)
        entries: list[tuple[str, HessianInfo | TensorStats]] = [*self.hessians.items(), *self.tensors.items()]
        for name, entry in entries:
            if not entry.is_sound:
                what = f"the entry {name!r} has a field of the wrong type or range"
                raise StatsError(f"{manifest_path} is malformed: {what}", _AGAIN)
        try:
            require_plain(self.manifest)
        except ValueError as error:
            raise StatsError(f"{manifest_path} is malformed: {error}", _AGAIN) from error
        stored = self._store.tensors
        for name, info in self.hessians.items():
            if name not in stored:
                raise StatsError(f"{self.path / HESSIANS} lacks Hessian {name!r}", _AGAIN)
            found = stored[name]
            if found.dtype != "F32" or found.shape != (info.stored_numel,):
                raise StatsError(
                    f"Hessian {name!r} in {self.path / HESSIANS} is {found.dtype} {list(found.shape)}, "
                    f"expected F32 [{info.stored_numel}]",
                    _AGAIN,
                )
        for name, tensor in self.tensors.items():
            for hessian in tensor.hessians:
                if hessian not in self.hessians:
                    raise StatsError(f"{manifest_path}: {name!r} refers to no Hessian {hessian!r}", _AGAIN)

    def rename_for(self, model: Checkpoint) -> None:
        """Take on the names under which ``model``, of which these statistics may be, is compared with another."""
        if isinstance(model, RenamedCheckpoint):
            known = self.tensors
            self.tensors = {name: known[own] for name, own in model.names.items() if own in known}

    def load(self, name: str, pinned: bool = False) -> Tensor:
        """The stored numbers of one Hessian, float32: a packed triangle, or a diagonal (I,)."""
        return self._store.read(name, pinned)

    def unpack(self, name: str, packed: Tensor) -> Tensor:
        """The Hessian (I, I), or its diagonal (I,), from what ``load`` gave, on the device where that lies now.

        Raises NumericalError where it is not finite.
        """
        from tailorcli.core.hessian import unpack_triangle

        info = self.hessians[name]
        if not bool(packed.isfinite().all()):
            raise NumericalError(f"NaN or infinity in the Hessian {name!r} of {self.path}", "calibrate again")
        return unpack_triangle(packed, info.size) if info.kind == "full" else packed

    def nbytes(self, name: str) -> int:
        """Bytes of one Hessian on disk."""
        return self._store.tensors[name].nbytes

    def fingerprint(self) -> str:
        """A hash over the manifest and a sample of the Hessians."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(self.manifest, sort_keys=True).encode())
        digest.update(self._store.fingerprint().encode())
        return digest.hexdigest()

    @property
    def sample_count(self) -> int:
        """How many samples were kept."""
        return int((self.manifest.get("samples") or {}).get("count", 0))

    def samples(self) -> list[Inputs]:
        """The model's inputs of every sample that was calibrated on. Raises StatsError where they were not kept."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        kept = self.manifest.get("samples")
        file = self.path / SAMPLES
        if kept is None:
            raise StatsError(
                f"{self.path} holds no samples, which propagation and distillation run the models over",
                "calibrate again, without --no-samples; or patch without --distill and with --no-propagate",
            )
        try:
            if file_digest(file) != field_of(kept, "blake2b", read_text):
                raise StatsError(f"{file} is not the one that {MANIFEST} names", _AGAIN)
            values = load_file(file)
            count = field_of(kept, "count", lambda value: read_index(value, len(values) + 1))  # each has a tensor
            found: list[Inputs] = [{} for _ in range(count)]
            for name, value in values.items():
                position, _, field_name = name.partition(" ")
                found[read_index(int(position), count)][field_name] = value
        except (OSError, SafetensorError, ValueError) as error:
            raise StatsError(f"cannot read the samples in {file}: {error}", _AGAIN) from error
        return found

    def responses(self) -> list[Tensor | None]:
        """Which tokens of each sample are its response, (1, T) bool; None where that was not told, or is not known.

        Raises StatsError, as ``samples`` does.
        """
        samples = self.samples()
        kept = self.manifest["samples"]
        try:
            runs = field_of(kept, "responses", list_of(_read_runs)) if "responses" in kept else None
            if runs is not None and len(runs) != len(samples):
                raise ValueError(f"responses of {len(runs)} samples, expected {len(samples)}")
            if runs and any(found and "input_ids" not in sample for sample, found in zip(samples, runs, strict=True)):
                raise ValueError("a response of a sample that has no tokens")
        except ValueError as error:
            raise StatsError(f"{self.path / MANIFEST} is malformed: {error}", _AGAIN) from error
        return response_masks(samples, runs)

    def following(self) -> list[int | None] | None:
        """The token behind what each sample's decoder reads; None where none is known. Raises StatsError."""
        kept = self.manifest.get("samples") or {}
        if "following" not in kept:
            return None
        try:
            found = list(field_of(kept, "following", list_of(maybe(lambda token: read_index(token, 1 << 40)))))
            if len(found) != kept.get("count"):
                raise ValueError(f"following tokens of {len(found)} samples, expected {kept.get('count')}")
            return found
        except ValueError as error:
            raise StatsError(f"{self.path / MANIFEST} is malformed: {error}", _AGAIN) from error

    @property
    def teacher_weight(self) -> float:
        """How far on the way from base to tuned the model lies that was calibrated; 1 is tuned itself."""
        found = self.manifest["model"].get("teacher_weight", 1.0)
        return float(found) if type(found) in (int, float) and 0.0 < found <= 2.0 else 1.0

    @property
    def model_fingerprint(self) -> str:
        """The fingerprint of the checkpoint that was calibrated."""
        return str(self.manifest["model"]["fingerprint"])

    @property
    def options(self) -> CalibrateOptions:
        """How the model ran when it was calibrated: its dtype, batches and sums, and whether block by block."""
        saved = self.manifest["options"]
        return CalibrateOptions(
            dtype=saved["dtype"],
            batch_size=saved["batch_size"],
            deterministic=bool(saved.get("deterministic", False)),
            blockwise=Blockwise.ALWAYS if saved.get("blockwise") == Blockwise.ALWAYS else Blockwise.AUTO,
        )

    def run_options(self, trust_remote_code: bool) -> CalibrateOptions:
        """How the model runs again as it ran then."""
        return replace(self.options, trust_remote_code=trust_remote_code)

    def close(self) -> None:
        """Close the file."""
        self._store.close()


BIAS_HESSIAN = "bias"  # a bias multiplies the constant 1: H = (2/N) sum 1 = 2 for every one of them


def expert_name(parameter: str, part: int | None) -> str:
    """The name of one expert's Hessian, or of the one for those with too few tokens."""
    return f"{parameter}[{'all' if part is None else part}]"
