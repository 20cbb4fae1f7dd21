"""What a run writes: a checkpoint folder, a patch file, or both: checked, resumed and finished together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli._version import __version__
from tailorcli.checkpoint.folder import INDEX_FILE, WORK_FOLDER, Checkpoint
from tailorcli.checkpoint.header import TensorInfo
from tailorcli.checkpoint.writer import JOURNAL, CheckpointWriter
from tailorcli.errors import CheckpointError, OptionsError, OutputError, PatchError
from tailorcli.files import as_output_error, digest_of, read_bytes, write_text_atomically
from tailorcli.guard import OutputLock, Watch, entries, lock_file, protect
from tailorcli.patchfile.reader import SUFFIX, PatchFile
from tailorcli.patchfile.records import TensorRecord, read_record
from tailorcli.patchfile.report import EVALUATION_FILE, REPORT_FILE, RUN_FILE, PatchReport, load_report
from tailorcli.patchfile.writer import PatchWriter
from tailorcli.runs.card import BASE_CARD, TUNED_CARD
from tailorcli.runs.plan import Plan
from tailorcli.runs.record import RunRecord, load_run
from tailorcli.system import bytes_on_disk
from tailorcli.terminal import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ANOTHER = "choose another folder for -o"
_ANOTHER_FILE = "choose another name for --patch-file"


@dataclass(frozen=True)
class Target:
    """Where a run writes to: the checkpoint ``folder``, the ``patch_file``, or both."""

    folder: Path | None
    patch_file: Path | None = None
    resume: bool = False
    overwrite: bool = False

    @classmethod
    def of(cls, folder: Any, patch_file: Any, *, resume: bool, overwrite: bool) -> Target:
        """A target from paths of any kind; None where that output is not wanted."""
        return cls(
            Path(folder) if folder is not None else None,
            Path(patch_file) if patch_file is not None else None,
            resume,
            overwrite,
        )

    @classmethod
    def needed(cls, folder: Any, patch_file: Any, *, resume: bool, overwrite: bool) -> Target:
        """``of``, for a run that writes. Raises OptionsError where neither output is wanted."""
        if folder is None and patch_file is None:
            raise OptionsError("nothing to write", "pass an output folder, a patch file, or both")
        return cls.of(folder, patch_file, resume=resume, overwrite=overwrite)

    @property
    def place(self) -> Path:
        """The folder, or else the patch file."""
        place = self.folder or self.patch_file
        assert place is not None
        return place

    def check(self, inputs: Sequence[Path], plan: Plan) -> None:
        """Nothing that is there would be lost, and the disk has room. Raises OutputError."""
        protect([self.folder], inputs, _ANOTHER)
        protect([self.patch_file], inputs, _ANOTHER_FILE)
        if self.folder is not None:
            self._check_folder(self.folder)
        if self.patch_file is not None:
            self._check_patch_file(self.patch_file)
        needed = ((self.folder, plan.write_bytes), (self.patch_file, plan.patch_bytes))
        disks: dict[int, int] = {}  # bytes still to be written
        for path, nbytes in needed:
            if path is None:
                continue
            there = existing_parent(path)
            disk, free = there.stat().st_dev, shutil.disk_usage(there).free
            disks[disk] = disks.get(disk, 0) + max(0, nbytes - _unfinished_bytes(path))
            if disks[disk] > free:
                raise OutputError(
                    f"not enough disk for {path}: it needs {disks[disk]:,} bytes, {free:,} are free",
                    "free some or choose another disk",
                )

    def _check_folder(self, output: Path) -> None:
        """The folder is new, or ours to resume or replace."""
        if output.exists() and not output.is_dir():
            raise OutputError(f"{output} exists and is a file", _ANOTHER)
        if not output.exists() or not entries(output):
            return
        if not (self.resume or self.overwrite):
            raise OutputError(f"{output} exists and is not empty", "choose another, or pass --resume or --overwrite")
        ours = (output / WORK_FOLDER).exists() or (output / RUN_FILE).exists()
        if self.resume and not ours:
            raise OutputError(f"{output} holds no run that could be resumed", "choose another folder, or --overwrite")
        if self.overwrite and not ours:
            raise OutputError(f"{output} holds files that tailorcli did not write", _ANOTHER)

    def _check_patch_file(self, file: Path) -> None:
        """The file is new, or ours to resume or replace, and does not lie in the output folder."""
        if file.suffix != SUFFIX:
            raise OutputError(f"the patch file {file} must end in {SUFFIX}", _ANOTHER_FILE)
        if self.folder is not None and file.resolve().is_relative_to(self.folder.resolve()):
            raise OutputError(f"the patch file {file} would lie in {self.folder}", _ANOTHER_FILE)
        if file.is_dir():
            raise OutputError(f"{file} exists and is a folder", _ANOTHER_FILE)
        unfinished = _journal_of(file).exists()
        if not file.exists() and not unfinished:
            return
        if not (self.resume or self.overwrite):
            what = "exists already" if file.exists() else "was begun by an earlier run"
            raise OutputError(f"{file} {what}", "choose another, or pass --resume or --overwrite")
        if file.exists():
            try:
                PatchFile.open(file).close()
            except PatchError as error:
                raise OutputError(f"{file} exists and is no patch file of tailorcli", _ANOTHER_FILE) from error

    def begin(
        self,
        plan: Plan,
        base: Checkpoint,
        inputs: Sequence[Path],
        identity: dict[str, Any],
        command: str,
        side: Mapping[str, Path | bytes],
        manifest: dict[str, Any] | None = None,
        announce: Callable[[Plan], None] | None = None,
        before_replacing: Callable[[], None] | None = None,
    ) -> Outputs | PatchReport:
        """Check that the plan can be written, and start; or the report of the same run, where it has finished earlier.

        ``inputs`` are the paths that no output may touch; ``side`` maps the names of side files to what is copied
        there; ``manifest`` goes into a patch file. ``announce`` is called with the plan when there is work to do,
        ``before_replacing`` before a folder that is there is given up. Raises TailorError.
        """
        self.check(inputs, plan)
        finished = self.finished(identity, command)
        if finished is not None:
            self._remove_leftovers()
            return finished
        if announce is not None:
            announce(plan)
        if before_replacing is not None and self.overwrite and self.folder is not None and self.folder.exists():
            before_replacing()
        return self._open(plan, base, identity, manifest or {}, side)

    def finished(
        self, identity: dict[str, Any], command: str, aside: Container[str] = frozenset()
    ) -> PatchReport | None:
        """The report of a run that had already finished with the same identity, when asked to resume it.

        What stands ``aside`` of the identity may be another, or none. Raises OutputError for another run's output.
        """
        if not self.resume:
            return None
        if self.folder is None:
            if self.patch_file is None or not self._patch_is_finished(identity, aside):
                return None
            with PatchFile.open(self.patch_file) as patch:
                return replace(patch.report(), command=command, is_earlier=True)
        run = _finished_run(self.folder, identity, aside)
        patch_done = self._patch_is_finished(identity, aside)
        if run is None:
            return None
        if not patch_done:
            raise OutputError(
                f"{self.folder} is finished, {self.patch_file} is not",
                "write the patch file by itself: the same command without -o and --resume",
            )
        saved = load_report(self.folder / REPORT_FILE)
        return replace(saved, command=command, stages=run.stages, seconds=run.seconds, is_earlier=True)

    def _remove_leftovers(self) -> None:
        """What a run that was ended after it had written all had no time to remove."""
        for place, is_folder in ((self.folder, True), (self.patch_file, False)):
            if place is None:
                continue
            work = place / WORK_FOLDER if is_folder else _journal_of(place)
            if not work.exists() and not lock_file(place, folder=is_folder).exists():
                continue
            with suppress(OutputError, OSError), OutputLock(place, folder=is_folder):  # it may be there to be read only
                shutil.rmtree(work, ignore_errors=True) if is_folder else work.unlink(missing_ok=True)

    def _patch_is_finished(self, identity: dict[str, Any], aside: Container[str] = frozenset()) -> bool:
        """Whether the patch file, if one is asked for, is there whole; another run's is an error."""
        if self.patch_file is None:
            return True
        if not self.patch_file.exists():
            return False
        with PatchFile.open(self.patch_file) as patch:
            if _without(patch.manifest.run, aside) != _without(identity, aside):
                raise OutputError(
                    f"{self.patch_file} is the finished output of another run", "choose another, or --overwrite"
                )
        return True

    def _open(
        self,
        plan: Plan,
        base: Checkpoint,
        identity: dict[str, Any],
        manifest: dict[str, Any],
        side: Mapping[str, Path | bytes],
    ) -> Outputs:
        """Start writing, or go on after what an interrupted run has safely written."""
        with ExitStack() as locks, ExitStack() as stack:
            folder_writer, patch_writer = None, None
            if self.folder is not None:
                locks.enter_context(OutputLock(self.folder, folder=True))
                self._check_folder(self.folder)  # another run may have ended since
            if self.patch_file is not None:
                locks.enter_context(OutputLock(self.patch_file, folder=False))
                self._check_patch_file(self.patch_file)
            if self.patch_file is not None and self.resume and self._patch_is_finished(identity):
                _journal_of(self.patch_file).unlink(missing_ok=True)  # that it was ended before it could remove
            elif self.patch_file is not None:
                if self.overwrite:
                    self.patch_file.unlink(missing_ok=True)
                infos = [base.tensors[name] for tensor in plan.patched for name in tensor.names]
                contents = _differing(side, base)
                full = {**manifest, "run": identity}
                patch_writer = PatchWriter(self.patch_file, base, infos, full, contents, identity, self.resume)
                stack.callback(patch_writer.close)
            if self.folder is not None:
                unfinished = (self.folder / WORK_FOLDER / JOURNAL).exists()
                if entries(self.folder) and (self.overwrite or not unfinished):
                    if self.resume and _finished_run(self.folder, identity) is not None:
                        raise OutputError(f"another run has just finished {self.folder}", "run the same command again")
                    _clear(self.folder)
                folder_writer = CheckpointWriter(self.folder, plan.layout, identity, self.resume)
                stack.callback(folder_writer.close)
            copies = {tensor.name: tensor.copies for tensor in plan.tensors}
            return Outputs(folder_writer, patch_writer, side, identity, copies, stack.pop_all(), locks.pop_all())


class Outputs:
    """The open outputs of a run; ``done`` names what is written already, ``records`` says what was done to it."""

    def __init__(
        self,
        folder: CheckpointWriter | None,
        patch: PatchWriter | None,
        side: Mapping[str, Path | bytes],
        identity: dict[str, Any],
        copies: Mapping[str, tuple[str, ...]],
        stack: ExitStack,
        locks: ExitStack,
    ) -> None:
        self._folder = folder
        self._patch = patch
        self._side = side
        self._identity = identity
        self._copies = copies
        self._stack = stack
        self._locks = locks
        self.wants_digest = patch is not None
        written = [writer.done for writer in (folder, patch) if writer is not None]
        found = {name: record for name, record in written[0].items() if all(name in done for done in written)}
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
        return None if self._folder is None else self._folder.read(name, like)

    def drain(self) -> None:
        """Wait until everything is written."""
        for writer in (self._patch, self._folder):
            if writer is not None:
                writer.drain()

    def finish(self, report: PatchReport, watch: Watch, text: str | None = None) -> None:
        """Give the outputs their names, the patch file first: a folder that loads comes last.

        ``watch`` is over all that was read: what was made of files that have changed since is removed, and
        CheckpointError raised. ``text`` is what the report file shall hold, if it is not ``report`` itself.
        """
        try:
            watch.require_unchanged()
        except CheckpointError:
            self.discard()
            raise
        text = report.to_json() if text is None else text
        if self._patch is not None:
            self._patch.finish(text)
        if self._folder is not None:
            texts = {REPORT_FILE: text, RUN_FILE: RunRecord.of(report, self._identity, len(self.done)).to_json()}
            self._folder.finish(self._side, texts)

    def discard(self) -> None:
        """Remove what was written, after an error that no resumed run could get over."""
        self._stack.close()
        for writer in (self._folder, self._patch):
            if writer is not None:
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


def identity_of(
    inputs: dict[str, dict[str, str]], options: dict[str, Any], device: torch.device, **more: Any
) -> dict[str, Any]:
    """What decides the bytes of an output, of inputs as reported: a run is only resumed under the same."""
    import torch

    fingerprints = {f"{role} fingerprint": facts["fingerprint"] for role, facts in inputs.items()}
    versions = {"tailorcli": __version__, "torch": torch.__version__, "used device": device.type}
    named = {f"{role} hub": facts["hub"] for role, facts in inputs.items() if "hub" in facts}
    identity = {**versions, **more, **fingerprints, **named, **options}
    return dict(json.loads(json.dumps(identity)))  # as it is read again: tuples become lists


def write_report(report: PatchReport, path: Any) -> None:
    """Write the report as JSON, whole or not at all. Raises OutputError."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(target, report.to_json())
    except OSError as error:
        raise as_output_error(target, error) from error


def progress_bar(tensors: Iterable[Any], what: str, shown: bool) -> Progress:
    """Progress through the bytes of ``tensors``."""
    return Progress(what, sum(tensor.nbytes for tensor in tensors), "B", shown=shown)


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists: where it is, or will be, on disk."""
    resolved = path.resolve()
    return next(parent for parent in (resolved, *resolved.parents) if parent.exists())


def free_bytes(path: Path) -> int:
    """Free bytes of the disk on which ``path`` is, or will be."""
    return shutil.disk_usage(existing_parent(path)).free


def _unfinished_bytes(path: Path) -> int:
    """Disk that the unfinished output of an earlier run takes up already."""
    part = path.with_name(path.name + ".part")
    files = path.rglob("*.part") if path.is_dir() else [part] if part.is_file() else []
    return sum(bytes_on_disk(file) for file in files)


def _without(identity: dict[str, Any], aside: Container[str]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name not in aside}


def _finished_run(folder: Path, identity: dict[str, Any], aside: Container[str] = frozenset()) -> RunRecord | None:
    """The run record of a finished output, whose shards are there; None for an unfinished one.

    Raises OutputError for another run's.
    """
    if (folder / WORK_FOLDER / JOURNAL).exists() or not (folder / RUN_FILE).exists():
        return None
    run = load_run(folder)
    if _without(run.identity, aside) != _without(identity, aside):
        raise OutputError(f"{folder} holds the finished output of another run", "choose another, or --overwrite")
    try:
        Checkpoint.open(folder).close()
    except CheckpointError:
        return None
    return run


def _journal_of(patch_file: Path) -> Path:
    return patch_file.with_name(patch_file.name + ".journal")


def _differing(side: Mapping[str, Path | bytes], base: Checkpoint) -> dict[str, bytes | str]:
    """Side files as a patch holds them: the digest of one that the base has too, the bytes of any other."""
    contents: dict[str, bytes | str] = {}
    for name, source in side.items():
        try:
            content = source if isinstance(source, bytes) else read_bytes(source)
            same = base.path / name
            equal = same.is_file() and read_bytes(same) == content
        except OSError as error:
            raise CheckpointError(f"cannot read {name}: {error.strerror or error}", "check its permissions") from error
        contents[name] = digest_of(content) if equal else content
    return contents


def _clear(folder: Path) -> None:
    """Take an earlier output of ours away so that no moment shows half a checkpoint, nor a run that has finished.

    The work folder marks the output as ours until the new run has begun; the record goes first, the index before its
    shards.
    """
    try:
        with Checkpoint.open(folder) as earlier:
            shards = earlier.shards
    except CheckpointError:  # unfinished or damaged
        shards = list(folder.glob("*.safetensors"))
    try:
        (folder / WORK_FOLDER).mkdir(exist_ok=True)
        for first in (RUN_FILE, f"{WORK_FOLDER}/{JOURNAL}", INDEX_FILE):
            (folder / first).unlink(missing_ok=True)
        for path in [*shards, *folder.rglob("*.safetensors.part")]:
            path.unlink(missing_ok=True)
        for name in (REPORT_FILE, EVALUATION_FILE, TUNED_CARD, BASE_CARD):
            (folder / name).unlink(missing_ok=True)
        for path in (folder / WORK_FOLDER).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise as_output_error(folder, error) from error
