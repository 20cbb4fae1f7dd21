"""Write a checkpoint tensor by tensor into shards whose headers are known beforehand, so that it can be resumed.

While it is written every shard carries the suffix ``.part`` and a journal lists the tensors that are safely on
disk. Only ``finish`` gives the shards their names, the index last: an interrupted output loads as nothing.

Several ranks may write one output: every tensor's place is known beforehand. The first lays out the shards, each has
a journal of its own, and the first finishes what all have written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.bits import bit_type, has_nan
from tailorcli.checkpoint.folder import INDEX_FILE, SINGLE_FILE, WORK_FOLDER, Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, TensorInfo
from tailorcli.checkpoint.journal import ANEW, Journal, WriteQueue, write_all
from tailorcli.checkpoint.layout import ShardLayout
from tailorcli.errors import NumericalError, OutputError, other_base
from tailorcli.files import as_output_error, write_text_atomically
from tailorcli.system import open_for_writing, sync_path

if TYPE_CHECKING:
    from torch import Tensor

    from tailorcli.checkpoint.bits import Bits

JOURNAL = "journal.jsonl"


class CheckpointWriter:
    """Writes one checkpoint folder on a thread of its own; see the module's docstring for the protocol.

    ``identity`` describes the run (options, inputs, versions): resuming with another one is refused. ``done`` has the
    records of the tensors that are written.
    """

    def __init__(
        self,
        folder: Path,
        layout: ShardLayout,
        identity: dict[str, Any],
        resume: bool,
        rank: int = 0,
        done: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """Begin an output, or go on with it; a further ``rank`` takes part in what the first has begun.

        It is told what is ``done`` by then. Raises OutputError.
        """
        self.folder = folder
        self.layout = layout
        self.done: dict[str, dict[str, Any]] = dict(done or {})
        self._journal = Journal(_journal_of(folder, rank))
        self._queue = WriteQueue("writer")
        self._descriptors: dict[str, int] = {}
        try:
            if rank:
                if not self._journal.path.exists():
                    self._journal.start(identity)
            elif resume and self._journal.path.exists():
                self._restore(identity)
            else:
                self._start(identity)
            for name in layout.headers:  # a run killed while finishing has named some shards already
                path = self._part(name) if self._part(name).exists() else folder / name
                if not path.is_file() or path.stat().st_size != layout.sizes[name]:
                    raise OutputError(f"cannot resume in {folder}: {path.name} is not as the run left it", ANEW)
                self._descriptors[name] = open_for_writing(path)
        except OSError as error:
            raise as_output_error(folder, error) from error

    def _restore(self, identity: dict[str, Any]) -> None:
        """What an interrupted run has written, however many ranks it had."""
        for journal in (self._journal, *map(Journal, _further_journals(self.folder))):
            for entry in journal.load(identity, self.folder):
                self.done[entry["name"]] = entry["record"]
        if not self.done.keys() <= self.layout.slots.keys():
            raise OutputError(f"cannot resume in {self.folder}: its journal is damaged", ANEW)

    @property
    def seconds(self) -> float:
        """Seconds that the thread has worked."""
        return self._queue.seconds

    def _part(self, shard: str) -> Path:
        return _part_of(self.folder, shard)

    def _start(self, identity: dict[str, Any]) -> None:
        """Lay out empty shards with their headers, then the journal: from here on the run can be resumed."""
        self._journal.path.parent.mkdir(parents=True, exist_ok=True)
        for path in (self._journal.path, *_further_journals(self.folder)):
            path.unlink(missing_ok=True)
        for name, header in self.layout.headers.items():
            part = self._part(name)
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as stream:
                stream.write(header)
                stream.truncate(self.layout.sizes[name])
                os.fsync(stream.fileno())
        self._journal.start(identity)

    def write(self, name: str, tensor: Tensor, record: dict[str, Any]) -> None:
        """Queue a tensor's final value and its report; blocks while an earlier tensor is still being written."""
        import torch

        found = tensor.detach().contiguous()
        if found.is_cuda:  # pinned memory takes it ten times as fast, and is used again
            found = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found)
        raw = found.view(-1).view(torch.uint8)
        self.write_bits(name, raw.numpy(), record)

    def write_bits(self, name: str, bits: Bits, record: dict[str, Any]) -> None:
        """``write`` of entries that are given as integers of their width."""
        import numpy as np

        self._queue.submit(lambda: self._write_now(name, [bits.view(np.uint8).data], record))

    def copy(self, name: str, source: Checkpoint, record: dict[str, Any], digest: str | None = None) -> None:
        """Queue a byte copy of a tensor from ``source``; with a SHA-256 ``digest`` its bytes must have it."""
        self._queue.submit(lambda: self._write_now(name, _pieces(source, source.output_tensors[name], digest), record))

    def _write_now(self, name: str, pieces: Iterable[memoryview], record: dict[str, Any]) -> None:
        slot = self.layout.slots[name]
        position = slot.offset
        try:
            for piece in pieces:
                write_all(self._descriptors[slot.shard], piece, position)
                position += len(piece)
            self._journal.add({"name": name, "record": record}, slot.nbytes, self._descriptors[slot.shard])
        except OSError as error:
            raise as_output_error(self._part(slot.shard), error) from error
        self.done[name] = record

    def drain(self) -> None:
        """Wait until everything queued is written and journaled."""
        self._queue.submit(self._journal.sync)
        self._queue.drain()

    def finish(self, side: Mapping[str, Path | bytes], texts: dict[str, str]) -> None:
        """Side files and records first, then the shards' names, then the index: the last one makes it loadable.

        ``side`` gives each side file, by its name relative to the folder, as a file to copy or as its bytes. Raises
        OutputError.
        """
        try:
            self.drain()
            for name, source in side.items():
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(target.name + ".part")  # a link there is not written through
                if isinstance(source, bytes):
                    part.write_bytes(source)
                else:
                    shutil.copyfile(source, part)
                part.replace(target)
            for name, text in texts.items():
                write_text_atomically(self.folder / name, text)
            self._close_files()
            for shard in self.layout.headers:
                if self._part(shard).exists():
                    self._part(shard).replace(self.folder / shard)
            if list(self.layout.headers) != [SINGLE_FILE]:
                write_text_atomically(self.folder / INDEX_FILE, self._index())
            sync_path(self.folder)
            self._journal.path.unlink(missing_ok=True)  # before those of other ranks: it tells that there is more to do
            shutil.rmtree(self.folder / WORK_FOLDER)
        except OSError as error:
            raise as_output_error(self.folder, error) from error

    def _index(self) -> str:
        total = sum(slot.nbytes for slot in self.layout.slots.values())
        weight_map = {name: slot.shard for name, slot in sorted(self.layout.slots.items())}
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"

    def _close_files(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def close(self) -> None:
        """Stop the thread and close the files; what is written stays for ``resume``."""
        self._queue.close()
        if self._descriptors:
            with suppress(OutputError):
                self._journal.sync()
        self._close_files()

    def discard(self) -> None:
        """Remove all that was written: after an error that no resumed run could get over."""
        self.close()
        for shard in self.layout.headers:
            self._part(shard).unlink(missing_ok=True)
        shutil.rmtree(self.folder / WORK_FOLDER, ignore_errors=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_written(folder: Path, layout: ShardLayout, name: str, like: TensorInfo) -> Tensor:
    """The value of a tensor in an output that is not finished, of the dtype and shape of ``like``."""
    slot = layout.slots[name]
    part = _part_of(folder, slot.shard)
    path = part if part.exists() else folder / slot.shard  # a run killed while finishing has named some
    with Checkpoint(folder, {name: replace(like, file=path, offset=slot.offset)}, [path]) as written:
        return written.read(name)


def _part_of(folder: Path, shard: str) -> Path:
    return folder / (shard + ".part")


def _journal_of(folder: Path, rank: int) -> Path:
    """Where a rank lists what it has written."""
    return folder / WORK_FOLDER / (f"journal-{rank}.jsonl" if rank else JOURNAL)


def _further_journals(folder: Path) -> list[Path]:
    """Those of the ranks after the first."""
    return sorted((folder / WORK_FOLDER).glob("journal-*.jsonl"))


def _pieces(source: Checkpoint, info: TensorInfo, digest: str | None) -> Iterable[memoryview]:
    found = hashlib.sha256()
    for piece in source.pieces(info):
        _refuse_nan(piece, info, source)
        if digest is not None:
            found.update(piece)
        yield piece
    if digest is not None and found.hexdigest() != digest:
        raise other_base(info.name, source.path)


def _refuse_nan(piece: memoryview, info: TensorInfo, source: Checkpoint) -> None:
    """A tensor that is only copied may hold infinities, as masks do, but no NaN.

    By the bits that is a twelfth of torch's time, which would also start threads for this one.
    """
    import numpy as np

    if info.dtype in PATCHABLE_DTYPES and has_nan(np.frombuffer(piece, bit_type(info.dtype)), info.dtype):
        raise NumericalError(f"NaN in tensor {info.name!r} of {source.path}", "check this checkpoint")
