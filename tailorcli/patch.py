"""The visible loop: go through a plan tensor by tensor, and score it or patch it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, open_tuned, tuned_side_files
from tailorcli.baselines import find_cut, patch_by_method
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.grown import GrownCheckpoint, grow_vocabulary
from tailorcli.checkpoint.readahead import ReadAhead
from tailorcli.device import StageTimer, device_errors, exact_float32, resolve_device
from tailorcli.errors import NumericalError, OptionsError
from tailorcli.files import PathLike, digest_of
from tailorcli.graft import MaskFile, check_graft, trained_masks
from tailorcli.options import PatchOptions
from tailorcli.patchfile.reader import raw_bytes
from tailorcli.patchfile.report import PatchReport
from tailorcli.plan import build_plan, working_set
from tailorcli.runs.outputs import Outputs, Target, identity_of, progress_bar
from tailorcli.runs.plan import Plan, TensorPlan

if TYPE_CHECKING:
    import torch

    from tailorcli.baselines import MaskOf
    from tailorcli.core.hessian import PreparedHessian
    from tailorcli.core.tailor import LayerResult
    from tailorcli.propagate import Propagation


@dataclass
class Inputs:
    """The opened inputs of a run."""

    base: Checkpoint
    tuned: Checkpoint
    stats: Stats | None
    retain: Stats | None = None
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
    ) -> Inputs:
        """Open all by their headers; ``stack`` closes them."""
        if options.method == "graft":
            check_graft(data, options)
        opened_base = stack.enter_context(Checkpoint.open(base))
        opened_tuned = stack.enter_context(open_tuned(tuned, opened_base))
        opened_stats = _open_stats(stats, stack)
        opened_retain = _open_stats(retain, stack)
        if options.resized_vocab:
            if isinstance(opened_tuned, AdaptedCheckpoint):
                what = "--resized-vocab is not for adapters"
                raise OptionsError(what, "merge the adapter first: model.merge_and_unload()")
            opened_base = stack.enter_context(grow_vocabulary(opened_base, opened_tuned))
        chosen = Path(data) if data and options.method == "graft" else None
        return cls(opened_base, opened_tuned, opened_stats, opened_retain, chosen)

    def describe(self) -> dict[str, dict[str, str]]:
        """Path and fingerprint of each."""
        facts = {
            "base": {"path": str(self.base.path), "fingerprint": self.base.fingerprint()},
            "tuned": {"path": str(self.tuned.path), "fingerprint": self.tuned.fingerprint()},
        }
        for name, stats in (("stats", self.stats), ("retain", self.retain)):
            if stats is not None:
                facts[name] = {"path": str(stats.path), "fingerprint": stats.fingerprint()}
        if self.data is not None:
            facts["data"] = {"path": str(self.data), "fingerprint": digest_of(self.data.read_bytes())}
        return facts

    @property
    def paths(self) -> list[Path]:
        """Where they lie: no output may."""
        return [item.path for item in (self.base, self.tuned, self.stats, self.retain) if item is not None]


def plan_patch(
    base: PathLike,
    tuned: PathLike,
    output: PathLike | None = None,
    stats: PathLike | None = None,
    options: PatchOptions = PatchOptions(),
    patch_file: PathLike | None = None,
    retain: PathLike | None = None,
    data: PathLike | None = None,
) -> Plan:
    """What ``patch_checkpoint`` would do to each tensor and what it would cost, from headers alone."""
    options = options.resolved(retain is not None)
    with ExitStack() as stack:
        inputs = Inputs.open(base, tuned, stats, options, stack, retain, data)
        plan = build_plan(inputs.base, inputs.tuned, inputs.stats, options, inputs.retain)
        target = Target.of(output, patch_file, resume=options.resume, overwrite=options.overwrite)
        _require_stored_rows(target, options)
        target.check(inputs.paths, plan)
        return plan


def _require_stored_rows(target: Target, options: PatchOptions) -> None:
    if target.patch_file is not None and options.resized_vocab:
        raise OptionsError(
            "a patch file holds entries of the base's own tensors, and --resized-vocab gives them new rows",
            "leave --patch-file out, or give the base the new rows first: resize_token_embeddings",
        )


def score_checkpoint(
    base: PathLike,
    tuned: PathLike,
    stats: PathLike | None = None,
    options: PatchOptions = PatchOptions(),
    progress: bool = False,
    retain: PathLike | None = None,
) -> PatchReport:
    """The mask statistics of every tensor (Eq. 9 to 11), without solving for or writing anything.

    Raises the same errors as ``patch_checkpoint``.
    """
    started = perf_counter()
    options = options.resolved(retain is not None)
    with ExitStack() as stack:
        inputs = Inputs.open(base, tuned, stats, options, stack, retain)
        plan = build_plan(inputs.base, inputs.tuned, inputs.stats, options, inputs.retain)
        device = resolve_device(options.device)
        timer = StageTimer(device)
        records = {t.name: _record(t, None, inputs.stats, options) for t in plan.left_at_base}
        bar = stack.enter_context(progress_bar(plan.patched, "scoring", progress))
        for tensor, result, _ in _tailored(plan.patched, inputs, options, device, timer, score_only=True):
            records[tensor.name] = _record(tensor, result, inputs.stats, options)
            bar.update(tensor.nbytes)
        ordered = [records[name] for name in inputs.base.tensors]
        seconds = perf_counter() - started
        return PatchReport("score", options.to_dict(), inputs.describe(), ordered, dict(timer.seconds), seconds)


def patch_checkpoint(
    base: PathLike,
    tuned: PathLike,
    output: PathLike | None,
    stats: PathLike | None = None,
    options: PatchOptions = PatchOptions(),
    progress: bool = False,
    patch_file: PathLike | None = None,
    announce: Callable[[Plan], None] | None = None,
    retain: PathLike | None = None,
    data: PathLike | None = None,
) -> PatchReport:
    """Patch ``base`` with the best ``density`` of ``tuned``; write the checkpoint ``output``, a ``patch_file`` or both.

    ``stats`` is a folder that ``calibrate_model`` wrote for ``tuned``; it may be missing where
    ``options.needs_hessians`` is false. The output has the base's tensor names, dtypes and (without
    ``max_shard_size``) sharding, and the tuned model's side files; a report and a run record lie beside them.
    ``retain`` is a folder that ``calibrate_model`` wrote for ``base``, on data that stand for what it must not forget
    or that it wrote itself: the retain term, weighed by ``options.retain_weight``.
    ``announce`` is called with the plan before the work starts; ``data`` is what ``method="graft"`` trains on.
    Raises TailorError for everything that a user can put right; nothing that looks finished is left then.
    """
    started = perf_counter()
    options = options.resolved(retain is not None)
    target = Target.of(output, patch_file, resume=options.resume, overwrite=options.overwrite)
    if target.folder is None and target.patch_file is None:
        raise OptionsError("nothing to write", "pass an output folder, a patch file, or both")
    _require_stored_rows(target, options)
    with ExitStack() as stack:
        inputs = Inputs.open(base, tuned, stats, options, stack, retain, data)
        plan = build_plan(inputs.base, inputs.tuned, inputs.stats, options, inputs.retain)
        device = resolve_device(options.device)
        target.check(inputs.paths, plan)
        described = inputs.describe()
        identity = identity_of(described, options.to_dict(), device)
        finished = target.finished(identity, "patch")
        if finished is not None:
            return finished
        if announce is not None:
            announce(plan)
        timer = StageTimer(device)
        side = {place.as_posix(): source for place, source in tuned_side_files(inputs.tuned).items()}
        manifest = {"task": options.task, "license": options.license, "inputs": described}
        outputs = stack.enter_context(target.open(plan, inputs.base, identity, manifest, side))
        records = dict(outputs.done)
        bar = stack.enter_context(progress_bar(plan.tensors, "patching", progress))
        bar.update(sum(tensor.nbytes for tensor in plan.tensors if tensor.name in records))
        todo = [tensor for tensor in plan.tensors if tensor.name not in records]
        with timer.stage("masks"), exact_float32(), device_errors():
            trained, masks = _masks_first(target, plan, records, inputs, options, identity, device, progress)

        def write(tensor: TensorPlan, result: LayerResult | None, digest: str, facts: dict[str, Any]) -> None:
            record = _record(tensor, result, inputs.stats, options) | facts
            if isinstance(inputs.base, GrownCheckpoint) and tensor.name in inputs.base.grown:
                record["note"] = f"the last {inputs.base.new_rows(tensor.name)} rows are new, and tuned's own"
            records[tensor.name] = record
            with timer.stage("wait for write"):
                if result is None or result.patched is None or record["status"] == "base":
                    outputs.copy(tensor.name, inputs.base, record)
                else:
                    outputs.write(tensor.name, result.patched, result.mask, record, digest)
            bar.update(tensor.nbytes)

        def plain(tensors: list[TensorPlan]) -> Iterator[tuple[TensorPlan, LayerResult | None, str]]:
            wanted: dict[str, Any] = {"score_only": False, "digests": outputs.wants_digest, "masks": masks}
            return _tailored(tensors, inputs, options, device, timer, **wanted)

        if options.propagate:
            with exact_float32(), device_errors():
                _propagation(inputs, options, device, timer, target, outputs, plain, write).run(plan.tensors)
        else:
            for tensor, result, digest in plain(todo):
                write(tensor, result, digest, {})
                del result
        with timer.stage("wait for write"):
            outputs.drain()
        timer.seconds["write"] = outputs.seconds
        ordered = [records[name] for name in inputs.base.tensors]
        seconds = perf_counter() - started
        report = PatchReport("patch", options.to_dict(), described, ordered, dict(timer.seconds), seconds)
        outputs.finish(report)
        if trained is not None:
            trained.remove()
        return report


def _masks_first(
    target: Target,
    plan: Plan,
    done: dict[str, Any],
    inputs: Inputs,
    options: PatchOptions,
    identity: dict[str, Any],
    device: torch.device,
    progress: bool,
) -> tuple[MaskFile | None, MaskOf | None]:
    """What has to look at all tensors before the first is patched: trained masks, or one threshold for all."""
    both = (inputs.base, inputs.tuned)
    if inputs.data is not None:
        trained = trained_masks(target.place, plan, *both, inputs.data, options, identity, device, progress)
        return trained, trained.mask_of
    if options.counts_first:
        return None, find_cut(plan.patched, done, *both, options.density, device).mask
    return None, None


def _propagation(
    inputs: Inputs,
    options: PatchOptions,
    device: torch.device,
    timer: StageTimer,
    target: Target,
    outputs: Outputs,
    plain: Callable[[list[TensorPlan]], Iterator[tuple[TensorPlan, LayerResult | None, str]]],
    write: Callable[[TensorPlan, LayerResult | None, str, dict[str, Any]], None],
) -> Propagation:
    from tailorcli.propagate import Propagation

    assert inputs.stats is not None
    assert inputs.retain is not None
    done = frozenset(outputs.done)
    return Propagation(
        *(inputs.base, inputs.tuned, inputs.stats, inputs.retain, options, device, timer),
        scratch=target.folder if target.folder is not None else target.place.parent,
        plain=plain,
        write=write,
        stored=lambda name: outputs.read(name, inputs.base.tensors[name]),
        done=done,
    )


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
    tensors: list[TensorPlan], inputs: Inputs, options: PatchOptions, device: torch.device, digests: bool
) -> ReadAhead[_Loaded]:
    """Reads what each of ``tensors`` needs; a Hessian only for the first of those that share it."""
    stats, retain = inputs.stats, inputs.retain
    pinned = device.type == "cuda"  # a GPU copies at full speed, and by itself, from pinned memory alone

    def needed(position: int) -> list[tuple[Stats, str]]:
        tensor = tensors[position]
        if tensor.hessian is None or stats is None or (position and tensors[position - 1].shares(tensor)):
            return []
        return [(stats, tensor.hessian), *((retain, name) for name in tensor.retain if retain is not None)]

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

    held = [working_set(tensor, inputs.tuned, stats, options) for tensor in tensors]
    return ReadAhead(load, [(size, nbytes(position)) for position, size in enumerate(held)])


def _tailored(
    tensors: list[TensorPlan],
    inputs: Inputs,
    options: PatchOptions,
    device: torch.device,
    timer: StageTimer,
    *,
    score_only: bool,
    digests: bool = False,
    masks: MaskOf | None = None,
) -> Iterator[tuple[TensorPlan, LayerResult | None, str]]:
    """Each tensor with its result and its base's digest, in order; no result for a tensor that stays at base."""
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
                            prepared = prepare_next((tensor.hessian, *tensor.retain), loaded.give_packed())
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
                yield tensor, result, digest
                del result
    finally:
        reader.close()
        timer.seconds["read"] = timer.seconds.get("read", 0.0) + reader.seconds


def _prepare_each(
    tensor: TensorPlan,
    inputs: Inputs,
    prepare_next: Callable[[tuple[str, ...], list[torch.Tensor]], PreparedHessian],
    timer: StageTimer,
) -> Iterator[PreparedHessian]:
    """The Hessians of fused experts, one at a time; one that serves several in a row is prepared once."""
    assert inputs.stats is not None
    sources = (inputs.stats, inputs.retain)
    each = zip(tensor.experts, tensor.retain, strict=True) if tensor.retain else ((name,) for name in tensor.experts)
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
    inputs: Inputs,
    options: PatchOptions,
    device: torch.device,
    timer: StageTimer,
) -> PreparedHessian:
    """Unpack and factorise a Hessian for the tensors that share it, and with it that of the retained data, if any."""
    from tailorcli.core.hessian import prepare, unpack_triangle
    from tailorcli.core.retain import prepare_retaining

    unpacked = []
    for stats, name in zip((inputs.stats, inputs.retain), names, strict=False):
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


def _open_stats(path: PathLike | None, stack: ExitStack) -> Stats | None:
    if path is None:
        return None
    stats = Stats.open(path)
    stack.callback(stats.close)
    return stats


def _record(
    tensor: TensorPlan, result: LayerResult | None, stats: Stats | None, options: PatchOptions
) -> dict[str, Any]:
    """The report's entry for one tensor; one that fine-tuning did not change has nothing to patch."""
    frozen = result is not None and result.figures.zero_delta == result.figures.numel
    used = [stats.hessians[name] for name in tensor.hessians] if stats else []
    record: dict[str, Any] = {
        "name": tensor.name,
        "status": "patched" if tensor.action == "patch" and not frozen else "base",
        "reason": "fine-tuning did not change it" if frozen else tensor.reason,
        "role": tensor.role,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "hessian": tensor.hessian,
        "kind": used[0].kind if used else None,
        "tokens": min(info.tokens for info in used) if used else None,
    }
    if tensor.experts:
        record["experts"] = list(tensor.experts)
    notes = [stats.tensors[tensor.name].note if stats is not None and used else "", tensor.note]
    if any(notes):
        record["note"] = "; ".join(note for note in notes if note)
    if tensor.retain:
        record["retain"] = tensor.retain[0] if len(tensor.retain) == 1 else list(tensor.retain)
    if result is not None and not frozen:
        record |= result.figures.to_dict()
        damping = result.figures.damping
        record["damped_further"] = damping is not None and damping > options.effective_damping
    return record
