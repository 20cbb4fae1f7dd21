"""The order in which the cells of a part are made: what a run that is cut short needs most comes first."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

from benchmarks.real.setting import say, share_machine
from benchmarks.sparse.bench import Bench, Unit
from benchmarks.sparse.cells import TEST, VALIDATION
from benchmarks.sparse.setting import LATE, MASKS, ROWS, TUNED_AT, Part, Row, pairs_of

Job = Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """What of a part is run: tasks, how many seeds, rows, depths (all without), and how many units at a time."""

    tasks: Sequence[str]
    seeds: int = 3
    rows: Sequence[Row] = tuple(ROWS)
    depths: Sequence[str] | None = None
    masks: Sequence[str] = MASKS
    jobs: int = 1


def run_part(part: Part, cache: Path, plan: Plan, rendered: Callable[[], None]) -> list[str]:
    """Every cell of a plan that is missing, ``rendered`` after each phase; what failed, in words, is returned."""
    pairs = pairs_of(part, cache, plan.tasks, plan.seeds)
    failed: list[str] = []
    for task, group in groupby(pairs, key=lambda pair: pair.name):
        benches = [Bench(part, pair, cache) for pair in group]
        failed += run_all([_job(b, partial(b.prepare, plan.rows), "what its units share") for b in benches], plan.jobs)
        for name, units in phases(benches, plan):
            if units:
                say(f"{part.name}, {task}: {name}")
                jobs = [_job(bench, partial(bench.make, unit), _told(unit)) for bench, unit in units]
                failed += run_all(jobs, plan.jobs)
            rendered()
        benches[0].measure_memory(plan.rows)
        rendered()
        if not failed:
            for bench in benches:
                bench.forget()
    return failed


def phases(benches: Sequence[Bench], plan: Plan) -> Iterator[tuple[str, list[tuple[Bench, Unit]]]]:
    """What is made, in this order; each phase needs the scores of those before.

    Each method at the rate that it is expected to want, with all seeds and layers; other rates with the first seed, and
    beyond the edge of those where the best lies there; all seeds at the best; the other depths. Then the same for the
    rows of LATE, and other masks in SPIDER's place.
    """
    first = benches[0]
    depths = plan.depths if plan.depths is not None else [*first.depths]
    early = [row for row in plan.rows if row not in LATE]
    late = [row for row in plan.rows if row in LATE]
    for rows in filter(None, (early, late)):
        at_first = {row: first.part.first_rate(row) for row in rows}
        if TUNED_AT in depths:
            yield "all layers, first rates", over(benches, TUNED_AT, at_first.items(), TEST)
        tried = [(row, rate) for rate in first.part.rates for row in rows]
        yield "all layers, other rates", over([first], TUNED_AT, tried, VALIDATION)
        yield "all layers, beyond the edge", over([first], TUNED_AT, beyond(first, rows), VALIDATION)
        picks = picked(first, rows)
        for depth in sorted(depths, key=lambda name: name != TUNED_AT):
            yield depth, over(benches, depth, picks.items(), TEST)
    spider = Row("spider")
    if TUNED_AT in depths and spider in plan.rows:
        rate = picked(first, [spider])[spider]
        yield "other masks", over(benches, TUNED_AT, [(Row(mask), rate) for mask in plan.masks], TEST)


def over(
    benches: Sequence[Bench], depth: str, wanted: Iterable[tuple[Row, float]], part: str
) -> list[tuple[Bench, Unit]]:
    """The units of all benches that lack scores on a part, a fine-tune of every seed before the next fine-tune."""
    if any(depth not in bench.depths for bench in benches):
        return []
    wanted = [*wanted]
    found = [(place, bench, unit) for bench in benches for place, unit in enumerate(bench.units(depth, wanted, part))]
    return [(bench, unit) for _, bench, unit in sorted(found, key=lambda item: item[0])]


def picked(first: Bench, rows: Sequence[Row]) -> dict[Row, float]:
    """The rate with the best H on the validation part of the first seed, of each row that was scored there."""
    found = first.validated()
    return {row: max(found[row], key=lambda rate: found[row][rate]) for row in rows if row in found}


def beyond(first: Bench, rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """A rate next to the best where that is the lowest or highest that was tried, if the part has one there."""
    found, more = first.validated(), []
    for row, best in picked(first, rows).items():
        lower = [rate for rate in first.part.wider if rate < min(found[row])]
        higher = [rate for rate in first.part.wider if rate > max(found[row])]
        if best == min(found[row]) and lower:
            more.append((row, max(lower)))
        if best == max(found[row]) and higher:  # of one rate alone both
            more.append((row, min(higher)))
    return more


def run_all(jobs: Sequence[tuple[str, Job]], at_a_time: int) -> list[str]:
    """Run all jobs, so many at a time, each in a process of its own where more than one; what failed, in words.

    A job that fails does not end the others.
    """
    failed = []

    def note(name: str, error: BaseException) -> None:
        say(f"{name} failed:\n{''.join(traceback.format_exception(error))}")
        failed.append(f"{name}: {error}")

    if at_a_time == 1:
        for name, job in jobs:
            try:
                job()
            except Exception as error:
                note(name, error)
        return failed
    with ProcessPoolExecutor(at_a_time, get_context("spawn"), initializer=share_machine, initargs=(at_a_time,)) as pool:
        running = {pool.submit(job): name for name, job in jobs}
        for done in as_completed(running):
            broke = done.exception()
            if broke is not None:
                note(running[done], broke)
    return failed


def _job(bench: Bench, job: Job, what: str) -> tuple[str, Job]:
    return f"{bench.pair.name}, seed {bench.pair.seed}, {what}", job


def _told(unit: Unit) -> str:
    return f"{unit.depth}, {unit.fine} at {unit.rate:g}"
