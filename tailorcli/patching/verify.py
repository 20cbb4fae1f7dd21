"""Whether a patched checkpoint is what its patch says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.bits import num_differing, number
from tailorcli.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint
from tailorcli.checkpoint.header import TensorInfo, read_header
from tailorcli.checkpoint.readahead import ReadAhead
from tailorcli.distributed import gathered, mine, now_on
from tailorcli.errors import CheckpointError, other_base
from tailorcli.files import PathLike, digest_of, read_json, same_bytes
from tailorcli.guard import Watch
from tailorcli.hub import local_folders
from tailorcli.patchfile.reader import PatchFile
from tailorcli.patchfile.report import REPORT_FILE, load_report
from tailorcli.patchfile.view import patch_, read_hashed
from tailorcli.runs.outputs import progress_bar

if TYPE_CHECKING:
    from tailorcli.checkpoint.bits import Bits

MOST_PROBLEMS = 20  # named one by one; all are counted


@dataclass
class VerifyReport:
    """What ``verify_checkpoint`` found; ``problems`` names the first tensors that are not as they must be.

    Without a patch, ``against`` is "report": it is then only proven which tensors equal the base, and that no
    other differs from it in more entries than its mask kept.
    """

    checkpoint: str
    against: str
    tensors: int = 0
    entries: int = 0
    kept: int = 0
    changed: int = 0  # entries that differ from the base
    wrong_tensors: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything is as it must be."""
        return self.wrong_tensors == 0

    def add(self, name: str, problem: str, **details: Any) -> None:
        """Count a tensor that is wrong, and name it if it is one of the first."""
        self.wrong_tensors += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append({"tensor": name, "problem": problem, **details})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {"ok": self.ok, **asdict(self)}


def verify_checkpoint(
    checkpoint: PathLike, base: PathLike, patch: PathLike | None = None, progress: bool = False
) -> VerifyReport:
    """Compare ``checkpoint`` bit for bit with ``base`` outside the mask, and with ``patch`` inside it.

    Without a patch file the checkpoint's own report says how many entries of each tensor may differ from the base.
    Raises TailorError where an input cannot be read or ``patch`` is not of ``base``.
    """
    with ExitStack() as stack:
        checkpoint, base = local_folders((checkpoint, base))
        opened = stack.enter_context(Checkpoint.open(base))
        found = stack.enter_context(Checkpoint.open(checkpoint))
        watch = Watch([*opened.shards, *found.shards, *([] if patch is None else [Path(patch)])])
        file = None
        kept: dict[str, int] = {}
        if patch is not None:
            file = stack.enter_context(PatchFile.open(patch))
            file.check_base(opened)
        else:
            kept = _kept_by_report(found, opened)
        report = VerifyReport(str(found.path), "patch" if file is not None else "report")
        _check_files(found, report)
        for name in found.tensors:
            if name not in opened.tensors:
                report.add(name, "the base has no such tensor")
        infos = list(opened.tensors.values())
        own = [infos[position] for position in sorted(mine([info.nbytes for info in infos]))]
        if file is not None:
            file.check([info.name for info in own if info.name in file.tensors])
        part = VerifyReport(report.checkpoint, report.against)
        bar = stack.enter_context(progress_bar(own, "verifying", progress))
        for info, pair in _with_values(own, opened, found, file, kept):
            now_on(info.name)
            part.tensors += 1
            part.entries += info.numel
            _verify_tensor(info.name, pair, opened, found, file, kept, part)
            del pair
            bar.update(info.nbytes)
        now_on("")
        watch.require_unchanged()
        _join(report, gathered(part), list(opened.tensors))
        return report


def _join(report: VerifyReport, parts: Sequence[VerifyReport], order: Sequence[str]) -> None:
    """Add what ranks found of their parts of the tensors; problems come in the ``order`` of the tensors' names."""
    for part in parts:
        for name in ("tensors", "entries", "kept", "changed", "wrong_tensors"):
            setattr(report, name, getattr(report, name) + getattr(part, name))
    places = {name: place for place, name in enumerate(order)}
    found = sorted((problem for part in parts for problem in part.problems), key=lambda p: places[p["tensor"]])
    report.problems = [*report.problems, *found][:MOST_PROBLEMS]


def _kept_by_report(found: Checkpoint, base: Checkpoint) -> dict[str, int]:
    """How many entries of each patched tensor the checkpoint's own report says were kept."""
    path = found.path / REPORT_FILE
    hint = "pass the patch: --patch FILE"
    if not path.exists():
        raise CheckpointError(f"{found.path} has no {REPORT_FILE} that would say what was kept", hint)
    saved = load_report(path)
    if saved.inputs["base"]["fingerprint"] != base.fingerprint():
        raise CheckpointError(f"{path} says that it was made from another base than {base.path}", hint)
    return {tensor.name: tensor.kept for tensor in saved.tensors if tensor.patched}


def _check_files(found: Checkpoint, report: VerifyReport) -> None:
    """What headers and index say besides names, shapes and places: they must be fit to load."""
    for shard in found.shards:
        _, metadata = read_header(shard)
        if metadata and metadata.get("format") != "pt":
            report.add(shard.name, "its metadata does not say that it holds PyTorch tensors")
    if found.shards[0].name == SINGLE_FILE:
        return
    index = read_json(found.path / INDEX_FILE)
    total = index.get("metadata", {}).get("total_size") if isinstance(index.get("metadata"), dict) else None
    if total != found.nbytes:
        report.add(INDEX_FILE, f"its total_size is {total}, the shards hold {found.nbytes} bytes")


@dataclass
class _Pair:
    """One tensor of both checkpoints; ``digest`` waits for that of the base's bytes, where a patch names one."""

    base: Bits
    digest: Callable[[], str]
    found: Bits


def _with_values(
    infos: Sequence[TensorInfo], base: Checkpoint, found: Checkpoint, file: PatchFile | None, kept: dict[str, int]
) -> Iterator[tuple[TensorInfo, _Pair | None]]:
    """Each tensor, with its values where they may differ by a mask; the next are read and hashed ahead."""

    def load(position: int) -> _Pair:
        name = masked[position].name
        if file is None:
            return _Pair(base.read_bits(name), str, found.read_bits(name))
        return _Pair(*read_hashed(base, name), found.read_bits(name))

    may_differ = kept if file is None else file.tensors
    masked = [info for info in infos if info.name in may_differ and _alike(info, found.tensors.get(info.name))]
    reader = ReadAhead(load, [(2 * info.nbytes, 2 * info.nbytes) for info in masked])
    pairs = iter(reader)
    names = {info.name for info in masked}
    try:
        for info in infos:
            yield info, next(pairs) if info.name in names else None
    finally:
        reader.close()


def _alike(info: TensorInfo, other: TensorInfo | None) -> bool:
    return other is not None and (info.dtype, info.shape) == (other.dtype, other.shape)


def _verify_tensor(
    name: str,
    pair: _Pair | None,
    base: Checkpoint,
    found: Checkpoint,
    file: PatchFile | None,
    kept: dict[str, int],
    report: VerifyReport,
) -> None:
    """Compare one tensor and note what differs."""
    import numpy as np

    info, other = base.tensors[name], found.tensors.get(name)
    if other is None:
        report.add(name, "it is missing")
        return
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        what = f"it is {other.dtype} {list(other.shape)}, the base has {info.dtype} {list(info.shape)}"
        report.add(name, what)
        return
    if pair is None:
        if file is not None and digest_of(*base.pieces(info)) != file.base[name].digest:
            raise other_base(name, base.path)
        pieces = zip(base.pieces(info), found.pieces(other), strict=True)
        if not all(same_bytes(ours, theirs) for ours, theirs in pieces):
            report.add(name, "it differs from the base, where it should be equal")
        return
    num_changed = num_differing(pair.base, pair.found)
    report.changed += num_changed
    if file is None:
        report.kept += kept[name]
        if num_changed > kept[name]:
            report.add(name, f"{num_changed} entries differ from the base, its mask kept {kept[name]}")
        return
    patch_(pair.base, pair.digest, file, name, base.path)
    expected = pair.base
    report.kept += file.tensors[name].kept
    if num_differing(expected, pair.found):
        wrong = np.flatnonzero(expected != pair.found)
        mask = file.flat_mask(name)[wrong]
        first = int(wrong[0])
        report.add(
            name,
            f"{int((~mask).sum())} entries outside the mask differ from the base, {int(mask.sum())} kept ones "
            f"from the patch",
            index=first,
            expected=number(expected[first:], info.dtype),
            found=number(pair.found[first:], info.dtype),
        )
