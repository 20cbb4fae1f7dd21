"""SPIDER (ICML 2025), Eq. 2 to 8: which entries a step of fine-tuning may move, and how far; and half and L2 beside it.

W is the weight after an optimiser step, W_base the pre-trained one, and g the gradient accumulated so far. The mask M
lies between 0 and 1 and goes by tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOMENTUM = 0.85  # of the accumulated gradient


def moments(values: Tensor) -> Tensor:
    """Sum of |v|, sum of v^2 and the number of entries, (3,) in float64: of shards they add up to the tensor's."""
    norms = [torch.linalg.vector_norm(values.detach(), order, dtype=torch.float64) for order in (1, 2)]
    return torch.stack([norms[0], norms[1].square(), norms[0].new_tensor(float(values.numel()))])


def importance(values: Tensor, total: Tensor) -> Tensor:
    """Sigmoid of the standardised magnitude, Eq. 2 and 4: (|v| - mean) / std over the tensor, float32, in (0, 1).

    ``total`` is what ``moments`` gives for the whole tensor; the deviation is the sample's (n - 1), as torch's. Where
    all magnitudes are equal every entry has 0.5.
    """
    sums, squares, count = (float(value) for value in total)
    mean = sums / count
    variance = (squares - count * mean**2) / max(1.0, count - 1.0)
    deviation = math.sqrt(variance) if not variance <= 0.0 else 0.0  # NaN stays NaN, and shows in the weights
    if deviation <= 1e-7 * mean or deviation == 0.0:  # what is left of equal numbers is rounding
        return torch.full_like(values, 0.5, dtype=torch.float32)
    return torch.sigmoid((values.detach().abs().float() - mean) / deviation)


def accumulated(sofar: Tensor, gradient: Tensor, momentum: float) -> Tensor:
    """The accumulated gradient, float32: ``momentum`` times the earlier one plus the new; 1 adds up without decay.

    The paper weighs the new one by 1 - momentum; that changes every entry by one factor, which Eq. 4 takes out again.
    """
    return sofar * momentum + gradient.to(sofar.dtype)


def selection(learnt: Tensor, general: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 7 before it is rescaled: G / (G + I) where G > I, else 0; and (2,): its sum and its entries that are not 0.

    ``learnt`` is G, the importance of the accumulated gradient; ``general`` is I, that of the pre-trained weight.
    """
    chosen = learnt > general
    weight = torch.where(chosen, learnt / (learnt + general), torch.zeros_like(learnt))
    return weight, torch.stack([weight.double().sum(), chosen.count_nonzero().double()])


def rescaled(weight: Tensor, total: Tensor) -> Tensor:
    """Eq. 8: over the mean of what is not 0, at most 1. ``total`` is what ``selection`` gives, of the whole tensor."""
    sums, count = (float(value) for value in total)
    return weight if count == 0.0 else (weight * (count / sums)).clamp_(max=1.0)


def pulled_back(weight: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Eq. 6: W * M + W_base * (1 - M), in the weight's dtype; exactly W_base where M is 0 and exactly W where it is 1.

    The sum is worked out in float32 as W_base + M (W - W_base).
    """
    moved = base.float() + mask * (weight.float() - base.float())
    mixed = torch.where(mask == 1.0, weight.float(), moved).to(weight.dtype)
    return torch.where(mask == 0.0, base.to(weight.dtype), mixed)


def l2_gradient(weight: Tensor, base: Tensor, strength: float) -> Tensor:
    """The gradient of ``strength`` * ||W - W_base||^2, which is 2 * strength * (W - W_base), float32."""
    return 2.0 * strength * (weight.detach().float() - base.float())


def drawn_half(count: int, generator: torch.Generator) -> list[bool]:
    """Half of a group of blocks, ``count`` blocks, drawn at random (half fine-tuning): one bool each, True is trained.

    An odd group has the larger or the smaller half with equal chance, so that each block's chance is one half.
    """
    half = count // 2 + (int(torch.randint(2, (1,), generator=generator)) if count % 2 else 0)
    chosen = set(torch.randperm(count, generator=generator)[:half].tolist())
    return [place in chosen for place in range(count)]
