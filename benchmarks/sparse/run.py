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

from benchmarks.common import say
from benchmarks.real.setting import share_machine
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
    """Every cell of a plan that is missing, ``rendered`` after each phase that made some; gives what failed."""
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
    beyond the edge of those where the best lies there; all seeds at the best. Then the same at the other depths, from
    the rate that is best with all layers; then for the rows of LATE, and other masks in SPIDER's place.
    """
    first = benches[0]
    depths = sorted(plan.depths if plan.depths is not None else first.depths, key=lambda name: name != TUNED_AT)
    early = [row for row in plan.rows if row not in LATE]
    late = [row for row in plan.rows if row in LATE]
    for rows in filter(None, (early, late)):
        tried = [(row, rate) for rate in first.part.rates for row in rows]
        for depth in depths:
            begin = {row: first.part.first_rate(row) for row in rows} | picked(first, TUNED_AT, rows)
            yield f"{depth}, first rates", over(benches, depth, begin.items(), TEST)
            yield f"{depth}, other rates", over([first], depth, tried, VALIDATION)
            for _ in first.part.wider:  # the best may lie at the edge again
                yield f"{depth}, beyond the edge", over([first], depth, beyond(first, depth, rows), VALIDATION)
            yield f"{depth}, best rates", over(benches, depth, picked(first, depth, rows).items(), TEST)
    spider = Row("spider")
    if TUNED_AT in depths and spider in plan.rows:
        rate = picked(first, TUNED_AT, [spider])[spider]
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


def picked(first: Bench, depth: str, rows: Sequence[Row]) -> dict[Row, float]:
    """The rate with the best H at a depth on the first seed's validation part, of each row that was scored there."""
    found = first.validated(depth)
    return {row: max(found[row], key=lambda rate: found[row][rate]) for row in rows if row in found}


def beyond(first: Bench, depth: str, rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """A rate next to the best where that is the lowest or highest that was tried, if the part has one there."""
    found, more = first.validated(depth), []
    for row, best in picked(first, depth, rows).items():
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
