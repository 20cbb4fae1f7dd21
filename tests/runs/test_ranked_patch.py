"""The commands that write, on ranks that are processes: the same bytes, also after one of them was killed."""

import json
import random

import pytest
from helpers import folder_digest, run
from kills.operations import ENDED, Operations
from ranked import command_line, ranked_cli, started


def patch(pair, out, *more):
    """The words of a command that writes both outputs into the folder ``out``."""
    where = (pair / "base", pair / "tuned", "--stats", pair / "stats", "--max-shard-size", "30KB")
    return ["patch", *map(str, where), "-o", str(out / "model"), "--patch-file", str(out / "p.safetensors"), *more]


def on_ranks(size, *arguments):
    """What the first rank showed; nothing fails, and no other says a word."""
    first, *others = ranked_cli(size, *arguments)
    assert first.code == 0, first.stderr
    assert [(end.code, end.stdout, end.stderr) for end in others] == [(0, "", "")] * (size - 1)
    return first


@pytest.fixture(scope="module")
def alone(llama_pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    run(*patch(llama_pair, out))
    return folder_digest(out)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_write_the_bytes_of_one(llama_pair, alone, tmp_path, size):
    shown = on_ranks(size, *patch(llama_pair, tmp_path, "--json"))
    assert folder_digest(tmp_path) == alone
    report = json.loads(shown.stdout)
    assert [share["rank"] for share in report["ranks"]] == list(range(size))
    assert sum(share["tensors"] for share in report["ranks"]) == len(report["tensors"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_score_apply_verify_and_merge_multi_are_those_of_one_process(llama_pair, tmp_path, size):
    base, tuned, stats = (str(llama_pair / name) for name in ("base", "tuned", "stats"))
    files = []
    for density in ("0.1", "0.2"):
        files.append(str(tmp_path / f"{density}.safetensors"))
        run("patch", base, tuned, "--stats", stats, "--density", density, "--patch-file", files[-1])
    joint = ("--method", "patches")
    for name, do in (("alone", run), ("ranks", lambda *words: on_ranks(size, *words))):
        out = tmp_path / name
        out.mkdir()
        do("score", base, tuned, "--stats", stats, "-o", str(out / "score.json"))
        do("apply", base, files[0], "-o", str(out / "applied"))
        do("merge-multi", base, *files, *joint, "-o", str(out / "merged"), "--patch-file", str(out / "m.safetensors"))
    assert folder_digest(tmp_path / "ranks") == folder_digest(tmp_path / "alone")
    words = ("verify", str(tmp_path / "ranks" / "applied"), "--base", base, "--patch", files[0])
    assert on_ranks(size, *words).stdout == run(*words).stdout
    words = ("verify", str(tmp_path / "ranks" / "applied"), "--base", base, "--patch", files[1], "--json")
    ends = ranked_cli(size, *words)
    assert ends[0].code == 1
    assert all(end.code for end in ends)  # torchrun ends the others
    assert ends[0].stdout == run(*words, expect=1).stdout


def killed_at(rank, number, work, *arguments):
    """The command line, ended at the ``number``-th operation on files below ``work`` of one rank."""
    import os

    from tailorcli.checkpoint import journal

    journal._SYNC_BYTES = 20_000
    if int(os.environ["RANK"]) == rank:
        Operations(work, number).install()
    command_line(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_a_rank_that_is_killed_leaves_nothing_that_loads_and_others_go_on(llama_pair, alone, tmp_path, moment):
    from tailorcli import Checkpoint, PatchFile, TailorError

    generator = random.Random(moment)
    size, rank = generator.choice([2, 3]), generator.randrange(2)
    number = generator.randrange(1, 12) if rank else generator.randrange(1, 60)
    arguments = patch(llama_pair, tmp_path)
    with started(size, killed_at, rank, number, tmp_path, *arguments) as job:
        ends = job.ended()
    assert ends[rank].code == ENDED, (number, ends)
    assert all(end.code for end in ends)
    assert sum(f"rank {rank} of {size}" in end.stderr for end in ends) == 1, ends
    finished = [folder_digest(tmp_path).get(name) == digest for name, digest in alone.items()]
    if not all(finished):
        with pytest.raises(TailorError):
            Checkpoint.open(tmp_path / "model")
    if (tmp_path / "p.safetensors").exists():
        PatchFile.open(tmp_path / "p.safetensors").check()
    again = generator.choice([1, 2, 4])
    begun = (tmp_path / "model" / ".tailorcli" / "journal.jsonl").exists() or (tmp_path / "p.safetensors").exists()
    more = ["--resume"] if begun else ["--overwrite"] if (tmp_path / "model").exists() else []
    if again == 1:
        run(*arguments, *more)
    else:
        on_ranks(again, *arguments, *more)
    assert folder_digest(tmp_path) == alone


@pytest.mark.slow
def test_a_target_is_searched_for_by_all_ranks(llama_pair, tmp_path):
    small = ("--num-samples", "8", "--seq-len", "24")
    for name, data in (("tuned", ("--data", str(llama_pair / "data.jsonl"))), ("base", ("--synthetic",))):
        run("calibrate", str(llama_pair / name), *data, "-o", str(tmp_path / name), *small)
    where = (llama_pair / "base", llama_pair / "tuned", "--stats", tmp_path / "tuned", "--retain", tmp_path / "base")
    how = ("--target", "old=90", "--distill-steps", "3", "--no-propagate", "--json")
    found = {}
    for name, do in (("alone", run), ("ranks", lambda *words: on_ranks(2, *words))):
        places = ("-o", tmp_path / f"{name}-model", "--patch-file", tmp_path / f"{name}.safetensors")
        found[name] = json.loads(do("patch", *map(str, (*where, *places, *how))).stdout)
        assert (tmp_path / f"{name}.safetensors").exists()
        assert not (tmp_path / f"{name}-model.target").exists()
    alone, ranks = found["alone"], found["ranks"]
    assert alone["distillation"]["steps"] == ranks["distillation"]["steps"]
    assert ranks["distillation"]["kept"] == pytest.approx(alone["distillation"]["kept"], rel=1e-3)
    assert ranks["target"]["density"] == alone["target"]["density"]
