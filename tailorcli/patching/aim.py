"""``patch --target``: density and weight picked so that a share of the old, or of the new, is kept; and no more.

Everything is measured on the held-out tenth of the samples that the statistics hold, the base's own or like them and
the new task's: no data of the old tasks are needed. Closed forms are made and measured at rising densities; at the one
that the target needs the entries are trained, with the base's weight raised, or lowered, where it is missed. A closed
form that reached it is taken where no training does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.device import device_errors, exact_float32, resolve_device
from tailorcli.distributed import ranks, require_shared, told, wait_for_all
from tailorcli.errors import CheckpointError, OptionsError, OutputError
from tailorcli.files import HIDDEN, PathLike, as_output_error, beside, write_text_atomically
from tailorcli.guard import Watch
from tailorcli.hub import local_folders
from tailorcli.options import CalibrateOptions, DistillOptions, PatchOptions
from tailorcli.patchfile.reader import PatchFile
from tailorcli.patchfile.report import REPORT_FILE, PatchReport, load_report
from tailorcli.patchfile.view import side_sources
from tailorcli.patching.apply import apply_patch, open_both, plan_of_patch, write_patched
from tailorcli.patching.distilled import distill_patch, for_samples_of, open_teacher, plan_distilled
from tailorcli.patching.inputs import PatchInputs, described_stats
from tailorcli.patching.patch import patch_checkpoint
from tailorcli.patching.teacher import with_teacher
from tailorcli.runs.outputs import Target, free_bytes
from tailorcli.runs.plan import Plan, SearchPlan
from tailorcli.runs.writing import Outputs
from tailorcli.training.run import Teaching
from tailorcli.units import counted, format_bytes

if TYPE_CHECKING:
    from tailorcli.training.distill import Material

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4)
SLACK = 0.04  # of the share, which training is expected to add to a closed form
ENOUGH = 0.1  # density above which trained entries keep no more of the old (docs/results/research.md, 12 and 13)
GAIN = 0.01  # of the new task's teacher that a higher density has to add, to be worth its entries
ATTEMPTS, FACTOR = 3, 3.0  # trainings, and what the base's weight is multiplied by between them
SUFFIX = ".target"
SEARCH = "search.json"  # what is searched for, beside the patches


@dataclass(frozen=True)
class Aim:
    """The share of the base's accuracy ("old"), or of the new task's teacher's ("new"), that is to be kept."""

    kind: str
    share: float

    @classmethod
    def parse(cls, text: str | Aim) -> Aim:
        """The aim that ``old=99`` or ``new=97`` asks for, in percent; one that is parsed. Raises OptionsError."""
        if isinstance(text, Aim):
            return text
        kind, _, value = text.partition("=")
        try:
            percent = float(value)
        except ValueError:
            percent = 0.0
        if kind not in ("old", "new") or not 1.0 < percent <= 100.0:  # 0.99 is meant as a share of 1
            raise OptionsError(f"the target {text!r} is not understood", "pass old=99 or new=97, a share in percent")
        return cls(kind, percent / 100)

    def __str__(self) -> str:
        return f"{self.kind}={100 * self.share:g}"

    @property
    def other(self) -> str:
        """The kind that is not aimed at."""
        return "new" if self.kind == "old" else "old"

    def is_reached(self, kept: Mapping[str, float]) -> bool:
        """Whether these shares reach it."""
        return kept[self.kind] >= self.share

    @property
    def densities(self) -> tuple[float, ...]:
        """Those that are tried, rising."""
        return DENSITIES if self.kind == "new" else tuple(each for each in DENSITIES if each <= ENOUGH)

    @property
    def search(self) -> SearchPlan:
        """What is tried to reach it."""
        return SearchPlan(str(self), self.densities, ATTEMPTS)


def pick_density(shares_at: Callable[[float], dict[str, float]], aim: Aim) -> float:
    """The density that training starts from, from shares of closed forms at rising densities.

    Of the new: the least that comes near the aim. Of the old: up to ENOUGH as long as the new gains; what a closed form
    of more entries forgets, training brings back.
    """
    chosen, *higher = aim.densities
    before = shares_at(chosen)
    for density in higher:
        if aim.kind == "new" and before["new"] >= aim.share - SLACK:
            break
        after = shares_at(density)
        if aim.kind == "old" and after["new"] < before["new"] + GAIN:
            break
        chosen, before = density, after
    return chosen


def after_miss(aim: Aim, density: float, weight: float) -> tuple[float, float]:
    """Density and weight of the base for another training: the weight up for the old, and down for the new.

    For the new the density goes up with it, to ENOUGH.
    """
    if aim.kind == "old":
        return density, weight * FACTOR
    return min((each for each in DENSITIES if density < each <= ENOUGH), default=density), weight / FACTOR


def patch_to_target(
    base: PathLike,
    tuned: PathLike,
    output: PathLike | None,
    stats: PathLike,
    retain: PathLike,
    target: str | Aim,
    options: PatchOptions = PatchOptions(),
    distill: DistillOptions = DistillOptions(),
    progress: bool = False,
    patch_file: PathLike | None = None,
    tell: Callable[[str], None] | None = None,
    graft_data: PathLike | None = None,
    made_of: Mapping[str, dict[str, str]] | None = None,
    teacher_data: PathLike | None = None,
    calibration: CalibrateOptions | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> PatchReport:
    """Patch and distil at the density, and with the weight of the base, that ``target`` needs, such as "old=99".

    ``options.density`` and ``distill.weight`` are where neither is known yet. What was tried and reached, by the
    held-out samples, is in the report's ``target``; ``tell`` hears it as it goes. Where no training reaches the target
    a closed form that does is written, and where nothing does, the nearest training. The other arguments are as for
    ``patch_checkpoint``. Raises TailorError.
    """
    started = perf_counter()
    aim = Aim.parse(target)
    options = searched(options).resolved(True, distilled=True)
    base, tuned = local_folders((base, tuned), code=options.trust_remote_code)
    where = Target.needed(output, patch_file, resume=options.resume, overwrite=options.overwrite)
    plan = plan_target(base, tuned, output, stats, retain, aim, options, distill, patch_file, graft_data)
    options = told(with_teacher(options, base, tuned, stats, teacher_data, progress, tell, calibration))
    with ExitStack() as stack:
        inputs = PatchInputs.open(base, tuned, stats, options, stack, retain, graft_data)
        inputs.sources = made_of or {}
        options = inputs.told(options)
        sampled = [stack.enter_context(closing(Stats.open(path))) for path in (stats, retain)]
        distill = for_samples_of(distill, sampled)
        earlier = finished_target(where, aim, options, distill, inputs.describe())
    if earlier is not None:
        return earlier
    if announce is not None and ranks().first:
        announce(plan)
    work = beside(where.place, SUFFIX)
    wait_for_all("the search to be planned")  # by what is there before the first rank begins
    if ranks().first:
        _begin(work, {"target": str(aim), **asdict(distill)}, resume=options.resume)
    require_shared(work)
    given = (base, tuned, stats, retain, aim, options, distill, progress, tell or (lambda _: None), work)
    search = _Search(*given, graft_data, made_of)
    best = search.run()
    if output is not None:
        size, again = options.max_shard_size, options.resume
        written = (base, best.file, output)
        apply_patch(*written, max_shard_size=size, resume=again, overwrite=options.overwrite, progress=progress)
    if ranks().first:
        if where.patch_file is not None:
            _copy(best.file, where.patch_file)
        shutil.rmtree(work)
    wait_for_all("the best patch to get its name")
    return replace(best.report, is_earlier=False, seconds=perf_counter() - started)


def plan_target(
    base: PathLike,
    tuned: PathLike,
    output: PathLike | None,
    stats: PathLike,
    retain: PathLike,
    target: str | Aim,
    options: PatchOptions = PatchOptions(),
    distill: DistillOptions = DistillOptions(),
    patch_file: PathLike | None = None,
    graft_data: PathLike | None = None,
) -> Plan:
    """What ``patch_to_target`` would do and cost, at the highest density that it tries. Raises TailorError."""
    aim = check_target(target, options)
    options = searched(options)
    base, tuned = local_folders((base, tuned), code=options.trust_remote_code)
    with open_checkpoint(base) as opened:
        check_searchable(options, opened)
    given = (base, tuned, output, stats, retain)
    highest, lowest = (
        plan_distilled(*given, replace(options, density=density), distill, patch_file, graft_data)
        for density in (aim.densities[-1], aim.densities[0])
    )
    place = Target.needed(output, patch_file, resume=options.resume, overwrite=options.overwrite).place
    require_search(beside(place, SUFFIX))
    written = highest.write_bytes if output is not None else 0
    needed, free = search_bytes(aim, lowest.patch_bytes, highest.patch_bytes), free_bytes(place)
    if needed + written > free and not options.resume:
        raise OutputError(
            f"not enough disk for {place}: the search keeps up to {format_bytes(needed)} of patches beside it, and the "
            f"output takes {format_bytes(written)}; {format_bytes(free)} are free",
            "free some, or choose another disk",
        )
    return replace(highest, search=aim.search)


def check_target(target: str | Aim, options: PatchOptions) -> Aim:
    """The target, if it is understood, and the method has a density to pick. Raises OptionsError."""
    aim = Aim.parse(target)
    if options.is_dense:
        raise OptionsError(
            f"--target picks a density, and {options.method} keeps every entry", "pick a method of masks"
        )
    return aim


def searched(options: PatchOptions) -> PatchOptions:
    """These options for closed forms, of which one may be written: propagated, as by default without training.

    Raises OptionsError, as ``PatchOptions.resolved`` does.
    """
    return options.resolved(True)


def check_searchable(options: PatchOptions, base: Checkpoint) -> None:
    """The patches of a search can be kept, as files of entries of the base's own tensors. Raises OptionsError."""
    hint = "pass --distill and a --density in place of --target"
    if base.dequantized:
        raise OptionsError(f"--target keeps patch files, and the tensors of {base.path} are quantised", hint)
    if options.resized_vocab:
        raise OptionsError("--target keeps patch files, which cannot hold the new rows of --resized-vocab", hint)


def search_bytes(aim: Aim, lowest: int, highest: int) -> int:
    """Bytes of all patch files of a search, from those of a file at its lowest and at its highest density."""
    first, last = aim.densities[0], aim.densities[-1]
    closed = sum(lowest + (highest - lowest) * (density - first) / (last - first) for density in aim.densities)
    return int(closed) + ATTEMPTS * highest


def search_in_words(aim: Aim, steps: int) -> str:
    """What a search does, whose trainings have so many steps at most."""
    return f"search for {aim}: {aim.search} of {counted(steps, 'step')}"


@dataclass(frozen=True)
class _Attempt:
    """One patch that was tried: its file and report, and the shares that it kept."""

    file: Path
    report: PatchReport
    kept: dict[str, float]
    kept_before: dict[str, float] = field(default_factory=dict)  # by the closed form that was trained


@dataclass(frozen=True)
class _Search:
    """A search under way in the folder ``work``; of several ranks each goes through it, and the first decides."""

    base: PathLike
    tuned: PathLike
    stats: PathLike
    retain: PathLike
    aim: Aim
    options: PatchOptions
    distill: DistillOptions
    progress: bool
    tell: Callable[[str], None]
    work: Path
    graft_data: PathLike | None = None
    made_of: Mapping[str, dict[str, str]] | None = None

    def run(self) -> _Attempt:
        """The training that reaches the aim, a closed form that does where none did, or the nearest training."""
        device, trust = resolve_device(self.options.device), self.options.trust_remote_code
        closed: dict[float, dict[str, float]] = {}  # what those that were measured keep
        with ExitStack() as stack:
            opened = stack.enter_context(Checkpoint.open(self.base))
            teacher = open_teacher(opened, self.tuned, self.stats, stack, self.options.known_teacher)
            retained = stack.enter_context(closing(Stats.open(self.retain)))
            teaching = Teaching(opened, [teacher], retained, device, trust, self.work, self.progress)
            with exact_float32(), device_errors("a smaller --distill-batch-size"):
                materials = teaching.materials(self.distill)

            def shares_at(density: float) -> dict[str, float]:
                with PatchFile.open(self._closed(density)) as file, exact_float32(), device_errors():
                    found = told(teaching.kept(file, materials))
                self.tell(f"closed form at density {density:g}: {_said(found)}")
                closed[density] = found
                return found

            density, weight = pick_density(shares_at, self.aim), self.distill.weight
        attempts: list[_Attempt] = []
        for number in range(1, ATTEMPTS + 1):
            attempts.append(self._trained(number, density, weight, attempts, materials))
            if self.aim.is_reached(attempts[-1].kept):
                self.tell(f"target {self.aim} reached: {_said(attempts[-1].kept)}")
                return attempts[-1]
            closed[density] = attempts[-1].kept_before
            density, weight = after_miss(self.aim, density, weight)
        nearest = max(attempts, key=lambda each: each.kept[self.aim.kind])
        reached = {density: kept for density, kept in closed.items() if self.aim.is_reached(kept)}
        if not reached:
            self.tell(f"target {self.aim} missed: {_said(nearest.kept)}")
            return nearest
        density = max(reached, key=lambda density: reached[density][self.aim.other])
        self.tell(
            f"target {self.aim} reached by no training, so that the closed form at density {density:g} is written: "
            f"{_said(reached[density])} (the nearest training: {_shares(nearest.kept)})"
        )
        return self._as_found(density, reached[density], attempts)

    def _closed(self, density: float) -> Path:
        """The patch at a density, as a file; one that is there is taken, or finished."""
        file = self.work / f"closed-{density:g}.safetensors"
        begun = told(self._begun(file))
        own = replace(self.options, density=density, resume=begun, overwrite=False, max_shard_size=None)
        both = (self.stats, self.retain)
        stats, retain = both if own.fits_statistics else (None, None)  # whose samples are used alone
        pair = (self.base, self.tuned, None, stats, own, self.progress)
        more: dict[str, Any] = {"retain": retain, "graft_data": self.graft_data, "made_of": self.made_of}
        patch_checkpoint(*pair, patch_file=file, **more)
        return file

    def _begun(self, file: Path) -> bool:
        """Whether a run has begun to write a file."""
        return any(path.name.startswith(file.name) for path in self.work.iterdir())

    def _trained(
        self, number: int, density: float, weight: float, before: list[_Attempt], materials: dict[str, Material]
    ) -> _Attempt:
        file = self.work / f"trained-{number}.safetensors"
        begun = told(self._begun(file))
        report = distill_patch(
            *(self._closed(density), self.base, self.tuned, self.stats, self.retain),
            patch_file=file,
            distill=replace(self.distill, weight=weight),
            device=self.options.device,
            progress=self.progress,
            resume=begun,
            teacher_weight=self.options.known_teacher,
            materials=materials,
            told=self._found(density, before) | {"weight": weight},
            trust_remote_code=self.options.trust_remote_code,
        )
        assert report.distillation is not None
        found = told(report.distillation["kept"])
        kept, before_it = ({kind: found[kind + when] for kind in ("old", "new")} for when in ("", "_before"))
        self.tell(f"trained at density {density:g}, weight {weight:g}: {_said(kept)}")
        return _Attempt(file, report, kept, before_it)

    def _found(self, density: float, missed: Sequence[_Attempt]) -> dict[str, Any]:
        """What a report says of this search."""
        tried = [each.kept for each in missed]
        return {"asked": str(self.aim), "density": density, "missed": tried, "distill": asdict(self.distill)}

    def _as_found(self, density: float, kept: dict[str, float], missed: Sequence[_Attempt]) -> _Attempt:
        """The closed form at a density, as a file whose report says what was searched for."""
        file = self.work / "closed-taken.safetensors"
        target = Target.of(None, file, resume=False, overwrite=True)
        with ExitStack() as stack:
            opened, closed = open_both(self.base, self._closed(density), stack)
            stats, retained = (stack.enter_context(closing(Stats.open(path))) for path in (self.stats, self.retain))
            report = closed.report()
            inputs = report.inputs | described_stats(stats, retained, report.inputs)
            report = replace(report, inputs=inputs, target=self._found(density, missed) | {"kept": kept})
            side, _ = side_sources(opened, closed)
            plan, manifest = plan_of_patch(opened, closed, None), closed.manifest
            about = {"task": manifest.task, "license": manifest.license, "inputs": inputs}
            begun = target.begin(plan, opened, [closed.path], manifest.run, report.command, side, about)
            assert isinstance(begun, Outputs)  # it is made anew
            outputs = stack.enter_context(begun)
            write_patched(plan, opened, closed, {}, report, outputs, lambda _: None)
            outputs.finish(report, Watch([*opened.shards, closed.path]))
        return _Attempt(file, report, kept)


def _said(kept: dict[str, float]) -> str:
    return f"{_shares(kept)}, by the held-out samples"


def _shares(kept: dict[str, float]) -> str:
    return f"{100 * kept['old']:.1f}% of the old and {100 * kept['new']:.1f}% of the new"


def finished_target(
    where: Target,
    aim: Aim,
    options: PatchOptions,
    distill: DistillOptions,
    described: Mapping[str, Mapping[str, str]],
) -> PatchReport | None:
    """The report of an earlier run of this command that had finished, when asked to resume it.

    ``options`` are resolved and know the teacher's weight; ``described`` are the inputs, as a report has them. Raises
    OutputError where another run's output is there.
    """
    if not where.resume or beside(where.place, SUFFIX).exists():
        return None
    if where.folder is not None and (where.folder / REPORT_FILE).is_file():
        report = load_report(where.folder / REPORT_FILE)
    elif where.folder is None and where.patch_file is not None and where.patch_file.is_file():
        with PatchFile.open(where.patch_file) as file:
            report = file.report()
    else:
        return None
    found = report.target or {}
    same = (
        found.get("asked") == str(aim)
        and _but(report.options, *_PICKED) == _but(options.to_dict(), *_PICKED)
        and found.get("distill") == _but(asdict(distill))
        and all(report.inputs.get(role, {}).get("fingerprint") == of["fingerprint"] for role, of in described.items())
    )
    if not same:
        raise OutputError(f"{where.place} holds the finished output of another run", "choose another, or --overwrite")
    _require_whole(where, report)
    return replace(report, is_earlier=True)


def _require_whole(where: Target, report: PatchReport) -> None:
    """All outputs of a finished search are there. Raises OutputError: its patches are gone, so nothing can be added."""
    if where.folder is None:
        return
    hint = "--overwrite makes them anew"
    try:
        Checkpoint.open(where.folder).close()
    except CheckpointError as error:
        raise OutputError(f"{where.folder} was finished and is no longer whole: {error.message}", hint) from error
    if where.patch_file is None:
        return
    if not where.patch_file.is_file():
        raise OutputError(f"{where.folder} is finished, and {where.patch_file} is not there", hint)
    with PatchFile.open(where.patch_file) as file:
        theirs = file.report()
        if (theirs.distillation, theirs.target) != (report.distillation, report.target):
            raise OutputError(f"{where.patch_file} is not of the run that made {where.folder}", hint)


_PICKED = ("density", "max_shard_size")  # options that a search picks, or that only the writing uses


def _but(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The others, as a file has them."""
    values: dict[str, Any] = json.loads(json.dumps({k: value for k, value in options.items() if k not in names}))
    return values


def require_search(work: Path) -> None:
    """Raise OutputError where something else than a search lies there."""
    ours = ("closed-", "trained-", SEARCH, HIDDEN)
    if work.exists() and (not work.is_dir() or any(not path.name.startswith(ours) for path in work.iterdir())):
        raise OutputError(f"{work} is no folder of ours", "move it away")


def _begin(work: Path, wanted: Mapping[str, Any], *, resume: bool) -> None:
    """The folder that a search for what is ``wanted`` is taken up in.

    Raises OutputError where it cannot be made, is not ours, or is of another search.
    """
    try:
        require_search(work)
        if work.exists() and not resume:
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        told_of = json.dumps(wanted, indent=1, default=str) + "\n"
        if (work / SEARCH).exists() and (work / SEARCH).read_text(encoding="utf-8") != told_of:
            raise OutputError(f"{work} is of a search with other options", "repeat them, or begin anew: --overwrite")
        write_text_atomically(work / SEARCH, told_of)
    except OSError as error:
        raise as_output_error(work, error) from error


def _copy(source: Path, file: Path) -> None:
    """Give a file's bytes another name, whole or not at all. Raises OutputError."""
    part = file.with_name(file.name + ".part")
    try:
        shutil.copyfile(source, part)
        part.replace(file)
    except OSError as error:
        raise as_output_error(file, error) from error
