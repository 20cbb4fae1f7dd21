"""Several ranks in a test, at the price of one import: processes forked from a server that has imported torch.

The test's process plays the part of torchrun's agent: it holds the store in which the ranks meet, and, as the agent
does, ends the others with SIGTERM when one has failed.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_PRELOADED = [
    "torch",
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
    "tailorcli.cli",
    "tailorcli.calibration.calibrate",
    "tailorcli.patching.patch",
    "ranked",
]


@dataclass
class Ended:
    """How a rank ended: its exit code (negative: by that signal), and what it showed."""

    code: int
    stdout: str
    stderr: str


class Job:
    """Ranks that run."""

    def __init__(self, processes, folder):
        self.processes = processes
        self._folder = folder

    def ended(self, timeout=60, like_torchrun=True):
        """Wait for all ranks; with ``like_torchrun`` the others get SIGTERM when one has failed."""
        until, told = time.monotonic() + timeout, False
        while any(process.exitcode is None for process in self.processes):
            if like_torchrun and not told and any(process.exitcode for process in self.processes):
                told = True
                for process in self.processes:
                    if process.exitcode is None:
                        process.terminate()
            if time.monotonic() > until:
                for process in self.processes:
                    process.kill()
                pytest.fail(f"ranks run on: {[self.shown(rank) for rank in range(len(self.processes))]}")
            time.sleep(0.02)
        return [
            Ended(process.exitcode, self.shown(rank, "out"), self.shown(rank, "err"))
            for rank, process in enumerate(self.processes)
        ]

    def shown(self, rank, stream="err"):
        return (self._folder / f"{rank}.{stream}").read_text()

    def kill(self, rank, number=signal.SIGKILL):
        os.kill(self.processes[rank].pid, number)


@contextmanager
def started(size, function, *arguments, env=None):
    """``size`` ranks that each call ``function(*arguments)``: a ``Job``."""
    from torch.distributed import TCPStore

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"LOCAL_WORLD_SIZE": str(size), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    shared |= {"GLOO_SOCKET_IFNAME": "lo"} | (env or {})
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(size):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            given = (own, str(Path(folder) / str(rank)), function, arguments)
            processes.append(context.Process(target=_run, args=given))
            processes[-1].start()
        try:
            yield Job(processes, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()


def ranked(size, function, *arguments, env=None):
    """What ``function(*arguments)`` gives on each of ``size`` ranks that are joined."""
    with tempfile.TemporaryDirectory() as folder, started(size, _called, folder, function, arguments, env=env) as job:
        ends = job.ended()
        assert [end.code for end in ends] == [0] * size, "\n".join(end.stderr for end in ends)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(size)]


def ranked_cli(size, *arguments, env=None, timeout=120):
    """The command line on ``size`` ranks: how each ended."""
    with started(size, command_line, *map(str, arguments), env=env) as job:
        return job.ended(timeout)


def command_line(*arguments):
    """The program, as ``python -m tailorcli`` runs it."""
    from tailorcli.cli import main

    sys.argv = ["tailorcli", *arguments]
    main()


def _called(folder, function, arguments):
    from tailorcli.distributed import joined

    with joined() as here:
        value = function(*arguments)
        (Path(folder) / str(here.rank)).write_bytes(pickle.dumps(value))


def _run(variables, place, function, arguments):
    """In the child: its streams are files, its variables those of its rank."""
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    function(*arguments)
