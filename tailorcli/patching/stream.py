"""Open the inputs of a patch, and tailor their tensors one at a time."""

from __future__ import annotations

import filecmp
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, config_folder, tokenizer_folder
from tailorcli.adapters.interpolated import InterpolatedCheckpoint, interpolated, original
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.grown import GrownCheckpoint, grow_vocabulary, numel_of_base
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.errors import OptionsError, note
from tailorcli.files import PathLike, digest_beside, digest_of
from tailorcli.guard import path_text
from tailorcli.hub import hub_facts, local_folders
from tailorcli.models.config import (
    config_digest,
    configs_of,
    differing_fields,
    moved_tokens,
    read_config,
    vocabulary_of,
)
from tailorcli.models.naming import open_for
from tailorcli.options import AUTO, PatchOptions
from tailorcli.patchfile.reader import raw_bytes
from tailorcli.patching.graft import check_graft
from tailorcli.patching.methods import patch_by_method
from tailorcli.runs.again import NOT_KEPT
from tailorcli.runs.loop import LastPrepared, worked_on
from tailorcli.runs.plan import TensorPlan

if TYPE_CHECKING:
    import torch

    from tailorcli.core.hessian import PreparedHessian
    from tailorcli.core.tailor import LayerResult
    from tailorcli.patching.run import Run


@dataclass
class PatchInputs:
    """The opened inputs of a run."""

    base: Checkpoint
    tuned: Checkpoint
    stats: Stats | None
    retain_stats: Stats | None = None
    graft_data: Path | None = None  # what graft trains on
    sources: Mapping[str, dict[str, str]] = field(default_factory=dict)  # what the statistics were made of

    @classmethod
    def open(
        cls,
        base: PathLike,
        tuned: PathLike,
        stats: PathLike | None,
        options: PatchOptions,
        stack: ExitStack,
        retain: PathLike | None = None,
        graft_data: PathLike | None = None,
    ) -> PatchInputs:
        """Open all by their headers; ``stack`` closes them.

        Raises TailorError where one cannot be opened or is not for these options.
        """
        if options.method == "graft":
            check_graft(graft_data, options)
        if options.teacher_weight == AUTO:
            raise OptionsError("a teacher's weight is picked by patch alone", "pass a number for --teacher-weight")
        base, tuned = local_folders((base, tuned), code=options.trust_remote_code)
        opened_base = stack.enter_context(open_checkpoint(base, options.fp8_output))
        opened_tuned = stack.enter_context(open_for(opened_base, tuned, options.fp8_output))
        _note_config(opened_base, opened_tuned)
        opened_stats = _open_stats(stats, stack)
        if opened_stats is not None and opened_stats.teacher_weight == 1.0:  # else they have the base's names
            opened_stats.rename_for(opened_tuned)
        opened_retain = _open_stats(retain, stack)
        _note_other_config(opened_stats, config_folder(opened_tuned))
        _note_other_config(opened_retain, opened_base.path)
        if options.resized_vocab:
            if opened_base.dequantized:
                what = "--resized-vocab is not for quantised checkpoints"
                raise OptionsError(what, "patch the two models as they were before they were quantised")
            if isinstance(opened_tuned, AdaptedCheckpoint):
                what = "--resized-vocab is not for adapters"
                raise OptionsError(what, "merge the adapter first: model.merge_and_unload()")
            opened_base = stack.enter_context(grow_vocabulary(opened_base, opened_tuned))
        weight = options.known_teacher
        if weight is None and opened_stats is not None:
            weight = opened_stats.teacher_weight
        opened_tuned = interpolated(opened_base, opened_tuned, weight)
        chosen = Path(graft_data) if graft_data and options.method == "graft" else None
        return cls(opened_base, opened_tuned, opened_stats, opened_retain, chosen)

    def told(self, options: PatchOptions, samples: Stats | None = None) -> PatchOptions:
        """``options`` with the teacher's weight that the patch goes to.

        Tuned itself goes without saying, unless the statistics, or those that give ``samples`` alone, have another.
        """
        measured = samples if samples is not None else self.stats
        weight = None if measured is None or measured.teacher_weight == 1.0 else 1.0
        if isinstance(self.tuned, InterpolatedCheckpoint):
            weight = self.tuned.weight
        return replace(options, teacher_weight=weight)

    def describe(self) -> dict[str, dict[str, str]]:
        """Path and fingerprint of each, and of what the statistics were made of, where that is told."""
        facts = {
            "base": {"path": path_text(self.base.path), "fingerprint": self.base.fingerprint()},
            "tuned": {"path": path_text(original(self.tuned).path), "fingerprint": self.tuned.fingerprint()},
        }
        for name, model in (("base", self.base), ("tuned", original(self.tuned))):
            facts[name] |= hub_facts(model.path)
        facts |= described_stats(self.stats, self.retain_stats, self.sources)
        if self.graft_data is not None:
            facts["data"] = {"path": path_text(self.graft_data), "fingerprint": digest_of(self.graft_data.read_bytes())}
        return facts | {role: entry for role, entry in self.sources.items() if entry["path"] != NOT_KEPT}

    @property
    def configs(self) -> dict[str, str]:
        """Digests of the configs that the models are run under, by role."""
        return configs_of({"base": self.base.path, "tuned": config_folder(original(self.tuned))})

    @property
    def paths(self) -> list[Path]:
        """Where they lie: no output may."""
        models = (self.base, original(self.tuned))
        found = [item.path for item in (*models, self.stats, self.retain_stats) if item is not None]
        return found if self.graft_data is None else [*found, self.graft_data]

    @property
    def files(self) -> list[Path]:
        """What is read of them."""
        stats = [file for item in (self.stats, self.retain_stats) if item is not None for file in item.files]
        return [*self.base.shards, *self.tuned.shards, *stats, *([] if self.graft_data is None else [self.graft_data])]


def described_stats(
    stats: Stats | None, retain: Stats | None, known: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """Path and fingerprint of both statistics, where they are there; ``known`` inputs say which will not be kept."""
    facts = {}
    for role, found in (("stats", stats), ("retain", retain)):
        if found is not None:
            kept = known.get(role, {}).get("path") != NOT_KEPT
            path = path_text(found.path) if kept else NOT_KEPT
            facts[role] = {"path": path, "fingerprint": found.fingerprint()}
    return facts


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


def _note_config(base: Checkpoint, tuned: Checkpoint) -> None:
    """Note where base and tuned run or read differently. A patched model gets tuned's config and its tokenizer."""
    _note_tokens(base.path, tokenizer_folder(tuned))
    folders = (base.path, config_folder(tuned))
    if folders[0] == folders[1] or not all((folder / "config.json").is_file() for folder in folders):
        return
    fields = differing_fields(*(read_config(folder) for folder in folders))
    if fields:
        more = f" and {len(fields) - 4} more" if len(fields) > 4 else ""
        told = f"base's and tuned's configs differ in {', '.join(fields[:4])}{more}"
        note(f"{told}: the patched model gets tuned's, and is run under it")


def _note_other_config(stats: Stats | None, folder: Path) -> None:
    """Note where statistics were measured under another config than the model in ``folder`` has now."""
    if stats is not None and stats.manifest["model"].get("config") not in (None, config_digest(folder)):
        note(f"{folder / 'config.json'} has changed since {stats.path} was measured: calibrate again if it matters")


def _note_tokens(base: Path, tuned: Path) -> None:
    """Note where a token has another id in tuned's tokenizer."""
    files = [folder / "tokenizer.json" for folder in (base, tuned)]
    if base == tuned or not all(file.is_file() for file in files) or filecmp.cmp(files[0], files[1], shallow=False):
        return
    first, second = map(vocabulary_of, (base, tuned))
    if first is not None and second is not None and (moved := moved_tokens(first, second)):
        what = "so that rows of their tables stand for different tokens, which a patch mixes"
        note(f"{tuned}: {moved:,} tokens have other ids in tuned's tokenizer than in base's, {what}")


def _open_stats(path: PathLike | None, stack: ExitStack) -> Stats | None:
    if path is None:
        return None
    stats = Stats.open(path)
    stack.callback(stats.close)
    return stats
