"""Commands in processes of their own, each forked from one that has imported torch: a start in milliseconds.

What a process of its own is for is kept: its descriptors, streams, signals, limits and exit code, and how Python ends.
What Python makes of its environment when it starts is not, such as PYTHONIOENCODING: that needs a start of its own.
The process that forks is one for all workers of a test run, as what it imports takes seconds.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import json
import os
import resource
import runpy
import select
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 600  # after which a command hangs
_DIGITS = 20  # of a number that is sent


class Process:
    """One that was launched: its ``pid``, and its exit code (negative: by that signal), None while it runs."""

    def __init__(self, connection, pid):
        self._connection = connection
        self.pid = pid
        self._code = None

    @property
    def exitcode(self):
        if self._code is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self._code

    def wait(self):
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(_number(self._connection))
            self._connection.close()
        return self._code

    def send_signal(self, number):
        if self.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)


def launch(arguments, *, stdin=None, stdout, stderr, env=None, file_limit=None):
    """Start ``python ARGUMENTS`` (-m MODULE, -c CODE or a script): a ``Process``.

    ``stdin``, ``stdout`` and ``stderr`` are descriptors, ``env`` is added to the environment, ``file_limit`` is the
    most bytes that a file may take.
    """
    request = {
        "arguments": [str(argument) for argument in arguments],
        "env": {**os.environ, **(env or {})},
        "folder": os.getcwd(),  # noqa: PTH109
        "file_limit": file_limit,
    }
    _server()
    connection = _connected()
    connection.settimeout(SECONDS)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        given = nothing.fileno() if stdin is None else stdin
        socket.send_fds(connection, [json.dumps(request).encode()], [given, stdout, stderr])
    return Process(connection, _number(connection))


def completed(arguments, *, stdout=None, stderr=None, **options):
    """The same and its end: exit code and the bytes of standard output and error, but for what got a descriptor."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = launch(
            arguments,
            stdout=out.fileno() if stdout is None else stdout,
            stderr=err.fileno() if stderr is None else stderr,
            **options,
        )
        code = process.wait()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


@functools.cache
def _address():
    """Where the process that forks listens: the same for all workers of a run of pytest-xdist."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    return str(Path(tempfile.gettempdir()) / f"tailorcli-launcher-{run}")


def _number(connection):
    return int(connection.recv(_DIGITS, socket.MSG_WAITALL))


def _connected():
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(_address())
    return connection


@functools.cache
def _server():
    """A connection to the process that forks, which ends with the last of them; started where there is none."""
    with _locked(_address()):
        try:
            ours = _connected()
        except OSError:
            Path(_address()).unlink(missing_ok=True)  # left by one that was killed
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(_address())
                listener.listen(100)
                pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
                command = [sys.executable, __file__, str(listener.fileno()), _address()]
                process = subprocess.Popen(command, pass_fds=[listener.fileno()], **pipes)
            process.returncode = 0  # it may outlive this process: nobody waits for it
            ours = _connected()
        ours.send(b"stay")
    atexit.register(ours.close)
    return ours


@contextlib.contextmanager
def _locked(address):
    """Within it, nobody else begins or ends what listens there."""
    with open(address + ".lock", "wb") as file:  # noqa: PTH123
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Server:
    """Forks for each request, until nobody is left who might send one."""

    def __init__(self, listener, address):
        self.listener = listener
        self.address = address
        self.workers = []
        self.waiting = {}  # who is to be told of the end of a process, by its pid

    def serve(self):
        """Give the request and its descriptors in a forked process, None at the end."""
        self._accept()  # the worker that started it
        while self.workers or not self._ended():
            ready = select.select([self.listener, *self.workers], [], [], 0.01 if self.waiting else None)[0]
            self._tell()
            if self.listener in ready and (asked := self._accept()):
                return asked
            self.workers = [each for each in self.workers if each not in ready or each.recv(100)]
        return None

    def _ended(self):
        with _locked(self.address):
            if select.select([self.listener], [], [], 0)[0]:  # somebody came meanwhile
                return False
            for name in (self.address, self.address + ".lock"):
                Path(name).unlink()
            return True

    def _accept(self):
        connection, _ = self.listener.accept()
        message, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if message == b"stay":
            self.workers.append(connection)
            return None
        pid = os.fork() if message else None
        if pid == 0:
            for each in (self.listener, connection, *self.workers, *self.waiting.values()):
                each.close()
            return json.loads(message), descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        if pid:
            connection.send(b"%*d" % (_DIGITS, pid))
            self.waiting[pid] = connection
        return None

    def _tell(self):
        while self.waiting:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self.waiting.pop(pid) as connection, contextlib.suppress(OSError):  # nobody may wait for it
                connection.send(b"%*d" % (_DIGITS, status))


def _become(request, descriptors):
    """Make this process what the request says, and run it; it ends as Python does."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        buffering = 1 if number == 2 or os.isatty(number) else -1
        stream = open(number, "w", buffering, "utf-8", errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    kind, *words = request["arguments"]
    sys.path[0] = "" if kind in ("-m", "-c") else os.path.dirname(kind)  # noqa: PTH120
    sys.path[1:1] = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    if kind == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *words[1:]]
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [kind, *words]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch.distributed  # noqa: F401
    from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

    import tailorcli.calibration.calibrate
    import tailorcli.cli.calibrating
    import tailorcli.cli.checking
    import tailorcli.cli.measure
    import tailorcli.cli.patchfiles
    import tailorcli.cli.patching
    import tailorcli.cli.showing
    import tailorcli.cli.training
    import tailorcli.patching.patch  # noqa: F401

    gc.collect()
    gc.freeze()
    asked = _Server(socket.socket(fileno=int(sys.argv[1])), sys.argv[2]).serve()
    if asked is not None:
        _become(*asked)
