"""Ways to choose and solve the entries: every tensor of a pair as a layer, and what a variant changes it by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.evidence.pairs import Pair
from tailorcli import Checkpoint, Stats
from tailorcli.core import count_kept, prepare_retaining, retained_goal, select_mask, unpack_triangle
from tailorcli.core.hessian import PreparedHessian, diagonal_of
from tailorcli.core.products import System
from tailorcli.core.solvers import solve_on_mask
from tailorcli.core.tailor import fused_score

KINDS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm", "lm_head")
SHRINKING = (0.5, 0.3, 0.2, 0.14)  # densities on the way to the wanted one


@dataclass(frozen=True)
class Variant:
    """One way to choose the entries; the objective is that of ``core.retain``, with samples that the base wrote."""

    name: str
    score: str = "fused"  # or salience, sensitivity, magnitude (d^2 A_jj), gain ((d A)_j^2 / A_jj)
    exchanges: int = 0  # rounds after the first solve
    shrinks: bool = False  # from every entry by ``SHRINKING`` to the density, solving again at each
    budget: str = "tensor"  # or global: one threshold on the score's share of the tensor's output energy
    at_base: tuple[str, ...] = ()  # parts of names
    beta: float = 0.1
    density: float = 0.1
    weight: float = 1.0
    damping: float = 0.01
    densities: tuple[tuple[str, float], ...] = ()  # part of a name -> density, where it is another


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
        if self.prepared.is_diagonal or bool(mask.all()):
            return torch.where(mask, self.goal, 0.0)
        target = torch.where(mask, self.times_a(self.goal), 0.0)
        system = System.of(self.prepared.hessian, self.prepared.amount, 1e-4)
        return solve_on_mask(target, mask, system, 1e-4, 300)[0]

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

    def stored(self, rows: Tensor) -> Tensor:
        """Rows (O, I) in the shape of the tensor."""
        return (rows.T if self.transposed else rows).reshape(self.shape)


def read_layers(pair: Pair, folder: Path, beta: float, damping: float) -> Iterator[Layer]:
    """Every tensor of a pair with the statistics in ``folder``."""
    new, old = Stats.open(folder / "stats"), Stats.open(folder / "stats-written")
    with Checkpoint.open(pair.base) as base, Checkpoint.open(pair.tuned) as tuned:
        for name in base.tensors:
            entry = new.tensors[name]
            assert entry.hessian is not None
            delta = tuned.read(name).float() - base.read(name).float()
            rows = (delta.T if entry.transposed else delta.reshape(-1, delta.shape[-1])).contiguous()
            both = _hessian(new, name), _hessian(old, name)
            prepared = prepare_retaining(both[0], both[1], beta, damping, sensitivity=True, sequential=False)
            goal = retained_goal(rows, prepared)
            yield Layer(name, goal, prepared, entry.transposed, delta.shape)
    new.close()
    old.close()


def _hessian(stats: Stats, name: str) -> Tensor:
    hessian = stats.tensors[name].hessian
    assert hessian is not None
    values, info = stats.load(hessian), stats.hessians[hessian]
    return unpack_triangle(values, info.size) if info.kind == "full" else values.clone()


def density_of(variant: Variant, name: str) -> float:
    """The density of a tensor."""
    return next((density for part, density in variant.densities if part in name), variant.density)


def choose_masks(found: list[Layer], scores: list[Tensor], variant: Variant, least: float = 0.0) -> list[Tensor]:
    """The kept entries: each tensor's own share, but at ``least`` so many, or the best of all tensors."""
    if variant.budget == "tensor":
        pairs = zip(found, scores, strict=True)
        densities = [(max(least, density_of(variant, layer.name)), score) for layer, score in pairs]
        return [select_mask(score.contiguous(), count_kept(density, score.numel())) for density, score in densities]
    energies = [float((layer.times_a(layer.goal) * layer.goal).sum()) for layer in found]
    shares = torch.cat([(s / max(e, 1e-30)).flatten() for s, e in zip(scores, energies, strict=True)])
    whole = select_mask(shares, count_kept(variant.density, shares.numel()))
    pieces = torch.split(whole, [score.numel() for score in scores])
    return [piece.view_as(score) for piece, score in zip(pieces, scores, strict=True)]


def first_masks(found: list[Layer], variant: Variant) -> list[Tensor]:
    """The masks before any exchange."""
    kind = variant.score
    if variant.budget == "global" and kind == "fused":  # min-max scores of tensors have no common unit
        kind = "sensitivity"
    return choose_masks(found, [layer.score(kind) for layer in found], variant, SHRINKING[0] * variant.shrinks)


def changes_of(found: list[Layer], variant: Variant) -> dict[str, Tensor]:
    """What each tensor changes by."""
    chosen = first_masks(found, variant)
    kept = [layer.solve(mask) for layer, mask in zip(found, chosen, strict=True)]
    for least in (*SHRINKING[1:], 0.0) if variant.shrinks else ():
        scores = [k.square() * layer.diagonal for layer, k in zip(found, kept, strict=True)]
        chosen = choose_masks(found, scores, variant, least)
        kept = [layer.solve(mask) for layer, mask in zip(found, chosen, strict=True)]
    for _ in range(variant.exchanges):
        scores = [one.exchange_score(k, m) for one, k, m in zip(found, kept, chosen, strict=True)]
        chosen = choose_masks(found, scores, variant)
        kept = [layer.solve(mask) for layer, mask in zip(found, chosen, strict=True)]
    changes = {}
    for layer, change in zip(found, kept, strict=True):
        left = any(part in layer.name for part in variant.at_base)
        changes[layer.name] = layer.stored(torch.zeros_like(change) if left else variant.weight * change)
    return changes
