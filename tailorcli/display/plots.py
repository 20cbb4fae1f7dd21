"""Pictures of a report or of statistics; matplotlib is an optional extra."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tailorcli.display.curves import draw_distillation
from tailorcli.display.inspection import Inspection
from tailorcli.display.names import by_kind, by_layer, place_of
from tailorcli.errors import OptionsError, OutputError, TailorError
from tailorcli.files import PathLike, as_output_error
from tailorcli.guard import PICTURE_MARK, check_plot_file
from tailorcli.patchfile.records import TensorRecord
from tailorcli.patchfile.report import MERGE, PatchReport, share

BEFORE, AFTER, TUNED, _NEUTRAL = "#d08a3c", "#2f6f9f", "#8a8a8a", "#4d8f57"
_PALETTE = ("#2f6f9f", "#d08a3c", "#4d8f57", "#8f4d7f", "#7a6a3a", "#3a8f8f")
_MANY = (*_PALETTE, "#b03a3a", "#5b5bb5", "#111111", "#c2a200", "#7fb03a", "#d46fb0")


def plot_inspection(inspection: Inspection, file: Path) -> None:
    """Draw what ``inspection`` found into ``file`` (PNG, PDF or SVG by its suffix).

    Raises TailorError without matplotlib, or for something that has no picture.
    """
    check_picture(file)
    if inspection.report is not None:
        distilled = inspection.report.distillation
        figure = new_figure(13, 9.5 if distilled is None else 14)
        above = figure
        if distilled is not None:
            above, below = figure.subfigures(2, 1, height_ratios=(2, 1))
            draw_distillation(below, distilled)
        _draw_report(above, inspection.report)
    elif inspection.hessians:
        figure = new_figure(11, 4.5)
        _draw_stats(figure, inspection.hessians)
    else:
        raise TailorError(
            f"{inspection.path} has nothing to plot", "plot a stats folder, a report or a patched checkpoint"
        )
    name = Path(inspection.path).name.replace("$", r"\$")  # else what stands between two is a formula
    figure.suptitle(f"{inspection.kind}: {name}", fontsize=13)
    save_figure(figure, file)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches. Raises TailorError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TailorError("--plot needs matplotlib", "pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def check_picture(file: Path) -> None:
    """Whether a picture can be written there: its suffix and its folder. Raises OutputError."""
    if file.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise OutputError(f"cannot write the plot {file}", "use a path that ends in .png, .pdf or .svg")
    if not file.parent.is_dir():
        raise OutputError(
            f"cannot write the plot {file}: there is no folder {file.parent}", "make it or choose another"
        )


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure into ``file``. Raises OutputError."""
    kind = file.suffix.lower()
    mark = {"Software" if kind == ".png" else "Creator": PICTURE_MARK}  # by which a later run knows it for ours
    part = file.with_name(f"{file.name}.part")  # so that it is there whole or not at all
    try:
        marked = mark if kind in (".png", ".pdf", ".svg") else None
        figure.savefig(part, dpi=110, metadata=marked, format=kind.removeprefix("."))
        part.replace(file)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise as_output_error(file, error) from error
    except ValueError as error:
        raise OutputError(
            f"cannot write the plot {file}: {error}", "use a path that ends in .png, .pdf or .svg"
        ) from error


def _draw_report(figure: Any, report: PatchReport) -> None:
    tensors = [tensor for tensor in report.tensors if tensor.patched]
    if report.command == MERGE:
        _draw_merge(figure, tensors, [task.replace("$", r"\$") for task in report.options["tasks"]])
        return
    top = figure.subplots(2, 2)
    _captured_by_layer(top[0][0], tensors)
    _errors(top[0][1], tensors, by_layer=True)
    if report.totals.get("drift") is None:
        _errors(top[1][0], tensors, by_layer=False)
    else:
        _drifts(top[1][0], tensors)
    _distances(top[1][1], tensors)


def _draw_merge(figure: Any, tensors: list[TensorRecord], tasks: list[str]) -> None:
    """How the tasks' masks overlap, where they disagree, and how far each task's layers are, by layer."""
    top = figure.subplots(2, 2)
    labels, groups = layers_of(tensors)
    positions = list(range(len(labels)))
    colors = [_PALETTE[i % len(_PALETTE)] for i in range(len(tasks))]

    def total(group: list[TensorRecord], number: int) -> float:
        return float(sum(tensor.kept_by[number] for tensor in group))

    def mean_error(group: list[TensorRecord], number: int) -> float:
        values = [t.errors[number] for t in group if t.errors is not None and t.kind == "full"]
        return 100 * sum(values) / len(values) if values else float("nan")

    kept, overlap, signs, errors = top[0][0], top[0][1], top[1][0], top[1][1]
    for number, (task, color) in enumerate(zip(tasks, colors, strict=True)):
        shares = [100 * (share(total(group, number), _sum(group, "numel")) or 0.0) for group in groups]
        kept.plot(positions, shares, "o-", color=color, label=task)
    union = [100 * (share(_sum(group, "kept"), _sum(group, "numel")) or 0.0) for group in groups]
    kept.plot(positions, union, "--", color="black", label="union")
    kept.set(title="Weights kept by each task, and by any, by layer", ylabel="% of weights")
    _share_axis(kept)
    kept.legend(loc="upper left", ncols=2)
    jaccard = [100 * (share(_sum(group, "kept_by_all"), _sum(group, "kept")) or 0.0) for group in groups]
    overlap.bar(positions, jaccard, color=AFTER, label="kept by all tasks / kept by any (Jaccard)")
    by_chance = [100 * (_overlap_by_chance(group, len(tasks)) or 0.0) for group in groups]
    overlap.plot(positions, by_chance, "_", color="black", ms=12, label="if the masks were drawn at random")
    overlap.set(
        title="Overlap of the tasks' masks, by layer", ylabel="%", ylim=(0, 1.3 * max([*jaccard, *by_chance, 1e-9]))
    )
    overlap.legend(loc="upper left")
    conflicts = [100 * (share(_sum(group, "sign_conflicts"), _sum(group, "shared")) or 0.0) for group in groups]
    signs.bar(positions, conflicts, color=BEFORE)
    signs.axhline(50, color="black", lw=0.8, ls="--")
    signs.set(title="Shared weights whose changes differ in sign, by layer", ylabel="% of those kept by several")
    if any(t.errors is not None and t.kind == "full" for t in tensors):
        for number, (task, color) in enumerate(zip(tasks, colors, strict=True)):
            errors.plot(positions, [mean_error(group, number) for group in groups], "o-", color=color, label=task)
        errors.legend()
    else:
        errors.text(0.5, 0.5, "not measured: merged without statistics", ha="center", transform=errors.transAxes)
    errors.set(title="Layer error against each task's tuned layer, by layer", ylabel="% of ‖ΔW X‖²")
    for axes in (kept, overlap, signs, errors):
        _name_positions(axes, labels)


def _overlap_by_chance(group: list[TensorRecord], num_tasks: int) -> float | None:
    """The expected Jaccard index of masks of the same densities drawn independently."""
    common, union = 0.0, 0.0
    for tensor in group:
        inside, outside = 1.0, 1.0
        for number in range(num_tasks):
            density = tensor.kept_by[number] / tensor.numel
            inside *= density
            outside *= 1.0 - density
        common += inside * tensor.numel
        union += (1.0 - outside) * tensor.numel
    return share(common, union)


def layers_of(tensors: list[TensorRecord]) -> tuple[list[str], list[list[TensorRecord]]]:
    """Tensors gathered by layer, each stack of layers for itself; those outside any layer come last as "other"."""
    groups = by_layer(tensors, lambda tensor: tensor.name)
    return list(groups), list(groups.values())


def _by_kind(tensors: list[TensorRecord]) -> tuple[list[str], list[list[TensorRecord]]]:
    groups = by_kind(tensors, lambda tensor: tensor.name, lambda tensor: False)
    return list(groups), list(groups.values())


def _captured_by_layer(axes: Any, tensors: list[TensorRecord]) -> None:
    labels, groups = layers_of(tensors)

    def shares(part: str, whole: str) -> list[float]:
        return [100 * (share(_sum(group, part), _sum(group, whole)) or 0.0) for group in groups]

    positions = range(len(labels))
    axes.plot(positions, shares("delta_sq_kept", "delta_sq"), "o-", color=AFTER, label="of the squared change ‖ΔW‖²")
    if any(t.sensitivity_sum for t in tensors):
        values = shares("sensitivity_kept", "sensitivity_sum")
        axes.plot(positions, values, "s-", color=BEFORE, label="of the summed sensitivity")
    axes.plot(positions, shares("kept", "numel"), "--", color=TUNED, label="of the weights (density)")
    axes.set(title="What the mask captures, by layer", ylabel="%")
    _share_axis(axes)
    _name_positions(axes, labels)
    axes.legend(loc="upper left")


def _share_axis(axes: Any) -> None:
    """From 0 with room for a legend, and no tick above 100%."""
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= min(100, axes.get_ylim()[1])])


def _drifts(axes: Any, tensors: list[TensorRecord]) -> None:
    """How much of the tuned layers' drift on the retained data the patched ones have."""
    measured = [t for t in tensors if t.kind == "full" and t.drift is not None]
    labels, groups = layers_of(measured)
    values = [100 * _sum(group, "drift") / len(group) for group in groups]
    draw_bars(axes, labels, [("patched", _NEUTRAL, values)])
    axes.axhline(100, color=TUNED, lw=0.8, ls="--", label="tuned")
    axes.set(title="Drift on the retained data, by layer (0 is the base)", ylabel="% of the tuned layer's")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(loc="upper right", ncols=2)


def _sum(tensors: list[TensorRecord], key: str) -> float:
    return sum(getattr(tensor, key) or 0.0 for tensor in tensors)


def _errors(axes: Any, tensors: list[TensorRecord], *, by_layer: bool) -> None:
    measured = [t for t in tensors if t.kind == "full" and t.error_after is not None]
    where = "layer" if by_layer else "module kind"
    axes.set(title=f"Layer error against the tuned layer, by {where}", ylabel="% of the error at base")
    if not measured:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    labels, groups = layers_of(measured) if by_layer else _by_kind(measured)
    _paired_bars(axes, labels, groups, "error_before", "error_after", scale=100.0, mean=True)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper right", ncols=2)


def _distances(axes: Any, tensors: list[TensorRecord]) -> None:
    """The paper's Fig. 6: the distance from base before and after the decorator."""
    labels, groups = layers_of(tensors)
    axes.set(title="Distance from base, Σ|W − W_base| (the paper's Fig. 6)", ylabel="")
    after = "distance_after" if any(t.distance_after is not None for t in tensors) else "distance_before"
    _paired_bars(axes, labels, groups, "distance_before", after, scale=1.0, mean=False)
    tuned = [_sum(group, "distance_tuned") for group in groups]
    axes.plot(range(len(labels)), tuned, "_", color="black", ms=9, label="tuned")
    inside = [value for label, value in zip(labels, tuned, strict=True) if label != "other"]
    if inside and max(tuned) > 3 * max(inside):  # an embedding has many times the weights of a layer
        axes.set_ylim(0, 1.35 * max(inside))
        axes.annotate(
            f"tuned: {tuned[-1]:,.0f}",
            (len(labels) - 1, max(inside)),
            ha="right",
            fontsize=8,
            xytext=(0, 4),
            textcoords="offset points",
        )
    else:
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
    axes.legend(loc="upper left", ncols=3)


def _paired_bars(
    axes: Any,
    labels: list[str],
    groups: list[list[TensorRecord]],
    before: str,
    after: str,
    *,
    scale: float,
    mean: bool,
) -> None:
    def values(key: str) -> list[float]:
        return [scale * _sum(group, key) / (len(group) if mean else 1) for group in groups]

    draw_bars(
        axes, labels, [("before compensation", BEFORE, values(before)), ("after compensation", AFTER, values(after))]
    )


def draw_bars(axes: Any, labels: list[str], kinds: list[tuple[str, str, list[float]]]) -> None:
    """Bars side by side at every label: the name, the colour and the values of each kind."""
    width = 0.8 / len(kinds)
    for number, (name, color, values) in enumerate(kinds):
        offset = (number - (len(kinds) - 1) / 2) * width
        axes.bar([i + offset for i in range(len(labels))], values, width=width, color=color, label=name)
    _name_positions(axes, labels)


def _draw_stats(figure: Any, hessians: dict[str, dict[str, Any]]) -> None:
    left, right = figure.subplots(1, 2)
    full = {name: info for name, info in hessians.items() if info["kind"] == "full"}
    gathered = by_kind(full, lambda name: name, lambda name: False)
    for kind, names in gathered.items():
        layers = {place_of(name).number or 0: full[name] for name in names}  # of experts, the last
        numbers = sorted(layers)
        left.plot(numbers, [layers[n]["mean_diagonal"] for n in numbers], "o-", label=kind)
        right.plot(numbers, [100 * layers[n]["dead"] / layers[n]["size"] for n in numbers], "o-", label=kind)
    left.set(title="Mean of diag(H): twice the mean square of an input", xlabel="layer", yscale="log")
    right.set(title="Dead input channels", xlabel="layer", ylabel="%")
    left.legend(fontsize=8)


def check_plot(file: Path, has_roles: bool, inputs: Iterable[PathLike | None]) -> None:
    """Whether an evaluation of ``inputs`` can be drawn into ``file``, before hours of work. Raises TailorError."""
    check_plot_file(file, inputs)
    new_figure(1, 1)
    if not has_roles:
        raise OptionsError("--plot draws old against new tasks", "name them by --origin and --target")
    check_picture(file)


def plot_evaluation(report: dict[str, Any], file: Path) -> None:
    """Draw every model of an evaluation by its old and new performance, over lines of equal H."""
    import numpy as np

    figure = new_figure(8, 6.5)
    axes = figure.subplots()
    ends: list[tuple[float, float]] = []  # of the error bars: what must be seen
    labels: list[tuple[str, str, float, float]] = []
    colors = {report["base"]: BEFORE, report["tuned"]: TUNED}
    for number, model in enumerate(report["models"]):
        old, new = model["summary"]["origin"], model["summary"]["target"]
        reach = [estimate["interval"] or [estimate["value"]] * 2 for estimate in (old, new)]
        ends += list(zip(*reach, strict=True))
        # A percentile interval need not hold the value itself where there are very few items.
        (left, right), (below, above) = (
            (max(0.0, e["value"] - low), max(0.0, high - e["value"]))
            for e, (low, high) in zip((old, new), reach, strict=True)
        )
        others = [color for color in _PALETTE if color != BEFORE]
        color = colors.get(model["name"], others[number % len(others)])
        bars = {"xerr": [[left], [right]], "yerr": [[below], [above]], "capsize": 3, "lw": 1.2}
        axes.errorbar(old["value"], new["value"], fmt="o", ms=7, color=color, **bars)
        label = f"{model['name']}, H {model['summary']['h_score']['value']:.1f}".replace("$", r"\$")
        labels.append((label, color, old["value"], new["value"]))
    (left, below), (right, above) = np.min(ends, axis=0), np.max(ends, axis=0)
    width, height = max(right - left, 2.0), max(above - below, 2.0)
    axes.set_xlim(max(0.0, left - 0.15 * width), min(102.0, right + 0.15 * width))
    axes.set_ylim(max(0.0, below - 0.15 * height), min(102.0, above + 0.15 * height))
    for label, color, x, y in labels:  # towards the middle, where there is room
        side = {"xytext": (6, 6), "ha": "left"} if x < (left + right) / 2 else {"xytext": (-6, 6), "ha": "right"}
        axes.annotate(label, (x, y), textcoords="offset points", color=color, **side)
    _draw_equal_h(axes)
    axes.set(
        title="Old against new performance, with lines of equal H",
        xlabel=f"old tasks, % ({_tasks_of(report, 'origin')})",
        ylabel=f"new tasks, % ({_tasks_of(report, 'target')})",
    )
    save_figure(figure, file)


def plot_frontiers(report: dict[str, Any], file: Path) -> None:
    """Draw a sweep: every setting by its performance on the test tasks, each family's frontier as a line."""
    figure = new_figure(9, 7)
    axes = figure.subplots()
    points = [(point, *(point["test"][name]["value"] for name in ("origin", "target"))) for point in report["points"]]
    ends = [(old, new) for point, old, new in points if point["options"] is None]
    families = list(dict.fromkeys(point["family"] for point, _, _ in points if point["options"] is not None))
    picked = set(report["picked"].values())
    for number, family in enumerate(families):
        style = {"color": _MANY[number % len(_MANY)], "ls": ("-", "--")[number // len(_MANY) % 2]}
        color = style["color"]
        own = [(point, old, new) for point, old, new in points if point["family"] == family]
        kept = [(old, new) for point, old, new in own if point["on_frontier"]["test"]]
        line = sorted({*kept, *(end for end in ends if not _is_beaten(end, [*kept, *ends]))})
        area = report["areas"]["test"][family]["value"]
        label = family + (f", area {area:.2f}" if area is not None else "")
        axes.plot(*zip(*line, strict=True), lw=1.4, alpha=0.8, **style)
        axes.plot([], [], marker="o", label=label.replace("$", r"\$"), **style)
        for point, old, new in own:
            chosen = point["label"] in picked
            axes.plot(old, new, "*" if chosen else "o", ms=13 if chosen else 5, color=color)
    for (old, new), name, color in zip(ends, ("base", "tuned"), (BEFORE, TUNED), strict=True):
        axes.plot(old, new, "s", ms=8, color=color)
        axes.annotate(name, (old, new), textcoords="offset points", xytext=(6, 6), color=color)
    _draw_equal_h(axes)
    axes.legend(title="star: picked " + report["rule"], fontsize=8, title_fontsize=8)
    axes.set(
        title="Old against new performance, every setting",
        xlabel=f"old tasks, % ({', '.join(report['origin'])})".replace("$", r"\$"),
        ylabel=f"new tasks, % ({', '.join(report['target'])})".replace("$", r"\$"),
    )
    save_figure(figure, file)


def _is_beaten(point: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    return any(old >= point[0] and new >= point[1] and (old, new) != point for old, new in others)


def _draw_equal_h(axes: Any) -> None:
    """Lines of equal H over the axes as they are."""
    import numpy as np

    sides = [np.linspace(start, stop, 200) for start, stop in (axes.get_xlim(), axes.get_ylim())]
    grid_old, grid_new = np.meshgrid(*sides)
    total = grid_old + grid_new
    h = np.divide(2 * grid_old * grid_new, total, out=np.zeros_like(total), where=total > 0)
    equal = axes.contour(grid_old, grid_new, h, 9, colors="#bbbbbb", linewidths=0.8, zorder=0)
    axes.clabel(equal, fmt="H %g", fontsize=8)


def _tasks_of(report: dict[str, Any], role: str) -> str:
    names = [name for name, facts in report["tasks"].items() if facts["role"] == role]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return shown.replace("$", r"\$")


def _name_positions(axes: Any, labels: list[str]) -> None:
    """Label every position, or every few of many; a stack of layers is named at its first layer alone."""
    stacks = [label.rpartition(" ")[0] for label in labels]
    labels = [
        label.rpartition(" ")[2] if number and stacks[number] == stacks[number - 1] else label
        for number, label in enumerate(labels)
    ]
    step = max(1, len(labels) // 24)
    longest = max(map(len, labels), default=0)
    rotated = (
        {"rotation": 35, "ha": "right"} if longest > 6 else {"rotation": 90 if longest > 2 and len(labels) > 12 else 0}
    )
    axes.set_xticks(range(0, len(labels), step))
    axes.set_xticklabels(labels[::step], fontsize=8, **rotated)
