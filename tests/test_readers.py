"""The check of outputs where people use them: it passes what is right, and finds what is not."""

import importlib.util
from pathlib import Path

import pytest
from helpers import make_pair, read_tensors, run
from safetensors.torch import save_file

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_readers.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_readers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = make_pair(tmp_path_factory.mktemp("readers"))
    quick = ("--solver", "none", "--omega", 1, "--max-shard-size", "30KB")
    run("patch", folder / "base", folder / "tuned", "-o", folder / "out", *quick)
    return folder / "out"


def test_transformers_and_peft_read_an_output_in_shards(script, out, tmp_path):
    told = script.check_all("out", out, tmp_path, None)
    assert told["transformers"].startswith("ok: LlamaForCausalLM, 21 tensors")
    assert told["PEFT"] == "ok: LoRA on 14 layers"
    assert told["llama.cpp"].startswith("not checked")


def test_a_weight_that_is_missing_is_found(script, out, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((out / name).read_bytes())
    tensors = read_tensors(out)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "work").mkdir()
    told = script.check_all("broken", broken, tmp_path / "work", None)
    assert told["transformers"].startswith("FAILED")
    assert "up_proj" in told["transformers"]
