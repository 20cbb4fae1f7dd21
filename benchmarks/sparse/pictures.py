"""Model-Dowser's Figure 1 and SPIDER's Table 3, drawn from what was measured here."""

from __future__ import annotations

from pathlib import Path

from benchmarks.sparse.setting import BASE, MASKS, OURS, TUNED_AT, Row
from benchmarks.sparse.summary import DARE, DOWSER, FULL, GRAFT, HALF, L2, PAPER, SPIDER, Table
from tailorcli.display.plots import new_figure, save_figure

LINES = (
    *((row, "--", "o") for row in (FULL, HALF, L2)),
    *((row, ":", "s") for row in (GRAFT, DARE, PAPER)),
    *((row, "-", "^") for row in (SPIDER, DOWSER, OURS[0])),
)
BARS = (("old", "origin", "tab:blue"), ("new", "target", "tab:orange"), ("H", "h_score", "black"))


def draw_depths(table: Table, file: Path) -> int:
    """H over the number of layers that are fine-tuned, of the seeds that all have; 0, and nothing drawn, of one depth.

    Gives the number of seeds.
    """
    depths = {name: n for name, n in table.depths.items() if all(table.of((row, name)) for row, *_ in LINES)}
    if len(depths) < 2:
        return 0
    table, seeds = table.of_shared_seeds([(row, name) for row, *_ in LINES for name in depths])
    if not seeds:
        return 0
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    for row, style, marker in LINES:
        found = [table.figure((row, name), "h_score") for name in depths]
        axes.plot([*depths.values()], [v[0] for v in found if v is not None], style, marker=marker, label=row.title)
    start = table.figure((BASE, next(iter(depths))), "h_score")
    if start is not None:
        axes.axhline(start[0], color="black", lw=1, ls="--", label=BASE.title)
    axes.set(xlabel="layers fine-tuned, the last ones", ylabel="H, % (test)", xticks=[*depths.values()])
    axes.grid(axis="y", color="#e4e4e4", lw=0.8)
    figure.legend(loc="outside right upper")
    save_figure(figure, file)
    return seeds


def draw_masks(table: Table, file: Path) -> int:
    """Old, new and H with SPIDER's mask and with others in its place, of the seeds that all have; their number.

    0, and nothing drawn, where they lack.
    """
    rows = [BASE, *(Row(mask) for mask in MASKS), SPIDER]
    table, seeds = table.of_shared_seeds([(row, TUNED_AT) for row in rows])
    if not seeds:
        return 0
    figure = new_figure(7.5, 3.8)
    axes = figure.subplots()
    for place, (label, name, color) in enumerate(BARS):
        found = [table.figure((row, TUNED_AT), name) for row in rows]
        heights = [float(value[0]) for value in found if value is not None]
        bars = axes.bar([n + 0.27 * (place - 1) for n in range(len(rows))], heights, 0.25, label=label, color=color)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(rows)), [row.fine or row.title for row in rows])
    axes.set_ylabel("% (test)")
    figure.legend(loc="outside upper center", ncols=len(BARS))
    save_figure(figure, file)
    return seeds
