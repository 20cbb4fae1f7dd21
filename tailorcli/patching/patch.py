"""The visible loop: go through a plan tensor by tensor, and score it or patch it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.device import StageTimer, deterministic_algorithms, device_errors, exact_float32, resolve_device
from tailorcli.distributed import ranks, told, wait_for_all
from tailorcli.errors import OptionsError
from tailorcli.files import PathLike
from tailorcli.guard import Watch
from tailorcli.options import AUTO, CalibrateOptions, PatchOptions
from tailorcli.patchfile.report import PatchReport
from tailorcli.patching.carded import side_files_of
from tailorcli.patching.checked import check_both, patch_checked, work_folder
from tailorcli.patching.cost import work_of
from tailorcli.patching.graft import MaskFile, check_trainable, trained_masks
from tailorcli.patching.inputs import PatchInputs
from tailorcli.patching.methods import find_cut
from tailorcli.patching.planner import build_plan
from tailorcli.patching.run import Run
from tailorcli.patching.stream import tailored
from tailorcli.patching.teacher import with_teacher
from tailorcli.runs.divided import own_tensors, spread_tensors
from tailorcli.runs.outputs import Target, identity_of, progress_bar
from tailorcli.runs.plan import Plan, TensorPlan

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs
    from tailorcli.patching.methods import MaskOf


def plan_patch(
    base: PathLike,
    tuned: PathLike,
    output: PathLike | None = None,
    stats: PathLike | None = None,
    options: PatchOptions = PatchOptions(),
    patch_file: PathLike | None = None,
    retain: PathLike | None = None,
    graft_data: PathLike | None = None,
) -> Plan:
    """What ``patch_checkpoint`` would do to each tensor and what it would cost, from headers alone."""
    options = options.resolved(retain is not None).before_teacher
    with ExitStack() as stack:
        inputs = PatchInputs.open(base, tuned, stats, options, stack, retain, graft_data)
        options = inputs.told(options)
        plan = build_plan(inputs.base, inputs.tuned, inputs.stats, options, inputs.retain_stats)
        target = Target.of(output, patch_file, resume=options.resume, overwrite=options.overwrite)
        check_writable(target, options, inputs.base)
        target.check(inputs.paths, plan)
        check_method(plan, inputs, options)
        if options.check_propagation:
            check_both(target, plan, inputs, options)
        return plan


def check_method(plan: Plan, inputs: PatchInputs, options: PatchOptions) -> list[Inputs] | None:
    """The samples that graft can train on; None of another method. Raises TailorError."""
    if inputs.graft_data is None:
        return None
    return check_trainable(plan.patched, inputs.base, inputs.tuned, inputs.graft_data, options)


def check_writable(target: Target, options: PatchOptions, base: Checkpoint) -> None:
    """A patch file is asked for only where it can hold the patch. Raises OptionsError."""
    _require_stored_rows(target, options)
    _require_plain_weights(target, base)


def _require_plain_weights(target: Target, base: Checkpoint) -> None:
    if target.patch_file is not None and base.dequantized:
        raise OptionsError(
            f"a patch file holds entries of the base's own tensors, and those of {base.path} are quantised",
            "leave --patch-file out, or patch the two models as they were before they were quantised",
        )


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
        inputs = PatchInputs.open(base, tuned, stats, options, stack, retain)
        options = inputs.told(options)
        plan = build_plan(inputs.base, inputs.tuned, inputs.stats, options, inputs.retain_stats)
        device = resolve_device(options.device)
        own = own_tensors(plan.patched, partial(work_of, inputs=inputs, options=options))
        bar = stack.enter_context(progress_bar(own, "scoring", progress))
        run = Run(inputs, options, device, StageTimer(device), bar=bar)
        for tensor in plan.left_at_base:
            run.note(tensor, None)
        for tensor, result, _ in tailored(own, run, score_only=True):
            run.note(tensor, result)
            run.advance(tensor)
        return run.report("score", inputs.describe(), started, own)


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
    graft_data: PathLike | None = None,
    made_of: Mapping[str, dict[str, str]] | None = None,
    teacher_data: PathLike | None = None,
    calibration: CalibrateOptions | None = None,
) -> PatchReport:
    """Patch ``base`` with the best ``density`` of ``tuned``; write the checkpoint ``output``, a ``patch_file`` or both.

    ``stats`` is a folder that ``calibrate_model`` wrote for ``tuned``; it may be missing where
    ``options.needs_hessians`` is false. The output has the base's tensor names, dtypes and (without
    ``max_shard_size``) sharding, and the tuned model's side files; a report and a run record lie beside them.
    ``retain`` is a folder that ``calibrate_model`` wrote for ``base``, on data that stand for what it must not forget
    or that it wrote itself: the retain term, weighed by ``options.retain_weight``.
    ``announce`` is called with the plan before the work starts; ``graft_data`` is what ``method="graft"`` trains on.
    ``made_of`` are further inputs that the report shall name: the path and the fingerprint of each.
    With ``options.teacher_weight`` "auto" the weight is picked first, and told, by the loss on ``teacher_data``,
    records of the new task that ``tuned`` was not trained on, drawn as ``calibration`` says, or on the samples of
    ``stats``.
    Raises TailorError for everything that a user can put right; nothing that looks finished is left then.
    """
    started = perf_counter()
    options = options.resolved(retain is not None)
    target = Target.needed(output, patch_file, resume=options.resume, overwrite=options.overwrite)
    _require_stored_rows(target, options)
    if options.teacher_weight == AUTO:
        plan_patch(base, tuned, output, stats, options, patch_file, retain, graft_data)
        how = (progress and ranks().first, None, calibration)
        options = told(with_teacher(options, base, tuned, stats, teacher_data, *how))
        wait_for_all("the teacher's weight to be picked")  # none writes before all have checked
    with ExitStack() as stack:
        inputs = PatchInputs.open(base, tuned, stats, options, stack, retain, graft_data)
        inputs.sources = made_of or {}
        _require_plain_weights(target, inputs.base)
        return patch_opened(inputs, target, inputs.told(options), progress, announce, started)


def patch_opened(
    inputs: PatchInputs,
    target: Target,
    options: PatchOptions,
    progress: bool,
    announce: Callable[[Plan], None] | None,
    started: float,
    *,
    holds_out: bool = False,
) -> PatchReport:
    """``patch_checkpoint`` of inputs that are open; ``options`` are resolved, ``started`` is a perf_counter.

    With ``holds_out`` a tenth of the samples is kept from propagation. Raises TailorError.
    """
    with ExitStack() as stack:
        side = side_files_of(inputs, options)
        watch = Watch([*inputs.files, *(source for source in side.values() if isinstance(source, Path))])
        plan = build_plan(inputs.base, inputs.tuned, inputs.stats, options, inputs.retain_stats)
        device = resolve_device(options.device)
        described = inputs.describe()
        chosen = options.identity(inputs.retain_stats is not None)
        identity = identity_of(described, chosen, device, **inputs.configs)
        manifest = {"task": options.task, "license": options.license, "inputs": described}
        if holds_out:
            identity["holds_out"] = True
        if options.check_propagation:
            check_both(target, plan, inputs, options)
        what = (plan, inputs.base, inputs.paths, identity, "patch", side, manifest)
        samples = check_method(plan, inputs, options)
        begun = target.begin(*what, announce=announce, divided=True)
        if isinstance(begun, PatchReport):
            return begun
        outputs = stack.enter_context(begun)
        if options.check_propagation:

            def one(where: Target, how: PatchOptions, holds_out: bool) -> PatchReport:
                return patch_opened(inputs, where, how, progress, None, perf_counter(), holds_out=holds_out)

            checked = patch_checked(plan, inputs, outputs, target, options, device, progress, one)
            checked = replace(checked, seconds=perf_counter() - started)
            outputs.finish(checked, watch)
            shutil.rmtree(work_folder(target))
            return checked
        records = dict(outputs.records)
        done = [tensor for tensor in plan.tensors if tensor.name in records]
        own = _own(plan, inputs, options, records)
        bar = stack.enter_context(progress_bar([*done, *own], "patching", progress))
        bar.start_at(sum(tensor.nbytes for tensor in done))
        timer = StageTimer(device)
        run = Run(inputs, options, device, timer, outputs, bar=bar, holds_out=holds_out, records=records)
        run.copy_first(own)
        trained, masks = _masks_first(target.place, plan, run, samples, identity, progress)
        del samples
        _patch_all(plan, own, replace(run, masks=masks), target)
        run.drain()
        report = run.report("patch", described, started, own)
        outputs.finish(report, watch)
        if trained is not None and ranks().first:
            trained.remove()
        return report


def _own(plan: Plan, inputs: PatchInputs, options: PatchOptions, done: Collection[str]) -> list[TensorPlan]:
    """The tensors that this rank patches, of those that no interrupted run has ``done``."""
    todo = [tensor for tensor in plan.tensors if tensor.name not in done]
    if options.propagate:
        owners = _owners(plan, inputs, options)
        return [tensor for tensor in todo if owners[tensor.name] == ranks().rank]
    return own_tensors(todo, partial(work_of, inputs=inputs, options=options))


def _owners(plan: Plan, inputs: PatchInputs, options: PatchOptions) -> dict[str, int]:
    """Which rank patches each tensor of a propagated patch, where one group of layers waits for the next."""
    return spread_tensors(plan.tensors, partial(work_of, inputs=inputs, options=options), ranks().size)


def _patch_all(plan: Plan, own: Sequence[TensorPlan], run: Run, target: Target) -> None:
    """Patch and write this rank's tensors, which an interrupted run has not written."""
    if run.options.propagate:
        from tailorcli.patching.propagate import patch_propagated

        owners = _owners(plan, run.inputs, run.options)
        with exact_float32(), deterministic_algorithms(_is_deterministic(run)), device_errors():
            patch_propagated(plan.tensors, run, target.scratch, owners=owners)
        return
    with deterministic_algorithms(_is_deterministic(run)):
        for tensor, result, digest in tailored([t for t in own if not run.is_done(t.name)], run):
            run.write(tensor, result, digest)
            del result


def _is_deterministic(run: Run) -> bool:
    """Whether the statistics were made with --deterministic: the patch is, too, then."""
    options = {} if run.inputs.stats is None else run.inputs.stats.manifest.get("options", {})
    return isinstance(options, dict) and bool(options.get("deterministic"))


def _masks_first(
    place: Path, plan: Plan, run: Run, samples: list[Inputs] | None, identity: dict[str, Any], progress: bool
) -> tuple[MaskFile | None, MaskOf | None]:
    """What has to look at all tensors before the first is patched: trained masks, or one threshold for all."""
    inputs, options, device = run.inputs, run.options, run.device
    both = (inputs.base, inputs.tuned)
    with run.timer.stage("masks"), exact_float32(), device_errors("a smaller --batch-size"):
        if samples is not None:
            trained = trained_masks(place, plan, *both, samples, options, identity, device, progress)
            return trained, trained.mask_of
        if options.counts_first:
            return None, find_cut(plan.patched, run.records, *both, options.density, device).mask
    return None, None
