"""Run models over tasks, one model after another, and say what each kept of the old ones and gained on the new."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.device import device_errors, resolve_device
from tailorcli.distributed import ranks
from tailorcli.errors import DataError, OptionsError, TailorError
from tailorcli.evaluation.harness import HarnessTasks, load_tasks, run_tasks
from tailorcli.evaluation.lm_eval import Result
from tailorcli.evaluation.metrics import LEVEL, Estimate, Roles, TaskScores, check_roles, compare
from tailorcli.evaluation.subjects import Subject, is_patch, needs_base, open_subject
from tailorcli.evaluation.tasks import EncodedTask, Task, encode_task, read_tasks
from tailorcli.files import PathLike, write_text
from tailorcli.guard import path_text
from tailorcli.hub import local_folder, local_folders, model_name
from tailorcli.models.calling import package_versions
from tailorcli.models.config import read_config, tokenizer_digest
from tailorcli.models.empty import check_shapes, most_tokens
from tailorcli.models.loading import load_encoder
from tailorcli.options import EvaluateOptions, HarnessOptions
from tailorcli.system import give_back_memory
from tailorcli.terminal import Progress, printable
from tailorcli.typed import plain

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1


@dataclass(frozen=True)
class EvaluateReport:
    """What an evaluation found: for each model its figures with intervals, and what it did on every single item."""

    options: dict[str, Any]
    versions: dict[str, str]
    tasks: dict[str, dict[str, Any]]  # name -> file, kind, role, and the numbers of the scored records
    models: dict[str, dict[str, Any]]  # name -> path, fingerprint, what it ran in
    roles: Roles
    scores: dict[str, dict[str, TaskScores]]  # model -> task
    figures: dict[str, dict[str, dict[str, Estimate]]]  # model -> "tasks" and "summary"
    seconds: float
    harness: dict[str, dict[str, Result]] = field(default_factory=dict)  # model -> task of lm-evaluation-harness

    def to_dict(self) -> dict[str, Any]:
        """Plain values: of a task what each model did on its items, in the order of the task's ``records``."""
        return {
            "format_version": FORMAT_VERSION,
            "command": "evaluate",
            "options": plain(self.options),
            "versions": plain(self.versions),
            "level": LEVEL,
            "tasks": self.tasks,
            "base": self.roles.base,
            "tuned": self.roles.tuned,
            "models": [self._model(name) for name in self.models],
            "seconds": self.seconds,
        }

    def _model(self, name: str) -> dict[str, Any]:
        figures = self.figures[name]
        tasks = {}
        for task, scores in self.scores[name].items():
            loss = scores.mean_loss
            tasks[task] = {
                **figures["tasks"][task].to_dict(),
                "loss": loss,
                "correct": [int(value) for value in scores.correct],
                "count": [int(value) for value in scores.count],
                **({} if loss is None else {"losses": [float(value) for value in scores.loss]}),
                **({"outputs": list(scores.outputs)} if scores.outputs else {}),
            }
        for task, result in self.harness.get(name, {}).items():
            more = {"loss": None, "metric": result.metric, "stderr": result.stderr}
            tasks[task] = {**figures["tasks"][task].to_dict(), **more}
        summary = {key: value.to_dict() for key, value in figures["summary"].items()}
        return {"name": name, **self.models[name], "summary": summary, "tasks": tasks}

    def write(self, path: PathLike) -> None:
        """Write the report as JSON, whole or not at all. Raises OutputError."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")


def evaluate_models(
    models: Sequence[PathLike],
    tasks: Sequence[str],
    options: EvaluateOptions = EvaluateOptions(),
    *,
    origin: Sequence[str] = (),
    target: Sequence[str] = (),
    base: PathLike | None = None,
    tuned: PathLike | None = None,
    progress: bool = False,
    harness: HarnessOptions = HarnessOptions(),
) -> EvaluateReport:
    """Evaluate models on tasks written as NAME=FILE:KIND (``tasks.KINDS``), loading one at a time.

    A model is a checkpoint's folder, an adapter's, or a patch file; the last two are formed on ``base`` in memory, and
    an adapter without one on the local folder that it names. ``origin`` and ``target`` name the old and the new tasks,
    from which H comes (Eq. 32); ``base`` and ``tuned`` say which of the models are the one before fine-tuning and the
    one after. Every item is scored for every model: one that is too long for one of them is left out for all.
    Tasks of lm-evaluation-harness stand beside one's own, with intervals by their standard errors. Everything is
    checked before a model is loaded. Raises TailorError.
    """
    started = perf_counter()
    read = read_tasks(tasks, options.limit) if tasks or not harness.tasks else []
    theirs = load_tasks(harness) if harness.tasks else None
    if twice := {task.name for task in read}.intersection(theirs.made if theirs is not None else ()):
        raise OptionsError(f"two tasks have the name {min(twice)!r}", "give your own another name")
    device = resolve_device(options.device)
    names = names_of(local_folders(models, code=options.trust_remote_code))
    base, tuned = (None if path is None else local_folder(path) for path in (base, tuned))
    known = [*(task.name for task in read), *(theirs.made if theirs is not None else ())]
    roles = roles_of(known, origin, target, base, tuned, names)
    with ExitStack() as stack:
        subjects = {name: open_subject(path, base, stack) for name, path in names.items()}
        for subject in subjects.values():
            check_shapes(subject.stored, read_config(subject.stored.path), options)
        encoded = encode_for_all(read, subjects, options)
        scores, facts, results, items = {}, {}, {}, {}
        for name, subject in subjects.items():
            with device_errors("a smaller --batch-size"):
                network = subject.load(options).to(device)
                scores[name] = _evaluate(name, network, encoded[name], options, progress)
                if theirs is not None:
                    found_there = _run_harness(name, theirs, subject, network, options, progress)
                    results[name] = {task: result for task, (result, _) in found_there.items()}
                    items = {task: count for task, (_, count) in found_there.items()}
            ran_in = str(network.dtype).removeprefix("torch.")
            del network
            _give_back(device)
            found = subject.checkpoint.fingerprint()
            facts[name] = {"path": path_text(names[name]), "fingerprint": found, "run_in": ran_in}
    measured = {name: {task: (r.value, r.stderr) for task, r in found.items()} for name, found in results.items()}
    of_tasks = {task.name: _task_facts(task, next(iter(encoded.values()))[task.name], roles) for task in read}
    of_tasks |= {task: _harness_facts(task, results, items[task], roles) for task in known if task not in of_tasks}
    more = {"harness": harness.to_dict()} if harness.tasks else {}
    return EvaluateReport(
        options=options.to_dict() | more,
        versions=package_versions() | ({"lm_eval": version("lm_eval")} if harness.tasks else {}),
        tasks=of_tasks,
        models=facts,
        roles=roles,
        scores=scores,
        figures=compare(scores, roles, options.resamples, options.seed, measured),
        seconds=perf_counter() - started,
        harness=results,
    )


def names_of(paths: list[Path]) -> dict[str, Path]:
    """A short name for each model: its folder's or file's, or the whole path where several have the same.

    Raises OptionsError for a model that is given twice.
    """
    if not paths:
        raise OptionsError("there is no model to evaluate", "pass one or more MODELs")
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise OptionsError(f"{path} is given twice", "pass every model once")
        seen[path.resolve()] = path
    short = [path.stem if is_patch(path) else model_name(path) for path in seen.values()]
    return {name if short.count(name) == 1 else str(path): path for name, path in zip(short, paths, strict=True)}


def roles_of(
    tasks: Sequence[str],
    origin: Sequence[str],
    target: Sequence[str],
    base: PathLike | None,
    tuned: PathLike | None,
    names: dict[str, Path],
) -> Roles:
    """The roles of tasks and models, checked; a base that adapters and patch files are on need not be evaluated.

    Raises OptionsError.
    """
    if base is not None and any(needs_base(path) for path in names.values()):
        listed = {path.resolve() for path in names.values()}
        is_listed = Path(base).resolve() in listed or str(base) in names
        base = base if is_listed and origin else None  # else it is what they are on, and no more
    return check_roles(tasks, origin, target, _which(base, names), _which(tuned, names))


def _which(path: PathLike | None, names: dict[str, Path]) -> str | None:
    """The name of the model that a path, or a name, stands for."""
    if path is None:
        return None
    for name, own in names.items():
        if str(path) == name or Path(path).resolve() == own.resolve():
            return name
    raise OptionsError(f"{path} is not among the models", f"name one of them: {', '.join(map(str, names.values()))}")


def encode_for_all(
    tasks: list[Task], subjects: dict[str, Subject], options: EvaluateOptions
) -> dict[str, dict[str, EncodedTask]]:
    """Model -> task -> the same items, by each model's own tokenizer; models with the same one share the result.

    Raises DataError for a task without an item that is short enough for all.
    """
    has_media = any(record.has_media for task in tasks for record in task.records)
    made: dict[tuple[str, int | None], dict[str, EncodedTask]] = {}
    keys = {}
    # Texts are cut alike for all, so that a model of more positions is not scored on more of one.
    positions = min(most_tokens(one.stored, read_config(one.stored.path), options) for one in subjects.values())
    for name, subject in subjects.items():
        stored, folder = subject.stored, subject.encoder_folder(has_media)
        encoder = load_encoder(folder, stored.path, has_media, options)
        keys[name] = (tokenizer_digest(folder, stored.path), encoder.start_token)
        if keys[name] not in made:
            made[keys[name]] = {task.name: encode_task(task, encoder, options, positions) for task in tasks}
    for task in tasks:
        out = {number for encoded in made.values() for number in encoded[task.name].left_out}
        for encoded in made.values():
            encoded[task.name] = encoded[task.name].without(out)
            if not encoded[task.name].items:
                what = f"task {task.name!r}: every item is too long for one of the models"
                raise DataError(what, "pass a larger --seq-len, or models alike in a run")
    return {name: made[key] for name, key in keys.items()}


def score_model(
    path: PathLike, tasks: dict[str, EncodedTask], options: EvaluateOptions, base: PathLike | None = None
) -> dict[str, TaskScores]:
    """One model's scores on tasks that are encoded already; nothing of it stays in memory.

    ``base`` is what an adapter or a patch file is on. Raises TailorError.
    """
    device = resolve_device(options.device)
    with ExitStack() as stack, device_errors("a smaller --batch-size"):
        network = open_subject(path, base, stack).load(options).to(device)
        scores = _evaluate(Path(path).name, network, tasks, options, progress=False)
        del network
        _give_back(device)
        return scores


def _evaluate(
    name: str, network: Any, tasks: dict[str, EncodedTask], options: EvaluateOptions, progress: bool
) -> dict[str, TaskScores]:
    """One model's scores on tasks of one's own."""
    from tailorcli.evaluation.predict import evaluate_network

    if not tasks:
        return {}
    rows = sum(len(item.rows) for task in tasks.values() for item in task.items)
    with Progress(f"evaluating {name}", rows, "rows", shown=progress) as bar:
        try:
            return evaluate_network(network, tasks, options, advance=lambda rows: bar.update(rows * ranks().size))
        except TailorError as error:
            raise type(error)(f"{name}: {error.message}", error.hint) from error


def _run_harness(
    name: str, tasks: HarnessTasks, subject: Subject, network: Any, options: EvaluateOptions, progress: bool
) -> dict[str, tuple[Result, int]]:
    """One model's results on tasks of lm-evaluation-harness, and how many items each has."""
    stored, folder = subject.stored, subject.encoder_folder(tasks.has_media)
    encoder = load_encoder(folder, stored.path, tasks.has_media, options)
    most = most_tokens(stored, read_config(stored.path), options)
    has_bars = progress and sys.stderr.isatty()
    if progress and not has_bars:
        print(f"running lm-evaluation-harness on {printable(name)}", file=sys.stderr, flush=True)
    return run_tasks(tasks, network, encoder, folder, most, options, quiet=not has_bars)


def _give_back(device: torch.device) -> None:
    """Nothing of a model that nobody holds any more stays in memory."""
    import torch

    gc.collect()
    give_back_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()


_METRICS = {
    "text": "right next tokens of all scored tokens",
    "choice": "items whose right choice has the highest log-likelihood a character",
    "choice-raw": "items whose right choice has the highest log-likelihood",
    "generate": "items answered with an accepted answer",
}


def _harness_facts(task: str, results: dict[str, dict[str, Result]], items: int, roles: Roles) -> dict[str, Any]:
    metric = next(iter(results.values()))[task].metric
    return {
        "file": None,
        "kind": "harness",
        "percent_of": f"{metric.removesuffix(',none')} of lm-evaluation-harness",
        "role": "origin" if task in roles.origin else "target" if task in roles.target else None,
        "items": items,
        "left_out": [],
    }


def _task_facts(task: Task, encoded: EncodedTask, roles: Roles) -> dict[str, Any]:
    return {
        "file": path_text(task.path),
        "blake2b": task.digest,
        "kind": task.kind,
        "percent_of": _METRICS[task.kind],
        "role": "origin" if task.name in roles.origin else "target" if task.name in roles.target else None,
        "items": len(encoded.items),
        "records": [item.number for item in encoded.items],
        "left_out": list(encoded.left_out),
    }
