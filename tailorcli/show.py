"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from tailorcli.inspection import KINDS, Inspection
from tailorcli.report import format_bytes, format_share, tensor_table

if TYPE_CHECKING:
    from tailorcli.plan import Plan

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
    if isinstance(value, float) and ("share" in key or key.startswith("error") or key in ("jaccard", "density")):
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
