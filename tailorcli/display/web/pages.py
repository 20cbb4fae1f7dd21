"""The page of whatever ``inspect`` knows: a patch in full, statistics and plain checkpoints by their figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tailorcli.display.inspection import KINDS, Inspection
from tailorcli.display.names import by_kind, place_of, short_names
from tailorcli.display.web import charts
from tailorcli.display.web.report import report_page
from tailorcli.display.web.shell import Page, Section, Table, Tile
from tailorcli.errors import CheckpointError
from tailorcli.files import PathLike, in_shell
from tailorcli.patchfile.report import EVALUATION_FILE
from tailorcli.runs.evaluated import read_evaluation
from tailorcli.units import counted, format_bytes


def page_of(inspection: Inspection, evaluation: PathLike | None = None) -> Page:
    """The page of an inspection; ``evaluation`` is a report of ``evaluate``.

    Without one it is what ``evaluate --write-card`` left in the checkpoint, if that is the one that was measured.
    Raises CheckpointError where ``evaluation`` is none, or is not of this model.
    """
    if inspection.report is not None:
        return report_page(inspection, inspection.report, _evaluation_of(inspection, evaluation))
    if evaluation is not None:
        raise CheckpointError(f"{inspection.path} is no patched model, whose evaluation could be drawn", "leave it out")
    facts = {name: _plain(value) for name, value in inspection.facts.items()}
    name = Path(inspection.path).resolve().name
    said = [f"{name} is an {KINDS[inspection.kind]}."]
    tiles: list[Tile] = []
    sections: list[Section] = []
    if inspection.hessians:
        said, tiles, sections = _of_stats(inspection)
    elif inspection.tensors:
        said, tiles, sections = _of_checkpoint(inspection)
    sections.append(Section("What it is", facts=facts))
    return Page(name, KINDS[inspection.kind], said, tiles, sections)


def _evaluation_of(inspection: Inspection, given: PathLike | None) -> dict[str, Any] | None:
    if given is not None:
        return _of_this_model(inspection, read_evaluation(Path(given)), given)
    there = Path(inspection.path) / EVALUATION_FILE
    if inspection.kind != "patched" or not there.is_file():
        return None
    found = read_evaluation(there)
    return found if found.get("fingerprint") == inspection.facts.get("fingerprint") else None


def _of_this_model(inspection: Inspection, found: dict[str, Any], given: PathLike) -> dict[str, Any]:
    """The evaluation, with this model named as the one that it is of. Raises CheckpointError where it is of others."""
    own = inspection.facts.get("fingerprint")
    if inspection.kind != "patched" or own is None or not any(model.get("fingerprint") for model in found["models"]):
        return found  # of a report, or by a version that noted no fingerprints
    name = next((model["name"] for model in found["models"] if model.get("fingerprint") == own), None)
    if name is None:
        what = f"{given} is no evaluation of {inspection.path} as it is now"
        raise CheckpointError(
            what, f"make one: tailorcli evaluate BASE TUNED {in_shell(inspection.path)} ... -o REPORT.json"
        )
    return {**found, "model": name}


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:,}" if type(value) is int else str(value)


def _of_stats(inspection: Inspection) -> tuple[list[str], list[Tile], list[Section]]:
    facts, hessians = inspection.facts, inspection.hessians
    full = {name: info for name, info in hessians.items() if info["kind"] == "full"}
    model = Path(str(facts["calibrated model"])).name or "a model"
    said = [
        f"What {model} uses of its weights on the samples it was run over.",
        f"{counted(len(hessians), 'Hessian')} for {counted(facts['tensors calibrated'], 'tensor')}; "
        f"{counted(facts['tensors without statistics'], 'tensor')} without.",
    ]
    tiles = [Tile(f"{len(hessians):,}", "Hessians"), Tile(format_bytes(facts["bytes"]), "of statistics")]
    for name, label in (("data samples", "samples"), ("data tokens", "tokens")):
        if type(facts.get(name)) is int:
            tiles.append(Tile(f"{facts[name]:,}", label))
    sections = []
    pictures: tuple[tuple[str, str, Callable[[dict[str, Any]], float]], ...] = (
        ("How large the inputs are", "Twice the mean square of a layer's inputs.", lambda i: i["mean_diagonal"]),
        ("Inputs that no token excites", "Percent of a layer's inputs.", lambda i: 100 * i["dead"] / max(i["size"], 1)),
    )
    for title, said_of, figure in pictures:
        rows: list[dict[str, Any]] = [
            {"layer": place_of(name).number, "series": kind, "value": figure(full[name])}
            for kind, names in by_kind(full, lambda n: n, lambda n: False).items()
            for name in names
            if place_of(name).number is not None
        ]
        if rows and any(row["value"] for row in rows):
            kinds = list(dict.fromkeys(row["series"] for row in rows))
            colors = dict(zip(kinds, charts.MANY * len(kinds), strict=False))
            is_log = "large" in title and all(row["value"] > 0 for row in rows)
            chart = charts.lines(rows, "layer", "layer", "", colors, form=".4g", log=is_log)
            sections.append(Section(title, said_of, chart=chart, wide=False))
    if len(sections) == 1:
        sections = [Section(sections[0].title, sections[0].said, chart=sections[0].chart)]
    names = short_names(hessians)
    keys = (("channels", "size"), ("tokens", "tokens"), ("mean of the diagonal", "mean_diagonal"), ("dead", "dead"))
    columns = [("Hessian", "name"), ("kind", "text"), *((title, "number") for title, _ in keys), ("used by", "count")]
    rows_of = [
        [names[n], hessians[n]["kind"], *(hessians[n].get(key) for _, key in keys), hessians[n]["used_by"]]
        for n in names
    ]
    sections.append(Section("Every Hessian", table=Table(columns, rows_of, filters=(1,))))
    if inspection.uncalibrated:
        sections.append(Section("Without statistics, and why", facts=_counted(inspection.uncalibrated.values())))
    return said, tiles, sections


def _counted(reasons: Iterable[str]) -> dict[str, str]:
    found: dict[str, int] = {}
    for reason in reasons:
        found[reason] = found.get(reason, 0) + 1
    return {reason: counted(count, "tensor") for reason, count in found.items()}


_TRAINED = "It was fine-tuned by the method {method} for {steps:,} steps: {share moved:.1%} of the weights moved."


def _of_checkpoint(inspection: Inspection) -> tuple[list[str], list[Tile], list[Section]]:
    facts, tensors = inspection.facts, inspection.tensors
    dtypes = ", ".join(facts["dtypes"])
    said = [
        f"{facts['architecture']}: {facts['parameters']:,} weights in {counted(facts['tensors'], 'tensor')}, {dtypes}.",
        _TRAINED.format(**facts) if inspection.kind == "fine-tuned" else "It holds no report of a patch by tailorcli.",
    ]
    tiles = [Tile(f"{facts['tensors']:,}", "tensors"), Tile(format_bytes(facts["bytes"]), dtypes)]

    def numel(tensor: dict[str, Any]) -> int:
        return math.prod(int(size) for size in tensor["shape"])

    kinds = by_kind(tensors, lambda t: t["name"], lambda t: len(t["shape"]) == 1)
    rows = [{"kind": kind, "series": "weights", "value": sum(map(numel, group)) / 1e6} for kind, group in kinds.items()]
    chart = charts.bars(rows, "million weights", {"weights": charts.PATCHED}, list(kinds), form=",.3f")
    names = short_names(t["name"] for t in tensors)
    kind_of = {t["name"]: kind for kind, group in kinds.items() for t in group}
    by_name = {t["name"]: t for t in tensors}
    columns = [("tensor", "name"), ("kind", "text"), ("dtype", "text"), ("shape", "text"), ("weights", "count")]
    table: list[list[Any]] = [
        [names[n], kind_of[n], by_name[n]["dtype"], " × ".join(map(str, by_name[n]["shape"])), numel(by_name[n])]
        for n in names
    ]
    if inspection.kind == "fine-tuned":
        columns += [("moved", "percent"), ("drift", "percent")]
        table = [[*row, by_name[n].get("moved"), by_name[n].get("drift")] for row, n in zip(table, names, strict=True)]
    return (
        said,
        tiles,
        [
            Section("Weights by kind of layer", chart=chart),
            Section("Every tensor", table=Table(columns, table, filters=(1, 2))),
        ],
    )
