"""FP8 weights are read as codes * scale; every other quantised weight is refused."""

import json

import pytest
import torch
from helpers import bits, make_pair, quantise, read_tensors
from safetensors.torch import save_file

from tailorcli import Checkpoint, PatchOptions, TailorError, patch_checkpoint
from tailorcli.checkpoint.quantized import open_checkpoint

KINDS = ("block", "channel", "tensor")
F = "model.safetensors"


@pytest.fixture(scope="module", params=KINDS)
def quantised(request, tmp_path_factory):
    """A tiny FP8 Llama pair, and what its weights stand for."""
    folder = make_pair(tmp_path_factory.mktemp(request.param))
    return folder, {name: quantise(folder / name, request.param) for name in ("base", "tuned")}


def test_a_weight_reads_as_its_codes_times_their_scales(quantised):
    folder, values = quantised
    with open_checkpoint(folder / "base") as wide, open_checkpoint(folder / "base", "bf16") as narrow:
        for name, value in values["base"].items():
            assert bits(wide.read(name)) == bits(value)
            assert bits(narrow.read(name)) == bits(value.to(torch.bfloat16))
            assert wide.tensors[name].dtype == "F32"
            assert b"".join(bytes(piece) for piece in wide.pieces(wide.tensors[name], 64)) == bits(value)
        assert len(wide.scales) == len(values["base"])
        assert not narrow.scales
        assert not [name for name in narrow.tensors if "_scale" in name]
        assert wide.fingerprint() == narrow.fingerprint() == Checkpoint.open(folder / "base").fingerprint()


def test_codes_outside_the_mask_are_the_bases_and_inside_the_nearest(quantised):
    folder, values = quantised
    name = "model.layers.1.mlp.down_proj.weight"
    raw = read_tensors(folder / "base")[name]
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(raw.shape, generator=generator) < 0.3
    wanted = torch.where(mask, values["tuned"][name], values["base"][name])
    with open_checkpoint(folder / "base") as base:
        codes = base.encode(name, wanted, mask)
        rounded = base.rounded(name, wanted, mask)
        assert codes.dtype == torch.float8_e4m3fn
        assert torch.equal(codes.view(torch.uint8)[~mask], raw.view(torch.uint8)[~mask])
        assert bits(base.encode(name, rounded, mask)) == bits(codes)  # what is rounded stays as it is
        assert bits(base.decoded(name, codes)) == bits(rounded)
        far = (rounded - wanted)[mask].abs() / wanted[mask].abs().clamp_min(1e-6)
        within = wanted[mask].abs() < 0.9 * values["base"][name].abs().max()
        assert far[within].median() < 1 / 16
        assert torch.equal(base.encode("model.norm.weight", wanted, mask), wanted)


def test_values_beyond_the_scale_become_the_largest_code(quantised):
    folder, values = quantised
    name = "model.layers.0.self_attn.q_proj.weight"
    everything = torch.ones_like(values["base"][name], dtype=torch.bool)
    with open_checkpoint(folder / "base") as base:
        for beyond, code in ((1e9, 448), (-1e9, -448)):
            codes = base.encode(name, torch.full_like(values["base"][name], beyond), everything)
            assert bool((codes.float() == code).all())


def test_blocks_that_config_gives_need_not_divide_the_weight(tmp_path):
    """By their number alone the scales could be of blocks of 4 rows, or of the columns' 5."""
    codes = (torch.arange(88.0).reshape(8, 11) - 40).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    save_file({"m.weight": codes, "m.weight_scale_inv": scales}, tmp_path / F)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"weight_block_size": [5, 4]}}))
    each = torch.tensor([[scales[row // 5, column // 4] for column in range(11)] for row in range(8)])
    with open_checkpoint(tmp_path) as checkpoint:
        value = checkpoint.read("m.weight")
        assert torch.equal(value, codes.float() * each)
        everything = torch.ones(8, 11, dtype=torch.bool)
        assert torch.equal(checkpoint.encode("m.weight", value, everything).float(), codes.float())
        assert checkpoint.read_cost("m.weight") == 88 + 6 * 4


OTHERS = {
    "gptq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
    "awq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
    "bitsandbytes": {"weight": torch.uint8, "weight.absmax": torch.float32, "weight.quant_map": torch.float32},
    "int8": {"weight": torch.int8, "SCB": torch.float32},
    "packed": {"weight_packed": torch.int32, "weight_scale": torch.bfloat16},
    "nvfp4": {"weight_packed": torch.uint8, "weight_scale": torch.float8_e4m3fn, "weight_global_scale": torch.float32},
    "mxfp4": {"weight_packed": torch.uint8, "weight_scale": torch.uint8},
    "mxfp4 experts": {"gate_up_proj_blocks": torch.uint8, "gate_up_proj_scales": torch.uint8},
    "odd scales": {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32},
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    OTHERS["powers of two"] = {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float8_e8m0fnu}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_quantised_weights_are_refused(tmp_path, kind):
    tensors = {f"model.layers.0.mlp.up_proj.{name}": torch.ones(5, 7).to(dtype) for name, dtype in OTHERS[kind].items()}
    if kind == "odd scales":
        tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(2, 3, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": kind}}))
    with pytest.raises(TailorError, match="neither can be patched without the other") as caught:
        open_checkpoint(tmp_path)
    assert kind in caught.value.message
    assert "before they were quantised" in caught.value.hint


def test_scales_of_other_experts_are_refused(tmp_path):
    weights = {"experts.up_proj": torch.ones(2, 4, 4).to(torch.float8_e4m3fn)}
    save_file(weights | {"experts.up_proj_scale_inv": torch.ones(4, 1, 1)}, tmp_path / F)
    with pytest.raises(TailorError, match="neither can be patched without the other"):
        open_checkpoint(tmp_path)


def test_scales_of_what_attention_keeps_stay_the_bases(tmp_path):
    folder = make_pair(tmp_path)
    for number, name in enumerate(("base", "tuned")):
        quantise(folder / name, "channel")
        tensors = read_tensors(folder / name)
        tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([1.0 + number])
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    options = PatchOptions(method="interpolate", weight=0.5)
    patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "out", options=options)
    assert read_tensors(tmp_path / "out")["model.layers.0.self_attn.k_scale"].item() == 1.0


def test_eight_bits_without_scales_that_were_fine_tuned_are_refused(tmp_path):
    folder = make_pair(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    for model in ("base", "tuned"):
        tensors = read_tensors(folder / model)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        save_file(tensors, folder / model / "model.safetensors", metadata={"format": "pt"})
    options = PatchOptions(method="interpolate", weight=0.5)
    with pytest.raises(TailorError, match="F8_E4M3 without scales and differs"):
        patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "out", options=options)
    tensors[name] = read_tensors(folder / "base")[name]  # frozen in the fine-tuning: it stays as it is
    save_file(tensors, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})
    patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "out", options=options)


def test_what_only_looks_like_it_is_let_through(tmp_path):
    """Integers and scales that have nothing to do with each other."""
    tensors = {
        "attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "attn.logit_scale": torch.ones(4),
        "bn.num_batches_tracked": torch.zeros((), dtype=torch.int64),
        "bn.weight": torch.ones(4),
        "layer.scale": torch.ones(4),
        "plain.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),  # a cast without scales
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert not checkpoint.dequantized


def test_what_belongs_to_a_block_of_zeros_is_no_nan(tmp_path):
    save_file(
        {"m.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn), "m.weight_scale": torch.zeros(2, 1)}, tmp_path / F
    )
    with open_checkpoint(tmp_path) as checkpoint:
        value = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        assert checkpoint.rounded("m.weight", value, torch.ones(2, 2, dtype=torch.bool)).abs().sum() == 0


def test_scales_of_inputs_and_outputs_are_no_weights(tmp_path):
    codes = torch.ones(2, 4, 4).to(torch.float8_e4m3fn)
    beside = {f"experts.up_proj_{short}_scale": torch.ones(2) for short in ("activation", "input", "output")}
    beside |= {f"o_proj.{short}_scale": torch.ones(()) for short in ("activation", "input", "output")}
    weights = {"experts.up_proj": codes, "experts.up_proj_scale_inv": torch.ones(2, 1, 1)}
    weights |= {"o_proj.weight": codes[0].clone(), "o_proj.weight_scale": torch.ones(4, 1)}
    save_file(weights | beside, tmp_path / F)
    with open_checkpoint(tmp_path) as wide, open_checkpoint(tmp_path, "bf16") as narrow:
        assert wide.scales == {*beside, "experts.up_proj_scale_inv", "o_proj.weight_scale"}
        assert narrow.tensors.keys() == {"experts.up_proj", "o_proj.weight"}
