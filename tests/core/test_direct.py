"""Masked systems solved directly, in batches of about equally many kept entries, against float64."""

import pytest
import torch
from helpers import random_hessian

from tailorcli.core import direct
from tailorcli.core.direct import solve_directly_


def solved(counts, size, hessian, amount, chosen=None):
    """The solution of rows that keep so many entries, their target and mask, and what came back."""
    generator = torch.Generator().manual_seed(3)
    kept = torch.stack([torch.randperm(size, generator=generator) < count for count in counts])
    target = torch.where(kept, torch.randn(kept.shape, generator=generator), 0.0)
    solution = torch.zeros_like(target)
    back = solve_directly_(solution, target, kept, hessian, amount, chosen or [True] * len(counts))
    return solution, target, kept, back


@pytest.mark.parametrize("most", [32, 1])
def test_rows_of_any_length_have_their_float64_solutions(most, monkeypatch):
    """Those that LAPACK takes whole, those that go by panels, short ones filled up to the longest of their batch."""
    monkeypatch.setattr(direct, "_MOST_TOGETHER", most)
    counts, size = [0, 1, 2, 17, 31, 32, 33, 64, 65, 90, 128, 129, 130, 144, 250, 255, 256, 300], 300
    hessian = random_hessian(size, tokens=4 * size, seed=1, decay=1.0)
    solution, target, kept, (failed, squares) = solved(counts, size, hessian, 0.02)
    assert failed == []
    assert bool((solution[~kept] == 0).all())
    damped = hessian.double() + 0.02 * torch.eye(size, dtype=torch.float64)
    left = torch.where(kept, solution.double() @ damped - target, 0.0).square().sum()
    for row, within in enumerate(kept):
        best = torch.linalg.solve(damped[within][:, within], target[row, within].double())
        torch.testing.assert_close(solution[row, within].double(), best, rtol=1e-3, atol=1e-3)
    assert float(left) / 5 <= squares <= 5 * float(left)  # itself rounded to float32
    assert squares <= 1e-10 * float(target.square().sum())


def test_a_row_whose_system_is_singular_is_named_and_stays_zero_and_the_others_do_not_notice():
    hessian = random_hessian(80, tokens=400, seed=2)
    sound = solved([70, 79, 40], 80, hessian, 0.1)
    hessian[5, 5] = -9.0  # of the rows that keep it
    solution, _, kept, (failed, _) = solved([70, 79, 40], 80, hessian, 0.1)
    assert failed == kept[:, 5].nonzero().squeeze(1).tolist() != []
    assert not bool(solution[failed].any())
    rest = [row for row in range(3) if row not in failed]
    torch.testing.assert_close(solution[rest], sound[0][rest])


def test_only_the_chosen_rows_are_solved():
    hessian = random_hessian(40, seed=4)
    solution = solved([10, 20, 30], 40, hessian, 0.1, [True, False, True])[0]
    assert solution.any(1).tolist() == [True, False, True]


def test_the_number_of_threads_changes_no_bit():
    hessian, threads = random_hessian(120, seed=5), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(solved([5 + number % 90 for number in range(200)], 120, hessian, 0.1)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
