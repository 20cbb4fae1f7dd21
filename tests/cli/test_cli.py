"""The command line as a user meets it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import typer
from helpers import run

from tailorcli import __version__, inspect_path
from tailorcli.cli import app

COMMANDS = sorted(typer.main.get_command(app).commands)


def test_version_and_help():
    assert run("--version").stdout.startswith(f"tailorcli {__version__}\n")
    for command in COMMANDS:
        assert command in run("--help").stdout
        assert "--json" in run(command, "--help").stdout


def test_data_on_stdout_and_the_rest_on_stderr(llama_pair, tmp_path):
    arguments = (llama_pair / "base", llama_pair / "tuned", "--stats", llama_pair / "stats")
    result = run("score", *arguments, "--json")
    assert json.loads(result.stdout)["totals"]["tensors_patched"] == 21
    result = run("patch", *arguments, "-o", tmp_path / "out", "--exclude", "*norm*")
    assert "left at base: 5" in result.stderr
    assert "left at base" not in result.stdout
    assert "mean layer error" in result.stdout
    assert "to read" in result.stderr  # the cost, before the work
    result = run("calibrate", llama_pair / "tuned", "--data", llama_pair / "data.jsonl", "-o", tmp_path / "s", "--json")
    assert json.loads(result.stdout)["calibrated"] == 21


def test_dry_run_writes_nothing(llama_pair, tmp_path):
    arguments = (llama_pair / "base", llama_pair / "tuned", "--stats", llama_pair / "stats", "-o", tmp_path / "out")
    plan = json.loads(run("patch", *arguments, "--dry-run", "--json").stdout)
    assert len(plan["tensors"]) == 21
    assert {"read_bytes", "write_bytes", "peak_memory_bytes", "free_bytes"} <= plan.keys()
    assert "lm_head" in run("patch", *arguments, "--dry-run").stdout
    assert "layers.1" not in run("patch", *arguments, "--dry-run").stdout
    assert "1.mlp.down_proj" in run("patch", *arguments, "--dry-run", "--tensors").stdout
    assert not (tmp_path / "out").exists()


def test_score_shows_both_scores(llama_pair):
    arguments = ("score", llama_pair / "base", llama_pair / "tuned", "--stats", llama_pair / "stats")
    shown = run(*arguments, "--tensors").stdout
    for word in ("1.mlp.down_proj ", "density", "sens. kept", "dW=0", "dead", "quantiles", "75%"):
        assert word in shown
    shown = run(*arguments).stdout
    for word in ("by kind", "down_proj ", "sens.", "dW = 0", "by depth", "other"):
        assert word in shown


def test_inspect_knows_what_it_sees(llama_pair, tmp_path):
    from tailorcli import PatchOptions, patch_checkpoint, score_checkpoint
    from tailorcli.runs.outputs import write_report

    arguments = (llama_pair / "base", llama_pair / "tuned")
    patch_checkpoint(*arguments, tmp_path / "out", llama_pair / "stats")
    write_report(score_checkpoint(*arguments, llama_pair / "stats", PatchOptions()), tmp_path / "score.json")
    kinds = {
        llama_pair / "stats": "stats",
        llama_pair / "base": "checkpoint",
        tmp_path / "out": "patched",
        tmp_path / "score.json": "report",
    }
    for path, kind in kinds.items():
        assert inspect_path(path).kind == kind
        assert json.loads(run("inspect", path, "--json").stdout)["kind"] == kind
        assert str(path.name) in run("inspect", path).stdout.replace("\n", "")


@pytest.mark.parametrize("what", ["out", "none", "stats", "score.json"])
def test_plots_are_drawn(llama_pair, gpt2_pair, tmp_path, what):
    pytest.importorskip("matplotlib")
    if what == "stats":
        path = gpt2_pair / "stats"
    else:
        path = tmp_path / what
        extra = ("--solver", "none", "--omega", "1") if what == "none" else ("--stats", gpt2_pair / "stats")
        command = "score" if what == "score.json" else "patch"
        run(command, gpt2_pair / "base", gpt2_pair / "tuned", "-o", path, *extra)
    run("inspect", path, "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_has_no_picture_says_so(llama_pair, tmp_path):
    result = run("inspect", llama_pair / "base", "--plot", tmp_path / "plot.png", expect=1)
    assert "nothing to plot" in result.stderr
    result = run("inspect", llama_pair / "stats", "--plot", tmp_path / "plot.nope", expect=1)
    assert ".png" in result.stderr


def test_usage_errors_exit_with_2():
    run("patch", expect=2)
    run("nothing", expect=2)
    run("score", "a", "b", "--density", "much", expect=2)


@pytest.mark.parametrize("module", ["tailorcli.cli.app", "typer"])
@pytest.mark.parametrize("start", ["from tailorcli.cli import main; main()", "-m tailorcli"])
def test_ctrl_c_while_the_program_is_imported_ends_it_quietly(module, start):
    hook = f"""
import sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
"""
    as_module = "import runpy; runpy.run_module('tailorcli', run_name='__main__')"
    code = hook + (as_module if start.startswith("-m") else start)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_sigterm_ends_a_command_as_ctrl_c_does(llama_pair, tmp_path):
    """Its temporary folder goes with it; the shell sees that it was terminated."""
    base, patch, scratch = llama_pair / "base", tmp_path / "law.safetensors", tmp_path / "scratch"
    arguments = (base, llama_pair / "tuned", "--stats", llama_pair / "stats")
    run("patch", *arguments, "--patch-file", patch)
    scratch.mkdir()
    command = ["evaluate", patch, "--base", base, "--task", f"t={llama_pair / 'data.jsonl'}:text"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tailorcli", *map(str, command)],
        env=os.environ | {"TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(scratch.glob("tailorcli-*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 143, said
    assert said.strip().endswith("interrupted")
    assert "Traceback" not in said
    assert not list(scratch.glob("tailorcli-*"))
