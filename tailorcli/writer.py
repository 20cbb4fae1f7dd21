"""Write a checkpoint tensor by tensor into shards whose headers are known beforehand, so that it can be resumed.

While it is written every shard carries the suffix ``.part`` and a journal lists the tensors that are safely on
disk. Only ``finish`` gives the shards their names, the index last: an interrupted output loads as nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, TensorInfo
from tailorcli.errors import NumericalError, OutputError, PatchError
from tailorcli.files import as_output_error, fsync_path, write_text_atomically

if TYPE_CHECKING:
    from torch import Tensor

WORK_FOLDER = ".tailorcli"
JOURNAL = "journal.jsonl"
_ANEW = "start anew with --overwrite"
_SYNC_BYTES = 1 << 28  # journal entries wait until this many bytes of theirs are on disk together


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in the output: a shard's name and the bytes from ``offset`` of it."""

    shard: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ShardLayout:
    """Every shard's header, and every tensor's slot."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    slots: dict[str, Slot]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(self.sizes.values())


def split_shards(sizes: Sequence[tuple[str, int]], max_shard_size: int) -> list[list[str]]:
    """Names in order, cut into shards of at most ``max_shard_size`` bytes; a larger tensor gets a shard alone."""
    shards: list[list[str]] = []
    filled = 0
    for name, nbytes in sizes:
        if not shards or filled + nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def plan_layout(base: Checkpoint, max_shard_size: int | None) -> ShardLayout:
    """Where each tensor goes: the base's own sharding, or a new one under ``max_shard_size`` bytes a shard."""
    if max_shard_size is None:
        by_file: dict[str, list[str]] = {}
        for info in base.tensors.values():
            by_file.setdefault(info.file.relative_to(base.path).as_posix(), []).append(info.name)
    else:
        shards = split_shards([(info.name, info.nbytes) for info in base.tensors.values()], max_shard_size)
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        by_file = dict(zip(names if count > 1 else [SINGLE_FILE], shards, strict=True))
    headers, sizes, slots = {}, {}, {}
    for file_name, tensor_names in by_file.items():
        header, placed = _build_header([base.tensors[name] for name in tensor_names])
        headers[file_name] = header
        for info, offset in placed:
            slots[info.name] = Slot(file_name, offset, info.nbytes)
        sizes[file_name] = len(header) + sum(info.nbytes for info, _ in placed)
    return ShardLayout(headers, sizes, slots)


def _build_header(infos: Sequence[TensorInfo]) -> tuple[bytes, list[tuple[TensorInfo, int]]]:
    """The bytes before the data, padded to a multiple of 8, and each tensor's offset in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, []
    for info in infos:
        entries[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        starts.append(position)
        position += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [(info, len(header) + start) for info, start in zip(infos, starts, strict=True)]


class Journal:
    """The tensors that are safely on disk, a line each, behind a first line that identifies the run.

    A line is only written after the bytes that it vouches for; lines wait until many bytes can be synced at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[str] = []
        self._files: set[int] = set()
        self._nbytes = 0

    def start(self, identity: dict[str, Any]) -> None:
        """A new journal with nothing in it."""
        write_text_atomically(self.path, json.dumps({"identity": identity}) + "\n")

    def load(self, identity: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        """The entries of an earlier run of the same ``identity``; ``folder`` is what the error names."""
        damaged = OutputError(f"cannot resume in {folder}: its journal is damaged", _ANEW)
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
            earlier = dict(json.loads(lines[0])["identity"])
            entries = [dict(json.loads(line)) for line in lines[1:-1]]
            _ = [(str(entry["name"]), dict(entry["record"])) for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise damaged from error
        current = json.loads(json.dumps(identity))  # the same round trip: tuples become lists
        changed = sorted(key for key in {*earlier, *current} if earlier.get(key) != current.get(key))
        if changed:
            details = ", ".join(f"{key}: {earlier.get(key)} then, {current.get(key)} now" for key in changed)
            raise OutputError(f"cannot resume in {folder}: {details}", _ANEW)
        # What follows the last newline was cut off in the middle.
        write_text_atomically(self.path, "".join(line + "\n" for line in lines[:-1]))
        return entries

    def add(self, entry: dict[str, Any], nbytes: int, descriptor: int) -> None:
        """Note an entry whose ``nbytes`` were written to the open file ``descriptor``."""
        self._lines.append(json.dumps(entry) + "\n")
        self._files.add(descriptor)
        self._nbytes += nbytes
        if self._nbytes >= _SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Data first, then the lines that vouch for it. Raises OutputError."""
        try:
            for descriptor in self._files:
                os.fdatasync(descriptor)
            if self._lines:
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.writelines(self._lines)
                    stream.flush()
                    os.fsync(stream.fileno())
        except OSError as error:
            raise as_output_error(self.path, error) from error
        self._lines, self._files, self._nbytes = [], set(), 0


class WriteQueue:
    """Jobs on a thread of their own, in order; ``submit`` blocks while one runs and another waits."""

    def __init__(self, name: str) -> None:
        self.seconds = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._queue: list[Future[None]] = []

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; raises what an earlier one raised."""
        while len(self._queue) > 1:  # one being written, one waiting: bounds the memory that waits here
            self._queue.pop(0).result()
        self._queue.append(self._pool.submit(self._timed, job))

    def _timed(self, job: Callable[[], None]) -> None:
        started = perf_counter()
        job()
        self.seconds += perf_counter() - started

    def drain(self) -> None:
        """Wait until everything queued is done."""
        while self._queue:
            self._queue.pop(0).result()

    def close(self) -> None:
        """Drop what waits and stop the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def write_all(descriptor: int, piece: memoryview, position: int) -> None:
    """``pwrite`` until everything is written."""
    while len(piece):
        count = os.pwrite(descriptor, piece, position)
        piece, position = piece[count:], position + count


class CheckpointWriter:
    """Writes one checkpoint folder on a thread of its own; see the module's docstring for the protocol.

    ``identity`` describes the run (options, inputs, versions): resuming with another one is refused.
    """

    def __init__(self, folder: Path, layout: ShardLayout, identity: dict[str, Any], resume: bool) -> None:
        self.folder = folder
        self.layout = layout
        self.done: dict[str, dict[str, Any]] = {}
        self._journal = Journal(folder / WORK_FOLDER / JOURNAL)
        self._queue = WriteQueue("writer")
        self._descriptors: dict[str, int] = {}
        self._made_folder = not folder.exists()
        try:
            if resume and self._journal.path.exists():
                for entry in self._journal.load(identity, folder):
                    self.done[entry["name"]] = entry["record"]
                if not self.done.keys() <= layout.slots.keys():
                    raise OutputError(f"cannot resume in {folder}: its journal is damaged", _ANEW)
            else:
                self._start(identity)
            for name in layout.headers:  # a run killed while finishing has named some shards already
                path = self._part(name) if self._part(name).exists() else folder / name
                if not path.is_file() or path.stat().st_size != layout.sizes[name]:
                    raise OutputError(f"cannot resume in {folder}: {path.name} is not as the run left it", _ANEW)
                self._descriptors[name] = os.open(path, os.O_RDWR)
        except OSError as error:
            raise as_output_error(folder, error) from error

    @property
    def seconds(self) -> float:
        """Seconds that the thread has worked."""
        return self._queue.seconds

    def _part(self, shard: str) -> Path:
        return self.folder / (shard + ".part")

    def _start(self, identity: dict[str, Any]) -> None:
        """Lay out empty shards with their headers, then the journal: from here on the run can be resumed."""
        self._journal.path.parent.mkdir(parents=True, exist_ok=True)
        self._journal.path.unlink(missing_ok=True)
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

        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self._queue.submit(lambda: self._write_now(name, [raw.numpy().data], record))

    def copy(self, name: str, source: Checkpoint, record: dict[str, Any], digest: str | None = None) -> None:
        """Queue a byte copy of a tensor from ``source``; with a SHA-256 ``digest`` its bytes must have it."""
        self._queue.submit(lambda: self._write_now(name, _pieces(source, source.tensors[name], digest), record))

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

    def read(self, name: str, like: TensorInfo) -> Tensor:
        """The value of a tensor that was written, of the dtype and shape of ``like``."""
        slot = self.layout.slots[name]
        part = self._part(slot.shard)
        path = part if part.exists() else self.folder / slot.shard  # a run killed while finishing has named some
        placed = replace(like, file=path, offset=slot.offset)
        with Checkpoint(self.folder, {name: placed}, [path]) as written:
            return written.read(name)

    def drain(self) -> None:
        """Wait until everything queued is written and journaled."""
        self._queue.submit(self._journal.sync)
        self._queue.drain()

    def finish(self, side: Mapping[str, Path | bytes], texts: dict[str, str]) -> None:
        """Side files and records first, then the shards' names, then the index: the last one makes it loadable.

        ``side`` gives each side file, by its name relative to the folder, as a file to copy or as its bytes.
        """
        try:
            self.drain()
            for name, source in side.items():
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(source, bytes):
                    target.write_bytes(source)
                else:
                    shutil.copyfile(source, target)
            for name, text in texts.items():
                write_text_atomically(self.folder / name, text)
            self._close_files()
            for shard in self.layout.headers:
                if self._part(shard).exists():
                    self._part(shard).replace(self.folder / shard)
            if list(self.layout.headers) != [SINGLE_FILE]:
                write_text_atomically(self.folder / INDEX_FILE, self._index())
            fsync_path(self.folder)
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
        if self._made_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pieces(source: Checkpoint, info: TensorInfo, digest: str | None) -> Iterable[memoryview]:
    found = hashlib.sha256()
    for piece in source.pieces(info):
        _refuse_nan(piece, info, source)
        if digest is not None:
            found.update(piece)
        yield piece
    if digest is not None and found.hexdigest() != digest:
        raise other_base(info.name, source.path)


def other_base(name: str, path: Path) -> PatchError:
    """The error for a base of which a tensor is not that which the patch was made for."""
    return PatchError(
        f"the patch is for another base: tensor {name!r} of {path} is not the one that was patched",
        "pass the checkpoint that the patch was made from: tailorcli inspect PATCH names it",
    )


def _refuse_nan(piece: memoryview, info: TensorInfo, source: Checkpoint) -> None:
    """A tensor that is only copied may hold infinities, as masks do, but no NaN."""
    import torch

    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}.get(info.dtype)
    if dtype is not None and bool(torch.frombuffer(piece, dtype=dtype).isnan().any()):
        raise NumericalError(f"NaN in tensor {info.name!r} of {source.path}", "check this checkpoint")
