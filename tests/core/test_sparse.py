"""Sparse fine-tuning's equations against plain readings of the papers in float64."""

import numpy as np
import pytest
import torch

from tailorcli.core import dowser, spider


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def standardised(values):
    magnitude = np.abs(values)
    return sigmoid((magnitude - magnitude.mean()) / magnitude.std(ddof=1))


def algorithm_1(base, gradients, rate, momentum):
    """SPIDER's Algorithm 1 on one tensor with plain gradient descent; the masks and weights of every step."""
    general, weight, sofar = standardised(base), base.copy(), np.zeros_like(base)
    masks, weights = [], []
    for gradient in gradients:
        sofar = momentum * sofar + (1 - momentum if momentum < 1 else 1) * gradient
        learnt = standardised(sofar)
        mask = np.where(learnt > general, learnt / (learnt + general), 0.0)
        mask = np.where(learnt > general, np.minimum(1.0, mask / mask[mask != 0].mean()), 0.0)
        weight = weight - rate * gradient
        weight = weight * mask + base * (1 - mask)
        masks.append(mask)
        weights.append(weight)
    return masks, weights


@pytest.mark.parametrize("momentum", [0.85, 1.0])
def test_spiders_masks_and_weights_over_five_steps_are_algorithm_1s(momentum):
    generator = np.random.default_rng(0)
    base = generator.normal(size=(24, 16))
    gradients = [generator.normal(size=(24, 16)) * generator.gamma(1.0, size=(24, 16)) for _ in range(5)]
    masks, weights = algorithm_1(base, gradients, 0.05, momentum)
    start = torch.tensor(base)
    weight, sofar = start.clone(), torch.zeros_like(start)
    general = spider.importance(start, spider.moments(start))
    for step, gradient in enumerate(map(torch.tensor, gradients)):
        sofar = spider.accumulated(sofar, gradient, momentum)
        learnt = spider.importance(sofar, spider.moments(sofar))
        mask = spider.rescaled(*spider.selection(learnt, general))
        weight = spider.pulled_back(weight - 0.05 * gradient, start, mask)
        np.testing.assert_allclose(mask.numpy(), masks[step], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(weight.numpy(), weights[step], rtol=1e-5, atol=1e-6)
        assert torch.equal(weight[mask == 0], start[mask == 0])
    assert 0.3 < np.mean(masks[-1] == 0) < 0.7
    assert masks[-1].max() == 1.0


def test_moments_of_shards_add_up_to_the_tensors():
    values = torch.randn(7, 5)
    assert torch.allclose(spider.moments(values[:3]) + spider.moments(values[3:]), spider.moments(values))


def test_equal_magnitudes_have_no_discrepancy():
    ones = torch.tensor([0.1, -0.1, 0.1, 0.1])
    assert spider.importance(ones, spider.moments(ones)).tolist() == [0.5] * 4
    weight, total = spider.selection(torch.full((4,), 0.5), torch.full((4,), 0.5))
    assert spider.rescaled(weight, total).tolist() == [0.0] * 4


def test_a_value_that_is_no_number_shows_in_every_importance():
    broken = torch.tensor([1.0, 2.0, torch.nan])
    assert spider.importance(broken, spider.moments(broken)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pulling_back_is_exact_at_both_ends_of_the_mask(dtype):
    base, weight = (torch.randn(64).to(dtype) for _ in range(2))
    mask = torch.arange(64).remainder(3) / 2.0
    back = spider.pulled_back(weight, base, mask)
    assert torch.equal(back[mask == 0], base[mask == 0])
    assert torch.equal(back[mask == 1], weight[mask == 1])
    half = (weight.double() + base.double())[mask == 0.5] / 2
    assert torch.allclose(back[mask == 0.5].double(), half, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_l2s_gradient_is_that_of_its_penalty():
    base, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (1e-3 * (weight - base).square().sum()).backward()
    assert torch.allclose(spider.l2_gradient(weight, base, 1e-3), weight.grad.float())


def test_half_draws_every_block_as_often_as_not():
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([spider.drawn_half(5, generator) for _ in range(4000)], dtype=torch.float64)
    assert {int(count) for count in draws.sum(1)} == {2, 3}
    assert torch.allclose(draws.mean(0), torch.full((5,), 0.5, dtype=torch.float64), atol=0.03)
    assert all(sum(spider.drawn_half(4, generator)) == 2 for _ in range(20))


def exact_and_estimate(samples, draws, seed=0):
    """Mean over ``samples`` of ||J_i||_2 |h_j| for W in f = A tanh(W h), and the estimate from random signs."""
    generator = torch.Generator().manual_seed(seed)
    weight, last = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((12, 9), (40, 12)))
    inputs = torch.randn(samples, 9, generator=generator, dtype=torch.float64).exp()
    exact, backward = torch.zeros(12, 9, dtype=torch.float64), []
    for h in inputs:
        z = (weight @ h / 9).requires_grad_()
        jacobian = torch.autograd.functional.jacobian(lambda z: last @ torch.tanh(z), z)  # (40, 12)
        exact += torch.outer(jacobian.norm(dim=0), h.abs()) / samples
        signs = [dowser.random_signs(torch.zeros(40, dtype=torch.float64), generator) for _ in range(draws)]
        backward.append(sum((xi @ jacobian).abs() for xi in signs))
    gain = dowser.gains(torch.stack(backward), inputs)
    return weight.abs() * exact, dowser.scores(weight, gain, samples * draws).double()


def test_dowsers_estimate_nears_the_exact_jacobians_as_samples_and_draws_grow():
    """The L1 form is lower by sqrt(2 / pi) where many outputs add up: one factor, which changes no ranking."""
    far, near = [], []
    for samples, draws, spreads in ((2, 1, far), (64, 8, near)):
        for seed in range(5):
            exact, estimate = exact_and_estimate(samples, draws, seed)
            ratio = estimate / exact
            correlation = torch.corrcoef(torch.stack([exact.log().flatten(), estimate.log().flatten()]))[0, 1]
            spreads.append((float(ratio.mean()), float(ratio.std() / ratio.mean()), float(correlation)))
    bias, spread, correlation = np.mean(near, axis=0)
    assert abs(bias - (2 / np.pi) ** 0.5) < 0.02
    assert 4 * spread < np.mean(far, axis=0)[1]
    assert spread < 0.06
    assert correlation > 0.999
    assert np.mean(far, axis=0)[2] < correlation


def test_the_products_of_a_layer_are_the_sums_over_tokens():
    backward, inputs = torch.rand(6, 3), torch.randn(6, 4)
    expected = sum(torch.outer(a, h.abs()) for a, h in zip(backward, inputs, strict=True))
    assert torch.allclose(dowser.gains(backward, inputs), expected)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_the_mask_has_exactly_its_share_of_the_lowest_scores(ratio):
    score = torch.rand(31, 17)
    score[:, 3] = 0.25
    mask = dowser.least_important(score, ratio)
    assert int(mask.sum()) == round(ratio * score.numel())
    if 0 < ratio < 1:
        assert score[mask].max() <= score[~mask].min()


@pytest.mark.parametrize("shape", [(3,), (8, 8), (5, 7), (2, 3, 5)])
def test_bits_hold_a_mask(shape):
    mask = torch.rand(shape) < 0.3
    bits = dowser.packed(mask)
    assert bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(dowser.unpacked(bits, shape), mask)
