"""The command ``patch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailorcli.cli.arguments import (
    CALIBRATION,
    DISTILL,
    OTHERS,
    OUTPUT,
    SOLVER,
    TRAINING,
    AllowDtype,
    AsJson,
    Base,
    CheckPropagation,
    DataIn,
    Density,
    Device,
    Distill,
    DistillBatchSize,
    DistillRate,
    DistillSteps,
    DistillTokens,
    DistillWeight,
    DryRun,
    Exclude,
    Html,
    Include,
    License,
    MaxIterations,
    MaxShardSize,
    Omega,
    OnRanks,
    OutFolder,
    Overwrite,
    OwnDamping,
    PatchOut,
    PromptColumn,
    Propagate,
    PushTo,
    Quiet,
    ResizedVocab,
    ResponseColumn,
    Resume,
    RetainIn,
    RetainWeight,
    ScoreBy,
    SolverChoice,
    StatsIn,
    Task,
    TeacherData,
    Tensors,
    TextColumn,
    Tolerance,
    TrustRemoteCode,
    Tuned,
    Verbose,
    flag,
    is_given,
    parse_teacher,
    require_unused,
)
from tailorcli.cli.output import print_report, require_output, say
from tailorcli.cli.plans import asked_fleet
from tailorcli.cli.sharing import check_page, check_push, push, write_page_of
from tailorcli.cli.tailoring import Asked, run, show, show_dry_run
from tailorcli.distributed import launched
from tailorcli.errors import OptionsError
from tailorcli.files import in_shell
from tailorcli.hub import local_folders
from tailorcli.options import (
    AUTO,
    Blockwise,
    CalibrateOptions,
    DataColumns,
    DistillOn,
    DistillOptions,
    DTypeName,
    Fp8Output,
    PatchMethod,
    PatchOptions,
    Preset,
    Solver,
    Threshold,
    with_preset,
)
from tailorcli.units import parse_size


def patch(
    context: typer.Context,
    base: Base,
    tuned: Tuned,
    output: OutFolder = None,
    patch_file: PatchOut = None,
    data: DataIn = None,
    retain_data: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="With --data: what BASE must not forget; else it writes its own."),
    ] = None,
    no_retain: Annotated[
        bool, flag("--no-retain", help="With --data: BASE is asked nothing, the paper's way.")
    ] = False,
    stats: StatsIn = None,
    retain: RetainIn = None,
    retain_weight: RetainWeight = 0.3,
    propagate: Propagate = None,
    check_propagation: CheckPropagation = False,
    density: Density = 0.1,
    omega: Omega = 0.5,
    score: ScoreBy = None,
    teacher_weight: Annotated[
        str | None,
        typer.Option(
            metavar="W",
            help="Patch towards the model so far on the way from BASE to TUNED; auto: by its loss on the new task.",
            show_default="as --stats was made, else 1",
        ),
    ] = None,
    teacher_data: TeacherData = None,
    preset: Annotated[
        Preset | None,
        typer.Option(
            metavar="NAME",
            help="paper: density, omega, solver, damping and block size of the paper, and no retain term.",
        ),
    ] = None,
    text_column: TextColumn = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Samples of each kind.",
            show_default="128; with --distill or --target 512",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most tokens of a sample.",
            show_default="2048; of what BASE writes 256",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Which samples are drawn, and written.", rich_help_panel=CALIBRATION)
    ] = 0,
    keep_stats: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the statistics here, for a second patch.", rich_help_panel=CALIBRATION),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Samples in a forward pass: decides memory and speed, not the result.",
            rich_help_panel=CALIBRATION,
        ),
    ] = 8,
    dtype: Annotated[
        DTypeName,
        typer.Option(
            metavar="DTYPE",
            help="Run in float32, bfloat16 or float16; auto: as stored.",
            rich_help_panel=CALIBRATION,
        ),
    ] = DTypeName.AUTO,
    deterministic: Annotated[
        bool,
        flag(
            "--deterministic",
            help="Each sample by itself, sums in float64: the same bits whatever --batch-size.",
            panel=CALIBRATION,
        ),
    ] = False,
    blockwise: Annotated[
        Blockwise,
        typer.Option(
            metavar="WHEN",
            help="Load one block at a time: always, never; auto: if the model does not fit.",
            rich_help_panel=CALIBRATION,
        ),
    ] = Blockwise.AUTO,
    include: Include = None,
    exclude: Exclude = None,
    allow_dtype_mismatch: AllowDtype = False,
    resized_vocab: ResizedVocab = False,
    solver: SolverChoice = Solver.JOINT,
    damping: OwnDamping = None,
    tolerance: Tolerance = 2e-4,
    max_iterations: MaxIterations = 300,
    block_size: Annotated[
        int, typer.Option(metavar="N", help="Columns per block of the sequential solver.", rich_help_panel=SOLVER)
    ] = 128,
    distill: Distill = False,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="old=99",
            help="Distil, and pick density and weight to keep this share (%) of BASE's accuracy; or new=97.",
            rich_help_panel=DISTILL,
        ),
    ] = None,
    distill_steps: DistillSteps = None,
    distill_rate: DistillRate = 0.1,
    distill_weight: DistillWeight = 2.0,
    distill_batch_size: DistillBatchSize = 8,
    distill_on: DistillTokens = DistillOn.ALL,
    device: Device = "auto",
    method: Annotated[
        PatchMethod,
        typer.Option(
            metavar="METHOD",
            help="tailor; or interpolate (WiSE-FT), dare, magnitude (TIES), graft, fapm, lines, dg-hard; changed: all "
            "that differs.",
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
    alpha: Annotated[
        float,
        typer.Option(metavar="A", help="lines: share of the way that the first layer goes.", rich_help_panel=OTHERS),
    ] = 0.5,
    beta: Annotated[
        float | None,
        typer.Option(
            metavar="B",
            help="lines: how much further the last layer goes.",
            show_default="1 - alpha",
            rich_help_panel=OTHERS,
        ),
    ] = None,
    threshold_scale: Annotated[
        float,
        typer.Option(metavar="X", help="dg-hard: what its threshold is multiplied by.", rich_help_panel=OTHERS),
    ] = 1.0,
    graft_data: Annotated[
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
    graft_batch_size: Annotated[
        int, typer.Option(metavar="N", help="graft: samples in a step.", rich_help_panel=OTHERS)
    ] = 8,
    max_shard_size: MaxShardSize = None,
    fp8_output: Annotated[
        Fp8Output,
        typer.Option(metavar="FORM", help="FP8 weights: as BASE stores them (fp8), or bf16.", rich_help_panel=OUTPUT),
    ] = Fp8Output.FP8,
    trust_remote_code: TrustRemoteCode = False,
    task: Task = None,
    license_: License = None,
    html: Html = None,
    push_to_hub: PushTo = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    ranks: OnRanks = None,
    tensors: Tensors = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write BASE with the best entries of TUNED in it.

    The entries that are taken over are adjusted to make up for the others. OUT loads with from_pretrained; a patch
    file holds the kept entries alone. Everything is checked before the work starts; an interrupted run leaves
    nothing that loads, and --resume finishes it to the same bytes.

    With --data it is the whole job: TUNED is calibrated on these, BASE on what it writes itself. With --stats and
    --retain it is the last of three steps, after calibrate.

    Examples:
      tailorcli patch BASE TUNED --data new.jsonl -o OUT
      tailorcli patch BASE TUNED --stats stats --retain base-stats -o OUT
    """
    require_output(output, patch_file)
    check_push(push_to_hub, output, dry_run)
    read = [base, tuned, stats, retain, data, retain_data, graft_data, teacher_data]
    check_page(html, [*read, output, patch_file, keep_stats])
    given = {name for name in context.params if is_given(context, name)}
    own = {"density": density, "omega": omega, "solver": solver, "damping": damping, "block_size": block_size}
    options = PatchOptions(
        **with_preset(preset, **{name: value for name, value in own.items() if name in given}),
        score=score,
        retain_weight=retain_weight,
        propagate=propagate,
        check_propagation=check_propagation,
        tolerance=tolerance,
        max_iterations=max_iterations,
        method=method,
        weight=weight,
        seed=seed,
        threshold=threshold,
        alpha=alpha,
        beta=beta,
        threshold_scale=threshold_scale,
        graft_steps=graft_steps,
        graft_rate=graft_rate,
        batch_size=graft_batch_size,
        device=device,
        fp8_output=fp8_output,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        max_shard_size=parse_size(max_shard_size) if max_shard_size else None,
        allow_dtype_mismatch=allow_dtype_mismatch,
        resized_vocab=resized_vocab,
        trust_remote_code=trust_remote_code,
        teacher_weight=parse_teacher(teacher_weight),
        task=task,
        license=license_,
        resume=resume,
        overwrite=overwrite,
    )
    training = (distill_steps, distill_rate, distill_weight, distill_batch_size, seed, distill_on)
    how = DistillOptions(*training) if distill or target is not None else None
    retained = not no_retain and preset is None
    _require_one_source(given)
    _require_samples(context, given)
    _require_used(given, options, retain is not None or (stats is None and retained))
    usual = CalibrateOptions.of_job(distilled=how is not None)
    calibration = CalibrateOptions(
        usual.num_samples if num_samples is None else num_samples,
        *(seq_len, batch_size),
        dtype=dtype,
        seed=seed,
        blockwise=blockwise,
        columns=DataColumns(text_column, prompt_column, response_column),
        deterministic=deterministic,
    )
    if teacher_data is not None:
        from tailorcli.patching.teacher import check_teacher_data

        check_teacher_data(teacher_data, calibration)  # else it fails after much work
    base, tuned = local_folders((base, tuned), code=trust_remote_code)
    asked = Asked(
        base=base,
        tuned=tuned,
        output=output,
        patch_file=patch_file,
        data=data,
        stats=stats,
        retain=retain,
        options=options,
        calibration=calibration,
        distill=how,
        target=target,
        graft_data=graft_data,
        teacher_data=teacher_data,
        retain_data=retain_data,
        retained=retained,
        keep_stats=keep_stats,
    )
    fleet = asked_fleet(ranks, dry_run)
    if dry_run:
        show_dry_run(asked, fleet, as_json, tensors)
        return
    report = run(asked, as_json)
    if not launched().first:
        return
    if stats is not None and retain is None and options.fits_statistics:
        what = "without --retain a patch follows TUNED in what it forgot, too"
        say(
            f"note: {what}: tailorcli calibrate {in_shell(base)} --synthetic -o BASE_STATS (--data OLD_TASK where the "
            "model writes no text), and --retain BASE_STATS",
            err=True,
        )
    write_page_of(output or patch_file, html)
    push(push_to_hub, output)
    if as_json:
        print_report(report, output, patch_file)
        return
    show(asked, report)


def _require_one_source(given: set[str]) -> None:
    """Statistics are made of data, or given. Raises OptionsError where both are asked for, or parts of both."""
    if "preset" in given and given & {"retain", "retain_data"}:
        option = "--retain" if "retain" in given else "--retain-data"
        raise typer.BadParameter(f"--preset paper has no retain term: leave {option} out")
    if "data" in given and given & {"stats", "retain"}:
        option = "--stats" if "stats" in given else "--retain"
        raise OptionsError(
            f"--data and {option} exclude each other: --data makes the statistics that {option} would name",
            "pass --data alone for the whole job, or --stats and --retain for statistics that are there",
        )
    if "data" in given:
        return
    for option in ("--retain-data", "--no-retain", "--keep-stats"):
        if option[2:].replace("-", "_") in given:
            raise OptionsError(f"{option} goes with --data", "pass the new task's data: --data FILE")
    if "deterministic" in given:
        raise OptionsError(
            "--deterministic goes with --data: a patch with --stats is what its statistics are",
            "pass it to calibrate, or the new task's data: --data FILE",
        )


def _require_samples(context: typer.Context, given: set[str]) -> None:
    """Raise OptionsError for training without samples, typer.BadParameter for an option that would be ignored."""
    if not given & {"distill", "target"}:
        require_unused(context, "is for --distill, or --target", *TRAINING)
    if "stats" in given and "teacher_data" not in given:
        columns = ("text_column", "prompt_column", "response_column")
        drawn = ("num_samples", "seq_len", "batch_size", "dtype", "blockwise", *columns)
        require_unused(context, "is for --data: --stats hold their samples", *drawn)
    for name, what in (("distill", "--distill needs"), ("target", "--target measures on")):
        if name in given and "data" not in given and not given >= {"stats", "retain"}:
            raise OptionsError(
                f"{what} the samples of both statistics",
                "pass --data FILE; or --stats STATS and --retain STATS (tailorcli calibrate BASE --synthetic -o STATS)",
            )
    picked = [name for name in ("density", "distill_weight", "preset") if name in given]
    if "target" in given and picked:
        raise typer.BadParameter(f"--target does not go with --{picked[0].replace('_', '-')}")


# Options of the patch that some methods and solvers do without, by their names in PatchOptions.
_OWN = {name: name for name in ("density", "omega", "solver", "damping", "tolerance", "max_iterations", "block_size")}
_OWN |= {name: name for name in ("retain_weight", "threshold", "alpha", "beta", "threshold_scale")}
_OWN |= {"graft_steps": "graft_steps", "graft_rate": "graft_rate", "graft_batch_size": "batch_size"}


def _require_used(given: set[str], options: PatchOptions, retained: bool) -> None:
    """Raise typer.BadParameter for an option that the method, or the solver, has no use for."""
    if "preset" in given and options.method != "tailor":
        raise typer.BadParameter(f"--preset paper is of the method tailor, not of {options.method}")
    if "teacher_data" in given and options.teacher_weight != AUTO:
        raise typer.BadParameter("--teacher-data is for --teacher-weight auto")
    try:
        used = options.resolved(retained).identity(retained)
    except OptionsError:  # of options that contradict one another, which is told where they are used
        return
    how = f"--method {options.method}" if options.method != "tailor" else f"--solver {options.solver}"
    for name, own in _OWN.items():
        if name in given and own not in used:
            why = "is for a patch with --retain" if name == "retain_weight" else f"has no part in {how}"
            raise typer.BadParameter(f"--{name.replace('_', '-')} {why}")
    if "graft_data" in given and options.method != "graft":
        raise typer.BadParameter("--graft-data is for --method graft")
