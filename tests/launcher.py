"""Commands in processes of their own, each forked from one that has imported torch: a start in milliseconds.

What a process of its own is for is kept: its descriptors, streams, signals, limits and exit code, and how Python ends.
What Python makes of its environment when it starts is not, such as PYTHONIOENCODING: that needs a start of its own.
"""

import atexit
import functools
import gc
import json
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile

SECONDS = 600  # after which a command hangs


def launch(arguments, *, stdin=None, stdout, stderr, env=None, file_limit=None):
    """Start ``python ARGUMENTS`` (-m MODULE, -c CODE or a script); gives what waits for its exit code, as Popen's.

    ``stdin``, ``stdout`` and ``stderr`` are descriptors, ``env`` is added to the environment, ``file_limit`` is the
    most bytes that a file may take.
    """
    request = {
        "arguments": [str(argument) for argument in arguments],
        "env": {**os.environ, **(env or {})},
        "folder": os.getcwd(),  # noqa: PTH109
        "file_limit": file_limit,
    }
    server = _server()
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        given = nothing.fileno() if stdin is None else stdin
        socket.send_fds(server, [json.dumps(request).encode()], [given, stdout, stderr])

    def wait():
        return os.waitstatus_to_exitcode(int(server.recv(100)))

    return wait


def completed(arguments, *, stdout=None, stderr=None, **options):
    """The same and its end: exit code and the bytes of standard output and error, but for what got a descriptor."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        wait = launch(
            arguments,
            stdout=out.fileno() if stdout is None else stdout,
            stderr=err.fileno() if stderr is None else stderr,
            **options,
        )
        code = wait()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


@functools.cache
def _server():
    """The socket to the process that forks, started once."""
    ours, theirs = socket.socketpair()
    with theirs:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        command = [sys.executable, __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], **pipes)
    ours.settimeout(SECONDS)

    def end():
        ours.close()  # at which it ends
        process.wait()

    atexit.register(end)
    return ours


def _serve(connection):
    """Fork for each request until there are no more. Gives the request and its descriptors in the forked process."""
    from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401  # and torch

    gc.collect()
    gc.freeze()
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            return None
        child = os.fork()
        if not child:
            connection.close()
            return json.loads(message), descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(str(os.waitpid(child, 0)[1]).encode())


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
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        _become(*asked)
