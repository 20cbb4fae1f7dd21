"""The open outputs of a run: what is written into a checkpoint folder and a patch file, and how both are finished."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import TensorInfo
from tailorcli.checkpoint.layout import ShardLayout
from tailorcli.checkpoint.writer import CheckpointWriter, read_written
from tailorcli.distributed import gathered, ranks, told, wait_for_all
from tailorcli.errors import CheckpointError, OutputError
from tailorcli.guard import Watch
from tailorcli.patchfile.records import TensorRecord, read_record
from tailorcli.patchfile.report import REPORT_FILE, RUN_FILE, PatchReport
from tailorcli.patchfile.spool import SpoolWriter, copy_into
from tailorcli.patchfile.writer import PatchWriter
from tailorcli.runs.record import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from tailorcli.checkpoint.bits import Bits


@dataclass(frozen=True)
class Written:
    """The records of the tensors that each output holds as a run begins; None for one that is not to be written."""

    folder: dict[str, dict[str, Any]] | None
    patch: dict[str, dict[str, Any]] | None


class Outputs:
    """The open outputs of a run; ``done`` names what is written already, ``records`` says what was done to it.

    ``places`` are the folder and the patch file. A further rank has no writers where the first writes all.
    """

    def __init__(
        self,
        places: tuple[Path | None, Path | None],
        folder: CheckpointWriter | None,
        patch: PatchWriter | SpoolWriter | None,
        written: Written,
        layout: ShardLayout,
        side: Mapping[str, Path | bytes],
        identity: dict[str, Any],
        copies: Mapping[str, tuple[str, ...]],
        stack: ExitStack,
        locks: ExitStack,
    ) -> None:
        self.written = written
        self._place, self._patch_file = places
        self._folder = folder
        self._patch = patch
        self._layout = layout
        self._side = side
        self._identity = identity
        self._copies = copies
        self._stack = stack
        self._locks = locks
        self.wants_digest = patch is not None
        each = [done for done in (written.folder, written.patch) if done is not None]
        found = {name: record for name, record in each[0].items() if all(name in done for done in each)}
        # A tensor that is stored under further names is done when all of these are.
        self.done = frozenset(name for name in found if all(copy in found for copy in copies.get(name, ())))
        self.records = {name: _record_again(found[name]) for name in self.done if found[name]}

    @property
    def seconds(self) -> float:
        """Seconds of writing."""
        return sum(writer.seconds for writer in (self._folder, self._patch) if writer is not None)

    def write(
        self, name: str, patched: Tensor, mask: Tensor | None, record: TensorRecord | None, base_digest: str
    ) -> None:
        """Queue a patched tensor; mask and digest of the base are for a patch file (``wants_digest``)."""
        for each, own in self._by_name(name, record):
            if self._folder is not None and each not in self._folder.done:
                self._folder.write(each, patched, _plain(own))
            if self._patch is not None and mask is not None and each not in self._patch.done:
                self._patch.write(each, mask, patched, _plain(own), base_digest)

    def write_bits(self, name: str, bits: Bits) -> None:
        """Queue a tensor for the folder alone, without a record, as integers of its entries' width."""
        for each, own in self._by_name(name, None):
            if self._folder is not None and each not in self._folder.done:
                self._folder.write_bits(each, bits, _plain(own))

    def copy(self, name: str, base: Checkpoint, record: TensorRecord | None, digest: str | None = None) -> None:
        """Queue a tensor that stays as it is in the base; with a ``digest`` its bytes must have it."""
        for each, own in self._by_name(name, record):
            if self._folder is not None and each not in self._folder.done:
                self._folder.copy(each, base, _plain(own), digest)
            if self._patch is not None and each not in self._patch.done:
                self._patch.note(each, _plain(own))

    def _by_name(self, name: str, record: TensorRecord | None) -> list[tuple[str, TensorRecord | None]]:
        """A tensor's record under each of its names."""
        copies = self._copies.get(name, ())
        if record is None:
            return [(each, None) for each in (name, *copies)]
        return [*records_of(name, copies, record).items()]

    def read(self, name: str, like: TensorInfo) -> Tensor | None:
        """The value of a tensor of ``done`` from the checkpoint that is being written; None where none is."""
        return None if self._place is None else read_written(self._place, self._layout, name, like)

    def drain(self) -> None:
        """Wait until everything is written."""
        for writer in (self._patch, self._folder):
            if writer is not None:
                writer.drain()

    def finish(self, report: PatchReport, watch: Watch, text: str | None = None) -> None:
        """Give the outputs their names, the patch file first: a folder that loads comes last.

        ``watch`` is over all that was read: what was made of files that have changed since is removed, and
        CheckpointError raised. ``text`` is what the report file shall hold, if it is not ``report`` itself. Of several
        ranks each calls it, with a report that is the first's to write: it comes back when the outputs are there.
        """
        self.drain()
        self._require_unchanged(watch)
        text = report.to_json() if text is None else text
        self._join_spools()
        if not ranks().first:
            self._stack.close()
        elif self._patch is not None:
            assert isinstance(self._patch, PatchWriter)
            self._patch.finish(text)
        if self._folder is not None and ranks().first:
            texts = {REPORT_FILE: text, RUN_FILE: RunRecord.of(report, self._identity, len(self.done)).to_json()}
            self._folder.finish(self._side, texts)
        wait_for_all("the outputs to get their names")

    def _require_unchanged(self, watch: Watch) -> None:
        """No rank has read what was changed meanwhile; all have written all by then. Raises CheckpointError."""
        changed = None
        try:
            watch.require_unchanged()
        except CheckpointError as error:
            changed = (error.message, error.hint)
        told_by = [found for found in gathered(changed) if found is not None]
        if told_by:
            self.discard()
            raise CheckpointError(*told_by[0])

    def _join_spools(self) -> None:
        """Give what the ranks have spooled of a patch file its places there; each copies what lies in its own spool."""
        writer = self._patch
        spool = writer.spool if isinstance(writer, PatchWriter) else writer
        if spool is None:
            return
        assert self._patch_file is not None
        here, places = ranks(), {}
        spooled = gathered((spool.tensors, spool.digests))
        if isinstance(writer, PatchWriter):
            tensors = {name: entry for part, _ in spooled for name, entry in part.items()}
            places = writer.places(tensors, {name: digest for _, part in spooled for name, digest in part.items()})
        places = told(places)
        own = {name: place for name, place in places.items() if place.spooled.rank % here.size == here.rank}
        copied = gathered(copy_into(self._patch_file, own))
        if isinstance(writer, PatchWriter):
            writer.take(places, {name: digest for part in copied for name, digest in part.items()})

    def discard(self) -> None:
        """Remove what was written, after an error that no resumed run could get over: the first rank does that."""
        self._stack.close()
        for writer in (self._folder, self._patch):
            if ranks().first and isinstance(writer, (CheckpointWriter, PatchWriter)):
                writer.discard()
        self._locks.close()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._locks.close()


def _plain(record: TensorRecord | None) -> dict[str, Any]:
    """A record as a journal holds it."""
    return {} if record is None else record.to_dict()


def _record_again(value: dict[str, Any]) -> TensorRecord:
    """A record as an interrupted run wrote it into its journal. Raises OutputError."""
    try:
        return read_record(value)
    except ValueError as error:
        raise OutputError(f"cannot resume: the journal is damaged: {error}", "start anew with --overwrite") from error


def records_of(name: str, copies: Iterable[str], record: TensorRecord) -> dict[str, TensorRecord]:
    """The record of a tensor and, with a note, of its copies under further names."""
    shown = f"one tensor with {name}"
    return {name: record} | {copy: replace(record, name=copy, note=shown) for copy in copies}
