"""Every operation on the files of a folder, counted; the process ends at the n-th of them. Linux only.

What Python's own functions do is counted: opening for writing, writing, syncing, renaming, removing, making folders,
setting a file's size. ``torn`` writes the first half of the bytes before the process ends.
"""

import builtins
import io
import os
import threading
from pathlib import Path

ENDED = 77  # exit code of a process that was ended here

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Operations:
    """The operations below ``root`` since ``install``: ``log`` has the kind and the path of each, in order."""

    def __init__(self, root, end_at=0, *, torn=False):
        self.log = []
        self._root = os.fspath(root)
        self._end_at, self._torn = end_at, torn
        self._counting = threading.Lock()

    def step(self, kind, place):
        """Note an operation that is about to be done; whether it shall be done by half, and the process end then."""
        path = _path_of(place)
        if not path.startswith(self._root):
            return False
        with self._counting:
            self.log.append((kind, path[len(self._root) + 1 :]))
            if len(self.log) != self._end_at:
                return False
            if not self._torn:
                os._exit(ENDED)
            return True

    def install(self):
        """Count from now on, in this process for good."""
        for name in ("unlink", "remove", "rmdir", "mkdir", "truncate"):
            self._wrap(name, lambda path, *_: path, name)
        for name in ("fsync", "fdatasync", "ftruncate", "posix_fallocate"):
            self._wrap(name, lambda descriptor, *_: descriptor, name)
        for name in ("rename", "replace", "link", "symlink"):
            self._wrap(name, lambda _, target, *__: target, name)
        self._wrap_writes()
        self._wrap_open()
        self._wrap_save_file()

    def _wrap(self, name, place_of, kind):
        real = getattr(os, name)

        def counted(*arguments, dir_fd=None, **options):
            place = place_of(*arguments)
            if dir_fd is not None:
                place, options["dir_fd"] = f"{_path_of(dir_fd)}/{place}", dir_fd
            if self.step(kind, place):  # it has no half
                os._exit(ENDED)
            return real(*arguments, **options)

        setattr(os, name, counted)

    def _wrap_writes(self):
        pwrite, write, sendfile = os.pwrite, os.write, os.sendfile

        def counted_pwrite(descriptor, data, offset):
            if self.step("write", descriptor):
                pwrite(descriptor, bytes(data)[: len(data) // 2], offset)
                os._exit(ENDED)
            return pwrite(descriptor, data, offset)

        def counted_write(descriptor, data):
            if self.step("write", descriptor):
                write(descriptor, bytes(data)[: len(data) // 2])
                os._exit(ENDED)
            return write(descriptor, data)

        def counted_sendfile(out, source, offset, count, *more, **options):
            if self.step("write", out):
                sendfile(out, source, offset, max(1, os.fstat(source).st_size // 2))
                os._exit(ENDED)
            return sendfile(out, source, offset, count, *more, **options)

        os.pwrite, os.write, os.sendfile = counted_pwrite, counted_write, counted_sendfile

    def _wrap_open(self):
        operations, real_open, real_os_open = self, io.open, os.open

        class Raw(io.FileIO):
            """A file whose every real write is counted, whatever is buffered above it."""

            def write(self, data):
                data = memoryview(data).cast("B")
                if operations.step("write", self.fileno()):
                    super().write(data[: len(data) // 2])
                    os._exit(ENDED)
                return super().write(data)

            def truncate(self, size=None):
                if operations.step("truncate", self.fileno()):
                    os._exit(ENDED)
                return super().truncate(size)

        def counted_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
            if not set(mode) & set("wax+") or isinstance(file, int):
                return real_open(file, mode, buffering, encoding, errors, newline, **more)
            if operations.step("open", file):
                os._exit(ENDED)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), **more)
            stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return stream
            return io.TextIOWrapper(stream, encoding, errors, newline)

        def counted_os_open(path, flags, mode=0o777, *, dir_fd=None):
            if flags & _WRITING and operations.step("open", path):
                os._exit(ENDED)
            return real_os_open(path, flags, mode, dir_fd=dir_fd)

        io.open = builtins.open = counted_open
        os.open = counted_os_open

    def _wrap_save_file(self):
        """Safetensors writes a file by itself, from Rust: one operation."""
        import safetensors.torch

        real = safetensors.torch.save_file

        def counted(tensors, path, *arguments, **options):
            torn = self.step("write", path)
            real(tensors, path, *arguments, **options)
            if torn:
                os.truncate(path, Path(path).stat().st_size // 2)
                os._exit(ENDED)

        safetensors.torch.save_file = counted


def _path_of(place):
    """The absolute path of a path or of an open file."""
    if isinstance(place, int):
        try:
            return str(Path(f"/proc/self/fd/{place}").readlink())
        except OSError:
            return ""
    return os.path.abspath(os.fsdecode(place))  # noqa: PTH100  # a link itself is what is removed
