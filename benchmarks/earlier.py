"""What joint was before: conjugate gradients in plain float32, to be timed beside what it is now."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.solver import Layer
from tailorcli.core.chunks import row_chunks

TOLERANCE, MAX_ITERATIONS = 1e-4, 300


def joint(layer: Layer) -> Tensor:
    """The decorator by float32 products, a dozen passes over (O, I) arrays an iteration, a wait in each."""
    decorator = torch.zeros_like(layer.delta)
    for chunk in row_chunks(*layer.delta.shape):
        kept = layer.mask[chunk]
        put_back = torch.where(kept, 0.0, layer.delta[chunk])
        product = put_back @ layer.hessian
        float((product * put_back).sum(1).sum(dtype=torch.float64))  # the energy before
        decorator[chunk] = _conjugate_gradients(torch.where(kept, product, 0.0), kept, layer.hessian, layer.amount)
    return decorator


def _conjugate_gradients(target: Tensor, kept: Tensor, hessian: Tensor, amount: float) -> Tensor:
    solution = torch.zeros_like(target)
    diagonal = hessian.diagonal() + amount
    precondition = torch.where(diagonal > 0, 1.0 / diagonal, 0.0)
    goal = TOLERANCE**2 * target.square().sum(1)
    rows = torch.arange(target.shape[0], device=target.device)
    x, r, steps = torch.zeros_like(target), target, 0
    p = r * precondition
    rz = (r * p).sum(1)
    while True:
        live = r.square().sum(1) > goal[rows]
        num_live = int(live.sum())
        if num_live == 0 or steps == MAX_ITERATIONS:
            solution[rows] = x
            return solution
        if num_live <= 0.75 * rows.numel():
            solution[rows[~live]] = x[~live]
            x, r, p, rz, kept, rows = x[live], r[live], p[live], rz[live], kept[live], rows[live]
            live = live[live]
        steps += 1
        q = (p @ hessian).add_(p, alpha=amount).mul_(kept)
        curvature = (p * q).sum(1)
        step = torch.where(live & (curvature > 0), rz / curvature, 0.0).unsqueeze(1)
        x = torch.addcmul(x, p, step)
        r = torch.addcmul(r, q, step, value=-1.0)
        z = r * precondition
        rz_next = (r * z).sum(1)
        p = torch.addcmul(z, p, torch.where(rz > 0, rz_next / rz, 0.0).unsqueeze(1))
        rz = rz_next
