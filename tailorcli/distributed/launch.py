"""How this process was started: alone, or as one of the ranks of torchrun. Nothing here imports torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tailorcli.errors import RankError


@dataclass(frozen=True)
class Ranks:
    """Which of the processes of a job this one is; of those on its machine, the ``local_rank``-th of ``local_size``."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def alone(self) -> bool:
        """Whether the job is this process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process speaks for all, and writes what is written once."""
        return self.rank == 0


def launched() -> Ranks:
    """The place that torchrun gave this process, or whatever else sets the variables that torch.distributed reads.

    Raises RankError for variables that fit no job.
    """
    if not all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return Ranks()
    rank, size, local_rank = _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", 0)
    local_size = _number("LOCAL_WORLD_SIZE", local_rank + 1)
    if not (rank < size and local_rank < local_size <= size):
        raise RankError(
            f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_size} fit no job",
            "start it with torchrun, which sets them; or unset them for a single process",
        )
    return Ranks(rank, size, local_rank, local_size)


def _number(name: str, default: int | None = None) -> int:
    given = os.environ.get(name, "")
    if not given and default is not None:
        return default
    if not (given.isascii() and given.isdigit()):
        raise RankError(f"the variable {name} is no number: {given!r}", "start it with torchrun, which sets it")
    return int(given)
