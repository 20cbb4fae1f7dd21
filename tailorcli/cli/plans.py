"""What the commands show before the work: the plan and its cost, here or on many ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tailorcli.cli.output import print_json, print_rich, say, show_reasons
from tailorcli.terminal import printable
from tailorcli.units import counted, format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from tailorcli.pipeline.estimate import CalibrationPlan
    from tailorcli.pipeline.plan import JobPlan
    from tailorcli.pipeline.ranks import Fleet, RankPlan
    from tailorcli.runs.plan import Plan


def _cost(plan: Plan, output: Path | None, patch_file: Path | None) -> dict[str, str]:
    """What a run does and costs, a few words each."""
    from tailorcli.runs.outputs import free_bytes

    writes = []
    if output is not None:
        writes.append(f"{format_bytes(plan.write_bytes)} to {output} ({format_bytes(free_bytes(output))} free)")
    if patch_file is not None:
        writes.append(f"at most {format_bytes(plan.patch_bytes)} to {patch_file}")
    retained = sum(bool(tensor.retained_hessians) for tensor in plan.patched)
    how = ", propagated: three models run block by block" if plan.propagates else ""
    term = f" ({retained} with the retain term{how})" if retained else ""
    training = {}
    if plan.training is not None:
        steps, host = counted(plan.training.steps, "step"), plan.training.host_bytes
        there = f"{format_bytes(plan.training.device_bytes)} on the GPU and {format_bytes(host)} beside it"
        if plan.training.device == "cpu":
            there = f"{format_bytes(plan.training.device_bytes + host)} of memory"
        training = {"training": f"at most {steps}, about {there}"}
    if plan.search is not None:
        of_last = f"the figures here are of density {plan.search.densities[-1]:g}"
        training["search"] = f"for {plan.search.target}: {plan.search}; {of_last}"
    return {
        "tensors": f"patching {counted(len(plan.patched), 'tensor')}{term}, leaving {len(plan.left_at_base)} at base",
        "read": format_bytes(plan.read_bytes),
        "write": " and ".join(writes),
        "memory": f"about {format_bytes(plan.peak_bytes)} at the peak",
        **training,
    }


def show_cost(plan: Plan, output: Path | None, patch_file: Path | None) -> None:
    """What a run is about to do and will cost, on standard error before it starts."""
    costs = _cost(plan, output, patch_file)
    read, memory = costs["read"], costs["memory"].replace(" at", " of memory at")
    say(f"{costs['tensors']}: {read} to read, to write {costs['write']}, {memory}", err=True)
    if "training" in costs:
        say(f"then training the kept entries: {costs['training']}", err=True)
    if "search" in costs:
        say(f"all that in a search {costs['search']}", err=True)


def show_job_cost(plan: JobPlan, output: Path | None, patch_file: Path | None) -> None:
    """The steps of a whole job and what it will cost, on standard error before it starts."""
    for line in _job_lines(plan):
        say(line, err=True)
    costs = _job_cost(plan, output, patch_file)
    say(f"to write {costs['write']}; {costs['memory']} of memory; {costs['time']}", err=True)


def _job_lines(plan: JobPlan) -> list[str]:
    """Its steps, numbered, each with the time that it will take or that it is there already."""
    lines = []
    for number, step in enumerate(plan.steps, 1):
        ends = "there already" if step.done else "" if step.seconds is None else f"about {duration(step.seconds)}"
        lines.append(f"{number}. {step.what}{f' ({ends})' if ends else ''}")
    return [*lines, f"not in one pass: {plan.why}"] if plan.why else lines


def _job_cost(plan: JobPlan, output: Path | None, patch_file: Path | None) -> dict[str, str]:
    """What a whole job costs, a few words each."""
    write = _cost(plan.patch, output, patch_file)["write"]
    if plan.stats_bytes:
        stay = "of statistics, which stay" if plan.kept else "of statistics meanwhile"
        write += f", and up to {format_bytes(plan.stats_bytes)} {stay}"
    time = "no estimate of the time" if plan.seconds is None else f"about {duration(plan.seconds)} in all"
    return {"write": write, "memory": f"about {format_bytes(plan.peak_bytes)}", "time": time}


def duration(seconds: float) -> str:
    """A time that is only estimated, in words."""
    if seconds < 60:
        return f"{max(5, 5 * math.ceil(seconds / 5))} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"


def show_job(
    plan: JobPlan, output: Path | None, patch_file: Path | None, as_json: bool, every_tensor: bool = False
) -> None:
    """What ``--dry-run`` shows of a whole job: the tensors as of a patch, then the steps and the costs."""
    from tailorcli.runs.outputs import free_bytes

    if as_json:
        print_json({**plan.to_dict(), "free_bytes": free_bytes(output or patch_file or Path())})
        return
    from tailorcli.display.summary import facts_table

    _show_tensors(plan.patch, every_tensor)
    for line in ["", *_job_lines(plan)]:
        say(line)
    costs = _cost(plan.patch, output, patch_file)
    patch = {name: costs[name] for name in ("tensors", "training") if name in costs}
    costs = _job_cost(plan, output, patch_file)
    print_rich("", facts_table(patch | ({"write": costs["write"]} if plan.ranks is not None else costs)))
    show_ranks(plan.ranks)
    say("dry run: nothing was written", err=True)


def show_plan(
    plan: Plan,
    output: Path | None,
    patch_file: Path | None,
    as_json: bool,
    every_tensor: bool = False,
    ranks: RankPlan | None = None,
) -> None:
    """What ``--dry-run`` shows: the treatment of each kind of layer, or of every tensor, and last what it costs."""
    from tailorcli.runs.outputs import free_bytes

    if as_json:
        where = output or patch_file or Path()
        own = {} if ranks is None else {"on_ranks": ranks.to_dict()}
        print_json({**plan.to_dict(), "free_bytes": free_bytes(where), **own})
        return
    from tailorcli.display.summary import facts_table

    _show_tensors(plan, every_tensor)
    print_rich("", facts_table(_cost(plan, output, patch_file)))
    show_ranks(ranks)
    say("dry run: nothing was written", err=True)


def _show_tensors(plan: Plan, every_tensor: bool) -> None:
    """The treatment of each kind of layer, or of every tensor."""
    from tailorcli.display.summary import plan_summary
    from tailorcli.display.tables import plan_table

    print_rich(*([plan_table(plan)] if every_tensor else [*plan_summary(plan.tensors), "every tensor: --tensors"]))
    show_reasons({tensor.name: tensor.reason for tensor in plan.left_at_base}, "left at base", err=False)
    show_reasons({tensor.name: tensor.note for tensor in plan.patched if tensor.note}, "note", err=False)


def show_calibration(plan: CalibrationPlan, output: Path, as_json: bool) -> None:
    """What ``calibrate --dry-run`` shows."""
    from tailorcli.runs.outputs import free_bytes

    if as_json:
        print_json({**plan.to_dict(), "free_bytes": free_bytes(output)})
        return
    from tailorcli.display.summary import facts_table

    show_reasons(plan.uncalibrated, "without statistics", err=False)
    size, free = format_bytes(plan.stats_bytes), format_bytes(free_bytes(output))
    facts = {
        "samples": f"{counted(plan.samples, 'sample')}, {counted(plan.tokens, 'token')} at most",
        "statistics": f"{counted(plan.hessians, 'Hessian')} for {counted(plan.calibrated, 'tensor')}",
        "write": f"up to {size} to {output} ({free} free)",
    }
    print_rich("", facts_table(facts))
    if plan.ranks is None:
        say("no estimate of the time: no block of the model can be run by itself")
    show_ranks(plan.ranks)
    say("dry run: nothing was written", err=True)


def asked_fleet(given: str | None, dry_run: bool) -> Fleet | None:
    """The ranks that --ranks names. Raises typer.BadParameter where the work itself is asked for."""
    from tailorcli.pipeline.ranks import parse_fleet

    if given is not None and not dry_run:
        raise typer.BadParameter(
            "--ranks goes with --dry-run; to run on N ranks, start with torchrun --nproc-per-node N -m tailorcli"
        )
    return None if given is None else parse_fleet(given)


def show_ranks(plan: RankPlan | None) -> None:
    """Each step on many ranks: its time, what bounds it, and what the fullest device holds."""
    if plan is None:
        return
    print_rich("", _table(plan))
    own = "" if plan.fits or plan.memory is None else f", more than the {format_bytes(plan.memory)} of a rank here"
    say(
        f"about {duration(plan.seconds)} on {plan.fleet} by rates measured here; "
        f"the fullest rank holds {format_bytes(plan.device_bytes)}{own}"
    )
    if plan.assumed:
        say(f"not measured but assumed: {', '.join(plan.assumed)}")


def _table(plan: RankPlan) -> Table:
    """A step of a job on many ranks a row; bytes are those of all ranks, a device's those of the fullest."""
    from tailorcli.display.summary import new_table

    columns = ["step", "time", "most of it", "read", "written", "a device"]
    table = new_table(f"on {plan.fleet}", columns[0], columns[1:], left=("most of it",))
    for step in plan.steps:
        sizes = (step.read_bytes, step.write_bytes, step.device_bytes)
        bound = f"{step.bound} {100 * step.parts[step.bound] / max(step.seconds, 1e-9):.0f}%"
        table.add_row(printable(step.what), duration(step.seconds), bound, *map(format_bytes, sizes))
    return table
