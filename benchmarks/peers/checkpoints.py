"""Whole checkpoints: mergekit on DARE, TIES and linear of one pair, and DG-Hard's own tool on the same pair.

Each command is a process of its own, turn by turn: seconds, processor seconds, and peak memory (ru_maxrss). DARE draws
at random, so its results are compared by the share that changed; the others are compared entry by entry.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import markdown, say, verdict
from benchmarks.peers.environments import MERGEKIT, UnavailableError, last_line, measured, programs_of, rounds_of
from benchmarks.synthetic import LlamaShape, write_pair

TARGET = 0.5  # of mergekit's time, and of its peak memory
METHODS = {"dare_linear": "dare", "ties": "magnitude", "linear": "interpolate"}  # mergekit's name, ours


def pair_of(cache: Path, shape: LlamaShape, rank: int = 0) -> tuple[Path, Path]:
    """A random pair in bfloat16, written once; each matrix has a change of this rank besides the noise."""
    folder = cache / f"pair-{shape.layers}-{shape.hidden}-{rank}"
    if not (folder / "whole").exists():
        say(f"writing {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        write_pair(folder, shape)
        _add_products(folder / "tuned" / "model.safetensors", rank)
        (folder / "whole").touch()
    return folder / "base", folder / "tuned"


def _add_products(file: Path, rank: int) -> None:
    """Add to each matrix one of this rank."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    tensors = load_file(file) if rank else {}
    for name, weight in tensors.items():
        if weight.dim() == 2:
            left = torch.randn(weight.shape[0], rank, generator=generator)  # (O, R)
            right = torch.randn(rank, weight.shape[1], generator=generator)  # (R, I)
            tensors[name] = weight.float().add(left @ right, alpha=0.002).to(weight.dtype)
    if rank:
        save_file(tensors, file, metadata={"format": "pt"})


def measure_merges(cache: Path, shape: LlamaShape, density: float, rounds: int) -> dict[str, Any]:
    """Mergekit and ours on each method. Raises UnavailableError where it cannot be installed."""
    pair, mergekit = pair_of(cache, shape), programs_of(MERGEKIT, cache) / "mergekit-yaml"
    found = {}
    with TemporaryDirectory(prefix="tailorcli-", dir=cache) as name:
        scratch = Path(name)
        for theirs, ours in METHODS.items():
            both = {
                "tailorcli": _our_command(pair, ours, density, scratch / "ours"),
                "mergekit": _merge_command(pair, theirs, density, mergekit, scratch),
            }
            runs = _turn_by_turn(theirs, both, rounds, scratch)
            found[theirs] = {"runs": runs, "compared": compared(pair[0], scratch / "ours", scratch / "mergekit")}
    return {"density": density, "rounds": rounds, "bytes": _bytes_of(pair[0]), "methods": found}


def measure_dg_hard(cache: Path, shape: LlamaShape, source: Path | None, rounds: int) -> dict[str, Any]:
    """DG-Hard's tool from a copy of its repository, run by this Python. Raises UnavailableError without one."""
    if source is None:
        try:
            programs_of("dghard", cache)
        except UnavailableError as tried:
            raise UnavailableError(
                f"{tried}; it is run from a copy of its repository (github.com/BrickleRex/dghard) with --dghard FOLDER"
            ) from tried
    pair = pair_of(cache, shape, rank=4)
    environment = os.environ | ({} if source is None else {"PYTHONPATH": _search_path(source)})
    with TemporaryDirectory(prefix="tailorcli-", dir=cache) as name:
        scratch = Path(name)
        python = sys.executable if source is not None else str(programs_of("dghard", cache) / "python")
        given = ["--base", str(pair[0]), "--ft", str(pair[1]), "--out", str(scratch / "dghard"), "--device", "cpu"]
        both = {
            "tailorcli": _our_command(pair, "dg-hard", None, scratch / "ours"),
            "dghard": [python, "-m", "dghard.cli", "repair", *given],
        }
        runs = _turn_by_turn("DG-Hard", both, rounds, scratch, environment)
        result = {"runs": runs, "compared": compared(pair[0], scratch / "ours", scratch / "dghard")}
    return {"rounds": rounds, "bytes": _bytes_of(pair[0]), **result}


def _search_path(source: Path) -> str:
    return os.pathsep.join(filter(None, (str(source.resolve()), os.environ.get("PYTHONPATH"))))


def _our_command(pair: tuple[Path, Path], method: str, density: float | None, out: Path) -> list[str]:
    command = [sys.executable, "-m", "tailorcli", "patch", *map(str, pair), "-o", str(out), "--method", method]
    command += ["--density", str(density)] if method in ("dare", "magnitude") else []
    return [*command, "--overwrite", "--quiet"]


def _merge_command(pair: tuple[Path, Path], method: str, density: float, mergekit: Path, scratch: Path) -> list[str]:
    """Mergekit's command and its configuration; linear is halfway between the two, as interpolate's default is."""
    base, tuned = map(str, pair)
    if method == "linear":
        models = [{"model": model, "parameters": {"weight": 0.5}} for model in (base, tuned)]
        config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    else:
        parameters = {"weight": 1.0, "density": density}
        models = [{"model": tuned, "parameters": parameters}]
        config = {"merge_method": method, "base_model": base, "models": models, "dtype": "bfloat16"}
    file = scratch / f"{method}.yml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    switches = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card", "--random-seed", "0"]
    return [str(mergekit), str(file), str(scratch / "mergekit"), *switches]


def _turn_by_turn(
    what: str,
    commands: dict[str, list[str]],
    rounds: int,
    scratch: Path,
    environment: dict[str, str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Figures of each command in each round; the first, which reads the files into the system's cache, is left out."""
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in commands}
    for number in rounds_of(rounds):
        say(f"{what}: round {number} of {rounds}")
        for key, command in commands.items():
            try:
                figures = measured(command, scratch, environment)
            except RuntimeError as failure:
                raise UnavailableError(f"{key} on {what}: {last_line(str(failure))}") from failure
            runs[key] += [figures] if number else []
    return runs


def compared(base: Path, ours: Path, theirs: Path) -> dict[str, float]:
    """Shares of all entries: changed by each, and equal to the bit in both; the largest difference, in float64."""
    from tailorcli import Checkpoint

    entries = equal = 0
    changed, worst = [0, 0], 0.0
    with Checkpoint.open(base) as before, Checkpoint.open(ours) as one, Checkpoint.open(theirs) as other:
        for name in before.tensors:
            start, a, b = before.read(name), one.read(name), other.read(name)
            entries += start.numel()
            equal += int((a == b).sum())
            changed = [changed[0] + int((a != start).sum()), changed[1] + int((b != start).sum())]
            worst = max(worst, float((a.double() - b.double()).abs().max()))
    return {
        "changed_by_ours": changed[0] / entries,
        "changed_by_theirs": changed[1] / entries,
        "equal": equal / entries,
        "worst": worst,
    }


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


COLUMNS = ["", "", "seconds", "processor seconds", "peak, MB", "of the peer's time", "of its memory", "changed"]


def rows_of(method: str, peer: str, figures: dict[str, Any]) -> list[list[str]]:
    """Two rows of the table: ours and the peer's."""
    ours, theirs = (middle(figures["runs"][key]) for key in ("tailorcli", peer))
    shares = [figures["compared"][key] for key in ("changed_by_ours", "changed_by_theirs")]
    ratios = [f"{ours[key] / theirs[key]:.2f}" for key in ("cpu_seconds", "peak_bytes")]
    rows = []
    for name, one, share, more in (("tailorcli", ours, shares[0], ratios), (peer, theirs, shares[1], ["", ""])):
        peak = f"{one['peak_bytes'] / 1e6:.0f}"
        rows.append([method, name, f"{one['seconds']:.1f}", f"{one['cpu_seconds']:.1f}", peak, *more, f"{share:.4f}"])
    return rows


def middle(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The median of each figure."""
    return {key: median(run[key] for run in runs) for key in ("seconds", "cpu_seconds", "peak_bytes")}


def told_of(same: dict[str, float]) -> str:
    """How far two results are the same, in words."""
    if same["equal"] == 1:
        return "every entry is the same to the bit"
    return f"{same['equal']:.2%} of the entries are the same to the bit, the others within {same['worst']:.1e}"


def render_merges(figures: dict[str, Any]) -> str:
    """The table, whether the target was met, and how far the results are the same."""
    rows, notes = [], []
    for method, one in figures["methods"].items():
        rows += rows_of(method, "mergekit", one)
        ours, theirs = (middle(one["runs"][key]) for key in ("tailorcli", "mergekit"))
        met = [verdict(ours[key] <= TARGET * theirs[key]) for key in ("cpu_seconds", "peak_bytes")]
        same = one["compared"]
        told = f"- {method}: at most half of the time {met[0]}, of the memory {met[1]}"
        if method != "dare_linear":
            told += f"; {told_of(same)}"
        notes.append(told)
    return "\n\n".join([markdown(COLUMNS, rows, (0, 1)), "\n".join(notes)])


def render_dg_hard(figures: dict[str, Any]) -> str:
    """The table, and how far the results are the same."""
    same = figures["compared"]
    return "\n\n".join(
        [
            markdown(COLUMNS, rows_of("DG-Hard", "dghard", figures), (0, 1)),
            f"- {told_of(same)}",
        ]
    )
