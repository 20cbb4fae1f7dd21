"""What lies beside the weights of a merged model: the first task's side files, and a card of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tailorcli.checkpoint.folder import BASE_CARD, CARD, TUNED_CARD
from tailorcli.files import read_bytes
from tailorcli.merging.plan import MergeInputs, Task
from tailorcli.options import DistillOptions, MergeOptions
from tailorcli.runs.again import merge_command
from tailorcli.runs.card import (
    CardText,
    Source,
    front_of,
    is_ours,
    merge_text,
    plain_name,
    trained_in_words,
    with_card,
)


def merged_side_files(
    side: Mapping[str, Path | bytes],
    inputs: MergeInputs,
    options: MergeOptions,
    distill: DistillOptions | None = None,
    retain: Path | None = None,
) -> dict[str, Path | bytes]:
    """The first task's side files with a model card; the first fine-tuned model's own lies beside it.

    With ``distill`` the merge is trained afterwards; ``retain`` is where the base's samples for that lie.
    """
    tuned = tuple(_source_of(task) for task in inputs.tasks)
    base = Source.of(
        inputs.base.path, next((found for found in (each.facts.get("base_model") for each in tuned) if found), None)
    )
    names = {"base": base.argument}
    for number, task in enumerate(inputs.tasks, 1):
        if task.tuned is not None:
            names[f"tuned {number}"] = Source.of(task.tuned.path).argument
        for role, item in (("patch", task.patch), ("stats", task.stats)):
            if item is not None:
                names[f"{role} {number}"] = plain_name(item.path)
    titles = [task.patch.name for task in inputs.tasks]
    settings = {"method": str(options.method), "weights": ", ".join(f"{w:.3g}" for w in options.shares(len(titles)))}
    settings |= {f"task {number}": title for number, title in enumerate(titles, 1)}
    trained = None
    if distill is not None and retain is not None:
        names["samples"], trained = plain_name(retain), asdict(distill)
        settings["distillation"] = trained_in_words(distill)
    licences = {task.patch.manifest.license for task in inputs.tasks}
    text = CardText(
        title=options.task or " + ".join(titles),
        said=merge_text(titles, base.name, str(options.method), distilled=distill is not None),
        settings=settings,
        command=merge_command(options.to_dict() | {"weights": options.weights}, names, distilled=trained),
        base=base,
        tuned=tuned,
        license=options.license or (licences.pop() if len(licences) == 1 else None),
        merged=True,
    )
    first = side.get(CARD)  # of a patch made before there were cards, the fine-tuned model's own
    others = {name: side[name] for name in (TUNED_CARD, BASE_CARD) if name in side}
    if first is not None and not is_ours(_content(first)):
        others |= {TUNED_CARD: first}
    return with_card(side, text, others)


def _content(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else read_bytes(source)


def _source_of(task: Task) -> Source:
    """A task's fine-tuned model: its folder where that is given, with what the patch's own card says in front."""
    entry = task.patch.side_files.get(CARD)
    facts = front_of(task.patch.side_file(CARD)) if entry is not None and entry.stored else {}
    if task.tuned is None:
        return Source(task.patch.name, None, facts)
    found = Source.of(task.tuned.path)
    return Source(found.name, found.hub_id, {**facts, **found.facts})
