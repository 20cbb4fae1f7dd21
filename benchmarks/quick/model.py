"""The pairs: a byte-level Llama that learns the old tasks, and a fine-tune of it for each new task, for each seed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.quick.data import NEW_TASKS, OLD_TASKS, WINDOW
from benchmarks.real.model import Recipe, descend, save_checkpoint
from tailorcli.demo.text import PAD, TaskText, build_tokenizer, encode
from tailorcli.device import resolve_device

HIDDEN, INTERMEDIATE, LAYERS, HEADS = 256, 688, 4, 8
BASE = Recipe(steps=700, batch=16, learning_rate=2e-3, warmup=20)
TUNED = Recipe(steps=200, batch=16, learning_rate=1e-3, warmup=10)


def build_network() -> PreTrainedModel:
    """Return a Llama over bytes of some 3 million parameters, freshly initialised."""
    config = LlamaConfig(
        vocab_size=PAD + 1,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=WINDOW,
        initializer_range=0.1,  # the usual 0.02 suits wide models; here it learns far more slowly
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    network: PreTrainedModel = LlamaForCausalLM(config)
    return network


def make_base(tasks: dict[str, TaskText], seed: int, folder: Path) -> Path:
    """Train a network on the old tasks, unless it is there; return its folder."""
    if not folder.exists():
        torch.manual_seed(seed)
        train(build_network(), [tasks[name].train for name in OLD_TASKS], BASE, seed, folder)
    return folder


def make_tuned(base: Path, tasks: dict[str, TaskText], new_task: str, seed: int, folder: Path) -> Path:
    """Fine-tune every parameter of ``base`` on a new task, unless that is done; return the folder."""
    if not folder.exists():
        train(LlamaForCausalLM.from_pretrained(base), [tasks[new_task].train], TUNED, seed, folder)
    return folder


def train(network: PreTrainedModel, texts: list[str], recipe: Recipe, seed: int, folder: Path) -> None:
    """Train on random windows of ``texts``, an equal share of every batch from each, and save."""
    device = resolve_device("auto")  # what is drawn is drawn on the CPU, so it is the same on both
    network = network.to(device)
    generator = torch.Generator().manual_seed(seed)
    streams = [encode([text])[0] for text in texts]
    offsets = torch.arange(WINDOW + 1)

    def loss_of(chosen: list[int]) -> torch.Tensor:
        share = len(chosen) // len(streams)
        starts = [torch.randint(len(stream) - WINDOW - 1, (share, 1), generator=generator) for stream in streams]
        batch = torch.cat([stream[start + offsets] for stream, start in zip(streams, starts, strict=True)])  # (B, T+1)
        batch = batch.to(device)
        logits = network(input_ids=batch[:, :-1], use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    descend(network.train(), loss_of, recipe.batch, recipe)
    save_checkpoint(network.eval().cpu(), build_tokenizer(), folder)


def make_pairs(tasks: dict[str, TaskText], seed: int, folder: Path) -> dict[str, Path]:
    """Make a seed's models in ``folder``; return them by name: ``base`` and the new tasks."""
    base = make_base(tasks, seed, folder / "base")
    return {"base": base} | {name: make_tuned(base, tasks, name, seed, folder / name) for name in NEW_TASKS}
