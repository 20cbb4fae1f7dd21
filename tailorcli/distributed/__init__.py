"""Several processes as one job: torchrun starts them, torch.distributed joins them, and here is who does what.

In a single process everything here is free and does nothing.
"""

from tailorcli.distributed.group import (
    first_of_all,
    gathered,
    joined,
    mine,
    now_on,
    ranks,
    require_alone,
    require_shared,
    sent,
    summed_,
    summed_at,
    told,
    wait_for_all,
)
from tailorcli.distributed.launch import Ranks, launched
from tailorcli.distributed.shares import shares
from tailorcli.distributed.watch import Ended, Failure

__all__ = [
    "Ended",
    "Failure",
    "Ranks",
    "first_of_all",
    "gathered",
    "joined",
    "launched",
    "mine",
    "now_on",
    "ranks",
    "require_alone",
    "require_shared",
    "sent",
    "shares",
    "summed_",
    "summed_at",
    "told",
    "wait_for_all",
]
