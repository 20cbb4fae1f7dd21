"""Apply a patch file to its base, and prove of a checkpoint that it is that base with that patch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.distributed import wait_for_all
from tailorcli.files import PathLike, digest_of
from tailorcli.guard import Watch
from tailorcli.patchfile.reader import PatchFile, raw_bytes
from tailorcli.patchfile.report import PatchReport
from tailorcli.patchfile.view import side_sources
from tailorcli.runs.outputs import Target, progress_bar
from tailorcli.runs.plan import Plan
from tailorcli.runs.writing import Outputs, records_of

if TYPE_CHECKING:
    from torch import Tensor

    from tailorcli.patchfile.records import TensorRecord

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tailorcli._version import __version__
from tailorcli.checkpoint.bits import keep_freed_memory
from tailorcli.checkpoint.folder import PIECE_BYTES
from tailorcli.checkpoint.header import TensorInfo
from tailorcli.checkpoint.layout import plan_layout
from tailorcli.checkpoint.readahead import ReadAhead
from tailorcli.distributed import mine, now_on
from tailorcli.errors import PatchError
from tailorcli.hub import local_folder
from tailorcli.patchfile.report import REPORT_FILE
from tailorcli.patchfile.view import read_patched
from tailorcli.runs.divided import Work, own_tensors, shares_of_ranks
from tailorcli.runs.plan import BARE_BYTES, RUNTIME_BYTES, TensorPlan
from tailorcli.system import threads_beside

if TYPE_CHECKING:
    from tailorcli.checkpoint.bits import Bits

_FROM_PATCH, _LEFT_OUT = "the patch file", "the patch leaves it alone"


def plan_apply(
    base: PathLike,
    patch: PathLike,
    output: PathLike | None = None,
    *,
    max_shard_size: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Plan:
    """What ``apply_patch`` would write and what it would cost; reads and checks all of the patch."""
    with ExitStack() as stack:
        opened, file = open_both(local_folder(base), patch, stack)
        plan = plan_of_patch(opened, file, max_shard_size, BARE_BYTES)
        Target.of(output, None, resume=resume, overwrite=overwrite).check([opened.path, file.path], plan)
        return plan


def apply_patch(
    base: PathLike,
    patch: PathLike,
    output: PathLike,
    *,
    max_shard_size: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    announce: Callable[[Plan], None] | None = None,
) -> PatchReport:
    """Write the checkpoint ``output``: ``base`` with the entries of the patch file in place.

    Weights, side files and report are to the byte those that the run which made the patch wrote, or would have
    written, to its output folder. ``announce`` is called with the plan before the work
    starts. Raises PatchError where the patch is damaged or ``base`` is not its base.
    """
    started = perf_counter()
    target = Target.of(output, None, resume=resume, overwrite=overwrite)
    keep_freed_memory()
    with ExitStack() as stack:
        opened, file = open_both(local_folder(base), patch, stack, divided=True)
        watch = Watch([*opened.shards, file.path])
        plan = plan_of_patch(opened, file, max_shard_size, BARE_BYTES)
        identity = {
            "tailorcli": __version__,
            "command": "apply",
            "base fingerprint": opened.fingerprint(),
            "patch fingerprint": file.fingerprint(),
            "max_shard_size": max_shard_size,
        }
        side, notes = side_sources(opened, file)
        is_checked: list[bool] = []  # whether the base is the patch's to the bit, and need not be hashed again

        def check_thoroughly() -> None:
            file.check_base(opened, thorough=True)
            is_checked.append(True)

        begun = target.begin(
            *(plan, opened, [opened.path, file.path], identity, "apply", side),
            announce=announce,
            before_replacing=check_thoroughly,
            divided=True,
        )
        if isinstance(begun, PatchReport):
            return begun
        outputs = stack.enter_context(begun)
        done = [tensor for tensor in plan.tensors if tensor.name in outputs.done]
        own = own_tensors([tensor for tensor in plan.tensors if tensor.name not in outputs.done], _work)
        bar = stack.enter_context(progress_bar([*done, *own], "applying", progress))
        bar.start_at(sum(tensor.nbytes for tensor in done))
        try:
            for tensor, patched in _patched_tensors(own, opened, file, bool(is_checked)):
                if patched is None:
                    outputs.copy(tensor.name, opened, None, None if is_checked else file.base[tensor.name].digest)
                else:
                    outputs.write_bits(tensor.name, patched)
                bar.update(tensor.nbytes)
            outputs.drain()
        except PatchError:  # a wrong base: no resumed run would get over it
            outputs.discard()
            raise
        text = file.side_file(REPORT_FILE).decode()
        shares = shares_of_ranks(own, started)
        seconds = perf_counter() - started
        report = replace(file.report(), command="apply", seconds=seconds, notes=notes, ranks=shares)
        outputs.finish(report, watch, text)
        return report


def open_both(base: PathLike, patch: PathLike, stack: ExitStack, divided: bool = False) -> tuple[Checkpoint, PatchFile]:
    """Both opened, every byte of the patch checked, and the base's headers and samples.

    With ``divided`` each rank checks its share of the patch, and all wait for one another. Raises TailorError.
    """
    file = stack.enter_context(PatchFile.open(patch))
    opened = stack.enter_context(Checkpoint.open(base))
    file.check_base(opened)
    if not divided:
        file.check()
        return opened, file
    check_share(file)
    wait_for_all("the patch file to be checked")
    return opened, file


def check_share(file: PatchFile) -> None:
    """Check a rank's share of a patch file. Raises PatchError."""
    names = list(file.tensors)
    file.check([names[position] for position in mine([file.nbytes_of(name) for name in names])])


def _work(tensor: TensorPlan) -> Work:
    """A tensor is read and written, and one that changes is put together."""
    return 0.0, float(tensor.nbytes * (4 if tensor.action == "patch" else 2))


def plan_of_patch(
    base: Checkpoint, file: PatchFile, max_shard_size: int | None, runtime_bytes: int = RUNTIME_BYTES
) -> Plan:
    """What a patch file does to each tensor of its base, and what that costs."""

    def plan_tensor(info: TensorInfo) -> TensorPlan:
        common = (info.name, info.dtype, info.shape, info.nbytes)
        if info.name not in file.tensors:
            return TensorPlan(*common, "base", _LEFT_OUT, held_bytes=PIECE_BYTES)
        # Its patched and (waiting to be written) its predecessor's values, mask, indices.
        held = 3 * info.nbytes + info.numel + 2 * file.nbytes_of(info.name) + (32 << 20)
        return TensorPlan(*common, "patch", method=_FROM_PATCH, held_bytes=held)

    tensors = tuple(plan_tensor(info) for info in base.tensors.values())
    layout = plan_layout(base, max_shard_size)
    return Plan(
        tensors=tensors,
        layout=layout,
        read_bytes=base.nbytes + file.nbytes,
        write_bytes=layout.nbytes,
        patch_bytes=0,
        peak_bytes=runtime_bytes + max((tensor.held_bytes for tensor in tensors), default=0),
    )


def _patched_tensors(
    tensors: list[TensorPlan], base: Checkpoint, file: PatchFile, is_checked: bool
) -> Iterator[tuple[TensorPlan, Bits | None]]:
    """Each tensor with its patched value, None where the patch leaves it at base; the next are made ahead.

    A base that ``is_checked`` is not hashed.
    """
    changed = [tensor for tensor in tensors if tensor.name in file.tensors]
    # To make one takes its values and its entries in the patch.
    sizes = [(each.held_bytes, each.nbytes + file.nbytes_of(each.name)) for each in changed]
    reader = ReadAhead(lambda i: read_patched(base, file, changed[i].name, is_checked), sizes, threads_beside())
    made = iter(reader)
    try:
        for tensor in tensors:
            now_on(tensor.name)
            if tensor.name not in file.tensors:
                yield tensor, None
                continue
            yield tensor, next(made)
        now_on("")
    finally:
        reader.close()


def copy_unpatched(plan: Plan, base: Checkpoint, file: PatchFile, closed: PatchReport, outputs: Outputs) -> None:
    """Write the tensors that are not in the patch ``file``, of which ``closed`` has the records."""
    by_name = {record.name: record for record in closed.tensors}
    for tensor in plan.tensors:
        if tensor.name not in file.tensors and tensor.name not in outputs.done:
            outputs.copy(tensor.name, base, by_name[tensor.name])
    outputs.drain()


def write_patched(
    plan: Plan,
    base: Checkpoint,
    file: PatchFile,
    values: dict[str, Tensor],
    closed: PatchReport,
    outputs: Outputs,
    advance: Callable[[int], object],
) -> dict[str, TensorRecord]:
    """Write every tensor with its trained ``values``, or as the patch ``file`` has it; its record by name.

    ``closed`` is the report of that patch, whose layer errors are not those of trained values. Raises OutputError.
    """
    by_name = {record.name: record for record in closed.tensors}
    records = dict(outputs.records)
    for tensor in plan.tensors:
        if tensor.name in records:
            continue
        record = by_name[tensor.name]
        records.update(records_of(tensor.name, tensor.copies, record))
        if tensor.name not in file.tensors:
            outputs.copy(tensor.name, base, record)
        else:
            value = base.read(tensor.name)
            digest = digest_of(raw_bytes(value)) if outputs.wants_digest else ""
            mask = file.mask(tensor.name)
            before = value[mask]
            value[mask] = values[tensor.name] if tensor.name in values else file.values(tensor.name)
            if tensor.name in values:
                stored = base.rounded(tensor.name, value, mask) if base.dequantized else value
                record = record.trained(float((stored[mask].double() - before.double()).abs().sum()))
                records.update(records_of(tensor.name, tensor.copies, record))
            outputs.write(tensor.name, base.encode(tensor.name, value, mask), mask, record, digest)
        advance(tensor.nbytes)
    outputs.drain()
    return records
