"""What the commands show in a terminal of 80 columns: no line is wider, no name is broken, a screen or so in all."""

import json
import os
import re

import pytest
from helpers import make_pair, run
from launcher import launch

pty = pytest.importorskip("pty")
LAYERS = 24


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A pair of 24 layers, statistics, and a patched checkpoint."""
    folder = make_pair(tmp_path_factory.mktemp("deep"), layers=LAYERS)
    run("calibrate", folder / "tuned", "--data", folder / "data.jsonl", "-o", folder / "stats", "--num-samples", 4)
    run("patch", folder / "base", folder / "tuned", "--stats", folder / "stats", "-o", folder / "out")
    return folder


def on_a_terminal(*arguments):
    """The lines that a command shows on a terminal of 80 columns, without colours."""
    ours, theirs = pty.openpty()
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = launch(("-m", "tailorcli", *arguments), **ends, env={"COLUMNS": "80", "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            read = os.read(ours, 1 << 16)
        except OSError:  # Linux' way to say that the other end is closed
            break
        if not read:
            break
        shown += read
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown.decode().replace("\r\n", "\n"))
    return [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]


@pytest.mark.parametrize("what", ["base", "stats", "out", "score", "dry run"])
def test_a_deep_model_fits_a_terminal(deep, what):
    pair = (deep / "base", deep / "tuned", "--stats", deep / "stats")
    arguments = {
        "score": ("score", *pair),
        "dry run": ("patch", *pair, "-o", deep / "other", "--dry-run"),
    }.get(what, ("inspect", deep / what))
    lines = on_a_terminal(*arguments)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 52, "\n".join(lines)
    words = {line.split()[0] for line in lines if line.strip()}
    assert {"down_proj", "q_proj", "lm_head"} <= words
    if what in ("out", "score", "stats"):
        depths = [line.split()[0] for line in lines if re.match(r"\d+-\d+ ", line)]
        assert depths == [f"{n}-{n + 2}" for n in range(0, LAYERS, 3)]


def test_two_stacks_of_layers_fit_a_terminal(deep, tmp_path):
    """A vision tower's layers beside a decoder's: longer names of kinds, and none of them broken."""
    report = json.loads((deep / "out" / "tailor_report.json").read_text())
    for tensor in report["tensors"]:
        number = int(tensor["name"].split(".")[2]) if tensor["name"].startswith("model.layers.") else 0
        stack = "vision_tower.encoder" if number >= LAYERS - 2 else "language_model"
        tensor["name"] = tensor["name"].replace("model.layers.", f"model.{stack}.layers.")
    (tmp_path / "report.json").write_text(json.dumps(report))
    lines = on_a_terminal("inspect", tmp_path / "report.json")
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("language_model down_proj ") for line in lines) == 1
    assert any(line.startswith("vision_tower 23 ") for line in lines)


def test_every_tensor_on_request_in_number_order(deep):
    lines = on_a_terminal("inspect", deep / "base", "--tensors")
    assert max(map(len, lines)) <= 80
    names = [line.split()[0] for line in lines if "self_attn.q_proj" in line]
    assert names == [f"{n}.self_attn.q_proj" for n in range(LAYERS)]


@pytest.mark.parametrize("more", [(), ("--all",)])
def test_every_figure_of_an_evaluation_stands_beside_its_model(deep, more):
    tasks = [f"{name}={deep / 'data.jsonl'}:text" for name in ("python", "unicode")]
    roles = ("--task", tasks[0], "--origin", "python", "--task", tasks[1], "--target", "unicode")
    models = [deep / name for name in ("base", "tuned", "out")]
    beside = ("--base", models[0], "--tuned", models[1], "--limit", 6)
    lines = on_a_terminal("evaluate", *models, *roles, *beside, *more)
    assert max(map(len, lines)) <= 80
    assert "…" not in "\n".join(lines)
    figures = [line for line in lines if re.match(r"\S.*\d\.\d\d", line)]
    assert {line.split()[0] for line in figures if line.split()[-1] != "s"} == {"base", "tuned", "out"}
    heads = [line for line in lines if re.match(r"model ", line)]
    assert len(heads) == (1 if not more else 4)  # three tables, one of which is too wide for one row of columns
    assert {"old", "new", "kept"} <= {word.rstrip(",") for word in " ".join(lines).split()}
