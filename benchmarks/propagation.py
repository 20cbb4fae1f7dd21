"""Would it help to calibrate and patch in one pass, each block's inputs coming from the patched blocks before it.

    python -m benchmarks.propagation

On the pair of ``benchmarks.real`` (SmolLM2-135M). For every linear layer, with X its inputs in the tuned model and
X' its inputs where all blocks before it are patched already, three ways to fit the kept entries of one mask:

- plain             minimise ||(W - W_tuned) X||^2: what ``tailorcli patch`` does
- patched inputs    minimise ||(W - W_tuned) X'||^2
- unpatched targets minimise ||W X' - W_tuned X||^2: the layer's outputs in the unpatched model as targets

All other tensors are those of ``tailorcli patch`` at the same density. At density 1 the three are one and the same:
every entry is kept, the blocks before are the tuned ones, X' = X. Writes a table of docs/results/research.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import markdown, say
from benchmarks.real import data, measure, setting
from benchmarks.real.chain import SEQ_LEN, load_cached, patch_step, run_chain, store
from benchmarks.real.render import between
from tailorcli.core.hessian import PreparedHessian, prepare
from tailorcli.core.products import System
from tailorcli.core.scores import count_kept, select_mask
from tailorcli.core.solvers import solve_on_mask
from tailorcli.core.tailor import fused_score
from tailorcli.data.encoder import Encoder
from tailorcli.data.records import read_records
from tailorcli.data.samples import draw_samples, make_batches
from tailorcli.options import CalibrateOptions

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results" / "research.md"
RUNS = [(0.1, way) for way in ("plain", "patched inputs", "unpatched targets")]
RUNS += [(0.3, way) for way in ("plain", "unpatched targets")]
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
DAMPING, OMEGA = 0.01, 0.5  # the defaults of tailorcli patch
SAMPLES = 64  # of the fine-tuning data, half of what benchmarks.real takes: each block runs them four times
WINDOWS = 32  # of test text of each task, half as well


class Products:
    """H = (2/N) X X^T, H' = (2/N) X' X'^T and D = (2/N) (X - X') X'^T of one layer input.

    D is C - H' with C = (2/N) X X'^T, but without the cancellation: a few channels are so large that rounding would
    drown the rest.
    """

    def __init__(self, size: int) -> None:
        self.plain, self.patched, self.drift = (torch.zeros(size, size) for _ in range(3))
        self.tokens = 0

    def add(self, x: Tensor, patched: Tensor) -> None:
        """Fold rows (N, I) of both models' inputs."""
        self.plain.addmm_(x.T, x, alpha=2.0)
        self.patched.addmm_(patched.T, patched, alpha=2.0)
        self.drift.addmm_((x - patched).T, patched, alpha=2.0)
        self.tokens += len(x)

    def mean(self) -> None:
        """Turn the sums into means."""
        for matrix in (self.plain, self.patched, self.drift):
            matrix.div_(self.tokens)


def fit(base: Tensor, tuned: Tensor, products: Products, prepared: PreparedHessian, density: float, way: str) -> Tensor:
    """The patched weight (O, I) of one layer by one of the ways; the mask is that of the tuned model's inputs."""
    delta = tuned - base
    assert prepared.inverse_diagonal is not None
    mask = select_mask(
        fused_score(delta, prepared.inverse_diagonal.unsqueeze(0), OMEGA), count_kept(density, delta.numel())
    )
    hessian = products.plain if way == "plain" else products.patched
    target = delta @ hessian
    if way == "unpatched targets":
        target += tuned @ products.drift
    amount = DAMPING * float(hessian.diagonal().mean())
    target += amount * delta  # damping pulls towards delta, as in the plain way
    change, _, _ = solve_on_mask(target.masked_fill_(~mask, 0.0), mask, System.of(hessian, amount, 1e-4), 1e-4, 300)
    return base + change


def run_block(block: nn.Module, state: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of each group of layers in one call of a block, and the block's output."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in block.named_modules():
        short = name.rpartition(".")[2]
        if any(short == group[0] for group in GROUPS):

            def hook(_: nn.Module, args: tuple[Tensor, ...], short: str = short) -> None:
                seen[short] = args[0].flatten(0, -2)

            handles.append(module.register_forward_pre_hook(hook))
    try:
        output = block(state, position_embeddings=rotary)
    finally:
        for handle in handles:
            handle.remove()
    return seen, output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def propagate(
    base: PreTrainedModel, tuned: PreTrainedModel, model: PreTrainedModel, batches: list[Tensor], **how: Any
) -> None:
    """Fit every linear layer of ``model``, block by block, in place; its other tensors stay as they are."""
    states = [tuned.model.embed_tokens(ids) for ids in batches]
    patched_states = [model.model.embed_tokens(ids) for ids in batches]
    places = [torch.arange(ids.shape[1]).unsqueeze(0) for ids in batches]
    rotaries = [tuned.model.rotary_emb(state, place) for state, place in zip(states, places, strict=True)]
    for number, block in enumerate(tuned.model.layers):
        say(f"  {how['way']}, density {how['density']}: block {number}")
        ours, theirs = model.model.layers[number], base.model.layers[number]
        products: dict[str, Products] = {}
        for name in dict(block.named_modules()):  # within the block the patched stream still sees tuned weights
            if any(name.endswith(layer) for group in GROUPS for layer in group):
                ours.get_submodule(name).weight.copy_(block.get_submodule(name).weight)
        for position, rotary in enumerate(rotaries):
            seen, states[position] = run_block(block, states[position], rotary)
            other, _ = run_block(ours, patched_states[position], rotary)
            for name, x in seen.items():
                products.setdefault(name, Products(x.shape[1])).add(x, other[name])
        for group in GROUPS:
            product = products[group[0]]
            product.mean()
            prepared = prepare(product.plain, DAMPING, sensitivity=True, sequential=False)
            for name, module in ours.named_modules():
                if name.rpartition(".")[2] in group:
                    weights = theirs.get_submodule(name).weight, block.get_submodule(name).weight
                    module.weight.copy_(fit(*weights, product, prepared, **how))
        for position, rotary in enumerate(rotaries):
            _, patched_states[position] = run_block(ours, patched_states[position], rotary)


@torch.no_grad()
def output_error(tuned: PreTrainedModel, model: PreTrainedModel, base: PreTrainedModel, batches: list[Tensor]) -> float:
    """How far the last hidden states are from the tuned model's, relative to the base's distance, squared."""
    near, far = 0.0, 0.0
    for ids in batches:
        wanted = tuned.model(input_ids=ids, use_cache=False).last_hidden_state
        near += float((model.model(input_ids=ids, use_cache=False).last_hidden_state - wanted).square().sum())
        far += float((base.model(input_ids=ids, use_cache=False).last_hidden_state - wanted).square().sum())
    return near / far


def load(folder: Path) -> PreTrainedModel:
    """A checkpoint in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def results(cache: Path, fresh: bool) -> Iterator[dict[str, Any]]:
    """A row for each way and density, kept in the cache."""
    texts = data.load_texts(setting.SEED)
    pair_key = setting.make_pair(cache, texts)
    tokenizer = setting.tokenizer_of(cache / "tuned")
    windows = data.held_out(texts, tokenizer, {"test": WINDOWS})["test"]
    options = CalibrateOptions(num_samples=SAMPLES, seq_len=SEQ_LEN)
    file = cache / "train.jsonl"
    samples = draw_samples(file, read_records(file), Encoder(tokenizer).encode, options)
    batches = [batch["input_ids"] for batch in make_batches(samples.inputs, 8)]
    for density, way in RUNS:
        step = patch_step("joint", str(density), pair_key)
        run_chain(cache, [step], fresh=False)
        stored = cache / "propagation" / f"{way.replace(' ', '-')}-{density}.json"
        stored.parent.mkdir(exist_ok=True)
        key = [pair_key, str(SAMPLES), str(WINDOWS)]
        row = None if fresh else load_cached(stored, key)
        if row is None:
            base, tuned, model = load(cache / "base"), load(cache / "tuned"), load(cache / step.output)
            propagate(base, tuned, model, batches, density=density, way=way)
            error = output_error(tuned, model, base, batches)
            scores = {task: measure.score_windows(model, rows) for task, rows in windows.items()}
            row = {"density": density, "way": way, "output_error": error, **measure.summarise(scores)}
            store(stored, key, row)
        yield row


def main() -> None:
    """Run and write the document."""
    parser = argparse.ArgumentParser(description="Propagation against the plain way, on SmolLM2-135M.")
    options = setting.parse(parser, DOCUMENT)
    rows = list(results(options.cache, options.fresh))
    print(json.dumps(rows, indent=1))
    cells = [
        [f"{row['density']:g}", row["way"], f"{row['output_error']:.3f}"]
        + [f"{row[k]:.2f}" for k in ("old", "new", "h")]
        for row in rows
    ]
    table = markdown(["density", "way", "output error", "old", "new", "H"], cells, text=(0, 1))
    page = between(options.document.read_text(encoding="utf-8"), "propagation-without", table)
    options.document.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
