"""What was tried to choose the entries better: `python -m benchmarks.leads`, on the pairs of the benchmark `quick`.

Every variant solves the same objective (retain term on samples that the base wrote itself, `core.retain`) at the same
density and differs in one thing: the score, exchange steps, how the budget is spread over tensors, or what is left at
base. Figures are of validation data: they chose what `patch` does. Writes its table into docs/research.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.evidence.pairs import Pair, quick
from benchmarks.evidence.run import GRIDS, run_pair
from benchmarks.real.render import between, table
from benchmarks.real.setting import say
from tailorcli import Checkpoint, EvaluateOptions, Stats, encode_task, evaluate_network, h_score, read_tasks
from tailorcli.core import count_kept, prepare_retaining, retained_goal, select_mask, unpack_triangle
from tailorcli.core.hessian import PreparedHessian, diagonal_of
from tailorcli.core.solvers import solve_on_mask
from tailorcli.core.tailor import fused_score
from tailorcli.loading import load_encoder
from tailorcli.options import CalibrateOptions

DENSITY, DAMPING = 0.1, 0.01
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "research.md"


@dataclass(frozen=True)
class Variant:
    """One way to choose the entries."""

    name: str
    score: str = "fused"  # or salience, sensitivity, magnitude (d^2 A_jj), gain ((d A)_j^2 / A_jj)
    exchanges: int = 0  # rounds after the first solve
    budget: str = "tensor"  # or global: one threshold on the score's share of the tensor's output energy
    at_base: tuple[str, ...] = ()  # parts of names
    beta: float = 0.1


VARIANTS = (
    Variant("without a retain term", beta=0.0),
    Variant("as `patch` does it"),
    Variant("beta 0.3", beta=0.3),
    Variant("embeddings left at base", at_base=("embed_tokens",)),
    Variant("norms left at base", at_base=("norm",)),
    Variant("salience alone", score="salience"),
    Variant("sensitivity alone", score="sensitivity"),
    Variant("score d² A_jj", score="magnitude"),
    Variant("score of the first gain, (dA)² / A_jj", score="gain"),
    Variant("three exchange rounds", exchanges=3),
    Variant("one budget for all tensors", budget="global"),
    Variant("one budget, three exchange rounds", exchanges=3, budget="global"),
)


@dataclass
class Layer:
    """A tensor as a layer: its goal (O, I), the prepared A, and where it goes back to."""

    name: str
    goal: Tensor
    prepared: PreparedHessian
    transposed: bool
    shape: torch.Size

    @property
    def diagonal(self) -> Tensor:
        """Diag A, damped (I,)."""
        return diagonal_of(self.prepared.hessian) + self.prepared.amount

    def times_a(self, rows: Tensor) -> Tensor:
        """Rows times the damped A."""
        if self.prepared.is_diagonal:
            return rows * self.diagonal
        return rows @ self.prepared.hessian + self.prepared.amount * rows

    def solve(self, mask: Tensor) -> Tensor:
        """The optimum on a mask."""
        if self.prepared.is_diagonal:
            return torch.where(mask, self.goal, 0.0)
        target = torch.where(mask, self.times_a(self.goal), 0.0)
        return solve_on_mask(target, mask, self.prepared.hessian, self.prepared.amount, 1e-4, 300)[0]

    def score(self, kind: str) -> Tensor:
        """The first score of every entry."""
        if kind == "magnitude":
            return self.goal.square() * self.diagonal
        if kind == "gain":
            return self.times_a(self.goal).square() / self.diagonal
        assert self.prepared.inverse_diagonal is not None
        omega = {"fused": 0.5, "salience": 1.0, "sensitivity": 0.0}[kind]
        return fused_score(self.goal, self.prepared.inverse_diagonal.unsqueeze(0), omega)

    def exchange_score(self, kept: Tensor, mask: Tensor) -> Tensor:
        """What keeping an entry is worth after a solve: x² A_jj inside, the gain of letting it in outside."""
        residual = self.times_a(self.goal - kept)
        return torch.where(mask, kept, residual / self.diagonal).square() * self.diagonal


def layers(pair: Pair, stats: Path, retain: Path, beta: float) -> Iterator[Layer]:
    """Every tensor of a pair."""
    new, old = Stats.open(stats), Stats.open(retain)
    with Checkpoint.open(pair.base) as base, Checkpoint.open(pair.tuned) as tuned:
        for name in base.tensors:
            entry = new.tensors[name]
            assert entry.hessian is not None
            delta = tuned.read(name).float() - base.read(name).float()
            rows = (delta.T if entry.transposed else delta.reshape(-1, delta.shape[-1])).contiguous()
            both = _hessian(new, name), _hessian(old, name)
            prepared = prepare_retaining(both[0], both[1], beta, DAMPING, sensitivity=True, sequential=False)
            goal = retained_goal(rows, prepared)
            yield Layer(name, goal, prepared, entry.transposed, delta.shape)
    new.close()
    old.close()


def _hessian(stats: Stats, name: str) -> Tensor:
    hessian = stats.tensors[name].hessian
    assert hessian is not None
    values, info = stats.load(hessian), stats.hessians[hessian]
    return unpack_triangle(values, info.size) if info.kind == "full" else values.clone()


def masks(found: list[Layer], scores: list[Tensor], budget: str) -> list[Tensor]:
    """The kept entries: the same share of every tensor, or the best of all."""
    if budget == "tensor":
        return [select_mask(score.contiguous(), count_kept(DENSITY, score.numel())) for score in scores]
    energies = [float((layer.times_a(layer.goal) * layer.goal).sum()) for layer in found]
    shares = torch.cat([(s / max(e, 1e-30)).flatten() for s, e in zip(scores, energies, strict=True)])
    whole = select_mask(shares, count_kept(DENSITY, shares.numel()))
    pieces = torch.split(whole, [score.numel() for score in scores])
    return [piece.view_as(score) for piece, score in zip(pieces, scores, strict=True)]


def patched(found: list[Layer], variant: Variant) -> dict[str, Tensor]:
    """What each tensor changes by."""
    if variant.budget == "global" and variant.score == "fused":  # min-max scores of tensors have no common unit
        scores = [layer.score("sensitivity") for layer in found]
    else:
        scores = [layer.score(variant.score) for layer in found]
    for left in range(variant.exchanges, -1, -1):
        chosen = masks(found, scores, variant.budget)
        kept = [layer.solve(mask) for layer, mask in zip(found, chosen, strict=True)]
        if left:
            scores = [one.exchange_score(k, m) for one, k, m in zip(found, kept, chosen, strict=True)]
    changes = {}
    for layer, change in zip(found, kept, strict=True):
        if any(part in layer.name for part in variant.at_base):
            change = torch.zeros_like(change)
        changes[layer.name] = (change.T if layer.transposed else change).reshape(layer.shape)
    return changes


def measure(pair: Pair, folder: Path) -> dict[str, tuple[float, float]]:
    """(old, new) on validation data of every variant."""
    encoder = load_encoder(pair.base, pair.base, False, CalibrateOptions())
    options = EvaluateOptions(batch_size=32)
    tasks = {task.name: encode_task(task, encoder, options) for task in read_tasks(pair.specs("validation"))}
    network = LlamaForCausalLM.from_pretrained(pair.base)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    found: dict[str, tuple[float, float]] = {}
    for variant in VARIANTS:
        say(f"  {variant.name}")
        opened = list(layers(pair, folder / "stats", folder / "stats-written", variant.beta))
        changes = patched(opened, variant)
        network.load_state_dict({n: v + changes[n] if n in changes else v for n, v in start.items()})
        accuracy = {name: scores.accuracy for name, scores in evaluate_network(network, tasks, options).items()}
        old = float(np.mean([accuracy[name] for name in pair.origin]))
        found[variant.name] = (old, accuracy[pair.target[0]])
    return found


def main() -> None:
    """Measure every variant on every pair and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leads", description=(__doc__ or "").split("\n")[0])
    root = Path(os.environ.get("TAILORCLI_CACHE") or Path.home() / ".cache" / "tailorcli")
    parser.add_argument("--cache", type=Path, default=root, help="folder for weights and results (%(default)s)")
    cache = parser.parse_args().cache / "quick"
    results: dict[str, list[dict[str, tuple[float, float]]]] = {}
    with torch.no_grad():
        for pair in quick(cache):
            say(f"{pair.name}, seed {pair.seed}")
            folder = cache / f"{pair.name}-{pair.seed}"
            if not (folder / "stats-written" / "manifest.json").exists():
                run_pair(pair, GRIDS["quick"], folder)
            results.setdefault(pair.name, []).append(measure(pair, folder))
    rows = []
    for variant in VARIANTS:
        cells = [variant.name]
        for seeds in results.values():
            pairs = np.array([one[variant.name] for one in seeds])  # (seeds, 2)
            h = [h_score(*pair) for pair in pairs]
            old, new = pairs.mean(0)
            cells += [f"{old:.1f}", f"{new:.1f}", f"{np.mean(h):.1f} ± {np.std(h, ddof=1):.1f}"]
        rows.append(cells)
    header = ["variant", *(f"{name}: {column}" for name in results for column in ("old", "new", "H"))]
    document = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(between(document, "leads", table(header, rows)), encoding="utf-8")
    say(f"wrote the table into {DOCUMENT}")


if __name__ == "__main__":
    main()
