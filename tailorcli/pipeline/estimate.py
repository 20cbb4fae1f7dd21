"""The cost of a job on any number of ranks, and of a model of which there is a config.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, is_adapter, named_base
from tailorcli.adapters.interpolated import original
from tailorcli.calibration.expected import ExpectedStats, expected_stats, require_any
from tailorcli.calibration.sources import check_source
from tailorcli.calibration.stats import BIAS_HESSIAN, Stats
from tailorcli.calibration.stats_writer import check_folder
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.device import free_memory, resolve_device
from tailorcli.errors import OptionsError
from tailorcli.files import PathLike, optional_path
from tailorcli.guard import protect
from tailorcli.hub import local_folder
from tailorcli.models.config import read_config
from tailorcli.models.naming import open_for
from tailorcli.models.skeleton import describe_checkpoint, is_config_alone, run_dtype
from tailorcli.options import AUTO, CalibrateOptions, DistillOptions, PatchOptions
from tailorcli.patching.aim import ATTEMPTS, Aim, check_target, search_bytes, search_in_words, searched
from tailorcli.patching.cost import propagation_bytes
from tailorcli.patching.distilled import with_training
from tailorcli.patching.inputs import PatchInputs
from tailorcli.patching.planner import build_plan
from tailorcli.pipeline.plan import JobPlan, Step
from tailorcli.pipeline.ranks import (
    Device,
    Fleet,
    RankPlan,
    RankStep,
    calibrating,
    distilling,
    patching,
    picking,
    repeated,
)
from tailorcli.pipeline.sides import TUNED, Side
from tailorcli.pipeline.trial import Rates, measure, measure_bare
from tailorcli.pipeline.work import Work
from tailorcli.runs.plan import Plan
from tailorcli.system import usable_cores
from tailorcli.units import counted, format_bytes

if TYPE_CHECKING:
    import torch

    from tailorcli.data.samples import Inputs

# Seconds a byte between two ranks, by what a machine of GPUs (NVLink), a network of such (400 Gb/s) and sockets of one
# machine usually give: no single device can measure it.
NVLINK, NETWORK, SOCKETS = 1 / 200e9, 1 / 40e9, 1 / 1e9
_DISK = 1 / 1e9  # where nothing is there to be read


@dataclass(frozen=True)
class CalibrationPlan:
    """What a calibration will gather and cost; ``uncalibrated`` maps a tensor's name to the reason."""

    samples: int
    tokens: int  # at most
    hessians: int
    calibrated: int
    uncalibrated: dict[str, str]
    stats_bytes: int  # at most
    ranks: RankPlan | None  # None where no block of the model can be measured

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--dry-run --json``."""
        own = {name: value for name, value in vars(self).items() if name != "ranks"}
        return own | {"on_ranks": None if self.ranks is None else self.ranks.to_dict()}


def plan_calibration(
    model: PathLike,
    data: PathLike | None,
    output: PathLike,
    options: CalibrateOptions = CalibrateOptions(),
    base: PathLike | None = None,
    fleet: Fleet | None = None,
) -> CalibrationPlan:
    """What ``calibrate_model`` would gather and cost, here or on ``fleet``; nothing is written.

    ``model`` may be a folder with a config.json alone: then samples are taken to be as long as they may be. Raises
    TailorError.
    """
    check_source(data, options, None)
    options = replace(options, teacher_weight=None)  # of the model's shapes and costs
    path, folder = local_folder(model, code=options.trust_remote_code), Path(output)
    protect([folder], [path, data], "choose another folder for -o")
    check_folder(folder, options.overwrite)
    device = resolve_device(options.device)
    with ExitStack() as stack:
        if is_config_alone(path):
            stored: Checkpoint = describe_checkpoint(path, options, TUNED)
            tuned, samples = stored, options.num_samples
            tokens = samples * options.length
        else:
            own = None if base is None else local_folder(base, code=options.trust_remote_code)
            stored, tuned = _opened(path, own, stack)
            side = Side.of(TUNED, tuned, stored, optional_path(data), options, folder)
            samples, tokens = side.samples, side.tokens
        stats = expected_stats(path, stored, tuned, options, samples, tokens)
        require_any([name for name in stats.hessians if name != BIAS_HESSIAN])
        estimate = Estimate.of(stored, tuned, options, device, fleet or Fleet())
        ranks = None
        if estimate is not None:
            work = estimate.work(stored, stats)
            written = options.length if options.synthetic else None
            ranks = estimate.plan([estimate.calibrate("calibrate", work, (samples, tokens), written)])
    left = {name: entry.reason for name, entry in stats.tensors.items() if not entry.hessians}
    found = (len(stats.hessians), len(stats.tensors) - len(left), left, stats.total_bytes)
    return CalibrationPlan(samples, tokens, *found, ranks)


def _opened(path: Path, base: Path | None, stack: ExitStack) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoint that a network is loaded from, and the model: the same, but for an adapter."""
    if not is_adapter(path):
        checkpoint = stack.enter_context(open_checkpoint(path))
        return checkpoint, checkpoint
    stored = stack.enter_context(open_checkpoint(named_base(path) if base is None else base))
    return stored, stack.enter_context(open_for(stored, path))


def is_described(folder: Path) -> bool:
    """Whether ``plan_described`` is for this folder: it has a config.json and no weights."""
    return is_config_alone(folder)


def plan_described(
    base: PathLike,
    tuned: PathLike,
    *,
    retain: bool = True,
    retain_data: PathLike | None = None,
    options: PatchOptions = PatchOptions(),
    calibration: CalibrateOptions | None = None,
    distill: DistillOptions | None = None,
    target: str | None = None,
    fleet: Fleet = Fleet(),
) -> JobPlan:
    """What ``tailor`` would cost for models of which there is a config.json alone; nothing is written.

    Samples are taken to be as many and as long as they may be. Raises TailorError.
    """
    aim = None if target is None else check_target(target, options)
    if aim is not None:
        distill, options = distill or DistillOptions(), searched(options)
    calibration = calibration or CalibrateOptions.of_job(distilled=distill is not None)
    writes = retain and retain_data is None
    require_divisible(options, fleet)
    require_retained(retain, distill, aim)
    job = DescribedJob.of(base, tuned, options, calibration, retain, writes, distill, aim)
    known = Estimate.of(job.base, job.base, calibration, resolve_device(options.device), fleet)
    assert known is not None  # nothing of the model itself is run
    _require_room(job.base, writes, known.device)
    return job.on(known)


@dataclass(frozen=True)
class DescribedJob:
    """A whole job of which there are shapes alone: both models, their statistics, the plan of the patch."""

    base: Checkpoint
    tuned: Checkpoint
    stats: ExpectedStats
    retain: ExpectedStats | None
    patch: Plan
    samples: int  # of each kind
    written: int | None  # length of those that the base writes
    distill: DistillOptions | None
    aim: Aim | None = None  # of a search, of whose patches ``patch`` is the largest
    search_bytes: int = 0  # of all of them
    picks: bool = False  # the teacher's weight, first
    checked: bool = False  # whether propagation helps, by a plain patch beside it

    @classmethod
    def of(
        cls,
        base: PathLike,
        tuned: PathLike,
        options: PatchOptions,
        calibration: CalibrateOptions,
        retain: bool,
        writes: bool,
        distill: DistillOptions | None = None,
        aim: Aim | None = None,
    ) -> DescribedJob:
        """Plan it; ``writes`` where the base writes its own samples. Raises TailorError."""
        _require_statistics(options)
        picks = options.teacher_weight == AUTO
        options = options.resolved(retain, distilled=distill is not None).before_teacher
        if aim is not None:
            options = replace(options, density=aim.densities[-1])
        own: dict[str, Any] = {"device": options.device, "trust_remote_code": options.trust_remote_code}
        asked = replace(calibration, include=options.include, exclude=options.exclude, **own)
        before, after = (describe_checkpoint(Path(p), asked, whose) for p, whose in ((base, "base"), (tuned, TUNED)))
        kinds = [asked, *([replace(asked, synthetic=writes)] if retain else [])]
        count = asked.num_samples
        new, *kept = (
            expected_stats(model.path, model, model, one, count, count * one.length)
            for model, one in zip((after, before), kinds, strict=False)
        )
        patch = build_plan(before, after, new, options, kept[0] if kept else None)
        if distill is not None:
            inputs = PatchInputs(before, after, new, kept[0] if kept else None)
            samples, where = [_blank(count, one.length) for one in kinds], resolve_device(options.device)
            patch = with_training(patch, inputs, samples, asked, options, distill, where)
        written, search = kinds[-1].length if writes else None, 0
        if aim is not None:
            least = replace(options, density=aim.densities[0])
            lowest = build_plan(before, after, new, least, kept[0] if kept else None)
            search = search_bytes(aim, lowest.patch_bytes, patch.patch_bytes)
        known = (kept[0] if kept else None, patch, count, written, distill, aim, search, picks)
        return cls(before, after, new, *known, options.check_propagation)

    def on(self, known: Estimate) -> JobPlan:
        """What each step costs on a fleet."""
        count, costs, total = self.samples, [], 0
        if self.picks:
            own = (count, int(self.stats.manifest["data"]["tokens"]))
            costs.append(known.pick(PICKING, known.work(self.tuned, self.stats), *own))
        for stats, model in ((self.stats, self.tuned), (self.retain, self.base)):
            if stats is None:
                continue
            tokens, written = int(stats.manifest["data"]["tokens"]), self.written if model is self.base else None
            whose = "the tuned model" if model is self.tuned else "the base"
            what = f"calibrate {whose}: {counted(count, 'sample')} of {tokens // count:,} tokens"
            what = f"let the base write {counted(count, 'sample')} of {written:,} tokens" if written else what
            costs.append(known.calibrate(what, known.work(model, stats), (count, tokens), written))
            total += tokens
        kinds = 1 if self.retain is None else 2
        last = known.patches(self.patch, self.base, self.stats, self.retain, (count * kinds, total), self.checked)
        if self.distill is not None:
            last.append(known.distill(self.patch, self.base, self.stats, self.distill, total // (count * 2)))
        costs += last if self.aim is None else [searching(self.aim, self.patch, last)]
        steps, ranks = tuple(Step(cost.what, seconds=cost.seconds) for cost in costs), known.plan(costs)
        needed = self.search_bytes + self.stats.total_bytes + (0 if self.retain is None else self.retain.total_bytes)
        return JobPlan(steps, self.patch, needed, False, ranks.device_bytes, ranks=ranks)


def _require_room(base: Checkpoint, writes: bool, device: Device) -> None:
    if writes and device.memory is not None and base.nbytes > device.memory:
        have = f"a rank has {format_bytes(device.memory)}"
        raise OptionsError(
            f"{base.path} takes {format_bytes(base.nbytes)}, {have}: it cannot write samples there",
            "pass --retain-data FILE, which goes block by block",
        )


def _require_statistics(options: PatchOptions) -> None:
    if not options.fits_statistics:
        what = "--ranks tells what a patch by statistics costs"
        raise OptionsError(what, "leave --ranks out: --dry-run tells what is read and written")


def ranks_of_patch(
    base: PathLike,
    tuned: PathLike,
    stats: PathLike | None,
    plan: Plan,
    options: PatchOptions = PatchOptions(),
    retain: PathLike | None = None,
    distill: DistillOptions | None = None,
    fleet: Fleet = Fleet(),
    target: str | None = None,
) -> RankPlan | None:
    """What a patch with statistics that are there costs on ``fleet``; ``plan`` is that of ``plan_patch``.

    With a ``target`` it is that of ``plan_target``. None where no block of the model can be measured. Raises
    TailorError.
    """
    _require_statistics(options)
    require_divisible(options, fleet)
    picks = options.teacher_weight == AUTO
    options = options if target is None else searched(options)
    options = options.resolved(retain is not None, distilled=distill is not None).before_teacher
    with ExitStack() as stack:
        inputs = PatchInputs.open(base, tuned, stats, options, stack, retain)
        assert inputs.stats is not None  # as the options need Hessians
        own = original(inputs.tuned)
        stored = own.base if isinstance(own, AdaptedCheckpoint) else own
        how = inputs.stats.run_options(options.trust_remote_code)
        known = Estimate.of(stored, own, how, resolve_device(options.device), fleet)
        if known is None:
            return None
        kinds = [one for one in (inputs.stats, inputs.retain_stats) if one is not None]
        samples = sum(max(1, one.sample_count) for one in kinds)
        tokens = sum(int(one.manifest["data"].get("tokens", 0)) for one in kinds)
        sources = (plan, inputs.base, inputs.stats, inputs.retain_stats)
        costs = known.patches(*sources, (samples, tokens), options.check_propagation)
        if distill is not None:
            costs.append(known.distill(plan, inputs.base, inputs.stats, distill, tokens // max(1, samples)))
        if target is not None:
            costs = [searching(Aim.parse(target), plan, costs)]
        if picks:
            own_data = (inputs.stats.sample_count, int(inputs.stats.manifest["data"].get("tokens", 0)))
            costs.insert(0, known.pick(PICKING, known.work(stored, inputs.stats), *own_data))
        return known.plan(costs)


PICKING = "pick the teacher's weight"


def searching(aim: Aim, plan: Plan, once: Sequence[RankStep]) -> RankStep:
    """The step of a search, whose patches and trainings each cost what they cost ``once``, the training last."""
    assert plan.training is not None
    times = [*[len(aim.densities)] * (len(once) - 1), ATTEMPTS]
    return repeated(search_in_words(aim, plan.training.steps), list(zip(once, times, strict=True)))


def require_divisible(options: PatchOptions, fleet: Fleet) -> None:
    """Refuse what runs in a single process where several are asked for. Raises OptionsError."""
    if options.check_propagation and fleet.size > 1:
        what = f"--check-propagation runs in a single process, and --ranks asks for {fleet.size}"
        raise OptionsError(what, "leave one of them out")


def require_retained(retain: bool, distill: DistillOptions | None, aim: Aim | None) -> None:
    """Refuse training without samples of the base. Raises OptionsError."""
    if distill is not None and not retain:
        what = "--distill" if aim is None else "--target"
        raise OptionsError(f"{what} needs samples of what the base must keep", "leave --no-retain, and --preset, out")


def _blank(count: int, length: int) -> list[Inputs]:
    """Samples of which the shapes alone matter."""
    import torch

    return [{"input_ids": torch.zeros((1, length), dtype=torch.int64)}] * count


@dataclass(frozen=True)
class Estimate:
    """What one device does in a second with this model, and the fleet that it is of."""

    device: Device
    fleet: Fleet
    config: dict[str, Any]
    assumed: tuple[str, ...]

    @classmethod
    def of(
        cls, stored: Checkpoint, tuned: Checkpoint, options: CalibrateOptions, where: torch.device, fleet: Fleet
    ) -> Estimate | None:
        """Measure one block of the model, or products of its kind where it has no weights; None where that fails."""
        config = read_config(stored.path)
        whole = replace(options, include=(), exclude=())
        work = Work.of(stored, expected_stats(stored.path, stored, tuned, whole, 1, 1), config)
        assumed = [f"{1e-9 / _link(where, fleet):.0f} GB/s between ranks"] if fleet.size > 1 else []
        if stored.shards:
            rates = measure(stored, tuned, options, where)
        else:
            dtype = run_dtype(stored, None, options)
            rates = measure_bare(work, dtype, where, _DISK)
            assumed += [f"{1e-9 / _DISK:.0f} GB/s of the disk", "weights as its config.json describes them"]
        if rates is None or not work.products:
            return None
        return cls(_device_of(rates, work, where, fleet), fleet, config, tuple(assumed))

    def work(self, model: Checkpoint, stats: Stats, plan: Plan | None = None) -> Work:
        """What is to be done with the tensors of a plan, or with all."""
        chosen = None if plan is None else [tensor.name for tensor in plan.patched]
        return Work.of(model, stats, self.config, chosen)

    def calibrate(self, what: str, work: Work, data: tuple[int, int], written: int | None) -> RankStep:
        """The step of a calibration; ``data`` are samples and tokens, ``written`` the length that it writes first."""
        return calibrating(what, work, self.device, self.fleet, *data, written)

    def pick(self, what: str, work: Work, samples: int, tokens: int) -> RankStep:
        """The step in which the teacher's weight is picked."""
        from tailorcli.calibration.teacher import MOST_TRIED

        return picking(what, work, self.device, self.fleet, samples, tokens, MOST_TRIED)

    def patches(
        self, plan: Plan, base: Checkpoint, stats: Stats, retain: Stats | None, data: tuple[int, int], checked: bool
    ) -> list[RankStep]:
        """The step of a patch, and where its propagation is ``checked`` that of the plain one that it is held against.

        ``data`` are samples and tokens of both kinds.
        """
        found = [self.patch(plan, base, stats, retain, data)]
        if checked:
            plain = self.patch(replace(plan, propagates=False), base, stats, retain, data)
            found.append(replace(plain, what=f"{plain.what} plainly, to write the better of both"))
        return found

    def patch(
        self, plan: Plan, base: Checkpoint, stats: Stats, retain: Stats | None, data: tuple[int, int]
    ) -> RankStep:
        """The step of a patch; ``data`` are samples and tokens of both kinds."""
        how, (samples, tokens) = "", data
        held = max(tensor.held_bytes for tensor in plan.tensors)
        if plan.propagates:
            mine, alone = -(-samples // self.fleet.size) / max(1, samples), held
            held += propagation_bytes(list(plan.tensors), base, stats, retain, mine, on_heap=False)
            if self.device.memory is not None and held > self.device.memory:  # then hidden states wait elsewhere
                held = alone + propagation_bytes(list(plan.tensors), base, stats, retain, 0.0, on_heap=False)
            how = ", propagated"
        what = f"patch {counted(len(plan.patched), 'tensor')}{how}"
        work, kinds = self.work(base, stats, plan), 1 if retain is None else 2
        propagated = tokens if plan.propagates else None
        return patching(what, work, self.device, self.fleet, kinds, held, plan.write_bytes, propagated, samples)

    def distill(self, plan: Plan, base: Checkpoint, stats: Stats, options: DistillOptions, tokens: int) -> RankStep:
        """The step of training the kept entries, which ``plan`` has, on samples of so many ``tokens`` each."""
        assert plan.training is not None
        steps, held = plan.training.steps, plan.training.device_bytes
        kept = plan.patch_bytes // 4  # no more than that
        what = f"train the kept entries: at most {counted(steps, 'step')}"
        size = (steps, options.batch_size)
        return distilling(what, self.work(base, stats, plan), self.device, self.fleet, *size, tokens, kept, held)

    def plan(self, steps: list[RankStep]) -> RankPlan:
        """Steps in the order in which they come."""
        return RankPlan(self.fleet, tuple(steps), self.device.memory, self.assumed)


def _link(where: torch.device, fleet: Fleet) -> float:
    if where.type == "cuda":
        return NVLINK if fleet.machines == 1 else NETWORK
    return SOCKETS


def _device_of(rates: Rates, work: Work, where: torch.device, fleet: Fleet) -> Device:
    """A device by the rates of this one; ranks on a CPU share its cores and its memory."""
    import torch

    share, memory = 1.0, free_memory(where)
    if where.type == "cpu":
        threads = min(torch.get_num_threads(), usable_cores())
        share = min(threads, usable_cores() / fleet.each) / threads
        memory = None if memory is None else memory // fleet.each
    return Device(
        product=rates.forward / work.products,
        gather=rates.hessian / max(1.0, work.gathered),
        prepare=rates.prepare,
        solve=rates.solve,
        entry=0.0,  # within solve
        step=rates.write / sum(1 for block in work.block_bytes if block),
        passage=rates.forward / work.products,
        load=rates.load,
        part=rates.load,
        read=0.0,  # within load
        write=rates.load,
        link=_link(where, fleet),
        memory=memory,
        share=share,
    )
