"""Several ranks write what one process writes, to the byte, and go on after one another whatever their number."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest
import torch
from families import make_family_pair
from helpers import broken_off, folder_digest, read_tensors
from pretended import pretended
from safetensors.torch import save_file

from tailorcli import (
    CalibrateOptions,
    MergeOptions,
    PatchOptions,
    apply_patch,
    calibrate_model,
    merge_patches,
    patch_checkpoint,
    score_checkpoint,
    verify_checkpoint,
)
from tailorcli.checkpoint.writer import CheckpointWriter
from tailorcli.patchfile.spool import SpoolWriter
from tailorcli.patching.cost import work_of
from tailorcli.patching.inputs import PatchInputs
from tailorcli.patching.planner import build_plan
from tailorcli.runs.divided import own_tensors


def patched(pair, out, ranks=1, options=PatchOptions(), *, stats="stats", **more):
    """The files of a patch by so many ranks, by their names and hashes, and the report of the first."""
    out.mkdir(exist_ok=True)

    def work():
        given = (pair / "base", pair / "tuned", out / "model", stats and pair / stats, options)
        return patch_checkpoint(*given, patch_file=out / "patch.safetensors", **more)

    with pretended(ranks) as run:
        reports = run(work)
    return folder_digest(out), reports[0]


@pytest.fixture(scope="module")
def whole(llama_pair, tmp_path_factory):
    """What one process writes."""
    return patched(llama_pair, tmp_path_factory.mktemp("whole"))


def test_tensors_of_one_hessian_stay_together_and_each_goes_to_one_rank(llama_pair):
    with ExitStack() as stack:
        given = (llama_pair / "base", llama_pair / "tuned", llama_pair / "stats", PatchOptions(), stack)
        inputs = PatchInputs.open(*given)
        plan = build_plan(inputs.base, inputs.tuned, inputs.stats, PatchOptions())
        with pretended(4) as run:
            shares = run(lambda: own_tensors(plan.tensors, partial(work_of, inputs=inputs, options=PatchOptions())))
    places = {tensor.name: position for position, tensor in enumerate(plan.tensors)}
    orders = [[places[tensor.name] for tensor in share] for share in shares]
    assert sorted(place for order in orders for place in order) == list(range(len(plan.tensors)))
    assert all(order and order == sorted(order) for order in orders)
    groups = [{tensor.hessian for tensor in share} for share in shares]
    assert sum(map(len, groups)) == len(set().union(*groups))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "llava"])
def test_families_are_divided_to_the_same_bytes(tmp_path, family):
    pair = tmp_path / "pair"
    make_family_pair(pair, family)
    calibrate_model(pair / "tuned", pair / "data.jsonl", pair / "stats", CalibrateOptions(num_samples=8))
    alone, _ = patched(pair, tmp_path / "alone")
    for ranks in (2, 4):
        assert patched(pair, tmp_path / str(ranks), ranks)[0] == alone


@pytest.mark.parametrize("ranks", [2, 3, pytest.param(50, marks=pytest.mark.slow)])
def test_ranks_write_the_bytes_of_one_process(llama_pair, whole, tmp_path, ranks):
    files, report = patched(llama_pair, tmp_path, ranks)
    assert files == whole[0]
    assert report.to_json() == whole[1].to_json()
    shares = json.loads((tmp_path / "model" / "tailor_run.json").read_text())["ranks"]
    assert shares == list(report.ranks)
    assert [share["rank"] for share in shares] == list(range(ranks))
    assert sum(share["tensors"] for share in shares) == len(report.tensors)
    assert sum(share["bytes"] for share in shares) == sum(4 * tensor.numel for tensor in report.tensors)
    assert whole[1].ranks == ()


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 3), (3, 1), pytest.param(2, 4, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("tensors", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_is_resumed_with_another_number_of_ranks(llama_pair, whole, tmp_path, before, after, tensors):
    with broken_off(CheckpointWriter, tensors):
        patched(llama_pair, tmp_path, before)
    assert not list((tmp_path / "model").glob("*.safetensors"))
    assert not (tmp_path / "patch.safetensors").exists()
    files, report = patched(llama_pair, tmp_path, after, PatchOptions(resume=True))
    assert files == whole[0]
    run = json.loads((tmp_path / "model" / "tailor_run.json").read_text())
    assert 0 < run["tensors_from_an_earlier_run"] < len(report.tensors)


def test_a_run_that_was_interrupted_twice_takes_over_what_every_rank_spooled(llama_pair, whole, tmp_path):
    with broken_off(SpoolWriter, 5):
        patched(llama_pair, tmp_path, 3)
    with broken_off(SpoolWriter, 3):
        patched(llama_pair, tmp_path, 2, PatchOptions(resume=True))
    files, _ = patched(llama_pair, tmp_path, 1, PatchOptions(resume=True))
    assert files == whole[0]
    assert not list(tmp_path.glob("*.rank*"))


def test_anew_nothing_of_other_ranks_is_taken_over(llama_pair, whole, tmp_path):
    with broken_off(SpoolWriter, 5):
        patched(llama_pair, tmp_path, 3, PatchOptions(density=0.3))
    files, _ = patched(llama_pair, tmp_path, 1, PatchOptions(overwrite=True))
    assert files == whole[0]


def test_one_threshold_for_all_tensors_keeps_the_same_entries_whatever_the_ranks(llama_pair, tmp_path):
    pair = tmp_path / "pair"
    base = {name: (value * 4096).round() / 4096 for name, value in read_tensors(llama_pair / "base").items()}
    steps = {name: torch.arange(value.numel()).remainder(3).view(value.shape) for name, value in base.items()}
    moved = {name: value + steps[name] / 16 for name, value in base.items()}  # by three amounts, exactly
    for name, values in (("base", base), ("tuned", moved)):
        shutil.copytree(llama_pair / name, pair / name)
        save_file(values, pair / name / "model.safetensors", {"format": "pt"})
    options = PatchOptions(method="magnitude", threshold="global", density=0.3)
    alone, report = patched(pair, tmp_path / "alone", 1, options, stats=None)
    assert report.totals["kept"] == round(0.3 * report.totals["numel"])
    assert {tensor.kept > 0 for tensor in report.tensors} == {True, False}  # all are equal, and the first are kept
    assert patched(pair, tmp_path / "three", 3, options, stats=None)[0] == alone
    with broken_off(CheckpointWriter, 7):
        patched(pair, tmp_path / "again", 3, options, stats=None)
    assert patched(pair, tmp_path / "again", 1, replace(options, resume=True), stats=None)[0] == alone


def test_apply_and_verify_are_divided_and_score_reports_the_same(llama_pair, whole, tmp_path):
    patched(llama_pair, tmp_path)
    base, file = llama_pair / "base", tmp_path / "patch.safetensors"
    with pretended(3) as run:
        applied = run(lambda: apply_patch(base, file, tmp_path / "applied", max_shard_size=30_000))
        scored = run(lambda: score_checkpoint(base, llama_pair / "tuned", llama_pair / "stats"))
    alone = apply_patch(base, file, tmp_path / "alone", max_shard_size=30_000)
    assert folder_digest(tmp_path / "applied") == folder_digest(tmp_path / "alone")
    assert applied[0].to_json() == alone.to_json()
    assert scored[0].to_json() == score_checkpoint(base, llama_pair / "tuned", llama_pair / "stats").to_json()
    shards = sorted((tmp_path / "alone").glob("*.safetensors"))
    for shard in shards[1:4]:
        content = bytearray(shard.read_bytes())
        content[-2] ^= 64
        shard.write_bytes(content)
    with pretended(3) as run:
        found = run(lambda: verify_checkpoint(tmp_path / "alone", base, file))
    expected = verify_checkpoint(tmp_path / "alone", base, file)
    assert expected.wrong_tensors == 3
    assert all(report == expected for report in found)


def test_merges_are_divided(llama_pair, tmp_path):
    for number, density in enumerate((0.1, 0.3)):
        patched(llama_pair, tmp_path / f"{number}", 1, PatchOptions(density=density))
    files = [tmp_path / f"{number}" / "patch.safetensors" for number in (0, 1)]

    def work(out):
        options = MergeOptions("patches")
        return merge_patches(
            llama_pair / "base", files, out / "model", (), (), options, patch_file=out / "p.safetensors"
        )

    for name in ("alone", "three"):
        (tmp_path / name).mkdir()
    alone = work(tmp_path / "alone")
    with pretended(3) as run:
        reports = run(lambda: work(tmp_path / "three"))
    assert folder_digest(tmp_path / "three") == folder_digest(tmp_path / "alone")
    assert reports[0].to_json() == alone.to_json()
    assert len(reports[0].ranks) == 3
