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
from tailorcli.options import CalibrateOptions, PatchOptions, parse_size

if TYPE_CHECKING:
    from tailorcli.plan import Plan

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
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Include = Annotated[list[str] | None, typer.Option(help="Only tensors whose name matches this glob; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="No tensor whose name matches this glob; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of tailorcli.")]
AllowDtype = Annotated[
    bool, typer.Option("--allow-dtype-mismatch", help="TUNED may be stored in another dtype than BASE.")
]


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
    from tailorcli.patch import score_checkpoint, write_report
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
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the patched checkpoint.")],
    stats: StatsIn = None,
    density: Density = 0.1,
    omega: Omega = 0.5,
    solver: Annotated[str, typer.Option(help="joint (exact), sequential (the paper's sweep) or none.")] = "joint",
    damping: Damping = 0.01,
    block_size: Annotated[int, typer.Option(help="Columns per block of the sequential solver.")] = 128,
    tolerance: Annotated[float, typer.Option(help="Relative residual at which the joint solver stops.")] = 1e-4,
    max_iterations: Annotated[int, typer.Option(help="Cap on the joint solver's iterations.")] = 300,
    device: Device = "auto",
    include: Include = None,
    exclude: Exclude = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Shard anew, such as 5GB; else the shards are the base's.")
    ] = None,
    allow_dtype_mismatch: AllowDtype = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")
    ] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan and its cost.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the base with the best entries of TUNED in it, compensated for those put back.

    OUT loads with from_pretrained. Everything is checked before the work starts; an interrupted run leaves nothing
    that loads, and --resume finishes it to the same bytes.
    """
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
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run or not as_json:
        plan = plan_patch(base, tuned, output, stats, options)
        if dry_run:
            _show_plan(plan, output, as_json)
            return
        typer.echo(_cost(plan, output), err=True)
        if not ((base if is_adapter(tuned) else tuned) / "config.json").exists():
            typer.echo(f"note: {tuned} has no config.json, so {output} will not load with from_pretrained", err=True)
    report = patch_checkpoint(base, tuned, output, stats, options, progress=not as_json)
    if as_json:
        _print_json({"output": str(output), **report.to_dict(), "stages": report.stages, "seconds": report.seconds})
        return
    _show_summary(report.to_dict(), output, report.seconds)


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


def _cost(plan: Plan, output: Path) -> str:
    """One line before the work starts."""
    from tailorcli.report import format_bytes

    return (
        f"patching {len(plan.patched)} tensors, leaving {len(plan.left_at_base)} at base: "
        f"{format_bytes(plan.read_bytes)} to read, {format_bytes(plan.write_bytes)} to write to {output} "
        f"({format_bytes(plan.free_bytes(output))} free), about {format_bytes(plan.peak_bytes)} of memory at the peak"
    )


def _show_plan(plan: Plan, output: Path, as_json: bool) -> None:
    if as_json:
        _print_json({**plan.to_dict(), "free_bytes": plan.free_bytes(output)})
        return
    from tailorcli.show import plan_table

    _print_rich(plan_table(plan))
    typer.echo(_cost(plan, output))
    typer.echo("dry run: nothing was written", err=True)


def _show_summary(report: dict[str, Any], output: Path, seconds: float) -> None:
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
    typer.echo(f"wrote {output} in {seconds:.1f} s; per tensor: tailorcli inspect {output}")


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
