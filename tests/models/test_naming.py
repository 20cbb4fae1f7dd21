"""Base and tuned under different names: what transformers loads whole is one pair, and its patch is the same."""

import json
import shutil

import pytest
import torch
import transformers
from families import make_family_pair
from helpers import make_model, make_pair, make_tokenizer, perturb, randomize, read_tensors, refused, run, write_data
from safetensors.torch import load_file, save_file

CHOSEN = ["--method", "magnitude", "--density", 1]


def rewrite(folder, change):
    """Store a single-file checkpoint anew with its tensors as ``change`` makes them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def added(**more):
    return lambda tensors: tensors | {name.replace("/", "."): value for name, value in more.items()}


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=100, max_position_embeddings=64, **sizes))


def pair_of(folder, make):
    make().save_pretrained(folder / "base")
    perturb(make()).save_pretrained(folder / "tuned")
    for name in ("base", "tuned"):
        make_tokenizer().save_pretrained(folder / name)
    write_data(folder / "data.jsonl")
    return folder


MASK = torch.ones(64, 64).tril().view(1, 1, 64, 64)
SPELLINGS = {
    "rotary frequencies": ("llama", added(**{"model/layers/0/self_attn/rotary_emb/inv_freq": torch.ones(4)})),
    "heads for further tokens": (
        "llama",
        added(**{"mtp/fc/weight": torch.ones(32, 64), "mtp/norm/weight": torch.ones(9)}),
    ),
    "compiled": ("llama", lambda t: {f"_orig_mod.{name}": value for name, value in t.items()}),
    "compiled inside": ("llama", renamed("model.layers", "model._orig_mod.layers")),
    "in parallel": ("llama", lambda t: {f"module.{name}": value for name, value in t.items()}),
    "attention masks": ("gpt2", added(**{"transformer/h/1/attn/bias": MASK})),
    "no prefix": ("gpt2", renamed("transformer.", "")),
    "position ids": ("bert", added(**{"bert/embeddings/position_ids": torch.arange(64)[None]})),
    "gamma": (
        "bert",
        lambda t: renamed("LayerNorm.bias", "LayerNorm.beta")(renamed("LayerNorm.weight", "LayerNorm.gamma")(t)),
    ),
}


@pytest.mark.parametrize("where", ["base", "tuned"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_and_what_only_one_holds_give_the_same_patch(tmp_path, spelling, where):
    kind, change = SPELLINGS[spelling]
    folder = pair_of(tmp_path, bert if kind == "bert" else lambda: make_model(kind))
    expected = read_tensors(folder / "tuned")
    rewrite(folder / where, change)
    if spelling == "heads for further tokens" and where == "tuned":  # which the output could not hold
        refused("patch", folder / "base", folder / "tuned", *CHOSEN, "-o", folder / "out", mentions=["only in tuned"])
        return
    run("patch", folder / "base", folder / "tuned", *CHOSEN, "-o", folder / "out")
    out, base = read_tensors(folder / "out"), read_tensors(folder / "base")
    assert out.keys() == base.keys()  # the output has the base's names, whatever tuned's are
    changed = change(expected) if where == "base" else expected
    assert all(torch.equal(value, changed[name]) for name, value in out.items())
    moved = sum(not torch.equal(value, base[name]) for name, value in out.items())
    assert moved == len(expected)


@pytest.mark.parametrize(
    ("blockwise", "wrapper"),
    [
        ("never", "_orig_mod."),
        ("always", "module."),
        ("never", "_fsdp_wrapped_module."),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in (("always", "_orig_mod."), ("never", "module."), ("always", "_fsdp_wrapped_module."))
        ),
    ],
)
def test_statistics_of_a_wrapped_model_are_those_of_the_model(tmp_path, wrapper, blockwise):
    folder = make_pair(tmp_path)
    how = ["--data", folder / "data.jsonl", "--blockwise", blockwise]
    run("calibrate", folder / "tuned", *how, "-o", folder / "stats")
    run("patch", folder / "base", folder / "tuned", "--stats", folder / "stats", "-o", folder / "out")
    rewrite(folder / "tuned", lambda t: {f"{wrapper}{name}": value for name, value in t.items()})
    run("calibrate", folder / "tuned", *how, "-o", folder / "again")
    expected, found = read_tensors(folder / "stats"), read_tensors(folder / "again")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    run("patch", folder / "base", folder / "tuned", "--stats", folder / "again", "-o", folder / "other")
    assert (folder / "out/model.safetensors").read_bytes() == (folder / "other/model.safetensors").read_bytes()


@pytest.mark.parametrize("count", [1, 2])
def test_shards_that_have_lost_their_index_are_a_checkpoint_where_none_is_missing(tmp_path, count):
    folder = make_pair(tmp_path)
    tensors = read_tensors(folder / "tuned")
    (folder / "tuned/model.safetensors").unlink()
    for number, names in enumerate([sorted(tensors)[i::count] for i in range(count)], 1):
        shard = folder / f"tuned/model-{number:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in names}, shard, {"format": "pt"})
    run("calibrate", folder / "tuned", "--data", folder / "data.jsonl", "-o", folder / "stats")
    run("patch", folder / "base", folder / "tuned", *CHOSEN, "-o", folder / "out")
    assert all(torch.equal(value, tensors[name]) for name, value in read_tensors(folder / "out").items())
    if count == 2:
        shard.unlink()
        refused("patch", folder / "base", folder / "tuned", *CHOSEN, "-o", folder / "more", mentions=["neither"])


def loaded_layout(folder):
    """Store a model under the names that it has in memory, as a trainer does that saves its state dict."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    state = getattr(transformers, name).from_pretrained(folder).state_dict()
    save_file({n: value.clone() for n, value in state.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2.5-vl", marks=pytest.mark.slow)])
def test_a_model_that_sees_in_the_loaded_model_s_names_gives_the_same_patch(tmp_path, family):
    folder = make_family_pair(tmp_path, family)
    shutil.copytree(folder / "tuned", folder / "loaded")
    loaded_layout(folder / "loaded")
    assert read_tensors(folder / "loaded").keys() != read_tensors(folder / "base").keys()
    how = ["--data", folder / "data.jsonl", "--num-samples", 6]
    run("calibrate", folder / "base", *how, "-o", folder / "retained")
    for name in ("tuned", "loaded"):
        run("calibrate", folder / name, *how, "-o", folder / f"stats-{name}")
        given = ["--stats", folder / f"stats-{name}", "--retain", folder / "retained"]
        run("patch", folder / "base", folder / name, *given, "-o", folder / f"out-{name}")
    expected, found = read_tensors(folder / "out-tuned"), read_tensors(folder / "out-loaded")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    run("score", folder / "base", folder / "loaded", "--stats", folder / "stats-loaded")


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_an_adapter_on_a_model_that_sees_is_what_peft_merges(tmp_path, family):
    from peft import LoraConfig, get_peft_model

    folder = make_family_pair(tmp_path, family)
    name = json.loads((folder / "base/config.json").read_text())["architectures"][0]
    network = getattr(transformers, name).from_pretrained(folder / "base")
    targets = r".*language_model.*(q_proj|down_proj)"
    adapted = get_peft_model(network, LoraConfig(r=4, target_modules=targets))
    randomize(adapted)
    adapted.save_pretrained(folder / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    given = [folder / "adapter", "--base", folder / "base", "--data", folder / "data.jsonl"]
    run("calibrate", *given, "-o", folder / "stats")
    run("patch", folder / "base", folder / "adapter", *CHOSEN, "-o", folder / "out")
    found = getattr(transformers, name).from_pretrained(folder / "out").state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    before = getattr(transformers, name).from_pretrained(folder / "base").state_dict()
    moved = [key for key, value in found.items() if not torch.equal(value, before[key])]
    assert moved
    assert all("language_model" in key and ("q_proj" in key or "down_proj" in key) for key in moved)


def test_what_the_model_needs_may_not_be_missing_and_the_hint_names_the_cause(tmp_path):
    folder = make_pair(tmp_path)
    whole = read_tensors(folder / "tuned")
    how = ["patch", folder / "base", folder / "tuned", *CHOSEN, "-o", folder / "out"]
    norm, key = "model.norm.weight", "model.layers.0.self_attn.q_proj"
    rewrite(folder / "tuned", lambda t: {f"module.{n}": v for n, v in t.items() if n != norm})
    refused(*how, mentions=["different tensors", norm])
    rewrite(folder / "tuned", lambda _: {n: torch.zeros(0) for n in whole})
    assert "ZeRO-3" in refused(*how, mentions=["has shape"])
    shown = refused("calibrate", folder / "tuned", "--data", folder / "data.jsonl", "-o", folder / "stats")
    assert "ZeRO-3" in shown
    lora = {f"{key}.lora_A.default.weight": torch.ones(4, 32), f"{key}.base_layer.weight": whole[f"{key}.weight"]}
    rewrite(folder / "tuned", lambda _: {n: v for n, v in whole.items() if n != f"{key}.weight"} | lora)
    assert "merge_and_unload" in refused(*how, mentions=["different tensors"])


def test_the_same_weights_under_other_names_are_no_fine_tune(tmp_path):
    folder = make_pair(tmp_path)
    shutil.copy(folder / "base/model.safetensors", folder / "tuned")
    rewrite(folder / "tuned", lambda t: {f"module.{name}": value for name, value in t.items()})
    refused("patch", folder / "base", folder / "tuned", *CHOSEN, "-o", folder / "out", mentions=["identical"])
