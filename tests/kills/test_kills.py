"""A few of the kills of ``make kills``, in a process of their own: it forks, and must have one thread for that."""

import json
import os
import sys
from pathlib import Path

import pytest
from launcher import completed

from tailorcli import PatchOptions, patch_checkpoint
from tailorcli.guard import lock_file

TESTS = Path(__file__).parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.skipif(sys.platform != "linux", reason="open files are told by /proc")
def test_ended_at_an_operation_on_files_nothing_unfinished_opens_and_all_can_go_on():
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    environment = ENVIRONMENT | {"PYTHONPATH": path}
    done = completed(("-m", "kills.harness", "--share", "1", "--json"), env=environment)
    assert done.stdout, done.stderr.decode()
    results = json.loads(done.stdout)
    assert [failure for result in results for failure in result["failures"]] == []
    assert done.returncode == 0
    assert len(results) == 22
    fewest = {"probe": 15}  # it writes one file and its manifest
    for result in results:
        assert result["kills"] == 1
        assert result["operations"] > fewest.get(result["command"].split()[0], 20), result["command"]


def test_a_finished_output_that_is_resumed_keeps_nothing_that_a_kill_left(llama_pair, tmp_path):
    out, file = tmp_path / "out", tmp_path / "patch.safetensors"
    arguments = (llama_pair / "base", llama_pair / "tuned", out, llama_pair / "stats")
    patch_checkpoint(*arguments, patch_file=file)
    finished = sorted(tmp_path.rglob("*"))
    (out / ".tailorcli").mkdir()
    left = [out / ".tailorcli.lock", lock_file(file, folder=False), tmp_path / "patch.safetensors.journal"]
    for path in left:
        path.touch()
    assert patch_checkpoint(*arguments, PatchOptions(resume=True), patch_file=file).is_earlier
    assert sorted(tmp_path.rglob("*")) == finished
