"""Hessians against a plain float64 reading of the model's own inputs."""

import json

import pytest
import torch
from helpers import make_model, make_pair, make_tokenizer, perturb, read_tensors, run, write_data

from tailorcli import TailorError, calibrate_model
from tailorcli.calibration.stats import Stats
from tailorcli.core import unpack_triangle
from tailorcli.models.layers import find_layers
from tailorcli.options import CalibrateOptions


def load_hessian(stats, tensor):
    entry = stats.tensors[tensor]
    info = stats.hessians[entry.hessian]
    values = stats.load(entry.hessian)
    return unpack_triangle(values, info.size) if info.kind == "full" else values


def plain_inputs(folder, module_name):
    """The inputs of a module over every text of data.jsonl, one sample at a time: no batches, no padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "tuned").eval()
    tokenizer = make_tokenizer()
    seen = []
    model.get_submodule(module_name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for line in (folder / "data.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    return torch.cat([x.reshape(-1, *x.shape[2:]) for x in seen])


def gram(x):
    return 2.0 / x.shape[0] * x.double().T @ x.double()


LLAMA_LINEAR = {
    "model.layers.1.self_attn.k_proj.weight": "model.layers.1.self_attn.k_proj",
    "model.layers.0.self_attn.o_proj.weight": "model.layers.0.self_attn.o_proj",
    "model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.down_proj.weight": "model.layers.1.mlp.down_proj",
    "lm_head.weight": "lm_head",
}


@pytest.mark.parametrize(("tensor", "module"), LLAMA_LINEAR.items())
def test_linear_hessians_are_those_of_the_inputs(llama_pair, tensor, module):
    found = load_hessian(Stats.open(llama_pair / "stats"), tensor).double()
    expected = gram(plain_inputs(llama_pair, module))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_every_way_to_pass_the_same_data_gives_the_same_statistics(llama_pair, tmp_path):
    """A form's record counts as the text that it stands for; the form is told, and the first sample on --verbose."""
    import csv

    texts = [{"text": f"what is {n}?\nit is {n}"} for n in range(9)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in texts))
    with (tmp_path / "d.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([("q", "reply"), *(record["text"].split("\n") for record in texts)])
    plain = run("calibrate", llama_pair / "tuned", "--data", tmp_path / "d.jsonl", "-o", tmp_path / "a")
    columns = ("--prompt-column", "q", "--response-column", "reply")
    table = run("calibrate", llama_pair / "tuned", "--data", tmp_path / "d.csv", *columns, "-o", tmp_path / "b", "-v")
    assert (tmp_path / "a/hessians.safetensors").read_bytes() == (tmp_path / "b/hessians.safetensors").read_bytes()
    facts = [json.loads((tmp_path / name / "manifest.json").read_text())["options"] for name in "ab"]
    assert "columns" not in facts[0]
    assert facts[1]["columns"] == {"prompt": "q", "response": "reply"}
    assert "d.jsonl: 9 records of text; drawn 9, " in plain.stderr
    assert "d.csv: 9 records of columns q and reply; drawn 9, " in table.stderr
    assert "  | w h a t   i s   " in table.stderr  # a token a character
    assert "  | " not in plain.stderr
    both = ("--text-column", "q", *columns)
    run("calibrate", llama_pair / "tuned", "--data", tmp_path / "d.csv", *both, "-o", tmp_path / "c", expect=1)


def test_embedding_norm_and_bias_statistics(llama_pair, gpt2_pair):
    stats = Stats.open(llama_pair / "stats")
    ids = plain_inputs(llama_pair, "model.embed_tokens").reshape(-1)
    counts = torch.bincount(ids, minlength=100)
    torch.testing.assert_close(load_hessian(stats, "model.embed_tokens.weight"), 2.0 * counts / len(ids))
    assert stats.tensors["model.embed_tokens.weight"].transposed
    x = plain_inputs(llama_pair, "model.norm").double()
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = 2.0 * normed.square().mean(0)
    torch.testing.assert_close(load_hessian(stats, "model.norm.weight").double(), expected, rtol=1e-4, atol=1e-5)
    gpt2 = Stats.open(gpt2_pair / "stats")
    x = plain_inputs(gpt2_pair, "transformer.h.1.ln_2").double()
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    found = load_hessian(gpt2, "transformer.h.1.ln_2.weight").double()
    torch.testing.assert_close(found, 2.0 * normed.square().mean(0), rtol=1e-4, atol=1e-5)
    for name in ("transformer.h.0.ln_1.bias", "transformer.h.0.attn.c_attn.bias"):
        assert gpt2.tensors[name].role == "bias"
        assert load_hessian(gpt2, name).tolist() == [2.0]


def test_conv1d_is_recorded_as_transposed(gpt2_pair):
    stats = Stats.open(gpt2_pair / "stats")
    entry = stats.tensors["transformer.h.0.mlp.c_fc.weight"]
    assert entry.transposed
    assert stats.hessians[entry.hessian].size == 32  # the checkpoint stores (32, 128)
    found = load_hessian(stats, "transformer.h.0.mlp.c_fc.weight").double()
    expected = gram(plain_inputs(gpt2_pair, "transformer.h.0.mlp.c_fc"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_positions_are_counted_for_every_sample(gpt2_pair):
    stats = Stats.open(gpt2_pair / "stats")
    tokenizer = make_tokenizer()
    texts = [json.loads(line)["text"] for line in (gpt2_pair / "data.jsonl").read_text().splitlines()]
    lengths = torch.tensor([len(tokenizer(text)["input_ids"]) for text in texts])
    counts = (torch.arange(64).unsqueeze(1) < lengths).sum(1)
    torch.testing.assert_close(load_hessian(stats, "transformer.wpe.weight"), 2.0 * counts / lengths.sum())


def test_equal_inputs_share_a_hessian(llama_pair, gpt2_pair):
    tensors = Stats.open(llama_pair / "stats").tensors
    attention = {tensors[f"model.layers.0.self_attn.{p}_proj.weight"].hessian for p in "qkv"}
    mlp = {tensors[f"model.layers.0.mlp.{p}_proj.weight"].hessian for p in ("gate", "up")}
    assert len(attention) == len(mlp) == 1
    assert attention != mlp
    full = [info for info in Stats.open(llama_pair / "stats").hessians.values() if info.kind == "full"]
    assert len(full) == 2 * 4 + 1  # qkv, o, gate and up, down for each block; the head
    assert all(entry.hessian for entry in Stats.open(gpt2_pair / "stats").tensors.values())


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_the_batch_split_does_not_matter(llama_pair, tmp_path, batch_size):
    """Invariant 4: other batches pad otherwise, the statistics are the same to float32 rounding."""
    options = CalibrateOptions(batch_size=batch_size)
    report = calibrate_model(llama_pair / "tuned", llama_pair / "data.jsonl", tmp_path / "stats", options)
    ours, theirs = Stats.open(tmp_path / "stats"), Stats.open(llama_pair / "stats")
    assert ours.tensors == theirs.tensors
    for name, info in theirs.hessians.items():
        assert ours.hessians[name].tokens == info.tokens == report.tokens
        expected = theirs.load(name)
        torch.testing.assert_close(ours.load(name), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_samples_are_cut_and_drawn_by_seed(llama_pair, tmp_path):
    facts = []
    for seed in (0, 0, 1):
        options = CalibrateOptions(num_samples=5, seq_len=7, seed=seed, overwrite=True)
        report = calibrate_model(llama_pair / "tuned", llama_pair / "data.jsonl", tmp_path / "stats", options)
        assert report.samples == 5
        assert report.tokens <= 35
        facts.append(Stats.open(tmp_path / "stats").fingerprint())
    assert facts[0] == facts[1] != facts[2]


def test_include_and_exclude_leave_the_rest_with_a_reason(llama_pair, tmp_path):
    options = CalibrateOptions(include=("*.mlp.*",), exclude=("*.0.mlp.up*",))
    calibrate_model(llama_pair / "tuned", llama_pair / "data.jsonl", tmp_path / "stats", options)
    tensors = Stats.open(tmp_path / "stats").tensors
    calibrated = {name for name, entry in tensors.items() if entry.hessian}
    assert calibrated == {n for n in tensors if ".mlp." in n and n != "model.layers.0.mlp.up_proj.weight"}
    assert "--include" in tensors["model.norm.weight"].reason


def test_checkpoint_of_the_bare_model_keeps_its_own_names(tmp_path):
    """Saved without the head, its tensors lack the prefix under which the causal model holds them."""
    make_pair(tmp_path, "gpt2", tied=True)
    model = perturb(make_model("gpt2"))
    model.transformer.save_pretrained(tmp_path / "bare")
    make_tokenizer().save_pretrained(tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    assert "h.0.attn.c_attn.weight" in read_tensors(tmp_path / "bare")
    calibrate_model(tmp_path / "bare", tmp_path / "data.jsonl", tmp_path / "bare_stats")
    calibrate_model(tmp_path / "tuned", tmp_path / "data.jsonl", tmp_path / "stats")
    bare, full = Stats.open(tmp_path / "bare_stats"), Stats.open(tmp_path / "stats")
    for name in read_tensors(tmp_path / "bare"):
        assert bare.tensors[name].hessian, bare.tensors[name].reason
        torch.testing.assert_close(load_hessian(bare, name), load_hessian(full, f"transformer.{name}"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_accumulated_in_float32(tmp_path, dtype):
    folder = make_pair(tmp_path, dtype=dtype)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    name = "model.layers.0.mlp.down_proj.weight"
    found = load_hessian(Stats.open(folder / "stats"), name).double()
    expected = gram(plain_inputs(folder, "model.layers.0.mlp.down_proj"))
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=2e-2 * expected.abs().max().item())


def test_calibration_leaves_global_settings_alone(llama_pair, tmp_path):
    from transformers.utils import logging

    torch.set_float32_matmul_precision("medium")
    try:
        bars = logging.is_progress_bar_enabled()
        calibrate_model(llama_pair / "tuned", llama_pair / "data.jsonl", tmp_path / "stats")
        assert torch.get_float32_matmul_precision() == "medium"
        assert logging.is_progress_bar_enabled() == bars
    finally:
        torch.set_float32_matmul_precision("highest")


def test_custom_data_file(llama_pair, tmp_path):
    write_data(tmp_path / "other.jsonl", count=3, seed=9)
    report = calibrate_model(llama_pair / "tuned", tmp_path / "other.jsonl", tmp_path / "stats")
    manifest = Stats.open(tmp_path / "stats").manifest
    assert report.samples == manifest["data"]["samples"] == 3
    assert manifest["data"]["tokens"] == report.tokens
    assert set(manifest["versions"]) == {"tailorcli", "torch", "transformers", "python"}


# --- Other architectures -----------------------------------------------------------------------------------------


def save_tiny(folder, model):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    write_data(folder.parent / "data.jsonl")
    return folder


def test_projections_called_in_another_order_than_they_are_defined(tmp_path):
    """OPT defines k, v, q and calls q first; its table of positions is called with a mask and works them out."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(
        vocab_size=100, word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, **sizes
    )
    model = save_tiny(tmp_path / "model", OPTForCausalLM(config))
    report = calibrate_model(model, tmp_path / "data.jsonl", tmp_path / "stats")
    assert not report.uncalibrated
    stats = Stats.open(tmp_path / "stats")
    positions = stats.load(stats.tensors["model.decoder.embed_positions.weight"].hessian)
    assert positions[:2].tolist() == [0.0, 0.0]  # its positions start at 2, and each sample has a first
    assert positions[2] == positions.max() > 0
    attention = "model.decoder.layers.1.self_attn."
    assert len({stats.tensors[f"{attention}{kind}_proj.weight"].hessian for kind in "kvq"}) == 1
    stats.close()


def test_a_layer_norm_by_another_name_is_calibrated(tmp_path):
    """Cohere's takes the mean off, has no bias, and is no subclass of torch's."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = CohereConfig(vocab_size=100, num_key_value_heads=2, pad_token_id=0, **sizes)
    model = save_tiny(tmp_path / "model", CohereForCausalLM(config))
    assert not calibrate_model(model, tmp_path / "data.jsonl", tmp_path / "stats").uncalibrated
    norm = CohereForCausalLM.from_pretrained(model).model.norm
    seen = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()[0]))
    network = CohereForCausalLM.from_pretrained(model)
    network.model.norm = norm
    for line in (tmp_path / "data.jsonl").read_text().splitlines():
        network(input_ids=torch.tensor([make_tokenizer()(json.loads(line)["text"])["input_ids"]]))
    x = torch.cat(seen)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    found = load_hessian(Stats.open(tmp_path / "stats"), "model.norm.weight").double()
    torch.testing.assert_close(found, 2.0 * x.square().mean(0), rtol=1e-4, atol=1e-5)


def test_an_embedding_that_scales_its_rows_is_calibrated(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3TextConfig(vocab_size=100, num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes)
    model = save_tiny(tmp_path / "model", Gemma3ForCausalLM(config))
    report = calibrate_model(model, tmp_path / "data.jsonl", tmp_path / "stats")
    assert "model.embed_tokens.weight" not in report.uncalibrated


def test_encoder_decoders_are_refused_clearly(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=100, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
    model = save_tiny(tmp_path / "model", T5ForConditionalGeneration(config))
    with pytest.raises(TailorError, match="encoder-decoder"):
        calibrate_model(model, tmp_path / "data.jsonl", tmp_path / "stats")
    assert not (tmp_path / "stats" / "manifest.json").exists()


def test_a_tied_table_is_an_embedding_whichever_of_its_modules_is_defined_first():
    """Jina's output layer is: the table was taken for a linear layer, and had other values in one pass."""
    model = torch.nn.Module()
    model.head, model.table = torch.nn.Linear(4, 9), torch.nn.Embedding(9, 4)
    model.table.weight = model.head.weight
    layer = find_layers(model)["head.weight"]
    assert (layer.role, layer.transposed, layer.size, layer.modules) == ("embedding", True, 9, [model.table])


def test_the_bias_of_a_head_that_is_tied_to_the_embedding_is_calibrated(tmp_path):
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=100, dim=32, n_layers=1, n_heads=4, hidden_dim=48, max_position_embeddings=64)
    model = save_tiny(tmp_path / "model", DistilBertForMaskedLM(config))
    report = calibrate_model(model, tmp_path / "data.jsonl", tmp_path / "stats")
    assert not report.uncalibrated
    assert load_hessian(Stats.open(tmp_path / "stats"), "vocab_projector.bias").tolist() == [2.0]


def seq2seq_model(folder, kind, records, **sizes):
    """A tiny T5-like encoder-decoder with its data."""
    import transformers

    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=100, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **shape, **sizes
    )
    save_tiny(folder / "model", getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_relative_positions_count_for_every_sample(tmp_path):
    """A table of them is looked up once a batch: batches of other sizes must not weigh them otherwise."""
    long = {"prompt": "abc defg hijk lmno pqrst uvw", "response": "xyz"}
    seq2seq_model(tmp_path, "T5", [{"prompt": "abc d", "response": "efg"}] * 5 + [long])
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    found = []
    for size in (1, 5):
        options = CalibrateOptions(batch_size=size, overwrite=True)
        calibrate_model(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "stats", options)
        found.append(load_hessian(Stats.open(tmp_path / "stats"), name))
    torch.testing.assert_close(found[0], found[1])


def test_experts_in_a_list_need_no_token_of_the_trial_run(tmp_path):
    """The trial is one short sample: what it does not reach, others may."""
    records = [{"prompt": 20 * c, "response": 20 * c} for c in "abcdefghijklmnopqrstuvwxyz"]
    experts = {"num_experts": 8, "expert_capacity": 64, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    seq2seq_model(tmp_path, "SwitchTransformers", records, num_decoder_layers=2, **experts)
    left = {}
    for way in ("never", "always"):
        options = CalibrateOptions(blockwise=way)
        report = calibrate_model(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / way, options)
        left[way] = {name for name in report.uncalibrated if ".expert" in name}
    assert left["never"] == left["always"]


@pytest.mark.parametrize(
    ("kind", "sizes", "norm"),
    [
        ("ConvNext", {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1]}, "convnext.embeddings.layernorm"),
        (
            "ResNet",
            {"embedding_size": 16, "hidden_sizes": [16], "depths": [1]},
            "resnet.embedder.embedder.normalization",
        ),
    ],
)
def test_norms_of_other_dimensions_stay_at_base_with_a_reason(tmp_path, kind, sizes, norm):
    """Nor has such a model an embedding that token ids could be too large for."""
    import transformers
    from families import save_vit_processor, write_family_data

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=5)
    getattr(transformers, f"{kind}ForImageClassification")(config).save_pretrained(tmp_path / "model")
    save_vit_processor(tmp_path / "model")
    report = calibrate_model(tmp_path / "model", write_family_data(tmp_path, "vit"), tmp_path / "stats")
    assert "does not normalise the last dimension" in report.uncalibrated[f"{norm}.weight"]


def test_inputs_that_the_model_does_not_take_are_an_error_of_the_data(tmp_path):
    from families import make_family_pair

    folder = make_family_pair(tmp_path, "instructblip")
    (folder / "data.jsonl").write_text('{"text": "no image"}\n')
    with pytest.raises(TailorError, match="the model cannot run on a sample of this data"):
        calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")


def test_cuts_and_too_few_tokens_are_told_of(tmp_path, caplog):
    folder = make_pair(tmp_path)
    (folder / "long.jsonl").write_text(json.dumps({"text": "a" * 30}) + "\n" + json.dumps({"text": "b" * 10}) + "\n")
    given = ["--data", folder / "long.jsonl", "--seq-len", 20, "-o", folder / "stats"]
    run("calibrate", folder / "tuned", *given)
    assert "1 of 2 samples are longer than --seq-len 20 and are cut: 10 of their 30 tokens are left out" in caplog.text
    assert "30 tokens for layers of 48 inputs (9 Hessians): take more data" in caplog.text
    caplog.clear()
    run("patch", folder / "base", folder / "tuned", "--stats", folder / "stats", "-o", folder / "out")
    assert "30 tokens for layers of 48 inputs" in caplog.text
    run("calibrate", folder / "tuned", "--data", folder / "data.jsonl", "-o", folder / "enough")
    caplog.clear()
    run("patch", folder / "base", folder / "tuned", "--stats", folder / "enough", "-o", folder / "more")
    assert caplog.text == ""
