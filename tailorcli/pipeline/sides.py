"""The two models of a job, each with what it is calibrated on: its statistics, made or found again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import config_folder, is_adapter
from tailorcli.adapters.interpolated import InterpolatedCheckpoint, original
from tailorcli.calibration.calibrate import calibrate_model
from tailorcli.calibration.expected import expected_stats
from tailorcli.calibration.kept import keep_samples, kept_samples
from tailorcli.calibration.sources import Source, drawn, require_writing, self_written
from tailorcli.calibration.stats import MANIFEST, Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.data.records import columns_of
from tailorcli.data.samples import count_tokens
from tailorcli.device import resolve_device
from tailorcli.errors import OutputError, TailorError
from tailorcli.files import digest_of
from tailorcli.guard import path_text
from tailorcli.models.calling import package_versions
from tailorcli.models.config import config_digest, read_config, tokenizer_digest
from tailorcli.options import CalibrateOptions, DTypeName
from tailorcli.patching.onepass import Material
from tailorcli.runs.again import SELF_WRITTEN
from tailorcli.units import counted, format_bytes

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs, Samples

TUNED, BASE = "tuned", "base"  # the folders of both statistics
# What decides neither which samples are run nor what they are run through.
_HOW = ("batch_size", "device", "blockwise", "overwrite", "keep_samples", "trust_remote_code")


@dataclass(frozen=True)
class Side:
    """A model and what it is calibrated on: ``data``, or what it writes itself; ``folder`` takes its statistics.

    ``base`` is that of an adapter, or of a model on the way to tuned.
    """

    name: str  # TUNED or BASE
    model: Path
    base: Path | None
    data: Path | None
    options: CalibrateOptions
    folder: Path
    facts: dict[str, Any]  # of the data file and the samples drawn from it
    drawn: Samples | None  # None: the model writes them
    source: Source

    @classmethod
    def of(
        cls,
        name: str,
        model: Checkpoint,
        stored: Checkpoint,
        data: Path | None,
        options: CalibrateOptions,
        folder: Path,
        tell: Callable[[str], None] | None = None,
        show: Callable[[str], None] | None = None,
        drawn_before: Samples | None = None,
    ) -> Side:
        """Draw the samples unless they are, or see that the model can write its own. Raises TailorError."""
        options = replace(options, synthetic=data is None, overwrite=False)
        if name == BASE and data is not None:  # the columns that were named are those of the new task's data
            options = replace(options, columns=columns_of(data, options.columns))
        with _own_names(name):
            source = Source(stored, model, read_config(stored.path), options, data, None, tell, show)
            plain = original(model)
            needed = stored if is_adapter(plain.path) else None
            needed = model.base if isinstance(model, InterpolatedCheckpoint) else needed
            adapted_to = None if needed is None else needed.path
            if data is None:
                require_writing(source, resolve_device(options.device))
                return cls(name, plain.path, adapted_to, data, options, folder, {}, None, source)
            samples = drawn(source) if drawn_before is None else drawn_before
            facts = {key: value for key, value in samples.facts.items() if key != "file"}
            return cls(name, plain.path, adapted_to, data, options, folder, facts, samples, source)

    @property
    def inputs(self) -> list[Inputs]:
        """The samples; of those that are yet to be written the shapes alone."""
        import torch

        if self.drawn is not None:
            return self.drawn.inputs
        return [{"input_ids": torch.zeros((1, self.options.length), dtype=torch.int64)}] * self.options.num_samples

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """Tokens of all, at most."""
        return sum(count_tokens(inputs) for inputs in self.inputs)

    @property
    def whose(self) -> str:
        """The model in words."""
        return "the tuned model" if self.name == TUNED else "the base"

    @property
    def to_write(self) -> str:
        """What the model is to write, in words."""
        return f"{counted(self.samples, 'sample')} of {self.options.length:,} tokens"

    @property
    def to_do(self) -> str:
        """A step in words: the samples made, if they are not there, and the model calibrated on them."""
        if self.data is None:
            return f"let the base write {self.to_write}, and calibrate it on them"
        return f"calibrate {self.whose} on {self.data}: {self._size}"

    @property
    def to_calibrate(self) -> str:
        """The part of one pass that is behind the writing of samples, in words."""
        if self.data is None:
            return "calibrate the base on what it wrote"
        return f"calibrate {self.whose} on {self.data} ({self._size})"

    @property
    def _size(self) -> str:
        return f"{counted(self.samples, 'sample')}, {counted(self.tokens, 'token')}"

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its statistics besides the model and the versions: the data and the options."""
        options = {key: value for key, value in self.options.to_dict().items() if key not in _HOW}
        return dict(json.loads(json.dumps({"data": self.facts, "options": options})))

    def describe(self) -> dict[str, str]:
        """Path and fingerprint of the data, as a report has them, and how many samples of what length."""
        path = path_text(self.data) if self.data is not None else SELF_WRITTEN
        facts = {"path": path, "fingerprint": digest_of(json.dumps(self.identity, sort_keys=True).encode())}
        given: dict[str, Any] = {
            "num_samples": self.options.num_samples,
            "seq_len": self.options.seq_len,
            "seed": self.options.seed,
        }
        given |= {"deterministic": self.options.deterministic or None}
        given |= {"dtype": None if self.options.dtype == DTypeName.AUTO else str(self.options.dtype)}
        given |= {f"{what}_column": column for what, column in asdict(self.options.columns).items()}
        return facts | {name: str(value) for name, value in given.items() if value is not None}

    def found(self, model: Checkpoint) -> bool:
        """Whether its folder holds the very statistics that would be made.

        Raises OutputError where it holds others, and StatsError where they are damaged.
        """
        if not (self.folder / MANIFEST).exists():
            return False
        with closing(Stats.open(self.folder)) as stats:
            differing = self._difference(stats, model)
        if differing:
            raise OutputError(
                f"{self.folder} holds statistics of {differing}",
                "choose another folder, or pass --overwrite to measure again",
            )
        return True

    def _difference(self, stats: Stats, model: Checkpoint) -> str:
        """In what statistics that are there differ from those that would be made; empty where they do not."""
        known, mine = stats.manifest, self.identity
        folder = config_folder(original(model))
        config = config_digest(folder)
        if stats.model_fingerprint != model.fingerprint():
            return f"another model ({known['model'].get('path', 'unknown')})"
        if known["model"].get("config", config) != config:
            return f"a model under another config ({folder / 'config.json'} has changed since)"
        options = known.get("options", {})
        for name, value in ({"deterministic": None, "columns": None} | mine["options"]).items():
            if options.get(name) != value:
                return f"another {name.replace('_', '-')} ({options.get(name)}, now {value})"
        data = known.get("data", {})
        if any(data.get(name) != value for name, value in mine["data"].items()):
            return f"other data ({data.get('file', 'unknown')})"
        for name, version in package_versions().items():
            if (found := known.get("versions", {}).get(name)) != version:
                return f"another version of {name} ({found}, now {version})"
        return "" if known.get("samples") is not None else "which no samples were kept"

    def stats(self, model: Checkpoint, stored: Checkpoint, done: bool, stack: ExitStack) -> Stats:
        """Its statistics for a plan: those that are there, or what they will be."""
        if done:
            return stack.enter_context(closing(Stats.open(self.folder)))
        named = self.data if self.data is not None else self.model
        return expected_stats(named, stored, model, self.options, self.samples, self.tokens)

    @property
    def is_written(self) -> bool:
        """Whether the model writes its samples itself, and an interrupted run has kept none."""
        return self.drawn is None and kept_samples(self.folder, self._decided) is None

    @property
    def _decided(self) -> dict[str, Any]:
        """What decides samples that the model writes itself."""
        device = resolve_device(self.options.device).type
        stored = self.source.stored
        model = {"model": stored.fingerprint(), "tokenizer": tokenizer_digest(stored.path, stored.path)}
        return self.identity | package_versions() | {"device": device} | model

    def material(self, progress: bool) -> Material:
        """The samples, those that the model writes itself kept in the folder for a run that is resumed.

        Raises TailorError.
        """
        samples = self.drawn or kept_samples(self.folder, self._decided)
        if samples is None:
            with _own_names(self.name):
                samples, _ = self_written(self.source, resolve_device(self.options.device), progress)
            keep_samples(self.folder, samples, self._decided)
        return Material(self.data or self.model, samples, self.options)

    def calibrate(self, progress: bool, announce: Callable[[str], None] | None) -> str:
        """Make the statistics, and say in a line what they are. Raises TailorError."""
        options = replace(self.options, overwrite=True)  # of what an interrupted run left
        with _own_names(self.name):
            report = calibrate_model(
                *(self.model, self.data, self.folder, options, progress),
                base=self.base,
                announce=announce,
                samples=self.drawn,
            )
        made = f"{counted(report.hessians, 'Hessian')} for {counted(report.calibrated, 'tensor')}"
        what = f"{counted(report.samples, 'sample')}, {counted(report.tokens, 'token')}"
        return f"{what}: {made} ({format_bytes(report.bytes)}, {report.seconds:.1f} s)"


@contextmanager
def _own_names(name: str) -> Iterator[None]:
    """Errors name the options that a job has: what ``calibrate`` calls --data is --retain-data for the base."""
    try:
        yield
    except TailorError as error:
        if name == BASE:
            error.hint = error.hint.replace("--data ", "--retain-data ")
        raise
