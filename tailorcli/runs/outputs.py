"""What a run writes: a checkpoint folder, a patch file, or both: checked, resumed and finished together."""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli._version import __version__
from tailorcli.checkpoint.folder import BASE_CARD, INDEX_FILE, TUNED_CARD, WORK_FOLDER, Checkpoint
from tailorcli.checkpoint.writer import JOURNAL, CheckpointWriter
from tailorcli.distributed import ranks, require_shared, told
from tailorcli.errors import CheckpointError, OptionsError, OutputError, PatchError
from tailorcli.files import as_output_error, digest_of, read_bytes, write_text
from tailorcli.guard import OutputLock, entries, lock_file, protect
from tailorcli.patchfile.reader import SUFFIX, PatchFile
from tailorcli.patchfile.report import EVALUATION_FILE, REPORT_FILE, RUN_FILE, PatchReport, load_report
from tailorcli.patchfile.spool import SpoolWriter, remove_spools
from tailorcli.patchfile.writer import PatchWriter
from tailorcli.runs.plan import Plan
from tailorcli.runs.record import RunRecord, load_run
from tailorcli.runs.writing import Outputs, Written
from tailorcli.system import bytes_on_disk
from tailorcli.terminal import Progress

if TYPE_CHECKING:
    import torch

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

    @property
    def scratch(self) -> Path:
        """Where files may lie while the run goes on: a finished output folder has none of them."""
        return self.place.parent if self.folder is None else self.folder / WORK_FOLDER

    def check(self, inputs: Sequence[Path], plan: Plan) -> None:
        """Nothing that is there would be lost, and the disk has room. Raises OutputError."""
        protect([self.folder], inputs, _ANOTHER)
        protect([self.patch_file], inputs, _ANOTHER_FILE)
        if self.folder is not None:
            self._check_folder(self.folder)
        if self.patch_file is not None:
            self._check_patch_file(self.patch_file)
        spooled = 1 if ranks().alone else 2  # ranks hold a patch file in parts until all have their places
        needed = ((self.folder, plan.write_bytes), (self.patch_file, spooled * plan.patch_bytes))
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
        try:
            unfinished = _journal_of(file).exists()
        except OSError as error:
            raise as_output_error(file, error) from error
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
        divided: bool = False,
    ) -> Outputs | PatchReport:
        """Check that the plan can be written, and start; or the report of the same run, where it has finished earlier.

        ``inputs`` are the paths that no output may touch; ``side`` maps the names of side files to what is copied
        there; ``manifest`` goes into a patch file. ``announce`` is called with the plan when there is work to do,
        ``before_replacing`` before a folder that is there is given up. Of several ranks each calls it: the first
        checks and starts, and with ``divided`` each writes what it is given, else the first alone. Raises TailorError.
        """
        with ExitStack() as stack:
            outputs: Outputs | None = None
            begun: Written | PatchReport | None = None
            if ranks().first:
                self.check(inputs, plan)
                begun = self.finished(identity, command)
                if begun is not None:
                    self.remove_leftovers()
                else:
                    if announce is not None:
                        announce(plan)
                    replaces = self.overwrite and self.folder is not None and self.folder.exists()
                    if before_replacing is not None and replaces:
                        before_replacing()
                    among_ranks = divided and not ranks().alone
                    outputs = stack.enter_context(self._open(plan, base, identity, manifest or {}, side, among_ranks))
                    begun = outputs.written
            begun = told(begun)
            assert begun is not None
            if isinstance(begun, PatchReport):
                return begun
            for place in self._marks(begun):
                require_shared(place)
            stack.pop_all()
            return outputs or self._join(plan, base, identity, side, begun, divided)

    def _marks(self, written: Written) -> list[Path]:
        """What the first rank has made, and every other must see."""
        marks = [] if self.folder is None else [self.folder / WORK_FOLDER / JOURNAL]
        return marks if self.patch_file is None or written.patch is None else [*marks, _journal_of(self.patch_file)]

    def _join(
        self,
        plan: Plan,
        base: Checkpoint,
        identity: dict[str, Any],
        side: Mapping[str, Path | bytes],
        written: Written,
        divided: bool,
    ) -> Outputs:
        """Take part, as a further rank, in what the first has begun and found ``written``."""
        rank = ranks().rank
        with ExitStack() as stack:
            folder, patch = None, None
            if divided and self.patch_file is not None and written.patch is not None:
                patch = SpoolWriter(self.patch_file, rank, identity, written.patch, base)
                stack.callback(patch.close)
            if divided and self.folder is not None:
                folder = CheckpointWriter(self.folder, plan.layout, identity, self.resume, rank, written.folder)
                stack.callback(folder.close)
            copies = {tensor.name: tensor.copies for tensor in plan.tensors}
            return Outputs(
                (self.folder, self.patch_file),
                folder,
                patch,
                written,
                plan.layout,
                side,
                identity,
                copies,
                stack.pop_all(),
                ExitStack(),
            )

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

    def remove_leftovers(self) -> None:
        """What a run that was ended after it had written all had no time to remove."""
        for place, is_folder in ((self.folder, True), (self.patch_file, False)):
            if place is None:
                continue
            work = place / WORK_FOLDER if is_folder else _journal_of(place)
            if not work.exists() and not lock_file(place, folder=is_folder).exists():
                continue
            with suppress(OutputError, OSError), OutputLock(place, folder=is_folder):  # it may be there to be read only
                shutil.rmtree(work, ignore_errors=True) if is_folder else _remove_journals(place)

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
        divided: bool,
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
                _remove_journals(self.patch_file)  # that it was ended before it could remove
            elif self.patch_file is not None:
                if self.overwrite:
                    self.patch_file.unlink(missing_ok=True)
                infos = [base.tensors[name] for tensor in plan.patched for name in tensor.names]
                contents = _differing(side, base)
                full = {**manifest, "run": identity}
                patch_writer = PatchWriter(self.patch_file, base, infos, full, contents, identity, self.resume, divided)
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
            written = Written(*(None if w is None else dict(w.done) for w in (folder_writer, patch_writer)))
            ends = (stack.pop_all(), locks.pop_all())
            return Outputs(
                (self.folder, self.patch_file),
                folder_writer,
                patch_writer,
                written,
                plan.layout,
                side,
                identity,
                copies,
                *ends,
            )


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
    write_text(Path(path), report.to_json())


def progress_bar(tensors: Iterable[Any], what: str, shown: bool) -> Progress:
    """Progress through the bytes of ``tensors``; of several ranks the first shows it."""
    return Progress(what, sum(tensor.nbytes for tensor in tensors), "B", shown=shown and ranks().first)


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists: where it is, or will be, on disk."""
    resolved = path.resolve()
    return next(parent for parent in (resolved, *resolved.parents) if parent.exists())


def free_bytes(path: Path) -> int:
    """Free bytes of the disk on which ``path`` is, or will be."""
    return shutil.disk_usage(existing_parent(path)).free


def _unfinished_bytes(path: Path) -> int:
    """Disk that the unfinished output of an earlier run takes up already."""
    files = path.rglob("*.part") if path.is_dir() else path.parent.glob(f"{glob.escape(path.name)}.*part")
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


def _remove_journals(patch_file: Path) -> None:
    """Take away what a finished patch file was made with, the journal that marks it last. Raises OSError."""
    remove_spools(patch_file)
    _journal_of(patch_file).unlink(missing_ok=True)


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
