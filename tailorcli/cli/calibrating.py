"""The commands that measure layers: ``calibrate`` and ``score``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tailorcli.cli.arguments import (
    OUTPUT,
    AllowDtype,
    AsJson,
    Base,
    BatchSize,
    BlockByBlock,
    DataIn,
    Density,
    Deterministic,
    Device,
    DryRun,
    DType,
    Exclude,
    Include,
    Omega,
    OnRanks,
    Overwrite,
    OwnDamping,
    PromptColumn,
    Quiet,
    ResizedVocab,
    ResponseColumn,
    RetainIn,
    RetainWeight,
    ScoreByAlone,
    StatsIn,
    TeacherData,
    Tensors,
    TextColumn,
    TrustRemoteCode,
    Tuned,
    Verbose,
    flag,
    parse_teacher,
)
from tailorcli.cli.output import (
    print_json,
    reasons,
    require_source,
    say,
    show_reasons,
    show_score,
)
from tailorcli.cli.plans import asked_fleet, show_calibration
from tailorcli.cli.verbosity import is_verbose, wants_progress
from tailorcli.distributed import launched
from tailorcli.files import in_shell
from tailorcli.guard import check_result
from tailorcli.options import (
    AUTO,
    Blockwise,
    CalibrateOptions,
    DataColumns,
    DTypeName,
    PatchOptions,
    TextMode,
)
from tailorcli.units import counted, format_bytes


def calibrate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="The model to measure, fine-tuned or base, or a LoRA adapter: a folder, or org/name."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STATS", help="Folder for the statistics.")],
    data: DataIn = None,
    synthetic: Annotated[
        bool,
        flag("--synthetic", help="MODEL writes its own samples, going on from --data if given."),
    ] = False,
    held_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --synthetic: half as many more samples, as a task for sweep."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="BASE",
            help="The pre-trained model, for an adapter and for --teacher-weight: a folder, or org/name.",
        ),
    ] = None,
    teacher_weight: Annotated[
        str | None,
        typer.Option(
            metavar="W",
            help="Take the model so far on the way from BASE to MODEL, 1 being MODEL; auto: by its loss on the data.",
        ),
    ] = None,
    teacher_data: TeacherData = None,
    num_samples: Annotated[int, typer.Option(metavar="N", help="Samples to draw from the data.")] = 128,
    seq_len: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most tokens of a sample.", show_default="2048; with --synthetic 256"),
    ] = None,
    text_mode: Annotated[
        TextMode, typer.Option(metavar="MODE", help="A sample of a .txt: a line, or a chunk of --seq-len tokens.")
    ] = TextMode.LINE,
    seed: Annotated[int, typer.Option(metavar="N", help="Which samples are drawn.")] = 0,
    text_column: TextColumn = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    include: Include = None,
    exclude: Exclude = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: DType = DTypeName.AUTO,
    deterministic: Deterministic = False,
    blockwise: BlockByBlock = Blockwise.AUTO,
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
    dry_run: DryRun = False,
    ranks: OnRanks = None,
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
        teacher_weight=parse_teacher(teacher_weight),
        columns=DataColumns(text_column, prompt_column, response_column),
        deterministic=deterministic,
    )
    if teacher_data is not None and options.teacher_weight != AUTO:
        raise typer.BadParameter("--teacher-data is for --teacher-weight auto")
    fleet = asked_fleet(ranks, dry_run)
    if dry_run:
        from tailorcli.pipeline.estimate import plan_calibration

        show_calibration(plan_calibration(model, data, output, options, base, fleet), output, as_json)
        return
    report = calibrate_model(
        model,
        data,
        output,
        options,
        progress=wants_progress(as_json),
        base=base,
        announce=None if as_json else partial(say, err=True),
        held_out=held_out,
        teacher_data=teacher_data,
        show=partial(say, err=True) if is_verbose() and not as_json else None,
    )
    if as_json:
        print_json(report.to_dict())
        return
    whose = " that the model wrote itself" if synthetic else ""
    what = f"{counted(report.samples, 'sample')}{whose}, {counted(report.tokens, 'token')}"
    made = f"{counted(report.hessians, 'Hessian')} for {counted(report.calibrated, 'tensor')}"
    say(f"{what}: {made} in {output} ({format_bytes(report.bytes)}, {report.seconds:.1f} s)")
    if report.ranks and is_verbose():
        say("on each rank: " + ", ".join(counted(each["samples"], "sample") for each in report.ranks), err=True)
    show_reasons(report.uncalibrated, "without statistics")
    show_reasons(report.notes, "note")
    if synthetic:
        say(f"next: tailorcli patch {in_shell(model)} TUNED --stats STATS --retain {in_shell(output)} -o OUT", err=True)
    else:
        before = "BASE" if base is None else in_shell(base)
        say(
            f"next: tailorcli patch {before} {in_shell(model)} --stats {in_shell(output)} --retain BASE_STATS -o OUT",
            err=True,
        )
        how = "--synthetic" if report.writes_samples else "--data OLD_TASK"
        say(f"with BASE_STATS by: tailorcli calibrate {before} {how} -o BASE_STATS", err=True)


def score(
    base: Base,
    tuned: Tuned,
    stats: StatsIn = None,
    retain: RetainIn = None,
    retain_weight: RetainWeight = 0.3,
    density: Density = 0.1,
    omega: Omega = 0.5,
    by: ScoreByAlone = None,
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
        score=by,
        retain_weight=retain_weight,
        solver="none",
        damping=damping,
        device=device,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        allow_dtype_mismatch=allow_dtype_mismatch,
        resized_vocab=resized_vocab,
    )
    check_result(output, [base, tuned, stats, retain], "score")
    report = score_checkpoint(base, tuned, stats, options, progress=wants_progress(as_json), retain=retain)
    if not launched().first:
        return
    if output is not None:
        write_report(report, output)
    if as_json:
        print_json({**report.to_dict(), **({"ranks": list(report.ranks)} if report.ranks else {})})
        return
    show_score(report, tensors)
    show_reasons(reasons(report.tensors), "left at base")
