"""The commands that take patch files: apply, verify, merge-multi.

Data goes to standard output; progress, notes and errors go to standard error.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tailorcli.cli.arguments import (
    BASE_HELP,
    DISTILL,
    TRAINING,
    AsJson,
    Base,
    Damping,
    Device,
    DistillBatchSize,
    DistillRate,
    DistillSteps,
    DistillTokens,
    DistillWeight,
    DryRun,
    License,
    MaxIterations,
    MaxShardSize,
    OutFolder,
    OutFolderNeeded,
    Overwrite,
    PatchIn,
    PatchOut,
    PushTo,
    Quiet,
    Resume,
    Task,
    Tensors,
    Tolerance,
    Verbose,
    flag,
    require_unused,
)
from tailorcli.cli.output import (
    print_json,
    print_report,
    print_rich,
    require_output,
    say,
    say_error,
    show_merge,
    show_stages,
    show_written,
)
from tailorcli.cli.plans import show_cost, show_plan
from tailorcli.cli.sharing import check_push, push
from tailorcli.cli.verbosity import wants_progress
from tailorcli.distributed import launched
from tailorcli.options import (
    DistillOn,
    DistillOptions,
    MergeMethod,
    MergeOptions,
)
from tailorcli.units import counted, parse_size


def apply(
    base: Base,
    patch_path: PatchIn,
    output: OutFolderNeeded,
    max_shard_size: MaxShardSize = None,
    push_to_hub: PushTo = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    tensors: Tensors = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make the patched checkpoint from BASE and a patch file.

    To the byte what patch -o writes. Refuses a base that is not the one the patch was made for.

    Examples:
      tailorcli apply BASE task.safetensors -o OUT
      tailorcli apply BASE task.safetensors -o OUT --max-shard-size 5GB
    """
    from tailorcli.patching.apply import apply_patch, plan_apply

    check_push(push_to_hub, output, dry_run)
    size = parse_size(max_shard_size) if max_shard_size else None
    if dry_run:
        plan = plan_apply(base, patch_path, output, max_shard_size=size, resume=resume, overwrite=overwrite)
        show_plan(plan, output, None, as_json, tensors)
        return
    report = apply_patch(
        base,
        patch_path,
        output,
        max_shard_size=size,
        resume=resume,
        overwrite=overwrite,
        progress=wants_progress(as_json),
        announce=None if as_json else partial(show_cost, output=output, patch_file=None),
    )
    if not launched().first:
        return
    for note in report.notes:
        say(f"note: {note}", err=True)
    push(push_to_hub, output)
    if as_json:
        print_report(report, output, None)
        return
    totals = report.totals
    say(f"put {totals['kept']:,} weights of the patch into {counted(totals['tensors_patched'], 'tensor')}")
    show_written(output, None, report)
    show_stages(report.stages)


def merge_multi(
    context: typer.Context,
    base: Base,
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH", help="Patch files of the tasks, on one BASE.")],
    output: OutFolder = None,
    patch_file: PatchOut = None,
    method: Annotated[
        MergeMethod,
        typer.Option(metavar="METHOD", help="average (the paper's), joint (one optimum for all tasks), or patches."),
    ] = MergeMethod.AVERAGE,
    tuned: Annotated[
        list[Path] | None,
        typer.Option(metavar="TUNED", help="average, joint: a task's fine-tuned checkpoint; once for each task."),
    ] = None,
    stats: Annotated[
        list[Path] | None,
        typer.Option(metavar="STATS", help="joint: a task's statistics; once for each task."),
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(metavar="W", help="Weight of a task; once for each PATCH, in their order.")
    ] = None,
    distill: Annotated[
        bool, flag("--distill", help="Then train the kept entries towards every TUNED and BASE.", panel=DISTILL)
    ] = False,
    retain: Annotated[
        Path | None,
        typer.Option(
            metavar="STATS", help="--distill: statistics of BASE, what it must not forget.", rich_help_panel=DISTILL
        ),
    ] = None,
    distill_steps: DistillSteps = None,
    distill_rate: DistillRate = 0.1,
    distill_weight: DistillWeight = 2.0,
    distill_batch_size: DistillBatchSize = 8,
    distill_on: DistillTokens = DistillOn.ALL,
    damping: Damping = 0.01,
    tolerance: Tolerance = 2e-4,
    max_iterations: MaxIterations = 300,
    device: Device = "auto",
    max_shard_size: MaxShardSize = None,
    task: Task = None,
    license_: License = None,
    push_to_hub: PushTo = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    tensors: Tensors = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    r"""Stitch the patches of several tasks into one model.

    average needs --tuned for each task, joint --stats as well, patches neither. Which belongs to which patch is
    told by their contents, not by their order.

    Examples:
      tailorcli merge-multi BASE a.safetensors b.safetensors -o OUT \
        --method patches
      tailorcli merge-multi BASE a.safetensors b.safetensors -o OUT \
        --tuned TUNED-A --tuned TUNED-B --stats STATS-A --stats STATS-B \
        --distill --retain base-stats
    """
    from tailorcli.merging.merge import merge_patches, plan_merge

    require_output(output, patch_file)
    check_push(push_to_hub, output, dry_run)
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
    if method != "joint":
        require_unused(context, "is for --method joint", "damping", "tolerance", "max_iterations")
    inputs = (tuple(tuned or ()), tuple(stats or ()))
    if distill != (retain is not None):
        raise typer.BadParameter("--distill and --retain STATS go together: the base is a teacher, on its own samples")
    if not distill:
        require_unused(context, "is for --distill", *TRAINING)
    how = DistillOptions(distill_steps, distill_rate, distill_weight, distill_batch_size, on=distill_on)
    if dry_run:
        if retain is not None:
            from tailorcli.merging.distilled import plan_distilled_merge

            plan = plan_distilled_merge(base, patches, output, *inputs, retain, options, how, patch_file)
        else:
            plan = plan_merge(base, patches, output, *inputs, options, patch_file)
        show_plan(plan, output, patch_file, as_json, tensors)
        return
    shown: dict[str, Any] = {
        "progress": wants_progress(as_json),
        "patch_file": patch_file,
        "announce": None if as_json else partial(show_cost, output=output, patch_file=patch_file),
    }
    if retain is not None:
        from tailorcli.merging.distilled import distill_merge

        report = distill_merge(base, patches, output, *inputs, retain, options, how, **shown)
    else:
        report = merge_patches(base, patches, output, *inputs, options, **shown)
    if not launched().first:
        return
    for note in report.notes:
        say(f"note: {note}", err=True)
    push(push_to_hub, output)
    if as_json:
        print_report(report, output, patch_file)
        return
    show_merge(report)
    show_written(output, patch_file, report)
    show_stages(report.stages)


def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the checkpoint to verify.")],
    base: Annotated[Path, typer.Option("--base", metavar="BASE", help=BASE_HELP)],
    patch_path: Annotated[
        Path | None,
        typer.Option(
            "--patch", metavar="PATCH", help="The patch file that was applied.", show_default="the report in OUT"
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prove that OUT is BASE with a patch applied, bit for bit.

    Exit code 1 if it is not.

    Examples:
      tailorcli verify OUT --base BASE
      tailorcli verify OUT --base BASE --patch task.safetensors
    """
    from tailorcli.patching.verify import verify_checkpoint

    report = verify_checkpoint(checkpoint, base, patch_path, progress=wants_progress(as_json))
    if as_json:
        print_json(report.to_dict())
    elif report.ok:
        say(
            f"{checkpoint} is right: {counted(report.tensors, 'tensor')}, {report.entries:,} weights, of which "
            f"{report.changed:,} differ from the base"
            + (", all as the patch says" if patch_path else f"; at most {report.kept:,} may (which: pass --patch)")
        )
    else:
        from tailorcli.display.tables import problem_table

        count = f"{report.wrong_tensors} wrong, {len(report.problems)} of them listed"
        say_error(
            f"{checkpoint} is not what it should be: {count}",
            "check that BASE and the patch are those that it was made of; if they are, make it again",
        )
        print_rich(problem_table(report.problems))
    if not report.ok:
        raise typer.Exit(1)
