"""Convolutions as linear layers: one row of inputs for each place that the kernel visits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unfold(
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """The inputs under a convolution's kernel, (places, C * prod(kernel)), in the order of its flattened weight.

    ``inputs`` is (B, C, *spatial) with as many spatial dimensions as ``kernel`` has entries; ``padding`` is with
    zeros, before and after each dimension.
    A convolution of one group is then the linear layer ``unfold(x) @ weight.flatten(1).T``.
    """
    sides = [side for both in reversed(padding) for side in both]
    x = torch.nn.functional.pad(inputs, sides) if any(sides) else inputs
    for dim, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, spread * (size - 1) + 1, step)[..., ::spread]  # the window becomes the last dimension
    spatial = len(kernel)
    order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
    return x.permute(order).flatten(0, spatial).flatten(1)  # (B * places, C * prod(kernel))
