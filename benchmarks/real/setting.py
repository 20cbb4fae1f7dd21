"""What the benchmarks on a real model share: the cache, the pair of models, the machine."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.common import cache_root, processor, say
from benchmarks.real import data, model
from tailorcli import __version__

SEED = 0
COUNTS = {"validation": 16, "test": 64}  # windows of each task
TRAIN_RECORDS = 10_000  # all of them

Texts = dict[str, dict[str, list[str]]]


def default_cache() -> Path:
    """Return the folder of the language model, unless an option says another."""
    return cache_root() if os.environ.get("TAILORCLI_CACHE") else cache_root() / "real"


def parse(parser: argparse.ArgumentParser, document: Path) -> argparse.Namespace:
    """Add the options that these benchmarks have in common, parse, and make the cache folder."""
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder for weights and results (%(default)s)"
    )
    parser.add_argument("--document", type=Path, default=document, help="Markdown file to write")
    parser.add_argument("--fresh", action="store_true", help="run the commands and evaluations again")
    options = parser.parse_args()
    options.cache = options.cache.expanduser().resolve()
    options.cache.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    return options


def make_pair(cache: Path, texts: Texts) -> str:
    """Make `base` and `tuned` unless they are there; return what identifies the pair."""
    say("making base")
    base = model.make_base(cache)
    recipe = model.Recipe(seed=SEED)
    pair_key = model.identity(recipe)
    model.discard_other(cache / "tuned", cache / "pair.json", pair_key)
    data.write_jsonl(texts[data.NEW_TASK]["train"], cache / "train.jsonl")
    say("making tuned")
    records = texts[data.NEW_TASK]["train"]
    model.make_tuned(base, data.windows(records, tokenizer_of(base), TRAIN_RECORDS), recipe, cache / "tuned")
    return pair_key


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a checkpoint folder."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def environment() -> dict[str, Any]:
    """Return what the figures were measured on and with."""
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tailorcli": __version__,
    }


def share_machine(processes: int) -> None:
    """Take one of so many processes' share of the cores and of a GPU's memory, and draw no bars.

    PyTorch frees what it keeps in store only where its own share is full: without one, a few processes fill the GPU.
    """
    torch.set_num_threads(max(1, min((os.cpu_count() or 1) // processes, torch.get_num_threads())))
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1 / processes)
    transformers.utils.logging.disable_progress_bar()
