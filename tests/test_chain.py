"""Every family of models through the whole chain: calibrate, patch, load; in the ordinary way and block by block."""

import functools
import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_family_pair, outputs
from helpers import read_tensors

from tailorcli import CalibrateOptions, PatchOptions, Stats, calibrate_model, patch_checkpoint, plan_patch
from tailorcli.models.names import expected_names

# What stays at base, by family; every other tensor is calibrated and patched.
LEFT_AT_BASE = {
    "bart": {"final_logits_bias": "a buffer"},
    "deepseek-v3": {"model.layers.1.mlp.gate.e_score_correction_bias": "a buffer"},
    "dinov2": {"embeddings.mask_token": "no product with it was recognised"},
    "qwen2-audio": {"audio_tower.embed_positions.weight": "its module is not called"},
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A family's pair with statistics, made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = make_family_pair(tmp_path_factory.mktemp(name), name)
            report = calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
            made[name] = folder, report
        return made[name]

    return make


@pytest.fixture(scope="module")
def outputs_of(chain):
    """What a family's ``base`` or ``tuned`` gives, worked out once."""

    @functools.cache
    def of(name, model):
        folder, _ = chain(name)
        return outputs(load(FAMILIES[name], folder / model), FAMILIES[name])

    return of


def load(family, folder):
    return type(family.make()).from_pretrained(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_calibrated_or_has_its_reason(chain, name):
    _, report = chain(name)
    expected = LEFT_AT_BASE.get(name, {})
    assert set(report.uncalibrated) == set(expected)
    for tensor, reason in expected.items():
        assert reason in report.uncalibrated[tensor]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("density", "model"), [(1.0, "tuned"), (0.0, "base")])
def test_an_all_keeping_mask_gives_the_tuned_logits_and_an_empty_one_the_base(
    chain, outputs_of, tmp_path, name, density, model
):
    folder, _ = chain(name)
    options = PatchOptions(density=density)
    patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "out", folder / "stats", options)
    family = FAMILIES[name]
    assert torch.equal(outputs(load(family, tmp_path / "out"), family), outputs_of(name, model))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sparse_patch_loads_and_keeps_its_density(chain, outputs_of, tmp_path, name):
    folder, _ = chain(name)
    options = PatchOptions(density=0.3)
    report = patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "out", folder / "stats", options)
    base, patched = read_tensors(folder / "base"), read_tensors(tmp_path / "out")
    assert patched.keys() == base.keys()  # the input's own names
    for record in report.to_dict()["tensors"]:
        numel, parts = record.get("numel", 0), len(record.get("experts", [None]))
        if record["status"] == "patched":
            assert record["kept"] == parts * round(0.3 * (numel // parts))
            changed = int((patched[record["name"]] != base[record["name"]]).sum())
            assert changed <= record["kept"]
            assert record["kind"] == "diagonal" or record["error_after"] <= record["error_before"] * (1 + 1e-5)
    family = FAMILIES[name]
    found = outputs(load(family, tmp_path / "out"), family)
    assert found.isfinite().all()
    for model in ("base", "tuned"):
        assert not torch.equal(found, outputs_of(name, model))


@pytest.mark.parametrize("name", FAMILIES)
def test_block_by_block_gives_the_statistics_of_the_ordinary_way(chain, tmp_path, name):
    folder, report = chain(name)
    options = CalibrateOptions(blockwise="always", batch_size=3)
    streamed = calibrate_model(folder / "tuned", folder / "data.jsonl", tmp_path / "stats", options)
    assert streamed.blockwise
    assert not report.blockwise
    assert streamed.uncalibrated == report.uncalibrated
    ours, theirs = Stats.open(tmp_path / "stats"), Stats.open(folder / "stats")
    for tensor, entry in theirs.tensors.items():
        other = ours.tensors[tensor]
        assert (other.role, other.transposed, other.note) == (entry.role, entry.transposed, entry.note)
        for mine, yours in zip(other.hessians, entry.hessians, strict=True):
            assert ours.hessians[mine].tokens == theirs.hessians[yours].tokens
            expected = theirs.load(yours)
            scale = float(expected.abs().max())
            torch.testing.assert_close(ours.load(mine), expected, rtol=1e-4, atol=1e-5 * scale, msg=tensor)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_have_their_own_hessians_from_the_tokens_routed_to_them(chain, name):
    """Together they saw every token as often as the router chooses experts; the mean over them is the layer's."""
    folder, _ = chain(name)
    stats = Stats.open(folder / "stats")
    names = {h for entry in stats.tensors.values() for h in entry.hessians if "gate_up_proj[" in h and ".0." in h}
    assert len(names) == 4
    tokens = json.loads((folder / "stats" / "manifest.json").read_text())["data"]["tokens"]
    assert sum(stats.hessians[h].tokens for h in names) == 2 * tokens
    values = [stats.load(h) for h in names]
    assert all(not torch.equal(values[0], other) for other in values[1:])


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_experts_with_too_few_tokens_share_the_hessian_of_all_and_say_so(chain, tmp_path, name):
    folder, _ = chain(name)
    options = CalibrateOptions(num_samples=2, seq_len=10)
    report = calibrate_model(folder / "tuned", folder / "data.jsonl", tmp_path / "stats", options)
    assert report.notes
    assert all("Hessian of all tokens" in note for note in report.notes.values())
    stats = Stats.open(tmp_path / "stats")
    pooled = [h for h in stats.hessians if h.endswith("[all]")]
    gate = next(h for h in pooled if "gate_up_proj" in h)
    assert stats.hessians[gate].tokens == 2 * report.tokens  # every token, once for each of its two experts
    patched = patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "out", tmp_path / "stats")
    assert {record["name"] for record in patched.to_dict()["tensors"] if "note" in record} == set(report.notes)


def test_fused_and_separate_experts_are_patched_alike(chain, tmp_path):
    """transformers fuses the experts of this checkpoint as it loads it; saved fused, it gives the same entries."""
    from safetensors.torch import save_file

    folder, _ = chain("qwen3-moe")
    fused = {}
    for model in ("base", "tuned"):
        network = load(FAMILIES["qwen3-moe"], folder / model)
        tensors = {name: value.detach().clone() for name, value in network.named_parameters()}
        fused[model] = tmp_path / model
        fused[model].mkdir()
        save_file(tensors, fused[model] / "model.safetensors", {"format": "pt"})
        for file in folder.joinpath(model).iterdir():
            if file.suffix != ".safetensors":
                (fused[model] / file.name).write_bytes(file.read_bytes())
    calibrate_model(fused["tuned"], folder / "data.jsonl", tmp_path / "stats")
    plan = plan_patch(fused["base"], fused["tuned"], stats=tmp_path / "stats")
    assert {len(tensor.experts) for tensor in plan.patched} == {0, 4}
    patch_checkpoint(fused["base"], fused["tuned"], tmp_path / "fused", tmp_path / "stats")
    patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "apart", folder / "stats")
    whole, apart = read_tensors(tmp_path / "fused"), read_tensors(tmp_path / "apart")
    for name, value in apart.items():
        if ".experts." in name and ".down_proj." in name:
            stem, _, rest = name.partition(".experts.")
            expected = whole[f"{stem}.experts.down_proj"][int(rest.split(".")[0])]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_padding_of_images_and_texts_never_counts(chain, tmp_path):
    """Invariant 4 with images: other batches, the same statistics."""
    folder, _ = chain("llava")
    options = CalibrateOptions(batch_size=1)
    calibrate_model(folder / "tuned", folder / "data.jsonl", tmp_path / "stats", options)
    ours, theirs = Stats.open(tmp_path / "stats"), Stats.open(folder / "stats")
    assert ours.tensors == theirs.tensors
    for name, info in theirs.hessians.items():
        assert ours.hessians[name].tokens == info.tokens
        expected = theirs.load(name)
        torch.testing.assert_close(ours.load(name), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_documents_table_names_every_family():
    text = Path(__file__).parent.parent.joinpath("docs", "reference", "architectures.md").read_text()
    for name in FAMILIES:
        assert f"| {name} |" in text
    for tensors in LEFT_AT_BASE.values():
        assert all(f"`{tensor}`" in text for tensor in tensors)


def test_expected_names_are_those_of_transformers_tables():
    network = FAMILIES["mixtral"].make()
    stored = ["model.layers.0.block_sparse_moe.experts.1.w2.weight", "lm_head.weight"]
    found = expected_names(network, stored)
    assert found[stored[0]] == "model.layers.0.mlp.experts.down_proj"
    assert found[stored[1]] == "lm_head.weight"


@pytest.mark.parametrize("name", ["vit", "gpt-oss", "whisper"])
@pytest.mark.parametrize("method", ["average", "joint"])
def test_two_equal_tasks_of_any_layer_kind_merge_to_their_patch(chain, tmp_path, name, method):
    from tailorcli import MergeOptions, merge_patches

    folder, _ = chain(name)
    inputs = folder / "base", folder / "tuned"
    file = tmp_path / "task.safetensors"
    patch_checkpoint(*inputs, tmp_path / "out", folder / "stats", PatchOptions(density=0.3), patch_file=file)
    stats = [folder / "stats"] * 2 if method == "joint" else []
    report = merge_patches(
        folder / "base", [file] * 2, tmp_path / "merged", [folder / "tuned"] * 2, stats, MergeOptions(method=method)
    )
    expected = read_tensors(tmp_path / "out")
    for tensor, value in read_tensors(tmp_path / "merged").items():
        torch.testing.assert_close(value, expected[tensor], rtol=1e-5, atol=1e-6)
    fused = [record for record in report.to_dict()["tensors"] if "fuses experts" in (record["method"] or "")]
    assert len(fused) == (4 if (name, method) == ("gpt-oss", "joint") else 0)
