"""What is compared: the parts, the depths of fine-tuning, the rows of a table, and the rates that are tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence import pairs
from benchmarks.evidence.pairs import Pair
from tailorcli import Checkpoint, PatchOptions
from tailorcli.models.config import read_config

FINE_TUNES = ("full", "half", "l2", "spider", "dowser")
PATCHES = {  # on top of a fine-tune
    "graft": PatchOptions(method="graft", graft_steps=20),
    "dare": PatchOptions(method="dare"),
    "paper": PatchOptions(solver="sequential"),
    "ours": PatchOptions(),
}
MASKS = ("magnitude", "gradient", "random")  # in place of SPIDER's own, half of the entries each
TUNED_AT = "all layers"
DEPTHS = ("last 2", "last third", TUNED_AT)


@dataclass(frozen=True, order=True)
class Row:
    """A line of a table: a fine-tune, and the patch on top of it, if any; the base has neither."""

    fine: str = ""
    patch: str = ""

    @property
    def title(self) -> str:
        """How the row is called."""
        named = {"paper": "tailor (paper)"}.get(self.patch, self.patch)
        if not self.fine:
            return "zero-shot"
        if self.patch == "ours":
            return f"ours on {self.fine}"
        return named or (f"mask by {self.fine}" if self.fine in MASKS else self.fine)


BASE = Row()
OURS = [Row(fine, "ours") for fine in FINE_TUNES]
ROWS = [
    *(Row(fine) for fine in ("full", "half", "l2")),
    *(Row("full", patch) for patch in ("graft", "dare", "paper")),
    OURS[0],
    *(Row(fine) for fine in ("spider", "dowser")),
    *OURS[1:],
]


LATE = [row for row in OURS[1:] if row.fine != "spider"]  # run after the others
FASTER = ("spider", "dowser")  # want a higher rate than the others: a part of each step, or of the entries


TRAINING = "bf16: true\n"  # the passes of every fine-tune; weights and optimiser are in the dtype of the part


@dataclass(frozen=True)
class Part:
    """A kind of model and its data, and how long each fine-tune of it trains."""

    name: str
    make: Callable[..., list[Pair]]  # of a cache folder
    tasks: tuple[str, ...]  # new tasks
    model: str  # in words
    steps: int
    batch: int
    seq_len: int
    samples: int  # of each kind of statistics
    rates: tuple[float, ...]  # tried for every row at every depth, on the validation part of the first seed
    first: float  # of them, the one that full fine-tuning is expected to want, a third of FASTER's
    wider: tuple[float, ...] = ()  # one of them is tried where the best lies at an edge
    items: int | None = None  # of a task, at most
    dtype: str = "auto"  # in which it trains; the output is in the base's
    frozen: str = "embeddings and the output layer"

    def first_rate(self, row: Row) -> float:
        """The rate at which a row is run before others are tried."""
        wanted = self.first if row.fine not in FASTER else self.first * 3
        return min(self.rates, key=lambda rate: abs(math.log(rate / wanted)))


_LARGER: dict[str, Any] = {"steps": 100, "batch": 8, "seq_len": 256, "samples": 512}
PARTS = {
    "quick": Part(
        "quick",
        pairs.quick,
        ("unicode", "licences"),
        "byte-level Llamas of 3 million parameters",
        steps=25,
        batch=8,
        seq_len=128,
        samples=48,
        rates=(1e-3, 3e-3),
        first=1e-3,
        wider=(1e-4, 3e-4, 1e-2, 3e-2),
        items=60,
    ),
    "text": Part(
        "text",
        pairs.text,
        ("unicode", "licences"),
        "SmolLM2-135M-Instruct",
        **_LARGER,
        rates=(1e-4, 3e-4, 1e-3),
        wider=(3e-5, 3e-3),
        first=3e-4,
        dtype="float32",
    ),
    "multimodal": Part(
        "multimodal",
        pairs.multimodal,
        ("fashion",),
        "a LLaVA of SmolLM2-135M-Instruct",
        frozen="embeddings, the output layer and the vision tower; of the last one `finetune` trained the patch "
        "embedding (0.2% of all that was trained) when these were measured, which it freezes now",
        **_LARGER,
        rates=(1e-4, 3e-4, 1e-3),
        wider=(3e-5, 3e-3),
        first=3e-4,
        dtype="float32",
    ),
}


def depths_of(base: Path) -> dict[str, int]:
    """Layers that are fine-tuned, the last ones, by the name of the depth; the shallowest first."""
    config = read_config(base)
    layers = int(config.get("text_config", config).get("num_hidden_layers", 0)) or _counted(base)
    found = dict(zip(DEPTHS, (min(2, layers), max(1, round(layers / 3)), layers), strict=True))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _counted(base: Path) -> int:
    """Layers of a model whose config leaves their number to the default of its kind."""
    with Checkpoint.open(base) as stored:
        numbers = [name.partition("layers.")[2].partition(".")[0] for name in stored.tensors if "vision" not in name]
    return 1 + max(int(number) for number in numbers if number.isdigit())


def pairs_of(part: Part, cache: Path, tasks: Sequence[str], seeds: int) -> list[Pair]:
    """The pairs of these tasks and of the first ``seeds`` seeds, seed after seed, with no fine-tune made."""
    order = {task: place for place, task in enumerate(tasks)}
    how = {"seeds": range(seeds)} if part.make is pairs.quick else {}  # whose base each seed trains
    made: Sequence[Pair] = part.make(cache, bases_only=True, **how)
    found = [pair for pair in made if pair.name in order and pair.seed < seeds]
    return sorted(found, key=lambda pair: (order[pair.name], pair.seed))
