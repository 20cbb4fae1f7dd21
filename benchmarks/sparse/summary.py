"""What the cells come to: means over the seeds, with intervals by the test items, and what is ahead of what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import mean, stdev

import numpy as np

from benchmarks.sparse.cells import TEST, VALIDATION, Cell
from benchmarks.sparse.setting import BASE, FINE_TUNES, MASKS, OURS, ROWS, TUNED_AT, Row
from tailorcli.evaluation.metrics import Array, bootstrap, estimate, summarise

RESAMPLES = 1000
FIGURES = ("origin", "target", "arithmetic_mean", "h_score")  # old, new, their average, H
THIRD, TWO = "last third", "last 2"
PAPER, GRAFT, DARE = (Row("full", patch) for patch in ("paper", "graft", "dare"))
FULL, HALF, L2, SPIDER, DOWSER = (Row(name) for name in FINE_TUNES)

Side = tuple[Row, str]  # a row, and the depth


@dataclass(frozen=True)
class Claim:
    """That one row is ahead of another in H."""

    text: str
    ahead: Side
    behind: Side


CLAIMS = (
    *(Claim(f"SPIDER beats {row.title}", (SPIDER, TWO), (row, TWO)) for row in (FULL, HALF, L2, GRAFT, DARE, PAPER)),
    *(Claim(f"SPIDER beats {row.title}", (SPIDER, TUNED_AT), (row, TUNED_AT)) for row in (FULL, HALF, L2, PAPER)),
    *(Claim(f"SPIDER's mask beats that by {name}", (SPIDER, TUNED_AT), (Row(name), TUNED_AT)) for name in MASKS),
    *(
        Claim(f"Model-Dowser beats {row.title}", (DOWSER, depth), (row, depth))
        for depth in (THIRD, TUNED_AT)
        for row in (FULL, SPIDER, GRAFT, DARE, PAPER)
    ),
    *(
        Claim(f"{row.title} collapses with depth: it is better at the last third", (row, THIRD), (row, TUNED_AT))
        for row in (GRAFT, DARE, PAPER)
    ),
)
OF_OURS = (  # not claimed by a paper
    *(
        Claim(f"ours on full beats {row.title}", (OURS[0], TUNED_AT), (row, TUNED_AT))
        for row in (PAPER, SPIDER, DOWSER)
    ),
    *(
        Claim(f"{row.title} beats spider", (row, TUNED_AT), (SPIDER, TUNED_AT))
        for row in OURS[1:]
        if row.fine != "spider"
    ),
    *(Claim(f"{row.title} beats {row.fine} alone", (row, TUNED_AT), (Row(row.fine), TUNED_AT)) for row in OURS),
)


@cache
def figures_of(cell: Cell) -> dict[str, Array]:
    """Figures (1 + RESAMPLES,) on the test items; the resamplings of a task are the same for all cells."""
    scores = cell.scores[TEST]
    found = {task: bootstrap([one], task, RESAMPLES)[0] for task, one in scores.items()}
    new = cell.new(scores)
    return summarise(found, [task for task in scores if task != new], [new])


@dataclass(frozen=True)
class Table:
    """The cells of one task, over all depths and seeds."""

    task: str
    cells: tuple[Cell, ...]

    @cached_property
    def depths(self) -> dict[str, int]:
        """Layers by the name of the depth, the shallowest first."""
        return dict(sorted({c.depth: c.layers for c in self.cells if c.depth}.items(), key=lambda item: item[1]))

    @cached_property
    def tested(self) -> dict[tuple[Row, str, int], Cell]:
        """The cells with test figures at the rate that was taken, by row, depth and seed."""
        found = [c for c in self.cells if TEST in c.scores and c.rate == self.taken[c.row, c.depth]]
        return {(cell.row, cell.depth, cell.seed): cell for cell in found}

    @cached_property
    def taken(self) -> dict[Side, float]:
        """The rate of every row at a depth: of those with the most seeds there, that with the best H on validation.

        Where none was scored on validation at a depth, the H with all layers decides.
        """
        runs: dict[Side, dict[float, int]] = {}
        for cell in self.cells:
            of_side = runs.setdefault((cell.row, cell.depth), {})
            of_side[cell.rate] = of_side.get(cell.rate, 0) + (TEST in cell.scores)
        found = {}
        for side, of_side in runs.items():
            most = [rate for rate in of_side if of_side[rate] == max(of_side.values())]
            found[side] = max(most, key=lambda rate: self._validated(side).get(rate, -1.0))
        return found

    @cached_property
    def _by_depth(self) -> dict[str, dict[Row, dict[float, float]]]:
        """H on validation by depth, row and rate."""
        return {depth: self.rates(depth) for depth in {TUNED_AT, *(cell.depth for cell in self.cells)}}

    def _validated(self, side: Side) -> dict[float, float]:
        """H on validation by the rate, at the depth of a row where it was scored there, else with all layers."""
        row, depth = side
        return self._by_depth[depth].get(row) or self._by_depth[TUNED_AT].get(row, {})

    def of(self, side: Side) -> list[Cell]:
        """The cells of a row at a depth; the base has no depth of its own, and stands beside the seeds of full."""
        row, depth = side
        if row == BASE:
            keys = [(row, "", cell.seed) for cell in self.of((FULL, depth))]
        else:
            keys = sorted(key for key in self.tested if key[:2] == side)
        return [self.tested[key] for key in keys if key in self.tested]

    def figure(self, side: Side, name: str) -> Array | None:
        """The mean over the seeds, (1 + RESAMPLES,); None where there is no cell."""
        found = [figures_of(cell)[name] for cell in self.of(side)]
        return np.mean(found, axis=0) if found else None

    def of_shared_seeds(self, sides: Iterable[Side]) -> tuple[Table, int]:
        """The table of the seeds that all ``sides`` have, so that they can be compared, and how many these are."""
        seeds = set.intersection(*({cell.seed for cell in self.of(side)} for side in sides))
        return Table(self.task, tuple(cell for cell in self.cells if cell.seed in seeds)), len(seeds)

    def between_seeds(self, side: Side) -> float | None:
        """The deviation of H between the seeds; None of one."""
        values = [float(figures_of(cell)["h_score"][0]) for cell in self.of(side)]
        return stdev(values) if len(values) > 1 else None

    def both(self, claim: Claim) -> dict[int, Array]:
        """How far a claim's first side is ahead in H, by the seed, of those that both sides have."""
        sides = [{cell.seed: figures_of(cell)["h_score"] for cell in self.of(s)} for s in (claim.ahead, claim.behind)]
        return {seed: sides[0][seed] - sides[1][seed] for seed in sides[0] if seed in sides[1]}

    def gap(self, claim: Claim) -> tuple[float, float, float] | None:
        """How far a claim's first side is ahead in H, the mean over the seeds of ``both``, with its 95% interval."""
        both = self.both(claim)
        if not both:
            return None
        found = estimate(np.mean([*both.values()], axis=0))
        if found.value is None or found.interval is None:
            return None
        return (found.value, *found.interval)

    def rates(self, depth: str = TUNED_AT, part: str = VALIDATION) -> dict[Row, dict[float, float]]:
        """H with the first seed at a depth on a part of the tasks, by row and rate."""
        found: dict[Row, dict[float, float]] = {}
        for cell in self.cells:
            if part in cell.scores and cell.row in ROWS and (cell.seed, cell.depth) == (0, depth):
                found.setdefault(cell.row, {})[cell.rate] = cell.h(part)
        return {row: dict(sorted(found[row].items())) for row in ROWS if row in found}

    def better(self) -> dict[Side, float]:
        """The rates that were better on validation than the one taken, by row and depth."""
        validated = {side: self._validated(side) for side in self.taken if side[0] in ROWS}
        best = {side: max(rates, key=lambda rate: rates[rate]) for side, rates in validated.items() if rates}
        order = {side: (ROWS.index(side[0]), -self.depths[side[1]]) for side in best}
        return {
            side: best[side] for side in sorted(best, key=lambda side: order[side]) if best[side] != self.taken[side]
        }

    def cost(self, side: Side) -> tuple[float, float, int | None]:
        """Share of entries that moved and seconds, means over the seeds; the least peak bytes of all runs."""
        cells = self.of(side)
        runs = [cell for cell in self.cells if (cell.row, cell.depth) == side]
        peaks = [cell.peak for cell in runs if cell.peak]
        return mean(cell.moved for cell in cells), mean(cell.seconds for cell in cells), min(peaks, default=None)


def tables_of(cells: Sequence[Cell]) -> list[Table]:
    """A table for each task."""
    tasks = dict.fromkeys(cell.task for cell in cells)
    return [Table(task, tuple(cell for cell in cells if cell.task == task)) for task in tasks]


def verdict(gap: tuple[float, float, float]) -> str:
    """Whether what was said to be ahead is."""
    return "yes" if gap[1] > 0 else "no" if gap[2] < 0 else "not told apart"
