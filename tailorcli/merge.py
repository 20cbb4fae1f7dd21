"""Stitch the patches of several tasks into one model: ``merge-multi`` (Eq. 14 and 15, and the joint optimum)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli import __version__
from tailorcli.adapter import open_tuned
from tailorcli.apply import patched_tensor, side_sources
from tailorcli.checkpoint import Checkpoint, TensorInfo
from tailorcli.device import StageTimer, device_errors, exact_float32, resolve_device
from tailorcli.errors import NumericalError, OptionsError, PatchError, StatsError
from tailorcli.options import MergeOptions
from tailorcli.outputs import Target, progress_bar
from tailorcli.patchfile import PatchFile
from tailorcli.plan import RUNTIME_BYTES, Plan, TensorPlan, check_pair, check_stats, group_by_hessian, most_patch_bytes
from tailorcli.reading import ReadAhead
from tailorcli.report import REPORT_FILE, PatchReport
from tailorcli.stats import Stats
from tailorcli.writer import plan_layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tailorcli.core.hessian import PreparedHessian

PathLike = str | os.PathLike[str]


@dataclass
class Task:
    """One task: its patch, and its fine-tuned model and statistics where the method uses them."""

    patch: PatchFile
    tuned: Checkpoint | None = None
    stats: Stats | None = None


@dataclass
class MergeInputs:
    """The opened inputs of a merge."""

    base: Checkpoint
    tasks: list[Task]

    @classmethod
    def open(
        cls,
        base: PathLike,
        patches: Sequence[PathLike],
        tuned: Sequence[PathLike],
        stats: Sequence[PathLike],
        options: MergeOptions,
        stack: ExitStack,
    ) -> MergeInputs:
        """Open all, check every byte of the patches, and find each patch its model and statistics by fingerprint."""
        _check_counts(patches, tuned, stats, options)
        opened = stack.enter_context(Checkpoint.open(base))
        tasks = []
        for path in patches:
            patch = stack.enter_context(PatchFile.open(path))
            patch.check_base(opened)
            patch.check()
            tasks.append(Task(patch))
        models = [stack.enter_context(open_tuned(path, opened)) for path in tuned]
        folders = [Stats.open(path) for path in stats]
        for folder in folders:
            stack.callback(folder.close)
        _pair_up(tasks, models, folders)
        for task in tasks:
            if task.tuned is not None:
                check_pair(opened, task.tuned, allow_dtype_mismatch=True)
                if task.stats is not None:
                    check_stats(opened, task.tuned, task.stats)
        return cls(opened, tasks)

    def describe(self) -> dict[str, dict[str, str]]:
        """Path and fingerprint of each."""
        facts = {"base": {"path": str(self.base.path), "fingerprint": self.base.fingerprint()}}
        for number, task in enumerate(self.tasks, 1):
            for role, item in (("patch", task.patch), ("tuned", task.tuned), ("stats", task.stats)):
                if item is not None:
                    facts[f"{role} {number}"] = {"path": str(item.path), "fingerprint": item.fingerprint()}
        return facts

    @property
    def paths(self) -> list[Path]:
        """Where they lie: no output may."""
        found = [self.base.path]
        for task in self.tasks:
            found += [item.path for item in (task.patch, task.tuned, task.stats) if item is not None]
        return found


def _check_counts(
    patches: Sequence[PathLike], tuned: Sequence[PathLike], stats: Sequence[PathLike], options: MergeOptions
) -> None:
    if not patches:
        raise OptionsError("no patch given", "pass the files that tailorcli patch --patch-file wrote")
    if options.weights and len(options.weights) != len(patches):
        raise OptionsError(
            f"{len(options.weights)} weights for {len(patches)} patches", "pass --weight once for each patch, in order"
        )
    if options.method == "patches" and (tuned or stats):
        raise OptionsError(
            "--method patches uses neither --tuned nor --stats",
            "leave them out, or merge with --method average or joint",
        )
    if options.method != "patches" and not tuned:
        raise OptionsError(
            f"--method {options.method} needs the fine-tuned models",
            "pass --tuned DIR once for each task, or merge from the patches alone: --method patches",
        )
    if options.method == "joint" and not stats:
        raise OptionsError(
            "--method joint needs the statistics of every task",
            "pass --stats DIR once for each task (made by tailorcli calibrate), or --method average",
        )


def _pair_up(tasks: list[Task], models: list[Checkpoint], folders: list[Stats]) -> None:
    """Give each patch the fine-tuned model and the statistics that it was made from; the order does not matter."""
    by_model = {model.fingerprint(): model for model in models}
    by_stats = {folder.model_fingerprint: folder for folder in folders}
    wanted = [task.patch.input_fingerprint("tuned") for task in tasks]
    for task, fingerprint in zip(tasks, wanted, strict=True):
        if models and fingerprint is None:
            raise PatchError(
                f"{task.patch.path} was itself merged: no single fine-tuned model belongs to it",
                "merge the patches that it was made from, or use --method patches",
            )
        if models and fingerprint not in by_model:
            made_from = task.patch.manifest["inputs"]["tuned"].get("path", "its fine-tuned model")
            raise PatchError(
                f"none of the --tuned folders is the model that {task.patch.path} was made from ({made_from})",
                "pass it with --tuned, or merge from the patches alone: --method patches",
            )
        task.tuned = by_model.get(str(fingerprint))
        if folders and fingerprint not in by_stats:
            assert task.tuned is not None
            raise StatsError(
                f"none of the --stats folders was made from {task.tuned.path}",
                f"make them: tailorcli calibrate {task.tuned.path} --data FILE -o STATS",
            )
        task.stats = by_stats.get(str(fingerprint))
    for kind, items in (("--tuned", by_model), ("--stats", by_stats)):
        unused = [item for fingerprint, item in items.items() if fingerprint not in wanted]
        if unused:
            raise OptionsError(f"{kind} {unused[0].path} belongs to none of the patches", "leave it out")


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
        plan, _ = _build_plan(inputs, options)
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
) -> PatchReport:
    """Stitch ``patches`` of one ``base`` into the checkpoint ``output``, a ``patch_file``, or both.

    ``average`` (Eq. 14, 15) needs the fine-tuned models, ``joint`` also their statistics; each is found its patch by
    fingerprint, in whatever order. Side files are those of the first patch. Raises TailorError.
    """
    started = perf_counter()
    target = Target.of(output, patch_file, resume=options.resume, overwrite=options.overwrite)
    if target.folder is None and target.patch_file is None:
        raise OptionsError("nothing to write", "pass an output folder, a patch file, or both")
    with ExitStack() as stack:
        inputs = MergeInputs.open(base, patches, tuned, stats, options, stack)
        plan, hessians = _build_plan(inputs, options)
        device = resolve_device(options.device)
        target.check(inputs.paths, plan)
        identity = _identity(inputs, options, device)
        finished = target.finished(identity, "merge-multi")
        if finished is not None:
            return finished
        timer = StageTimer(device)
        side, notes = _side_files(inputs)
        outputs = stack.enter_context(target.open(plan, inputs.base, identity, _manifest(inputs, options), side))
        records = dict(outputs.done)
        bar = stack.enter_context(progress_bar(plan.tensors, "merging", progress))
        bar.update(sum(tensor.nbytes for tensor in plan.tensors if tensor.name in records))
        todo = [tensor for tensor in plan.tensors if tensor.name not in records]
        for tensor, merged in _merged(todo, hessians, inputs, options, device, timer):
            record = _record(tensor, merged)
            records[tensor.name] = record
            with timer.stage("wait for write"):
                if merged is None:
                    outputs.copy(tensor.name, inputs.base, record)
                else:
                    digest = inputs_digest(inputs, tensor.name)
                    outputs.write(tensor.name, merged.patched, merged.union, record, digest)
            bar.update(tensor.nbytes)
        with timer.stage("wait for write"):
            outputs.drain()
        timer.seconds["write"] = outputs.seconds
        ordered = [records[name] for name in inputs.base.tensors]
        described = options.to_dict() | {
            "tasks": [task.patch.name for task in inputs.tasks],
            "weights": list(options.shares(len(patches))),
        }
        seconds = perf_counter() - started
        report = PatchReport("merge-multi", described, inputs.describe(), ordered, dict(timer.seconds), seconds, notes)
        outputs.finish(report)
        return report


def inputs_digest(inputs: MergeInputs, name: str) -> str:
    """The digest of a base tensor, from a patch that holds it: reading the tensor has proven it right."""
    return next(task.patch.tensors[name].base for task in inputs.tasks if name in task.patch.tensors)


def _identity(inputs: MergeInputs, options: MergeOptions, device: torch.device) -> dict[str, Any]:
    """What decides the bytes of the output: a run is only resumed under the same."""
    import torch

    fingerprints = {f"{role} fingerprint": facts["fingerprint"] for role, facts in inputs.describe().items()}
    return {
        "tailorcli": __version__,
        "torch": torch.__version__,
        "used device": device.type,
        "command": "merge-multi",
        **fingerprints,
        **options.to_dict(),
    }


def _manifest(inputs: MergeInputs, options: MergeOptions) -> dict[str, Any]:
    """What a merged patch file says of itself; the licence is the tasks' where they agree."""
    patches = [task.patch for task in inputs.tasks]
    licenses = {patch.manifest.get("license") for patch in patches}
    common = licenses.pop() if len(licenses) == 1 else None
    return {
        "task": options.task or " + ".join(patch.name for patch in patches),
        "license": options.license or common,
        "inputs": inputs.describe(),
        "merged_from": [
            {"task": patch.name, "license": patch.manifest.get("license"), "fingerprint": patch.fingerprint()}
            for patch in patches
        ],
    }


def _side_files(inputs: MergeInputs) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """The first patch's side files, and a note for each that another patch has differently."""
    first, *others = [task.patch for task in inputs.tasks]
    side, notes = side_sources(inputs.base, first)
    found = []
    for other in others:
        for name, entry in other.side_files.items():
            if name == REPORT_FILE:
                continue
            if name not in first.side_files:
                found.append(f"side file {name} of {other.name} is left out: {first.name} has none")
            elif entry.digest != first.side_files[name].digest:
                found.append(f"side file {name} is that of {first.name}; {other.name} has another")
    return side, notes + tuple(dict.fromkeys(found))


def _build_plan(inputs: MergeInputs, options: MergeOptions) -> tuple[Plan, dict[str, tuple[str, ...]]]:
    """Every tensor's treatment, and the tasks' Hessians for those that are solved or measured with them."""
    hessians: dict[str, tuple[str, ...]] = {}
    tensors = [_plan_tensor(info, inputs, options, hessians) for info in inputs.base.tensors.values()]
    ordered = group_by_hessian(tensors)
    layout = plan_layout(inputs.base, options.max_shard_size)
    patched = [tensor for tensor in ordered if tensor.action == "patch"]
    if not patched:
        raise OptionsError("no tensor would be merged: the patches hold none", "make them again")
    kept = [min(t.numel, sum(k.patch.kept_of(t.name) for k in inputs.tasks)) for t in patched]
    read = inputs.base.nbytes + sum(task.patch.nbytes for task in inputs.tasks)
    read += sum(t.tuned.read_cost(p.name) for t in inputs.tasks if t.tuned is not None for p in patched)
    plan = Plan(
        tensors=tuple(ordered),
        layout=layout,
        read_bytes=read + sum(_hessian_bytes(names, inputs) for names in set(hessians.values())),
        write_bytes=layout.nbytes,
        patch_bytes=most_patch_bytes(zip(patched, kept, strict=True)),
        peak_bytes=RUNTIME_BYTES + max(_working_set(tensor, hessians, inputs) for tensor in patched),
        largest_hessian=max((_hessian_size(names, inputs) for names in hessians.values()), default=0),
    )
    return plan, hessians


def _plan_tensor(
    info: TensorInfo, inputs: MergeInputs, options: MergeOptions, hessians: dict[str, tuple[str, ...]]
) -> TensorPlan:
    common = (info.name, info.dtype, info.shape, info.nbytes)
    if not any(info.name in task.patch.tensors for task in inputs.tasks):
        return TensorPlan(*common, "base", "no task patches it")
    if inputs.tasks[0].stats is None:
        return TensorPlan(*common, "patch", options.method)
    entries = [task.stats.tensors[info.name] for task in inputs.tasks if task.stats is not None]
    names = tuple(entry.hessian for entry in entries if entry.hessian is not None)
    first = entries[0]
    infos = [t.stats.hessians[n] for t, n in zip(inputs.tasks, names, strict=False) if t.stats is not None]
    alike = len({(entry.transposed, entry.role) for entry in entries}) == 1 and len({i.kind for i in infos}) == 1
    if len(names) < len(entries) or not alike:
        missing = [task.patch.name for task, entry in zip(inputs.tasks, entries, strict=True) if entry.hessian is None]
        why = f"no statistics of {', '.join(missing)}" if missing else "the tasks' statistics are of different kinds"
        reason = f"average: {why}" if options.method == "joint" else options.method
        return TensorPlan(*common, "patch", reason, role=first.role)
    hessians[info.name] = names
    return TensorPlan(*common, "patch", options.method, first.hessian, first.role, first.transposed)


def _hessian_bytes(names: tuple[str, ...], inputs: MergeInputs) -> int:
    return sum(task.stats.nbytes(name) for task, name in zip(inputs.tasks, names, strict=True) if task.stats)


def _hessian_size(names: tuple[str, ...], inputs: MergeInputs) -> int:
    return max(t.stats.hessians[name].size for t, name in zip(inputs.tasks, names, strict=True) if t.stats)


def _working_set(tensor: TensorPlan, hessians: dict[str, tuple[str, ...]], inputs: MergeInputs) -> int:
    """Bytes held while one tensor is merged: every task's weights and mask, the mean, the result, all Hessians."""
    full = 4 * tensor.numel
    held = 2 * tensor.nbytes + 2 * full
    for task in inputs.tasks:
        held += tensor.nbytes + tensor.numel
        held += task.tuned.tensors[tensor.name].nbytes if task.tuned is not None else 0
    names = hessians.get(tensor.name)
    if names is not None and inputs.tasks[0].stats and inputs.tasks[0].stats.hessians[names[0]].kind == "full":
        square = 4 * _hessian_size(names, inputs) ** 2
        held += (len(names) + 3) * square + _hessian_bytes(names, inputs) + min(12 * (64 << 20), 12 * full)
    return held


@dataclass
class _Loaded:
    """One tensor's inputs as read from disk."""

    base: Tensor
    masks: list[Tensor]
    patched: list[Tensor]
    tuned: list[Tensor]
    packed: list[Tensor]  # the tasks' Hessians, where the tensor before did not use the same


@dataclass
class Merged:
    """One merged tensor, the union of its masks, and its figures."""

    patched: Tensor
    union: Tensor
    figures: dict[str, Any]


def _reader(tensors: list[TensorPlan], hessians: dict[str, tuple[str, ...]], inputs: MergeInputs) -> ReadAhead[_Loaded]:
    """Reads what each of ``tensors`` needs from every task."""

    def needed(position: int) -> tuple[str, ...]:
        names = hessians.get(tensors[position].name, ())
        return () if position and hessians.get(tensors[position - 1].name) == names else names

    def load(position: int) -> _Loaded:
        name = tensors[position].name
        base = inputs.base.read(name)
        loaded = _Loaded(base, [], [], [], [])
        for task in inputs.tasks:
            if name in task.patch.tensors:
                loaded.masks.append(task.patch.mask(name))
                loaded.patched.append(patched_tensor(base, task.patch, name, inputs.base.path))
            else:
                loaded.masks.append(base.new_zeros(base.shape, dtype=_bool()))
                loaded.patched.append(base)
            if task.tuned is not None:
                loaded.tuned.append(task.tuned.read(name))
        for task, hessian in zip(inputs.tasks, needed(position), strict=False):
            assert task.stats is not None
            loaded.packed.append(task.stats.load(hessian))
        return loaded

    sizes = [_working_set(tensor, hessians, inputs) for tensor in tensors]
    return ReadAhead(load, [(size, size // 2) for size in sizes])


def _bool() -> torch.dtype:
    import torch

    return torch.bool


def _merged(
    tensors: list[TensorPlan],
    hessians: dict[str, tuple[str, ...]],
    inputs: MergeInputs,
    options: MergeOptions,
    device: torch.device,
    timer: StageTimer,
) -> Iterator[tuple[TensorPlan, Merged | None]]:
    """Each tensor with its merged value, in order; None for a tensor that no task patches."""
    reader = _reader([tensor for tensor in tensors if tensor.action == "patch"], hessians, inputs)
    loads = iter(reader)
    opened: list[Tensor] = []  # the tasks' Hessians, on the device
    combined: PreparedHessian | None = None
    previous: tuple[str, ...] | None = None
    try:
        with exact_float32(), device_errors():
            for tensor in tensors:
                if tensor.action != "patch":
                    yield tensor, None
                    continue
                with timer.stage("wait for read"):
                    loaded = next(loads)
                names = hessians.get(tensor.name)
                try:
                    if names != previous:
                        opened, combined = [], None  # freed before the next ones are unpacked
                        if names is not None:
                            opened, combined = _prepare(names, loaded, inputs, options, device, timer)
                        previous = names
                    yield tensor, _merge_tensor(tensor, loaded, opened, combined, options, device, timer)
                except NumericalError as error:
                    raise NumericalError(f"tensor {tensor.name!r}: {error.message}", error.hint) from error
                del loaded
    finally:
        reader.close()
        timer.seconds["read"] = reader.seconds


def _prepare(
    names: tuple[str, ...],
    loaded: _Loaded,
    inputs: MergeInputs,
    options: MergeOptions,
    device: torch.device,
    timer: StageTimer,
) -> tuple[list[Tensor], PreparedHessian | None]:
    """Unpack the tasks' Hessians, and combine and factorise them where the joint solver will use them."""
    from tailorcli.core.hessian import prepare, unpack_triangle
    from tailorcli.core.stitch import combine_hessians

    opened = []
    with timer.stage("unpack"):
        for task, name in zip(inputs.tasks, names, strict=True):
            assert task.stats is not None
            info = task.stats.hessians[name]
            packed = loaded.packed.pop(0).to(device)
            opened.append(unpack_triangle(packed, info.size) if info.kind == "full" else packed)
            if not bool(packed.isfinite().all()):
                raise NumericalError(f"NaN or infinity in the Hessian {name!r} of {task.stats.path}", "calibrate again")
    if options.method != "joint":
        return opened, None
    with timer.stage("factorise"):
        hessian = combine_hessians(opened, options.shares(len(names)))
        return opened, prepare(hessian, options.damping, sensitivity=False, sequential=False)


def _merge_tensor(
    tensor: TensorPlan,
    loaded: _Loaded,
    hessians: list[Tensor],
    combined: PreparedHessian | None,
    options: MergeOptions,
    device: torch.device,
    timer: StageTimer,
) -> Merged:
    """One tensor by its method, with its figures."""
    from tailorcli.core import stitch
    from tailorcli.core.tailor import layer_shape, require_finite

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
    union = stitch.union_mask(masks)
    figures: dict[str, Any] = {"numel": base.numel(), **stitch.overlap_figures(base, patched, masks)}
    with timer.stage("solve"):
        if options.method == "patches":
            merged = stitch.stitch_patches(base, patched, masks, union, weights)
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


def _record(tensor: TensorPlan, merged: Merged | None) -> dict[str, Any]:
    """The report's entry for one tensor."""
    record: dict[str, Any] = {
        "name": tensor.name,
        "status": "patched" if merged is not None else "base",
        "reason": "" if merged is not None else tensor.reason,
        "method": tensor.reason if merged is not None else None,
        "role": tensor.role,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "hessian": tensor.hessian,
        "kind": None,
        "errors": None,
    }
    if merged is not None:
        record |= merged.figures
    return record
