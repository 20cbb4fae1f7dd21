"""``patch --check-propagation``: propagated on nine tenths of the samples, and kept only where it helps on the rest.

Propagation fits every layer to few tokens, through all layers before it; with too few for a model it can lose. Whether
it does is seen on the samples that it was not fitted on: how far the plain and the propagated patch are from the
tuned model on those of the new task, and from the base on the retained ones. The statistics are of all samples, though:
the masks, and the plain patch, have seen those as well, so that the check leans towards the plain one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.device import StageTimer, device_errors, exact_float32
from tailorcli.distributed import require_alone
from tailorcli.errors import OptionsError, OutputError
from tailorcli.files import HIDDEN, as_output_error, beside
from tailorcli.models.config import read_config
from tailorcli.models.empty import empty_on_meta
from tailorcli.models.running import output_head
from tailorcli.options import CalibrateOptions, PatchOptions
from tailorcli.patchfile.reader import PatchFile
from tailorcli.patchfile.report import PatchReport
from tailorcli.patching.apply import write_patched
from tailorcli.patching.inputs import PatchInputs
from tailorcli.runs.outputs import Target, free_bytes, progress_bar
from tailorcli.runs.plan import Plan
from tailorcli.runs.writing import Outputs
from tailorcli.training.run import Teaching
from tailorcli.units import format_bytes

if TYPE_CHECKING:
    import torch

SUFFIX = ".check"  # of the folder beside the output that an interrupted run goes on from
PLAIN, PROPAGATED = "plain", "propagated"


def check_both(target: Target, plan: Plan, inputs: PatchInputs, options: PatchOptions) -> None:
    """Both patches can be made, and be kept in the folder beside the output, if there is one.

    Raises OptionsError, OutputError.
    """
    require_alone("--check-propagation")
    if inputs.base.dequantized:
        what = "--check-propagation keeps two patch files, and the base's tensors are quantised"
        raise OptionsError(what, "leave it out")
    how = CalibrateOptions(trust_remote_code=options.trust_remote_code)
    network = empty_on_meta(inputs.base, read_config(inputs.base.path), how)
    if output_head(network) is None:
        what = f"--check-propagation compares answers, and {type(network).__name__} has no layer over a vocabulary"
        raise OptionsError(what, "leave it out")
    if target.folder is None and target.patch_file is None:
        return
    place, work = target.place, work_folder(target)
    needed, free = plan.write_bytes + 2 * plan.patch_bytes, free_bytes(place)
    if needed > free:
        what = f"not enough disk for {place}: the output and two patches beside it take {format_bytes(needed)}"
        raise OutputError(f"{what}, {format_bytes(free)} are free", "free some, or choose another disk")
    ours = (PLAIN, PROPAGATED, HIDDEN)
    if work.exists() and not (work.is_dir() and all(path.name.startswith(ours) for path in work.iterdir())):
        raise OutputError(f"{work} is no folder of ours", "move it away")


def patch_checked(
    plan: Plan,
    inputs: PatchInputs,
    outputs: Outputs,
    target: Target,
    options: PatchOptions,
    device: torch.device,
    progress: bool,
    patch: Callable[[Target, PatchOptions, bool], PatchReport],
) -> PatchReport:
    """Make both patches in a folder beside the output, and write the better one; its report says what was measured.

    ``patch`` makes one of them, of samples of which it may be told to hold a tenth out. Raises TailorError.
    """
    work = work_folder(target)
    try:
        if work.exists() and not target.resume:
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_output_error(work, error) from error
    reports = {}
    for name in (PLAIN, PROPAGATED):
        begun = any(path.name.startswith(name) for path in work.iterdir())
        where = Target.of(None, work / f"{name}.safetensors", resume=begun, overwrite=False)
        how = replace(options, propagate=name == PROPAGATED, check_propagation=False, resume=begun, overwrite=False)
        how = replace(how, max_shard_size=None)
        reports[name] = patch(where, how, name == PROPAGATED)
    timer = StageTimer(device)
    with timer.stage("check"), exact_float32(), device_errors():
        found = _measured(work, inputs, options, device)
    losses = {name: found[name]["new"] + found[name]["retained"] for name in reports}
    best = PROPAGATED if losses[PROPAGATED] < losses[PLAIN] else PLAIN
    bar = progress_bar(plan.tensors, "writing", progress)
    with PatchFile.open(work / f"{best}.safetensors") as file, bar, timer.stage("write"):
        records = write_patched(plan, inputs.base, file, {}, reports[best], outputs, bar.update)
    stages = dict(reports[PLAIN].stages)
    for name, seconds in (*reports[PROPAGATED].stages.items(), *timer.seconds.items()):
        stages[name] = stages.get(name, 0.0) + seconds
    in_order = [records[name] for name in inputs.base.tensors]
    facts: dict[str, Any] = {"kept": best == PROPAGATED, "held_out": found}
    return replace(reports[best], options=options.to_dict(), tensors=in_order, stages=stages, propagation=facts)


def work_folder(target: Target) -> Path:
    """The folder beside the output."""
    return beside(target.place, SUFFIX)


def _measured(
    work: Path, inputs: PatchInputs, options: PatchOptions, device: torch.device
) -> dict[str, dict[str, float]]:
    """The divergences of both patches on the samples that are held out."""
    assert inputs.stats is not None
    assert inputs.retain_stats is not None
    teachers, trust = [(inputs.tuned, inputs.stats)], options.trust_remote_code
    teaching = Teaching(inputs.base, teachers, inputs.retain_stats, device, trust, work)
    materials = teaching.held_out_materials(inputs.stats.options.batch_size)
    found = {}
    for name in (PLAIN, PROPAGATED):
        with PatchFile.open(work / f"{name}.safetensors") as file:
            found[name] = teaching.divergences(file, materials)
    return found


def in_words(found: dict[str, dict[str, float]]) -> str:
    """Both patches' divergences in words."""
    both = [f"{name} {of['new']:.4f} from TUNED and {of['retained']:.4f} from BASE" for name, of in found.items()]
    return f"{', '.join(both)}, nats a token"
