"""What a job costs on many ranks: counted from shapes, by rates of one device."""

import json

import pytest
import torch
from helpers import make_model, make_pair, refused, run

from tailorcli.calibration.expected import expected_stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.errors import CheckpointError, OptionsError
from tailorcli.models.config import read_config
from tailorcli.models.skeleton import describe_checkpoint, is_config_alone
from tailorcli.options import CalibrateOptions, PatchOptions
from tailorcli.pipeline.estimate import DescribedJob, Estimate
from tailorcli.pipeline.ranks import Device, Fleet, parse_fleet
from tailorcli.pipeline.work import Work

SMALL = CalibrateOptions(num_samples=12, seq_len=24)
# Every kind of work by itself, so that each takes a time that can be told apart.
UNIT = Device(1e-9, 1e-9, 1e-9, 1e-9, 1e-9, 1e-6, 1e-9, 1e-9, 1e-9, 0.0, 1e-9, 1e-9)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def bare(pair, tmp_path_factory):
    """A folder with the config alone."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_bytes((pair / "base/config.json").read_bytes())
    return folder


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=100, num_key_value_heads=1, num_local_experts=4, **sizes))


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "mixtral"])
def test_a_config_alone_describes_what_would_be_saved(tmp_path, kind):
    model = mixtral() if kind == "mixtral" else make_model("llama" if kind == "tied" else kind, tied=kind == "tied")
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_bytes((tmp_path / "saved/config.json").read_bytes())
    assert is_config_alone(tmp_path / "bare")
    assert not is_config_alone(tmp_path / "saved")
    described = describe_checkpoint(tmp_path / "bare", SMALL, "base")
    with Checkpoint.open(tmp_path / "saved") as saved:
        shapes = {name: (info.shape, info.dtype, info.nbytes) for name, info in saved.tensors.items()}
    assert {name: (i.shape, i.dtype, i.nbytes) for name, i in described.tensors.items()} == shapes
    with pytest.raises(CheckpointError, match="holds no weights"):
        described.read("model.embed_tokens.weight" if kind != "gpt2" else "transformer.wte.weight")


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_expected_statistics_are_those_that_calibrate_writes(pair, tmp_path, kind):
    folder = pair / "tuned"
    if kind == "mixtral":
        folder = tmp_path / "model"
        mixtral().save_pretrained(folder)
        for file in (pair / "tuned").glob("tok*"):
            (folder / file.name).write_bytes(file.read_bytes())
    run("calibrate", folder, "--data", pair / "data.jsonl", "-o", tmp_path / "stats", "--num-samples", 40)
    with Checkpoint.open(folder) as stored:
        expected = expected_stats(folder, stored, stored, CalibrateOptions(), 40, 1)
    from tailorcli.calibration.stats import Stats

    measured = Stats.open(tmp_path / "stats")
    measured.close()
    sizes = [sorted((h.kind, h.size) for n, h in s.hessians.items() if "[all]" not in n) for s in (expected, measured)]
    assert sizes[0] == sizes[1]


def test_ranks_are_written_as_a_number_or_as_machines_times_ranks():
    assert parse_fleet("8") == Fleet(1, 8)
    assert parse_fleet("4x8") == Fleet(4, 8)
    assert str(parse_fleet("4x8")) == "8 ranks on each of 4 machines"
    for wrong in ("", "0", "x8", "-1", "2.5", "0x8", "9999999x9999999"):
        with pytest.raises(OptionsError, match="--ranks"):
            parse_fleet(wrong)


@pytest.mark.parametrize("propagate", [None, False])
def test_more_ranks_take_less_time_until_there_is_nothing_to_divide(bare, propagate):
    job = DescribedJob.of(bare, bare, PatchOptions(propagate=propagate), SMALL, True, True)
    plans = [job.on(Estimate(UNIT, fleet, read_config(bare), ())) for fleet in (Fleet(), Fleet(1, 2), Fleet(16, 64))]
    one, two, many = (plan.ranks.steps for plan in plans)
    assert [step.parts["the forward pass"] for step in two[:2]] == pytest.approx(
        [step.parts["the forward pass"] / 2 for step in one[:2]]
    )
    assert [step.parts["the forward pass"] for step in many[:2]] == pytest.approx(
        [step.parts["the forward pass"] / 12 for step in one[:2]]  # a sample each, and none for the others
    )
    name = "solving" if propagate is False else "fitting layers"
    assert one[2].parts[name] > two[2].parts[name] >= many[2].parts[name] > 0.0
    assert all(step.parts["sums over ranks"] == 0.0 for step in one if "sums over ranks" in step.parts)
    assert two[0].parts["sums over ranks"] > 0.0
    assert many[0].read_bytes == 16 * one[0].read_bytes  # by each machine
    assert one[2].device_bytes >= two[2].device_bytes >= many[2].device_bytes


def test_the_work_is_counted_from_shapes(bare):
    described = describe_checkpoint(bare, SMALL, "tuned")
    stats = expected_stats(bare, described, described, SMALL, 1, 1)
    work = Work.of(described, stats, read_config(bare))
    attention, mlp = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 48
    assert work.products == 2 * (attention + mlp)
    assert work.gathered == 2 * (3 * 32**2 + 48**2) + 32**2  # and the output layer's
    assert work.hessian_bytes == 4 * work.gathered


def test_experts_are_reached_by_their_share_of_the_tokens(tmp_path):
    config = mixtral().config
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    described = describe_checkpoint(tmp_path, SMALL, "tuned")
    work = Work.of(described, expected_stats(tmp_path, described, described, SMALL, 1, 1), read_config(tmp_path))
    experts = [piece for piece in work.pieces if "experts" in piece.name]
    assert len(experts) == 2 * 4 * 3
    assert {piece.reached for piece in experts} == {0.5}  # two of four


def test_what_fits_no_device_goes_block_by_block_and_says_so(bare):
    job = DescribedJob.of(bare, bare, PatchOptions(), SMALL, True, True)
    small = Device(**{**vars(UNIT), "memory": 100_000})
    plan = job.on(Estimate(small, Fleet(), read_config(bare), ())).ranks
    assert plan.steps[0].blockwise
    assert not plan.fits
    assert not job.on(Estimate(UNIT, Fleet(), read_config(bare), ())).ranks.steps[0].blockwise


def test_dry_runs_tell_what_ranks_cost_with_weights_and_with_a_config_alone(pair, bare, tmp_path):
    small = ("--num-samples", 12, "--seq-len", 24)
    weights = ("patch", pair / "base", pair / "tuned", "--data", pair / "data.jsonl", *small, "-o", tmp_path / "out")
    shown = json.loads(run(*weights, "--dry-run", "--ranks", "2x4", "--json").stdout)["on_ranks"]
    assert (shown["ranks"], shown["machines"], len(shown["steps"])) == (8, 2, 3)
    assert shown["seconds"] == pytest.approx(sum(step["seconds"] for step in shown["steps"]))
    assert all(step["seconds"] == pytest.approx(sum(step["parts"].values())) for step in shown["steps"])
    how = (*small, "-o", tmp_path / "out", "--dry-run", "--ranks", 2)
    search = ("--data", pair / "data.jsonl", "--target", "old=99", "--teacher-weight", "auto")
    told = run("patch", bare, bare, *how, *search).stdout
    assert "on 2 ranks by rates measured here" in told
    assert "1. pick the teacher's weight" in told
    assert "4. search for old=99" in told
    refused("patch", bare, bare, *how, "--check-propagation", mentions=["single process"])
    one = ("--data", pair / "data.jsonl", *how[:-1], 1, "--check-propagation", "--json")
    for models in ((bare, bare), (pair / "base", pair / "tuned")):
        for more in ((), ("--distill",)):
            steps = json.loads(run("patch", *models, *one, *more).stdout)["on_ranks"]["steps"]
            assert steps[3]["what"].endswith("plainly, to write the better of both")
            assert steps[3]["seconds"] < steps[2]["seconds"]
            assert len(steps) == 4 + len(more)
        [*_, search] = json.loads(run("patch", *models, *one, "--target", "old=99").stdout)["on_ranks"]["steps"]
        assert search["seconds"] > 3 * (steps[2]["seconds"] + steps[3]["seconds"])
    assert "weights as its config.json describes them" in told
    told = run("calibrate", bare, "--synthetic", "-o", tmp_path / "stats", "--dry-run", "--ranks", 2).stdout
    assert "on 2 ranks" in told
    assert not [*tmp_path.iterdir()]


def test_a_calibration_is_planned_by_its_own_samples(pair, tmp_path):
    stats = tmp_path / "stats"
    planned = run("calibrate", pair / "tuned", "--data", pair / "data.jsonl", "-o", stats, "--dry-run", "--json")
    plan = json.loads(planned.stdout)
    assert not stats.exists()
    done = json.loads(run("calibrate", pair / "tuned", "--data", pair / "data.jsonl", "-o", stats, "--json").stdout)
    assert {name: plan[name] for name in ("samples", "tokens", "hessians", "calibrated")} == {
        name: done[name] for name in ("samples", "tokens", "hessians", "calibrated")
    }
    refused("calibrate", pair / "tuned", "--data", pair / "data.jsonl", "-o", stats, "--dry-run", mentions=["already"])


def test_ranks_of_a_patch_with_statistics(pair, tmp_path):
    run("calibrate", pair / "tuned", "--data", pair / "data.jsonl", "-o", tmp_path / "stats", "--num-samples", 8)
    patch = ("patch", pair / "base", pair / "tuned", "-o", tmp_path / "out", "--stats", tmp_path / "stats", "--dry-run")
    told = run(*patch, "--ranks", 4, "--teacher-weight", "auto").stdout
    assert "on 4 ranks by rates measured here" in told
    assert "pick the teacher's weight" in told
    refused(*patch, "--ranks", "many", mentions=["--ranks", "many"])
    magnitude = ("patch", pair / "base", pair / "tuned", "-o", tmp_path / "out", "--method", "magnitude", "--dry-run")
    refused(*magnitude, "--ranks", 4, mentions=["--ranks"])
    run(*patch[:-1], "--ranks", 4, expect=2)
