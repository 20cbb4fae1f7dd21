"""The command line: parse, make one call of the API, show what it returned.

Data goes to standard output; progress, notes and errors go to standard error.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tailorcli import __version__
from tailorcli.errors import TailorError
from tailorcli.options import CalibrateOptions, MergeOptions, PatchOptions, parse_size

if TYPE_CHECKING:
    from tailorcli.plan import Plan
    from tailorcli.report import PatchReport

app = typer.Typer(
    name="tailorcli",
    help="Fine-tune a large model, then get back what it forgot: keep the best tenth of the fine-tuned entries, "
    "compensate them, put everything else back (Model Tailor, ICML 2024).",
    epilog="The main job: tailorcli calibrate TUNED --data FILE -o STATS; "
    "tailorcli patch BASE TUNED --stats STATS -o OUT. To see it work offline: tailorcli demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Command = TypeVar("Command", bound=Callable[..., Any])


def friendly_errors(command: Command) -> Command:
    """Show a TailorError as one message and exit with 1; anything else is a bug and keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except TailorError as error:
            typer.secho(f"error: {error.message}", err=True, fg=typer.colors.RED)
            if error.hint:
                typer.echo(f"  try: {error.hint}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted; what patch had written can be finished with --resume", err=True)
            raise typer.Exit(130) from None

    return wrapped  # type: ignore[return-value]


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"tailorcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Model Tailor from the shell."""


# Arguments and options that several commands share.
Base = Annotated[Path, typer.Argument(metavar="BASE", help="Folder of the pre-trained checkpoint (safetensors).")]
Tuned = Annotated[Path, typer.Argument(metavar="TUNED", help="Folder of the fine-tuned checkpoint, or adapter.")]
StatsIn = Annotated[
    Path | None,
    typer.Option("--stats", help="Folder made by calibrate; may be left out with --omega 1 (and --solver none)."),
]
Density = Annotated[float, typer.Option(help="Fraction of each tensor's entries to keep from TUNED, 0 to 1.")]
Omega = Annotated[float, typer.Option(help="Weight of salience |dW| against sensitivity in the score, 0 to 1.")]
Damping = Annotated[float, typer.Option(help="Added to the Hessian's diagonal, as a multiple of its mean.")]
Tolerance = Annotated[float, typer.Option(help="Relative residual at which the joint solver stops.")]
MaxIterations = Annotated[int, typer.Option(help="Cap on the joint solver's iterations.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Include = Annotated[list[str] | None, typer.Option(help="Only tensors whose name matches this glob; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="No tensor whose name matches this glob; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of tailorcli.")]
AllowDtype = Annotated[
    bool, typer.Option("--allow-dtype-mismatch", help="TUNED may be stored in another dtype than BASE.")
]

OutFolder = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder for the patched checkpoint.")
]
PatchOut = Annotated[
    Path | None,
    typer.Option("--patch-file", metavar="FILE.safetensors", help="Write the kept entries here; with -o or without."),
]
PatchIn = Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file of a task.")]
MaxShardSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Shard anew, such as 5GB; else the shards are the base's.")
]
Task = Annotated[str | None, typer.Option(help="Name of the task, for the patch file.")]
License = Annotated[str | None, typer.Option("--license", help="Licence of the patch, for the patch file.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan and its cost.")]


@app.command()
@friendly_errors
def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the fine-tuned checkpoint or adapter.")],
    data: Annotated[
        Path, typer.Option(help="New-task data: .jsonl or .json (text, messages, or prompt and response), or .txt.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STATS", help="Folder for the statistics.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of the pre-trained checkpoint, where MODEL is a LoRA adapter.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples to draw from the data.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sample at most; longer ones are cut.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Samples in a forward pass: memory and speed, not the result.")] = 8,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Run the model in float32, bfloat16, float16; auto: as stored.")] = "auto",
    include: Include = None,
    exclude: Exclude = None,
    text_mode: Annotated[str, typer.Option(help=".txt: a document a 'line', or 'chunk's of --seq-len.")] = "line",
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Run the fine-tuned model over new-task data and store a Hessian for every parameter.

    The Hessians say which inputs matter to each layer; score and patch read them. Needs no old data.
    """
    from tailorcli.calibrate import calibrate_model
    from tailorcli.report import format_bytes

    options = CalibrateOptions(
        num_samples=num_samples,
        seq_len=seq_len,
        batch_size=batch_size,
        device=device,
        dtype=dtype,  # type: ignore[arg-type]  # checked by the dataclass
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        text_mode=text_mode,  # type: ignore[arg-type]
        seed=seed,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    report = calibrate_model(model, data, output, options, progress=not as_json, base=base)
    if as_json:
        _print_json(report.to_dict())
        return
    typer.echo(
        f"{report.samples} samples, {report.tokens:,} tokens: {report.hessians} Hessians for {report.calibrated} "
        f"tensors in {output} ({format_bytes(report.bytes)}, {report.seconds:.1f} s)"
    )
    _show_reasons(report.uncalibrated, "without statistics")
    typer.echo(f"next: tailorcli patch {base or 'BASE'} {model} --stats {output} -o OUT", err=True)


@app.command()
@friendly_errors
def score(
    base: Base,
    tuned: Tuned,
    stats: StatsIn = None,
    density: Density = 0.1,
    omega: Omega = 0.5,
    damping: Damping = 0.01,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="REPORT.json", help="Also write the report here.")
    ] = None,
    device: Device = "auto",
    include: Include = None,
    exclude: Exclude = None,
    allow_dtype_mismatch: AllowDtype = False,
    as_json: AsJson = False,
) -> None:
    """Show what a mask would capture, tensor by tensor, before patching. Writes no checkpoint."""
    from tailorcli.outputs import write_report
    from tailorcli.patch import score_checkpoint
    from tailorcli.report import tensor_table

    options = PatchOptions(
        density=density,
        omega=omega,
        solver="none",
        damping=damping,
        device=device,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        allow_dtype_mismatch=allow_dtype_mismatch,
    )
    report = score_checkpoint(base, tuned, stats, options, progress=not as_json)
    if output is not None:
        write_report(report, output)
    if as_json:
        _print_json(report.to_dict())
        return
    _print_rich(tensor_table(report.to_dict(), errors=False))
    _show_quantiles(report.to_dict())
    _show_reasons(_reasons(report.tensors), "left at base")


@app.command()
@friendly_errors
def patch(
    base: Base,
    tuned: Tuned,
    output: OutFolder = None,
    patch_file: PatchOut = None,
    stats: StatsIn = None,
    density: Density = 0.1,
    omega: Omega = 0.5,
    solver: Annotated[str, typer.Option(help="joint (exact), sequential (the paper's sweep) or none.")] = "joint",
    damping: Damping = 0.01,
    block_size: Annotated[int, typer.Option(help="Columns per block of the sequential solver.")] = 128,
    tolerance: Tolerance = 1e-4,
    max_iterations: MaxIterations = 300,
    device: Device = "auto",
    include: Include = None,
    exclude: Exclude = None,
    max_shard_size: MaxShardSize = None,
    allow_dtype_mismatch: AllowDtype = False,
    task: Task = None,
    license_: License = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write the base with the best entries of TUNED in it, compensated for those put back.

    OUT loads with from_pretrained; a patch file holds the kept entries alone. Everything is checked before the work
    starts; an interrupted run leaves nothing that loads, and --resume finishes it to the same bytes.
    """
    _require_output(output, patch_file)
    from tailorcli.adapter import is_adapter
    from tailorcli.patch import patch_checkpoint, plan_patch

    options = PatchOptions(
        density=density,
        omega=omega,
        solver=solver,  # type: ignore[arg-type]  # checked by the dataclass
        damping=damping,
        block_size=block_size,
        tolerance=tolerance,
        max_iterations=max_iterations,
        device=device,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        max_shard_size=parse_size(max_shard_size) if max_shard_size else None,
        allow_dtype_mismatch=allow_dtype_mismatch,
        task=task,
        license=license_,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run or not as_json:
        plan = plan_patch(base, tuned, output, stats, options, patch_file)
        if dry_run:
            _show_plan(plan, output, patch_file, as_json)
            return
        typer.echo(_cost(plan, output, patch_file), err=True)
        if output is not None and not ((base if is_adapter(tuned) else tuned) / "config.json").exists():
            typer.echo(f"note: {tuned} has no config.json, so {output} will not load with from_pretrained", err=True)
    report = patch_checkpoint(base, tuned, output, stats, options, progress=not as_json, patch_file=patch_file)
    if as_json:
        _print_report(report, output, patch_file)
        return
    _show_summary(report.to_dict())
    _show_written(output, patch_file, report.seconds)


@app.command()
@friendly_errors
def apply(
    base: Base,
    patch_path: PatchIn,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the patched checkpoint.")],
    max_shard_size: MaxShardSize = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write the checkpoint that a patch file makes of its base: to the byte what patch -o writes.

    Refuses a base that is not the one the patch was made for.
    """
    from tailorcli.apply import apply_patch, plan_apply

    size = parse_size(max_shard_size) if max_shard_size else None
    if dry_run:
        plan = plan_apply(base, patch_path, output, max_shard_size=size, resume=resume, overwrite=overwrite)
        _show_plan(plan, output, None, as_json)
        return
    report = apply_patch(
        base,
        patch_path,
        output,
        max_shard_size=size,
        resume=resume,
        overwrite=overwrite,
        progress=not as_json,
    )
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        _print_report(report, output, None)
        return
    totals = report.totals
    typer.echo(f"changed {totals['kept']:,} entries in {totals['tensors_patched']} tensors")
    _show_written(output, None, report.seconds)


@app.command("merge-multi")
@friendly_errors
def merge_multi(
    base: Base,
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH...", help="Patch files of the tasks, on one BASE.")],
    output: OutFolder = None,
    patch_file: PatchOut = None,
    tuned: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A task's fine-tuned checkpoint; repeat for each task.")
    ] = None,
    stats: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A task's statistics (calibrate); repeat for each task.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="average (Eq. 14, 15), joint (one optimum for all tasks), or patches (no other input).")
    ] = "average",
    weight: Annotated[
        list[float] | None, typer.Option(metavar="W", help="Weight of a task; once for each PATCH, in their order.")
    ] = None,
    damping: Damping = 0.01,
    tolerance: Tolerance = 1e-4,
    max_iterations: MaxIterations = 300,
    device: Device = "auto",
    max_shard_size: MaxShardSize = None,
    task: Task = None,
    license_: License = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Stitch the patches of several tasks into one model by the union of their masks.

    average needs --tuned for each task, joint also --stats, patches neither. Each is found its patch by fingerprint.
    """
    from tailorcli.merge import merge_patches, plan_merge

    _require_output(output, patch_file)
    options = MergeOptions(
        method=method,  # type: ignore[arg-type]  # checked by the dataclass
        weights=tuple(weight or ()),
        damping=damping,
        tolerance=tolerance,
        max_iterations=max_iterations,
        device=device,
        max_shard_size=parse_size(max_shard_size) if max_shard_size else None,
        task=task,
        license=license_,
        resume=resume,
        overwrite=overwrite,
    )
    inputs = (tuple(tuned or ()), tuple(stats or ()))
    if dry_run:
        _show_plan(plan_merge(base, patches, output, *inputs, options, patch_file), output, patch_file, as_json)
        return
    report = merge_patches(base, patches, output, *inputs, options, progress=not as_json, patch_file=patch_file)
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        _print_report(report, output, patch_file)
        return
    _show_merge(report.to_dict())
    _show_written(output, patch_file, report.seconds)


@app.command()
@friendly_errors
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the checkpoint to verify.")],
    base: Annotated[Path, typer.Option("--base", help="Folder of the pre-trained checkpoint.")],
    patch_path: Annotated[
        Path | None, typer.Option("--patch", metavar="PATCH", help="Patch file that was applied; else OUT's report.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prove that OUT is BASE with PATCH applied: bit for bit, inside the masks and outside. Exit code 1 if not."""
    from tailorcli.apply import verify_checkpoint
    from tailorcli.show import problem_table

    report = verify_checkpoint(checkpoint, base, patch_path, progress=not as_json)
    if as_json:
        _print_json(report.to_dict())
    elif report.ok:
        typer.echo(
            f"{checkpoint} is right: {report.tensors} tensors, {report.entries:,} entries, of which "
            f"{report.changed:,} differ from the base"
            + (", all as the patch says" if patch_path else f"; at most {report.kept:,} may (which: pass --patch)")
        )
    else:
        typer.secho(f"error: {checkpoint} is not what it should be: {report.wrong_tensors} wrong", err=True, fg="red")
        _print_rich(problem_table(report.problems))
    if not report.ok:
        raise typer.Exit(1)


@app.command("inspect")
@friendly_errors
def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Statistics, a report, or any checkpoint folder.")],
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it, too (needs tailorcli[plot]).")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a path is and show its figures."""
    from tailorcli.inspection import inspect_path

    inspection = inspect_path(path)
    if plot is not None:
        from tailorcli.plots import plot_inspection

        plot_inspection(inspection, plot)
        typer.echo(f"drew {plot}", err=True)
    if as_json:
        _print_json(inspection.to_dict())
        return
    from tailorcli.show import inspection_parts

    _print_rich(*inspection_parts(inspection))


@app.command()
@friendly_errors
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to keep.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A much smaller run, to see that everything works.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in DIR.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a small model forget and be patched: offline, on real text, in about two minutes.

    Trains a small Llama on old tasks, fine-tunes it on a new one, calibrates, patches and compares with plain
    interpolation. The checkpoints stay in DIR to go on with.
    """
    from tailorcli.demo import follow_up_commands, render_demo, run_demo

    report = run_demo(output, seed=seed, quick=quick, overwrite=overwrite, progress=not as_json)
    if as_json:
        _print_json(report.to_dict())
        return
    _print_rich(render_demo(report))
    typer.echo("The checkpoints are yours to go on with:")
    for line in follow_up_commands(report):
        typer.echo(f"  {line}")


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def _print_rich(*parts: Any) -> None:
    """Tables to standard output; wide ones stay whole when the output is no terminal."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=200)
    for part in parts:
        console.print(part)


def _reasons(tensors: list[dict[str, Any]]) -> dict[str, str]:
    return {tensor["name"]: tensor["reason"] for tensor in tensors if tensor["status"] != "patched"}


def _show_reasons(reasons: dict[str, str], what: str) -> None:
    """Every tensor that was not patched or not calibrated, gathered by reason: never silently."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        typer.echo(f"{what}: {len(names)} ({reason}): {', '.join(names[:4])}{more}", err=True)


def _require_output(output: Path | None, patch_file: Path | None) -> None:
    if output is None and patch_file is None:
        raise typer.BadParameter("pass --output OUT, --patch-file FILE.safetensors, or both")


def _cost(plan: Plan, output: Path | None, patch_file: Path | None) -> str:
    """One line before the work starts."""
    from tailorcli.outputs import free_bytes
    from tailorcli.report import format_bytes

    writes = []
    if output is not None:
        writes.append(f"{format_bytes(plan.write_bytes)} to {output} ({format_bytes(free_bytes(output))} free)")
    if patch_file is not None:
        writes.append(f"at most {format_bytes(plan.patch_bytes)} to {patch_file}")
    return (
        f"patching {len(plan.patched)} tensors, leaving {len(plan.left_at_base)} at base: "
        f"{format_bytes(plan.read_bytes)} to read, to write {' and '.join(writes)}, "
        f"about {format_bytes(plan.peak_bytes)} of memory at the peak"
    )


def _show_plan(plan: Plan, output: Path | None, patch_file: Path | None, as_json: bool) -> None:
    from tailorcli.outputs import free_bytes

    if as_json:
        where = output or patch_file or Path()
        _print_json({**plan.to_dict(), "free_bytes": free_bytes(where)})
        return
    from tailorcli.show import plan_table

    _print_rich(plan_table(plan))
    typer.echo(_cost(plan, output, patch_file))
    typer.echo("dry run: nothing was written", err=True)


def _print_report(report: PatchReport, output: Path | None, patch_file: Path | None) -> None:
    """The report as JSON, with where it was written and how long it took."""
    paths = {"output": output, "patch_file": patch_file}
    where = {key: str(path) for key, path in paths.items() if path is not None}
    _print_json({**where, **report.to_dict(), "stages": report.stages, "seconds": report.seconds})


def _show_written(output: Path | None, patch_file: Path | None, seconds: float) -> None:
    """The last lines: what was written, and what to look at next."""
    from tailorcli.report import format_bytes

    if patch_file is not None:
        size = format_bytes(patch_file.stat().st_size)
        typer.echo(f"wrote {patch_file} ({size}); apply it: tailorcli apply BASE {patch_file} -o OUT")
    if output is not None:
        typer.echo(f"wrote {output}; per tensor: tailorcli inspect {output}")
    typer.echo(f"{seconds:.1f} s", err=True)


def _show_summary(report: dict[str, Any]) -> None:
    from tailorcli.report import format_share

    totals = report["totals"]
    typer.echo(
        f"kept {totals['kept']:,} of {totals['numel']:,} entries ({format_share(totals['density'])}), which hold "
        f"{format_share(totals['delta_share_kept'])} of the squared change"
    )
    if totals["error_before"] is not None:
        typer.echo(
            f"mean layer error against the tuned model: {format_share(totals['error_before'])} before compensation, "
            f"{format_share(totals['error_after'])} after ({report['options']['solver']})"
        )
    if totals["damped_further"]:
        typer.echo(f"damped further than asked: {', '.join(totals['damped_further'])}", err=True)
    _show_reasons(_reasons(report["tensors"]), "left at base")


def _show_merge(report: dict[str, Any]) -> None:
    from tailorcli.report import format_share

    totals, tasks = report["totals"], report["options"]["tasks"]
    kept = ", ".join(f"{task} {count:,}" for task, count in zip(tasks, totals["kept_by"], strict=True))
    typer.echo(
        f"merged {len(tasks)} tasks ({report['options']['method']}): {totals['kept']:,} of {totals['numel']:,} entries "
        f"({format_share(totals['density'])}); kept by {kept}; by all {totals['kept_by_all']:,} "
        f"(Jaccard {format_share(totals['jaccard'])}), {totals['sign_conflicts']:,} with changes of both signs"
    )
    if totals["errors"] is not None:
        errors = ", ".join(f"{task} {format_share(e)}" for task, e in zip(tasks, totals["errors"], strict=True))
        typer.echo(f"mean layer error against each tuned model: {errors}")
    for method, count in totals["methods"].items():
        if method != report["options"]["method"]:
            typer.echo(f"{count} tensors by {method}", err=True)
    if totals["damped_further"]:
        typer.echo(f"damped further than asked: {', '.join(totals['damped_further'])}", err=True)
    _show_reasons(_reasons(report["tensors"]), "left at base")


def _show_quantiles(report: dict[str, Any]) -> None:
    from tailorcli.show import quantile_table

    _print_rich(quantile_table(report))


def main() -> None:
    """The console script."""
    # Read by OpenMP when torch loads: threads that wait sleep rather than spin. Spinning takes the cores from the
    # threads that read and write, and from whatever else the machine does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


if __name__ == "__main__":
    main()
