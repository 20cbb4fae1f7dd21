"""The commands that are ended at every operation on files, and how what they wrote is opened."""

from collections.abc import Callable
from dataclasses import dataclass

from helpers import make_pair

from tailorcli import (
    CalibrateOptions,
    Checkpoint,
    DistillOptions,
    PatchOptions,
    calibrate_model,
    patch_checkpoint,
    tailor,
)
from tailorcli.calibration.stats import Stats
from tailorcli.merging.merge import merge_patches
from tailorcli.options import MergeOptions
from tailorcli.patchfile.reader import PatchFile
from tailorcli.patching.apply import apply_patch
from tailorcli.training.finetune import finetune_model
from tailorcli.training.importance import Importance
from tailorcli.training.probe import probe_model
from tailorcli.training.settings import FinetuneOptions, ProbeOptions

FOLDER, FILE, STATS, WRITTEN, IMPORTANCE = "out", "out.safetensors", "stats", "written.jsonl", "importance"
SHARD = 20_000  # bytes: several shards of the tiny models


@dataclass(frozen=True)
class Command:
    """``run(inputs, work, variant, resume=..., overwrite=...)`` writes ``outputs`` into the folder ``work``.

    ``variant`` 1 differs from 0 in every tensor that is written: an earlier output.
    """

    name: str
    outputs: tuple[str, ...]
    run: Callable
    can_resume: bool = True
    can_overwrite: bool = True
    is_long: bool = False  # left out where a share of the kills is asked for


def make_inputs(folder):
    """A pair, its statistics with samples, the base's, and two patch files of each variant."""
    make_pair(folder, layers=1, shard="30KB")
    make_pair(folder / "deep", layers=2)  # blocks to go through one by one
    small = {"num_samples": 4, "seq_len": 24, "keep_samples": True}
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats", CalibrateOptions(**small))
    calibrate_model(folder / "base", folder / "data.jsonl", folder / "retain", CalibrateOptions(**small, seed=7))
    for number, density in enumerate((0.1, 0.2, 0.05, 0.3)):
        patch(folder, folder / f"patch{number}", 0, outputs=(FILE,), density=density)
    return folder


def patch(inputs, work, variant, *, outputs, resume=False, overwrite=False, density=None, **changes):
    density = density or (0.1, 0.2)[variant]
    options = PatchOptions(density=density, max_shard_size=SHARD, resume=resume, overwrite=overwrite, **changes)
    out, file = (work / name if name in outputs else None for name in (FOLDER, FILE))
    retain = inputs / "retain" if options.propagate else None
    stats = inputs / "stats"
    patch_checkpoint(inputs / "base", inputs / "tuned", out, stats, options, patch_file=file, retain=retain)


def apply(inputs, work, variant, *, resume=False, overwrite=False):
    file = inputs / f"patch{variant}" / FILE
    apply_patch(inputs / "base", file, work / FOLDER, max_shard_size=SHARD, resume=resume, overwrite=overwrite)


def merge(inputs, work, variant, *, resume=False, overwrite=False):
    files = [inputs / f"patch{number}" / FILE for number in (variant, variant + 2)]
    options = MergeOptions("patches", resume=resume, overwrite=overwrite, max_shard_size=SHARD)
    merge_patches(inputs / "base", files, work / FOLDER, (), (), options, patch_file=work / FILE)


def calibrate(inputs, work, variant, *, overwrite=False, **changes):
    data = None if changes.get("synthetic") else inputs / "deep" / "data.jsonl"
    options = CalibrateOptions(
        num_samples=4, seq_len=24, seed=variant, keep_samples=True, overwrite=overwrite, **changes
    )
    held_out = work / WRITTEN if data is None else None
    calibrate_model(inputs / "deep" / "tuned", data, work / STATS, options, held_out=held_out)


def whole(inputs, work, variant, *, resume=False, overwrite=False):
    options = PatchOptions(density=(0.1, 0.2)[variant], max_shard_size=SHARD, resume=resume, overwrite=overwrite)
    calibration = CalibrateOptions(num_samples=4, seq_len=24)
    tailor(  # in one pass: it has blocks to go through
        inputs / "deep" / "base",
        inputs / "deep" / "tuned",
        work / FOLDER,
        inputs / "deep" / "data.jsonl",
        options=options,
        calibration=calibration,
    )


def aimed(inputs, work, variant, *, resume=False, overwrite=False):
    deep = inputs / "deep"
    options = PatchOptions(propagate=False, max_shard_size=SHARD, resume=resume, overwrite=overwrite, seed=variant)
    tailor(
        *(deep / "base", deep / "tuned", work / FOLDER, deep / "data.jsonl"),
        options=options,
        calibration=CalibrateOptions(num_samples=4, seq_len=24, seed=variant),
        distill=DistillOptions(steps=1, batch_size=2),
        target=("old=50", "new=50")[variant],
    )


def _with(function, **fixed):
    return lambda *arguments, **options: function(*arguments, **fixed, **options)


def probe(inputs, work, variant, *, overwrite=False):
    options = ProbeOptions(num_samples=2, rademacher=1, seq_len=8, seed=variant, overwrite=overwrite)
    probe_model(inputs / "base", work / IMPORTANCE, options)


def finetune(inputs, work, variant, *, resume=False, overwrite=False):
    deep = inputs / "deep"
    options = FinetuneOptions(
        method="spider",
        steps=4,
        save_every=2,
        batch_size=2,
        seq_len=16,
        learning_rate=1e-2,
        seed=variant,
        resume=resume,
    )
    finetune_model(deep / "base", deep / "data.jsonl", work / FOLDER, options)


COMMANDS = (
    Command("patch", (FOLDER,), _with(patch, outputs=(FOLDER,))),
    Command("patch both", (FOLDER, FILE), _with(patch, outputs=(FOLDER, FILE))),
    Command("patch file", (FILE,), _with(patch, outputs=(FILE,))),
    Command("patch propagated", (FOLDER,), _with(patch, outputs=(FOLDER,), propagate=True)),
    Command(
        "patch checked",
        (FOLDER,),
        _with(patch, outputs=(FOLDER,), propagate=True, check_propagation=True),
        is_long=True,
    ),
    Command("patch whole", (FOLDER,), whole),
    Command("patch target", (FOLDER,), aimed, is_long=True),
    Command("apply", (FOLDER,), apply),
    Command("merge-multi", (FOLDER, FILE), merge),
    Command("calibrate", (STATS,), calibrate, can_resume=False),
    Command("calibrate blocks", (STATS,), _with(calibrate, blockwise="always"), can_resume=False),
    Command("probe", (IMPORTANCE,), probe, can_resume=False),
    Command("finetune", (FOLDER,), finetune, can_overwrite=False, is_long=True),
    Command("calibrate synthetic", (STATS, WRITTEN), _with(calibrate, synthetic=True), can_resume=False),
)


def opens(work, output):
    """Whether an output opens as what it is. Raises what is no refusal."""
    from tailorcli import TailorError

    place = work / output
    try:
        if output == FOLDER:
            with Checkpoint.open(place) as checkpoint:
                for name in checkpoint.tensors:
                    checkpoint.read(name)
        elif output == FILE:
            with PatchFile.open(place) as file:
                file.check()
        elif output == STATS:
            stats = Stats.open(place)
            for name in stats.hessians:
                stats.load(name)
            stats.close()
        elif output == IMPORTANCE:
            importance = Importance.open(place)
            for name in importance.digests:
                importance.read(name)
        else:
            return place.exists()
    except TailorError:
        return False
    return True
