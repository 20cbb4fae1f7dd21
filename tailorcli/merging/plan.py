"""What a merge reads and what it will do to each tensor: inputs paired by fingerprint, the plan from headers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tailorcli.adapters.interpolated import interpolated, original
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import TensorInfo
from tailorcli.checkpoint.layout import plan_layout
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.errors import OptionsError, PatchError, StatsError
from tailorcli.files import PathLike, in_shell
from tailorcli.guard import path_text
from tailorcli.hub import hub_facts, local_folders
from tailorcli.models.naming import open_for
from tailorcli.options import MergeOptions
from tailorcli.patchfile.reader import PatchFile
from tailorcli.patchfile.view import side_sources
from tailorcli.patching.apply import check_share
from tailorcli.patching.checks import check_pair, check_stats
from tailorcli.runs.divided import Work
from tailorcli.runs.plan import RUNTIME_BYTES, Plan, TensorPlan, group_by_hessian, most_patch_bytes

_PER_BYTE = 64  # multiplications in the time of reading a byte
_WORK_ARRAYS = 8  # of a row chunk: start, target, the tasks' distances, products, the solver's own


@dataclass
class Task:
    """One task: its patch, and its fine-tuned model and statistics where the method uses them."""

    patch: PatchFile
    tuned: Checkpoint | None = None
    stats: Stats | None = None
    title: str = ""  # its name, with its file where another task has the same


def _told_apart(tasks: list[Task]) -> list[Task]:
    """The tasks with titles that tell them apart: by their names, else their files, else their paths."""
    names = [task.patch.name for task in tasks]
    files = [f"{name} ({task.patch.path.name})" for name, task in zip(names, tasks, strict=True)]
    paths = [f"{name} ({task.patch.path})" for name, task in zip(names, tasks, strict=True)]
    for task, *titles in zip(tasks, names, files, paths, strict=True):
        of_all = zip(titles, (names, files, paths), strict=True)
        task.title = next((title for title, others in of_all if others.count(title) == 1), titles[-1])
    return tasks


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
        distilled: bool = False,
        divided: bool = False,
    ) -> MergeInputs:
        """Open all, check every byte of the patches, and find each patch its model and statistics by fingerprint.

        With ``distilled`` every task needs both, whatever the method; with ``divided`` each rank checks its share of
        the patches. Raises OptionsError for inputs that do not
        belong together, PatchError for a damaged patch.
        """
        _check_counts(patches, tuned, stats, options, distilled)
        base, *tuned = local_folders((base, *tuned))
        opened = stack.enter_context(open_checkpoint(base))
        if opened.dequantized:
            what = f"merge-multi does not take quantised checkpoints ({opened.path})"
            raise OptionsError(what, "merge the models as they were before they were quantised")
        tasks = []
        for path in patches:
            patch = stack.enter_context(PatchFile.open(path))
            patch.check_base(opened)
            check_share(patch) if divided else patch.check()
            tasks.append(Task(patch))
        models = [stack.enter_context(open_for(opened, path)) for path in tuned]
        folders = [Stats.open(path) for path in stats]
        for folder in folders:
            stack.callback(folder.close)
        _pair_up(tasks, [_calibrated(opened, model, folders) for model in models], folders)
        for task in tasks:
            if task.tuned is not None:
                check_pair(opened, original(task.tuned), allow_dtype_mismatch=True)
                if task.stats is not None:
                    if task.stats.teacher_weight == 1.0:  # else they have the base's names
                        task.stats.rename_for(task.tuned)
                    check_stats(opened, task.tuned, task.stats)
        return cls(opened, _told_apart(tasks))

    def describe(self) -> dict[str, dict[str, str]]:
        """Path and fingerprint of each."""
        facts = {"base": {"path": path_text(self.base.path), "fingerprint": self.base.fingerprint()}}
        for number, task in enumerate(self.tasks, 1):
            for role, item in (("patch", task.patch), ("tuned", task.tuned), ("stats", task.stats)):
                if item is not None:
                    facts[f"{role} {number}"] = {"path": path_text(item.path), "fingerprint": item.fingerprint()}
        facts["base"] |= hub_facts(self.base.path)
        for number, task in enumerate(self.tasks, 1):
            if task.tuned is not None:
                facts[f"tuned {number}"] |= hub_facts(task.tuned.path)
        return facts

    @property
    def paths(self) -> list[Path]:
        """Where they lie: no output may."""
        found = [self.base.path]
        for task in self.tasks:
            found += [item.path for item in (task.patch, task.tuned, task.stats) if item is not None]
        return found

    @property
    def files(self) -> list[Path]:
        """What is read of them."""
        found = list(self.base.shards)
        for task in self.tasks:
            found.append(task.patch.path)
            found += task.tuned.shards if task.tuned is not None else []
            found += task.stats.files if task.stats is not None else []
        return found


def _check_counts(
    patches: Sequence[PathLike],
    tuned: Sequence[PathLike],
    stats: Sequence[PathLike],
    options: MergeOptions,
    distilled: bool,
) -> None:
    if not patches:
        raise OptionsError("no patch given", "pass the files that tailorcli patch --patch-file wrote")
    if options.weights and len(options.weights) != len(patches):
        raise OptionsError(
            f"{len(options.weights)} weights for {len(patches)} patches", "pass --weight once for each patch, in order"
        )
    if distilled and not (tuned and stats):
        raise OptionsError(
            "--distill needs every task's teacher and samples", "pass --tuned DIR and --stats DIR once for each task"
        )
    if options.method == "patches" and (tuned or stats) and not distilled:
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


def _calibrated(base: Checkpoint, model: Checkpoint, folders: list[Stats]) -> list[Checkpoint]:
    """A fine-tuned model, and those between it and the base of which one of the statistics is."""
    views = (interpolated(base, model, folder.teacher_weight) for folder in folders)
    wanted = {folder.model_fingerprint for folder in folders}
    return [model, *(view for view in views if view is not model and view.fingerprint() in wanted)]


def _pair_up(tasks: list[Task], models: list[list[Checkpoint]], folders: list[Stats]) -> None:
    """Give each patch the fine-tuned model and the statistics that it was made from; the order does not matter.

    ``models`` are each a fine-tuned one and what lies between it and the base.
    """
    by_model: dict[str, Checkpoint] = {}
    for model in (model for own in models for model in own):
        alike = by_model.setdefault(model.fingerprint(), model)
        if original(alike).path.resolve() != original(model).path.resolve() and not _hold_the_same(alike, model):
            raise OptionsError(
                f"--tuned {original(alike).path} and {original(model).path} differ in a few entries alone, and cannot "
                "be told apart by the samples that a fingerprint is of",
                "merge from the patches alone: --method patches",
            )
    by_stats: dict[str, Stats] = {}
    for folder in folders:
        first = by_stats.setdefault(folder.model_fingerprint, folder)
        if first.path.resolve() != folder.path.resolve():
            raise OptionsError(
                f"--stats {first.path} and {folder.path} were both made from one fine-tuned model",
                "pass one for each task",
            )
    wanted = [task.patch.input_fingerprint("tuned") for task in tasks]
    for task, fingerprint in zip(tasks, wanted, strict=True):
        if models and fingerprint is None:
            raise PatchError(
                f"{task.patch.path} was itself merged: no single fine-tuned model belongs to it",
                "merge the patches that it was made from, or use --method patches",
            )
        if models and fingerprint not in by_model:
            made_from = task.patch.manifest.inputs["tuned"]["path"]
            raise PatchError(
                f"none of the --tuned folders is the model that {task.patch.path} was made from ({made_from})",
                "pass it with --tuned, or merge from the patches alone: --method patches; a patch that was made with "
                "--teacher-weight belongs to a model between the two, and wants --stats that were made so, too",
            )
        task.tuned = by_model.get(str(fingerprint))
        if folders and fingerprint not in by_stats:
            assert task.tuned is not None
            raise StatsError(
                f"none of the --stats folders was made from {task.tuned.path}",
                f"make them: tailorcli calibrate {in_shell(task.tuned.path)} --data FILE -o STATS",
            )
        task.stats = by_stats.get(str(fingerprint))
    unused = [("--tuned", own[0].path) for own in models if not {model.fingerprint() for model in own} & {*wanted}]
    unused += [("--stats", folder.path) for fingerprint, folder in by_stats.items() if fingerprint not in wanted]
    for kind, path in unused:
        raise OptionsError(f"{kind} {path} belongs to none of the patches", "leave it out")


def _hold_the_same(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether two models with one fingerprint, and so with the same names and shapes, have the same weights."""
    return all(first.read(name).equal(second.read(name)) for name in first.tensors)


def build_merge_plan(inputs: MergeInputs, options: MergeOptions) -> Plan:
    """Every tensor's treatment and the cost, from headers. Raises OptionsError where there is nothing to merge."""
    tensors = [_plan_tensor(info, inputs, options) for info in inputs.base.tensors.values()]
    tensors = [replace(tensor, held_bytes=merge_working_set(tensor, inputs)) for tensor in tensors]
    ordered = group_by_hessian(tensors)
    layout = plan_layout(inputs.base, options.max_shard_size)
    patched = [tensor for tensor in ordered if tensor.action == "patch"]
    if not patched:
        raise OptionsError("no tensor would be merged: the patches hold none", "make them again")
    kept = [count for _, count in most_kept_of(patched, inputs)]
    read = inputs.base.nbytes + sum(task.patch.nbytes for task in inputs.tasks)
    read += sum(t.tuned.read_cost(p.name) for t in inputs.tasks if t.tuned is not None for p in patched)
    hessians = {tensor.task_hessians for tensor in patched if tensor.task_hessians}
    return Plan(
        tensors=tuple(ordered),
        layout=layout,
        read_bytes=read + sum(_hessian_bytes(names, inputs) for names in hessians),
        write_bytes=layout.nbytes,
        patch_bytes=most_patch_bytes(
            zip(patched, kept, strict=True), ordered, side_sources(inputs.base, inputs.tasks[0].patch)[0].values()
        ),
        peak_bytes=RUNTIME_BYTES + max(tensor.held_bytes for tensor in patched),
    )


def most_kept_of(tensors: Sequence[TensorPlan], inputs: MergeInputs) -> list[tuple[str, int]]:
    """How many entries of each tensor the union of the masks may have, by its name."""
    return [(t.name, min(t.numel, sum(k.patch.kept_of(t.name) for k in inputs.tasks))) for t in tensors]


def _plan_tensor(info: TensorInfo, inputs: MergeInputs, options: MergeOptions) -> TensorPlan:
    common = (info.name, info.dtype, info.shape, info.nbytes)
    if not any(info.name in task.patch.tensors for task in inputs.tasks):
        return TensorPlan(*common, "base", "no task patches it")
    if inputs.tasks[0].stats is None:
        return TensorPlan(*common, "patch", method=options.method)
    entries = [task.stats.tensors[info.name] for task in inputs.tasks if task.stats is not None]
    names = tuple(entry.hessian for entry in entries if entry.hessian is not None)
    first = entries[0]
    infos = [
        task.stats.hessians[entry.hessian]
        for task, entry in zip(inputs.tasks, entries, strict=True)
        if task.stats is not None and entry.hessian is not None
    ]
    alike = len({(entry.transposed, entry.role) for entry in entries}) == 1 and len({i.kind for i in infos}) == 1
    if any(entry.experts for entry in entries):
        why = "it fuses experts"
        return TensorPlan(*common, "patch", role=first.role, method=_without_joint(options, why))
    if len(names) < len(entries) or not alike:
        missing = [task.title for task, entry in zip(inputs.tasks, entries, strict=True) if entry.hessian is None]
        why = f"no statistics of {', '.join(missing)}" if missing else "the tasks' statistics are of different kinds"
        return TensorPlan(*common, "patch", role=first.role, method=_without_joint(options, why))
    return TensorPlan(
        *(*common, "patch", "", first.hessian, first.role, first.transposed),
        method=options.method,
        task_hessians=names,
    )


def _without_joint(options: MergeOptions, why: str) -> str:
    """The method for a tensor that has no Hessians of all tasks."""
    return f"average: {why}" if options.method == "joint" else options.method


def _hessian_bytes(names: tuple[str, ...], inputs: MergeInputs) -> int:
    return sum(task.stats.nbytes(name) for task, name in zip(inputs.tasks, names, strict=True) if task.stats)


def _hessian_size(names: tuple[str, ...], inputs: MergeInputs) -> int:
    return max(t.stats.hessians[name].size for t, name in zip(inputs.tasks, names, strict=True) if t.stats)


def merge_work(tensor: TensorPlan, inputs: MergeInputs) -> Work:
    """How much work the tasks' Hessians are, once for all tensors that share them, and a tensor is itself."""
    if tensor.action != "patch":
        return 0.0, float(_PER_BYTE * 2 * tensor.nbytes)
    count, names = len(inputs.tasks), tensor.task_hessians
    each = float((2 * count + 2) * _PER_BYTE * tensor.nbytes)
    if not names or inputs.tasks[0].stats is None or inputs.tasks[0].stats.hessians[names[0]].kind != "full":
        return 0.0, each
    size = _hessian_size(names, inputs)
    return float(size**3 + 2 * count * _PER_BYTE * size**2), each + (16 + 2 * count) * tensor.numel * size


def merge_working_set(tensor: TensorPlan, inputs: MergeInputs) -> int:
    """Bytes held while one tensor is merged: every task's weights and mask, the mean, the result, all Hessians."""
    if tensor.action != "patch":
        return 0  # it goes through in pieces
    full = 4 * tensor.numel
    held = 2 * tensor.nbytes + 2 * full
    for task in inputs.tasks:
        held += tensor.nbytes + tensor.numel
        held += task.tuned.tensors[tensor.name].nbytes if task.tuned is not None else 0
    names = tensor.task_hessians
    if not names:
        return held
    held += full + min(_WORK_ARRAYS * (64 << 20), _WORK_ARRAYS * full)  # the compensation, and row chunks
    if inputs.tasks[0].stats and inputs.tasks[0].stats.hessians[names[0]].kind == "full":
        square = 4 * _hessian_size(names, inputs) ** 2
        held += (len(names) + 3) * square + _hessian_bytes(names, inputs)
    return held
