"""What differs between operating systems: each call has a way that works on Linux, macOS and Windows.

Names that a system lacks are looked up when they are needed, so that taking one away shows what happens there.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

_BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends otherwise
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)
_ZEROS = 1 << 24  # bytes written at a time where the system cannot reserve room
_NO_RESERVING = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems that cannot
_seeking = threading.Lock()  # a file has one position: where it must be moved, one thread at a time reads or writes


def open_for_reading(path: Path) -> int:
    """A descriptor of a regular file, for ``read_at``. Raises OSError, and never waits.

    A pipe or a device in a file's place has no end and may have no beginning: opening one could block, or do things.
    """
    try:
        _require_regular(path.stat())
        descriptor = os.open(path, os.O_RDONLY | _BINARY | _NO_WAITING)
    except ValueError as error:  # a null character, or half of one that the file system cannot name
        raise OSError(errno.EINVAL, "no file can have this name") from error
    try:
        _require_regular(os.fstat(descriptor))  # it may have changed meanwhile
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")


def open_for_writing(path: Path) -> int:
    """A descriptor of an existing file for ``write_at`` alone. Raises OSError.

    Several machines may write side by side into one file: through a descriptor that could read as well, a network file
    system may send the whole page around what is written, and with it old bytes in the place of another machine's.
    """
    return os.open(path, os.O_WRONLY | _BINARY)


def read_at(descriptor: int, buffer: memoryview, position: int) -> int:
    """Read into ``buffer`` from byte ``position`` on; the bytes read, 0 at the end of the file. Raises OSError."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], position)
    if hasattr(os, "pread"):
        data = os.pread(descriptor, len(buffer), position)
    else:
        with _seeking:
            os.lseek(descriptor, position, os.SEEK_SET)
            data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(descriptor: int, piece: memoryview, position: int) -> int:
    """Write ``piece`` from byte ``position`` on; the bytes written, which may be fewer. Raises OSError."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, piece, position)
    with _seeking:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, piece)


def sync_data(descriptor: int) -> None:
    """Put a file's bytes on the disk; its times may wait, where the system tells them apart. Raises OSError."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def sync_path(path: Path) -> None:
    """Make a file, or a folder's entries, durable. Windows has no way to ask that of a folder. Raises OSError."""
    is_folder = path.is_dir()
    if is_folder and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY) if is_folder else open_for_writing(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(file: IO[bytes], size: int) -> None:
    """Give an empty file room on the disk for ``size`` bytes: without, a mapping of it kills the process on a full one.

    Where the system cannot reserve, zeros are written. Raises OSError.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in _NO_RESERVING:
                raise
    zeros = bytes(min(size, _ZEROS))
    for start in range(0, size, _ZEROS):
        file.write(zeros[: size - start])
    file.flush()


def bytes_on_disk(path: Path) -> int:
    """What a file takes up on the disk, less than its size where it has holes. Raises OSError."""
    found = path.stat()
    return found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size


def peak_memory() -> int | None:
    """The most bytes that this process has had in memory at a time; None where the system does not tell.

    Linux counts in ``ru_maxrss`` what the process had before it became this program: its parent's memory.
    """
    if sys.platform == "linux":
        with suppress(OSError, ValueError, StopIteration):
            lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # kilobytes but on macOS


def bytes_moved() -> int:
    """Bytes that this process has read and written so far, from and to files; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return sum(int(found[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
    except (OSError, KeyError, ValueError):
        return 0


def is_running(pid: int) -> bool:
    """Whether a process of this machine still runs; one that has ended and is not yet taken note of does not."""
    with suppress(OSError, ValueError, IndexError):
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2][0] not in "ZX"
        )
    if Path("/proc/self/stat").exists() or os.name == "nt":  # there, signal 0 would end a process
        return os.name == "nt"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_beside() -> int:
    """Threads for work that leaves Python to others, such as reading and hashing: more gain little and hold memory."""
    return min(4, 2 * usable_cores())


def variable_of_parent(name: str) -> str | None:
    """A variable as the parent process was given it, where the system tells; else None."""
    with suppress(OSError, AttributeError):
        pairs = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        found = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
        return found[name.encode()].decode("utf-8", "replace") if name.encode() in found else None
    return None


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can still take, by the machine and by its container; None if untold.

    ``root`` is where the system's own files lie. A control group's limit (version 1 or 2), or that of any group
    above it, counts as the machine's memory: beyond it the kernel ends the process. Where the system tells only how
    much memory there is in all, half of that is taken to be free.
    """
    found = [_free_of_machine(root), *_free_of_groups(root)]
    return min((free for free in found if free is not None), default=None)


def _free_of_machine(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    if hasattr(os, "sysconf"):  # macOS
        with suppress(OSError, ValueError):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _free_of_windows()


def _free_of_windows() -> int | None:
    import ctypes

    library = getattr(ctypes, "windll", None)
    if library is None:
        return None
    # MEMORYSTATUSEX: two 32-bit numbers, then seven of 64 bits; the second of those is the free physical memory.
    status = (ctypes.c_uint64 * 8)()
    ctypes.c_uint32.from_buffer(status).value = ctypes.sizeof(status)
    return int(status[2]) if library.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None


# Of each version of control groups: where its memory controller lies, and the files of limit, use and, within
# memory.stat, of cached file pages that the kernel gives up when memory is short.
_GROUPS = {
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
}


def _free_of_groups(root: Path) -> list[int]:
    """What is left under each limit that holds for this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    free = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 1 if "memory" in controllers.split(",") else 2 if number == "0" else 0
        if not version:
            continue
        mount, limit_file, used_file, cache_field = _GROUPS[version]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # In a container the path can be the host's, whose folders are not there: the container's own is the root.
        for depth in range(len(parts) + 1):
            group = (root / mount).joinpath(*parts[:depth])
            with suppress(OSError, ValueError):
                limit = int((group / limit_file).read_text())  # "max": no limit here
                used = int((group / used_file).read_text())
                free.append(max(0, limit - used + _cache_of(group, cache_field)))
    return free


def _cache_of(group: Path, field: str) -> int:
    with suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == field:
                return int(value)
    return 0


def give_back_memory() -> None:
    """Hand the memory of freed tensors back to the system, where the C library can be asked to (glibc).

    It keeps arrays below 32 MB on its heap, where small objects come to lie between them: after many blocks of a
    model the holes can be larger than the blocks.
    """
    import ctypes

    with suppress(OSError, AttributeError, TypeError):  # another C library, or another system
        ctypes.CDLL(None).malloc_trim(0)


def lock_descriptor(descriptor: int) -> bool | None:
    """Lock an open file for this process alone, without waiting: whether it worked; None where none can be locked."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True
