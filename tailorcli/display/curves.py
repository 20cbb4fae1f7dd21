"""The curves of a distillation, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tailorcli.display.summary import new_table

_MOST_ROWS = 11  # of the table: the first, the last, the best, and some between


def distillation_table(found: Mapping[str, Any]) -> Table:
    """The held-out divergences from both teachers by step; the step whose state was kept is marked."""
    table = new_table("distillation: held-out divergence, nats a token", "step", ("new", "retained", "objective"))
    weight = _weight_of(found)
    steps, best = found["steps"], found["best"]
    every = max(1, -(-(len(steps) - 1) // (_MOST_ROWS - 2)))
    for place, step in enumerate(steps):
        if place % every and step not in (best, steps[-1]):
            continue
        new, retained = found["new"][place], found["retained"][place]
        figures = [f"{value:.4f}" for value in (new, retained, new + weight * retained)]
        table.add_row(f"{step:,}{' (kept)' if step == best else ''}", *figures)
    return table


def draw_distillation(figure: Any, found: Mapping[str, Any]) -> None:
    """Both curves side by side, held out and trained on, with the step that was kept."""
    for axes, kind, title in zip(
        figure.subplots(1, 2),
        ("new", "retained"),
        ("Divergence from tuned, new task", "Divergence from the base, retained samples"),
        strict=True,
    ):
        axes.plot(found["steps"], found[kind], "o-", color="tab:blue", label="held out")
        trained = found.get(f"trained_{kind}")
        values = trained if isinstance(trained, list) else []
        if len(values) == len(found["steps"]) - 1 and all(isinstance(value, int | float) for value in values):
            axes.plot(found["steps"][1:], trained, "--", color="tab:orange", label="trained on")
        axes.axvline(found["best"], color="gray", linewidth=1, label=f"kept: step {found['best']}")
        axes.set(title=title, xlabel="step", ylabel="nats a token")
        axes.set_ylim(bottom=0)
        axes.legend()


def _weight_of(found: Mapping[str, Any]) -> float:
    options = found.get("options")
    weight = options.get("weight") if isinstance(options, Mapping) else None
    return float(weight) if isinstance(weight, int | float) else 1.0
