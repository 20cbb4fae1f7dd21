"""The commands that measure whole models: ``evaluate``, ``hscore`` and ``sweep``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailorcli.cli.arguments import (
    HARNESS,
    OTHERS,
    OUTPUT,
    RUNNING,
    SOLVER,
    TASK_SPEC,
    TRAINING,
    All,
    AsJson,
    Base,
    BatchSize,
    Device,
    Distill,
    DistillBatchSize,
    DistillRate,
    DistillSteps,
    DistillTokens,
    DistillWeight,
    DType,
    Html,
    Limit,
    Origin,
    Plot,
    Propagate,
    Quiet,
    RetainIn,
    SeqLen,
    SomeOrigin,
    SomeTarget,
    SomeTasks,
    StatsIn,
    Target,
    Tasks,
    TrustRemoteCode,
    Tuned,
    Verbose,
    flag,
    require_unused,
)
from tailorcli.cli.output import print_json, print_rich, say
from tailorcli.cli.sharing import check_page, write_cards
from tailorcli.cli.verbosity import wants_progress
from tailorcli.distributed import launched
from tailorcli.guard import check_result
from tailorcli.options import (
    DistillOn,
    DistillOptions,
    DTypeName,
    EvaluateOptions,
    HarnessOptions,
    PatchMethod,
    PatchOptions,
    Solver,
)
from tailorcli.units import counted

if TYPE_CHECKING:
    from tailorcli.sweep.outcome import SweepReport
    from tailorcli.sweep.settings import Setting


def evaluate(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="Checkpoints or adapters (folders, or org/name), and patch files."),
    ],
    task: SomeTasks = None,
    origin: SomeOrigin = None,
    target: SomeTarget = None,
    base: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The pre-trained MODEL: adapters and patch files are on it.")
    ] = None,
    tuned: Annotated[Path | None, typer.Option(metavar="MODEL", help="Which MODEL is the fine-tuned one.")] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK,...", help="Run these tasks or groups, too; repeatable.", rich_help_panel=HARNESS),
    ] = None,
    harness_tasks: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with tasks of your own, as YAML files.", rich_help_panel=HARNESS),
    ] = None,
    harness_shots: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Examples in each prompt.",
            show_default="what each task says",
            rich_help_panel=HARNESS,
        ),
    ] = None,
    harness_chat: Annotated[
        bool, flag("--harness-chat", help="Put the prompts through each model's chat template.", panel=HARNESS)
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC", help="Metric to take, or TASK=METRIC; repeatable.", rich_help_panel=HARNESS),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens that kind generate writes.", rich_help_panel=RUNNING)
    ] = 32,
    limit: Limit = None,
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: DType = DTypeName.AUTO,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="REPORT.json",
            help="Write all figures here, down to single items.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    write_card: Annotated[
        bool,
        flag("--write-card", help="Put the table into the card of each MODEL that tailorcli made.", panel=OUTPUT),
    ] = False,
    plot: Plot = None,
    everything: All = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    r"""Measure what models kept of the old tasks and gained on the new.

    Accuracies, their averages and the H-score. One model at a time is loaded; every figure has a 95% interval over the
    items, paired between models.

    Examples:
      tailorcli evaluate BASE TUNED OUT --task new=new.jsonl:text
      tailorcli evaluate BASE TUNED OUT --harness hellaswag --origin hellaswag \
        --task new=new.jsonl:choice --target new
    """
    from tailorcli.evaluation.evaluate import evaluate_models
    from tailorcli.evaluation.tasks import parse_task

    options = EvaluateOptions(
        batch_size=batch_size,
        seq_len=seq_len,
        limit=limit,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    names = tuple(name.strip() for listed in harness or () for name in listed.split(",") if name.strip())
    if not task and not names:
        raise typer.BadParameter("pass a task of your own, --task, or of lm-evaluation-harness, --harness")
    if not names and (harness_tasks or harness_shots is not None or harness_chat or metric):
        raise typer.BadParameter("--harness-tasks, --harness-shots, --harness-chat and --metric need --harness TASK")
    theirs = HarnessOptions(
        tasks=names,
        include=None if harness_tasks is None else str(harness_tasks),
        shots=harness_shots,
        chat=harness_chat,
        metrics=tuple(metric or ()),
    )
    read = [*models, base, tuned, harness_tasks, *(parse_task(spec)[1] for spec in task or ())]
    if plot is not None:
        from tailorcli.display.plots import check_plot

        check_plot(plot, bool(origin and target), read)
    check_result(output, read, "evaluate")
    if output is not None and plot is not None and output.resolve() == plot.resolve():
        raise typer.BadParameter(f"-o and --plot are both {output}")
    report = evaluate_models(
        models,
        task or (),
        options,
        origin=origin or (),
        target=target or (),
        base=base,
        tuned=tuned,
        progress=wants_progress(as_json),
        harness=theirs,
    )
    if not launched().first:
        return
    if output is not None:
        report.write(output)
        say(f"wrote {output}", err=True)
    if write_card:
        write_cards(report.to_dict())
    if plot is not None:
        from tailorcli.display.plots import plot_evaluation

        plot_evaluation(report.to_dict(), plot)
        say(f"drew {plot}", err=True)
    for name, facts in report.tasks.items():
        if facts["left_out"]:
            of = counted(facts["items"] + len(facts["left_out"]), "item")
            count = f"{len(facts['left_out']):,} of {of}"
            say(f"left out of task {name}: {count} (too long, or nothing in them to score)", err=True)
    if as_json:
        print_json(report.to_dict())
        return
    from tailorcli.display.tables import evaluation_parts

    print_rich(*evaluation_parts(report.to_dict(), everything=everything))
    say(f"{report.seconds:.1f} s", err=True)


def hscore(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS.json", help="Result files of lm-evaluation-harness.")
    ],
    origin: Origin,
    target: Target,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC", help="Metric to take, or TASK=METRIC; repeatable."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Work out the H-score of lm-evaluation-harness results.

    Examples:
      tailorcli hscore base.json out.json --origin hellaswag --target gsm8k
      tailorcli hscore out.json --origin mmlu --target gsm8k --metric acc
    """
    from tailorcli.evaluation.lm_eval import read_results

    report = read_results(results, origin, target, metric or ())
    if as_json:
        print_json(report.to_dict())
        return
    from tailorcli.display.tables import results_table

    print_rich(results_table(report.to_dict()))


def sweep(
    context: typer.Context,
    base: Base,
    tuned: Tuned,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the results; a rerun goes on from them.")
    ],
    task: Tasks,
    origin: Origin,
    target: Target,
    validation: Annotated[
        list[str] | None,
        typer.Option(metavar=TASK_SPEC, help="The same tasks on other data, to pick the settings on; repeatable."),
    ] = None,
    stats: StatsIn = None,
    retain: RetainIn = None,
    retain_weight: Annotated[
        list[float] | None,
        typer.Option(
            metavar="W", help="Weights of --retain to try; 0 is without it. Repeatable.", show_default="as patch"
        ),
    ] = None,
    propagate: Propagate = None,
    density: Annotated[
        list[float] | None,
        typer.Option(metavar="D", help="Densities to try; repeatable.", show_default="0.1"),
    ] = None,
    omega: Annotated[
        list[float] | None, typer.Option(metavar="W", help="Values of omega to try; repeatable.", show_default="0.5")
    ] = None,
    min_old_kept: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT",
            help="Pick the most of the new with this much of the old kept.",
            show_default="the best H-score",
        ),
    ] = None,
    solver: Annotated[
        list[Solver] | None,
        typer.Option(
            metavar="SOLVER", help="Solvers to try; repeatable.", show_default="joint", rich_help_panel=SOLVER
        ),
    ] = None,
    damping: Annotated[
        list[float] | None,
        typer.Option(metavar="X", help="Dampings to try; repeatable.", show_default="as patch", rich_help_panel=SOLVER),
    ] = None,
    distill: Distill = False,
    distill_steps: DistillSteps = None,
    distill_rate: DistillRate = 0.1,
    distill_weight: DistillWeight = 2.0,
    distill_batch_size: DistillBatchSize = 8,
    distill_on: DistillTokens = DistillOn.ALL,
    method: Annotated[
        list[PatchMethod] | None,
        typer.Option(
            metavar="METHOD",
            help="Another method: interpolate and lines at each --weight, others at each --density; repeatable.",
            rich_help_panel=OTHERS,
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            metavar="W",
            help="interpolate: weights to try, lines: alphas; repeatable.",
            show_default="0.3, 0.5, 0.7",
            rich_help_panel=OTHERS,
        ),
    ] = None,
    graft_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="graft: the fine-tuning data, to train its mask on.", rich_help_panel=OTHERS),
    ] = None,
    limit: Limit = None,
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    html: Html = None,
    plot: Plot = None,
    everything: All = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    r"""Patch in many ways, evaluate each, and compare old against new.

    Statistics are reused, never made. Every setting that is done is stored in DIR.

    Examples:
      tailorcli sweep BASE TUNED -o DIR --stats stats --density 0.1 --density 1 \
        --task a=a.jsonl:text --origin a --task b=b.jsonl:text --target b
      tailorcli sweep BASE TUNED -o DIR --stats stats --retain base-stats \
        --task a=a.jsonl:text --origin a --task b=b.jsonl:text --target b
    """
    from tailorcli.evaluation.tasks import parse_task
    from tailorcli.sweep.run import run_sweep
    from tailorcli.sweep.settings import settings_of

    if retain_weight and any(retain_weight) and retain is None:
        raise typer.BadParameter("--retain-weight needs --retain STATS")
    if distill and (stats is None or retain is None):
        raise typer.BadParameter("--distill needs --stats STATS and --retain STATS")
    defaults = PatchOptions()
    retain_weights = retain_weight if retain_weight else [defaults.retain_weight] if retain is not None else []
    how = DistillOptions(distill_steps, distill_rate, distill_weight, distill_batch_size, on=distill_on)
    settings = settings_of(
        PatchOptions(device=device, overwrite=True, propagate=propagate),
        densities=density or [defaults.density],
        omegas=omega or [defaults.omega],
        solvers=solver or [defaults.solver],
        retain_weights=retain_weights,
        dampings=damping or [None],
        methods=method or [],
        weights=weight or [],
        distill=how if distill else None,
    )
    read = [base, tuned, stats, retain, graft_data, *(parse_task(spec)[1] for spec in (*task, *(validation or ())))]
    if not distill:
        require_unused(context, "is for --distill", *TRAINING)
    if not {"interpolate", "lines"} & set(method or ()):
        require_unused(context, "is for --method interpolate and lines", "weight")
    if "graft" not in (method or ()):
        require_unused(context, "is for --method graft", "graft_data")
    if stats is None and method:  # the other methods alone
        made = [setting for setting in settings if not setting.options.needs_hessians]
        if len(made) < len(settings):
            require_unused(context, "needs --stats STATS", "solver", "omega", "damping")
        settings = made
    if retain is not None and not any(setting.retained or setting.distill is not None for setting in settings):
        raise typer.BadParameter("--retain is for settings of --stats with a weight above 0: leave it out")
    if propagate and not any(setting.options.propagate for setting in settings):
        raise typer.BadParameter("--propagate is for the joint solver with --retain STATS")
    check_page(html, read)
    if plot is not None:
        from tailorcli.display.plots import check_plot

        check_plot(plot, has_roles=True, inputs=read)
    report = run_sweep(
        base,
        tuned,
        settings,
        task,
        output,
        origin=origin,
        target=target,
        validation=validation or (),
        stats=stats,
        retain=retain,
        graft_data=graft_data,
        min_old_kept=min_old_kept,
        options=EvaluateOptions(batch_size=batch_size, seq_len=seq_len, limit=limit, device=device),
        announce=None if as_json else partial(say, err=True),
    )
    if not launched().first:
        return
    inputs = {"base": base, "tuned": tuned, "stats": stats, "retain": retain, "data": graft_data}
    _draw(report, settings, inputs, plot, html)
    if as_json:
        print_json(report.to_dict())
        return
    from tailorcli.display.tables import sweep_parts

    print_rich(*sweep_parts(report.to_dict(), everything=everything))
    say(f"{report.seconds:.1f} s; everything is in {output}", err=True)


def _draw(
    report: SweepReport, settings: list[Setting], inputs: dict[str, Path | None], plot: Path | None, html: Path | None
) -> None:
    """The frontiers as a picture, and as a page with the command of every setting, where they are asked for."""
    if plot is not None:
        from tailorcli.display.plots import plot_frontiers

        plot_frontiers(report.to_dict(), plot)
        say(f"drew {plot}", err=True)
    if html is not None:
        from tailorcli.display.web.frontier import sweep_page
        from tailorcli.display.web.shell import write_page

        given = {role: str(path) for role, path in inputs.items() if path is not None}
        commands = {setting.label: setting.command(given) for setting in settings}
        title = f"{Path(given['base']).name} and {Path(given['tuned']).name}"
        write_page(sweep_page(report.to_dict(), commands, title), html)
        say(f"wrote {html}; open it in a browser", err=True)
