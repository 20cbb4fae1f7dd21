"""Token accuracy and loss of causal language models on windows of text, and the H-score."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.real.chain import load_cached, store
from benchmarks.real.data import NEW_TASK, OLD_TASKS
from tailorcli import h_score

BATCH = 4  # windows at a time: the logits of one window take 25 MB, and 50 MB in float32
CANDIDATES = 8
DRAWS = 2000  # of a bootstrap

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


@dataclass(frozen=True)
class Candidate:
    """A model to score: how to make it, and what it is made from, which decides whether scores are still good.

    Of the candidates on one line, only the best on validation text is tested.
    """

    make: Callable[[], PreTrainedModel]
    source: str
    made_by: str = ""
    line: str = ""


def evaluate_all(
    candidates: dict[str, Candidate],
    windows: dict[str, dict[str, Any]],
    counts: dict[str, int],
    folder: Path,
    new_tasks: tuple[str, ...] = (NEW_TASK,),
    fresh: bool = False,
) -> dict[str, dict[str, TaskScores]]:
    """Score all candidates on validation text and those that `contenders` leaves on test text; kept in `folder`.

    `windows` holds part -> task -> token windows, `counts` how many of a task were asked for in each part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, TaskScores]] = {label: {} for label in candidates}
    for part, tasks in windows.items():
        lines = {label: candidate.line for label, candidate in candidates.items()}
        for label in candidates if part == "validation" else contenders(scores, lines, new_tasks):
            print(f"  {label}, {part}", file=sys.stderr, flush=True)
            candidate = candidates[label]
            key = [candidate.source, str(counts[part]), *filter(None, [candidate.made_by])]
            file = folder / f"{label}-{part}.json"
            if fresh:
                file.unlink(missing_ok=True)
            scores[label][part] = evaluate(candidate.make, tasks, file, key)
    return scores


def contenders(
    scores: dict[str, dict[str, TaskScores]], lines: dict[str, str], new_tasks: tuple[str, ...]
) -> list[str]:
    """Return the models to test: of each line only the point with the best H on validation text."""
    best: dict[str, str] = {}
    for label, line in lines.items():
        rival = best.setdefault(line or label, label)
        h, h_rival = (summarise(scores[one]["validation"], new_tasks)["h"] for one in (label, rival))
        if h > h_rival:
            best[line] = label
    return [label for label in scores if label in best.values()]


def evaluate(
    make: Callable[[], PreTrainedModel],
    tasks: dict[str, Any],
    file: Path,
    key: list[str],
) -> TaskScores:
    """Score one model on every task; kept in `file`, so that a rerun need not load the model."""
    stored: TaskScores | None = load_cached(file, key)
    if stored is not None:
        return stored
    model = make()
    scores = {task: score_windows(model, windows) for task, windows in tasks.items()}
    store(file, key, scores)
    return scores


def summarise(scores: TaskScores, new_tasks: tuple[str, ...] = (NEW_TASK,)) -> dict[str, float]:
    """Return the old tasks' average accuracy, the new tasks', and the H-score of the two."""
    old, new = (sum(scores[task]["accuracy"] for task in tasks) / len(tasks) for tasks in (OLD_TASKS, new_tasks))
    return {"old": old, "new": new, "h": h_score(old, new)}


def h_difference(
    first: TaskScores, second: TaskScores, new_tasks: tuple[str, ...] = (NEW_TASK,)
) -> tuple[float, float]:
    """Return H(first) - H(second) and its standard error, by a bootstrap over the windows.

    Both models saw the same windows, so each draw takes the same windows for both.
    """
    rng = np.random.default_rng(0)
    tasks = (*OLD_TASKS, *new_tasks)
    means = np.empty((2, DRAWS, len(tasks)))
    for position, task in enumerate(tasks):
        count = len(first[task]["correct"])
        drawn = rng.integers(0, count, (DRAWS, count))
        for model, scores in enumerate((first, second)):
            share = np.array(scores[task]["correct"]) / scores[task]["tokens"]
            means[model, :, position] = 100 * share[drawn].mean(1)
    old, new = means[:, :, : len(OLD_TASKS)].mean(2), means[:, :, len(OLD_TASKS) :].mean(2)
    h = 2 * old * new / np.maximum(old + new, 1e-9)  # 0 where both are
    difference = summarise(first, new_tasks)["h"] - summarise(second, new_tasks)["h"]
    return difference, float((h[0] - h[1]).std())
