"""Model-Dowser: how much each weight moves a model's answers, and the mask of those that move them least.

S_ij = |W_ij| * mean over samples and tokens of E|xi^T J_i| * |h_j|, with J_i = df/dz_i of the layer's outputs z = W h,
xi of random signs over the model's outputs f, and h the layer's inputs. The absolute value stands for the root of the
mean square, within a factor that is the same for all entries, so that small gradients do not vanish in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailorcli.core.scores import count_kept, select_mask

_BITS = 8


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """xi: +1 or -1 with equal chance, of the shape and dtype of ``like``; drawn on the generator's device."""
    bits = torch.randint(2, like.shape, generator=generator, device=generator.device, dtype=torch.int8)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)


def gains(backward: Tensor, inputs: Tensor) -> Tensor:
    """Sum over N tokens of |xi^T J_i| * |h_j|, (O, I) float32, as one product.

    ``backward`` (N, O) holds the absolute gradients at the layer's outputs, summed over the draws of xi; ``inputs``
    (N, I) what the layer multiplied.
    """
    return backward.float().T @ inputs.detach().abs().float()


def scores(weight: Tensor, gain: Tensor, count: int) -> Tensor:
    """S, float32 in the shape of ``weight``: |W| times the mean of the ``gains`` over ``count`` draws and tokens."""
    return weight.detach().abs().float() * gain / max(count, 1)


def least_important(score: Tensor, ratio: float) -> Tensor:
    """The mask of what may be trained, bool: the round(ratio * numel) lowest scores; of equal ones the last.

    ``score`` must be finite and not negative.

    >>> least_important(torch.tensor([[1.0, 3.0], [0.5, 2.0]]), 0.5).tolist()
    [[True, False], [True, False]]
    """
    return ~select_mask(score, score.numel() - count_kept(ratio, score.numel()))


def packed(mask: Tensor) -> Tensor:
    """A bool mask as bits, eight entries a byte, (ceil(numel / 8),) uint8, the first entry in the lowest bit.

    >>> packed(torch.tensor([True, False, True])).tolist()
    [5]
    """
    flat = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % _BITS))
    places = torch.arange(_BITS, dtype=torch.uint8, device=mask.device)
    return (flat.view(-1, _BITS) << places).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool mask of ``shape`` that ``packed`` made bits of.

    >>> unpacked(torch.tensor([5], dtype=torch.uint8), (3,)).tolist()
    [True, False, True]
    """
    places = torch.arange(_BITS, dtype=torch.uint8, device=bits.device)
    flat = (bits.unsqueeze(1) >> places).bitwise_and_(1).view(-1)
    return flat[: torch.Size(shape).numel()].view(shape).bool()
