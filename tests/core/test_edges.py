"""Numbers at the edges: float64 pairs, very large and very small weights and Hessians, outputs that overflow."""

import math

import pytest
import torch
from helpers import bits, random_hessian

from tailorcli import core
from tailorcli.core.baselines import baseline_layer, released_layer
from tailorcli.core.hessian import combine_hessians, prepare
from tailorcli.core.propagation import Moments, refit
from tailorcli.core.retain import prepare_retaining
from tailorcli.core.stitch import stitch_joint, task_errors
from tailorcli.core.tailor import tailor_layer
from tailorcli.errors import NumericalError

ROWS, COLUMNS = 24, 30
SOLVERS = ("none", "sequential", "joint")


def weights(scale=1.0, change=0.02, dtype=torch.float32, seed=0):
    """A base and a tuned matrix (O, I)."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    delta = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64) * change
    return (base * scale).to(dtype), ((base + delta) * scale).to(dtype)


def hessian_of(kind, scale=1.0, seed=0):
    full = random_hessian(COLUMNS, seed=seed)
    return (full if kind == "full" else full.diagonal().clone()) * scale


def prepared_by(kind, solver, scale=1.0, retain=None):
    wanted = {"sensitivity": True, "sequential": solver == "sequential" and kind == "full"}
    if retain is None:
        return prepare(hessian_of(kind, scale), 0.01, **wanted)
    return prepare_retaining(hessian_of(kind, scale), hessian_of(kind, retain, seed=1), 0.3, 0.01, **wanted)


def tailored(base, tuned, prepared, solver, **options):
    chosen = {"density": 0.3, "omega": 0.5, "solver": solver} | options
    return tailor_layer(base, tuned, prepared, **chosen)


# --- float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [1e-8, 1e-12, 1e-50])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_float64_change_below_float32s_step_is_kept_to_the_bit(solver, change):
    base, _ = weights(dtype=torch.float64)
    base *= 1e-40 if change == 1e-50 else 1.0
    tuned = base + change * torch.randn(base.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = tailored(base, tuned, prepared_by("full", solver), solver, density=1.0)
    assert bits(result.patched) == bits(tuned)
    assert result.figures.zero_delta == int((base == tuned).sum())
    part = tailored(base, tuned, prepared_by("full", solver), solver)
    assert bits(part.patched[~part.mask]) == bits(base[~part.mask])
    assert bool((part.patched[part.mask] != base[part.mask]).any())


@pytest.mark.parametrize("method", ["magnitude", "dare", "interpolate", "fapm"])
def test_every_method_keeps_a_float64_change(method):
    base, _ = weights(dtype=torch.float64)
    delta = 1e-10 * torch.randn(base.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tuned = base + delta
    result = baseline_layer(base, tuned, method=method, density=0.5, weight=0.5, seed=3)
    scale = 1.0 if method == "dare" else 0.5  # dare divides by its density
    expected = base + torch.where(result.mask, scale * (tuned - base), 0.0)
    torch.testing.assert_close(result.patched, expected, rtol=0, atol=1e-15)
    assert result.figures.distance_tuned == pytest.approx(float((tuned - base).abs().sum()), rel=1e-5)


def test_the_released_code_keeps_a_float64_change():
    base, _ = weights(dtype=torch.float64)
    tuned = base + 1e-9
    result = released_layer(base, tuned, prepared_by("full", "sequential"), density=1.0)
    torch.testing.assert_close(result.patched, tuned, rtol=0, atol=1e-14)


def test_a_mask_of_a_float64_pair_is_that_of_its_true_changes():
    base, _ = weights(dtype=torch.float64)
    delta = 1e-10 * torch.randn(base.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = tailored(base, base + delta, None, "none", omega=1.0, score_only=True)
    largest = delta.abs().flatten().topk(int(result.mask.sum())).indices
    assert set(result.mask.flatten().nonzero().squeeze(1).tolist()) == set(largest.tolist())


def moments(hessian, drift=0.0):
    return Moments(hessian.clone(), hessian * drift, torch.zeros_like(hessian), tokens=100)


def test_propagation_adds_in_float64():
    base, _ = weights(dtype=torch.float64)
    tuned = base + 1e-10 * torch.randn(base.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.ones_like(base, dtype=torch.bool)
    plain = base + 0.5 * (tuned - base)
    new, none = moments(hessian_of("full")), moments(torch.zeros(COLUMNS, COLUMNS))
    found = refit(base, tuned, plain, mask, new, none, retain_weight=0.0, damping=1e-6, tolerance=1e-6)
    assert float((found.patched - tuned).norm() / (tuned - base).norm()) < 0.01


def test_stitching_adds_in_float64():
    base, _ = weights(dtype=torch.float64)
    both = [
        base + 1e-10 * torch.randn(base.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in (1, 1)
    ]
    hessians = [hessian_of("full", seed=seed) for seed in (0, 1)]
    combined = prepare(combine_hessians(hessians, (0.5, 0.5)), 0.01, sensitivity=False, sequential=False)
    union = torch.ones_like(base, dtype=torch.bool)
    merged = stitch_joint(base, both, union, hessians, combined, (0.5, 0.5)).patched
    torch.testing.assert_close(merged, both[0], rtol=0, atol=1e-15)
    assert task_errors(base, merged, both, hessians, transposed=False) == pytest.approx([0.0, 0.0], abs=1e-6)


# --- Scale -------------------------------------------------------------------------------------------------------

SCALES = [1e30, 3e37, 1e-30, 1e-36]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scale_of_a_hessian_changes_nothing_but_its_energies(solver, kind, scale):
    base, tuned = weights()
    expected = tailored(base, tuned, prepared_by(kind, solver), solver)
    found = tailored(base, tuned, prepared_by(kind, solver, scale), solver)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.patched, expected.patched, rtol=1e-4, atol=1e-6)
    assert found.figures.error_after == pytest.approx(expected.figures.error_after, rel=1e-3)
    assert found.figures.residual == pytest.approx(expected.figures.residual, abs=1e-4)
    for name in ("output_energy", "sensitivity_sum", "sensitivity_kept"):
        assert getattr(found.figures, name) == pytest.approx(scale * getattr(expected.figures, name), rel=1e-3)
    levels = [scale * level for level in expected.figures.sensitivity_quantiles]
    assert found.figures.sensitivity_quantiles == pytest.approx(levels, rel=1e-3)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_a_hessian_below_float32s_normal_numbers_still_decides(kind):
    base, tuned = weights()
    expected = tailored(base, tuned, prepared_by(kind, "joint"), "joint")
    found = tailored(base, tuned, prepared_by(kind, "joint", 1e-42), "joint")
    assert float((found.mask == expected.mask).float().mean()) > 0.9
    assert found.figures.error_after == pytest.approx(expected.figures.error_after, rel=0.2)


@pytest.mark.parametrize("retain", [1e30, 1e-30])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_the_scales_of_both_hessians_of_a_retain_term_change_nothing(kind, scale, retain):
    base, tuned = weights()
    expected = tailored(base, tuned, prepared_by(kind, "joint", retain=1.0), "joint")
    found = tailored(base, tuned, prepared_by(kind, "joint", scale, retain=retain), "joint")
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.patched, expected.patched, rtol=1e-3, atol=1e-5)
    assert found.figures.drift == pytest.approx(expected.figures.drift, rel=1e-3)
    for name in ("output_energy", "sensitivity_sum", "sensitivity_kept"):
        assert getattr(found.figures, name) == pytest.approx(scale * getattr(expected.figures, name), rel=1e-3)
    assert found.figures.drift_energy == pytest.approx(retain * expected.figures.drift_energy, rel=1e-3)


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e-20, 1e-30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scale_of_the_weights_changes_nothing_but_theirs(solver, scale):
    base, tuned = weights()
    expected = tailored(base, tuned, prepared_by("full", solver), solver)
    found = tailored(*weights(scale), prepared_by("full", solver), solver)
    assert float((found.mask == expected.mask).float().mean()) > 0.99
    torch.testing.assert_close(found.patched / scale, expected.patched, rtol=1e-2, atol=1e-2)
    for name in ("error_before", "error_after"):
        assert getattr(found.figures, name) == pytest.approx(getattr(expected.figures, name), rel=1e-2)
    assert found.figures.delta_sq == pytest.approx(expected.figures.delta_sq * scale**2, rel=1e-3)
    levels = [scale**2 * level for level in expected.figures.sensitivity_quantiles]
    assert found.figures.sensitivity_quantiles == pytest.approx(levels, rel=2e-2, abs=0.0)
    every = [value for value in found.figures.to_dict().values() if isinstance(value, float)]
    assert all(map(math.isfinite, every))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_propagation_does_not_depend_on_the_scale_of_its_moments(scale):
    base, tuned = weights()
    mask = torch.rand(base.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    plain = torch.where(mask, tuned, base)

    def fitted(factor):
        new, kept = (moments(hessian_of("full", factor, seed), 0.1) for seed in (0, 1))
        return refit(base, tuned, plain, mask, new, kept, retain_weight=0.3, damping=0.01)

    expected, found = fitted(1.0), fitted(scale)
    torch.testing.assert_close(found.patched, expected.patched, rtol=1e-3, atol=1e-4)
    assert math.isfinite(found.residual)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_stitching_does_not_depend_on_the_scale_of_the_hessians(kind, scale):
    base, first = weights()
    second = weights(seed=5)[1] - weights(seed=5)[0] + base
    union = torch.rand(base.shape, generator=torch.Generator().manual_seed(2)) < 0.4

    def stitched(factor):
        hessians = [hessian_of(kind, factor, seed) for seed in (0, 1)]
        combined = prepare(combine_hessians(hessians, (0.5, 0.5)), 0.01, sensitivity=False, sequential=False)
        merged = stitch_joint(base, [first, second], union, hessians, combined, (0.5, 0.5)).patched
        return merged, task_errors(base, merged, [first, second], hessians, transposed=False)

    (expected, errors), (found, found_errors) = stitched(1.0), stitched(scale)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found_errors == pytest.approx(errors, rel=1e-3)


# --- What no right result can be had for ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tailor", "magnitude", "dare", "interpolate", "fapm", "dg-hard", "released"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_that_overflows_is_refused(method, dtype):
    base, tuned = torch.full((4, COLUMNS), 3e38).to(dtype), torch.full((4, COLUMNS), -3e38).to(dtype)
    ways = {
        "tailor": lambda: tailored(base, tuned, prepared_by("full", "joint"), "joint"),
        "released": lambda: released_layer(base, tuned, prepared_by("full", "sequential"), density=0.5),
    }
    with pytest.raises(NumericalError, match="tuned minus base overflows"):
        ways.get(method, lambda: baseline_layer(base, tuned, method=method, density=0.5))()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [1e38, 2e38])
def test_weights_near_the_end_of_float32_give_finite_values_or_are_refused(solver, value):
    base, tuned = torch.full((4, COLUMNS), 3e38), torch.full((4, COLUMNS), 3e38)
    tuned[1] = value
    prepared = prepared_by("full", solver)
    if (solver, value) == ("joint", 1e38):
        with pytest.raises(NumericalError, match="by more than float32 holds"):
            tailored(base, tuned, prepared, solver, density=0.1)
        return
    result = tailored(base, tuned, prepared, solver, density=0.1)
    assert bool(result.patched.isfinite().all())
    assert all(math.isfinite(v) for v in result.figures.to_dict().values() if isinstance(v, float))


def test_a_released_score_that_overflows_is_refused():
    base, tuned = weights(1e25)
    with pytest.raises(NumericalError, match="overflow"):
        released_layer(base, tuned, prepared_by("full", "sequential"), density=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_value_that_the_bases_dtype_cannot_hold_is_refused_with_what_made_it(dtype):
    largest = torch.finfo(dtype).max
    base = torch.zeros(ROWS, COLUMNS, dtype=dtype)
    tuned = torch.full((ROWS, COLUMNS), 0.9 * largest).to(dtype)
    with pytest.raises(NumericalError, match="overflows") as found:
        tailored(base, tuned, prepared_by("full", "none"), "none", weight=1.5)
    assert "smaller --weight" in found.value.hint
    if dtype == torch.float16:
        with pytest.raises(NumericalError, match="tuned's values overflow"):
            tailored(base, torch.full_like(tuned, 1e6, dtype=torch.float32), None, "none", omega=1.0)
    with pytest.raises(NumericalError, match="overflows"):
        baseline_layer(base, tuned, method="dare", density=0.01)
    mask = torch.ones_like(base, dtype=torch.bool)
    new, none = moments(torch.eye(COLUMNS), 1e3), moments(torch.zeros(COLUMNS, COLUMNS))
    with pytest.raises(NumericalError, match="a propagated value overflows"):
        refit(base, tuned, tuned, mask, new, none, retain_weight=0.0, damping=0.0)


def test_a_plain_pair_is_worked_on_in_units_of_one():
    assert core.precision.unit_of(0.02) == 1.0
    assert prepared_by("full", "joint").unit == 1.0
    for size in (1e-44, 1e-20, 1e20, 3e38):
        unit = core.precision.unit_of(size)
        assert math.log2(unit) % 2 == 0
        assert 2**-30 <= size / unit <= 2**30
