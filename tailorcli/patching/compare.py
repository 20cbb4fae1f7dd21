"""Do two models belong together, and what has fine-tuning changed: from headers and a sample of the weights.

Nothing is run and little is read: some rows of each matrix, evenly spread. What the weights cannot tell, how much was
forgotten, is not guessed at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, config_folder, tokenizer_folder
from tailorcli.adapters.config import read_settings
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.grown import GrownCheckpoint, grow_vocabulary
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, TensorInfo, torch_dtype
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.errors import CheckpointError, NumericalError, OptionsError, TailorError
from tailorcli.files import PathLike
from tailorcli.guard import path_text
from tailorcli.hub import hub_facts, local_folders
from tailorcli.models.config import differing_fields, moved_tokens, read_config, vocabulary_of, writes_samples
from tailorcli.models.naming import open_for
from tailorcli.patching.checks import check_pair
from tailorcli.typed import plain

if TYPE_CHECKING:
    from torch import Tensor

ROWS, ENTRIES = 48, 1 << 20  # of a tensor, at most, that are read
_MANY = 600  # of so many tensors on fewer rows of each
_FEW_WHOLE = 64  # tensors that have to be formed whole to be looked at, at most
_BLOCK, _MATRICES = 384, 36  # rows and columns of a change whose rank is looked at, and how many such
ENERGY = 0.99  # the share of the squared change that the directions counted as its rank hold
LOW = 0.25  # a change of so few directions, of those that it could have, is of low rank
SPARSE = 0.5  # a fine-tune that moved fewer of the entries has left most of them alone


@dataclass(frozen=True)
class TensorChange:
    """What a sample of one tensor's entries says of it; the squares are sums over the sample.

    ``directions`` hold 99% of the squared change in a block of the tensor, which could have had ``most_directions``;
    None where that was not looked at.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sampled: int
    moved: int
    base_sq: float
    delta_sq: float
    directions: int | None = None
    most_directions: int | None = None

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Comparison:
    """Two models side by side; ``needs`` are the options that a patch of them asks for, ``told`` what differs."""

    base: dict[str, str]
    tuned: dict[str, str]
    architecture: str
    tokenizer: str
    told: tuple[str, ...]
    needs: tuple[str, ...]
    tensors: tuple[TensorChange, ...]
    adapter: str  # what an adapter says of itself; empty for full weights
    seconds: float

    @property
    def sampled(self) -> int:
        """Entries that were looked at."""
        return sum(tensor.sampled for tensor in self.tensors)

    @property
    def numel(self) -> int:
        """Entries of all tensors that were looked at."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def moved(self) -> float:
        """The share of the entries that differ, each tensor's by its size."""
        return sum(t.numel * t.moved / t.sampled for t in self.tensors) / max(1, self.numel)

    @property
    def change(self) -> float:
        """The size of the change against that of the weights, as root mean squares over all entries."""
        parts = [(t.numel / t.sampled * t.delta_sq, t.numel / t.sampled * t.base_sq) for t in self.tensors]
        return math.sqrt(sum(delta for delta, _ in parts) / max(1e-300, sum(base for _, base in parts)))

    @property
    def low_rank(self) -> int | None:
        """Directions that hold nearly all of a low-rank change, the most of any tensor; None where it is none."""
        found = [(t.directions, t.most_directions) for t in self.tensors if t.directions and t.most_directions]
        low = [count for count, most in found if count <= LOW * most]
        return max(low) if found and len(low) >= 0.8 * len(found) else None

    @property
    def untouched(self) -> tuple[str, ...]:
        """Tensors of which no sampled entry moved."""
        return tuple(tensor.name for tensor in self.tensors if not tensor.moved)

    @property
    def kind(self) -> str:
        """What sort of fine-tuning it looks like: ``adapter``, ``low rank``, ``sparse``, ``partial`` or ``full``."""
        if self.adapter:
            return "adapter"
        if self.low_rank is not None:
            return "low rank"
        if self.moved < SPARSE and len(self.untouched) < len(self.tensors) / 2:
            return "sparse"
        matrices = [tensor for tensor in self.tensors if len(tensor.shape) > 1]
        return "partial" if any(not tensor.moved for tensor in matrices) else "full"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        own = {
            "kind": self.kind,
            "moved": self.moved,
            "change": self.change,
            "low_rank": self.low_rank,
            "untouched": list(self.untouched),
            "sampled": self.sampled,
            "numel": self.numel,
        }
        values = {"format_version": 1, "command": "check"} | asdict(self) | own
        return {name: plain(value) for name, value in values.items()}


def compare_models(base: PathLike, tuned: PathLike, *, trust_remote_code: bool = False) -> Comparison:
    """Compare a pre-trained model with its fine-tune (a checkpoint, or an adapter), by headers and sampled entries.

    Raises CheckpointError where they do not belong together. What a patch of them needs an option for, another dtype,
    a grown vocabulary or a base that writes no samples, is in the result's ``needs``.
    """
    started = perf_counter()
    base_folder, tuned_folder = local_folders((base, tuned), code=trust_remote_code)
    with ExitStack() as stack:
        before = first = stack.enter_context(open_checkpoint(base_folder))
        second = stack.enter_context(open_for(first, tuned_folder))
        needs: list[str] = []
        first = _grown_where_needed(first, second, needs)
        changed = second.changed if isinstance(second, AdaptedCheckpoint) else second.tensors.keys()
        others = (info.dtype != first.tensors[name].dtype for name, info in second.tensors.items())
        if not isinstance(second, AdaptedCheckpoint) and any(others):
            needs.append("--allow-dtype-mismatch")
        if "--no-retain" not in needs and not _writes_samples(first.path):
            needs += ["--retain-data", "OLD_TASK.jsonl"]
        names = [name for name, info in first.tensors.items() if _is_compared(name, info, first, second)]
        return Comparison(
            base=_facts(before),
            tuned=_facts(second),
            architecture=_architecture(first, second),
            tokenizer=_tokenizers(first.path, tokenizer_folder(second)),
            told=(*_new_rows(first), *_config_differences(first.path, config_folder(second))),
            needs=tuple(needs),
            tensors=tuple(_changes(first, second, names, set(changed))),
            adapter=_adapter(second),
            seconds=perf_counter() - started,
        )


def _grown_where_needed(base: Checkpoint, tuned: Checkpoint, needs: list[str]) -> Checkpoint:
    """Check the pair, and give the base with tuned's rows where only those are more. Raises CheckpointError."""
    try:
        check_pair(base, tuned, allow_dtype_mismatch=True)
    except CheckpointError:
        try:
            grown = grow_vocabulary(base, tuned) if base.tensors.keys() == tuned.tensors.keys() else None
        except (CheckpointError, OptionsError):
            grown = None
        if grown is None:
            raise
        check_pair(grown, tuned, allow_dtype_mismatch=True)
        needs += ["--resized-vocab", "--no-retain"]  # the base knows nothing of the new rows
        return grown
    return base


def _is_compared(name: str, info: TensorInfo, base: Checkpoint, tuned: Checkpoint) -> bool:
    return name in tuned.tensors and info.dtype in PATCHABLE_DTYPES and info.numel > 0 and name not in base.scales


def _facts(model: Checkpoint) -> dict[str, str]:
    tensors = model.tensors.values()
    dtypes = sorted({info.dtype for info in tensors})
    weights = sum(info.numel for info in tensors)
    facts = {"path": path_text(model.path), "weights": str(weights), "tensors": str(len(model.tensors))}
    return facts | {"dtypes": ", ".join(dtypes)} | hub_facts(model.path)


def _architecture(base: Checkpoint, tuned: Checkpoint) -> str:
    """The class that both configs name, or both where they differ."""
    names = []
    for folder in (base.path, config_folder(tuned)):
        try:
            found = read_config(folder).get("architectures")
        except TailorError:
            found = None
        names.append(str(found[0]) if isinstance(found, list) and found else "unknown")
    return names[0] if names[0] == names[1] else f"{names[0]}, and {names[1]} in tuned"


def _new_rows(base: Checkpoint) -> list[str]:
    """How many rows of the vocabulary are new in tuned."""
    if not isinstance(base, GrownCheckpoint):
        return []
    return [f"{name}: {base.new_rows(name)} rows more in tuned" for name in sorted(base.grown)]


def _config_differences(base: Path, tuned: Path) -> list[str]:
    try:
        fields = differing_fields(read_config(base), read_config(tuned)) if base != tuned else []
    except TailorError:
        lacking = [folder for folder in (base, tuned) if not (folder / "config.json").is_file()]
        return [
            f"config.json is missing in {lacking[0]}: put it there first" if lacking else "a config.json is damaged"
        ]
    return [f"config: {field}" for field in fields]


def _writes_samples(base: Path) -> bool:
    try:
        return writes_samples(read_config(base))
    except TailorError:
        return True


def _tokenizers(base: Path, tuned: Path) -> str:
    """How the two tokenizers differ, in a few words, by their files."""
    first, second = vocabulary_of(base), vocabulary_of(tuned)
    if first is None or second is None:
        return f"not compared: no tokenizer.json in {base if first is None else tuned}; samples are drawn with it"
    if first == second:
        return "the same"
    more, fewer = len(second.keys() - first.keys()), len(first.keys() - second.keys())
    other = moved_tokens(first, second)
    counts = ((more, "more"), (fewer, "fewer"), (other, "under other ids"))
    told = [f"{count:,} {what}" for count, what in counts if count]
    return f"tokens of tuned's against base's: {', '.join(told)}"


def _adapter(tuned: Checkpoint) -> str:
    if not isinstance(tuned, AdaptedCheckpoint):
        return ""
    return f"a LoRA adapter of rank {read_settings(tuned.path).rank} on {len(tuned.changed)} tensors"


def _changes(base: Checkpoint, tuned: Checkpoint, names: list[str], changed: set[str]) -> Iterator[TensorChange]:
    """The sampled change of each tensor; of those that have to be formed whole, a spread of them is looked at."""
    whole = {name for name in names if name in changed and not _is_plain(base, tuned, name)}
    chosen = set(_spread(sorted(whole), _FEW_WHOLE))
    seen = [name for name in names if name in changed and (name not in whole or name in chosen)]
    matrices = [name for name in seen if len(base.tensors[name].shape) == 2]
    ranked = set(_spread(matrices, _MATRICES))
    rows = max(4, ROWS * _MANY // max(_MANY, len(names)))
    for name in names:
        if name not in whole or name in chosen:
            yield _change(base, tuned, name, rows, name in changed, name in whole, name in ranked)


def _spread(names: list[str], most: int) -> list[str]:
    """At most so many of the names, evenly."""
    step = max(1.0, len(names) / most)
    return [names[int(number * step)] for number in range(min(most, len(names)))]


def _is_plain(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    """Whether a part of a tensor can be read by itself, in both."""
    return all(
        not isinstance(model, AdaptedCheckpoint) and not model.dequantized and torch_dtype(model.tensors[name].dtype)
        for model in (base, tuned)
    )


def _change(
    base: Checkpoint, tuned: Checkpoint, name: str, most: int, changed: bool, whole: bool, ranked: bool
) -> TensorChange:
    info = base.tensors[name]
    common = (name, info.shape, info.dtype)
    old = _sample(base, name, most, whole)
    if not changed:
        return TensorChange(*common, old.numel(), 0, float(old.double().square().sum()), 0.0)
    new = _sample(tuned, name, most, whole)
    delta = new.double() - old.double()
    moved = int((_stored(new, info) != _stored(old, info)).sum())
    found = _directions(base, tuned, name, whole) if ranked and moved else (None, None)
    squares = (float(old.double().square().sum()), float(delta.square().sum()))
    return TensorChange(*common, old.numel(), moved, *squares, *found)


def _stored(values: Tensor, info: TensorInfo) -> Tensor:
    """Values as the base's dtype would hold them: what rounds to the same has not moved."""
    dtype = torch_dtype(info.dtype)
    return values.to(dtype) if dtype is not None else values


def _sample(model: Checkpoint, name: str, most: int, whole: bool) -> Tensor:
    """Entries of evenly spread rows, at most so many, float32 or float64: the same ones in every model."""
    info = model.tensors[name]
    rows, width = (1, info.numel) if len(info.shape) < 2 else (info.shape[0], info.numel // info.shape[0])
    picked = sorted({int(number * rows / min(rows, most)) for number in range(min(rows, most))})
    length = min(width, max(1, ENTRIES // len(picked)))
    return _rows(model, name, picked, width, length, whole)


def _rows(model: Checkpoint, name: str, picked: list[int], width: int, length: int, whole: bool) -> Tensor:
    """The first ``length`` entries of some rows of ``width``: (rows, length), in float32 (float64 as it is)."""
    import torch

    info = model.tensors[name]
    if whole:
        value = model.read(name).reshape(-1, width)
        return _wide(value[torch.tensor(picked), :length])
    dtype = torch_dtype(info.dtype)
    assert dtype is not None
    parts = []
    for row in picked:
        raw = torch.empty(length * dtype.itemsize, dtype=torch.uint8)
        model.read_into(info, raw.numpy().data, row * width * dtype.itemsize)
        parts.append(raw.view(dtype))
    return _wide(torch.stack(parts))


def _wide(values: Tensor) -> Tensor:
    import torch

    return values if values.dtype == torch.float64 else values.float()


def _directions(base: Checkpoint, tuned: Checkpoint, name: str, whole: bool) -> tuple[int, int] | tuple[None, None]:
    """How many directions hold 99% of the squared change in a block of a matrix, and how many there could be."""
    import torch

    rows, width = base.tensors[name].shape
    if min(rows, width) < 16:
        return None, None
    picked = sorted({int(number * rows / min(rows, _BLOCK)) for number in range(min(rows, _BLOCK))})
    length = min(width, _BLOCK)
    pair = [_rows(model, name, picked, width, length, whole).double() for model in (tuned, base)]
    for model, part in zip((tuned, base), pair, strict=True):
        if not bool(part.isfinite().all()):
            what = f"tensor {name!r} of {model.path} holds NaN or infinity"
            raise NumericalError(what, "repair or re-export that model: no patch can be made of it")
    values = torch.linalg.svdvals(pair[0] - pair[1]).square()
    total = float(values.sum())
    if total <= 0.0:
        return None, None
    held = torch.cumsum(values, 0) / total
    return int((held < ENERGY).sum()) + 1, len(values)
