"""Stitch the patches of several tasks into one model (Eq. 14, 15), and the joint optimum over all of them.

Every function takes one tensor: ``base``, and for each task i its mask M_i, its patched values and its fine-tuned
weights, all of one shape. Weights w_i are positive and sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from tailorcli.core.chunks import map_rows, row_chunks
from tailorcli.core.figures import quadratic_form
from tailorcli.core.hessian import PreparedHessian, dampen
from tailorcli.core.precision import gap, in_units, working_dtype
from tailorcli.core.products import System, product
from tailorcli.core.solvers import Decoration, solve_by_chunks
from tailorcli.core.tailor import assemble


def union_mask(masks: Sequence[Tensor]) -> Tensor:
    """M_agg, the entries that any task keeps (Eq. 15)."""
    union = masks[0].clone()
    for mask in masks[1:]:
        union |= mask
    return union


def stitch_average(
    base: Tensor,
    tuned: Sequence[Tensor],
    patched: Sequence[Tensor],
    masks: Sequence[Tensor],
    union: Tensor,
    weights: Sequence[float],
) -> Tensor:
    """Eq. 14: M_agg * (mean of Theta_i + mean of C_i) + (1 - M_agg) * base, in the base's dtype.

    A task's decorator C_i is what its patched values differ from its tuned weights by on its own mask, and zero
    elsewhere. So Theta_i + C_i is the patched value where the task keeps an entry, and its *tuned* weight where only
    another does. All matrices are (O, I).
    """
    mean = _empty(base)

    def fill(rows: slice) -> None:
        total = torch.zeros_like(mean[rows])
        for theta, values, mask, weight in zip(tuned, patched, masks, weights, strict=True):
            total.add_(torch.where(mask[rows], values[rows].to(mean.dtype), theta[rows].to(mean.dtype)), alpha=weight)
        mean[rows] = total

    map_rows(base, fill)
    return assemble(base, mean, union, None)


def stitch_patches(
    base: Tensor, patched: Sequence[Tensor], masks: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """From the patches alone: the mean of the values of those tasks that keep an entry, base where none does.

    A task that keeps an entry at the base's own value did not change it, so it does not count there.
    """
    mean = _empty(base)
    masks = [mask & (values != base) for mask, values in zip(masks, patched, strict=True)]
    union = union_mask(masks)

    def fill(rows: slice) -> None:
        total = torch.zeros_like(mean[rows])
        share = torch.zeros_like(total)
        for values, mask, weight in zip(patched, masks, weights, strict=True):
            here = mask[rows].to(total.dtype).mul_(weight)
            share += here
            total.addcmul_(here, values[rows].to(total.dtype))
        mean[rows] = torch.where(share > 0, total / share, 0.0)
        for values, mask, weight in zip(patched, masks, weights, strict=True):  # one task alone: its very value
            alone = mask[rows] & (share == weight)
            mean[rows] = torch.where(alone, values[rows].to(total.dtype), mean[rows])

    map_rows(base, fill)
    return assemble(base, mean, union, None)


@dataclass(frozen=True)
class Stitched:
    """The stitched tensor in the base's dtype, and how well the joint equations were solved."""

    patched: Tensor
    decoration: Decoration


def stitch_joint(
    base: Tensor,
    tuned: Sequence[Tensor],
    union: Tensor,
    hessians: Sequence[Tensor],
    combined: PreparedHessian,
    weights: Sequence[float],
    *,
    transposed: bool = False,
    tolerance: float = 2e-4,
    max_iterations: int = 300,
) -> Stitched:
    """The optimum for all tasks at once: minimise sum w_i (W - Theta_i) (H_i + a_i I) (W - Theta_i)^T over the mask.

    ``combined`` is the prepared A = sum w_i H_i. Solved as a compensation C of a reference R that is the tasks' mean
    tuned weight on the mask and base elsewhere: A_SS C_S = (sum w_i (Theta_i - R) H_i)_S. The mean weighs the tasks
    by w_i a_i (a_i = damping * mean diag H_i), so that the damping pulls towards R alone. With one task, and with
    two equal ones, this is what ``tailor_layer`` computes, operation for operation.
    """
    means = [dampen(hessian, 1.0) for hessian in hessians]
    pulls = [weight * mean for weight, mean in zip(weights, means, strict=True)]
    if not sum(pulls) > 0:
        pulls = list(weights)
    reference = _mean(base, tuned, [pull / sum(pulls) for pull in pulls])
    matrices = (base, reference, union, *tuned)
    base_r, reference_r, union_r, *tuned_r = (m.T for m in matrices) if transposed else matrices  # (O, I)
    dtype = working_dtype(base, *tuned)
    in_unit = [in_units(hessian, combined.unit) for hessian in hessians]

    def right_side(chunk: slice) -> Tensor:
        start = torch.where(union_r[chunk], reference_r[chunk].to(dtype), base_r[chunk].to(dtype))  # (R, I)
        target = torch.zeros(start.shape, dtype=torch.float32, device=start.device)
        for theta, hessian, weight in zip(tuned_r, in_unit, weights, strict=True):
            away = gap(theta[chunk], start)
            target.add_(away * hessian if hessian.dim() == 1 else product(away, hessian), alpha=weight)
        return torch.where(union_r[chunk], target, 0.0)

    if combined.is_diagonal:
        decoration = _divide(union_r, right_side, combined.hessian + combined.amount)
    else:
        system = System.of(combined.hessian, combined.amount, tolerance)
        decoration = solve_by_chunks(union_r, right_side, system, tolerance, max_iterations)
    stored = decoration.decorator.T if transposed else decoration.decorator
    patched = assemble(base, reference, union, stored)
    return Stitched(patched, replace(decoration, decorator=stored))


def _divide(mask: Tensor, right_side: Callable[[slice], Tensor], damped: Tensor) -> Decoration:
    """The exact solution for a diagonal Hessian ``damped`` (I,): each entry by itself; zero where no data reach."""
    solution = torch.empty_like(mask, dtype=torch.float32)
    for chunk in row_chunks(*mask.shape):
        target = right_side(chunk)
        solution[chunk] = torch.where(damped > 0, target / damped, 0.0)
    return Decoration(solution, iterations=0, residual=0.0)


def _empty(base: Tensor) -> Tensor:
    """Room for a mean: float32, or float64 where the base is."""
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    return torch.empty(base.shape, dtype=dtype, device=base.device)


def _mean(base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    mean = _empty(base)

    def fill(rows: slice) -> None:
        total = tensors[0][rows].to(mean.dtype) * weights[0]
        for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
            total.add_(tensor[rows].to(mean.dtype), alpha=weight)
        mean[rows] = total

    map_rows(base, fill)
    return mean


def overlap_figures(base: Tensor, patched: Sequence[Tensor], masks: Sequence[Tensor]) -> dict[str, Any]:
    """How the tasks' masks meet: kept by each, by all, by several, and entries whose changes differ in sign.

    ``jaccard`` is |intersection| / |union| over all tasks; ``pairs`` holds the same for each two of them. ``shared``
    entries are kept by two tasks or more; of them, ``sign_conflicts`` move up for one and down for another.
    """

    def counts(rows: slice) -> Tensor:
        parts = [mask[rows] for mask in masks]
        every = parts[0].clone()
        up, down, any_before, shared = (torch.zeros_like(every) for _ in range(4))
        origin = base[rows]
        for values, mask in zip(patched, parts, strict=True):
            every &= mask
            shared |= any_before & mask
            any_before |= mask
            up |= mask & (values[rows] > origin)
            down |= mask & (values[rows] < origin)
        numbers = [any_before.sum(), every.sum(), shared.sum(), (up & down).sum(), *(part.sum() for part in parts)]
        numbers += [(a & b).sum() for a, b in combinations(parts, 2)]
        return torch.stack(numbers)

    found = torch.stack(map_rows(base, counts)).sum(0).tolist() if base.numel() else [0] * (4 + len(masks))
    union, common, shared, conflicts, *rest = found
    kept_by, both = rest[: len(masks)], rest[len(masks) :]
    pairs = [
        _ratio(inner, kept_by[a] + kept_by[b] - inner)
        for inner, (a, b) in zip(both, combinations(range(len(masks)), 2), strict=False)
    ]
    return {
        "kept": union,
        "kept_by": kept_by,
        "kept_by_all": common,
        "jaccard": _ratio(common, union),
        "pairs": pairs,
        "shared": shared,
        "sign_conflicts": conflicts,
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def task_errors(
    base: Tensor, patched: Tensor, tuned: Sequence[Tensor], hessians: Sequence[Tensor], transposed: bool
) -> list[float]:
    """For each task the relative layer error of W: ||(W - Theta_i) X_i||^2 / ||(base - Theta_i) X_i||^2."""
    matrices = (base, patched, *tuned)
    base_r, patched_r, *tuned_r = (m.T for m in matrices) if transposed else matrices
    errors = []
    for theta, hessian in zip(tuned_r, hessians, strict=True):
        left, whole = 0.0, 0.0
        for rows in row_chunks(*base_r.shape):
            left += quadratic_form(gap(patched_r[rows], theta[rows]), hessian)
            whole += quadratic_form(gap(base_r[rows], theta[rows]), hessian)
        errors.append(left / whole if whole > 0 else 0.0)
    return errors
