"""Folders as they come: leftovers beside the weights, kernels that are not installed, code of the model's own."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from families import make_family_model
from helpers import (
    make_adapter,
    make_model,
    make_pair,
    make_tokenizer,
    perturb,
    read_tensors,
    refused,
    run,
    write_data,
)
from safetensors.torch import save_file

from tailorcli import (
    CalibrateOptions,
    DistillOptions,
    PatchOptions,
    calibrate_model,
    distill_patch,
    patch_checkpoint,
)
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.errors import CheckpointError
from tailorcli.models.config import read_config
from tailorcli.models.empty import model_class_of, most_tokens
from tailorcli.models.loading import load_model
from tailorcli.models.skeleton import empty_model

IDS = torch.arange(2, 22)[None]
TRUSTED = CalibrateOptions(trust_remote_code=True)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def logits_of(folder, options=CalibrateOptions()):
    with Checkpoint.open(folder) as checkpoint, torch.no_grad():
        return load_model(checkpoint, read_config(folder), options)(input_ids=IDS).logits


@pytest.mark.parametrize("has_own", [True, False])
@pytest.mark.parametrize("name", ["llama", "bart", "gemma3"])
def test_a_model_without_its_weights_ends_texts_as_the_whole_one_does(tmp_path, name, has_own):
    """Its generation_config.json may name other ends than its config.json, as those of chat models do."""
    make_family_model(name).save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    if has_own:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [5, 7], "pad_token_id": 3}))
    else:
        file.unlink()
    with Checkpoint.open(tmp_path) as checkpoint:
        given = (checkpoint, read_config(tmp_path), CalibrateOptions())
        whole, empty = load_model(*given), empty_model(*given)
    assert empty.generation_config.to_dict() == whole.generation_config.to_dict()
    assert (whole.generation_config.eos_token_id == [5, 7]) == has_own


def test_a_head_that_is_stored_with_values_of_its_own_is_untied(tmp_path, caplog):
    """As transformers unties it, whole, tensor by tensor and block by block; an equal copy stays tied."""
    folder = make_pair(tmp_path, tied=True)
    tables = {}
    for name, shift in (("base", 0.0), ("tuned", 0.1)):
        tensors = read_tensors(folder / name)
        table = tensors["model.embed_tokens.weight"]
        tables[name] = table
        noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
        tensors["lm_head.weight"] = table + shift * noise
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        wrapped = {f"module.{key}": value for key, value in tensors.items()}
        shutil.copytree(folder / name, folder / f"wrapped {name}")
        save_file(wrapped, folder / f"wrapped {name}" / "model.safetensors", metadata={"format": "pt"})
        wanted = transformers.AutoModelForCausalLM.from_pretrained(folder / name).eval()
        with torch.no_grad():
            logits = wanted(input_ids=IDS).logits
        for place in (name, f"wrapped {name}"):
            torch.testing.assert_close(logits_of(folder / place), logits)
    assert "tuned stores lm_head.weight with values of its own" in caplog.text
    assert "base stores" not in caplog.text
    given = ["--data", folder / "data.jsonl", "--num-samples", 6, "--seq-len", 20]
    for number, blockwise in enumerate(("auto", "never")):
        result = run(
            "patch",
            folder / "base",
            folder / "tuned",
            *given,
            "--blockwise",
            blockwise,
            "-o",
            tmp_path / f"out{number}",
        )
        assert result.exit_code == 0, result.stderr
    found = [read_tensors(tmp_path / f"out{number}") for number in (0, 1)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["lm_head.weight"], tables["base"])


@pytest.fixture(scope="module")
def merged_beside(tmp_path_factory):
    """``tuned``: a merged model saved into the folder of its adapter; ``merged``: the same model alone."""
    folder = make_adapter(
        tmp_path_factory.mktemp("merged"), target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    shutil.copytree(folder / "merged", folder / "tuned")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "adapter" / name, folder / "tuned")
    write_data(folder / "data.jsonl")
    return folder


@pytest.mark.parametrize("blockwise", ["never", "always"])
def test_an_adapter_beside_the_weights_it_was_merged_into_is_not_applied_again(
    merged_beside, tmp_path, caplog, blockwise
):
    found = {}
    for name in ("merged", "tuned"):
        how = ["--data", merged_beside / "data.jsonl", "--blockwise", blockwise]
        run("calibrate", merged_beside / name, *how, "-o", tmp_path / name)
        found[name] = read_tensors(tmp_path / name)
    assert blockwise == "always" or "tuned holds full weights, which are taken as they are" in caplog.text  # told once
    assert found["merged"].keys() == found["tuned"].keys()
    assert all(torch.equal(value, found["tuned"][name]) for name, value in found["merged"].items())


def test_a_patch_from_such_a_folder_loads_and_has_no_adapter(merged_beside, tmp_path):
    out = tmp_path / "out"
    run("patch", merged_beside / "base", merged_beside / "tuned", "--method", "magnitude", "--density", 1, "-o", out)
    assert not (out / "adapter_config.json").exists()
    with torch.no_grad():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(out)(IDS).logits
        expected = transformers.AutoModelForCausalLM.from_pretrained(merged_beside / "merged")(IDS).logits
    assert torch.equal(loaded, expected)
    assert torch.equal(logits_of(merged_beside / "tuned"), expected)


def test_a_quantization_that_the_weights_have_lost_is_left_out(tmp_path, caplog):
    folder = make_pair(tmp_path)
    expected = logits_of(folder / "tuned")
    leftover = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_config(folder / "tuned", quantization_config=leftover)
    with caplog.at_level(logging.WARNING, "tailorcli"):
        assert torch.equal(logits_of(folder / "tuned"), expected)
    assert "stored in full precision" in caplog.text
    run("calibrate", folder / "tuned", "--data", folder / "data.jsonl", "-o", folder / "stats", "--blockwise", "always")


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_an_attention_that_is_not_installed_gives_way_to_that_of_torch(tmp_path, caplog, implementation):
    folder = make_pair(tmp_path)
    expected = logits_of(folder / "tuned")
    edit_config(folder / "tuned", attn_implementation=implementation)
    with pytest.raises(ImportError):
        transformers.AutoModelForCausalLM.from_pretrained(folder / "tuned")
    with caplog.at_level(logging.WARNING, "tailorcli"):
        assert torch.equal(logits_of(folder / "tuned"), expected)
    assert f"asks for {implementation}, which is not installed" in caplog.text
    with Checkpoint.open(folder / "tuned") as checkpoint:
        assert empty_model(checkpoint, read_config(folder / "tuned"), CalibrateOptions()) is not None
    edit_config(folder / "tuned", attn_implementation="eager")
    with Checkpoint.open(folder / "tuned") as checkpoint:
        eager = load_model(checkpoint, read_config(folder / "tuned"), CalibrateOptions())
    assert eager.config._attn_implementation == "eager"  # what there is, is kept


def roberta(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"vocab_size": 100, "max_position_embeddings": 34, "pad_token_id": 1}
    return getattr(transformers, f"{kind}ForMaskedLM")(getattr(transformers, f"{kind}Config")(**sizes))


@pytest.mark.parametrize(("kind", "limit"), [("Roberta", 32), ("Camembert", 32), ("MPNet", 32), ("Bert", 34)])
def test_positions_that_start_after_the_padding_are_fewer(tmp_path, kind, limit):
    folder = tmp_path / "model"
    model = roberta(kind)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with Checkpoint.open(folder) as checkpoint:
        assert most_tokens(checkpoint, read_config(folder), CalibrateOptions()) == limit
    with torch.no_grad():
        model(torch.full((1, limit), 5))  # no token more
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 5))
    write_data(tmp_path / "data.jsonl", 12)
    run("calibrate", folder, "--data", tmp_path / "data.jsonl", "-o", tmp_path / "stats")
    lengths = [len(value[0]) for name, value in read_tensors(tmp_path / "stats").items() if name.endswith("input_ids")]
    assert max(lengths) == limit


OWN_CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
class OwnConfig(PretrainedConfig):
    model_type = "own-wrapper"
    def __init__(self, llm=None, **more):
        super().__init__(**more)
        self.llm = llm or {}
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.language_model = LlamaForCausalLM(LlamaConfig(**config.llm))
        self.post_init()
    def forward(self, input_ids=None, **more):
        return self.language_model(input_ids=input_ids)
"""


def make_own(folder, auto):
    """A Llama inside a wrapper whose code lies with the weights, as ``auto`` of transformers loads it."""
    llama = perturb(make_model())
    folder.mkdir()
    make_tokenizer().save_pretrained(folder)
    from safetensors.torch import save_file

    tensors = {f"language_model.{name}": value.contiguous() for name, value in llama.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "modeling_own.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig"} | dict.fromkeys(auto, "modeling_own.OwnModel")
    config = {"model_type": "own-wrapper", "architectures": ["OwnModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config | {"llm": llama.config.to_dict(), "dtype": "float32"}))
    return llama.eval()


@pytest.mark.parametrize("auto", [["AutoModel"], ["AutoModelForMaskedLM"], ["AutoModel", "AutoModelForCausalLM"]])
def test_code_of_the_model_s_own_is_loaded_by_the_automatic_class_that_it_names(tmp_path, auto):
    folder = tmp_path / "own"
    llama = make_own(folder, auto)
    assert model_class_of(read_config(folder), TRUSTED).__name__ == auto[-1]
    with torch.no_grad():
        assert torch.allclose(logits_of(folder, TRUSTED), llama(IDS).logits, atol=1e-6)


def test_hints_never_advise_an_option_that_is_given(tmp_path):
    folder = tmp_path / "own"
    make_own(folder, ["AutoModel"])
    write_data(tmp_path / "data.jsonl")
    how = [folder, "--data", tmp_path / "data.jsonl", "-o", tmp_path / "stats"]
    assert "pass --trust-remote-code" in refused("calibrate", *how)
    (folder / "modeling_own.py").write_text("import no_such_package\n" + OWN_CODE)
    shown = refused("calibrate", *how, "--trust-remote-code")
    assert "--trust-remote-code" not in shown
    assert "no_such_package" in shown
    (folder / "modeling_own.py").write_text(OWN_CODE.replace("self.post_init()", "self.post_init(config.nothing)"))
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError) as raised:
        load_model(checkpoint, read_config(folder), TRUSTED)
    assert "--trust-remote-code" not in raised.value.hint


HEAD = """    def get_output_embeddings(self):
        return self.language_model.lm_head
"""


def make_own_pair(folder):
    """Two of such models, and data for both."""
    for name in ("base", "tuned"):
        llama = make_own(folder / name, ["AutoModel"])
    tuned = {f"language_model.{n}": v.contiguous() for n, v in perturb(llama, seed=5).state_dict().items()}
    save_file(tuned, folder / "tuned/model.safetensors", {"format": "pt"})
    write_data(folder / "data.jsonl")


def test_a_patch_runs_code_of_the_models_own_where_it_may(tmp_path):
    make_own_pair(tmp_path)
    given = ["--data", tmp_path / "data.jsonl", "--trust-remote-code"]
    run("calibrate", tmp_path / "tuned", *given, "-o", tmp_path / "stats")
    run("calibrate", tmp_path / "base", *given, "-o", tmp_path / "retained")
    how = ["patch", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "out", "--stats", tmp_path / "stats"]
    how += ["--retain", tmp_path / "retained"]
    assert "pass --trust-remote-code" in refused(*how)
    run(*how, "--overwrite", "--trust-remote-code")
    report = json.loads((tmp_path / "out/tailor_report.json").read_text())
    assert sum(tensor.get("propagated", False) for tensor in report["tensors"]) > 0


def test_training_runs_code_of_the_models_own_where_it_may(tmp_path):
    make_own_pair(tmp_path)
    pair, file = (tmp_path / "base", tmp_path / "tuned"), tmp_path / "patch.safetensors"
    for name in ("base", "tuned"):
        how = CalibrateOptions(4, 16, trust_remote_code=True)
        calibrate_model(tmp_path / name, tmp_path / "data.jsonl", tmp_path / f"{name}-stats", how)
    patch_checkpoint(*pair, None, None, PatchOptions(method="magnitude", trust_remote_code=True), patch_file=file)
    given = (file, *pair, tmp_path / "tuned-stats", tmp_path / "base-stats", tmp_path / "out")
    trained = {"distill": DistillOptions(steps=2), "trust_remote_code": True}
    with pytest.raises(CheckpointError, match="OwnModel has no linear output layer"):
        distill_patch(*given, **trained, overwrite=True)
    for folder in pair:
        (folder / "modeling_own.py").write_text(OWN_CODE + HEAD)
    assert distill_patch(*given, **trained, overwrite=True).distillation["steps"] == [0, 1, 2]
    with pytest.raises(CheckpointError) as raised:
        distill_patch(*given, overwrite=True)
    assert "pass --trust-remote-code" in raised.value.hint


def test_a_processor_that_does_not_load_is_no_processor_of_pictures_alone(tmp_path, monkeypatch):
    """Without torchvision Qwen3-VL's image processor loads by itself: it would leave out the text."""
    import transformers
    from families import make_family_pair

    from tailorcli.models.loading import load_encoder

    folder = make_family_pair(tmp_path, "llava") / "base"

    def missing(*_, **__):
        raise ImportError("LlavaVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)
    with pytest.raises(CheckpointError, match="cannot load a processor") as caught:
        load_encoder(folder, folder, True, CalibrateOptions())
    assert "pip install torchvision" in caught.value.hint
