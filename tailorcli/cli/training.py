"""The commands that train: ``probe`` and ``finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailorcli.cli.arguments import (
    OUTPUT,
    RUNNING,
    AsJson,
    Base,
    BlockByBlock,
    Device,
    DryRun,
    DType,
    Overwrite,
    PromptColumn,
    Quiet,
    ResponseColumn,
    Resume,
    Tensors,
    TextColumn,
    TrustRemoteCode,
    Verbose,
)
from tailorcli.cli.output import print_json, print_rich, say, show_reasons, show_stages
from tailorcli.cli.verbosity import wants_progress
from tailorcli.distributed import require_alone
from tailorcli.files import in_shell
from tailorcli.options import Blockwise, DataColumns, DTypeName
from tailorcli.training.settings import Accumulate, FinetuneOptions, ProbeOptions, TuningMethod
from tailorcli.units import counted, format_bytes, format_share

if TYPE_CHECKING:
    from tailorcli.training.outcome import FinetunePlan, FinetuneReport

METHOD = "The method"

TrainingDevice = Annotated[
    str, typer.Option(metavar="DEVICE", help="cpu or cuda; auto: GPUs where there are.", rich_help_panel=RUNNING)
]


def probe(
    base: Base,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="IMPORTANCE", help="Folder for the scores.")],
    data: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Samples to use in place of those that BASE writes itself.")
    ] = None,
    num_samples: Annotated[int, typer.Option(metavar="N", help="Samples.")] = 64,
    rademacher: Annotated[int, typer.Option(metavar="R", help="Draws of random signs, a backward pass each.")] = 8,
    seq_len: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of a sample.", show_default="256; with --data 2048")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the samples and the signs.")] = 0,
    text_column: TextColumn = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Samples in a pass: decides memory and speed.", rich_help_panel=RUNNING)
    ] = 4,
    device: Device = "auto",
    dtype: DType = DTypeName.AUTO,
    blockwise: BlockByBlock = Blockwise.AUTO,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score how much each weight of a base matters to what it says.

    Method dowser of finetune takes the scores. Needs no data: the samples are what the base writes itself. A
    model that does not fit the device with what backward needs goes block by block, on --data where it does not fit
    at all. IMPORTANCE takes two bytes an entry.

    Examples:
      tailorcli probe BASE -o importance
      tailorcli probe BASE -o importance --data pictures.jsonl
    """
    from tailorcli.training.probe import probe_model

    require_alone("probe")
    options = ProbeOptions(
        num_samples=num_samples,
        rademacher=rademacher,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        columns=DataColumns(text_column, prompt_column, response_column),
        overwrite=overwrite,
        blockwise=blockwise,
    )
    report = probe_model(base, output, options, data, wants_progress(as_json))
    if as_json:
        print_json(report.to_dict())
        return
    whose = "" if data is not None else " that the model wrote itself"
    what = f"{counted(report.samples, 'sample')}{whose}, {counted(report.tokens, 'token')}"
    made = f"scores of {report.entries:,} entries in {counted(report.scored, 'tensor')}"
    say(f"{what}: {made} in {output} ({format_bytes(report.bytes)}, {report.seconds:.1f} s)")
    show_reasons(report.unscored, "without scores")
    say(
        f"next: tailorcli finetune {in_shell(base)} --data FILE -o OUT --method dowser --importance {in_shell(output)}",
        err=True,
    )


def finetune(
    base: Base,
    data: Annotated[
        Path,
        typer.Option(
            metavar="DATA", help="Records to learn: a file, a folder, - for standard input, or a dataset of the Hub."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the fine-tuned checkpoint.")
    ],
    method: Annotated[
        TuningMethod,
        typer.Option(metavar="METHOD", help="full, half, l2, spider or dowser.", rich_help_panel=METHOD),
    ] = TuningMethod.FULL,
    importance: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="dowser: what probe wrote of BASE.", rich_help_panel=METHOD)
    ] = None,
    update_ratio: Annotated[
        float, typer.Option(metavar="R", help="dowser: share of entries to train.", rich_help_panel=METHOD)
    ] = 0.1,
    accumulate: Annotated[
        Accumulate,
        typer.Option(metavar="HOW", help="spider: gradients by momentum, or their sum.", rich_help_panel=METHOD),
    ] = Accumulate.MOMENTUM,
    strength: Annotated[
        float, typer.Option(metavar="X", help="l2: weight of the distance from BASE.", rich_help_panel=METHOD)
    ] = 1e-3,
    round_steps: Annotated[
        int, typer.Option(metavar="N", help="half: steps between two draws.", rich_help_panel=METHOD)
    ] = 1,
    trainable: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Train what matches; repeatable. Else all but embeddings, output layer and towers.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    last_layers: Annotated[
        int | None, typer.Option(metavar="N", help="Train the last N blocks alone.", rich_help_panel=METHOD)
    ] = None,
    epochs: Annotated[float, typer.Option(metavar="N", help="Times through the data.")] = 1.0,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimiser steps, in place of --epochs.")] = None,
    learning_rate: Annotated[float, typer.Option(metavar="R", help="Of AdamW, falling to 0.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Records in a pass, on each device.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(metavar="N", help="Passes in a step.")] = 1,
    seq_len: Annotated[int, typer.Option(metavar="N", help="Most tokens of a record.")] = 2048,
    warmup: Annotated[float, typer.Option(metavar="F", help="Share of the steps in which the rate rises.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(metavar="X", help="Of the entries that are trained.")] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order of the records, and of half's draws.")] = 0,
    text_column: TextColumn = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    device: TrainingDevice = "auto",
    dtype: DType = DTypeName.AUTO,
    trust_remote_code: TrustRemoteCode = False,
    training_args: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="More of transformers' TrainingArguments.", rich_help_panel=RUNNING),
    ] = None,
    save_every: Annotated[
        int, typer.Option(metavar="N", help="Steps between states to go on from.", rich_help_panel=OUTPUT)
    ] = 500,
    resume: Resume = False,
    dry_run: DryRun = False,
    tensors: Tensors = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a base on new data, by a method that lets it forget less.

    dowser (Model-Dowser) trains the entries that matter least to what the base says; spider (SPIDER) picks entries in
    every step; half trains half of the blocks, l2 stays near the base, full does nothing of the kind. It runs on
    transformers' Trainer: torchrun starts it on several devices. A response is learnt alone, where records have one.

    Examples:
      tailorcli finetune BASE --data FILE -o OUT --method spider --last-layers 4
      tailorcli finetune BASE --data FILE -o OUT --method dowser --importance IMP
    """
    from tailorcli.training.finetune import finetune_model, plan_finetune

    options = FinetuneOptions(
        method=method,
        update_ratio=update_ratio,
        trainable=tuple(trainable or ()),
        last_layers=last_layers,
        accumulate=accumulate,
        strength=strength,
        round_steps=round_steps,
        seed=seed,
        epochs=epochs,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        seq_len=seq_len,
        warmup=warmup,
        weight_decay=weight_decay,
        save_every=save_every,
        resume=resume,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        columns=DataColumns(text_column, prompt_column, response_column),
    )
    if dry_run:
        plan = plan_finetune(base, data, output, options, importance, training_args)
        print_json(plan.to_dict()) if as_json else _show_plan(plan)
        return
    announce = None if as_json else _announce
    report = finetune_model(base, data, output, options, importance, training_args, wants_progress(as_json), announce)
    if report is None:  # a further process of torchrun
        return
    if as_json:
        print_json(report.to_dict())
        return
    _show_report(report, tensors)


def _facts(plan: FinetunePlan) -> list[tuple[str, str]]:
    """A plan in words."""
    share = format_share(plan.entries / plan.of_entries)
    what = f"{plan.entries:,} of {plan.of_entries:,} entries ({share}) in {counted(plan.parameters, 'tensor')}"
    learnt = f"{counted(plan.examples, 'record')}, {counted(plan.tokens, 'token')}, {plan.learnt_tokens:,} to learn"
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.memory.items())
    more = f"activations and what the optimiser {plan.uncounted} holds" if plan.uncounted else "activations"
    return [
        ("method", plan.method),
        ("trains", what),
        ("data", learnt),
        ("steps", f"{plan.steps:,}"),
        ("memory", f"{format_bytes(sum(plan.memory.values()))} and {more}: {parts}"),
        ("writes", f"{format_bytes(plan.write_bytes)} to {plan.output}"),
    ]


def _show_plan(plan: FinetunePlan) -> None:
    from tailorcli.display.summary import facts_table

    print_rich(facts_table(dict(_facts(plan))))
    say("dry run: nothing was written", err=True)


def _announce(plan: FinetunePlan) -> None:
    facts = dict(_facts(plan))
    say(f"{plan.method}: training {facts['trains']}, {facts['data']}, {facts['steps']} steps", err=True)


def _show_report(report: FinetuneReport, every_tensor: bool) -> None:
    """What a fine-tune did, in a few lines; every tensor on request."""
    if every_tensor:
        print_rich(_tensor_table(report))
    show_reasons(report.unscored, "left frozen")
    share = format_share(report.moved / report.numel if report.numel else 0.0)
    say(f"moved {report.moved:,} of {report.numel:,} entries ({share}), drift {format_share(report.drift)} of the base")
    if report.losses:
        first, last = report.losses[0][1], report.losses[-1][1]
        say(f"loss {first:.4g} at first, {last:.4g} at last, in {counted(report.steps, 'step')}")
    peaks = [("on the GPU", report.peak_cuda_bytes), ("in this process", report.peak_memory_bytes)]
    memory = ", ".join(f"{format_bytes(size)} {where}" for where, size in peaks if size)
    say(f"wrote {report.output} ({report.seconds:.1f} s; peak memory {memory})")
    show_stages(report.stages)


def _tensor_table(report: FinetuneReport) -> object:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("tensor", "entries", "moved", "drift"):
        table.add_column(name, justify="left" if name == "tensor" else "right", overflow="fold")
    for tensor in report.tensors:
        table.add_row(tensor.name, f"{tensor.numel:,}", format_share(tensor.share), format_share(tensor.drift))
    return table
