"""The command line under several ranks: what is shown, once, and the exit codes."""

import json
import os
import re
import socket
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


TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def on_two_machines(*program):
    """Two agents of torchrun with two processes each, as on two machines: their exit codes and what both showed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [TORCHRUN, "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", str(port), *map(str, program)]
    variables = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    agents = [subprocess.Popen(command, **pipes, text=True, env=variables) for _ in range(2)]
    shown = [agent.communicate(timeout=300) for agent in agents]
    return [agent.returncode for agent in agents], "".join(out for out, _ in shown), "".join(err for _, err in shown)


@pytest.mark.slow
def test_two_machines(pair, tmp_path):
    given = ["-m", "tailorcli", "calibrate", pair / "tuned", "--data", pair / "data.jsonl", "--json", "-o"]
    codes, shown, _ = on_two_machines(*given, tmp_path / "s")
    assert codes == [0, 0]
    assert [each["samples"] > 0 for each in json.loads(shown)["ranks"]] == [True] * 4
    codes, shown, errors = on_two_machines(*given, tmp_path / "s")
    assert codes == [1, 1]
    assert shown == ""
    assert errors.count("error: ") == 1
    assert f"error: {tmp_path}/s already holds statistics" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "expected"),
    [("raises", "at tensor 3: NaN in it"), ("is_killed", "it was at tensor 3"), ("is_stopped", "")],
)
def test_a_rank_of_two_machines_fails(does, expected):
    program = Path(__file__).parent.parent / "failing_ranks.py"
    codes, _, errors = on_two_machines(program, 3, does)
    assert codes == [1, 1]
    told = [line for line in errors.splitlines() if line.startswith("told by")]
    assert len(told) == 1
    assert "rank 3 of 4" in told[0]
    assert expected in told[0]


@pytest.mark.slow
def test_torchrun_itself(pair, tmp_path):
    command = [TORCHRUN, "--nproc-per-node", "2", "-m", "tailorcli"]
    command += ["calibrate", str(pair / "nothing"), "--data", str(pair / "data.jsonl"), "-o", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("nothing is not there") == 2  # our line, and torchrun's table of what failed
    assert f"traceback : {pair}/nothing is not there; try: pass the folder" in done.stderr


def examples(kind):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "many-devices.md").read_text()
    return re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)


@pytest.mark.slow
def test_the_script_for_slurm(pair, tmp_path):
    """With stand-ins for Slurm's commands: two machines, which are this one."""
    (script,) = examples("bash")
    (tmp_path / "job.sbatch").write_text(script)
    stand_ins = {
        "scontrol": "printf 'localhost\\nother\\n'",
        "srun": '[ "$1" = --kill-on-bad-exit ] && shift; "$@" & one=$!; "$@" & two=$!; wait $one && wait $two',
    }
    for name, does in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{tmp_path}:{Path(TORCHRUN).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_NODELIST": "x[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "GPUS": "1", "PORT": str(port)}
    given = ["calibrate", pair / "tuned", "--data", pair / "data.jsonl", "-o", tmp_path / "s"]
    variables = os.environ | slurm | {"PATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        ["bash", tmp_path / "job.sbatch", *given], capture_output=True, text=True, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 samples") == 1


def test_the_manifest_for_kubernetes():
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all(examples("yaml")[0])
    pods = job["spec"]["template"]["spec"]
    command = pods["containers"][0]["command"]
    assert pods["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert f"--nnodes={job['spec']['completions']}" in command
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pods['subdomain']}:29500" in command
    assert {mount["name"] for mount in pods["containers"][0]["volumeMounts"]} == {v["name"] for v in pods["volumes"]}
    require_command(command[command.index("tailorcli") + 1 :])


def require_command(arguments):
    """That the command takes these arguments; the files they name are not there."""
    from helpers import run

    assert "is not there" in run(*arguments, expect=1).stderr
