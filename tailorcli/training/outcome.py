"""What a fine-tune gives: its plan, its checkpoint in the base's own layout, and its report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES
from tailorcli.checkpoint.layout import plan_layout
from tailorcli.checkpoint.writer import CheckpointWriter
from tailorcli.errors import CheckpointError, NumericalError, OutputError
from tailorcli.files import read_json
from tailorcli.guard import OutputLock
from tailorcli.models.empty import empty_on_meta
from tailorcli.models.names import aliases, expected_names, unwrapped
from tailorcli.models.naming import aligned
from tailorcli.options import LoadOptions
from tailorcli.patchfile.report import FINETUNE_FILE
from tailorcli.typed import field_of, list_of, maybe, plain, read_amount, read_count, read_object, read_text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FinetunePlan:
    """What is about to be trained, and its cost: bytes by what takes them, without activations."""

    output: str
    method: str
    parameters: int
    entries: int  # that may move
    of_entries: int  # of the whole model
    examples: int
    tokens: int
    learnt_tokens: int
    steps: int
    memory: dict[str, int]
    write_bytes: int
    uncounted: str = ""  # the optimiser, where it is not known what it holds

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {name: plain(value) for name, value in asdict(self).items()}


def memory_of(
    method: str, weights: int, numel: int, size: int, optimiser: int | None, *, puts_back: bool
) -> dict[str, int]:
    """Bytes beside activations, by what takes them, of ``numel`` trained entries of ``size`` bytes each.

    ``optimiser`` is what that holds, None where it is not known; by one that ``puts_back`` what a mask holds, dowser
    has a copy of the weights.
    """
    extra = {
        "spider": {"base's copy": numel * size, "accumulated gradient": numel * 4},
        "l2": {"base's copy": numel * size},
        "dowser": {"mask": -(-numel // 8)} | ({"copy for a step": numel * size} if puts_back else {}),
    }
    parts = {"weights": weights, "gradients": numel * size}
    parts |= {} if optimiser is None else {"optimiser": optimiser}
    return parts | extra.get(method, {})


@dataclass(frozen=True)
class TensorChange:
    """How far fine-tuning moved a tensor: the entries that differ from the base's, and the sums of its drift."""

    name: str
    numel: int
    moved: int
    change: float  # ||W - W_base||^2
    base: float  # ||W_base||^2

    @property
    def share(self) -> float:
        """Share of the entries that moved."""
        return self.moved / self.numel if self.numel else 0.0

    @property
    def drift(self) -> float:
        """||W - W_base|| / ||W_base||."""
        return math.sqrt(self.change / self.base) if self.base else 0.0


@dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tune was and did."""

    output: str
    base: str
    method: str
    steps: int
    examples: int
    tokens: int
    learnt_tokens: int
    losses: list[list[float]]  # step, mean loss since the one before
    tensors: list[TensorChange]
    unscored: dict[str, str]  # parameters that dowser left frozen for want of scores
    peak_memory_bytes: int | None
    peak_cuda_bytes: int | None
    identity: dict[str, Any]
    seconds: float = 0.0  # in the output: until the training ended
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """Entries that differ from the base's."""
        return sum(tensor.moved for tensor in self.tensors)

    @property
    def numel(self) -> int:
        """All entries."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def drift(self) -> float:
        """||W - W_base|| / ||W_base|| over all tensors."""
        base = sum(tensor.base for tensor in self.tensors)
        return math.sqrt(sum(tensor.change for tensor in self.tensors) / base) if base else 0.0

    def timed(self, seconds: float, stages: Mapping[str, float]) -> FinetuneReport:
        """A copy with what the whole run took."""
        return replace(self, seconds=seconds, stages=dict(stages))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        tensors = [asdict(t) | {"share": t.share, "drift": t.drift} for t in self.tensors]
        whole = {"moved": self.moved, "numel": self.numel, "drift": self.drift}
        values = {"format_version": 1, "command": "finetune"} | asdict(self) | whole | {"tensors": tensors}
        return {name: plain(value) for name, value in values.items()}

    @classmethod
    def read(cls, file: Path) -> Self:
        """The report in an output. Raises OutputError for one that is damaged."""
        value = read_json(file)
        try:
            return cls(
                **{name: field_of(value, name, read_text) for name in ("output", "base", "method")},
                **{n: field_of(value, n, read_count) for n in ("steps", "examples", "tokens", "learnt_tokens")},
                losses=field_of(value, "losses", list_of(list_of(_any_number))),
                tensors=field_of(value, "tensors", list_of(_read_change)),
                unscored=field_of(value, "unscored", read_object),
                peak_memory_bytes=field_of(value, "peak_memory_bytes", maybe(read_count)),
                peak_cuda_bytes=field_of(value, "peak_cuda_bytes", maybe(read_count)),
                identity=field_of(value, "identity", read_object),
                seconds=field_of(value, "seconds", read_amount),
            )
        except (ValueError, KeyError) as error:
            raise OutputError(f"{file} is damaged: {error}", "choose another folder for -o") from error


def _any_number(value: Any) -> float:
    from tailorcli.typed import read_number

    return float(read_number(value))


def _read_change(value: Any) -> TensorChange:
    return TensorChange(
        name=field_of(value, "name", read_text),
        numel=field_of(value, "numel", read_count),
        moved=field_of(value, "moved", read_count),
        change=field_of(value, "change", read_amount),
        base=field_of(value, "base", read_amount),
    )


def write_outcome(
    base: Checkpoint,
    config: dict[str, Any],
    options: LoadOptions,
    trained: Path,
    output: Path,
    identity: dict[str, Any],
    facts: Mapping[str, Any],
    side: Mapping[str, Path | bytes],
) -> FinetuneReport:
    """Write the model saved in ``trained`` as ``output``: the base's names, dtypes and shards, and ``side`` files.

    Raises NumericalError for values that are no numbers.
    """
    with Checkpoint.open(trained) as saved, OutputLock(output, folder=True):
        source = _sources(base, aligned(base, saved), config, options, set(facts["trained"]))
        with CheckpointWriter(output, plan_layout(base, None), identity, resume=True) as writer:
            for name in base.tensors:
                if name not in writer.done:
                    _write(name, base, source.get(name), writer)
            writer.drain()
            changes = [_read_change(writer.done[name]) for name in base.tensors if writer.done[name]]
            report = FinetuneReport(
                output=str(output),
                base=facts["base"],
                method=facts["method"],
                **{name: facts[name] for name in ("steps", "examples", "tokens", "learnt_tokens", "unscored")},
                losses=[list(entry) for entry in facts["losses"]],
                tensors=changes,
                peak_memory_bytes=facts["peak_memory_bytes"],
                peak_cuda_bytes=facts["peak_cuda_bytes"],
                identity=identity,
                seconds=facts["seconds"],
            )
            writer.finish(side, {FINETUNE_FILE: json.dumps(report.to_dict(), indent=1) + "\n"})
    return report


def _sources(
    base: Checkpoint, saved: Checkpoint, config: dict[str, Any], options: LoadOptions, trained: set[str]
) -> dict[str, tuple[Checkpoint, str]]:
    """Where the trained value of each tensor lies; not of those that no model holds. Raises CheckpointError."""
    found = {name: (saved, name) for name in base.tensors if name in saved.tensors}
    if len(found) == len(base.tensors):
        return found
    network = empty_on_meta(base, config, options)
    network.tie_weights()
    expected, tied = expected_names(network, base.tensors), aliases(network)
    held = {tied.get(expected[name], expected[name]): name for name in found}
    for name in base.tensors:
        parameter = tied.get(expected[name], expected[name])
        if name not in found and parameter in held:  # a copy of a tied table, which is saved once
            found[name] = (saved, held[parameter])
        elif name not in found and unwrapped(parameter) in trained:
            raise CheckpointError(f"transformers saved tensor {name!r} under another name", "report this model")
    return found


def _write(name: str, base: Checkpoint, source: tuple[Checkpoint, str] | None, writer: CheckpointWriter) -> None:
    """One tensor: as it was trained, or the base's bytes."""
    info = base.tensors[name]
    if source is None or info.dtype not in PATCHABLE_DTYPES:
        writer.copy(name, base, {})
        return
    before = base.read(name)
    trained = source[0].read(source[1])
    if trained.shape != before.shape:
        shapes = f"has shape {list(trained.shape)} after training, {list(before.shape)} before"
        raise CheckpointError(f"tensor {name!r} {shapes}", "train a base that is not resized")
    after = _unless_moved(trained, before)
    if not bool(after.isfinite().all()) and bool(before.isfinite().all()):
        raise NumericalError(f"training left NaN or infinity in tensor {name!r}", "lower --learning-rate")
    moved = int((_raw(after) != _raw(before)).count_nonzero())
    if not moved:
        record = TensorChange(name, info.numel, 0, 0.0, _square(before))
        writer.copy(name, base, asdict(record))
        return
    record = TensorChange(name, info.numel, moved, _square(after.double() - before.double()), _square(before))
    writer.write(name, after, asdict(record))


def _unless_moved(trained: Tensor, before: Tensor) -> Tensor:
    """What was trained, in the dtype of ``before``; that itself where training has left what the run made of it.

    A run in fewer bits rounds the entries that it does not train, too.
    """
    import torch

    rounded = before.to(trained.dtype)
    return torch.where(_raw(trained) == _raw(rounded), before, trained.to(before.dtype))


def _raw(value: Tensor) -> Tensor:
    """The bits of floats as whole numbers: minus zero is not zero."""
    import torch

    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.contiguous().view(sizes[value.element_size()])


def _square(value: Tensor) -> float:
    """The sum of squares, without what a base may hold that is no finite number."""
    import torch

    return float(torch.linalg.vector_norm(value.where(value.isfinite(), 0.0), dtype=torch.float64).square())
