"""Propagation: its equations against a direct float64 minimisation, and whole models against a re-implementation."""

import json
import shutil
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import make_family_pair
from helpers import (
    bits,
    broken_off,
    count_mapped_files,
    folder_digest,
    make_model,
    make_pair,
    make_tokenizer,
    perturb,
    read_tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP
from typer.testing import CliRunner

from tailorcli import PatchOptions, TailorError, apply_patch, calibrate_model, patch_checkpoint, plan_patch
from tailorcli.calibration.stats import SAMPLES, Stats
from tailorcli.checkpoint.folder import WORK_FOLDER, Checkpoint
from tailorcli.checkpoint.writer import CheckpointWriter
from tailorcli.cli import app
from tailorcli.core.hessian import unpack_triangle
from tailorcli.core.propagation import (
    accumulate_moments_,
    complete_,
    no_moments,
    propagated_errors,
    solve_propagated,
)
from tailorcli.core.retain import retain_scale
from tailorcli.models.layers import find_layers
from tailorcli.models.places import Place
from tailorcli.options import CalibrateOptions
from tailorcli.patchfile.report import load_report
from tailorcli.patchfile.writer import PatchWriter
from tailorcli.patching.cost import propagation_bytes
from tailorcli.patching.propagate import Propagation, _are_aligned, _spread
from tailorcli.patching.run import Run

PROPAGATED = PatchOptions(propagate=True, retain_weight=0.3, damping=0.1)
FEW = CalibrateOptions(num_samples=12)  # each sample goes through up to four models
CPU = torch.device("cpu")
OTHER = {"tuned": "base", "base": "tuned"}  # the model whose samples they are not


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny Llama pair (untied head) with statistics of both models, samples kept."""
    folder = make_pair(tmp_path_factory.mktemp("propagate"), layers=3)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats", CalibrateOptions(num_samples=16))
    calibrate_model(
        folder / "base", None, folder / "retain", CalibrateOptions(synthetic=True, num_samples=8, seq_len=12)
    )
    return folder


def run(pair, output, options=PROPAGATED, **more):
    more = {"retain": pair / "retain"} | more
    return patch_checkpoint(pair / "base", pair / "tuned", output, pair / "stats", options, **more)


@pytest.fixture(scope="module")
def whole(pair):
    """The folder that a run writes."""
    run(pair, pair / "whole")
    return pair / "whole"


@pytest.fixture(scope="module")
def whole_file(pair):
    """The patch file that a run writes which writes nothing else."""
    run(pair, None, patch_file=pair / "whole.safetensors")
    return pair / "whole.safetensors"


def moments_of(patched, unpatched):
    found = no_moments(patched.shape[1], CPU)
    for x, y in zip(torch.tensor_split(patched, 3), torch.tensor_split(unpatched, 3), strict=True):
        accumulate_moments_(found, x, y)
    complete_(found)
    return found


@given(size=st.integers(1, 16), rows=st.integers(1, 6), seed=st.integers(0, 10_000), transposed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_fit_is_the_minimum_of_both_terms_on_the_mask(size, rows, seed, transposed):
    g = torch.Generator().manual_seed(seed)
    base, tuned, plain = (torch.randn(rows, size, generator=g) for _ in range(3))
    mask = torch.rand(rows, size, generator=g) < 0.5
    plain = torch.where(mask, plain, base)
    x, x_r = (torch.randn(3 * size + 4, size, generator=g) for _ in range(2))
    moved, moved_r = x + 0.3 * torch.randn(x.shape, generator=g), x_r + 0.3 * torch.randn(x.shape, generator=g)
    new, retained = moments_of(moved, x), moments_of(moved_r, x_r)
    given_ = [t.T.contiguous() if transposed else t for t in (base, tuned, plain, mask)]
    found = solve_propagated(
        *given_, new, retained, retain_weight=0.7, damping=0.05, transposed=transposed, tolerance=1e-7
    )
    result = found.patched.T if transposed else found.patched
    assert bits(result[~mask]) == bits(base[~mask])

    scale = retain_scale(new.hessian, retained.hessian, 0.7)
    amount = 0.05 * float((new.hessian + scale * retained.hessian).diagonal().mean())
    n = len(x)
    for row in range(rows):
        kept = mask[row].numpy()
        # Stacked least squares over the tokens themselves: no Hessian of ours in it.
        roots = (np.sqrt(2 / n), np.sqrt(2 * scale / n), np.sqrt(amount))
        design = np.concatenate(
            [roots[0] * moved.double().numpy(), roots[1] * moved_r.double().numpy(), roots[2] * np.eye(size)]
        )
        wanted = np.concatenate(
            [
                roots[0] * (x.double() @ tuned[row].double()).numpy(),
                roots[1] * (x_r.double() @ base[row].double()).numpy(),
                roots[2] * plain[row].double().numpy(),
            ]
        )
        fixed = np.where(kept, 0.0, base[row].double().numpy())
        expected = fixed.copy()
        expected[kept] = np.linalg.lstsq(design[:, kept], wanted - design @ fixed, rcond=None)[0]
        np.testing.assert_allclose(result[row].numpy(), expected, atol=2e-4 * (1 + np.abs(expected).max()))


def test_moments_are_means_over_all_batches_and_tell_how_far_the_inputs_moved():
    x = torch.randn(30, 5, dtype=torch.float64)
    y = x + 0.1 * torch.randn(30, 5, dtype=torch.float64)
    found = moments_of(y.float(), x.float())
    torch.testing.assert_close(found.hessian.double(), 2 / 30 * y.T @ y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.drift.double(), 2 / 30 * (x - y).T @ y, rtol=1e-4, atol=1e-5)
    assert found.tokens == 30
    assert found.shift == pytest.approx(float((x - y).square().sum() / x.square().sum()), rel=1e-4)


def test_moments_of_float16_inputs_above_255_are_summed_wider():
    """256 squared is more than float16 holds."""
    g = torch.Generator().manual_seed(0)
    x = (3000 * torch.randn(40, 6, generator=g)).to(torch.float16)
    y = (x.float() + 400 * torch.randn(40, 6, generator=g)).to(torch.float16)
    assert torch.isinf(x.square()).any()
    found = moments_of(y, x)
    x64, y64 = x.double(), y.double()
    gap = x64 - y64
    assert found.shift == pytest.approx(float(gap.square().sum() / x64.square().sum()), rel=1e-6)
    assert found.whole == pytest.approx(float(x64.square().sum()), rel=1e-6)
    torch.testing.assert_close(found.hessian.double(), 2 / 40 * y64.T @ y64, rtol=1e-5, atol=1.0)
    torch.testing.assert_close(found.drift.double(), 2 / 40 * gap.T @ y64, rtol=1e-5, atol=1.0)


def test_a_float16_model_with_large_activations_reports_the_shifts_of_a_float32_one(tmp_path):
    make_pair(tmp_path, dtype=torch.float16)
    for which in ("base", "tuned"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / which)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.post_attention_layernorm.weight.mul_(2000)
                layer.mlp.gate_proj.weight.mul_(0.01)
                layer.mlp.up_proj.weight.mul_(0.01)
        model.save_pretrained(tmp_path / which)
    shifts = {}
    for dtype in ("float16", "float32"):
        stats = {which: tmp_path / f"{which}-{dtype}" for which in ("base", "tuned")}
        for which, folder in stats.items():
            calibrate_model(tmp_path / which, tmp_path / "data.jsonl", folder, replace(FEW, dtype=dtype))
        report = patch_checkpoint(
            *(tmp_path / "base", tmp_path / "tuned", tmp_path / dtype, stats["tuned"], PROPAGATED),
            retain=stats["base"],
        )
        shifts[dtype] = {r.name: (r.input_shift, r.retained_input_shift) for r in report.tensors if r.propagated}
    loud = "model.layers.1.mlp.gate_proj.weight"
    hessian = Stats.open(tmp_path / "tuned-float16").hessians[loud]
    assert hessian.mean_diagonal > 2 * 256**2
    assert min(shifts["float32"][loud]) > 1e-3
    assert shifts["float16"].keys() == shifts["float32"].keys()
    for name, found in shifts["float16"].items():
        assert found == pytest.approx(shifts["float32"][name], rel=0.05, abs=1e-4), name


def test_weights_are_fitted_as_they_are_stored_where_the_models_run_in_fewer_bits(pair, tmp_path):
    for which in ("tuned", "base"):
        calibrate_model(pair / which, pair / "data.jsonl", tmp_path / which, replace(FEW, dtype="bfloat16"))
    report = patch_checkpoint(
        *(pair / "base", pair / "tuned", tmp_path / "out", tmp_path / "tuned", PROPAGATED), retain=tmp_path / "base"
    )
    assert report.totals["propagated"] == 3 * 7 + 1
    base, out = read_tensors(pair / "base"), read_tensors(tmp_path / "out")
    for record in report.tensors:
        assert out[record.name].dtype == torch.float32
        assert int((out[record.name] != base[record.name]).sum()) <= record.kept
        assert not record.propagated or not torch.equal(out[record.name], out[record.name].bfloat16().float())


def test_the_fit_has_its_earlier_name_in_the_core():
    import tailorcli.core

    assert tailorcli.core.refit is tailorcli.core.solve_propagated is solve_propagated


def test_unmoved_inputs_leave_an_undamped_optimum_where_it_is():
    g = torch.Generator().manual_seed(0)
    base, tuned = torch.randn(4, 8, generator=g), torch.randn(4, 8, generator=g)
    x, x_r = torch.randn(50, 8, generator=g), torch.randn(50, 8, generator=g)
    new, retained = moments_of(x, x), moments_of(x_r, x_r)
    mask = torch.ones(4, 8, dtype=torch.bool)
    first = solve_propagated(base, tuned, base, mask, new, retained, retain_weight=1.0, damping=0.0).patched
    again = solve_propagated(base, tuned, first, mask, new, retained, retain_weight=1.0, damping=0.0)
    torch.testing.assert_close(again.patched, first, rtol=1e-4, atol=1e-5)
    scale = retain_scale(new.hessian, retained.hessian, 1.0)
    system = new.hessian + scale * retained.hessian
    target = tuned @ new.hessian + scale * base @ retained.hessian
    torch.testing.assert_close(first, torch.linalg.solve(system, target.T).T)


def inputs_of(network, samples, names):
    """What goes into the named modules when a network runs over samples: name -> (N, I)."""
    seen = {name: [] for name in names}
    handles = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for inputs in samples:
            network(**inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def test_a_model_is_fitted_block_by_block_from_the_patched_blocks_before(pair, tmp_path):
    run(pair, tmp_path / "plain", replace(PROPAGATED, propagate=False))
    report = run(pair, tmp_path / "out")
    plain, found = read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "out")
    base, tuned = read_tensors(pair / "base"), read_tensors(pair / "tuned")
    networks = {
        name: AutoModelForCausalLM.from_pretrained(path).eval()
        for name, path in (("base", pair / "base"), ("tuned", pair / "tuned"), ("patched", tmp_path / "plain"))
    }
    samples = {"tuned": Stats.open(pair / "stats").samples(), "base": Stats.open(pair / "retain").samples()}
    linear = [name for name, module in networks["base"].named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 3 * 7 + 1
    together = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    stages = [
        [name for name in linear if name.startswith(f"model.layers.{number}.") and name.endswith(ends)]
        for number in range(3)
        for ends in together
    ]
    for names in (*stages, ["lm_head"]):
        assert names
        references = {which: inputs_of(networks[which], samples[which], names) for which in samples}
        patched = {which: inputs_of(networks["patched"], samples[which], names) for which in samples}
        for name in names:
            moments = {w: moments_of(patched[w][name], references[w][name]) for w in samples}
            weight = f"{name}.weight"
            mask = plain[weight] != base[weight]
            expected = solve_propagated(
                *(base[weight], tuned[weight], plain[weight], mask, moments["tuned"], moments["base"]),
                retain_weight=0.3,
                damping=0.1,
            ).patched
            # An entry that a plain patch happens to leave at base to the bit is not in this mask.
            torch.testing.assert_close(found[weight], expected, rtol=1e-3, atol=1e-4)
            record = next(record for record in report.to_dict()["tensors"] if record["name"] == weight)
            assert record["propagated"]
            assert record["input_shift"] == pytest.approx(moments["tuned"].shift, rel=1e-3)
            assert record["retained_input_shift"] == pytest.approx(moments["base"].shift, rel=1e-3)
        for name in names:
            networks["patched"].get_parameter(f"{name}.weight").data.copy_(found[f"{name}.weight"])
    for name in base:
        if name.endswith(("norm.weight", "embed_tokens.weight")):
            assert bits(found[name]) == bits(plain[name])
    moved = [name for name in base if not torch.equal(found[name], plain[name])]
    assert len(moved) == 3 * 7 + 1


def patched_errors(base, tuned, patched, mask, inputs, unpatched, energies):
    """A dense float64 reading of what a report says: figures from the very inputs, each kind (N, I)."""
    base, tuned, patched = (t.double() for t in (base, tuned, patched))
    x, y, x_r, y_r = (t.double() for t in (inputs["tuned"], unpatched["tuned"], inputs["base"], unpatched["base"]))

    def error(weight):
        return 2 / len(x) * float((x @ weight.T - y @ tuned.T).square().sum())

    return {
        "output_energy": energies["tuned"],
        "error_before": error(torch.where(mask, tuned, base)) / energies["tuned"],
        "error_after": error(patched) / energies["tuned"],
        "drift_energy": energies["base"],
        "drift": 2 / len(x_r) * float((x_r @ patched.T - y_r @ base.T).square().sum()) / energies["base"],
    }


@given(
    size=st.integers(1, 12),
    rows=st.integers(1, 5),
    shift=st.sampled_from([0.0, 0.01, 0.5]),
    seed=st.integers(0, 10_000),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_the_errors_are_those_of_the_inputs_in_the_patched_model(size, rows, shift, seed, transposed, dtype):
    g = torch.Generator().manual_seed(seed)
    base, change, fit = (torch.randn(rows, size, generator=g) for _ in range(3))
    base, tuned, patched = (t.to(dtype) for t in (base, base + 0.3 * change, base + 0.3 * fit))
    mask = torch.rand(rows, size, generator=g) < 0.5
    patched = torch.where(mask, patched, base)
    unpatched = {which: torch.randn(3 * size + 4, size, generator=g) for which in ("tuned", "base")}
    inputs = {which: x + shift * torch.randn(x.shape, generator=g) for which, x in unpatched.items()}
    moments = [moments_of(inputs[which], unpatched[which]) for which in ("tuned", "base")]
    stored = [t.T.contiguous() if transposed else t for t in (base, tuned, patched, mask)]
    energies = {"tuned": 0.7 * size * rows, "base": 0.3 * size * rows}
    given_ = {"output_energy": energies["tuned"], "drift_energy": energies["base"], "transposed": transposed}
    found = propagated_errors(*stored, *moments, **given_)
    for name, expected in patched_errors(base, tuned, patched, mask, inputs, unpatched, energies).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    unknown = propagated_errors(*stored, *moments, **given_ | {"output_energy": None, "drift_energy": 0.0})
    assert (unknown.error_before, unknown.error_after, unknown.drift) == (None, None, 0.0)


def test_the_report_measures_what_is_stored_on_the_inputs_that_the_patched_model_has(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("tailorcli.patching.propagate.COMPARED", 1000)
    report = run(pair, tmp_path / "out")
    base, tuned, found = (read_tensors(path) for path in (pair / "base", pair / "tuned", tmp_path / "out"))
    stats, retain = Stats.open(pair / "stats"), Stats.open(pair / "retain")
    samples = {"tuned": stats.samples(), "base": retain.samples()}
    fitted = [record for record in report.to_dict()["tensors"] if record.get("propagated")]
    modules = [record["name"].removesuffix(".weight") for record in fitted]
    load = lambda path: AutoModelForCausalLM.from_pretrained(path).eval()  # noqa: E731
    unpatched = {which: inputs_of(load(pair / which), samples[which], modules) for which in samples}
    inputs = {which: inputs_of(load(tmp_path / "out"), samples[which], modules) for which in samples}
    others = {which: inputs_of(load(pair / name), samples[which], modules) for which, name in OTHER.items()}
    weights = {"base": base, "tuned": tuned}
    for record, module in zip(fitted, modules, strict=True):
        name = record["name"]
        both = ({which: seen[which][module] for which in samples} for seen in (inputs, unpatched))
        mask = found[name] != base[name]  # but for a kept entry that was fitted to base's value to the bit
        energies = {}
        for which, other in OTHER.items():
            own = unpatched[which][module].double() @ weights[which][name].double().T
            apart = own - others[which][module].double() @ weights[other][name].double().T
            energies[which] = 2 / len(own) * float(apart.square().sum())
        for figure, expected in patched_errors(base[name], tuned[name], found[name], mask, *both, energies).items():
            assert record[figure] == pytest.approx(expected, rel=2e-3, abs=1e-5), (name, figure)
        assert record["error_after"] < record["error_before"]
        delta, moved, error = ((a[name] - b[name]).double() for a, b in ((tuned, base), (found, base), (found, tuned)))
        h, r = (unpack_triangle(s.load(s.tensors[name].hessian), delta.shape[1]).double() for s in (stats, retain))
        form = lambda d, matrix: float((d @ matrix * d).sum())  # noqa: E731
        assert record["error_after_unpatched_inputs"] == pytest.approx(form(error, h) / form(delta, h), rel=1e-3)
        assert record["drift_unpatched_inputs"] == pytest.approx(form(moved, r) / form(delta, r), rel=1e-3)
        assert record["output_energy_unpatched_inputs"] == pytest.approx(form(delta, h), rel=1e-3)
        assert record["drift_energy_unpatched_inputs"] == pytest.approx(form(delta, r), rel=1e-3)
        assert record["distance_after"] == pytest.approx(float(moved.abs().sum()), rel=1e-4)
        assert record["kept"] == round(0.1 * delta.numel())
    measured = [record for record in report.to_dict()["tensors"] if record["kind"] == "full"]
    for name in ("error_before", "error_after", "drift"):
        mean = sum(record[name] for record in measured) / len(measured)
        assert report.totals[name] == pytest.approx(mean)
        mean = sum(record[f"{name}_unpatched_inputs"] for record in measured) / len(measured)
        assert report.totals[f"{name}_unpatched_inputs"] == pytest.approx(mean)
    plain = run(pair, tmp_path / "plain", replace(PROPAGATED, propagate=False))
    assert not any("unpatched" in name for name in plain.totals)
    assert report.totals["error_before_unpatched_inputs"] == pytest.approx(plain.totals["error_before"])


def test_the_batches_that_are_compared_are_spread():
    assert _spread([1] * 128) == [number % 4 == 0 for number in range(128)]
    assert _spread([8] * 16) == [number % 4 == 0 for number in range(16)]
    assert _spread([5, 7]) == [True, True]
    assert _spread([100, 100]) == [True, False]
    assert _spread([]) == []


def test_a_few_samples_tell_how_far_the_unpatched_models_are_apart(pair, tmp_path, monkeypatch):
    """Only what is divided by is an estimate, and the output is the same to the byte."""
    monkeypatch.setattr(Stats, "options", CalibrateOptions(batch_size=1))
    reports = {}
    for count in (1000, 3):
        monkeypatch.setattr("tailorcli.patching.propagate.COMPARED", count)
        reports[count] = run(pair, tmp_path / str(count))
    whole, few = (read_tensors(tmp_path / str(count)) for count in reports)
    assert all(bits(value) == bits(few[name]) for name, value in whole.items())
    for one, other in zip(reports[1000].tensors, reports[3].tensors, strict=True):
        one, other = one.to_dict(), other.to_dict()
        if one.get("propagated"):
            for energy, figure in (("output_energy", "error_after"), ("drift_energy", "drift")):
                assert one[energy] != other[energy]
                assert 1 / 3 < one[energy] / other[energy] < 3
                assert one[energy] * one[figure] == pytest.approx(other[energy] * other[figure], rel=1e-5)


def test_a_propagated_report_without_the_unpatched_figures_opens(whole, tmp_path):
    """As earlier versions wrote them."""
    shutil.copytree(whole, tmp_path / "out")
    path = tmp_path / "out" / "tailor_report.json"
    report = json.loads(path.read_text())
    for part in (report["totals"], *report["tensors"]):
        for name in [name for name in part if name.endswith("_unpatched_inputs")]:
            del part[name]
    path.write_text(json.dumps(report))
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--plot", str(tmp_path / "plot.png")])
    assert shown.exit_code == 0, shown.output
    assert load_report(path).totals == report["totals"]


@pytest.mark.parametrize("batch", [1, 5])
def test_batches_do_not_matter(pair, whole, tmp_path, batch):
    for which, samples in (("tuned", "stats"), ("base", "retain")):
        manifest = pair / samples / "manifest.json"
        changed = json.loads(manifest.read_text())
        changed["options"]["batch_size"] = batch
        other = tmp_path / samples
        other.mkdir()
        for file in (pair / samples).iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        (other / "manifest.json").write_text(json.dumps(changed))
        assert Stats.open(other).samples()[0].keys(), which
    patch_checkpoint(
        *(pair / "base", pair / "tuned", tmp_path / "other", tmp_path / "stats", PROPAGATED),
        retain=tmp_path / "retain",
    )
    one, other = read_tensors(whole), read_tensors(tmp_path / "other")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("after", [pytest.param(n, marks=() if n == 13 else pytest.mark.slow) for n in (1, 7, 13, 29)])
def test_an_interrupted_run_is_finished_to_the_same_bytes(pair, whole, tmp_path, after):
    with broken_off(CheckpointWriter, after):
        run(pair, tmp_path / "out")
    run(pair, tmp_path / "out", replace(PROPAGATED, resume=True))
    assert folder_digest(tmp_path / "out") == folder_digest(whole)


def test_hidden_states_can_wait_in_files(pair, whole, tmp_path, monkeypatch):
    files = count_mapped_files(monkeypatch)
    monkeypatch.setattr("tailorcli.models.spill.HIDDEN_SHARE", 0.0)
    run(pair, tmp_path / "files")
    assert len(files) > 3 * 4 * 10  # blocks, groups of layers, batches
    assert {file.parent for file in files} == {tmp_path / "files" / WORK_FOLDER}  # which is gone once it is finished
    assert folder_digest(tmp_path / "files") == folder_digest(whole)


def test_weights_that_the_models_hold_are_not_read_again(pair, whole, tmp_path, monkeypatch):
    """A model in the dtype that is stored has them to the bit."""
    read_again = []

    def read(self, source, model, name):
        held = model.network.get_parameter(model.places[name].parameters[0])
        read_again.append(torch.equal(held, source.read(name)) and held.dtype == source.read(name).dtype)
        return source.read(name)

    monkeypatch.setattr(Propagation, "_weight", read)
    run(pair, tmp_path / "out")
    assert folder_digest(tmp_path / "out") == folder_digest(whole)
    assert len(read_again) > 20
    assert all(read_again)


def test_an_interrupted_patch_file_is_finished_to_the_same_bytes(pair, whole_file, tmp_path, monkeypatch):
    """No checkpoint is at hand from which the finished blocks could be read: they are worked out again."""
    with broken_off(PatchWriter, 16):
        run(pair, None, patch_file=tmp_path / "p.safetensors")
    written = []
    write = Run.write
    monkeypatch.setattr(
        Run, "write", lambda self, tensor, *how: written.append(tensor.name) or write(self, tensor, *how)
    )
    run(pair, None, replace(PROPAGATED, resume=True), patch_file=tmp_path / "p.safetensors")
    assert len(written) == len({*written}) == len(read_tensors(pair / "base")) - 16  # the others are there
    assert (tmp_path / "p.safetensors").read_bytes() == whole_file.read_bytes()


def test_the_patch_file_gives_the_same_checkpoint(pair, whole_file, tmp_path):
    run(pair, tmp_path / "out", patch_file=tmp_path / "p.safetensors")
    for file in (tmp_path / "p.safetensors", whole_file):
        apply_patch(pair / "base", file, tmp_path / file.stem)
        expected = read_tensors(tmp_path / "out")
        for name, value in read_tensors(tmp_path / file.stem).items():
            assert bits(value) == bits(expected[name])


def test_small_hidden_states_count_twice_where_the_heap_keeps_their_holes(pair, monkeypatch):
    plan = plan_patch(*(pair / "base", pair / "tuned", None, pair / "stats", PROPAGATED), retain=pair / "retain")
    known = Stats.open(pair / "stats"), Stats.open(pair / "retain")
    with Checkpoint.open(pair / "base") as base, closing(known[0]), closing(known[1]):

        def asked(**how):
            return propagation_bytes(list(plan.tensors), base, *known, **how)

        states = asked(on_heap=False) - asked(share=0.0, on_heap=False)
        assert states > 0
        assert asked() == asked(on_heap=False) + states
        monkeypatch.setattr("tailorcli.patching.cost._MAPPED", 64)  # as if these arrays were large
        assert asked() == asked(on_heap=False)


def propagate_by_command(pair, *more):
    paths = (pair / "base", pair / "tuned", "--stats", pair / "stats", "--retain", pair / "retain")
    return CliRunner().invoke(app, [str(part) for part in ("patch", *paths, *more)])


def test_the_command_says_what_it_does_and_costs(pair, tmp_path):
    dry = propagate_by_command(pair, "-o", tmp_path / "out", "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    paths = (pair / "base", pair / "tuned", tmp_path / "plain", pair / "stats")
    plain = plan_patch(*paths, PatchOptions(propagate=False), retain=pair / "retain")
    with_runs = plan_patch(*paths, PatchOptions(propagate=True), retain=pair / "retain")
    assert json.loads(dry.output)["read_bytes"] == with_runs.read_bytes > plain.read_bytes
    assert with_runs.peak_bytes > plain.peak_bytes
    result = propagate_by_command(pair, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "propagated" in result.output
    totals = json.loads((tmp_path / "out" / "tailor_report.json").read_text())["totals"]
    before, after, drift = (f"{100 * totals[name]:.1f}%" for name in ("error_before", "error_after", "drift"))
    assert (
        f"{before} before compensation, {after} after (100% is the base; on the patched model's inputs, joint)"
        in result.output
    )
    assert f"{drift} of the tuned model's (0% is the base; on the patched model's inputs, " in result.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_without_a_retain_term_or_samples_it_says_what_to_do(pair, tmp_path):
    common = (pair / "base", pair / "tuned", tmp_path / "out", pair / "stats")
    for options, retain in ((PROPAGATED, None), (replace(PROPAGATED, retain_weight=0.0), pair / "retain")):
        with pytest.raises(TailorError, match="needs the retain term"):
            patch_checkpoint(*common, options, retain=retain)
    bare = CalibrateOptions(keep_samples=False)
    calibrate_model(pair / "base", pair / "data.jsonl", tmp_path / "bare", bare)
    assert not (tmp_path / "bare" / SAMPLES).exists()
    with pytest.raises(TailorError, match="holds no samples") as raised:
        patch_checkpoint(*common, PROPAGATED, retain=tmp_path / "bare")
    assert "--no-propagate" in raised.value.hint
    patch_checkpoint(*common, replace(PROPAGATED, propagate=False), retain=tmp_path / "bare")
    for changed in ({"solver": "none"}, {"weight": 0.5}, {"method": "dare"}):
        with pytest.raises(TailorError, match="propagate is for the method tailor"):
            replace(PROPAGATED, **changed)


def test_samples_that_are_not_the_manifests_are_refused(pair, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(pair / "retain", copied)
    samples = Stats.open(copied).samples()
    assert len(samples) == 8
    assert all(inputs["input_ids"].shape == (1, 12) for inputs in samples)
    (copied / SAMPLES).write_bytes(b"\0" * 100)
    with pytest.raises(TailorError, match=f"{SAMPLES} is not the one"):
        run(pair, tmp_path / "out", retain=copied)
    (copied / SAMPLES).unlink()
    with pytest.raises(TailorError, match="cannot read the samples"):
        run(pair, tmp_path / "out", retain=copied)


def test_a_second_calibration_without_samples_takes_the_old_ones_away(pair, tmp_path):
    few = CalibrateOptions(num_samples=3)
    calibrate_model(pair / "base", pair / "data.jsonl", tmp_path / "stats", few)
    assert len(Stats.open(tmp_path / "stats").samples()) == 3
    calibrate_model(
        pair / "base", pair / "data.jsonl", tmp_path / "stats", replace(few, keep_samples=False, overwrite=True)
    )
    assert not Stats.open(tmp_path / "stats").manifest.get("samples")
    assert sorted(file.name for file in (tmp_path / "stats").iterdir()) == ["hessians.safetensors", "manifest.json"]


# Propagated and plain layers of each: Conv1D; pictures and a projector; experts of a list, and fused ones; an encoder.
KINDS = {
    "gpt2": (4 * 2, ()),
    "llava": (None, ("vision_tower", "multi_modal_projector", "language_model")),
    "mixtral": (None, ("self_attn",)),
    "qwen2.5-vl": (None, ("visual.blocks", "model.layers")),
    "t5": (None, ("encoder", "decoder")),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind != "qwen2.5-vl" else pytest.mark.slow) for kind in KINDS]
)
def test_other_families_are_propagated_as_far_as_their_inputs_can_be_told(tmp_path, kind):
    count, reached = KINDS[kind]
    make_pair(tmp_path, kind) if kind == "gpt2" else make_family_pair(tmp_path, kind)
    for which in ("tuned", "base"):
        calibrate_model(tmp_path / which, tmp_path / "data.jsonl", tmp_path / f"{which}-stats", FEW)
    common = (tmp_path / "base", tmp_path / "tuned")
    report = patch_checkpoint(
        *(*common, tmp_path / "out", tmp_path / "tuned-stats", PROPAGATED), retain=tmp_path / "base-stats"
    )
    plain = patch_checkpoint(
        *(*common, tmp_path / "plain", tmp_path / "tuned-stats", replace(PROPAGATED, propagate=False)),
        retain=tmp_path / "base-stats",
    )
    fitted = [record["name"] for record in report.to_dict()["tensors"] if record.get("propagated")]
    assert count is None or len(fitted) == count
    for part in reached:
        assert any(part in name for name in fitted), (part, fitted)
    assert not any("expert" in name for name in fitted)
    found, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "plain")
    changed = {name for name, value in found.items() if bits(value) != bits(expected[name])}
    assert changed == set(fitted)
    assert [r.name for r in report.tensors] == [r.name for r in plain.tensors]
    assert [r.kept for r in report.tensors] == [r.kept for r in plain.tensors]


@pytest.mark.parametrize(
    ("lane", "mate", "tokens", "expected"),
    [
        ((2, 5, 4), (2, 5, 4), 10, True),
        ((10, 4), (10, 4), 10, True),  # flattened
        ((6, 4), (6, 4), 10, False),  # as many were routed here in both models, but which?
        ((6, 4), (7, 4), 10, False),
        ((6, 4), (6, 4), None, True),  # outside the blocks
    ],
)
def test_inputs_are_of_the_same_tokens_where_all_of_them_are_there(lane, mate, tokens, expected):
    lane, mate = (SimpleNamespace(held=[torch.zeros(shape)]) for shape in (lane, mate))
    assert _are_aligned(SimpleNamespace(lane=lane, mate=mate, tokens=tokens)) == expected


def test_a_layer_that_tuning_left_as_it_was_stays_at_base_and_one_without_retained_statistics_is_not_fitted(
    pair, tmp_path
):
    shutil.copytree(pair / "tuned", tmp_path / "tuned")
    base, tensors = read_tensors(pair / "base"), read_tensors(pair / "tuned")
    frozen, unknown = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {frozen: base[frozen]}, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    few = CalibrateOptions(num_samples=4)
    calibrate_model(tmp_path / "tuned", pair / "data.jsonl", tmp_path / "stats", few)
    calibrate_model(pair / "base", pair / "data.jsonl", tmp_path / "retain", replace(few, exclude=(unknown,)))
    common = (pair / "base", tmp_path / "tuned", tmp_path / "out", tmp_path / "stats", PROPAGATED)
    report = patch_checkpoint(*common, retain=tmp_path / "retain")
    assert {record.name for record in report.tensors if record.kind == "full" and not record.propagated} == {
        frozen,
        unknown,
    }
    out = read_tensors(tmp_path / "out")
    assert bits(out[frozen]) == bits(base[frozen])
    assert not torch.equal(out[unknown], base[unknown])


def test_the_fit_is_made_as_it_was_asked_for(pair, tmp_path, monkeypatch):
    given_, sums = [], set()

    def solve(*tensors, **how):
        given_.append(how)
        return solve_propagated(*tensors, **how)

    def empty(size, device, dtype):
        sums.add(dtype)
        return no_moments(size, device, dtype)

    monkeypatch.setattr("tailorcli.patching.propagate.solve_propagated", solve)
    monkeypatch.setattr("tailorcli.patching.propagate.no_moments", empty)
    for which in ("tuned", "base"):
        few = CalibrateOptions(num_samples=4, deterministic=True)
        calibrate_model(pair / which, pair / "data.jsonl", tmp_path / which, few)
    how = {"retain_weight": 0.6, "damping": 0.2, "tolerance": 0.003, "max_iterations": 7}
    common = (pair / "base", pair / "tuned", None, tmp_path / "tuned", PatchOptions(propagate=True, **how))
    patch_checkpoint(*common, retain=tmp_path / "base", patch_file=tmp_path / "p.safetensors")
    assert given_ == [how | {"transposed": False}] * (3 * 7 + 1)
    assert sums == {torch.float64}


def test_a_layer_that_is_called_twice_keeps_its_plain_patch(pair, tmp_path, monkeypatch):
    def forward(mlp, x):
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return mlp.down_proj(inner) + mlp.down_proj(inner.square())

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    for which in ("tuned", "base"):
        calibrate_model(pair / which, pair / "data.jsonl", tmp_path / which, CalibrateOptions(num_samples=4))
    common = (pair / "base", pair / "tuned", None, tmp_path / "tuned", PROPAGATED)
    report = patch_checkpoint(*common, retain=tmp_path / "base", patch_file=tmp_path / "p.safetensors")
    plain = {record.name for record in report.tensors if record.kind == "full" and not record.propagated}
    assert plain == {f"model.layers.{number}.mlp.down_proj.weight" for number in range(3)}


def test_a_block_that_is_called_twice_is_one_error(pair, tmp_path, monkeypatch):
    once = LlamaDecoderLayer.__call__
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", lambda b, x, **how: once(b, once(b, x, **how), **how))
    with pytest.raises(TailorError, match=r"calls its block model\.layers\.0 more than once") as raised:
        run(pair, tmp_path / "out")
    assert raised.value.hint == "pass --no-propagate"
    assert run(pair, tmp_path / "plain", replace(PROPAGATED, propagate=False)).totals["kept"] > 0


@pytest.mark.parametrize("kind", ["retain", "stats"])
def test_a_layer_that_one_kind_of_data_does_not_reach_keeps_its_plain_patch(pair, tmp_path, monkeypatch, kind):
    lengths = {sample["input_ids"].shape[1] for sample in Stats.open(pair / kind).samples()}
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda m, x: x if x.shape[1] in lengths else forward(m, x))
    report = run(pair, tmp_path / "out")
    assert {record.name.split(".")[-2] for record in report.tensors if record.propagated} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")
    }


def test_models_that_take_other_tokens_through_a_layer_are_not_compared_there(pair, tmp_path, monkeypatch):
    base = {bits(value) for name, value in read_tensors(pair / "base").items() if "gate_proj" in name}
    forward = LlamaMLP.forward

    def partly(mlp, x):
        if x.shape[1] == 12 or bits(mlp.gate_proj.weight.detach()) not in base:  # retained, or of another model
            return forward(mlp, x)
        return torch.cat([x[:, :1], forward(mlp, x[:, 1:])], 1)

    monkeypatch.setattr(LlamaMLP, "forward", partly)
    report = run(pair, tmp_path / "out")
    assert report.totals["propagated"] == 3 * 7 + 1
    apart = {record.name.split(".")[-2] for record in report.tensors if record.propagated and not record.output_energy}
    assert apart == {"gate_proj", "up_proj", "down_proj"}


def test_a_layer_is_fitted_again_where_one_linear_module_holds_all_of_its_weight_and_nothing_else():
    one, other, table = nn.Linear(4, 6), nn.Linear(4, 6), nn.Embedding(6, 4)
    other.weight = nn.Parameter(one.weight.detach().clone())
    again = nn.Linear(4, 6)
    again.weight = other.weight
    network = nn.ModuleDict({"one": one, "twice": other, "again": again, "table": table, "conv": nn.Conv1d(4, 6, 1)})
    network.register_parameter("stack", nn.Parameter(torch.zeros(2, 6, 4)))
    patched = SimpleNamespace(patched=SimpleNamespace(network=network))
    part = SimpleNamespace(_layers=find_layers(network), _models=patched)
    part._parameter = lambda layer: Propagation._parameter(part, layer)

    def is_fitted(place, shape=(6, 4), retained=("h",)):
        tensor = SimpleNamespace(shape=shape, retained_hessians=retained)
        return Propagation._layer_of(part, tensor, place) is not None

    assert is_fitted(Place(("one.weight",)))
    assert not is_fitted(Place(("one.weight",)), retained=())
    assert not is_fitted(Place(("one.weight",)), shape=(3, 4))  # some of its rows
    assert not is_fitted(Place(("one.weight", "twice.weight")), shape=(12, 4))
    assert not is_fitted(Place(reason="unknown"))
    assert not is_fitted(None)
    for name in ("twice.weight", "table.weight", "one.bias"):
        assert not is_fitted(Place((name,)), shape=tuple(network.get_parameter(name).shape)), name
    assert not is_fitted(Place(("conv.weight",)), shape=(6, 4, 1))
    assert not is_fitted(Place(("stack",), part=1))
    assert not is_fitted(Place(("stack",), part=1, transposed=True), shape=(4, 6))


def test_an_adapter_is_propagated_as_the_model_that_it_makes(tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    make_pair(tmp_path)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    for name, base in (("adapter", tmp_path / "base"), ("merged", None)):
        calibrate_model(tmp_path / name, tmp_path / "data.jsonl", tmp_path / f"{name}-stats", FEW, base=base)
    calibrate_model(tmp_path / "base", tmp_path / "data.jsonl", tmp_path / "retain", FEW)
    for name in ("adapter", "merged"):
        patch_checkpoint(
            *(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-out", tmp_path / f"{name}-stats", PROPAGATED),
            retain=tmp_path / "retain",
        )
    one, other = read_tensors(tmp_path / "adapter-out"), read_tensors(tmp_path / "merged-out")
    for name, value in one.items():
        agree = (value - other[name]).abs() < 1e-3 * (1 + value.abs())
        assert float(agree.float().mean()) > 0.999, name


def test_the_patched_model_runs_under_the_config_that_the_output_gets(tmp_path):
    """Every entry kept and next to no retain term: the output's logits are tuned's, under tuned's own rope_theta."""
    import json

    from transformers import AutoModelForCausalLM

    def sharp(model):
        with torch.no_grad():
            for layer in model.model.layers:
                for weight in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                    weight.weight.mul_(12)
                for weight in (layer.self_attn.o_proj, layer.self_attn.v_proj):
                    weight.weight.mul_(6)
        return model

    folder = make_pair(tmp_path)
    sharp(make_model()).save_pretrained(folder / "base")
    sharp(perturb(make_model(), scale=0.05)).save_pretrained(folder / "tuned")
    config = json.loads((folder / "tuned" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    (folder / "tuned" / "config.json").write_text(json.dumps(config))
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats", FEW)
    calibrate_model(folder / "base", folder / "data.jsonl", folder / "retain", FEW)
    options = PatchOptions(density=1.0, retain_weight=1e-6, damping=1e-4, propagate=True)
    run(folder, tmp_path / "out", options)
    ids = torch.randint(2, 97, (4, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out, tuned = (AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in (tmp_path / "out", folder / "tuned"))
    assert (out - tuned).norm() / tuned.norm() < 0.01
