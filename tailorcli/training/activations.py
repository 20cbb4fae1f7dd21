"""What a step holds of a network's activations, and running its blocks twice where that is too much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tailorcli.models.lockstep import find_blocks

MOST_BYTES = 1 << 29  # of a batch's activations that are kept rather than worked out again
CPU_MOST_BYTES = 3 << 26  # there, where they would be most of what training adds to a small model
_EXPERTS = 2  # that a token takes, where the config does not tell


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks that are run as a whole: lists of modules of one class, and what transformers checkpoints."""
    blocks = dict(find_blocks(network))
    for name, module in network.named_modules():
        inside = any(name == block or name.startswith(f"{block}.") for block in blocks)
        if not inside and getattr(type(module), "gradient_checkpointing", None) is False:  # one of transformers' layers
            blocks[name] = module
    return blocks


def kept_bytes(network: Any, tokens: int, size: int) -> tuple[int, int]:
    """About how many bytes backward needs of ``tokens`` tokens: of all blocks together, and of the largest.

    Of every linear layer its inputs and outputs, ``size`` bytes each; what lies between them is about as much again.
    """
    config = network.config.get_text_config()
    experts = int(getattr(config, "num_experts_per_tok", None) or _EXPERTS)

    def held(module: nn.Module) -> int:
        features = 0
        for parameter in module.parameters():
            if parameter.dim() in (2, 3):
                features += sum(parameter.shape[-2:]) * (experts if parameter.dim() == 3 else 1)
        return 2 * features * tokens * size

    blocks = [held(block) for block in blocks_of(network).values()]
    return sum(blocks), max(blocks, default=0)


def kept_limit(*, on_gpu: bool) -> int:
    """Bytes of activations that are kept; blocks of a batch that has more are run twice."""
    return MOST_BYTES if on_gpu else CPU_MOST_BYTES


@contextmanager
def checkpointed(network: nn.Module, tokens: int) -> Iterator[bool]:
    """Within it the blocks' activations are worked out again in backward, where ``tokens`` tokens have too many.

    Whether they do depends on the network alone and not on what is free: a run that is taken up again does the same.
    transformers' own switch works in training mode alone, which turns dropout on; this leaves the mode as it is.
    """
    some = next(network.parameters())
    if kept_bytes(network, tokens, some.element_size())[0] <= kept_limit(on_gpu=some.is_cuda):
        yield False
        return
    blocks = list(blocks_of(network).values())

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    for block in blocks:
        block.forward = again(block.forward)
    try:
        yield True
    finally:
        for block in blocks:
            del block.forward
