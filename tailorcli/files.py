"""Files read and written with care: JSON, digests, synced and atomic writes, errors that name the file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shlex
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, TypeVar

from tailorcli.errors import CheckpointError, OptionsError, OutputError
from tailorcli.system import open_for_reading, sync_path, threads_beside
from tailorcli.typed import require_sound

PathLike = str | os.PathLike[str]
Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_JSON = 1 << 27  # bytes: JSON takes up to twenty times as much memory
_NO_MORE_FILES = (errno.EMFILE, errno.ENFILE)
_MORE_FILES = "allow more of them (ulimit -n 4096), or save the checkpoints in fewer shards"
_NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # a system may know no quotas


def given_path(path: PathLike) -> Path:
    """A path that was given. Raises OptionsError for one that the system cannot even look for."""
    place = Path(path)
    try:
        place.stat()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise OptionsError(f"{place} is no path: {error.strerror}", "choose another, or mend the link") from None
    return place


def optional_path(path: PathLike | None) -> Path | None:
    """A path that may not have been given."""
    return None if path is None else Path(path)


def expanded_path(path: PathLike) -> Path:
    """``given_path`` with a leading ``~`` as the user's folder. Raises OptionsError."""
    place = Path(path)
    with suppress(RuntimeError):  # no such user: a name that begins with ~
        place = place.expanduser()
    return given_path(place)


def in_shell(path: PathLike) -> str:
    """A path as a command that is shown to be copied has it: in quotes where a shell needs them."""
    return shlex.quote(str(path))


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The user's error for a failed read."""
    if error.errno in _NO_MORE_FILES:
        return CheckpointError(f"cannot read {path}: too many files are open", _MORE_FILES)
    return CheckpointError(f"cannot read {path}: {error.strerror or error}", "check the path and its permissions")


def require_file(path: Path) -> None:
    """Refuse a pipe, a socket or a device, at which another library would wait without end. Raises CheckpointError."""
    if not path.is_file() and not path.is_dir() and path.exists():
        raise CheckpointError(f"{path} is a pipe or a device, not a file", "take it away")


def require_files(folder: Path) -> None:
    """Refuse a folder with anything but regular files, which another library would read. Raises CheckpointError."""
    try:
        for path in folder.iterdir():
            require_file(path)
    except OSError as error:
        raise unreadable(folder, error) from error


def open_regular(path: Path) -> BufferedReader:
    """A regular file, open for reading. Raises OSError for whatever else is there; never waits for it."""
    return os.fdopen(open_for_reading(path), "rb")


def read_bytes(path: Path) -> bytes:
    """All of a regular file. Raises OSError."""
    with open_regular(path) as stream:
        return stream.read()


def read_text_file(path: Path) -> str:
    """All of a regular file as text, each line end a newline. Raises OSError, UnicodeDecodeError."""
    with open_regular(path) as stream:
        return TextIOWrapper(stream, "utf-8").read()


def parse_json(text: str | bytes) -> Any:
    """A JSON value of few levels whose texts can be printed; its numbers may be any. Raises ValueError."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    require_sound(value)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, as ``parse_json`` reads it. Raises CheckpointError, which names the file."""
    try:
        with open_regular(path) as stream:
            text = stream.read(_MOST_JSON + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(text) > _MOST_JSON:
        raise CheckpointError(f"{path} has more than {_MOST_JSON:,} bytes", "pass a file of JSON, not of data")
    try:
        value = parse_json(text.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "download or save it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object", "download or save it again")
    return value


def beside(output: Path, suffix: str) -> Path:
    """A place by the name of an output with ``suffix`` behind it, for what a run goes on from.

    Raises OutputError for an output without a name, such as the root, and OptionsError for too long a name.
    """
    whole = output if output.name not in ("", "..") else output.resolve()
    if not whole.name:
        raise OutputError(f"{output} cannot be an output's folder", "choose another folder for -o")
    return given_path(whole.with_name(whole.name + suffix))


HIDDEN = "hidden-"  # files of hidden states begin with it: a run that is killed just then may leave one


class ScratchFolder:
    """A temporary folder at ``path``. It goes by ``remove``, with this object, and at the end of the program.

    Who takes it away is settled before it is made: a signal that is raised between the two, as the standard library's
    ``TemporaryDirectory`` has them, would leave it behind. Raises OutputError.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.gettempdir()) / f"tailorcli-{secrets.token_hex(16)}"  # which nobody else can have
        self.remove = weakref.finalize(self, _remove_folder, self.path)
        try:
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise as_output_error(self.path, error) from error

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()


def _remove_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync_path(temporary)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """``write_text_atomically`` for a file that the user asked for; missing folders are made. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, text)
    except OSError as error:
        raise as_output_error(path, error) from error


def as_output_error(path: Path, error: OSError) -> OutputError:
    """The user's error for a failed write."""
    if error.errno in _NO_MORE_FILES:
        return OutputError(f"cannot write {path}: too many files are open", _MORE_FILES)
    if error.errno in _NO_SPACE:
        return OutputError(
            f"no space left on the device while writing {path}",
            "free some and run it again, with --resume where the command has it",
        )
    return OutputError(f"cannot write {path}: {error.strerror or error}", "check the path and its permissions")


def file_digest(path: Path) -> str:
    """A hash of a data file's bytes, by which a manifest or a report names it. Raises OSError."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


_PIECE = 1 << 16


def pieces_digest(path: Path) -> str:
    """A short hash of a file's size, beginning, middle and end, or of all files of a folder; "absent" without one.

    It tells apart files of different runs in a moment, whatever their size. Raises CheckpointError.
    """
    digest = hashlib.blake2b(digest_size=8)
    try:
        if not path.exists():
            return "absent"
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if not file.is_file():
                continue
            with open_regular(file) as stream:
                size = os.fstat(stream.fileno()).st_size
                digest.update(f"{file.name} {size}\0".encode("utf-8", "surrogateescape"))
                for start in sorted({0, max(0, size // 2), max(0, size - _PIECE)}):
                    stream.seek(start)
                    digest.update(stream.read(_PIECE))
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def same_bytes(one: memoryview, other: memoryview) -> bool:
    """Whether two buffers of bytes are equal; their own comparison goes item by item, seventy times as slowly."""
    import numpy as np

    return len(one) == len(other) and bool(np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)))


def on_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``work`` on every item, a few of them side by side; results in order.

    For what leaves Python to others meanwhile: reading, hashing, NumPy. What one raises is raised in its turn, and
    those that wait are dropped.
    """
    with ThreadPoolExecutor(threads_beside(), thread_name_prefix="beside") as pool:
        yield from pool.map(work, items)


def digest_beside(data: Any) -> Callable[[], str]:
    """``digest_of`` one buffer, worked out on a thread of its own; call what it gives to wait for it."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(digest_of(data)), name="digest")
    thread.start()

    def wait() -> str:
        thread.join()
        return found[0]

    return wait


def digest_of(*parts: Any) -> str:
    """SHA-256 of all the bytes of ``parts``, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
