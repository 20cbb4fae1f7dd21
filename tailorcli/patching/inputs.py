"""The inputs of a patch: two models, statistics, and what graft trains on."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, config_folder, tokenizer_folder
from tailorcli.adapters.interpolated import InterpolatedCheckpoint, interpolated, original
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.grown import grow_vocabulary
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.errors import OptionsError, note
from tailorcli.files import PathLike, digest_of
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
from tailorcli.patching.graft import check_graft
from tailorcli.runs.again import NOT_KEPT

if TYPE_CHECKING:
    pass


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


def _open_stats(path: PathLike | None, stack: ExitStack) -> Stats | None:
    if path is None:
        return None
    stats = Stats.open(path)
    stack.callback(stats.close)
    return stats


def _note_tokens(base: Path, tuned: Path) -> None:
    """Note where a token has another id in tuned's tokenizer."""
    files = [folder / "tokenizer.json" for folder in (base, tuned)]
    if base == tuned or not all(file.is_file() for file in files) or filecmp.cmp(files[0], files[1], shallow=False):
        return
    first, second = map(vocabulary_of, (base, tuned))
    if first is not None and second is not None and (moved := moved_tokens(first, second)):
        what = "so that rows of their tables stand for different tokens, which a patch mixes"
        note(f"{tuned}: {moved:,} tokens have other ids in tuned's tokenizer than in base's, {what}")
