"""What the commands say of what they find: finished outputs, tasks of one name, folders and files of other kinds."""

import json

import pytest
from helpers import make_pair, refused, run

PLAIN = ("--omega", "1", "--solver", "none")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("words"))


def test_a_finished_output_is_said_to_be_finished(pair, tmp_path):
    arguments = ("patch", pair / "base", pair / "tuned", *PLAIN, "-o", tmp_path / "out")
    assert "wrote" in run(*arguments).stdout
    again = run(*arguments, "--resume")
    assert "already finished" in again.stdout
    assert "wrote" not in again.output.replace("nothing was written", "")
    assert " s\n" not in again.stderr


def test_tasks_of_one_name_are_told_apart_by_their_files(pair, tmp_path):
    for name, density in (("one", 0.1), ("two", 0.2)):
        tuned = tmp_path / f"tuned-{name}"
        tuned.mkdir()
        for file in (pair / "tuned").iterdir():
            (tuned / file.name).write_bytes(file.read_bytes())
        config = json.loads((tuned / "config.json").read_text())
        (tuned / "config.json").write_text(json.dumps(config | {"use_cache": name == "one"}))
        file = tmp_path / f"{name}.safetensors"
        run("patch", pair / "base", tuned, *PLAIN, "--density", density, "--patch-file", file, "--task", "uni")
    files = (tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    shown = run("merge-multi", pair / "base", *files, "--method", "patches", "-o", tmp_path / "out")
    assert "uni (one.safetensors)" in shown.stdout
    assert "uni (two.safetensors)" in shown.stdout
    assert "config.json" not in shown.stderr  # they differ in use_cache alone
    tasks = json.loads((tmp_path / "out" / "tailor_report.json").read_text())["options"]["tasks"]
    assert tasks == ["uni (one.safetensors)", "uni (two.safetensors)"]


def test_the_plan_of_a_patch_file_is_an_upper_bound(pair, tmp_path):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for file in (pair / "tuned").iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    (tuned / "tokenizer.json").write_text((tuned / "tokenizer.json").read_text() + " " * 300_000)
    file = tmp_path / "p.safetensors"
    for density in ("0.01", "0.9"):
        arguments = ("patch", pair / "base", tuned, *PLAIN, "--density", density, "--patch-file", file, "--overwrite")
        told = json.loads(run(*arguments, "--dry-run", "--json").stdout)["patch_bytes"]
        run(*arguments)
        assert file.stat().st_size <= told


def test_a_gguf_file_is_named_with_the_way_out(pair, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00\xc3\x28")
    for arguments in (
        ("inspect", file),
        ("inspect", tmp_path),
        ("patch", file, pair / "tuned", *PLAIN, "-o", tmp_path / "out"),
    ):
        assert "convert_hf_to_gguf" in refused(*arguments, mentions=["GGUF"])


def test_a_folder_of_checkpoints_names_the_last(pair, tmp_path):
    for step in (40, 120):
        (tmp_path / f"checkpoint-{step}").symlink_to(pair / "tuned")
    shown = refused("patch", pair / "base", tmp_path, *PLAIN, "-o", pair / "out")
    assert "checkpoint-120" in shown


def test_a_picture_in_a_folder_that_is_not_there_says_so(pair, tmp_path):
    pytest.importorskip("matplotlib")
    run("patch", pair / "base", pair / "tuned", *PLAIN, "-o", tmp_path / "out")
    shown = refused("inspect", tmp_path / "out", "--plot", tmp_path / "no" / "p.png", mentions=["no folder"])
    assert ".pdf" not in shown
