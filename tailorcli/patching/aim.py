"""``patch --target``: density and weight picked so that a share of the old, or of the new, is kept; and no more.

Everything is measured on the held-out tenth of the samples that the statistics hold, the base's own or like them and
the new task's: no data of the old tasks are needed. Closed forms are made and measured at rising densities; at the one
that the target needs the entries are trained, with the base's weight, or the density, raised where it is missed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.device import device_errors, exact_float32, resolve_device
from tailorcli.errors import OptionsError, OutputError
from tailorcli.files import PathLike, as_output_error
from tailorcli.options import DistillOptions, PatchOptions
from tailorcli.patchfile.reader import PatchFile
from tailorcli.patchfile.report import REPORT_FILE, PatchReport, load_report
from tailorcli.patching.apply import apply_patch
from tailorcli.patching.distilled import distill_patch, open_teacher
from tailorcli.patching.patch import patch_checkpoint, plan_patch
from tailorcli.runs.outputs import Target

if TYPE_CHECKING:
    from tailorcli.training.distill import Material

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4)
SLACK = 0.04  # of the share, which training is expected to add to a closed form
GAIN = 0.01  # of the new task's teacher that a higher density has to add, to be worth its entries
ATTEMPTS, FACTOR = 3, 3.0  # trainings, and what the base's weight is multiplied by between them
SUFFIX = ".target"


@dataclass(frozen=True)
class Aim:
    """The share of the base's accuracy ("old"), or of the new task's teacher's ("new"), that is to be kept."""

    kind: str
    share: float

    @classmethod
    def parse(cls, text: str) -> Aim:
        """The aim that ``old=99`` or ``new=97`` asks for, in percent. Raises OptionsError."""
        kind, _, value = text.partition("=")
        try:
            percent = float(value)
        except ValueError:
            percent = 0.0
        if kind not in ("old", "new") or not 0.0 < percent <= 100.0:
            raise OptionsError(f"the target {text!r} is not understood", "pass old=99 or new=97, a share in percent")
        return cls(kind, percent / 100)

    def __str__(self) -> str:
        return f"{self.kind}={100 * self.share:g}"


def pick_density(shares_at: Callable[[float], dict[str, float]], aim: Aim) -> float:
    """The density that training starts from, from shares of closed forms at rising densities.

    Of the new: the least that comes near the aim. Of the old: up as long as that is near it and the new gains.
    """
    chosen, before = DENSITIES[0], shares_at(DENSITIES[0])
    for density in DENSITIES[1:]:
        if aim.kind == "new" and before["new"] >= aim.share - SLACK:
            break
        after = shares_at(density)
        worth = aim.kind == "new" or after["new"] >= before["new"] + GAIN
        if not worth or (aim.kind == "old" and after["old"] < aim.share - SLACK):
            break
        chosen, before = density, after
    return chosen


def after_miss(aim: Aim, density: float, weight: float) -> tuple[float, float]:
    """Density and weight of the base for another training: of the old the weight goes up, of the new the density."""
    if aim.kind == "old":
        return density, weight * FACTOR
    higher = [each for each in DENSITIES if each > density]
    return (higher[0], weight) if higher else (density, weight / FACTOR)


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
) -> PatchReport:
    """Patch and distil at the density, and with the weight of the base, that ``target`` needs, such as "old=99".

    ``options.density`` and ``distill.weight`` are where neither is known yet. What was tried and reached, by the
    held-out samples, is in the report's ``distillation["target"]``; ``tell`` hears it as it goes. A target that is not
    reached gives the nearest. Raises TailorError.
    """
    aim = Aim.parse(target) if isinstance(target, str) else target
    where = Target.needed(output, patch_file, resume=options.resume, overwrite=options.overwrite)
    earlier = _finished(where)
    if earlier is not None:
        return earlier
    if options.is_dense:
        raise OptionsError(
            f"--target picks a density, and {options.method} keeps every entry", "pick a method of masks"
        )
    plan_patch(base, tuned, output, stats, replace(options, density=1.0), patch_file, retain)
    work = where.place.with_name(where.place.name + SUFFIX)
    _begin(work, resume=options.resume)
    search = _Search(base, tuned, stats, retain, aim, options, distill, progress, tell or (lambda _: None), work)
    best = search.run()
    if output is not None:
        size, again = options.max_shard_size, options.resume
        written = (base, best.file, output)
        apply_patch(*written, max_shard_size=size, resume=again, overwrite=options.overwrite, progress=progress)
    if where.patch_file is not None:
        _copy(best.file, where.patch_file)
    shutil.rmtree(work)
    return best.report


@dataclass(frozen=True)
class _Attempt:
    """One training: its patch file and report, and the shares that it kept."""

    file: Path
    report: PatchReport
    kept: dict[str, float]


@dataclass(frozen=True)
class _Search:
    """A search under way in the folder ``work``."""

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

    def run(self) -> _Attempt:
        """The best of the trainings: one that reaches the aim and keeps most of the other, or the nearest."""
        from tailorcli.training.run import materials_of, measure_patch_file

        device, trust = resolve_device(self.options.device), self.options.trust_remote_code
        with ExitStack() as stack:
            opened = stack.enter_context(Checkpoint.open(self.base))
            teacher = open_teacher(opened, self.tuned, self.stats, stack, self.options.teacher_weight)
            retained = stack.enter_context(closing(Stats.open(self.retain)))
            given = (opened, [teacher], retained, self.distill, device, self.progress, trust, self.work)
            with exact_float32(), device_errors("a smaller --distill-batch-size"):
                materials = materials_of(*given)

            def shares_at(density: float) -> dict[str, float]:
                with PatchFile.open(self._closed(density)) as file, exact_float32(), device_errors():
                    found = measure_patch_file(file, opened, [teacher], materials, device, trust)
                self.tell(f"closed form at density {density:g}: {_said(found)}")
                return found

            density, weight = pick_density(shares_at, self.aim), self.distill.weight
        attempts: list[_Attempt] = []
        for number in range(1, ATTEMPTS + 1):
            attempts.append(self._trained(number, density, weight, attempts, materials))
            if attempts[-1].kept[self.aim.kind] >= self.aim.share:
                break
            density, weight = after_miss(self.aim, density, weight)
        reached = [each for each in attempts if each.kept[self.aim.kind] >= self.aim.share]
        best = reached[0] if reached else max(attempts, key=lambda each: each.kept[self.aim.kind])
        self.tell(f"target {self.aim} {'reached' if reached else 'missed'}: {_said(best.kept)}")
        return best

    def _closed(self, density: float) -> Path:
        """The patch at a density, as a file; one that is there is taken, or finished."""
        file = self.work / f"closed-{density:g}.safetensors"
        begun = any(path.name.startswith(file.name) for path in self.work.iterdir())
        own = replace(self.options, density=density, resume=begun, overwrite=False, max_shard_size=None)
        pair = (self.base, self.tuned, None, self.stats, own, self.progress)
        patch_checkpoint(*pair, patch_file=file, retain=self.retain)
        return file

    def _trained(
        self, number: int, density: float, weight: float, before: list[_Attempt], materials: dict[str, Material]
    ) -> _Attempt:
        file = self.work / f"trained-{number}.safetensors"
        begun = any(path.name.startswith(file.name) for path in self.work.iterdir())
        told: dict[str, Any] = {
            "asked": str(self.aim),
            "density": density,
            "weight": weight,
            "missed": [each.kept for each in before],
        }
        report = distill_patch(
            *(self._closed(density), self.base, self.tuned, self.stats, self.retain),
            patch_file=file,
            distill=replace(self.distill, weight=weight),
            device=self.options.device,
            progress=self.progress,
            resume=begun,
            teacher_weight=self.options.teacher_weight,
            materials=materials,
            told=told,
        )
        assert report.distillation is not None
        kept = {kind: report.distillation["kept"][kind] for kind in ("old", "new")}
        self.tell(f"trained at density {density:g}, weight {weight:g}: {_said(kept)}")
        return _Attempt(file, report, kept)


def _said(kept: dict[str, float]) -> str:
    return f"{100 * kept['old']:.1f}% of the old and {100 * kept['new']:.1f}% of the new, by the held-out samples"


def _finished(where: Target) -> PatchReport | None:
    """The report of an earlier run of this command that had finished."""
    if not where.resume or where.place.with_name(where.place.name + SUFFIX).exists():
        return None
    if where.folder is not None and (where.folder / REPORT_FILE).is_file():
        return replace(load_report(where.folder / REPORT_FILE), is_earlier=True)
    if where.folder is None and where.patch_file is not None and where.patch_file.is_file():
        with PatchFile.open(where.patch_file) as file:
            return replace(file.report(), is_earlier=True)
    return None


def _begin(work: Path, *, resume: bool) -> None:
    """The folder that a search is taken up in. Raises OutputError where it cannot be made, or is not ours."""
    try:
        if work.exists() and not resume:
            strange = not work.is_dir() or [p for p in work.iterdir() if not p.name.startswith(("closed-", "trained-"))]
            if strange:
                raise OutputError(f"{work} is no folder of ours", "move it away")
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
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
