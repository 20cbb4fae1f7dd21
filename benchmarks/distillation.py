"""A step of distillation against a plain training step, on a model of random weights with synthetic teachers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import markdown, verdict
from benchmarks.synthetic import LlamaShape
from tailorcli.core.distillation import rate_at
from tailorcli.options import DistillOptions
from tailorcli.training.activations import checkpointed
from tailorcli.training.distill import Material, step_losses
from tailorcli.training.entries import Entries, Trained
from tailorcli.training.teachers import Teacher, logits_of

STEP_RATIO, PEAK_BYTES, STEPS_SECONDS = 1.25, 40e9, 300.0
BATCH, TOKENS = 8, 512
Figures = dict[str, Any]


def random_network(shape: LlamaShape, device: torch.device) -> Any:
    """A Llama of random weights in bfloat16, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def random_entries(network: Any, density: float) -> list[Entries]:
    """A random ``density`` of every parameter."""
    found = []
    for name, parameter in network.named_parameters():
        kept = (torch.rand(parameter.numel(), device=parameter.device) < density).nonzero().squeeze(1)
        values = parameter.detach().reshape(-1)[kept].float()
        found.append(Entries(name, name, kept.int(), values, 1e-3, parameter.dtype))
    return found


def random_material(network: Any, tokens: int, count: int, options: DistillOptions) -> Material:
    """Samples of random tokens, with a teacher whose hidden states are random."""
    config = network.config
    head = network.lm_head.weight.detach().clone()
    samples = [{"input_ids": torch.randint(config.vocab_size, (1, tokens))} for _ in range(count)]
    states = [torch.randn(tokens, config.hidden_size, dtype=head.dtype) for _ in samples]
    return Material.split(samples, Teacher(states, logits_of(network, head, None)), options)


def plain_step(network: Any, batches: list[Tensor]) -> None:
    """Forward and backward of a model that is trained whole, by transformers' own loss and checkpoints; no update."""
    for ids in batches:
        network(input_ids=ids, labels=ids).loss.backward()
    network.zero_grad(set_to_none=True)


def measure(
    shape: LlamaShape,
    device: torch.device,
    density: float,
    tiny: bool,
    timed: Callable[[Callable[[], object], int], float],
    free: Callable[[], None],
    peak: Callable[[], int],
) -> Figures:
    """Seconds of a step of each kind, the most device memory, and one held-out evaluation."""
    batch, tokens, rounds = (2, 32, 3) if tiny else (BATCH, TOKENS, 3)
    options = DistillOptions(batch_size=batch)
    network = random_network(shape, device)
    batches = [torch.randint(shape.vocab, (batch, tokens), device=device) for _ in range(2)]
    network.train()
    prefix = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"
    getattr(network, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    plain = timed(partial(plain_step, network, batches), rounds)
    getattr(network, f"{prefix}_checkpointing_disable")()
    network.eval()
    free()
    trained = Trained(network, random_entries(network, density))
    materials = {kind: random_material(network, tokens, 3 * batch, options) for kind in ("new", "retained")}
    done = iter(range(1 << 30))

    def step() -> None:
        number = next(done)
        step_losses(network, materials, options, device, (), number)
        trained.step(number + 1, options.rate * rate_at(number % 200 + 1, 200, 10))

    with checkpointed(network, batch * tokens):
        free()
        seconds = timed(step, rounds)
        alone = timed(partial(trained.step, 1, 1e-6), rounds)
    return {
        "layers": shape.layers,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "kept": sum(len(entries.values) for entries in trained.entries),
        "tokens": batch * tokens,
        "plain": plain,
        "step": seconds,
        "update": alone,
        "held_out": timed(partial(materials["new"].held_out_loss, network, (), device), 1),
        "peak_bytes": peak(),
    }


def render(found: Figures) -> str:
    """The targets one by one."""
    ratio, peak = found["step"] / found["plain"], found["peak_bytes"]
    rows = [
        ("a plain step: forward, backward", f"{found['plain']:.3f} s", "", ""),
        ("a step of distillation", f"{found['step']:.3f} s", "", ""),
        ("of it the update", f"{found['update']:.3f} s", "", ""),
        ("over the plain step", f"{ratio:.2f}", f"{STEP_RATIO:g}", verdict(ratio <= STEP_RATIO)),
        ("200 steps", f"{200 * found['step']:.0f} s", f"{STEPS_SECONDS:g} s", verdict(found["step"] <= 1.5)),
        ("peak device memory", f"{peak / 1e9:.1f} GB", f"{PEAK_BYTES / 1e9:g} GB", verdict(peak <= PEAK_BYTES)),
    ]
    table = markdown(("distillation, density 0.1, both kinds of samples", "found", "target", ""), rows)
    return (
        f"{table}\n\n{found['layers']} layers, {found['parameters'] / 1e9:.2f}e9 parameters, "
        f"{found['kept'] / 1e9:.3f}e9 kept entries, {found['tokens']:,} tokens of each kind a step"
    )
