"""The visible loop: go through a plan tensor by tensor, and score it or patch it."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli import __version__
from tailorcli.adapter import open_tuned, tuned_side_files
from tailorcli.checkpoint import INDEX_FILE, WEIGHT_SUFFIXES, Checkpoint, read_json
from tailorcli.device import StageTimer, device_errors, exact_float32, resolve_device
from tailorcli.errors import CheckpointError, NumericalError, OutputError
from tailorcli.options import PatchOptions
from tailorcli.plan import Plan, TensorPlan, build_plan, check_output, working_set
from tailorcli.report import REPORT_FILE, RUN_FILE, PatchReport, load_report
from tailorcli.stats import Stats
from tailorcli.writer import JOURNAL, WORK_FOLDER, CheckpointWriter, as_output_error, write_text_atomically

if TYPE_CHECKING:
    import torch

    from tailorcli.core.hessian import PreparedHessian
    from tailorcli.core.tailor import LayerResult

PathLike = str | os.PathLike[str]


@dataclass
class Inputs:
    """The opened inputs of a run."""

    base: Checkpoint
    tuned: Checkpoint
    stats: Stats | None

    @classmethod
    def open(cls, base: PathLike, tuned: PathLike, stats: PathLike | None, stack: ExitStack) -> Inputs:
        """Open all by their headers; ``stack`` closes them."""
        opened_base = Checkpoint.open(base)
        opened = cls(opened_base, open_tuned(tuned, opened_base), Stats.open(stats) if stats is not None else None)
        for item in (opened.base, opened.tuned, opened.stats):
            if item is not None:
                stack.callback(item.close)
        return opened

    def describe(self) -> dict[str, dict[str, str]]:
        """Path and fingerprint of each."""
        facts = {
            "base": {"path": str(self.base.path), "fingerprint": self.base.fingerprint()},
            "tuned": {"path": str(self.tuned.path), "fingerprint": self.tuned.fingerprint()},
        }
        if self.stats is not None:
            facts["stats"] = {"path": str(self.stats.path), "fingerprint": self.stats.fingerprint()}
        return facts


def plan_patch(
    base: PathLike,
    tuned: PathLike,
    output: PathLike | None = None,
    stats: PathLike | None = None,
    options: PatchOptions = PatchOptions(),
) -> Plan:
    """What ``patch_checkpoint`` would do to each tensor and what it would cost, from headers alone."""
    with ExitStack() as stack:
        inputs = Inputs.open(base, tuned, stats, stack)
        plan = build_plan(inputs.base, inputs.tuned, inputs.stats, options)
        if output is not None:
            _check_output(Path(output), inputs, options, plan)
        return plan


def score_checkpoint(
    base: PathLike,
    tuned: PathLike,
    stats: PathLike | None = None,
    options: PatchOptions = PatchOptions(),
    progress: bool = False,
) -> PatchReport:
    """The mask statistics of every tensor (Eq. 9 to 11), without solving for or writing anything.

    Raises the same errors as ``patch_checkpoint``.
    """
    started = perf_counter()
    with ExitStack() as stack:
        inputs = Inputs.open(base, tuned, stats, stack)
        plan = build_plan(inputs.base, inputs.tuned, inputs.stats, options)
        device = resolve_device(options.device)
        timer = StageTimer(device)
        records = {t.name: _record(t, None, inputs.stats, options) for t in plan.left_at_base}
        bar = stack.enter_context(_progress(plan.patched, "scoring", progress))
        for tensor, result in _tailored(plan.patched, inputs, options, device, timer, score_only=True):
            records[tensor.name] = _record(tensor, result, inputs.stats, options)
            bar.update(tensor.nbytes)
        return _report("score", inputs, options, records, timer, perf_counter() - started)


def patch_checkpoint(
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    stats: PathLike | None = None,
    options: PatchOptions = PatchOptions(),
    progress: bool = False,
) -> PatchReport:
    """Patch ``base`` with the best ``density`` of ``tuned`` and write the checkpoint ``output``.

    ``stats`` is a folder that ``calibrate_model`` wrote for ``tuned``; it may be missing only with
    ``solver="none"`` and ``omega=1``. The output has the base's tensor names, dtypes and (without
    ``max_shard_size``) sharding, and the tuned model's side files; a report and a run record lie beside them.
    Raises TailorError for everything that a user can put right; nothing that looks finished is left then.
    """
    started = perf_counter()
    folder = Path(output)
    with ExitStack() as stack:
        inputs = Inputs.open(base, tuned, stats, stack)
        plan = build_plan(inputs.base, inputs.tuned, inputs.stats, options)
        device = resolve_device(options.device)
        _check_output(folder, inputs, options, plan)
        identity = _identity(inputs, options, device)
        finished = _finished_report(folder, identity) if options.resume else None
        if finished is not None:
            return finished
        if options.overwrite and folder.exists():
            _clear(folder)
        timer = StageTimer(device)
        writer = stack.enter_context(CheckpointWriter(folder, plan.layout, identity, options.resume))
        records = dict(writer.done)
        bar = stack.enter_context(_progress(plan.tensors, "patching", progress))
        bar.update(sum(tensor.nbytes for tensor in plan.tensors if tensor.name in records))
        todo = [tensor for tensor in plan.tensors if tensor.name not in records]
        for tensor, result in _tailored(todo, inputs, options, device, timer, score_only=False):
            record = _record(tensor, result, inputs.stats, options)
            records[tensor.name] = record
            with timer.stage("wait for write"):
                if result is None or result.patched is None:
                    writer.copy(tensor.name, inputs.base, record)
                else:
                    writer.write(tensor.name, result.patched, record)
            del result
            bar.update(tensor.nbytes)
        with timer.stage("wait for write"):
            writer.drain()
        timer.seconds["write"] = writer.seconds
        report = _report("patch", inputs, options, records, timer, perf_counter() - started)
        texts = {REPORT_FILE: report.to_json(), RUN_FILE: _run_record(report, identity, len(records) - len(todo))}
        writer.finish(tuned_side_files(inputs.tuned), texts)
        return report


@dataclass
class _Loaded:
    """One tensor's inputs as read from disk."""

    base: torch.Tensor
    tuned: torch.Tensor
    packed: torch.Tensor | None  # its Hessian, where the tensor before did not use the same


class _ReadAhead:
    """Reads the next tensor on a thread of its own while the current one is worked on.

    Only where both together stay below the fullest single tensor, so that reading ahead costs no peak memory.
    """

    def __init__(self, tensors: list[TensorPlan], inputs: Inputs, options: PatchOptions) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.action == "patch"]
        self._inputs = inputs
        sizes = [working_set(t, inputs.tuned, inputs.stats, options) for t in self._tensors]
        room = max(sizes, default=0) + (64 << 20)
        self._fits = [size + self._nbytes(i + 1) <= room for i, size in enumerate(sizes)]
        self._next: Future[_Loaded] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self.seconds = 0.0

    def _nbytes(self, position: int) -> int:
        if position >= len(self._tensors):
            return 0
        tensor = self._tensors[position]
        return tensor.nbytes + self._inputs.tuned.tensors[tensor.name].nbytes + self._hessian_bytes(position)

    def _hessian_bytes(self, position: int) -> int:
        name = self._needed_hessian(position)
        return self._inputs.stats.nbytes(name) if name and self._inputs.stats else 0

    def _needed_hessian(self, position: int) -> str | None:
        name = self._tensors[position].hessian
        return None if position and self._tensors[position - 1].hessian == name else name

    def _load(self, position: int) -> _Loaded:
        started = perf_counter()
        tensor, stats = self._tensors[position], self._inputs.stats
        hessian = self._needed_hessian(position)
        loaded = _Loaded(
            self._inputs.base.read(tensor.name),
            self._inputs.tuned.read(tensor.name),
            stats.load(hessian) if hessian and stats else None,
        )
        self.seconds += perf_counter() - started
        return loaded

    def __iter__(self) -> Iterator[tuple[TensorPlan, _Loaded]]:
        for position, tensor in enumerate(self._tensors):
            current = self._next or self._pool.submit(self._load, position)
            self._next = None
            loaded = current.result()
            del current
            if position + 1 < len(self._tensors) and self._fits[position]:
                self._next = self._pool.submit(self._load, position + 1)
            yield tensor, loaded
            del loaded

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _tailored(
    tensors: list[TensorPlan],
    inputs: Inputs,
    options: PatchOptions,
    device: torch.device,
    timer: StageTimer,
    *,
    score_only: bool,
) -> Iterator[tuple[TensorPlan, LayerResult | None]]:
    """Each tensor with its result, in order; None for a tensor that stays at base."""
    from tailorcli.core.tailor import tailor_layer

    reader = _ReadAhead(tensors, inputs, options)
    loads = iter(reader)
    prepared: PreparedHessian | None = None
    prepared_name: str | None = None
    try:
        with exact_float32(), device_errors():
            for tensor in tensors:
                if tensor.action != "patch":
                    yield tensor, None
                    continue
                with timer.stage("wait for read"):
                    _, loaded = next(loads)
                try:
                    if tensor.hessian != prepared_name:
                        prepared = None  # freed before the next one is unpacked
                        prepared = _prepare(tensor, loaded, inputs.stats, options, device, timer)
                        prepared_name = tensor.hessian
                    with timer.stage("transfer"):
                        base, tuned = loaded.base.to(device), loaded.tuned.to(device)
                    loaded.base = loaded.tuned = loaded.packed = None  # type: ignore[assignment]
                    result = tailor_layer(
                        base,
                        tuned,
                        prepared,
                        density=options.density,
                        omega=options.omega,
                        solver=options.solver,
                        transposed=tensor.transposed,
                        block_size=options.block_size,
                        tolerance=options.tolerance,
                        max_iterations=options.max_iterations,
                        score_only=score_only,
                        timer=timer,
                    )
                    del base, tuned
                except NumericalError as error:
                    raise NumericalError(f"tensor {tensor.name!r}: {error.message}", error.hint) from error
                yield tensor, result
                del result
    finally:
        reader.close()
        timer.seconds["read"] = reader.seconds


def _prepare(
    tensor: TensorPlan,
    loaded: _Loaded,
    stats: Stats | None,
    options: PatchOptions,
    device: torch.device,
    timer: StageTimer,
) -> PreparedHessian | None:
    """Unpack and factorise the Hessian that came with a tensor, for it and those after it that share it."""
    from tailorcli.core.hessian import prepare, unpack_triangle

    if tensor.hessian is None or loaded.packed is None or stats is None:
        return None
    info = stats.hessians[tensor.hessian]
    with timer.stage("unpack"):
        packed = loaded.packed.to(device)
        loaded.packed = None
        hessian = unpack_triangle(packed, info.size) if info.kind == "full" else packed
    if not bool(hessian.diagonal().isfinite().all() if hessian.dim() == 2 else hessian.isfinite().all()):
        raise NumericalError(f"NaN or infinity in its Hessian {tensor.hessian!r}", "calibrate again")
    with timer.stage("factorise"):
        sequential = options.solver == "sequential" and info.kind == "full"
        return prepare(hessian, options.damping, sensitivity=options.omega < 1.0, sequential=sequential)


def _record(
    tensor: TensorPlan, result: LayerResult | None, stats: Stats | None, options: PatchOptions
) -> dict[str, Any]:
    """The report's entry for one tensor."""
    record: dict[str, Any] = {
        "name": tensor.name,
        "status": "patched" if tensor.action == "patch" else "base",
        "reason": tensor.reason,
        "role": tensor.role,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "hessian": tensor.hessian,
        "kind": stats.hessians[tensor.hessian].kind if tensor.hessian and stats else None,
        "tokens": stats.hessians[tensor.hessian].tokens if tensor.hessian and stats else None,
    }
    if result is not None:
        record |= result.figures.to_dict()
        used = result.figures.damping
        record["damped_further"] = used is not None and used > options.damping
    return record


def _report(
    command: str,
    inputs: Inputs,
    options: PatchOptions,
    records: dict[str, dict[str, Any]],
    timer: StageTimer,
    seconds: float,
) -> PatchReport:
    ordered = [records[name] for name in inputs.base.tensors]
    return PatchReport(command, options.to_dict(), inputs.describe(), ordered, dict(timer.seconds), seconds)


def _identity(inputs: Inputs, options: PatchOptions, device: torch.device) -> dict[str, Any]:
    """What decides the bytes of the output: a run is only resumed under the same."""
    import torch

    fingerprints = {f"{role} fingerprint": facts["fingerprint"] for role, facts in inputs.describe().items()}
    return {
        "tailorcli": __version__,
        "torch": torch.__version__,
        "used device": device.type,
        **fingerprints,
        **options.to_dict(),
    }


def _run_record(report: PatchReport, identity: dict[str, Any], resumed: int) -> str:
    """How this output came about: identity, times, versions; differs between runs, unlike the report."""
    record = {
        "identity": identity,
        "inputs": report.inputs,
        "seconds": report.seconds,
        "stages": report.stages,
        "tensors_from_an_earlier_run": resumed,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    return json.dumps(record, indent=1) + "\n"


def _check_output(folder: Path, inputs: Inputs, options: PatchOptions, plan: Plan) -> None:
    paths = [inputs.base.path, inputs.tuned.path, *([inputs.stats.path] if inputs.stats else [])]
    check_output(folder, paths, resume=options.resume, overwrite=options.overwrite, plan=plan)
    if not folder.exists() or not any(folder.iterdir()):
        return
    ours = (folder / WORK_FOLDER).exists() or (folder / RUN_FILE).exists()
    if options.resume and not ours:
        raise OutputError(f"{folder} holds no run that could be resumed", "choose another folder, or --overwrite")
    if options.overwrite and not ours and any(file.name.endswith(WEIGHT_SUFFIXES) for file in folder.rglob("*")):
        raise OutputError(f"{folder} holds a checkpoint that tailorcli did not write", "choose another folder for -o")


def _finished_report(folder: Path, identity: dict[str, Any]) -> PatchReport | None:
    """The report of a run that had already finished with the same identity, when asked to resume it."""
    if (folder / WORK_FOLDER / JOURNAL).exists() or not (folder / RUN_FILE).exists():
        return None
    run = read_json(folder / RUN_FILE)
    if run.get("identity") != json.loads(json.dumps(identity)):
        raise OutputError(f"{folder} holds the finished output of another run", "choose another, or --overwrite")
    saved = load_report(folder / REPORT_FILE)
    if not isinstance(run.get("stages"), dict) or not isinstance(run.get("seconds"), float):
        raise OutputError(f"{folder / RUN_FILE} is damaged", "start anew with --overwrite")
    return PatchReport(
        "patch", saved["options"], saved["inputs"], saved["tensors"], run["stages"], seconds=run["seconds"]
    )


def _clear(folder: Path) -> None:
    """Take an earlier output of ours away, the index first so that no moment shows half a checkpoint."""
    try:
        with Checkpoint.open(folder) as earlier:
            shards = earlier.shards
    except CheckpointError:  # unfinished or damaged
        shards = list(folder.glob("*.safetensors"))
    try:
        (folder / INDEX_FILE).unlink(missing_ok=True)
        for path in [*shards, *folder.rglob("*.safetensors.part")]:
            path.unlink()
        for name in (REPORT_FILE, RUN_FILE):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    except OSError as error:
        raise as_output_error(folder, error) from error


def _progress(tensors: Any, what: str, shown: bool) -> Any:
    """A progress bar over bytes, on standard error."""
    from tqdm import tqdm

    total = sum(tensor.nbytes for tensor in tensors)
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None if shown else True, leave=False)


def write_report(report: PatchReport, path: PathLike) -> None:
    """Write the report as JSON, whole or not at all."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(target, report.to_json())
    except OSError as error:
        raise as_output_error(target, error) from error
