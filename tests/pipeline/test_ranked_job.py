"""Several ranks in what goes through whole models: propagation, distillation, evaluation, sweeps, the whole job."""

import json
import os
from contextlib import closing

import pytest
import torch
from families import make_family_pair
from helpers import make_pair, read_tensors, report_of, run, write_data
from kills.operations import ENDED, Operations
from ranked import command_line, ranked, ranked_cli, started

from tailorcli import Checkpoint, DistillOptions, Stats, TailorError
from tailorcli.training.run import Teaching

SMALL = ("--num-samples", 12, "--seq-len", 24, "--batch-size", 4)
DISTILL = ("--distill", "--distill-steps", 4, "--distill-batch-size", 3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Both models with both statistics, and their propagated patch by one process."""
    pair = make_pair(tmp_path_factory.mktemp("pair"))
    run("calibrate", pair / "tuned", "--data", pair / "data.jsonl", "-o", pair / "stats", *SMALL)
    run("calibrate", pair / "base", "--synthetic", "-o", pair / "base-stats", *SMALL)
    run(*patch_of(pair), "-o", pair / "alone", "--patch-file", pair / "alone.safetensors")
    return pair


def patch_of(pair):
    return ("patch", pair / "base", pair / "tuned", "--stats", pair / "stats", "--retain", pair / "base-stats")


def ended_well(ends):
    assert [end.code for end in ends] == [0] * len(ends), "\n".join(end.stderr for end in ends)
    assert all(end.stdout == "" for end in ends[1:])
    return ends[0]


def assert_alike(pair, folder, other, tolerance=1e-5):
    """The same entries are the base's, to the bit; the others differ by rounding alone."""
    base, mine, theirs = (read_tensors(each) for each in (pair / "base", folder, other))
    for name, value in base.items():
        assert (mine[name] == value).equal(theirs[name] == value), name
        apart, moved = (mine[name] - theirs[name]).abs().max(), (theirs[name] - value).abs().max()
        assert apart <= tolerance * moved.clamp_min(1e-9), name


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_a_propagated_patch_is_that_of_one_process_to_rounding(pair, tmp_path, size):
    shown = ended_well(ranked_cli(size, *patch_of(pair), "-o", tmp_path / "out"))
    assert "propagated: 15 layers" in shown.stdout
    assert_alike(pair, tmp_path / "out", pair / "alone")
    mine, theirs = report_of(tmp_path / "out"), report_of(pair / "alone")
    assert mine["totals"]["kept"] == theirs["totals"]["kept"]
    for one, other in zip(mine["tensors"], theirs["tensors"], strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float):
                assert one[name] == pytest.approx(value, rel=2e-4, abs=1e-6), (other["name"], name)
            elif name != "iterations":
                assert one[name] == value, (other["name"], name)
    did = json.loads((tmp_path / "out/tailor_run.json").read_text())["ranks"]
    assert sum(share["tensors"] for share in did) == len(read_tensors(tmp_path / "out"))
    assert all(share["tensors"] > 0 for share in did)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "llava"])
@pytest.mark.parametrize("more", [(), (*DISTILL, "--no-propagate")], ids=["propagated", "distilled"])
def test_other_families_are_those_of_one_process(tmp_path, family, more):
    pair = make_family_pair(tmp_path, family)
    samples = ("--num-samples", 12, "--batch-size", 3)
    for model, stats in (("tuned", "stats"), ("base", "base-stats")):
        run("calibrate", pair / model, "--data", pair / "data.jsonl", "-o", pair / stats, *samples)
    run(*patch_of(pair), *more, "-o", tmp_path / "alone")
    ended_well(ranked_cli(2, *patch_of(pair), *more, "-o", tmp_path / "out"))
    assert_alike(pair, tmp_path / "out", tmp_path / "alone", tolerance=1e-3 if more else 1e-5)


def killed_at(rank, number, work, *arguments):
    """The command line, ended at the ``number``-th operation on files below ``work`` of one rank."""
    if os.environ["RANK"] == str(rank):
        Operations(work, number).install()
    command_line(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(0, 12), (0, 30), (1, 3), (1, 9)])
@pytest.mark.parametrize("more", [(), (*DISTILL, "--no-propagate")], ids=["propagated", "distilled"])
def test_a_killed_rank_leaves_nothing_that_loads_and_others_go_on(pair, tmp_path, rank, number, more):
    out = tmp_path / "out"
    command = (*patch_of(pair), *more, "-o", out)
    with started(2, killed_at, rank, number, tmp_path, *map(str, command)) as job:
        ends = job.ended(120)
    assert ends[rank].code == ENDED, ends
    assert sum(f"rank {rank} of 2" in end.stderr for end in ends) == 1, ends
    with pytest.raises(TailorError):
        Checkpoint.open(out)
    ended_well(ranked_cli(3, *command, "--resume"))
    expected, tolerance = pair / "alone", 1e-5
    if more:
        expected, tolerance = tmp_path / "alone", 1e-3
        run(*patch_of(pair), *more, "-o", expected)
    assert_alike(pair, out, expected, tolerance)


@pytest.mark.slow
def test_deterministic_statistics_give_the_bytes_of_one_process(pair, tmp_path):
    data = ("--data", pair / "data.jsonl", *SMALL, "--deterministic")
    for model in ("base", "tuned"):
        run("calibrate", pair / model, *data, "-o", tmp_path / f"{model}-stats")
    both = ("--stats", tmp_path / "tuned-stats", "--retain", tmp_path / "base-stats")
    run("patch", pair / "base", pair / "tuned", *both, "-o", tmp_path / "alone")
    ended_well(ranked_cli(3, "patch", pair / "base", pair / "tuned", *both, "-o", tmp_path / "out"))
    alone = read_tensors(tmp_path / "alone")
    assert all(value.equal(alone[name]) for name, value in read_tensors(tmp_path / "out").items())


def test_a_distilled_patch_takes_the_steps_of_one_process(pair, tmp_path):
    run(*patch_of(pair), *DISTILL, "--no-propagate", "-o", tmp_path / "alone")
    ended_well(ranked_cli(2, *patch_of(pair), *DISTILL, "--no-propagate", "-o", tmp_path / "out"))
    assert_alike(pair, tmp_path / "out", tmp_path / "alone", tolerance=1e-3)
    mine, theirs = (report_of(folder)["distillation"] for folder in (tmp_path / "out", tmp_path / "alone"))
    assert (mine["steps"], mine["best"]) == (theirs["steps"], theirs["best"])
    for name in ("new", "retained", "trained_new", "trained_retained"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name
    assert mine["kept"] == pytest.approx(theirs["kept"], rel=1e-3)
    assert not (tmp_path / "out.distill").exists()


def taught(pair, blockwise):
    """What the teachers say on this rank, by kind: the last hidden states of each sample."""
    options = DistillOptions(batch_size=3)
    with (
        Checkpoint.open(pair / "base") as base,
        Checkpoint.open(pair / "tuned") as tuned,
        closing(Stats.open(pair / "stats")) as stats,
        closing(Stats.open(pair / "base-stats")) as retain,
    ):
        for each in (stats, retain):
            each.manifest["options"]["blockwise"] = blockwise
        found = Teaching(base, [(tuned, stats)], retain, torch.device("cpu")).materials(options)
    return {kind: material.teacher.states for kind, material in found.items()}


@pytest.mark.parametrize("blockwise", ["auto", "always"])
def test_each_rank_asks_the_teachers_about_its_own_samples_alone(pair, blockwise):
    alone, ranks = taught(pair, "auto"), ranked(2, taught, pair, blockwise)
    for kind, states in alone.items():
        assert len(states) == 12
        for state, both in zip(states, zip(*(of[kind] for of in ranks), strict=True), strict=True):
            [mine] = [each for each in both if each.numel()]
            assert torch.equal(mine, state)
        asked = [sum(state.numel() > 0 for state in of[kind]) for of in ranks]
        assert sorted(asked) == [4, 8]  # of each step of 3 one takes 2, and the one held out is the first's


def write_tasks(folder):
    write_data(folder / "old.jsonl", 9, seed=3)
    write_data(folder / "new.jsonl", 7, seed=4)
    return ("--task", f"old={folder / 'old.jsonl'}:text", "--task", f"new={folder / 'new.jsonl'}:text")


def test_an_evaluation_is_that_of_one_process_to_the_bit(pair, tmp_path):
    tasks = (*write_tasks(tmp_path), "--batch-size", 2)
    choices = tmp_path / "choices.jsonl"
    records = [{"prompt": f"{n} ", "choices": ["aa", "b" * n, "c"], "answer": n % 3} for n in range(1, 8)]
    choices.write_text("".join(json.dumps(record) + "\n" for record in records))
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"prompt": f"{n} ", "response": "a"}) + "\n" for n in range(5)))
    tasks += ("--task", f"c={choices}:choice", "--task", f"g={answers}:generate")
    command = ("evaluate", pair / "base", pair / "tuned", *tasks)
    run(*command, "-o", tmp_path / "alone.json")
    ended_well(ranked_cli(3, *command, "-o", tmp_path / "ranks.json"))
    alone, ranks = (json.loads((tmp_path / name).read_text()) for name in ("alone.json", "ranks.json"))
    assert alone.pop("seconds") > 0
    assert ranks.pop("seconds") > 0
    assert ranks == alone


@pytest.mark.slow
def test_a_sweep_finds_the_points_of_one_process(pair, tmp_path):
    parts = (*write_tasks(tmp_path), "--origin", "old", "--target", "new", "--stats", pair / "stats")
    command = ("sweep", pair / "base", pair / "tuned", *parts, "--density", 0.1, "--density", 0.5)
    run(*command, "-o", tmp_path / "alone")
    ended_well(ranked_cli(2, *command, "-o", tmp_path / "ranks"))
    alone, ranks = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("alone", "ranks"))
    for report in (alone, ranks):
        for point in report["points"]:
            del point["seconds"]
    assert ranks == alone


@pytest.mark.slow
def test_the_whole_job_is_one_command(pair, tmp_path):
    job = ("patch", pair / "base", pair / "tuned", "--data", pair / "data.jsonl", *SMALL)
    run(*job, "-o", tmp_path / "alone")
    ended_well(ranked_cli(2, *job, "-o", tmp_path / "out"))
    assert_alike(pair, tmp_path / "out", tmp_path / "alone", tolerance=1e-3)
    assert not (tmp_path / "out.work").exists()


def test_no_moments_of_a_rank_change_those_of_all():
    from tailorcli.core.propagation import accumulate_moments_, joined_, no_moments

    torch.manual_seed(0)
    x, y = torch.randn(40, 6), torch.randn(40, 6)
    whole = no_moments(6, torch.device("cpu"))
    accumulate_moments_(whole, x, y)
    parts = [no_moments(6, torch.device("cpu")) for _ in range(3)]
    for part, rows in zip(parts, (slice(0, 25), slice(25, 40), slice(0, 0)), strict=True):
        accumulate_moments_(part, x[rows], y[rows])
    before = [[p.tokens, p.moved, p.whole] for p in parts]
    total = sum(p.tokens for p in parts)
    matrices = [[m * p.tokens / total for m in (p.hessian, p.drift, p.gap)] for p in parts]
    sums = [sum(each) for each in zip(*matrices, strict=True)]
    answers = iter([torch.tensor(before, dtype=torch.float64).sum(0), *sums])
    joined_(parts[0], lambda tensor: tensor.copy_(next(answers)))
    assert parts[0].tokens == whole.tokens
    assert parts[0].shift == pytest.approx(whole.shift)
    for name in ("hessian", "drift", "gap"):
        torch.testing.assert_close(getattr(parts[0], name).tril(), getattr(whole, name).tril())
