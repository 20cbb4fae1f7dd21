"""A share of ``make fuzz``."""

import json
import os
from pathlib import Path

from launcher import completed

ROOT = Path(__file__).parents[2]


def test_a_damaged_file_is_read_or_refused_by_every_reader():
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    environment = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = completed(("-m", "fuzz", "--inputs", "600"), env=environment)
    assert done.returncode == 0, done.stderr[-4000:].decode()
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tracebacks"] == 0
    assert min(figures["read"], figures["refused"]) > 80, figures
