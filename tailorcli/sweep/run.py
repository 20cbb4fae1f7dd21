"""Patch one pair in many ways, evaluate each result, and see which settings no other beats: the frontier.

Statistics are made once, by ``calibrate``; a sweep only patches and evaluates. Every setting that is done is kept, so
that a sweep goes on where it was interrupted, and a wider one reuses a narrower one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.distributed import ranks, require_shared
from tailorcli.errors import OptionsError, OutputError
from tailorcli.evaluation.evaluate import encode_for_all
from tailorcli.evaluation.metrics import check_roles
from tailorcli.evaluation.subjects import open_subject
from tailorcli.evaluation.tasks import Task, read_tasks
from tailorcli.files import PathLike, as_output_error, write_text
from tailorcli.guard import OutputLock, entries, protect
from tailorcli.hub import local_folders
from tailorcli.options import EvaluateOptions
from tailorcli.patching.distilled import plan_distilled
from tailorcli.patching.patch import plan_patch
from tailorcli.sweep.outcome import SweepReport, areas_of, pick, rule_of, with_figures
from tailorcli.sweep.scoring import (
    POINTS,
    RESULT,
    WORK,
    Inputs,
    Scorer,
    distilled_inputs,
    identity_of,
    inputs_of,
    named,
)
from tailorcli.sweep.settings import Setting

REPORT_FILE = "sweep.json"
_MERGED = "merged"  # a folder that earlier versions made
_DRAWN = (".png", ".svg", ".pdf", ".html")  # pictures and pages, which may lie in the folder


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
    folder = Path(output)
    with ExitStack() as stack:
        if ranks().first:
            _check_folder(folder)
            stack.enter_context(OutputLock(folder, folder=True))
        require_shared(folder)
        ends = {name: open_subject(path, base, stack) for name, path in (("base", base), ("tuned", tuned))}
        known = identity_of(ends, stats, retain, graft_data, read, options)
        encoded = {part: encode_for_all(of_part, ends, options) for part, of_part in read.items()}
        with open_checkpoint(base) as opened:
            quantised = opened.dequantized
        scorer = Scorer(folder, encoded, options, known, quantised)
        inputs = [inputs_of(setting, stats, retain, graft_data) for setting in settings]
        _require_makeable(settings, base, tuned, inputs)
        results = [scorer.end(name, end.path, base) for name, end in ends.items()]
        for number, (setting, given) in enumerate(zip(settings, inputs, strict=True), 1):
            say(f"{number} of {len(settings)}: {setting.label}")
            results.append(scorer.patched(setting, base, tuned, given))
    points = with_figures(results, roles, options)
    parts = tuple(read)
    report = SweepReport(
        points=points,
        roles=roles,
        parts=parts,
        areas={part: areas_of(points, part) for part in parts},
        picked=pick(points, parts[-1], min_old_kept),
        rule=f"on {parts[-1]}: {rule_of(points, parts[-1], min_old_kept)}",
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


def _require_makeable(settings: Sequence[Setting], base: PathLike, tuned: PathLike, inputs: Sequence[Inputs]) -> None:
    """Each kind of setting can be made of its inputs: one plan of each, before any model runs. Raises TailorError."""
    seen = set()
    for setting, given in zip(settings, inputs, strict=True):
        options = setting.resolved
        uses = (setting.retained, setting.distill is not None, options.needs_hessians)
        kind = (options.method, options.solver, options.propagate, *uses)
        if kind not in seen:
            seen.add(kind)
            with named(setting):
                if setting.distill is None:
                    plan_patch(base, tuned, options=options, **given)
                else:
                    plan_distilled(
                        base, tuned, None, **distilled_inputs(given), options=options, distill=setting.distill
                    )


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


def _check_folder(folder: Path) -> None:
    """The output folder is new, empty, or has an earlier sweep in it. Raises OutputError."""
    try:
        present = [entry.name for entry in entries(folder)] if folder.exists() else []
        foreign = [
            name for name in present if name not in (POINTS, WORK, _MERGED, REPORT_FILE) and not name.endswith(_DRAWN)
        ]
        results = (folder / POINTS).iterdir() if (folder / POINTS).is_dir() else iter(())
        foreign += [place.name for place in results if not RESULT.fullmatch(place.name)]
        if not foreign and POINTS not in present:  # ours is the first thing that a sweep makes
            foreign = [name for name in present if not name.endswith(_DRAWN)]
        work = folder / WORK  # which is removed
        foreign += [entry.name for entry in (entries(work) if work.is_dir() else ()) if not _is_ours(entry.name)]
        if foreign:
            raise OutputError(f"{folder} holds other files ({foreign[0]}, ...)", "choose another folder for -o")
    except OSError as error:
        raise as_output_error(folder, error) from error
