"""The commands that measure whole models: ``evaluate``, ``hscore`` and ``sweep``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tailorcli.cli.commands import app, friendly_errors
from tailorcli.cli.options import AsJson, Base, Device, NoPropagate, RetainIn, StatsIn, Tuned
from tailorcli.cli.output import print_json, print_rich, say
from tailorcli.options import EvaluateOptions, PatchOptions

Origin = Annotated[list[str] | None, typer.Option(metavar="NAME", help="An old task, by its name; repeatable.")]
Target = Annotated[list[str] | None, typer.Option(metavar="NAME", help="A new task, by its name; repeatable.")]


@app.command()
@friendly_errors
def evaluate(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Folders of checkpoints.")],
    task: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE:KIND", help="A task: kind text, choice, choice-raw, generate; repeatable."),
    ],
    origin: Origin = None,
    target: Target = None,
    base: Annotated[Path | None, typer.Option(metavar="MODEL", help="Which MODEL is the pre-trained one.")] = None,
    tuned: Annotated[Path | None, typer.Option(metavar="MODEL", help="Which MODEL is the fine-tuned one.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="REPORT.json", help="Write all figures here, down to single items."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw old against new (needs matplotlib).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Of each file, only the first so many records.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens that kind generate writes at most.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Texts are cut to so many tokens, longer items left out.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass: memory and speed.")] = 8,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Run the models in float32, bfloat16, float16; auto: as stored.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the models' own code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what each MODEL kept of the old tasks and gained on the new: accuracies, averages, H-score.

    One model at a time is loaded; every figure comes with a 95% interval over the items, paired between models.
    """
    from tailorcli.evaluation.evaluate import evaluate_models

    options = EvaluateOptions(
        batch_size=batch_size,
        seq_len=seq_len,
        limit=limit,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if plot is not None:
        from tailorcli.display.plots import check_plot

        check_plot(plot, bool(origin and target))
    report = evaluate_models(
        models,
        task,
        options,
        origin=origin or (),
        target=target or (),
        base=base,
        tuned=tuned,
        progress=not as_json,
    )
    if output is not None:
        report.write(output)
        say(f"wrote {output}", err=True)
    if plot is not None:
        from tailorcli.display.plots import plot_evaluation

        plot_evaluation(report.to_dict(), plot)
        say(f"drew {plot}", err=True)
    for name, facts in report.tasks.items():
        if facts["left_out"]:
            count = f"{len(facts['left_out'])} of {facts['items'] + len(facts['left_out'])} items"
            say(f"left out of task {name}: {count} (too long, or nothing in them to score)", err=True)
    if as_json:
        print_json(report.to_dict())
        return
    from tailorcli.display.tables import evaluation_parts

    print_rich(*evaluation_parts(report.to_dict()))
    say(f"{report.seconds:.1f} s", err=True)


@app.command()
@friendly_errors
def hscore(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS.json...", help="Result files of lm-evaluation-harness.")
    ],
    origin: Annotated[list[str], typer.Option(metavar="NAME", help="An old task or group; repeatable.")],
    target: Annotated[list[str], typer.Option(metavar="NAME", help="A new task or group; repeatable.")],
    metric: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="Metric to take, or TASK=METRIC; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The averages and the H-score of results that lm-evaluation-harness wrote, a row a file."""
    from tailorcli.evaluation.lm_eval import read_results

    report = read_results(results, origin, target, metric or ())
    if as_json:
        print_json(report.to_dict())
        return
    from tailorcli.display.tables import results_table

    print_rich(results_table(report.to_dict()))


@app.command()
@friendly_errors
def sweep(
    base: Base,
    tuned: Tuned,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for results; kept for reruns.")],
    task: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE:KIND", help="A task, as for evaluate; repeatable."),
    ],
    origin: Annotated[list[str], typer.Option(metavar="NAME", help="An old task, by its name; repeatable.")],
    target: Annotated[list[str], typer.Option(metavar="NAME", help="A new task, by its name; repeatable.")],
    validation: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE:KIND", help="The same tasks on other data, to pick the settings on."),
    ] = None,
    stats: StatsIn = None,
    retain: RetainIn = None,
    data: Annotated[Path | None, typer.Option(help="What --method graft trains on.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Repeatable; 0.1 without.")] = None,
    omega: Annotated[list[float] | None, typer.Option(help="Repeatable; the default of patch without.")] = None,
    solver: Annotated[list[str] | None, typer.Option(help="Repeatable; joint without.")] = None,
    retain_weight: Annotated[
        list[float] | None, typer.Option(help="Of --retain, repeatable; 0 is without it; the default of patch without.")
    ] = None,
    damping: Annotated[list[float] | None, typer.Option(help="Repeatable; the default of patch without.")] = None,
    no_propagate: NoPropagate = False,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Another method to compare with, at each --density; interpolate at each --weight; repeatable."
        ),
    ] = None,
    weight: Annotated[list[float] | None, typer.Option(help="Of interpolate, repeatable; 0.3 to 0.7 without.")] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Pick the most of the new with this percentage of the old kept; else the best H."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the frontiers (needs matplotlib).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Of each task's file, only the first so many records.")] = None,
    seq_len: Annotated[int, typer.Option(help="Texts are cut to so many tokens, longer items left out.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass: memory and speed.")] = 8,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Patch in many ways, evaluate each, and draw the frontier of old against new performance.

    Statistics are reused, never made; every setting that is done is kept in DIR, and a rerun goes on from there.
    """
    from tailorcli.sweep import run_sweep, settings_of

    if retain_weight and any(retain_weight) and retain is None:
        raise typer.BadParameter("--retain-weight needs --retain STATS")
    defaults = PatchOptions()
    betas = retain_weight if retain_weight else [defaults.retain_weight] if retain is not None else []
    settings = settings_of(
        PatchOptions(device=device, overwrite=True, propagate=False if no_propagate else None),
        densities=density or [defaults.density],
        omegas=omega or [defaults.omega],
        solvers=solver or [defaults.solver],
        retain_weights=betas,
        dampings=damping or [None],
        methods=method or [],
        weights=weight or [],
    )
    if plot is not None:
        from tailorcli.display.plots import check_plot

        check_plot(plot, has_roles=True)
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
        data=data,
        keep=keep,
        options=EvaluateOptions(batch_size=batch_size, seq_len=seq_len, limit=limit, device=device),
        announce=None if as_json else partial(say, err=True),
    )
    if plot is not None:
        from tailorcli.display.plots import plot_frontiers

        plot_frontiers(report.to_dict(), plot)
        say(f"drew {plot}", err=True)
    if as_json:
        print_json(report.to_dict())
        return
    from tailorcli.display.tables import sweep_parts

    print_rich(*sweep_parts(report.to_dict()))
    say(f"{report.seconds:.1f} s; everything is in {output}", err=True)
