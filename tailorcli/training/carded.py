"""What lies beside the weights of a fine-tuned model: the base's side files, and a card of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailorcli.checkpoint.folder import BASE_CARD, CARD, Checkpoint, side_files
from tailorcli.data.hub import dataset_id
from tailorcli.data.sources import STDIN
from tailorcli.files import PathLike
from tailorcli.patchfile.report import FINETUNE_FILE
from tailorcli.runs.again import finetune_command
from tailorcli.runs.card import CardText, Source, code, plain_name, with_card
from tailorcli.training.settings import FinetuneOptions
from tailorcli.units import counted

_HELD = {  # what each method does against forgetting, as a card says it
    "half": "In turn one half of the weights was trained and the other rested (half fine-tuning).",
    "l2": "A penalty on its distance from the base held it near that.",
    "spider": "In every step those entries were trained that matter more to the new data than to the base, and the "
    "others put back (SPIDER).",
    "dowser": "Of each layer the {ratio:.3g}% of the entries that matter least to what the base says were trained "
    "(Model-Dowser); every other weight is the base's, bit for bit.",
}


@dataclass(frozen=True)
class Given:
    """What a fine-tune was called with, beside its base and its options."""

    data: PathLike
    importance: PathLike | None = None
    training_args: PathLike | None = None


def side_files_of(
    base: Checkpoint, options: FinetuneOptions, given: Given, facts: Mapping[str, Any]
) -> dict[str, Path | bytes]:
    """The base's side files by their names in the output, and a model card; the base's own lies beside it.

    ``facts`` are what the run says of its steps, examples and tokens.
    """
    side: dict[str, Path | bytes] = {place.as_posix(): base.path / place for place in side_files(base.path)}
    others = {BASE_CARD: side[CARD]} if CARD in side else {}
    return with_card(side, _card(Source.of(base.path), options, given, facts), others)


def _card(base: Source, options: FinetuneOptions, given: Given, facts: Mapping[str, Any]) -> CardText:
    called = str(given.data)
    dataset = dataset_id(called)
    data = dataset or ("standard input" if called == STDIN else plain_name(Path(called)))
    said = [f"This model is {code(base.name)} after fine-tuning on {code(data)}."]
    if options.method in _HELD:
        said.append(_HELD[options.method].format(ratio=100 * options.update_ratio))
    tokens = f"{facts['learnt_tokens']:,} of {counted(facts['tokens'], 'token')} learnt"
    settings = {
        "method": str(options.method),
        "learning rate": f"{options.learning_rate:g}",
        "steps": f"{facts['steps']:,}",
        "data": f"{counted(facts['examples'], 'record')} of {data}, {tokens}",
    }
    names = {"base": base.argument, "data": called if dataset or called == STDIN else data}
    for role, path in (("importance", given.importance), ("training_args", given.training_args)):
        if path is not None:
            names[role] = plain_name(Path(path))
    values = vars(options) | {f"{name}_column": value for name, value in vars(options.columns).items()}
    return CardText(
        title=f"{base.name}, fine-tuned",
        said=" ".join(said),
        settings=settings,
        command=finetune_command(values, vars(FinetuneOptions()), names),
        base=base,
        tuned=(),
        datasets=() if dataset is None else (dataset,),
        tags=(),
        report=FINETUNE_FILE,
    )
