"""What a terminal of 80 columns shows of a report, statistics or a plan: by kind of layer, and by depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from rich.cells import cell_len
from rich.table import Column as RichColumn
from rich.table import Table

from tailorcli.display.names import by_kind, by_layer, place_of
from tailorcli.patchfile.report import MERGE, share
from tailorcli.terminal import printable
from tailorcli.units import format_bytes, format_share

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from tailorcli.patchfile.records import TensorRecord
    from tailorcli.patchfile.report import PatchReport
    from tailorcli.runs.plan import TensorPlan

MOST_RUNS = 8  # of layers, by depth
_MOST_TASKS = 3  # of a merge, each with its own figures

Item = TypeVar("Item")
Column = tuple[str, Callable[[list[Any]], str]]


_LEAST = 16  # characters of a first column: beside many others it would have none
_APART = 2  # between columns


class _Titled(Table):
    """A table below its title, which takes the width of the terminal and not that of the table.

    Columns for which the terminal has no room follow below, behind the first one again.
    """

    heading = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield console.render_str(f"\n{self.heading}", style="italic")
        for number, columns in enumerate(self._groups(options.max_width)):
            if number:
                yield ""
            part = copy(self)
            part.columns = [replace(column, _index=place) for place, column in enumerate(columns)]
            yield from super(_Titled, part).__rich_console__(console, options)

    def _groups(self, width: int) -> list[list[RichColumn]]:
        """The columns, as many together as there is room for, each time behind the first."""
        first, *others = self.columns
        room = width - max(_LEAST, min(_width_of(first), width // 3))
        groups: list[list[RichColumn]] = [[]]
        left = room
        for column in others:
            needed = _width_of(column) + _APART
            if needed > left and groups[-1]:
                groups.append([])
                left = room
            groups[-1].append(column)
            left -= needed
        return [[first, *group] for group in groups]


def _width_of(column: RichColumn) -> int:
    """Characters of the widest line of a column."""
    texts = [column.header, *column.cells]
    return max(cell_len(line) for text in texts for line in str(text).split("\n"))


def new_table(title: str, first: str, columns: Sequence[str], *, left: Sequence[str] = ()) -> Table:
    """A table without frames: its first column may fold, the others, right-aligned, never do."""
    table = _Titled(box=None, padding=(0, _APART, 0, 0), header_style="bold")
    table.heading = title
    table.add_column(first, overflow="fold", min_width=_LEAST)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def facts_table(facts: dict[str, str]) -> Table:
    """A fact a line, by its name."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(printable(name), printable(value))
    return table


def summary_tables(
    items: Sequence[Item],
    columns: Sequence[Column],
    name_of: Callable[[Item], str],
    is_vector: Callable[[Item], bool],
    *,
    depth: Sequence[Column] | None = None,
    left: Sequence[str] = (),
) -> list[Table]:
    """A row for each kind of layer; with the columns ``depth``, a second table with a row for each run of layers."""
    found = [("by kind", columns, by_kind(items, name_of, is_vector))]
    if depth:
        found.append(("by depth (layers)", depth, by_layer(items, name_of, MOST_RUNS)))
    tables = []
    for title, shown, groups in found:
        table = new_table(title, title.split()[1], [name for name, _ in shown], left=left)
        for label, group in groups.items():
            table.add_row(label, *(figure(group) for _, figure in shown))
        tables.append(table)
    return tables


def report_summary(report: PatchReport) -> list[Table]:
    """Masks, errors and drift of a report's patched tensors, by kind and by depth."""
    tensors = [tensor for tensor in report.tensors if tensor.patched]
    columns = _merge_columns(report) if report.command == MERGE else _patch_columns(report)
    counted: list[Column] = [("tensors", _count), ("weights", _sum_of("numel")), *columns]
    return summary_tables(
        tensors, counted, lambda t: t.name, lambda t: len(t.shape) == 1, depth=counted if tensors else None
    )


def _count(group: list[Any]) -> str:
    return f"{len(group):,}"


def _sum_of(key: str) -> Callable[[list[TensorRecord]], str]:
    return lambda group: short_count(int(_sum(group, key)))


def short_count(number: int) -> str:
    """A count of weights in at most six characters: 950, 12.3K, 4.56M."""
    value, units = float(number), iter("KMBT")
    unit = ""
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.3g}{unit}" if unit else str(number)


def _sum(group: list[TensorRecord], key: str) -> float:
    return float(sum(getattr(tensor, key) or 0 for tensor in group))


def _share_of(part: str, whole: str) -> Callable[[list[TensorRecord]], str]:
    return lambda group: format_share(share(_sum(group, part), _sum(group, whole)))


def _mean_of(key: str) -> Callable[[list[TensorRecord]], str]:
    """The plain mean over the tensors with a full Hessian, as in the totals."""

    def mean(group: list[TensorRecord]) -> str:
        values = [getattr(t, key) for t in group if t.kind == "full" and getattr(t, key) is not None]
        return format_share(sum(values) / len(values) if values else None)

    return mean


def _patch_columns(report: PatchReport) -> list[Column]:
    totals = report.totals
    columns: list[Column] = [
        ("kept", _share_of("kept", "numel")),
        ("|dW|²\nkept", _share_of("delta_sq_kept", "delta_sq")),
    ]
    if totals["sensitivity_share_kept"] is not None and report.command == "score":
        columns.append(("sens.\nkept", _share_of("sensitivity_kept", "sensitivity_sum")))
    if report.command == "score":
        columns.append(("dW = 0", _share_of("zero_delta", "numel")))
    if totals["error_before"] is not None:
        columns += [("error\nbefore", _mean_of("error_before")), ("\nafter", _mean_of("error_after"))]
    if totals.get("drift") is not None:
        columns.append(("drift", _mean_of("drift")))
    return columns


def _merge_columns(report: PatchReport) -> list[Column]:
    tasks = report.options["tasks"]

    def kept_by(number: int) -> Callable[[list[TensorRecord]], str]:
        return lambda group: format_share(share(sum(t.kept_by[number] for t in group), _sum(group, "numel")))

    def error_of(number: int) -> Callable[[list[TensorRecord]], str]:
        def mean(group: list[TensorRecord]) -> str:
            values = [t.errors[number] for t in group if t.errors is not None and t.kind == "full"]
            return format_share(sum(values) / len(values) if values else None)

        return mean

    columns: list[Column] = [("kept", _share_of("kept", "numel"))]
    if len(tasks) <= _MOST_TASKS:
        columns += [(f"by {number}", kept_by(number - 1)) for number in range(1, len(tasks) + 1)]
    columns += [("by all", _share_of("kept_by_all", "kept")), ("signs\ndiffer", _share_of("sign_conflicts", "shared"))]
    if report.totals["errors"] is not None and len(tasks) <= _MOST_TASKS:
        columns += [(f"error {number}", error_of(number - 1)) for number in range(1, len(tasks) + 1)]
    return columns


def plan_summary(tensors: Sequence[TensorPlan]) -> list[Table]:
    """What will be done with each kind of layer."""
    columns: list[Column] = [
        ("tensors", _count),
        ("weights", lambda group: short_count(sum(tensor.numel for tensor in group))),
        ("shape", lambda group: only(shape_text(tensor.shape) for tensor in group)),
        ("treatment", _treatments),
    ]
    left = ("shape", "treatment")
    return summary_tables(tensors, columns, lambda t: t.name, lambda t: len(t.shape) == 1, left=left)


def _treatments(group: list[TensorPlan]) -> str:
    """Patched, and how, or left at base: with counts where the group is of several minds."""
    found: dict[str, int] = {}
    for tensor in group:
        said = treatment(tensor)
        found[said] = found.get(said, 0) + 1
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{count} {said}" for said, count in found.items())


def treatment(tensor: TensorPlan) -> str:
    """What will be done with a tensor, in a few words."""
    if tensor.action != "patch":
        return "base"
    if tensor.experts:
        how = f"a Hessian for each of {len(tensor.experts)} experts"
    else:
        how = "" if tensor.hessian else tensor.method or "by salience alone"
    return ", ".join(filter(None, ("patch", how, "retained" if tensor.retained_hessians else "")))


def stats_summary(hessians: dict[str, dict[str, Any]]) -> list[Table]:
    """Hessians by kind of layer and by depth."""

    def least_and_most(
        show: Callable[[Any], str], value: Callable[[dict[str, Any]], Any]
    ) -> Callable[[list[Any]], str]:
        def spread(group: list[Any]) -> str:
            values = [value(info) for _, info in group]
            low, high = show(min(values)), show(max(values))
            return low if low == high else f"{low} to {high}"

        return spread

    columns: list[Column] = [
        ("Hessians", _count),
        ("tensors", lambda group: f"{sum(info['used_by'] for _, info in group):,}"),
        ("channels", least_and_most("{:,}".format, lambda info: info["size"])),
        ("tokens", least_and_most(short_count, lambda info: info["tokens"])),
        ("mean\ndiagonal", least_and_most("{:.2g}".format, lambda info: info["mean_diagonal"])),
        ("dead", lambda group: f"{sum(info['dead'] for _, info in group):,}"),
    ]
    return summary_tables(list(hessians.items()), columns, lambda item: item[0], _is_of_vector, depth=columns)


def _is_of_vector(item: tuple[str, dict[str, Any]]) -> bool:
    """Of a norm or a bias: an embedding's Hessian is diagonal, too, but lies in no layer."""
    name, info = item
    return info["kind"] != "full" and place_of(name).number is not None


def checkpoint_summary(tensors: Sequence[dict[str, Any]]) -> list[Table]:
    """The tensors of a plain checkpoint by kind."""
    columns: list[Column] = [
        ("tensors", _count),
        ("shape", lambda group: only(shape_text(tensor["shape"]) for tensor in group)),
        ("dtype", lambda group: only(tensor["dtype"] for tensor in group)),
        ("bytes", lambda group: format_bytes(sum(tensor["bytes"] for tensor in group))),
    ]
    return summary_tables(tensors, columns, lambda t: str(t["name"]), lambda t: len(t["shape"]) == 1, left=("shape",))


def shape_text(shape: Sequence[int]) -> str:
    """``576×1536``; a tensor without dimensions is a scalar."""
    return "×".join(map(str, shape)) or "scalar"


def only(values: Any) -> str:
    """What all have in common, or the first with the count of others: ``576×1536 and 2 more``."""
    found = list(dict.fromkeys(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"
