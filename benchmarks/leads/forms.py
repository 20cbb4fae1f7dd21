"""Other forms of what is trained: block by block, and matrices of low rank in place of kept entries."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.leads.runs import NEW, RETAINED, Ground, Run, of_blocks
from tailorcli.core.distillation import adam_step_, rate_at, root_mean_square
from tailorcli.training.distill import WARMUP
from tailorcli.training.entries import Trained


def train_blocks(ground: Ground, run: Run) -> Any:
    """The patched network, whose blocks were trained one after another, each for the steps of the run.

    A block's outputs go towards the teacher's, both kinds in units of how far fine-tuning moved them; what follows the
    last block is trained on the answers.
    """
    whole = ground.student(run)
    network, layers = whole.network, ground.teachers[NEW].config.num_hidden_layers
    whole.close()
    moved = _moved(ground, run)
    warmup = max(1, round(WARMUP * run.steps))
    weight = float(run.weight)
    for number, entries in enumerate(of_blocks(whole, layers)):
        trained = Trained(network, entries)
        for step in range(run.steps):
            for kind, share in ((NEW, 1.0), (RETAINED, weight)):
                places = ground.batch(run, step)
                if number == layers:
                    value = ground.loss(network, run, kind, places).mean()
                else:
                    ids = ground.tokens(run, kind, places)
                    with torch.no_grad():
                        taught = _outputs(ground.teachers[kind], ids, number)
                    value = (_outputs(network, ids, number) - taught).square().mean() / moved[kind][number]
                torch.autograd.backward(share * value)
            trained.step(step + 1, run.rate * rate_at(step + 1, run.steps, warmup))
        trained.close()
    return network


def _outputs(network: Any, ids: Tensor, number: int) -> Tensor:
    """What block ``number`` gives, (B, T, I); of the last block after the final norm."""
    states: Tensor = network.model(input_ids=ids, output_hidden_states=True).hidden_states[number + 1]
    return states


def _moved(ground: Ground, run: Run) -> dict[str, list[float]]:
    """The mean square of how far fine-tuning moved each block's outputs, on the first samples of each kind."""
    found = {}
    with torch.no_grad():
        for kind in (NEW, RETAINED):
            ids = ground.tokens(run, kind, slice(0, run.batch))
            both = [ground.teachers[each].model(input_ids=ids, output_hidden_states=True) for each in (NEW, RETAINED)]
            pairs = zip(both[0].hidden_states[1:], both[1].hidden_states[1:], strict=True)
            found[kind] = [float((one - other).square().mean()) for one, other in pairs]
    return found


def bytes_of_sparse(entries: int, density: float) -> float:
    """The least bytes of a tensor of so many entries at a density: float32 values, and the entropy of their places."""
    places = -sum(p * math.log2(p) for p in (density, 1 - density) if 0 < p < 1)
    return entries * (4 * density + places / 8)


def train_low_rank(ground: Ground, run: Run) -> Any:
    """The base's network plus trained products of two factors, of a patch's bytes, from the best of the dense optimum.

    Vectors are trained whole.
    """
    network = ground.network("base")
    network.requires_grad_(True)
    factors: dict[str, list[Tensor]] = {}
    for layer in ground.layers:
        change = layer.stored(layer.goal)
        if change.dim() < 2:
            factors[layer.name] = [change.clone()]
            continue
        rows, columns = change.shape
        rank = int(bytes_of_sparse(change.numel(), run.density) / (4 * (rows + columns)))
        left, sizes, right = torch.linalg.svd(change, full_matrices=False)
        root = sizes[:rank].sqrt()
        factors[layer.name] = [(left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous()]
    scales = {name: [root_mean_square(each) for each in pair] for name, pair in factors.items()}
    moments = {name: [(torch.zeros_like(each), torch.zeros_like(each)) for each in f] for name, f in factors.items()}
    parameters = dict(network.named_parameters())

    def put() -> None:
        with torch.no_grad():
            for name, pair in factors.items():
                change = pair[0] if len(pair) == 1 else pair[0] @ pair[1]
                parameters[name].copy_(ground.start[name] + change)

    def update(number: int, rate: float) -> None:
        with torch.no_grad():
            for name, pair in factors.items():
                gradient = parameters[name].grad
                parameters[name].grad = None
                found = [gradient] if len(pair) == 1 else [gradient @ pair[1].T, pair[0].T @ gradient]
                for place, each in enumerate(pair):
                    step = rate * scales[name][place]
                    adam_step_(each, found[place], *moments[name][place], number, step)
        put()

    put()
    ground.descend(run, network, update)
    return network


def measured(ground: Ground, run: Run) -> dict[str, float]:
    """Distil, and measure what came out."""
    torch.manual_seed(0)
    if run.form == "low rank":
        network = train_low_rank(ground, run)
    elif run.form == "blocks":
        network = train_blocks(ground, run)
    else:
        trained = ground.student(run)
        ground.descend(run, trained.network, trained.step)
        trained.close()
        network = trained.network
    written = ground.held_out(network, replace(run, retained="written"))
    return {**ground.accuracies(network), "kl_new": written[NEW], "kl_retained": written[RETAINED]}
