"""LoRA adapters as the tuned model, against PEFT's own merge."""

import json
import random
import shutil
import struct
from collections import Counter

import pytest
import torch
from helpers import make_adapter, make_tokenizer, read_tensors, write_data
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tailorcli import Checkpoint, TailorError, calibrate_model, patch_checkpoint
from tailorcli.adapters.checkpoint import AdaptedCheckpoint, is_adapter, open_tuned, tuned_side_files
from tailorcli.calibration.stats import Stats
from tailorcli.cli import app
from tailorcli.options import CalibrateOptions, PatchOptions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"


def edit_config(folder, **changes):
    path = folder / "adapter" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    path = folder / "adapter" / WEIGHTS
    save_file(change(load_file(path)) or {}, path)


def compare(folder, tolerance=2e-6):
    """Every tensor of the adapted base against the merged checkpoint; returns how many differ from the base."""
    expected, before = read_tensors(folder / "merged"), read_tensors(folder / "base")
    with Checkpoint.open(folder / "base") as base, open_tuned(folder / "adapter", base) as tuned:
        assert isinstance(tuned, AdaptedCheckpoint)
        assert list(tuned.tensors) == list(base.tensors)
        assert set(tuned.tensors) == set(expected)
        for name, info in tuned.tensors.items():
            found = tuned.read(name)
            assert tuple(found.shape) == info.shape == base.tensors[name].shape
            assert found.numel() * found.element_size() == info.nbytes
            if name in tuned.changed:
                torch.testing.assert_close(found.float(), expected[name].float(), rtol=0, atol=tolerance)
            else:
                assert found.dtype == before[name].dtype
                assert torch.equal(found, before[name])
        assert tuned.nbytes == sum(info.nbytes for info in tuned.tensors.values())
        return sum(not torch.equal(expected[n].float(), before[n].float()) for n in expected)


ATTENTION = ["q_proj", "v_proj"]
SETTINGS = {
    "plain": ("llama", {"target_modules": "all-linear"}, 14),
    "patterns": (
        "llama",
        {
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {"layers.0.self_attn.v_proj": 2, "down_proj": 6, "^model.layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {r".*\.1\.mlp\.down_proj": 40, "q_proj": 3},
        },
        6,
    ),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 7}, 4),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, 8),
    "saved": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm", "embed_tokens"]}, 4 + 7),
    "saved norms": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_1", "ln_f"]}, 2 + 6),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, 4),
    "positions": ("gpt2", {"target_modules": ["wpe", "c_attn"]}, 3),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}, 2 + 13),
    # PEFT saves the bias of a module that is trained whole three times: as itself, as its wrapper's, and as it was.
    "biases and saved": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]}, 2 + 14),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}, 4),
    "bias of B": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}, 12),
    "both biases": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "bias": "all", "lora_alpha": 3}, 15),
    "dora": ("llama", {"target_modules": [*ATTENTION, "down_proj", "embed_tokens"], "use_dora": True}, 7),
    "dora conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "bias": "lora_only"}, 12),
    "tokens": ("llama", {"target_modules": ATTENTION, "trainable_token_indices": [3, 1, 99]}, 5),
    "tokens of two": (
        "llama",
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [5]}},
        6,
    ),
    "orthogonal": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"}, 4),
    "mica": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "mica"}, 4),
    "gaussian": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}, 4),
    "some layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": "layers"}, 2),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_every_tensor_is_what_peft_merges(tmp_path, case):
    kind, settings, changed = SETTINGS[case]
    assert compare(make_adapter(tmp_path, kind, **settings)) == changed


def test_tokens_of_a_tied_embedding(tmp_path):
    """PEFT ties the trained rows itself, so that one tensor stands for both."""
    make_adapter(tmp_path, tied=True, target_modules=ATTENTION, trainable_token_indices=[3, 1])
    assert compare(tmp_path) == 5
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": copy}, file, {"format": "pt"})
    refused(tmp_path, "tokens of 'model.embed_tokens.weight'", "stores it twice")
    save_file(tensors | {"lm_head.weight": copy + 1}, file, {"format": "pt"})  # which transformers does not tie
    with Checkpoint.open(tmp_path / "base") as base, open_tuned(tmp_path / "adapter", base) as tuned:
        assert len(tuned.changed) == 5


def test_a_square_conv1d_is_told_by_the_model_not_by_the_flag(tmp_path):
    """PEFT leaves in fan_in_fan_out what the last adapted layer asked for."""
    make_adapter(tmp_path, "gpt2", target_modules=["c_proj"])
    edit_config(tmp_path, fan_in_fan_out=False)
    assert compare(tmp_path) == 4
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "of another kind"}))
    edit_config(tmp_path, fan_in_fan_out=True)
    assert compare(tmp_path) == 4


def test_a_square_linear_layer_in_a_model_with_conv1ds_is_none(tmp_path):
    make_adapter(tmp_path, target_modules=ATTENTION)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert compare(tmp_path) == 4


def test_a_change_adds_to_the_weight_that_the_adapter_brings_along(tmp_path):
    """PEFT saves an embedding of its own under ``base_layer`` where that was resized or trained."""
    make_adapter(tmp_path, layers=1, target_modules=ATTENTION)
    prefix = "base_model.model." + Q.removesuffix("weight")
    own = torch.full((32, 32), 0.5)
    edit_tensors(tmp_path, lambda tensors: tensors | {prefix + "base_layer.weight": own})
    with Checkpoint.open(tmp_path / "base") as base, open_tuned(tmp_path / "adapter", base) as tuned:
        parts = load_file(tmp_path / "adapter" / WEIGHTS)
        up, down = (parts[f"{prefix}lora_{x}.weight"] for x in "BA")
        torch.testing.assert_close(tuned.read(Q), own + 2 * up @ down)


def test_what_lies_under_a_wrappers_name_alone_is_taken(tmp_path):
    make_adapter(tmp_path, layers=1, target_modules=ATTENTION)
    norm = torch.full((32,), 0.5)
    edit_tensors(tmp_path, lambda tensors: tensors | {"base_model.model.model.norm.modules_to_save.weight": norm})
    with Checkpoint.open(tmp_path / "base") as base, open_tuned(tmp_path / "adapter", base) as tuned:
        assert torch.equal(tuned.read("model.norm.weight"), norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_formed_tensors_are_not_rounded_to_the_base(tmp_path, dtype):
    make_adapter(tmp_path, dtype=dtype, shard="20KB", target_modules=ATTENTION)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    compare(tmp_path)
    with Checkpoint.open(tmp_path / "base") as base, open_tuned(tmp_path / "adapter", base) as tuned:
        found = tuned.read(Q)
        assert found.dtype == torch.float32
        assert tuned.tensors[Q].dtype == "F32"
        assert not torch.equal(found, found.to(dtype).float())


def test_float64_base_and_half_precision_adapter(tmp_path):
    make_adapter(tmp_path, dtype=torch.float64, target_modules=ATTENTION)
    edit_tensors(tmp_path, lambda tensors: {name: value.bfloat16() for name, value in tensors.items()})
    with Checkpoint.open(tmp_path / "base") as base, open_tuned(tmp_path / "adapter", base) as tuned:
        prefix = "base_model.model." + Q.removesuffix("weight")
        parts = load_file(tmp_path / "adapter" / WEIGHTS)
        up, down = (parts[f"{prefix}lora_{x}.weight"].double() for x in "BA")
        torch.testing.assert_close(tuned.read(Q), base.read(Q) + 2 * up @ down, rtol=0, atol=1e-14)


def test_names_with_and_without_the_prefix(tmp_path):
    make_adapter(tmp_path, "gpt2", target_modules=["c_attn", "c_fc"], modules_to_save=["ln_f"], bias="lora_only")
    expected = {}
    with Checkpoint.open(tmp_path / "base") as base, open_tuned(tmp_path / "adapter", base) as tuned:
        expected = {name.removeprefix("transformer."): tuned.read(name) for name in tuned.tensors}

    def found(rename_base, rename_adapter):
        bare = tmp_path / "bare"
        shutil.copytree(tmp_path / "base", bare, dirs_exist_ok=True)
        save_file({rename_base(n): t for n, t in read_tensors(tmp_path / "base").items()}, bare / "model.safetensors")
        tensors = load_file(tmp_path / "adapter" / WEIGHTS)
        other = shutil.copytree(tmp_path / "adapter", tmp_path / "other", dirs_exist_ok=True)
        save_file({rename_adapter(n): t for n, t in tensors.items()}, other / WEIGHTS)
        with Checkpoint.open(bare) as base, open_tuned(other, base) as tuned:
            return {name.removeprefix("transformer."): tuned.read(name) for name in tuned.tensors}

    without = lambda name: name.replace("transformer.", "")  # noqa: E731
    same = lambda name: name  # noqa: E731
    unprefixed = lambda name: name.removeprefix("base_model.model.")  # noqa: E731
    for renames in ((without, same), (same, without), (without, without), (same, unprefixed)):
        for name, value in found(*renames).items():
            assert torch.equal(value, expected[name]), name


def test_biases_under_the_names_of_older_versions(tmp_path):
    make_adapter(tmp_path, "gpt2", target_modules=["c_attn"], bias="lora_only")
    edit_tensors(tmp_path, lambda tensors: {name.replace("base_layer.", ""): t for name, t in tensors.items()})
    assert compare(tmp_path) == 4
    edit_tensors(
        tmp_path, lambda tensors: {name.replace(".bias", ".base_layer.bias"): t for name, t in tensors.items()}
    )
    edit_tensors(
        tmp_path, lambda tensors: {name: t for name, t in tensors.items() if "h.0" not in name or "bias" in name}
    )
    with Checkpoint.open(tmp_path / "base") as base, open_tuned(tmp_path / "adapter", base) as tuned:
        assert len(tuned.changed) == 3


def test_reading_bytes_of_a_formed_tensor(tmp_path):
    make_adapter(tmp_path, target_modules=ATTENTION, modules_to_save=["norm"])
    with Checkpoint.open(tmp_path / "base") as base, open_tuned(tmp_path / "adapter", base) as tuned:
        for name in (Q, "model.norm.weight", "lm_head.weight"):
            info = tuned.tensors[name]
            buffer = bytearray(40)
            tuned.read_into(info, memoryview(buffer), 20)
            assert bytes(buffer) == tuned.read(name).numpy().tobytes()[20:60]
            assert tuned.sample_bytes(info)
        assert set(base.shards) < set(tuned.shards)
        assert tuned.read_cost(Q) == base.tensors[Q].nbytes + 4 * 4 * (32 + 32)
        assert tuned.read_cost("lm_head.weight") == base.tensors["lm_head.weight"].nbytes


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    make_adapter(tmp_path, target_modules=ATTENTION)
    with Checkpoint.open(tmp_path / "base") as base, open_tuned(tmp_path / "adapter", base) as tuned:
        whole = tuned.read(Q)
        monkeypatch.setattr("tailorcli.adapters.checkpoint._PIECE", 100)  # of 1024 entries
        assert torch.equal(tuned.read(Q), whole)


def test_fingerprint_knows_what_decides_the_weights(tmp_path):
    make_adapter(tmp_path, target_modules=ATTENTION)

    def fingerprint():
        with Checkpoint.open(tmp_path / "base") as base, open_tuned(tmp_path / "adapter", base) as tuned:
            assert tuned.fingerprint() != base.fingerprint()
            return tuned.fingerprint()

    first = fingerprint()
    edit_config(tmp_path, lora_dropout=0.5, base_model_name_or_path="elsewhere", peft_version="0")
    assert fingerprint() == first
    edit_config(tmp_path, lora_alpha=9)
    assert fingerprint() != first
    edit_config(tmp_path, lora_alpha=8)
    edit_tensors(tmp_path, lambda tensors: {name: value * 1.01 for name, value in tensors.items()})
    second = fingerprint()
    base = read_tensors(tmp_path / "base")
    save_file({name: value * 1.01 for name, value in base.items()}, tmp_path / "base" / "model.safetensors")
    assert len({first, second, fingerprint()}) == 3


def test_fingerprint_knows_which_rows_and_which_way_round(tmp_path):
    make_adapter(tmp_path / "rows", target_modules=ATTENTION, trainable_token_indices=[3, 1])
    make_adapter(tmp_path / "turned", "gpt2", target_modules=["c_proj"])

    def fingerprint(folder):
        with Checkpoint.open(folder / "base") as base, open_tuned(folder / "adapter", base) as tuned:
            return tuned.fingerprint()

    first = [fingerprint(tmp_path / which) for which in ("rows", "turned")]
    edit_config(tmp_path / "rows", trainable_token_indices=[3, 2])
    config = json.loads((tmp_path / "turned" / "base" / "config.json").read_text())
    (tmp_path / "turned" / "base" / "config.json").write_text(json.dumps({**config, "model_type": "of another kind"}))
    edit_config(tmp_path / "turned", fan_in_fan_out=False)  # the square layers are no longer those of a Conv1D
    assert not set(first) & {fingerprint(tmp_path / which) for which in ("rows", "turned")}


# The whole chain.


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeded(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


CHAINS = {
    "llama": ("llama", {"target_modules": [*ATTENTION, "down_proj", "embed_tokens"], "modules_to_save": ["norm"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only", "use_dora": True}),
}


@pytest.fixture(scope="module", params=CHAINS)
def chain(request, tmp_path_factory):
    """Base, adapter, PEFT's merge of it, and the statistics of both; read only."""
    kind, settings = CHAINS[request.param]
    folder = make_adapter(tmp_path_factory.mktemp(request.param), kind, **settings)
    write_data(folder / "data.jsonl", count=12)
    common = ["--data", folder / "data.jsonl"]
    succeeded("calibrate", folder / "adapter", "--base", folder / "base", *common, "-o", folder / "stats")
    calibrate_model(folder / "merged", folder / "data.jsonl", folder / "merged_stats")
    return folder


def test_statistics_are_those_of_the_merged_model(chain):
    ours, theirs = Stats.open(chain / "stats"), Stats.open(chain / "merged_stats")
    assert ours.tensors == theirs.tensors
    for name in theirs.hessians:
        expected = theirs.load(name)
        torch.testing.assert_close(ours.load(name), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert ours.manifest["model"]["base"] == str(chain / "base")


def test_patches_are_those_of_the_merged_model(chain, tmp_path):
    succeeded("patch", chain / "base", chain / "adapter", "--stats", chain / "stats", "-o", tmp_path / "ours")
    patch_checkpoint(chain / "base", chain / "merged", tmp_path / "theirs", chain / "merged_stats")
    base, ours, theirs = (read_tensors(f) for f in (chain / "base", tmp_path / "ours", tmp_path / "theirs"))
    differing = 0
    for name in base:
        masks = ours[name] != base[name], theirs[name] != base[name]
        differing += int((masks[0] != masks[1]).sum())
        both = masks[0] == masks[1]
        torch.testing.assert_close(ours[name][both], theirs[name][both], rtol=1e-3, atol=1e-4)
    assert differing <= 2e-3 * sum(value.numel() for value in base.values())
    report = json.loads((tmp_path / "ours" / "tailor_report.json").read_text())
    assert report["inputs"]["tuned"]["path"] == str(chain / "adapter")


def test_density_one_is_the_merged_model_and_zero_the_base(chain, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(2, 40).reshape(2, -1)

    @torch.no_grad()
    def logits(folder, adapter=None):
        model = AutoModelForCausalLM.from_pretrained(folder)
        return (PeftModel.from_pretrained(model, adapter) if adapter else model)(ids).logits

    for density, expected in ((1.0, "merged"), (0.0, "base")):
        out = tmp_path / expected
        options = PatchOptions(density=density, solver="none", omega=1.0)
        patch_checkpoint(chain / "base", chain / "adapter", out, options=options)
        torch.testing.assert_close(logits(out), logits(chain / expected), rtol=0, atol=2e-5 * density)
    unmerged = logits(chain / "base", chain / "adapter")  # as PEFT itself reads the folder
    torch.testing.assert_close(logits(tmp_path / "merged"), unmerged, rtol=0, atol=5e-5)
    assert not (tmp_path / "base" / CONFIG).exists()


def test_score_dry_run_and_resume(chain, tmp_path):
    arguments = [chain / "base", chain / "adapter", "--stats", chain / "stats"]
    scored = json.loads(succeeded("score", *arguments, "--json").stdout)
    assert scored["totals"]["kept"] > 0
    planned = succeeded("patch", *arguments, "-o", tmp_path / "out", "--dry-run")
    assert "no config.json" not in planned.stderr
    assert not (tmp_path / "out").exists()
    succeeded("patch", *arguments, "-o", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    succeeded("patch", *arguments, "-o", tmp_path / "out", "--resume")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_a_bfloat16_base_needs_no_permission(tmp_path):
    make_adapter(tmp_path, dtype=torch.bfloat16, target_modules=ATTENTION, modules_to_save=["norm"])
    write_data(tmp_path / "data.jsonl", count=6)
    edit_config(tmp_path, base_model_name_or_path=str(tmp_path / "base"))
    calibrate_model(tmp_path / "adapter", tmp_path / "data.jsonl", tmp_path / "stats")
    assert Stats.open(tmp_path / "stats").manifest["model"]["run_in"] == "bfloat16"
    patch_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", tmp_path / "stats")
    base, out = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "out")
    assert {value.dtype for value in out.values()} == {torch.bfloat16}
    assert not torch.equal(base[Q], out[Q])
    assert torch.equal(base["lm_head.weight"], out["lm_head.weight"])


def test_an_own_tokenizer_replaces_that_of_the_base(tmp_path):
    make_adapter(tmp_path, target_modules=ATTENTION)
    (tmp_path / "base" / "added_tokens.json").write_text("{}")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("x")
    (tmp_path / "adapter" / "README.md").write_text("x")
    (tmp_path / "adapter" / "trainer_state.json").write_text("{}")

    def sources():
        with Checkpoint.open(tmp_path / "base") as base, open_tuned(tmp_path / "adapter", base) as tuned:
            return {str(place): source.parent.name for place, source in tuned_side_files(tuned).items()}

    configs, tokenizer = ["config.json", "generation_config.json"], ["tokenizer.json", "tokenizer_config.json"]
    from_base = dict.fromkeys([*configs, *tokenizer, "added_tokens.json"], "base")
    assert sources() == from_base | {"chat_template.jinja": "adapter"}
    make_tokenizer("{{ messages }}").save_pretrained(tmp_path / "adapter")
    own = dict.fromkeys([*tokenizer, "chat_template.jinja"], "adapter")
    assert sources() == dict.fromkeys(configs, "base") | own
    write_data(tmp_path / "data.jsonl", count=3)
    calibrate_model(tmp_path / "adapter", tmp_path / "data.jsonl", tmp_path / "stats", base=tmp_path / "base")


# What is refused.


BY_SALIENCE = ("--omega", "1", "--solver", "none")


def refused(folder, *mentions):
    """Both commands that take an adapter refuse it with one clear error, and write nothing."""
    commands = [("score", folder / "base", folder / "adapter", "--omega", "1", "--json")]
    commands.append(("patch", folder / "base", folder / "adapter", "-o", folder / "out", *BY_SALIENCE))
    for command in commands:
        result = run(*command)
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code == 1, result.output
        assert result.stderr.count("error: ") == 1
        assert "\n  try: " in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
        for word in mentions:
            assert str(word) in result.stderr, result.stderr
        assert result.stdout == ""
        assert not (folder / "out").exists()
    return result.stderr


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("sound"), layers=1, target_modules=ATTENTION)


@pytest.fixture
def adapter(sound, tmp_path):
    """A copy of a sound adapter and its base, to damage."""
    for name in ("base", "adapter"):
        shutil.copytree(sound / name, tmp_path / name)
    return tmp_path


CONFIGS = {
    "another kind": ({"peft_type": "LOHA"}, ["LOHA", "only LoRA"]),
    "adalora": ({"peft_type": "ADALORA"}, ["ADALORA"]),
    "no kind": ({"peft_type": None}, ["no peft_type"]),
    **{
        init: ({"init_lora_weights": init}, [init, "base's own weights"])
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "of the future")
    },
    "alora": ({"alora_invocation_tokens": [1]}, ["aLoRA"]),
    "arrow": ({"arrow_config": {"top_k": 2}}, ["arrow_config"]),
    "replication": ({"layer_replication": [[0, 1], [0, 1]]}, ["repeats layers"]),
    "megatron": ({"megatron_config": {"a": 1}}, ["Megatron"]),
    "qalora": ({"use_qalora": True}, ["QA-LoRA"]),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, ["target_parameters"]),
    "kasa": ({"kasa_config": {}, "velora_config": {"a": 1}}, ["velora_config"]),
    "an unknown setting": ({"use_magic": True}, ["use_magic", "does not know"]),
    "rank zero": ({"r": 0}, ["r must be a positive whole number"]),
    "rank of another": ({"r": 3}, ["rank 3"]),
    "rank true": ({"r": True}, ["r must be"]),
    "alpha": ({"lora_alpha": "8"}, ["lora_alpha must be a number"]),
    "alpha infinite": ({"lora_alpha": float("inf")}, ["lora_alpha must be a number"]),
    "alpha huge": ({"lora_alpha": 10**400}, ["lora_alpha must be a number"]),
    "bias": ({"bias": "some"}, ["none, all or lora_only"]),
    "flag": ({"use_rslora": "yes"}, ["use_rslora must be true or false"]),
    "pattern": ({"rank_pattern": {"q_proj": 2.5}}, ["rank_pattern must map"]),
    "pattern list": ({"alpha_pattern": [1]}, ["alpha_pattern must map"]),
    "pattern no regex": ({"alpha_pattern": {"(": 1}}, ["no regular expression"]),
    "pattern rank": ({"rank_pattern": {"q_proj": 2}}, ["rank 2"]),
    "dora": ({"use_dora": True}, ["lacks lora_magnitude_vector"]),
    "bias of B": ({"lora_bias": True}, ["lacks lora_B.bias"]),
    "both": ({"lora_bias": True, "use_dora": True}, ["no meaning together"]),
    "tokens": ({"trainable_token_indices": [1, 1]}, ["distinct token ids"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_that_are_no_plain_lora(adapter, case):
    changes, mentions = CONFIGS[case]
    edit_config(adapter, **changes)
    refused(adapter, adapter / "adapter", *mentions)


P = "base_model.model.model.layers.0.self_attn.q_proj."
HEAD = "base_model.model.lm_head.weight"
EMBED = "base_model.model.model.embed_tokens.weight"


def dropped(*names):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def added(name, *shape, dtype=torch.float32):
    return lambda tensors: tensors | {name: torch.ones(shape).to(dtype)}


TENSORS = {
    "A without B": (dropped(P + "lora_B.weight"), ["has lora_A.weight without lora_B.weight"]),
    "B without A": (dropped(P + "lora_A.weight"), ["has lora_B.weight without lora_A.weight"]),
    "nothing": (lambda _: {}, ["holds no tensors"]),
    "inputs": (added(P + "lora_A.weight", 4, 31), ["takes 31 to 32 channels", "[32, 32]"]),
    "outputs": (added(P + "lora_B.weight", 33, 4), ["takes 32 to 33 channels"]),
    "no matrix": (added(P + "lora_A.weight", 4, 32, 1, 1), ["which are no matrices"]),
    "other module": (added("base_model.model.score.weight", 2, 32), ["not in the base", "score.weight"]),
    "other layer": (added(P.replace("0", "7") + "lora_A.weight", 4, 32), ["layers.7"]),
    "unknown part": (added(P + "lora_C.weight", 4, 32), ["lora_C.weight", "no part of a LoRA adapter"]),
    "named adapter": (added(P + "lora_A.default.weight", 4, 32), ["lora_A.default.weight"]),
    "vocabulary": (added(HEAD, 103, 32), ["[103, 32]", "resized vocabulary"]),
    "embedding": (added(EMBED, 103, 32), ["[103, 32]", "resized vocabulary"]),
    "table": (
        lambda t: (
            added(EMBED.replace("weight", "lora_embedding_A"), 4, 103)(t)
            | added(EMBED.replace("weight", "lora_embedding_B"), 32, 4)({})
        ),
        ["takes 103 to 32", "resized vocabulary"],
    ),
    "magnitude": (added(P + "lora_magnitude_vector", 32), ["has lora_magnitude_vector", "use_dora false"]),
    "bias of B": (added(P + "lora_B.bias", 32), ["not in the base", "q_proj.bias"]),
    "lone magnitude": (added(EMBED.replace("weight", "lora_magnitude_vector"), 32), ["lora_magnitude_vector alone"]),
    "tokens": (added(EMBED.replace("weight", "token_adapter.trainable_tokens_delta"), 2, 32), ["names 0 lists"]),
    "twice": (added(P.removeprefix("base_model.model.") + "lora_A.weight", 4, 32), ["twice"]),
    "replaced, too": (added(P + "weight", 32, 32), ["both adapts and replaces"]),
    "dtype": (added(P + "lora_A.weight", 4, 32, dtype=torch.int8), ["is I8"]),
    "float8": (added(P + "lora_A.weight", 4, 32, dtype=torch.float8_e4m3fn), ["is F8_E4M3"]),
    "no entries": (added(P + "lora_A.weight", 4, 0), ["has no entries"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(adapter, case):
    change, mentions = TENSORS[case]
    edit_tensors(adapter, change)
    refused(adapter, adapter / "adapter", *mentions)


def test_a_token_behind_the_last_is_refused(tmp_path):
    make_adapter(tmp_path, layers=1, target_modules=ATTENTION, trainable_token_indices=[3, 99])
    edit_config(tmp_path, trainable_token_indices=[3, 100])
    refused(tmp_path, tmp_path / "adapter", "2 trainable_token_indices do not fit", "[100, 32]")


def test_nan_in_the_adapter_stops_the_run(adapter):
    edit_tensors(adapter, lambda t: t | {P + "lora_B.weight": torch.full((32, 4), torch.nan)})
    result = run("patch", adapter / "base", adapter / "adapter", "-o", adapter / "out", *BY_SALIENCE)
    assert result.exit_code == 1
    assert f"NaN or infinity in tensor '{P}lora_B.weight'" in result.stderr
    with pytest.raises(TailorError):
        Checkpoint.open(adapter / "out")


def test_folders_that_are_no_whole_adapter(adapter):
    base, folder = adapter / "base", adapter / "adapter"
    assert is_adapter(folder)
    assert not is_adapter(base)
    (folder / WEIGHTS).rename(folder / "kept")
    refused(adapter, "adapter without adapter_model.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"not a pickle")
    assert "save_pretrained" in refused(adapter, folder, "pickled adapter, which is never loaded")
    (folder / "kept").rename(folder / WEIGHTS)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-5])
    refused(adapter, WEIGHTS, "truncated")
    (folder / WEIGHTS).write_bytes(data)
    (folder / CONFIG).write_text("{")
    refused(adapter, CONFIG, "is not JSON")
    shutil.rmtree(base)
    shutil.copytree(folder, base)
    assert "merge_and_unload" in refused(adapter, base, "holds an adapter, not a checkpoint")
    result = run("inspect", folder)
    assert result.exit_code == 1
    assert "holds an adapter" in result.stderr


def test_an_untrained_adapter_changes_nothing(adapter):
    edit_tensors(adapter, lambda t: {n: v * (".lora_B." not in n) for n, v in t.items()})
    refused(adapter, adapter / "adapter", "untrained")
    edit_tensors(adapter, lambda t: t | {"base_model.model.model.norm.weight": torch.full((32,), 2.0)})
    with Checkpoint.open(adapter / "base") as base, open_tuned(adapter / "adapter", base) as tuned:
        assert not tuned.is_untrained()  # of what is saved whole nothing tells


def test_an_adapter_whose_scale_is_zero_changes_nothing(tmp_path):
    make_adapter(tmp_path, target_modules=["q_proj"], lora_alpha=0)
    refused(tmp_path, tmp_path / "adapter", "untrained")


def test_a_tied_base_has_no_place_for_an_untied_change(tmp_path):
    cases = [
        ({"target_modules": ["embed_tokens", "q_proj"]}, "changes the embedding 'model.embed_tokens.weight'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "ties its output layer"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"target_modules": ["lm_head", "q_proj"]}, "lm_head.weight"),
    ]
    for i, (settings, why) in enumerate(cases):
        folder = make_adapter(tmp_path / str(i), tied=True, layers=1, **settings)
        assert "untie" in refused(folder, why)
    config = json.loads((tmp_path / "0" / "base" / "config.json").read_text())
    config.pop("tie_word_embeddings", None)  # what its class says then
    (tmp_path / "0" / "base" / "config.json").write_text(json.dumps(config))
    assert "untie" in refused(tmp_path / "0", cases[0][1])


def test_a_quantized_base(adapter):
    tensors = read_tensors(adapter / "base")
    tensors[Q] = tensors[Q].to(torch.int8)
    save_file(tensors, adapter / "base" / "model.safetensors")
    assert "quantized" in refused(adapter, "I8")


def test_ambiguous_names(adapter):
    tensors = read_tensors(adapter / "base")
    twins = {f"{side}.{name}": value.clone() for side in ("left", "right") for name, value in tensors.items()}
    save_file(twins, adapter / "base" / "model.safetensors")
    refused(adapter, "more than one way")


def calibrate_refused(folder, *extra, mentions):
    result = run("calibrate", folder / "adapter", "--data", folder / "data.jsonl", "-o", folder / "stats", *extra)
    assert result.exit_code == 1, repr(result.exception)
    assert result.stderr.count("error: ") == 1
    for word in mentions:
        assert str(word) in result.stderr, result.stderr
    assert not (folder / "stats" / "manifest.json").exists()


def test_calibrate_needs_the_base_of_an_adapter_and_of_nothing_else(adapter):
    write_data(adapter / "data.jsonl", count=3)
    calibrate_refused(adapter, mentions=["names none", "--base BASE"])
    edit_config(adapter, base_model_name_or_path="meta-llama/nowhere")
    calibrate_refused(adapter, mentions=["meta-llama/nowhere", "--base BASE"])
    edit_config(adapter, base_model_name_or_path="x" * 5000)
    calibrate_refused(adapter, mentions=["no local folder", "--base BASE"])
    calibrate_refused(adapter, "--base", adapter / "nowhere", mentions=["not there"])
    calibrate_refused(adapter, "--base", adapter / "adapter", mentions=["holds an adapter"])
    shutil.rmtree(adapter / "adapter")
    shutil.copytree(adapter / "base", adapter / "adapter")
    calibrate_refused(adapter, "--base", adapter / "base", mentions=["--base is for adapters"])


def test_calibrate_refuses_what_the_network_ties(adapter):
    """A checkpoint may store both tables of a model that ties them: only one of them cannot be adapted there."""
    tensors = read_tensors(adapter / "base")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, adapter / "base" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "base" / "config.json").read_text())
    (adapter / "base" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    edit_tensors(adapter, added(EMBED, 100, 32))
    write_data(adapter / "data.jsonl", count=3)
    calibrate_refused(adapter, "--base", adapter / "base", mentions=["model.embed_tokens.weight", "ties"])


def test_statistics_of_another_adapter_are_refused(chain, tmp_path):
    shutil.copytree(chain / "adapter", tmp_path / "adapter")
    edit_config(tmp_path, lora_alpha=9)
    result = run("score", chain / "base", tmp_path / "adapter", "--stats", chain / "stats")
    assert result.exit_code == 1
    assert f"calibrate {tmp_path / 'adapter'} --base {chain / 'base'}" in result.stderr
    options = CalibrateOptions(num_samples=2)
    with pytest.raises(TailorError, match="already holds"):
        calibrate_model(chain / "adapter", chain / "data.jsonl", chain / "stats", options, base=chain / "base")


VALUES = [
    None,
    True,
    False,
    0,
    -1,
    3,
    1 << 70,
    0.5,
    "",
    "x",
    "all",
    [],
    [1],
    [[1]],
    {},
    {"a": 1},
    {"q_proj": -1},
    {"[": 2},
]


def opens(folder):
    """Whether the adapter opens; anything but a TailorError fails the test."""
    try:
        with Checkpoint.open(folder / "base") as base, open_tuned(folder / "adapter", base) as tuned:
            for name in tuned.changed:
                tuned.read(name)
        return True
    except TailorError as error:
        refusal = error
    assert str(folder) in refusal.message
    assert refusal.hint
    return False


def test_mutated_settings_open_or_are_refused(adapter):
    path = adapter / "adapter" / CONFIG
    sound = json.loads(path.read_text())
    outcomes = Counter()
    for name in [*sound, "new"]:
        for value in VALUES:
            path.write_text(json.dumps(sound | {name: value}))
            outcomes[opens(adapter)] += 1
    assert min(outcomes.values()) > 100
    path.write_text("[" * 100_000)
    assert not opens(adapter)


def test_mutated_headers_open_or_are_refused(adapter):
    path = adapter / "adapter" / WEIGHTS
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    generator = random.Random(0)
    names = [name for name in header if name != "__metadata__"]
    outcomes = Counter()
    for _ in range(300):
        changed = json.loads(json.dumps(header))
        name = generator.choice(names)
        kind = generator.randrange(5)
        if kind == 0:
            changed[generator.choice(VALUES[8:10]) + generator.choice(names)[generator.randrange(60) :]] = changed.pop(
                name
            )
        elif kind == 1:
            changed[name][generator.choice(["dtype", "shape", "data_offsets"])] = generator.choice(VALUES)
        elif kind == 2:
            changed[name]["shape"] = changed[name]["shape"][::-1]
        elif kind == 3:
            changed[name]["dtype"] = generator.choice(["I32", "U32", "F32"])
        text = json.dumps(changed).encode()
        if kind == 4:
            position = generator.randrange(len(text))
            text = text[:position] + bytes([generator.randrange(256)]) + text[position + 1 :]
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        outcomes[opens(adapter)] += 1
    assert outcomes[False] > 150


@pytest.mark.parametrize("flag", ["fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"])
def test_null_where_peft_has_a_flag_is_off(adapter, flag):
    with open_tuned(adapter / "adapter", Checkpoint.open(adapter / "base")) as before:
        expected = {name: before.read(name) for name in before.changed}
    edit_config(adapter, **{flag: None})
    with open_tuned(adapter / "adapter", Checkpoint.open(adapter / "base")) as after:
        assert all(torch.equal(after.read(name), value) for name, value in expected.items())
