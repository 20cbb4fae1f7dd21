"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from tailorcli.display.curves import distillation_table
from tailorcli.display.inspection import KINDS, Inspection
from tailorcli.display.names import short_names
from tailorcli.display.summary import (
    checkpoint_summary,
    facts_table,
    new_table,
    report_summary,
    shape_text,
    stats_summary,
    treatment,
)
from tailorcli.patchfile.report import (
    MERGE,
    density_of,
    has_teacher,
    is_retained,
    options_shown,
    share,
    target_in_words,
)
from tailorcli.units import format_bytes, format_share

if TYPE_CHECKING:
    from tailorcli.patchfile.records import TensorRecord
    from tailorcli.patchfile.report import PatchReport
    from tailorcli.runs.plan import Plan


def inspection_parts(inspection: Inspection, *, tensors: bool = False) -> list[Any]:
    """What to print for an inspection: its facts and a summary by kind and depth; with ``tensors`` the whole table."""
    first = {"path": inspection.path, "is a": KINDS[inspection.kind]}
    parts: list[Any] = [facts_table(first | dict(_shown_facts(inspection)))]
    report = inspection.report
    if report is not None:
        parts += report_summary(report)
        if tensors:
            parts.append(tensor_table(report, errors=report.command == "patch"))
        if report.distillation is not None:
            parts.append(distillation_table(report.distillation))
        parts += by_reason({t.name: t.reason for t in report.tensors if not t.patched}, "left at base")
    if inspection.hessians:
        parts += [*stats_summary(inspection.hessians), *([_hessian_table(inspection.hessians)] if tensors else [])]
    parts += by_reason(inspection.uncalibrated, "no statistics")
    parts += by_reason(inspection.notes, "note")
    if inspection.tensors:
        parts += [*checkpoint_summary(inspection.tensors), *([_plain_table(inspection.tensors)] if tensors else [])]
    more = inspection.report is not None or inspection.hessians or inspection.tensors
    return parts if tensors or not more else [*parts, "every tensor: --tensors"]


def by_reason(reasons: dict[str, str], what: str) -> list[str]:
    """A line for every reason, with the first names that it holds for."""
    gathered: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        gathered.setdefault(reason, []).append(name)
    return [
        f"{what}: {len(names)} ({reason}): {', '.join(names[:4])}"
        + (f" and {len(names) - 4} more" if names[4:] else "")
        for reason, names in gathered.items()
    ]


_TITLES = {
    "kept_by": "kept by each task",
    "kept_by_all": "kept by all",
    "jaccard": "overlap (Jaccard)",
    "shared": "kept by several",
    "sign_conflicts": "of them, signs differ",
    "errors": "mean layer errors",
}
_HOLDS = ("tensors", "parameters", "bytes", "shards", "dtypes")  # of a checkpoint, in one line


def _shown_facts(inspection: Inspection) -> list[tuple[str, str]]:
    """Facts in words: figures that belong together in one line, none that says what another does."""
    facts, report = dict(inspection.facts), inspection.report
    rows: list[tuple[str, str]] = []
    if facts.keys() >= set(_HOLDS):
        rows.append(("holds", _holding(facts)))
        facts = {key: value for key, value in facts.items() if key not in _HOLDS}
    if report is None:
        return rows + [(key.replace("_", " "), _show_fact(key, value)) for key, value in facts.items()]
    totals, options = report.totals, options_shown(report)
    for key, value in facts.items():
        if key not in options and key not in totals:
            rows.append((key.replace("_", " "), _show_fact(key, value)))
    said = (f"{name.replace('_', ' ')} {_option(value)}" for name, value in options.items())
    return [*rows, ("options", ", ".join(said)), *_shown_totals(totals, options=report.options)]


def _holding(facts: dict[str, Any]) -> str:
    files = "1 file" if facts["shards"] == 1 else f"{facts['shards']} files"
    dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in facts["dtypes"].items())
    weights = f"{facts['parameters']:,} weights"
    return f"{facts['tensors']:,} tensors ({dtypes}), {weights}, {format_bytes(facts['bytes'])} in {files}"


def _shown_totals(totals: dict[str, Any], options: dict[str, Any]) -> list[tuple[str, str]]:
    towards = target_in_words(options)
    rows = [
        ("patched", f"{totals['tensors_patched']:,} tensors, {totals['tensors_at_base']:,} left at base"),
        ("weights kept", f"{totals['kept']:,} of {totals['numel']:,} ({format_share(totals['density'])})"),
    ]
    if totals.get("zero_delta_share"):
        rows.append(("not tuned at all", f"{format_share(totals['zero_delta_share'])} of the weights"))
    if totals.get("delta_share_kept") is not None:
        of_both = [f"{format_share(totals['delta_share_kept'])} of the squared change"]
        if totals["sensitivity_share_kept"] is not None:
            of_both.append(f"{format_share(totals['sensitivity_share_kept'])} of the sensitivity")
        rows.append(("they hold", ", ".join(of_both)))
    if totals.get("error_before") is not None:
        before, after = (format_share(totals[f"error_{when}"]) for when in ("before", "after"))
        own = ", on the patched model's inputs" if "error_after_unpatched_inputs" in totals else ""
        against = f"; against {towards}" if has_teacher(options) else ""
        said = f"{before} before compensation, {after} after (100% is the base{against}{own})"
        rows.append(("mean layer error", said))
    if totals.get("drift") is not None:
        rows.append(("mean drift", f"{format_share(totals['drift'])} of {towards}'s, on the retained data"))
    if totals.get("propagated"):
        new, old = format_share(totals["input_shift"]), format_share(totals["retained_input_shift"])
        moved = f"inputs moved by {new} of their energy, on the retained data by {old}"
        rows.append(("propagated", f"{totals['propagated']} layers: {moved}"))
    rows += [(title, _show_fact(key, totals[key])) for key, title in _TITLES.items() if totals.get(key) is not None]
    if totals["damped_further"]:
        rows.append(("damped further", _show_fact("", totals["damped_further"])))
    return rows


def _option(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_option, value)) if isinstance(value, (list, tuple)) else str(value)


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
        "share" in key or key.startswith(("error", "drift")) or key.endswith("shift") or key in ("jaccard", "density")
    ):
        return format_share(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _hessian_table(hessians: dict[str, dict[str, Any]]) -> Table:
    columns = ("kind", "channels", "tokens", "tensors", "mean diag", "dead")
    table = new_table("Hessians", "Hessian", columns, left=("kind",))
    for name, short in short_names(hessians).items():
        info = hessians[name]
        table.add_row(
            short,
            info["kind"],
            f"{info['size']:,}",
            f"{info['tokens']:,}",
            str(info["used_by"]),
            f"{info['mean_diagonal']:.3g}",
            str(info["dead"]),
        )
    return table


def _plain_table(tensors: list[dict[str, Any]]) -> Table:
    found = {tensor["name"]: tensor for tensor in tensors}
    changes = ("moved", "drift") if any("moved" in tensor for tensor in tensors) else ()  # of a fine-tune
    table = new_table("tensors", "tensor", ("dtype", "shape", "bytes", *changes), left=("dtype",))
    for name, short in short_names(found).items():
        tensor = found[name]
        shown = [format_share(tensor.get(name)) for name in changes]
        table.add_row(short, tensor["dtype"], shape_text(tensor["shape"]), format_bytes(tensor["bytes"]), *shown)
    return table


def plan_table(plan: Plan) -> Table:
    """Every tensor's treatment."""
    table = new_table("plan", "tensor", ("dtype", "shape", "treatment"), left=("dtype", "treatment"))
    found = {tensor.name: tensor for tensor in plan.tensors}
    for name, short in short_names(found).items():
        tensor = found[name]
        table.add_row(short, tensor.dtype, shape_text(tensor.shape), treatment(tensor))
    return table


def quantile_table(report: PatchReport) -> Table:
    """Quantiles of both scores, tensor by tensor."""
    from tailorcli.core.figures import QUANTILES

    title = "quantiles of salience |dW| (above) and sensitivity (below), from a sample of each tensor"
    levels = [{0.0: "least", 1.0: "most"}.get(level, f"{level:.0%}") for level in QUANTILES]
    table = new_table(title, "tensor", levels)
    found = {tensor.name: tensor for tensor in report.tensors if tensor.patched}
    for name, short in short_names(found).items():
        tensor = found[name]
        if not tensor.salience_quantiles:
            continue
        table.add_row(short, *(f"{value:.2e}" for value in tensor.salience_quantiles))
        if tensor.sensitivity_quantiles:
            table.add_row("", *(f"{value:.2e}" for value in tensor.sensitivity_quantiles), style="dim")
    return table


def problem_table(problems: list[dict[str, Any]]) -> Table:
    """The first tensors that a verification found wrong."""
    table = Table(title="what is wrong")
    for column in ("tensor", "problem"):
        table.add_column(column, overflow="fold")
    for problem in problems:
        told = problem["problem"]
        if "index" in problem:
            told += f"; the first at {problem['index']}: expected {problem['expected']}, found {problem['found']}"
        table.add_row(problem["tensor"], told)
    return table


_SUMMARY = {"origin": "old", "target": "new", "average": "Avg", "arithmetic_mean": "(old + new) / 2", "h_score": "H"}
_COMPARED = {
    "origin_kept": "old kept, % of base",
    "target_kept": "new kept, % of tuned",
    "gain_kept": "gain kept, % of tuned",
    "h_minus_tuned": "H - tuned's H",
}


_SHORT = {"origin": "old", "target": "new", "h_score": "H", "origin_kept": "old kept", "target_kept": "new kept"}
_MOST_TASKS = 4  # in columns; more of them are rows


def evaluation_parts(report: dict[str, Any], *, everything: bool = False) -> list[Any]:
    """What to print for an evaluation: one table, of old, new and H, or of the tasks where none is old or new.

    With ``everything``, all tasks with their losses, both averages, and what is kept of base and tuned.
    """
    summarised = bool(report["models"][0]["summary"])
    if not everything:
        return [_short_table(report) if summarised else _tasks_table(report)]
    parts: list[Any] = [_tasks_table(report)]
    if len(report["tasks"]) > _MOST_TASKS and any(facts["kind"] == "text" for facts in report["tasks"].values()):
        parts.append(_losses_table(report))
    if summarised:
        parts.append(_figures_table("old and new tasks, their H-score", _SUMMARY, report))
        compared = {key: title for key, title in _COMPARED.items() if key in report["models"][0]["summary"]}
        if compared:
            parts.append(_figures_table("beside base and tuned", compared, report))
    return parts


def _short_table(report: dict[str, Any]) -> Table:
    """Old, new and H of each model, with their intervals below; beside base and tuned, what is kept of them."""
    columns = {key: title for key, title in _SHORT.items() if key in report["models"][0]["summary"]}
    names = {role: [n for n, f in report["tasks"].items() if f["role"] == role] for role in ("origin", "target")}
    told = "; ".join(f"{_SHORT[role]}: {', '.join(found)}" for role, found in names.items())
    table = new_table(f"percent right [95% interval over the items]; {told}", "model", list(columns.values()))
    for model in report["models"]:
        table.add_row(_model_title(model["name"], report), *(_above(model["summary"][key]) for key in columns))
    return table


def _tasks_table(report: dict[str, Any]) -> Table:
    """Every task of every model: models in rows, or tasks where they are many."""
    models, tasks = report["models"], report["tasks"]
    titles = {
        name: f"{name} ({', '.join(filter(None, (facts['kind'], _ROLES[facts['role']])))}, {facts['items']:,})"
        for name, facts in tasks.items()
    }
    title = "percent right [95% interval over the items]"
    if len(tasks) > _MOST_TASKS:
        table = new_table(title, "task", [_model_title(model["name"], report) for model in models])
        for name, shown in titles.items():
            table.add_row(shown, *(_above(model["tasks"][name]) for model in models))
        return table
    columns: list[str] = []
    for name, shown in titles.items():
        columns += [shown.replace(" (", "\n("), *(["loss"] if tasks[name]["kind"] == "text" else [])]
    table = new_table(title, "model", columns)
    for model in models:
        cells: list[str] = []
        for name, facts in tasks.items():
            figures = model["tasks"][name]
            cells += [_above(figures), *([f"{figures['loss']:.3f}"] if facts["kind"] == "text" else [])]
        table.add_row(_model_title(model["name"], report), *cells)
    return table


_ROLES = {"origin": "old", "target": "new", None: ""}


def _losses_table(report: dict[str, Any]) -> Table:
    names = [name for name, facts in report["tasks"].items() if facts["kind"] == "text"]
    table = new_table("loss, nats a token", "model", names)
    for model in report["models"]:
        table.add_row(_model_title(model["name"], report), *(f"{model['tasks'][name]['loss']:.3f}" for name in names))
    return table


def _above(estimate: dict[str, Any], signed: bool = False) -> str:
    """A value with its interval below it, which is narrower than both in a line."""
    return _show_estimate(estimate, signed).replace(" [", "\n[")


def _figures_table(title: str, columns: dict[str, str], report: dict[str, Any]) -> Table:
    table = new_table(title, "model", [column.replace(", ", ",\n") for column in columns.values()])
    for model in report["models"]:
        cells = [_above(model["summary"][key], signed=key == "h_minus_tuned") for key in columns]
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
    table = Table(title="percent ± standard error", title_justify="left")
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


def sweep_parts(report: dict[str, Any], *, everything: bool = False) -> list[Any]:
    """What to print for a sweep: every setting that ran with its figures on the test tasks, and each family's area.

    With ``everything``, the 95% intervals, too.
    """
    shown = "percent on the test tasks" + (" [95% interval over the items]" if everything else "")
    table = new_table(f"{shown}; * picked {report['rule']}", "setting", ("old", "new", "H", "area"))
    show = _above if everything else _value
    picked = set(report["picked"].values())
    family = None
    for point in report["points"]:
        area = report["areas"]["test"].get(point["family"]) if point["family"] != family else None
        family = point["family"]
        figures = [show(point["test"][name]) for name in ("origin", "target", "h_score")]
        star = "* " if point["label"] in picked else "  "
        table.add_row(star + point["label"], *figures, show(area) if area else "")
    return [
        table,
        "area under a family's frontier: 0.5 is the straight line from base to tuned, 1 all of old and new at once",
    ]


def _value(estimate: dict[str, Any]) -> str:
    return "-" if estimate["value"] is None else f"{estimate['value']:.2f}"


_COLUMNS = ("shape", "kept", "density", "|dW|² kept", "sens. kept", "dW=0", "dead", "damping")


def tensor_table(report: PatchReport, *, errors: bool) -> Table:
    """One row a patched tensor and a row of totals; with ``errors`` the layer errors before and after."""
    if report.command == MERGE:
        return _merge_table(report)

    title = f"{report.command}: {_choice(report.options)}"
    if is_retained(report.inputs):
        title += f", retain weight {report.options['retain_weight']:g}"
    if report.options.get("propagate"):
        title += ", propagated"
    drifts = errors and "drift" in report.totals
    more = (*(("error before", "after") if errors else ()), *(("drift",) if drifts else ()))
    table = new_table(title, "tensor", (*_COLUMNS, *more))
    found = {tensor.name: tensor for tensor in report.tensors if tensor.patched}
    for name, short in short_names(found).items():
        tensor = found[name]
        drift = [format_share(tensor.drift)] if drifts else []
        table.add_row(short, *_tensor_row(tensor, errors), *drift)
    totals = report.totals
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
    """How the weights were chosen, for a title."""
    method, weight = options.get("method", "tailor"), options.get("weight", 1.0)  # earlier reports have neither
    scaled = f", weight {weight:g}" if weight != 1.0 else ""
    if method == "tailor":
        chosen = f", score {options['score']}" if "score" in options else ""
        return f"density {options['density']:g}, omega {options['omega']:g}{chosen}{scaled}"
    return f"{method}, density {density_of(options):g}{scaled}"


def _tensor_row(tensor: TensorRecord, errors: bool) -> list[str]:
    row = [
        shape_text(tensor.shape),
        f"{tensor.kept:,}",
        format_share(share(tensor.kept, tensor.numel)),
        format_share(share(tensor.delta_sq_kept, tensor.delta_sq)),
        format_share(share(tensor.sensitivity_kept, tensor.sensitivity_sum)),
        format_share(share(tensor.zero_delta, tensor.numel)),
        "-" if tensor.dead_channels is None else str(tensor.dead_channels),
        "-" if tensor.damping is None else f"{tensor.damping:g}",
    ]
    if errors:
        row += [format_share(tensor.error_before), format_share(tensor.error_after)]
    return row


def _merge_table(report: PatchReport) -> Table:
    """One row a merged tensor: kept by whom, how the masks overlap, each task's layer error."""
    tasks, totals = report.options["tasks"], report.totals
    mixed = len(totals["methods"]) > 1
    measured = totals["errors"] is not None
    columns = ["shape", *(("by",) if mixed else ()), "kept", "by each", "Jaccard", "signs differ"]
    columns += ["layer errors"] if measured else []
    table = new_table(f"{MERGE}, {report.options['method']}: {', '.join(tasks)}", "tensor", columns, left=("by",))

    def row(name: str, shape: str, method: str, figures: dict[str, Any]) -> list[str]:
        by_each = [format_share(share(kept, figures["numel"])) for kept in figures["kept_by"]]
        errors = [format_share(error) for error in figures["errors"] or []]
        return [
            *(name, shape, *((method,) if mixed else ())),
            format_share(share(figures["kept"], figures["numel"])),
            *(" ".join(by_each), format_share(figures["jaccard"]), f"{figures['sign_conflicts']:,}"),
            *((" ".join(errors) or "-",) if measured else ()),
        ]

    found = {tensor.name: tensor for tensor in report.tensors if tensor.patched}
    for name, short in short_names(found).items():
        tensor = found[name]
        table.add_row(*row(short, shape_text(tensor.shape), str(tensor.method), tensor.to_dict()))
    table.add_section()
    name = f"total: {totals['tensors_patched']} merged, {totals['tensors_at_base']} left at base"
    table.add_row(*row(name, f"{totals['numel']:,}", "", totals), style="bold")
    return table
