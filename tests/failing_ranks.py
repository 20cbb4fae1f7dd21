"""Ranks of which one does something odd, for tests of how the others end; a program for torchrun, too."""

import os
import signal
import sys
import time
from contextlib import contextmanager

import torch

from tailorcli import distributed
from tailorcli.errors import NumericalError


def works_on(rank, does, how="sums"):
    """Rank ``rank`` does something odd at its third tensor; the others wait for it in a sum, or work."""
    with joined_and_told():
        for number in range(1000 if how == "works" else 5):
            distributed.now_on(f"tensor {number}")
            if distributed.ranks().rank == rank and number == 3:
                ODD[does]()
            if how == "works":
                time.sleep(0.05)
            else:
                distributed.summed_(torch.ones(1))


def raises():
    raise NumericalError("NaN in it", "look at it")


def has_a_bug():
    return {}["nothing"]


def sleeps():
    time.sleep(1000)


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


ODD = {each.__name__: each for each in (raises, has_a_bug, sleeps, is_killed, is_stopped)}


@contextmanager
def joined_and_told():
    """``joined`` as the command line uses it."""
    from tailorcli.distributed import watch

    watch.BEAT_SECONDS, watch.IDLE_SECONDS = 0.2, 2.0

    def tell(error, failure):
        print(f"told by {distributed.launched().rank}: {error!r}", file=sys.stderr, flush=True)

    try:
        with distributed.joined({"the command": "x"}, tell):
            yield
    except distributed.Ended as ended:
        sys.stderr.flush()
        os._exit(ended.code)


if __name__ == "__main__":
    works_on(int(sys.argv[1]), sys.argv[2])
