"""What no command may do to files: write over an input or what is not ours, beside another run, from moving inputs.

Every command asks ``protect`` before it works, whatever it writes. Nothing here opens a file for writing but a lock.
"""

from __future__ import annotations

import json
import os
import platform
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self

from tailorcli.errors import CheckpointError, OutputError
from tailorcli.files import PathLike, as_output_error, given_path
from tailorcli.system import lock_descriptor

LOCK = ".tailorcli.lock"
PAGE_MARK = '<meta name="generator" content="tailorcli'  # stands at the beginning of every page of ours
PICTURE_MARK = "tailorcli"  # stands in every picture of ours
_PICTURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
_ELSEWHERE = "choose another path"
_MOST_WATCHED = 10_000


def protect(outputs: Iterable[PathLike | None], inputs: Iterable[PathLike | None], hint: str = _ELSEWHERE) -> None:
    """No output is an input, lies in the folder of one, or is a folder that holds one.

    Links are followed: symbolic ones, and hard ones to a file of an input. Raises OutputError, and OptionsError for a
    path that the system cannot look for.
    """
    given = [given_path(path) for path in inputs if path is not None]
    for output in (given_path(path) for path in outputs if path is not None):
        try:
            for path in given:
                _refuse(output, path, hint)
        except OSError as error:
            raise as_output_error(output, error) from error


def _refuse(output: Path, path: Path, hint: str) -> None:
    target, source = output.resolve(), path.resolve()
    above = {_identity(place) for place in (target, *target.parents)} - {None}
    if source == target or _identity(source) in {_identity(target)} - {None}:
        raise OutputError(f"the output {output} would replace an input ({path})", hint)
    if _identity(target) is not None and _identity(target) in {_identity(place) for place in source.parents}:
        raise OutputError(f"the output {output} would replace an input ({path})", hint)
    if source in target.parents or (source.is_dir() and _identity(source) in above):
        raise OutputError(f"the output {output} lies inside an input ({path})", hint)
    if target.is_file() and target.stat().st_nlink > 1 and source.is_dir():
        for folder, _, names in os.walk(source):
            if any(_identity(Path(folder) / name) == _identity(target) for name in names):
                raise OutputError(f"the output {output} would replace an input (a file of {path})", hint)


def _identity(path: Path) -> tuple[int, int] | None:
    """What a file is whatever its name: None for one that is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_result(file: PathLike | None, inputs: Iterable[PathLike | None], command: str) -> None:
    """A JSON result may go to ``file``: it is none of the inputs, and new or an earlier result of this command.

    Raises OutputError.
    """
    if file is None:
        return
    protect([file], inputs)
    _only_over(Path(file), partial(_is_result, command), f"a result of tailorcli {command}")


def check_plot_file(file: PathLike | None, inputs: Iterable[PathLike | None]) -> None:
    """A picture may be drawn into ``file``: it is none of the inputs, and new or an earlier picture of ours.

    Raises OutputError.
    """
    if file is None:
        return
    protect([file], inputs)
    _only_over(Path(file), _is_picture, "a picture that tailorcli drew")


def check_page_file(file: PathLike | None, inputs: Iterable[PathLike | None]) -> None:
    """A page may be written into ``file``: an .html that is none of the inputs, and new or an earlier page of ours.

    Raises OutputError.
    """
    if file is None:
        return
    protect([file], inputs)
    if Path(file).suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"the page {file} must end in .html", "choose another name for --html")
    _only_over(Path(file), _is_page, "a page that tailorcli wrote")


def _only_over(file: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    above = next((folder for folder in file.absolute().parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise OutputError(f"{file} would lie in {above}, which is a file", _ELSEWHERE)
    if above is not None and not os.access(above, os.W_OK):  # told before the work whose result it is to hold
        raise OutputError(f"cannot write {file}: nothing can be written into {above}", _ELSEWHERE)
    if not file.exists():
        return
    if file.is_dir():
        raise OutputError(f"{file} exists and is a folder", _ELSEWHERE)
    if not stat.S_ISREG(file.stat().st_mode):  # what is written takes the place of what was there, once it is whole
        raise OutputError(
            f"{file} is a device or a pipe, not a file", "choose a file, or pass --json and use the output"
        )
    if file.stat().st_size and not is_ours(file):
        raise OutputError(f"{file} exists and is not {what}", "choose another path, or remove it first")


def _is_result(command: str, file: Path) -> bool:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "format_version" in value and value.get("command") == command


def _is_picture(file: Path) -> bool:
    try:
        content = file.read_bytes()
    except OSError:
        return False
    start = _PICTURES.get(file.suffix.lower())
    return start is not None and content.startswith(start) and PICTURE_MARK.encode() in content


def _is_page(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return PAGE_MARK.encode() in stream.read(4096)
    except OSError:
        return False


def path_text(path: PathLike) -> str:
    r"""A path as text that any JSON holds: bytes of its name that are no UTF-8 are written as ``\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class Watch:
    """Files that must not change while a run reads them: their size, time and identity, taken when it begins.

    A folder stands for what lies in it, as far as the first ten thousand files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        every = (each for file in files for each in ((file,) if not file.is_dir() else _inside(file)))
        self._before = {file: _stamp(file) for file in every}

    def require_unchanged(self) -> None:
        """Raise CheckpointError for the first file that is no longer what it was."""
        for file, before in self._before.items():
            if _stamp(file) != before:
                raise CheckpointError(
                    f"{file} was changed while it was read: the result would fit neither its old content nor its new",
                    "run it again when nothing writes to it any more",
                )


def _inside(folder: Path) -> Iterator[Path]:
    try:
        yield from islice((file for file in folder.rglob("*") if file.is_file()), _MOST_WATCHED)
    except OSError:
        return


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def lock_file(place: Path, *, folder: bool) -> Path:
    """Where the lock of an output lies: in the folder ``place``, or beside the file, by a name that no one else has.

    It begins with the file's own name, by which a folder of half-done work knows what is its own.
    """
    return place / LOCK if folder else place.with_name(place.name + LOCK)


class OutputLock:
    """While it is held no other run writes to the same output: the folder ``place``, or the file of that name.

    A lock file lies in the folder, or beside the file, and goes when the lock is released. Where the system can lock
    files, a killed run's lock is free at once; elsewhere its file must be removed by hand, as the error says.
    """

    def __init__(self, place: Path, *, folder: bool) -> None:
        """Take the lock; missing folders are made. Raises OutputError where another run holds it."""
        self._file = lock_file(place, folder=folder)
        self._made = [above for above in self._file.parents if not above.exists()]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor: int | None = self._take(place)
        except OSError as error:
            raise as_output_error(place, error) from error

    def _take(self, place: Path) -> int:
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            held = lock_descriptor(descriptor)
            if held is None:
                os.close(descriptor)
                return self._make_alone(place)
            if not held:
                os.close(descriptor)
                raise self._taken(place, "wait until it ends, or choose another output")
            found = os.fstat(descriptor)
            if _identity(self._file) == (found.st_dev, found.st_ino):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _who())
                return descriptor
            os.close(descriptor)  # the run before removed the file between the two steps

    def _make_alone(self, place: Path) -> int:
        """On a system without locks: whoever makes the file has it."""
        self._file.unlink()
        self._file = self._file.with_name(self._file.name + ".held")
        try:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            raise self._taken(place, f"wait until it ends; if it was killed, remove {self._file}") from None
        os.write(descriptor, _who())
        return descriptor

    def _taken(self, place: Path, hint: str) -> OutputError:
        owner = ""
        with suppress(OSError):
            owner = self._file.read_text("utf-8", "replace").strip()
        return OutputError(f"another run is writing to {place}" + (f" ({owner})" if owner else ""), hint)

    def release(self) -> None:
        """Give the lock up, and remove its file; folders that were made for it and hold nothing go, too."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            self._file.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _who() -> bytes:
    return f"process {os.getpid()} on {platform.node()}\n".encode()


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, but for a lock. Raises OSError."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(LOCK)]
