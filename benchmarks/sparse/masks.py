"""SPIDER's Table 3: fine-tuning with another mask in the place of SPIDER's, all else the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tailorcli.core.scores import count_kept, select_mask
from tailorcli.core.spider import pulled_back
from tailorcli.training.shards import local
from tailorcli.training.sparse import SparseTuning

SHARE = 0.5  # of each tensor's entries, as in the paper's table
Rule = Callable[[str, Tensor, Tensor], Tensor]


def smallest_weights(_: str, base: Tensor, __: Tensor) -> Tensor:
    """The half of a tensor's entries with the smallest pre-trained weights, bool."""
    return select_mask(-base.abs().float(), count_kept(SHARE, base.numel()))


def largest_gradients(_: str, __: Tensor, gradient: Tensor) -> Tensor:
    """The half of a tensor's entries with the largest accumulated gradients, bool."""
    return select_mask(gradient.abs(), count_kept(SHARE, gradient.numel()))


def at_random(name: str, base: Tensor, _: Tensor) -> Tensor:
    """Half of a tensor's entries, drawn once for each tensor, bool."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return select_mask(torch.rand(base.shape, generator=generator), count_kept(SHARE, base.numel()))


RULES: dict[str, Rule] = {"magnitude": smallest_weights, "gradient": largest_gradients, "random": at_random}


@contextmanager
def masked_by(rule: Rule) -> Iterator[None]:
    """While it lasts the method "spider" moves the entries of this mask, and no others."""

    def pull_back(self: Any, name: str, parameter: Tensor) -> None:
        values, base = local(parameter), self._held[name]
        mask = rule(name, base.cpu(), self._sofar[name].cpu()).to(values.device)
        values.copy_(pulled_back(values, base, mask.float()))

    with patch.object(SparseTuning, "_pull_back", pull_back):
        yield
