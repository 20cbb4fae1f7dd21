"""Statistics and a sweep for every pair; everything lies in the cache and is made once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.common import say
from benchmarks.evidence.pairs import Pair
from benchmarks.real.setting import share_machine
from tailorcli import CalibrateOptions, Checkpoint, EvaluateOptions, PatchOptions, Stats, TailorError, calibrate_model
from tailorcli.evaluation.metrics import h_score
from tailorcli.options import DistillOptions
from tailorcli.sweep.outcome import Point, SweepReport
from tailorcli.sweep.run import run_sweep
from tailorcli.sweep.settings import Setting

SAMPLES = 512  # of each kind; distillation makes more of them than the closed forms do
SEQ_LEN = 256
SMALL = "text-small"  # the benchmark text with few samples and steps
MANY = 2048  # samples of each kind, on which the default is distilled once more
MANY_SWEEP = "sweep-many"  # the folder of what was distilled on them
WRITTEN = "written"  # the task of going on as the base did
PICKED = "joint, propagated, density 0.1, retain weight picked on written samples"  # family and label
OWN_DATA = "retained on old samples"  # the family that a user has who kept some of the old data
_OPTIONS = PatchOptions(overwrite=True)


@dataclass(frozen=True)
class Grid:
    """What is tried of each method, besides base and tuned."""

    weights: tuple[float, ...]  # of interpolate
    dare: tuple[tuple[float, float], ...]  # density and weight
    magnitude: tuple[tuple[float, float], ...]
    graft: tuple[float, ...]  # densities
    graft_steps: int
    plain: tuple[tuple[str, float, float], ...]  # solver, density, weight: the paper's method
    propagated: tuple[tuple[float, float, float], ...]  # density, beta and damping
    retained: tuple[tuple[float, float, float], ...]  # likewise, without propagation
    own_data: tuple[tuple[float, float, float], ...]  # the same with samples of the old tasks
    omegas: tuple[float, ...] = ()  # of the paper's sweep and of the default, density 0.1
    lines: tuple[float, ...] = ()  # alphas
    dg_hard: tuple[float, ...] = ()  # scales of its threshold
    fapm: tuple[float, ...] = ()  # densities
    distilled: tuple[float, ...] = ()  # densities of the default, distilled at one default for all
    many: tuple[float, ...] = ()  # densities of the same on more samples
    many_samples: int = MANY  # of each kind
    distill_steps: int | None = None
    samples: int = SAMPLES  # of each kind
    seq_len: int = SEQ_LEN

    def settings(self) -> list[Setting]:
        """All but those of ``own_data``."""
        found = [_other("interpolate", weight=weight) for weight in self.weights]
        found += [_other("dare", density=density, weight=weight) for density, weight in self.dare]
        found += [_other("magnitude", density=density, weight=weight) for density, weight in self.magnitude]
        found += [_other("graft", density=density, graft_steps=self.graft_steps) for density in self.graft]
        found += [_other("lines", alpha=alpha) for alpha in self.lines]
        found += [_other("dg-hard", threshold_scale=scale) for scale in self.dg_hard]
        found += [_other("fapm", density=density) for density in self.fapm]
        found.append(_other("tailor-released", density=0.1))
        found += [
            Setting(replace(_OPTIONS, solver=solver, density=density, weight=weight))
            for solver, density, weight in self.plain
        ]
        found += [_retained(*one, propagate=True) for one in self.propagated]
        found += [_retained(*one, propagate=False) for one in self.retained]
        found += [Setting(replace(_OPTIONS, solver="sequential", omega=omega)) for omega in self.omegas]
        found += [Setting(replace(_OPTIONS, omega=omega), retained=True) for omega in self.omegas]
        found += [distilled(density, self.distill_steps) for density in self.distilled]
        return list(dict.fromkeys(found))

    def many_settings(self) -> list[Setting]:
        """Those on more samples, without what their labels end with."""
        return [distilled(density, self.distill_steps) for density in self.many]

    def own_settings(self) -> list[Setting]:
        """Those with retained statistics of old samples."""
        return [_retained(*one, propagate=False) for one in self.own_data]


def _other(method: str, **values: float) -> Setting:
    return Setting(replace(_OPTIONS, method=method, **values))  # type: ignore[arg-type]


def distilled(density: float, steps: int | None = None, *, propagate: bool | None = None) -> Setting:
    """The default at a density, distilled; ``propagate`` may say whether it is propagated before."""
    changed = replace(_OPTIONS, density=density, propagate=propagate)
    return Setting(changed, retained=True, distill=DistillOptions(steps=steps))


def _retained(density: float, beta: float, damping: float, *, propagate: bool) -> Setting:
    changed = replace(_OPTIONS, density=density, retain_weight=beta, damping=damping, propagate=propagate)
    return Setting(changed.resolved(True), retained=True)


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
        propagated=(
            *((0.1, beta, 0.1) for beta in (0.1, 0.3, 1.0)),
            *((density, 0.3, 0.1) for density in (0.3, 1.0)),
        ),
        retained=(
            *((0.1, beta, 0.01) for beta in (0.03, 0.1, 0.3, 1.0)),
            *((density, 0.1, 0.01) for density in (0.02, 0.3, 1.0)),
            *((0.3, 0.3, 0.01), (1.0, 0.3, 0.01)),
        ),
        own_data=((0.1, 0.3, 0.01), (0.3, 0.3, 0.01)),
        omegas=(0.0, 1.0),  # 0.5 is there already
        lines=(0.0, 0.2, 0.4, 0.6, 0.8),
        dg_hard=(0.5, 1.0, 2.0, 4.0),
        fapm=(0.1, 0.3, 0.5, 0.8),
        distilled=(0.1, 0.02),
        many=(0.1,),
    ),
    "text": Grid(
        weights=(0.4, 0.5, 0.6, 0.7),
        dare=((0.1, 1.0), (0.5, 0.6)),
        magnitude=((0.1, 1.0), (0.3, 1.0)),
        graft=(0.1,),
        graft_steps=40,
        plain=(("none", 0.1, 1.0), ("sequential", 0.1, 1.0), ("joint", 0.1, 1.0)),
        propagated=((0.1, 0.3, 0.1),),
        retained=((0.1, 0.1, 0.01), (0.1, 0.3, 0.01)),
        own_data=((0.1, 0.3, 0.01),),
        lines=(0.0, 0.3, 0.5, 0.7),
        dg_hard=(0.5, 1.0, 2.0),
        fapm=(0.1, 0.3, 0.5),
        distilled=(0.1, 0.02),
    ),
    SMALL: Grid(  # what two cores can bear
        weights=(0.4, 0.5, 0.6, 0.7),
        dare=((0.5, 0.6),),
        magnitude=((0.3, 1.0),),
        graft=(0.1,),
        graft_steps=40,
        plain=(("sequential", 0.1, 1.0),),
        propagated=((0.1, 0.3, 0.1),),
        retained=(),
        own_data=(),
        many=(0.1,),
        many_samples=512,
        samples=128,
        seq_len=128,
    ),
    "multimodal": Grid(
        weights=(0.3, 0.4, 0.5, 0.6, 0.7),
        dare=((0.1, 1.0), (0.5, 0.5), (0.5, 0.6)),
        magnitude=((0.1, 1.0), (0.2, 1.0), (0.3, 1.0)),
        graft=(0.1,),
        graft_steps=40,
        plain=(("none", 0.1, 1.0), ("sequential", 0.1, 1.0), ("joint", 0.1, 1.0), ("joint", 0.02, 1.0)),
        propagated=((0.1, 0.1, 0.1), (0.1, 0.3, 0.1), (0.1, 1.0, 0.1), (0.3, 0.3, 0.1)),
        retained=(
            *((0.1, beta, 0.01) for beta in (0.1, 0.3, 1.0, 3.0, 10.0)),
            *((0.3, 1.0, 0.01), (0.3, 3.0, 0.01), (0.1, 3.0, 0.3)),
        ),
        own_data=((0.1, 0.3, 0.01), (0.1, 1.0, 0.01), (0.1, 3.0, 0.01)),
        lines=(0.0, 0.3, 0.5, 0.7),
        dg_hard=(0.5, 1.0, 2.0),
        fapm=(0.1, 0.3, 0.5),
        distilled=(0.1, 0.02),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What the sweep of one pair found; ``own`` are the points of the retain term on old samples and the picked one."""

    pair: Pair
    report: SweepReport
    own: tuple[Point, ...]


def run_pair(pair: Pair, grid: Grid, folder: Path) -> Outcome:
    """Calibrate what is not calibrated yet, then sweep."""
    stats = partial(_stats, samples=grid.samples)
    new = stats(folder / "stats", pair.tuned, pair.train, grid.seq_len)
    held_out = folder / "written.jsonl"
    length = min(pair.retain_length, grid.seq_len)
    written = stats(folder / "stats-written", pair.base, pair.retain_starts, length, held_out)
    own = stats(folder / "stats-own", pair.base, pair.old_train, grid.seq_len) if grid.own_data else None
    specs = {part: pair.specs(part) for part in ("test", "validation")}
    with_written = {part: [*of_part, f"{WRITTEN}={held_out}:text"] for part, of_part in specs.items()}

    def sweep(
        settings: list[Setting], tasks: dict[str, list[str]], retain: Path | None, place: str = "sweep"
    ) -> SweepReport:
        # One folder for all on the same samples, where base and tuned are scored once for the same tasks.
        return run_sweep(
            *(pair.base, pair.tuned, settings, tasks["test"], folder / place),
            origin=pair.origin,
            target=pair.target,
            validation=tasks["validation"],
            stats=new,
            retain=retain,
            graft_data=pair.train,
            options=EvaluateOptions(batch_size=2 * batch_size(), max_new_tokens=pair.answer_length),
            announce=say,
        )

    settings = grid.settings()
    others = sweep([one for one in settings if not one.retained], specs, None)
    of_old = sweep(grid.own_settings(), specs, own).points[2:] if grid.own_data else []
    ours = sweep([one for one in settings if one.retained], with_written, written)
    points = [*others.points, *ours.points[2:]]
    extra = [replace(point, family=OWN_DATA) for point in of_old]
    if grid.many:
        count, more = grid.many_samples, folder / "written-many.jsonl"
        new = stats(folder / "stats-many", pair.tuned, pair.train, grid.seq_len, samples=count)
        written = stats(folder / "stats-many-written", pair.base, pair.retain_starts, length, more, samples=count)
        found = sweep(grid.many_settings(), specs, written, MANY_SWEEP)
        points += [on_many(point, count) for point in found.points[2:]]
    return Outcome(pair, replace(others, points=points), (*extra, *_picked(ours.points[2:])))


def on_many(point: Point, samples: int) -> Point:
    """A point of a setting on so many samples, with a label of its own."""
    return replace(point, label=f"{point.label}, {samples_of(samples)}")


def samples_of(count: int) -> str:
    """What the label of a setting on so many samples ends with."""
    return f"{count:,} samples"


def _picked(points: Sequence[Point]) -> list[Point]:
    """The point at density 0.1 with the best H of the new task's validation data and of what the base wrote itself.

    So beta is picked without any data of the old tasks.
    """
    default = PatchOptions().resolved(True).to_dict()
    held = ("density", "omega", "damping", "propagate")
    closed = [point for point in points if "distilled" not in point.family]
    found = [p for p in closed if p.options and all(p.options[name] == default[name] for name in held)]
    if len(found) < 2:
        return []
    best = max(found, key=lambda point: h_score(point.at("test", WRITTEN), point.at("validation", "target")))
    return [replace(best, family=PICKED, label=PICKED)]


def _stats(
    folder: Path, model: Path, data: Path | None, length: int, held_out: Path | None = None, samples: int = SAMPLES
) -> Path:
    """The statistics of a model in ``folder``, made unless they are there: on data, or on what it writes itself.

    With ``held_out`` it writes itself, and the file takes samples that it was not calibrated on.
    """
    try:
        found = Stats.open(folder)
        found.close()
        with Checkpoint.open(model) as checkpoint:
            fits = found.model_fingerprint == checkpoint.fingerprint() and found.manifest.get("samples")
    except TailorError:
        fits = False
    if not fits or (held_out is not None and not held_out.exists()):
        say(f"calibrating {model.name} for {folder}")
        options = CalibrateOptions(
            num_samples=samples, seq_len=length, batch_size=batch_size(), synthetic=held_out is not None, overwrite=True
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        calibrate_model(model, data, folder, options, held_out=held_out)
    return folder


def batch_size() -> int:
    """How many samples are run at once, which decides speed and memory, not what comes out."""
    return 256 if torch.cuda.is_available() else 16


def first_of(grid: Grid) -> Grid:
    """What the tables need most of a grid: every other method, the default, and it distilled."""
    default = PatchOptions().resolved(True)
    plain = tuple(one for one in grid.plain if one[1] == default.density)
    propagated = ((default.density, default.retain_weight, default.effective_damping),)
    return replace(grid, plain=plain, propagated=propagated, retained=(), own_data=grid.own_data[:1], omegas=())


def run_all(name: str, pairs: Sequence[Pair], cache: Path, grid: Grid, jobs: int = 1) -> list[Outcome]:
    """Every pair of a benchmark, ``jobs`` of them at a time, each in a process of its own."""
    run = partial(_run_one, name, cache, grid)
    if jobs == 1:
        return [run(pair) for pair in pairs]
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=share_machine, initargs=(jobs,)) as pool:
        return list(pool.map(run, pairs))


def _run_one(name: str, cache: Path, grid: Grid, pair: Pair) -> Outcome:
    say(f"{name}: {pair.name}, seed {pair.seed}")
    return run_pair(pair, grid, cache / f"{pair.name}-{pair.seed}")
