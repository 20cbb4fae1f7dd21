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
from tailorcli.units import counted, format_bytes, format_share

if TYPE_CHECKING:
    from tailorcli.patchfile.records import TensorRecord
    from tailorcli.patchfile.report import PatchReport


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


def print_report(report: PatchReport, output: Path | None, patch_file: Path | None) -> None:
    """The report as JSON, with where it was written and how long it took."""
    paths = {"output": output, "patch_file": patch_file}
    where = {key: str(path) for key, path in paths.items() if path is not None}
    ranks = {"ranks": list(report.ranks)} if report.ranks else {}
    print_json({**where, **report.to_dict(), **ranks, "stages": report.stages, "seconds": report.seconds})


def show_written(output: Path | None, patch_file: Path | None, report: PatchReport) -> None:
    """The last lines: what was written, and what to look at next; or that all was there already."""
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
    errors = began.get("errors") or [began[name] for name in ("error_after",) if name in began]
    texts = [f"mean layer errors of {', '.join(map(format_share, errors))}"] if errors else []
    texts += [f"a mean drift of {format_share(began['drift'])}"] if "drift" in began else []
    return " and ".join(texts)


def show_merge(report: PatchReport) -> None:
    """The totals of a merge in a few lines."""
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
    say(
        f"kept {totals['kept']:,} of {totals['numel']:,} weights ({format_share(totals['density'])}), which hold "
        f"{format_share(totals['delta_share_kept'])} of the squared change"
    )
