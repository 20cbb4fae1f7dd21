"""Token accuracy and loss of causal language models on windows of text, and the H-score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.real.chain import load_cached, store
from benchmarks.real.data import NEW_TASK, OLD_TASKS

BATCH = 4  # windows at a time: the logits of one window take 25 MB, and 50 MB in float32
CANDIDATES = 8

# task -> {"accuracy": percent, "loss": nats a token, "correct": right tokens of each window, "tokens": of a window}
TaskScores = dict[str, dict[str, Any]]


@torch.inference_mode()
def score_windows(model: PreTrainedModel, windows: torch.Tensor) -> dict[str, Any]:
    """Predict each next token of token windows, shape (B, W), and compare."""
    head = model.get_output_embeddings().weight  # (V, D)
    correct: list[int] = []
    loss = 0.0
    for batch in torch.split(windows, BATCH):
        hidden = model.base_model(input_ids=batch).last_hidden_state[:, :-1]  # (B, W - 1, D)
        wanted = batch[:, 1:]
        best, losses = predict(hidden.flatten(0, 1), head, wanted.flatten())
        correct += (best.view_as(wanted) == wanted).sum(1).tolist()
        loss += float(losses.sum())
    tokens = windows.shape[1] - 1
    count = tokens * len(windows)
    return {"accuracy": 100 * sum(correct) / count, "loss": loss / count, "correct": correct, "tokens": tokens}


def predict(hidden: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable token and the loss of the wanted one for hidden states (N, D), each (N,).

    In bfloat16 the best logits often tie, so the candidates and the wanted token are computed again in
    float32; all logits in float32 would take twice the time.
    """
    logits = linear(hidden, head)  # (N, V)
    candidates = logits.topk(CANDIDATES).indices
    exact = torch.einsum("nd,nkd->nk", hidden.float(), head[candidates].float())
    best = candidates.gather(1, exact.argmax(1, keepdim=True)).squeeze(1)
    right = (hidden.float() * head[wanted].float()).sum(1)
    return best, logits.float().logsumexp(1) - right


def load_model(folder: Path) -> PreTrainedModel:
    """Load a checkpoint in bfloat16, ready for evaluation."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.eval()
    return model


def interpolate(base: Path, tuned: Path, weight: float) -> PreTrainedModel:
    """Return base + weight * (tuned - base), entry by entry, rounded to bfloat16."""
    model, other = load_model(base), load_model(tuned)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.copy_(torch.lerp(ours.float(), theirs.float(), weight))
    return model


def evaluate(
    make: Callable[[], PreTrainedModel], tasks: dict[str, torch.Tensor], file: Path, key: list[str]
) -> TaskScores:
    """Score one model on every task; kept in `file`, so that a rerun need not load the model."""
    stored: TaskScores | None = load_cached(file, key)
    if stored is not None:
        return stored
    model = make()
    scores = {task: score_windows(model, windows) for task, windows in tasks.items()}
    store(file, key, scores)
    return scores


def h_score(old: float, new: float) -> float:
    """Return the harmonic mean of the old tasks' average and the new task (Eq. 32)."""
    return 2 * old * new / (old + new) if old + new > 0 else 0.0


def summarise(scores: TaskScores) -> dict[str, float]:
    """Return the old tasks' average accuracy, the new task's, and the H-score."""
    old = sum(scores[task]["accuracy"] for task in OLD_TASKS) / len(OLD_TASKS)
    new = scores[NEW_TASK]["accuracy"]
    return {"old": old, "new": new, "h": h_score(old, new)}


def h_difference(first: TaskScores, second: TaskScores, draws: int = 2000) -> tuple[float, float]:
    """Return H(first) - H(second) and its standard error, by a bootstrap over the windows.

    Both models saw the same windows, so each draw takes the same windows for both.
    """
    rng = np.random.default_rng(0)
    tasks = (*OLD_TASKS, NEW_TASK)
    means = np.empty((2, draws, len(tasks)))
    for position, task in enumerate(tasks):
        count = len(first[task]["correct"])
        drawn = rng.integers(0, count, (draws, count))
        for model, scores in enumerate((first, second)):
            share = np.array(scores[task]["correct"]) / scores[task]["tokens"]
            means[model, :, position] = 100 * share[drawn].mean(1)
    old, new = means[:, :, : len(OLD_TASKS)].mean(2), means[:, :, -1]
    h = 2 * old * new / (old + new)
    difference = summarise(first)["h"] - summarise(second)["h"]
    return difference, float((h[0] - h[1]).std())
