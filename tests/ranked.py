"""Several ranks in a test: processes that the launcher forks.

The test's process plays the part of torchrun's agent: it holds the store in which the ranks meet, and, as the agent
does, ends the others with SIGTERM when one has failed.
"""

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from launcher import launch


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
                    process.send_signal(signal.SIGTERM)
            if time.monotonic() > until:
                pytest.fail(f"ranks run on: {[self.shown(rank) for rank in range(len(self.processes))]}")
            time.sleep(0.02)
        return [
            Ended(process.exitcode, self.shown(rank, "out"), self.shown(rank, "err"))
            for rank, process in enumerate(self.processes)
        ]

    def shown(self, rank, stream="err"):
        return (self._folder / f"{rank}.{stream}").read_text()

    def kill(self, rank, number=signal.SIGKILL):
        self.processes[rank].send_signal(number)


@contextmanager
def started(size, function, *arguments, env=None):
    """``size`` ranks that each call ``function(*arguments)``: a ``Job``."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"LOCAL_WORLD_SIZE": str(size), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)} | (env or {})
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call"
        call.write_bytes(pickle.dumps((function, arguments)))
        processes = []
        for rank in range(size):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (Path(folder) / f"{rank}.out").open("wb") as out, (Path(folder) / f"{rank}.err").open("wb") as err:
                ends = {"stdout": out.fileno(), "stderr": err.fileno()}
                processes.append(launch(("-c", "import ranked; ranked.run_here()", call), **ends, env=own))
        try:
            yield Job(processes, Path(folder))
        finally:
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()


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


def run_here():
    """In the process of a rank: make the call that is in the file, and end without what Python takes apart then."""
    import torch

    torch.set_num_threads(1)
    function, arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
