"""Propagation: its equations against a direct float64 minimisation, and whole models against a re-implementation."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import make_family_pair
from helpers import bits, broken_off, folder_digest, make_pair, read_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tailorcli import PatchOptions, TailorError, apply_patch, calibrate_model, patch_checkpoint, plan_patch
from tailorcli.cli import app
from tailorcli.core.propagation import accumulate_moments_, complete_, no_moments, refit
from tailorcli.core.retain import retain_scale
from tailorcli.options import CalibrateOptions
from tailorcli.stats import SAMPLES, Stats
from tailorcli.writer import CheckpointWriter

PROPAGATED = PatchOptions(propagate=True, retain_weight=0.3, damping=0.1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny Llama pair (untied head) with statistics of both models, samples kept."""
    folder = make_pair(tmp_path_factory.mktemp("propagate"), layers=3)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    calibrate_model(
        folder / "base", None, folder / "retain", CalibrateOptions(synthetic=True, num_samples=8, seq_len=12)
    )
    return folder


def run(pair, output, options=PROPAGATED, **more):
    return patch_checkpoint(
        pair / "base", pair / "tuned", output, pair / "stats", options, retain=pair / "retain", **more
    )


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
    found = refit(*given_, new, retained, retain_weight=0.7, damping=0.05, transposed=transposed, tolerance=1e-7)
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


def test_unmoved_inputs_leave_an_undamped_optimum_where_it_is():
    g = torch.Generator().manual_seed(0)
    base, tuned = torch.randn(4, 8, generator=g), torch.randn(4, 8, generator=g)
    x, x_r = torch.randn(50, 8, generator=g), torch.randn(50, 8, generator=g)
    new, retained = moments_of(x, x), moments_of(x_r, x_r)
    mask = torch.ones(4, 8, dtype=torch.bool)
    first = refit(base, tuned, base, mask, new, retained, retain_weight=1.0, damping=0.0).patched
    again = refit(base, tuned, first, mask, new, retained, retain_weight=1.0, damping=0.0)
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
    blocks = [[name for name in linear if name.startswith(f"model.layers.{number}.")] for number in range(3)]
    for names in (*blocks, ["lm_head"]):
        assert names
        references = {which: inputs_of(networks[which], samples[which], names) for which in samples}
        patched = {which: inputs_of(networks["patched"], samples[which], names) for which in samples}
        for name in names:
            moments = {w: moments_of(patched[w][name], references[w][name]) for w in samples}
            weight = f"{name}.weight"
            mask = plain[weight] != base[weight]
            expected = refit(
                *(base[weight], tuned[weight], plain[weight], mask, moments["tuned"], moments["base"]),
                retain_weight=0.3,
                damping=0.1,
            ).patched
            # An entry that a plain patch happens to leave at base to the bit is not in this mask.
            torch.testing.assert_close(found[weight], expected, rtol=1e-3, atol=1e-4)
            record = next(record for record in report.tensors if record["name"] == weight)
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


def test_the_report_measures_what_is_stored(pair, tmp_path):
    report = run(pair, tmp_path / "out")
    base, tuned, found = (read_tensors(path) for path in (pair / "base", pair / "tuned", tmp_path / "out"))
    stats, retain = Stats.open(pair / "stats"), Stats.open(pair / "retain")
    for record in report.tensors:
        if not record.get("propagated"):
            continue
        name = record["name"]
        from tailorcli.core.hessian import unpack_triangle

        delta, moved, error = ((a[name] - b[name]).double() for a, b in ((tuned, base), (found, base), (found, tuned)))
        h, r = (unpack_triangle(s.load(s.tensors[name].hessian), delta.shape[1]).double() for s in (stats, retain))
        form = lambda d, matrix: float((d @ matrix * d).sum())  # noqa: E731
        assert record["error_after"] == pytest.approx(form(error, h) / form(delta, h), rel=1e-3)
        assert record["drift"] == pytest.approx(form(moved, r) / form(delta, r), rel=1e-3)
        assert record["distance_after"] == pytest.approx(float(moved.abs().sum()), rel=1e-4)
        assert record["kept"] == round(0.1 * delta.numel())


@pytest.mark.parametrize("batch", [1, 5])
def test_batches_do_not_matter(pair, tmp_path, batch):
    run(pair, tmp_path / "one")
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
    one, other = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "other")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("after", [1, 7, 13, 29])
def test_an_interrupted_run_is_finished_to_the_same_bytes(pair, tmp_path, after):
    run(pair, tmp_path / "whole")
    with broken_off(CheckpointWriter, after):
        run(pair, tmp_path / "out")
    run(pair, tmp_path / "out", replace(PROPAGATED, resume=True))
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "whole")


def test_the_patch_file_gives_the_same_checkpoint(pair, tmp_path):
    run(pair, tmp_path / "out", patch_file=tmp_path / "p.safetensors")
    run(pair, None, patch_file=tmp_path / "alone.safetensors")
    for file in ("p", "alone"):
        apply_patch(pair / "base", tmp_path / f"{file}.safetensors", tmp_path / file)
        expected = read_tensors(tmp_path / "out")
        for name, value in read_tensors(tmp_path / file).items():
            assert bits(value) == bits(expected[name])
