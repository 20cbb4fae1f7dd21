"""Run one command and record what it took: python step.py RECORD.json -- COMMAND...

A process of its own, without torch: a child's peak memory as the system counts it starts from that
of the process which forked it, and the benchmark itself holds models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run the command after `--`, write its figures to RECORD.json, return its exit status."""
    record, separator, *command = arguments
    if separator != "--":
        raise SystemExit("usage: python step.py RECORD.json -- COMMAND...")
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it is reaped: Popen need not wait for it
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * unit,
        "exit_status": process.returncode,
    }
    Path(record).write_text(json.dumps(figures), encoding="utf-8")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
