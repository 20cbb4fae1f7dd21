"""Train the kept entries of a patch to answer as its teachers do: tuned on the new task, the base on the rest.

Several ranks have the model each, and divide the samples of every batch: the gradients are summed, and all take the
same step. A sample is always the same rank's, which alone asks the teachers about it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tailorcli.core.distillation import rate_at
from tailorcli.data.samples import batch_places, count_tokens, join
from tailorcli.distributed import mine, now_on, ranks, summed_
from tailorcli.errors import DataError, NumericalError
from tailorcli.models.running import to_device
from tailorcli.options import DistillOptions
from tailorcli.training.activations import checkpointed
from tailorcli.training.entries import Trained
from tailorcli.training.teachers import Teacher, kept_accuracy_of, loss, predicted

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

NEW, RETAINED = "new", "retained"  # kinds of samples; several new tasks are "new 1", "new 2" and so on
HELD_OUT = 0.1  # of each kind of samples
WARMUP = 0.05  # of the steps
EVALUATIONS = 20
PATIENCE = 5  # evaluations without a better objective, after which it stops


@dataclass
class History:
    """What a run saw: the held-out divergences in nats a token, before the first step and at each evaluation."""

    steps: list[int] = field(default_factory=list)
    new: list[float] = field(default_factory=list)
    retained: list[float] = field(default_factory=list)
    trained_new: list[float] = field(default_factory=list)  # means over the steps since the last evaluation
    trained_retained: list[float] = field(default_factory=list)
    best: int = 0  # the step of the state that was kept
    rounded_new: float = 0.0  # held out, once the values are rounded to the base's dtype
    rounded_retained: float = 0.0
    kept: dict[str, float] = field(default_factory=dict)  # shares of the teachers' accuracy, before and after
    by_task: list[list[float]] = field(default_factory=list)  # of several new tasks each its own, whose mean is ``new``

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report."""
        values = asdict(self)
        return values if self.by_task else {name: value for name, value in values.items() if name != "by_task"}


@dataclass
class Material:
    """One kind of samples with their teacher, split into those that are trained on and those held out."""

    samples: list[Inputs]
    teacher: Teacher
    train: list[list[list[int]]]  # by step: its samples, in batches of one length
    held: list[list[int]]  # batches of samples of one length
    responses: list[Tensor] | None = None  # of each sample (1, T) bool: the tokens that count, where not all do
    share: float = 1.0  # of a new task among several

    @classmethod
    def split(
        cls,
        samples: list[Inputs],
        teacher: Teacher,
        options: DistillOptions,
        responses: list[Tensor] | None = None,
        share: float = 1.0,
    ) -> Material:
        """Every tenth sample (``HELD_OUT``) in a drawn order is held out; one with no token that counts is left out.

        Raises DataError for fewer than two.
        """
        order = [
            number
            for number, sample in enumerate(samples)
            if bool(predicted(sample, (), teacher.ends).any())
            and (responses is None or bool(before_response(responses[number]).any()))
        ]
        if len(order) < 2:
            what = "distillation needs two samples of each kind at least, with a token that counts"
            raise DataError(what, "calibrate on more data")
        random.Random(options.seed).shuffle(order)
        count = max(1, round(HELD_OUT * len(order)))
        held = in_batches(samples, sorted(order[:count]), options.batch_size)
        train = in_steps(samples, sorted(order[count:]), options.batch_size)
        return cls(samples, teacher, train, held, responses, share)

    def batches(self, step: int, seed: int) -> list[list[int]]:
        """The samples of a step, in batches of one length: all steps' in turn, in a new order each time round."""
        turn, place = divmod(step, len(self.train))
        order = list(range(len(self.train)))
        random.Random(f"{seed} {turn}").shuffle(order)
        return self.train[order[place]]

    def loss(self, student: Any, places: list[int], media: tuple[int, ...], device: torch.device, grad: bool) -> Tensor:
        """The mean divergence over a batch."""
        batch = join([self.samples[place] for place in places])
        states = torch.stack([self.teacher.states[place] for place in places])
        return loss(student, self.teacher, to_device(batch, device), states, self.counted(places, media), grad)

    def counted(self, places: list[int], media: tuple[int, ...]) -> Tensor:
        """Where the next token is predicted and counts, (B, T) bool."""
        wanted = predicted(join([self.samples[place] for place in places]), media, self.teacher.ends)
        if self.responses is not None:
            wanted &= before_response(torch.cat([self.responses[place] for place in places]))
        return wanted

    def _own_held(self) -> list[list[int]]:
        """The batches of what is held out that are this rank's."""
        return [self.held[number] for number in mine([len(batch) for batch in self.held])]

    @property
    def own(self) -> list[int]:
        """The samples that this rank ever runs: those for which it needs the teacher's states."""
        return sorted(place for step in [*map(own_of, self.train), *self._own_held()] for place in step)

    def kept_share(self, student: Any, media: tuple[int, ...], device: torch.device) -> float:
        """The share that the student keeps of its teacher's accuracy on what is held out, were that the teacher's."""
        kept, whole = (torch.zeros((), device=device) for _ in range(2))
        with torch.no_grad():
            for places in self._own_held():
                batch = to_device(join([self.samples[place] for place in places]), device)
                states = torch.stack([self.teacher.states[place] for place in places])
                parts = kept_accuracy_of(student, self.teacher, batch, states, self.counted(places, media))
                kept += parts[0]
                whole += parts[1]
        kept, whole = summed_(torch.stack([kept, whole]).double())
        return float(kept) / max(float(whole), 1e-9)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest batch."""
        batches = [*(batch for step in self.train for batch in step), *self.held]
        return max(sum(count_tokens(self.samples[place]) for place in batch) for batch in batches)

    def held_out_loss(self, student: Any, media: tuple[int, ...], device: torch.device) -> float:
        """The mean divergence over what is held out, each sample weighing as much as it has tokens."""
        total, tokens = torch.zeros((), device=device), 0
        with torch.no_grad():
            for places in self._own_held():
                count = int(self.counted(places, media).sum())
                total += count * self.loss(student, places, media, device, grad=False)
                tokens += count
        both = summed_(torch.tensor([float(total), tokens], dtype=torch.float64, device=device))
        return float(both[0]) / max(float(both[1]), 1)


def own_of(step: Sequence[Sequence[int]]) -> set[int]:
    """The samples of a step's batches that are this rank's, the same whenever the step comes round."""
    in_all = [place for batch in step for place in batch]
    return set(in_all[ranks().rank :: ranks().size])


def before_response(response: Tensor) -> Tensor:
    """Where what comes next belongs to a response, (B, T) bool of such marks: behind its last token what ends it."""
    return torch.cat([response[:, 1:], response[:, -1:]], dim=1)


def in_batches(samples: list[Inputs], places: Sequence[int], size: int) -> list[list[int]]:
    """The samples at ``places`` in batches of ``size`` at most, each of one length, by their places."""
    chosen = [samples[place] for place in places]
    return [[places[inner] for inner in batch] for batch in batch_places(chosen, size)]


def in_steps(samples: list[Inputs], places: Sequence[int], size: int) -> list[list[list[int]]]:
    """The samples at ``places`` by steps of ``size`` samples, the last one's fewer, each in batches of one length.

    Samples of like lengths come together, so that a step has few batches.
    """
    ordered = [place for batch in in_batches(samples, places, len(places)) for place in batch]
    steps = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [in_batches(samples, step, size) for step in steps]


def distill(
    trained: Trained,
    materials: dict[str, Material],
    options: DistillOptions,
    device: torch.device,
    media: tuple[int, ...] = (),
    history: History | None = None,
    save: Callable[[int, History, dict[str, Tensor]], None] | None = None,
    best: dict[str, Tensor] | None = None,
    start: int = 0,
    advance: Callable[[int, float, float], object] = lambda *_: None,
) -> History:
    """Train in place and leave the best state on the held-out samples in ``trained``.

    ``materials`` holds "new", or several tasks' "new 1" and so on, and "retained". Minimises
    KL(tuned || patched) + weight * KL(base || patched), each the mean over the predicted tokens of a step's samples,
    the first term the mean over the tasks by their shares. Raises NumericalError where the loss is no number.
    """
    history, steps = history or History(), options.known_steps
    every = max(1, steps // EVALUATIONS)
    warmup = max(1, round(WARMUP * steps))
    sums = {kind: torch.zeros((), device=device) for kind in materials}  # on the device: no step waits for its losses
    if not history.steps:
        _evaluate(trained, materials, options, device, media, history, 0, None)
        best = trained.values()
    assert best is not None
    tokens = max(material.most_tokens for material in materials.values())
    with checkpointed(trained.network, tokens):
        for step in range(start, steps):
            # Here and not after an evaluation: a run that is taken up may have stopped before it was broken off.
            if sum(1 for past in history.steps if past > history.best) >= PATIENCE:
                break
            for kind, value in step_losses(trained.network, materials, options, device, media, step).items():
                sums[kind] += value
            for each in trained.entries if not ranks().alone else ():
                summed_(each.gradient)
            trained.step(step + 1, options.rate * rate_at(step + 1, steps, warmup))
            advance(step + 1, history.new[-1], history.retained[-1])
            if (step + 1) % every and step + 1 != steps:
                continue
            means = _means(sums, history.steps[-1], step + 1)
            _evaluate(trained, materials, options, device, media, history, step + 1, means)
            if history.best == step + 1:
                best = trained.values()
            if save is not None:
                save(step + 1, history, best)
    trained.set_values(best)
    return history


def step_losses(
    student: Any,
    materials: dict[str, Material],
    options: DistillOptions,
    device: torch.device,
    media: tuple[int, ...],
    step: int,
) -> dict[str, Tensor]:
    """Both losses of a step's batches, scalars on the device; their weighed gradients are added to the entries'.

    Of several ranks each has its samples' part of both.
    """
    losses = {}
    now_on(f"step {step + 1}")
    tasks = sum(material.share for kind, material in materials.items() if kind != RETAINED)
    for kind, material in materials.items():
        weight = options.weight if kind == RETAINED else material.share / tasks
        batches = material.batches(step, options.seed)
        here = own_of(batches)
        losses[kind] = torch.zeros((), device=device)
        total = None
        for batch in batches:
            own = [place for place in batch if place in here]
            share = 1.0
            if own != batch or len(batches) > 1:  # of the mean over all tokens of the step
                total = total or sum(int(material.counted(places, media).sum()) for places in batches)
                share = int(material.counted(own, media).sum()) / max(total, 1) if own else 0.0
            if share == 0.0:
                continue
            value = material.loss(student, own, media, device, grad=True)
            value = value if share == 1.0 else share * value
            if value.requires_grad:  # not where no kept entry lies on the way, as those of a projector without pictures
                torch.autograd.backward(value if weight == 1 else weight * value)
            losses[kind] = losses[kind] + value.detach()
    return losses


def _means(sums: dict[str, Tensor], before: int, step: int) -> dict[str, float]:
    """The mean losses since the step ``before``; their sums start anew. Raises NumericalError for no number."""
    means = {kind: float(summed_(total.clone())) / (step - before) for kind, total in sums.items()}
    for kind, mean in means.items():
        if not math.isfinite(mean):
            where = f"steps {before + 1} to {step}"
            raise NumericalError(f"the {kind} loss is {mean} in {where}", "lower --distill-rate")
        sums[kind].zero_()
    return means


def _evaluate(
    trained: Trained,
    materials: dict[str, Material],
    options: DistillOptions,
    device: torch.device,
    media: tuple[int, ...],
    history: History,
    step: int,
    means: dict[str, float] | None,
) -> None:
    """Add the held-out losses at ``step`` to the history, and note whether it is the best."""
    tasks, retained = held_out(trained.network, materials, media, device)
    new = mean_of(tasks, materials)
    objectives = [a + options.weight * b for a, b in zip(history.new, history.retained, strict=True)]
    if all(new + options.weight * retained < earlier for earlier in objectives):
        history.best = step
    history.steps.append(step)
    history.new.append(new)
    history.retained.append(retained)
    if len(tasks) > 1:
        history.by_task.append(tasks)
    if means is not None:
        history.trained_new.append(mean_of([value for kind, value in means.items() if kind != RETAINED], materials))
        history.trained_retained.append(means[RETAINED])


def held_out(
    student: Any, materials: dict[str, Material], media: tuple[int, ...], device: torch.device
) -> tuple[list[float], float]:
    """The held-out divergences of each new task, and that of the retained samples."""
    found = {kind: material.held_out_loss(student, media, device) for kind, material in materials.items()}
    return [value for kind, value in found.items() if kind != RETAINED], found[RETAINED]


def kept_shares(
    student: Any, materials: dict[str, Material], media: tuple[int, ...], device: torch.device
) -> dict[str, float]:
    """What the student keeps of the base's accuracy ("old") and of the new tasks' teachers' ("new", the least)."""
    shares = {kind: material.kept_share(student, media, device) for kind, material in materials.items()}
    return {"old": shares.pop(RETAINED), "new": min(shares.values())}


def mean_of(values: Sequence[float], materials: dict[str, Material]) -> float:
    """The mean of a number of each new task, by the tasks' shares."""
    shares = [material.share for kind, material in materials.items() if kind != RETAINED]
    return sum(share * value for share, value in zip(shares, values, strict=True)) / sum(shares)
