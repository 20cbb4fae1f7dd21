"""Patching FP8 checkpoints: in the base's own scheme, or in bfloat16."""

import json
from contextlib import closing

import pytest
import torch
from helpers import bits, broken_off, folder_digest, make_pair, quantise, read_tensors, refused, run

from tailorcli import CalibrateOptions, PatchOptions, Stats, calibrate_model, patch_checkpoint
from tailorcli.checkpoint.quantized import open_checkpoint
from tailorcli.checkpoint.writer import CheckpointWriter


@pytest.fixture(scope="module")
def fp8_pair(tmp_path_factory):
    """A tiny FP8 Llama pair in blocks, with statistics; and what its weights stand for."""
    folder = make_pair(tmp_path_factory.mktemp("fp8"))
    values = {name: quantise(folder / name, "block") for name in ("base", "tuned")}
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    return folder, values


def as_plain(folder, source, values):
    """The same model in float32, as a checkpoint without quantisation."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for file in (source).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    stored = {n: t for n, t in read_tensors(source).items() if "_scale" not in n}
    save_file(stored | values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_statistics_are_those_of_the_dequantised_model(fp8_pair, tmp_path):
    folder, values = fp8_pair
    plain = as_plain(tmp_path / "plain", folder / "tuned", values["tuned"])
    calibrate_model(plain, folder / "data.jsonl", tmp_path / "stats")
    ours, theirs = Stats.open(folder / "stats"), Stats.open(tmp_path / "stats")
    for name, entry in theirs.tensors.items():
        assert ours.tensors[name].hessian == entry.hessian
    for name in theirs.hessians:
        torch.testing.assert_close(ours.load(name), theirs.load(name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_the_patch_is_that_of_the_dequantised_pair_rounded_to_the_bases_scheme(fp8_pair, tmp_path, density):
    folder, values = fp8_pair
    options = PatchOptions(density=density, omega=1, solver="none")
    patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "out", None, options)
    plain = {n: as_plain(tmp_path / n, folder / n, values[n]) for n in ("base", "tuned")}
    patch_checkpoint(plain["base"], plain["tuned"], tmp_path / "wanted", None, options)
    out, wanted, base = (read_tensors(p) for p in (tmp_path / "out", tmp_path / "wanted", folder / "base"))
    assert out.keys() == base.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    with open_checkpoint(folder / "base") as stored:
        for name, value in wanted.items():
            if name in values["base"]:
                mask = value != values["base"][name]
                assert bits(out[name]) == bits(stored.encode(name, value, mask))
                assert bits(out[name + "_scale_inv"]) == bits(base[name + "_scale_inv"])
            else:
                assert bits(out[name]) == bits(value)


@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_with_statistics_in_either_form(fp8_pair, tmp_path, form):
    folder, values = fp8_pair
    options = PatchOptions(density=0.2, fp8_output=form)
    report = patch_checkpoint(folder / "base", folder / "tuned", tmp_path / "out", folder / "stats", options)
    assert report.totals["error_after"] < report.totals["error_before"]
    out = read_tensors(tmp_path / "out")
    if form == "fp8":  # the figures are of the codes that are stored
        records = {record.name: record for record in report.tensors}
        with open_checkpoint(tmp_path / "out") as stored, closing(Stats.open(folder / "stats")) as stats:
            for name, tuned in values["tuned"].items():
                record, base = records[name], values["base"][name].double()
                hessian = stats.unpack(record.hessian, stats.load(record.hessian)).double()
                off, change = stored.read(name).double() - tuned.double(), tuned.double() - base
                error = ((off @ hessian) * off).sum() / ((change @ hessian) * change).sum()
                assert record.error_after == pytest.approx(error.item(), rel=1e-3)
    if form == "fp8":
        run("verify", tmp_path / "out", "--base", folder / "base")
    else:
        refused("verify", tmp_path / "out", "--base", folder / "base", mentions=["in bfloat16"])
    name = "model.layers.0.mlp.up_proj.weight"
    if form == "fp8":
        same = out[name].view(torch.uint8) == read_tensors(folder / "base")[name].view(torch.uint8)
    else:
        assert out[name].dtype == torch.bfloat16
        assert not [n for n in out if "_scale" in n]
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        same = out[name] == values["base"][name].to(torch.bfloat16)
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert 0.79 < same.float().mean() < 1.0


def test_other_methods_leave_the_scales_alone(fp8_pair, tmp_path):
    folder, _ = fp8_pair
    for number, chosen in enumerate(({"method": "interpolate"}, {"method": "dare", "density": 0.5})):
        patch_checkpoint(folder / "base", folder / "tuned", tmp_path / f"{number}", None, PatchOptions(**chosen))
        out, base = read_tensors(tmp_path / f"{number}"), read_tensors(folder / "base")
        for name in base:
            if "_scale" in name:
                assert bits(out[name]) == bits(base[name])
        assert any(bits(out[name]) != bits(base[name]) for name in base if name.endswith("proj.weight"))


def test_what_does_not_go_with_fp8_is_refused(fp8_pair, tmp_path):
    folder, _ = fp8_pair
    pair = (folder / "base", folder / "tuned")
    how = ("--method", "interpolate")
    refused("patch", *pair, *how, "--patch-file", tmp_path / "p.safetensors", mentions=["quantised"])
    refused("patch", *pair, *how, "--resized-vocab", "-o", tmp_path / "o", mentions=["quantised"])
    merge = ("merge-multi", folder / "base", tmp_path / "p.safetensors", "--method", "patches", "-o", tmp_path / "o")
    refused(*merge, mentions=["merge-multi", "quantised"])
    search = ("patch", *pair, "--target", "old=99", "-o", tmp_path / "o")  # which would keep patch files
    new, both = ("--data", folder / "data.jsonl"), ("--stats", folder / "stats", "--retain", folder / "stats")
    for given in (new, both, (*both, "--dry-run")):
        refused(*search, *given, mentions=["--target", "quantised"])
    assert sorted(tmp_path.iterdir()) == []


def inputs_of(folder, samples, name):
    """What goes into the named module of a model when it runs over samples, in float64."""
    from transformers import AutoModelForCausalLM

    network, seen = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for inputs in samples:
            network(**inputs)
    return torch.cat(seen).double()


def test_propagation_sees_the_rounded_weights_and_resumes_to_the_same_bytes(fp8_pair, tmp_path):
    folder, values = fp8_pair
    few = CalibrateOptions(num_samples=12)  # each goes through four models
    stats = {"tuned": tmp_path / "stats", "base": tmp_path / "retain"}
    for which, place in stats.items():
        calibrate_model(folder / which, folder / "data.jsonl", place, few)
    arguments = (folder / "base", folder / "tuned")
    more = {"retain": stats["base"]}
    options = PatchOptions(density=0.3, propagate=True)
    report = patch_checkpoint(*arguments, tmp_path / "whole", stats["tuned"], options, **more)
    assert report.totals["propagated"] > 0
    with broken_off(CheckpointWriter, 9):
        patch_checkpoint(*arguments, tmp_path / "out", stats["tuned"], options, **more)
    again = PatchOptions(density=0.3, propagate=True, resume=True)
    patch_checkpoint(*arguments, tmp_path / "out", stats["tuned"], again, **more)
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "whole")
    base, out = read_tensors(folder / "base"), read_tensors(tmp_path / "out")
    name = "model.layers.1.self_attn.o_proj.weight"
    same = out[name].view(torch.uint8) == base[name].view(torch.uint8)
    assert 0.69 < same.float().mean() < 1.0
    with closing(open_checkpoint(tmp_path / "whole")) as whole:
        written = {n: whole.read(n).float() for n in values["base"]}
    models = (
        as_plain(tmp_path / "x", folder / "tuned", values["tuned"]),
        as_plain(tmp_path / "y", tmp_path / "whole", written),
    )
    x, y = (inputs_of(model, Stats.open(stats["tuned"]).samples(), name.removesuffix(".weight")) for model in models)
    record = next(record for record in report.tensors if record.name == name)
    assert record.input_shift == pytest.approx(float((x - y).square().sum() / x.square().sum()), rel=1e-3)


MIXED = {"a quantised base": ("block", None), "a quantised tuned": (None, "block"), "two schemes": ("block", "channel")}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_the_output_says_how_it_is_quantised_whatever_tuned_is(tmp_path, kind, form):
    from transformers import AutoModelForCausalLM

    folder = make_pair(tmp_path, dtype=torch.bfloat16)
    values = {name: read_tensors(folder / name) for name in ("base", "tuned")}
    for name, scheme in zip(("base", "tuned"), MIXED[kind], strict=True):
        values[name] |= quantise(folder / name, scheme) if scheme else {}
    how = ("--method", "interpolate", "--weight", "0.5", "--allow-dtype-mismatch", "--fp8-output", form)
    run("patch", folder / "base", folder / "tuned", *how, "-o", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    with open_checkpoint(tmp_path / "out") as out:
        assert out.dequantized == (MIXED[kind][0] is not None and form == "fp8")
        for name, base in values["base"].items():
            torch.testing.assert_close(loaded[name], out.read(name).float(), rtol=0.01, atol=1e-4)
            if "_scale" not in name:
                wanted = base.double().lerp(values["tuned"][name].double(), 0.5)
                assert (loaded[name] - wanted).norm() < 0.1 * wanted.norm()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = config.get("quantization_config", {}).get("quant_method")
    assert said == ("fp8" if form == "fp8" and MIXED[kind][0] else None)
    if MIXED[kind][0] is None:  # its bits are the base's to compare, whatever --fp8-output said
        run("verify", tmp_path / "out", "--base", folder / "base")


def test_a_pair_of_two_dtypes_is_told_as_it_is_stored(tmp_path):
    folder = make_pair(tmp_path, dtype=torch.bfloat16)
    quantise(folder / "base", "block")
    said = ["F8_E4M3 with scales in base", "BF16 in tuned"]
    pair = (folder / "base", folder / "tuned")
    refused("patch", *pair, "--method", "interpolate", "-o", tmp_path / "out", mentions=said)


def test_an_output_in_bfloat16_has_no_shard_for_what_held_scales_alone(tmp_path):
    from safetensors.torch import save_file

    folder = make_pair(tmp_path, dtype=torch.bfloat16)
    for name in ("base", "tuned"):
        quantise(folder / name, "block")
    tensors = read_tensors(folder / "base")
    shards = [{n: t for n, t in tensors.items() if ("_scale" in n) is scales} for scales in (False, True)]
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / "base" / file, metadata={"format": "pt"})
    (folder / "base" / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard}}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    for form, wanted in (("bf16", ["model.safetensors"]), ("fp8", files)):
        out = tmp_path / form
        run("patch", folder / "base", folder / "tuned", "--method", "interpolate", "--fp8-output", form, "-o", out)
        assert sorted(path.name for path in out.glob("*.safetensors")) == wanted
        assert (out / "model.safetensors.index.json").exists() == (form == "fp8")


def test_a_patch_file_of_a_quantised_tuned_gives_a_plain_model(tmp_path):
    folder = make_pair(tmp_path, dtype=torch.bfloat16)
    quantise(folder / "tuned", "block")
    how = ("--method", "interpolate", "--allow-dtype-mismatch", "--patch-file", tmp_path / "p.safetensors")
    run("patch", folder / "base", folder / "tuned", *how)
    run("apply", folder / "base", tmp_path / "p.safetensors", "-o", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("said", [{}, {"quantization_config": {"quant_method": "modelopt"}}])
@pytest.mark.parametrize("kind", ["block", "channel", "tensor"])
def test_evaluate_runs_what_the_codes_stand_for(tmp_path, kind, said):
    """Also where transformers knows nothing of the scheme, and would run the codes as if they were weights."""
    folder = make_pair(tmp_path)
    plain = as_plain(tmp_path / "plain", folder / "base", quantise(folder / "base", kind))
    config = json.loads((folder / "base" / "config.json").read_text())
    del config["quantization_config"]
    (folder / "base" / "config.json").write_text(json.dumps(config | said))
    task = ("--task", f"old={folder / 'data.jsonl'}:text", "--json")
    (ours,), (theirs,) = (
        json.loads(run("evaluate", model, *task).stdout)["models"] for model in (folder / "base", plain)
    )
    assert ours["tasks"]["old"]["loss"] == pytest.approx(theirs["tasks"]["old"]["loss"], rel=1e-6)


def test_evaluate_refuses_codes_that_transformers_does_not_read(tmp_path):
    from safetensors.torch import save_file

    folder = make_pair(tmp_path)
    tensors, name = read_tensors(folder / "base"), "model.layers.0.mlp.up_proj.weight"
    tensors |= {name: tensors[name].to(torch.float8_e5m2), f"{name}_scale": torch.ones(48, 1)}
    save_file(tensors, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    refused("evaluate", folder / "base", "--task", f"old={folder / 'data.jsonl'}:text", mentions=["F8_E5M2 codes"])
