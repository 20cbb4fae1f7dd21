"""``finetune`` on models of many kinds and under many TrainingArguments: what is trained, on what, and by how much."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers as tr
from families import make_family_pair
from helpers import bits, interrupted_when_saved, make_model, make_pair, make_tokenizer, read_tensors, refused, run
from torch import nn

from tailorcli.errors import DataError, OptionsError
from tailorcli.training import SparseTuning
from tailorcli.training import finetune as module
from tailorcli.training.choice import choose
from tailorcli.training.examples import Collate, Prepared
from tailorcli.training.resuming import is_finished
from tailorcli.training.trainer import GuardedTrainer

FEW = ("--steps", 1, "--learning-rate", 1e-2)
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def finetune(folder, out, *more, expect=0):
    return run("finetune", folder / "base", "--data", folder / "data.jsonl", "-o", out, *more, expect=expect)


def plainly(tmp_path):
    """TrainingArguments under which a step is the gradient times the rate."""
    (tmp_path / "plain.yaml").write_text("optim: sgd\nmax_grad_norm: 0\n")
    return ("--training-args", tmp_path / "plain.yaml")


@pytest.mark.parametrize("family", ["bart", "llava", "mixtral"])
def test_a_batch_in_parts_is_the_batch(family, tmp_path):
    """Also where the model takes the number of all tokens and ignores it."""
    pair = make_family_pair(tmp_path, family)
    records = [json.loads(line) for line in (pair / "data.jsonl").read_text().splitlines()][:1] * 4
    (pair / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = json.loads((pair / "base" / "config.json").read_text())
    config |= {name: 0.0 for name in config if name.endswith("dropout")}
    (pair / "base" / "config.json").write_text(json.dumps(config))
    found = {}
    for size, parts in ((4, 1), (1, 4)):
        how = ("--batch-size", size, "--gradient-accumulation", parts, *plainly(tmp_path))
        told = json.loads(finetune(pair, tmp_path / f"{size}", *FEW, *how, "--json").stdout)
        found[size] = (told["losses"][0][1], read_tensors(tmp_path / f"{size}"))
    assert found[1][0] == pytest.approx(found[4][0], rel=2e-3)
    base = read_tensors(pair / "base")
    for name, value in found[4][1].items():
        torch.testing.assert_close(found[1][1][name] - base[name], value - base[name], rtol=0.02, atol=1e-5)


def video_llava():
    vision = tr.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)
    return tr.VideoLlavaForConditionalGeneration(
        tr.VideoLlavaConfig(vision_config=vision, text_config=tr.LlamaConfig(**SMALL, vocab_size=100))
    )


def granite_speech():
    encoder = {"hidden_dim": 16, "num_layers": 5, "num_heads": 2, "input_dim": 16, "output_dim": 10}
    projector = {**SMALL, "encoder_hidden_size": 16, "model_type": "blip_2_qformer"}
    text = tr.GraniteConfig(**SMALL, vocab_size=100).to_dict() | {"model_type": "granite"}
    return tr.GraniteSpeechForConditionalGeneration(
        tr.GraniteSpeechConfig(text_config=text, encoder_config=encoder, projector_config=projector)
    )


@pytest.mark.parametrize(
    ("make", "tower", "connector", "blocks"),
    [
        (video_llava, "model.video_tower", "model.multi_modal_projector", "model.language_model.layers.1."),
        (granite_speech, "model.encoder", "model.projector", "model.language_model.layers.1."),
    ],
)
def test_towers_are_frozen_whatever_they_are_called(make, tower, connector, blocks):
    with torch.device("meta"):
        network = make()
    chosen = choose(network)
    assert not [name for name in chosen if name.startswith(tower)]
    assert [name for name in chosen if name.startswith(connector)]
    assert {name[: len(blocks)] for name in choose(network, last_layers=1)} == {blocks}


def test_what_a_towers_layers_call_a_projection_is_no_connector(tmp_path):
    pair = make_family_pair(tmp_path, "instructblip")
    finetune(pair, tmp_path / "out", *FEW, "--batch-size", 2)
    base, out = read_tensors(pair / "base"), read_tensors(tmp_path / "out")
    moved = [name for name in base if bits(base[name]) != bits(out[name])]
    assert moved
    assert not [name for name in moved if "vision_model" in name]


def test_the_last_blocks_are_the_language_models_own_list():
    config = tr.Zamba2Config(
        vocab_size=100, hidden_size=32, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, n_mamba_heads=2, mamba_ngroups=1,
        use_shared_attention_adapter=False, num_mem_blocks=1, adapter_rank=4,
    )  # fmt: skip
    with torch.device("meta"):
        network = tr.Zamba2ForCausalLM(config)
    chosen = choose(network, last_layers=1)
    assert chosen
    assert all(name.startswith("model.layers.3.") for name in chosen)
    text = tr.BartConfig(
        vocab_size=100, d_model=16, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        network = tr.BartForConditionalGeneration(text)
    assert all("decoder.layers.1." in name for name in choose(network, last_layers=1))


@pytest.mark.parametrize("method", ["spider", "l2"])
@pytest.mark.parametrize("clipped", [True, False])
def test_a_fused_optimiser_with_scaled_gradients_does_the_same(method, clipped):
    """Steps that overflow are skipped, and what is added or accumulated is without the scale."""

    def trained(fused):
        model = make_model()
        tuning = SparseTuning(method, strength=0.5)
        tuning.attach(SimpleNamespace(model=model, add_callback=lambda _: None))
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(own, lr=1e-2, fused=fused)
        where = SimpleNamespace(output_dir="none", process_index=0)
        tuning.on_train_begin(where, SimpleNamespace(global_step=0), None, optimizer=optimizer, model=model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # the first steps overflow
        ids = torch.randint(2, 90, (4, 12), generator=torch.Generator().manual_seed(0))
        for step in range(8):
            scaler.scale(4 * model(input_ids=ids, labels=ids).loss).backward()
            if clipped:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            tuning.on_pre_optimizer_step(None, SimpleNamespace(global_step=step), None)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert all(bool(value.isfinite().all()) for value in tuning._sofar.values())
        return [parameter.detach() for parameter in own]

    for one, other in zip(trained(False), trained(True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_batch_norms_that_are_frozen_stay_as_they_are():
    model = make_model()
    model.seen = nn.BatchNorm1d(4)
    model.trained = nn.Module()
    model.trained._orig_mod = nn.BatchNorm1d(4)  # as torch.compile names it
    tuning = SparseTuning("full", trainable=["model.layers.*", "trained.*"])
    tuning.attach(SimpleNamespace(model=model, add_callback=lambda _: None))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    given = {"optimizer": optimizer, "model": model}
    tuning.on_train_begin(SimpleNamespace(), SimpleNamespace(global_step=0), None, **given)
    model.train()
    assert model.model.layers[0].training
    assert not model.seen.training
    assert model.trained._orig_mod.training
    tuning.on_train_end(None, None, None)
    model.train()
    assert model.seen.training


def test_parameters_that_are_cut_in_another_way_are_refused():
    """FSDP 1 leaves flat pieces where the parameters were."""
    model = make_model()
    tuning = SparseTuning("half")
    tuning.attach(SimpleNamespace(model=model, add_callback=lambda _: None))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().reshape(-1)[:100].clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(OptionsError, match="FSDP 1"):
        tuning.on_train_begin(SimpleNamespace(), SimpleNamespace(global_step=0), None, optimizer=optimizer, model=model)


def test_processes_that_are_not_the_first_see_that_a_run_is_finished(tmp_path):
    pair = make_pair(tmp_path)
    finetune(pair, tmp_path / "out", *FEW)
    assert is_finished(tmp_path / "out")
    assert not is_finished(pair / "base")
    (tmp_path / "out" / ".tailorcli").mkdir()
    (tmp_path / "out" / ".tailorcli" / "journal.jsonl").write_text("")
    assert not is_finished(tmp_path / "out")


def test_one_process_trains_on_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(tr.TrainingArguments, "n_gpu", property(lambda _: 2))
    monkeypatch.setattr(module, "_arguments", lambda *_: {"output_dir": str(tmp_path), "use_cpu": True})
    assert module.training_arguments(None, tmp_path)._n_gpu == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("label_smoothing_factor: 0.1", "on the token that it is shown"),
        ("logging_nan_inf_filter: true", "stops at a loss"),
        ("dataloader_drop_last: true", "fill no batch of 64"),
    ],
)
def test_arguments_that_would_do_something_else_are_refused(line, said, tmp_path):
    pair = make_family_pair(tmp_path, "llava")
    (tmp_path / "more.yaml").write_text(line + "\n")
    how = ("--data", pair / "data.jsonl", "-o", tmp_path / "out", "--training-args", tmp_path / "more.yaml")
    refused("finetune", pair / "base", *how, "--batch-size", 64, "--dry-run", mentions=[said])


def test_a_part_of_what_is_trained_as_a_whole_is_refused(tmp_path):
    pair = make_family_pair(tmp_path, "mixtral")
    name = next(name for name in read_tensors(pair / "base") if "experts.0" in name)
    how = ("finetune", pair / "base", "--data", pair / "data.jsonl", "-o", tmp_path / "out")
    said = refused(*how, "--trainable", name, "--dry-run", mentions=["a part of"])
    whole = said.replace("\n", " ").split("--trainable '")[1].split("'")[0]
    assert json.loads(run(*how, "--trainable", whole, "--dry-run", "--json").stdout)["parameters"] == 1


def test_a_probe_in_another_dtype_is_of_the_same_base(tmp_path):
    pair = make_pair(tmp_path)
    few = ("--num-samples", 4, "--seq-len", 12, "--dtype", "float16")
    run("probe", pair / "base", "-o", tmp_path / "importance", *few)
    finetune(pair, tmp_path / "out", *FEW, "--method", "dowser", "--importance", tmp_path / "importance")
    how = ("finetune", pair / "base", "--data", pair / "data.jsonl", "-o", tmp_path / "two", "--method", "dowser")
    tiny = ("--importance", tmp_path / "importance", "--update-ratio", 0.0001)
    refused(*how, *tiny, mentions=["leaves no entry to train"])


def test_another_tokenizer_is_another_run(tmp_path, monkeypatch):
    pair = make_pair(tmp_path)
    command = ("--steps", 3, "--batch-size", 2, "--save-every", 1)
    with interrupted_when_saved(monkeypatch):
        finetune(pair, tmp_path / "out", *command, expect=130)
    make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}").save_pretrained(pair / "base")
    how = ("--data", pair / "data.jsonl", "-o", tmp_path / "out", *command, "--resume")
    refused("finetune", pair / "base", *how, mentions=["other options, inputs or versions"])


def test_a_padding_of_minus_one_pads_with_zero(tmp_path):
    pair = make_pair(tmp_path)
    config = json.loads((pair / "base" / "config.json").read_text()) | {"pad_token_id": -1}
    (pair / "base" / "config.json").write_text(json.dumps(config))
    finetune(pair, tmp_path / "out", *FEW)


def test_like_lengths_come_together_where_they_are_asked_for(tmp_path):
    examples = Prepared(None, 99)
    for length in torch.randperm(64, generator=torch.Generator().manual_seed(0)).add(2).tolist():
        ids = torch.ones(1, length, dtype=torch.long)
        examples.tokens.append({"input_ids": ids, "labels": ids})
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    given = tr.TrainingArguments(
        tmp_path, per_device_train_batch_size=4, train_sampling_strategy="group_by_length", **quiet
    )
    drawn = torch.tensor([*GuardedTrainer.of(make_model(), given, examples, 0)._get_train_sampler()])
    lengths = torch.tensor([inputs["labels"].shape[1] for inputs in examples.tokens])
    assert sorted(drawn.tolist()) == [*range(64)]
    spreads = [(drawn_in.max() - drawn_in.min()).item() for drawn_in in lengths[drawn].split(4)]
    assert sum(spreads) / len(spreads) < 25  # 38 where they are drawn


def test_what_a_token_sees_is_padded_with_it():
    """Llama 3.2 Vision has a mask (1, T, images, tiles) of the pictures that each token sees."""
    made = [
        {"input_ids": torch.ones(1, n, dtype=torch.long), "cross_attention_mask": torch.ones(1, n, 1, 4)}
        for n in (3, 5)
    ]
    batch = Collate(0)(made)
    assert batch["cross_attention_mask"].shape == (2, 5, 1, 4)
    assert batch["cross_attention_mask"][0, 3:].sum() == 0
    assert batch["cross_attention_mask"][0, :3].all()


def test_pictures_of_several_sizes_are_filled_up_where_their_sizes_stand_beside_them():
    """As their processors do it; without the sizes zeros would count as a part of the picture."""
    made = [
        {"input_ids": torch.ones(1, 2, dtype=torch.long), "pixel_values": torch.ones(1, 3, size, 4)} for size in (2, 4)
    ]
    with pytest.raises(DataError, match="different shapes"):
        Collate(0)(made)
    batch = Collate(0)([example | {"image_sizes": torch.tensor([[2, 4]])} for example in made])
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    assert batch["pixel_values"].sum((1, 2, 3)).tolist() == [24.0, 48.0]
    assert not batch["pixel_values"][0, :, 2:].any()
