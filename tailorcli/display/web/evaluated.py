"""The part of a page that shows what an evaluation found: old against new, or a bar for each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tailorcli.display.web import charts
from tailorcli.display.web.shell import Section, Tile
from tailorcli.terminal import printable

_BASE, _TUNED, _OWN, _OTHER = "base", "fine-tuned", "this model", "others"


def evaluation_section(brief: Mapping[str, Any], own: str | None) -> Section:
    """Old against new where the tasks have these roles, else each task; ``own`` is the model that the page is of."""
    rows = [_row(brief, model, own) for model in brief["models"]]
    if not all(row["old"] is not None and row["new"] is not None for row in rows) or not rows:
        return _by_task(brief, own)
    colors = {_BASE: charts.BASE, _TUNED: charts.TUNED, _OWN: charts.PATCHED, _OTHER: charts.SECOND}
    there = {series: color for series, color in colors.items() if any(row["series"] == series for row in rows)}
    said = (
        "Up is better on the new tasks, right on the old ones; along a grey line H, their harmonic mean, is the same. "
    )
    said += "Bars are 95% intervals over the items."
    return Section("Old against new", said, chart=charts.old_against_new(rows, there))


def _row(brief: Mapping[str, Any], model: Mapping[str, Any], own: str | None) -> dict[str, Any]:
    name = model["name"]
    series = _OWN if name == own else _BASE if name == brief["base"] else _TUNED if name == brief["tuned"] else _OTHER
    row: dict[str, Any] = {"name": printable(name), "series": series, "large": series == _OWN}
    for short, role in (("old", "origin"), ("new", "target"), ("h", "h_score")):
        figure = model["summary"].get(role) or {}
        row[short] = figure.get("value")
        row[f"{short}_low"], row[f"{short}_high"] = figure.get("interval") or (None, None)
    return row


def _by_task(brief: Mapping[str, Any], own: str | None) -> Section:
    rows = [
        {"kind": printable(task), "series": printable(model["name"]), "value": figure["value"]}
        for model in brief["models"]
        for task, figure in model["tasks"].items()
        if figure["value"] is not None
    ]
    names = [model["name"] for model in brief["models"]]
    others = iter(charts.MANY[1:] * len(names))
    colors = {printable(name): charts.PATCHED if name == own else next(others) for name in names}
    order = [printable(task) for task in brief["tasks"]]
    return Section("What was measured", "Percent right on held-out items.", chart=charts.bars(rows, "%", colors, order))


def evaluation_sentence(brief: Mapping[str, Any], own: str | None) -> str | None:
    """What came out, beside base and the fine-tuned model where they were measured, too; None where it is not known."""
    by_role = {row["series"]: row for row in (_row(brief, model, own) for model in brief["models"])}
    mine = by_role.get(_OWN)
    if mine is None or mine["old"] is None or mine["new"] is None:
        return None
    parts = []
    for part, what in (("old", "the old tasks"), ("new", "the new")):
        known = {name: by_role[name][part] for name in (_BASE, _TUNED) if name in by_role}
        others = ", ".join(f"{name} {value:.1f}" for name, value in known.items() if value is not None)
        parts.append(f"{mine[part]:.1f}% on {what}" + (f" ({others})" if others else ""))
    return f"Measured, it is right in {' and '.join(parts)}."


def evaluation_tiles(brief: Mapping[str, Any], own: str | None) -> list[Tile]:
    """Old, new and H of the model, with those of base and the fine-tuned one below."""
    by_role = {row["series"]: row for row in (_row(brief, model, own) for model in brief["models"])}
    mine = by_role.get(_OWN)
    if mine is None:
        return []
    tiles = []
    for part, label in (("old", "old tasks, %"), ("new", "new tasks, %"), ("h", "H")):
        known = [(name, by_role[name][part]) for name in (_BASE, _TUNED) if name in by_role]
        note = ", ".join(f"{name} {value:.1f}" for name, value in known if value is not None)
        if mine[part] is not None:
            tiles.append(Tile(f"{mine[part]:.1f}", label, note))
    return tiles
