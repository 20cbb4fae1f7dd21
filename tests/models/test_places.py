"""Every checkpoint tensor is found in the parameter, and the slice of it, in which transformers put it."""

import pytest
import torch
import transformers
from helpers import make_tokenizer, perturb, run, write_data

from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.core.hessian import unpack_triangle
from tailorcli.models.names import aliases, expected_names
from tailorcli.models.places import map_names

SIZES = {"vocab_size": 100, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 4}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
COUNT = 12  # experts.10 stands before experts.2 in a file


def upcycled(kind):
    """All experts of a layer are copies of one, as they are where a dense model was made into a sparse one."""
    torch.manual_seed(0)
    more = {"Mixtral": {"num_local_experts": COUNT}, "Qwen3Moe": {"num_experts": COUNT, "moe_intermediate_size": 12}}
    more["Qwen2Moe"] = more["Qwen3Moe"] | {"shared_expert_intermediate_size": 12}
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more[kind], num_experts_per_tok=2)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(20)
            for stacked in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                stacked.copy_(stacked[:1].expand_as(stacked).clone())
            if kind == "Qwen2Moe":  # the dense layer is still there, as the shared expert
                gate, up = layer.mlp.experts.gate_up_proj[0].chunk(2)
                layer.mlp.shared_expert.gate_proj.weight.copy_(gate)
                layer.mlp.shared_expert.up_proj.weight.copy_(up)
                layer.mlp.shared_expert.down_proj.weight.copy_(layer.mlp.experts.down_proj[0])
    return model


def routed_inputs(model, samples, expert):
    """What the first layer's experts multiply, for the tokens that are routed to one of them: rows (N, I)."""
    seen = []
    handle = model.model.layers[0].mlp.gate.register_forward_hook(
        lambda module, args, result: seen.append(args[0].reshape(-1, 8)[(result[2] == expert).any(-1)])
    )
    with torch.no_grad():
        for inputs in samples:
            model(**inputs)
    handle.remove()
    return torch.cat(seen)


_SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("Qwen3Moe", "Qwen2Moe")]


@pytest.mark.parametrize("kind", ["Mixtral", *_SLOW])
def test_experts_of_equal_values_have_each_their_own_hessian(tmp_path, kind):
    model, folder = upcycled(kind).eval(), tmp_path / "model"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    write_data(tmp_path / "data.jsonl", 24)
    how = ["--data", tmp_path / "data.jsonl", "--batch-size", 1]
    run("calibrate", folder, *how, "-o", tmp_path / "stats")
    stats = Stats.open(tmp_path / "stats")
    middle = "block_sparse_moe" if kind == "Mixtral" else "mlp"
    first, last = ("w1", "w2") if kind == "Mixtral" else ("gate_proj", "down_proj")
    for expert in range(COUNT):
        entry = stats.tensors[f"model.layers.0.{middle}.experts.{expert}.{first}.weight"]
        assert entry.hessian in (f"model.layers.0.mlp.experts.gate_up_proj[{n}]" for n in (expert, "all"))
        rows = routed_inputs(model, stats.samples(), expert)
        if len(rows) >= 8:
            found = unpack_triangle(stats.load(entry.hessian), 8)
            torch.testing.assert_close(found, 2 / len(rows) * rows.T @ rows, rtol=1e-4, atol=1e-6)
        below = stats.tensors[f"model.layers.1.{middle}.experts.{expert}.{last}.weight"]
        assert below.hessian in (f"model.layers.1.mlp.experts.down_proj[{n}]" for n in (expert, "all"))
    own = {e.hessian for n, e in stats.tensors.items() if "layers.0" in n and n.endswith(f"{first}.weight")}
    assert len(own) >= 4
    if kind == "Qwen2Moe":
        shared = stats.tensors["model.layers.0.mlp.shared_expert.gate_proj.weight"].hessian
        assert "shared_expert" in shared
    run("calibrate", folder, *how, "--blockwise", "always", "-o", tmp_path / "blocks")
    assert {n: e.hessian for n, e in Stats.open(tmp_path / "blocks").tensors.items()} == {
        name: entry.hessian for name, entry in stats.tensors.items()
    }


def test_gate_and_up_of_equal_values_lie_in_the_slices_of_their_expert(tmp_path):
    model = perturb(upcycled("Mixtral"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj.zero_()
    model.save_pretrained(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        parameters = dict(model.named_parameters())
        found = map_names(checkpoint, parameters, aliases(model), expected_names(model, checkpoint.tensors))
        for layer in range(2):
            for expert in range(COUNT):
                for part in ("w1", "w3"):
                    place = found[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"]
                    assert place.parameters == (f"model.layers.{layer}.mlp.experts.gate_up_proj",)
                    assert (place.part, place.transposed) == (expert, False)
