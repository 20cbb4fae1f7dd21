"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from tailorcli.display.inspection import KINDS, Inspection
from tailorcli.patchfile.report import MERGE, share
from tailorcli.units import format_bytes, format_share

if TYPE_CHECKING:
    from rich.table import Table

    from tailorcli.runs.plan import Plan

_MOST_ROWS = 400  # of a plain checkpoint's tensors


def inspection_parts(inspection: Inspection) -> list[Any]:
    """What to print for an inspection: its facts, then the table of its kind."""
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("path", inspection.path)
    facts.add_row("is a", KINDS[inspection.kind])
    for key, value in inspection.facts.items():
        facts.add_row(key.replace("_", " "), _show_fact(key, value))
    parts: list[Any] = [facts]
    if inspection.report is not None:
        parts.append(tensor_table(inspection.report, errors=inspection.report["command"] == "patch"))
        parts += _reason_parts(inspection.report)
    if inspection.hessians:
        parts.append(_hessian_table(inspection.hessians))
    parts += [f"no statistics: {name} ({reason})" for name, reason in inspection.uncalibrated.items()]
    parts += [f"note: {name} ({note})" for name, note in inspection.notes.items()]
    if inspection.tensors:
        parts.append(_plain_table(inspection.tensors))
    return parts


def _show_fact(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(_show_fact(key, entry) for entry in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if key == "bytes" or key.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, float) and (
        "share" in key or key.startswith("error") or key.endswith("shift") or key in ("jaccard", "density", "drift")
    ):
        return format_share(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _reason_parts(report: dict[str, Any]) -> list[str]:
    return [f"left at base: {t['name']} ({t['reason']})" for t in report["tensors"] if t["status"] != "patched"]


def _hessian_table(hessians: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Hessians")
    for column in ("hessian", "kind", "channels", "tokens", "tensors", "mean diag", "dead"):
        table.add_column(column, justify="left" if column in ("hessian", "kind") else "right", overflow="fold")
    for name, info in hessians.items():
        table.add_row(
            name,
            info["kind"],
            f"{info['size']:,}",
            f"{info['tokens']:,}",
            str(info["used_by"]),
            f"{info['mean_diagonal']:.3g}",
            str(info["dead"]),
        )
    return table


def _plain_table(tensors: list[dict[str, Any]]) -> Table:
    table = Table(title="tensors")
    for column in ("tensor", "dtype", "shape", "bytes"):
        table.add_column(column, justify="left" if column == "tensor" else "right", overflow="fold")
    for tensor in tensors[:_MOST_ROWS]:
        shape = "×".join(map(str, tensor["shape"])) or "scalar"
        table.add_row(tensor["name"], tensor["dtype"], shape, format_bytes(tensor["bytes"]))
    if len(tensors) > _MOST_ROWS:
        table.add_row(f"and {len(tensors) - _MOST_ROWS} more (--json shows all)", "", "", "")
    return table


def plan_table(plan: Plan) -> Table:
    """Every tensor's treatment."""
    table = Table(title="plan")
    for column in ("tensor", "dtype", "shape", "treatment", "by"):
        table.add_column(column, overflow="fold")
    for tensor in plan.tensors:
        treatment = "patch" if tensor.action == "patch" else f"base: {tensor.reason}"
        shape = "×".join(map(str, tensor.shape)) or "scalar"
        own = f"{len(tensor.experts)} experts" if tensor.experts else tensor.hessian
        shared = own or tensor.reason or "salience alone" if tensor.action == "patch" else ""
        shared += ", retained" if tensor.retain else ""
        table.add_row(tensor.name, tensor.dtype, shape, treatment, shared)
    return table


def quantile_table(report: dict[str, Any]) -> Table:
    """Quantiles of both scores, tensor by tensor."""
    from tailorcli.core.figures import QUANTILES

    table = Table(title="quantiles of salience |dW| (above) and sensitivity (below), from a sample of each tensor")
    table.add_column("tensor", overflow="fold")
    for level in QUANTILES:
        table.add_column({0.0: "least", 1.0: "most"}.get(level, f"{level:.0%}"), justify="right")
    for tensor in report["tensors"]:
        if tensor["status"] != "patched" or not tensor["salience_quantiles"]:
            continue
        table.add_row(tensor["name"], *(f"{value:.2e}" for value in tensor["salience_quantiles"]))
        if tensor["sensitivity_quantiles"]:
            table.add_row("", *(f"{value:.2e}" for value in tensor["sensitivity_quantiles"]), style="dim")
    return table


def problem_table(problems: list[dict[str, Any]]) -> Table:
    """The first tensors that a verification found wrong."""
    table = Table(title="what is wrong")
    for column in ("tensor", "problem", "first at", "expected", "found"):
        table.add_column(column, overflow="fold")
    for problem in problems:
        place = [str(problem[key]) if key in problem else "" for key in ("index", "expected", "found")]
        table.add_row(problem["tensor"], problem["problem"], *place)
    return table


_SUMMARY = {"origin": "old", "target": "new", "average": "Avg", "arithmetic_mean": "(old + new) / 2", "h_score": "H"}
_COMPARED = {
    "origin_kept": "old kept, % of base",
    "target_kept": "new kept, % of tuned",
    "gain_kept": "gain kept, % of tuned",
    "h_minus_tuned": "H - tuned's H",
}


def evaluation_parts(report: dict[str, Any]) -> list[Any]:
    """What to print for an evaluation: a table of the tasks, then one of averages and H where tasks are old and new."""
    models, tasks = report["models"], report["tasks"]
    table = Table(title="percent right [95% interval over the items]")
    table.add_column("model", overflow="fold")
    for name, facts in tasks.items():
        role = {"origin": ", old", "target": ", new", None: ""}[facts["role"]]
        table.add_column(f"{name} ({facts['kind']}{role}, {facts['items']:,})", justify="right")
        if facts["kind"] == "text":
            table.add_column("loss", justify="right")
    for model in models:
        row = [_model_title(model["name"], report)]
        for name, facts in tasks.items():
            figures = model["tasks"][name]
            row += [_show_estimate(figures), *([f"{figures['loss']:.3f}"] if facts["kind"] == "text" else [])]
        table.add_row(*row)
    parts: list[Any] = [table]
    if models[0]["summary"]:
        parts.append(_figures_table("old and new tasks, their H-score", _SUMMARY, report))
        compared = {key: title for key, title in _COMPARED.items() if key in models[0]["summary"]}
        if compared:
            parts.append(_figures_table("beside base and tuned", compared, report))
    return parts


def _figures_table(title: str, columns: dict[str, str], report: dict[str, Any]) -> Table:
    table = Table(title=title)
    table.add_column("model", overflow="fold")
    for column in columns.values():
        table.add_column(column, justify="right")
    for model in report["models"]:
        cells = [_show_estimate(model["summary"][key], signed=key == "h_minus_tuned") for key in columns]
        table.add_row(_model_title(model["name"], report), *cells)
    return table


def _model_title(name: str, report: dict[str, Any]) -> str:
    role = next((role for role in ("base", "tuned") if report[role] == name and role != name), None)
    return f"{name} ({role})" if role else name


def _show_estimate(estimate: dict[str, Any], signed: bool = False) -> str:
    if estimate["value"] is None:
        return "-"
    sign = "+" if signed else ""
    shown = f"{estimate['value']:{sign}.2f}"
    if estimate["interval"] is None:
        return shown
    low, high = estimate["interval"]
    return f"{shown} [{low:{sign}.2f}, {high:{sign}.2f}]"


def results_table(report: dict[str, Any]) -> Table:
    """One row a result file of lm-evaluation-harness."""
    rows, roles = report["results"], {"origin": "old", "target": "new"}
    table = Table(title="percent ± standard error")
    table.add_column("file", overflow="fold")
    table.add_column("model", overflow="fold")
    for role, title in roles.items():
        for name in report[role]:
            metrics = dict.fromkeys(row["tasks"][name]["metric"].removesuffix(",none") for row in rows)
            table.add_column(f"{name} ({title}, {' or '.join(metrics)})", justify="right")
    for title in _SUMMARY.values():
        table.add_column(title, justify="right")
    for row in rows:
        figures = [*(row["tasks"][name] for role in roles for name in report[role]), *row["summary"].values()]
        cells = (f"{f['value']:.2f}" + (f" ± {f['stderr']:.2f}" if f["stderr"] is not None else "") for f in figures)
        table.add_row(row["file"], row["model"], *cells)
    return table


def sweep_parts(report: dict[str, Any]) -> list[Any]:
    """What to print for a sweep: each family's picked setting with its figures on the test tasks, and its area."""
    table = Table(title=f"picked {report['rule']}; percent on the test tasks [95% interval over the items]")
    table.add_column("family")
    table.add_column("setting", overflow="fold")
    for column in ("old", "new", "H", "area under the frontier"):
        table.add_column(column, justify="right")
    points = {point["label"]: point for point in report["points"]}
    ends = {name: name for name in ("base", "tuned")}
    for family, label in {**ends, **report["picked"]}.items():
        figures = points[label]["test"]
        shown = [_show_estimate(figures[name]) for name in ("origin", "target", "h_score")]
        area = report["areas"]["test"].get(family)
        setting = "" if label == family else label.removeprefix(f"{family}, ").removeprefix(f"{family} ")
        table.add_row(family, setting, *shown, _show_estimate(area) if area else "")
    return [
        table,
        "area 0.5: the straight line from base to tuned; 1 and more: all of the old and all of the new at once",
    ]


_COLUMNS = ("tensor", "shape", "kept", "density", "|dW|² kept", "sens. kept", "dW=0", "dead", "damping")


def tensor_table(report: dict[str, Any], *, errors: bool) -> Table:
    """One row a patched tensor and a row of totals; with ``errors`` the layer errors before and after."""
    from rich.table import Table

    if report["command"] == MERGE:
        return _merge_table(report)

    title = f"{report['command']}: {_choice(report['options'])}"
    if "retain" in report["inputs"]:
        title += f", retain weight {report['options']['retain_weight']:g}"
    if report["options"].get("propagate"):
        title += ", propagated"
    drifts = errors and "drift" in report["totals"]
    table = Table(title=title)
    for column in (*_COLUMNS, *(("error before", "after") if errors else ()), *(("drift",) if drifts else ())):
        table.add_column(column, justify="left" if column == "tensor" else "right", overflow="fold")
    for tensor in report["tensors"]:
        if tensor["status"] == "patched":
            drift = [format_share(tensor.get("drift"))] if drifts else []
            table.add_row(*_tensor_row(tensor, errors), *drift)
    totals = report["totals"]
    last = [
        f"total: {totals['tensors_patched']} patched, {totals['tensors_at_base']} left at base",
        f"{totals['numel']:,}",
        f"{totals['kept']:,}",
        format_share(totals["density"]),
        format_share(totals["delta_share_kept"]),
        format_share(totals["sensitivity_share_kept"]),
        format_share(totals["zero_delta_share"]),
        "",
        "",
    ]
    if errors:
        last += [format_share(totals["error_before"]), format_share(totals["error_after"])]
    if drifts:
        last.append(format_share(totals["drift"]))
    table.add_section()
    table.add_row(*last, style="bold")
    return table


def _choice(options: dict[str, Any]) -> str:
    """How the entries were chosen, for a title."""
    method, weight = options.get("method", "tailor"), options.get("weight", 1.0)  # earlier reports have neither
    scaled = f", weight {weight:g}" if weight != 1.0 else ""
    if method == "tailor":
        return f"density {options['density']:g}, omega {options['omega']:g}{scaled}"
    return f"{method}{scaled}" if method == "interpolate" else f"{method}, density {options['density']:g}{scaled}"


def _tensor_row(tensor: dict[str, Any], errors: bool) -> list[str]:
    row = [
        tensor["name"],
        "×".join(str(size) for size in tensor["shape"]),
        f"{tensor['kept']:,}",
        format_share(share(tensor["kept"], tensor["numel"])),
        format_share(share(tensor["delta_sq_kept"], tensor["delta_sq"])),
        format_share(share(tensor["sensitivity_kept"], tensor["sensitivity_sum"])),
        format_share(share(tensor["zero_delta"], tensor["numel"])),
        "-" if tensor["dead_channels"] is None else str(tensor["dead_channels"]),
        "-" if tensor["damping"] is None else f"{tensor['damping']:g}",
    ]
    if errors:
        row += [format_share(tensor["error_before"]), format_share(tensor["error_after"])]
    return row


def _merge_table(report: dict[str, Any]) -> Table:
    """One row a merged tensor: kept by whom, how the masks overlap, each task's layer error."""
    from rich.table import Table

    tasks, totals = [str(task) for task in report["options"]["tasks"]], report["totals"]
    mixed = len(totals["methods"]) > 1
    measured = totals["errors"] is not None
    table = Table(title=f"{MERGE}, {report['options']['method']}: {', '.join(tasks)}")
    table.add_column("tensor", overflow="fold", min_width=30)
    table.add_column("shape", justify="right", overflow="fold")
    if mixed:
        table.add_column("by", overflow="fold")
    for column in ("kept", "by each", "Jaccard", "signs differ", *(("layer errors",) if measured else ())):
        table.add_column(column, justify="right", overflow="fold")

    def row(name: str, shape: str, method: str, figures: dict[str, Any]) -> list[str]:
        by_each = [format_share(share(kept, figures["numel"])) for kept in figures["kept_by"]]
        errors = [format_share(error) for error in figures["errors"] or []]
        return [
            *(name, shape, *((method,) if mixed else ())),
            format_share(share(figures["kept"], figures["numel"])),
            *(" ".join(by_each), format_share(figures["jaccard"]), f"{figures['sign_conflicts']:,}"),
            *((" ".join(errors) or "-",) if measured else ()),
        ]

    for tensor in report["tensors"]:
        if tensor["status"] == "patched":
            shape = "×".join(str(size) for size in tensor["shape"])
            table.add_row(*row(str(tensor["name"]), shape, str(tensor["method"]), tensor))
    table.add_section()
    name = f"total: {totals['tensors_patched']} merged, {totals['tensors_at_base']} left at base"
    table.add_row(*row(name, f"{totals['numel']:,}", "", totals), style="bold")
    return table
