"""Tasks of lm-evaluation-harness, run on a network that is loaded already; the extra ``lm-eval`` has them.

What comes out of it is each task's metric with its standard error, as in the files that the harness itself writes.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailorcli.data.encoder import Encoder
from tailorcli.device import is_out_of_memory, kept_random_numbers
from tailorcli.errors import CheckpointError, DataError, OptionsError, first_line
from tailorcli.evaluation.lm_eval import METRICS, Result, result_of, wanted_metrics
from tailorcli.options import EvaluateOptions, HarnessOptions

_EXTRA = "pip install 'tailorcli[lm-eval]' (in a checkout: pip install '.[lm-eval]')"
_SEED = 1234  # the harness's own
_NAMES = "list the names with: lm-eval ls tasks; your own are YAML files in the folder of --harness-tasks DIR"


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks and groups of the harness by name, each with the object that it made of them."""

    manager: Any
    made: Mapping[str, Any]
    wanted: Mapping[str, str]  # task -> metric; under "" that of all others
    options: HarnessOptions

    @property
    def has_media(self) -> bool:
        """Whether any of them has images."""
        return any(_has_media(made) for made in self.made.values())


def load_tasks(options: HarnessOptions) -> HarnessTasks:
    """The tasks by name, their data loaded, before a model is: a tag stands for its tasks, a group for itself.

    Raises OptionsError for a name that is none, DataError where the harness or a data set cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        what = "--harness takes lm-evaluation-harness, which is not installed"
        raise DataError(what, _EXTRA) from error
    include = options.include
    if include is not None and not Path(include).is_dir():
        raise OptionsError(f"--harness-tasks {include} is no folder", "pass the folder of the tasks' YAML files")
    made: dict[str, Any] = {}
    with _calm(quiet=True):
        try:
            manager = TaskManager(include_path=include, include_defaults=False)
            if not set(options.tasks) <= set(manager.all_tasks):  # looking through all that it has takes its time
                manager = TaskManager(include_path=include)
        except Exception as error:  # whatever it makes of a folder's files
            raise DataError(f"lm-evaluation-harness cannot read {include}: {first_line(error)}", _NAMES) from error
        for name in options.tasks:
            if name not in manager.all_tasks:
                raise OptionsError(f"lm-evaluation-harness has no task {name!r}", _NAMES)
            try:
                found = manager.load([name])
            except Exception as error:  # whatever it, and whatever loads the data, raises
                what = f"lm-evaluation-harness cannot load task {name!r}: {first_line(error)}"
                raise DataError(what, "its data must be on this machine, or within reach") from error
            whole = {**found["tasks"], **found["groups"]}
            made |= {name: whole[name]} if name in whole else found["tasks"]
    wanted = wanted_metrics(options.metrics, list(made))
    for name, task in made.items():
        _check_metric(name, task, wanted)
    return HarnessTasks(manager, made, wanted, options)


def _check_metric(name: str, task: Any, wanted: Mapping[str, str]) -> None:
    """A task has a metric that can be taken, known before hours of work; a group shows its own later on."""
    if not hasattr(task, "aggregation"):
        return
    there = [str(metric) for metric in task.aggregation()]
    asked = wanted.get(name, wanted.get(""))
    names = METRICS if asked is None else (asked.partition(",")[0],)
    if not set(names) & set(there):
        hint = f"it has {', '.join(sorted(there))}; choose one by --metric {name}=METRIC"
        raise DataError(f"task {name!r} of lm-evaluation-harness has no metric {' or '.join(names)}", hint)


def run_tasks(
    tasks: HarnessTasks, network: Any, encoder: Encoder, folder: Path, most: int, options: EvaluateOptions, quiet: bool
) -> dict[str, tuple[Result, int]]:
    """Each task's metric in percent and its number of items, of one network on its device.

    ``folder`` holds its tokenizer or processor, ``most`` is how many tokens it may be given. Raises TailorError.
    """
    images = {name: task for name, task in tasks.made.items() if _has_media(task)}
    others = {name: task for name, task in tasks.made.items() if name not in images}
    found: dict[str, Any] = {}
    with _calm(quiet):
        for group, with_images in ((others, False), (images, True)):
            if group:
                found |= _run(group, tasks, _model(network, encoder, folder, most, options, with_images), options)
    return {name: found[name] for name in tasks.made}


def _model(network: Any, encoder: Encoder, folder: Path, most: int, options: EvaluateOptions, with_images: bool) -> Any:
    """The network as the harness calls one. Raises CheckpointError."""
    tokenizer = encoder.tokenizer
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        what = f"the tokenizer of {folder} names neither a first nor a last token, which lm-evaluation-harness needs"
        raise CheckpointError(what, "set its bos_token or eos_token, and save it again")
    how = {"batch_size": options.batch_size, "max_length": min(most, options.seq_len)}
    try:
        if with_images:
            from lm_eval.models.hf_vlms import HFMultimodalLM

            network.name_or_path = str(folder)  # where it looks for the processor
            return HFMultimodalLM(pretrained=network, trust_remote_code=options.trust_remote_code, **how)
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=network, tokenizer=tokenizer, trust_remote_code=options.trust_remote_code, **how)
    except Exception as error:  # whatever it raises of a model that it does not know
        raise CheckpointError(f"lm-evaluation-harness cannot run {folder}: {first_line(error)}") from error


def _run(
    group: Mapping[str, Any], tasks: HarnessTasks, model: Any, options: EvaluateOptions
) -> dict[str, tuple[Result, int]]:
    from lm_eval.evaluator import evaluate

    shots = tasks.options.shots
    try:
        loaded = tasks.manager.load(list(group.values()))
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):  # a task that says 0 means it
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=_SEED)
        with _seeded():
            how = {"apply_chat_template": tasks.options.chat, "fewshot_as_multiturn": tasks.options.chat}
            found = evaluate(lm=model, task_dict=loaded, limit=options.limit, log_samples=False, **how)
    except Exception as error:  # whatever it, a task's own code, or the model raises
        if is_out_of_memory(error):
            raise
        names = ", ".join(group)
        what = f"lm-evaluation-harness cannot run {names}: {first_line(error)}"
        raise DataError(what, "run it by itself to see more: lm-eval run --model hf") from error
    figures = {**found["results"], **(found.get("groups") or {})}
    better = found.get("higher_is_better")
    counts = {name: int(count["effective"]) for name, count in (found.get("n-samples") or {}).items()}
    return {
        name: (
            result_of("lm-evaluation-harness", name, _plain_floats(figures[name]), tasks.wanted, better),
            sum(counts.get(leaf, 0) for leaf in _leaves(name, task)),
        )
        for name, task in group.items()
    }


@contextmanager
def _seeded() -> Iterator[None]:
    """Equal draws on every run, and afterwards the generators as they were."""
    import random

    import numpy as np
    import torch

    with kept_random_numbers(range(torch.cuda.device_count()) if torch.cuda.is_available() else ()):
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        yield


def _leaves(name: str, task: Any) -> Sequence[str]:
    """The names of the tasks in a group; of a task its own."""
    return [leaf.task_name for leaf in task.get_all_tasks()] if hasattr(task, "get_all_tasks") else [name]


def _has_media(task: Any) -> bool:
    members = task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]
    return any(getattr(member, "MULTIMODAL", False) for member in members)


def _plain_floats(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of NumPy as Python's own, as a file would have them."""
    import numpy as np

    return {name: float(value) if isinstance(value, np.floating) else value for name, value in figures.items()}


@contextmanager
def _calm(quiet: bool) -> Iterator[None]:
    """The harness says nothing but what is an error; with ``quiet`` its progress bars are left out, too.

    It prints to standard output, which is for results.
    """
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            if quiet:
                with redirect_stderr(io.StringIO()):
                    yield
            else:
                yield
    finally:
        logger.setLevel(before)
