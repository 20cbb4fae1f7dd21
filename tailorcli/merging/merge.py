"""Stitch the patches of several tasks into one model: ``merge-multi`` (Eq. 14 and 15, and the joint optimum)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import CARDS, Checkpoint
from tailorcli.device import StageTimer, resolve_device
from tailorcli.distributed import wait_for_all
from tailorcli.errors import PatchError
from tailorcli.files import PathLike, parse_json, read_bytes
from tailorcli.guard import Watch
from tailorcli.merging.carded import merged_side_files
from tailorcli.merging.plan import MergeInputs, build_merge_plan, merge_work
from tailorcli.options import MergeOptions
from tailorcli.patchfile.reader import PatchFile
from tailorcli.patchfile.records import TensorRecord, fields_of
from tailorcli.patchfile.report import REPORT_FILE, PatchReport, is_retained
from tailorcli.patchfile.view import patched_tensor, side_sources
from tailorcli.runs.divided import joined_records, own_tensors, shares_of_ranks
from tailorcli.runs.loop import LastPrepared, worked_on
from tailorcli.runs.outputs import Target, identity_of, progress_bar
from tailorcli.runs.plan import Plan, TensorPlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tailorcli.core.hessian import PreparedHessian
    from tailorcli.runs.writing import Outputs


def plan_merge(
    base: PathLike,
    patches: Sequence[PathLike],
    output: PathLike | None = None,
    tuned: Sequence[PathLike] = (),
    stats: Sequence[PathLike] = (),
    options: MergeOptions = MergeOptions(),
    patch_file: PathLike | None = None,
) -> Plan:
    """What ``merge_patches`` would do to each tensor and what it would cost; reads and checks all of the patches."""
    with ExitStack() as stack:
        inputs = MergeInputs.open(base, patches, tuned, stats, options, stack)
        plan = build_merge_plan(inputs, options)
        Target.of(output, patch_file, resume=options.resume, overwrite=options.overwrite).check(inputs.paths, plan)
        return plan


def merge_patches(
    base: PathLike,
    patches: Sequence[PathLike],
    output: PathLike | None,
    tuned: Sequence[PathLike] = (),
    stats: Sequence[PathLike] = (),
    options: MergeOptions = MergeOptions(),
    progress: bool = False,
    patch_file: PathLike | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> PatchReport:
    """Stitch ``patches`` of one ``base`` into the checkpoint ``output``, a ``patch_file``, or both.

    ``average`` (Eq. 14, 15) needs the fine-tuned models, ``joint`` also their statistics; fingerprints tell which
    belongs to which patch. Side files are those of the first patch. ``announce`` is called with the plan before the
    work starts. Raises TailorError.
    """
    started = perf_counter()
    target = Target.needed(output, patch_file, resume=options.resume, overwrite=options.overwrite)
    with ExitStack() as stack:
        inputs = MergeInputs.open(base, patches, tuned, stats, options, stack, divided=True)
        wait_for_all("the patch files to be checked")
        watch = Watch(inputs.files)
        plan = build_merge_plan(inputs, options)
        device = resolve_device(options.device)
        facts = inputs.describe()
        identity = identity_of(facts, options.identity(len(patches)), device, command="merge-multi")
        side, notes = side_files_of(inputs)
        side = merged_side_files(side, inputs, options)
        notes += _retain_notes(inputs, options)
        what = (plan, inputs.base, inputs.paths, identity, "merge-multi", side, manifest_of(inputs, facts, options))
        begun = target.begin(*what, announce=announce, divided=True)
        if isinstance(begun, PatchReport):
            return begun
        outputs = stack.enter_context(begun)
        timer = StageTimer(device)
        own = own_tensors(
            [tensor for tensor in plan.tensors if tensor.name not in outputs.records],
            partial(merge_work, inputs=inputs),
        )
        records = _write_all(plan, own, inputs, options, outputs, device, timer, progress)
        timer.seconds["write"] = outputs.seconds
        shares = shares_of_ranks(own, started)
        records = joined_records(records, outputs.records)
        ordered = [records[name] for name in inputs.base.tensors]
        described = described_options(inputs, options)
        seconds = perf_counter() - started
        stages = dict(timer.seconds)
        report = PatchReport("merge-multi", described, facts, ordered, stages, seconds, notes, ranks=shares)
        outputs.finish(report, watch)
        return report


def described_options(inputs: MergeInputs, options: MergeOptions) -> dict[str, Any]:
    """The options of a merge as its report has them."""
    tasks = [task.title for task in inputs.tasks]
    return options.to_dict() | {"tasks": tasks, "weights": list(options.shares(len(tasks)))}


def _write_all(
    plan: Plan,
    own: list[TensorPlan],
    inputs: MergeInputs,
    options: MergeOptions,
    outputs: Outputs,
    device: torch.device,
    timer: StageTimer,
    progress: bool,
) -> dict[str, TensorRecord]:
    """Merge and write this rank's ``own`` tensors, which no earlier run has written; the records of these and those."""
    records = dict(outputs.records)
    done = [tensor for tensor in plan.tensors if tensor.name in records]
    digests = {name: tensor.digest for name, tensor in inputs.tasks[0].patch.base.items()}
    with progress_bar([*done, *own], "merging", progress) as bar:
        bar.start_at(sum(tensor.nbytes for tensor in done))
        try:
            for tensor, merged in _merged(own, inputs, options, device, timer):
                record = records[tensor.name] = _record(tensor, merged)
                with timer.stage("wait for write"):
                    if merged is None:
                        outputs.copy(tensor.name, inputs.base, record, digests[tensor.name])
                    else:
                        outputs.write(tensor.name, merged.patched, merged.union, record, digests[tensor.name])
                bar.update(tensor.nbytes)
            with timer.stage("wait for write"):
                outputs.drain()
        except PatchError:  # a wrong base: no resumed run would get over it
            outputs.discard()
            raise
    return records


def _retain_notes(inputs: MergeInputs, options: MergeOptions) -> tuple[str, ...]:
    """What joint leaves out of the patches: it starts from the tuned models again."""
    if options.method != "joint":
        return ()
    made = [task.title for task in inputs.tasks if is_retained(task.patch.manifest.inputs)]
    what = "was made with a retain term, which joint leaves out; --method patches keeps it"
    return tuple(f"{name} {what}" for name in made)


def manifest_of(inputs: MergeInputs, facts: dict[str, dict[str, str]], options: MergeOptions) -> dict[str, Any]:
    """What a merged patch file says of itself; the licence is the tasks' where they agree."""
    patches = [task.patch for task in inputs.tasks]
    licenses = {patch.manifest.license for patch in patches}
    common = licenses.pop() if len(licenses) == 1 else None
    return {
        "task": options.task or " + ".join(patch.name for patch in patches),
        "license": options.license or common,
        "inputs": facts,
        "merged_from": [
            {"task": patch.name, "license": patch.manifest.license, "fingerprint": patch.fingerprint()}
            for patch in patches
        ],
    }


def side_files_of(inputs: MergeInputs) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """The first patch's side files, and a note for each that another patch has differently."""
    first, *others = [task.patch for task in inputs.tasks]
    kept, *titles = [task.title for task in inputs.tasks]
    side, notes = side_sources(inputs.base, first)
    fingerprints = [task.patch.fingerprint() for task in inputs.tasks]
    found = [
        f"{task.patch.path} is given {count} times and counts as often"
        for task, count in zip(inputs.tasks, map(fingerprints.count, fingerprints), strict=True)
        if count > 1
    ]
    for title, other in zip(titles, others, strict=True):
        for name, entry in other.side_files.items():
            if name == REPORT_FILE or name in CARDS:
                continue
            if name not in first.side_files:
                found.append(f"side file {name} of {title} is left out: {kept} has none")
            elif entry.digest != first.side_files[name].digest and not _same_model(name, first, other, inputs.base):
                found.append(f"side file {name} is that of {kept}; {title} has another")
    return side, notes + tuple(dict.fromkeys(found))


def _same_model(name: str, first: PatchFile, other: PatchFile, base: Checkpoint) -> bool:
    """Whether a side file that differs is a config.json of the same model: ``use_cache`` is worth no line."""
    return name == "config.json" and _config(first, base) == _config(other, base)


def _config(patch: PatchFile, base: Checkpoint) -> Any:
    """A patch's config.json without what changes nothing of the model, or its bytes where it is no JSON object."""
    stored = patch.side_files["config.json"].stored
    content = patch.side_file("config.json") if stored else read_bytes(base.path / "config.json")
    try:
        config = parse_json(content)
        return {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL}
    except (ValueError, AttributeError):
        return content


_NOT_OF_THE_MODEL = ("use_cache", "transformers_version", "_name_or_path")


@dataclass
class _Loaded:
    """One tensor's inputs as read from disk."""

    base: Tensor
    masks: list[Tensor]
    patched: list[Tensor]
    tuned: list[Tensor]
    packed: list[Tensor]  # the tasks' Hessians, where the tensor before did not use the same


@dataclass
class _Hessians:
    """The tasks' Hessians on the device, and what the joint solver has of them together."""

    each: list[Tensor]
    combined: PreparedHessian | None


@dataclass
class Merged:
    """One merged tensor, the union of its masks, and its figures."""

    patched: Tensor
    union: Tensor
    figures: dict[str, Any]


def _load(tensor: TensorPlan, hessians: tuple[str, ...], inputs: MergeInputs) -> _Loaded:
    """What a tensor needs from every task."""
    import torch

    name = tensor.name
    base = inputs.base.read(name)
    loaded = _Loaded(base, [], [], [], [])
    for task in inputs.tasks:
        if name in task.patch.tensors:
            loaded.masks.append(task.patch.mask(name))
            loaded.patched.append(patched_tensor(base, task.patch, name, inputs.base.path))
        else:
            loaded.masks.append(torch.zeros(base.shape, dtype=torch.bool))
            loaded.patched.append(base)
        if task.tuned is not None:
            loaded.tuned.append(task.tuned.read(name))
    for task, hessian in zip(inputs.tasks, hessians, strict=False):
        assert task.stats is not None
        loaded.packed.append(task.stats.load(hessian))
    return loaded


def _merged(
    tensors: list[TensorPlan],
    inputs: MergeInputs,
    options: MergeOptions,
    device: torch.device,
    timer: StageTimer,
) -> Iterator[tuple[TensorPlan, Merged | None]]:
    """Each tensor with its merged value, in order; None for a tensor that no task patches."""
    last: LastPrepared[_Hessians] = LastPrepared()

    def work(tensor: TensorPlan, held: list[_Loaded]) -> Merged:
        loaded, names = held.pop(), tensor.task_hessians
        hessians = last.of(names, lambda: _prepare(names, loaded, inputs, options, device, timer))
        return _merge_tensor(tensor, loaded, hessians or _Hessians([], None), options, device, timer)

    def nbytes(tensor: TensorPlan, _: tuple[str, ...]) -> int:
        return tensor.held_bytes // 2

    return worked_on(tensors, partial(_load, inputs=inputs), nbytes, work, timer)


def _prepare(
    names: tuple[str, ...],
    loaded: _Loaded,
    inputs: MergeInputs,
    options: MergeOptions,
    device: torch.device,
    timer: StageTimer,
) -> _Hessians:
    """Unpack the tasks' Hessians, and combine and factorise them where the joint solver will use them."""
    from tailorcli.core.hessian import combine_hessians, prepare

    opened = []
    with timer.stage("unpack"):
        for task, name in zip(inputs.tasks, names, strict=True):
            assert task.stats is not None
            opened.append(task.stats.unpack(name, loaded.packed.pop(0).to(device)))
    if options.method != "joint":
        return _Hessians(opened, None)
    with timer.stage("factorise"):
        hessian = combine_hessians(opened, options.shares(len(names)))
        return _Hessians(opened, prepare(hessian, options.damping, sensitivity=False, sequential=False))


def _merge_tensor(
    tensor: TensorPlan,
    loaded: _Loaded,
    opened: _Hessians,
    options: MergeOptions,
    device: torch.device,
    timer: StageTimer,
) -> Merged:
    """One tensor by its method, with its figures."""
    from tailorcli.core import stitch
    from tailorcli.core.tailor import layer_shape, require_finite

    hessians, combined = opened.each, opened.combined
    with timer.stage("transfer"):
        shape = layer_shape(loaded.base, hessians[0].shape[0] if hessians else None)
        base, *rest = (
            t.to(device).reshape(shape) for t in (loaded.base, *loaded.masks, *loaded.patched, *loaded.tuned)
        )
        count = len(loaded.masks)
        masks, patched, tuned = rest[:count], rest[count : 2 * count], rest[2 * count :]
    for theta in tuned:
        require_finite(theta)
    weights = options.shares(count)
    with timer.stage("overlap"):
        union = stitch.union_mask(masks)
        figures = stitch.overlap_figures(base, patched, masks)
    with timer.stage("solve"):
        if options.method == "patches":
            merged = stitch.stitch_patches(base, patched, masks, weights)
        elif combined is None:
            merged = stitch.stitch_average(base, tuned, patched, masks, union, weights)
        else:
            solved = stitch.stitch_joint(
                base,
                tuned,
                union,
                hessians,
                combined,
                weights,
                transposed=tensor.transposed,
                tolerance=options.tolerance,
                max_iterations=options.max_iterations,
            )
            merged = solved.patched
            figures |= {"iterations": solved.decoration.iterations, "residual": solved.decoration.residual}
            figures |= {"damping": combined.damping, "damped_further": combined.damping > options.damping}
        require_finite(merged)
    with timer.stage("measure"):
        if hessians:
            figures["errors"] = stitch.task_errors(base, merged, tuned, hessians, tensor.transposed)
            figures["kind"] = "full" if hessians[0].dim() == 2 else "diagonal"
    return Merged(merged.view(loaded.base.shape), union.view(loaded.base.shape), figures)


def _record(tensor: TensorPlan, merged: Merged | None) -> TensorRecord:
    """The report's entry for one tensor."""
    if merged is None:
        return tensor.to_record(patched=False, of_merge=True)
    return tensor.to_record(patched=True, of_merge=True, method=tensor.method, **fields_of(merged.figures))
