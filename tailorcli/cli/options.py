"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[Path, typer.Argument(metavar="BASE", help="Folder of the pre-trained checkpoint (safetensors).")]
Tuned = Annotated[Path, typer.Argument(metavar="TUNED", help="Folder of the fine-tuned checkpoint, or adapter.")]
StatsIn = Annotated[
    Path | None,
    typer.Option("--stats", help="Folder made by calibrate; may be left out with --omega 1 (and --solver none)."),
]
RetainIn = Annotated[
    Path | None,
    typer.Option("--retain", metavar="STATS", help="Statistics of BASE (calibrate BASE --synthetic): what to keep."),
]
RetainWeight = Annotated[float, typer.Option(help="Weight of what --retain keeps against the new task.")]
NoPropagate = Annotated[
    bool, typer.Option("--no-propagate", help="With --retain: patch each layer by itself, and run no models.")
]
Density = Annotated[float, typer.Option(help="Fraction of each tensor's entries to keep from TUNED, 0 to 1.")]
Omega = Annotated[float, typer.Option(help="Weight of salience |dW| against sensitivity in the score, 0 to 1.")]
OwnDensity = Annotated[
    float | None, typer.Option(help="Fraction of each tensor's entries to keep from TUNED, 0 to 1. Default 0.1.")
]
OwnOmega = Annotated[
    float | None, typer.Option(help="Weight of salience |dW| against sensitivity in the score. Default 0.5.")
]
Damping = Annotated[float, typer.Option(help="Added to the Hessian's diagonal, as a multiple of its mean.")]
OwnDamping = Annotated[
    float | None,
    typer.Option(help="Added to the Hessian's diagonal, times its mean. Default 0.01, with --retain 0.1."),
]
Tolerance = Annotated[float, typer.Option(help="Relative residual at which the joint solver stops.")]
MaxIterations = Annotated[int, typer.Option(help="Cap on the joint solver's iterations.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Include = Annotated[list[str] | None, typer.Option(help="Only tensors whose name matches this glob; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="No tensor whose name matches this glob; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of tailorcli.")]
AllowDtype = Annotated[
    bool, typer.Option("--allow-dtype-mismatch", help="TUNED may be stored in another dtype than BASE.")
]
ResizedVocab = Annotated[
    bool, typer.Option("--resized-vocab", help="TUNED has more vocabulary rows: take the new ones over.")
]

OutFolder = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder for the patched checkpoint.")
]
PatchOut = Annotated[
    Path | None,
    typer.Option("--patch-file", metavar="FILE.safetensors", help="Write the kept entries here; with -o or without."),
]
PatchIn = Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file of a task.")]
MaxShardSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Shard anew, such as 5GB; else the shards are the base's.")
]
Task = Annotated[str | None, typer.Option(help="Name of the task, for the patch file.")]
License = Annotated[str | None, typer.Option("--license", help="Licence of the patch, for the patch file.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan and its cost.")]
