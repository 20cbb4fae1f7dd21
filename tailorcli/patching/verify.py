"""Whether a patched checkpoint is what its patch says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

from tailorcli.checkpoint.bits import STEP_BYTES, bit_type_of, keep_freed_memory, number
from tailorcli.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint
from tailorcli.checkpoint.header import TensorInfo, read_header
from tailorcli.checkpoint.quantized import fp8_scales
from tailorcli.checkpoint.readahead import ReadAhead
from tailorcli.distributed import gathered, mine, now_on
from tailorcli.errors import CheckpointError, other_base
from tailorcli.files import PathLike, read_json, same_bytes
from tailorcli.guard import Watch
from tailorcli.hub import local_folders
from tailorcli.options import Fp8Output
from tailorcli.patchfile.reader import PatchFile
from tailorcli.patchfile.report import REPORT_FILE, load_report
from tailorcli.patchfile.view import read_patched
from tailorcli.runs.outputs import progress_bar
from tailorcli.system import threads_beside

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

    Without a patch file the checkpoint's own report says how many entries of each tensor may differ from the base;
    of a vocabulary that was resized the rows that the base has are compared.
    Raises TailorError where an input cannot be read or ``patch`` is not of ``base``.
    """
    keep_freed_memory()
    with ExitStack() as stack:
        checkpoint, base = local_folders((checkpoint, base))
        opened = stack.enter_context(Checkpoint.open(base))
        found = stack.enter_context(Checkpoint.open(checkpoint))
        watch = Watch([*opened.shards, *found.shards, *([] if patch is None else [Path(patch)])])
        file, kept, grows = None, dict[str, int](), False
        if patch is not None:
            file = stack.enter_context(PatchFile.open(patch))
            file.check_base(opened)
        else:
            kept, grows = _kept_by_report(found, opened)
        report = VerifyReport(str(found.path), "patch" if file is not None else "report")
        _check_files(found, report)
        for name in found.tensors:
            if name not in opened.tensors:
                report.add(name, "the base has no such tensor")
        infos = list(opened.tensors.values())
        own = [infos[position] for position in sorted(mine([info.nbytes for info in infos]))]
        if file is not None:
            file.check([info.name for info in own if info.name in file.tensors])
        bar = stack.enter_context(progress_bar(own, "verifying", progress))
        parts = []
        for info, part in _parts(own, _Inputs(opened, found, file, kept, grows)):
            parts.append(part)
            bar.update(info.nbytes)
        watch.require_unchanged()
        names = list(opened.tensors)
        mine_joined = VerifyReport(report.checkpoint, report.against)
        _join(mine_joined, parts, names)
        _join(report, gathered(mine_joined), names)
        return report


def _join(report: VerifyReport, parts: Sequence[VerifyReport], order: Sequence[str]) -> None:
    """Add what ranks found of their parts of the tensors; problems come in the ``order`` of the tensors' names."""
    for part in parts:
        for name in ("tensors", "entries", "kept", "changed", "wrong_tensors"):
            setattr(report, name, getattr(report, name) + getattr(part, name))
    places = {name: place for place, name in enumerate(order)}
    found = sorted((problem for part in parts for problem in part.problems), key=lambda p: places[p["tensor"]])
    report.problems = [*report.problems, *found][:MOST_PROBLEMS]


def _kept_by_report(found: Checkpoint, base: Checkpoint) -> tuple[dict[str, int], bool]:
    """How many entries of each patched tensor the checkpoint's own report says were kept; whether it has new rows."""
    path = found.path / REPORT_FILE
    hint = "pass the patch: --patch FILE"
    if not path.exists():
        raise CheckpointError(f"{found.path} has no {REPORT_FILE} that would say what was kept", hint)
    saved = load_report(path)
    if saved.options.get("fp8_output") == Fp8Output.BF16 and fp8_scales(base):
        what = f"{found.path} holds FP8 weights of {base.path} in bfloat16: none of their bits can be compared"
        raise CheckpointError(what, "verify one that was written with --fp8-output fp8")
    if saved.inputs["base"]["fingerprint"] != base.fingerprint():
        raise CheckpointError(f"{path} says that it was made from another base than {base.path}", hint)
    kept = {tensor.name: tensor.kept for tensor in saved.tensors if tensor.patched}
    return kept, bool(saved.options.get("resized_vocab"))


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


@dataclass(frozen=True)
class _Inputs:
    """What is compared; without a ``file``, ``kept`` says how many entries of a patched tensor may differ."""

    base: Checkpoint
    found: Checkpoint
    file: PatchFile | None
    kept: dict[str, int]
    grows: bool = False  # whether tensors may have further rows, of which the base knows nothing

    def may_differ(self, name: str) -> bool:
        """Whether some entries of a tensor may be others than the base's."""
        return name in (self.kept if self.file is None else self.file.tensors)


def _parts(infos: Sequence[TensorInfo], inputs: _Inputs) -> Iterator[tuple[TensorInfo, VerifyReport]]:
    """Each tensor with what was found of it; a few are compared side by side."""
    file = inputs.file
    sizes = [
        4 * STEP_BYTES + (file.nbytes_of(info.name) if file and info.name in file.tensors else 0) for info in infos
    ]
    reader = ReadAhead(lambda i: _part_of(infos[i], inputs), list(zip(sizes, sizes, strict=True)), threads_beside())
    parts = iter(reader)
    try:
        for info in infos:
            now_on(info.name)
            yield info, next(parts)
        now_on("")
    finally:
        reader.close()


def _part_of(info: TensorInfo, inputs: _Inputs) -> VerifyReport:
    """What is found of one tensor."""
    part = VerifyReport("", "", tensors=1, entries=info.numel)
    other = inputs.found.tensors.get(info.name)
    if other is None:
        part.add(info.name, "it is missing")
    elif (info.dtype, info.shape) != (other.dtype, other.shape) and not (inputs.grows and _has_new_rows(info, other)):
        what = f"it is {other.dtype} {list(other.shape)}, the base has {info.dtype} {list(info.shape)}"
        part.add(info.name, what)
    elif inputs.may_differ(info.name):
        _compare_patched(info, inputs, part)
    else:
        _compare_equal(info, inputs, part)
    return part


def _has_new_rows(info: TensorInfo, other: TensorInfo) -> bool:
    """Whether ``other`` has the rows of ``info``, as far as its shape tells, and more behind them."""
    alike = info.dtype == other.dtype and info.shape[1:] == other.shape[1:]
    return alike and len(info.shape) > 0 and 0 < info.shape[0] < other.shape[0]


def _compare_equal(info: TensorInfo, inputs: _Inputs, part: VerifyReport) -> None:
    """Compare a tensor that must be the base's."""
    digest, are_same = hashlib.sha256(), True
    for ours, theirs in zip(*_in_pieces(info, inputs), strict=True):
        if inputs.file is not None:
            digest.update(ours)
        are_same = are_same and same_bytes(ours, theirs)
    if inputs.file is not None and digest.hexdigest() != inputs.file.base[info.name].digest:
        raise other_base(info.name, inputs.base.path)
    if not are_same:
        part.add(info.name, "it differs from the base, where it should be equal")


def _compare_patched(info: TensorInfo, inputs: _Inputs, part: VerifyReport) -> None:
    """Compare a tensor some of whose entries may differ from the base's."""
    import numpy as np

    name, file, kind = info.name, inputs.file, bit_type_of(info)
    step = STEP_BYTES // np.dtype(kind).itemsize
    kept_entries = repeat([]) if file is None else file.kept_entries(name, step)
    digest, is_as_patched, kept_changed = hashlib.sha256(), True, 0
    for ours, theirs, kept in zip(*_in_pieces(info, inputs), kept_entries, strict=False):
        if file is not None:
            digest.update(ours)
        found = np.frombuffer(theirs, kind)
        differs = np.not_equal(np.frombuffer(ours, kind), found)
        part.changed += int(np.count_nonzero(differs))
        for places, values in kept:
            is_as_patched = is_as_patched and np.array_equal(found.take(places), values)
            kept_changed += int(np.count_nonzero(differs.take(places)))
    if file is None:
        part.kept = inputs.kept[name]
        if part.changed > part.kept:
            part.add(name, f"{part.changed} entries differ from the base, its mask kept {part.kept}")
        return
    if digest.hexdigest() != file.base[name].digest:
        raise other_base(name, inputs.base.path)
    part.kept = file.tensors[name].kept
    if not is_as_patched or part.changed > kept_changed:
        _name_differences(info, inputs, file, part)


def _in_pieces(info: TensorInfo, inputs: _Inputs) -> tuple[Iterator[memoryview], Iterator[memoryview]]:
    """A tensor's bytes in the base and in the checkpoint, in pieces that the processor's cache has room for."""
    other = replace(inputs.found.tensors[info.name], nbytes=info.nbytes)  # without rows that are new
    return inputs.base.pieces(info, STEP_BYTES), inputs.found.pieces(other, STEP_BYTES)


def _name_differences(info: TensorInfo, inputs: _Inputs, file: PatchFile, part: VerifyReport) -> None:
    """Say where a tensor that is not right differs, which takes memory for all of it."""
    import numpy as np

    expected, found = read_patched(inputs.base, file, info.name, is_checked=True), inputs.found.read_bits(info.name)
    wrong = np.flatnonzero(expected != found)
    mask = file.flat_mask(info.name)[wrong]
    first = int(wrong[0])
    part.add(
        info.name,
        f"{int((~mask).sum())} entries outside the mask differ from the base, {int(mask.sum())} kept ones "
        f"from the patch",
        index=first,
        expected=number(expected[first:], info.dtype),
        found=number(found[first:], info.dtype),
    )
