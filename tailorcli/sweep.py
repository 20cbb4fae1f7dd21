"""Patch one pair in many ways, evaluate each result, and see which settings no other beats: the frontier.

Statistics are made once, by ``calibrate``; a sweep only patches and evaluates. Every setting that is done is kept, so
that a sweep goes on where it was interrupted, and a wider one reuses a narrower one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from tailorcli._version import __version__
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.data.records import media_digest, read_records
from tailorcli.distributed import ranks, require_shared, told
from tailorcli.errors import CheckpointError, OptionsError, OutputError, TailorError
from tailorcli.evaluation.evaluate import encode_for_all, score_model
from tailorcli.evaluation.metrics import (
    Array,
    Estimate,
    Roles,
    TaskScores,
    bootstrap,
    check_roles,
    estimate,
    frontier,
    frontier_area,
    summarise,
)
from tailorcli.evaluation.subjects import Subject, open_subject
from tailorcli.evaluation.tasks import Task, read_tasks
from tailorcli.files import PathLike, as_output_error, file_digest, read_json, write_text
from tailorcli.guard import OutputLock, entries, protect
from tailorcli.hub import local_folders
from tailorcli.models.config import tokenizer_digest
from tailorcli.options import DistillOptions, EvaluateOptions, PatchMethod, PatchOptions, Solver
from tailorcli.patching.distilled import distill_checkpoint, plan_distilled
from tailorcli.patching.patch import patch_checkpoint, plan_patch
from tailorcli.runs.again import number_of, patch_command, shell_text
from tailorcli.typed import field_of, list_of, maybe, read_amount, read_count, read_number, read_object

if TYPE_CHECKING:
    from tailorcli.evaluation.tasks import EncodedTask
    from tailorcli.patchfile.report import PatchReport

FORMAT_VERSION = 1
REPORT_FILE = "sweep.json"
WEIGHTS = (0.3, 0.5, 0.7)  # of an interpolation, unless others are asked for
SCALES = (0.5, 1.0, 2.0)  # of dg-hard's threshold
_POINTS, _WORK, _MERGED = "settings", "work", "merged"
_RESULT = re.compile(r"[0-9a-f]{24}\.json(\.part)?")

_Inputs = dict[str, PathLike | None]  # of a setting: stats, retain and graft_data, None where it has no use for one


@dataclass(frozen=True)
class Setting:
    """One way to patch: the options, whether the retained statistics are used, and how it is distilled, if it is.

    What is distilled uses the samples of both statistics, whatever its method.
    """

    options: PatchOptions
    retained: bool = False
    distill: DistillOptions | None = None

    @property
    def resolved(self) -> PatchOptions:
        """The options with a value for everything."""
        distilled = self.distill is not None
        return self.options.resolved(self.retained or distilled, distilled)

    @property
    def family(self) -> str:
        """What it is compared as; the settings of a family make one frontier."""
        o = self.resolved
        distilled = ", distilled" if self.distill is not None else ""
        if o.method != "tailor":
            return f"{o.method}{distilled}"
        retained = self.retained or (self.distill is not None and o.needs_hessians)
        return f"{o.solver}{', propagated' if o.propagate else ', retained' if retained else ''}{distilled}"

    @property
    def label(self) -> str:
        """The family with what distinguishes its settings, numbers in full."""
        o = self.resolved
        if o.is_dense:
            dense = {
                "interpolate": [f"{self.family} {number_of(o.effective_weight)}"],
                "changed": [self.family],
                "lines": [self.family, f"alpha {number_of(o.alpha)}", f"beta {o.effective_beta:g}"],
            }
            parts = dense.get(o.method, [self.family, f"threshold scale {number_of(o.threshold_scale)}"])
            return ", ".join([*parts, *self._distilled])
        parts = [self.family, f"density {number_of(o.density)}"]
        if self.retained:
            parts.append(f"retain weight {number_of(o.retain_weight)}")
        if o.method == "tailor" and o.omega != PatchOptions().omega:
            parts.append(f"omega {number_of(o.omega)}")
        distilled = self.distill is not None
        usual = PatchOptions().resolved(self.retained or distilled, distilled)
        if o.method == "tailor" and o.effective_score != usual.effective_score:
            parts.append(f"score {o.effective_score}")
        if o.method == "tailor" and o.damping != usual.damping:
            parts.append(f"damping {number_of(o.effective_damping)}")
        if o.effective_weight != 1.0:
            parts.append(f"weight {number_of(o.effective_weight)}")
        return ", ".join([*parts, *self._distilled])

    def command(self, inputs: Mapping[str, str]) -> str:
        """The ``tailorcli patch`` that makes this setting's model; ``inputs`` are paths by their roles."""
        options = self.resolved
        used = {
            "base": True,
            "tuned": True,
            "stats": options.needs_hessians or self.distill is not None,
            "retain": self.retained or self.distill is not None,
            "data": options.method == "graft",
        }
        given = {role: path for role, path in inputs.items() if used[role]}
        trained = None if self.distill is None else asdict(self.distill)
        return shell_text(patch_command(options.to_dict(), given, distilled=trained))

    @property
    def _distilled(self) -> list[str]:
        """How it is distilled, where that is not as by default."""
        if self.distill is None:
            return []
        chosen, default = asdict(self.distill), asdict(DistillOptions())
        changed = {name: value for name, value in chosen.items() if value != default[name]}
        shown = {
            name: number_of(value) if isinstance(value, (int, float)) else value for name, value in changed.items()
        }
        return [f"distill {name.replace('_', ' ')} {value}" for name, value in shown.items()]


def settings_of(
    options: PatchOptions,
    *,
    densities: Sequence[float] = (0.1,),
    omegas: Sequence[float] = (0.5,),
    solvers: Sequence[Solver | str] = ("joint",),
    retain_weights: Sequence[float] = (),
    dampings: Sequence[float | None] = (None,),
    methods: Sequence[PatchMethod | str] = (),
    weights: Sequence[float] = (),
    distill: DistillOptions | None = None,
) -> list[Setting]:
    """Every combination of the values for the method tailor, and of those that ``methods`` have for each of them.

    ``retain_weights`` are for the retained statistics; zero is without them, and so is what uses no statistics at all.
    ``weights`` are the interpolation's, and the alphas of ``lines``, which goes on from each to tuned itself;
    ``dg-hard`` has its threshold halved and doubled. With ``distill`` each setting with retained statistics comes once
    more, distilled.
    """
    found: list[Setting] = []
    for density, omega, solver, retain_weight, damping in product(
        densities, omegas, solvers, retain_weights or (0.0,), dampings
    ):
        changed = replace(
            options,
            density=density,
            omega=omega,
            solver=solver,
            damping=damping,
            propagate=options.propagate if solver == "joint" and retain_weight > 0 else None,
        )
        retained = retain_weight > 0 and changed.needs_hessians
        if changed.needs_hessians:
            changed = replace(changed, retain_weight=retain_weight)
        found.append(Setting(changed, retained=retained))
        if distill is not None and retain_weight > 0:
            found.append(Setting(changed, retained=retained, distill=distill))
    options = replace(options, score=None, propagate=None)  # which are of the method tailor
    for method in methods:
        if method == "interpolate":
            found += [Setting(replace(options, method=method, weight=weight)) for weight in weights or WEIGHTS]
        elif method == "lines":
            found += [Setting(replace(options, method=method, alpha=alpha)) for alpha in weights or WEIGHTS]
        elif method == "changed":
            found.append(Setting(replace(options, method=method)))
        elif method == "dg-hard":
            found += [Setting(replace(options, method=method, threshold_scale=scale)) for scale in SCALES]
        elif method != "tailor":
            found += [Setting(replace(options, method=method, density=density)) for density in densities]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Point:
    """One evaluated model: a setting, or an end of the way from base to tuned; part -> figure (1 + R,) by name."""

    label: str
    family: str
    options: dict[str, Any] | None  # None: base or tuned
    figures: dict[str, dict[str, Array]]
    scores: dict[str, dict[str, TaskScores]]  # part -> task
    seconds: float  # that the patch took
    patch_bytes: int | None = None  # of its patch file

    def at(self, part: str, name: str) -> float:
        """A figure's value."""
        return float(self.figures[part][name][0])


@dataclass(frozen=True)
class SweepReport:
    """All points of a sweep, base and tuned first; each family's area under its frontier, and the setting picked."""

    points: list[Point]
    roles: Roles
    parts: tuple[str, ...]
    areas: dict[str, dict[str, Estimate]]  # part -> family
    picked: dict[str, str]  # family -> label, by the last of the parts
    rule: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format_version": FORMAT_VERSION,
            "command": "sweep",
            "origin": list(self.roles.origin),
            "target": list(self.roles.target),
            "rule": self.rule,
            "points": [
                {
                    "label": point.label,
                    "family": point.family,
                    "options": point.options,
                    "seconds": point.seconds,
                    "patch_bytes": point.patch_bytes,
                    "on_frontier": {part: point.label in self.frontier_of(point.family, part) for part in self.parts},
                    **{
                        part: {name: estimate(figure).to_dict() for name, figure in point.figures[part].items()}
                        for part in self.parts
                    },
                }
                for point in self.points
            ],
            "areas": {part: {f: e.to_dict() for f, e in found.items()} for part, found in self.areas.items()},
            "picked": self.picked,
        }

    def frontier_of(self, family: str, part: str) -> list[str]:
        """The labels of a family's points, and of base and tuned, that none of them beats, in the order of old."""
        members = members_of(self.points, family)
        order = frontier([(p.at(part, "origin"), p.at(part, "target")) for p in members])
        return [members[i].label for i in order]


def members_of(points: Sequence[Point], family: str) -> list[Point]:
    """A family's points with base and tuned, which every family can reach."""
    return [point for point in points if point.options is None or point.family == family]


def run_sweep(
    base: PathLike,
    tuned: PathLike,
    settings: Sequence[Setting],
    tasks: Sequence[str],
    output: PathLike,
    *,
    origin: Sequence[str],
    target: Sequence[str],
    validation: Sequence[str] = (),
    stats: PathLike | None = None,
    retain: PathLike | None = None,
    graft_data: PathLike | None = None,
    min_old_kept: float | None = None,
    options: EvaluateOptions = EvaluateOptions(),
    announce: Callable[[str], object] | None = None,
) -> SweepReport:
    """Evaluate base, tuned and every setting on ``tasks`` (NAME=FILE:KIND), and on ``validation`` of the same names.

    The setting of each family is picked on the validation tasks, where there are any: the best H, or, with
    ``min_old_kept``, the most of the new among those with that percentage of the base's old performance. ``output``
    takes a file for each setting that is done, which a rerun of the same version reuses, and ``sweep.json``. Each
    model is encoded with its own tokenizer; a patched one has tuned's. Raises TailorError.
    """
    started = perf_counter()
    if min_old_kept is not None and not (min_old_kept == 0 or 1 < min_old_kept <= 100):
        hint = "it is a share in percent, such as 99"
        raise OptionsError(f"min-old-kept must be 0, or above 1 and at most 100, got {min_old_kept}", hint)
    _require_inputs(settings, stats, graft_data)
    say = announce or (lambda message: None)
    base, tuned = local_folders((base, tuned), code=options.trust_remote_code)
    read = _read_parts(tasks, validation, options)
    roles = check_roles([task.name for task in read["test"]], origin, target)
    if not roles.origin:
        raise OptionsError("a sweep needs old and new tasks", "name them: --origin NAME --target NAME")
    files = [task.path for of_part in read.values() for task in of_part]
    protect([output], [base, tuned, stats, retain, graft_data, *files], "choose another folder for -o")
    folder = _prepare(Path(output)) if ranks().first else Path(output)
    require_shared(folder)
    with ExitStack() as stack:
        if ranks().first:
            stack.enter_context(OutputLock(folder, folder=True))
        ends = {name: open_subject(path, base, stack) for name, path in (("base", base), ("tuned", tuned))}
        known = _identity(ends, stats, retain, graft_data, read, options)
        encoded = {part: encode_for_all(of_part, ends, options) for part, of_part in read.items()}
        with open_checkpoint(base) as opened:
            quantised = opened.dequantized
        scorer = _Scorer(folder, encoded, options, known, quantised)
        inputs = [_inputs_of(setting, stats, retain, graft_data) for setting in settings]
        _require_makeable(settings, base, tuned, inputs)
        results = [scorer.end(name, end.path, base) for name, end in ends.items()]
        for number, (setting, given) in enumerate(zip(settings, inputs, strict=True), 1):
            say(f"{number} of {len(settings)}: {setting.label}")
            results.append(scorer.patched(setting, base, tuned, given))
    points = _with_figures(results, roles, options)
    parts = tuple(read)
    report = SweepReport(
        points=points,
        roles=roles,
        parts=parts,
        areas={part: _areas(points, part) for part in parts},
        picked=_pick(points, parts[-1], min_old_kept),
        rule=f"on {parts[-1]}: {_rule(points, parts[-1], min_old_kept)}",
        seconds=perf_counter() - started,
    )
    if ranks().first:
        write_text(folder / REPORT_FILE, json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
    return report


def _require_inputs(settings: Sequence[Setting], stats: PathLike | None, graft_data: PathLike | None) -> None:
    """Every setting has what it is made of, before any model runs. Raises OptionsError."""
    for setting in settings:
        if setting.options.needs_hessians and stats is None:
            what = f"the setting {setting.label} needs statistics"
            raise OptionsError(what, "pass --stats STATS, or other methods alone: --method interpolate")
        if setting.options.method == "graft" and graft_data is None:
            raise OptionsError("method graft trains on the fine-tuning data", "pass --graft-data FILE")


def _inputs_of(
    setting: Setting, stats: PathLike | None, retain: PathLike | None, graft_data: PathLike | None
) -> _Inputs:
    """What a setting is made of, besides base and tuned."""
    distilled = setting.distill is not None
    return {
        "stats": stats if setting.options.needs_hessians or distilled else None,
        "retain": retain if setting.retained or distilled else None,
        "graft_data": graft_data if setting.options.method == "graft" else None,
    }


def _require_makeable(settings: Sequence[Setting], base: PathLike, tuned: PathLike, inputs: Sequence[_Inputs]) -> None:
    """Each kind of setting can be made of its inputs: one plan of each, before any model runs. Raises TailorError."""
    seen = set()
    for setting, given in zip(settings, inputs, strict=True):
        options = setting.resolved
        uses = (setting.retained, setting.distill is not None, options.needs_hessians)
        kind = (options.method, options.solver, options.propagate, *uses)
        if kind not in seen:
            seen.add(kind)
            with _named(setting):
                if setting.distill is None:
                    plan_patch(base, tuned, options=options, **given)
                else:
                    plan_distilled(base, tuned, None, **_both(given), options=options, distill=setting.distill)


@contextmanager
def _named(setting: Setting) -> Iterator[None]:
    """An error says which setting it is of."""
    try:
        yield
    except TailorError as error:
        raise type(error)(f"{setting.label}: {error.message}", error.hint) from error


def _read_parts(tasks: Sequence[str], validation: Sequence[str], options: EvaluateOptions) -> dict[str, list[Task]]:
    read = {"test": read_tasks(tasks, options.limit)}
    if validation:
        read["validation"] = read_tasks(validation, options.limit)
        names = [sorted(task.name for task in part) for part in read.values()]
        if names[0] != names[1]:
            raise OptionsError(
                f"--validation has the tasks {', '.join(names[1])}, --task {', '.join(names[0])}",
                "give every task a validation file under the same name",
            )
        kinds = {task.name: task.kind for task in read["test"]}
        for task in read["validation"]:
            if task.kind != kinds[task.name]:
                what = f"--validation has task {task.name!r} of kind {task.kind}, --task of kind {kinds[task.name]}"
                raise OptionsError(what, "give both the same kind")
    return read


def _is_ours(name: str) -> bool:
    """Whether a sweep makes something of this name in the folder where it works."""
    return name.startswith(("model", "patch.safetensors", ".patch.safetensors"))


_DRAWN = (".png", ".svg", ".pdf", ".html")  # pictures and pages, which may lie in the folder


def _prepare(folder: Path) -> Path:
    """The output folder: empty, or with an earlier sweep in it."""
    try:
        present = [entry.name for entry in entries(folder)] if folder.exists() else []
        foreign = [
            name for name in present if name not in (_POINTS, _WORK, _MERGED, REPORT_FILE) and not name.endswith(_DRAWN)
        ]
        results = (folder / _POINTS).iterdir() if (folder / _POINTS).is_dir() else iter(())
        foreign += [place.name for place in results if not _RESULT.fullmatch(place.name)]
        if not foreign and _POINTS not in present:  # ours is the first thing that a sweep makes
            foreign = [name for name in present if not name.endswith(_DRAWN)]
        work = folder / _WORK  # which is removed
        foreign += [entry.name for entry in (entries(work) if work.is_dir() else ()) if not _is_ours(entry.name)]
        if foreign:
            raise OutputError(f"{folder} holds other files ({foreign[0]}, ...)", "choose another folder for -o")
        (folder / _POINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_output_error(folder, error) from error
    return folder


def _identity(
    ends: Mapping[str, Subject],
    stats: PathLike | None,
    retain: PathLike | None,
    graft_data: PathLike | None,
    read: Mapping[str, list[Task]],
    options: EvaluateOptions,
) -> dict[str, Any]:
    """What the result of every setting depends on besides the setting."""
    facts: dict[str, Any] = {name: end.checkpoint.fingerprint() for name, end in ends.items()}
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
    root = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0{file_digest(file)}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Result:
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
class _Scorer:
    """Scores models on all parts' tasks, each once: results lie in files."""

    folder: Path
    tasks: dict[str, dict[str, dict[str, EncodedTask]]]  # part -> "base" or "tuned" -> task
    options: EvaluateOptions
    known: dict[str, Any]
    quantised: bool

    def end(self, name: str, path: Path, base: PathLike) -> _Result:
        """Base or tuned."""
        return _Result(name, name, None, *self._scores(name, {}, (), lambda: _Made(path, base), name))

    def patched(self, setting: Setting, base: PathLike, tuned: PathLike, inputs: _Inputs) -> _Result:
        """A setting's model, which is written, evaluated and removed. Raises TailorError, which names the setting."""
        work = self.folder / _WORK
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
                report = _distilled(setting, options, base, tuned, model, stored, inputs)
            return _Made(model, None, report.seconds, None if stored is None else stored.stat().st_size)

        try:
            used = [name for name, path in inputs.items() if path is not None]
            with _named(setting):
                found = self._scores(setting.label, chosen, used, make)
        finally:
            if ranks().first:
                shutil.rmtree(work, ignore_errors=True)
        return _Result(setting.label, setting.family, chosen, *found)

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
        file = self.folder / _POINTS / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.json"
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


def _distilled(
    setting: Setting,
    options: PatchOptions,
    base: PathLike,
    tuned: PathLike,
    output: Path,
    file: Path | None,
    inputs: _Inputs,
) -> PatchReport:
    """Patch and distil. Raises OptionsError without both statistics."""
    assert setting.distill is not None
    given = _both(inputs)
    return distill_checkpoint(base, tuned, output, **given, options=options, distill=setting.distill, patch_file=file)


def _both(inputs: _Inputs) -> dict[str, Any]:
    """The inputs of a distilled setting. Raises OptionsError without both statistics."""
    if inputs["stats"] is None or inputs["retain"] is None:
        raise OptionsError("distillation needs the samples of both statistics", "pass --stats and --retain")
    return inputs


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


def _with_figures(results: list[_Result], roles: Roles, options: EvaluateOptions) -> list[Point]:
    """The points with their averages and H, resampled alike, so that differences between them are paired."""
    parts = list(results[0].scores)
    figures: list[dict[str, dict[str, Array]]] = [{part: {} for part in parts} for _ in results]
    for part in parts:
        for task in results[0].scores[part]:
            scores = [result.scores[part][task] for result in results]
            for found, figure in zip(figures, bootstrap(scores, task, options.resamples, options.seed), strict=True):
                found[part][task] = figure
        for found in figures:
            found[part] |= summarise(found[part], roles.origin, roles.target)
    return [
        Point(result.label, result.family, result.options, found, result.scores, result.seconds, result.patch_bytes)
        for result, found in zip(results, figures, strict=True)
    ]


def families_of(points: Iterable[Point]) -> list[str]:
    """The families that were swept, in their order."""
    return list(dict.fromkeys(point.family for point in points if point.options is not None))


def _areas(points: list[Point], part: str) -> dict[str, Estimate]:
    return {family: estimate(area_figure(points, family, part)) for family in families_of(points)}


def area_figure(points: Sequence[Point], family: str, part: str) -> Array:
    """The area under a family's frontier as a figure (1 + R,)."""
    members = members_of(points, family)
    old, new = (np.stack([p.figures[part][name] for p in members]) for name in ("origin", "target"))  # (P, 1 + R)
    return np.array([frontier_area(old[:, r], new[:, r], old[:2, r], new[:2, r]) for r in range(old.shape[1])])


def _floor(points: list[Point], part: str, min_old_kept: float) -> float:
    """The least old performance that keeps so many percent of the base's."""
    return min_old_kept / 100 * points[0].at(part, "origin")


def _rule(points: list[Point], part: str, min_old_kept: float | None) -> str:
    """By what a setting of each family is picked, and for which of them none fulfils it."""
    if min_old_kept is None:
        return "the best H"
    floor = _floor(points, part, min_old_kept)
    kept = {point.family for point in points if point.options is not None and point.at(part, "origin") >= floor}
    missed = [family for family in families_of(points) if family not in kept]
    rule = f"most of the new with {min_old_kept:g}% of the old"
    return rule + (f"; no setting of {', '.join(missed)} keeps that: the one that keeps most" if missed else "")


def _pick(points: list[Point], part: str, min_old_kept: float | None) -> dict[str, str]:
    """Each family's setting by the rule; without one that keeps enough, the one that keeps the most."""
    floor = None if min_old_kept is None else _floor(points, part, min_old_kept)
    picked = {}
    for family in families_of(points):
        members = [point for point in points if point.options is not None and point.family == family]
        if floor is None:
            best = max(members, key=lambda point: point.at(part, "h_score"))
        elif enough := [point for point in members if point.at(part, "origin") >= floor]:
            best = max(enough, key=lambda point: point.at(part, "target"))
        else:
            best = max(members, key=lambda point: point.at(part, "origin"))
        picked[family] = best.label
    return picked
