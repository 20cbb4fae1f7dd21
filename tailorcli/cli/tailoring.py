"""What ``patch`` was asked for: a patch by statistics that are there, or the whole job; planned or done."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.cli.output import say, show_reasons, show_stages, show_summary, show_written
from tailorcli.cli.plans import show_cost, show_job, show_job_cost, show_plan
from tailorcli.cli.verbosity import is_verbose, wants_progress
from tailorcli.errors import OptionsError
from tailorcli.options import AUTO, CalibrateOptions, DistillOptions, PatchOptions

if TYPE_CHECKING:
    from tailorcli.patchfile.report import PatchReport
    from tailorcli.pipeline.plan import JobPlan
    from tailorcli.pipeline.ranks import Fleet
    from tailorcli.runs.plan import Plan


@dataclass(frozen=True)
class Asked:
    """What stands on the command line; with ``distill``, and no ``data``, there are both statistics."""

    base: Path
    tuned: Path
    output: Path | None
    patch_file: Path | None
    data: Path | None  # of the whole job
    stats: Path | None
    retain: Path | None
    options: PatchOptions
    calibration: CalibrateOptions
    distill: DistillOptions | None
    target: str | None
    graft_data: Path | None
    teacher_data: Path | None
    retain_data: Path | None
    retained: bool  # whether the whole job asks the base
    keep_stats: Path | None

    @property
    def models(self) -> tuple[Path, Path, Path | None]:
        """Base and tuned, and the folder for what is made of them."""
        return self.base, self.tuned, self.output

    @property
    def statistics(self) -> tuple[Path, Path]:
        """Both, where there is ``distill`` and no ``data``."""
        assert self.stats is not None
        assert self.retain is not None
        return self.stats, self.retain

    @property
    def described_job(self) -> dict[str, Any]:
        """What the cost of a whole job depends on, as ``plan_described`` takes it."""
        names = ("base", "tuned", "options", "calibration", "distill", "target", "retain_data")
        return {name: getattr(self, name) for name in names} | {"retain": self.retained}

    @property
    def whole_job(self) -> dict[str, Any]:
        """A whole job, as ``tailor`` takes it."""
        names = ("output", "patch_file", "data", "graft_data", "teacher_data", "keep_stats")
        return self.described_job | {name: getattr(self, name) for name in names}


def show_dry_run(asked: Asked, fleet: Fleet | None, as_json: bool, every_tensor: bool) -> None:
    """Check everything, and show the plan and its cost, on ``fleet`` if it is given. Raises TailorError."""
    from tailorcli.pipeline.estimate import is_described, ranks_of_patch
    from tailorcli.pipeline.job import plan_job

    shown = (asked.output, asked.patch_file, as_json, every_tensor)
    if fleet is not None and is_described(asked.base):
        show_job(_described(asked, fleet), *shown)
    elif asked.data is not None:
        tell = None if as_json else partial(say, err=True)
        show_job(plan_job(**asked.whole_job, tell=tell, fleet=fleet), *shown)
    else:
        plan = _planned(asked)
        ranks = None
        if fleet is not None:
            given = (asked.options, asked.retain, asked.distill, fleet, asked.target)
            ranks = ranks_of_patch(asked.base, asked.tuned, asked.stats, plan, *given)
        show_plan(plan, *shown, ranks)
        if asked.options.teacher_weight == AUTO:
            say("before that the teacher's weight is picked: models between BASE and TUNED are run", err=True)


def _described(asked: Asked, fleet: Fleet) -> JobPlan:
    """The cost of the whole job for models of which there is a config.json alone."""
    from tailorcli.pipeline.estimate import plan_described

    if asked.stats is not None:
        what = f"{asked.base} has a config.json alone, and --stats are of a model with weights"
        raise OptionsError(what, "leave it out")
    return plan_described(**asked.described_job, fleet=fleet)


def _planned(asked: Asked) -> Plan:
    from tailorcli.patching.aim import plan_target
    from tailorcli.patching.distilled import plan_distilled
    from tailorcli.patching.patch import plan_patch

    where: dict[str, Any] = {"patch_file": asked.patch_file, "graft_data": asked.graft_data}
    if asked.distill is None:
        return plan_patch(*asked.models, asked.stats, asked.options, retain=asked.retain, **where)
    given = (*asked.models, *asked.statistics)
    if asked.target is None:
        return plan_distilled(*given, asked.options, asked.distill, **where)
    return plan_target(*given, asked.target, asked.options, asked.distill, **where)


def run(asked: Asked, as_json: bool) -> PatchReport:
    """Do what is asked, and say on standard error what it costs and how it goes. Raises TailorError."""
    from tailorcli.adapters.checkpoint import is_adapter
    from tailorcli.patching.aim import patch_to_target
    from tailorcli.patching.distilled import distill_checkpoint
    from tailorcli.patching.patch import patch_checkpoint
    from tailorcli.pipeline.job import tailor

    side = asked.base if is_adapter(asked.tuned) else asked.tuned
    if asked.output is not None and side.is_dir() and not (side / "config.json").exists():
        say(f"note: {asked.tuned} has no config.json, so {asked.output} will not load with from_pretrained", err=True)
    say_more = None if as_json else partial(say, err=True)
    places: dict[str, Any] = {"output": asked.output, "patch_file": asked.patch_file}
    shown: dict[str, Any] = {"progress": wants_progress(as_json)}
    if asked.data is not None:
        shown["announce"] = None if as_json else partial(show_job_cost, **places)
        shown |= {"tell": say_more, "show": say_more if is_verbose() else None}
        return tailor(**asked.whole_job, **shown)
    shown["announce"] = None if as_json else partial(show_cost, **places)
    shown |= {"patch_file": asked.patch_file, "graft_data": asked.graft_data}
    shown |= {"teacher_data": asked.teacher_data, "calibration": asked.calibration}
    if asked.distill is None:
        return patch_checkpoint(*asked.models, asked.stats, asked.options, retain=asked.retain, **shown)
    given = (*asked.models, *asked.statistics)
    if asked.target is None:
        return distill_checkpoint(*given, asked.options, asked.distill, **shown)
    return patch_to_target(*given, asked.target, asked.options, asked.distill, tell=say_more, **shown)


def show(asked: Asked, report: PatchReport) -> None:
    """What came of it, in a few lines."""
    show_summary(report)
    show_reasons({record.name: record.note for record in report.tensors if record.note}, "note")
    show_written(asked.output, asked.patch_file, report)
    show_stages(report.stages)
    kept = asked.keep_stats
    if kept is not None and kept.exists():  # a finished run that was called again made none
        say(f"statistics kept in {kept}: the same command with another --density and -o takes them from there")
