"""What the commands show: data on standard output, notes on standard error."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from tailorcli.cli.verbosity import is_quiet, is_verbose
from tailorcli.files import in_shell
from tailorcli.terminal import printable

if TYPE_CHECKING:
    from tailorcli.patchfile.records import TensorRecord
    from tailorcli.patchfile.report import PatchReport
    from tailorcli.pipeline.plan import JobPlan
    from tailorcli.pipeline.ranks import RankPlan
    from tailorcli.runs.plan import Plan


def say(text: str, *, err: bool = False) -> None:
    """One line to standard output, or with ``err`` to standard error, where ``--quiet`` leaves it out.

    What it quotes does nothing to a terminal.
    """
    if not (err and is_quiet()):
        stream = sys.stderr if err else sys.stdout
        print(_at_words(printable(text), stream), file=stream, flush=err)


def _at_words(line: str, stream: TextIO) -> str:
    """The line as it fits a terminal, broken between words; but not one that has a command to copy."""
    width = shutil.get_terminal_size().columns
    if not stream.isatty() or len(line) <= width or "tailorcli " in line:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def say_error(message: str, hint: str = "") -> None:
    """An error on standard error, red on a terminal, and what to try next."""
    shown = f"error: {printable(message)}"
    colored = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[31m{shown}\x1b[0m" if colored else shown, file=sys.stderr, flush=True)
    if hint:
        print(printable(f"  try: {hint}"), file=sys.stderr, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """JSON to standard output: in ASCII, and null for a number that JSON does not have."""
    print(json.dumps(_finite(value), indent=1, allow_nan=False).replace("\x7f", "\\u007f"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def print_rich(*parts: Any) -> None:
    """Tables to standard output; wide ones stay whole when the output is no terminal."""
    from rich.console import Console

    class Plain(Console):
        """What is shown comes from files: brackets in a name are no markup, and controls are shown as escapes."""

        def render_str(self, text: str, **settings: Any) -> Any:
            return super().render_str("\n".join(map(printable, text.split("\n"))), **settings)

    plain: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
    console = Plain(**plain) if sys.stdout.isatty() else Plain(width=200, **plain)
    for part in parts:
        console.print(part)


def reasons(tensors: list[TensorRecord]) -> dict[str, str]:
    """Why each tensor that was left at base was."""
    return {tensor.name: tensor.reason for tensor in tensors if not tensor.patched}


def show_reasons(reasons: dict[str, str], what: str, *, err: bool = True) -> None:
    """Every tensor that was not patched or not calibrated, gathered by reason: never silently."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = names if is_verbose() else names[:4]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        say(f"{what}: {len(names)} ({reason}): {', '.join(shown)}{more}", err=err)


def require_output(output: Path | None, patch_file: Path | None) -> None:
    """Raise typer.BadParameter (exit code 2) where there is nothing to write."""
    if output is None and patch_file is None:
        raise typer.BadParameter("pass --output OUT, --patch-file FILE.safetensors, or both")


def require_source(data: Path | None, synthetic: bool) -> None:
    """Raise typer.BadParameter (exit code 2) where there is nothing to calibrate on."""
    if data is None and not synthetic:
        raise typer.BadParameter("pass --data FILE, or --synthetic to let the model write its own samples")


def _cost(plan: Plan, output: Path | None, patch_file: Path | None) -> dict[str, str]:
    """What a run does and costs, a few words each."""
    from tailorcli.runs.outputs import free_bytes
    from tailorcli.units import counted, format_bytes

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
    from tailorcli.units import format_bytes

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
    _show_ranks(plan.ranks)
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
    _show_ranks(ranks)
    say("dry run: nothing was written", err=True)


def _show_ranks(plan: RankPlan | None) -> None:
    from tailorcli.cli.ranks import show_ranks  # which imports this module

    show_ranks(plan)


def _show_tensors(plan: Plan, every_tensor: bool) -> None:
    """The treatment of each kind of layer, or of every tensor."""
    from tailorcli.display.summary import plan_summary
    from tailorcli.display.tables import plan_table

    print_rich(*([plan_table(plan)] if every_tensor else [*plan_summary(plan.tensors), "every tensor: --tensors"]))
    show_reasons({tensor.name: tensor.reason for tensor in plan.left_at_base}, "left at base", err=False)
    show_reasons({tensor.name: tensor.note for tensor in plan.patched if tensor.note}, "note", err=False)


def print_report(report: PatchReport, output: Path | None, patch_file: Path | None) -> None:
    """The report as JSON, with where it was written and how long it took."""
    paths = {"output": output, "patch_file": patch_file}
    where = {key: str(path) for key, path in paths.items() if path is not None}
    ranks = {"ranks": list(report.ranks)} if report.ranks else {}
    print_json({**where, **report.to_dict(), **ranks, "stages": report.stages, "seconds": report.seconds})


def show_written(output: Path | None, patch_file: Path | None, report: PatchReport) -> None:
    """The last lines: what was written, and what to look at next; or that all was there already."""
    from tailorcli.units import format_bytes

    if report.is_earlier:
        there = " and ".join(str(path) for path in (patch_file, output) if path is not None)
        say(f"{there}: already finished by an earlier run of this command; nothing was written")
        return
    if patch_file is not None:
        size = format_bytes(patch_file.stat().st_size)
        say(f"wrote {patch_file} ({size}); apply it: tailorcli apply BASE {in_shell(patch_file)} -o OUT")
    if output is not None:
        say(f"wrote {output}; its figures: tailorcli inspect {in_shell(output)}")
    show_time(report)


def show_time(report: PatchReport) -> None:
    """How long a run took, and of several ranks how much each did: the least and the most."""
    told = f"{report.seconds:.1f} s"
    if report.ranks:
        tensors = _range([str(share["tensors"]) for share in sorted(report.ranks, key=lambda s: s["tensors"])])
        seconds = _range([f"{share['seconds']:.1f}" for share in sorted(report.ranks, key=lambda s: s["seconds"])])
        told += f"; {len(report.ranks)} ranks: {tensors} tensors in {seconds} s each"
    say(told, err=True)


def _range(ordered: list[str]) -> str:
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def show_stages(stages: dict[str, float]) -> None:
    """With ``--verbose``, where the time went."""
    if is_verbose() and stages:
        say("of which " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items()), err=True)


def show_summary(report: PatchReport) -> None:
    """The totals of a patch in a few lines."""
    from tailorcli.patchfile.report import target_in_words
    from tailorcli.units import format_share

    totals, towards = report.totals, target_in_words(report.options)
    show_kept(totals)
    own = "on the patched model's inputs, " if "error_after_unpatched_inputs" in totals else ""
    if totals["error_before"] is not None:
        how = report.options["solver"] if report.options["method"] == "tailor" else report.options["method"]
        say(
            f"mean layer error against {towards}: {format_share(totals['error_before'])} before compensation, "
            f"{format_share(totals['error_after'])} after (100% is the base; {own}{how})"
        )
    if "drift" in totals:
        say(
            f"mean drift on the retained data: {format_share(totals['drift'])} of {towards}'s (0% is the base; "
            f"{own}retain weight {report.options['retain_weight']:g})"
        )
    if "propagated" in totals:
        say(
            f"propagated: {totals['propagated']} layers fitted again from the patched model's inputs, which patching "
            f"moves by {format_share(totals['input_shift'])} of their energy on the new task, "
            f"{format_share(totals['retained_input_shift'])} on the retained data"
        )
    if report.propagation is not None:
        from tailorcli.patching.checked import in_words

        kept = "kept" if report.propagation["kept"] else "given up: each layer keeps its plain patch"
        say(f"propagation checked on the samples held out, and {kept} ({in_words(report.propagation['held_out'])})")
    if report.distillation is not None:
        show_distillation(report.distillation, towards)
    if totals["damped_further"]:
        say(f"damped further than asked: {', '.join(totals['damped_further'])}", err=True)
    show_reasons(reasons(report.tensors), "left at base")


def show_distillation(found: dict[str, Any], towards: str = "the tuned model") -> None:
    """What training the kept entries ``towards`` a model did to both held-out divergences."""
    from tailorcli.patchfile.report import trained_tasks
    from tailorcli.units import counted

    before, after = (found["steps"].index(step) for step in (0, found["best"]))
    new, retained = (f"{found[kind][before]:.4f} to {found[kind][after]:.4f}" for kind in ("new", "retained"))
    tasks = trained_tasks(found)
    teacher, least = towards, "of the new task's teacher's"
    if tasks > 1:
        teacher, least = "the tuned models", f"(the least of {tasks} tasks) of a new task's teacher's"
        new += f" (the mean of {tasks} tasks by their weights)"
    say(
        f"distilled in {counted(found['steps'][-1], 'step')} (the best: {found['best']}); held-out divergence, nats a "
        f"token: from {teacher} {new} on the new task{'s' * (tasks > 1)}, from the base {retained} on the retained "
        "samples"
    )
    if found.get("began") and found["best"]:
        say(f"it began as a patch with {_of_layers(found['began'])}; training goes by outputs, not by layers", err=True)
    if found.get("kept"):
        kept = {kind: f"{100 * share:.1f}%" for kind, share in found["kept"].items()}
        say(
            f"by the held-out samples, were they the teachers' own: it keeps {kept['old']} of the base's accuracy "
            f"(before: {kept['old_before']}) and {kept['new']} {least} ({kept['new_before']})"
        )
    show_reasons(found.get("untrained", {}), "not trained")


def _of_layers(began: dict[str, Any]) -> str:
    """The mean layer error and drift of a patch, in words."""
    from tailorcli.units import format_share

    errors = began.get("errors") or [began[name] for name in ("error_after",) if name in began]
    texts = [f"mean layer errors of {', '.join(map(format_share, errors))}"] if errors else []
    texts += [f"a mean drift of {format_share(began['drift'])}"] if "drift" in began else []
    return " and ".join(texts)


def show_merge(report: PatchReport) -> None:
    """The totals of a merge in a few lines."""
    from tailorcli.units import counted, format_share

    totals, tasks = report.totals, report.options["tasks"]
    kept = ", ".join(f"{task} {count:,}" for task, count in zip(tasks, totals["kept_by"], strict=True))
    say(
        f"merged {counted(len(tasks), 'task')} ({report.options['method']}): "
        f"{totals['kept']:,} of {totals['numel']:,} entries ({format_share(totals['density'])}); "
        f"kept by {kept}; by all {totals['kept_by_all']:,} "
        f"(Jaccard {format_share(totals['jaccard'])}), {totals['sign_conflicts']:,} with changes of both signs"
    )
    if totals["errors"] is not None:
        errors = ", ".join(f"{task} {format_share(e)}" for task, e in zip(tasks, totals["errors"], strict=True))
        say(f"mean layer error against each tuned model: {errors}")
    if report.distillation is not None:
        show_distillation(report.distillation)
    for method, count in totals["methods"].items():
        if method != report.options["method"]:
            say(f"{count} tensors by {method}", err=True)
    if totals["damped_further"]:
        say(f"damped further than asked: {', '.join(totals['damped_further'])}", err=True)
    show_reasons(reasons(report.tensors), "left at base")


def show_score(report: PatchReport, every_tensor: bool) -> None:
    """What the masks would capture, by kind of layer and by depth, or tensor by tensor with the scores' quantiles."""
    from tailorcli.display.summary import report_summary
    from tailorcli.display.tables import quantile_table, tensor_table

    if every_tensor:
        print_rich(tensor_table(report, errors=False), quantile_table(report))
    else:
        print_rich(*report_summary(report), "every tensor, and the quantiles of the scores: --tensors")
    show_kept(report.totals)


def show_kept(totals: dict[str, Any]) -> None:
    """How much of the tuned model's change the masks keep."""
    from tailorcli.units import format_share

    say(
        f"kept {totals['kept']:,} of {totals['numel']:,} weights ({format_share(totals['density'])}), which hold "
        f"{format_share(totals['delta_share_kept'])} of the squared change"
    )
