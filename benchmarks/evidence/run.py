"""Statistics and a sweep for every pair; everything lies in the cache and is made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.evidence.pairs import Pair
from benchmarks.real.setting import say
from tailorcli import CalibrateOptions, Checkpoint, EvaluateOptions, PatchOptions, Stats, TailorError, calibrate_model
from tailorcli.sweep import Point, Setting, SweepReport, run_sweep

SAMPLES = 128
SEQ_LEN = 256
OWN_DATA = "retained on old samples"  # the family that a user has who kept some of the old data
_OPTIONS = PatchOptions(overwrite=True, retain_weight=0.3)  # beta where a grid says none


@dataclass(frozen=True)
class Grid:
    """What is tried of each method, besides base and tuned."""

    weights: tuple[float, ...]  # of interpolate
    dare: tuple[tuple[float, float], ...]  # density and weight
    magnitude: tuple[tuple[float, float], ...]
    graft: tuple[float, ...]  # densities
    graft_steps: int
    plain: tuple[tuple[str, float, float], ...]  # solver, density, weight: the paper's method
    retained: tuple[tuple[float, float], ...]  # density and beta
    own_data: tuple[tuple[float, float], ...]  # likewise, with samples of the old tasks
    omegas: tuple[float, ...] = ()  # of the paper's sweep and of the default, density 0.1

    def settings(self) -> list[Setting]:
        """All but those of ``own_data``."""
        found = [_other("interpolate", weight=weight) for weight in self.weights]
        found += [_other("dare", density=density, weight=weight) for density, weight in self.dare]
        found += [_other("magnitude", density=density, weight=weight) for density, weight in self.magnitude]
        found += [_other("graft", density=density, graft_steps=self.graft_steps) for density in self.graft]
        found.append(_other("tailor-released", density=0.1))
        found += [
            Setting(replace(_OPTIONS, solver=solver, density=density, weight=weight))  # type: ignore[arg-type]
            for solver, density, weight in self.plain
        ]
        found += [_retained(*one) for one in self.retained]
        found += [Setting(replace(_OPTIONS, solver="sequential", omega=omega)) for omega in self.omegas]
        beta = PatchOptions().retain_weight
        found += [Setting(replace(_OPTIONS, omega=omega, retain_weight=beta), retained=True) for omega in self.omegas]
        return list(dict.fromkeys(found))


def _other(method: str, **values: float) -> Setting:
    return Setting(replace(_OPTIONS, method=method, **values))  # type: ignore[arg-type]


def _retained(density: float, beta: float) -> Setting:
    return Setting(replace(_OPTIONS, density=density, retain_weight=beta), retained=True)


GRIDS = {
    "quick": Grid(
        weights=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        dare=((0.1, 1.0), (0.5, 0.6)),
        magnitude=((0.1, 1.0), (0.3, 1.0)),
        graft=(0.1,),
        graft_steps=50,
        plain=(
            ("none", 0.1, 1.0),
            *(("sequential", density, 1.0) for density in (0.02, 0.05, 0.1, 0.2, 0.5)),
            *(("joint", 0.05, 1.0), ("joint", 0.1, 1.0)),
        ),
        retained=(
            *((0.1, beta) for beta in (0.03, 0.1, 0.3, 1.0)),
            *((density, 0.1) for density in (0.02, 0.05, 0.2, 0.3, 0.5, 1.0)),
            *((0.3, 0.3), (1.0, 0.3), (1.0, 1.0)),
        ),
        own_data=((0.1, 0.1), (0.1, 0.3), (0.3, 0.3)),
        omegas=(0.0, 0.25, 0.75, 1.0),  # 0.5 is there already
    ),
    "text": Grid(
        weights=(0.4, 0.5, 0.6, 0.7),
        dare=((0.1, 1.0), (0.5, 0.6)),
        magnitude=((0.1, 1.0), (0.3, 1.0)),
        graft=(0.1,),
        graft_steps=40,
        plain=(("none", 0.1, 1.0), ("sequential", 0.1, 1.0), ("joint", 0.1, 1.0), ("joint", 0.02, 1.0)),
        retained=((0.1, 0.1), (0.1, 0.3), (0.1, 1.0), (0.3, 0.3), (1.0, 1.0)),
        own_data=((0.1, 0.3),),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What the sweep of one pair found; ``own`` are the points of the retain term on old samples."""

    pair: Pair
    report: SweepReport
    own: tuple[Point, ...]


def run_pair(pair: Pair, grid: Grid, folder: Path) -> Outcome:
    """Calibrate what is not calibrated yet, then sweep."""
    new = _stats(folder / "stats", pair.tuned, pair.train)
    written = _stats(folder / "stats-written", pair.base, None, pair.retain_length)
    own = _stats(folder / "stats-own", pair.base, pair.old_train)
    common = {
        "origin": pair.origin,
        "target": pair.target,
        "validation": pair.specs("validation"),
        "stats": new,
        "data": pair.train,
        "options": EvaluateOptions(batch_size=32),
        "announce": say,
    }
    inputs = (pair.base, pair.tuned)
    # One folder for both, where base and tuned are scored once; the report that stays in it is that of the whole grid.
    settings = [_retained(*one) for one in grid.own_data]
    other = run_sweep(*inputs, settings, pair.specs("test"), folder / "sweep", retain=own, **common)  # type: ignore[arg-type]
    report = run_sweep(*inputs, grid.settings(), pair.specs("test"), folder / "sweep", retain=written, **common)  # type: ignore[arg-type]
    points = tuple(replace(point, family=OWN_DATA) for point in other.points[2:])
    return Outcome(pair, report, points)


def _stats(folder: Path, model: Path, data: Path | None, length: int = SEQ_LEN) -> Path:
    """The statistics of a model in ``folder``, made unless they are there: on data, or on what it writes itself."""
    try:
        found = Stats.open(folder)
        found.close()
        with Checkpoint.open(model) as checkpoint:
            fits = found.model_fingerprint == checkpoint.fingerprint()
    except TailorError:
        fits = False
    if not fits:
        say(f"calibrating {model.name} for {folder}")
        options = CalibrateOptions(
            num_samples=SAMPLES, seq_len=length, batch_size=16, synthetic=data is None, overwrite=True
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        calibrate_model(model, data, folder, options)
    return folder


def run_all(name: str, pairs: Sequence[Pair], cache: Path) -> list[Outcome]:
    """Every pair of a benchmark in turn."""
    outcomes = []
    for pair in pairs:
        say(f"{name}: {pair.name}, seed {pair.seed}")
        outcomes.append(run_pair(pair, GRIDS[name], cache / f"{pair.name}-{pair.seed}"))
    return outcomes
