"""What the ranks of a propagated patch tell one another: where they go on, values, moments, energies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tailorcli.checkpoint.header import torch_dtype
from tailorcli.core.propagation import Moments, joined_, no_moments
from tailorcli.distributed import gathered, ranks, sent, summed_

if TYPE_CHECKING:
    from tailorcli.runs.plan import TensorPlan


def of_all(names: Iterable[str]) -> set[str]:
    """The names that any rank gives."""
    return {name for found in gathered(sorted(names)) for name in found}


def shared(value: Tensor | None, tensor: TensorPlan, owner: int, device: torch.device) -> Tensor:
    """The value of a tensor, in its stored dtype, as the rank ``owner`` has it; None on the others."""
    if value is not None and ranks().alone:
        return value
    dtype = torch_dtype(tensor.dtype)
    assert dtype is not None  # a tensor that is patched has one
    own = torch.empty(tensor.shape, dtype=dtype, device=device) if value is None else value.to(device)
    raw = sent(own.contiguous().view(-1).view(torch.uint8), owner)  # bytes: not every backend knows every dtype
    return raw.view(dtype).view(tensor.shape)


def join_moments(moments: dict[str, Moments], device: torch.device, dtype: torch.dtype) -> None:
    """Make the moments of this rank's batches those of all, by kind of data; they are summed in ``dtype``."""
    sizes = gathered({kind: len(found.hessian) for kind, found in moments.items()})
    for kind, size in sorted({entry for part in sizes for entry in part.items()}):
        joined_(moments.setdefault(kind, no_moments(size, device, dtype)), summed_)


def summed_pairs(own: Mapping[tuple[str, str], tuple[float, int]]) -> dict[tuple[str, str], tuple[float, int]]:
    """Sums and counts of all ranks, by what they are of."""
    parts = gathered(dict(own))
    keys = {key: None for part in parts for key in part}
    found = {key: [part[key] for part in parts if key in part] for key in keys}
    return {key: (sum(total for total, _ in each), sum(count for _, count in each)) for key, each in found.items()}
