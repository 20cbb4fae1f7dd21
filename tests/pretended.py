"""Threads of this process as ranks: what they would write, without the seconds that processes take to start."""

import sys
import threading
from contextlib import contextmanager

import pytest

from tailorcli import distributed


@contextmanager
def pretended(size):
    """Within it, ``run(work)`` calls ``work()`` once a rank, at the same time; gives what each returned.

    The first error that a rank raises is raised, and ends the others where they wait for it.
    """
    here, barrier, slots = threading.local(), threading.Barrier(size, timeout=60), [None] * size

    def ranks():
        return distributed.Ranks(here.rank, size, here.rank) if hasattr(here, "rank") else distributed.Ranks()

    def gathered(obj):
        if not hasattr(here, "rank"):
            return [obj]
        slots[here.rank] = obj
        barrier.wait()
        found = list(slots)
        barrier.wait()
        return found

    def run(work):
        results, errors = [None] * size, []

        def one(rank):
            here.rank = rank
            try:
                results[rank] = work()
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        barrier.reset()
        if errors:
            raise errors[0]
        return results

    ours = {
        "ranks": ranks,
        "gathered": gathered,
        "told": lambda obj, source=0: gathered(obj)[source],
        "wait_for_all": lambda what: gathered(None),
        "require_shared": lambda path: gathered(None),
        "summed_": lambda tensor: tensor.copy_(sum(gathered(tensor.clone()))),
        "now_on": lambda name: None,
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, ours_ in ours.items():
            theirs = getattr(distributed, name)
            for key, module in list(sys.modules.items()):
                if key.startswith("tailorcli") and getattr(module, name, None) is theirs:
                    patched.setattr(module, name, ours_)
        yield run
