"""The benchmarks beside peers and of growth: what they compute from what was measured, without any peer."""

import subprocess
import venv

import pytest
from helpers import make_pair

from benchmarks.growth import Series, slope
from benchmarks.growth import section as growth_section
from benchmarks.peers.__main__ import section
from benchmarks.peers.checkpoints import compared
from benchmarks.peers.environments import UnavailableError, programs_of, rounds_of


def test_an_exponent_is_that_of_the_power_and_what_is_not_fitted_is_only_shown():
    assert slope([1, 2, 4, 8], [5, 20, 80, 320]) == pytest.approx(2)
    series = Series("density", "solve", "s", "3", [0.1, 0.2, 0.4, 1.0], [1.0, 8.0, 64.0, 0.5], 3)
    assert series.exponents() == pytest.approx((3, 3))
    row = growth_section("density", [series]).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "solve",
        "1 s",
        "8 s",
        "64 s",
        "0.5 s",
        "3.00",
        "3.00",
        "3",
    ]


def test_results_are_compared_entry_by_entry(tmp_path):
    folder = make_pair(tmp_path, layers=1)
    same = compared(folder / "base", folder / "tuned", folder / "tuned")
    assert same["equal"] == 1
    assert same["worst"] == 0
    assert same["changed_by_ours"] == same["changed_by_theirs"] > 0.99
    found = compared(folder / "base", folder / "base", folder / "tuned")
    assert found["changed_by_ours"] == 0
    assert found["equal"] == pytest.approx(1 - same["changed_by_ours"])
    assert found["worst"] > 0.02


def test_the_first_of_several_rounds_does_not_count():
    assert list(rounds_of(1)) == [1]
    assert list(rounds_of(3)) == [0, 1, 2, 3]


def test_a_peer_that_cannot_be_installed_says_so_with_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setattr(venv, "create", lambda *_, **__: None)
    failed = subprocess.CompletedProcess([], 1, "", "Collecting nothing\nERROR: No matching distribution\n\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UnavailableError, match=r"`pip install torch==.*`: ERROR: No matching distribution") as caught:
        programs_of("a-peer==1", tmp_path)
    shown = section("dg-hard", {"unavailable": str(caught.value)})
    assert shown.endswith("Not measured: " + str(caught.value) + ".")
