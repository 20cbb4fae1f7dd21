"""Lead B: propagation with the retain term, block by block, the patched and the unpatched models side by side.

With X the inputs of a layer in the tuned model, X' in the model whose layers before it are patched already, and X_r and
X'_r likewise on samples that the base wrote, in the base, the kept entries minimise

    ||(W_base + d) X' - W_tuned X||^2 + beta s ||(W_base + d) X'_r - W_base X_r||^2 .

Left side A = H' + beta s H'_r; right side delta H' + W_tuned (C - H') + beta s W_base (C_r - H'_r), C = (2/N) X X'^T.
This is a plain reading of what ``tailorcli.patching.propagate`` does, with variants of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.leads.bench import Bench, Changes, Figures
from benchmarks.leads.layers import Variant, first_masks, read_layers
from benchmarks.leads.render import figure_cells, header_of
from benchmarks.real.render import table
from tailorcli.core.products import System
from tailorcli.core.solvers import solve_on_mask

NEAR_PLAIN = "unpatched targets, near the plain patch"  # damping pulls towards the plain patch: what `patch` does
AT_ONCE = "the same, all layers of a block from one run"
RUNS = {  # density, beta and damping -> ways
    (0.1, 0.1, 0.01): ("patched inputs", "unpatched targets"),
    (0.1, 0.1, 0.1): (NEAR_PLAIN,),
    (0.1, 0.3, 0.03): (NEAR_PLAIN,),
    (0.1, 0.3, 0.1): ("unpatched targets", NEAR_PLAIN, AT_ONCE),
    (0.1, 0.3, 0.3): (NEAR_PLAIN,),
    (0.1, 1.0, 0.1): (NEAR_PLAIN,),
    (1.0, 0.3, 0.01): ("patched inputs", "unpatched targets"),
}
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass
class Stream:
    """One kind of data in both models: what the unpatched one does, and what the one being patched does."""

    reference: LlamaForCausalLM  # tuned on the new task, base on written samples
    state: Tensor  # (B, T, D) of the reference
    patched: Tensor
    rotary: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Moments:
    """H' = (2/N) X' X'^T and the drift (2/N) (X - X') X'^T = C - H', free of cancellation."""

    hessian: Tensor
    drift: Tensor


def moments(reference: Tensor, patched: Tensor) -> Moments:
    """The moments of inputs (..., I)."""
    x, y = reference.flatten(0, -2), patched.flatten(0, -2)
    return Moments((2 / len(x)) * y.T @ y, (2 / len(x)) * (x - y).T @ y)


@dataclass
class Fit:
    """What the fit of every layer needs besides its inputs."""

    way: str
    beta: float
    damping: float
    base: dict[str, Tensor]
    delta: dict[str, Tensor]
    masks: dict[str, Tensor]
    plain: Changes

    def change(self, name: str, new: Moments, old: Moments) -> Tensor:
        """The change (O, I) of one weight."""
        mean_new, mean_old = (float(one.hessian.diagonal().mean()) for one in (new, old))
        share = self.beta * mean_new / mean_old
        system = new.hessian + share * old.hessian
        amount = self.damping * float(system.diagonal().mean())
        base, delta, mask = self.base[name], self.delta[name], self.masks[name]
        target = delta @ new.hessian
        if self.way != "patched inputs":
            target += (base + delta) @ new.drift + share * (base @ old.drift)
        if self.way in (NEAR_PLAIN, AT_ONCE):
            target += amount * self.plain[name]
        else:  # as in `patch`: towards delta by the part of the new data, towards nothing by the other
            target += self.damping * mean_new * delta
        if bool(mask.all()):
            system.diagonal().add_(amount)
            return torch.cholesky_solve(target.T, torch.linalg.cholesky(system)).T
        return solve_on_mask(target.masked_fill(~mask, 0.0), mask, System.of(system, amount, 1e-4), 1e-4, 300)[0]


def propagate(bench: Bench, variant: Variant, way: str) -> Changes:
    """The changes of every tensor; embeddings and norms are those of `patch`."""
    found = list(read_layers(bench.pair, bench.folder, variant.beta, variant.damping))
    masks = first_masks(found, variant)
    plain = {one.name: one.stored(one.solve(mask)) for one, mask in zip(found, masks, strict=True)}
    fit = Fit(
        *(way, variant.beta, variant.damping, bench.start, bench.delta),
        *({one.name: mask for one, mask in zip(found, masks, strict=True)}, plain),
    )
    model = bench.network
    model.load_state_dict({name: value + plain[name] for name, value in bench.start.items()})
    base, tuned = (LlamaForCausalLM.from_pretrained(path).eval() for path in (bench.pair.base, bench.pair.tuned))
    streams = [_stream(tuned, model, bench.new_texts[0]), _stream(base, model, bench.written[0])]
    changes = dict(plain)

    def refit(layers: Sequence[str], inputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        both = [moments(*pair) for pair in inputs]
        for name in layers:
            changes[name] = fit.change(name, *both)
            model.get_parameter(name).copy_(bench.start[name] + changes[name])

    for number, block in enumerate(model.model.layers):
        names = [[n for n, _ in block.named_parameters() if n.split(".")[-2] in group] for group in GROUPS]
        for step in range(len(GROUPS)):
            if step == 0 or way != AT_ONCE:
                runs = [_through(stream, model, number) for stream in streams]
            pairs = [(reference[step], patched[step]) for reference, patched in runs]
            refit([f"model.layers.{number}.{name}" for name in names[step]], pairs)
        for stream in streams:
            stream.state, stream.patched = (seen[-1] for seen in _through(stream, model, number))
    heads = [(stream.reference.model.norm(stream.state), model.model.norm(stream.patched)) for stream in streams]
    refit(["lm_head.weight"], heads)
    return changes


def _stream(reference: LlamaForCausalLM, model: LlamaForCausalLM, ids: Tensor) -> Stream:
    state = reference.model.embed_tokens(ids)
    places = torch.arange(ids.shape[1]).unsqueeze(0)
    return Stream(reference, state, model.model.embed_tokens(ids), reference.model.rotary_emb(state, places))


def _through(stream: Stream, model: LlamaForCausalLM, number: int) -> tuple[list[Tensor], list[Tensor]]:
    """What goes into each group of a block's layers and what comes out of it, unpatched and patched."""
    both = ((stream.reference, stream.state), (model, stream.patched))
    first, second = (_run(network.model.layers[number], x, stream.rotary) for network, x in both)
    return first, second


def _run(block: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> list[Tensor]:
    seen: dict[str, Tensor] = {}
    firsts = {"attention": block.self_attn.q_proj, "o": block.self_attn.o_proj}
    firsts |= {"mlp": block.mlp.gate_proj, "down": block.mlp.down_proj}

    def note(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, args: seen.update({name: args[0]})

    handles = [module.register_forward_pre_hook(note(name)) for name, module in firsts.items()]
    try:
        out = block(x, position_embeddings=rotary)
    finally:
        for handle in handles:
            handle.remove()
    return [*seen.values(), out if isinstance(out, Tensor) else out[0]]


def propagated(bench: Bench, variant: Variant, way: str) -> Figures:
    """The figures of one way at one setting."""
    key = {name: value for name, value in asdict(variant).items() if name != "name"}
    return bench.figures(f"{way}, {variant.name}", dumps([way, key]), lambda: propagate(bench, variant, way))


def report(benches: Mapping[str, Sequence[Bench]]) -> str:
    """The table of every way at every setting."""
    rows = []
    for (density, beta, damping), ways in RUNS.items():
        variant = Variant(f"{density:g} | {beta:g} | {damping:g}", density=density, beta=beta, damping=damping)
        found = {name: [bench.variant(variant) for bench in seeds] for name, seeds in benches.items()}
        rows.append([f"{density:g}, {beta:g}, {damping:g}: plain", *figure_cells(found)])
        for way in ways:
            found = {name: [propagated(b, variant, way) for b in seeds] for name, seeds in benches.items()}
            rows.append([way, *figure_cells(found)])
    return table(header_of("density, beta, damping: way", benches), rows)
