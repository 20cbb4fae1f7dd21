"""The models that are compared, and how each is made from what lies in the cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.real.chain import Step, record_file
from benchmarks.real.measure import Candidate, interpolate, load_model
from benchmarks.stitch.lora import load_merged
from benchmarks.stitch.steps import ADAPTER, ADAPTER_PATCH, METHODS, TASKS, merged_folder

WEIGHTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of the sum of both deltas; of the adapter
SCALES = (0.5, 0.6, 0.7, 0.8, 1.2, 1.5)  # from base to a merged or patched model, and beyond
PLAIN_AVERAGE = "plain-average"
ARITHMETIC = "arithmetic"


def task_arithmetic(base: Path, tuned: list[Path], weight: float) -> PreTrainedModel:
    """Return base + weight · Σ (tuned − base), entry by entry in float32, rounded to bfloat16."""
    model = load_model(base)
    others = [dict(load_model(path).named_parameters()) for path in tuned]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ours = parameter.float()
            delta = sum((other[name].float() - ours for other in others), torch.zeros_like(ours))
            parameter.copy_(ours + weight * delta)
    return model


def stitched(cache: Path, chain: list[Step], source: str) -> dict[str, Candidate]:
    """Return the models of the two-task comparison."""
    base, tuned = cache / "base", [cache / task.tuned for task in TASKS]
    made = {path.name: Candidate(partial(load_model, path), source) for path in (base, *tuned)}
    made[PLAIN_AVERAGE] = Candidate(partial(task_arithmetic, base, tuned, 1 / len(tuned)), source)
    for weight in WEIGHTS:
        make = partial(task_arithmetic, base, tuned, weight)
        made[f"{ARITHMETIC}-{weight}"] = Candidate(make, source, line=ARITHMETIC)
    patched = [folder for task in TASKS for folder in (task.patched, task.applied)]
    for folder in (*patched, *map(merged_folder, METHODS)):
        made[folder] = Candidate(partial(load_model, cache / folder), source, _record(cache, chain, folder))
    for method in METHODS:
        made |= _scaled(cache, chain, merged_folder(method), source)
    return made


def adapted(cache: Path, chain: list[Step], source: str) -> dict[str, Candidate]:
    """Return the models of the comparison with LoRA that are not in the other one."""
    base, adapter = cache / "base", cache / ADAPTER
    made = {ADAPTER: Candidate(partial(load_merged, base, adapter, 1.0), source)}
    for weight in WEIGHTS:
        make = partial(load_merged, base, adapter, weight)
        made[f"{ADAPTER}-{weight}"] = Candidate(make, source, line=f"{ADAPTER}-")
    record = _record(cache, chain, ADAPTER_PATCH)
    made[ADAPTER_PATCH] = Candidate(partial(load_model, cache / ADAPTER_PATCH), source, record)
    return made | _scaled(cache, chain, ADAPTER_PATCH, source)


def _scaled(cache: Path, chain: list[Step], folder: str, source: str) -> dict[str, Candidate]:
    """Return the models between the base and a model that a step made."""
    line, record = f"scaled-{folder}", _record(cache, chain, folder)
    makers = {weight: partial(interpolate, cache / "base", cache / folder, weight) for weight in SCALES}
    return {f"{line}-{weight}": Candidate(make, source, record, line) for weight, make in makers.items()}


def _record(cache: Path, chain: list[Step], output: str) -> str:
    """Return the record of the step that made an output: another run of it is another record."""
    step = next(step for step in chain if step.output == output)
    return record_file(cache, step).read_text(encoding="utf-8")
