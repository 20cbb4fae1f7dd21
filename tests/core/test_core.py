"""The equations against a dense float64 oracle, and the invariants as properties."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import Oracle, bits, random_hessian, random_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorcli import core
from tailorcli.core import chunks, largest, scores, solvers
from tailorcli.core.figures import QUANTILES, LayerFigures, combine_figures, figures_after_fit, quadratic_form
from tailorcli.core.gradients import conjugate_gradients
from tailorcli.core.hessian import damping_steps, factorise, prepare
from tailorcli.core.precision import extent, unit_of
from tailorcli.core.products import System
from tailorcli.core.retain import prepare_retaining
from tailorcli.core.scores import _kth_largest_between, _kth_largest_by_radix
from tailorcli.core.tailor import add_salience_, assemble, fused_score, layer_shape, tailor_experts, tailor_layer
from tailorcli.errors import NumericalError

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 10_000)
DTYPES = st.sampled_from([(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float16, torch.float32)])
DENSITIES = st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])


# --- Hessians -------------------------------------------------------------------------------------------------


@given(tokens=st.integers(1, 60), size=st.sampled_from([1, 7, 600]), seed=SEEDS, data=st.data())
@settings(max_examples=25, deadline=None)
def test_hessian_does_not_depend_on_the_batches(tokens, size, seed, data):
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))
    cut = data.draw(st.integers(0, tokens))
    hessian, seen = torch.zeros(size, size), 0
    for batch in (x[:cut], x[cut:]):
        seen = core.accumulate_(hessian, batch, seen)
    full = core.unpack_triangle(core.pack_triangle(hessian), size)
    expected = 2.0 / tokens * x.double().T @ x.double()
    assert seen == tokens
    torch.testing.assert_close(full.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(full, full.T)


def test_diagonal_hessian_of_token_counts():
    diagonal = torch.zeros(4)
    seen = core.accumulate_diagonal_(diagonal, torch.tensor([1, 0, 2, 0]), 3, 0)
    seen = core.accumulate_diagonal_(diagonal, torch.tensor([0, 0, 1, 0]), 1, seen)
    torch.testing.assert_close(diagonal, 2.0 / 4 * torch.tensor([1.0, 0.0, 3.0, 0.0]))
    assert seen == 4


@given(size=SIZES, seed=SEEDS, damping=st.sampled_from([0.001, 0.01, 0.1]))
@settings(max_examples=40, deadline=None)
def test_inverse_diagonal_is_that_of_the_true_inverse(size, seed, damping):
    hessian = random_hessian(size, seed=seed)
    factor = factorise(hessian, damping)
    inverse = np.linalg.inv(Oracle.damped(hessian, damping))
    np.testing.assert_allclose(core.inverse_diagonal(factor).numpy(), np.diag(inverse), rtol=1e-3)
    upper = core.inverse_factor(factor).double().numpy()
    assert np.allclose(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper, inverse, rtol=2e-2, atol=2e-3 * np.abs(inverse).max())


def test_inverse_diagonal_over_several_blocks():
    hessian = random_hessian(1100, tokens=3000)
    found = core.inverse_diagonal(factorise(hessian, 0.01)).double().numpy()
    np.testing.assert_allclose(found, np.diag(np.linalg.inv(Oracle.damped(hessian, 0.01))), rtol=1e-3)


def test_hessian_that_is_not_positive_definite_is_damped_in_named_steps():
    hessian = torch.eye(6)
    hessian[0, 1] = hessian[1, 0] = 1.05  # eigenvalue -0.05
    factor = factorise(hessian, 0.01)
    assert factor.damping == 0.1
    assert factor.damping in damping_steps(0.01)
    hessian[0, 1] = hessian[1, 0] = 100.0
    with pytest.raises(NumericalError, match=r"damping tried: 0.01, 0.1, 1, 10"):
        factorise(hessian, 0.01)


def test_dead_channels_have_no_sensitivity_and_do_not_disturb_the_others():
    hessian = random_hessian(12, seed=3)
    dead = torch.zeros(14, 14)
    dead[:12, :12] = hessian
    found = core.inverse_diagonal(factorise(dead, 0.0))
    assert torch.isinf(found[12:]).all()
    torch.testing.assert_close(found[:12], core.inverse_diagonal(factorise(hessian, 0.0)), rtol=1e-4, atol=1e-5)
    assert (core.sensitivity(torch.ones(3, 14), found)[:, 12:] == 0).all()


def test_a_diagonal_hessian_is_damped_and_inverted_entry_by_entry():
    prepared = prepare(torch.tensor([4.0, 0.0, 1.0, 3.0]), 0.5, sensitivity=True, sequential=False)
    assert prepared.amount == 1.0  # half of the mean
    assert prepared.inverse_diagonal.tolist() == pytest.approx([1 / 5, torch.inf, 1 / 2, 1 / 4])
    assert prepared.num_dead == 1


def test_the_steps_of_damping_go_up_by_tens_and_begin_above_zero():
    assert damping_steps(0.01) == pytest.approx((0.01, 0.1, 1.0, 10.0))
    assert damping_steps(0.0) == (0.0, 1e-3, 1e-2, 1e-1)


# --- Scores and the mask --------------------------------------------------------------------------------------


@given(rows=SIZES, columns=SIZES, seed=SEEDS, omega=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_fused_score_is_eq_11(rows, columns, seed, omega):
    if rows * columns < 2:
        return
    base, tuned = random_layer(rows, columns, seed)
    delta = tuned - base
    hessian = random_hessian(columns, seed=seed)
    inverse = prepare(hessian, 0.01, sensitivity=True, sequential=False).inverse_diagonal
    found = fused_score(delta, inverse.unsqueeze(0), omega).double().numpy()
    if 0 < omega < 1:
        expected = Oracle.fused(delta, hessian, 0.01, omega)
    else:  # the one score that counts, not normalised: the order is the same
        expected = np.abs(delta.numpy()) if omega else Oracle.sensitivity(delta, hessian, 0.01)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * expected.max())


@given(
    rows=SIZES,
    columns=SIZES,
    seed=SEEDS,
    omega=st.sampled_from([0.0, 0.5, 1.0]),
    size=st.sampled_from([1e-18, 1, 1e18]),
)
@settings(max_examples=30, deadline=None)
def test_the_sum_of_scores_is_each_over_its_largest(rows, columns, seed, omega, size):
    if rows * columns < 2:
        return
    base, tuned = random_layer(rows, columns, seed)
    delta = (tuned - base) * size
    hessian = random_hessian(columns, seed=seed)
    inverse = prepare(hessian, 0.01, sensitivity=True, sequential=False).inverse_diagonal.unsqueeze(0)
    goal = delta.roll(1, 0)  # as if a retain term aimed elsewhere
    found = fused_score(goal, inverse, omega, unit_of(extent(goal)))
    before = found.double().numpy()
    add_salience_(found, delta)
    moved = np.abs(delta.double().numpy())
    expected = before / before.max() + moved / moved.max()
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6, atol=1e-7)


def test_the_sum_of_scores_decides_the_mask_of_a_tensor():
    base = torch.zeros(2, 64)
    tuned = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    options = {"density": 0.25, "omega": 0.5, "solver": "joint"}
    new, retained = random_hessian(64, seed=1), random_hessian(64, seed=2)
    prepared = prepare_retaining(new, retained, 0.3, 0.1, sensitivity=True, sequential=False)
    masks = {by: tailor_layer(base, tuned, prepared, score_by=by, **options).mask for by in ("paper", "sum")}
    goal = core.retained_goal(tuned, prepared)
    score = fused_score(goal, prepared.inverse_diagonal.unsqueeze(0), 0.5)
    assert masks["paper"].equal(core.select_mask(score, 32))
    assert masks["sum"].equal(core.select_mask(score / score.max() + tuned.abs() / tuned.abs().max(), 32))
    assert not masks["sum"].equal(masks["paper"])


def test_no_change_at_all_has_no_score():
    score = torch.zeros(2, 3)
    add_salience_(score, torch.zeros(2, 3))
    assert score.equal(torch.zeros(2, 3))


@given(
    values=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3e-39, 7.5]), min_size=1, max_size=200),
    density=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_mask_keeps_exactly_the_best_and_breaks_ties_by_index(values, density):
    score = torch.tensor(values)
    count = core.count_kept(density, score.numel())
    assert count == round(density * len(values))
    mask = core.select_mask(score, count)
    assert mask.sum() == count
    np.testing.assert_array_equal(mask.numpy(), Oracle.mask(score.numpy().astype(np.float64), count))


@given(size=st.integers(1, 3000), seed=SEEDS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_radix_selection_agrees_with_sorting(size, seed, data):
    count = data.draw(st.integers(1, size))
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)).abs()
    values = torch.where(values < 0.3, torch.tensor(0.0), values)
    assert _kth_largest_by_radix(values, count) == values.sort(descending=True).values[count - 1]


@given(size=st.integers(200, 3000), seed=SEEDS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_selection_between_bounds_agrees_with_sorting_or_says_that_it_cannot(size, seed, data):
    count = data.draw(st.integers(1, size))
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)).abs()
    values[: data.draw(st.integers(0, size))] = 0.25  # many that are alike
    with patch.object(scores, "_BOUNDING", 128):
        found = _kth_largest_between(values, count)
    assert found is None or found == values.sort(descending=True).values[count - 1]


def test_selection_between_bounds_finds_its_threshold_in_weights():
    values = torch.randn(300, 500, generator=torch.Generator().manual_seed(0)).abs().flatten()
    with patch.object(scores, "_BOUNDING", 4096):
        found = _kth_largest_between(values, 15_000)
    assert found == values.sort(descending=True).values[14_999]


@given(size=st.integers(300, 3000), seed=SEEDS, density=DENSITIES, alike=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_selection_in_pieces_keeps_exactly_the_best(size, seed, density, alike):
    score = torch.randn(size, generator=torch.Generator().manual_seed(seed)).abs()
    score[: int(alike * size)] = 0.25
    with patch.multiple(scores, _BOUNDING=128, _PIECE=100):
        mask = core.select_mask(score, core.count_kept(density, size))
    np.testing.assert_array_equal(mask.numpy(), Oracle.mask(score.numpy(), core.count_kept(density, size)))


@pytest.mark.parametrize("count", [100, 199, 200, 201, 250])
def test_a_sample_that_is_unlike_all_other_entries_misleads_no_selection(count):
    score = torch.ones(300)
    score[::3] = 0.1  # where the sample is taken
    with patch.multiple(scores, _BOUNDING=128, _PIECE=100):
        assert torch.equal(core.select_mask(score, count), torch.from_numpy(Oracle.mask(score.numpy(), count)))
        assert _kth_largest_between(score, count) in ((None,) if count <= 200 else (None, score[0]))


def test_ties_go_by_index_across_the_pieces_that_are_searched_for_them(monkeypatch):
    monkeypatch.setattr(scores, "_TIE_CHUNK", 8)
    assert core.select_mask(torch.ones(5, 20), 3).flatten().nonzero().flatten().tolist() == [0, 1, 2]


@given(size=st.integers(300, 3000), seed=SEEDS, density=DENSITIES, alike=st.floats(0, 0.2), kinds=DTYPES)
@settings(max_examples=20, deadline=None)
def test_the_largest_changes_are_found_in_one_pass_as_by_their_scores(size, seed, density, alike, kinds):
    base, tuned = (tensor.flatten().to(kind) for tensor, kind in zip(random_layer(size, 1, seed), kinds, strict=True))
    tuned[: int(alike * size)] = (base[: int(alike * size)] + 0.125).to(tuned.dtype)
    options = {"density": density, "omega": 1.0, "solver": "none"}
    with patch.multiple(largest, _SAMPLE=128, _PIECE=100):
        quick = core.tailor_layer(base, tuned, None, **options)
    with patch.object(largest, "_SAMPLE", size):  # too few for a sample: the long way
        slow = core.tailor_layer(base, tuned, None, **options)
    assert torch.equal(quick.mask, slow.mask)
    assert bits(quick.patched) == bits(slow.patched)
    found, expected = quick.figures.to_dict(), slow.figures.to_dict()
    assert found.keys() == expected.keys()
    for name in ("kept", "zero_delta", "salience_quantiles"):
        assert found[name] == expected[name]
    for name in ("delta_sq", "delta_sq_kept", "distance_tuned", "distance_before", "distance_after"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_the_largest_changes_of_weights_take_the_short_way_and_odd_ones_the_long_way():
    base, tuned = random_layer(300, 300, 0)
    count = base.numel() // 10
    found, changes = largest.most_salient(base, tuned, count), (tuned - base).abs().flatten()
    mask = core.select_mask(changes, count)
    assert torch.equal(found.mask, mask)
    assert found.changed == int((changes > 0).sum())
    assert (found.square, found.square_kept) == pytest.approx(
        tuple(float(part.double().square().sum()) for part in (changes, changes[mask])), rel=1e-5
    )
    assert (found.total, found.total_kept) == pytest.approx(
        tuple(float(part.double().sum()) for part in (changes, changes[mask])), rel=1e-5
    )
    scored = core.tailor_layer(base, tuned, None, density=0.1, omega=1.0, solver="none", score_only=True)
    assert (scored.patched, scored.figures.distance_after) == (None, None)
    half = core.tailor_layer(base, tuned, None, density=0.1, omega=1.0, solver="none", weight=0.5)
    torch.testing.assert_close(half.patched, torch.where(half.mask, (base + tuned) / 2, base))
    assert half.figures.distance_after == pytest.approx(half.figures.distance_before / 2, rel=1e-5)
    assert largest.most_salient(torch.zeros(base.shape), 1e-30 * base, count) is None  # whose squares are none
    tuned[0, 0] = torch.nan
    assert largest.most_salient(base, tuned, count) is None
    assert largest.most_salient(base, base.double(), count) is None
    with patch.object(largest, "_PIECE", 1000):
        assert largest.most_salient(torch.zeros(base.shape), torch.ones(base.shape), count) is None  # all alike


# --- The solvers ----------------------------------------------------------------------------------------------


def run_layer(base, tuned, hessian, **options):
    chosen = {"density": 0.3, "omega": 0.5, "solver": "joint", **options}
    sequential = chosen["solver"] == "sequential" and hessian.dim() == 2
    prepared = prepare(hessian, 0.01, sensitivity=True, sequential=sequential)
    return core.tailor_layer(base, tuned, prepared, **chosen)


@given(rows=SIZES, columns=SIZES, seed=SEEDS, density=DENSITIES)
@settings(max_examples=40, deadline=None)
def test_joint_is_the_exact_optimum(rows, columns, seed, density):
    base, tuned = random_layer(rows, columns, seed)
    hessian = random_hessian(columns, seed=seed)
    result = run_layer(base, tuned, hessian, density=density)
    delta, mask = (tuned - base).numpy(), result.mask.numpy()
    best = Oracle.joint(delta, mask, hessian, 0.01)
    np.testing.assert_allclose((result.patched - base).numpy(), best, atol=2e-4)


@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
@pytest.mark.parametrize("columns", [5, 16, 33])
def test_sequential_is_theorem_4_5(columns, block_size):
    base, tuned = random_layer(9, columns, seed=columns)
    hessian = random_hessian(columns, seed=1)
    result = run_layer(base, tuned, hessian, solver="sequential", block_size=block_size)
    expected = Oracle.sequential((tuned - base).numpy(), result.mask.numpy(), hessian, 0.01)
    np.testing.assert_allclose((result.patched - base).numpy(), expected, atol=1e-4)


@given(rows=SIZES, columns=SIZES, seed=SEEDS, density=DENSITIES, decay=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_joint_is_never_worse_than_sequential_or_none(rows, columns, seed, density, decay):
    """Invariant 3, on the damped objective that all three are given."""
    base, tuned = random_layer(rows, columns, seed)
    hessian = random_hessian(columns, seed=seed, decay=decay)
    delta = (tuned - base).numpy()
    errors = {}
    for solver in ("none", "sequential", "joint"):
        result = run_layer(base, tuned, hessian, density=density, solver=solver)
        errors[solver] = Oracle.error((result.patched - base).numpy(), delta, hessian, damping=0.01)
    slack = 1e-5 * Oracle.error(0 * delta, delta, hessian, damping=0.01)
    assert errors["joint"] <= errors["sequential"] + slack
    assert errors["joint"] <= errors["none"] + slack


@given(
    rows=SIZES, columns=SIZES, seed=SEEDS, density=DENSITIES, solver=st.sampled_from(["none", "sequential", "joint"])
)
@settings(max_examples=60, deadline=None)
def test_outside_the_mask_base_to_the_bit(rows, columns, seed, density, solver):
    base, tuned = random_layer(rows, columns, seed)
    base[0, 0] = -0.0  # a sign that a sum would lose
    base, tuned = base.bfloat16(), tuned.bfloat16()
    result = run_layer(base, tuned, random_hessian(columns, seed=seed), density=density, solver=solver)
    assert result.mask.sum() == round(density * base.numel())
    assert result.patched.dtype == torch.bfloat16
    assert bits(result.patched[~result.mask]) == bits(base[~result.mask])
    if density == 1.0:
        assert bits(result.patched) == bits(tuned)
    if density == 0.0:
        assert bits(result.patched) == bits(base)


def test_a_wide_layer_solves_longer_rows_directly_than_a_narrow_one():
    def direct(columns, kept):
        return solvers._worth_solving_directly(torch.arange(columns).unsqueeze(0) < kept) == [True]

    shortest, longest = [(64, 64), (512, 80), (2048, 600), (16384, 2000)], [(512, 150), (2048, 800), (16384, 2100)]
    assert all(direct(*each) for each in shortest)
    assert not any(direct(*each) for each in longest)
    assert not direct(64, 0)


def test_conjugate_gradients_agree_with_the_direct_solution():
    hessian = random_hessian(64, seed=5)
    delta = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    mask = delta.abs() > 1.0
    direct = core.decorate_joint(delta, mask, hessian, 0.02)
    target = torch.where(mask, torch.where(mask, 0.0, delta) @ hessian, 0.0)
    solution, steps, residual_sq = conjugate_gradients(target, mask, System.of(hessian, 0.02, 1e-6), 1e-6, 500)
    assert 0 < steps < 500
    assert residual_sq**0.5 <= 1e-6 * float(target.norm())
    torch.testing.assert_close(solution, direct.decorator, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("density", [0.8, 0.95])
def test_joint_reaches_the_residual_it_reports(density):
    """Wide and dense enough that conjugate gradients take over."""
    base, tuned = random_layer(40, 300, seed=2)
    hessian = random_hessian(300, seed=2, decay=1.0)
    result = run_layer(base, tuned, hessian, density=density)
    assert result.figures.iterations > 0
    assert result.figures.residual <= 1e-3
    a = Oracle.damped(hessian, 0.01)
    delta, mask = (tuned - base).double().numpy(), result.mask.numpy()
    change = (result.patched.double() - base.double()).numpy()
    residual = np.where(mask, (change - delta) @ a, 0.0)
    target = np.where(mask, np.where(mask, 0.0, delta) @ a, 0.0)
    assert np.linalg.norm(residual) <= 1.5e-3 * np.linalg.norm(target)


def test_rows_in_chunks_of_very_different_size_have_the_values_and_the_residual_of_all_together(monkeypatch):
    hessian = random_hessian(300, seed=2, decay=1.0)
    delta = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(40, 300, generator=torch.Generator().manual_seed(1)) < 0.9
    delta[:20] *= 1e-12  # so that their chunk is worked on in a unit of its own
    whole = core.decorate_joint(delta[20:], mask[20:], hessian, 0.02)
    monkeypatch.setattr(chunks, "_SOLVER_CHUNK", 20 * 300)
    found = core.decorate_joint(delta, mask, hessian, 0.02)
    torch.testing.assert_close(found.decorator[20:], whole.decorator)
    left = torch.where(mask, (found.decorator - torch.where(mask, 0.0, delta)).double() @ hessian.double(), 0.0)
    left += 0.02 * found.decorator.double()
    target = torch.where(mask, torch.where(mask, 0.0, delta).double() @ hessian.double(), 0.0)
    assert found.residual == pytest.approx(float(left.norm() / target.norm()), rel=0.1)
    last = core.decorate_joint(delta[[*range(20, 40), 0]], mask[[*range(20, 40), 0]], hessian, 0.02)
    assert last.residual == pytest.approx(found.residual, rel=1e-3)  # the last chunk's is nothing beside it
    last = core.decorate_joint(delta.roll(20, 0), mask & (torch.arange(40) < 20).unsqueeze(1), hessian, 0.02)
    assert last.iterations == found.iterations > 0  # those of the chunk that took most


def test_rows_solved_directly_report_their_residual_and_singular_ones_go_on_by_iterations():
    hessian = random_hessian(40, seed=3)
    delta = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    found = core.decorate_joint(delta, delta.abs() > 1.0, hessian, 0.02)
    assert found.iterations == 0
    assert 0.0 < found.residual < 1e-4
    ones, kept = torch.ones(3, 3), torch.tensor([[True, True, True], [True, False, False]])
    target = torch.where(kept, 6.0, 0.0)
    solution, steps, _ = solvers.solve_on_mask(target, kept, System.of(ones, 0.0, 1e-6), 1e-6, 10)
    torch.testing.assert_close(solution, torch.tensor([[2.0, 2.0, 2.0], [6.0, 0.0, 0.0]]))
    assert steps > 0


def test_joint_without_damping_on_fewer_tokens_than_channels():
    """H_SS may be singular then; the iterative solver takes over and never makes the error worse."""
    base, tuned = random_layer(20, 40, seed=1)
    hessian = random_hessian(40, tokens=6, seed=1)
    prepared = prepare(hessian, 0.0, sensitivity=False, sequential=False)
    result = core.tailor_layer(base, tuned, prepared, density=0.5, omega=1.0, solver="joint")
    assert result.figures.error_after < result.figures.error_before
    assert torch.isfinite(result.patched).all()


@pytest.mark.parametrize("solver", ["none", "sequential", "joint"])
def test_dead_channels_go_back_to_base_unless_kept(solver):
    base, tuned = random_layer(10, 24, seed=4)
    hessian = torch.zeros(24, 24)
    hessian[:20, :20] = random_hessian(20, seed=4)
    result = run_layer(base, tuned, hessian, density=0.2, omega=0.0, solver=solver)
    assert result.figures.dead_channels == 4
    assert not result.mask[:, 20:].any()
    assert bits(result.patched[:, 20:]) == bits(base[:, 20:])
    kept = run_layer(base, tuned, hessian, density=0.9, omega=1.0, solver=solver)
    columns = kept.mask.clone()
    columns[:, :20] = False
    assert bits(kept.patched[columns]) == bits(tuned[columns])


@pytest.mark.parametrize("solver", ["none", "sequential", "joint"])
def test_a_hessian_of_zeros_only_compensates_nothing(solver):
    base, tuned = random_layer(6, 8, seed=0)
    result = run_layer(base, tuned, torch.zeros(8, 8), density=0.5, omega=1.0, solver=solver)
    assert bits(result.patched) == bits(torch.where(result.mask, tuned, base))


# --- Every parameter is a layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["none", "sequential", "joint"])
def test_diagonal_hessians_need_no_compensation(solver):
    """Embeddings (by token), norm scales (by channel) and biases: the masked weights are the optimum."""
    table, tuned_table = random_layer(12, 5, seed=6)
    counts = torch.tensor([0.0, 3.0] * 6)
    result = run_layer(table, tuned_table, counts, transposed=True, omega=0.0, solver=solver)
    assert not result.mask[::2].any()  # tokens that never came have no sensitivity
    assert bits(result.patched) == bits(torch.where(result.mask, tuned_table, table))
    scale, tuned_scale = table[0], tuned_table[0]
    assert run_layer(scale, tuned_scale, torch.ones(5), solver=solver).patched.shape == (5,)
    bias = run_layer(scale, tuned_scale, torch.tensor([2.0]), omega=0.0, density=0.4, solver=solver)
    largest = (tuned_scale - scale).abs().topk(2).indices
    assert set(bias.mask.nonzero().squeeze(1).tolist()) == set(largest.tolist())


@pytest.mark.parametrize("solver", ["sequential", "joint"])
def test_transposed_storage_gives_the_same_layer(solver):
    base, tuned = random_layer(14, 22, seed=8)
    hessian = random_hessian(22, seed=8)
    plain = run_layer(base, tuned, hessian, solver=solver)
    flipped = run_layer(base.T.contiguous(), tuned.T.contiguous(), hessian, solver=solver, transposed=True)
    assert torch.equal(plain.mask, flipped.mask.T)
    torch.testing.assert_close(plain.patched, flipped.patched.T)
    assert plain.figures.error_after == pytest.approx(flipped.figures.error_after, rel=1e-4)


# --- Figures ---------------------------------------------------------------------------------------------------


def test_figures_against_the_oracle():
    base, tuned = random_layer(16, 20, seed=9)
    tuned[:3] = base[:3]
    hessian = random_hessian(20, seed=9)
    figures = run_layer(base, tuned, hessian).figures
    result = run_layer(base, tuned, hessian)
    delta, mask = (tuned - base).double().numpy(), result.mask.numpy()
    change = (result.patched - base).double().numpy()
    whole = Oracle.error(0 * delta, delta, hessian)
    assert figures.zero_delta == 60
    assert figures.kept == mask.sum() == 96
    assert figures.delta_sq == pytest.approx((delta**2).sum(), rel=1e-5)
    assert figures.delta_sq_kept == pytest.approx((delta**2)[mask].sum(), rel=1e-5)
    sensitivity = Oracle.sensitivity(delta, hessian, 0.01)
    assert figures.sensitivity_kept == pytest.approx(sensitivity[mask].sum(), rel=1e-3)
    assert figures.error_before == pytest.approx(
        Oracle.error(np.where(mask, delta, 0), delta, hessian) / whole, rel=1e-4
    )
    assert figures.error_after == pytest.approx(Oracle.error(change, delta, hessian) / whole, rel=1e-3)
    assert figures.distance_after == pytest.approx(np.abs(change).sum(), rel=1e-4)
    assert figures.distance_before == pytest.approx(np.abs(delta[mask]).sum(), rel=1e-4)
    assert figures.salience_quantiles == pytest.approx(np.quantile(np.abs(delta), QUANTILES).tolist(), rel=1e-5)
    assert figures.sensitivity_quantiles == pytest.approx(np.quantile(sensitivity, QUANTILES).tolist(), rel=1e-3)
    alone = run_layer(base, tuned, hessian, solver="none").figures
    assert alone.error_after == alone.error_before == pytest.approx(figures.error_before, rel=1e-5)
    assert alone.distance_after == alone.distance_before


def test_figures_are_those_of_the_values_as_they_are_stored():
    base, tuned = random_layer(16, 20, seed=9)
    hessian = random_hessian(20, seed=9)
    coarse = run_layer(base, tuned, hessian, solver="none", store=lambda values, _: values.bfloat16().float())
    delta, change = (tuned - base).double().numpy(), (coarse.patched - base).double().numpy()
    assert not torch.equal(coarse.patched, run_layer(base, tuned, hessian, solver="none").patched)
    assert coarse.figures.distance_after == pytest.approx(np.abs(change).sum(), rel=1e-4)
    error = Oracle.error(change, delta, hessian) / Oracle.error(0 * delta, delta, hessian)
    assert coarse.figures.error_after == pytest.approx(error, rel=1e-3)
    wide = random_layer(300, 300, seed=9)  # which without a Hessian and without storing takes one pass
    how = {"density": 0.3, "omega": 1.0, "solver": "none"}
    alone = tailor_layer(*wide, None, **how, store=lambda values, _: values.bfloat16().float())
    assert torch.equal(alone.patched, tailor_layer(*wide, None, **how).patched.bfloat16().float())
    assert alone.figures.distance_after == pytest.approx(float((alone.patched - wide[0]).abs().sum()), rel=1e-5)
    near = (base + 0.001 * (tuned - base)).bfloat16()  # where the goal lies between two numbers of bfloat16
    retaining = prepare_retaining(hessian, random_hessian(20, seed=8), 0.5, 0.1, sensitivity=True, sequential=False)
    kept = tailor_layer(base.bfloat16(), near, retaining, density=0.3, omega=0.5, solver="none")
    moved = (kept.patched.float() - base.bfloat16().float()).abs().sum()
    assert kept.figures.distance_after == pytest.approx(float(moved), rel=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_figures_after_a_fit_are_those_of_the_fitted_values(transposed, monkeypatch):
    monkeypatch.setattr(chunks, "_SOLVER_CHUNK", 4 * 20)  # several chunks of rows
    base, tuned = random_layer(10, 20, seed=1)
    patched = base + (tuned - base).roll(1, 0)
    hessian, retained = random_hessian(20, seed=1), random_hessian(20, seed=2)
    plain = replace(run_layer(base, tuned, hessian).figures, output_energy=2.0, drift_energy=4.0)
    stored = [matrix.T.contiguous() if transposed else matrix for matrix in (base, tuned, patched)]
    found = figures_after_fit(plain, *stored, hessian, retained, transposed)
    left, moved = (patched - tuned).double().numpy(), (patched - base).double().numpy()
    assert found.error_after == pytest.approx(Oracle.error(left, 0 * left, hessian) / 2, rel=1e-4)
    assert found.drift == pytest.approx(Oracle.error(moved, 0 * moved, retained) / 4, rel=1e-4)
    assert found.distance_after == pytest.approx(np.abs(moved).sum(), rel=1e-5)
    assert (found.error_before, found.kept) == (plain.error_before, plain.kept)


def test_a_quadratic_form_of_a_wide_layer_is_that_of_float64():
    hessian = random_hessian(600, seed=4)
    rows = torch.randn(5, 600, generator=torch.Generator().manual_seed(0))
    expected = float((rows.double() @ hessian.double() * rows.double()).sum())
    assert quadratic_form(rows, hessian) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("where", "value"), [("base", float("nan")), ("tuned", float("inf"))])
def test_weights_that_are_not_finite_are_refused(where, value):
    base, tuned = random_layer(4, 5, seed=0)
    {"base": base, "tuned": tuned}[where][1, 2] = value
    with pytest.raises(NumericalError, match=f"NaN or infinity in the {where} weights"):
        run_layer(base, tuned, random_hessian(5))


def test_a_kept_entry_goes_its_share_of_the_way_to_its_compensated_value():
    base, tuned, decorator = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 3.0]]), torch.tensor([[1.0, 0.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert assemble(base, tuned, mask, decorator, 0.5).tolist() == [[2.5, 2.0]]
    assert assemble(base, tuned, mask, decorator).tolist() == [[4.0, 3.0]]


def test_a_bias_has_one_channel_and_a_scale_as_many_as_it_has_entries():
    assert [layer_shape(torch.empty(6), inputs) for inputs in (1, 6, None)] == [(6, 1), (1, 6), (1, 6)]
    assert [layer_shape(torch.empty(6, 4, 3), inputs) for inputs in (12, 1, None)] == [(6, 12), (72, 1), (6, 12)]


def test_a_tuned_value_that_the_bases_dtype_does_not_hold_is_refused_also_without_a_hessian():
    for size in (4, 300):  # the latter in one pass
        base, tuned = random_layer(size, size, 0)
        tuned[1, 1] = 1e6
        with pytest.raises(NumericalError, match=r"tuned's values overflow torch\.float16"):
            tailor_layer(base.half(), tuned, None, density=0.1, omega=1.0, solver="none")


def test_inputs_are_never_changed():
    base, tuned = random_layer(30, 30, seed=3)
    hessian = random_hessian(30, seed=3)
    before = [bits(t) for t in (base, tuned, hessian)]
    for solver in ("none", "sequential", "joint"):
        run_layer(base, tuned, hessian, solver=solver)
    assert [bits(t) for t in (base, tuned, hessian)] == before


@pytest.mark.parametrize(("decay", "density"), [(0.5, 0.5), (1.0, 0.3), (1.0, 0.8)])
def test_the_default_tolerance_is_near_enough_to_the_optimum(decay, density):
    """Also where H is ill-conditioned, and a small residual could hide a large error."""
    delta = torch.randn(64, 400, generator=torch.Generator().manual_seed(1))
    hessian = random_hessian(400, tokens=1600, seed=1, decay=decay)
    mask = delta.abs() >= delta.abs().flatten().kthvalue(round((1 - density) * delta.numel())).values
    amount = core.dampen(hessian, 0.01)
    target = torch.where(mask, torch.where(mask, 0.0, delta) @ hessian, 0.0)
    found, steps, _ = conjugate_gradients(target, mask, System.of(hessian, amount, 2e-4), 2e-4, 300)
    change = torch.where(mask, delta, 0.0) + found
    best = Oracle.error(Oracle.joint(delta, mask.numpy(), hessian, 0.01), delta, hessian, 0.01)
    assert steps < 300
    assert Oracle.error(change, delta, hessian, 0.01) <= 1.02 * best


def test_figures_of_slices_add_up_by_the_tokens_of_each():
    common = {"numel": 10, "kept": 2, "zero_delta": 1, "delta_sq": 4.0, "delta_sq_kept": 2.0, "distance_tuned": 5.0}
    common |= {"distance_before": 3.0, "distance_after": 4.0, "sensitivity_sum": 6.0, "sensitivity_kept": 2.0}
    first = LayerFigures(
        **common,
        **{"salience_quantiles": [0.0, 1.0], "sensitivity_quantiles": [0.0, 2.0], "dead_channels": 1, "damping": 0.1},
        **{"output_energy": 2.0, "error_before": 0.5, "error_after": 0.25, "drift_energy": 4.0, "drift": 0.5},
        **{"iterations": 3, "residual": 1e-3},
    )
    second = replace(first, salience_quantiles=[2.0, 3.0], dead_channels=0, damping=0.01, output_energy=6.0)
    second = replace(second, error_before=1.0, error_after=0.75, drift_energy=8.0, drift=0.25, iterations=2)
    found = combine_figures([first, replace(second, residual=1e-4)], tokens=(3, 1), retained_tokens=(1, 3))
    for name, value in common.items():
        assert getattr(found, name) == 2 * value, name
    assert found.salience_quantiles == [1.0, 2.0]
    assert found.sensitivity_quantiles == [0.0, 2.0]
    assert found.output_energy == 2 * 3 / 4 + 6 / 4
    assert (found.error_before, found.error_after) == ((0.5 * 1.5 + 1.0 * 1.5) / 3, (0.25 * 1.5 + 0.75 * 1.5) / 3)
    assert found.drift_energy == 4 / 4 + 8 * 3 / 4
    assert found.drift == pytest.approx((0.5 * 1 + 0.25 * 6) / 7)
    assert (found.dead_channels, found.damping, found.iterations, found.residual) == (1, 0.1, 3, 1e-3)
    alike = combine_figures([first, second])
    assert (alike.output_energy, alike.drift_energy) == (8.0, 12.0)


def test_fused_experts_count_in_the_errors_by_their_tokens():
    """As if all of their outputs were measured at once: ||(W - W_tuned) X||^2 over ||delta X||^2."""
    generator = torch.Generator().manual_seed(4)
    counts = (400, 7)
    inputs = [torch.randn(count, 6, generator=generator) * (1 + 3 * (count < 10)) for count in counts]
    base, tuned = (torch.randn(2, 5, 6, generator=generator) for _ in range(2))
    prepared = [prepare(2 * x.T @ x / len(x), 0.01, sensitivity=True, sequential=False) for x in inputs]
    how = {"density": 0.3, "omega": 0.5, "solver": "joint"}
    retaining = [
        prepare_retaining(*(2 * x.T @ x / len(x) for x in pair), 0.5, 0.1, sensitivity=True, sequential=False)
        for pair in zip(inputs, inputs[::-1], strict=True)  # the other expert's inputs are what this one retains
    ]
    kept = tailor_experts(base, tuned, retaining, counts, counts[::-1], **how)
    drifts = [
        (((w - b) @ x.T).square().sum(), ((t - b) @ x.T).square().sum())
        for x, w, t, b in zip(inputs[::-1], kept.patched, tuned, base, strict=True)
    ]
    left, whole = (sum(column) for column in zip(*drifts, strict=True))
    assert kept.figures.drift == pytest.approx((left / whole).item(), rel=1e-4)
    found = tailor_experts(base, tuned, prepared, counts, **how)
    parts = zip(inputs, found.patched, tuned, base, strict=True)
    squares = [(((w - t) @ x.T).square().sum(), ((t - b) @ x.T).square().sum()) for x, w, t, b in parts]
    left, whole = (sum(column) for column in zip(*squares, strict=True))
    assert found.figures.error_after == pytest.approx((left / whole).item(), rel=1e-4)
    assert found.figures.output_energy == pytest.approx(2 * whole.item() / sum(counts), rel=1e-4)
    alike = tailor_experts(base, tuned, prepared, **how)
    assert alike.figures.error_after != pytest.approx(found.figures.error_after, rel=0.01)
    assert torch.equal(alike.patched, found.patched)
