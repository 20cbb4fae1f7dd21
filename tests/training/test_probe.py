"""Model-Dowser's scores: against the exact Jacobian of a tiny model, data-free, and what they cost."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, make_family_pair
from helpers import make_model, make_pair
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tailorcli.errors import OptionsError, OutputError
from tailorcli.models.parts import Parts
from tailorcli.training.gains import reasons_of, scored_layers, scores_of
from tailorcli.training.importance import MANIFEST, SCORES, Importance, ImportanceError
from tailorcli.training.probe import probe_model, probe_network
from tailorcli.training.settings import ProbeOptions

SMALL = ProbeOptions(num_samples=6, rademacher=2, seq_len=12)


def exact_scores(model, batch, module, name):
    """|W| times the mean over tokens of ||J_i||_2 |h_j|, (O, I), by a backward pass for each logit; float64."""
    held = {}

    def take(_, args, output):
        held["h"], held["z"] = args[0].detach()[0], output

    handle = module.register_forward_hook(take)
    logits = model(**batch).logits[0]
    handle.remove()
    rows = torch.eye(logits.numel(), dtype=logits.dtype).view(-1, *logits.shape)
    jacobian = torch.autograd.grad(logits, held["z"], rows, is_grads_batched=True)[0][:, 0]  # (T V, T, O)
    gain = jacobian.norm(dim=0).T @ held["h"].abs() / len(held["h"])
    weight = dict(model.named_parameters())[name].detach().abs()
    return weight * (gain if weight.shape == gain.shape else gain.T)  # Conv1D stores (I, O)


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.1.attn.c_attn")]
)
def test_scores_near_those_of_the_exact_jacobian_as_draws_grow(kind, name):
    model = make_model(kind).double().eval()
    batch = {"input_ids": torch.arange(3, 11).unsqueeze(0)}
    module, weight = model.get_submodule(name), f"{name}.weight"
    exact = exact_scores(model, batch, module, weight)
    ratios, correlations = [], []
    for draws in (2, 256):
        scores, _ = scores_of(model, probe_network(model, [batch], draws, seed=0), draws)
        ratio = scores[weight].double() / exact
        ratios.append(ratio)
        both = torch.stack([scores[weight].double().flatten(), exact.flatten()])
        correlations.append(float(torch.corrcoef(both)[0, 1]))
    assert abs(float(ratios[1].mean()) - math.sqrt(2 / math.pi)) < 0.01  # the L1 form's one factor
    assert float(ratios[1].std()) < 0.3 * float(ratios[0].std())
    assert correlations[1] > max(0.999, correlations[0])


@pytest.mark.slow
def test_the_batch_size_changes_no_more_than_rounding_of_the_products():
    model = make_model()
    rows = [torch.randint(2, 90, (1, 9)) for _ in range(4)]
    one = probe_network(model, [{"input_ids": torch.cat(rows)}], 400, seed=0)
    four = probe_network(model, [{"input_ids": row} for row in rows], 400, seed=1)
    for name, gain in one.items():
        assert gain.tokens == four[name].tokens == 36
        ratio = gain.total / four[name].total
        assert ratio.mean().sub(1).abs() < 0.02
        assert ratio.std() < 0.1
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_probe_needs_no_data_and_says_what_it_scored(tmp_path):
    pair = make_pair(tmp_path)
    report = probe_model(pair / "base", tmp_path / "importance", SMALL)
    assert report.samples == 6
    assert report.tokens == 72
    importance = Importance.open(tmp_path / "importance")
    linear = {name for name, _ in make_model().named_parameters() if "_proj" in name}
    assert set(importance.digests) == linear
    assert set(importance.reasons) == {name for name, _ in make_model().named_parameters()} - linear
    assert report.entries == sum(importance.read(name).numel() for name in linear)
    again = probe_model(pair / "base", tmp_path / "again", SMALL)
    assert again.tokens == report.tokens
    assert (tmp_path / "again" / SCORES).read_bytes() == (tmp_path / "importance" / SCORES).read_bytes()


def test_a_model_in_bfloat16_has_the_scores_of_float32_but_for_rounding(tmp_path):
    pair = make_pair(tmp_path, dtype=torch.bfloat16)
    found = []
    for dtype in ("bfloat16", "float32"):
        options = ProbeOptions(num_samples=8, rademacher=16, seq_len=12, dtype=dtype)
        probe_model(pair / "base", tmp_path / dtype, options, data=pair / "data.jsonl")
        found.append(Importance.open(tmp_path / dtype).read("model.layers.1.mlp.down_proj.weight"))
    assert np.corrcoef(*(score.flatten().log().numpy() for score in found))[0, 1] > 0.95


def test_a_probe_is_not_written_over_what_is_there(tmp_path):
    pair = make_pair(tmp_path)
    probe_model(pair / "base", tmp_path / "importance", SMALL)
    with pytest.raises(OutputError, match="already holds"):
        probe_model(pair / "base", tmp_path / "importance", SMALL)
    (tmp_path / "importance" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="other files"):
        probe_model(pair / "base", tmp_path / "importance", ProbeOptions(overwrite=True))


def test_a_damaged_importance_is_one_error(tmp_path):
    pair = make_pair(tmp_path)
    probe_model(pair / "base", tmp_path / "importance", SMALL)
    manifest = json.loads((tmp_path / "importance" / MANIFEST).read_text())
    for change in ({"format_version": 0}, {"parameters": []}, {"parameters": {"x": "y"}}, {"base": 3}):
        (tmp_path / "importance" / MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(ImportanceError):
            Importance.open(tmp_path / "importance")
    (tmp_path / "importance" / MANIFEST).unlink()
    with pytest.raises(ImportanceError, match="no importance"):
        Importance.open(tmp_path / "importance")


class CountedProducts(TorchDispatchMode):
    """Counts the multiply-adds of matrix products, backward passes included."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.count += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def test_a_probe_takes_at_most_half_as_many_products_again_as_its_passes():
    """Its passes: one forward and eight backward, without the products and without gradients of weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=250, **sizes)).requires_grad_(False)
    batch = {"input_ids": torch.randint(250, (4, 32))}

    def passes():
        leaf = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        logits = model(inputs_embeds=leaf).logits
        for draw in range(8):
            torch.autograd.grad(logits, leaf, torch.ones_like(logits), retain_graph=draw < 7)

    counts = []
    for run in (passes, lambda: probe_network(model, [batch], 8, seed=0)):
        with CountedProducts() as counted:
            run()
        counts.append(counted.count)
    assert counts[0] < counts[1] < 1.5 * counts[0]


@pytest.mark.parametrize(
    "name", ["llava", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "t5", "mixtral"))]
)
def test_block_by_block_the_scores_are_those_of_the_whole(tmp_path, monkeypatch, name):
    """With towers, two stacks, tables of positions and experts; one block at a time has its weights."""
    pair = make_family_pair(tmp_path, name) if name in FAMILIES else make_pair(tmp_path, name)
    found = []
    for how in ("never", "always"):
        if how == "always":
            monkeypatch.setattr("tailorcli.training.probe.load_model", None)
            loaded = watch_blocks(monkeypatch)
        options = ProbeOptions(num_samples=6, rademacher=2, seq_len=12, batch_size=2, blockwise=how)
        report = probe_model(pair / "base", tmp_path / how, options, pair / "data.jsonl")
        found.append((Importance.open(tmp_path / how), report))
    (whole, of_whole), (blocks, of_blocks) = found
    assert of_blocks.tokens == of_whole.tokens
    assert blocks.digests == whole.digests
    assert blocks.reasons == whole.reasons
    for score in whole.digests:
        torch.testing.assert_close(blocks.read(score), whole.read(score), rtol=1e-2, atol=0)  # bfloat16's rounding
    assert max(loaded) == 1


def test_experts_in_one_tensor_have_no_scores_and_the_reason_says_so():
    model = FAMILIES["mixtral"].make()
    scored = scored_layers(model)
    experts = {name for name, value in model.named_parameters() if value.dim() == 3}
    assert experts
    assert not experts & set(scored)
    reasons = reasons_of(model, scored)
    assert all("experts in one tensor" in reasons[name] for name in experts)
    assert not any("expert" in reason for name, reason in reasons.items() if name not in experts)


def test_a_linear_layer_that_gives_no_plain_product_is_not_scored():
    """DeepSeek-V4 uses each part of a weight's rows on other inputs, Llama 4's router gives its choice as well."""

    class Grouped(nn.Linear):
        def forward(self, x):  # (N, 2, 4) -> (N, 2, 3)
            return torch.einsum("ngi,goi->ngo", x, self.weight.view(2, 3, 4))

    class Choosing(nn.Linear):
        def forward(self, x):
            logits = super().forward(x)
            return logits.softmax(-1), logits

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.plain = nn.Embedding(9, 8), nn.Linear(8, 8)
            self.grouped, self.choosing = Grouped(4, 6, bias=False), Choosing(6, 6)

        def forward(self, input_ids):
            hidden = self.plain(self.embed(input_ids)).view(-1, 2, 4)
            return (self.choosing(self.grouped(hidden).flatten(1))[0],)

    torch.manual_seed(0)
    model = Model()
    gains = probe_network(model, [{"input_ids": torch.arange(6).view(1, 6)}], 2, 0)
    scores, reasons = scores_of(model, gains, 2)
    assert set(scores) == {"plain.weight"}
    assert {name for name, reason in reasons.items() if "no plain product" in reason} == {
        "grouped.weight",
        "choosing.weight",
    }


def watch_blocks(monkeypatch):
    """How many blocks had weights after each load."""
    counts, load = [], Parts.load

    def watched(parts, part):
        places = load(parts, part)
        parameters = dict(parts._network.named_parameters())
        full = {b for b in parts._blocks for n in parts._parameters[b] if parameters[n].device.type != "meta"}
        counts.append(len(full))
        return places

    monkeypatch.setattr(Parts, "load", watched)
    return counts


@pytest.mark.slow
def test_block_by_block_a_model_writes_its_samples_whole_where_it_fits(tmp_path):
    pair = make_pair(tmp_path)
    for how in ("never", "always"):
        probe_model(pair / "base", tmp_path / how, replace(SMALL, blockwise=how))
    whole, blocks = (Importance.open(tmp_path / how) for how in ("never", "always"))
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(blocks.read(name), whole.read(name), rtol=1e-2, atol=0)


def test_a_model_that_does_not_fit_is_probed_block_by_block_by_itself(tmp_path, monkeypatch, caplog):
    pair = make_pair(tmp_path)
    monkeypatch.setattr("tailorcli.training.probe_blocks.free_memory", lambda device: 100_000)
    monkeypatch.setattr("tailorcli.training.probe.load_model", None)
    probe_model(pair / "base", tmp_path / "importance", SMALL, pair / "data.jsonl")
    assert "block by block" in caplog.text
    monkeypatch.setattr("tailorcli.device.free_memory", lambda device: 10_000)
    with pytest.raises(OptionsError, match="cannot write samples") as error:
        probe_model(pair / "base", tmp_path / "other", SMALL)
    assert "--data" in error.value.hint
