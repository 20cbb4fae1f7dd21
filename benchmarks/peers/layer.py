"""One layer and its Hessian: our solvers, SparseGPT's published sweep, and llm-compressor's SparseGPT.

llm-compressor prunes delta itself and chooses its own mask, block by block; it takes none. So our solvers are also
held against it on the mask that it chose.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import markdown, say
from benchmarks.peers.environments import LLM_COMPRESSOR, last_line, programs_of, rounds_of
from benchmarks.solver import BLOCK, DAMPING, Layer, joint, layer_error, make_layer, published, sequential
from tailorcli.device import exact_float32

OURS = {"joint": joint, "sequential": sequential, "published": published}
PEER = "llm-compressor"


def measure(cache: Path, sizes: list[int], density: float, rounds: int) -> dict[str, Any]:
    """Figures for each size I = O. Raises UnavailableError where the peer cannot be installed."""
    python = programs_of(LLM_COMPRESSOR, cache) / "python"
    with exact_float32():
        return {"density": density, "rounds": rounds, "layers": [_compare(python, n, density, rounds) for n in sizes]}


def _compare(python: Path, size: int, density: float, rounds: int) -> dict[str, Any]:
    """One layer, every solver turn by turn; the first round does not count."""
    from safetensors.torch import load_file, save_file

    layer = make_layer(size, density, 1.0, torch.device("cpu"))
    results: dict[str, Tensor] = {}
    with TemporaryDirectory(prefix="tailorcli-") as name:
        given, result = Path(name) / "layer.safetensors", Path(name) / "result.safetensors"
        save_file({"delta": layer.delta, "hessian": layer.hessian}, given)
        words = [1 - density, BLOCK, DAMPING, torch.get_num_threads()]
        command = [str(word) for word in (python, Path(__file__).with_name("prune_step.py"), given, result, *words)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, **pipes) as peer:
            found: dict[str, list[dict[str, float]]] = {key: [] for key in (*OURS, PEER)}
            for number in rounds_of(rounds):
                say(f"I = O = {size}, round {number} of {rounds}")
                for key, solver in OURS.items():
                    seconds, results[key] = _timed(solver, layer)
                    found[key] += [seconds] if number else []
                seconds = _one_round(peer)
                found[PEER] += [seconds] if number else []
        pruned = load_file(result)["pruned"]
    theirs = replace(layer, mask=pruned != 0)
    errors = {key: layer_error(layer, change) for key, change in results.items()}
    errors[PEER] = layer_error(theirs, pruned - layer.delta)
    own = {key: layer_error(theirs, OURS[key](theirs)) for key in ("sequential", "joint")}
    kept = float(theirs.mask.double().mean())
    return {"size": size, "runs": found, "errors": errors, "errors_on_its_mask": own, "peer_keeps": kept}


def _timed(solver: Callable[[Layer], Tensor], layer: Layer) -> tuple[dict[str, float], Tensor]:
    wall, processor = time.perf_counter(), time.process_time()
    change = solver(layer)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}, change


def _one_round(peer: subprocess.Popen[str]) -> dict[str, float]:
    assert peer.stdin is not None
    assert peer.stdout is not None
    assert peer.stderr is not None
    peer.stdin.write("\n")
    peer.stdin.flush()
    for line in peer.stdout:
        if line.startswith("round "):
            return dict(json.loads(line.removeprefix("round ")))
    raise RuntimeError(f"{PEER} ended: {last_line(peer.stderr.read())}")


def render(figures: dict[str, Any]) -> str:
    """The table, and what llm-compressor's own mask makes of it."""
    rows, notes = [], []
    for one in figures["layers"]:
        for key, runs in one["runs"].items():
            seconds = [median(run[kind] for run in runs) for kind in ("seconds", "cpu_seconds")]
            rows.append([f"{one['size']}", key, *(f"{value:.2f}" for value in seconds), f"{one['errors'][key]:.4f}"])
        own = one["errors_on_its_mask"]
        notes.append(
            f"- I = O = {one['size']}: on the mask that llm-compressor chose, {one['peer_keeps']:.1%} of the entries, "
            f"its error is {one['errors'][PEER]:.4f}, our sequential's {own['sequential']:.4f}, "
            f"joint's {own['joint']:.4f}"
        )
    table = markdown(["I = O", "", "seconds", "processor seconds", "layer error"], rows, (0, 1))
    return "\n\n".join([table, "\n".join(notes)])
