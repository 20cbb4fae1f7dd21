"""--deterministic: bits that no batch size decides, and sums that are rounded once."""

import json

import pytest
import torch
from helpers import folder_digest, make_pair, refused, run

from tailorcli import CalibrateOptions, PatchOptions, Stats, calibrate_model, patch_checkpoint
from tailorcli.calibration.accumulators import Accumulators
from tailorcli.core.propagation import accumulate_moments_, complete_, no_moments
from tailorcli.device import deterministic_algorithms

SMALL = ("--num-samples", 12, "--seq-len", 24)
REPORTS = ("tailor_run.json", "tailor_report.json", "README.md", "manifest.json")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.slow
def test_the_batch_size_decides_no_bit(pair, tmp_path):
    job = ("patch", pair / "base", pair / "tuned", "--data", pair / "data.jsonl", *SMALL)
    for batch in (1, 5):
        run(*job, "--deterministic", "--batch-size", batch, "-o", tmp_path / f"out{batch}")
        run(
            *("calibrate", pair / "tuned", "--data", pair / "data.jsonl", *SMALL, "--deterministic"),
            *("--batch-size", batch, "-o", tmp_path / f"stats{batch}"),
        )
    assert folder_digest(tmp_path / "out1", REPORTS) == folder_digest(tmp_path / "out5", REPORTS)
    assert folder_digest(tmp_path / "stats1", REPORTS) == folder_digest(tmp_path / "stats5", REPORTS)
    run("calibrate", pair / "base", "--synthetic", *SMALL, "--deterministic", "-o", tmp_path / "base-stats")
    stats = ("--stats", tmp_path / "stats5", "--retain", tmp_path / "base-stats")
    run("patch", pair / "base", pair / "tuned", *stats, "-o", tmp_path / "steps")  # which its statistics make so
    assert folder_digest(tmp_path / "steps", REPORTS) == folder_digest(tmp_path / "out1", REPORTS)
    assert json.loads((tmp_path / "stats5" / "manifest.json").read_text())["options"]["deterministic"] is True
    assert "--deterministic" in (tmp_path / "out1" / "README.md").read_text()


def test_block_by_block_and_whole_are_the_same_bits(pair, tmp_path):
    for when in ("always", "never"):
        options = CalibrateOptions(num_samples=6, blockwise=when, deterministic=True)
        calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / when, options)
    one, other = (Stats.open(tmp_path / when) for when in ("always", "never"))
    assert all(one.load(name).equal(other.load(name)) for name in other.hessians)


def test_the_result_is_that_of_ordinary_sums_to_their_rounding(pair, tmp_path):
    found = []
    for exact in (False, True):
        options = CalibrateOptions(num_samples=12, deterministic=exact)
        calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / f"{exact}", options)
        found.append(Stats.open(tmp_path / f"{exact}"))
    for name in found[0].hessians:
        plain, exact = (stats.load(name) for stats in found)
        torch.testing.assert_close(plain, exact, rtol=1e-4, atol=1e-6 * float(exact.abs().max()))
    masks = [
        patch_checkpoint(pair / "base", pair / "tuned", tmp_path / f"out{exact}", tmp_path / f"{exact}", PatchOptions())
        for exact in (False, True)
    ]
    kept = [[record.kept for record in report.tensors] for report in masks]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_rounded_once_in_whatever_order(dtype):
    generator = torch.Generator().manual_seed(0)
    batches = [(50 * torch.randn(n, 7, generator=generator)).to(dtype) for n in (3, 1, 400, 17)]
    wide = torch.cat(batches).double()
    expected = (2 / len(wide) * wide.T @ wide).float()
    for order in (batches, batches[::-1]):
        accumulators = Accumulators(torch.device("cpu"), torch.float64)
        for rows in order:
            accumulators.get("layer", True, 7).add_rows(rows)
            accumulators.get("norm", False, 7).add_channels(rows)
        packed = {name: hessian for name, _, hessian in accumulators.give({"layer", "norm"})}
        assert packed["layer"].tril().equal(expected.tril())
        assert packed["norm"].equal(expected.diagonal())


def test_moments_are_rounded_once_too():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(600, 6, generator=generator) for _ in range(2))
    moments = no_moments(6, torch.device("cpu"), torch.float64)
    for rows in (slice(0, 7), slice(7, 600)):
        accumulate_moments_(moments, y[rows], x[rows])
    complete_(moments)
    a, b = x.double(), y.double()
    for found, expected in (
        (moments.hessian, b.T @ b),
        (moments.gap, (a - b).T @ (a - b)),
        (moments.drift, (a - b).T @ b),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, (2 / 600 * expected).float(), rtol=1e-7, atol=1e-9)


def test_torchs_own_switches_come_back():
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_patch_with_statistics_is_what_these_are(pair, tmp_path):
    command = ("patch", pair / "base", pair / "tuned", "--stats", pair, "--deterministic", "-o", tmp_path / "out")
    refused(*command, mentions=["--deterministic goes with --data"], output=tmp_path / "out")


def test_kept_statistics_of_ordinary_sums_are_not_taken_for_deterministic_ones(pair, tmp_path):
    job = ("patch", pair / "base", pair / "tuned", "--data", pair / "data.jsonl", "--no-retain", *SMALL)
    kept = ("--keep-stats", tmp_path / "kept", "-o")
    run(*job, *kept, tmp_path / "out", "--deterministic")
    refused(*job, *kept, tmp_path / "other", mentions=["another deterministic"])
