"""The command line under several ranks: what is shown, once, and the exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_pair
from ranked import command_line, ranked_cli, started


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def test_a_wrong_option_is_told_once(pair):
    ends = ranked_cli(2, "calibrate", pair / "tuned", "-o", pair / "s")
    assert [end.code for end in ends] == [2, 2] or ends[0].code == 2
    assert sum("pass --data FILE" in end.stderr for end in ends) == 1


def test_bad_input_is_told_once(pair):
    ends = ranked_cli(3, "calibrate", pair / "nothing", "--data", pair / "data.jsonl", "-o", pair / "s")
    assert [end.code for end in ends] == [1, 1, 1]
    assert "".join(end.stderr for end in ends) == (
        f"error: {pair}/nothing is not there\n  try: pass the folder that save_pretrained wrote\n"
    )


def test_a_command_that_is_done_in_a_moment_runs_once(pair):
    ends = ranked_cli(2, "check", pair / "base", pair / "tuned", "--json")
    assert [end.code for end in ends] == [0, 0]
    assert ends[0].stdout.startswith("{")
    assert ends[1].stdout == ends[1].stderr == ""


def differing_command(pair):
    rank = os.environ["RANK"]
    command_line("calibrate", f"{pair}/tuned", "--data", f"{pair}/data.jsonl", "-o", f"{pair}/s", "--seed", rank)


def differing_files(pair):
    os.chdir(f"{pair}/of{os.environ['RANK']}")
    command_line("calibrate", f"{pair}/tuned", "--data", "data.jsonl", "-o", f"{pair}/s")


def test_ranks_that_differ_are_told_so(pair):
    with started(2, differing_command, pair) as job:
        ends = job.ended()
    shown = "".join(end.stderr for end in ends)
    assert shown.count("error: the ranks differ in the command: calibrate ") == 1
    assert "--seed 0 on rank 0, calibrate " in shown
    for rank in range(2):
        (pair / f"of{rank}").mkdir()
        (pair / f"of{rank}" / "data.jsonl").write_text('{"text": "%s"}\n' % ("abc" * (rank + 1)))
    with started(2, differing_files, pair) as job:
        ends = job.ended()
    assert "".join(end.stderr for end in ends).count("error: the ranks differ in data.jsonl: ") == 1
    assert [end.code for end in ends] == [1, 1]
    assert not (pair / "s").exists()


def test_standard_input_reaches_one_process(pair):
    ends = ranked_cli(2, "calibrate", pair / "tuned", "--data", "-", "-o", pair / "s")
    assert "".join(end.stderr for end in ends).count("error: standard input reaches one process alone") == 1


@pytest.mark.slow
def test_torchrun_itself(pair, tmp_path):
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "-m", "tailorcli"]
    command += ["calibrate", str(pair / "nothing"), "--data", str(pair / "data.jsonl"), "-o", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("nothing is not there") == 2  # our line, and torchrun's table of what failed
    assert f"traceback : {pair}/nothing is not there; try: pass the folder" in done.stderr
