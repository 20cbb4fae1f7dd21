"""Each model of a sweep is scored once: its scores lie in a file, named by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tailorcli._version import __version__
from tailorcli.calibration.stats import Stats
from tailorcli.data.records import media_digest, read_records
from tailorcli.distributed import ranks, require_shared, told
from tailorcli.errors import CheckpointError, OptionsError, OutputError, TailorError
from tailorcli.evaluation.evaluate import score_model
from tailorcli.evaluation.metrics import TaskScores
from tailorcli.evaluation.subjects import Subject
from tailorcli.evaluation.tasks import Task
from tailorcli.files import PathLike, as_output_error, file_digest, read_json, write_text
from tailorcli.models.config import tokenizer_digest
from tailorcli.options import EvaluateOptions
from tailorcli.patching.distilled import distill_checkpoint
from tailorcli.patching.patch import patch_checkpoint
from tailorcli.sweep.settings import Setting
from tailorcli.typed import field_of, list_of, maybe, read_amount, read_count, read_number, read_object

if TYPE_CHECKING:
    from tailorcli.evaluation.tasks import EncodedTask

POINTS, WORK = "settings", "work"  # folders in the output
RESULT = re.compile(r"[0-9a-f]{24}\.json(\.part)?")  # a file of scores

Inputs = dict[str, PathLike | None]  # of a setting: stats, retain and graft_data, None where it has no use for one


def inputs_of(setting: Setting, stats: PathLike | None, retain: PathLike | None, graft_data: PathLike | None) -> Inputs:
    """What a setting is made of, besides base and tuned."""
    distilled = setting.distill is not None
    return {
        "stats": stats if setting.options.needs_hessians or distilled else None,
        "retain": retain if setting.retained or distilled else None,
        "graft_data": graft_data if setting.options.method == "graft" else None,
    }


def distilled_inputs(inputs: Inputs) -> dict[str, Any]:
    """The inputs of a distilled setting. Raises OptionsError without both statistics."""
    if inputs["stats"] is None or inputs["retain"] is None:
        raise OptionsError("distillation needs the samples of both statistics", "pass --stats and --retain")
    return inputs


@contextmanager
def named(setting: Setting) -> Iterator[None]:
    """A TailorError that is raised says which setting it is of."""
    try:
        yield
    except TailorError as error:
        raise type(error)(f"{setting.label}: {error.message}", error.hint) from error


def identity_of(
    ends: Mapping[str, Subject],
    stats: PathLike | None,
    retain: PathLike | None,
    graft_data: PathLike | None,
    read: Mapping[str, list[Task]],
    options: EvaluateOptions,
) -> dict[str, Any]:
    """What the result of every setting depends on besides the setting."""
    facts: dict[str, Any] = {name: end.checkpoint.fingerprint() for name, end in ends.items()}
    # A fingerprint is of samples, and a result outlives its run: all bytes are read, once for all settings.
    first = ranks().first
    facts["weights"] = told(
        {name: list(map(file_digest, end.checkpoint.shards)) for name, end in ends.items() if first}
    )
    has_media = any(record.has_media for of_part in read.values() for task in of_part for record in task.records)
    folders = {name: (end.encoder_folder(has_media), end.stored.path) for name, end in ends.items()}
    facts["tokenizers"] = {name: tokenizer_digest(*where) for name, where in folders.items()}
    written = {name: end.stored.path / "generation_config.json" for name, end in ends.items()}  # where a text ends
    facts["generation"] = {name: file_digest(file) for name, file in written.items() if file.is_file()}
    facts["versions"] = {name: version(name) for name in ("torch", "transformers")} | {"tailorcli": __version__}
    facts["code"] = _code_digest()
    for name, path in (("stats", stats), ("retain", retain)):
        if path is not None:
            found = Stats.open(path)
            facts[name] = found.fingerprint()
            found.close()
    if graft_data is not None:
        records = read_records(graft_data)
        facts["graft_data"] = (records.digest, media_digest(records))
    facts["tasks"] = {
        part: [(t.name, t.kind, t.digest, media_digest(t.records)) for t in of_part] for part, of_part in read.items()
    }
    ignored = ("batch_size", "resamples", "seed")
    facts["options"] = {key: value for key, value in options.to_dict().items() if key not in ignored}
    return facts


def _code_digest() -> str:
    """A hash of the package's source: a result is not reused after a change to what made it."""
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0{file_digest(file)}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Result:
    """One model as it was scored: base or tuned (without ``options``), or the model of a setting."""

    label: str
    family: str
    options: dict[str, Any] | None
    scores: dict[str, dict[str, TaskScores]]  # part -> task
    seconds: float
    patch_bytes: int | None = None


@dataclass(frozen=True)
class _Made:
    """A model to score: its folder, the seconds that the patch took, the bytes of its patch file.

    ``base`` is what an adapter is on.
    """

    path: Path
    base: PathLike | None = None
    seconds: float = 0.0
    patch_bytes: int | None = None


@dataclass(frozen=True)
class Scorer:
    """Scores models on all parts' tasks, each once: results lie in files."""

    folder: Path
    tasks: dict[str, dict[str, dict[str, EncodedTask]]]  # part -> "base" or "tuned" -> task
    options: EvaluateOptions
    known: dict[str, Any]
    quantised: bool

    def end(self, name: str, path: Path, base: PathLike) -> Result:
        """Base or tuned."""
        return Result(name, name, None, *self._scores(name, {}, (), lambda: _Made(path, base), name))

    def patched(self, setting: Setting, base: PathLike, tuned: PathLike, inputs: Inputs) -> Result:
        """A setting's model, which is written, evaluated and removed. Raises TailorError, which names the setting."""
        work = self.folder / WORK
        model, file = work / "model", work / "patch.safetensors"
        options = setting.resolved
        chosen = options.to_dict() | {"retained": setting.retained}
        if setting.distill is not None:
            chosen["distill"] = asdict(setting.distill)

        def make() -> _Made:
            if ranks().first:
                shutil.rmtree(work, ignore_errors=True)
                try:
                    work.mkdir()
                except OSError as error:
                    raise as_output_error(work, error) from error
            require_shared(work)
            stored = None if self.quantised else file
            if setting.distill is None:
                report = patch_checkpoint(base, tuned, model, options=options, patch_file=stored, **inputs)  # type: ignore[arg-type]
            else:
                how: dict[str, Any] = {"options": options, "distill": setting.distill, "patch_file": stored}
                report = distill_checkpoint(base, tuned, model, **distilled_inputs(inputs), **how)
            return _Made(model, None, report.seconds, None if stored is None else stored.stat().st_size)

        try:
            used = [name for name, path in inputs.items() if path is not None]
            with named(setting):
                found = self._scores(setting.label, chosen, used, make)
        finally:
            if ranks().first:
                shutil.rmtree(work, ignore_errors=True)
        return Result(setting.label, setting.family, chosen, *found)

    def _scores(
        self,
        label: str,
        options: dict[str, Any],
        used: Sequence[str],
        make: Callable[[], _Made],
        encoded_for: str = "tuned",  # whose tokenizer a patched model has
    ) -> tuple[dict[str, dict[str, TaskScores]], float, int | None]:
        unused = {"stats", "retain", "graft_data"}.difference(used)
        known = {name: fact for name, fact in self.known.items() if name not in unused}
        key = json.dumps([label, options, known], sort_keys=True)
        file = self.folder / POINTS / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.json"
        if not told(file.exists()):
            made = make()
            by_part = {part: models[encoded_for] for part, models in self.tasks.items()}
            flat = {f"{part}/{name}": task for part, tasks in by_part.items() for name, task in tasks.items()}
            scores = score_model(made.path, flat, self.options, made.base)
            values = {"label": label, "options": options, "seconds": made.seconds, "patch_bytes": made.patch_bytes}
            values["scores"] = {name: _plain(one) for name, one in scores.items()}
            if ranks().first:
                write_text(file, json.dumps(values) + "\n")
            require_shared(file)
        items = {f"{part}/{n}": len(t.items) for part, ms in self.tasks.items() for n, t in ms[encoded_for].items()}
        return _read_scores(file, items)


def _read_scores(file: Path, items: Mapping[str, int]) -> tuple[dict[str, dict[str, TaskScores]], float, int | None]:
    """What ``_scores`` stored of one model: part -> task -> scores of so many items, its seconds, its patch's bytes.

    Raises OutputError for a file that is damaged.
    """
    found: dict[str, dict[str, TaskScores]] = {}
    try:
        stored = read_json(file)
        scores = field_of(stored, "scores", read_object)
        if scores.keys() != items.keys():
            raise ValueError("it is of other tasks")
        for name, values in scores.items():
            part, _, task = name.partition("/")
            readers = {"correct": read_amount, "count": read_amount, "loss": _read_loss}
            correct, count, loss = (
                np.array(field_of(values, key, list_of(read)), float) for key, read in readers.items()
            )
            if {len(correct), len(count), len(loss)} != {items[name]} or not (count > 0).all():
                raise ValueError(f"{name} has not a score for each of {items[name]} items")
            found.setdefault(part, {})[task] = TaskScores(correct, count, loss)
        seconds = float(field_of(stored, "seconds", read_amount))
        patch_bytes = field_of(stored, "patch_bytes", maybe(read_count))
    except (ValueError, CheckpointError) as error:
        raise OutputError(
            f"the result of an earlier sweep in {file} is damaged: {error}", "remove that file"
        ) from error
    return found, seconds, patch_bytes


def _read_loss(value: Any) -> float:
    """A loss, NaN where there is none. Raises ValueError."""
    return math.nan if isinstance(value, float) and math.isnan(value) else read_number(value)


def _plain(scores: TaskScores) -> dict[str, list[float]]:
    return {key: [float(x) for x in value] for key, value in asdict(scores).items() if key != "outputs"}
