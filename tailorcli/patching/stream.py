"""Read tensors ahead, tailor one at a time, and say what was done to each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, config_folder
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.grown import grow_vocabulary
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.checkpoint.readahead import ReadAhead
from tailorcli.device import StageTimer, device_errors, exact_float32
from tailorcli.errors import NumericalError, OptionsError, note
from tailorcli.files import PathLike, digest_of
from tailorcli.guard import path_text
from tailorcli.models.config import differing_fields, read_config
from tailorcli.models.naming import open_for
from tailorcli.options import PatchOptions
from tailorcli.patchfile.reader import raw_bytes
from tailorcli.patchfile.records import AT_BASE, PATCHED, TensorRecord, fields_of
from tailorcli.patching.graft import check_graft
from tailorcli.patching.methods import patch_by_method
from tailorcli.runs.plan import TensorPlan

if TYPE_CHECKING:
    import torch

    from tailorcli.core.hessian import PreparedHessian
    from tailorcli.core.tailor import LayerResult
    from tailorcli.patching.methods import MaskOf


@dataclass
class PatchInputs:
    """The opened inputs of a run."""

    base: Checkpoint
    tuned: Checkpoint
    stats: Stats | None
    retain_stats: Stats | None = None
    data: Path | None = None  # what graft trains on

    @classmethod
    def open(
        cls,
        base: PathLike,
        tuned: PathLike,
        stats: PathLike | None,
        options: PatchOptions,
        stack: ExitStack,
        retain: PathLike | None = None,
        data: PathLike | None = None,
    ) -> PatchInputs:
        """Open all by their headers; ``stack`` closes them.

        Raises TailorError where one cannot be opened or is not for these options.
        """
        if options.method == "graft":
            check_graft(data, options)
        opened_base = stack.enter_context(open_checkpoint(base, options.fp8_output))
        opened_tuned = stack.enter_context(open_for(opened_base, tuned, options.fp8_output))
        _note_config(opened_base, opened_tuned)
        opened_stats = _open_stats(stats, stack)
        if opened_stats is not None:
            opened_stats.rename_for(opened_tuned)
        opened_retain = _open_stats(retain, stack)
        if options.resized_vocab:
            if opened_base.dequantized:
                what = "--resized-vocab is not for quantised checkpoints"
                raise OptionsError(what, "patch the two models as they were before they were quantised")
            if isinstance(opened_tuned, AdaptedCheckpoint):
                what = "--resized-vocab is not for adapters"
                raise OptionsError(what, "merge the adapter first: model.merge_and_unload()")
            opened_base = stack.enter_context(grow_vocabulary(opened_base, opened_tuned))
        chosen = Path(data) if data and options.method == "graft" else None
        return cls(opened_base, opened_tuned, opened_stats, opened_retain, chosen)

    def describe(self) -> dict[str, dict[str, str]]:
        """Path and fingerprint of each."""
        facts = {
            "base": {"path": path_text(self.base.path), "fingerprint": self.base.fingerprint()},
            "tuned": {"path": path_text(self.tuned.path), "fingerprint": self.tuned.fingerprint()},
        }
        for name, stats in (("stats", self.stats), ("retain", self.retain_stats)):
            if stats is not None:
                facts[name] = {"path": path_text(stats.path), "fingerprint": stats.fingerprint()}
        if self.data is not None:
            facts["data"] = {"path": path_text(self.data), "fingerprint": digest_of(self.data.read_bytes())}
        return facts

    @property
    def paths(self) -> list[Path]:
        """Where they lie: no output may."""
        found = [item.path for item in (self.base, self.tuned, self.stats, self.retain_stats) if item is not None]
        return found if self.data is None else [*found, self.data]

    @property
    def files(self) -> list[Path]:
        """What is read of them."""
        stats = [file for item in (self.stats, self.retain_stats) if item is not None for file in item.files]
        return [*self.base.shards, *self.tuned.shards, *stats, *([] if self.data is None else [self.data])]


@dataclass
class _Loaded:
    """One tensor's inputs as read from disk."""

    base: torch.Tensor
    tuned: torch.Tensor
    packed: list[torch.Tensor]  # its Hessian and that of the retained data, where the tensor before had others
    digest: str  # of the base's bytes, where it is wanted

    def give_packed(self) -> list[torch.Tensor]:
        """The Hessians, which are not kept here any longer."""
        packed, self.packed = self.packed, []
        return packed


def _reader(
    tensors: list[TensorPlan], inputs: PatchInputs, options: PatchOptions, device: torch.device, digests: bool
) -> ReadAhead[_Loaded]:
    """Reads what each of ``tensors`` needs; a Hessian only for the first of those that share it."""
    stats, retain_stats = inputs.stats, inputs.retain_stats
    pinned = device.type == "cuda"  # a GPU copies at full speed, and by itself, from pinned memory alone

    def needed(position: int) -> list[tuple[Stats, str]]:
        tensor = tensors[position]
        if tensor.hessian is None or stats is None or (position and tensors[position - 1].shares(tensor)):
            return []
        return [
            (stats, tensor.hessian),
            *((retain_stats, name) for name in tensor.retained_hessians if retain_stats is not None),
        ]

    def nbytes(position: int) -> int:
        tensor = tensors[position]
        both = tensor.nbytes + inputs.tuned.tensors[tensor.name].nbytes
        return both + sum(source.nbytes(name) for source, name in needed(position))

    def load(position: int) -> _Loaded:
        name = tensors[position].name
        base = inputs.base.read(name, pinned)
        return _Loaded(
            base,
            inputs.tuned.read(name, pinned),
            [source.load(name, pinned) for source, name in needed(position)],
            digest_of(raw_bytes(base)) if digests else "",
        )

    return ReadAhead(load, [(tensor.held_bytes, nbytes(position)) for position, tensor in enumerate(tensors)])


def tailored(
    tensors: list[TensorPlan],
    inputs: PatchInputs,
    options: PatchOptions,
    device: torch.device,
    timer: StageTimer,
    *,
    score_only: bool,
    digests: bool = False,
    masks: MaskOf | None = None,
) -> Iterator[tuple[TensorPlan, LayerResult | None, str]]:
    """Each tensor with its result and its base's digest, in order; no result for a tensor that stays at base.

    Raises NumericalError, which names the tensor.
    """
    from tailorcli.core.tailor import tailor_experts, tailor_layer

    prepare_next = partial(_prepare, inputs=inputs, options=options, device=device, timer=timer)
    layer_settings: dict[str, Any] = {
        "density": options.density,
        "omega": options.omega,
        "solver": options.solver,
        "block_size": options.block_size,
        "tolerance": options.tolerance,
        "max_iterations": options.max_iterations,
        "weight": options.effective_weight,
        "score_only": score_only,
        "timer": timer,
    }
    reader = _reader([tensor for tensor in tensors if tensor.action == "patch"], inputs, options, device, digests)
    loads = iter(reader)
    prepared: PreparedHessian | None = None
    prepared_for: TensorPlan | None = None
    try:
        with exact_float32(), device_errors():
            for tensor in tensors:
                if tensor.action != "patch":
                    yield tensor, None, ""
                    continue
                with timer.stage("wait for read"):
                    loaded = next(loads)
                try:
                    if prepared_for is None or not tensor.shares(prepared_for):
                        prepared, prepared_for = None, tensor  # freed before the next one is unpacked
                        if tensor.hessian is not None:
                            prepared = prepare_next((tensor.hessian, *tensor.retained_hessians), loaded.give_packed())
                    with timer.stage("transfer"):
                        base, tuned = (t.to(device, non_blocking=True) for t in (loaded.base, loaded.tuned))
                    digest = loaded.digest
                    del loaded
                    settings = layer_settings | {"transposed": tensor.transposed}
                    if options.method != "tailor":
                        result = patch_by_method(tensor, base, tuned, prepared, options, masks, timer)
                    elif tensor.experts:
                        each = _prepare_each(tensor, inputs, prepare_next, timer)
                        result = tailor_experts(base, tuned, each, **settings)
                    else:
                        result = tailor_layer(base, tuned, prepared, **settings)
                    del base, tuned
                except NumericalError as error:
                    raise NumericalError(f"tensor {tensor.name!r}: {error.message}", error.hint) from error
                if inputs.base.dequantized and result.patched is not None and result.mask is not None:
                    stored = inputs.base.rounded(tensor.name, result.patched, result.mask)
                    result = replace(result, patched=stored)
                yield tensor, result, digest
                del result
    finally:
        reader.close()
        timer.seconds["read"] = timer.seconds.get("read", 0.0) + reader.seconds


def _prepare_each(
    tensor: TensorPlan,
    inputs: PatchInputs,
    prepare_next: Callable[[tuple[str, ...], list[torch.Tensor]], PreparedHessian],
    timer: StageTimer,
) -> Iterator[PreparedHessian]:
    """The Hessians of fused experts, one at a time; one that serves several in a row is prepared once."""
    assert inputs.stats is not None
    sources = (inputs.stats, inputs.retain_stats)
    each = (
        zip(tensor.experts, tensor.retained_hessians, strict=True)
        if tensor.retained_hessians
        else ((name,) for name in tensor.experts)
    )
    for names, same in groupby(each):
        with timer.stage("wait for read"):
            packed = [source.load(name) for source, name in zip(sources, names, strict=False) if source is not None]
        prepared = prepare_next(names, packed)
        del packed
        for _ in same:
            yield prepared
        del prepared


def _prepare(
    names: tuple[str, ...],
    packed: list[torch.Tensor],
    inputs: PatchInputs,
    options: PatchOptions,
    device: torch.device,
    timer: StageTimer,
) -> PreparedHessian:
    """Unpack and factorise a Hessian for the tensors that share it, and with it that of the retained data, if any."""
    from tailorcli.core.hessian import prepare, unpack_triangle
    from tailorcli.core.retain import prepare_retaining

    unpacked = []
    for stats, name in zip((inputs.stats, inputs.retain_stats), names, strict=False):
        assert stats is not None
        info = stats.hessians[name]
        with timer.stage("unpack"):
            values = packed.pop(0).to(device, non_blocking=True)
            hessian = unpack_triangle(values, info.size) if info.kind == "full" else values
        if not bool(hessian.diagonal().isfinite().all() if hessian.dim() == 2 else hessian.isfinite().all()):
            raise NumericalError(f"NaN or infinity in its Hessian {name!r} of {stats.path}", "calibrate again")
        unpacked.append(hessian)
        del values, hessian
    with timer.stage("factorise"):
        full = unpacked[0].dim() == 2
        wanted = {"sensitivity": options.omega < 1.0, "sequential": options.needs_factor and full}
        if len(unpacked) == 2:
            new, retained = unpacked
            return prepare_retaining(new, retained, options.retain_weight, options.effective_damping, **wanted)
        return prepare(unpacked[0], options.effective_damping, **wanted)


def _note_config(base: Checkpoint, tuned: Checkpoint) -> None:
    """Note where base and tuned run differently. A patched model gets tuned's config, so it runs as tuned does."""
    folders = (base.path, config_folder(tuned))
    if folders[0] == folders[1] or not all((folder / "config.json").is_file() for folder in folders):
        return
    fields = differing_fields(*(read_config(folder) for folder in folders))
    if fields:
        more = f" and {len(fields) - 4} more" if len(fields) > 4 else ""
        told = f"base's and tuned's configs differ in {', '.join(fields[:4])}{more}"
        note(f"{told}: the patched model gets tuned's, and is run under it")


def _open_stats(path: PathLike | None, stack: ExitStack) -> Stats | None:
    if path is None:
        return None
    stats = Stats.open(path)
    stack.callback(stats.close)
    return stats


def record_of(
    tensor: TensorPlan,
    result: LayerResult | None,
    stats: Stats | None,
    options: PatchOptions,
    further: dict[str, Any] | None = None,
) -> TensorRecord:
    """The report's entry for one tensor, with ``further`` fields; one that fine-tuning did not change stays at base."""
    frozen = result is not None and result.figures.zero_delta == result.figures.numel
    used = [stats.hessians[name] for name in tensor.hessians] if stats else []
    notes = [stats.tensors[tensor.name].note if stats is not None and used else "", tensor.note]
    figures: dict[str, Any] = {}
    if result is not None and not frozen:
        figures = fields_of(result.figures.to_dict())
        damping = result.figures.damping
        figures["damped_further"] = damping is not None and damping > options.effective_damping
    found: dict[str, Any] = {
        "name": tensor.name,
        "status": PATCHED if tensor.action == "patch" and not frozen else AT_BASE,
        "reason": "fine-tuning did not change it" if frozen else tensor.reason,
        "role": tensor.role,
        "shape": tensor.shape,
        "dtype": tensor.dtype,
        "hessian": tensor.hessian,
        "kind": used[0].kind if used else None,
        "tokens": min(info.tokens for info in used) if used else None,
        "experts": tensor.experts,
        "note": "; ".join(note for note in notes if note),
        "retain": tensor.retained_hessians,
        **figures,
        **(further or {}),
    }
    return TensorRecord(**found)
