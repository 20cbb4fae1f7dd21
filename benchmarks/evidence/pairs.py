"""The pairs of each benchmark: base and tuned checkpoints for several seeds, their data and their tasks."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks.common import say
from benchmarks.evidence import text_data
from benchmarks.multimodal import data as picture_data
from benchmarks.multimodal import model as picture_model
from benchmarks.quick import data as quick_data
from benchmarks.quick import model as quick_model
from benchmarks.real import data as real_data
from benchmarks.real import model as real_model
from benchmarks.real.setting import TRAIN_RECORDS, default_cache, tokenizer_of
from tailorcli.demo.text import TaskText

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Pair:
    """One fine-tune: where its models and its data lie, and the tasks that tell what it forgot and learnt."""

    name: str  # of the new task
    seed: int
    base: Path
    tuned: Path
    train: Path  # what it was fine-tuned on, for calibration and for graft
    old_train: Path  # samples of the old tasks, for a user who has some
    tasks: Path  # folder of the files of the tasks
    kinds: dict[str, str]  # task -> kind
    origin: tuple[str, ...]
    target: tuple[str, ...]
    retain_length: int  # tokens of a sample that the base writes itself
    retain_starts: Path | None = None  # what such samples begin with
    answer_length: int = 32  # tokens that a model may answer
    task_file: str = "{task}-{part}.jsonl"

    def specs(self, part: str) -> list[str]:
        """The tasks of a part as ``tailorcli evaluate`` takes them."""
        files = {name: self.tasks / self.task_file.format(task=name, part=part) for name in self.kinds}
        return [f"{name}={files[name]}:{kind}" for name, kind in self.kinds.items()]


def quick(cache: Path, seeds: Sequence[int] | None = None, jobs: int = 1, *, bases_only: bool = False) -> list[Pair]:
    """Byte-level Llamas of 3 million parameters, trained here; three new tasks for every seed (SEEDS).

    ``jobs`` seeds are trained at a time; with ``bases_only`` the fine-tunes are left for others to make.
    """
    tasks = quick_data.load_tasks()
    folder = cache / "data"
    quick_data.write_parts(tasks, folder)
    chosen = SEEDS if seeds is None else seeds
    make = partial(_quick_models, tasks, cache, bases_only)
    if jobs == 1:
        made = [make(seed) for seed in chosen]
    else:
        with ProcessPoolExecutor(min(jobs, len(chosen)), mp_context=get_context("spawn")) as pool:
            made = list(pool.map(make, chosen))
    pairs = []
    for seed, models in zip(chosen, made, strict=True):
        for new in quick_data.NEW_TASKS:
            kinds = dict.fromkeys((*quick_data.OLD_TASKS, new), "text")
            train, old = folder / f"{new}-train.jsonl", folder / "old-train.jsonl"
            pairs.append(
                Pair(
                    *(new, seed, models["base"], cache / f"seed{seed}" / new, train, old, folder),
                    *(kinds, quick_data.OLD_TASKS, (new,), quick_data.WINDOW),
                )
            )
    return pairs


def _quick_models(tasks: dict[str, TaskText], cache: Path, bases_only: bool, seed: int) -> dict[str, Path]:
    say(f"quick: models of seed {seed}")
    if bases_only:
        return {"base": quick_model.make_base(tasks, seed, cache / f"seed{seed}" / "base")}
    return quick_model.make_pairs(tasks, seed, cache / f"seed{seed}")


@dataclass(frozen=True)
class FineTune:
    """One way to fine-tune on a new task: how, and on how many of its documents (all without)."""

    task: str
    recipe: real_model.Recipe
    documents: int | None = None


# The last is trained too long on too little: the tuned model is no longer the best on its own task.
FINE_TUNES = {
    "unicode": FineTune("unicode", real_model.Recipe()),
    "licences": FineTune("licences", real_model.Recipe()),
    "licences-overtrained": FineTune("licences", real_model.Recipe(steps=80, learning_rate=5e-4), 40),
}


def text(cache: Path, *, bases_only: bool = False) -> list[Pair]:
    """SmolLM2-135M-Instruct, and its fine-tunes (FINE_TUNES) for every seed, unless ``bases_only``."""
    texts = text_data.load_texts()
    base = real_model.make_base(default_cache())
    tokenizer = tokenizer_of(base)
    folder = cache / "data"
    text_data.write_tasks(texts, tokenizer, folder)
    text_data.write_old_training(texts, tokenizer, folder / "old-train.jsonl")
    pairs = []
    for name, how in FINE_TUNES.items():
        train = folder / f"{name}-train.jsonl"
        documents = texts[how.task]["train"][: how.documents]
        real_data.write_jsonl(documents, train)
        windows = real_data.windows(documents, tokenizer, TRAIN_RECORDS)
        tasks = (*text_data.OLD_TASKS, how.task)
        kinds = {task: "choice" if task == "cities" else "text" for task in tasks}
        for seed in SEEDS:
            tuned = cache / f"{name}-tuned{seed}"
            if not bases_only:
                say(f"text: fine-tune {name} of seed {seed}")
                real_model.make_tuned(base, windows, replace(how.recipe, seed=seed), tuned)
            where = (base, tuned, train, folder / "old-train.jsonl", folder)
            pairs.append(Pair(name, seed, *where, kinds, text_data.OLD_TASKS, (how.task,), 128))
    return pairs


def multimodal(cache: Path, *, bases_only: bool = False) -> list[Pair]:
    """A LLaVA that answers questions on shapes and photos; its fine-tune on clothes a seed, unless ``bases_only``."""
    folders = picture_data.load(cache)
    new, old = folders[picture_data.NEW_TASK], [folders[name] for name in picture_data.OLD_TASKS]
    base = cache / "base"
    if not base.exists():
        say("multimodal: the base")
        start = picture_model.assemble(
            real_model.make_base(default_cache()), picture_model.make_tower(cache), cache / "assembled"
        )
        captions = zip(*(picture_data.read(folder / f"{picture_data.CAPTIONS}.jsonl") for folder in old), strict=False)
        questions = [picture_data.read(folder / "train.jsonl") for folder in old]
        picture_model.make_base(start, questions, [caption for pair in captions for caption in pair], base)
    kinds = dict.fromkeys(folders, "generate")
    picture_data.write_mixture(old, picture_data.OLD_TRAIN_COUNT, cache / "old-train.jsonl")
    starts = picture_data.write_starts(old, cache)
    pairs = []
    for seed in SEEDS:
        tuned = cache / f"tuned{seed}"
        if not bases_only:
            say(f"multimodal: fine-tune of seed {seed}")
            recipe = replace(picture_model.TUNED_RECIPE, seed=seed)
            picture_model.make_tuned(base, picture_data.read(new / "train.jsonl"), recipe, tuned)
        pairs.append(
            Pair(
                *(picture_data.NEW_TASK, seed, base, tuned, new / "train.jsonl", cache / "old-train.jsonl", cache),
                *(kinds, picture_data.OLD_TASKS, (picture_data.NEW_TASK,), 48, starts, 4, "{task}/{part}.jsonl"),
            )
        )
    return pairs
