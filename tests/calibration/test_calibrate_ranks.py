"""Statistics that several ranks make are those of one process, up to rounding."""

import json
import os
import signal

import pytest
from families import make_family_pair
from helpers import run
from ranked import command_line, ranked_cli, started

from tailorcli.calibration.stats import Stats
from tailorcli.errors import TailorError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = make_family_pair(tmp_path_factory.mktemp(family.replace(".", "-")), family)
        return made[family]

    return get


def calibrated(size, pair, output, *arguments):
    """The report of ``calibrate`` on so many ranks, and what all of them showed beside it."""
    ends = ranked_cli(size, "calibrate", *arguments, "-o", output, "--json", "--batch-size", "3")
    assert [end.code for end in ends] == [0] * size, [end.stderr for end in ends]
    assert [end.stdout for end in ends[1:]] == [""] * (size - 1)
    return json.loads(ends[0].stdout)


def require_same(one, other):
    """The same folder but for rounding: names, tokens, reasons, samples; Hessians to 1e-6 of their diagonal."""
    first, second = Stats.open(one), Stats.open(other)
    assert sorted(first.hessians) == sorted(second.hessians)
    assert first.tensors == second.tensors
    for name, info in first.hessians.items():
        found = second.hessians[name]
        assert (info.size, info.kind, info.tokens, info.dead) == (found.size, found.kind, found.tokens, found.dead)
        expected = first.load(name)
        scale = max(float(expected.abs().max()), 1e-30)
        assert float((second.load(name) - expected).abs().max()) <= 1e-6 * scale, name
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (one, other)]
    for part in ("data", "options", "samples", "model"):
        assert manifests[0][part] == manifests[1][part], part
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir())


CASES = [
    ("mixtral", 3, "never"),
    ("llama", 2, "always"),
    *(
        pytest.param(family, size, blockwise, marks=pytest.mark.slow)
        for family in ("llama", "gpt2", "mixtral", "llava")
        for size in (2, 4)
        for blockwise in ("never", "always")
    ),
    pytest.param("qwen3-moe", 3, "always", marks=pytest.mark.slow),
    pytest.param("t5", 3, "always", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "size", "blockwise"), CASES)
def test_ranks_make_the_same_statistics(pairs, tmp_path, family, size, blockwise):
    pair = pairs(family)
    given = [str(pair / "tuned"), "--data", str(pair / "data.jsonl"), "--blockwise", blockwise]
    report = calibrated(size, pair, tmp_path / "ranks", *given)
    alone = run("calibrate", *given, "-o", str(tmp_path / "alone"), "--json", "--batch-size", "3")
    expected = json.loads(alone.stdout)
    require_same(tmp_path / "alone", tmp_path / "ranks")
    assert expected.pop("ranks") == []
    done = report.pop("ranks")
    assert len(done) == size
    assert sum(each["samples"] for each in done) == report["samples"]
    assert sum(each["tokens"] for each in done) == report["tokens"]
    for told in (report, expected):
        for changing in ("output", "seconds", "stages"):
            told.pop(changing)
    assert report == expected


@pytest.mark.parametrize("blockwise", ["always", pytest.param("never", marks=pytest.mark.slow)])
def test_pictures_on_one_rank_alone(pairs, tmp_path, blockwise):
    """Batches of one rank come to a tower's blocks, those of another to the language model's."""
    pair = pairs("llava")
    records = [json.loads(line) for line in (pair / "data.jsonl").read_text().splitlines()]
    seen = [record for record in records if "images" in record][:2]
    texts = [{"text": f"{number} plain words of some length " * 3} for number in range(6)]
    data = pair / "mixed.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in (*seen, *texts)))
    given = [str(pair / "tuned"), "--data", str(data), "--blockwise", blockwise]
    calibrated(2, pair, tmp_path / "ranks", *given)
    run("calibrate", *given, "-o", str(tmp_path / "alone"), "--batch-size", "3")
    require_same(tmp_path / "alone", tmp_path / "ranks")


@pytest.mark.parametrize("blockwise", ["never", pytest.param("always", marks=pytest.mark.slow)])
def test_more_ranks_than_samples(pairs, tmp_path, blockwise):
    pair = pairs("llama")
    given = [str(pair / "tuned"), "--data", str(pair / "data.jsonl"), "--num-samples", "2", "--blockwise", blockwise]
    report = calibrated(3, pair, tmp_path / "ranks", *given)
    run("calibrate", *given, "-o", str(tmp_path / "alone"))
    assert sorted(each["samples"] for each in report["ranks"]) == [0, 1, 1]
    for file in (tmp_path / "alone", tmp_path / "ranks"):
        manifest = json.loads((file / "manifest.json").read_text())
        manifest["options"]["batch_size"] = 0
        (file / "manifest.json").write_text(json.dumps(manifest))
    require_same(tmp_path / "alone", tmp_path / "ranks")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_model_writes_the_same_samples_on_any_number_of_ranks(pairs, tmp_path, size):
    """Texts of many lengths, and so many batches; further ones go into a file."""
    pair = pairs("llama")
    given = [str(pair / "base"), "--synthetic", "--data", str(pair / "data.jsonl"), "--seq-len", "60"]
    calibrated(size, pair, tmp_path / "ranks", *given, "--held-out", str(tmp_path / "ranks.jsonl"))
    run("calibrate", *given, "--held-out", tmp_path / "alone.jsonl", "-o", tmp_path / "alone", "--batch-size", "3")
    require_same(tmp_path / "alone", tmp_path / "ranks")
    assert (tmp_path / "ranks.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text()


@pytest.mark.slow
def test_ranks_pick_the_same_teacher(pairs, tmp_path):
    pair = pairs("llama")
    given = [str(pair / "tuned"), "--base", str(pair / "base"), "--data", str(pair / "data.jsonl")]
    given += ["--teacher-weight", "auto"]
    calibrated(3, pair, tmp_path / "ranks", *given)
    run("calibrate", *given, "-o", tmp_path / "alone", "--batch-size", "3")
    require_same(tmp_path / "alone", tmp_path / "ranks")  # the losses that were tried are in the manifest
    losses = json.loads((tmp_path / "ranks" / "manifest.json").read_text())["model"]["teacher_losses"]
    assert len(losses) > 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_leaves_nothing_that_opens(pairs, tmp_path, rank):
    pair = pairs("llama")
    given = [str(pair / "tuned"), "--data", str(pair / "data.jsonl"), "-o", str(tmp_path / "s")]
    with started(2, killed_while_it_writes, rank, given) as job:
        ends = job.ended(120)
    assert ends[rank].code == -signal.SIGKILL
    assert ends[1 - rank].code == 1
    assert f"error: rank {rank} of 2 is gone" in ends[1 - rank].stderr
    assert "; it was at model." in ends[1 - rank].stderr
    with pytest.raises(TailorError):
        Stats.open(tmp_path / "s")
    assert [end.code for end in ranked_cli(2, "calibrate", *given)] == [0, 0]
    Stats.open(tmp_path / "s")


def killed_while_it_writes(rank, given):
    from tailorcli.calibration.stats_writer import StatsWriter

    original = StatsWriter.write

    def write(self, name, info, values):
        original(self, name, info, values)
        if os.environ["RANK"] == str(rank) and self.count == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    StatsWriter.write = write
    command_line("calibrate", *given)
