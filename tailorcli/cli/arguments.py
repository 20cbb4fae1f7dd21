"""Arguments and options that several commands share, and the panels of ``--help`` in which they stand.

What stands in no panel is an option of the main job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tailorcli.cli.verbosity import set_quiet, set_verbose
from tailorcli.options import AUTO, Blockwise, DistillOn, DTypeName, Score, Solver

CALIBRATION = "Statistics, with --data"
TENSORS = "Which tensors"
SOLVER = "Solver"
DISTILL = "Distillation"
OTHERS = "Other methods, to compare with"
RUNNING = "How it runs"
OUTPUT = "Output"


def flag(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:
    """An option that takes no value; Typer alone would show one, <bool>."""
    return typer.Option(*names, metavar="", help=help, rich_help_panel=panel, **more)


def parse_teacher(given: str | None) -> float | str | None:
    """The value of --teacher-weight. Raises typer.BadParameter for a word that is none."""
    if given is None or given == AUTO:
        return given
    try:
        return float(given)
    except ValueError as error:
        raise typer.BadParameter(f"--teacher-weight takes a number or auto, got {given!r}") from error


# What goes in.
BASE_HELP = "The pre-trained model: a folder, or org/name of the Hub."
Base = Annotated[Path, typer.Argument(metavar="BASE", help=BASE_HELP)]
Tuned = Annotated[
    Path, typer.Argument(metavar="TUNED", help="The fine-tuned model or its LoRA adapter: a folder, or org/name.")
]
PatchIn = Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file of a task.")]
StatsIn = Annotated[
    Path | None, typer.Option("--stats", metavar="STATS", help="Statistics of TUNED: what calibrate wrote.")
]
RetainIn = Annotated[
    Path | None,
    typer.Option("--retain", metavar="STATS", help="Statistics of BASE: what it must not forget."),
]
RetainWeight = Annotated[
    float, typer.Option(metavar="W", help="Weight of what BASE must not forget, against the new task.")
]
Propagate = Annotated[
    bool | None,
    flag(
        "--propagate/--no-propagate",
        help="Fit layers again, from the inputs that the patched model gives them.",
        show_default="with --data or --retain, not with --distill",
    ),
]
CheckPropagation = Annotated[
    bool,
    flag("--check-propagation", help="Propagate on nine tenths of the samples, and only if it helps on the rest."),
]
TeacherData = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="With --teacher-weight auto: records that TUNED was not trained on."),
]
Density = Annotated[float, typer.Option(metavar="D", help="Share of each tensor's entries to keep, 0 to 1.")]
Omega = Annotated[
    float,
    typer.Option(metavar="W", help="Weight of an entry's change against its sensitivity in the score, 0 to 1."),
]

_SCORE_BY = {"metavar": "BY", "help": "Choose entries by the paper's score, or by its sum with how far each was moved."}
ScoreBy = Annotated[Score | None, typer.Option("--score", **_SCORE_BY, show_default="paper; sum with --distill")]
ScoreByAlone = Annotated[Score | None, typer.Option("--score", **_SCORE_BY, show_default="paper")]  # of a plain patch

# Data.
DATA = "Data"
DataIn = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Data of the new task: a file, a folder, - for standard input, or a dataset of the Hub.",
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column of the data that holds a text.", rich_help_panel=DATA),
]
PromptColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column of the data that holds a prompt.", rich_help_panel=DATA),
]
ResponseColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column of the data that holds its response.", rich_help_panel=DATA),
]

# Which tensors.
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Only tensors whose name matches; repeatable.", rich_help_panel=TENSORS),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="No tensor whose name matches; repeatable.", rich_help_panel=TENSORS),
]
AllowDtype = Annotated[
    bool,
    flag(
        "--allow-dtype-mismatch",
        help="TUNED may be stored in another dtype than BASE.",
        panel=TENSORS,
    ),
]
ResizedVocab = Annotated[
    bool,
    flag(
        "--resized-vocab",
        help="TUNED has more vocabulary rows: take the new ones over.",
        panel=TENSORS,
    ),
]

# The solver.
SolverChoice = Annotated[
    Solver,
    typer.Option(
        metavar="SOLVER",
        help="How to make up for what is left out: joint (exact), sequential (the paper's sweep), none.",
        rich_help_panel=SOLVER,
    ),
]
Damping = Annotated[
    float,
    typer.Option(metavar="X", help="Added to the Hessian's diagonal, times its mean.", rich_help_panel=SOLVER),
]
OwnDamping = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Added to the Hessian's diagonal, times its mean.",
        show_default="0.1; without --data and --retain 0.01",
        rich_help_panel=SOLVER,
    ),
]
Tolerance = Annotated[
    float,
    typer.Option(metavar="X", help="Relative residual at which the joint solver stops.", rich_help_panel=SOLVER),
]
MaxIterations = Annotated[
    int, typer.Option(metavar="N", help="Most iterations of the joint solver.", rich_help_panel=SOLVER)
]
Distill = Annotated[bool, flag("--distill", help="Then train the kept entries towards TUNED and BASE.", panel=DISTILL)]
DistillSteps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Steps of training.",
        show_default="400; with more than 512 samples more",
        rich_help_panel=DISTILL,
    ),
]
DistillRate = Annotated[
    float,
    typer.Option(metavar="R", help="Learning rate, in units of a tensor's own change.", rich_help_panel=DISTILL),
]
DistillWeight = Annotated[
    float, typer.Option(metavar="B", help="Weight of BASE's answers against TUNED's.", rich_help_panel=DISTILL)
]
DistillBatchSize = Annotated[
    int, typer.Option(metavar="N", help="Samples of each kind in a step.", rich_help_panel=DISTILL)
]
DistillTokens = Annotated[
    DistillOn,
    typer.Option(
        metavar="WHICH",
        help="Tokens that count: all, or those of responses, where records have any.",
        rich_help_panel=DISTILL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE", help="cpu, cuda or cuda:N; auto: a GPU where there is one.", rich_help_panel=RUNNING
    ),
]

# Running models.
BlockByBlock = Annotated[
    Blockwise,
    typer.Option(
        metavar="WHEN",
        help="Load one block of the model at a time: always, never; auto: if it does not fit.",
        rich_help_panel=RUNNING,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Samples in a forward pass: decides memory and speed, not the result.",
        rich_help_panel=RUNNING,
    ),
]
Deterministic = Annotated[
    bool,
    flag(
        "--deterministic",
        help="Each sample by itself, sums in float64: the same bits on a device whatever the batches.",
        panel=RUNNING,
    ),
]
DType = Annotated[
    DTypeName,
    typer.Option(
        metavar="DTYPE", help="Run in float32, bfloat16 or float16; auto: as stored.", rich_help_panel=RUNNING
    ),
]
TrustRemoteCode = Annotated[
    bool,
    flag("--trust-remote-code", help="Run the code that comes with a model.", panel=RUNNING),
]
SeqLen = Annotated[
    int,
    typer.Option(metavar="N", help="Most tokens: texts are cut, longer items left out.", rich_help_panel=RUNNING),
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", help="Only the first N records of each file.", rich_help_panel=RUNNING)
]

# Tasks to measure on.
TASK_SPEC = "NAME=FILE:KIND"
Tasks = Annotated[
    list[str],
    typer.Option("--task", metavar=TASK_SPEC, help="A task; KIND is text, choice, choice-raw or generate. Repeatable."),
]
SomeTasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar=TASK_SPEC, help="A task; KIND is text, choice, choice-raw or generate. Repeatable."),
]
HARNESS = "Tasks of lm-evaluation-harness"
Origin = Annotated[list[str], typer.Option(metavar="NAME", help="Name of an old task; repeatable.")]
Target = Annotated[list[str], typer.Option(metavar="NAME", help="Name of a new task; repeatable.")]
SomeOrigin = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Name of an old task; repeatable.")]
SomeTarget = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Name of a new task; repeatable.")]

# What comes out.
OutFolder = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder for the patched checkpoint.")
]
OutFolderNeeded = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the patched checkpoint.")
]
PatchOut = Annotated[
    Path | None,
    typer.Option("--patch-file", metavar="FILE", help="Write the kept entries alone here (.safetensors)."),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Split the weights anew, such as 5GB; else as BASE is.", rich_help_panel=OUTPUT),
]
Task = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Name of the task, for the patch file.", rich_help_panel=OUTPUT),
]
License = Annotated[
    str | None,
    typer.Option("--license", metavar="NAME", help="Licence of the patch file.", rich_help_panel=OUTPUT),
]
Resume = Annotated[
    bool,
    flag("--resume", help="Go on with an interrupted run of this command.", panel=OUTPUT),
]
Overwrite = Annotated[
    bool,
    flag("--overwrite", help="Replace an earlier output of tailorcli.", panel=OUTPUT),
]
Tensors = Annotated[bool, flag("--tensors", help="Show every tensor, not only kinds of layer and depth.", panel=OUTPUT)]
All = Annotated[bool, flag("--all", help="Show every figure and interval, not only a handful a model.", panel=OUTPUT)]
DryRun = Annotated[
    bool,
    flag("--dry-run", help="Check everything, show the plan and its cost.", panel=OUTPUT),
]
OnRanks = Annotated[
    str | None,
    typer.Option(
        "--ranks",
        metavar="N or MxN",
        help="With --dry-run: what it costs on N ranks, or on M machines of N each; a config.json alone will do.",
        rich_help_panel=OUTPUT,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.png", help="Draw a picture (needs the extra plot).", rich_help_panel=OUTPUT),
]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub", metavar="NAME", help="Upload OUT to the Hub as NAME when it is done.", rich_help_panel=OUTPUT
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE.html", help="Write a page to look at (needs the extra html).", rich_help_panel=OUTPUT
    ),
]
AsJson = Annotated[bool, flag("--json", help="Print JSON instead of tables.", panel=OUTPUT)]
Quiet = Annotated[
    bool,
    flag(
        "--quiet",
        "-q",
        callback=set_quiet,
        help="Say nothing but results and errors.",
        panel=OUTPUT,
    ),
]
Verbose = Annotated[
    bool,
    flag(
        "--verbose",
        "-v",
        callback=set_verbose,
        help="Say more: all names, seconds by stage, where an error arose.",
        panel=OUTPUT,
    ),
]

TRAINING = ("distill_steps", "distill_rate", "distill_weight", "distill_batch_size", "distill_on")  # of --distill


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, rather than having its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def require_unused(context: typer.Context, why: str, *names: str) -> None:
    """Raise typer.BadParameter for an option that would be ignored."""
    for name in names:
        if is_given(context, name):
            raise typer.BadParameter(f"--{name.replace('_', '-')} {why}")
