"""The page of a patch, a merge or a score: what was done, what came out, where it sits, every tensor, and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from tailorcli.display.inspection import KINDS, Inspection
from tailorcli.display.names import by_kind, by_layer, place_of, short_names, stack_titles
from tailorcli.display.summary import short_count
from tailorcli.display.web import charts
from tailorcli.display.web.evaluated import evaluation_section, evaluation_sentence, evaluation_tiles
from tailorcli.display.web.shell import Page, Section, Table, Tile
from tailorcli.patchfile.records import TensorRecord
from tailorcli.patchfile.report import (
    MERGE,
    PatchReport,
    has_teacher,
    is_dense,
    is_retained,
    share,
    target_in_words,
    trained_tasks,
)
from tailorcli.runs.again import NEW, merge_command, patch_command, shell_text
from tailorcli.runs.card import merge_text, patch_text
from tailorcli.runs.evaluated import with_ends
from tailorcli.terminal import printable
from tailorcli.units import counted, format_share

Figure = Callable[[TensorRecord], float | None]
BEFORE_AFTER = {"before adjusting": charts.BASE, "after": charts.PATCHED}


def report_page(inspection: Inspection, report: PatchReport, evaluation: Mapping[str, Any] | None) -> Page:
    """The page of an inspection that has a report; ``evaluation`` is what is known of its performance."""
    evaluation = None if evaluation is None else with_ends(evaluation, report.inputs)
    own = _own_name(inspection, evaluation)
    measured = evaluation_sentence(evaluation, own) if evaluation else None
    said = [_what_was_done(report), _what_came_out(report)]
    if measured is None and evaluation is not None:
        measured = "It was measured: H needs to know which tasks are old and new, by --origin and --target."
    said.append(measured or _next_step(report))
    sections = [
        *([evaluation_section(evaluation, own)] if evaluation else []),
        *_where(report),
        *([_distillation(report.distillation)] if report.distillation else []),
        _tensors(report),
        *_left(report),
        _again(inspection, report),
    ]
    tiles = [*(evaluation_tiles(evaluation, own) if evaluation else []), *_tiles(report, short=bool(measured))]
    return Page(Path(inspection.path).resolve().name, KINDS[inspection.kind], said, tiles, sections)


def _own_name(inspection: Inspection, evaluation: Mapping[str, Any] | None) -> str | None:
    """Which of the evaluated models the page is of: the one that the evaluation is of, else the one of its name."""
    if evaluation is None:
        return None
    name = Path(inspection.path).resolve().name
    return evaluation["model"] or next((m["name"] for m in evaluation["models"] if Path(m["name"]).name == name), None)


def _names(report: PatchReport) -> dict[str, str]:
    """Each input as a command takes it: a model of the Hub by its id and commit, anything else by its path."""
    return {role: entry.get("hub") or entry["path"] for role, entry in report.inputs.items()}


def _what_was_done(report: PatchReport) -> str:
    names = {
        role: entry["hub"].partition("@")[0] if entry.get("hub") else Path(entry["path"]).name or entry["path"]
        for role, entry in report.inputs.items()
    }
    options = report.options
    if report.command == MERGE:
        tasks, trained = [str(task) for task in options["tasks"]], report.distillation is not None
        text = merge_text(tasks, names["base"], options["method"], distilled=trained)
    else:
        text = patch_text(
            {"method": "tailor", "solver": "none", "weight": 1.0, **options},
            names["base"],
            names.get("tuned", "the fine-tuned model"),
            retained=is_retained(names),
            distilled=report.distillation is not None,
        )
    return text.replace("`", "")


def _what_came_out(report: PatchReport) -> str:
    totals = report.totals
    tensors = counted(totals["tensors_patched"], "tensor")
    weights = f"{totals['kept']:,} of {totals['numel']:,} weights in {tensors}"
    if report.command == MERGE:
        return (
            f"It changes {weights}; of what any task changes {format_share(totals['jaccard'])} is changed by all, and "
            f"{totals['sign_conflicts']:,} of the shared weights were pulled both ways."
        )
    if is_dense(report):
        return f"Any of the {totals['numel']:,} weights in {tensors} may differ from the base's."
    held = f"{format_share(totals['delta_share_kept'])} of the squared change"
    if totals["error_before"] is None:
        return f"It {'would keep' if report.command == 'score' else 'keeps'} {weights}, which hold {held}."
    drift = totals.get("drift")
    return (
        f"It keeps {weights}, which hold {held}: the layers' outputs are off those of {_towards(report)} by "
        f"{format_share(totals['error_after'])} of what that changed in them"
        + (f", and what the base must keep moved {format_share(drift)} as far." if drift is not None else ".")
    )


def _towards(report: PatchReport) -> str:
    """What the patch goes towards, and its figures are measured against."""
    return target_in_words(report.options, "the fine-tuned model")


def _next_step(report: PatchReport) -> str:
    if report.command == "score":
        return "Nothing was written: this is what a patch would keep."
    if report.distillation is not None:
        return _trained(report.distillation, _towards(report))
    return "Nobody has measured it yet: tailorcli evaluate says how it does, with tasks of yours."


def _trained(found: Mapping[str, Any], towards: str) -> str:
    """What training did to both held-out divergences, from its first step to the best."""
    first, best = 0, found["steps"].index(found["best"])
    if best == first:
        return "Training gained nothing on the samples held out: the patch is what it began with."
    several = trained_tasks(found)
    new = towards if several <= 1 else f"the {several} fine-tuned models, on average"
    said = []
    for part, model in (("new", new), ("retained", "the base")):
        begin, end = found[part][first], found[part][best]
        way = "nearer to" if end < begin else "further from" if end > begin else "as far from"
        said.append(f"{way} {model} ({begin:.3g} to {end:.3g})")
    return f"Training brought it {' and '.join(said)}, in nats a token."


def _tiles(report: PatchReport, *, short: bool) -> list[Tile]:
    totals = report.totals
    whole = totals["numel"] + totals["numel_at_base"]
    tiles = [
        Tile(
            format_share(share(totals["kept"], whole)),
            "of the weights patched" if not is_dense(report) else "of the weights may differ",
            f"{short_count(totals['kept'])} of {short_count(whole)}",
        )
    ]
    if report.command == MERGE:
        tiles.append(Tile(format_share(totals["jaccard"]), "changed by all tasks", "of what any changes"))
        return tiles
    if not short and not is_dense(report):
        tiles.append(Tile(format_share(totals["delta_share_kept"]), "of the squared change", "is in those weights"))
    goal = "its teacher" if has_teacher(report.options) else "fine-tuned"
    if totals["error_after"] is not None:
        before = f"{format_share(totals['error_before'])} before adjusting; the base 100%"
        tiles.append(Tile(format_share(totals["error_after"]), f"layer error to {goal}", before))
    if totals.get("drift") is not None:
        tiles.append(Tile(format_share(totals["drift"]), "drift on what to keep", f"{goal} 100%, the base 0%"))
    return tiles


def _figures(report: PatchReport) -> dict[str, Figure]:
    """What the grid can show of a tensor, as shares."""

    def full(key: str) -> Figure:
        return lambda t: getattr(t, key) if t.kind == "full" else None

    found: dict[str, Figure] = {}
    if report.command == MERGE:
        found |= {"weights patched": lambda t: t.kept / t.numel, "changed by all tasks": lambda t: t.jaccard}
        found["signs that differ"] = lambda t: share(t.sign_conflicts, t.shared)
        for number, task in enumerate(report.options["tasks"]):
            found[f"error to {printable(task)}"] = _error_to(number)
    else:
        found["error after adjusting"] = full("error_after")
        found["drift"] = full("drift")
        found["share of the squared change kept"] = lambda t: share(t.delta_sq_kept, t.delta_sq)
        found["weights kept"] = lambda t: t.kept / t.numel
    patched = [t for t in report.tensors if t.patched]
    known = {name: [figure(t) for t in patched] for name, figure in found.items()}
    # A figure that is the same everywhere, as the share of the weights mostly is, makes no picture.
    spread = {name: [v for v in values if v is not None] for name, values in known.items()}
    varied = {name for name, values in spread.items() if values and max(values) - min(values) > 0.01}
    return {name: figure for name, figure in found.items() if name in varied}


def _error_to(number: int) -> Figure:
    """The layer error against the tuned model of one task of a merge."""
    return lambda t: t.errors[number] if t.errors and t.kind == "full" else None


def _where(report: PatchReport) -> list[Section]:
    patched = [t for t in report.tensors if t.patched]
    figures = _figures(report)
    inside = [t for t in patched if place_of(t.name).number is not None]
    depths = by_layer(inside, lambda t: t.name)
    kinds = by_kind(inside, lambda t: t.name, lambda t: False)
    sections = []
    if figures and len(depths) > 1:
        layer_of = {t.name: label for label, group in depths.items() for t in group}
        kind_of = {t.name: label for label, group in kinds.items() for t in group}
        rows = []
        for name, figure in figures.items():
            cells: dict[tuple[str, str], list[float]] = {}
            for tensor in inside:
                value = figure(tensor)
                if value is not None:
                    cells.setdefault((layer_of[tensor.name], kind_of[tensor.name]), []).append(100 * value)
            rows += [
                {"layer": layer, "kind": kind, "measure": name, "value": sum(values) / len(values)}
                for (layer, kind), values in cells.items()
            ]
        chart = charts.grid(rows, list(figures), list(kinds), list(depths))
        said = "By kind of layer and depth, pale for the least and strong for the most."
        sections.append(Section("Where the patch sits", said, chart=chart))
    return [*sections, *_errors(report, patched)]


def _errors(report: PatchReport, patched: Sequence[TensorRecord]) -> list[Section]:
    """Layer errors and drift by depth and by kind, where they were measured."""
    measured = [t for t in patched if t.kind == "full" and t.error_after is not None]
    if report.command == MERGE or not measured:
        return []

    def mean(group: Sequence[TensorRecord], key: str) -> float | None:
        values = [getattr(t, key) for t in group if getattr(t, key) is not None]
        return 100 * sum(values) / len(values) if values else None

    series = {"before adjusting": "error_before", "after": "error_after"}
    layers: dict[str, dict[int, list[TensorRecord]]] = {}  # by stack and number
    for tensor in measured:
        place = place_of(tensor.name)
        if place.number is not None:
            layers.setdefault(place.stack, {}).setdefault(place.number, []).append(tensor)
    titles = stack_titles(layers)
    sections = []
    for stack, groups in layers.items():
        if len(groups) < 2:
            continue
        of_depth = series | {"drift on what to keep": "drift"}
        rows = [
            {"layer": number, "series": name, "value": value}
            for number, group in sorted(groups.items())
            for name, key in of_depth.items()
            if (value := mean(group, key)) is not None
        ]
        colors = BEFORE_AFTER | {"drift on what to keep": charts.SECOND}
        there = {name: color for name, color in colors.items() if any(row["series"] == name for row in rows)}
        said = f"Distance of the layers' outputs from {_towards(report)}'s, in percent of what that changed."
        chart = charts.lines(rows, "layer", "layer", "%", there)
        title = ", ".join(filter(None, ("Error by depth", printable(titles[stack]))))
        sections.append(Section(title, said, chart=chart, wide=False))
    kinds = by_kind(measured, lambda t: t.name, lambda t: False)
    rows = [
        {"kind": kind, "series": name, "value": value}
        for kind, group in kinds.items()
        for name, key in series.items()
        if (value := mean(group, key)) is not None
    ]
    chart = charts.bars(rows, "%", BEFORE_AFTER, list(kinds))
    said = "The same by kind of layer: what adjusting the kept weights made up for."
    return [*sections, Section("Error by kind of layer", said, chart=chart, wide=len(sections) % 2 == 0)]


def _distillation(found: Mapping[str, Any]) -> Section:
    series = {"from the fine-tuned model, on the new task": "new", "from the base, on what to keep": "retained"}
    rows = [
        {"step": step, "series": name, "value": value}
        for name, key in series.items()
        for step, value in zip(found["steps"], found[key], strict=True)
    ]
    colors = dict(zip(series, (charts.TUNED, charts.BASE), strict=True))
    chart = charts.lines(rows, "step", "step", "nats a token", colors, form=".4f", marked=found["best"])
    said = (
        f"Held-out divergence while the kept weights were trained; the dashed line is the best step, {found['best']}."
    )
    return Section("Training the kept weights", said, chart=chart)


def _tensors(report: PatchReport) -> Section:
    names = short_names(t.name for t in report.tensors)
    kinds = {
        t.name: label
        for label, group in by_kind(report.tensors, lambda t: t.name, lambda t: len(t.shape) == 1).items()
        for t in group
    }
    columns: list[tuple[str, str, Callable[[TensorRecord], Any]]] = [
        ("tensor", "name", lambda t: names[t.name]),
        ("kind", "text", lambda t: kinds[t.name]),
        ("layer", "count", lambda t: place_of(t.name).number),
        ("state", "text", lambda t: "patched" if t.patched else "as in the base"),
        ("shape", "text", lambda t: " × ".join(map(str, t.shape)) or "scalar"),
        ("weights", "count", lambda t: t.numel),
        ("kept" if report.command != MERGE else "patched", "count", lambda t: t.kept if t.patched else None),
    ]
    if report.command == MERGE:
        columns.append(("by all", "count", lambda t: t.kept_by_all if t.patched else None))
        columns.append(("signs differ", "count", lambda t: t.sign_conflicts if t.patched else None))
        for number, task in enumerate(report.options["tasks"]):
            columns.append((f"error to {printable(task)}", "percent", _error_to(number)))
    else:
        columns.append(("|ΔW|² kept", "percent", lambda t: share(t.delta_sq_kept, t.delta_sq) if t.patched else None))
        for title, key in (("error before", "error_before"), ("after", "error_after"), ("drift", "drift")):
            columns.append((title, "percent", attrgetter(key)))
    columns.append(("note", "long", lambda t: "; ".join(filter(None, (t.reason, t.note)))))
    ordered = sorted(report.tensors, key=lambda t: list(names).index(t.name)) if len(names) < 2000 else report.tensors
    rows = [[figure(t) for _, _, figure in columns] for t in ordered]
    used = [n for n in range(len(columns)) if n < 3 or any(row[n] not in (None, "") for row in rows)]
    table = Table([columns[n][:2] for n in used], [[row[n] for n in used] for row in rows], filters=(1, 3))
    return Section("Every tensor", "A click on a heading sorts; the search takes any part of a name.", table=table)


def _left(report: PatchReport) -> list[Section]:
    reasons: dict[str, int] = {}
    for tensor in report.tensors:
        if not tensor.patched:
            reasons[tensor.reason] = reasons.get(tensor.reason, 0) + 1
    facts = {reason or "no reason given": counted(count, "tensor") for reason, count in reasons.items()}
    return [Section("Left as in the base, and why", facts=facts)] if facts else []


def _again(inspection: Inspection, report: PatchReport) -> Section:
    trained = report.distillation.get("options") if report.distillation is not None else None
    inputs, out = _names(report), inspection.path if inspection.kind == "patched" else "OUT"
    if report.command == MERGE:
        words = merge_command(report.options, inputs, out, distilled=trained)
    else:
        how, command = report.inputs.get(NEW), report.command
        words = patch_command(report.options, inputs, out, distilled=trained, calibration=how, command=command)
    if inspection.kind == "patch":
        words[-2:] = ["--patch-file", inspection.path]
    facts = {
        f"{role}": f"{entry['path']} (fingerprint {entry['fingerprint']})" for role, entry in report.inputs.items()
    }
    return Section("Make it again", command=shell_text(words), facts=facts)
