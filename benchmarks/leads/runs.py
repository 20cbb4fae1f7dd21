"""A short run of distillation on a pair of `quick`, and the ground it starts from: masks, teachers, tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.evidence.pairs import SEEDS, Pair
from benchmarks.leads.layers import Layer, read_layers
from benchmarks.leads.objectives import divergences
from benchmarks.quick import data as quick_data
from tailorcli import PatchOptions, Stats
from tailorcli.core import count_kept, select_mask
from tailorcli.core.distillation import rate_at
from tailorcli.core.tailor import add_salience_
from tailorcli.demo.text import encode
from tailorcli.models.places import Place
from tailorcli.training.distill import WARMUP
from tailorcli.training.entries import Entries, Trained, entries_of

CPU = torch.device("cpu")
HELD = 48  # samples of each kind that no run is trained on, the last ones
DEFAULT = PatchOptions().resolved(True)
NEW, RETAINED = "new", "retained"


@dataclass(frozen=True)
class Run:
    """One way to distil, shortly."""

    density: float = 0.1
    mask: str = "both"  # the sum that --distill takes; or the paper's score (of the goal), that of delta, |delta|, ...
    budget: str = "tensor"  # or wanted: densities of tensors by the first gradients of what is left out
    form: str = "sparse"  # or blocks: block by block; or low rank
    steps: int = 60
    batch: int = 4  # samples of each kind in a step
    count: int = 48  # samples of each kind
    rate: float = 0.1
    weight: float | str = 2.0  # B; or start, running: the quotient of both divergences
    loss: str = "forward"  # or reverse, both, confident
    retained: str = "written"  # by the base, at temperature 1 or "written at T"; or own: of the old tasks


@dataclass
class Ground:
    """What all runs on a pair share."""

    pair: Pair
    folder: Path  # of its statistics
    start: dict[str, Tensor]  # of the base
    texts: dict[str, Tensor]  # tokens (B, T) by kind: new, written, own
    tasks: dict[str, Tensor]
    _logits: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, cache: Path) -> Ground:
        """The ground of TASK-SEED."""
        task, _, seed = name.rpartition("-")
        assert int(seed) in SEEDS
        models, folder = cache / f"seed{seed}", cache / "data"
        kinds = dict.fromkeys((*quick_data.OLD_TASKS, task), "text")
        train, old = folder / f"{task}-train.jsonl", folder / "old-train.jsonl"
        where = (task, int(seed), models / "base", models / task, train, old, folder)
        pair = Pair(*where, kinds, quick_data.OLD_TASKS, (task,), quick_data.WINDOW)
        texts = {kind: _samples(cache / name / f"stats{part}") for kind, part in _KINDS.items()}
        tasks = {each: validation(pair, each) for each in kinds}
        return cls(pair, cache / name, LlamaForCausalLM.from_pretrained(pair.base).state_dict(), texts, tasks)

    def network(self, end: str) -> Any:
        """The base's network or tuned's."""
        return LlamaForCausalLM.from_pretrained(self.pair.base if end == "base" else self.pair.tuned).eval()

    @cached_property
    def teachers(self) -> dict[str, Any]:
        """Tuned's network and the base's, by the kind of samples that they teach."""
        return {NEW: self.network("tuned"), RETAINED: self.network("base")}

    @cached_property
    def layers(self) -> list[Layer]:
        """Every tensor as a layer, by today's defaults without propagation."""
        return list(read_layers(self.pair, self.folder, DEFAULT.retain_weight, DEFAULT.effective_damping))

    def masks(self, run: Run) -> list[Tensor]:
        """The mask of every tensor as rows (O, I)."""
        found = self.scores(run)
        return [select_mask(score, count_kept(run.density, score.numel())) for score in found]

    def scores(self, run: Run) -> Iterator[Tensor]:
        """What the entries of every tensor are chosen by, (O, I)."""
        generator = torch.Generator().manual_seed(0)
        tuned = self.teachers[NEW].state_dict()
        for layer in self.layers:
            delta = tuned[layer.name] - self.start[layer.name]
            delta = (delta.T if layer.transposed else delta.reshape(layer.goal.shape)).contiguous()  # (O, I)
            if run.mask == "random":
                score = torch.rand(delta.shape, generator=generator)
            elif run.mask == "|delta|":
                score = delta.abs()
            elif run.mask == "both":
                score = layer.score("fused").contiguous()
                add_salience_(score, delta)
            elif run.mask == "the paper's score of delta":
                score = replace(layer, goal=delta).score("fused")
            else:
                score = layer.score("salience" if run.mask == "|goal|" else "fused")
            yield score.contiguous()

    def student(self, run: Run) -> Trained:
        """The base's network with the closed form on the masks in it, whose entries are trained."""
        masks = self.masks(run)
        if run.budget == "wanted":
            masks = self._wanted(run, masks)
        return self._student(masks)

    def _student(self, masks: list[Tensor]) -> Trained:
        network = self.network("base")
        entries = []
        for layer, mask in zip(self.layers, masks, strict=True):
            base, kept = self.start[layer.name], layer.stored(mask)
            values = (base + layer.stored(layer.solve(mask)))[kept]
            entries.append(entries_of(layer.name, Place((layer.name,)), base, kept, values, CPU))
        return Trained(network, entries)

    def _wanted(self, run: Run, masks: list[Tensor]) -> list[Tensor]:
        """As many entries in all, a tensor's share by the root of its mean squared gradient, halved or doubled at most.

        The gradient is that of the first batches at the closed form, on the run's own masks.
        """
        trained = self._student(masks)
        trained.close()
        for step in range(4):
            for kind, weight in ((NEW, 1.0), (RETAINED, 2.0)):
                value = self.loss(trained.network, run, kind, self.batch(run, step)).mean()
                torch.autograd.backward(weight * value)
        wanted = []
        for layer in self.layers:
            gradient = trained.network.get_parameter(layer.name).grad
            scale = layer.goal.square().mean().sqrt()  # a step's length is in units of it
            wanted.append(float(gradient.square().mean().sqrt() * scale))
        sizes = [layer.goal.numel() for layer in self.layers]
        usual = sum(w * n for w, n in zip(wanted, sizes, strict=True)) / sum(sizes)
        shares = [min(2.0, max(0.5, w / usual)) for w in wanted]
        factor = sum(sizes) / sum(s * n for s, n in zip(shares, sizes, strict=True))
        found = []
        for score, share in zip(self.scores(run), shares, strict=True):
            found.append(select_mask(score, count_kept(min(1.0, run.density * share * factor), score.numel())))
        return found

    def batch(self, run: Run, step: int) -> list[int]:
        """The samples of a step: all in turn, in a new order each time round."""
        turn, place = divmod(step * run.batch, run.count - run.count % run.batch)
        order = torch.randperm(run.count, generator=torch.Generator().manual_seed(turn)).tolist()
        return [int(number) for number in order[place : place + run.batch]]

    def tokens(self, run: Run, kind: str, places: list[int] | slice) -> Tensor:
        """Tokens (B, T) of a kind."""
        return self._texts(run.retained if kind == RETAINED else NEW)[places]

    def _texts(self, name: str) -> Tensor:
        """All samples of a name, (B, T); those at a temperature of their own are written when first asked for."""
        if name not in self.texts:
            temperature = float(name.removeprefix("written at "))
            self.texts[name] = written_at(temperature, self.teachers[RETAINED], self.texts["written"])
        return self.texts[name]

    def loss(self, student: Any, run: Run, kind: str, places: list[int] | slice, loss: str | None = None) -> Tensor:
        """The divergence of each predicted token from its teacher, (N,)."""
        ids, taught = self.tokens(run, kind, places), self._taught(run, kind, places)
        return divergences(taught.flatten(0, 1), student(input_ids=ids).logits[:, :-1].flatten(0, 1), loss or run.loss)

    def _taught(self, run: Run, kind: str, places: list[int] | slice) -> Tensor:
        """The teacher's logits of the predicted tokens, (B, T, V), each sample's worked out once."""
        name = run.retained if kind == RETAINED else NEW
        numbers = range(len(self._texts(name)))[places] if isinstance(places, slice) else places
        for number in numbers:
            if (name, number) not in self._logits:
                with torch.no_grad():
                    found = self.teachers[kind](input_ids=self.texts[name][number : number + 1]).logits
                self._logits[name, number] = found[0, :-1].clone()
        return torch.stack([self._logits[name, number] for number in numbers])

    def held_out(self, student: Any, run: Run) -> dict[str, float]:
        """Both mean divergences KL(teacher || student) on samples that no run is trained on."""
        with torch.no_grad():
            return {
                kind: float(self.loss(student, run, kind, slice(-HELD, None), "forward").mean())
                for kind in (NEW, RETAINED)
            }

    def accuracies(self, network: Any) -> dict[str, float]:
        """The percentages of next bytes guessed right on validation data: old, new."""
        found = {name: accuracy(network, ids) for name, ids in self.tasks.items()}
        return {"old": mean(found[name] for name in self.pair.origin), "new": found[self.pair.target[0]]}

    def descend(self, run: Run, student: Any, update: Callable[[int, float], object]) -> None:
        """Train for the steps of a run: both losses' gradients, then ``update`` with the step's number and rate."""
        warmup = max(1, round(WARMUP * run.steps))
        weight = run.weight if isinstance(run.weight, float) else 1.0
        if run.weight == "start":
            first = self.held_out(student, run)
            weight = min(4.0, max(0.5, first[NEW] / max(first[RETAINED], 1e-9)))
        seen: list[dict[str, float]] = []
        for step in range(run.steps):
            if run.weight == "running" and seen:
                sums = {kind: sum(each[kind] for each in seen[-10:]) for kind in (NEW, RETAINED)}
                weight = min(4.0, max(0.5, sums[NEW] / max(sums[RETAINED], 1e-9)))
            losses = {}
            for kind, share in ((NEW, 1.0), (RETAINED, weight)):
                value = self.loss(student, run, kind, self.batch(run, step)).mean()
                torch.autograd.backward(share * value)
                losses[kind] = float(value.detach())
            seen.append(losses)
            update(step + 1, run.rate * rate_at(step + 1, run.steps, warmup))


def written_at(temperature: float, network: Any, others: Tensor) -> Tensor:
    """As many samples as ``others`` (B, T), from the same first tokens, written by ``network`` at a temperature."""
    torch.manual_seed(0)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    found: Tensor = network.generate(others[:, :1], max_length=others.shape[1], pad_token_id=0, **how)
    return found


_KINDS = {NEW: "", "written": "-written", "own": "-own"}


def of_blocks(trained: Trained, layers: int) -> Iterator[list[Entries]]:
    """The entries of each block in turn: the embedding's with the first, what follows the last by itself."""
    for number in range(layers):
        inside = (f"model.layers.{number}.", "model.embed_tokens.") if number == 0 else (f"model.layers.{number}.",)
        yield [each for each in trained.entries if each.parameter.startswith(inside)]
    yield [each for each in trained.entries if each.parameter.startswith(("model.norm.", "lm_head."))]


def accuracy(network: Any, ids: Tensor) -> float:
    """The percentage of next tokens of (B, T) guessed right."""
    with torch.no_grad():
        right = network(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    return 100.0 * float(right.float().mean())


def validation(pair: Pair, task: str) -> Tensor:
    """The validation samples of a task, tokens (B, T)."""
    texts = quick_data.read_texts(pair.tasks / f"{task}-validation.jsonl")
    rows = (encode([text])[0][: quick_data.WINDOW] for text in texts)
    return torch.stack([row for row in rows if len(row) == quick_data.WINDOW])


def _samples(folder: Path) -> Tensor:
    stats = Stats.open(folder)
    found = torch.cat([sample["input_ids"] for sample in stats.samples()])
    stats.close()
    return found
