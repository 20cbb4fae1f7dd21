"""DG-Hard, FAPM and LiNeS against dense oracles in float64."""

import numpy as np
import pytest
import torch
from helpers import Oracle, bits

from tailorcli.core import count_kept, denoise, fapm_mask, fapm_score, hard_threshold, line_weight
from tailorcli.core.baselines import baseline_layer
from tailorcli.core.rivals import SMALLEST, denoised, marchenko_pastur_median, select_signed
from tailorcli.errors import NumericalError
from tailorcli.patching.methods import weights_by_depth

DTYPES = [torch.float32, torch.bfloat16]


def weights(rows, columns, seed=0, dtype=torch.float32, rank=3):
    """A base, and a tuned weight whose change is of low rank with noise on it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator)
    signal = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    tuned = base + 0.05 * signal + 0.02 * torch.randn(rows, columns, generator=generator)
    return base.to(dtype), tuned.to(dtype)


# --- DG-Hard ---------------------------------------------------------------------------------------------------


def median_by_integration(ratio):
    """The Marchenko-Pastur median from its density, summed over a fine grid of angles."""
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    angle = (np.arange(400_000) + 0.5) * (np.pi / 2 / 400_000)
    x = low + (high - low) * np.sin(angle) ** 2
    mass = (high - low) ** 2 * (np.sin(angle) * np.cos(angle)) ** 2 / x
    return x[np.searchsorted(np.cumsum(mass) / mass.sum(), 0.5)]


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_the_median_is_that_of_the_density(ratio):
    assert marchenko_pastur_median(ratio) == pytest.approx(median_by_integration(ratio), rel=1e-4)


def test_the_threshold_is_the_published_one_and_the_same_for_the_transpose():
    assert hard_threshold(50, 50) == pytest.approx(2.858, abs=1e-3)  # Gavish and Donoho, Table IV
    assert hard_threshold(50, 100) == pytest.approx(2.1711, abs=1e-3)
    assert hard_threshold(50, 100) == hard_threshold(100, 50)
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="ratio"):
            marchenko_pastur_median(wrong)
    with pytest.raises(ValueError, match="entries"):
        hard_threshold(0, 3)


def denoised_oracle(delta, scale):
    left, values, right = np.linalg.svd(np.asarray(delta, np.float64), full_matrices=False)
    ratio = min(delta.shape) / max(delta.shape)
    optimum = (2 * (ratio + 1) + 8 * ratio / (ratio + 1 + (ratio**2 + 14 * ratio + 1) ** 0.5)) ** 0.5
    kept = values > scale * optimum * np.median(values) / median_by_integration(ratio) ** 0.5
    return (left[:, kept] * values[kept]) @ right[kept], int(kept.sum())


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (40, 40)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_singular_values_of_noise_are_dropped(shape, scale):
    base, tuned = weights(*shape)
    expected, rank = denoised_oracle(tuned - base, scale)
    assert rank == 3 or scale != 1.0  # what was put in
    assert np.allclose(denoise(tuned - base, scale).numpy(), expected, atol=1e-5)


def test_a_stack_of_matrices_is_denoised_one_by_one():
    deltas = [torch.subtract(*reversed(weights(40, 32, seed))) for seed in range(3)]
    stacked = denoised(torch.stack(deltas).view(3, -1), (3, 40, 32), 1.0)
    assert np.allclose(stacked.view(3, 40, 32).numpy(), [denoised_oracle(d, 1.0)[0] for d in deltas], atol=1e-5)
    kernel = torch.cat(deltas, 1)  # a convolution: one row an output
    assert torch.equal(denoised(kernel, (40, 8, 4, 3), 1.0), denoise(kernel))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dg_hard_leaves_vectors_and_small_matrices_tuned(dtype):
    for shape in ((2000,), (31, 33), (4, 31, 33), (1, 1)):
        base, tuned = torch.randn((2, *shape), generator=torch.Generator().manual_seed(1)).to(dtype)
        assert base[0].numel() < SMALLEST
        result = baseline_layer(base, tuned, method="dg-hard", density=0.1)
        assert bits(result.patched) == bits(tuned)
        assert result.figures.kept == base.numel()
        half = baseline_layer(base, tuned, method="dg-hard", density=0.1, weight=0.5)
        torch.testing.assert_close(half.patched, (base + tuned) / 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dg_hard_adds_what_is_left_of_the_change_and_rounds_once(dtype):
    base, tuned = weights(64, 48, dtype=dtype)
    for weight, scale in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5)):
        change, _ = denoised_oracle(tuned.double() - base.double(), scale)
        result = baseline_layer(base, tuned, method="dg-hard", density=0.1, weight=weight, threshold_scale=scale)
        exact = base.double() + weight * torch.from_numpy(change)
        spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-3)
        assert ((result.patched.double() - exact).abs() <= 0.51 * spacing + 1e-5).all()
        moved = float((result.patched.double() - base.double()).abs().sum())
        assert result.figures.distance_after == pytest.approx(moved, rel=1e-3)


def test_what_an_svd_cannot_hold_is_one_error(monkeypatch):
    def fails(*_, **__):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(NumericalError, match="does not converge"):
        denoise(torch.randn(40, 40))


# --- FAPM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])  # 0.9 reaches the negative scores
def test_fapm_keeps_the_highest_scores(dtype, density):
    base, tuned = weights(40, 30, dtype=dtype)
    base[3, 4], tuned[5, 6] = 0.0, base[5, 6]
    delta = (tuned - base).float()
    size, change = np.abs(base.double().numpy()), np.abs(delta.double().numpy())
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.where(change > 0, change - size.mean() * change / size, 0.0)
    found = fapm_score(delta, base).double().numpy()
    finite = np.isfinite(score)
    assert np.allclose(found[finite], score[finite], rtol=1e-4, atol=1e-6)
    assert found[3, 4] == found.min()
    count = count_kept(density, delta.numel())
    mask = fapm_mask(delta, base, count)
    assert int(mask.sum()) == count
    kept = score[mask.numpy()]
    assert kept.min() >= np.sort(score.ravel())[-count] - 1e-6
    result = baseline_layer(base, tuned, method="fapm", density=density)
    assert torch.equal(result.mask, mask)
    assert bits(result.patched) == bits(torch.where(mask, tuned, base))


def test_signed_scores_are_selected_to_the_bit_with_ties_to_the_lowest_index():
    generator = np.random.default_rng(0)
    lowest = float(torch.finfo(torch.float32).min)
    for case in range(60):
        score = generator.standard_normal(97).astype(np.float32).round(case % 3)
        score[::13], score[5], score[50] = lowest, -0.0, -1e-45
        for count in (0, 1, 20, 60, 90, 96, 97):
            expected = Oracle.mask(score.astype(np.float64) + 0.0, count)
            found = select_signed(torch.from_numpy(score), count).numpy()
            assert (found == expected).all(), (case, count)


def test_a_fresh_bias_is_scored_by_its_change_alone():
    delta = torch.tensor([[0.1, -3.0, 2.0, 0.0]])
    assert fapm_mask(delta, torch.zeros(1, 4), 2).tolist() == [[False, True, True, False]]


# --- LiNeS -----------------------------------------------------------------------------------------------------


def test_a_line_goes_from_alpha_to_alpha_plus_beta():
    names = ["embed.weight", "norm.weight", "lm_head.weight"]
    names += [f"model.layers.{n}.mlp.experts.{e}.weight" for n in range(5) for e in range(2)]
    names += [f"vision.blocks.{n}.weight" for n in (0, 2, 10)] + ["projector.0.weight"]
    found = weights_by_depth(names, 0.2, 0.8)
    assert [found[name] for name in names[:3]] == [0.2] * 3
    for number in range(5):
        expected = 0.2 + 0.8 * number / 4
        assert found[f"model.layers.{number}.mlp.experts.1.weight"] == pytest.approx(expected, abs=1e-15)
    assert [found[f"vision.blocks.{n}.weight"] for n in (0, 2, 10)] == pytest.approx([0.2, 0.6, 1.0])
    assert found["projector.0.weight"] == 0.2
    for alpha in (0.1, 0.3, 0.7, 0.9):
        assert line_weight(alpha, 1.0 - alpha, 1.0) == 1.0
        assert line_weight(alpha, 1.0 - alpha, 0.0) == alpha
