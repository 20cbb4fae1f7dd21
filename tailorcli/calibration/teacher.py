"""How far on the way from base to tuned the best model of the new task lies: by the loss on data of that task."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tailorcli.adapters.interpolated import InterpolatedCheckpoint
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.data.samples import count_tokens
from tailorcli.distributed import gathered, mine
from tailorcli.errors import DataError, NumericalError
from tailorcli.models.blockwise import run_blockwise, skeleton_if_too_large
from tailorcli.models.config import read_config
from tailorcli.models.generation import media_token_ids
from tailorcli.models.loading import load_model
from tailorcli.models.running import forward, to_device
from tailorcli.options import CalibrateOptions
from tailorcli.system import give_back_memory
from tailorcli.terminal import Progress

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

STEP, FINE = 0.2, 0.1
LEAST, MOST = 0.2, 1.6
MOST_TRIED = 7  # weights, at most
TEMPERATURES = (1.0, 1.25, 1.5, 2.0, 3.0)  # what logits are divided by

_NO_NUMBER = 1e9  # the loss of a model that gives none: no other is as high


@dataclass(frozen=True)
class TeacherChoice:
    """The weight that was picked, and the mean loss in nats a token at each weight that was tried.

    Losses are at the temperature that suits a weight best. ``least`` is the weight with the least.
    """

    weight: float
    losses: dict[float, float]
    least: float

    def told(self) -> str:
        """One line for the user."""
        said = {weight: "no number" if loss >= _NO_NUMBER else f"{loss:.4f}" for weight, loss in self.losses.items()}
        tried = ", ".join(f"{weight:g}: {said[weight]}" for weight in sorted(said))
        noise = "" if self.least == self.weight else f"; {self.least:g} is better by no more than noise"
        return f"teacher weight {self.weight:g}, by the loss on the new task's data (nats a token; {tried}{noise})"


def choose(losses_at: Callable[[float], list[float]]) -> TeacherChoice:
    """The weight with the least mean loss: down from 1 in steps while that helps, else up, then between.

    ``losses_at`` gives the losses of the same samples at a weight. A weight other than 1 has to be better by more than
    the standard error of the paired difference, so that noise picks nothing.
    """
    found: dict[float, list[float]] = {}

    def mean(weight: float) -> float:
        weight = round(weight, 2)
        if weight not in found:
            found[weight] = losses_at(weight)
        return sum(found[weight]) / len(found[weight])

    best, step = 1.0, -STEP
    if mean(1.0 - STEP) >= mean(1.0):
        step = STEP
    while LEAST <= best + step <= MOST and mean(best + step) < mean(best):
        best = round(best + step, 2)
    best = min((best, *(w for w in (best - FINE, best + FINE) if LEAST <= w <= MOST)), key=mean)
    gains = [one - other for one, other in zip(found[1.0], found[round(best, 2)], strict=True)]
    gain = sum(gains) / len(gains)
    spread = (sum((each - gain) ** 2 for each in gains) / max(1, len(gains) - 1) / len(gains)) ** 0.5
    weight = round(best, 2) if gain > spread else 1.0
    return TeacherChoice(weight, {each: sum(values) / len(values) for each, values in found.items()}, round(best, 2))


def choose_teacher(
    base: Checkpoint,
    tuned: Checkpoint,
    samples: list[Inputs],
    options: CalibrateOptions,
    device: torch.device,
    responses: list[torch.Tensor | None] | None = None,
    following: list[int | None] | None = None,
    progress: bool = False,
) -> TeacherChoice:
    """Try models between base and tuned, and beyond it, on ``samples`` of the new task; see ``choose``.

    A model that was trained too long is too sure of itself, and its loss high where its guesses are the best. So each
    weight has the loss at the temperature that suits it (Guo et al. 2017, arXiv 1706.04599), of ``TEMPERATURES``.

    Where ``responses`` mark a sample's response (1, T), its tokens alone count; ``following`` has the token that comes
    behind what a sample's decoder reads, the end of its answer. Every weight loads a model once, block
    by block where ``options`` ask for that or it does not fit.
    Raises DataError where no token is predicted, NumericalError where tuned's loss is no number, and CheckpointError.
    """
    marks, last = responses or [None] * len(samples), following or [None] * len(samples)

    def losses_at(weight: float) -> list[float]:
        view = InterpolatedCheckpoint(base, tuned, weight)
        config = read_config(view.path)
        skeleton = skeleton_if_too_large(view, config, options, device)
        network = load_model(view, config, options).to(device) if skeleton is None else skeleton
        own = mine([count_tokens(sample) for sample in samples])
        loss_of = partial(_loss_of, network, samples, marks, last, device, own)
        if skeleton is None:
            losses = [loss_of(number) for number in range(len(own))]
        else:
            losses = run_blockwise(network, view, view, len(own), loss_of, device, Path(tempfile.gettempdir()))
        joint = {place: loss for each in gathered(dict(zip(own, losses, strict=True))) for place, loss in each.items()}
        found = [joint[place] for place in range(len(samples))]
        del network, skeleton, loss_of
        gc.collect()
        give_back_memory()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        bar.update()
        known = [value for value in found if value is not None]
        if not known:
            raise DataError("no sample has a token that is predicted", "pass records of text")
        if not all(math.isfinite(value) for values in known for value in values):
            if weight == 1.0:
                what = f"the loss of {tuned.path} is no number on this data"
                raise NumericalError(what, "run it in another --dtype, such as bfloat16 or float32; or give a weight")
            return [_NO_NUMBER] * len(known)
        return calibrated(known)

    with Progress("teacher", MOST_TRIED, "models", shown=progress) as bar:
        return choose(losses_at)


def calibrated(losses: list[list[float]]) -> list[float]:
    """Each sample's loss at one temperature, that with the least mean; ``losses`` has a sample's at each temperature.

    >>> calibrated([[1.0, 0.5], [1.0, 1.25]])
    [0.5, 1.25]
    """
    return list(min(zip(*losses, strict=True), key=sum))


def _loss_of(
    network: Any,
    samples: list[Inputs],
    responses: list[torch.Tensor | None],
    following: list[int | None],
    device: torch.device,
    places: list[int],
    number: int,
) -> list[float] | None:
    place = places[number]
    return next_token_losses(network, samples[place], responses[place], device, following[place])


def next_token_losses(
    network: Any, sample: Inputs, response: torch.Tensor | None, device: torch.device, following: int | None = None
) -> list[float] | None:
    """The mean cross-entropy in nats of a sample's next tokens at each of ``TEMPERATURES``.

    Where its response is marked it is of that one's tokens; ``following`` is the token behind a decoder's last. None
    for a sample without any.
    """
    ids = sample.get("decoder_input_ids", sample.get("input_ids"))
    if ids is None:
        return None
    after = ids[:, 1:] if following is None else torch.cat([ids[:, 1:], ids.new_tensor([[following]])], dim=1)
    wanted = torch.ones_like(after, dtype=torch.bool)
    for token in media_token_ids(network):
        wanted &= after != token
    if response is not None:
        wanted &= response[:, 1:]
    if not bool(wanted.any()):
        return None
    logits = forward(network, to_device(sample, device)).logits
    if logits.shape[:2] != ids.shape:
        return None
    guesses, right = logits[:, : after.shape[1]][wanted].float(), after[wanted].to(device)
    return [float(nn.functional.cross_entropy(guesses / temperature, right)) for temperature in TEMPERATURES]
