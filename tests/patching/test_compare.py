"""``check``: whether two models belong together and what fine-tuning changed, by headers and samples."""

import json
import shutil

import pytest
import torch
from families import make_family_pair
from helpers import make_adapter, make_model, make_pair, make_tokenizer, perturb, read_tensors, refused, run
from safetensors.torch import save_file

from tailorcli import compare_models


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def change(pair, folder, edit, dtype=None):
    """``folder``/tuned: the base of ``pair`` with ``edit(name, value)`` for each tensor."""
    shutil.copytree(pair / "base", folder / "tuned")
    values = {name: edit(name, value) for name, value in read_tensors(pair / "base").items()}
    values = {name: value.to(dtype or value.dtype).contiguous() for name, value in values.items()}
    save_file(values, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})
    return folder / "tuned"


def test_a_full_fine_tune_is_told_with_its_size(pair):
    found = compare_models(pair / "base", pair / "tuned")
    base, tuned = read_tensors(pair / "base"), read_tensors(pair / "tuned")
    delta = sum((tuned[name] - base[name]).square().sum() for name in base)
    whole = sum(value.square().sum() for value in base.values())
    assert found.kind == "full"
    assert found.moved > 0.99
    assert found.change == pytest.approx(float((delta / whole).sqrt()), rel=0.05)  # from a sample of the rows
    assert found.untouched == found.needs == ()
    assert found.tokenizer == "the same"
    assert found.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("family", ["t5", "whisper", "vit", "instructblip"])
def test_a_model_that_writes_no_samples_needs_data_of_its_old_tasks(tmp_path, family):
    """In every command that it is told as the next one."""
    folder = make_family_pair(tmp_path, family)
    base, tuned, data = folder / "base", folder / "tuned", folder / "data.jsonl"
    assert compare_models(base, tuned).needs == ("--retain-data", "OLD_TASK.jsonl")
    told = run("calibrate", tuned, "--data", data, "--num-samples", 2, "-o", tmp_path / "stats").stderr
    assert "calibrate BASE --data OLD_TASK -o BASE_STATS" in told
    refused("patch", base, tuned, "--data", data, "-o", tmp_path / "out", mentions=["cannot write its own samples"])


def test_a_low_rank_change_is_told_from_a_full_one(pair, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def edit(name, value):
        if not name.endswith(("q_proj.weight", "down_proj.weight")):
            return value
        rows, columns = value.shape
        return value + 0.01 * torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)

    found = compare_models(pair / "base", change(pair, tmp_path, edit))
    assert found.kind == "low rank"
    assert found.low_rank == 3
    assert "lm_head.weight" in found.untouched
    assert len(found.untouched) == len(read_tensors(pair / "base")) - 4


def test_a_sparse_change_and_layers_left_alone_are_told(pair, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def sparse(name, value):
        return torch.where(torch.rand(value.shape, generator=generator) < 0.1, value + 0.02, value)

    found = compare_models(pair / "base", change(pair, tmp_path, sparse))
    assert found.kind == "sparse"
    assert found.moved == pytest.approx(0.1, abs=0.02)
    (tmp_path / "half").mkdir()

    def half(name, value):
        return value + 0.02 * torch.randn(value.shape, generator=generator) if ".layers.1." in name else value

    found = compare_models(pair / "base", change(pair, tmp_path / "half", half))
    assert found.kind == "partial"
    assert all(".layers.1." not in name for name in found.untouched)


def test_an_adapter_is_told_by_what_it_says_of_itself(tmp_path):
    folder = make_adapter(tmp_path)
    found = compare_models(folder / "base", folder / "adapter")
    assert found.kind == "adapter"
    assert "rank 4 on 4 tensors" in found.adapter
    merged = compare_models(folder / "base", folder / "merged")
    assert found.change == pytest.approx(merged.change, rel=0.02)
    assert merged.kind == "low rank"


def test_the_command_that_it_ends_with_works(pair, tmp_path):
    tuned = change(pair, tmp_path, lambda name, value: value + 0.02 * torch.randn(value.shape), torch.bfloat16)
    told = json.loads(run("check", pair / "base", tuned, "--json").stdout)
    assert told["needs"] == ["--allow-dtype-mismatch"]
    command = told["next"].replace("NEW_TASK.jsonl", str(pair / "data.jsonl")).replace("OUT", str(tmp_path / "out"))
    run(*command.split()[1:], "--num-samples", 4, "--seq-len", 16, "--no-retain", "--dry-run")
    shown = run("check", pair / "base", pair / "tuned").stdout
    for said in (
        "A full fine-tune",
        "by kind",
        "by depth",
        "next: tailorcli patch",
        "the weights do not tell",
        "sampled",
    ):
        assert said in shown
    assert max(len(line) for line in shown.splitlines() if "tailorcli patch" not in line) < 200
    assert "down_proj" in run("check", pair / "base", pair / "tuned", "--tensors").stdout


def test_a_grown_vocabulary_is_told_with_its_option(pair, tmp_path):
    model = perturb(make_model())
    model.resize_token_embeddings(110)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "tuned")
    found = compare_models(pair / "base", tmp_path / "tuned")
    assert found.needs == ("--resized-vocab", "--no-retain")
    assert "1 more" in found.tokenizer
    assert "lm_head.weight: 10 rows more in tuned" in found.told


def test_what_does_not_belong_together_is_one_error(pair, tmp_path):
    make_pair(tmp_path, "gpt2")
    refused("check", pair / "base", tmp_path / "tuned", mentions=["different tensors"])
    refused("check", pair / "base", pair / "base", mentions=["identical"])
    refused("check", pair / "base", pair / "nothing", mentions=["nothing"])
    make_pair(tmp_path / "deep", layers=3)
    refused("check", pair / "base", tmp_path / "deep" / "tuned", mentions=["only in tuned"])
