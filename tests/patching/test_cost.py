"""The plan's memory against what is really allocated: every tensor of a run is counted, whatever the machine."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from benchmarks.synthetic import LlamaShape, write_inputs, write_stats
from tailorcli import PatchOptions
from tailorcli.checkpoint import readahead
from tailorcli.device import StageTimer
from tailorcli.patching.cost import working_set
from tailorcli.patching.inputs import PatchInputs
from tailorcli.patching.planner import build_plan
from tailorcli.patching.run import Run
from tailorcli.patching.stream import tailored
from tailorcli.runs.plan import RUNTIME_BYTES

WIDE = LlamaShape(layers=1, hidden=256, intermediate=1024, vocab=200)  # down_proj: its Hessian is the largest of all
SLACK = 1 << 20  # bytes of small arrays, whatever the tensor's size
TALL = LlamaShape(layers=1, hidden=256, intermediate=256, vocab=8000)  # the tables, which have diagonal Hessians


@pytest.fixture(scope="module", params=[WIDE, TALL], ids=["wide", "tall"])
def inputs(request, tmp_path_factory):
    """A pair, its statistics, and others of the base."""
    folder = tmp_path_factory.mktemp("cost")
    found = write_inputs(folder, request.param, "bf16")
    retain = write_stats(folder / "retain", request.param, found.base, seed=1)
    return SimpleNamespace(base=found.base, tuned=found.tuned, stats=found.stats, retain=retain)


class AtOnce:
    """An executor that works on the caller's thread, where the profiler counts."""

    def __init__(self, *_, **__):
        pass

    def submit(self, call, *arguments):
        from concurrent.futures import Future

        future = Future()
        future.set_result(call(*arguments))
        return future

    def shutdown(self, **_):
        pass


def allocated_peak(work):
    """The most bytes of tensors that are alive at a time while ``work`` runs, beyond those that were before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(
    ("solver", "retained"),
    [
        ("joint", True),
        ("sequential", False),
        pytest.param("joint", False, marks=pytest.mark.slow),
        pytest.param("sequential", True, marks=pytest.mark.slow),
    ],
)
def test_the_plan_holds_what_a_run_allocates(inputs, solver, retained, monkeypatch):
    """For each tensor at least its share of the plan, and of the largest no more than three times as much."""
    monkeypatch.setattr(readahead, "ThreadPoolExecutor", AtOnce)
    options = PatchOptions(solver=solver, propagate=False, device="cpu").resolved(retained)
    device = torch.device("cpu")
    peaks = {}
    with ExitStack() as stack:
        retain = inputs.retain if retained else None
        opened = PatchInputs.open(inputs.base, inputs.tuned, inputs.stats, options, stack, retain)
        plan = build_plan(opened.base, opened.tuned, opened.stats, options, opened.retain_stats)
        for tensor in plan.patched:
            run = Run(opened, options, device, StageTimer(device))
            peak = allocated_peak(lambda given=([tensor], run): list(tailored(*given)))
            assert peak <= working_set(tensor, opened.tuned, opened.stats, options) + SLACK, tensor.name
            peaks[tensor.name] = peak
    planned = plan.peak_bytes - RUNTIME_BYTES
    assert max(peaks.values()) <= planned <= 3 * max(peaks.values())


@pytest.mark.parametrize("method", ["dg-hard", "fapm", "lines"])
def test_a_rival_allocates_no_more_than_its_plan(inputs, method, monkeypatch):
    monkeypatch.setattr(readahead, "ThreadPoolExecutor", AtOnce)
    options = PatchOptions(method=method, device="cpu").resolved(retained=False)
    device = torch.device("cpu")
    with ExitStack() as stack:
        opened = PatchInputs.open(inputs.base, inputs.tuned, None, options, stack, None)
        for tensor in build_plan(opened.base, opened.tuned, None, options, None).patched:
            run = Run(opened, options, device, StageTimer(device))
            peak = allocated_peak(lambda given=([tensor], run): list(tailored(*given)))
            assert peak <= working_set(tensor, opened.tuned, None, options) + SLACK, tensor.name
