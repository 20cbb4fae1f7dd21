"""What will happen to each tensor and what it will cost, decided on headers alone, before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, tuned_side_files
from tailorcli.adapters.interpolated import original
from tailorcli.calibration.stats import Stats, TensorStats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, TensorInfo
from tailorcli.checkpoint.layout import plan_layout
from tailorcli.errors import OptionsError, StatsError, note
from tailorcli.files import in_shell
from tailorcli.models.names import unwrapped
from tailorcli.models.naming import tied_copies
from tailorcli.options import RELEASED, PatchOptions, matches
from tailorcli.patching.checks import are_equal, check_pair, check_propagate, check_retain, check_stats
from tailorcli.patching.cost import (
    bytes_to_read,
    most_kept,
    pair_bytes,
    propagation_bytes,
    training_bytes,
    working_set,
)
from tailorcli.patching.methods import weights_by_depth
from tailorcli.runs.plan import RUNTIME_BYTES, Plan, TensorPlan, group_by_hessian, most_patch_bytes


def build_plan(
    base: Checkpoint, tuned: Checkpoint, stats: Stats | None, options: PatchOptions, retain_stats: Stats | None = None
) -> Plan:
    """Check that the inputs belong together and decide every tensor's treatment.

    Raises CheckpointError, StatsError or OptionsError for anything that would only show up in the middle of the
    work. ``stats`` may be None only where no Hessian is needed (``options.needs_hessians``).
    """
    if stats is None and options.needs_hessians:
        raise OptionsError(
            "no statistics given",
            "pass the new task's data: --data FILE; or --stats STATS, which tailorcli calibrate made. "
            f"What the weights alone tell: tailorcli check {in_shell(base.path)} {in_shell(tuned.path)}",
        )
    own = original(tuned)
    check_pair(base, own, options.allow_dtype_mismatch)
    if stats is not None:
        check_stats(base, tuned, stats)
    if retain_stats is not None:
        check_retain(base, tuned, retain_stats, options)
    if options.propagate:
        check_propagate(stats, retain_stats, options)
    if any(unwrapped(name) != name for name in base.tensors):
        what = "names its tensors as a wrapper did: the output does, too, and from_pretrained does not find them"
        note(f"{base.path} {what}; save BASE again from the model inside the wrapper")
    copies = tied_copies(base, own)
    further = {name for names in copies.values() for name in names}
    infos = (info for info in base.tensors.values() if info.name not in further)
    tensors = _plan_tensors(infos, base, tuned, stats, options, retain_stats, copies)
    if not any(tensor.action == "patch" for tensor in tensors):
        raise OptionsError("no tensor would be patched", "check --include and --exclude, and those of calibrate")
    if (
        retain_stats is not None
        and options.retain_weight > 0.0
        and not any(tensor.retained_hessians for tensor in tensors)
    ):
        raise StatsError(
            f"{retain_stats.path} has statistics for none of the tensors that would be patched",
            "check --include and --exclude, and those of calibrate",
        )
    if options.method == "lines":
        weights = weights_by_depth(base.tensors, options.alpha, options.effective_beta)
        tensors = [replace(tensor, weight=weights[tensor.name]) for tensor in tensors]
    ordered = group_by_hessian(tensors)
    layout = plan_layout(base, options.max_shard_size)
    passes = {"graft": 1, "magnitude": 2 * options.counts_first}.get(options.method, 0)  # over both before the work
    ordered = [replace(tensor, held_bytes=working_set(tensor, tuned, stats, options)) for tensor in ordered]
    held = [tensor.held_bytes for tensor in ordered]
    held.append(training_bytes(ordered, base, tuned, options))
    propagated = propagation_bytes(ordered, base, stats, retain_stats) if options.propagate else 0
    return Plan(
        tensors=tuple(ordered),
        layout=layout,
        read_bytes=bytes_to_read(ordered, tuned, stats, retain_stats)
        + passes * pair_bytes(ordered, tuned)
        + (3 * base.nbytes if options.propagate else 0),  # the three models' weights, to run them
        write_bytes=layout.nbytes,
        patch_bytes=most_patch_bytes(
            most_kept([t for t in ordered if t.action == "patch"], options), ordered, tuned_side_files(own).values()
        ),
        peak_bytes=RUNTIME_BYTES + max(held) + propagated,
        propagates=bool(options.propagate),
    )


def replanned(
    tensors: Sequence[TensorPlan],
    base: Checkpoint,
    tuned: Checkpoint,
    stats: Stats,
    options: PatchOptions,
    retain_stats: Stats | None,
) -> list[TensorPlan]:
    """Tensors of a plan in the order of work, now that the statistics are there that it only expected."""
    copies = {tensor.name: tensor.copies for tensor in tensors}
    infos = (base.tensors[tensor.name] for tensor in tensors)
    found = _plan_tensors(infos, base, tuned, stats, options, retain_stats, copies)
    return [
        replace(tensor, held_bytes=working_set(tensor, tuned, stats, options)) for tensor in group_by_hessian(found)
    ]


def _plan_tensors(
    infos: Iterable[TensorInfo],
    base: Checkpoint,
    tuned: Checkpoint,
    stats: Stats | None,
    options: PatchOptions,
    retain_stats: Stats | None,
    copies: Mapping[str, tuple[str, ...]],
) -> list[TensorPlan]:
    """The treatment of each of these tensors of the base, in their order; ``copies`` are their further names."""
    own = original(tuned)
    changed: Collection[str] = tuned.tensors.keys()
    unchanged = "tuned does not hold it, and its model does not use it"
    if isinstance(own, AdaptedCheckpoint):
        changed, unchanged = own.changed, "the adapter leaves it alone"
    return [
        _plan_tensor(
            info,
            "" if info.name in changed else unchanged,
            info.name in base.scales,
            _left_by_dtype(info, base, own),
            stats,
            options,
            retain_stats,
            copies.get(info.name, ()),
        )
        for info in infos
    ]


def _plan_tensor(
    info: TensorInfo,
    unchanged: str,
    scale: bool,
    no_float: str,
    stats: Stats | None,
    options: PatchOptions,
    retain_stats: Stats | None,
    copies: tuple[str, ...],
) -> TensorPlan:
    names = (info.name, *copies)
    entry = _entry(names, stats)
    reason, by_statistics = "", False
    included = any(matches(name, options.include, ()) for name in names)
    if not included or not all(matches(name, (), options.exclude) for name in names):
        reason = "not chosen by --include and --exclude"
    elif no_float:
        reason = no_float
    elif scale:
        reason = "it holds the scales of a quantised weight, which stay the base's"
    elif info.numel == 0:
        reason = "it has no entries"
    elif unchanged:
        reason = unchanged
    elif options.needs_hessians and not entry.hessians:
        reason, by_statistics = f"no statistics: {entry.reason}", True
    elif options.method == RELEASED and not _is_linear(entry, stats):
        reason, by_statistics = "the released code patches linear layers alone", True
    common = (info.name, info.dtype, info.shape, info.nbytes)
    if reason:
        return TensorPlan(*common, "base", reason, role=entry.role, copies=copies, by_statistics=by_statistics)
    hessian, experts = (entry.hessian, tuple(entry.experts)) if options.needs_hessians else (None, ())
    retained: tuple[str, ...] = ()
    note = ""
    if retain_stats is not None and options.retain_weight > 0.0:
        retained, note = _retained(entry, _entry(names, retain_stats), stats, retain_stats)
    method = "" if options.method == "tailor" else options.method
    return TensorPlan(
        *common, "patch", "", hessian, entry.role, entry.transposed, experts, retained, note, method, copies=copies
    )


def _left_by_dtype(info: TensorInfo, base: Checkpoint, tuned: Checkpoint) -> str:
    """Why a tensor without floating-point entries stays at base, and whether tuned's is another; empty of others."""
    if info.dtype in PATCHABLE_DTYPES:
        return ""
    differs = info.name in tuned.tensors and not are_equal(base, tuned, info.name)
    return f"{info.dtype} is no floating-point dtype that can be patched{', and differs in tuned' if differs else ''}"


def _entry(names: Sequence[str], stats: Stats | None) -> TensorStats:
    """What statistics say of a tensor that is stored under these names: under one of them it may be left out."""
    entries = [stats.tensors[name] for name in names if stats is not None and name in stats.tensors]
    known = [entry for entry in entries if entry.hessians]
    return next(iter((*known, *entries)), TensorStats(None))


def _retained(
    entry: TensorStats, other: TensorStats, stats: Stats | None, retain_stats: Stats
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
            stats.hessians[new].kind != retain_stats.hessians[old].kind
            for new, old in zip(entry.hessians, names, strict=True)
        )
    ):
        return (), "without the retain term: its retained statistics are of another kind than those of the new task"
    return names, ""


def _is_linear(entry: TensorStats, stats: Stats | None) -> bool:
    return stats is not None and entry.hessian is not None and stats.hessians[entry.hessian].kind == "full"
