"""What will happen to each tensor and what it will cost, decided on headers alone, before any work."""

from __future__ import annotations

import re

from tailorcli.adapters.checkpoint import AdaptedCheckpoint
from tailorcli.calibration.stats import Stats, TensorStats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, TensorInfo
from tailorcli.checkpoint.layout import plan_layout
from tailorcli.errors import CheckpointError, OptionsError, StatsError
from tailorcli.options import PatchOptions, matches
from tailorcli.runs.plan import RUNTIME_BYTES, Plan, TensorPlan, group_by_hessian, most_patch_bytes

_WORK_BYTES = 12 * (64 << 20)  # the solver's work arrays, bounded by the row chunks in core.solvers
_TRANSFORMERS_BYTES = 300 << 20  # and what graft needs besides


def build_plan(
    base: Checkpoint, tuned: Checkpoint, stats: Stats | None, options: PatchOptions, retain: Stats | None = None
) -> Plan:
    """Check that the inputs belong together and decide every tensor's treatment.

    Raises CheckpointError, StatsError or OptionsError for anything that would only show up in the middle of the
    work. ``stats`` may be None only where no Hessian is needed (``options.needs_hessians``).
    """
    if stats is None and options.needs_hessians:
        raise OptionsError(
            "no statistics given",
            "pass --stats STATS (made by tailorcli calibrate), or choose by salience alone: --solver none --omega 1",
        )
    check_pair(base, tuned, options.allow_dtype_mismatch)
    if stats is not None:
        check_stats(base, tuned, stats)
    if retain is not None:
        check_retain(base, tuned, retain, options)
    if options.propagate:
        check_propagate(stats, retain, options)
    changed = tuned.changed if isinstance(tuned, AdaptedCheckpoint) else base.tensors.keys()
    tensors = [_plan_tensor(info, info.name in changed, stats, options, retain) for info in base.tensors.values()]
    if not any(tensor.action == "patch" for tensor in tensors):
        raise OptionsError("no tensor would be patched", "check --include and --exclude, and those of calibrate")
    if retain is not None and options.retain_weight > 0.0 and not any(tensor.retain for tensor in tensors):
        raise StatsError(
            f"{retain.path} has statistics for none of the tensors that would be patched",
            "check --include and --exclude, and those of calibrate",
        )
    ordered = group_by_hessian(tensors)
    layout = plan_layout(base, options.max_shard_size)
    passes = {"graft": 1, "magnitude": 2 * options.counts_first}.get(options.method, 0)  # over both before the work
    held = [working_set(tensor, tuned, stats, options) for tensor in ordered]
    held.append(_training_bytes(ordered, base, tuned, options))
    propagated = _propagation_bytes(ordered, base, stats, retain) if options.propagate else 0
    return Plan(
        tensors=tuple(ordered),
        layout=layout,
        read_bytes=_bytes_to_read(ordered, tuned, stats, retain)
        + passes * _pair_bytes(ordered, tuned)
        + (3 * base.nbytes if options.propagate else 0),  # the three models' weights, to run them
        write_bytes=layout.nbytes,
        patch_bytes=most_patch_bytes(_most_kept([t for t in ordered if t.action == "patch"], options)),
        peak_bytes=RUNTIME_BYTES + max(held) + propagated,
        propagates=bool(options.propagate),
        largest_hessian=max((stats.hessians[h].size for t in ordered if stats for h in t.hessians), default=0),
    )


def _most_kept(tensors: list[TensorPlan], options: PatchOptions) -> list[tuple[TensorPlan, int]]:
    """How many entries of each tensor are kept, at most; of a draw, all but surely: six deviations above its mean."""
    if options.method == "interpolate":
        return [(tensor, tensor.numel) for tensor in tensors]
    if options.counts_first:  # the widest entries first
        left, most = round(options.density * sum(tensor.numel for tensor in tensors)), []
        for tensor in sorted(tensors, key=lambda t: t.nbytes / t.numel, reverse=True):
            most.append((tensor, min(left, tensor.numel)))
            left -= most[-1][1]
        return most
    spread = 6.0 * (options.density * (1.0 - options.density)) ** 0.5 if options.method == "dare" else 0.0
    return [(t, min(t.numel, round(options.density * t.numel + spread * t.numel**0.5))) for t in tensors]


def _plan_tensor(
    info: TensorInfo, changed: bool, stats: Stats | None, options: PatchOptions, retain: Stats | None
) -> TensorPlan:
    entry = stats.tensors[info.name] if stats is not None else TensorStats(None)
    reason = ""
    if not matches(info.name, options.include, options.exclude):
        reason = "not chosen by --include and --exclude"
    elif info.dtype not in PATCHABLE_DTYPES:
        reason = f"{info.dtype} is no floating-point dtype that can be patched"
    elif info.numel == 0:
        reason = "it has no entries"
    elif not changed:
        reason = "the adapter leaves it alone"
    elif options.needs_hessians and not entry.hessians:
        reason = f"no statistics: {entry.reason}"
    elif options.method == "tailor-released" and not _is_linear(entry, stats):
        reason = "the released code patches linear layers alone"
    common = (info.name, info.dtype, info.shape, info.nbytes)
    if reason:
        return TensorPlan(*common, action="base", reason=reason, role=entry.role)
    hessian, experts = (entry.hessian, tuple(entry.experts)) if options.needs_hessians else (None, ())
    retained: tuple[str, ...] = ()
    note = ""
    if retain is not None and options.retain_weight > 0.0:
        retained, note = _retained(entry, retain.tensors[info.name], stats, retain)
    return TensorPlan(*common, "patch", "", hessian, entry.role, entry.transposed, experts, retained, note)


def _retained(
    entry: TensorStats, other: TensorStats, stats: Stats | None, retain: Stats
) -> tuple[tuple[str, ...], str]:
    """The retained data's Hessians for a tensor, of the same kind as those of the new task; or why there are none."""
    names = tuple(other.hessians)
    if not names:
        return (), f"without the retain term: no retained statistics: {other.reason}"
    alike = stats is not None and len(names) == len(entry.hessians) and entry.transposed == other.transposed
    if (
        stats is None
        or not alike
        or any(
            stats.hessians[new].kind != retain.hessians[old].kind
            for new, old in zip(entry.hessians, names, strict=True)
        )
    ):
        return (), "without the retain term: its retained statistics are of another kind than those of the new task"
    return names, ""


def _is_linear(entry: TensorStats, stats: Stats | None) -> bool:
    return stats is not None and entry.hessian is not None and stats.hessians[entry.hessian].kind == "full"


def _training_bytes(tensors: list[TensorPlan], base: Checkpoint, tuned: Checkpoint, options: PatchOptions) -> int:
    """Bytes that graft holds at its fullest, but for a batch's activations: the model, both weights, gradients, S."""
    if options.method != "graft":
        return 0
    patched = [tensor for tensor in tensors if tensor.action == "patch"]
    held = sum(2 * tensor.nbytes + tuned.tensors[tensor.name].nbytes + 4 * tensor.numel for tensor in patched)
    work = [4 * tensor.numel for tensor in patched]
    chosen = 4 * (sum(work) if options.threshold == "global" else max(work))  # S again, its copies, the mask
    return _TRANSFORMERS_BYTES + base.nbytes + held + max(chosen, 4 * max(work))


def _propagation_bytes(tensors: list[TensorPlan], base: Checkpoint, stats: Stats | None, retain: Stats | None) -> int:
    """Bytes that propagation holds besides: a block of three models and its patch, moments, hidden states."""
    blocks: dict[str, int] = {}
    for info in base.tensors.values():
        block = re.sub(r"(\.\d+)\..*", r"\1", info.name)  # up to its first number
        blocks[block] = blocks.get(block, 0) + info.nbytes
    known = [source for source in (stats, retain) if source is not None]
    sizes = {h: source.hessians[h] for source in known for t in tensors for h in t.hessians if h in source.hessians}
    moments = [4 * info.size**2 for info in sizes.values() if info.kind == "full"]
    widest = max((info.size for info in sizes.values() if info.kind == "full"), default=0)
    embedding = max((t.nbytes // t.shape[0] for t in tensors if t.role == "embedding" and len(t.shape) == 2), default=0)
    width = max((t.shape[-1] for t in tensors if t.role == "embedding" and len(t.shape) == 2), default=1)
    tokens = sum(int(source.manifest["data"].get("tokens", 0)) for source in known)
    # Of each token, in two models: what a block holds while it waits within (its input, the residual stream, what its
    # norm makes of that, queries, keys and values, or what the widest layer takes), and the holes between.
    hidden = 2 * tokens * (5 * embedding + embedding * widest // width)
    return _TRANSFORMERS_BYTES + 5 * max(blocks.values()) + 8 * max(moments, default=0) + hidden


def _pair_bytes(tensors: list[TensorPlan], tuned: Checkpoint) -> int:
    return sum(tensor.nbytes + tuned.read_cost(tensor.name) for tensor in tensors if tensor.action == "patch")


def _bytes_to_read(tensors: list[TensorPlan], tuned: Checkpoint, stats: Stats | None, retain: Stats | None) -> int:
    total = sum(tensor.nbytes for tensor in tensors)
    total += sum(tuned.read_cost(tensor.name) for tensor in tensors if tensor.action == "patch")
    used = {hessian for tensor in tensors for hessian in tensor.hessians}
    total += sum(stats.nbytes(name) for name in used if stats is not None)
    return total + sum(retain.nbytes(name) for name in {h for t in tensors for h in t.retain} if retain is not None)


def working_set(tensor: TensorPlan, tuned: Checkpoint, stats: Stats | None, options: PatchOptions) -> int:
    """Bytes held while one tensor is worked on: both weights, delta, score and its copy, result, Hessian, work."""
    if tensor.action != "patch":
        return 1 << 24
    full = tensor.numel * 4
    weights = tensor.nbytes + tuned.tensors[tensor.name].nbytes
    # The fullest moment is either the selection (delta, score, its copy) or the assembly (delta, decorator,
    # result); a result of the tensor before, and its mask, may still wait to be written.
    arrays = max(3 * full, 2 * full + tensor.nbytes) + full // 4 + tensor.nbytes + tensor.numel
    hessian = 0
    sizes = [stats.hessians[h].size for h in tensor.hessians if stats.hessians[h].kind == "full"] if stats else []
    if sizes:
        square = 4 * max(sizes) ** 2
        hessian = square // 2 + square + 2 * square  # packed, unpacked, damped copy and factor
        if tensor.retain:  # another of each, their sum; the goal and the target values of every entry
            hessian += square // 2 + 2 * square
            arrays += 2 * full
    work = min(_WORK_BYTES, 12 * full) if hessian else 0
    return weights + arrays + hessian + work


def check_pair(base: Checkpoint, tuned: Checkpoint, allow_dtype_mismatch: bool) -> None:
    """Both checkpoints have the same tensors: names, shapes, dtypes; and are not one and the same.

    What an adapter makes or brings along is not stored in the base's dtype, and need not be.
    """
    _check_names(base, tuned)
    free = tuned.changed if isinstance(tuned, AdaptedCheckpoint) else frozenset()
    for name, info in base.tensors.items():
        other = tuned.tensors[name]
        if info.shape != other.shape:
            raise CheckpointError(_shape_message(info, other), _shape_hint(base, tuned, info, other))
        if info.dtype != other.dtype and not allow_dtype_mismatch and name not in free:
            differing = sum(i.dtype != tuned.tensors[n].dtype for n, i in base.tensors.items())
            raise CheckpointError(
                f"tensor {name!r} is {info.dtype} in base ({base.path}) and {other.dtype} in tuned ({tuned.path}); "
                f"{differing} tensors differ in dtype",
                "pass --allow-dtype-mismatch to compute in float32 and store the base's dtype",
            )
    if isinstance(tuned, AdaptedCheckpoint) and tuned.is_untrained():
        raise CheckpointError(f"the adapter {tuned.path} changes nothing: it is untrained", "pass a trained adapter")
    if base.fingerprint() == tuned.fingerprint() and _equal_bytes(base, tuned):
        raise CheckpointError(
            f"base and tuned are identical ({base.path} and {tuned.path})",
            "pass the pre-trained folder, then the tuned",
        )


def _check_names(base: Checkpoint, tuned: Checkpoint) -> None:
    only_base = [name for name in base.tensors if name not in tuned.tensors]
    only_tuned = [name for name in tuned.tensors if name not in base.tensors]
    if not only_base and not only_tuned:
        return
    missing = "; ".join(
        f"only in {where}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for where, names in (("base", only_base), ("tuned", only_tuned))
        if names
    )
    hint = "pass a tuned checkpoint of the same architecture, saved in full"
    if any(name.endswith("lm_head.weight") for name in (*only_base, *only_tuned)) and len(only_base + only_tuned) == 1:
        hint = "one of them ties its embeddings and the other does not: save both the same way"
    raise CheckpointError(f"base ({base.path}) and tuned ({tuned.path}) hold different tensors: {missing}", hint)


def _shape_message(base: TensorInfo, tuned: TensorInfo) -> str:
    return f"tensor {base.name!r} has shape {list(base.shape)} in base and {list(tuned.shape)} in tuned"


def _shape_hint(base: Checkpoint, tuned: Checkpoint, first: TensorInfo, other: TensorInfo) -> str:
    """A vocabulary is resized where a table of tokens, or two, and nothing else has other rows."""
    differing = [info for name, info in base.tensors.items() if info.shape != tuned.tensors[name].shape]
    rows = {(info.shape[:1], tuned.tensors[info.name].shape[:1]) for info in differing}
    rest = all(info.shape[1:] == tuned.tensors[info.name].shape[1:] for info in differing)
    tables = len([info for info in differing if len(info.shape) == 2])  # a head may have a bias besides
    if len(rows) == 1 and rest and len(first.shape) > 0 and 1 <= tables <= 2:
        if first.shape[0] < other.shape[0]:
            return "this looks like a resized vocabulary: pass --resized-vocab to take the new rows from tuned"
        return (
            "this looks like a resized vocabulary, which tuned's is smaller in: grow tuned with "
            f"resize_token_embeddings({first.shape[0]}) first"
        )
    return "pass checkpoints of one architecture and size"


def _equal_bytes(base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether all tensors are equal to the byte; only asked when their samples are."""
    step = 1 << 24
    for name, info in base.tensors.items():
        for start in range(0, info.nbytes, step):
            parts = []
            for checkpoint in (base, tuned):
                part = bytearray(min(step, info.nbytes - start))
                checkpoint.read_into(checkpoint.tensors[name], memoryview(part), start)
                parts.append(part)
            if parts[0] != parts[1]:
                return False
    return True


def check_retain(base: Checkpoint, tuned: Checkpoint, retain: Stats, options: PatchOptions) -> None:
    """The retained statistics were made on this very base, know all its tensors, and fit their shapes."""
    if not options.needs_hessians or options.method != "tailor":
        raise OptionsError("--retain is for the method tailor with statistics", "leave --retain out")
    if options.resized_vocab:
        raise OptionsError(
            "--retain does not go with --resized-vocab: the base's statistics know nothing of the new rows",
            "give the base the new rows first (resize_token_embeddings) and calibrate that",
        )
    if retain.model_fingerprint != base.fingerprint():
        whose = (
            f"on the model given as TUNED ({tuned.path})"
            if retain.model_fingerprint == tuned.fingerprint()
            else (f"from another model ({retain.manifest['model'].get('path', 'unknown')}) than base ({base.path})")
        )
        raise StatsError(
            f"{retain.path} was calibrated {whose}; --retain takes statistics of the base",
            f"make them: tailorcli calibrate {base.path} --synthetic -o NEW_STATS",
        )
    check_shapes(base, retain)


def check_propagate(stats: Stats | None, retain: Stats | None, options: PatchOptions) -> None:
    """There is a retain term, without which propagation ruins a patch, and the samples to run the models over."""
    if stats is None or retain is None or options.retain_weight <= 0.0:
        raise OptionsError(
            "propagation needs the retain term: without it nothing holds the patched weights near the base",
            "pass --retain STATS (tailorcli calibrate BASE --synthetic -o STATS) and a positive --retain-weight",
        )
    for source in (stats, retain):
        source.samples()


def check_stats(base: Checkpoint, tuned: Checkpoint, stats: Stats) -> None:
    """The statistics were made on this very tuned model, know all its tensors, and fit their shapes."""
    if stats.model_fingerprint != tuned.fingerprint():
        if stats.model_fingerprint == base.fingerprint():
            raise StatsError(
                f"{stats.path} was calibrated on the model given as BASE ({base.path})",
                f"if the two are swapped: tailorcli ... {tuned.path} {base.path}; if not, calibrate TUNED",
            )
        option = f" --base {base.path}" if isinstance(tuned, AdaptedCheckpoint) else ""
        made_from = stats.manifest["model"].get("path", "another model")
        raise StatsError(
            f"{stats.path} was made from another model ({made_from}) than tuned ({tuned.path})",
            f"calibrate it: tailorcli calibrate {tuned.path}{option} --data FILE -o NEW_STATS",
        )
    check_shapes(tuned, stats)


def check_shapes(model: Checkpoint, stats: Stats) -> None:
    """The statistics know all tensors of the model, and fit their shapes."""
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
    if len(info.shape) < 2:
        return info.numel
    return info.shape[0] if entry.transposed else info.numel // max(info.shape[0], 1)
