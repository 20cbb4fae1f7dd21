"""`python -m benchmarks.leads.chats`: what a chat model shall write for itself, so that its answers are kept.

SmolLM2-135M-Instruct in float32, fine-tuned on questions and answers on Unicode in its chat template, is patched on
samples that the base writes, from random tokens or as chats: behind the opening of a user's turn it asks itself a
question and answers it. The old tasks are the base's own answers to other questions, the continents of cities as a
chat, and text as such. Validation data; the closed form, not propagated, and its distillation. Some hours on two cores.
Writes a table of docs/results/research.md.
"""

from __future__ import annotations

import argparse
import json
import keyword
import pydoc_data.topics
import random
import sys
import unicodedata
import zoneinfo
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from benchmarks.common import cache_root, say
from benchmarks.evidence import text_data
from benchmarks.leads.__main__ import DOCUMENT
from benchmarks.leads.render import spread
from benchmarks.real import model as real_model
from benchmarks.real.render import between, table
from benchmarks.real.setting import tokenizer_of
from tailorcli import (
    CalibrateOptions,
    DistillOptions,
    EvaluateOptions,
    PatchOptions,
    calibrate_model,
    distill_checkpoint,
    evaluate_models,
    finetune_model,
    patch_checkpoint,
)
from tailorcli.calibration.sources import write_jsonl
from tailorcli.training.settings import FinetuneOptions

SEEDS = (0, 1, 2)
SAMPLES, SEQ_LEN = 128, 128  # of each calibration
STEPS = 20  # of distillation
TRAINED, ASKED, SCORED = 1000, 200, 60  # records of the new task; questions that the base answers; items of a task
OLD = ("chat", "cities", "english", "python")
TASKS = (*OLD, "new")
ARMS = {"plain": "from random tokens", "chats": "as chats"}
WEIGHTS = (0.3, 0.5, 0.7)  # of the interpolations
_POEMS = (
    "rain,the sea,winter,an old clock,my cat,the moon,a train,bread,a lost letter,mountains,the colour red,silence,"
    "a garden,my brother,autumn leaves,a bridge,the night sky,a violin,coffee,school"
)
_PLACE = "the first words of a user"
_FORMS = ("Name the Unicode characters {}.", "What are the characters {} called?", "Give me the names of {}.")


def new_pairs() -> list[tuple[str, str]]:
    """Questions after the names of two Unicode characters each, and their answers."""
    named = [(code, unicodedata.name(chr(code), "")) for code in range(0x370, 0x2FFF)]
    named = [each for each in named if each[1]]
    rng = random.Random(0)
    pairs = []
    for start in rng.sample(range(0, len(named) - 2, 2), TRAINED + 2 * ASKED):
        two = named[start : start + 2]
        question = rng.choice(_FORMS).format(" and ".join(f"U+{code:04X}" for code, _ in two))
        pairs.append((question, "\n".join(f"U+{code:04X} {name}" for code, name in two)))
    return pairs


def old_questions() -> list[str]:
    """Questions of other kinds: cities, Python's language and modules, poems, sums."""
    rng = random.Random(1)
    zones = [zone for zone in zoneinfo.available_timezones() if "/" in zone and "Etc" not in zone]
    places = sorted({zone.split("/")[-1].replace("_", " ") for zone in zones})
    topics = [*sorted(pydoc_data.topics.topics), *keyword.kwlist]
    modules = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
    sums = [(rng.randint(2, 60), rng.choice(["plus", "minus", "times"]), rng.randint(2, 30)) for _ in range(40)]
    questions = [
        *(f"What should I see in {place}?" for place in places[::3]),
        *(f"Explain {topic} in Python." for topic in topics),
        *(f"What is the Python module {name} for?" for name in modules[::2]),
        *(f"Write a poem about {subject}." for subject in _POEMS.split(",")),
        *(f"What is {first} {sign} {second}?" for first, sign, second in sums),
    ]
    rng.shuffle(questions)
    return questions[:ASKED]


def answers_of(base: Path, tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> list[str]:
    """The base's likeliest answers, of 48 tokens at most."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer.padding_side = "left"
    found = []
    for first in range(0, len(questions), 50):
        batch = tokenizer(
            [asked(tokenizer, question) for question in questions[first : first + 50]],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        with torch.no_grad():
            written = network.generate(**batch, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        width = batch["input_ids"].shape[1]
        found += [tokenizer.decode(row[width:], skip_special_tokens=True) for row in written]
    return found


def asked(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """A question in the chat template, with the head of an answer."""
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def prepare(base: Path, folder: Path) -> None:
    """The data of the tasks and of training, unless they are there."""
    if (folder / "opening.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(base)
    pairs = new_pairs()
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs[:TRAINED]]
    write_jsonl([{"messages": messages} for messages in turns], folder / "train.jsonl")
    write_jsonl([{"question": q, "answer": a} for q, a in pairs[TRAINED : TRAINED + ASKED]], folder / "new.jsonl")
    questions = old_questions()
    answers = answers_of(base, tokenizer, questions)
    write_jsonl([{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)], folder / "chat.jsonl")
    text_data.write_tasks(text_data.load_texts(), tokenizer, folder / "text")
    cities = [json.loads(line) for line in (folder / "text" / "cities-test.jsonl").read_text().splitlines()]
    for city in cities:
        question = city["prompt"].replace("The city of", "On which continent does the city of")
        city["prompt"] = asked(tokenizer, question.replace("lies on the continent of", "lie?"))
        city["choices"] = [choice.strip() for choice in city["choices"]]
        city["answer"] = city["answer"].strip()
    write_jsonl(cities, folder / "cities.jsonl")
    write_jsonl([{"text": opening_of(tokenizer)}], folder / "opening.jsonl")


def opening_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes before a user's words."""
    whole = str(tokenizer.apply_chat_template([{"role": "user", "content": _PLACE}], tokenize=False))
    return whole[: whole.index(_PLACE)]


def retained(arm: str, base: Path, cache: Path) -> Path:
    """Statistics of the base on what it wrote."""
    options = CalibrateOptions(num_samples=SAMPLES, seq_len=SEQ_LEN, batch_size=16, synthetic=True)
    data = cache / "data" / "opening.jsonl" if arm == "chats" else None
    return made(cache / f"retained-{arm}", lambda out: calibrate_model(base, data, out, options))


def made(output: Path, make: Callable[[Path], object]) -> Path:
    """An output that is made unless it is there."""
    if not output.exists():
        say(f"  {output.name}")
        make(output)
    return output


def scored(model: Path, data: Path) -> dict[str, float]:
    """The accuracy of a model on each task, in percent."""
    text = {name: data / "text" / f"{name}-test.jsonl" for name in ("english", "python")}
    files = {name: text.get(name, data / f"{name}.jsonl") for name in TASKS}
    specs = [f"{name}={file}:{'choice' if name == 'cities' else 'text'}" for name, file in files.items()]
    options = EvaluateOptions(batch_size=32, limit=SCORED)
    report = evaluate_models([model], specs, options, origin=OLD, target=("new",))
    [scores] = report.scores.values()
    return {name: float(score.accuracy or 0.0) for name, score in scores.items()}


def measure(seed: int, base: Path, cache: Path) -> dict[str, dict[str, float]]:
    """The figures of every model of a seed, each kept as it comes."""
    folder, data = cache / f"seed-{seed}", cache / "data"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scores.json"
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}

    def score(name: str, model: Callable[[], Path]) -> None:
        if name not in found:
            found[name] = scored(model(), data)
            say(f"seed {seed}: {name}: {found[name]}")
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def tuned() -> Path:
        options = FinetuneOptions(
            steps=60,
            batch_size=8,
            seq_len=SEQ_LEN,
            learning_rate=3e-4,
            warmup=0.05,
            seed=seed,
            save_every=10**6,
            dtype="float32",
        )
        return made(folder / "tuned", lambda out: finetune_model(base, data / "train.jsonl", out, options))

    def stats() -> Path:
        options = CalibrateOptions(num_samples=SAMPLES, seq_len=SEQ_LEN, batch_size=16)
        return made(folder / "stats", lambda out: calibrate_model(tuned(), data / "train.jsonl", out, options))

    def patched(arm: str) -> Path:
        options, kept = PatchOptions(propagate=False), retained(arm, base, cache)
        return made(folder / arm, lambda out: patch_checkpoint(base, tuned(), out, stats(), options, retain=kept))

    def trained(arm: str) -> Path:
        options, how, kept = PatchOptions(propagate=False), DistillOptions(steps=STEPS), retained(arm, base, cache)
        output = folder / f"{arm}-distilled"
        return made(output, lambda out: distill_checkpoint(base, tuned(), out, stats(), kept, options, how))

    def between_both(weight: float) -> Path:
        options = PatchOptions(method="interpolate", weight=weight)
        return made(folder / f"interpolate-{weight:g}", lambda out: patch_checkpoint(base, tuned(), out, None, options))

    score("base", lambda: base)
    score("tuned", tuned)
    for weight in WEIGHTS:
        score(f"interpolate {weight:g}", partial(between_both, weight))
    for arm in ARMS:
        score(arm, partial(patched, arm))
        score(f"{arm}, distilled", partial(trained, arm))
    return found


def rows_of(found: list[dict[str, dict[str, float]]]) -> list[list[str]]:
    """A row for each model that was measured: every task, mean and deviation over the seeds that have it."""
    names = {"base": "base", "tuned": "tuned"} | {f"interpolate {w:g}": f"interpolate {w:g}" for w in WEIGHTS}
    for arm, how in ARMS.items():
        names |= {arm: f"patched, samples {how}", f"{arm}, distilled": f"the same, distilled for {STEPS} steps"}
    rows = []
    for name, shown in names.items():
        known = [of_seed[name] for of_seed in found if name in of_seed]
        if known:
            of = "" if len(known) == len(found) else f" ({len(known)} of {len(found)} seeds)"
            rows.append([shown + of, *(spread([one[task] for one in known]) for task in TASKS)])
    return rows


def main() -> None:
    """Measure every seed and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leads.chats", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="which (%(default)s)")
    parser.add_argument("--cache", type=Path, default=cache_root() / "chats", help="(%(default)s)")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    base = made(options.cache / "base", lambda out: in_float32(real_model.make_base(cache_root()), out))
    prepare(base, options.cache / "data")
    found = [measure(seed, base, options.cache) for seed in options.seeds]
    text = table(["model", *TASKS], rows_of(found))
    print(text)
    document = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(between(document, "chats", text), encoding="utf-8")


def in_float32(base: Path, output: Path) -> None:
    """The base, which is stored in bfloat16, in float32."""
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(output)
    tokenizer_of(base).save_pretrained(output)


if __name__ == "__main__":
    main()
