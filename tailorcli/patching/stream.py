"""Open the inputs of a patch, and tailor their tensors one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.grown import GrownCheckpoint, numel_of_base
from tailorcli.files import digest_beside
from tailorcli.options import PatchOptions
from tailorcli.patchfile.reader import raw_bytes
from tailorcli.patching.methods import patch_by_method
from tailorcli.patching.run import Run
from tailorcli.runs.loop import LastPrepared, worked_on
from tailorcli.runs.plan import TensorPlan

if TYPE_CHECKING:
    import torch

    from tailorcli.core.hessian import PreparedHessian
    from tailorcli.core.tailor import LayerResult


@dataclass
class _Loaded:
    """One tensor's inputs as read from disk."""

    base: torch.Tensor
    tuned: torch.Tensor
    packed: list[torch.Tensor]  # its Hessian and that of the retained data, where the tensor before had others
    digest: str  # of the base's bytes, where it is wanted


def tailored(
    tensors: Sequence[TensorPlan], run: Run, *, score_only: bool = False
) -> Iterator[tuple[TensorPlan, LayerResult | None, str]]:
    """Each tensor with its result and its base's digest, in order; no result for a tensor that stays at base.

    Raises NumericalError, which names the tensor.
    """
    last: LastPrepared[PreparedHessian] = LastPrepared()

    def work(tensor: TensorPlan, held: list[_Loaded]) -> tuple[LayerResult, str]:
        loaded = held.pop()
        names = tensor.shared_hessians
        prepared = last.of(names, partial(_prepare, names, loaded.packed, run))
        with run.timer.stage("transfer"):
            pair = [t.to(run.device, non_blocking=True) for t in (loaded.base, loaded.tuned)]
        digest = loaded.digest
        del loaded
        return _tailor(tensor, pair, prepared, run, score_only), digest

    for tensor, found in worked_on(tensors, partial(_load, run=run), partial(_read_bytes, run=run), work, run.timer):
        yield (tensor, None, "") if found is None else (tensor, *found)
        del found


def _sources(names: tuple[str, ...], run: Run) -> list[tuple[Stats, str]]:
    """The statistics that hold a Hessian, and that of the retained data, each with its name in them."""
    both = (run.inputs.stats, run.inputs.retain_stats)
    return [(stats, name) for stats, name in zip(both, names, strict=False) if stats is not None]


def _load(tensor: TensorPlan, hessians: tuple[str, ...], run: Run) -> _Loaded:
    pinned = run.device.type == "cuda"  # a GPU copies at full speed, and by itself, from pinned memory alone
    base = run.inputs.base.read(tensor.name, pinned)
    digest = digest_beside(raw_bytes(base)) if run.wants_digest else None
    tuned = run.inputs.tuned.read(tensor.name, pinned)
    packed = [stats.load(name, pinned) for stats, name in _sources(hessians, run)]
    return _Loaded(base, tuned, packed, "" if digest is None else digest())


def _read_bytes(tensor: TensorPlan, hessians: tuple[str, ...], run: Run) -> int:
    both = tensor.nbytes + run.inputs.tuned.tensors[tensor.name].nbytes
    return both + sum(stats.nbytes(name) for stats, name in _sources(hessians, run))


def _tailor(
    tensor: TensorPlan, pair: list[torch.Tensor], prepared: PreparedHessian | None, run: Run, score_only: bool
) -> LayerResult:
    """One tensor by its method; ``pair`` is its base and its tuned value, and is emptied."""
    from tailorcli.core.tailor import tailor_experts, tailor_layer

    options = _of_the_base(run.options, tensor, run.inputs.base)
    settings: dict[str, Any] = {
        "density": options.density,
        "omega": options.omega,
        "score_by": options.effective_score,
        "solver": options.solver,
        "block_size": options.block_size,
        "tolerance": options.tolerance,
        "max_iterations": options.max_iterations,
        "weight": options.effective_weight,
        "score_only": score_only,
        "timer": run.timer,
        "transposed": tensor.transposed,
    }
    base, tuned = pair
    pair.clear()
    rounded = partial(run.inputs.base.rounded, tensor.name) if run.inputs.base.dequantized else None
    if options.method != "tailor":
        result = patch_by_method(tensor, base, tuned, prepared, options, run.masks, run.timer)
    elif tensor.experts:
        new = _tokens_of(tensor.experts, run.inputs.stats)
        counts = (new, _tokens_of(tensor.retained_hessians, run.inputs.retain_stats))
        result = tailor_experts(base, tuned, _prepare_each(tensor, run), *counts, **settings)
    else:
        return tailor_layer(base, tuned, prepared, **settings, store=rounded)
    del base, tuned
    if rounded is not None and result.patched is not None:
        result = replace(result, patched=rounded(result.patched, result.mask))
    return result


def _tokens_of(experts: Sequence[str], stats: Stats | None) -> list[float]:
    """The tokens of each expert by its Hessian; of one that several share each has an equal part."""
    if stats is None:
        return []
    users = Counter(experts)
    return [stats.hessians[name].tokens / users[name] for name in experts]


def _of_the_base(options: PatchOptions, tensor: TensorPlan, base: Checkpoint) -> PatchOptions:
    """The options with a density that is one of the base's own entries, where the tensor has rows that it lacks.

    DARE's stays as it is: it says what a kept change is divided by, and new rows have none.
    """
    own = numel_of_base(base, tensor.name) if isinstance(base, GrownCheckpoint) else tensor.numel
    if own == tensor.numel or options.method == "dare":
        return options
    return replace(options, density=options.density * own / tensor.numel)


def _prepare_each(tensor: TensorPlan, run: Run) -> Iterator[PreparedHessian]:
    """The Hessians of fused experts, one at a time; one that serves several in a row is prepared once."""
    each = (
        zip(tensor.experts, tensor.retained_hessians, strict=True)
        if tensor.retained_hessians
        else ((name,) for name in tensor.experts)
    )
    for names, same in groupby(each):
        with run.timer.stage("wait for read"):
            packed = [stats.load(name) for stats, name in _sources(names, run)]
        prepared = _prepare(names, packed, run)
        del packed
        for _ in same:
            yield prepared
        del prepared


def _prepare(names: tuple[str, ...], packed: list[torch.Tensor], run: Run) -> PreparedHessian:
    """Unpack and factorise a Hessian for the tensors that share it, and with it that of the retained data, if any.

    ``packed`` is emptied.
    """
    from tailorcli.core.hessian import prepare
    from tailorcli.core.retain import prepare_retaining

    options, unpacked = run.options, []
    with run.timer.stage("unpack"):
        for stats, name in _sources(names, run):
            unpacked.append(stats.unpack(name, packed.pop(0).to(run.device, non_blocking=True)))
    with run.timer.stage("factorise"):
        full = unpacked[0].dim() == 2
        wanted = {"sensitivity": options.omega < 1.0, "sequential": options.needs_factor and full}
        if len(unpacked) == 2:
            new, retained = unpacked
            return prepare_retaining(new, retained, options.retain_weight, options.effective_damping, **wanted)
        return prepare(unpacked[0], options.effective_damping, **wanted)
