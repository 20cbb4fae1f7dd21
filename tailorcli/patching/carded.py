"""What lies beside the weights of a patched model: the fine-tuned model's side files, and a card of its own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, config_folder, tuned_side_files
from tailorcli.adapters.config import CONFIG_FILE
from tailorcli.adapters.interpolated import original
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import BASE_CARD, CARD, TUNED_CARD, Checkpoint
from tailorcli.checkpoint.quantized import config_of_output
from tailorcli.data.hub import dataset_id
from tailorcli.errors import CheckpointError
from tailorcli.files import read_json
from tailorcli.options import DistillOptions, PatchOptions, options_in_report
from tailorcli.patchfile.report import PatchReport
from tailorcli.patching.inputs import PatchInputs
from tailorcli.runs.again import NEW, RETAINED, SELF_WRITTEN, patch_command
from tailorcli.runs.card import (
    CardText,
    Source,
    patch_text,
    plain_name,
    trained_in_words,
    with_card,
)
from tailorcli.units import counted


def side_files_of(
    inputs: PatchInputs,
    options: PatchOptions,
    distill: DistillOptions | None = None,
    samples: tuple[Stats | None, Stats | None] | None = None,
) -> dict[str, Path | bytes]:
    """Tuned's side files by their names in the output, and a model card; tuned's own card lies beside it.

    The config says how the output is quantised, which tuned may not be, or in another way. ``samples`` are the
    statistics that were used, if they are not those of ``inputs``.
    """
    side: dict[str, Path | bytes] = {}
    tuned = original(inputs.tuned)
    for place, source in tuned_side_files(tuned).items():
        side[place.as_posix()] = source
    if (config := config_of_output(inputs.base, tuned, config_folder(tuned))) is not None:
        side["config.json"] = config
    used = samples if samples is not None else (inputs.stats, inputs.retain_stats)
    there = {name: file for name, file in _own_cards(inputs).items() if file.is_file()}
    return with_card(side, _card(inputs, options, distill, *used), there)


def card_of_trained(
    report: PatchReport,
    base: Checkpoint,
    tuned: Checkpoint,
    distill: DistillOptions,
    samples: tuple[Stats | None, Stats | None],
) -> bytes:
    """The card of a patch whose ``report`` was made before its kept entries were trained on ``samples``."""
    options = options_in_report(report.options)
    data = report.inputs.get("data")
    inputs = PatchInputs(base, tuned, None, None, None if data is None else Path(data["path"]))
    inputs.sources = {role: entry for role, entry in report.inputs.items() if role in (NEW, RETAINED)}
    beside = [name for name, file in _own_cards(inputs).items() if file.is_file()]
    return _card(inputs, options, distill, *samples).render(beside).encode()


def _own_cards(inputs: PatchInputs) -> dict[str, Path]:
    """Where the cards of the models lie that are kept beside our own."""
    tuned = original(inputs.tuned)
    own = {TUNED_CARD: tuned.path / CARD}
    return own | ({BASE_CARD: inputs.base.path / CARD} if isinstance(tuned, AdaptedCheckpoint) else {})


def _card(
    inputs: PatchInputs,
    options: PatchOptions,
    distill: DistillOptions | None,
    stats: Stats | None,
    retain: Stats | None,
) -> CardText:
    tuned = Source.of(original(inputs.tuned).path)
    base = Source.of(inputs.base.path, _base_of_adapter(original(inputs.tuned)) or tuned.facts.get("base_model"))
    given = {"stats": stats, "retain": retain}
    names = {"base": base.argument, "tuned": tuned.argument}
    names |= {role: plain_name(found.path) for role, found in given.items() if found is not None}
    if inputs.graft_data is not None:
        names["data"] = plain_name(inputs.graft_data)
    for role, entry in inputs.sources.items():
        names[role] = entry["path"] if entry["path"] == SELF_WRITTEN else plain_name(Path(entry["path"]))
    values = options.to_dict()
    retained = retain is not None
    said = patch_text(values, base.name, tuned.name, retained=retained, distilled=distill is not None)
    settings = _settings(options, retained, distill)
    for title, found in (("new task", stats), ("what the base must keep", retain)):
        if found is not None:
            settings[title] = _samples_of(found)
    trained = None if distill is None else asdict(distill)
    return CardText(
        title=f"{tuned.name}, patched" if options.task is None else f"{tuned.name}, patched for {options.task}",
        said=said,
        settings=settings,
        command=patch_command(values, names, distilled=trained, calibration=inputs.sources.get(NEW)),
        base=base,
        tuned=(tuned,),
        license=options.license,
        datasets=_dataset_of(stats),
    )


def _base_of_adapter(tuned: object) -> Any:
    """What an adapter's config calls its base, an id of the Hub or a path; None of a full checkpoint."""
    if not isinstance(tuned, AdaptedCheckpoint):
        return None
    try:
        return read_json(tuned.path / CONFIG_FILE).get("base_model_name_or_path")
    except CheckpointError:
        return None


_SHOWN = (
    *("method", "density", "omega", "score", "solver", "damping", "retain_weight", "propagate", "weight", "threshold"),
    *("alpha", "beta", "threshold_scale", "teacher_weight"),
    *("include", "exclude", "resized_vocab", "fp8_output"),
)


def _settings(
    options: PatchOptions, retained: bool, distill: DistillOptions | None
) -> dict[str, str | tuple[str, ...]]:
    """The options that a reader asks for, of those that decide what is written; the report has them all."""
    values = options.identity(retained)
    shown: dict[str, str | tuple[str, ...]] = {}
    for name in _SHOWN:
        value = values.get(name)
        if value is None or value is False or value == () or (name, value) in (("method", "tailor"), ("weight", 1.0)):
            continue
        text = f"{value:g}" if isinstance(value, float) else "yes" if value is True else str(value)
        shown[name.replace("_", " ")] = tuple(value) if isinstance(value, (list, tuple)) else text
    if distill is not None:
        shown["distillation"] = trained_in_words(distill)
    return shown


def _dataset_of(stats: Stats | None) -> tuple[str, ...]:
    """The dataset of the Hub on which statistics were made; nothing where it was a file, or the model's own samples."""
    data = {} if stats is None else stats.manifest.get("data")
    name = data.get("file") if isinstance(data, dict) else None
    found = dataset_id(name) if isinstance(name, str) else None
    return () if found is None else (found,)


def _samples_of(stats: Stats) -> str:
    """How many samples of what statistics were made of, as their manifest has it."""
    data = stats.manifest.get("data")
    data = data if isinstance(data, dict) else {}
    count, tokens, file = data.get("samples"), data.get("tokens"), data.get("file")
    parts = [counted(number, what) for number, what in ((count, "sample"), (tokens, "token")) if type(number) is int]
    whose = "that the model wrote itself" if data.get("synthetic") else ""
    if isinstance(file, str) and file:
        name = (_dataset_of(stats) or (plain_name(Path(file)),))[0]
        whose = f"of {name}" if not whose else f"{whose}, going on from {name}"
    return " ".join([", ".join(parts) or "samples", whose]).strip()
