"""A pair with everything that a patched model is measured on; each measurement is kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaForCausalLM

from benchmarks.common import say
from benchmarks.evidence.pairs import Pair
from benchmarks.evidence.run import SAMPLES, SEQ_LEN
from benchmarks.leads.layers import Variant, changes_of, read_layers
from tailorcli import Checkpoint, EvaluateOptions, Stats, encode_task, evaluate_network, h_score, read_tasks
from tailorcli.calibration.synthetic import write_samples
from tailorcli.data.records import read_records
from tailorcli.data.samples import draw_samples
from tailorcli.models.loading import load_encoder
from tailorcli.options import CalibrateOptions

HELD = 64  # samples of each text that only the rule sees
_BATCH = 32
Changes = dict[str, Tensor]


@dataclass(frozen=True)
class Figures:
    """A model on validation data, and on what a user has without any old data; losses in nats a token."""

    old: float  # accuracy in percent, the old tasks' average
    new: float
    loss_old: float
    loss_new: float
    held_accuracy: float  # training text of the new task that calibration left out
    held_loss: float
    written_accuracy: float  # samples that the base wrote itself, not those calibrated on
    written_loss: float

    @property
    def h(self) -> float:
        """The H-score on validation data."""
        return h_score(self.old, self.new)


class Bench:
    """A pair's networks and texts, and the figures of its patched models."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair, self.folder = pair, folder
        self.encoder = load_encoder(pair.base, pair.base, False, CalibrateOptions())
        self.options = EvaluateOptions(batch_size=_BATCH)
        tasks = read_tasks(pair.specs("validation"))
        self.tasks = {task.name: encode_task(task, self.encoder, self.options) for task in tasks}
        self.network = LlamaForCausalLM.from_pretrained(pair.base).eval()
        self.start = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.known = [str(path) for path in self._fingerprints()]

    def _fingerprints(self) -> Iterable[object]:
        for path in (self.pair.base, self.pair.tuned):
            with Checkpoint.open(path) as checkpoint:
                yield checkpoint.fingerprint()
        for name in ("stats", "stats-written"):
            stats = Stats.open(self.folder / name)
            stats.close()
            yield stats.fingerprint()

    @cached_property
    def delta(self) -> Changes:
        """What fine-tuning changed."""
        tuned = LlamaForCausalLM.from_pretrained(self.pair.tuned).state_dict()
        return {name: tuned[name] - value for name, value in self.start.items()}

    @cached_property
    def new_texts(self) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) of the new task's training data: those that calibration took, and as many others."""
        options = CalibrateOptions(num_samples=2 * SAMPLES, seq_len=SEQ_LEN)
        records = read_records(self.pair.train)
        drawn = draw_samples(self.pair.train, records, self.encoder.encode, options).inputs
        ids = torch.cat([inputs["input_ids"] for inputs in drawn])
        return ids[:SAMPLES], ids[SAMPLES:]

    @cached_property
    def written(self) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) that the base wrote: those that calibration took, and others."""
        found = []
        for seed in (0, 1):
            file = self.folder.parent / "leads" / f"written-{seed}-of-{self.pair.seed}.pt"
            if not file.exists():
                say(f"  the base writes, seed {seed}")
                self.network.load_state_dict(self.start)
                options = CalibrateOptions(
                    num_samples=SAMPLES, seq_len=self.pair.retain_length, synthetic=True, seed=seed
                )
                device, bar = torch.device("cpu"), tqdm(disable=True)
                samples = write_samples(self.network, self.encoder.tokenizer, options, device, bar)
                file.parent.mkdir(exist_ok=True)
                torch.save(torch.cat([inputs["input_ids"] for inputs in samples.inputs]), file)
            found.append(torch.load(file))
        return found[0], found[1]

    def variant(self, variant: Variant) -> Figures:
        """The figures of one way to choose the entries."""
        key = {name: value for name, value in asdict(variant).items() if name != "name"}

        def changes() -> Changes:
            return changes_of(list(read_layers(self.pair, self.folder, variant.beta, variant.damping)), variant)

        return self.figures(variant.name, json.dumps(key), changes)

    def between(self, weight: float) -> Figures:
        """The figures of an interpolation: 0 is the base, 1 the tuned model."""
        return self.figures(
            f"interpolate {weight:g}", f"interpolate {weight}", lambda: {n: weight * d for n, d in self.delta.items()}
        )

    def figures(self, name: str, key: str, changes: Callable[[], Changes]) -> Figures:
        """The figures of the base with changes, measured unless that was done; ``key`` says what they are."""
        digest = hashlib.blake2b(json.dumps([key, self.known]).encode(), digest_size=12).hexdigest()
        file = self.folder / "leads" / f"{digest}.json"
        if not file.exists():
            say(f"  {name}")
            values = changes()
            self.network.load_state_dict({n: v + values[n] if n in values else v for n, v in self.start.items()})
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({"name": name, "key": key} | asdict(self._measured())), encoding="utf-8")
        stored = json.loads(file.read_text(encoding="utf-8"))
        return Figures(**{name: stored[name] for name in Figures.__dataclass_fields__})

    def _measured(self) -> Figures:
        scores = evaluate_network(self.network, self.tasks, self.options)
        losses = {name: found.mean_loss or 0.0 for name, found in scores.items()}
        held, written = (score_tokens(self.network, texts[1][:HELD]) for texts in (self.new_texts, self.written))
        origin, target = self.pair.origin, self.pair.target[0]
        return Figures(
            old=mean(scores[name].accuracy for name in origin),
            new=scores[target].accuracy,
            loss_old=mean(losses[name] for name in origin),
            loss_new=losses[target],
            held_accuracy=held[0],
            held_loss=held[1],
            written_accuracy=written[0],
            written_loss=written[1],
        )


def score_tokens(network: LlamaForCausalLM, ids: Tensor) -> tuple[float, float]:
    """Accuracy in percent and loss in nats of guessing each next token of (B, T)."""
    right, loss = 0, 0.0
    for batch in torch.split(ids, _BATCH):
        logits = network(input_ids=batch, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
        right += int((logits.argmax(-1) == batch[:, 1:]).sum())
        loss += float(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    count = ids[:, 1:].numel()
    return 100 * right / count, loss / count
