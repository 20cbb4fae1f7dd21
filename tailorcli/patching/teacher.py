"""The teacher's weight that "auto" stands for: worked out before anything else, by the loss on the new task's data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tailorcli.adapters.interpolated import InterpolatedCheckpoint
from tailorcli.calibration.sources import Source, drawn
from tailorcli.calibration.stats import Stats, response_masks
from tailorcli.calibration.teacher import choose_teacher
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.data.records import read_records
from tailorcli.device import device_errors, exact_float32, resolve_device
from tailorcli.errors import OptionsError, note
from tailorcli.files import PathLike
from tailorcli.hub import local_folders
from tailorcli.models.config import read_config
from tailorcli.models.naming import open_for
from tailorcli.options import AUTO, CalibrateOptions, PatchOptions

if TYPE_CHECKING:
    from tailorcli.data.samples import Samples


def with_teacher(
    options: PatchOptions,
    base: PathLike,
    tuned: PathLike,
    stats: PathLike | None = None,
    data: PathLike | None = None,
    progress: bool = False,
    tell: Callable[[str], None] | None = None,
    calibration: CalibrateOptions | None = None,
    samples: Samples | None = None,
) -> PatchOptions:
    """``options`` with a number in place of the teacher's weight "auto"; others as they are.

    It is picked on ``data``, drawn and run as ``calibration`` says, or on ``samples`` of the new task, or else on those
    that ``stats`` hold, unless theirs was picked before. ``tell`` hears what was picked and why. Raises TailorError.
    """
    if options.teacher_weight != AUTO:
        return options
    say = tell or note
    base, tuned = local_folders((base, tuned), code=options.trust_remote_code)
    with ExitStack() as stack:
        opened = stack.enter_context(open_checkpoint(base, options.fp8_output))
        other = stack.enter_context(open_for(opened, tuned, options.fp8_output))
        found = None if stats is None else stack.enter_context(closing(Stats.open(stats)))
        if data is None and found is not None and "teacher_losses" in found.manifest["model"]:
            say(f"teacher weight {found.teacher_weight:g}, which was picked when {found.path} was made")
            return replace(options, teacher_weight=found.teacher_weight)
        calibration = replace(
            calibration or CalibrateOptions(), teacher_weight=None, trust_remote_code=options.trust_remote_code
        )
        if found is not None:
            calibration = replace(calibration, dtype=found.options.dtype)
        if data is not None:
            view = InterpolatedCheckpoint(opened, other, 1.0)
            samples = drawn(Source(view, view, read_config(view.path), calibration, Path(data), None))
        if samples is not None:
            inputs, masks = samples.inputs, response_masks(samples.inputs, samples.responses)
            following = samples.following
        elif found is not None:
            inputs, masks, following = found.samples(), found.responses(), found.following()
        else:
            raise OptionsError(
                "--teacher-weight auto is picked by the loss on the new task's data, and there are none",
                "pass --teacher-data FILE, records that TUNED was not trained on",
            )
        device = resolve_device(options.device)
        with exact_float32(), device_errors("a smaller --seq-len"):
            choice = choose_teacher(opened, other, inputs, calibration, device, masks, following, progress)
    say(choice.told())
    if data is None:
        note("it was picked on what TUNED is calibrated on: where it was trained on that, pass others: --teacher-data")
    return replace(options, teacher_weight=choice.weight)


def check_teacher_data(data: PathLike, calibration: CalibrateOptions) -> None:
    """What the weight is to be picked on can be read. Raises DataError."""
    read_records(data, columns=calibration.columns)
