"""Checks that base, tuned and statistics belong together, before any work."""

from __future__ import annotations

from tailorcli.adapters.checkpoint import AdaptedCheckpoint
from tailorcli.adapters.config import CONFIG_FILE as ADAPTER_CONFIG
from tailorcli.adapters.interpolated import InterpolatedCheckpoint, interpolated, original
from tailorcli.calibration.stats import Stats, TensorStats, too_few_tokens
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import TensorInfo
from tailorcli.checkpoint.quantized import DequantizedCheckpoint
from tailorcli.checkpoint.renamed import RenamedCheckpoint
from tailorcli.errors import CheckpointError, OptionsError, StatsError, note
from tailorcli.files import in_shell
from tailorcli.models.empty import HOLLOW_HINT
from tailorcli.models.names import unwrapped
from tailorcli.options import PatchOptions

_SMALL_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4")
_QUANTISED = (".qweight", ".weight_packed", ".absmax", ".SCB", ".weight_scale", ".weight_scale_inv")


def check_pair(base: Checkpoint, tuned: Checkpoint, allow_dtype_mismatch: bool) -> None:
    """Both checkpoints have the same tensors: names, shapes, dtypes; and are not one and the same.

    What an adapter makes or brings along is not stored in the base's dtype, and need not be. Raises CheckpointError
    where they do not go together.
    """
    _check_names(base, tuned)
    free = tuned.changed if isinstance(tuned, AdaptedCheckpoint) else frozenset()
    for name, other in tuned.tensors.items():
        info = base.tensors[name]
        if info.shape != other.shape:
            raise CheckpointError(_shape_message(info, other), _shape_hint(base, tuned, info, other))
        if info.dtype != other.dtype and not allow_dtype_mismatch and name not in free:
            differing = sum(i.dtype != base.tensors[n].dtype for n, i in tuned.tensors.items())
            raise CheckpointError(
                f"tensor {name!r} is {_dtype_of(base, name)} in base ({base.path}) and {_dtype_of(tuned, name)} in "
                f"tuned ({tuned.path}); {differing} tensors differ in dtype",
                "pass --allow-dtype-mismatch to compute in float32 and store the base's dtype",
            )
    for name, info in base.tensors.items():
        if info.dtype in _SMALL_FLOATS and name in tuned.tensors and not are_equal(base, tuned, name):
            raise CheckpointError(
                f"tensor {name!r} is {info.dtype} without scales and differs between base ({base.path}) and tuned "
                f"({tuned.path}): it cannot be patched",
                "save both in bfloat16",
            )
    if isinstance(tuned, AdaptedCheckpoint) and tuned.is_untrained():
        raise CheckpointError(f"the adapter {tuned.path} changes nothing: it is untrained", "pass a trained adapter")
    if _have_equal_samples(base, tuned) and _equal_bytes(base, tuned):
        raise CheckpointError(
            f"base and tuned are identical ({base.path} and {tuned.path})",
            "its weights are the base's, and an adapter lies beside them: pass a folder of the adapter alone"
            if (tuned.path / ADAPTER_CONFIG).exists()
            else "pass the pre-trained folder, then the tuned",
        )


def _dtype_of(checkpoint: Checkpoint, name: str) -> str:
    """A tensor's dtype as its file has it."""
    if isinstance(checkpoint, DequantizedCheckpoint) and name in checkpoint.scale_of:
        return f"{checkpoint.stored.tensors[name].dtype} with scales"
    return checkpoint.tensors[name].dtype


def _check_names(base: Checkpoint, tuned: Checkpoint) -> None:
    only_base = [name for name in base.tensors if name not in tuned.tensors and name not in tuned.absent]
    only_tuned = [name for name in tuned.tensors if name not in base.tensors]
    if not only_base and not only_tuned:
        return
    plain = {unwrapped(name) for name in only_base} & {unwrapped(name) for name in only_tuned}
    only_base, only_tuned = (  # a wrapper's prefix is not what is wrong
        [name for name in names if unwrapped(name) not in plain] for names in (only_base, only_tuned)
    )
    missing = "; ".join(
        f"only in {where}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for where, names in (("base", only_base), ("tuned", only_tuned))
        if names
    )
    hint = "pass a tuned checkpoint of the same architecture, saved in full"
    if any(".lora_A." in name or name.endswith(".base_layer.weight") for name in only_tuned):
        hint = "tuned was saved from a PEFT model before its adapter was merged: model.merge_and_unload() first"
    elif any(name.endswith(_QUANTISED) for name in only_tuned):
        hint = "tuned is quantised and base is not: pass the fine-tuned model as it was before it was quantised"
    elif (
        any(name.endswith("lm_head.weight") for name in (*only_base, *only_tuned)) and len(only_base + only_tuned) == 1
    ):
        hint = "one of them ties its embeddings and the other does not: save both the same way"
    raise CheckpointError(f"base ({base.path}) and tuned ({tuned.path}) hold different tensors: {missing}", hint)


def _shape_message(base: TensorInfo, tuned: TensorInfo) -> str:
    return f"tensor {base.name!r} has shape {list(base.shape)} in base and {list(tuned.shape)} in tuned"


def _shape_hint(base: Checkpoint, tuned: Checkpoint, first: TensorInfo, other: TensorInfo) -> str:
    """A vocabulary is resized where a table of tokens, or two, and nothing else has other rows."""
    if 0 in other.shape and 0 not in first.shape:
        return HOLLOW_HINT
    differing = [base.tensors[name] for name, info in tuned.tensors.items() if base.tensors[name].shape != info.shape]
    rows = {(info.shape[:1], tuned.tensors[info.name].shape[:1]) for info in differing}
    rest = all(info.shape[1:] == tuned.tensors[info.name].shape[1:] for info in differing)
    tables = len([info for info in differing if len(info.shape) == 2])  # a head may have a bias besides
    if len(rows) == 1 and rest and len(first.shape) > 0 and 1 <= tables <= 2:
        if first.shape[0] < other.shape[0]:
            what = "pass --resized-vocab, and with --data --no-retain, to take the new rows from tuned"
            return f"this looks like a resized vocabulary: {what}"
        return (
            "this looks like a resized vocabulary, which tuned's is smaller in: grow tuned with "
            f"resize_token_embeddings({first.shape[0]}) first"
        )
    return "pass checkpoints of one architecture and size"


def _have_equal_samples(base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether no sample tells them apart, under whatever names they store their tensors."""
    if not isinstance(tuned, RenamedCheckpoint):
        return base.fingerprint() == tuned.fingerprint()
    return all(
        base.sample_bytes(base.tensors[name]) == tuned.sample_bytes(info) for name, info in tuned.tensors.items()
    )


def _equal_bytes(base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether all tensors are equal to the byte; only asked when their samples are."""
    return all(are_equal(base, tuned, name) for name in tuned.tensors)


def are_equal(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    """Whether a tensor is equal to the byte in both."""
    step, info = 1 << 24, base.tensors[name]
    if info.dtype != tuned.tensors[name].dtype:
        return False
    for start in range(0, info.nbytes, step):
        parts = []
        for checkpoint in (base, tuned):
            part = bytearray(min(step, info.nbytes - start))
            checkpoint.read_into(checkpoint.tensors[name], memoryview(part), start)
            parts.append(part)
        if parts[0] != parts[1]:
            return False
    return True


def check_retain(base: Checkpoint, tuned: Checkpoint, retain_stats: Stats, options: PatchOptions) -> None:
    """The retained statistics were made on this very base, know all its tensors, and fit their shapes.

    Raises OptionsError or StatsError otherwise.
    """
    if not options.needs_hessians or options.method != "tailor":
        raise OptionsError("--retain is for the method tailor with statistics", "leave --retain out")
    if options.resized_vocab:
        raise OptionsError(
            "--retain does not go with --resized-vocab: the base's statistics know nothing of the new rows",
            "give the base the new rows first (resize_token_embeddings) and calibrate that",
        )
    if retain_stats.model_fingerprint != base.fingerprint():
        whose = (
            f"on the model given as TUNED ({tuned.path})"
            if retain_stats.model_fingerprint == tuned.fingerprint()
            else (
                f"from another model ({retain_stats.manifest['model'].get('path', 'unknown')}) than base ({base.path})"
            )
        )
        raise StatsError(
            f"{retain_stats.path} was calibrated {whose}; --retain takes statistics of the base",
            f"make them: tailorcli calibrate {in_shell(base.path)} --synthetic -o NEW_STATS",
        )
    check_shapes(base, retain_stats)
    _warn_of_few_tokens(retain_stats)


def check_propagate(stats: Stats | None, retain_stats: Stats | None, options: PatchOptions) -> None:
    """There is a retain term, without which propagation ruins a patch, and the samples to run the models over.

    Raises OptionsError otherwise.
    """
    if stats is None or retain_stats is None or options.retain_weight <= 0.0:
        raise OptionsError(
            "propagation needs the retain term: without it nothing holds the patched weights near the base",
            "pass --retain STATS (tailorcli calibrate BASE --synthetic -o STATS) and a positive --retain-weight",
        )
    for source in (stats, retain_stats):
        source.samples()


def check_stats(base: Checkpoint, tuned: Checkpoint, stats: Stats) -> None:
    """The statistics were made on this very tuned model, know all its tensors, and fit their shapes.

    Those of another model between base and tuned serve as well, which is noted. Raises StatsError otherwise.
    """
    weight = tuned.weight if isinstance(tuned, InterpolatedCheckpoint) else 1.0
    measured, tuned = interpolated(base, original(tuned), stats.teacher_weight), original(tuned)
    if stats.model_fingerprint == measured.fingerprint():
        if stats.teacher_weight != weight:
            note(f"{stats.path} was measured at teacher weight {stats.teacher_weight:g}, the patch goes to {weight:g}")
    else:
        if stats.model_fingerprint == base.fingerprint():
            swapped = f"{in_shell(tuned.path)} {in_shell(base.path)}"
            raise StatsError(
                f"{stats.path} was calibrated on the model given as BASE ({base.path})",
                f"if the two are swapped: tailorcli ... {swapped}; if not, calibrate TUNED",
            )
        option = f" --base {in_shell(base.path)}" if isinstance(tuned, AdaptedCheckpoint) else ""
        made_from = stats.manifest["model"].get("path", "another model")
        raise StatsError(
            f"{stats.path} was made from another model ({made_from}) than tuned ({tuned.path})",
            f"calibrate it: tailorcli calibrate {in_shell(tuned.path)}{option} --data FILE -o NEW_STATS",
        )
    check_shapes(tuned, stats)
    _warn_of_few_tokens(stats)


def _warn_of_few_tokens(stats: Stats) -> None:
    if few := too_few_tokens(stats.hessians):
        note(f"{stats.path}: {few} and calibrate again")


def check_shapes(model: Checkpoint, stats: Stats) -> None:
    """The statistics know all tensors of the model, and fit their shapes. Raises StatsError otherwise."""
    for name, info in model.tensors.items():
        entry = stats.tensors.get(name)
        if entry is None:
            raise StatsError(f"{stats.path} does not mention tensor {name!r}", "calibrate again")
        fused = bool(entry.experts)
        matrix = len(info.shape) == (3 if fused else 2)
        if (fused and (not matrix or len(entry.experts) != info.shape[0])) or (entry.transposed and not matrix):
            what = f"{len(entry.experts)} experts" if fused else "a matrix"
            raise StatsError(
                f"{stats.path}: tensor {name!r} of shape {list(info.shape)} is not {what}", "calibrate again"
            )
        inputs = _num_inputs(info, entry)
        for hessian in entry.hessians:
            size = stats.hessians[hessian].size
            if size != inputs:
                raise StatsError(
                    f"{stats.path}: tensor {name!r} has {inputs} input channels, its Hessian {size}", "calibrate again"
                )


def _num_inputs(info: TensorInfo, entry: TensorStats) -> int:
    if entry.role == "bias":
        return 1
    if entry.experts:
        return info.shape[1] if entry.transposed else info.shape[2]
    if len(info.shape) < 2 or entry.role == "norm":  # each entry has an input of its own, whatever their shape
        return info.numel
    return info.shape[0] if entry.transposed else info.numel // max(info.shape[0], 1)
