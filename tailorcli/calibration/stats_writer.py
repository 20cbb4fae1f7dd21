"""Write the statistics folder: Hessians as they are measured, the manifest last."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tailorcli.calibration.stats import (
    FORMAT_VERSION,
    HEADER_ENTRY,
    HESSIANS,
    MANIFEST,
    SAMPLES,
    HessianInfo,
    TensorStats,
)
from tailorcli.checkpoint.header import build_header, header_entry
from tailorcli.checkpoint.journal import WriteQueue
from tailorcli.distributed import gathered, ranks, require_shared, wait_for_all
from tailorcli.errors import CheckpointError, OutputError
from tailorcli.files import HIDDEN, as_output_error, file_digest, read_json, write_text_atomically
from tailorcli.guard import entries
from tailorcli.system import sync_path

if TYPE_CHECKING:
    from torch import Tensor

    from tailorcli.data.samples import Inputs


_MOVED_BYTES = 1 << 24
_OTHER_PLACE = "free some space or choose another folder for -o"


def check_folder(folder: Path, overwrite: bool) -> None:
    """See that ``folder`` may take new statistics: it is not there, empty, or holds old ones that are given up.

    The old ones, which ``overwrite`` gives up, stay until ``StatsWriter.finish`` has written the new. Raises
    OutputError for a folder that holds anything else.
    """
    present = require_ours(folder)
    if MANIFEST in present and not overwrite:
        raise OutputError(f"{folder} already holds statistics", "choose another folder, or pass --overwrite")
    if present and not _are_ours(folder, present):
        raise OutputError(f"{folder} holds files that tailorcli did not write", "choose another folder for -o")


def require_ours(folder: Path) -> list[str]:
    """The names of what is in ``folder``, if it is there. Raises OutputError where one is not of a calibration."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} exists and is a file", "choose another folder for -o")
    present = [entry.name for entry in entries(folder)] if folder.exists() else []
    ours = (MANIFEST, *(name + end for name in (HESSIANS, SAMPLES) for end in ("", ".part")), MANIFEST + ".part")
    foreign = [name for name in present if name not in ours and not fnmatchcase(name, f"{HIDDEN}*.part")]
    if foreign:
        raise OutputError(f"{folder} holds other files ({foreign[0]}, ...)", "choose another folder for -o")
    return present


def remove_statistics(folder: Path) -> None:
    """Take away what a calibration wrote into ``folder``, finished or not, and the folder where nothing else is in it.

    Raises OutputError.
    """
    try:
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name in (MANIFEST, HESSIANS, SAMPLES) or path.name.endswith(".part"):
                path.unlink()
        with suppress(OSError):
            folder.rmdir()
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _are_ours(folder: Path, present: Sequence[str]) -> bool:
    """Whether the manifest, if there is one, is of statistics; what is unfinished has none."""
    if MANIFEST not in present:
        return all(name.endswith(".part") or name in (HESSIANS, SAMPLES) for name in present)
    try:
        return "hessians" in read_json(folder / MANIFEST)
    except CheckpointError:
        return False


class StatsWriter:
    """Writes Hessians one at a time, then the manifest: without it the folder is not statistics.

    ``room`` are the names that are expected, as long as they may be: their header comes first in the file, and is
    padded. Where others come, the data move up.
    """

    def __init__(self, folder: Path, room: Iterable[str]) -> None:
        self.folder = folder
        self._part = folder / (HESSIANS + ".part")
        self._infos: dict[str, HessianInfo] = {}
        self._ends: dict[str, tuple[int, int]] = {}
        self._size = 0
        self._queue = WriteQueue("statistics")
        header = sum(len(json.dumps(name)) + HEADER_ENTRY for name in room) + HEADER_ENTRY
        self._start = 8 + header + -header % 8  # of the data
        self._ranks = ranks()
        try:
            if self._ranks.first:
                self._part.open("wb").close()
            require_shared(self._part)
            self._file = self._part.open("r+b")
        except OSError as error:
            raise _cannot_write(folder, error) from error

    @property
    def infos(self) -> dict[str, HessianInfo]:
        """What each Hessian is that was written so far."""
        return dict(self._infos)

    @property
    def count(self) -> int:
        """Hessians written so far."""
        return len(self._infos)

    def __enter__(self) -> Self:
        return self

    @property
    def seconds(self) -> float:
        """Seconds that the thread has written."""
        return self._queue.seconds

    def __exit__(self, *_: object) -> None:
        self._queue.close()
        with suppress(OSError):  # what a full disk refused was reported when it was written
            self._file.close()
        if not self._ranks.first:
            return
        with suppress(OSError):  # given up: nothing can go on with it, and it may be large
            self._part.unlink(missing_ok=True)
            (self.folder / f"{SAMPLES}.part").unlink(missing_ok=True)
            for path in self.folder.glob(f"{HIDDEN}*.part"):  # where a mapped file cannot be removed
                path.unlink(missing_ok=True)

    def write(self, name: str, info: HessianInfo, values: Tensor | None) -> None:
        """Append one Hessian, already packed, or replace the one of its name, on a thread of its own.

        None stands for values that another rank writes: all ranks write the same names in the same order. Raises
        OutputError on a full disk, where not at once, with the next Hessian or in the end.
        """
        import torch

        start, stop = self._ends.setdefault(name, (self._size, self._size + 4 * info.stored_numel))
        self._size = max(self._size, stop)
        if values is None:
            self._infos.pop(name, None)
            return
        data = values.to("cpu", torch.float32).contiguous().view(-1)
        self._queue.submit(lambda: self._write_now(start, data.view(torch.uint8).numpy().data))
        self._infos[name] = info

    def _write_now(self, start: int, data: memoryview) -> None:
        try:
            self._file.seek(self._start + start)
            self._file.write(data)
        except OSError as error:
            raise _cannot_write(self._part, error) from error

    def read(self, name: str) -> tuple[HessianInfo, Tensor] | None:
        """A Hessian that this rank wrote before, packed."""
        import torch

        if name not in self._infos:
            return None
        start, stop = self._ends[name]
        self._queue.drain()
        self._file.seek(self._start + start)
        return self._infos[name], torch.frombuffer(bytearray(self._file.read(stop - start)), dtype=torch.float32)

    def store_samples(
        self,
        samples: Sequence[Inputs],
        responses: Sequence[Sequence[tuple[int, int]]] | None = None,
        following: Sequence[int | None] | None = None,
    ) -> dict[str, Any]:
        """Store the samples, and give what the manifest says of them.

        That has the runs of their ``responses`` and the tokens ``following``, where there are any. Raises OutputError
        on a full disk.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        part = self.folder / f"{SAMPLES}.part"
        named = {f"{position} {name}": value for position, s in enumerate(samples) for name, value in s.items()}
        try:
            save_file({name: value.cpu().clone().contiguous() for name, value in named.items()}, part)
            sync_path(part)
            said: dict[str, Any] = {"count": len(samples), "blake2b": file_digest(part)}
            said |= {} if responses is None else {"responses": [list(map(list, runs)) for runs in responses]}
            return said if following is None else said | {"following": list(following)}
        except OSError as error:
            raise _cannot_write(part, error) from error
        except SafetensorError as error:  # which tells of a full disk, too
            raise OutputError(f"cannot write {part}: {error}", _OTHER_PLACE) from error

    def _move_data(self, start: int) -> None:
        """Let the data begin at byte ``start``, at or behind the one where they do; the last piece moves first."""
        if start == self._start:
            return
        for first in reversed(range(0, self._size, _MOVED_BYTES)):
            self._file.seek(self._start + first)
            piece = self._file.read(min(_MOVED_BYTES, self._size - first))
            self._file.seek(start + first)
            self._file.write(piece)
        self._start = start

    def finish(self, tensors: dict[str, TensorStats], facts: dict[str, Any]) -> None:
        """Write the header and the manifest, and give the files their names. Raises OutputError.

        Among ranks the first does, when all have written; the others wait for it.
        """
        self._queue.drain()
        try:
            self._file.flush()
            sync_path(self._part)
        except OSError as error:
            raise _cannot_write(self._part, error) from error
        written = {name: info for infos in gathered(self._infos) for name, info in infos.items()}
        self._infos = {name: written[name] for name in self._ends}
        if self._ranks.first:
            self._complete(tensors, facts)
        wait_for_all("the manifest")

    def _complete(self, tensors: dict[str, TensorStats], facts: dict[str, Any]) -> None:
        entries = {
            name: header_entry("F32", [info.stored_numel], *self._ends[name]) for name, info in self._infos.items()
        }
        header = build_header(entries, self._start)
        manifest = {
            "format_version": FORMAT_VERSION,
            **facts,
            "hessians": {name: asdict(info) for name, info in self._infos.items()},
            "tensors": {name: asdict(entry) for name, entry in tensors.items()},
        }
        try:
            self._move_data(len(header))
            self._file.seek(0)
            self._file.write(header)
            self._file.close()
            sync_path(self._part)
            (self.folder / MANIFEST).unlink(missing_ok=True)  # an old one, which does not fit the new Hessians
            self._part.replace(self.folder / HESSIANS)
            if facts.get("samples") is None:
                (self.folder / SAMPLES).unlink(missing_ok=True)
            else:
                (self.folder / f"{SAMPLES}.part").replace(self.folder / SAMPLES)
            write_text_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        except OSError as error:
            raise _cannot_write(self.folder, error) from error


def _cannot_write(path: Path, error: OSError) -> OutputError:
    """The error without a word of --resume: a calibration starts again."""
    return OutputError(as_output_error(path, error).message, _OTHER_PLACE)
