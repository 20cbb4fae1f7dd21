"""The page of a sweep: every setting by old and new, its frontier, and the command of each to copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tailorcli.display.web import charts
from tailorcli.display.web.shell import Page, Section, Table, Tile
from tailorcli.terminal import printable
from tailorcli.units import counted, format_bytes

_ENDS = {"base": charts.BASE, "tuned": charts.TUNED}
_FAMILIES = (charts.PATCHED, charts.SECOND, charts.THIRD, "#2f7ed8", "#b08900", "#4d9a3f", "#c0564b", "#7a8a99")


def sweep_page(report: Mapping[str, Any], commands: Mapping[str, str], title: str) -> Page:
    """The page of what ``SweepReport.to_dict`` gives; ``commands`` makes each setting's model again, by its label."""
    points = report["points"]
    families = list(dict.fromkeys(point["family"] for point in points if point["options"] is not None))
    colors = {printable(name): _FAMILIES[n % len(_FAMILIES)] for n, name in enumerate(families)} | _ENDS
    picked = set(report["picked"].values())
    rows = [_row(point, commands.get(point["label"]), point["label"] in picked) for point in points]
    chart = charts.old_against_new(
        rows,
        colors,
        paths=[row for family in families for row in _frontier(points, family)],
        labelled=False,
        tips=(("patch", "patch file", ""), ("took", "took", "")),
    )
    best = [point for point in points if point["label"] in picked]
    best.sort(key=lambda point: -(point["test"]["h_score"]["value"] or 0.0))
    said = [
        f"{counted(len(points) - len(_ends(points)), 'setting')} in {counted(len(families), 'kind')} were patched and "
        "measured beside base and tuned.",
        f"The setting picked of each, {report['rule']}: " + "; ".join(printable(p["label"]) for p in best) + ".",
    ]
    if best:
        old, new, h = (best[0]["test"][key]["value"] or 0.0 for key in ("origin", "target", "h_score"))
        ends = ", ".join(f"{p['label']} {p['test']['h_score']['value'] or 0.0:.1f}" for p in _ends(points))
        said.append(f"The best is right in {old:.1f}% on the old tasks and {new:.1f}% on the new: H {h:.1f} ({ends}).")
    scores = [(point, point["test"]["h_score"]["value"] or 0.0) for point in best[:6]]
    tiles = [Tile(f"{h:.1f}", f"H of {printable(p['family'])}", printable(p["label"])) for p, h in scores]
    how = (
        "Every point is a setting; a line joins those of a kind that no other beats, a diamond is the one picked. "
        "The pointer shows a setting, a click its command."
    )
    sections = [Section("Old against new", how, chart=chart), _table(points, commands, picked)]
    return Page(title, "sweep", said, tiles, sections)


def _ends(points: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [point for point in points if point["options"] is None]


def _row(point: Mapping[str, Any], command: str | None, is_picked: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": printable(point["label"]), "large": is_picked}
    row["series"] = printable(point["label"] if point["options"] is None else point["family"])
    for short, role in (("old", "origin"), ("new", "target"), ("h", "h_score")):
        row[short] = point["test"][role]["value"]
        row[f"{short}_low"] = row[f"{short}_high"] = None  # bars of many points would hide them
    size = point.get("patch_bytes")
    row["patch"] = format_bytes(size) if size else "-"
    row["took"] = f"{point['seconds']:.1f} s" if point["options"] is not None else "-"
    if command is not None:
        row["command"] = command
    return row


def _frontier(points: list[Mapping[str, Any]], family: str) -> list[dict[str, Any]]:
    """The family's frontier as it is at the test, from left to right, with base and tuned at its ends."""
    own = [point for point in points if point["family"] == family and point["on_frontier"]["test"]]
    places = [(p["test"]["origin"]["value"], p["test"]["target"]["value"]) for p in [*own, *_ends(points)]]
    kept = [at for at in places if not any(o[0] >= at[0] and o[1] >= at[1] and o != at for o in places)]
    series = printable(family)
    return [{"series": series, "old": old, "new": new, "order": n} for n, (old, new) in enumerate(sorted(set(kept)))]


def _table(points: list[Mapping[str, Any]], commands: Mapping[str, str], picked: set[str]) -> Section:
    columns = [
        ("setting", "text"),
        ("command", "command"),
        ("kind", "text"),
        ("old, %", "score"),
        ("new, %", "score"),
        ("H", "score"),
    ]
    columns += [("on its frontier", "text"), ("patch, MB", "number"), ("seconds", "number")]
    rows = []
    for point in points:
        is_end, size = point["options"] is None, point.get("patch_bytes")
        frontier = "picked" if point["label"] in picked else "yes" if point["on_frontier"]["test"] else "no"
        rows.append(
            [
                printable(point["label"]),
                commands.get(point["label"]),
                "" if is_end else printable(point["family"]),
                *(point["test"][role]["value"] for role in ("origin", "target", "h_score")),
                "" if is_end else frontier,
                None if not size else size / 1e6,
                None if is_end else point["seconds"],
            ]
        )
    used = [n for n in range(len(columns)) if any(row[n] not in (None, "") for row in rows)]
    table = Table(
        [columns[n] for n in used], [[row[n] for n in used] for row in rows], filters=(used.index(2), used.index(6))
    )
    return Section("Every setting", "A button copies the command that makes that model.", table=table)
