"""Run the fine-tuned model over calibration data and store a Hessian for every parameter that has one.

In the ordinary way the whole model is in memory; one that does not fit goes block by block (``passes``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import config_folder, is_adapter, named_base
from tailorcli.adapters.config import CONFIG_FILE
from tailorcli.adapters.interpolated import InterpolatedCheckpoint, original
from tailorcli.calibration.entries import entry_of
from tailorcli.calibration.passes import Run, collect_blockwise, collect_whole
from tailorcli.calibration.placement import skeleton_for_blocks
from tailorcli.calibration.sources import Source, check_source, drawn, self_written, write_jsonl
from tailorcli.calibration.stats import HESSIANS, HessianInfo, response_masks, too_few_tokens
from tailorcli.calibration.stats_writer import StatsWriter, check_folder
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.device import StageTimer, deterministic_algorithms, device_errors, exact_float32, resolve_device
from tailorcli.distributed import gathered, ranks, told
from tailorcli.errors import OptionsError, OutputError, note
from tailorcli.files import PathLike, optional_path
from tailorcli.guard import OutputLock, Watch, path_text, protect
from tailorcli.hub import hub_facts, local_folder
from tailorcli.models.calling import package_versions
from tailorcli.models.config import config_digest, read_config, writes_samples
from tailorcli.models.empty import check_shapes
from tailorcli.models.naming import open_for
from tailorcli.options import AUTO, CalibrateOptions

if TYPE_CHECKING:
    import torch

    from tailorcli.calibration.teacher import TeacherChoice
    from tailorcli.data.samples import Samples


@dataclass(frozen=True)
class CalibrateReport:
    """What a calibration gathered; ``uncalibrated`` maps a tensor's name to the reason, ``notes`` to a remark.

    ``writes_samples`` says whether such a model takes ``synthetic``, as far as its config tells.
    """

    output: str
    samples: int
    tokens: int
    hessians: int
    calibrated: int
    uncalibrated: dict[str, str]
    bytes: int
    seconds: float
    stages: dict[str, float]
    blockwise: bool = False
    notes: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # the form of its records, how many were drawn and cut
    ranks: list[dict[str, Any]] = field(default_factory=list)  # of several: the samples, tokens, seconds of each
    writes_samples: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


def calibrate_model(
    model: PathLike,
    data: PathLike | None,
    output: PathLike,
    options: CalibrateOptions = CalibrateOptions(),
    progress: bool = False,
    base: PathLike | None = None,
    announce: Callable[[str], None] | None = None,
    held_out: PathLike | None = None,
    teacher_data: PathLike | None = None,
    show: Callable[[str], None] | None = None,
    samples: Samples | None = None,
) -> CalibrateReport:
    """Run the checkpoint ``model`` over samples of ``data`` and write the statistics folder ``output``.

    ``data`` is a file, a folder of files, "-" for standard input, or a dataset of the Hub, NAME[:CONFIG][:SPLIT].
    ``announce`` is told in a line which form was recognised, ``show`` is given the first sample as the model sees it.
    ``samples`` are those of ``data``, where they were drawn before.

    With ``options.synthetic`` the model writes the samples itself: from random tokens, or, where there are ``data``,
    from the images and prompts of these; half as many further ones, those of the next seed, go to the .jsonl file
    ``held_out``, as a task for evaluate and sweep.

    One Hessian H = (2/N) sum x x^T per distinct layer input, over N tokens; nothing is padded. ``model`` is
    the *fine-tuned* checkpoint: its layer inputs on the new task are what Eq. 5 compares. It may be an adapter on
    ``base``, which defaults to the local folder that the adapter itself names. A model that does not fit the device
    is streamed through it block by block, which ``announce`` is told.

    With ``options.teacher_weight`` w the model that runs is base + w * (tuned - base), which a patch with these
    statistics then goes to. "auto" picks w by the loss of next tokens on ``teacher_data``, records of the new task that
    ``model`` was not trained on, or on the samples themselves; ``announce`` is told. Raises TailorError.

    Among ranks (``tailorcli.distributed.joined``) each runs a part of the samples, and all get the same report.
    """
    started = perf_counter()
    folder = Path(output)
    model = local_folder(model, code=options.trust_remote_code)
    base = None if base is None else local_folder(base, code=options.trust_remote_code)
    check_source(data, options, held_out)
    with ExitStack() as stack:
        stored, tuned = _open(Path(model), base, stack, options)
        device = resolve_device(options.device)
        read = [stored.path, tuned.path, data]
        protect([folder, held_out], read, "choose another folder for -o, or another file")
        watch = Watch([*stored.shards, *tuned.shards, *([] if data is None else [Path(data)])])
        if ranks().first:
            check_folder(folder, options.overwrite)
            _require_new(held_out, options.overwrite)
            stack.enter_context(OutputLock(folder, folder=True))
        timer = StageTimer(device)
        config = read_config(stored.path)
        with timer.stage("data"):
            files = optional_path(data), optional_path(held_out)
            source = Source(stored, tuned, config, options, *files, announce, show)
            further: list[dict[str, Any]] = []
            if options.synthetic:
                samples, further = self_written(source, device, progress)
            elif samples is None:
                samples = drawn(source)
        choice = None
        if options.teacher_weight is not None:
            with timer.stage("teacher"), exact_float32(), device_errors("a smaller --seq-len"):
                weight, choice = _teacher(source, samples, teacher_data, device, progress, announce)
            view = stored
            assert isinstance(view, InterpolatedCheckpoint)
            if weight == 1.0:
                own = base if is_adapter(model) else None
                stored, tuned = _open(Path(model), own, stack, replace(options, teacher_weight=None))
            else:
                stored = tuned = InterpolatedCheckpoint(view.base, view.tuned, weight)
        writer = stack.enter_context(StatsWriter(folder, _longest_hessian_names(stored)))
        run = Run(stored, tuned, samples, options, device, timer, writer, progress)
        with timer.stage("load"):
            check_shapes(stored, config, options)
            skeleton = skeleton_for_blocks(run, config, announce)
        blockwise = skeleton is not None
        smaller = "a smaller --batch-size or --seq-len" + ("" if blockwise else ", or --blockwise always")
        with exact_float32(), deterministic_algorithms(options.deterministic), device_errors(smaller):
            layers, dtype = collect_blockwise(run, skeleton) if blockwise else collect_whole(run, config)
        tensors = {name: entry_of(name, run, layers) for name in stored.tensors}
        if any("bias" in entry.hessians for entry in tensors.values()):
            _write_bias(run)
        facts = _facts(run, dtype, blockwise, choice)
        with timer.stage("wait for write"):
            watch.require_unchanged()
            if options.keep_samples and ranks().first:
                facts["samples"] = writer.store_samples(samples.inputs, samples.responses, samples.following)
            if source.held_out is not None and ranks().first:
                write_jsonl(further, source.held_out)  # only now: a run that is ended earlier leaves none in the way
            writer.finish(tensors, facts)
        timer.seconds["write"] = writer.seconds
    if few := too_few_tokens(writer.infos):
        note(f"{folder}: {few}")
    uncalibrated = {name: entry.reason for name, entry in tensors.items() if not entry.hessians}
    return CalibrateReport(
        output=str(folder),
        samples=len(samples.inputs),
        tokens=samples.num_tokens,
        hessians=writer.count,
        calibrated=len(tensors) - len(uncalibrated),
        uncalibrated=uncalibrated,
        bytes=told((folder / HESSIANS).stat().st_size if ranks().first else 0),
        seconds=perf_counter() - started,
        stages=dict(timer.seconds),
        blockwise=blockwise,
        notes={name: entry.note for name, entry in tensors.items() if entry.note},
        data=samples.told,
        ranks=[] if ranks().alone else gathered(run.done | {"seconds": round(perf_counter() - started, 3)}),
        writes_samples=writes_samples(config),
    )


def _teacher(
    source: Source,
    samples: Samples,
    data: PathLike | None,
    device: torch.device,
    progress: bool,
    announce: Callable[[str], None] | None,
) -> tuple[float, TeacherChoice | None]:
    """The weight of the model between base and tuned that is calibrated, and how it was picked, if it was."""
    from tailorcli.calibration.teacher import choose_teacher

    view, weight, choice = source.stored, source.options.teacher_weight, None
    assert isinstance(view, InterpolatedCheckpoint)
    if weight == AUTO:
        shown = samples if data is None else drawn(replace(source, data=Path(data)))
        marks = response_masks(shown.inputs, shown.responses)
        given = (shown.inputs, source.options, device, marks, shown.following, progress)
        choice = choose_teacher(view.base, view.tuned, *given)
        weight = choice.weight
        (announce or note)(choice.told())
        if data is None:
            note("it was picked on --data: where TUNED was trained on that, pass other records with --teacher-data")
    return float(weight or 1.0), choice


def _facts(run: Run, dtype: str, blockwise: bool, choice: TeacherChoice | None) -> dict[str, Any]:
    """What the manifest says of the run: the model, the data, the options, the versions."""
    tuned = original(run.tuned)
    model: dict[str, Any] = {"path": path_text(tuned.path), "fingerprint": run.tuned.fingerprint(), "run_in": dtype}
    model |= {"config": config_digest(config_folder(tuned))} | hub_facts(tuned.path)
    if isinstance(run.tuned, InterpolatedCheckpoint):
        model |= {"base": path_text(run.tuned.base.path), "teacher_weight": run.tuned.weight}
    if choice is not None:
        model["teacher_losses"] = {f"{weight:g}": loss for weight, loss in sorted(choice.losses.items())}
    if run.stored is not run.tuned:
        model["base"] = path_text(run.stored.path)
    options = run.options.to_dict() | {"overwrite": False, "blockwise": "always" if blockwise else "never"}
    return {"model": model, "data": run.samples.facts, "options": options, "versions": package_versions()}


def _require_new(held_out: PathLike | None, overwrite: bool) -> None:
    """Whoever writes samples of their own does not lose them; and the file can be made when the work is done."""
    if held_out is None:
        return
    if not Path(held_out).parent.is_dir():
        raise OutputError(f"cannot write {held_out}: its folder is not there", "make it first, or choose another file")
    if Path(held_out).exists() and not overwrite:
        raise OutputError(f"{held_out} exists already", "choose another file for --held-out, or pass --overwrite")


def _open(
    model: Path, base: PathLike | None, stack: ExitStack, options: CalibrateOptions
) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoint from which the network is loaded, and the tuned model: the same, but for an adapter.

    With a teacher's weight both are a view between base and tuned, at the weight 1 as long as that is not known.
    """
    if options.teacher_weight is not None:
        if base is None and not is_adapter(model):
            raise OptionsError("--teacher-weight needs the base", "pass it: --base BASE")
        opened = stack.enter_context(open_checkpoint(named_base(model) if base is None else base))
        tuned = stack.enter_context(open_for(opened, model))
        weight = 1.0 if options.teacher_weight == AUTO else float(options.teacher_weight)
        view = InterpolatedCheckpoint(opened, tuned, weight)
        return view, view
    if not is_adapter(model):
        if base is not None:
            raise OptionsError(f"--base is for adapters, but {model} is none", "leave --base out")
        checkpoint = stack.enter_context(open_checkpoint(model))
        if (model / CONFIG_FILE).exists():
            note(f"{model} holds full weights, which are taken as they are: the adapter beside them is not applied")
        return checkpoint, checkpoint
    stored = stack.enter_context(open_checkpoint(named_base(model) if base is None else base))
    return stored, stack.enter_context(open_for(stored, model))


def _longest_hessian_names(stored: Checkpoint) -> Iterator[str]:
    """Upper bounds, to size the header: one name per Hessian that could be written, with the longest prefix.

    A parameter's name may have a prefix that transformers adds to the checkpoint's.
    """
    for name, info in stored.tensors.items():
        yield f"{name} and a prefix such as model.language_model [all]"
        if len(info.shape) == 3:
            yield from (f"{name} and a prefix such as model.language_model [{part}]" for part in range(info.shape[0]))


def _write_bias(run: Run) -> None:
    """The Hessian of all constants."""
    import torch

    from tailorcli.calibration.stats import BIAS_HESSIAN

    info = HessianInfo(1, "diagonal", run.samples.num_tokens, 2.0)
    run.writer.write(BIAS_HESSIAN, info, torch.tensor([2.0]) if ranks().first else None)
