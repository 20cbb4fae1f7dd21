"""Calibrate the tuned model and its base, and patch: one call for what are else three, with the same bytes.

Where nobody wants the statistics, both models are calibrated and patched block by block in one pass, and none are
written (``patching.onepass``). Else, and where a method or a model forbids that, they lie in a folder beside the
output, which an interrupted run goes on from, and go at the end; or they stay where the caller wants them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, is_adapter
from tailorcli.adapters.interpolated import InterpolatedCheckpoint, original
from tailorcli.calibration.expected import ExpectedStats
from tailorcli.calibration.gathering import NotInOnePassError
from tailorcli.calibration.stats import Stats
from tailorcli.calibration.stats_writer import remove_statistics, require_ours
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.device import free_memory, resolve_device
from tailorcli.distributed import ranks, require_shared, wait_for_all
from tailorcli.errors import DataError, OptionsError, OutputError, note
from tailorcli.files import PathLike, beside, optional_path
from tailorcli.guard import OutputLock, entries, protect
from tailorcli.hub import local_folder
from tailorcli.options import AUTO, CalibrateOptions, DistillOn, DistillOptions, PatchOptions
from tailorcli.patchfile.report import PatchReport
from tailorcli.patching.aim import (
    ATTEMPTS,
    Aim,
    check_searchable,
    check_target,
    finished_target,
    patch_to_target,
    search_bytes,
    search_in_words,
    searched,
)
from tailorcli.patching.aim import SUFFIX as TARGET_SUFFIX
from tailorcli.patching.checked import SUFFIX as CHECK_SUFFIX
from tailorcli.patching.checked import check_both
from tailorcli.patching.distilled import SUFFIX as DISTILL_SUFFIX
from tailorcli.patching.distilled import distill_checkpoint, settings_of, with_training
from tailorcli.patching.inputs import PatchInputs
from tailorcli.patching.measuring import NEW as NEW_DATA
from tailorcli.patching.measuring import RETAINED as RETAINED_DATA
from tailorcli.patching.onepass import patch_in_one_pass, why_not_in_one_pass
from tailorcli.patching.patch import check_writable, patch_checkpoint
from tailorcli.patching.planner import build_plan
from tailorcli.patching.teacher import with_teacher
from tailorcli.pipeline.estimate import PICKING, Estimate, require_divisible, require_retained, searching
from tailorcli.pipeline.plan import JobPlan, Step
from tailorcli.pipeline.ranks import Fleet, RankPlan
from tailorcli.pipeline.sides import BASE, TUNED, Side
from tailorcli.pipeline.trial import Rates, calibrating, distilling, measure, patching, picking
from tailorcli.runs.again import NEW, NOT_KEPT, RETAINED
from tailorcli.runs.outputs import Target, free_bytes, identity_of
from tailorcli.runs.plan import RUNTIME_BYTES, Plan
from tailorcli.units import counted, format_bytes

if TYPE_CHECKING:
    import torch

SUFFIX = ".work"  # of the folder beside the output
_WORKS = (SUFFIX, TARGET_SUFFIX, CHECK_SUFFIX, DISTILL_SUFFIX)  # of all that lie there for a while


def tailor(
    base: PathLike,
    tuned: PathLike,
    output: PathLike | None,
    data: PathLike,
    *,
    retain_data: PathLike | None = None,
    retain: bool = True,
    options: PatchOptions = PatchOptions(),
    calibration: CalibrateOptions | None = None,
    distill: DistillOptions | None = None,
    patch_file: PathLike | None = None,
    keep_stats: PathLike | None = None,
    graft_data: PathLike | None = None,
    teacher_data: PathLike | None = None,
    target: str | None = None,
    progress: bool = False,
    announce: Callable[[JobPlan], None] | None = None,
    tell: Callable[[str], None] | None = None,
    show: Callable[[str], None] | None = None,
) -> PatchReport:
    """Give back to ``tuned`` what it forgot of ``base``: calibrate both, patch, and write ``output`` or a patch file.

    ``data`` is the new task's, which ``tuned`` is calibrated on. ``base`` is calibrated on ``retain_data``, or on what
    it writes itself; without ``retain`` not at all (the paper's way). ``calibration`` says how both are calibrated
    (by default on 128 samples each, with ``distill`` or a ``target`` on 512); its device, tensors and remote code are
    those of ``options``. With ``distill`` the kept entries are then trained;
    with a ``target`` they are, too, as ``patch_to_target`` does it. A teacher's weight that is "auto" is picked first,
    on ``teacher_data`` or on the samples of ``data``, and told.
    The statistics stay in ``keep_stats``, if that is given, and are taken from there where they are the very ones that
    would be made. With ``options.resume`` an interrupted job goes on wherever it was. ``announce`` is called with the
    plan before the work starts, ``tell`` with a line on the data and on each step, ``show`` with the first sample.
    The output has the same tensors, to the bit, as ``calibrate_model`` and ``patch_checkpoint`` give one by one.
    Raises TailorError.
    """
    job = _Job.of(
        base=base,
        tuned=tuned,
        output=output,
        patch_file=patch_file,
        data=data,
        retain_data=retain_data,
        retain=retain,
        options=options,
        calibration=calibration,
        distill=distill,
        target=target,
        keep_stats=keep_stats,
        graft_data=graft_data,
        teacher_data=teacher_data,
    )
    say = tell or (lambda line: None)
    started, stages = perf_counter(), dict[str, float]()
    with ExitStack() as stack:
        job.open(stack, tell, show)
        earlier = None if job.picks else job.finished()
        plan = None if earlier is not None else job.plan(stack, announce is not None)
        if plan is not None and announce is not None:
            announce(plan)
        if job.picks:
            stack.close()
            begun = perf_counter()
            job.pick(progress, tell)
            stages["teacher"] = perf_counter() - begun
            job.open(stack, None, None)
            earlier = job.finished()
            plan = None if earlier is not None else job.plan(stack, False)
        if earlier is not None:
            job.target.remove_leftovers()
            if job.work.exists():  # of a run that was ended just before it removed it
                with suppress(OutputError), _locked(job.work):
                    job.clean()
                with suppress(OSError):
                    job.work.rmdir()
            return earlier
        assert plan is not None
        wait_for_all("the plan")  # which is made of what is there before the first rank begins
        with _locked(job.work), _told_once(job):
            if options.overwrite and ranks().first:
                _remove(job.work)
            require_shared(job.work)
            report = job.in_one_pass(plan.patch, progress, say, stages) if plan.one_pass else None
            if report is None:
                stack.close()  # each step opens what it reads
                job.calibrate(progress, say, stages)
                report = job.patch(progress, tell)
            job.clean()
    with suppress(OSError):
        job.work.rmdir()
    return replace(report, stages=stages | report.stages, seconds=perf_counter() - started)


def plan_job(
    base: PathLike,
    tuned: PathLike,
    output: PathLike | None,
    data: PathLike,
    *,
    retain_data: PathLike | None = None,
    retain: bool = True,
    options: PatchOptions = PatchOptions(),
    calibration: CalibrateOptions | None = None,
    distill: DistillOptions | None = None,
    patch_file: PathLike | None = None,
    keep_stats: PathLike | None = None,
    graft_data: PathLike | None = None,
    teacher_data: PathLike | None = None,
    target: str | None = None,
    tell: Callable[[str], None] | None = None,
    fleet: Fleet | None = None,
) -> JobPlan:
    """What ``tailor`` would do and cost, on ``fleet`` if it is given; everything is checked and nothing written.

    Raises TailorError.
    """
    job = _Job.of(
        base=base,
        tuned=tuned,
        output=output,
        patch_file=patch_file,
        data=data,
        retain_data=retain_data,
        retain=retain,
        options=options,
        calibration=calibration,
        distill=distill,
        target=target,
        keep_stats=keep_stats,
        graft_data=graft_data,
        teacher_data=teacher_data,
    )
    with ExitStack() as stack:
        job.open(stack, tell, None)
        return job.plan(stack, True, fleet)


@dataclass
class _Job:
    """The inputs of a job, and from ``open`` and ``plan`` on its two sides, each ``done`` already or not."""

    base: Path
    tuned: Path
    data: Path
    retain_data: Path | None
    retained: bool
    options: PatchOptions
    calibration: CalibrateOptions
    distill: DistillOptions | None
    target: Target
    keep_stats: Path | None
    graft_data: Path | None
    teacher_data: Path | None
    aim: Aim | None  # distillation is part of it
    opened: PatchInputs | None = None
    stored: dict[str, Checkpoint] = field(default_factory=dict)  # by side: what its network is loaded from
    sides: tuple[Side, ...] = ()
    done: tuple[bool, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        base: PathLike,
        tuned: PathLike,
        output: PathLike | None,
        patch_file: PathLike | None,
        data: PathLike,
        retain_data: PathLike | None,
        retain: bool,
        options: PatchOptions,
        calibration: CalibrateOptions | None,
        distill: DistillOptions | None,
        target: str | None,
        keep_stats: PathLike | None,
        graft_data: PathLike | None,
        teacher_data: PathLike | None,
    ) -> _Job:
        """Take the options together. Raises OptionsError where they contradict one another."""
        to = Target.needed(output, patch_file, resume=options.resume, overwrite=options.overwrite)
        aim = None if target is None else check_target(target, options)
        if aim is not None:
            distill, options = distill or DistillOptions(), searched(options)
        if distill is None and not options.fits_statistics:
            raise OptionsError(f"{_named(options)} uses no statistics, and --data is to make them", "leave --data out")
        require_retained(retain, distill, aim)
        if options.resized_vocab and retain and distill is None:
            raise OptionsError(
                "what BASE must keep is measured on BASE, which knows nothing of the new rows of --resized-vocab",
                "pass --no-retain, or give the base the new rows first: resize_token_embeddings",
            )
        if retain_data is not None and not retain:
            raise OptionsError("--retain-data and --no-retain exclude each other", "pass the one that you mean")
        if calibration is not None and calibration.teacher_weight is not None:
            what = "the teacher's weight of a whole job is one of the patch's options"
            raise OptionsError(what, "set it in PatchOptions; to have it picked, calibrate, then patch with --stats")
        calibration = replace(
            calibration or CalibrateOptions.of_job(distilled=distill is not None),
            device=options.device,
            include=options.include,
            exclude=options.exclude,
            trust_remote_code=options.trust_remote_code,
            keep_samples=True,
        )
        return cls(
            base=local_folder(base, code=options.trust_remote_code),
            tuned=local_folder(tuned, code=options.trust_remote_code),
            target=to,
            data=Path(data),
            retain_data=optional_path(retain_data),
            retained=retain,
            options=options.resolved(retain and not options.resized_vocab, distilled=distill is not None),
            calibration=calibration,
            distill=distill,
            aim=aim,
            keep_stats=optional_path(keep_stats),
            graft_data=optional_path(graft_data),
            teacher_data=optional_path(teacher_data),
        )

    @property
    def inputs(self) -> PatchInputs:
        """Both models, from ``open`` on."""
        assert self.opened is not None
        return self.opened

    @property
    def work(self) -> Path:
        """The folder beside the output that an interrupted run goes on from."""
        return beside(self.target.place, SUFFIX)

    @property
    def picks(self) -> bool:
        """Whether the teacher's weight is yet to be picked."""
        return self.options.teacher_weight == AUTO

    def pick(self, progress: bool, tell: Callable[[str], None] | None) -> None:
        """Pick it, on the samples that are drawn or on other data. Raises TailorError."""
        given = (None, self.teacher_data, progress, tell, self.calibration)
        drawn = None if self.teacher_data is not None else self.sides[0].drawn
        self.options = with_teacher(self.options, self.base, self.tuned, *given, drawn)

    @property
    def sources(self) -> dict[str, dict[str, str]]:
        """The data, as the report names them."""
        return {{TUNED: NEW, BASE: RETAINED}[side.name]: side.describe() for side in self.sides}

    def open(self, stack: ExitStack, tell: Callable[[str], None] | None, show: Callable[[str], None] | None) -> None:
        """Open both models and draw the samples, unless they are drawn. Raises TailorError."""
        folder = self.work if self.keep_stats is None else self.keep_stats
        read = [self.base, self.tuned, self.data, self.retain_data, self.teacher_data]
        protect([self.target.folder], read, "choose another folder for -o")
        protect([self.target.patch_file], read, "choose another name for --patch-file")
        places = (self.target.folder, self.target.patch_file)
        works = [beside(place, end) for place in places if place is not None for end in _WORKS]
        protect([self.keep_stats], [*read, self.target.folder], "choose another folder for --keep-stats")
        kept = None if self.keep_stats is None else self.keep_stats.resolve()
        for work in (each.resolve() for each in works):
            if kept is not None and (work == kept or work in kept.parents):
                what = f"--keep-stats {self.keep_stats} is where this job works, which goes at its end"
                raise OptionsError(what, "choose another folder for --keep-stats")
        options = self.options.before_teacher
        self.opened = PatchInputs.open(self.base, self.tuned, None, options, stack, None, self.graft_data)
        if self.aim is not None:
            check_searchable(options, self.inputs.base)
        own = self.inputs.base if is_adapter(self.tuned) else stack.enter_context(open_checkpoint(self.tuned))
        weight = None if options.teacher_weight == 1.0 else options.teacher_weight  # which is tuned itself
        towards = replace(self.calibration, teacher_weight=weight)
        drawn = self.sides[0].drawn if self.sides else None
        sides = [Side.of(TUNED, self.inputs.tuned, own, self.data, towards, folder / TUNED, tell, show, drawn)]
        if self.retained:
            base = stack.enter_context(open_checkpoint(self.base))
            earlier = self.sides[1].drawn if self.sides else None
            given = (self.retain_data, self.calibration, folder / BASE, tell, None, earlier)
            sides.append(Side.of(BASE, base, base, *given))
        self.sides = tuple(sides)
        if self.distill is not None:
            self.distill = self.distill.for_samples(max(side.samples for side in sides))
        self.stored = {TUNED: own, BASE: self.inputs.base}

    def finished(self) -> PatchReport | None:
        """The report of the same job where it has ended before, when asked to resume it. Raises OutputError."""
        described = self.inputs.describe() | self.sources
        options = self.inputs.told(self.options)
        if self.aim is not None and self.distill is not None:
            return finished_target(self.target, self.aim, options, self.distill, described)
        device = resolve_device(self.options.device)
        identity = identity_of(described, options.identity(self.retained), device, **self.inputs.configs)
        if self.distill is not None:
            identity |= settings_of(self.distill)
        return self.target.finished(identity, "patch", ("stats fingerprint", "retain fingerprint"))

    def plan(self, stack: ExitStack, estimate: bool, fleet: Fleet | None = None) -> JobPlan:
        """Check everything that can be checked beforehand, and say what will be done. Raises TailorError.

        With ``estimate`` one block of the model is run, to tell how long it will take, here or on ``fleet``.
        """
        inputs, options = self.inputs, self.options.before_teacher
        if self.aim is not None:
            options = replace(options, density=self.aim.densities[-1])
        self._check_work()
        require_divisible(options, fleet or Fleet())
        fresh = self.keep_stats is None and options.overwrite
        self.done = tuple(not fresh and self._is_there(side) for side in self.sides)
        stats = []
        for side, done in zip(self.sides, self.done, strict=True):
            model = inputs.tuned if side.name == TUNED else inputs.base
            at_weight = isinstance(model, InterpolatedCheckpoint)  # whose statistics have the base's names
            stats.append(side.stats(model, inputs.base if at_weight else self.stored[side.name], done, stack))
            if side.name == TUNED and not at_weight:
                stats[-1].rename_for(inputs.tuned)
        has_term = self.retained and not options.resized_vocab  # else the base lends its samples alone
        first, retained = (stats[0], stats[1] if has_term else None) if options.fits_statistics else (None, None)
        patch = build_plan(inputs.base, inputs.tuned, first, options, retained)
        if self.distill is not None:
            self._require_samples(self.distill)
            samples = [side.inputs for side in self.sides]
            device = resolve_device(options.device)
            patch = with_training(patch, inputs, samples, self.calibration, options, self.distill, device)
        check_writable(self.target, options, inputs.base)
        paths = [self.base, self.tuned, self.data, *([] if self.retain_data is None else [self.retain_data])]
        self.target.check(paths, patch)
        if options.check_propagation:
            check_both(self.target, patch, inputs, options)
        expected = [one for one in stats if isinstance(one, ExpectedStats)]
        why = self._why_in_steps(fleet)
        if not why:
            peak = _peak(patch) + sum(_block_bytes(one) for one in expected)
            return JobPlan(self._steps(patch, stats, estimate, True), patch, 0, False, peak, one_pass=True)
        needed = sum(one.total_bytes for one in expected)
        place = self.work if self.keep_stats is None else self.keep_stats
        if self.aim is not None:
            least = replace(options, density=self.aim.densities[0])
            lowest = build_plan(inputs.base, inputs.tuned, first, least, retained)
            needed += search_bytes(self.aim, lowest.patch_bytes, patch.patch_bytes)
        if needed + patch.write_bytes > free_bytes(place):
            what = "the statistics" if self.aim is None else "the statistics and the search's patches"
            raise OutputError(
                f"not enough disk for {place}: {what} take up to {format_bytes(needed)}, and the output "
                f"{format_bytes(patch.write_bytes)}; {format_bytes(free_bytes(place))} are free",
                "free some, choose another disk, or fewer tensors with --include",
            )
        calibrated = [_calibration_peak(inputs.base, one, resolve_device(options.device)) for one in expected]
        peak = max([_peak(patch), *calibrated])
        steps, kept = self._steps(patch, stats, estimate and fleet is None), self.keep_stats is not None
        on_ranks = self._on_ranks(patch, stats, fleet) if fleet is not None else None
        return JobPlan(steps, patch, needed, kept, peak, why=why, ranks=on_ranks)

    def _require_samples(self, distill: DistillOptions) -> None:
        """Training finds what it needs in the samples, before hours of calibration. Raises DataError."""
        for side in self.sides:
            if side.samples < 2:
                what = f"training needs two samples of each kind, and {side.data or 'what the base writes'} gives 1"
                raise DataError(what, "give more, or a larger --num-samples")
        drawn = self.sides[0].drawn
        answers = drawn is not None and (
            drawn.responses is not None or all("decoder_input_ids" in sample for sample in drawn.inputs)
        )
        if distill.on == DistillOn.RESPONSES and not answers:
            what = f"no record of {self.data} has a response, and --distill-on responses trains on nothing else"
            raise DataError(what, 'give records of "prompt" and "response", or of messages; or leave --distill-on out')

    def _on_ranks(self, patch: Plan, stats: list[Stats], fleet: Fleet) -> RankPlan | None:
        """What each step that is to be done costs on ``fleet``; None where no block of the model can be measured."""
        own, base = original(self.inputs.tuned), self.inputs.base
        model = own if isinstance(own, AdaptedCheckpoint) else self.stored[TUNED]
        known = Estimate.of(self.stored[TUNED], model, self.calibration, resolve_device(self.options.device), fleet)
        if known is None:
            return None
        costs = []
        if self.picks:
            work = known.work(self.stored[TUNED], stats[0])
            costs.append(known.pick(PICKING, work, self.sides[0].samples, self.sides[0].tokens))
        for side, done, one in zip(self.sides, self.done, stats, strict=True):
            written = side.options.length if side.data is None else None
            work = known.work(self.stored[side.name], one)
            if not done:
                costs.append(known.calibrate(side.to_do, work, (side.samples, side.tokens), written))
        samples, tokens = (sum(getattr(side, name) for side in self.sides) for name in ("samples", "tokens"))
        kinds = (stats[0], stats[1] if self.retained else None)
        last = known.patches(patch, base, *kinds, (samples, tokens), self.options.check_propagation)
        if self.distill is not None:
            last.append(known.distill(patch, base, stats[0], self.distill, tokens // samples))
        if self.aim is not None and self.distill is not None:
            last = [searching(self.aim, patch, last)]
        return known.plan([*costs, *last])

    def _why_in_steps(self, fleet: Fleet | None) -> str:
        """Why the models are calibrated before they are patched; empty where all is done in one pass."""
        if self.keep_stats is not None:
            return "--keep-stats writes the statistics"
        if self.distill is not None:
            return "training starts from a whole patch"
        if self.options.check_propagation:
            return "--check-propagation makes two patches of the statistics"
        if fleet is not None and fleet.size == 1:
            return "--ranks is of the steps"
        if not ranks().alone or fleet is not None:
            return "several processes divide each step"
        if any(self.done):
            return "statistics are there already"
        if self.calibration.blockwise == "never":
            return "--blockwise never has each model in memory as a whole"
        return why_not_in_one_pass(self.inputs, self.calibration)

    def _check_work(self) -> None:
        """The folder beside the output is new, or ours to go on from or to replace. Raises OutputError."""
        if not self.work.exists():
            return
        if not self.work.is_dir() or (strange := [e.name for e in entries(self.work) if e.name not in (TUNED, BASE)]):
            what = f"holds {strange[0]!r}, which no run of ours wrote" if self.work.is_dir() else "is a file"
            raise OutputError(f"{self.work} {what}", "move it away, or choose another output")
        for name in (TUNED, BASE):
            require_ours(self.work / name)
        if entries(self.work) and not (self.options.resume or self.options.overwrite):
            raise OutputError(
                f"{self.target.place} was begun by an earlier run, whose statistics lie in {self.work}",
                "pass --resume to go on with it, or --overwrite to begin anew",
            )

    def _is_there(self, side: Side) -> bool:
        """Whether the very statistics are there; others are given up with --overwrite alone."""
        if self.picks and side.name == TUNED:
            return False  # of which model is not known yet
        try:
            return side.found(self.inputs.tuned if side.name == TUNED else self.inputs.base)
        except OutputError:
            if self.options.overwrite:
                return False
            raise

    def _steps(self, patch: Plan, stats: list[Stats], estimate: bool, one_pass: bool = False) -> tuple[Step, ...]:
        tuned, base, rates = self.inputs.tuned, self.inputs.base, None
        if estimate:
            device = resolve_device(self.options.device)
            stored, model = self.stored[TUNED], original(tuned)
            model = model if isinstance(model, AdaptedCheckpoint) else stored
            rates = measure(stored, model, self.calibration, device)
        steps = []
        if self.picks:
            on = self.teacher_data or self.data
            seconds = None if rates is None else picking(rates, base, self.sides[0].tokens)
            steps.append(Step(f"pick the teacher's weight by the loss on {on}", seconds=seconds))
        for side, done in zip(self.sides, self.done, strict=True):
            written = (side.samples, side.options.length) if side.data is None else None
            seconds = None if rates is None else calibrating(rates, base, side.tokens, written)
            steps.append(Step(side.to_do, done, seconds))
        tokens = sum(side.tokens for side in self.sides)
        numel = sum(tensor.numel for tensor in patch.patched if tensor.role == "linear")
        seconds = None if rates is None else patching(rates, base, stats, tokens, self.options, numel)
        how = ", propagated: three models run block by block" if patch.propagates else ""
        if self.options.check_propagation:
            how = f"{how}; and plainly, to write the better of both"
            if rates is not None and seconds is not None:
                plainly = replace(self.options, propagate=False, check_propagation=False)
                seconds += patching(rates, base, stats, tokens, plainly, numel)
        training = None
        if self.distill is not None and rates is not None:
            each = tokens // sum(side.samples for side in self.sides)
            training = distilling(rates, self.distill.known_steps, self.distill.batch_size, each)
        if self.aim is not None and self.distill is not None:
            if seconds is not None and training is not None:
                seconds = len(self.aim.densities) * seconds + ATTEMPTS * training
            steps.append(Step(f"{search_in_words(self.aim, self.distill.known_steps)}{how}", seconds=seconds))
            return tuple(steps)
        work = f"patch {counted(len(patch.patched), 'tensor')}{how}"
        if one_pass:
            return (*steps[: int(self.picks)], *self._one_pass(work, rates, seconds))
        steps.append(Step(work, seconds=seconds))
        if self.distill is not None:
            what = f"train the kept entries: at most {counted(self.distill.known_steps, 'step')}"
            steps.append(Step(what, seconds=training))
        return tuple(steps)

    def _one_pass(self, patching: str, rates: Rates | None, seconds: float | None) -> tuple[Step, ...]:
        """The steps of one pass: what the base writes, and everything else; ``seconds`` are those of the patch."""
        steps, texts, base = [], [], self.inputs.base
        for side in self.sides:
            texts.append(side.to_calibrate)
            if side.data is None:
                written = (side.samples, side.options.length)
                writing = None if rates is None else calibrating(rates, base, 0, written)
                steps.append(Step(f"let the base write {side.to_write}", not side.is_written, writing))
            if rates is not None and seconds is not None:
                seconds += calibrating(rates, base, side.tokens, None)
        what = f"block by block in one pass, without statistics on disk: {', '.join(texts)}, {patching}"
        return (*steps, Step(what, seconds=seconds))

    def in_one_pass(
        self, plan: Plan, progress: bool, say: Callable[[str], None], stages: dict[str, float]
    ) -> PatchReport | None:
        """Calibrate and patch block by block; None, with a note, where the model turns out to forbid that."""
        given = {}
        for kind, side in zip((NEW_DATA, RETAINED_DATA), self.sides, strict=False):
            begun, writes = perf_counter(), side.is_written
            given[kind] = material = side.material(progress)
            if writes:
                stages["write samples"] = perf_counter() - begun
                counts = counted(len(material.samples.inputs), "sample"), counted(material.samples.num_tokens, "token")
                say(f"the base wrote {counts[0]}, {counts[1]} ({stages['write samples']:.1f} s)")
        self.inputs.sources = self.sources
        options, started = self.inputs.told(self.options), perf_counter()
        try:
            return patch_in_one_pass(self.inputs, given, plan, self.target, options, progress, started)
        except NotInOnePassError as error:
            note(f"{error.message}: both models are calibrated first, and patched then")
            return None

    def calibrate(self, progress: bool, say: Callable[[str], None], stages: dict[str, float]) -> None:
        """Make the statistics that are not there."""
        for side, done in zip(self.sides, self.done, strict=True):
            if not done:
                begun = perf_counter()
                say(f"calibrated {side.whose}: {side.calibrate(progress, say)}")
                stages[f"calibrate {side.name}"] = perf_counter() - begun

    @property
    def _passing(self) -> dict[str, dict[str, str]]:
        """The statistics that will not be kept, as a report names them."""
        return {} if self.keep_stats is not None else {role: {"path": NOT_KEPT} for role in ("stats", "retain")}

    def patch(self, progress: bool, tell: Callable[[str], None] | None) -> PatchReport:
        """The last step, with the statistics that are there now."""
        stats, retain = self.sides[0].folder, self.sides[1].folder if self.retained else None
        common: dict[str, Any] = {
            "progress": progress,
            "patch_file": self.target.patch_file,
            "made_of": self.sources | self._passing,
            "graft_data": self.graft_data,
        }
        pair = (self.base, self.tuned, self.target.folder)
        if self.aim is not None and self.distill is not None and retain is not None:
            how = (self.aim, self.options, self.distill)
            return patch_to_target(*pair, stats, retain, *how, tell=tell, **common)
        if self.distill is not None and retain is not None:
            return distill_checkpoint(*pair, stats, retain, self.options, self.distill, **common)
        return patch_checkpoint(*pair, stats, self.options, retain=retain, **common)

    def clean(self) -> None:
        """Take the statistics in the work folder away. Raises OutputError."""
        if ranks().first:
            _remove(self.work)


def _peak(patch: Plan) -> int:
    """Bytes of this machine's memory at the fullest moment of the patch and of the training after it."""
    if patch.training is None:
        return patch.peak_bytes
    held = patch.training.host_bytes + (patch.training.device_bytes if patch.training.device == "cpu" else 0)
    return max(patch.peak_bytes, RUNTIME_BYTES + held)


def _block_bytes(stats: ExpectedStats) -> int:
    """Bytes of the Hessians of one block of a model, the largest."""
    blocks: dict[str, int] = {}
    for name, info in stats.hessians.items():
        if info.kind == "full":
            block = re.sub(r"(\.\d+)\..*", r"\1", name)  # up to its first number
            blocks[block] = blocks.get(block, 0) + 4 * info.size**2
    return max(blocks.values(), default=0)


def _calibration_peak(model: Checkpoint, stats: ExpectedStats, device: torch.device) -> int:
    """Bytes of this machine's memory while a model is calibrated: its weights and Hessians, or a part of them.

    What does not fit goes block by block, within four fifths of what is free.
    """
    full = [4 * info.size**2 for info in stats.hessians.values() if info.kind == "full"]
    whole = model.nbytes + (sum(full) if device.type == "cpu" else 0)
    free = free_memory(resolve_device("cpu"))
    return RUNTIME_BYTES + (whole if free is None else min(whole, int(0.8 * free)))


def _named(options: PatchOptions) -> str:
    return f"--method {options.method}" if options.method != "tailor" else "--solver none with --omega 1"


def _remove(work: Path) -> None:
    """Take both statistics away from a work folder, and the folder where nothing else is in it. Raises OutputError."""
    for name in (TUNED, BASE):
        remove_statistics(work / name)
    with suppress(OSError):
        work.rmdir()


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """No other run works in the folder meanwhile; of several ranks the first holds the lock."""
    with OutputLock(work, folder=True) if ranks().first else nullcontext():
        yield


@contextmanager
def _told_once(job: _Job) -> Iterator[None]:
    """Notes on the statistics were told with the plan, by the names of what they are made of."""
    folders = tuple(f"note: {side.folder}" for side in job.sides)

    def is_new(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(folders)

    logger = logging.getLogger("tailorcli")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
