"""Parameters that FSDP has cut into shards (DTensor): this process's part, and sums over all processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Give this process's part of a sharded tensor, in the same memory; another tensor as it is."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if _is_shard(tensor) else tensor
    return part.detach()


def as_shard(whole: Tensor, like: Tensor) -> Tensor:
    """Give this process's part of ``whole``, cut as ``like`` is; whole where ``like`` is not sharded."""
    if not _is_shard(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    cut = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
    return cut.to_local().detach().clone()


def summed(value: Tensor, like: Tensor) -> Tensor:
    """``value`` summed over all processes that hold a part of ``like``."""
    if not _is_shard(like):
        return value
    import torch.distributed as dist

    sharded: Any = like
    total = value.clone()
    for dimension, placement in enumerate(sharded.placements):
        if placement.is_shard():
            dist.all_reduce(total, group=sharded.device_mesh.get_group(dimension))
    return total
