"""What several ranks have encoded of one patch file, until the places in it are known.

How large a mask is, is known once it is encoded: no rank can know beforehand where in the file its tensors go. Each
appends them to a spool beside the file, with a journal of its own. Once all are there their sizes give the places, and
each rank copies what its spool holds into the file: to the byte what one process would have appended.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.journal import ANEW, Journal, WriteQueue, write_all
from tailorcli.errors import OutputError
from tailorcli.files import as_output_error, digest_of
from tailorcli.patchfile.coding import CODINGS, PADDING, encode, pad_byte
from tailorcli.patchfile.reader import raw_bytes
from tailorcli.system import open_for_reading, open_for_writing, read_at, sync_data
from tailorcli.typed import field_of, list_of, one_of, read_count, read_text

if TYPE_CHECKING:
    from torch import Tensor

_COPIED_BYTES = 1 << 24  # at a time


@dataclass(frozen=True)
class Spooled:
    """A tensor that waits in the spool of a rank, from byte ``at`` on: its mask, not padded, then its values."""

    rank: int
    at: int
    codes: int  # bytes
    values: int  # bytes
    coding: str
    kept: int  # entries


@dataclass(frozen=True)
class Placed:
    """Where a spooled tensor goes in the file: from byte ``position`` on, its mask padded to ``codes`` bytes."""

    spooled: Spooled
    position: int
    codes: int

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.position + self.codes + self.spooled.values


def placed_in_order(tensors: Mapping[str, Spooled], position: int) -> dict[str, Placed]:
    """The place of each tensor in a file that holds them one after another from byte ``position`` on."""
    places = {}
    for name, spooled in tensors.items():
        codes = spooled.codes + padding_after(position, spooled.codes)
        places[name] = Placed(spooled, position, codes)
        position = places[name].end
    return places


def padding_after(position: int, codes: int) -> int:
    """How many bytes follow a mask of ``codes`` bytes that begins at byte ``position``: what comes next is aligned."""
    return -(position + codes) % (PADDING + 1)


def encode_kept(mask: Tensor, patched: Tensor) -> tuple[str, Any, int, memoryview]:
    """A flat tensor as a patch file has it: the mask's coding and codes, how many entries are kept, their values."""
    import numpy as np

    entries = np.frombuffer(raw_bytes(patched), dtype=f"V{patched.element_size()}")
    parts = [entries[:0]]
    coding, codes = encode(mask.numpy(), lambda places: parts.append(entries[places]))
    kept = np.concatenate(parts)
    return coding, codes, kept.size, kept.view(np.uint8).data if kept.size else memoryview(b"")


class SpoolWriter:
    """One rank's part of a patch file, written on a thread of its own; it outlasts an interrupted run.

    ``done`` has the records of the tensors that are written, by whichever rank and run.
    """

    def __init__(
        self, file: Path, rank: int, identity: dict[str, Any], done: Mapping[str, dict[str, Any]], base: Checkpoint
    ) -> None:
        """Open the spool of ``rank`` for a part of ``file``; what it holds already is kept. Raises OutputError.

        ``base`` is the checkpoint whose tensors are noted.
        """
        self.done = dict(done)
        self.tensors: dict[str, Spooled] = {}  # of this run
        self.digests: dict[str, str] = {}  # of this run, of each tensor's bytes in the base
        self._rank, self._base = rank, base
        self._path, journal = _paths_of(file, rank)
        self._journal = Journal(journal)
        self._queue = WriteQueue("patch writer")
        try:
            if not journal.exists():
                self._path.write_bytes(b"")
                self._journal.start(identity)
            self._descriptor = open_for_writing(self._path)
            self._position = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise as_output_error(self._path, error) from error

    @property
    def seconds(self) -> float:
        """Seconds that the thread has worked."""
        return self._queue.seconds

    def write(self, name: str, mask: Tensor, patched: Tensor, record: dict[str, Any], base_digest: str) -> None:
        """Queue a tensor: its mask, its final values (of which the kept ones are stored), its report.

        ``base_digest`` is the SHA-256 of the base's bytes.
        """
        flat, values = mask.detach().cpu().reshape(-1), patched.detach().cpu().reshape(-1)
        self._queue.submit(lambda: self._write_now(name, flat, values, record, base_digest))

    def note(self, name: str, record: dict[str, Any]) -> None:
        """Queue a tensor that stays at base: only the digest of its bytes is taken down."""
        self._queue.submit(lambda: self._note_now(name, record))

    def _write_now(self, name: str, mask: Tensor, patched: Tensor, record: dict[str, Any], digest: str) -> None:
        coding, codes, kept, values = encode_kept(mask, patched)
        spooled = Spooled(self._rank, self._position, codes.size, len(values), coding, kept)
        try:
            write_all(self._descriptor, codes.data, self._position)
            write_all(self._descriptor, values, self._position + codes.size)
            line = {"name": name, "record": record, "sha256": digest, "coding": coding, "kept": kept}
            place = {"at": self._position, "bytes": [codes.size, len(values)]}
            self._journal.add(line | place, codes.size + len(values), self._descriptor)
        except OSError as error:
            raise as_output_error(self._path, error) from error
        self._position += codes.size + len(values)
        self.tensors[name], self.digests[name], self.done[name] = spooled, digest, record

    def _note_now(self, name: str, record: dict[str, Any]) -> None:
        digest = digest_of(*self._base.pieces(self._base.tensors[name]))
        self._journal.add({"name": name, "record": record, "sha256": digest}, 0, self._descriptor)
        self.digests[name], self.done[name] = digest, record

    def drain(self) -> None:
        """Wait until everything queued is written and journaled. Raises OutputError."""
        self._queue.submit(self._journal.sync)
        self._queue.drain()

    def close(self) -> None:
        """Stop the thread and close the spool; what is written stays for ``resume``."""
        self._queue.close()
        if self._descriptor >= 0:
            if self._journal.path.exists():  # not where the first rank has removed all
                with suppress(OutputError):
                    self._journal.sync()
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def copy_into(file: Path, places: Mapping[str, Placed]) -> dict[str, str]:
    """Copy spooled tensors to their places in the patch file ``file`` that is under way; the SHA-256 of each.

    Raises OutputError.
    """
    part = unfinished(file)
    digests = {}
    opened: dict[int, int] = {}
    try:
        target = open_for_writing(part)
        try:
            for name, place in places.items():
                rank = place.spooled.rank
                if rank not in opened:
                    opened[rank] = open_for_reading(_paths_of(file, rank)[0])
                digests[name] = _copy(opened[rank], target, place)
            sync_data(target)
        finally:
            for descriptor in (target, *opened.values()):
                os.close(descriptor)
    except OSError as error:
        raise as_output_error(part, error) from error
    return digests


def _copy(source: int, target: int, place: Placed) -> str:
    """One tensor's mask, padded, and its values; gives their digest. Raises OSError."""
    spooled, digest, position = place.spooled, hashlib.sha256(), place.position
    pad = bytes([pad_byte(spooled.coding)]) * (place.codes - spooled.codes)
    parts = (
        *_pieces(source, spooled.at, spooled.codes),
        memoryview(pad),
        *_pieces(source, spooled.at + spooled.codes, spooled.values),
    )
    for piece in parts:
        digest.update(piece)
        write_all(target, piece, position)
        position += len(piece)
    return digest.hexdigest()


def _pieces(source: int, start: int, nbytes: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(nbytes, _COPIED_BYTES)))
    end = start + nbytes
    while start < end:
        count = read_at(source, buffer[: end - start], start)
        if not count:
            raise OSError(5, "a spool of a rank is shorter than its journal says")
        yield buffer[:count]
        start += count


def spooled_earlier(file: Path, identity: dict[str, Any]) -> list[tuple[dict[str, Any], Spooled | None]]:
    """What interrupted runs of the same ``identity`` have spooled: each journal's entry, and where its tensor waits.

    None waits of a tensor that stays at base. Raises OutputError.
    """
    found: list[tuple[dict[str, Any], Spooled | None]] = []
    for rank in ranks_with_spools(file):
        path, journal = _paths_of(file, rank)
        damaged = OutputError(f"cannot resume {file}: the journal of rank {rank} is damaged", ANEW)
        for entry in Journal(journal).load(identity, file):
            try:
                field_of(entry, "sha256", read_text)
                spooled = _read_spooled(entry, rank) if "at" in entry else None
                if spooled is not None and spooled.at + spooled.codes + spooled.values > path.stat().st_size:
                    raise ValueError(entry["at"])
            except (ValueError, OSError) as error:
                raise damaged from error
            found.append((entry, spooled))
    return found


def _read_spooled(entry: dict[str, Any], rank: int) -> Spooled:
    at, kept = (field_of(entry, name, read_count) for name in ("at", "kept"))
    codes, values = field_of(entry, "bytes", list_of(read_count))
    return Spooled(rank, at, codes, values, field_of(entry, "coding", one_of(*CODINGS)), kept)


def unfinished(file: Path) -> Path:
    """A patch file's name until it is finished."""
    return file.with_name(file.name + ".part")


def ranks_with_spools(file: Path) -> list[int]:
    """The ranks that have a spool beside ``file``."""
    form = re.compile(re.escape(file.name) + r"\.rank(\d+)\.journal")
    names = [form.fullmatch(path.name) for path in _beside(file, ".journal")]
    return sorted(int(match[1]) for match in names if match)


def remove_spools(file: Path) -> None:
    """Take all spools away. Raises OSError."""
    for path in (*_beside(file, ".journal"), *_beside(file, ".journal.part"), *_beside(file, ".part")):
        path.unlink(missing_ok=True)


def _beside(file: Path, end: str) -> Iterable[Path]:
    """Whatever a rank wrote beside the file, with this end of its name."""
    form = re.compile(re.escape(file.name) + r"\.rank\d+" + re.escape(end))
    if not file.parent.is_dir():
        return []
    return [path for path in file.parent.iterdir() if form.fullmatch(path.name)]


def _paths_of(file: Path, rank: int) -> tuple[Path, Path]:
    """The spool of a rank, and its journal."""
    return file.with_name(f"{file.name}.rank{rank}.part"), file.with_name(f"{file.name}.rank{rank}.journal")
