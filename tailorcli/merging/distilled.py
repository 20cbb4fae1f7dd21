"""Merge, then train the entries that any task keeps towards every task's teacher: ``merge-multi --distill``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from tailorcli.adapters.checkpoint import config_folder
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.device import resolve_device
from tailorcli.files import PathLike
from tailorcli.guard import Watch, path_text
from tailorcli.merging.carded import merged_side_files
from tailorcli.merging.merge import described_options, manifest_of, merge_patches, side_files_of
from tailorcli.merging.plan import MergeInputs, build_merge_plan, most_kept_of
from tailorcli.models.config import configs_of
from tailorcli.options import DistillOptions, MergeOptions, PatchOptions
from tailorcli.patchfile.report import PatchReport
from tailorcli.patching.checks import check_retain
from tailorcli.patching.distilled import (
    START,
    Work,
    for_samples_of,
    remove_work,
    require_samples,
    settings_of,
    train_and_write,
    training_plan,
)
from tailorcli.runs.outputs import Target, identity_of
from tailorcli.runs.plan import Plan
from tailorcli.training.run import Teaching

if TYPE_CHECKING:
    import torch


def distill_merge(
    base: PathLike,
    patches: Sequence[PathLike],
    output: PathLike | None,
    tuned: Sequence[PathLike],
    stats: Sequence[PathLike],
    retain: PathLike,
    options: MergeOptions = MergeOptions(),
    distill: DistillOptions = DistillOptions(),
    progress: bool = False,
    patch_file: PathLike | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> PatchReport:
    """``merge_patches``, and then the entries that any task keeps trained towards all teachers.

    Minimises the mean over the tasks, by ``options.weights``, of KL(tuned || merged) on each one's samples
    + weight * KL(base || merged) on those of ``retain``. ``tuned`` and ``stats`` have to be there for every task,
    whatever the method; fingerprints tell which belongs to which patch. Raises TailorError.
    """
    started = perf_counter()
    target = Target.needed(output, patch_file, resume=options.resume, overwrite=options.overwrite)
    with ExitStack() as stack:
        sources = _Sources.open(base, patches, tuned, stats, retain, options, stack)
        inputs = sources.inputs
        sampled = [*(stats for _, stats in sources.teachers), sources.retain]
        require_samples(sampled, distill)
        distill = for_samples_of(distill, sampled)
        watch = Watch([*inputs.files, *sources.retain.files])
        device = resolve_device(options.device)
        plan = sources.plan(options, distill, device)
        kept = {"path": path_text(sources.retain.path), "fingerprint": sources.retain.fingerprint()}
        facts = inputs.describe() | {"samples": kept}
        settings = options.identity(len(patches)) | settings_of(distill)
        identity = identity_of(facts, settings, device, command="merge-multi", **sources.configs)
        side, notes = side_files_of(inputs)
        side = merged_side_files(side, inputs, options, distill, sources.retain.path)
        manifest = manifest_of(inputs, facts, options)
        what = (plan, inputs.base, sources.paths, identity, "merge-multi", side, manifest)
        Work.check(target)
        begun = target.begin(*what, announce=announce)
        if isinstance(begun, PatchReport):
            Work.clear(target)
            return begun
        outputs = stack.enter_context(begun)
        work = Work.of(target, identity)
        start = work.start
        own = replace(options, resume=start.resume, overwrite=False, max_shard_size=None)
        models = ((), ()) if options.method == "patches" else (tuned, stats)
        closed = merge_patches(base, patches, None, *models, own, progress, start.patch_file)
        shares = options.shares(len(sources.teachers))
        given = (inputs.base, sources.teachers, sources.retain, device)
        teaching = Teaching(*given, scratch=work.folder, progress=progress, shares=shares)
        found = train_and_write(work, work.folder / START, plan, teaching, closed, outputs, distill)
        described = described_options(inputs, options)
        seconds = perf_counter() - started
        report = PatchReport("merge-multi", described, facts, found.records, found.stages, seconds, notes)
        report = replace(report, distillation=found.facts)
        outputs.finish(report, watch)
        remove_work(work.folder)
        return report


def plan_distilled_merge(
    base: PathLike,
    patches: Sequence[PathLike],
    output: PathLike | None,
    tuned: Sequence[PathLike],
    stats: Sequence[PathLike],
    retain: PathLike,
    options: MergeOptions = MergeOptions(),
    distill: DistillOptions = DistillOptions(),
    patch_file: PathLike | None = None,
) -> Plan:
    """What ``distill_merge`` would do and what it would cost. Raises TailorError."""
    with ExitStack() as stack:
        sources = _Sources.open(base, patches, tuned, stats, retain, options, stack)
        plan = sources.plan(options, distill, resolve_device(options.device))
        target = Target.of(output, patch_file, resume=options.resume, overwrite=options.overwrite)
        target.check(sources.paths, plan)
        require_samples([*(stats for _, stats in sources.teachers), sources.retain], distill)
        if output is not None or patch_file is not None:
            Work.check(target)
        return plan


@dataclass(frozen=True)
class _Sources:
    """The merge's inputs, and the base's samples."""

    inputs: MergeInputs
    retain: Stats

    @classmethod
    def open(
        cls,
        base: PathLike,
        patches: Sequence[PathLike],
        tuned: Sequence[PathLike],
        stats: Sequence[PathLike],
        retain: PathLike,
        options: MergeOptions,
        stack: ExitStack,
    ) -> _Sources:
        inputs = MergeInputs.open(base, patches, tuned, stats, options, stack, distilled=True)
        opened = stack.enter_context(closing(Stats.open(retain)))
        first = inputs.tasks[0].tuned
        assert first is not None
        check_retain(inputs.base, first, opened, PatchOptions())
        return cls(inputs, opened)

    @property
    def teachers(self) -> list[tuple[Checkpoint, Stats]]:
        """Each task's fine-tuned model with its statistics."""
        return [(task.tuned, task.stats) for task in self.inputs.tasks if task.tuned is not None and task.stats]

    @property
    def configs(self) -> dict[str, str]:
        """Digests of the configs that the models are run under, by role."""
        tuned = {f"tuned {number}": config_folder(model) for number, (model, _) in enumerate(self.teachers, 1)}
        return configs_of({"base": self.inputs.base.path} | tuned)

    @property
    def paths(self) -> list[Path]:
        """Where all lie: no output may."""
        return [*self.inputs.paths, self.retain.path]

    def plan(self, options: MergeOptions, distill: DistillOptions, device: torch.device) -> Plan:
        """The plan of the merge with that of its training. Raises TailorError."""
        plan = build_merge_plan(self.inputs, options)
        kept = most_kept_of(plan.patched, self.inputs)
        samples = [stats.samples() for stats in (*(stats for _, stats in self.teachers), self.retain)]
        tuned, stats = self.teachers[0]
        given = (self.inputs.base, config_folder(tuned), kept, samples, stats.options)
        return replace(plan, training=training_plan(*given, distill, device))
