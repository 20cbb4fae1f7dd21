"""What a network says of encoded tasks: the logits of the scored positions, in float32, and greedy answers.

Only samples of equal shapes are put into one batch: nothing is padded. Several ranks divide the batches, which stay as
they are, and all have all scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tailorcli.data.samples import batch_places, count_tokens, join
from tailorcli.device import exact_float32, is_out_of_memory
from tailorcli.distributed import gathered, mine, now_on
from tailorcli.errors import CheckpointError, DataError, NumericalError, first_line
from tailorcli.evaluation.metrics import TaskScores
from tailorcli.evaluation.tasks import EncodedTask, Item, Row, normalise
from tailorcli.models.calling import quiet_transformers
from tailorcli.models.generation import greedy_generation
from tailorcli.models.running import check_ids, forward, in_dtype_of, in_use, output_head, to_device
from tailorcli.options import EvaluateOptions

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

_CANDIDATES = 8  # logits that are worked out again in float32, besides the wanted ones
_ENTRIES = 1 << 25  # logits at a time


@torch.no_grad()  # in inference mode tensors that a network keeps could not be trained with later
def evaluate_network(
    network: Any,
    tasks: Mapping[str, EncodedTask],
    options: EvaluateOptions = EvaluateOptions(),
    advance: Callable[[int], object] | None = None,
) -> dict[str, TaskScores]:
    """Score a loaded network, on the device where it is, on every task; ``advance`` is told of finished rows.

    Raises DataError where it cannot run on the items, CheckpointError for a network that writes no text, NumericalError
    for outputs that are not finite.
    """
    if hasattr(network, "can_generate") and not network.can_generate():
        what = f"{type(network).__name__} predicts no next token"
        raise CheckpointError(what, "evaluate is for models that write text")
    check_ids([row.inputs for task in tasks.values() for item in task.items for row in item.rows], network)
    with in_use(network), exact_float32():
        reader = _Reader(network)
        score = {"text": _score_text, "generate": _score_answers}
        return {
            name: score.get(task.kind, _score_choices)(reader, task, options, advance or (lambda rows: None))
            for name, task in tasks.items()
        }


Advance = Callable[[int], object]


def _score_text(reader: _Reader, task: EncodedTask, options: EvaluateOptions, advance: Advance) -> TaskScores:
    correct, count, loss = (np.zeros(len(task.items)) for _ in range(3))
    for item, row, best, losses in _asked(reader, task.items, options.batch_size, advance):
        correct[item] = int((best == row.wanted[0]).sum())
        count[item] = row.wanted.shape[1]
        loss[item] = float(losses.sum())
    correct, count, loss = (sum(each) for each in zip(*gathered((correct, count, loss)), strict=True))
    return TaskScores(correct, count, loss)


def _score_choices(reader: _Reader, task: EncodedTask, options: EvaluateOptions, advance: Advance) -> TaskScores:
    """Right where the right choice has the highest log-likelihood for its length; the first of equals counts."""
    likely = [np.zeros(len(item.lengths)) for item in task.items]
    for item, row, _, losses in _asked(reader, task.items, options.batch_size, advance):
        for choice, of_choice in zip(row.choices, losses, strict=True):
            likely[item][choice] = -float(of_choice.sum()) / task.items[item].lengths[choice]
    likely = [sum(each) for each in zip(*gathered(likely), strict=True)]  # of a choice one rank has more than zero
    right = [float(values.argmax() == item.answer) for item, values in zip(task.items, likely, strict=True)]
    return TaskScores(np.array(right), np.ones(len(right)), np.full(len(right), np.nan))


def _asked(
    reader: _Reader, items: tuple[Item, ...], batch_size: int, advance: Advance
) -> Iterator[tuple[int, Row, Tensor, Tensor]]:
    """For each row its item's place, the row, the likeliest tokens (P,) and the losses (C, P) in float64."""
    rows = [(place, row) for place, item in enumerate(items) for row in item.rows]
    tokens = torch.cat([row.wanted.flatten() for _, row in rows[:64]])
    by_length = sorted((row for _, row in rows), key=lambda row: -count_tokens(row.inputs))
    for row in {frozenset(row.inputs): row for row in by_length}.values():  # the shortest of each kind of inputs
        reader.check(row, tokens)
    for batch in _own([row.inputs for _, row in rows], batch_size if reader.head is not None else 1):
        chosen = [rows[position] for position in batch]
        best, losses = reader.read([row for _, row in chosen])
        start = 0
        for place, row in chosen:
            stop, width = start + len(row.places), len(row.wanted)
            yield place, row, best[start:stop], losses[start:stop, :width].T
            start = stop
        advance(len(chosen))


def _own(samples: list[Inputs], size: int) -> Iterator[list[int]]:
    """The batches of this rank, as places in ``samples``."""
    batches = list(batch_places(samples, size))
    for number in mine([sum(count_tokens(samples[place]) for place in batch) for batch in batches]):
        now_on(f"batch {number}")
        yield batches[number]
    now_on("")


def _score_answers(reader: _Reader, task: EncodedTask, options: EvaluateOptions, advance: Advance) -> TaskScores:
    """Right where the first line that is written greedily is an accepted answer, both normalised."""
    if not hasattr(reader.network, "generate"):
        what = f"{type(reader.network).__name__} has no way to generate text"
        raise CheckpointError(what, "score its responses with kind text instead")
    outputs = [""] * len(task.items)
    rows = [item.rows[0].inputs for item in task.items]
    for batch in _own(rows, options.batch_size):
        texts = reader.write(join([rows[place] for place in batch]), options.max_new_tokens, task.decode)
        for place, text in zip(batch, texts, strict=True):
            outputs[place] = text
        advance(len(batch))
    outputs = ["".join(each) for each in zip(*gathered(outputs), strict=True)]
    answers = zip(task.items, outputs, strict=True)
    right = np.array([float(normalise(output) in item.accepted) for item, output in answers])
    return TaskScores(right, np.ones(len(right)), np.full(len(right), np.nan), tuple(outputs))


class _Reader:
    """Runs a network and reads its predictions.

    ``head`` is its output layer, where its logits are nothing but that layer's outputs: then only the positions that
    are asked for go through it. Otherwise (a scale, a cap, a bias behind it) the network's own logits are taken.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        self.device = next(network.parameters()).device
        self._linear = output_head(network)
        self.head: nn.Linear | None = self._linear

    def check(self, row: Row, tokens: Tensor) -> None:
        """Whether the head is all there is behind the hidden states, and whether the network reads ahead.

        Raises DataError if it does: then its outputs know the very tokens that they should predict. ``tokens`` are
        some of text, to put in the place of another.
        """
        inputs = to_device(row.inputs, self.device)
        caught: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, args: caught.append(args[0])) if self.head else None
        try:
            logits = getattr(forward(self.network, inputs), "logits", None)
        finally:
            if hook is not None:
                hook.remove()
        name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
        if logits is None or logits.shape[:2] != inputs[name].shape:
            shape = "none" if logits is None else list(logits.shape)
            what = f"{type(self.network).__name__} gives logits {shape} for {inputs[name].shape[1]} tokens"
            raise CheckpointError(what, "evaluate is for models that predict each next token")
        if self.head is not None:
            alone = len(caught) == 1 and caught[0].shape[:2] == inputs[name].shape
            if not alone or not torch.equal(self.head(caught[0]).float(), logits.float()):
                self.head = None
        self._check_causal(inputs, name, tokens, logits)

    def _check_causal(self, inputs: Inputs, name: str, tokens: Tensor, logits: Tensor) -> None:
        ids, others = inputs[name], tokens[tokens != int(inputs[name][0, -1])]
        if ids.shape[1] < 2 or not len(others):
            return
        changed = ids.clone()
        changed[0, -1] = int(others[0])
        before = logits[0, :-1].float()
        after = forward(self.network, {**inputs, name: changed}).logits[0, :-1].float()
        moved = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-6)
        exact = logits.dtype in (torch.float32, torch.float64) and self.network.dtype == logits.dtype
        if float(moved.max()) > (1e-3 if exact else 0.1):
            what = f"{type(self.network).__name__} reads ahead: its outputs change with tokens behind them"
            raise DataError(what, "evaluate is for models that see no token before they predict it")

    def read(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """The likeliest token (N,) and the losses of the wanted ones (N, C), at all places of all rows, on the CPU.

        Rows with fewer continuations than C have losses without meaning behind theirs.
        """
        inputs = to_device(join([row.inputs for row in rows]), self.device)
        most = max(len(row.wanted) for row in rows)
        padded = [torch.cat([row.wanted, row.wanted[:1].expand(most - len(row.wanted), -1)]).T for row in rows]
        wanted = torch.cat(padded).to(self.device)  # (N, C)
        places = torch.cat([torch.stack([torch.full_like(row.places, i), row.places]) for i, row in enumerate(rows)], 1)
        sample, place = places.to(self.device)
        if self.head is None:
            with _float32_head(self._linear):
                logits = forward(self.network, inputs).logits[sample, place].float()
            return _predictions(logits, wanted)
        hidden = self._hidden(self.head, inputs)[sample, place]  # (N, D)
        step = max(1, _ENTRIES // self.head.out_features)
        pieces = [
            _predictions(exact_logits(part, self.head, targets), targets)
            for part, targets in zip(torch.split(hidden, step), torch.split(wanted, step), strict=True)
        ]
        best, losses = zip(*pieces, strict=True)
        return torch.cat(best), torch.cat(losses)

    def _hidden(self, head: nn.Linear, inputs: Inputs) -> Tensor:
        """What would go through the head, which is not asked."""
        caught: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            return hidden[..., :1]

        with _replaced(head, catch):
            forward(self.network, inputs)
        return caught[0]

    def write(self, inputs: Inputs, max_new_tokens: int, decode: Callable[[list[int]], str]) -> list[str]:
        """What the network writes greedily after each prompt, to the end of its first line that is not empty.

        Raises DataError.
        """
        prompt = inputs["input_ids"].to(self.device)
        encoder_decoder = bool(getattr(self.network.config, "is_encoder_decoder", False))

        def written(ids: Tensor) -> Tensor:
            if encoder_decoder:
                return ids[:, 1:]  # the decoder's first token is given
            echoed = ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt)
            return ids[:, prompt.shape[1] :] if echoed else ids

        def lines(ids: Tensor) -> list[str]:
            return [decode(_until(row, ends)).lstrip() for row in written(ids).tolist()]

        def stop(ids: Tensor, scores: object, **_: object) -> Tensor:
            return torch.tensor(["\n" in text for text in lines(ids)], device=ids.device)

        with greedy_generation(self.network, max_new_tokens) as config, _float32_head(self._linear):
            ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            try:
                given = in_dtype_of(self.network, to_device(inputs, self.device))
                given["attention_mask"] = torch.ones_like(prompt)
                with quiet_transformers():
                    ids = self.network.generate(**given, generation_config=config, stopping_criteria=[stop])
            except Exception as error:  # whatever a model's own code raises
                if is_out_of_memory(error):
                    raise
                shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
                what = f"the model cannot write after a prompt of this data ({shapes}): {first_line(error)}"
                raise DataError(what, "see that the records hold what the model takes: text or images") from error
        return [text.partition("\n")[0].rstrip() for text in lines(ids)]


def _until(ids: list[int], ends: list[int | None]) -> list[int]:
    """Token ids in front of the first end of text."""
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)


def _predictions(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    losses = logits.logsumexp(1, keepdim=True) - logits.gather(1, wanted)
    if not bool(losses.isfinite().all()):
        raise NumericalError(
            "the model's outputs are not finite", "look for NaN in its weights, or pass --dtype float32"
        )
    return logits.argmax(1).cpu(), losses.double().cpu()


def exact_logits(hidden: Tensor, head: nn.Linear, wanted: Tensor | None = None) -> Tensor:
    """Logits (..., V) of hidden states (..., D) in float32, where it matters: for the best and the ``wanted`` (..., C).

    In bfloat16 the best logits often tie, so those are computed again in float32; all of them would take twice the
    time.
    """
    rough = linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    if rough.dtype in (torch.float32, torch.float64):
        return rough
    chosen = rough.topk(min(_CANDIDATES, rough.shape[-1])).indices
    chosen = chosen if wanted is None else torch.cat([chosen, wanted], -1)
    exact = torch.einsum("...d,...kd->...k", hidden.float(), head.weight[chosen].float())
    if head.bias is not None:
        exact = exact + head.bias[chosen].float()
    return rough.float().scatter_(-1, chosen, exact)


@contextmanager
def _replaced(head: nn.Linear, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While this lasts, the layer is another function."""
    own = vars(head).get("forward")  # None where it is its class's
    head.forward = function  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own  # type: ignore[method-assign]


@contextmanager
def _float32_head(head: nn.Linear | None) -> Iterator[None]:
    """While this lasts, a network gives its logits in float32."""
    if head is None:
        yield
        return
    with _replaced(head, lambda hidden: exact_logits(hidden, head)):
        yield
