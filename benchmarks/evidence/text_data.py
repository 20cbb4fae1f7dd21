"""The tasks of the benchmark `text`, all of them from what Python and torch install: nothing is downloaded.

Old tasks: English prose and Python source (as in benchmarks.real), C++ headers (torch's own), and on which continent a
city lies (the names of time zones), as a choice of four. New tasks: records of the Unicode character database, and
the law of software licences.
"""

from __future__ import annotations

import json
import random
import zoneinfo
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from benchmarks.quick.data import headers, licences
from benchmarks.real import data as real

OLD_TASKS = ("english", "python", "cpp", "cities")
NEW_TASKS = ("unicode", "licences")
TOKENS = 32  # of a text sample
COUNTS = {"validation": 80, "test": 300}  # items of a task
CONTINENTS = ("Africa", "America", "Asia", "Europe")
_TEXTS_SEED = 0


def load_texts() -> dict[str, dict[str, list[str]]]:
    """Return the texts as task -> part -> documents; the split is the same for every seed of the fine-tuning."""
    texts = real.load_texts(_TEXTS_SEED)
    for name, documents in (("cpp", headers()), ("licences", licences())):
        texts[name] = real.split([text for _, text in documents], random.Random(_TEXTS_SEED))
    return texts


def write_tasks(texts: dict[str, dict[str, list[str]]], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write FOLDER/TASK-PART.jsonl for every task and part."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, parts in texts.items():
        for part, count in COUNTS.items():
            samples = _samples(parts[part], tokenizer, count)
            _write(folder / f"{task}-{part}.jsonl", [{"text": text} for text in samples])
    for part, records in _cities().items():
        _write(folder / f"cities-{part}.jsonl", records)


def write_old_training(texts: dict[str, dict[str, list[str]]], tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Write training text of the old text tasks: what a user who has some would retain."""
    chosen = [text for task in ("english", "python", "cpp") for text in _samples(texts[task]["train"], tokenizer, 100)]
    random.Random(0).shuffle(chosen)
    _write(file, [{"text": text} for text in chosen])


def _samples(texts: list[str], tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Cut documents, an eighth of the samples from one at most, into texts of TOKENS tokens."""
    found: list[str] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: TOKENS * max(1, count // 8)]
        pieces = [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS + 1, TOKENS)]
        found += [tokenizer.decode(piece) for piece in pieces]
        if len(found) >= count:
            break
    return found[:count]


def _cities() -> dict[str, list[dict[str, object]]]:
    """Cities of the time zones, each with the four continents in an order of its own; none is in two parts."""
    zones = [zone.split("/") for zone in sorted(zoneinfo.available_timezones())]
    places = {parts[-1].replace("_", " "): parts[0] for parts in zones if len(parts) > 1 and parts[0] in CONTINENTS}
    cities = sorted(places)
    rng = random.Random(0)
    rng.shuffle(cities)
    if len(cities) < COUNTS["test"] + COUNTS["validation"] // 2:
        raise SystemExit(f"only {len(cities)} cities in the time zone database: python -m pip install tzdata")
    parts: dict[str, list[dict[str, object]]] = {}
    for part, count in reversed(COUNTS.items()):  # test first: there are just enough
        chosen, cities = cities[:count], cities[count:]
        parts[part] = [
            {"prompt": f"The city of {city} lies on the continent of", "choices": choices, "answer": f" {places[city]}"}
            for city in chosen
            for choices in [[f" {name}" for name in CONTINENTS]]
        ]
    return parts


def _write(file: Path, records: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
