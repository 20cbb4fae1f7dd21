"""Patch, then train the kept entries towards both teachers, then write: ``patch --distill``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import config_folder
from tailorcli.adapters.interpolated import interpolated, original
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import CARD, Checkpoint
from tailorcli.checkpoint.grown import GrownCheckpoint
from tailorcli.checkpoint.quantized import UnroundedCheckpoint
from tailorcli.device import StageTimer, device_errors, exact_float32, resolve_device
from tailorcli.distributed import ranks, require_shared, told, wait_for_all
from tailorcli.errors import DataError, OptionsError, OutputError
from tailorcli.files import HIDDEN, PathLike, as_output_error, beside, digest_of, write_text_atomically
from tailorcli.guard import Watch
from tailorcli.hub import local_folders
from tailorcli.models.config import configs_of
from tailorcli.models.naming import open_for
from tailorcli.options import AUTO, DistillOptions, PatchOptions, options_in_report
from tailorcli.patchfile.reader import PatchFile
from tailorcli.patchfile.report import PatchReport, is_retained
from tailorcli.patchfile.view import side_sources
from tailorcli.patching.apply import copy_unpatched, open_both, plan_of_patch, write_patched
from tailorcli.patching.carded import card_of_trained, side_files_of
from tailorcli.patching.checked import check_both
from tailorcli.patching.checks import check_retain, check_stats
from tailorcli.patching.cost import most_kept
from tailorcli.patching.inputs import PatchInputs, described_stats
from tailorcli.patching.patch import patch_opened
from tailorcli.patching.planner import build_plan
from tailorcli.patching.teacher import with_teacher
from tailorcli.runs.outputs import Target, identity_of, progress_bar
from tailorcli.runs.plan import Plan, TrainingPlan
from tailorcli.runs.writing import Outputs
from tailorcli.training.run import Teaching, counted_tokens

if TYPE_CHECKING:
    import torch

    from tailorcli.data.samples import Inputs
    from tailorcli.options import CalibrateOptions
    from tailorcli.patchfile.records import TensorRecord
    from tailorcli.training.distill import Material

START, STATE = "start.safetensors", "state.safetensors"
RUN = "run.txt"  # whose they are
_MORE_REPORT = 1 << 16  # bytes of a report that training adds, at most
SUFFIX = ".distill"  # of the folder beside the output that an interrupted run goes on from


def distill_checkpoint(
    base: PathLike,
    tuned: PathLike,
    output: PathLike | None,
    stats: PathLike,
    retain: PathLike,
    options: PatchOptions = PatchOptions(),
    distill: DistillOptions = DistillOptions(),
    progress: bool = False,
    patch_file: PathLike | None = None,
    announce: Callable[[Plan], None] | None = None,
    graft_data: PathLike | None = None,
    made_of: Mapping[str, dict[str, str]] | None = None,
    teacher_data: PathLike | None = None,
    calibration: CalibrateOptions | None = None,
) -> PatchReport:
    """``patch_checkpoint``, and then the kept entries trained on KL(tuned || patched) + weight * KL(base || patched).

    The divergences are means over the predicted tokens of the samples in ``stats`` (new task) and ``retain`` (what the
    base must keep); a tenth of each is held out, and the state that is best on it is written. Outside the mask the
    output is the base, bit for bit. ``teacher_data`` and ``calibration`` are as for ``patch_checkpoint``.
    Raises TailorError.
    """
    started = perf_counter()
    options = options.resolved(not options.resized_vocab, distilled=True)
    base, tuned = local_folders((base, tuned), code=options.trust_remote_code)
    target = Target.needed(output, patch_file, resume=options.resume, overwrite=options.overwrite)
    if options.teacher_weight == AUTO:
        plan_distilled(base, tuned, output, stats, retain, options, distill, patch_file, graft_data)
        shown = (progress and ranks().first, None, calibration)
        options = told(with_teacher(options, base, tuned, stats, teacher_data, *shown))
        wait_for_all("the teacher's weight to be picked")  # none writes before all have checked
    with ExitStack() as stack:
        sources = _Sources.open(base, tuned, stats, retain, options, stack, graft_data)
        inputs, both, options = sources.inputs, sources.both, sources.options
        require_samples(both, distill)
        distill = for_samples_of(distill, both)
        inputs.sources = made_of or {}
        side = side_files_of(inputs, options, distill, (both[0], both[1]))
        read = [*inputs.files, *both[0].files, *both[1].files]
        watch = Watch([*read, *(source for source in side.values() if isinstance(source, Path))])
        device = resolve_device(options.device)
        plan = sources.plan(options, distill, device)
        described = inputs.describe() | described_stats(*both, inputs.sources)
        settings = options.identity(True) | settings_of(distill)
        identity = identity_of(described, settings, device, **inputs.configs)
        manifest = {"task": options.task, "license": options.license, "inputs": described}
        job = (plan, inputs.base, sources.paths, identity, "patch", side, manifest)
        Work.check(target)
        begun = target.begin(*job, announce=announce)
        if isinstance(begun, PatchReport):
            Work.clear(target)
            return begun
        outputs = stack.enter_context(begun)
        work = Work.of(target, identity)
        closed = sources.closed_form(work, options, progress)
        teachers, trust = [(inputs.tuned, both[0])], options.trust_remote_code
        teaching = Teaching(inputs.base, teachers, both[1], device, trust, work.folder, progress)
        found = train_and_write(work, work.folder / START, plan, teaching, closed, outputs, distill)
        described_options, seconds = options.to_dict(), perf_counter() - started
        report = PatchReport("patch", described_options, described, found.records, found.stages, seconds)
        report = replace(report, distillation=found.facts, propagation=closed.propagation)
        outputs.finish(report, watch)
        remove_work(work.folder)
        return report


@dataclass(frozen=True)
class Work:
    """The folder beside an output in which an interrupted run is taken up."""

    folder: Path

    @staticmethod
    def place(target: Target) -> Path:
        """Where it lies."""
        return beside(target.place, SUFFIX)

    @classmethod
    def check(cls, target: Target) -> None:
        """What lies there is ours. Raises OutputError."""
        require_work(cls.place(target))

    @classmethod
    def clear(cls, target: Target) -> None:
        """Remove what a run that was ended after it had written all had no time to remove."""
        with suppress(OutputError):  # something else lies there: it is no matter of a run that has finished
            remove_work(cls.place(target))

    @classmethod
    def of(cls, target: Target, identity: Mapping[str, Any]) -> Work:
        """The folder for an output, new unless the run of this ``identity`` is taken up. Raises OutputError."""
        folder, run = cls.place(target), digest_of(json.dumps(identity, sort_keys=True, default=str).encode())
        if ranks().first:
            try:
                whose = (folder / RUN).read_text(encoding="utf-8") if (folder / RUN).exists() else ""
                if not target.resume or whose != run:
                    remove_work(folder)
                folder.mkdir(parents=True, exist_ok=True)
                write_text_atomically(folder / RUN, run)
            except OSError as error:
                raise as_output_error(folder, error) from error
        require_shared(folder)
        return cls(folder)

    @property
    def start(self) -> Target:
        """Where the patch goes that training starts from; one that is there already is taken, or gone on with."""
        begun = told(any(path.name.startswith(START) for path in self.folder.iterdir()))
        return Target.of(None, self.folder / START, resume=begun, overwrite=False)


_OF_LAYERS = ("error_before", "error_after", "drift", "errors")  # totals of a patch that training makes stale


@dataclass(frozen=True)
class Written:
    """What was trained and written: the records of all tensors in the base's order, seconds by stage, the report."""

    records: list[TensorRecord]
    stages: dict[str, float]
    facts: dict[str, Any]


def train_and_write(
    work: Work,
    start: Path,
    plan: Plan,
    teaching: Teaching,
    closed: PatchReport,
    outputs: Outputs,
    distill: DistillOptions,
    materials: dict[str, Material] | None = None,
) -> Written:
    """Train the kept entries of the patch file ``start``, whose report is ``closed``, and write every tensor.

    ``materials`` are what the teachers said, where they have run. Raises TailorError.
    """
    base, timer = teaching.base, StageTimer(teaching.device)
    with PatchFile.open(start) as file:
        copy_unpatched(plan, base, file, closed, outputs)  # what is wrong with one is told before the training
        with timer.stage("distill"), exact_float32(), device_errors("a smaller --distill-batch-size"):
            found = teaching.distill(file, distill, work.folder / STATE, materials)
        with progress_bar(plan.tensors, "writing", teaching.progress) as bar, timer.stage("write"):
            values = found.values if found.history.best else {}  # the state before the first step is the patch itself
            records = write_patched(plan, base, file, values, closed, outputs, bar.update)
    began = {name: closed.totals[name] for name in _OF_LAYERS if closed.totals.get(name) is not None}
    facts = {"options": asdict(distill), "untrained": found.untrained, "began": began, **found.history.to_dict()}
    stages = dict(closed.stages) | dict(timer.seconds)
    return Written([records[name] for name in base.tensors], stages, facts)


def distill_patch(
    patch: PathLike,
    base: PathLike,
    tuned: PathLike | Sequence[PathLike],
    stats: PathLike | Sequence[PathLike],
    retain: PathLike,
    output: PathLike | None = None,
    patch_file: PathLike | None = None,
    distill: DistillOptions = DistillOptions(),
    device: str = "auto",
    progress: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    teacher_weight: float | None = None,
    materials: dict[str, Material] | None = None,
    told: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PatchReport:
    """Train the kept entries of the file ``patch``, and write the checkpoint ``output``, a ``patch_file`` or both.

    Whatever made the patch, its mask stays. ``tuned`` and ``stats`` are a fine-tuned model and its statistics, or
    several of both in one order; ``retain`` are statistics of ``base``. What is minimised, and what is kept, is as in
    ``distill_checkpoint``. ``teacher_weight`` is that of the patch, where it is not that of the statistics;
    ``materials`` are what the teachers said, where they have run; the report says ``told`` under "target". With
    ``trust_remote_code`` the models' own code may run. Raises TailorError.
    """
    started = perf_counter()
    target = Target.needed(output, patch_file, resume=resume, overwrite=overwrite)
    models, folders = (list(given) if isinstance(given, (list, tuple)) else [given] for given in (tuned, stats))
    if len(models) != len(folders) or not models:
        what = f"{len(models)} fine-tuned models and {len(folders)} statistics"
        raise OptionsError(what, "pass one of each for every task")
    base, *models = local_folders((base, *models), code=trust_remote_code)
    with ExitStack() as stack:
        opened, file = open_both(base, patch, stack)
        teachers = [open_teacher(opened, *pair, stack, teacher_weight) for pair in zip(models, folders, strict=True)]
        retained = stack.enter_context(closing(Stats.open(retain)))
        check_retain(opened, teachers[0][0], retained, PatchOptions())
        sampled = [*(found for _, found in teachers), retained]
        require_samples(sampled, distill)
        distill = for_samples_of(distill, sampled)
        read = [path for model, found in teachers for path in (*model.shards, *found.files)]
        watch = Watch([*opened.shards, file.path, *read, *retained.files])
        where = resolve_device(device)
        plan = plan_of_patch(opened, file, None)
        kept = [(name, tensor.kept) for name, tensor in file.tensors.items()]
        samples = [found.samples() for found in sampled]
        how = teachers[0][1].run_options(trust_remote_code)
        given = (opened, config_folder(teachers[0][0]), kept, samples, how, distill, where)
        plan = replace(plan, training=training_plan(*given), patch_bytes=file.path.stat().st_size + _MORE_REPORT)
        closed = file.report()
        used = {f"samples {number}": found.fingerprint() for number, found in enumerate(sampled)}
        used |= {f"teacher {number}": model.fingerprint() for number, (model, _) in enumerate(teachers)}
        facts = used | {"patch": file.fingerprint(), "target": None if told is None else dict(told)}
        models_run = {"base": opened.path} | {f"teacher {n}": config_folder(m) for n, (m, _) in enumerate(teachers)}
        identity = identity_of(closed.inputs, settings_of(distill) | facts, where, **configs_of(models_run))
        side, _ = side_sources(opened, file)
        inputs = closed.inputs
        if closed.command == "patch":
            both = (teachers[0][1], retained)
            if not is_retained(inputs) and options_in_report(closed.options).fits_statistics:
                closed = replace(closed, options=closed.options | {"retain_weight": 0.0})  # it lends samples alone
            inputs = inputs | described_stats(*both, inputs)
            side[CARD] = card_of_trained(closed, opened, teachers[0][0], distill, both)
        manifest = {"task": file.manifest.task, "license": file.manifest.license, "inputs": inputs}
        paths = [opened.path, file.path, *(original(model).path for model, _ in teachers), *(s.path for s in sampled)]
        Work.check(target)
        begun = target.begin(plan, opened, paths, identity, closed.command, side, manifest)
        if isinstance(begun, PatchReport):
            Work.clear(target)
            return begun
        outputs = stack.enter_context(begun)
        work = Work.of(target, identity)
        teaching = Teaching(opened, teachers, retained, where, trust_remote_code, work.folder, progress)
        found = train_and_write(work, file.path, plan, teaching, closed, outputs, distill, materials)
        report = replace(closed, inputs=inputs, tensors=found.records, stages=found.stages)
        report = replace(report, seconds=perf_counter() - started, distillation=found.facts)
        report = replace(report, target=None if told is None else dict(told))
        outputs.finish(report, watch)
        remove_work(work.folder)
        return report


def open_teacher(
    base: Checkpoint, tuned: PathLike, stats: PathLike, stack: ExitStack, weight: float | None = None
) -> tuple[Checkpoint, Stats]:
    """A fine-tuned model and its statistics, at their teacher's weight if none is given.

    Raises TailorError if they are not a pair.
    """
    opened, found = stack.enter_context(open_for(base, tuned)), stack.enter_context(closing(Stats.open(stats)))
    model = interpolated(base, opened, found.teacher_weight if weight is None else weight)
    if found.teacher_weight == 1.0:
        found.rename_for(opened)
    check_stats(base, model, found)
    return model, found


def plan_distilled(
    base: PathLike,
    tuned: PathLike,
    output: PathLike | None,
    stats: PathLike,
    retain: PathLike,
    options: PatchOptions = PatchOptions(),
    distill: DistillOptions = DistillOptions(),
    patch_file: PathLike | None = None,
    graft_data: PathLike | None = None,
) -> Plan:
    """What ``distill_checkpoint`` would do and what it would cost, from headers and samples. Raises TailorError."""
    options = options.resolved(not options.resized_vocab, distilled=True).before_teacher
    with ExitStack() as stack:
        sources = _Sources.open(base, tuned, stats, retain, options, stack, graft_data)
        require_samples(sources.both, distill)
        plan = sources.plan(sources.options, distill, resolve_device(options.device))
        target = Target.of(output, patch_file, resume=options.resume, overwrite=options.overwrite)
        target.check(sources.paths, plan)
        if output is not None or patch_file is not None:
            Work.check(target)
        if sources.options.check_propagation:
            check_both(target, plan, sources.inputs, sources.options)
        return plan


@dataclass(frozen=True)
class _Sources:
    """What a distilled patch is made of: the inputs of the patch, and the statistics whose samples are learned from."""

    inputs: PatchInputs
    both: tuple[Stats, Stats]
    options: PatchOptions  # with the teacher's weight

    @classmethod
    def open(
        cls,
        base: PathLike,
        tuned: PathLike,
        stats: PathLike,
        retain: PathLike,
        options: PatchOptions,
        stack: ExitStack,
        graft_data: PathLike | None,
    ) -> _Sources:
        """Open all by their headers; ``stack`` closes them. Raises TailorError where they do not go together."""
        used: tuple[PathLike | None, PathLike | None] = (
            (stats, retain) if options.fits_statistics else (None, None)
        )  # else the samples of both are used alone
        new, retained = (stack.enter_context(closing(Stats.open(path))) for path in (stats, retain))
        if options.teacher_weight is None:
            options = replace(options, teacher_weight=new.teacher_weight)
        if options.resized_vocab:  # the base's statistics know nothing of the new rows, but its samples serve
            used = (used[0], None)
        inputs = PatchInputs.open(base, tuned, used[0], options, stack, used[1], graft_data)
        check_stats(inputs.base, inputs.tuned, new)
        own = inputs.base.stored if isinstance(inputs.base, GrownCheckpoint) else inputs.base
        check_retain(own, inputs.tuned, retained, PatchOptions())
        return cls(inputs, (new, retained), inputs.told(options, new))

    @property
    def paths(self) -> list[Path]:
        """Where all lie: no output may."""
        return [*self.inputs.paths, *(found.path for found in self.both)]

    def closed_form(self, work: Work, options: PatchOptions, progress: bool) -> PatchReport:
        """The patch that training starts from, its values not rounded to codes."""
        base = self.inputs.base
        inputs = replace(self.inputs, base=UnroundedCheckpoint(base) if base.dequantized else base)
        start = work.start
        own = replace(options, resume=start.resume, overwrite=False, max_shard_size=None)
        return patch_opened(inputs, start, own, progress, None, perf_counter())

    def plan(self, options: PatchOptions, distill: DistillOptions, device: torch.device) -> Plan:
        """The plan of the patch with that of its training. Raises TailorError."""
        inputs = self.inputs
        plan = build_plan(inputs.base, inputs.tuned, inputs.stats, options, inputs.retain_stats)
        how = self.both[0].run_options(options.trust_remote_code)
        return with_training(plan, inputs, [found.samples() for found in self.both], how, options, distill, device)


def with_training(
    plan: Plan,
    inputs: PatchInputs,
    samples: list[list[Inputs]],
    how: CalibrateOptions,
    options: PatchOptions,
    distill: DistillOptions,
    device: torch.device,
) -> Plan:
    """The plan of a patch with that of its training on ``samples`` of both kinds; ``how`` the models are loaded."""
    kept = [(tensor.name, count) for tensor, count in most_kept(plan.patched, options)]
    where = config_folder(inputs.tuned)
    return replace(plan, training=training_plan(inputs.base, where, kept, samples, how, distill, device))


def training_plan(
    base: Checkpoint,
    folder: Path,
    kept: Sequence[tuple[str, int]],
    samples: Sequence[list[Inputs]],
    how: CalibrateOptions,
    distill: DistillOptions,
    device: torch.device,
) -> TrainingPlan:
    """What training so many ``kept`` entries of the base's tensors takes; ``folder`` has the patched model's config.

    Raises CheckpointError.
    """
    from tailorcli.training.cost import training_bytes

    needed = training_bytes(base, folder, kept, samples, how, distill.batch_size, device.type == "cuda")
    return TrainingPlan(distill.for_samples(max(map(len, samples))).known_steps, device.type, *needed)


def require_samples(sampled: Sequence[Stats], distill: DistillOptions) -> None:
    """Training finds what it needs in these statistics, the last of which are the base's. Raises DataError."""
    for number, found in enumerate(sampled, 1):
        if not found.sample_count:
            found.samples()  # which says that they were not kept
        counted_tokens(found, distill, needed=number < len(sampled))
        if found.sample_count < 2:
            what = f"{found.path} has 1 sample, and training needs two of each kind: one of them is held out"
            raise DataError(what, "calibrate on more data")


def for_samples_of(distill: DistillOptions, sampled: Iterable[Stats]) -> DistillOptions:
    """With a known number of steps, for training on the samples of these statistics."""
    return distill.for_samples(max(found.sample_count for found in sampled))


def settings_of(distill: DistillOptions) -> dict[str, Any]:
    """The options as they stand in a run's identity."""
    return {f"distill {name}": value for name, value in asdict(distill).items()}


def require_work(work: Path) -> None:
    """Raise OutputError where something else than what an interrupted run left lies there."""
    if not work.exists():
        return
    if not work.is_dir():
        raise OutputError(f"{work} is no folder of ours", "move it away")
    strange = [path.name for path in work.iterdir() if not path.name.startswith((START, STATE, RUN, HIDDEN))]
    if strange:
        raise OutputError(f"{work} holds {strange[0]!r}, which no run of ours wrote", "move it away")


def remove_work(work: Path) -> None:
    """Take away what an interrupted run left. Raises OutputError where something else lies there."""
    if ranks().first and work.exists():
        require_work(work)
        shutil.rmtree(work)
