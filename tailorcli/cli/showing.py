"""The commands that show things: ``inspect`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailorcli.cli.arguments import (
    OUTPUT,
    AsJson,
    Html,
    Plot,
    Quiet,
    Tensors,
    Verbose,
    flag,
)
from tailorcli.cli.output import (
    print_json,
    print_rich,
    say,
)
from tailorcli.cli.sharing import check_page, write_page_of
from tailorcli.cli.verbosity import wants_progress
from tailorcli.guard import check_plot_file


def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Statistics, a report, a patch file, any checkpoint.")],
    html: Html = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            metavar="REPORT.json", help="With --html: what evaluate -o wrote of this model.", rich_help_panel=OUTPUT
        ),
    ] = None,
    plot: Plot = None,
    tensors: Tensors = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what a path is and show its figures.

    Examples:
      tailorcli inspect OUT
      tailorcli inspect OUT --html page.html
    """
    from tailorcli.display.inspection import inspect_path

    if evaluation is not None and html is None:
        raise typer.BadParameter("--evaluation is drawn on a page: pass --html FILE.html")
    check_plot_file(plot, [path])
    check_page(html, [path, evaluation])
    inspection = inspect_path(path)
    if plot is not None:
        from tailorcli.display.plots import plot_inspection

        plot_inspection(inspection, plot)
        say(f"drew {plot}", err=True)
    write_page_of(path, html, evaluation)
    if as_json:
        print_json(inspection.to_dict())
        return
    from tailorcli.display.tables import inspection_parts

    print_rich(*inspection_parts(inspection, tensors=tensors))


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to keep it in.")] = Path("demo"),
    quick: Annotated[bool, flag("--quick", help="A much smaller run, to see that everything works.")] = False,
    distill: Annotated[bool, flag("--distill", help="Train the patch by --distill, too: twice the time.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the weights and the batches.")] = 0,
    overwrite: Annotated[
        bool,
        flag("--overwrite", help="Replace an earlier demo in DIR.", panel=OUTPUT),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Watch a small model forget and be patched, in a few minutes.

    Needs no network. Trains a small Llama on old tasks, fine-tunes it on a new one, calibrates, patches and
    compares with plain interpolation. The checkpoints stay in DIR to go on with.

    Examples:
      tailorcli demo --distill
      tailorcli demo --quick -o /tmp/demo
    """
    from tailorcli.demo.demo import follow_up_commands, render_demo, run_demo

    shown = {"progress": wants_progress(as_json), "distill": distill}
    report = run_demo(output, seed=seed, quick=quick, overwrite=overwrite, **shown)
    if as_json:
        print_json(report.to_dict())
        return
    print_rich(render_demo(report))
    say("The checkpoints are yours to go on with:")
    for line in follow_up_commands(report):
        say(f"  {line}")
