"""The command line under test: the settings that are compared, and the models that come of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.multimodal.data import NEW_TASK
from benchmarks.multimodal.model import load_model
from benchmarks.real.chain import DEFAULT_PATCH, Step, calibrate_step, patch_folder, patch_step, record_file
from benchmarks.real.measure import Candidate, interpolate

WEIGHTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # from base to tuned
SCALES = (0.5, 0.6, 0.7, 0.8, 0.9)  # from base to the model patched with the default options
DENSITIES = ("0.02", "0.05", "0.1", "0.2")
LAYERS, PAPER_LAYERS = 30, 12  # of the language model; the last ones of them, which the paper patches
PAPER = "patched-paper-0.1"


def settings() -> list[tuple[str, str]]:
    """Return (solver, density) of the models that are patched throughout."""
    return [(solver, "0.1") for solver in ("none", "sequential")] + [("joint", density) for density in DENSITIES]


def paper_globs() -> tuple[str, ...]:
    """Return the names of what the paper patches: the projector and the last decoder layers."""
    layers = range(LAYERS - PAPER_LAYERS, LAYERS)
    return ("*multi_modal_projector*", *(f"*language_model*layers.{layer}.*" for layer in layers))


def steps(pair_key: str) -> list[Step]:
    """Return the chain in order; paths are relative to the cache folder."""
    chain = [calibrate_step("calibrate", "tuned", f"{NEW_TASK}/train.jsonl", "stats", pair_key)]
    chain += [patch_step(solver, density, pair_key) for solver, density in settings()]
    globs = [part for glob in paper_globs() for part in ("--include", glob)]
    options = ("--stats", "stats", "-o", PAPER, "--solver", "sequential", "--density", "0.1", *globs)
    chain.append(Step(PAPER, ("patch", "base", "tuned", *options), PAPER, pair_key))
    return chain


def patched_folders() -> list[str]:
    """Return the folders of all patched models."""
    return [*(patch_folder(*setting) for setting in settings()), PAPER]


def unpatched(cache: Path, pair_key: str) -> dict[str, Candidate]:
    """Return the pair and the points between them."""
    base, tuned = cache / "base", cache / "tuned"
    made = {path.name: Candidate(partial(load_model, path), pair_key) for path in (base, tuned)}
    for weight in WEIGHTS:
        make = partial(interpolate, base, tuned, weight, load_model)
        made[f"interpolation-{weight}"] = Candidate(make, pair_key, line="interpolation")
    return made


def patched(cache: Path, pair_key: str) -> dict[str, Candidate]:
    """Return the patched models, and the points between the base and the default one."""
    made_by = {step.output: record_file(cache, step).read_text(encoding="utf-8") for step in steps(pair_key)}
    made = {
        folder: Candidate(partial(load_model, cache / folder), pair_key, made_by[folder])
        for folder in patched_folders()
    }
    default = patch_folder(*DEFAULT_PATCH)
    for weight in SCALES:
        make = partial(interpolate, cache / "base", cache / default, weight, load_model)
        made[f"scaled-{weight}"] = Candidate(make, pair_key, made_by[default], line="scaled")
    return made
