"""Several processes as one job: who does what, what they share, and how they end."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from failing_ranks import works_on
from hypothesis import given
from hypothesis import strategies as st
from ranked import ranked, started

from tailorcli import distributed
from tailorcli.distributed import shares
from tailorcli.errors import RankError


def shared_things():
    here = distributed.ranks()
    distributed.now_on(f"tensor {here.rank}")
    total = distributed.summed_(torch.full((3, 2), float(here.rank + 1)).T)
    copied = distributed.sent(torch.full((2,), here.rank), source=here.size - 1)
    distributed.wait_for_all("the test")
    return {
        "place": (here.rank, here.size, here.first, here.alone),
        "total": total.tolist(),
        "copied": copied.tolist(),
        "gathered": distributed.gathered("x" * here.rank),
        "told": distributed.told({"from": here.rank}, source=1 % here.size),
        "mine": distributed.mine([5, 1, 4, 1]),
    }


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_share_what_they_have(size):
    found = ranked(size, shared_things)
    total = float(sum(range(1, size + 1)))
    assert [each["place"] for each in found] == [(rank, size, rank == 0, size == 1) for rank in range(size)]
    for each in found:
        assert each["total"] == [[total] * 3] * 2
        assert each["copied"] == [size - 1] * 2
        assert each["gathered"] == ["x" * rank for rank in range(size)]
        assert each["told"] == {"from": 1 % size}
    assert sorted(place for each in found for place in each["mine"]) == [0, 1, 2, 3]


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 9))
def test_work_is_divided_evenly(weights, size):
    taken = shares(weights, size)
    assert sorted(place for each in taken for place in each) == list(range(len(weights)))
    assert all(each == sorted(each) for each in taken)
    loads = [sum(weights[place] for place in each) for each in taken]
    assert max(loads) - min(loads) <= max(weights, default=0)  # no rank has more to do by more than one piece
    assert shares(weights, size) == taken


def test_work_of_no_weight_is_divided_too():
    assert shares([0, 0, 0], 2) == [[0, 2], [1]]
    assert shares([7], 3) == [[0], [], []]
    with pytest.raises(ValueError, match="at least 1"):
        shares([1], 0)


def test_a_process_alone_needs_no_torch():
    code = (
        "import sys; from tailorcli import distributed as d\n"
        "with d.joined({'a': 1}) as here: pass\n"
        "assert (here, d.ranks()) == (d.Ranks(), d.Ranks()) and here.alone and here.first\n"
        "assert (d.gathered(1), d.told(2), d.mine([3, 1]), d.summed_(4), d.sent(5)) == ([1], 2, [0, 1], 4, 5)\n"
        "d.now_on('x'); d.wait_for_all('y'); d.require_alone('z'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "fit no job"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "fit no job"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is no number: 'one'"),
    ],
)
def test_variables_of_no_job(monkeypatch, variables, expected):
    for name, value in ({"MASTER_ADDR": "h", "MASTER_PORT": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=expected):
        distributed.launched()


def test_a_rank_of_a_machine_without_torchrun(monkeypatch):
    for name, value in {"MASTER_ADDR": "h", "MASTER_PORT": "1", "RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.launched() == distributed.Ranks(3, 4, 0, 1)
    monkeypatch.delenv("RANK")
    assert distributed.launched().alone


# --- how they end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sums", pytest.param("works", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("raises", "rank 1 of 3, at tensor 3: NaN in it"),
        ("has_a_bug", "KeyError('nothing')"),
        ("is_killed", "rank 1 of 3 is gone (process "),
        pytest.param("is_stopped", "rank 1 of 3 has not answered for", marks=pytest.mark.slow),
        pytest.param("sleeps", "rank 1 of 3 has neither worked, read nor written", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_all_end_with_one_error(does, told, how, rank):
    if does == "sleeps" and how == "works":
        pytest.skip("nobody waits for it")
    with started(3, works_on, rank, does, how) as job:
        began = time.monotonic()
        ends = job.ended()
        assert time.monotonic() - began < 30
    lines = [line for end in ends for line in end.stderr.splitlines() if line.startswith("told by")]
    assert len(lines) == 1, [end.stderr for end in ends]
    assert told.replace("rank 1", f"rank {rank}") in lines[0]
    if does not in ("raises", "has_a_bug"):
        assert "it was at tensor 3" in lines[0]
        assert ends[rank].code == -signal.SIGKILL
    assert all(end.code for end in ends)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_ends_all_from_outside_is_told_once(number, code):
    """Ctrl-C, or a launcher that is ended."""
    with started(3, works_on, 9, "raises", "works") as job:
        time.sleep(5)
        for rank in range(3):
            job.kill(rank, number)
        ends = job.ended(like_torchrun=False)
    assert [end.code for end in ends] == [code] * 3
    assert sum(end.stderr.count("told by") for end in ends) == 1
