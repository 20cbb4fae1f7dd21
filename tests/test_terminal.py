"""What reaches a terminal: escapes in place of controls, valid JSON, streams that cannot take it, progress."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import invoke, make_pair, run
from launcher import completed
from safetensors.torch import save_file

from tailorcli import terminal

HOSTILE = "a\x1b]0;owned\x07\x1b[2Jb\x9b1mc\u202ed\u2066e\rf\ng[bold red]h[/]\x7f"
ACTING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def program(*arguments, **streams):
    """The program in a process of its own."""
    return completed(("-m", "tailorcli", *arguments), **streams)


def program_in(*arguments, **environment):
    """The same with an environment that Python reads when it starts."""
    command = [sys.executable, "-m", "tailorcli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=120, check=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("terminal"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A base and a tuned checkpoint whose only tensor, and whose folder, have names that act on a terminal."""
    folder = tmp_path_factory.mktemp("hostile") / HOSTILE.replace("/", "")
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        (folder / name).mkdir(parents=True)
        weight = torch.randn(8, 8, generator=generator)
        save_file({f"model.layers.0.{HOSTILE}.weight": weight}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"architectures": [HOSTILE]}))
    return folder


def shown(done):
    """All that a command wrote, which must not act on a terminal."""
    return harmless((done.stdout or b"").decode() + done.stderr.decode())


def harmless(text):
    assert "Traceback" not in text, text
    assert not ACTING.search(text), ascii(ACTING.search(text))
    return text


def test_text_that_acts_on_a_terminal_is_escaped():
    assert terminal.printable("a\x1b[31mb\nc\u202ed\udcffe") == "a\\x1b[31mb\\nc\\u202ed\\udcffe"
    assert terminal.printable("日本語 café 👩‍🚀 [bold]x[/]") == "日本語 café 👩‍🚀 [bold]x[/]"


def test_names_from_files_and_paths_do_nothing_to_a_terminal(hostile, tmp_path):
    base, tuned = hostile / "base", hostile / "tuned"
    file, out = tmp_path / "p.safetensors", tmp_path / "out"
    plain = ("--omega", "1", "--solver", "none")
    both = ("-o", out, "--patch-file", file)
    named = []
    for arguments in (
        ("inspect", base),
        ("score", base, tuned, "--omega", "1"),
        ("patch", base, tuned, *plain, "-o", out, "--dry-run"),
        ("patch", base, tuned, *plain, *both),
        ("inspect", out),
        ("inspect", file),
        ("apply", base, file, "-o", tmp_path / "applied"),
        ("verify", out, "--base", base, "--patch", file),
        ("merge-multi", base, file, file, "--method", "patches", "-o", tmp_path / "merged"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 0 or arguments[0] == "merge-multi", done.stderr
        named += [arguments[0]] if "\\x1b]0;owned" in harmless(done.stdout + done.stderr) else []
    assert {"inspect", "score", "patch"} <= set(named)


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", f"/nowhere/{HOSTILE}"),
        ("patch", "base", "tuned", f"--{HOSTILE}"),
        (HOSTILE,),
        ("evaluate", "base", "--task", HOSTILE),
        ("hscore", HOSTILE, "--origin", HOSTILE, "--target", "b"),
        ("calibrate", HOSTILE, "--data", "x.jsonl", "-o", "y"),
    ],
)
def test_errors_quote_nothing_that_acts_on_a_terminal(arguments):
    done = program(*arguments)
    assert done.returncode in (1, 2)
    text = " ".join(shown(done).replace("│", "").split())  # a usage error is wrapped in a frame
    assert "\\x1b]0;owned" in text
    assert "[bold red]h[/" in text


@pytest.mark.parametrize("command", ["inspect", pytest.param("score", marks=pytest.mark.slow), "patch"])
def test_json_is_valid_whatever_the_names(hostile, tmp_path, command):
    base, tuned = hostile / "base", hostile / "tuned"
    more = {"inspect": (), "score": (tuned, "--omega", "1"), "patch": (tuned, "--omega", "1", "--solver", "none")}
    where = ("-o", tmp_path / "out") if command == "patch" else ()
    done = program_in(command, base, *more[command], *where, "--json", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr.decode()
    shown(done)
    tensors = json.loads(done.stdout)["tensors"]
    assert HOSTILE in tensors[0]["name"]


def test_json_has_no_numbers_that_json_does_not_have(capsys):
    from tailorcli.cli.output import print_json

    print_json({"a": [float("nan"), 1.5], "b": {"c": float("inf")}, "d": "\udcff\x7f"})
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text) == {"a": [None, 1.5], "b": {"c": None}, "d": "\udcff\x7f"}


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_a_stream_of_few_characters_gets_escapes_in_their_place(pair, tmp_path, encoding):
    named = tmp_path / "日本語"
    named.symlink_to(pair / "base")
    for arguments, code in ((("inspect", named), 0), (("inspect", tmp_path / "無"), 1), (("patch", "--無"), 2)):
        done = program_in(*arguments, PYTHONIOENCODING=encoding, LC_ALL="C")
        assert done.returncode == code, done.stderr.decode()
        assert b"Traceback" not in done.stderr
        assert b"\\u" in (done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [("inspect", "base"), ("inspect", "base", "--json"), ("score", "base", "tuned", "--omega", "1"), ("-h",)],
)
def test_a_reader_that_has_gone_ends_the_program_quietly(pair, arguments):
    here = [pair / word if word in ("base", "tuned") else word for word in arguments]
    read, write = os.pipe()
    os.close(read)
    try:
        done = program(*here, stdout=write)
    finally:
        os.close(write)
    assert done.stderr.decode() == ""
    assert done.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", [("inspect", "base"), ("inspect", "base", "--json"), ("--version",), ("-h",)])
def test_output_that_cannot_be_written_is_one_error(pair, arguments):
    here = [pair / word if word == "base" else word for word in arguments]
    with Path("/dev/full").open("w") as full:
        done = program(*here, stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr.decode() == "error: cannot write to standard output: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_notes_that_cannot_be_written_end_nothing(pair, tmp_path):
    arguments = ("patch", pair / "base", pair / "tuned", "--omega", "1", "--solver", "none", "-o", tmp_path / "out")
    with Path("/dev/full").open("w") as full:
        done = program(*arguments, stderr=full.fileno())
    assert done.returncode == 0
    run("verify", tmp_path / "out", "--base", pair / "base")


def test_elsewhere_than_on_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.05)
    with terminal.Progress("patching a\x1b[2J", 400_000, "B", shown=True) as progress:
        progress.start_at(100_000)
        progress.update(100_000)
        progress.note("loss 2.50")
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 6
    assert re.fullmatch(r"patching a\\x1b\[2J: 50%, 200k of 400k B, 0:00, about 0:00 left, loss 2\.50", lines[0])
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_progress_that_is_not_asked_for_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.01)
    with terminal.Progress("patching", 4, "B", shown=False) as progress:
        progress.update(1)
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
