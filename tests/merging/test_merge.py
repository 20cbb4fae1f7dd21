"""Stitching several tasks: Eq. 14 and 15 and the joint optimum against dense float64, and the command end to end."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    Oracle,
    bits,
    broken_off,
    folder_digest,
    invoke,
    make_model,
    make_pair,
    make_tokenizer,
    perturb,
    random_hessian,
    read_tensors,
    refused,
    write_data,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended import pretended
from safetensors.torch import save_file

from tailorcli import (
    CalibrateOptions,
    MergeOptions,
    PatchOptions,
    Stats,
    TailorError,
    calibrate_model,
    inspect_path,
    merge_patches,
    patch_checkpoint,
    tailor,
)
from tailorcli.calibration.stats import HessianInfo, TensorStats
from tailorcli.checkpoint.header import TensorInfo
from tailorcli.checkpoint.writer import CheckpointWriter
from tailorcli.core import combine_hessians, overlap_figures, stitch_average, stitch_joint, stitch_patches, union_mask
from tailorcli.core.hessian import prepare, unpack_triangle
from tailorcli.merging.plan import MergeInputs, Task, _plan_tensor, _told_apart, most_kept_of
from tailorcli.patchfile.reader import PatchFile
from tailorcli.patching.apply import apply_patch
from tailorcli.patching.verify import verify_checkpoint

METHODS = ("average", "joint", "patches")


# --- The equations ---------------------------------------------------------------------------------------------


def test_the_two_by_two_example_of_the_documentation():
    """docs/concepts/stitching.md, entry by entry."""
    base = torch.zeros(2, 2)
    tuned = [torch.tensor([[0.4, 0.2], [0.1, 0.0]]), torch.tensor([[0.6, 0.0], [0.3, 0.2]])]
    masks = [torch.tensor([[True, True], [False, False]]), torch.tensor([[True, False], [True, False]])]
    patched = [torch.tensor([[0.5, 0.2], [0.0, 0.0]]), torch.tensor([[0.7, 0.0], [0.4, 0.0]])]
    union, half = union_mask(masks), (0.5, 0.5)
    average = stitch_average(base, tuned, patched, masks, union, half)
    torch.testing.assert_close(average, torch.tensor([[0.6, 0.1], [0.25, 0.0]]))
    alone = stitch_patches(base, patched, masks, half)
    torch.testing.assert_close(alone, torch.tensor([[0.6, 0.2], [0.4, 0.0]]))


def make_tasks(seed, rows=5, columns=8, tasks=2, density=0.4, decay=0.5):
    """A base, and for each task fine-tuned weights, a mask, patched values and a Hessian."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator)
    tuned = [base + 0.1 * torch.randn(rows, columns, generator=generator) for _ in range(tasks)]
    masks = [torch.rand(rows, columns, generator=generator) < density for _ in range(tasks)]
    noise = [0.05 * torch.randn(rows, columns, generator=generator) for _ in range(tasks)]
    patched = [torch.where(m, t + n, base) for m, t, n in zip(masks, tuned, noise, strict=True)]
    hessians = [random_hessian(columns, seed=seed + i, decay=decay) for i in range(tasks)]
    return base, tuned, masks, patched, hessians


def shares(tasks, seed):
    weights = np.random.default_rng(seed).uniform(0.2, 2, tasks)
    return tuple((weights / weights.sum()).tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_average_is_equations_14_and_15(seed, tasks, density):
    base, tuned, masks, patched, _ = make_tasks(seed, tasks=tasks, density=density)
    weights = shares(tasks, seed)
    found = stitch_average(base, tuned, patched, masks, union_mask(masks), weights)
    m_agg = np.logical_or.reduce([mask.numpy() for mask in masks])
    theta = [t.double().numpy() for t in tuned]
    decorators = [np.where(m, p.double().numpy() - t, 0.0) for m, p, t in zip(masks, patched, theta, strict=True)]
    mean = sum(w * t for w, t in zip(weights, theta, strict=True))
    c_agg = sum(w * c for w, c in zip(weights, decorators, strict=True))
    expected = np.where(m_agg, mean + c_agg, base.double().numpy())
    np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-6)
    assert bits(found[~union_mask(masks)]) == bits(base[~union_mask(masks)])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.0, 0.2, 0.7]))
def test_patches_alone_are_the_mean_of_those_that_keep_an_entry(seed, tasks, density):
    base, _, masks, patched, _ = make_tasks(seed, tasks=tasks, density=density)
    weights = shares(tasks, seed)
    found = stitch_patches(base, patched, masks, weights)
    for place in np.ndindex(*base.shape):
        keepers = [i for i in range(tasks) if masks[i][place]]
        if not keepers:
            assert found[place] == base[place]
        elif len(keepers) == 1:
            assert found[place] == patched[keepers[0]][place]
        else:
            total = sum(weights[i] * float(patched[i][place]) for i in keepers)
            assert float(found[place]) == pytest.approx(total / sum(weights[i] for i in keepers), abs=1e-6)


def joint(base, tuned, union, hessians, weights, damping, **options):
    combined = prepare(combine_hessians(hessians, weights), damping, sensitivity=False, sequential=False)
    return stitch_joint(base, tuned, union, hessians, combined, weights, tolerance=1e-6, **options).patched


def dense_joint(base, tuned, union, hessians, weights, damping):
    """min sum_i w_i (W - Theta_i) (H_i + a_i I) (W - Theta_i)^T over the union mask, row by row, in float64."""
    origin = base.double().numpy()
    deltas = [t.double().numpy() - origin for t in tuned]
    damped = [w * Oracle.damped(h, damping) for w, h in zip(weights, hessians, strict=True)]
    change = np.zeros_like(origin)
    for row in range(len(origin)):
        kept = np.flatnonzero(union[row])
        if kept.size:
            right = sum(d[row] @ a for d, a in zip(deltas, damped, strict=True))
            change[row, kept] = np.linalg.solve(sum(damped)[np.ix_(kept, kept)], right[kept])
    return origin + change


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from([0.01, 0.3]))
def test_joint_is_the_dense_least_squares_solution(seed, tasks, density, damping):
    base, tuned, masks, _, hessians = make_tasks(seed, tasks=tasks, density=density)
    weights, union = shares(tasks, seed), union_mask(masks)
    found = joint(base, tuned, union, hessians, weights, damping)
    expected = dense_joint(base, tuned, union, hessians, weights, damping)
    np.testing.assert_allclose(found.double().numpy(), expected, atol=2e-4)
    assert bits(found[~union]) == bits(base[~union])
    flipped = joint(base.T, [t.T for t in tuned], union.T, hessians, weights, damping, transposed=True)
    torch.testing.assert_close(flipped.T, found, atol=1e-5, rtol=0)


def test_joint_with_many_entries_takes_the_iterative_solver():
    """Rows too full for a direct solution go through conjugate gradients, to the same optimum."""
    base, tuned, masks, _, hessians = make_tasks(3, rows=3, columns=600, density=0.5)
    union, weights = union_mask(masks), (0.25, 0.75)
    assert int(union[0].sum()) ** 3 > 100 * 600**2
    found = joint(base, tuned, union, hessians, weights, 0.01)
    np.testing.assert_allclose(found.numpy(), dense_joint(base, tuned, union, hessians, weights, 0.01), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_joint_of_diagonal_hessians_is_closed_form(seed, tasks):
    base, tuned, masks, _, _ = make_tasks(seed, tasks=tasks)
    generator = torch.Generator().manual_seed(seed)
    counts = [torch.randint(0, 4, (base.shape[1],), generator=generator).float() for _ in range(tasks)]
    counts[0][0] = 1.0  # some token was seen
    weights, union = shares(tasks, seed), union_mask(masks)
    found = joint(base, tuned, union, counts, weights, 0.01)
    expected = dense_joint(base, tuned, union, [torch.diag(c) for c in counts], weights, 0.01)
    np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-5)


def summed_error(weights_found, tuned, hessians, weights, damping):
    found = weights_found.double().numpy()
    return sum(
        w * Oracle.error(found, t.double().numpy(), h, damping)
        for w, t, h in zip(weights, tuned, hessians, strict=True)
    )


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.floats(0.05, 1), st.sampled_from([0.2, 1.0, 2.0]))
def test_joint_is_never_worse_than_average(seed, tasks, density, decay):
    """Also where masks collide and deltas disagree: here every second task wants the opposite of the first."""
    base, tuned, masks, patched, hessians = make_tasks(seed, tasks=tasks, density=density, decay=decay)
    for i in range(1, tasks, 2):
        tuned[i] = base - (tuned[0] - base)
        masks[i] = masks[0].clone()
        patched[i] = torch.where(masks[i], tuned[i], base)
    weights, union = shares(tasks, seed), union_mask(masks)
    solved = joint(base, tuned, union, hessians, weights, 1e-4)
    average = stitch_average(base, tuned, patched, masks, union, weights)
    alone = stitch_patches(base, patched, masks, weights)
    for damping in (1e-4, 0.0):  # in the objective that was solved, and in the bare layer error
        best = summed_error(solved, tuned, hessians, weights, damping)
        slack = 1e-6 + (0.0 if damping else 1e-3 * best)
        assert best <= summed_error(average, tuned, hessians, weights, damping) + slack
        assert best <= summed_error(alone, tuned, hessians, weights, damping) + slack


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.0, 0.3, 0.9]))
def test_overlap_figures_against_sets(seed, tasks, density):
    base, _, masks, patched, _ = make_tasks(seed, tasks=tasks, density=density)
    found = overlap_figures(base, patched, masks)
    sets = [set(np.flatnonzero(mask)) for mask in masks]
    union, common = set.union(*sets), set.intersection(*sets)
    assert (found["kept"], found["kept_by"], found["kept_by_all"]) == (len(union), list(map(len, sets)), len(common))
    assert found["jaccard"] == (pytest.approx(len(common) / len(union)) if union else None)
    pairs = [(a, b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    assert found["pairs"] == [pytest.approx(len(a & b) / len(a | b)) if a | b else None for a, b in pairs]
    moves = [torch.sign(values - base).view(-1).tolist() for values in patched]
    signs = [{place: move[place] for place in kept} for move, kept in zip(moves, sets, strict=True)]
    conflicts = [p for p in union if {1.0, -1.0} <= {sign[p] for sign in signs if p in sign}]
    assert found["sign_conflicts"] == len(conflicts)
    assert found["shared"] == sum(sum(place in s for s in sets) >= 2 for place in union)


# --- The command -----------------------------------------------------------------------------------------------


def make_tasks_folder(folder, kind="llama", dtype=torch.float32, shard=None):
    """A base with two fine-tunes of it, their statistics, and their patches at density 0.05."""
    make_pair(folder, kind, dtype=dtype, shard=shard)
    (folder / "tuned").rename(folder / "one")
    perturb(make_model(kind), seed=7).to(dtype).save_pretrained(folder / "two")
    make_tokenizer("{{ messages[0].content }}").save_pretrained(folder / "two")
    write_data(folder / "data2.jsonl", seed=5)
    for name, data in (("one", "data.jsonl"), ("two", "data2.jsonl")):
        calibrate_model(folder / name, folder / data, folder / f"{name}-stats")
        options = PatchOptions(density=0.05, task=name, license="MIT")
        arguments = (folder / "base", folder / name, folder / f"{name}-out", folder / f"{name}-stats", options)
        patch_checkpoint(*arguments, patch_file=folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks on one float32 Llama; read only."""
    return make_tasks_folder(tmp_path_factory.mktemp("tasks"))


def inputs_of(folder, method, names=("one", "two")):
    """Patches, tuned models and statistics as ``merge_patches`` takes them, the latter two in another order."""
    patches = [folder / f"{name}.safetensors" for name in names]
    tuned = [folder / name for name in dict.fromkeys(reversed(names))] if method != "patches" else []
    stats = [folder / f"{name}-stats" for name in dict.fromkeys(names)] if method == "joint" else []
    return patches, tuned, stats


def merge(folder, out, method, names=("one", "two"), patch_file=None, **changes):
    patches, tuned, stats = inputs_of(folder, method, names)
    options = MergeOptions(method=method, **changes)
    return merge_patches(folder / "base", patches, out, tuned, stats, options, patch_file=patch_file)


def as_bits(folder):
    return {name: bits(tensor) for name, tensor in read_tensors(folder).items()}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.float32),
        ("gpt2", torch.bfloat16),
        pytest.param("llama", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("gpt2", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_one_task_and_two_equal_ones_are_the_patch_itself(tmp_path, kind, dtype):
    folder = make_tasks_folder(tmp_path, kind, dtype, shard="20KB")
    for method in METHODS:
        for number, names in enumerate((("one",), ("one", "one"))):
            out = tmp_path / f"{method}{number}"
            merge(folder, out, method, names)
            assert as_bits(out) == as_bits(folder / "one-out"), (method, names)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_tasks_changes_nothing_but_rounding(tasks, tmp_path, method):
    merge(tasks, tmp_path / "a", method, weights=(1.0, 3.0))
    merge(tasks, tmp_path / "b", method, ("two", "one"), weights=(3.0, 1.0))
    first, second = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-6, rtol=0)


def test_a_weight_is_that_of_the_patch_in_its_place(tasks, tmp_path):
    merge(tasks, tmp_path / "out", "patches", weights=(1.0, 3.0))
    name = "model.layers.0.mlp.up_proj.weight"
    base, one, two, out = (read_tensors(tasks / n)[name] for n in ("base", "one-out", "two-out", tmp_path / "out"))
    both = (one != base) & (two != base)
    assert both.any()
    torch.testing.assert_close(out[both], (one[both] + 3 * two[both]) / 4)


def test_statistics_of_none_of_the_models_are_refused(tasks, tmp_path):
    calibrate_model(tasks / "base", tasks / "data.jsonl", tmp_path / "other", CalibrateOptions(num_samples=4))
    patches, tuned, stats = inputs_of(tasks, "joint")
    with pytest.raises(TailorError, match=r"--stats .*other belongs to none of the patches"):
        merge_patches(
            *(tasks / "base", patches, tmp_path / "x", tuned, [*stats, tmp_path / "other"]), MergeOptions("joint")
        )


@pytest.mark.parametrize("method", METHODS)
def test_merged_tensors_against_the_equations(tasks, tmp_path, method):
    """Every tensor of the output is what the functions of the core make of the same inputs."""
    report = merge(tasks, tmp_path / "out", method)
    out, base = read_tensors(tmp_path / "out"), read_tensors(tasks / "base")
    tuned = [read_tensors(tasks / name) for name in ("one", "two")]
    outs = [read_tensors(tasks / f"{name}-out") for name in ("one", "two")]
    records = {record["name"]: record for record in report.to_dict()["tensors"]}
    with PatchFile.open(tasks / "one.safetensors") as one, PatchFile.open(tasks / "two.safetensors") as two:
        for name, tensor in base.items():
            masks = [one.mask(name), two.mask(name)]
            values, thetas, union = [o[name] for o in outs], [t[name] for t in tuned], union_mask(masks)
            assert records[name]["kept"] == int(union.sum())
            assert bits(out[name][~union]) == bits(tensor[~union])
            if method == "average":
                first, second = (torch.where(m, v, t) for m, v, t in zip(masks, values, thetas, strict=True))
                expected = first / 2 + second / 2
                torch.testing.assert_close(out[name][union], expected[union])
            elif method == "patches":
                both = masks[0] & masks[1]
                expected = torch.where(both, (values[0] + values[1]) / 2, torch.where(masks[0], values[0], values[1]))
                torch.testing.assert_close(out[name][union], expected[union])
    if method == "joint":
        assert report.totals["methods"] == {"joint": 21}
        assert report.totals["largest_residual"] < 1e-3


def test_a_joint_merge_of_uneven_tasks_is_the_dense_optimum(tasks, tmp_path):
    """Of each task its own Hessian, weight and fine-tuned weights; the table's Hessian is that of its rows."""
    report = merge(tasks, tmp_path / "out", "joint", weights=(3.0, 1.0), damping=0.3, tolerance=1e-6)
    base, out, *tuned = (
        read_tensors(folder) for folder in (tasks / "base", tmp_path / "out", tasks / "one", tasks / "two")
    )
    errors = {record["name"]: record["errors"] for record in report.to_dict()["tensors"]}
    stats = [Stats.open(tasks / f"{name}-stats") for name in ("one", "two")]
    for name in (f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "mlp.down_proj")):
        check_dense(name, base[name], out[name], [t[name] for t in tuned], stats, errors[name])
    table = "model.embed_tokens.weight"
    check_dense(table, base[table].T, out[table].T, [t[table].T for t in tuned], stats, errors[table])


def check_dense(name, base, out, tuned, stats, errors):
    """One tensor (O, I) of a merge of weights 0.75 and 0.25 and of damping 0.3, with the tasks' layer errors."""
    hessians = []
    for each in stats:
        hessian = each.tensors[name].hessian
        stored, info = each.load(hessian), each.hessians[hessian]
        hessians.append(unpack_triangle(stored, info.size) if info.kind == "full" else torch.diag(stored))
    expected = dense_joint(base, tuned, out != base, hessians, (0.75, 0.25), 0.3)
    np.testing.assert_allclose(out.double().numpy(), expected, atol=1e-4)
    for theta, hessian, error in zip(tuned, hessians, errors, strict=True):
        left, whole = (float(((m - theta).double() @ hessian.double() * (m - theta)).sum()) for m in (out, base))
        assert error == pytest.approx(left / whole, rel=1e-3)


def test_joint_follows_both_tasks_better_than_average(tasks, tmp_path):
    patches, tuned, stats = inputs_of(tasks, "joint")
    found = {}
    for method in ("average", "joint"):
        options = MergeOptions(method=method)
        report = merge_patches(tasks / "base", patches, tmp_path / method, tuned, stats, options)
        found[method] = report
    for ours, theirs in zip(found["joint"].to_dict()["tensors"], found["average"].to_dict()["tensors"], strict=True):
        assert ours["errors"] is not None
        energies = [1.0, 1.0] if ours["kind"] == "diagonal" else ours["errors"]
        assert len(energies) == len(theirs["errors"]) == 2
    assert sum(found["joint"].totals["errors"]) < sum(found["average"].totals["errors"])


@pytest.mark.parametrize("method", METHODS)
def test_the_merged_patch_file_is_the_merged_checkpoint(tasks, tmp_path, method):
    file = tmp_path / "both.safetensors"
    merge(tasks, tmp_path / "out", method, patch_file=file)
    apply_patch(tasks / "base", file, tmp_path / "applied")
    assert folder_digest(tmp_path / "applied") == folder_digest(tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out", tasks / "base", file).ok
    facts = inspect_path(file).facts
    assert (facts["task"], facts["license"]) == ("one + two", "MIT")
    # It can be merged on, from the patches alone.
    merge_patches(tasks / "base", [file, tasks / "one.safetensors"], tmp_path / "more", (), (), MergeOptions("patches"))
    shown = refused("merge-multi", tasks / "base", file, "--tuned", tasks / "one", "-o", tmp_path / "x")
    assert "itself merged" in shown


MOMENTS = list(zip(METHODS, (0, 3, 15), strict=True))
OTHERS = [(method, after) for method in METHODS for after in (0, 3, 15) if (method, after) not in MOMENTS]


@pytest.mark.parametrize(
    ("method", "after"), MOMENTS + [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS]
)
def test_an_interrupted_merge_is_resumed_to_the_same_bytes(tasks, tmp_path, method, after):
    merge(tasks, tmp_path / "whole", method, patch_file=tmp_path / "whole.safetensors")
    with broken_off(CheckpointWriter, after):
        merge(tasks, tmp_path / "cut", method, patch_file=tmp_path / "cut.safetensors")
    merge(tasks, tmp_path / "cut", method, patch_file=tmp_path / "cut.safetensors", resume=True)
    assert folder_digest(tmp_path / "cut") == folder_digest(tmp_path / "whole")
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    again = merge(tasks, tmp_path / "cut", method, patch_file=tmp_path / "cut.safetensors", resume=True)
    assert again.totals["kept_by"] == [1100, 1100]  # round(0.05 * numel), summed over the tensors


def test_tensors_that_a_task_leaves_alone(tasks, tmp_path):
    """One task patched only its attention: the others' masks are empty there, and Eq. 14 still averages its weights."""
    options = PatchOptions(density=0.05, task="part", include=("*self_attn*",), exclude=("*.1.self_attn.v_proj*",))
    arguments = (tasks / "base", tasks / "two", None, tasks / "two-stats", options)
    patch_checkpoint(*arguments, patch_file=tmp_path / "part.safetensors")
    base, one, two = (read_tensors(tasks / name) for name in ("base", "one-out", "two"))
    patches = [tasks / "one.safetensors", tmp_path / "part.safetensors"]
    tuned = [tasks / "one", tasks / "two"]
    stats = [tasks / "one-stats", tasks / "two-stats"]
    for method, folders in (("average", ()), ("joint", stats)):
        merge_patches(tasks / "base", patches, tmp_path / method, tuned, folders, MergeOptions(method))
    merge_patches(tasks / "base", patches[1:], tmp_path / "part", (), (), MergeOptions("patches"))
    name = "model.layers.0.mlp.up_proj.weight"
    with PatchFile.open(patches[0]) as patch:
        mask = patch.mask(name)
    out = read_tensors(tmp_path / "average")[name]
    torch.testing.assert_close(out[mask], (one[name][mask] + two[name][mask]) / 2)
    assert bits(out[~mask]) == bits(base[name][~mask])
    assert bits(read_tensors(tmp_path / "part")[name]) == bits(base[name])


def test_a_tensor_without_statistics_is_averaged_and_reported(tasks, tmp_path):
    calibrate_model(
        tasks / "two", tasks / "data2.jsonl", tmp_path / "less", options=calibrate_options(exclude=("*down_proj*",))
    )
    patches, tuned, stats = inputs_of(tasks, "joint")
    command = ["merge-multi", tasks / "base", *patches, "--method", "joint", "-o", tmp_path / "out"]
    for folder in tuned:
        command += ["--tuned", folder]
    for folder in (stats[0], tmp_path / "less"):
        command += ["--stats", folder]
    shown = invoke(*command)
    assert shown.exit_code == 0, shown.output
    assert "2 tensors by average: no statistics of two" in shown.stderr
    merge(tasks, tmp_path / "average", "average")
    name = "model.layers.1.mlp.down_proj.weight"
    assert bits(read_tensors(tmp_path / "out")[name]) == bits(read_tensors(tmp_path / "average")[name])


def test_statistics_that_any_task_lacks(tasks, tmp_path):
    """Whichever of the tasks it is, the tensor is averaged."""
    options = calibrate_options(exclude=("*layers.0.mlp*",))
    for name, data in (("one", "data.jsonl"), ("two", "data2.jsonl")):
        calibrate_model(tasks / name, tasks / data, tmp_path / name, options)
        stats = [tmp_path / "one" if name == "one" else tasks / "one-stats"]
        stats.append(tmp_path / "two" if name == "two" else tasks / "two-stats")
        patches, tuned, _ = inputs_of(tasks, "average")
        out = tmp_path / f"{name}-out"
        report = merge_patches(tasks / "base", patches, out, tuned, stats, MergeOptions("joint"))
        assert report.totals["methods"] == {"joint": 18, f"average: no statistics of {name}": 3}
    doubled = [tasks / "one-stats", tasks / "two-stats", tmp_path / "one"]
    with pytest.raises(TailorError, match="both made from one fine-tuned model"):
        merge_patches(tasks / "base", patches, tmp_path / "x", tuned, doubled, MergeOptions("joint"))


def test_a_task_that_keeps_an_entry_at_base_has_no_say_about_it():
    base = torch.zeros(1, 3)
    patched = [torch.tensor([[0.4, 0.0, 0.2]]), torch.tensor([[0.0, 0.0, 0.4]])]
    masks = [torch.ones(1, 3, dtype=torch.bool)] * 2
    found = stitch_patches(base, patched, masks, (0.5, 0.5))
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.0, 0.3]]))


def calibrate_options(**changes):
    from tailorcli import CalibrateOptions

    return CalibrateOptions(**changes)


def test_the_documented_example(tasks, tmp_path):
    """Two tasks at density 0.05 each against one at 0.10, from the shell, looked at and drawn."""
    from transformers import AutoModelForCausalLM

    command = ["merge-multi", tasks / "base", tasks / "one.safetensors", tasks / "two.safetensors", "--method", "joint"]
    command += ["--tuned", tasks / "one", "--tuned", tasks / "two"]
    command += ["--stats", tasks / "one-stats", "--stats", tasks / "two-stats"]
    shown = invoke(*command, "--dry-run", "-o", tmp_path / "both", "--json")
    plan = json.loads(shown.stdout)
    assert not (tmp_path / "both").exists()
    assert plan["write_bytes"] > 0
    shown = invoke(*command, "-o", tmp_path / "both")
    assert shown.exit_code == 0, shown.output
    assert "merged 2 tasks (joint)" in shown.stdout
    assert "chat_template.jinja" in shown.stderr  # only the second task has one
    report = json.loads((tmp_path / "both" / "tailor_report.json").read_text())
    assert report["options"]["tasks"] == ["one", "two"]
    assert 0.09 < report["totals"]["density"] <= 0.1
    shown = invoke("inspect", tmp_path / "both", "--plot", tmp_path / "both.png")
    assert shown.exit_code == 0, shown.output
    assert "Jaccard" in shown.stdout
    assert (tmp_path / "both.png").stat().st_size > 10_000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_the_plan_covers_the_memory_of_every_task(tasks):
    from tailorcli import plan_merge

    sizes = []
    for count in (1, 2, 4):
        patches, tuned, stats = inputs_of(tasks, "joint")
        patches = [patches[i % 2] for i in range(count)]
        used = slice(0, min(count, 2))
        tuned = [tasks / "one", tasks / "two"][used]
        sizes.append(plan_merge(tasks / "base", patches, None, tuned, stats[used], MergeOptions("joint")).peak_bytes)
    assert sizes[0] < sizes[1] < sizes[2]


def test_tasks_are_called_by_what_tells_them_apart():
    given = [("a", "x/p"), ("b", "x/q"), ("b", "y/r"), ("c", "x/p"), ("c", "y/p"), ("d", "x/p"), ("d", "x/p")]
    tasks = [Task(SimpleNamespace(name=name, path=Path(path))) for name, path in given]
    wanted = ["a", "b (q)", "b (r)", "c (x/p)", "c (y/p)", "d (x/p)", "d (x/p)"]
    assert [task.title for task in _told_apart(tasks)] == wanted


@pytest.mark.parametrize(
    ("entry", "kind", "method"),
    [
        (TensorStats("h", "linear"), "full", "joint"),
        (TensorStats("h", "linear"), "diagonal", "average: the tasks' statistics are of different kinds"),
        (TensorStats("h", "linear", transposed=True), "full", "average: the tasks' statistics are of different kinds"),
        (TensorStats("h", "embedding"), "full", "average: the tasks' statistics are of different kinds"),
        (TensorStats(None, "linear", experts=["h"]), "full", "average: it fuses experts"),
        (TensorStats(None, "linear"), "full", "average: no statistics of two"),
    ],
)
def test_what_the_statistics_of_two_tasks_tell_together_is_merged_jointly(entry, kind, method):
    tasks = [
        Task(
            SimpleNamespace(tensors={"w"}),
            stats=SimpleNamespace(tensors={"w": known}, hessians={"h": HessianInfo(4, of_kind, 9)}),
            title=title,
        )
        for title, known, of_kind in (("one", TensorStats("h", "linear"), "full"), ("two", entry, kind))
    ]
    info = TensorInfo("w", "F32", (4, 4), Path("w"), 0, 64)
    for order in (tasks, tasks[::-1]):
        found = _plan_tensor(info, MergeInputs(None, order), MergeOptions("joint"))
        assert (found.method, found.task_hessians) == (method, ("h", "h") if method == "joint" else ())


def test_a_union_of_masks_is_no_larger_than_its_tensor():
    tensors = [SimpleNamespace(name=name, numel=100) for name in ("dense", "sparse")]
    kept = [{"dense": 70, "sparse": 30}, {"dense": 60, "sparse": 20}]
    tasks = [Task(SimpleNamespace(kept_of=of.__getitem__)) for of in kept]
    assert most_kept_of(tensors, MergeInputs(None, tasks)) == [("dense", 100), ("sparse", 50)]


def test_statistics_that_lack_a_tensor_are_one_error(tasks, tmp_path):
    patches, tuned, stats = inputs_of(tasks, "joint")
    lacking = shutil.copytree(stats[0], tmp_path / "lacking")
    manifest = json.loads((lacking / "manifest.json").read_text())
    del manifest["tensors"]["model.norm.weight"]
    (lacking / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TailorError, match=r"lacking does not mention tensor 'model\.norm\.weight'"):
        merge_patches(tasks / "base", patches, tmp_path / "x", tuned, [lacking, stats[1]], MergeOptions("joint"))


def test_patches_of_one_model_towards_itself_and_towards_a_model_half_way(tasks, tmp_path):
    half = CalibrateOptions(teacher_weight=0.5)
    calibrate_model(tasks / "one", tasks / "data.jsonl", tmp_path / "half-stats", half, base=tasks / "base")
    pair = (tasks / "base", tasks / "one", None, tmp_path / "half-stats")
    patch_checkpoint(*pair, PatchOptions(density=0.05, teacher_weight=0.5), patch_file=tmp_path / "half.safetensors")
    patches = [tmp_path / "half.safetensors", tasks / "one.safetensors"]
    stats = [tmp_path / "half-stats", tasks / "one-stats"]
    report = merge_patches(
        *(tasks / "base", patches, tmp_path / "out", [tasks / "one"], stats), MergeOptions(method="joint")
    )
    assert report.totals["kept"] > 0


def test_joint_says_that_it_leaves_out_a_retain_term_however_the_patch_was_made(tasks, tmp_path):
    given = {"retain_data": tasks / "data2.jsonl", "calibration": CalibrateOptions(8, 16)}
    patch = tmp_path / "whole-job.safetensors"
    tailor(tasks / "base", tasks / "one", None, tasks / "data.jsonl", patch_file=patch, **given)
    patches, tuned, stats = inputs_of(tasks, "joint")
    options = MergeOptions(method="joint")
    report = merge_patches(tasks / "base", [patch, patches[1]], tmp_path / "out", tuned, stats, options)
    assert [note for note in report.notes if "retain term" in note]
    assert "retain weight 0.3" in " ".join(invoke("inspect", patch).stdout.split())


# --- Bad input -------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_belong_together(tasks, tmp_path):
    base, one, two = tasks / "base", tasks / "one.safetensors", tasks / "two.safetensors"
    command = ["merge-multi", base, one, two, "-o", tmp_path / "out"]
    tuned = ["--tuned", tasks / "one", "--tuned", tasks / "two"]
    stats = ["--stats", tasks / "one-stats", "--stats", tasks / "two-stats"]
    assert invoke("merge-multi", base, one, two).exit_code == 2  # no output
    assert invoke("merge-multi", base, "-o", tmp_path / "out").exit_code == 2  # no patch
    refused(*command, mentions=["fine-tuned models"], output=tmp_path / "out")
    refused(*command, *tuned[:2], mentions=["two.safetensors", "--tuned"], output=tmp_path / "out")
    refused(*command, *tuned, "--tuned", base, mentions=["--tuned", "none"], output=tmp_path / "out")
    refused(*command, *tuned, "--method", "joint", mentions=["statistics"], output=tmp_path / "out")
    refused(*command, *tuned, *stats[:2], "--method", "joint", mentions=["two"], output=tmp_path / "out")
    refused(*command, *tuned, "--method", "patches", mentions=["--method patches"], output=tmp_path / "out")
    assert invoke(*command, *tuned, "--method", "sum").exit_code == 2
    refused(*command, *tuned, "--weight", 1, mentions=["1 weights for 2 patches"], output=tmp_path / "out")
    refused(*command, *tuned, "--weight", 1, "--weight", -1, mentions=["positive"], output=tmp_path / "out")
    refused(*command, *tuned, "--weight", 1e308, "--weight", 1e308, mentions=["finite"], output=tmp_path / "out")
    refused(*command, *tuned, *stats, "--method", "joint", "--damping", -1, mentions=["damping"])
    assert invoke(*command, *tuned, "--damping", 0.1).exit_code == 2  # which average has no use for
    refused("merge-multi", tasks / "one", one, two, *tuned, "-o", tmp_path / "out", mentions=["another base"])
    refused(*command[:-1], tasks / "one", *tuned, mentions=["input"])
    refused(*command[:-2], "--patch-file", one, *tuned, mentions=["one.safetensors"])
    refused(*command[:-2], "--patch-file", one, *tuned, "--overwrite", mentions=["one.safetensors"])
    assert not (tmp_path / "out").exists()


def test_models_that_samples_do_not_tell_apart_are_no_two_tasks(tmp_path):
    """Other rows of a large table were trained in each: a fingerprint, of a sample, is the same for both."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    table = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    moved = {"base": slice(0), "one": slice(100, 106), "two": slice(200, 206), "copy": slice(100, 106)}
    for name, rows in moved.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        values = table.clone()
        values[rows] += 1
        save_file({"embed_tokens.weight": values}, tmp_path / name / "model.safetensors", {"format": "pt"})
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for file in files:
        options = PatchOptions(method="changed")
        patch_checkpoint(tmp_path / "base", file.with_suffix(""), None, options=options, patch_file=file)
    given = ("merge-multi", tmp_path / "base", *files, "-o", tmp_path / "out")
    both = ("--tuned", tmp_path / "one", "--tuned", tmp_path / "two")
    refused(*given, *both, mentions=[tmp_path / "one", tmp_path / "two"], output=tmp_path / "out")
    again = ("--tuned", tmp_path / "one", "--tuned", tmp_path / "copy")
    assert invoke("merge-multi", tmp_path / "base", files[0], *again, "-o", tmp_path / "out").exit_code == 0


def test_nan_in_a_fine_tuned_model_is_named(tasks, tmp_path):
    for name in ("base", "one", "one-stats"):
        shutil.copytree(tasks / name, tmp_path / name)
    shutil.copy(tasks / "one.safetensors", tmp_path)
    tensors = read_tensors(tmp_path / "one")
    tensors["model.layers.1.mlp.down_proj.weight"][20, 20] = float("nan")
    save_file(tensors, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    arguments = ("merge-multi", tmp_path / "base", tmp_path / "one.safetensors", "-o", tmp_path / "out")
    shown = refused(*arguments, "--tuned", tmp_path / "one", output=tmp_path / "out")
    assert "down_proj" in shown or "none of the --tuned" in shown  # the sample of the fingerprint may see it, too


def mask_of(patch, name, tensor):
    """The patch's mask; all False for a tensor that it leaves alone, as an adapter does with most."""
    return patch.mask(name) if name in patch.tensors else torch.zeros_like(tensor, dtype=torch.bool)


# --- Adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_an_adapter_and_a_full_fine_tune_are_stitched(tmp_path, kind):
    """An adapter on a bfloat16 base as one of the tasks: its unrounded weights are what is merged."""
    from helpers import make_adapter

    folder = make_adapter(tmp_path, kind, dtype=torch.bfloat16, target_modules="all-linear")
    perturb(make_model(kind), seed=7).to(torch.bfloat16).save_pretrained(folder / "full")
    make_tokenizer().save_pretrained(folder / "full")
    write_data(folder / "data.jsonl")
    for name, base in (("adapter", folder / "base"), ("full", None)):
        calibrate_model(folder / name, folder / "data.jsonl", folder / f"{name}-stats", base=base)
        options = PatchOptions(density=0.05, task=name)
        arguments = (folder / "base", folder / name, folder / f"{name}-out", folder / f"{name}-stats", options)
        patch_checkpoint(*arguments, patch_file=folder / f"{name}.safetensors")
        apply_patch(folder / "base", folder / f"{name}.safetensors", folder / f"{name}-applied")
        assert folder_digest(folder / f"{name}-applied") == folder_digest(folder / f"{name}-out")
    for method in METHODS:
        merge(folder, tmp_path / f"one-{method}", method, ("adapter",))
        assert as_bits(tmp_path / f"one-{method}") == as_bits(folder / "adapter-out")
        report = merge(folder, tmp_path / f"both-{method}", method, ("adapter", "full"))
        assert report.totals["kept_by"][0] > 0
        files = [folder / f"{name}.safetensors" for name in ("adapter", "full")]
        union = [PatchFile.open(file) for file in files]
        out, base = read_tensors(tmp_path / f"both-{method}"), read_tensors(folder / "base")
        for name, tensor in base.items():
            outside = ~union_mask([mask_of(patch, name, tensor) for patch in union])
            assert bits(out[name][outside]) == bits(tensor[outside])
        for patch in union:
            patch.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "joint"])
def test_ranks_merge_to_the_bytes_of_one_process(tasks, tmp_path, method):
    def merged(name, ranks):
        out = tmp_path / name
        out.mkdir()
        with pretended(ranks) as run:
            reports = run(lambda: merge(tasks, out / "model", method, patch_file=out / "patch.safetensors"))
        return folder_digest(out), reports[0].to_json()

    assert merged("three", 3) == merged("alone", 1)
