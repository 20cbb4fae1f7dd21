"""What ``--dry-run`` shows of a calibration, and of any job on many ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tailorcli.cli.output import duration, print_json, print_rich, say, show_reasons
from tailorcli.terminal import printable

if TYPE_CHECKING:
    from rich.table import Table

    from tailorcli.pipeline.estimate import CalibrationPlan
    from tailorcli.pipeline.ranks import Fleet, RankPlan


def show_calibration(plan: CalibrationPlan, output: Path, as_json: bool) -> None:
    """What ``calibrate --dry-run`` shows."""
    from tailorcli.runs.outputs import free_bytes

    if as_json:
        print_json({**plan.to_dict(), "free_bytes": free_bytes(output)})
        return
    from tailorcli.display.summary import facts_table
    from tailorcli.units import counted, format_bytes

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
    from tailorcli.units import format_bytes

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
    from tailorcli.units import format_bytes

    columns = ["step", "time", "most of it", "read", "written", "a device"]
    table = new_table(f"on {plan.fleet}", columns[0], columns[1:], left=("most of it",))
    for step in plan.steps:
        sizes = (step.read_bytes, step.write_bytes, step.device_bytes)
        bound = f"{step.bound} {100 * step.parts[step.bound] / max(step.seconds, 1e-9):.0f}%"
        table.add_row(printable(step.what), duration(step.seconds), bound, *map(format_bytes, sizes))
    return table
