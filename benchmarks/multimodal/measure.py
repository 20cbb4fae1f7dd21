"""What a model answers: right where the first token it would write is that of the right answer."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from benchmarks.multimodal.data import NEW_TASK, OLD_TASK, TASKS, Item
from benchmarks.multimodal.model import encode
from benchmarks.real.measure import TaskScores, h_score

BATCH = 50  # questions at a time


@dataclass(frozen=True)
class Batch:
    """Questions of one length, so that nothing is padded: their inputs, answers' first tokens (B,) and places (B,)."""

    inputs: dict[str, torch.Tensor]
    wanted: torch.Tensor
    places: list[int]


def held_out(
    items: dict[str, dict[str, list[Item]]], processor: ProcessorMixin, counts: dict[str, int]
) -> dict[str, dict[str, list[Batch]]]:
    """Return part -> task -> questions, for each part of `counts` in its order."""
    return {part: {task: batches(items[task][part], processor) for task in TASKS} for part in counts}


def batches(items: list[Item], processor: ProcessorMixin) -> list[Batch]:
    """Encode questions without their answers, those of one length together."""
    answers = {item.response: int(processor.tokenizer(item.response)["input_ids"][0]) for item in items}
    if len(set(answers.values())) < len(answers):
        raise SystemExit(f"two answers begin with the same token: {answers}")
    by_length = defaultdict(list)
    for place, item in enumerate(items):
        by_length[len(processor.tokenizer(item.prompt)["input_ids"])].append(place)
    made = []
    for places in by_length.values():
        for start in range(0, len(places), BATCH):
            chosen = places[start : start + BATCH]
            inputs = encode(processor, [items[i] for i in chosen], answered=False)
            made.append(Batch(inputs, torch.tensor([answers[items[i].response] for i in chosen]), chosen))
    return made


@torch.inference_mode()
def score_answers(model: PreTrainedModel, questions: list[Batch]) -> dict[str, Any]:
    """Let a model answer questions greedily; the shape of the result is that of benchmarks.real.

    Of the answers the first token is enough: no two right answers of a task share it. The passes run in bfloat16,
    the logits are worked out in float32, because in bfloat16 the best of them often tie.
    """
    correct = [0] * sum(len(batch.places) for batch in questions)
    loss = 0.0
    for batch in questions:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(**batch.inputs).last_hidden_state[:, -1]  # (B, D)
        logits = model.lm_head(hidden.float())  # (B, V)
        loss += float((logits.logsumexp(1) - logits.gather(1, batch.wanted[:, None])[:, 0]).sum())
        for place, right in zip(batch.places, (logits.argmax(1) == batch.wanted).tolist(), strict=True):
            correct[place] = int(right)
    count = len(correct)
    return {"accuracy": 100 * sum(correct) / count, "loss": loss / count, "correct": correct, "tokens": 1}


def figures(scores: TaskScores) -> dict[str, tuple[float, float]]:
    """Return old, new, their average and H, each in percent with its standard error over the questions."""
    old, new = (scores[task]["accuracy"] for task in (OLD_TASK, NEW_TASK))
    old_error, new_error = (standard_error(scores[task]) for task in (OLD_TASK, NEW_TASK))
    total = max(old + new, 1e-9)
    # H is 2ab/(a + b); its derivatives are 2b²/(a + b)² by a and 2a²/(a + b)² by b.
    h_error = math.hypot(2 * new**2 / total**2 * old_error, 2 * old**2 / total**2 * new_error)
    return {
        "old": (old, old_error),
        "new": (new, new_error),
        "average": ((old + new) / 2, math.hypot(old_error, new_error) / 2),
        "h": (h_score(old, new), h_error),
    }


def standard_error(of_task: dict[str, Any]) -> float:
    """Return the standard error of an accuracy in percent."""
    share = of_task["accuracy"] / 100
    return 100 * math.sqrt(share * (1 - share) / len(of_task["correct"]))
