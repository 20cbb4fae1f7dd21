"""The commands that calibrate, score, patch and inspect, and the demo.

Each parses, makes one call of the API, and shows what it returned.
Data goes to standard output; progress, notes and errors go to standard error.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tailorcli.cli.arguments import (
    DISTILL,
    OTHERS,
    OUTPUT,
    RUNNING,
    SOLVER,
    AllowDtype,
    AsJson,
    Base,
    BatchSize,
    Density,
    Device,
    DryRun,
    DType,
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
    PatchOut,
    Plot,
    Quiet,
    ResizedVocab,
    Resume,
    RetainIn,
    RetainWeight,
    SolverChoice,
    StatsIn,
    Task,
    Tensors,
    Tolerance,
    TrustRemoteCode,
    Tuned,
    Verbose,
    flag,
)
from tailorcli.cli.output import (
    print_json,
    print_report,
    print_rich,
    reasons,
    require_output,
    require_source,
    say,
    show_cost,
    show_plan,
    show_reasons,
    show_score,
    show_stages,
    show_summary,
    show_written,
)
from tailorcli.cli.verbosity import wants_progress
from tailorcli.errors import OptionsError
from tailorcli.guard import check_plot_file, check_result
from tailorcli.options import (
    Blockwise,
    CalibrateOptions,
    DistillOptions,
    DTypeName,
    Fp8Output,
    PatchMethod,
    PatchOptions,
    Preset,
    Solver,
    TextMode,
    Threshold,
    with_preset,
)
from tailorcli.units import counted, format_bytes, parse_size


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, rather than having its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def calibrate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of the fine-tuned checkpoint, or of its LoRA adapter.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STATS", help="Folder for the statistics.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Data of the new task: .jsonl, .json or .txt."),
    ] = None,
    synthetic: Annotated[
        bool,
        flag("--synthetic", help="MODEL writes its own samples, going on from --data if given."),
    ] = False,
    held_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --synthetic: half as many more samples, as a task for sweep."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="BASE", help="Folder of the pre-trained checkpoint, if MODEL is an adapter.")
    ] = None,
    num_samples: Annotated[int, typer.Option(metavar="N", help="Samples to draw from the data.")] = 128,
    seq_len: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most tokens of a sample.", show_default="2048; with --synthetic 256"),
    ] = None,
    text_mode: Annotated[
        TextMode, typer.Option(metavar="MODE", help="A sample of a .txt: a line, or a chunk of --seq-len tokens.")
    ] = TextMode.LINE,
    seed: Annotated[int, typer.Option(metavar="N", help="Which samples are drawn.")] = 0,
    include: Include = None,
    exclude: Exclude = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: DType = DTypeName.AUTO,
    blockwise: Annotated[
        Blockwise,
        typer.Option(
            metavar="WHEN",
            help="Load one block of the model at a time: always, never; auto: if it does not fit.",
            rich_help_panel=RUNNING,
        ),
    ] = Blockwise.AUTO,
    trust_remote_code: TrustRemoteCode = False,
    no_samples: Annotated[
        bool,
        flag(
            "--no-samples",
            help="Store no samples in STATS; patch then needs --no-propagate.",
            panel=OUTPUT,
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure which inputs matter to each layer of a model, on your data.

    The statistics are what the other commands read. Of the fine-tuned model on data of the new task they are what
    patch --stats takes; no old data is needed. Of the base, with --synthetic or on data that stand for what it must
    not forget, they are what patch --retain takes.

    Examples:
      tailorcli calibrate TUNED --data train.jsonl -o stats
      tailorcli calibrate BASE --synthetic -o base-stats
    """
    require_source(data, synthetic)
    from tailorcli.calibration.calibrate import calibrate_model

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
        progress=wants_progress(as_json),
        base=base,
        announce=None if as_json else partial(say, err=True),
        held_out=held_out,
    )
    if as_json:
        print_json(report.to_dict())
        return
    whose = " that the model wrote itself" if synthetic else ""
    what = f"{counted(report.samples, 'sample')}{whose}, {counted(report.tokens, 'token')}"
    made = f"{counted(report.hessians, 'Hessian')} for {counted(report.calibrated, 'tensor')}"
    say(f"{what}: {made} in {output} ({format_bytes(report.bytes)}, {report.seconds:.1f} s)")
    show_reasons(report.uncalibrated, "without statistics")
    show_reasons(report.notes, "note")
    if synthetic:
        say(f"next: tailorcli patch {model} TUNED --stats STATS --retain {output} -o OUT", err=True)
    else:
        say(f"next: tailorcli patch {base or 'BASE'} {model} --stats {output} -o OUT", err=True)


def score(
    base: Base,
    tuned: Tuned,
    stats: StatsIn = None,
    retain: RetainIn = None,
    retain_weight: RetainWeight = 0.3,
    density: Density = 0.1,
    omega: Omega = 0.5,
    include: Include = None,
    exclude: Exclude = None,
    allow_dtype_mismatch: AllowDtype = False,
    resized_vocab: ResizedVocab = False,
    damping: OwnDamping = None,
    device: Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="REPORT.json", help="Write the report here, too.", rich_help_panel=OUTPUT
        ),
    ] = None,
    tensors: Tensors = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a patch would keep.

    Writes no checkpoint.

    Examples:
      tailorcli score BASE TUNED --stats stats
      tailorcli score BASE TUNED --stats stats --density 0.2 -o score.json
    """
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
    check_result(output, [base, tuned, stats, retain])
    report = score_checkpoint(base, tuned, stats, options, progress=wants_progress(as_json), retain=retain)
    if output is not None:
        write_report(report, output)
    if as_json:
        print_json(report.to_dict())
        return
    show_score(report, tensors)
    show_reasons(reasons(report.tensors), "left at base")


def patch(
    context: typer.Context,
    base: Base,
    tuned: Tuned,
    output: OutFolder = None,
    patch_file: PatchOut = None,
    stats: StatsIn = None,
    retain: RetainIn = None,
    retain_weight: RetainWeight = 0.3,
    no_propagate: NoPropagate = False,
    density: Density = 0.1,
    omega: Omega = 0.5,
    preset: Annotated[
        Preset | None,
        typer.Option(metavar="NAME", help="paper: the paper's density, omega, solver, damping and block size."),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    allow_dtype_mismatch: AllowDtype = False,
    resized_vocab: ResizedVocab = False,
    solver: SolverChoice = Solver.JOINT,
    damping: OwnDamping = None,
    tolerance: Tolerance = 1e-4,
    max_iterations: MaxIterations = 300,
    block_size: Annotated[
        int, typer.Option(metavar="N", help="Columns per block of the sequential solver.", rich_help_panel=SOLVER)
    ] = 128,
    distill: Annotated[
        bool, flag("--distill", help="Then train the kept entries towards TUNED and BASE.", panel=DISTILL)
    ] = False,
    distill_steps: Annotated[int, typer.Option(metavar="N", help="Steps of training.", rich_help_panel=DISTILL)] = 200,
    distill_rate: Annotated[
        float,
        typer.Option(metavar="R", help="Learning rate, in units of a tensor's own change.", rich_help_panel=DISTILL),
    ] = 0.1,
    distill_weight: Annotated[
        float, typer.Option(metavar="B", help="Weight of BASE's answers against TUNED's.", rich_help_panel=DISTILL)
    ] = 1.0,
    distill_batch_size: Annotated[
        int, typer.Option(metavar="N", help="Samples of each kind in a step.", rich_help_panel=DISTILL)
    ] = 8,
    device: Device = "auto",
    method: Annotated[
        PatchMethod,
        typer.Option(
            metavar="METHOD",
            help="tailor; or interpolate (WiSE-FT), dare, magnitude (TIES), graft.",
            rich_help_panel=OTHERS,
        ),
    ] = PatchMethod.TAILOR,
    weight: Annotated[
        float | None,
        typer.Option(
            metavar="W",
            help="Share of the way from BASE that kept entries go.",
            show_default="1; interpolate 0.5",
            rich_help_panel=OTHERS,
        ),
    ] = None,
    threshold: Annotated[
        Threshold,
        typer.Option(
            metavar="OF",
            help="magnitude, graft: the top of each tensor, or of all tensors together (global).",
            rich_help_panel=OTHERS,
        ),
    ] = Threshold.TENSOR,
    seed: Annotated[int, typer.Option(metavar="N", help="dare, graft: of what is drawn.", rich_help_panel=OTHERS)] = 0,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="graft: the fine-tuning data, to train its mask on.", rich_help_panel=OTHERS),
    ] = None,
    graft_steps: Annotated[
        int, typer.Option(metavar="N", help="graft: steps of training.", rich_help_panel=OTHERS)
    ] = 100,
    graft_rate: Annotated[
        float,
        typer.Option(
            metavar="X", help="graft: how far a step moves the mask's logits, root mean square.", rich_help_panel=OTHERS
        ),
    ] = 0.1,
    batch_size: Annotated[int, typer.Option(metavar="N", help="graft: samples in a step.", rich_help_panel=OTHERS)] = 8,
    max_shard_size: MaxShardSize = None,
    fp8_output: Annotated[
        Fp8Output,
        typer.Option(metavar="FORM", help="FP8 weights: as BASE stores them (fp8), or bf16.", rich_help_panel=OUTPUT),
    ] = Fp8Output.FP8,
    trust_remote_code: TrustRemoteCode = False,
    task: Task = None,
    license_: License = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    tensors: Tensors = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write BASE with the best entries of TUNED in it.

    The entries that are taken over are adjusted to make up for the others. OUT loads with from_pretrained; a patch
    file holds the kept entries alone. Everything is checked before the work starts; an interrupted run leaves
    nothing that loads, and --resume finishes it to the same bytes.

    Examples:
      tailorcli patch BASE TUNED --stats stats -o OUT
      tailorcli patch BASE TUNED --stats stats --retain base-stats -o OUT
    """
    require_output(output, patch_file)
    from tailorcli.adapters.checkpoint import is_adapter
    from tailorcli.patching.patch import patch_checkpoint, plan_patch

    if preset is not None and retain is not None:
        raise typer.BadParameter("--preset paper has no retain term: leave --retain out")
    own = {"density": density, "omega": omega, "solver": solver, "damping": damping, "block_size": block_size}
    given = {name: value for name, value in own.items() if _is_given(context, name)}
    options = PatchOptions(
        **with_preset(preset, **given),
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
        fp8_output=fp8_output,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        max_shard_size=parse_size(max_shard_size) if max_shard_size else None,
        allow_dtype_mismatch=allow_dtype_mismatch,
        resized_vocab=resized_vocab,
        trust_remote_code=trust_remote_code,
        task=task,
        license=license_,
        resume=resume,
        overwrite=overwrite,
    )
    if distill and (stats is None or retain is None):
        raise OptionsError(
            "--distill needs the samples of both statistics",
            "pass --stats STATS and --retain STATS (tailorcli calibrate BASE --synthetic -o STATS)",
        )
    if dry_run:
        show_plan(
            plan_patch(base, tuned, output, stats, options, patch_file, retain, data),
            output,
            patch_file,
            as_json,
            tensors,
        )
        return
    if output is not None and not ((base if is_adapter(tuned) else tuned) / "config.json").exists():
        say(f"note: {tuned} has no config.json, so {output} will not load with from_pretrained", err=True)
    shown: dict[str, Any] = {
        "progress": wants_progress(as_json),
        "patch_file": patch_file,
        "announce": None if as_json else partial(show_cost, output=output, patch_file=patch_file),
        "data": data,
    }
    if distill and stats is not None and retain is not None:
        from tailorcli.patching.distilled import distill_checkpoint

        how = DistillOptions(distill_steps, distill_rate, distill_weight, distill_batch_size, seed)
        report = distill_checkpoint(base, tuned, output, stats, retain, options, how, **shown)
    else:
        report = patch_checkpoint(base, tuned, output, stats, options, retain=retain, **shown)
    if as_json:
        print_report(report, output, patch_file)
        return
    show_summary(report)
    show_reasons({record.name: record.note for record in report.tensors if record.note}, "note")
    show_written(output, patch_file, report)
    show_stages(report.stages)


def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Statistics, a report, a patch file, any checkpoint.")],
    plot: Plot = None,
    tensors: Tensors = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what a path is and show its figures.

    Examples:
      tailorcli inspect OUT
      tailorcli inspect stats --plot stats.png
    """
    from tailorcli.display.inspection import inspect_path

    check_plot_file(plot, [path])
    inspection = inspect_path(path)
    if plot is not None:
        from tailorcli.display.plots import plot_inspection

        plot_inspection(inspection, plot)
        say(f"drew {plot}", err=True)
    if as_json:
        print_json(inspection.to_dict())
        return
    from tailorcli.display.tables import inspection_parts

    print_rich(*inspection_parts(inspection, tensors=tensors))


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to keep it in.")] = Path("demo"),
    quick: Annotated[bool, flag("--quick", help="A much smaller run, to see that everything works.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the weights and the batches.")] = 0,
    overwrite: Annotated[
        bool,
        flag("--overwrite", help="Replace an earlier demo in DIR.", panel=OUTPUT),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Watch a small model forget and be patched, in two minutes.

    Needs no network. Trains a small Llama on old tasks, fine-tunes it on a new one, calibrates, patches and
    compares with plain interpolation. The checkpoints stay in DIR to go on with.

    Examples:
      tailorcli demo
      tailorcli demo --quick -o /tmp/demo
    """
    from tailorcli.demo.demo import follow_up_commands, render_demo, run_demo

    report = run_demo(output, seed=seed, quick=quick, overwrite=overwrite, progress=wants_progress(as_json))
    if as_json:
        print_json(report.to_dict())
        return
    print_rich(render_demo(report))
    say("The checkpoints are yours to go on with:")
    for line in follow_up_commands(report):
        say(f"  {line}")
