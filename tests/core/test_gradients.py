"""Conjugate gradients with products of halves, as a GPU has them, against float64."""

import os
from dataclasses import replace

import pytest
import torch
from helpers import random_hessian

from tailorcli import core
from tailorcli.core import gradients, solvers
from tailorcli.core.gradients import conjugate_gradients
from tailorcli.core.products import System, left_parts, product_of_halves, right_parts
from tailorcli.core.propagation import accumulate_moments_, complete_, no_moments
from tailorcli.core.steps import State, step_
from tailorcli.options import PatchOptions

DEFAULT = PatchOptions().tolerance


def problem(size=256, rows=24, density=0.1, decay=1.0):
    """Mask, Hessian, what damping adds, and the right side: a layer with a steep spectrum."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(rows, size, generator=generator)
    hessian = random_hessian(size, tokens=4 * size, seed=1, decay=decay)
    mask = torch.rand(rows, size, generator=generator) < density
    target = torch.where(mask, torch.where(mask, 0.0, delta) @ hessian, 0.0)
    return mask, hessian, core.dampen(hessian, 0.01), target


def optimum(mask, hessian, amount, target):
    """The solution in float64, row by row."""
    damped = hessian.double() + amount * torch.eye(len(hessian), dtype=torch.float64)
    best = torch.zeros(mask.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.solve(damped[kept][:, kept], target[row, kept].double())
    return best


def gain(x, hessian, amount, target):
    """What a change ``x`` takes off the objective."""
    x = x.double()
    return float((2 * x * target.double() - (x @ hessian.double() + amount * x) * x).sum())


def residual(x, mask, hessian, amount, target):
    left = torch.where(mask, target.double() - (x.double() @ hessian.double() + amount * x.double()), 0.0)
    return (left.norm(dim=1) / target.double().norm(dim=1)).max()


def test_two_parts_multiply_as_exactly_as_float32_needs():
    left, right = torch.randn(40, 300), torch.randn(300, 50)
    found = product_of_halves(left_parts(left), right_parts(right)).double()
    exact = left.double() @ right.double()
    assert (found - exact).abs().max() <= 2**-15 * (left.abs() @ right.abs()).max()


@pytest.mark.parametrize(("decay", "density"), [(0.5, 0.1), (1.0, 0.1), (1.0, 0.5)])
@pytest.mark.parametrize("halves", [True, False])
def test_the_default_tolerance_reaches_the_float64_optimum_to_a_ten_thousandth_of_the_gain(decay, density, halves):
    """Also where the spectrum is steep, where a Hessian rounded to bfloat16 is not even positive definite."""
    mask, hessian, amount, target = problem(decay=decay, density=density)
    best = gain(optimum(mask, hessian, amount, target), hessian, amount, target)
    system = System.of(hessian, amount, DEFAULT, halves=halves)
    found, steps, squares = conjugate_gradients(target, mask, system, DEFAULT, 300)
    assert steps < 300
    assert gain(found, hessian, amount, target) >= (1 - 1e-4) * best
    assert residual(found, mask, hessian, amount, target) <= 1.05 * DEFAULT
    assert (squares**0.5) <= DEFAULT * target.norm()
    assert bool((found[~mask] == 0).all())


def test_halves_take_at_most_twice_the_steps_of_float32():
    mask, hessian, amount, target = problem()
    steps = [
        conjugate_gradients(target, mask, System.of(hessian, amount, 1e-4, halves=halves), 1e-4, 300)[1]
        for halves in (True, False)
    ]
    assert steps[0] <= 2 * steps[1]


@pytest.mark.parametrize("worse", [0.001, -2.0])
def test_rows_that_halves_do_not_bring_on_go_on_in_float32(worse, monkeypatch):
    """Whatever was lost on the way: here the halves are of another Hessian, and of one that is not even positive."""
    mask, hessian, amount, target = problem()
    system = System.of(hessian, amount, 1e-4, halves=True)
    half = system.half.clone()
    half.diagonal().add_(worse)
    taken = []
    real = gradients._descend

    def noted(target, kept, system, *rest):
        taken.append(system.half is None)
        return real(target, kept, system, *rest)

    monkeypatch.setattr(gradients, "_descend", noted)
    found, _, squares = conjugate_gradients(target, mask, replace(system, half=half), 1e-4, 900)
    assert taken[0] is False
    assert taken[-1] is (worse < 0)
    assert squares**0.5 <= 1e-4 * target.norm()
    assert residual(found, mask, hessian, amount, target) <= 1.05e-4


def test_a_row_without_a_right_side_or_without_kept_entries_stays_zero():
    mask, hessian, amount, target = problem(rows=6)
    mask[1], target[1], target[2] = False, 0.0, 0.0
    found, _, squares = conjugate_gradients(target, mask, System.of(hessian, amount, 1e-3, halves=True), 1e-3, 300)
    assert bool((found[1:3] == 0).all())
    assert bool(found[0].any())
    assert squares == squares


def test_the_kernel_gives_what_plain_torch_gives():
    """Where Triton has a GPU, or interprets its kernels on a CPU (TRITON_INTERPRET=1)."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("neither a GPU nor Triton's interpreter")
    kernels = pytest.importorskip("tailorcli.core.kernels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size in (72, 5000):
        mask = torch.rand(5, size) < 0.4
        p, r = (torch.randn(5, size) * mask).half(), torch.randn(5, size) * mask
        length, goal = torch.rand(5) + 0.5, torch.tensor([0.0, 0.0, 1e9, 0.0, 0.0])
        squares = r.square().sum(1)
        given = State(p, torch.randn(5, size), r, mask, torch.rand(size), length, squares, 0.5 * squares, goal)
        q = 2.0 * p.float() + 0.1
        plain, fused = (State(*(t.clone().to(device) for t in given)) for _ in range(2))
        step_(q.clone().to(device), plain)
        kernels.step_(q.clone().to(device), fused)
        torch.testing.assert_close(plain.p, fused.p, rtol=2**-9, atol=1e-4)
        for ours, theirs in zip(plain[1:], fused[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_moments_of_halves_are_those_of_float64(monkeypatch):
    """As on a GPU: single products of bfloat16 are exact there, and the gap between two inputs goes in two parts."""
    monkeypatch.setattr("tailorcli.core.hessian.multiplies_halves", lambda device: True)
    monkeypatch.setattr("tailorcli.core.propagation.multiplies_halves", lambda device: True)
    monkeypatch.setattr("tailorcli.core.products._HALF_BLOCK", 16)
    x = torch.randn(120, 40).to(torch.bfloat16)
    reference = (x.float() + 0.01 * torch.randn(120, 40)).to(torch.bfloat16)
    moments = no_moments(40, torch.device("cpu"))
    for rows in (slice(0, 50), slice(50, 50), slice(50, 120)):
        accumulate_moments_(moments, x[rows], reference[rows])
    complete_(moments)
    x, apart = x.double(), reference.double() - x.double()
    assert moments.tokens == 120
    for found, left, right in ((moments.hessian, x, x), (moments.drift, apart, x), (moments.gap, apart, apart)):
        exact = 2.0 / 120 * left.T @ right
        assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_a_right_side_that_overflows_gives_no_values_whatever_solves_it(monkeypatch):
    monkeypatch.setattr(solvers, "_worth_solving_directly", lambda kept: [False] * len(kept))
    mask = torch.ones(2, 4, dtype=torch.bool)
    right = torch.tensor([[1.0, torch.inf, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    found = solvers.solve_by_chunks(mask, lambda rows: right[rows], System.of(torch.eye(4), 0.1, 1e-3), 1e-3, 9)
    assert bool(found.decorator.isnan().any())
