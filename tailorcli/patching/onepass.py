"""Calibrate both models and patch in one pass: a block's Hessians are used while they are in memory, and dropped.

Both models go block by block through their samples, in step. Nothing of the statistics is written; the patch is that
of statistics that were, as each Hessian is the sum of the same inputs in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint
from tailorcli.adapters.interpolated import original
from tailorcli.calibration.gathering import Gathering, HeldStats, NotInOnePassError
from tailorcli.calibration.passes import Subject
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.grown import GrownCheckpoint
from tailorcli.checkpoint.renamed import RenamedCheckpoint
from tailorcli.data.samples import make_batches
from tailorcli.device import StageTimer, deterministic_algorithms, device_errors, exact_float32, resolve_device
from tailorcli.guard import Watch
from tailorcli.models.config import read_config
from tailorcli.models.empty import check_shapes, empty_on_meta
from tailorcli.models.lockstep import Lockstep, find_blocks
from tailorcli.models.names import aliases
from tailorcli.models.running import check_ids, forward, last_logits_only, samples_in, to_device
from tailorcli.models.spill import Spill
from tailorcli.options import PatchOptions
from tailorcli.patchfile.report import PatchReport
from tailorcli.patching.carded import side_files_of
from tailorcli.patching.measuring import NEW, RETAINED, Measuring
from tailorcli.patching.propagate import patch_propagated
from tailorcli.patching.run import Run
from tailorcli.patching.stream import tailored
from tailorcli.patching.three_models import PartModel
from tailorcli.runs.outputs import Target, identity_of, progress_bar

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs, Samples
    from tailorcli.models.lockstep import Lane
    from tailorcli.options import CalibrateOptions
    from tailorcli.patching.inputs import PatchInputs
    from tailorcli.runs.plan import Plan, TensorPlan


@dataclass(frozen=True)
class Material:
    """What one model is calibrated on, and how; ``path`` is what its statistics are named by in words."""

    path: Path
    samples: Samples
    options: CalibrateOptions


def why_not_in_one_pass(inputs: PatchInputs, calibration: CalibrateOptions) -> str:
    """Why these models cannot be calibrated and patched in one pass; empty where they can, as far as shapes tell.

    Raises CheckpointError where transformers cannot build the model.
    """
    base, tuned = inputs.base, original(inputs.tuned)
    if isinstance(base, GrownCheckpoint):
        return "the tuned model has another vocabulary"
    if isinstance(tuned, RenamedCheckpoint):
        return "the two models name their tensors differently"
    if base.dequantized or tuned.dequantized:
        return "a model is stored quantised"
    network = empty_on_meta(base, read_config(base.path), calibration)
    if not find_blocks(network):
        return "the model has no list of blocks"
    if network.config.is_encoder_decoder:  # whose embedding is used again behind the encoder
        return "an encoder and a decoder share an embedding"
    if not isinstance(tuned, AdaptedCheckpoint):
        other = empty_on_meta(tuned, read_config(tuned.path), calibration)
        if aliases(network).keys() != aliases(other).keys():
            return "one of the models ties its output layer to its embedding, the other does not"
    return ""


def patch_in_one_pass(
    inputs: PatchInputs,
    given: Mapping[str, Material],
    plan: Plan,
    target: Target,
    options: PatchOptions,
    progress: bool,
    started: float,
) -> PatchReport:
    """Calibrate the models on what is ``given`` by kind of data, NEW and perhaps RETAINED, and patch as ``plan`` says.

    ``plan`` is by statistics that are only expected; ``options`` are resolved, ``started`` is a perf_counter. Raises
    NotInOnePassError, having removed what was written, where a model turns out to call its layers in another order;
    other TailorErrors as ``patch_checkpoint``.
    """
    device = resolve_device(options.device)
    timer = StageTimer(device)
    subjects = {kind: _subject(inputs, kind, material, device, timer) for kind, material in given.items()}
    for subject in subjects.values():
        config = read_config(subject.stored.path)
        check_shapes(subject.stored, config, subject.options)
        check_ids(subject.samples.inputs, empty_on_meta(subject.stored, config, subject.options))
    stats = {kind: HeldStats(given[kind].path, subject) for kind, subject in subjects.items()}
    new, retained = stats[NEW], stats.get(RETAINED)
    with ExitStack() as stack:
        side = side_files_of(inputs, options, samples=(new, retained))
        watch = Watch([*inputs.files, *(source for source in side.values() if isinstance(source, Path))])
        described = inputs.describe()
        identity = identity_of(described, options.identity(retained is not None), device, **inputs.configs)
        manifest = {"task": options.task, "license": options.license, "inputs": described}
        begun = target.begin(plan, inputs.base, inputs.paths, identity, "patch", side, manifest)
        if isinstance(begun, PatchReport):
            return begun
        outputs = stack.enter_context(begun)
        bar = stack.enter_context(progress_bar(plan.tensors, "patching", progress))
        records = dict(outputs.records)
        bar.start_at(sum(tensor.nbytes for tensor in plan.tensors if tensor.name in records))
        measured = replace(inputs, stats=new, retain_stats=retained)
        run = Run(measured, options, device, timer, outputs, bar=bar, records=records)
        run.copy_first(tensor for tensor in plan.left_at_base if not tensor.by_statistics)
        scratch = target.scratch
        try:
            exact = deterministic_algorithms(given[NEW].options.deterministic)
            with exact_float32(), exact, device_errors("a smaller --batch-size"):
                if options.propagate:
                    patch_propagated(plan.tensors, run, scratch, lambda *models: _measuring(run, subjects, models))
                else:
                    _patch_alone(plan.tensors, run, subjects, scratch)
        except NotInOnePassError:
            outputs.discard()
            raise
        run.drain()
        report = run.report("patch", described, started)
        outputs.finish(report, watch)
        return report


def _subject(inputs: PatchInputs, kind: str, material: Material, device: Any, timer: StageTimer) -> Subject:
    """The tuned model on new data, or the base on retained data."""
    tuned = inputs.tuned if kind == NEW else inputs.base
    stored: Checkpoint = inputs.base if isinstance(tuned, AdaptedCheckpoint) else tuned
    return Subject(stored, tuned, material.samples, material.options, device, timer)


def _measuring(run: Run, subjects: Mapping[str, Subject], models: Sequence[PartModel]) -> Measuring:
    """Statistics of models that hold what lies outside their blocks."""
    sides = {}
    for (kind, subject), model in zip(subjects.items(), models, strict=True):
        subject.places = model.places  # filled as parts are loaded
        stats = run.inputs.stats if kind == NEW else run.inputs.retain_stats
        assert isinstance(stats, HeldStats)
        sides[kind] = Gathering(subject, stats, model.network, model.parts)
    return Measuring(run, sides)


def _patch_alone(tensors: Sequence[TensorPlan], run: Run, subjects: Mapping[str, Subject], scratch: Path) -> None:
    """Patch every tensor by itself, each block as soon as it is measured; what lies outside the blocks comes last."""
    models = {
        kind: PartModel.of(subject.stored, subject.tuned, subject.options, run.device, run.timer)
        for kind, subject in subjects.items()
    }
    for model in models.values():
        model.load("")
    measuring = _measuring(run, subjects, [*models.values()])
    calls: list[tuple[Callable[[], Any], int]] = []
    owners: list[str] = []
    for kind, subject in subjects.items():
        for batch in make_batches(subject.samples.inputs, subject.options.together):
            call = _call(models[kind].network, batch, run)
            calls.append((measuring.watched(kind, call), samples_in(batch)))
            owners.append(kind)
    first, *others = [find_blocks(model.network) for model in models.values()]
    lockstep = Lockstep(first, calls, others)
    lanes = {kind: [lane for lane, own in zip(lockstep.lanes, owners, strict=True) if own == kind] for kind in models}
    spill = Spill.measured(run.device, scratch)
    left = {tensor.name: tensor for tensor in tensors}

    def visit(block: str, waiting: list[Lane]) -> None:
        names = models[NEW].parts.tensors[block]
        inside = [tensor for tensor in left.values() if not {*names}.isdisjoint(tensor.names)]
        if not inside:
            raise NotInOnePassError(f"the model calls its block {block} more than once")
        for tensor in inside:
            del left[tensor.name]
        todo = [tensor for tensor in inside if not run.is_done(tensor.name)]
        for model in models.values():
            model.load(block)
            model.parts.read_behind(block)  # while this one is run and patched
        with run.timer.stage("run"):
            measuring.measure(block, waiting, spill, advance=True, counts=bool(todo))
        for model in models.values():
            model.parts.drop(block)
        _write(measuring.plan(todo), run)
        measuring.forget(block)

    with ExitStack() as stack:
        stack.enter_context(measuring.running(lanes))
        for model in models.values():
            stack.enter_context(last_logits_only(model.network))
        for model in models.values():
            stack.callback(model.parts.end_reading)
        lockstep.run(measuring.turn, visit, spill)
    _write([t for t in measuring.settle([*left.values()], None) if not run.is_done(t.name)], run)


def _call(network: Any, batch: Inputs, run: Run) -> Callable[[], Any]:
    return lambda: forward(network, to_device(batch, run.device))


def _write(tensors: Sequence[TensorPlan], run: Run) -> None:
    """Patch tensors by themselves and queue them."""
    for tensor, result, digest in tailored(tensors, run):
        run.write(tensor, result, digest)
        del result
