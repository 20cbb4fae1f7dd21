"""Lead A: a setting picked without any old data, by losses on held-out new text and on samples that the base wrote.

Since the written samples are draws from the base, their loss is its entropy plus the divergence from base to patched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from benchmarks.leads.bench import Bench, Figures
from benchmarks.leads.layers import Variant
from benchmarks.leads.render import header_of, spread
from benchmarks.real.render import table
from tailorcli import h_score

BETAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
WEIGHTS = (0.4, 0.5, 0.6, 0.7, 0.8)
OTHERS = ((0.3, 0.1), (0.3, 0.3), (1.0, 0.3), (1.0, 1.0))  # density and beta
Points = dict[str, Figures]
Merit = Callable[[Figures, Figures, Figures], float]  # of a point, the base and the tuned model; more is better


def at_density(beta: float, density: float = 0.1) -> Variant:
    """The setting of `patch` with a beta and a density."""
    return Variant(f"density {density:g}, beta {beta:g}", beta=beta, density=density)


def sum_of_losses(weight: float) -> Merit:
    """The losses' sum in nats, that of the written samples times ``weight``."""
    return lambda point, base, tuned: -(point.held_loss + weight * point.written_loss)


def shares(point: Figures, base: Figures, tuned: Figures) -> tuple[float, float]:
    """What is kept of the base on written samples, and of the tuned model's gain, each by its own loss's range."""
    kept = (tuned.written_loss - point.written_loss) / (tuned.written_loss - base.written_loss)
    gain = (base.held_loss - point.held_loss) / (base.held_loss - tuned.held_loss)
    return kept, gain


def h_of_shares(point: Figures, base: Figures, tuned: Figures) -> float:
    """The harmonic mean of the shares, as far as they are positive."""
    kept, gain = shares(point, base, tuned)
    return h_score(max(kept, 0.0), max(gain, 0.0))


def h_of_accuracies(point: Figures, base: Figures, tuned: Figures) -> float:
    """The H-score with written samples for the old tasks and held-out text for the new one."""
    return h_score(point.written_accuracy, point.held_accuracy)


def h_of_validation(point: Figures, base: Figures, tuned: Figures) -> float:
    """What only real tasks tell."""
    return point.h


RULES: dict[str, Merit] = {
    "best H of the real tasks": h_of_validation,
    "loss_new + loss_written": sum_of_losses(1.0),
    "loss_new + loss_written / 2": sum_of_losses(0.5),
    "loss_new + 2 loss_written": sum_of_losses(2.0),
    "sum of the losses by their ranges": lambda *of: sum(shares(*of)),
    "harmonic mean of the losses' shares": h_of_shares,
    "H of the accuracies on both texts": h_of_accuracies,
}


def sparse_points(bench: Bench) -> Points:
    """The betas at density 0.1."""
    return {f"{beta:g}": bench.variant(at_density(beta)) for beta in BETAS}


def mixed_points(bench: Bench) -> Points:
    """The betas, other densities, and interpolation."""
    found = {f"0.1/{label}": point for label, point in sparse_points(bench).items()}
    found |= {f"{density:g}/{beta:g}": bench.variant(at_density(beta, density)) for density, beta in OTHERS}
    return found | {f"i{weight:g}": bench.between(weight) for weight in WEIGHTS}


def picks(rule: Merit, points: Points, bench: Bench) -> str:
    """The label of the point with the most merit."""
    base, tuned = bench.between(0.0), bench.between(1.0)
    return max(points, key=lambda label: rule(points[label], base, tuned))


def pick_table(benches: Mapping[str, Sequence[Bench]], points_of: Callable[[Bench], Points], fixed: str) -> str:
    """What every rule picks, and how much H it loses against the best pick."""
    every = {name: [points_of(bench) for bench in seeds] for name, seeds in benches.items()}
    rows = []
    for title, rule in {f"always {fixed}": None, **RULES}.items():
        cells = [title]
        for name, seeds in benches.items():
            pairs = list(zip(seeds, every[name], strict=True))
            chosen = [fixed if rule is None else picks(rule, points, bench) for bench, points in pairs]
            h = [points[label].h for label, points in zip(chosen, every[name], strict=True)]
            lost = [max(p.h for p in points.values()) - value for value, points in zip(h, every[name], strict=True)]
            cells += [", ".join(chosen), spread(h), f"{mean(lost):.2f} ({max(lost):.2f})"]
        rows.append(cells)
    return table(header_of("rule", benches, ("picks", "H", "lost (at most)")), rows)


def point_table(benches: Mapping[str, Sequence[Bench]]) -> str:
    """The points themselves, mean of the seeds."""
    rows = []
    every = {name: [mixed_points(bench) for bench in seeds] for name, seeds in benches.items()}
    for name, seeds in benches.items():
        every[name] = [
            {"base": bench.between(0.0), "tuned": bench.between(1.0)} | points
            for bench, points in zip(seeds, every[name], strict=True)
        ]
    for label in next(iter(every.values()))[0]:
        cells = [label]
        for seeds_points in every.values():
            of_seeds = [points[label] for points in seeds_points]
            cells.append(f"{mean(p.h for p in of_seeds):.1f}")
            cells += [f"{mean(p.held_loss for p in of_seeds):.3f}", f"{mean(p.written_loss for p in of_seeds):.3f}"]
            cells.append(f"{mean(p.held_loss + p.written_loss for p in of_seeds):.3f}")
        rows.append(cells)
    return table(header_of("setting", benches, ("H", "loss_new", "loss_written", "sum")), rows)


def report(benches: Mapping[str, Sequence[Bench]]) -> str:
    """The tables of the lead."""
    for seeds in benches.values():
        for bench in seeds:
            bench.between(0.0), bench.between(1.0)
    return "\n\n".join(
        (
            "The betas 0, 0.01, 0.03, 0.1, 0.3 and 1 at density 0.1:",
            pick_table(benches, sparse_points, "0.1"),
            "A mixed set: these as *density/beta*, densities 0.3 and 1 besides, interpolation as *i* and its weight:",
            pick_table(benches, mixed_points, "0.1/0.1"),
            "The points, mean of the seeds:",
            point_table(benches),
        )
    )
