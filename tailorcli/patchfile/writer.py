"""Write a patch file tensor by tensor, so that an interrupted run can go on (the format: docs/reference/formats.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import TensorInfo, build_header, header_entry
from tailorcli.checkpoint.journal import Journal, WriteQueue, write_all
from tailorcli.errors import OutputError
from tailorcli.files import as_output_error, digest_of
from tailorcli.patchfile.coding import CODINGS, PADDING, pad_byte
from tailorcli.patchfile.manifest import PatchTensor, SideFile, read_patch_tensor
from tailorcli.patchfile.reader import (
    FILE,
    FORMAT_VERSION,
    MASK,
    METADATA_KEY,
    VALUES,
)
from tailorcli.patchfile.report import REPORT_FILE
from tailorcli.patchfile.spool import (
    Placed,
    Spooled,
    SpoolWriter,
    encode_kept,
    padding_after,
    placed_in_order,
    ranks_with_spools,
    remove_spools,
    spooled_earlier,
    unfinished,
)
from tailorcli.system import open_for_writing, sync_path
from tailorcli.typed import list_of, read_count, read_text

if TYPE_CHECKING:
    from torch import Tensor

_DIGEST = "0" * 64  # in the place of one that is not known yet
_SPARE = 4096  # bytes of the header left free: a resumed run may name its inputs by longer paths


class PatchWriter:
    """Writes one patch file on a thread of its own; like a checkpoint it can be resumed and is finished in one step.

    The data are appended to ``FILE.part`` behind room for the header, whose size is known beforehand but whose
    content is not. ``FILE.journal`` lists what is safely written.

    Where several ranks write, each spools its tensors (``patchfile.spool``), and so does a single one that goes on
    after them: ``places`` and ``take`` then come before ``finish``.
    """

    def __init__(
        self,
        file: Path,
        base: Checkpoint,
        shapes: Sequence[TensorInfo],
        manifest: dict[str, Any],
        side: dict[str, bytes | str],
        identity: dict[str, Any],
        resume: bool,
        divided: bool = False,
    ) -> None:
        """Open the file for writing; ``divided`` among ranks, of which this is the first.

        ``shapes`` are the tensors to come, in order; ``side`` maps side files to bytes, or to their digest where
        the base has the same. Raises OutputError.
        """
        self.file = file
        self.done: dict[str, dict[str, Any]] = {}
        self._side = side
        self._manifest = {"format_version": FORMAT_VERSION, **manifest}
        self._base = base
        self._base_tensors = describe_base(base)  # each gets its digest when its turn comes
        self._entries: dict[str, PatchTensor] = {}
        self._sizes: dict[str, tuple[int, int]] = {}  # bytes of the mask and of the values
        self._infos = {info.name: info for info in shapes}
        self._needed = self._longest_header()
        self._reserved = self._needed + _SPARE
        self._position = self._reserved
        self._part = unfinished(file)
        self._journal = Journal(file.with_name(file.name + ".journal"))
        self._queue = WriteQueue("patch writer")
        self._spooled: dict[str, Spooled] = {}  # that wait in the spools of earlier runs
        self._spool: SpoolWriter | None = None
        try:
            if resume and self._journal.path.exists() and self._part.exists():
                self._restore(self._journal.load(identity, file))
                self._restore_spools(identity)
            else:
                remove_spools(file)
                file.parent.mkdir(parents=True, exist_ok=True)
                self._journal.path.unlink(missing_ok=True)
                self._part.write_bytes(b"")
                self._journal.start(identity)
            self._descriptor: int = open_for_writing(self._part)
            os.ftruncate(self._descriptor, self._position)
            if divided or self._spooled or ranks_with_spools(file):
                self._spool = SpoolWriter(file, 0, identity, self.done, base)
        except OSError as error:
            raise as_output_error(file, error) from error

    @property
    def seconds(self) -> float:
        """Seconds that the thread has worked."""
        return self._queue.seconds + (self._spool.seconds if self._spool is not None else 0.0)

    def _restore(self, entries: list[dict[str, Any]]) -> None:
        damaged = OutputError(f"cannot resume {self.file}: its journal is damaged", "start anew with --overwrite")
        try:
            for entry in entries:
                name = str(entry["name"])
                self._base_tensors[name]["sha256"] = read_text(entry["sha256"])
                self.done[name] = dict(entry["record"])
                if "entry" not in entry:
                    continue
                self._infos[name]
                mask, values = list_of(read_count)(entry["bytes"])
                if not self._entries:  # the room that was left for the header then
                    self._reserved = self._position = read_count(entry["at"])
                    if self._reserved < self._needed:
                        raise OutputError(
                            f"cannot resume {self.file}: its inputs are named by much longer paths now",
                            "name them as before, or start anew with --overwrite",
                        )
                if entry["at"] != self._position:
                    raise ValueError(entry["at"])
                self._entries[name] = read_patch_tensor(entry["entry"])
                self._sizes[name] = (mask, values)
                self._position += mask + values
        except (KeyError, TypeError, ValueError) as error:
            raise damaged from error
        if self._entries and self._part.stat().st_size < self._position:
            raise damaged

    def _restore_spools(self, identity: dict[str, Any]) -> None:
        for entry, spooled in spooled_earlier(self.file, identity):
            name = str(entry["name"])
            if name not in self._base_tensors or (spooled is not None and name not in self._infos):
                raise OutputError(f"cannot resume {self.file}: its journal is damaged", "start anew with --overwrite")
            self._base_tensors[name]["sha256"] = entry["sha256"]
            self.done[name] = dict(entry["record"])
            if spooled is not None:
                self._spooled[name] = spooled

    def write(self, name: str, mask: Tensor, patched: Tensor, record: dict[str, Any], base_digest: str) -> None:
        """Queue a tensor: its mask, its final values (of which the kept ones are stored), its report.

        ``base_digest`` is the SHA-256 of the base's bytes.
        """
        if self._spool is not None:
            self._spool.write(name, mask, patched, record, base_digest)
            return
        flat, values = mask.detach().cpu().reshape(-1), patched.detach().cpu().reshape(-1)
        if name not in self.done:
            self._queue.submit(lambda: self._write_now(name, flat, values, record, base_digest))

    def note(self, name: str, record: dict[str, Any]) -> None:
        """Queue a tensor that stays at base: only the digest of its bytes is taken down."""
        if self._spool is not None:
            self._spool.note(name, record)
        elif name not in self.done:
            self._queue.submit(lambda: self._note_now(name, record))

    def _note_now(self, name: str, record: dict[str, Any]) -> None:
        digest = digest_of(*self._base.pieces(self._base.tensors[name]))
        self._base_tensors[name]["sha256"] = digest
        self._journal.add({"name": name, "record": record, "sha256": digest}, 0, self._descriptor)
        self.done[name] = record

    def _write_now(self, name: str, mask: Tensor, patched: Tensor, record: dict[str, Any], base_digest: str) -> None:
        import numpy as np

        coding, codes, kept, values = encode_kept(mask, patched)
        padding = padding_after(self._position, codes.size)
        codes = np.append(codes, np.full(padding, pad_byte(coding), dtype=np.uint8))
        entry = PatchTensor(kept, coding, digest_of(codes.data, values))
        try:
            write_all(self._descriptor, codes.data, self._position)
            write_all(self._descriptor, values, self._position + codes.size)
            line = {"name": name, "record": record, "sha256": base_digest, "entry": asdict(entry)}
            place = {"at": self._position, "bytes": [codes.size, len(values)]}
            self._journal.add(line | place, codes.size + len(values), self._descriptor)
        except OSError as error:
            raise as_output_error(self._part, error) from error
        self._position += codes.size + len(values)
        self._base_tensors[name]["sha256"] = base_digest
        self._entries[name] = entry
        self._sizes[name] = (codes.size, len(values))
        self.done[name] = record

    def drain(self) -> None:
        """Wait until everything queued is written and journaled. Raises OutputError."""
        if self._spool is not None:
            self._spool.drain()
        self._queue.submit(self._journal.sync)
        self._queue.drain()

    @property
    def spool(self) -> SpoolWriter | None:
        """What this rank has spooled, where tensors are."""
        return self._spool

    def places(self, spooled: Mapping[str, Spooled], digests: Mapping[str, str]) -> dict[str, Placed]:
        """Where each tensor that waits in a spool goes; ``spooled`` are those of this run, of all ranks.

        ``digests`` are the SHA-256 of the base's bytes of every tensor of this run. The order is that of one process.
        """
        for name, digest in digests.items():
            self._base_tensors[name]["sha256"] = digest
        self._spooled.update(spooled)
        return placed_in_order(
            {name: self._spooled[name] for name in self._infos if name in self._spooled}, self._position
        )

    def take(self, places: Mapping[str, Placed], digests: Mapping[str, str]) -> None:
        """Take note of tensors that lie in their ``places`` now; ``digests`` are of their masks and values."""
        for name, place in places.items():
            self._entries[name] = PatchTensor(place.spooled.kept, place.spooled.coding, digests[name])
            self._sizes[name] = (place.codes, place.spooled.values)
            self._position = place.end

    def finish(self, report: str) -> None:
        """The side files and the report, then the header, then the file's name. Raises OutputError."""
        try:
            self.drain()
            side = {**self._side, REPORT_FILE: report.encode()}
            stored = {name: content for name, content in side.items() if isinstance(content, bytes)}
            for content in stored.values():
                write_all(self._descriptor, memoryview(content), self._position)
                self._position += len(content)
            sizes = {name: len(content) for name, content in stored.items()}
            header = self._header(self._entries, self._sizes, sizes, _describe(side), self._reserved)
            assert len(header) == self._reserved, "no header is longer than the longest"
            write_all(self._descriptor, memoryview(header), 0)
            os.ftruncate(self._descriptor, self._position)
            os.fsync(self._descriptor)
            self._close_file()  # Windows names no open file anew
            self._part.replace(self.file)
            if self._spool is not None:
                self._spool.close()
                remove_spools(self.file)
            self._journal.path.unlink(missing_ok=True)  # the last: it tells that there is more to take away
            sync_path(self.file.parent)
        except OSError as error:
            raise as_output_error(self.file, error) from error

    def _longest_header(self) -> int:
        """The header's size with every number as long as it can get."""
        longest = max(CODINGS, key=len)
        entries = {n: PatchTensor(info.numel, longest, _DIGEST) for n, info in self._infos.items()}
        sizes = {name: (info.nbytes + PADDING, info.nbytes) for name, info in self._infos.items()}
        stored = {name: len(content) for name, content in self._side.items() if isinstance(content, bytes)}
        side: dict[str, bytes | str] = {**self._side, REPORT_FILE: b""}
        return len(self._header(entries, sizes, {**stored, REPORT_FILE: 1 << 40}, _describe(side)))

    def _header(
        self,
        entries: dict[str, PatchTensor],
        sizes: dict[str, tuple[int, int]],
        stored: dict[str, int],
        side: dict[str, Any],
        room: int = 0,
    ) -> bytes:
        base = {"fingerprint": self._base.fingerprint(), "tensors": self._base_tensors}
        manifest = {
            **self._manifest,
            "base": base,
            "tensors": {n: asdict(e) for n, e in entries.items()},
            "side_files": side,
        }
        header: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(manifest, separators=(",", ":"))}}
        position = 0
        for name, (mask, values) in sizes.items():
            dtype = self._infos[name].dtype
            kept = entries[name].kept
            header[MASK + name] = header_entry("U8", [mask], position, position + mask)
            header[VALUES + name] = header_entry(dtype, [kept], position + mask, position + mask + values)
            position += mask + values
        for name, nbytes in stored.items():
            header[FILE + name] = header_entry("U8", [nbytes], position, position + nbytes)
            position += nbytes
        return build_header(header, room)

    def close(self) -> None:
        """Stop the thread and close the file; what is written stays for ``resume``."""
        self._queue.close()
        if self._spool is not None:
            self._spool.close()
        if self._descriptor >= 0:
            if self._journal.path.exists():  # not where all is finished
                with suppress(OutputError):
                    self._journal.sync()
            self._close_file()

    def _close_file(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def discard(self) -> None:
        """Remove all that was written: after an error that no resumed run could get over."""
        self.close()
        self._part.unlink(missing_ok=True)
        remove_spools(self.file)
        self._journal.path.unlink(missing_ok=True)


def _describe(side: dict[str, bytes | str]) -> dict[str, Any]:
    """The metadata's entries of side files that are stored (bytes) or only known by their digest."""
    described = {}
    for name, content in side.items():
        stored = isinstance(content, bytes)
        described[name] = asdict(SideFile(digest_of(content) if isinstance(content, bytes) else content, stored))
    return described


def describe_base(base: Checkpoint) -> dict[str, dict[str, Any]]:
    """Every tensor of the base as the metadata holds it, but for the digest of its bytes."""
    return {
        name: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "fingerprint": base.tensor_fingerprint(info),
            "sha256": _DIGEST,
        }
        for name, info in base.tensors.items()
    }
