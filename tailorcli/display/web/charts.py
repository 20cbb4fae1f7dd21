"""Pictures as Vega-Lite has them: plain values that ``page.js`` draws. Colours are the page's own, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BASE, TUNED, PATCHED, SECOND, THIRD = (f"var(--{name})" for name in ("base", "tuned", "patched", "second", "third"))
MANY = (PATCHED, SECOND, TUNED, THIRD, BASE)
Row = Mapping[str, Any]


def _field(name: str, kind: str, title: str | None = None, **more: Any) -> dict[str, Any]:
    return {"field": name, "type": kind, "title": title, **more}


def _tip(*fields: tuple[str, str, str]) -> list[dict[str, Any]]:
    """What stands beside the pointer: (field, title, format)."""
    return [
        _field(name, "quantitative" if form else "nominal", title, **({"format": form} if form else {}))
        for name, title, form in fields
    ]


def lines(
    rows: Sequence[Row],
    x: str,
    title_x: str,
    title_y: str,
    colors: Mapping[str, str],
    *,
    form: str = ".1f",
    marked: float | None = None,
    log: bool = False,
) -> dict[str, Any]:
    """Lines over numbers: rows have ``x``, ``series`` and ``value``; ``marked`` is a place on x to point out."""
    color = _field("series", "nominal", scale={"domain": [*colors], "range": [*colors.values()]})
    scale = {"type": "log"} if log else {"zero": True, "nice": True}
    encoding = {
        "x": _field(x, "quantitative", title_x, axis=_whole([row[x] for row in rows]), scale={"nice": False}),
        "y": _field("value", "quantitative", title_y, scale=scale, axis={"tickCount": 5}),
        "color": color,
        "tooltip": _tip(("series", "of", ""), (x, title_x, "d"), ("value", title_y, form)),
    }
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": list(rows)},
            "mark": {"type": "line", "strokeWidth": 2, "point": {"size": 34, "filled": True}},
            "encoding": encoding,
        }
    ]
    if marked is not None:
        rule = {"type": "rule", "color": "var(--muted)", "strokeDash": [4, 4], "tooltip": f"{title_x} {marked:g}: kept"}
        layers.append({"data": {"values": [{x: marked}]}, "mark": rule, "encoding": {"x": _field(x, "quantitative")}})
    return {"layer": layers, "width": "container", "height": 250}


def _whole(values: Sequence[float]) -> dict[str, Any]:
    """An axis of whole numbers without lines; a few of them are named one by one."""
    found = sorted(set(values))
    return {"grid": False, "format": "d", **({"values": found} if len(found) <= 12 else {"tickMinStep": 1})}


_NAMES = {"labelLimit": 150, "ticks": False, "domain": False}


def bars(
    rows: Sequence[Row], title_x: str, colors: Mapping[str, str], order: Sequence[str], *, form: str = ".1f"
) -> dict[str, Any]:
    """Bars by ``kind``, side by side for each ``series``: rows have ``value`` besides."""
    encoding: dict[str, Any] = {
        "y": _field("kind", "nominal", None, sort=list(order), axis=_NAMES),
        "x": _field("value", "quantitative", title_x, axis={"tickCount": 5}),
        "color": _field("series", "nominal", scale={"domain": [*colors], "range": [*colors.values()]}),
        "tooltip": _tip(("kind", "kind", ""), ("series", "of", ""), ("value", title_x, form)),
    }
    if len(colors) == 1:
        encoding["color"]["legend"] = None
    else:
        encoding["yOffset"] = _field("series", "nominal", sort=[*colors])
    step = 22 if len(colors) == 1 else 13 * len(colors)
    mark = {"type": "bar", "cornerRadiusEnd": 3}
    height = step * max(len(order), 1)
    return {"data": {"values": list(rows)}, "mark": mark, "encoding": encoding, "width": "container", "height": height}


def grid(rows: Sequence[Row], measures: Sequence[str], kinds: Sequence[str], layers: Sequence[str]) -> dict[str, Any]:
    """Kind of layer against depth, as strong in colour as the figure is large; buttons choose among ``measures``.

    Rows have ``layer``, ``kind``, ``measure`` and ``value`` in percent.
    """
    step = max(1, -(-len(layers) // 24))
    shown = [label for number, label in enumerate(layers) if number % step == 0]
    spec: dict[str, Any] = {
        "data": {"values": list(rows)},
        "transform": [
            {"filter": "datum.measure === chosen"},
            {
                "joinaggregate": [
                    {"op": "max", "field": "value", "as": "most"},
                    {"op": "min", "field": "value", "as": "least"},
                ]
            },
            {"calculate": "(datum.value - datum.least) / max(datum.most - datum.least, 1e-9)", "as": "share"},
        ],
        "mark": {"type": "rect", "cornerRadius": 3, "color": PATCHED, "stroke": "var(--card)", "strokeWidth": 2},
        "encoding": {
            "x": _field(
                *("layer", "nominal", "layer"),
                sort=list(layers),
                axis={"labelAngle": 0, "values": shown, "ticks": False, "domain": False},
            ),
            "y": _field("kind", "nominal", None, sort=list(kinds), axis=_NAMES),
            "opacity": _field(
                *("share", "quantitative", "of the largest"), scale={"domain": [0, 1], "range": [0.1, 1]}, legend=None
            ),
            "tooltip": _tip(
                ("kind", "kind", ""), ("layer", "layer", ""), ("measure", "figure", ""), ("value", "%", ".2f")
            ),
        },
        "width": "container",
        "height": 26 * len(kinds),
        "params": [{"name": "chosen", "value": measures[0]}],
    }
    if len(measures) > 1:
        buttons = {"input": "radio", "options": [*measures], "name": ""}
        spec["params"] = [{"name": "chosen", "value": measures[0], "bind": buttons}]
    return spec


def equal_h(x: tuple[float, float], y: tuple[float, float]) -> list[dict[str, Any]]:
    """Points of lines on which H is the same, within the limits: ``old``, ``new``, ``h``."""
    low, high = (_harmonic(a, b) for a, b in zip(x, y, strict=True))
    if not 0.0 <= low <= high <= 200.0:  # no percentages
        return []
    step = next((s for s in (0.5, 1, 2, 5, 10) if (high - low) / s <= 9), 20)
    found = []
    level = step * (int(low / step) + 1)
    while level < high:
        for number in range(81):
            old = x[0] + (x[1] - x[0]) * number / 80
            new = level * old / (2 * old - level) if 2 * old > level else -1.0
            if y[0] <= new <= y[1]:
                found.append({"old": old, "new": new, "h": level})
        level += step
    return found


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def limits(values: Iterable[float]) -> tuple[float, float]:
    """An axis with room at both ends, within 0 and 100 where the values are."""
    found = list(values)
    low, high = min(found), max(found)
    room = 0.12 * max(high - low, 2.0)
    return max(0.0, low - room), min(102.0, high + room) if high <= 100 else high + room


def old_against_new(
    rows: Sequence[Row],
    colors: Mapping[str, str],
    *,
    paths: Sequence[Row] = (),
    labelled: bool = True,
    tips: Sequence[tuple[str, str, str]] = (),
) -> dict[str, Any]:
    """Models by their old and new performance over lines of equal H.

    Rows have ``name``, ``series``, ``old``, ``new``, ``h`` and the ends of their intervals (``old_low`` ...), or None
    there; ``large`` marks the one that matters. ``paths`` are points of frontiers, in order.
    """
    x = limits([row[key] for row in rows for key in ("old", "old_low", "old_high") if row.get(key) is not None])
    y = limits([row[key] for row in rows for key in ("new", "new_low", "new_high") if row.get(key) is not None])
    axes = {
        along: _field(
            name, "quantitative", f"{name} tasks, %", scale={"domain": list(ends), "nice": False}, axis={"grid": False}
        )
        for along, name, ends in (("x", "old", x), ("y", "new", y))
    }
    color = _field("series", "nominal", scale={"domain": [*colors], "range": [*colors.values()]})
    tooltip = _tip(("name", "model", ""), ("old", "old, %", ".2f"), ("new", "new, %", ".2f"), ("h", "H", ".2f"), *tips)
    layers = _lines_of_equal_h(equal_h(x, y), axes)
    if paths:
        line = {"type": "line", "strokeWidth": 1.8, "opacity": 0.75}
        order = _field("order", "quantitative")
        layers.append(
            {"data": {"values": list(paths)}, "mark": line, "encoding": axes | {"color": color, "order": order}}
        )
    points = {"values": list(rows)}
    layers += _intervals(points, axes, color)
    size = {"condition": {"test": "datum.large", "value": 190}, "value": 80}
    shape = {"condition": {"test": "datum.large", "value": "diamond"}, "value": "circle"}
    point = {"type": "point", "filled": True, "opacity": 1, "stroke": "var(--card)", "strokeWidth": 1.5}
    encoding = axes | {"color": color, "size": size, "shape": shape, "tooltip": tooltip}
    layers.append({"data": points, "mark": point | {"cursor": "pointer"}, "encoding": encoding})
    if labelled:
        layers += _names(points, axes, color, (x[0] + x[1]) / 2)
    return {
        "layer": layers,
        "width": "container",
        "height": 360,
        "usermeta": {"narrow": {"height": 300}},
        "resolve": {"scale": {"color": "shared"}},
    }


def _lines_of_equal_h(equal: Sequence[Row], axes: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines, and H at the end of each."""
    last = {row["h"]: row for row in equal}
    return [
        {
            "data": {"values": equal},
            "mark": {"type": "line", "strokeWidth": 1, "color": "var(--line)", "clip": True},
            "encoding": axes | {"detail": {"field": "h"}, "tooltip": None},
        },
        {
            "data": {"values": list(last.values())},
            "mark": {"type": "text", "dx": -4, "dy": -7, "align": "right", "fontSize": 11, "color": "var(--muted)"},
            "encoding": axes | {"text": {"value": {"expr": "'H ' + format(datum.h, '~g')"}}, "tooltip": None},
        },
    ]


def _intervals(points: dict[str, Any], axes: dict[str, Any], color: dict[str, Any]) -> list[dict[str, Any]]:
    """The intervals of old and of new as a cross through each point that has them."""
    known = {"filter": "isValid(datum.old_low) && isValid(datum.new_low)"}
    rule = {"type": "rule", "opacity": 0.55, "strokeWidth": 1.5}
    layers = []
    for first, along, across in (("old", "x", "y"), ("new", "y", "x")):
        encoding: dict[str, Any] = {
            along: {**axes[along], "field": f"{first}_low"},
            f"{along}2": {"field": f"{first}_high"},
            across: axes[across],
            "color": color,
        }
        layers.append({"data": points, "transform": [known], "mark": rule, "encoding": encoding})
    return layers


def _names(points: dict[str, Any], axes: dict[str, Any], color: dict[str, Any], middle: float) -> list[dict[str, Any]]:
    """Each point's name on the side where there is room for it."""
    text = {"dy": -10, "fontSize": 12.5, "fontWeight": 600, "limit": 180}
    encoding = axes | {"text": {"field": "name"}, "color": color}
    return [
        {
            "data": points,
            "transform": [{"filter": test}],
            "mark": {"type": "text", "align": align, "dx": dx, **text},
            "encoding": encoding,
        }
        for test, align, dx in ((f"datum.old <= {middle}", "left", 10), (f"datum.old > {middle}", "right", -10))
    ]
