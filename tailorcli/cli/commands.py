"""The command line: parse, make one call of the API, show what it returned.

Data goes to standard output; progress, notes and errors go to standard error.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tailorcli._version import __version__
from tailorcli.cli.options import (
    AllowDtype,
    AsJson,
    Base,
    Damping,
    Density,
    Device,
    DryRun,
    Exclude,
    Include,
    License,
    MaxIterations,
    MaxShardSize,
    NoPropagate,
    Omega,
    OutFolder,
    Overwrite,
    OwnDamping,
    OwnDensity,
    OwnOmega,
    PatchIn,
    PatchOut,
    ResizedVocab,
    Resume,
    RetainIn,
    RetainWeight,
    StatsIn,
    Task,
    Tolerance,
    Tuned,
)
from tailorcli.cli.output import (
    print_json,
    print_report,
    print_rich,
    reasons,
    require_output,
    require_source,
    say,
    say_error,
    show_cost,
    show_merge,
    show_plan,
    show_quantiles,
    show_reasons,
    show_summary,
    show_written,
)
from tailorcli.errors import TailorError
from tailorcli.options import CalibrateOptions, MergeOptions, PatchOptions, with_preset
from tailorcli.terminal import guard_streams
from tailorcli.units import parse_size

if TYPE_CHECKING:
    pass

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
            say_error(error.message, error.hint)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            resumable = "resume" in inspect.signature(command).parameters
            say("interrupted" + ("; where it had begun to write, --resume finishes it" if resumable else ""), err=True)
            raise typer.Exit(130) from None

    return wrapped  # type: ignore[return-value]


def _version(shown: bool) -> None:
    if shown:
        say(f"tailorcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Model Tailor from the shell."""


@app.command()
@friendly_errors
def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the fine-tuned checkpoint or adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STATS", help="Folder for the statistics.")],
    data: Annotated[
        Path | None,
        typer.Option(help="New-task data: .jsonl, .json (text, messages, prompt and response; images), .txt."),
    ] = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="MODEL writes its own samples, going on from --data where given.")
    ] = False,
    held_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="With --synthetic: half as many more samples, as a task for sweep."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the pre-trained checkpoint, where MODEL is a LoRA adapter.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples to draw from the data.")] = 128,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a sample at most: 2048, with --synthetic 256.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in a forward pass: memory and speed, not the result.")] = 8,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Run the model in float32, bfloat16, float16; auto: as stored.")] = "auto",
    include: Include = None,
    exclude: Exclude = None,
    text_mode: Annotated[str, typer.Option(help=".txt: a document a 'line', or 'chunk's of --seq-len.")] = "line",
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    blockwise: Annotated[
        str, typer.Option(help="Load one block of the model at a time: always, never; auto: if it does not fit.")
    ] = "auto",
    no_samples: Annotated[
        bool, typer.Option("--no-samples", help="Keep no samples in STATS; patch then needs --no-propagate.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Run the fine-tuned model over new-task data and store a Hessian for every parameter.

    The Hessians say which inputs matter to each layer; score and patch read them. Needs no old data. Of the base, with
    --synthetic or data that stand for what it must not forget, they are what patch --retain takes.
    """
    require_source(data, synthetic)
    from tailorcli.calibration.calibrate import calibrate_model
    from tailorcli.units import format_bytes

    options = CalibrateOptions(
        num_samples=num_samples,
        seq_len=seq_len,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        text_mode=text_mode,
        seed=seed,
        trust_remote_code=trust_remote_code,
        blockwise=blockwise,
        overwrite=overwrite,
        synthetic=synthetic,
        keep_samples=not no_samples,
    )
    report = calibrate_model(
        model,
        data,
        output,
        options,
        progress=not as_json,
        base=base,
        announce=None if as_json else partial(say, err=True),
        held_out=held_out,
    )
    if as_json:
        print_json(report.to_dict())
        return
    whose = " that the model wrote itself" if synthetic else ""
    say(
        f"{report.samples} samples{whose}, {report.tokens:,} tokens: {report.hessians} Hessians for "
        f"{report.calibrated} tensors in {output} ({format_bytes(report.bytes)}, {report.seconds:.1f} s)"
    )
    show_reasons(report.uncalibrated, "without statistics")
    show_reasons(report.notes, "note")
    if synthetic:
        say(f"next: tailorcli patch {model} TUNED --stats STATS --retain {output} -o OUT", err=True)
    else:
        say(f"next: tailorcli patch {base or 'BASE'} {model} --stats {output} -o OUT", err=True)


@app.command()
@friendly_errors
def score(
    base: Base,
    tuned: Tuned,
    stats: StatsIn = None,
    retain: RetainIn = None,
    retain_weight: RetainWeight = 0.3,
    density: Density = 0.1,
    omega: Omega = 0.5,
    damping: OwnDamping = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="REPORT.json", help="Also write the report here.")
    ] = None,
    device: Device = "auto",
    include: Include = None,
    exclude: Exclude = None,
    allow_dtype_mismatch: AllowDtype = False,
    resized_vocab: ResizedVocab = False,
    as_json: AsJson = False,
) -> None:
    """Show what a mask would capture, tensor by tensor, before patching. Writes no checkpoint."""
    from tailorcli.display.tables import tensor_table
    from tailorcli.patching.patch import score_checkpoint
    from tailorcli.runs.outputs import write_report

    options = PatchOptions(
        density=density,
        omega=omega,
        retain_weight=retain_weight,
        solver="none",
        damping=damping,
        device=device,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        allow_dtype_mismatch=allow_dtype_mismatch,
        resized_vocab=resized_vocab,
    )
    report = score_checkpoint(base, tuned, stats, options, progress=not as_json, retain=retain)
    if output is not None:
        write_report(report, output)
    if as_json:
        print_json(report.to_dict())
        return
    print_rich(tensor_table(report.to_dict(), errors=False))
    show_quantiles(report.to_dict())
    show_reasons(reasons(report.tensors), "left at base")


@app.command()
@friendly_errors
def patch(
    base: Base,
    tuned: Tuned,
    output: OutFolder = None,
    patch_file: PatchOut = None,
    stats: StatsIn = None,
    retain: RetainIn = None,
    retain_weight: RetainWeight = 0.3,
    no_propagate: NoPropagate = False,
    density: OwnDensity = None,
    omega: OwnOmega = None,
    solver: Annotated[
        str | None, typer.Option(help="joint (exact), sequential (the paper's sweep) or none. Default joint.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper: density, omega, solver, damping and block size of the paper.")
    ] = None,
    damping: OwnDamping = None,
    block_size: Annotated[
        int | None, typer.Option(help="Columns per block of the sequential solver. Default 128.")
    ] = None,
    tolerance: Tolerance = 1e-4,
    max_iterations: MaxIterations = 300,
    method: Annotated[
        str,
        typer.Option(help="tailor, or to compare with: interpolate (WiSE-FT), dare, magnitude (TIES), graft."),
    ] = "tailor",
    weight: Annotated[
        float | None,
        typer.Option(help="Share of the way from BASE that the kept entries go. [default: 1; interpolate: 0.5]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which entries dare draws, and samples graft.")] = 0,
    threshold: Annotated[
        str, typer.Option(help="magnitude, graft: the top of each 'tensor', or of all ('global').")
    ] = "tensor",
    data: Annotated[Path | None, typer.Option(help="What graft trains its mask on: the fine-tuning data.")] = None,
    graft_steps: Annotated[int, typer.Option(help="Steps of graft's training.")] = 100,
    graft_rate: Annotated[float, typer.Option(help="How far a step moves a mask's logits, root mean square.")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Samples in a step of graft.")] = 8,
    device: Device = "auto",
    include: Include = None,
    exclude: Exclude = None,
    max_shard_size: MaxShardSize = None,
    allow_dtype_mismatch: AllowDtype = False,
    resized_vocab: ResizedVocab = False,
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
    require_output(output, patch_file)
    from tailorcli.adapters.checkpoint import is_adapter
    from tailorcli.patching.patch import patch_checkpoint, plan_patch

    if preset is not None and retain is not None:
        raise typer.BadParameter("--preset paper has no retain term: leave --retain out")
    own = {"density": density, "omega": omega, "solver": solver, "damping": damping, "block_size": block_size}
    options = PatchOptions(
        **with_preset(preset, **own),
        retain_weight=retain_weight,
        propagate=False if no_propagate else None,
        tolerance=tolerance,
        max_iterations=max_iterations,
        method=method,
        weight=weight,
        seed=seed,
        threshold=threshold,
        graft_steps=graft_steps,
        graft_rate=graft_rate,
        batch_size=batch_size,
        device=device,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        max_shard_size=parse_size(max_shard_size) if max_shard_size else None,
        allow_dtype_mismatch=allow_dtype_mismatch,
        resized_vocab=resized_vocab,
        task=task,
        license=license_,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run:
        show_plan(
            plan_patch(base, tuned, output, stats, options, patch_file, retain, data), output, patch_file, as_json
        )
        return
    if output is not None and not ((base if is_adapter(tuned) else tuned) / "config.json").exists():
        say(f"note: {tuned} has no config.json, so {output} will not load with from_pretrained", err=True)
    report = patch_checkpoint(
        base,
        tuned,
        output,
        stats,
        options,
        progress=not as_json,
        patch_file=patch_file,
        announce=None if as_json else partial(show_cost, output=output, patch_file=patch_file),
        retain=retain,
        data=data,
    )
    if as_json:
        print_report(report, output, patch_file)
        return
    show_summary(report.to_dict())
    show_reasons({record["name"]: record["note"] for record in report.tensors if "note" in record}, "note")
    show_written(output, patch_file, report.seconds)


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
    from tailorcli.patching.apply import apply_patch, plan_apply

    size = parse_size(max_shard_size) if max_shard_size else None
    if dry_run:
        plan = plan_apply(base, patch_path, output, max_shard_size=size, resume=resume, overwrite=overwrite)
        show_plan(plan, output, None, as_json)
        return
    report = apply_patch(
        base,
        patch_path,
        output,
        max_shard_size=size,
        resume=resume,
        overwrite=overwrite,
        progress=not as_json,
        announce=None if as_json else partial(show_cost, output=output, patch_file=None),
    )
    for note in report.notes:
        say(f"note: {note}", err=True)
    if as_json:
        print_report(report, output, None)
        return
    totals = report.totals
    say(f"changed {totals['kept']:,} entries in {totals['tensors_patched']} tensors")
    show_written(output, None, report.seconds)


@app.command("merge-multi")
@friendly_errors
def merge_multi(
    base: Base,
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH", help="Patch files of the tasks, on one BASE.")],
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

    average needs --tuned for each task, joint also --stats, patches neither; fingerprints tell which belongs to which.
    """
    from tailorcli.merging.merge import merge_patches, plan_merge

    require_output(output, patch_file)
    options = MergeOptions(
        method=method,
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
        show_plan(plan_merge(base, patches, output, *inputs, options, patch_file), output, patch_file, as_json)
        return
    report = merge_patches(
        base,
        patches,
        output,
        *inputs,
        options,
        progress=not as_json,
        patch_file=patch_file,
        announce=None if as_json else partial(show_cost, output=output, patch_file=patch_file),
    )
    for note in report.notes:
        say(f"note: {note}", err=True)
    if as_json:
        print_report(report, output, patch_file)
        return
    show_merge(report.to_dict())
    show_written(output, patch_file, report.seconds)


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
    from tailorcli.display.tables import problem_table
    from tailorcli.patching.verify import verify_checkpoint

    report = verify_checkpoint(checkpoint, base, patch_path, progress=not as_json)
    if as_json:
        print_json(report.to_dict())
    elif report.ok:
        say(
            f"{checkpoint} is right: {report.tensors} tensors, {report.entries:,} entries, of which "
            f"{report.changed:,} differ from the base"
            + (", all as the patch says" if patch_path else f"; at most {report.kept:,} may (which: pass --patch)")
        )
    else:
        count = f"{report.wrong_tensors} wrong, {len(report.problems)} of them listed"
        say_error(f"{checkpoint} is not what it should be: {count}")
        print_rich(problem_table(report.problems))
    if not report.ok:
        raise typer.Exit(1)


@app.command("inspect")
@friendly_errors
def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Statistics, a report, a patch file, any checkpoint.")],
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it, too (needs matplotlib).")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a path is and show its figures."""
    from tailorcli.display.inspection import inspect_path

    inspection = inspect_path(path)
    if plot is not None:
        from tailorcli.display.plots import plot_inspection

        plot_inspection(inspection, plot)
        say(f"drew {plot}", err=True)
    if as_json:
        print_json(inspection.to_dict())
        return
    from tailorcli.display.tables import inspection_parts

    print_rich(*inspection_parts(inspection))


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
    from tailorcli.demo.demo import follow_up_commands, render_demo, run_demo

    report = run_demo(output, seed=seed, quick=quick, overwrite=overwrite, progress=not as_json)
    if as_json:
        print_json(report.to_dict())
        return
    print_rich(render_demo(report))
    say("The checkpoints are yours to go on with:")
    for line in follow_up_commands(report):
        say(f"  {line}")


def main() -> None:
    """The console script."""
    # Read by OpenMP when torch loads: threads that wait sleep rather than spin. Spinning takes the cores from the
    # threads that read and write, and from whatever else the machine does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    guard_streams()
    try:
        app()
    finally:
        sys.stdout.flush()  # here, where a failure is an exit code and no traceback
