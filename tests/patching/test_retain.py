"""The retain term against a direct float64 minimisation, and end to end on tiny pairs."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from families import make_family_pair
from helpers import Oracle, bits, broken_off, folder_digest, random_hessian, random_layer, read_tensors, refused, run
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorcli import (
    PatchOptions,
    TailorError,
    calibrate_model,
    core,
    inspect_path,
    patch_checkpoint,
    plan_patch,
    score_checkpoint,
)
from tailorcli.calibration.stats import HESSIANS, Stats
from tailorcli.checkpoint.writer import CheckpointWriter
from tailorcli.core.figures import drift, measure
from tailorcli.core.hessian import prepare
from tailorcli.core.retain import prepare_retaining, retain_scale, retained_goal
from tailorcli.options import CalibrateOptions

SIZES = st.integers(1, 24)
SEEDS = st.integers(0, 10_000)
WEIGHTS = st.sampled_from([0.01, 0.3, 1.0, 10.0])


def two_hessians(size, seed):
    """Of the new task and of the retained data, in other units."""
    return random_hessian(size, seed=seed), 7.0 * random_hessian(size, seed=seed + 1, decay=0.8)


def run_layer(base, tuned, hessian, retained, weight, *, damping=0.01, **options):
    chosen = {"density": 0.3, "omega": 0.5, "solver": "joint", **options}
    sequential = chosen["solver"] == "sequential" and hessian.dim() == 2
    wanted = {"sensitivity": True, "sequential": sequential}
    return core.tailor_layer(base, tuned, prepare_retaining(hessian, retained, weight, damping, **wanted), **chosen)


def terms(hessian, retained, weight, damping):
    """The two damped quadratic forms, float64 (I, I), and the number that H_r is multiplied by."""
    h, r = (np.asarray(x, np.float64) for x in (hessian, retained))
    h, r = (np.diag(x) if x.ndim == 1 else x for x in (h, r))
    scale = weight * np.trace(h) / np.trace(r)
    return Oracle.damped(h, damping), scale * Oracle.damped(r, damping)


def objective(change, delta, hessian, retained, weight, damping=0.01):
    fit, keep = terms(hessian, retained, weight, damping)
    change, delta = np.asarray(change, np.float64), np.asarray(delta, np.float64)
    gap = change - delta
    return float(np.einsum("oi,ij,oj->", gap, fit, gap) + np.einsum("oi,ij,oj->", change, keep, change))


def best_change(delta, mask, hessian, retained, weight, damping=0.01):
    """The minimiser of ``objective`` on each row's mask, by a dense solve of its normal equations."""
    fit, keep = terms(hessian, retained, weight, damping)
    delta, mask = np.asarray(delta, np.float64), np.asarray(mask)
    change = np.zeros_like(delta)
    for row in range(delta.shape[0]):
        kept = np.flatnonzero(mask[row])
        if kept.size:
            change[row, kept] = np.linalg.solve((fit + keep)[np.ix_(kept, kept)], (delta[row] @ fit)[kept])
    return change


# --- One tensor ---------------------------------------------------------------------------------------------------


@given(rows=SIZES, columns=SIZES, seed=SEEDS, weight=WEIGHTS, density=st.sampled_from([0.1, 0.5, 0.9]))
@settings(max_examples=40, deadline=None)
def test_joint_is_the_minimum_on_the_mask(rows, columns, seed, weight, density):
    base, tuned = random_layer(rows, columns, seed)
    hessians = two_hessians(columns, seed)
    result = run_layer(base, tuned, *hessians, weight, density=density)
    delta = (tuned - base).numpy()
    best = best_change(delta, result.mask.numpy(), *hessians, weight)
    np.testing.assert_allclose((result.patched - base).numpy(), best, atol=2e-4)
    flipped = run_layer(base.T.contiguous(), tuned.T.contiguous(), *hessians, weight, density=density, transposed=True)
    np.testing.assert_allclose(
        (flipped.patched.T - base).numpy(), best_change(delta, flipped.mask.T.numpy(), *hessians, weight), atol=2e-4
    )


@given(columns=st.integers(2, 24), seed=SEEDS, weight=WEIGHTS)
@settings(max_examples=25, deadline=None)
def test_the_mask_is_chosen_by_the_scores_of_the_goal(columns, seed, weight):
    """The same problem as without the term, with another change and another Hessian: so its scores are Eq. 9 and 11."""
    base, tuned = random_layer(5, columns, seed)
    hessian, retained = two_hessians(columns, seed)
    result = run_layer(base, tuned, hessian, retained, weight, density=0.4, solver="none")
    scale = retain_scale(hessian, retained, weight)
    combined = hessian.double().numpy() + scale * retained.double().numpy()
    goal = best_change((tuned - base).numpy(), np.ones((5, columns), bool), hessian, retained, weight)
    score = Oracle.fused(goal, combined, 0.01, 0.5)
    kept = result.mask.numpy()
    assert score[kept].min() >= score[~kept].max() - 2e-3 * score.max()
    sensitivity = Oracle.sensitivity(goal, combined, 0.01)
    np.testing.assert_allclose(result.figures.sensitivity_sum, sensitivity.sum(), rtol=5e-3)
    np.testing.assert_allclose(result.figures.sensitivity_kept, sensitivity[kept].sum(), rtol=5e-3)
    np.testing.assert_allclose(result.figures.distance_before, np.abs(goal[kept]).sum(), rtol=5e-3)


@given(size=SIZES, seed=SEEDS, weight=WEIGHTS, kind=st.sampled_from(["embedding", "norm", "bias"]))
@settings(max_examples=40, deadline=None)
def test_diagonal_hessians_in_closed_form(size, seed, weight, kind):
    generator = torch.Generator().manual_seed(seed)
    channels = 1 if kind == "bias" else size
    hessian, retained = (torch.rand(2, channels, generator=generator) + 0.05).unbind()
    shape = {"embedding": (size, 6), "norm": (size,), "bias": (size,)}[kind]
    base = torch.randn(shape, generator=generator)
    tuned = base + 0.1 * torch.randn(shape, generator=generator)
    result = run_layer(base, tuned, hessian, retained, weight, density=0.5, transposed=kind == "embedding")
    delta, mask, change = tuned - base, result.mask, result.patched - base
    if kind == "embedding":
        delta, mask, change = delta.T, mask.T, change.T
    elif kind == "norm":
        delta, mask, change = delta[None], mask[None], change[None]
    else:
        delta, mask, change = delta[:, None], mask[:, None], change[:, None]
    best = best_change(delta.numpy(), mask.numpy(), hessian, retained, weight)
    np.testing.assert_allclose(change.numpy(), best, atol=1e-5)


@pytest.mark.parametrize("diagonal", [False, True])
def test_without_weight_the_goal_is_the_change_itself(diagonal):
    base, tuned = random_layer(6, 20, 0)
    hessian, retained = two_hessians(20, 0)
    if diagonal:
        hessian, retained = hessian.diagonal().clone(), retained.diagonal().clone()
    prepared = prepare_retaining(hessian, retained, 0.0, 0.01, sensitivity=True, sequential=False)
    torch.testing.assert_close(retained_goal(tuned - base, prepared), tuned - base, rtol=1e-4, atol=1e-5)


def test_without_weight_the_goal_is_the_change_also_where_damping_went_further():
    hessian = torch.eye(6)
    hessian[0, 1] = hessian[1, 0] = 1.05  # eigenvalue -0.05
    prepared = prepare_retaining(hessian, torch.eye(6), 0.0, 0.01, sensitivity=False, sequential=False)
    assert prepared.damping == 0.1
    delta = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(retained_goal(delta, prepared), delta)


@pytest.mark.parametrize("shape", [(6,), (6, 6)])
def test_where_no_data_of_either_kind_reach_the_goal_is_the_change_itself(shape):
    nothing = torch.zeros(shape)
    prepared = prepare_retaining(nothing, nothing, 0.5, 0.01, sensitivity=True, sequential=False)
    delta = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(retained_goal(delta, prepared), delta)


@pytest.mark.parametrize("solver", ["none", "sequential", "joint"])
def test_the_ends_of_the_density_and_of_the_weight(solver):
    base, tuned = random_layer(9, 20, 1)
    hessians = two_hessians(20, 1)
    nothing = run_layer(base, tuned, *hessians, 1.0, solver=solver, density=0.0)
    assert bits(nothing.patched) == bits(base)
    whole = run_layer(base, tuned, *hessians, 1.0, solver=solver, density=1.0)
    goal = best_change((tuned - base).numpy(), np.ones((9, 20), bool), *hessians, 1.0)
    np.testing.assert_allclose((whole.patched - base).numpy(), goal, atol=1e-5)
    far = run_layer(base, tuned, *hessians, 1e6, solver=solver, density=1.0)
    assert float((far.patched - base).norm()) < 1e-3 * float((tuned - base).norm())
    half = run_layer(base.bfloat16(), tuned.bfloat16(), *hessians, 1.0, solver=solver)
    assert bits(half.patched[~half.mask]) == bits(base.bfloat16()[~half.mask])


def test_more_weight_means_less_drift_and_a_larger_error():
    base, tuned = random_layer(12, 30, 2)
    hessian, retained = two_hessians(30, 2)
    delta = tuned - base
    for density in (0.2, 1.0):
        figures = []
        for weight in (0.0, 0.1, 0.5, 2.0, 10.0, 100.0):
            mask = (
                delta.abs()
                >= delta.abs().flatten().kthvalue(round((1 - density) * delta.numel()) + (density == 1)).values
            )
            prepared = prepare_retaining(hessian, retained, weight, 0.01, sensitivity=False, sequential=False)
            goal = retained_goal(delta, prepared)
            found = core.decorate_joint(goal, mask, prepared.hessian, prepared.amount, tolerance=1e-6)
            patched = base + torch.where(mask, goal + found.decorator, 0.0)
            values = {"patched": patched, "tuned": tuned, "prepared": prepared, "decoration": found}
            figures.append(measure(delta, mask, **values, moved=True, goal=goal))
        drifts, errors = [f.drift for f in figures], [f.error_after for f in figures]
        assert drifts == sorted(drifts, reverse=True)
        assert errors == sorted(errors)
        assert drifts[-1] < 0.01 * drifts[0]


@given(rows=SIZES, columns=SIZES, seed=SEEDS, weight=WEIGHTS, density=st.sampled_from([0.1, 0.4, 0.9]))
@settings(max_examples=40, deadline=None)
def test_joint_is_never_worse_than_the_others_on_the_combined_objective(rows, columns, seed, weight, density):
    base, tuned = random_layer(rows, columns, seed)
    hessians = two_hessians(columns, seed)
    delta = (tuned - base).numpy()
    found = {}
    for solver in ("none", "sequential", "joint"):
        result = run_layer(base, tuned, *hessians, weight, density=density, solver=solver)
        found[solver] = objective((result.patched - base).numpy(), delta, *hessians, weight)
    slack = 1e-5 * objective(0 * delta, delta, *hessians, weight)
    assert found["joint"] <= found["sequential"] + slack
    assert found["joint"] <= found["none"] + slack


@pytest.mark.parametrize("transposed", [False, True])
def test_the_inputs_are_left_alone(transposed):
    base, tuned = random_layer(12, 12, 8)
    hessian, retained = two_hessians(12, 8)
    prepared = prepare_retaining(hessian, retained, 1.0, 0.01, sensitivity=True, sequential=False)
    inputs = (base, tuned, hessian, retained, prepared.hessian)
    before = [bits(tensor) for tensor in inputs]
    core.tailor_layer(base, tuned, prepared, density=0.3, omega=0.5, solver="joint", transposed=transposed)
    assert [bits(tensor) for tensor in inputs] == before


def test_sequential_is_theorem_4_5_on_the_goal():
    base, tuned = random_layer(9, 16, 3)
    hessian, retained = two_hessians(16, 3)
    result = run_layer(base, tuned, hessian, retained, 0.7, solver="sequential")
    mask = result.mask.numpy()
    goal = best_change((tuned - base).numpy(), np.ones_like(mask), hessian, retained, 0.7)
    combined = hessian.double().numpy() + retain_scale(hessian, retained, 0.7) * retained.double().numpy()
    expected = Oracle.sequential(goal, mask, combined, 0.01)
    np.testing.assert_allclose((result.patched - base).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("diagonal", [False, True])
def test_dead_channels(diagonal, damping):
    """Dead in both: the share 1 / (1 + beta). In H alone: back to base. In H_r alone: the tuned value, nearly."""
    base, tuned = random_layer(4, 15, 4)
    full, other = two_hessians(15, 4)
    for matrix, dead in ((full, [12, 13]), (other, [13, 14])):
        matrix[dead, :] = matrix[:, dead] = 0.0
    if diagonal:
        full, other = full.diagonal().clone(), other.diagonal().clone()
    result = run_layer(base, tuned, full, other, 3.0, damping=damping, density=1.0, solver="none")
    delta, change = tuned - base, result.patched - base
    assert result.figures.dead_channels == 1
    torch.testing.assert_close(change[:, 13], 0.25 * delta[:, 13], rtol=1e-4, atol=1e-6)
    if diagonal:  # others may stand in for it elsewhere
        assert float(change[:, 12].norm()) < 0.1 * float(delta[:, 12].norm())
        assert float((change - delta)[:, 14].norm()) < 0.1 * float(delta[:, 14].norm())
    assert result.patched.isfinite().all()
    if damping:
        best = best_change(delta.numpy(), np.ones((4, 15), bool), full, other, 3.0)
        np.testing.assert_allclose(change.numpy(), best, atol=1e-4)


@pytest.mark.parametrize("diagonal", [False, True])
def test_retained_data_that_never_reach_the_layer_change_nothing(diagonal):
    base, tuned = random_layer(5, 12, 5)
    hessian = random_hessian(12, seed=5)
    hessian = hessian.diagonal().clone() if diagonal else hessian
    result = run_layer(base, tuned, hessian, torch.zeros_like(hessian), 2.0)
    prepared = prepare(hessian, 0.01, sensitivity=True, sequential=False)
    without = core.tailor_layer(base, tuned, prepared, density=0.3, omega=0.5, solver="joint")
    assert torch.equal(result.mask, without.mask)
    torch.testing.assert_close(result.patched, without.patched, rtol=1e-4, atol=1e-5)
    assert result.figures.drift == 0.0  # of nothing


def test_the_weight_has_no_unit():
    base, tuned = random_layer(5, 12, 6)
    hessian, retained = two_hessians(12, 6)
    found = [run_layer(base, tuned, hessian, scale * retained, 1.0).patched for scale in (1.0, 1e-3, 1e4)]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-3, atol=1e-4)


def test_the_figures_are_those_of_the_values_that_are_stored():
    base, tuned = random_layer(7, 18, 7)
    hessian, retained = two_hessians(18, 7)
    figures = run_layer(base, tuned, hessian, retained, 1.0).figures
    result = run_layer(base, tuned, hessian, retained, 1.0)
    delta, change = (tuned - base).numpy(), (result.patched - base).numpy()
    zero = np.zeros_like(delta)
    left = Oracle.error(change, zero, retained) / Oracle.error(delta, zero, retained)
    np.testing.assert_allclose(figures.drift, left, rtol=1e-3)
    error = Oracle.error(change, delta, hessian) / Oracle.error(zero, delta, hessian)
    np.testing.assert_allclose(figures.error_after, error, rtol=1e-3)
    goal = best_change(delta, np.ones_like(delta, dtype=bool), hessian, retained, 1.0)
    before = Oracle.error(np.where(result.mask, goal, 0.0), delta, hessian) / Oracle.error(zero, delta, hessian)
    np.testing.assert_allclose(figures.error_before, before, rtol=1e-3)
    ends = [drift(tuned - base, end, tuned, retained, False)["drift"] for end in (base, tuned)]
    np.testing.assert_allclose(ends, [0.0, 1.0], atol=1e-6)


# --- Checkpoints --------------------------------------------------------------------------------------------------

SYNTHETIC = CalibrateOptions(synthetic=True, num_samples=16, seq_len=24)


@pytest.fixture(scope="module")
def retained(llama_pair, tmp_path_factory):
    """Statistics of the tiny Llama's base over samples that it wrote itself."""
    folder = tmp_path_factory.mktemp("retained") / "stats"
    calibrate_model(llama_pair / "base", None, folder, SYNTHETIC)
    return folder


@pytest.fixture(scope="module")
def gpt2_retained(gpt2_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retained") / "stats"
    calibrate_model(gpt2_pair / "base", None, folder, SYNTHETIC)
    return folder


def dense(stats, name):
    info = stats.hessians[name]
    values = stats.load(name)
    return core.unpack_triangle(values, info.size) if info.kind == "full" else values


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_tensor_of_a_checkpoint_is_the_minimum(kind, request, tmp_path):
    """Linear layers, transposed ones, embeddings, norms and biases, read back from the output."""
    pair, other = (
        request.getfixturevalue(f"{kind}_pair"),
        request.getfixturevalue("retained" if kind == "llama" else "gpt2_retained"),
    )
    options = PatchOptions(retain_weight=0.7, damping=0.01, tolerance=1e-6, propagate=False)
    report = patch_checkpoint(
        pair / "base",
        pair / "tuned",
        tmp_path / "o",
        pair / "stats",
        options,
        retain=other,
        patch_file=tmp_path / "p.safetensors",
    )
    base, tuned, out = (read_tensors(folder) for folder in (pair / "base", pair / "tuned", tmp_path / "o"))
    new, old = Stats.open(pair / "stats"), Stats.open(other)
    assert report.totals["tensors_at_base"] == 0
    roles = set()
    for record in report.to_dict()["tensors"]:
        name = record["name"]
        entry = new.tensors[name]
        hessians = dense(new, entry.hessian), dense(old, old.tensors[name].hessian)
        shape = (-1, len(hessians[0])) if not entry.transposed else base[name].shape
        delta, change = (x.reshape(shape) for x in (tuned[name] - base[name], out[name] - base[name]))
        if entry.transposed:
            delta, change = delta.T, change.T
        # An entry that the goal leaves at base looks as if it were not kept: it does not matter to the minimum.
        best = best_change(delta.numpy(), (change != 0).numpy(), *hessians, 0.7)
        np.testing.assert_allclose(change.numpy(), best, atol=2e-4 * float(delta.abs().max()) + 1e-6)
        assert record["retain"] == old.tensors[name].hessian
        assert record["drift"] < 1.0
        roles.add((entry.role, entry.transposed))
    assert len(roles) >= 3


def test_weight_zero_has_the_bytes_of_a_patch_without(llama_pair, retained, tmp_path):
    arguments = (llama_pair / "base", llama_pair / "tuned")
    options = PatchOptions(retain_weight=0.0)
    patch_checkpoint(*arguments, tmp_path / "zero", llama_pair / "stats", options, retain=retained)
    report = patch_checkpoint(*arguments, tmp_path / "none", llama_pair / "stats")
    zero, without = read_tensors(tmp_path / "zero"), read_tensors(tmp_path / "none")
    assert {name: bits(tensor) for name, tensor in zero.items()} == {n: bits(t) for n, t in without.items()}
    assert "drift" not in report.totals


def test_drift_falls_and_the_error_rises_with_the_weight(gpt2_pair, gpt2_retained, tmp_path):
    totals = []
    for weight in (0.1, 1.0, 10.0):
        options = PatchOptions(retain_weight=weight, overwrite=True, density=1.0)
        report = patch_checkpoint(
            gpt2_pair / "base", gpt2_pair / "tuned", tmp_path / "o", gpt2_pair / "stats", options, retain=gpt2_retained
        )
        totals.append(report.totals)
    for before, after in pairwise(totals):
        assert after["drift"] < before["drift"]
        assert after["error_after"] > before["error_after"]


def test_score_says_what_patch_will_keep(llama_pair, retained, tmp_path):
    arguments = (llama_pair / "base", llama_pair / "tuned")
    scored = score_checkpoint(*arguments, llama_pair / "stats", PatchOptions(solver="none"), retain=retained)
    patched = patch_checkpoint(*arguments, tmp_path / "out", llama_pair / "stats", retain=retained)
    keys = ("kept", "delta_sq_kept", "sensitivity_kept", "salience_quantiles", "sensitivity_quantiles", "retain")
    for ours, theirs in zip(scored.to_dict()["tensors"], patched.to_dict()["tensors"], strict=True):
        assert [ours[key] for key in keys] == [theirs[key] for key in keys]
    without = score_checkpoint(*arguments, llama_pair / "stats", PatchOptions(solver="none"))
    assert scored.totals["delta_share_kept"] != without.totals["delta_share_kept"]


def test_tensors_without_retained_statistics_are_patched_without_the_term(llama_pair, tmp_path):
    """Said in the plan, in the report and on the terminal; such a tensor is what it is without --retain."""
    some = CalibrateOptions(synthetic=True, num_samples=8, seq_len=16, exclude=("*.mlp.*",))
    calibrate_model(llama_pair / "base", None, tmp_path / "some", some)
    pair = (llama_pair / "base", llama_pair / "tuned", "--stats", llama_pair / "stats")
    planned = run("patch", *pair, "--retain", tmp_path / "some", "-o", tmp_path / "out", "--dry-run")
    assert "(15 with the retain term, propagated" in planned.stdout
    assert re.search(r"note: 6 \(without the retain term: no retained statistics: not chosen", planned.stdout)
    done = run("patch", *pair, "--retain", tmp_path / "some", "-o", tmp_path / "out")
    assert re.search(r"note: 6 \(without the retain term", done.stderr)
    report = json.loads((tmp_path / "out" / "tailor_report.json").read_text())
    noted = {record["name"] for record in report["tensors"] if "without the retain term" in record.get("note", "")}
    assert noted == {record["name"] for record in report["tensors"] if ".mlp." in record["name"]}
    alike = PatchOptions(damping=0.1)
    patch_checkpoint(llama_pair / "base", llama_pair / "tuned", tmp_path / "without", llama_pair / "stats", alike)
    ours, plain = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "without")
    assert {name for name in ours if bits(ours[name]) == bits(plain[name])} == noted


def test_statistics_of_another_kind_are_not_combined(llama_pair, retained, tmp_path):
    other = copy_stats(retained, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    changed = manifest["tensors"]["lm_head.weight"]
    changed["transposed"] = True  # a square tensor would pass the check of shapes
    changed["hessian"] = manifest["tensors"]["model.layers.0.self_attn.q_proj.weight"]["hessian"]
    for name in ("model.layers.0.self_attn.q_proj.weight",):
        manifest["tensors"][name]["transposed"] = True
    changed["transposed"] = False
    (other / "manifest.json").write_text(json.dumps(manifest))
    plan = plan_patch(llama_pair / "base", llama_pair / "tuned", tmp_path / "o", llama_pair / "stats", retain=other)
    notes = {tensor.name: tensor.note for tensor in plan.tensors if tensor.note}
    assert list(notes) == ["model.layers.0.self_attn.q_proj.weight"]
    assert "another kind" in notes["model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_experts_have_retained_hessians_of_their_own(family, tmp_path):
    from families import FAMILIES

    family = next(name for name in FAMILIES if name.replace("-", "_") == family)
    folder = make_family_pair(tmp_path, family)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    calibrate_model(folder / "base", None, folder / "retained", SYNTHETIC)
    options = PatchOptions(retain_weight=0.1, damping=0.01)
    report = patch_checkpoint(
        folder / "base", folder / "tuned", folder / "out", folder / "stats", options, retain=folder / "retained"
    )
    fused = [record for record in report.to_dict()["tensors"] if record.get("experts")]
    base, out = read_tensors(folder / "base"), read_tensors(folder / "out")
    tuned, new, old = read_tensors(folder / "tuned"), Stats.open(folder / "stats"), Stats.open(folder / "retained")
    for record in fused:
        assert len(record["retain"]) == len(record["experts"])
        assert 0.0 < record["drift"] < 1.0
        name, flipped = record["name"], new.tensors[record["name"]].transposed
        for expert, (first, second) in enumerate(zip(record["experts"], record["retain"], strict=True)):
            delta, change = tuned[name][expert] - base[name][expert], out[name][expert] - base[name][expert]
            delta, change = (delta.T, change.T) if flipped else (delta, change)
            best = best_change(delta.numpy(), (change != 0).numpy(), dense(new, first), dense(old, second), 0.1)
            np.testing.assert_allclose(change.numpy(), best, atol=1e-3 * float(delta.abs().max()))
    patched = [record for record in report.to_dict()["tensors"] if record["status"] == "patched"]
    assert all("retain" in record or "retain term" in record["note"] for record in patched)
    assert fused or family != "gpt_oss"


def copy_stats(source, target):
    import shutil

    shutil.copytree(source, target)
    return target


def test_the_job_through_the_commands(llama_pair, tmp_path):
    """Calibrate, a dry run, patch, inspect and its picture; the report says what was retained and how far it went."""
    base, tuned, stats = (llama_pair / name for name in ("base", "tuned", "stats"))
    made = run("calibrate", base, "--synthetic", "--num-samples", 6, "--seq-len", 12, "-o", tmp_path / "retained")
    assert made.stdout.startswith("6 samples that the model wrote itself, 72 tokens")
    assert f"next: tailorcli patch {base} TUNED --stats STATS --retain {tmp_path / 'retained'} -o OUT" in made.stderr
    arguments = (base, tuned, "--stats", stats, "--retain", tmp_path / "retained", "--retain-weight", "0.5")
    plan = json.loads(run("patch", *arguments, "-o", tmp_path / "out", "--dry-run", "--json").stdout)
    assert all(tensor["retain"] for tensor in plan["tensors"])
    assert not (tmp_path / "out").exists()
    shown = run("patch", *arguments, "-o", tmp_path / "out", "--patch-file", tmp_path / "p.safetensors").stdout
    assert re.search(r"mean drift on the retained data: [0-9.]+% of the tuned model's \(0% is the base", shown)
    report = json.loads((tmp_path / "out" / "tailor_report.json").read_text())
    assert report["inputs"]["retain"]["fingerprint"] == Stats.open(tmp_path / "retained").fingerprint()
    assert report["options"]["retain_weight"] == 0.5
    assert 0.0 < report["totals"]["drift"] < 1.0
    assert all(0.0 < record["drift"] < 1.0 for record in report["tensors"])
    table = run("inspect", tmp_path / "out", "--plot", tmp_path / "plot.png").stdout
    assert "drift" in table
    assert "retain weight 0.5" in table
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert inspect_path(tmp_path / "p.safetensors").kind == "patch"
    run("apply", base, tmp_path / "p.safetensors", "-o", tmp_path / "applied")
    applied, out = read_tensors(tmp_path / "applied"), read_tensors(tmp_path / "out")
    assert {name: bits(tensor) for name, tensor in applied.items()} == {n: bits(t) for n, t in out.items()}
    scored = run("score", *arguments, "--tensors", "-o", tmp_path / "score.json").stdout
    assert "retain weight 0.5" in " ".join(scored.split())
    run("inspect", tmp_path / "score.json", "--plot", tmp_path / "score.png")


def test_an_interrupted_run_is_resumed_to_the_same_bytes(llama_pair, retained, tmp_path):
    arguments = (llama_pair / "base", llama_pair / "tuned")
    options = PatchOptions(retain_weight=0.5)
    patch_checkpoint(*arguments, tmp_path / "whole", llama_pair / "stats", options, retain=retained)
    with broken_off(CheckpointWriter, after=5):
        patch_checkpoint(*arguments, tmp_path / "out", llama_pair / "stats", options, retain=retained)
    resume = PatchOptions(retain_weight=0.5, resume=True)
    for change, chosen, what in (
        ({"retain": None}, resume, "retain"),
        ({"retain": retained}, PatchOptions(retain_weight=0.6, resume=True), "retain.weight"),
    ):
        with pytest.raises(TailorError, match=rf"cannot resume.*{what}"):
            patch_checkpoint(*arguments, tmp_path / "out", llama_pair / "stats", chosen, **change)
    patch_checkpoint(*arguments, tmp_path / "out", llama_pair / "stats", resume, retain=retained)
    assert json.loads((tmp_path / "out" / "tailor_run.json").read_text())["tensors_from_an_earlier_run"] == 5
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "whole")


# --- What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--solver", "none", "--omega", "1"), "--retain is for the method tailor with statistics"),
        (("--method", "dare"), "--retain is for the method tailor"),
        (("--retain-weight", "-1"), "retain-weight must be zero or positive, got -1.0"),
        (("--retain-weight", "nan"), "retain-weight must be zero or positive, got nan"),
        (("--retain-weight", "inf"), "retain-weight must be zero or positive, got inf"),
        (("--include", "nothing*"), "no tensor would be patched"),
    ],
)
def test_what_does_not_go_together(llama_pair, retained, tmp_path, extra, message):
    pair = (llama_pair / "base", llama_pair / "tuned", "--stats", llama_pair / "stats", "--retain", retained)
    assert message in refused("patch", *pair, "-o", tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


def test_a_resized_vocabulary_is_refused(llama_pair, retained, tmp_path):
    from helpers import make_model, make_tokenizer, perturb

    model = perturb(make_model())
    model.resize_token_embeddings(107)
    model.save_pretrained(tmp_path / "tuned")
    make_tokenizer().save_pretrained(tmp_path / "tuned")
    calibrate_model(tmp_path / "tuned", llama_pair / "data.jsonl", tmp_path / "stats", CalibrateOptions(num_samples=4))
    pair = (llama_pair / "base", tmp_path / "tuned", "--stats", tmp_path / "stats", "--retain", retained)
    message = refused("patch", *pair, "-o", tmp_path / "out", "--resized-vocab")
    assert "--retain does not go with --resized-vocab" in message


def test_a_joint_merge_says_that_it_leaves_the_term_out(llama_pair, retained, tmp_path):
    pair = (llama_pair / "base", llama_pair / "tuned")
    file = tmp_path / "p.safetensors"
    patch_checkpoint(*pair, None, llama_pair / "stats", PatchOptions(task="one"), patch_file=file, retain=retained)
    for method, said in (("joint", True), ("average", False)):
        inputs = ("--tuned", pair[1], "--stats", llama_pair / "stats", "-o", tmp_path / method)
        done = run("merge-multi", pair[0], file, *inputs, "--method", method)
        assert ("one was made with a retain term" in done.stderr) == said


def test_retained_statistics_of_another_model_are_refused(llama_pair, gpt2_retained, tmp_path):
    pair = (llama_pair / "base", llama_pair / "tuned", "--stats", llama_pair / "stats", "-o", tmp_path / "out")
    message = refused("patch", *pair, "--retain", llama_pair / "stats")
    assert "was calibrated on the model given as TUNED" in message
    assert f"tailorcli calibrate {llama_pair / 'base'} --synthetic" in message
    assert "from another model" in refused("patch", *pair, "--retain", gpt2_retained)
    refused("patch", *pair, "--retain", tmp_path / "missing")
    refused("score", *pair[:4], "--retain", llama_pair / "stats")


def test_damaged_retained_statistics_are_refused(llama_pair, retained, tmp_path):
    arguments = (llama_pair / "base", llama_pair / "tuned", tmp_path / "out", llama_pair / "stats")
    cut = copy_stats(retained, tmp_path / "cut")
    for file in cut.iterdir():
        if file.name != "manifest.json":
            file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(TailorError, match="cut"):
        patch_checkpoint(*arguments, retain=cut)
    missing = copy_stats(retained, tmp_path / "missing")
    manifest = json.loads((missing / "manifest.json").read_text())
    del manifest["tensors"]["model.norm.weight"]
    (missing / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TailorError, match=r"missing.* does not mention tensor 'model.norm.weight'"):
        patch_checkpoint(*arguments, retain=missing)
    none = tmp_path / "none"
    calibrate_model(
        llama_pair / "base", None, none, CalibrateOptions(synthetic=True, num_samples=2, seq_len=4, include=("*norm*",))
    )
    with pytest.raises(TailorError, match="none of the tensors that would be patched"):
        patch_checkpoint(*arguments, PatchOptions(exclude=("*norm*",)), retain=none)


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_nan_in_a_retained_hessian_names_its_folder(llama_pair, retained, tmp_path, tensor):
    from safetensors.torch import load_file, save_file

    broken = copy_stats(retained, tmp_path / "broken")
    stats = Stats.open(broken)
    name = stats.tensors[tensor].hessian
    stats.close()
    file = broken / HESSIANS
    tensors = load_file(file)
    tensors[name][0] = float("nan")
    save_file(tensors, file)
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TailorError) as caught:
        patch_checkpoint(
            llama_pair / "base", llama_pair / "tuned", tmp_path / "out", llama_pair / "stats", retain=broken
        )
    assert str(broken) in caught.value.message
    assert tensor in caught.value.message
