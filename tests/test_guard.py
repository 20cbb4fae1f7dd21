"""No input is written over, nothing that is not ours is replaced, one run at a time, inputs that change are noticed."""

import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from helpers import folder_digest, invoke, make_pair, refused, run, write_data

import tailorcli.guard as guard_module
from tailorcli import Checkpoint, PatchOptions, Stats, TailorError, calibrate_model, patch_checkpoint
from tailorcli.errors import OutputError
from tailorcli.guard import LOCK, OutputLock, check_plot_file, check_result, path_text, protect
from tailorcli.runs import outputs

SALIENCE = ("--omega", 1, "--solver", "none")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair with statistics, a patch file of it, a task and a picture; every command has its inputs here."""
    folder = make_pair(tmp_path_factory.mktemp("guard"))
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    run("patch", folder / "base", folder / "tuned", *SALIENCE, "--patch-file", folder / "patch.safetensors")
    write_data(folder / "old.jsonl", count=3, seed=1)
    write_data(folder / "new.jsonl", count=3, seed=2)
    return folder


def commands(pair):
    """Command -> its arguments but for the output, the option that names the output, and its inputs."""
    base, tuned, stats, data = (pair / name for name in ("base", "tuned", "stats", "data.jsonl"))
    tasks = ("--task", f"old={pair / 'old.jsonl'}:text", "--task", f"new={pair / 'new.jsonl'}:text")
    roles = ("--origin", "old", "--target", "new")
    patch = pair / "patch.safetensors"
    sweep = ("sweep", base, tuned, "--stats", stats, *tasks, *roles)
    return {
        "calibrate": (("calibrate", tuned, "--data", data), "-o", (tuned, data)),
        "held-out": (
            ("calibrate", tuned, "--synthetic", "--data", data, "-o", pair / "s"),
            "--held-out",
            (tuned, data),
        ),
        "score": (("score", base, tuned, "--stats", stats), "-o", (base, tuned, stats)),
        "patch": (("patch", base, tuned, "--stats", stats), "-o", (base, tuned, stats)),
        "patch file": (("patch", base, tuned, "--stats", stats), "--patch-file", (base, tuned, stats)),
        "apply": (("apply", base, patch), "-o", (base, patch)),
        "merge": (("merge-multi", base, patch, patch, "--method", "patches"), "-o", (base, patch)),
        "merge file": (("merge-multi", base, patch, patch, "--method", "patches"), "--patch-file", (base, patch)),
        "evaluate": (("evaluate", base, tuned, *tasks, "--limit", 1), "-o", (base, tuned, pair / "old.jsonl")),
        "evaluate plot": (
            ("evaluate", base, tuned, *tasks, *roles, "--limit", 1),
            "--plot",
            (base, tuned, pair / "old.jsonl"),
        ),
        "sweep": (sweep, "-o", (base, tuned, stats, pair / "old.jsonl")),
        "sweep plot": ((*sweep, "-o", pair / "swept"), "--plot", (base, tuned, stats, pair / "old.jsonl")),
        "inspect": (("inspect", stats), "--plot", (stats,)),
    }


FILES = {"held-out": "x.jsonl", "score": "r.json", "evaluate": "r.json", "inspect": "p.png"}
FILES |= {"patch file": "p.safetensors", "merge file": "p.safetensors", "evaluate plot": "p.png", "sweep plot": "p.png"}


def everything(pair):
    """All that lies in the folder of the inputs: names and bytes."""
    return folder_digest(pair, skip=())


@pytest.mark.parametrize("name", list(commands(Path())))
@pytest.mark.parametrize("kind", ["itself", "inside", "above", "by a symbolic link", "by a hard link"])
def test_no_output_is_an_input_or_lies_in_one(pair, tmp_path, name, kind):
    """Whatever the command and however the path is written: one error, and every input as it was."""
    command, option, inputs = commands(pair)[name]
    before = everything(pair)
    for number, path in enumerate(inputs):
        out = output_at(path, kind, tmp_path / str(number), name)
        if out is None:
            continue
        shown = invoke(*command, option, out, *(("--overwrite",) if has_overwrite(name) else ()))
        assert shown.exit_code == 1, (path, out, shown.output, shown.exception)
        assert shown.stderr.count("error: ") == 1
        assert everything(pair) == before, (path, out)


def has_overwrite(name):
    return name.split()[0] in ("calibrate", "held-out", "patch", "apply", "merge")


def output_at(path, kind, folder, name):
    """An output that would hurt the input ``path``; None where there is none of the kind."""
    folder.mkdir()
    file = FILES.get(name)
    if kind == "itself":
        return path
    if kind == "inside":
        return path / (file or "deep") if path.is_dir() else None
    if kind == "above":
        return None if file else path.parent
    if kind == "by a symbolic link":
        (folder / "link").symlink_to(path, target_is_directory=path.is_dir())
        return folder / "link" / (file or "deep") if path.is_dir() else folder / "link"
    if not file:  # of a folder there are none
        return None
    source = next(iter(sorted(path.glob("*.json"))), None) if path.is_dir() else path
    out = folder / file
    os.link(source, out)
    return out


def test_files_beside_the_inputs_are_fine(pair, tmp_path):
    protect([tmp_path / "out", tmp_path / "r.json", None], [tmp_path / "base", tmp_path / "data.jsonl", None])
    protect([pair / "out", pair / "basement"], [pair / "base", pair / "data.jsonl"])


@pytest.mark.parametrize("content", ["{}", "my notes", '{"command": "deploy"}', "[1]", "\\0"])
def test_a_result_replaces_only_results_of_ours(pair, tmp_path, content):
    file = tmp_path / "r.json"
    file.write_text(content)
    for command in (commands(pair)["score"][0], commands(pair)["evaluate"][0]):
        refused(*command, "-o", file, mentions=[file])
        assert file.read_text() == content
    file.unlink()
    run(*commands(pair)["score"][0], "-o", file)
    run(*commands(pair)["score"][0], "-o", file)
    check_result(None, [pair], "score")
    refused(*commands(pair)["evaluate"][0], "-o", file, mentions=["not a result of tailorcli evaluate"])
    refused(*commands(pair)["score"][0], "-o", file / "inside.json", mentions=["which is a file"])


@pytest.mark.parametrize("name", ["evaluate", "evaluate plot", "score"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(pair, tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)  # root may write anywhere
    for work in ("tailorcli.evaluation.evaluate.evaluate_models", "tailorcli.patching.patch.score_checkpoint"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("it was worked on before"))
    command, option, _ = commands(pair)[name]
    for file in (tmp_path / "r.png", tmp_path / "new" / "r.png"):
        refused(*command, option, file, mentions=[f"cannot write {file}", tmp_path])


def test_devices_and_pipes_are_not_replaced(pair, tmp_path):
    """Results are written beside their place and moved there: as root that would put a file in a device's place."""
    os.mkfifo(tmp_path / "pipe.json")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("score", "evaluate"):
        refused(*commands(pair)[name][0], "-o", tmp_path / "pipe.json", mentions=["pipe"])
    refused("inspect", pair / "stats", "--plot", tmp_path / "pipe.png", mentions=["pipe"])
    for check in (partial(check_result, command="score"), check_plot_file):
        with pytest.raises(OutputError, match="device or a pipe"):
            check("/dev/null", [pair])
    assert not list(tmp_path.glob("*.part"))


def test_a_picture_replaces_only_pictures_of_ours(pair, tmp_path):
    pytest.importorskip("matplotlib")
    for suffix in ("png", "pdf", "svg"):
        file = tmp_path / f"p.{suffix}"
        run("inspect", pair / "stats", "--plot", file)
        run("inspect", pair / "stats", "--plot", file)  # over the one before
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    notes = tmp_path / "notes.pdf"
    notes.write_text("the tailorcli notes")
    for file in (photo, notes):
        before = file.read_bytes()
        refused("inspect", pair / "stats", "--plot", file, mentions=[file])
        assert file.read_bytes() == before
    check_plot_file(tmp_path / "new.png", [pair])


@pytest.mark.parametrize("names", [["README.md", "config.json"], ["thesis.tex"], ["sub/data.csv"]])
def test_overwrite_replaces_no_foreign_folder(pair, tmp_path, names):
    """Also one without weights, whose files side files would replace."""
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    before = folder_digest(out)
    for name in ("calibrate", "patch", "apply", "merge"):
        refused(*commands(pair)[name][0], "-o", out, "--overwrite", mentions=[out])
        assert folder_digest(out) == before, name
    refused(*commands(pair)["sweep"][0], "-o", out, mentions=[out])
    refused("demo", "--quick", "--overwrite", "-o", out, mentions=[out])
    assert folder_digest(out) == before


def test_folders_that_only_look_like_ours(pair, tmp_path):
    """Names alone do not make a folder ours where something would be removed."""
    (tmp_path / "swept" / "work").mkdir(parents=True)
    (tmp_path / "swept" / "work" / "thesis.tex").write_text("mine")
    (tmp_path / "points" / "settings").mkdir(parents=True)
    (tmp_path / "points" / "settings" / "mine.json").write_text("{}")
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "manifest.json").write_text('{"name": "my app"}')
    (tmp_path / "demo" / "base").mkdir(parents=True)
    (tmp_path / "demo" / "demo.json").write_text("{}")
    (tmp_path / "demo" / "base" / "mine").write_text("mine")
    before = folder_digest(tmp_path)
    for name in ("swept", "points"):
        refused(*commands(pair)["sweep"][0], "-o", tmp_path / name, mentions=[tmp_path / name])
    refused(*commands(pair)["calibrate"][0], "-o", tmp_path / "stats", "--overwrite", mentions=[tmp_path / "stats"])
    refused("demo", "--quick", "--overwrite", "-o", tmp_path / "demo", mentions=[tmp_path / "demo"])
    assert folder_digest(tmp_path) == before


def test_held_out_samples_are_not_replaced_unasked(pair, tmp_path):
    (tmp_path / "x.jsonl").write_text("mine")
    command = ("calibrate", pair / "base", "--synthetic", "--num-samples", 2, "--seq-len", 8, "-o", tmp_path / "s")
    refused(*command, "--held-out", tmp_path / "x.jsonl", mentions=["x.jsonl"])
    assert (tmp_path / "x.jsonl").read_text() == "mine"


def test_a_link_in_the_output_is_not_written_through(pair, tmp_path):
    """A side file of OUT that is a link to BASE's own (``cp -as`` makes such folders) leaves that as it was."""
    shutil.copytree(pair / "base", tmp_path / "base")
    arguments = (tmp_path / "base", pair / "tuned", tmp_path / "out", None)
    patch_checkpoint(*arguments, PatchOptions(omega=1.0, solver="none"))
    (tmp_path / "base" / "config.json").write_text((tmp_path / "base" / "config.json").read_text() + "\n")
    before = folder_digest(tmp_path / "base")
    for link in (os.symlink, os.link):
        (tmp_path / "out" / "config.json").unlink()
        link(tmp_path / "base" / "config.json", tmp_path / "out" / "config.json")
        patch_checkpoint(*arguments, PatchOptions(omega=1.0, solver="none", overwrite=True))
        assert folder_digest(tmp_path / "base") == before
        assert not (tmp_path / "out" / "config.json").is_symlink()


# --- two runs on one output -------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["with locks", "without"])
def test_one_run_at_a_time(pair, tmp_path, monkeypatch, system):
    if system == "without":
        monkeypatch.setattr(guard_module, "lock_descriptor", lambda descriptor: None)
    outputs_of = {
        "patch": tmp_path / "out",
        "patch file": tmp_path / "p.safetensors",
        "apply": tmp_path / "a",
        "merge": tmp_path / "m",
        "calibrate": tmp_path / "s",
        "sweep": tmp_path / "w",
    }
    for name, out in outputs_of.items():
        command, option, _ = commands(pair)[name]
        with OutputLock(out, folder=name != "patch file"):
            shown = refused(*command, option, out, mentions=["another run is writing", f"process {os.getpid()}"])
            assert ("remove" in shown) == (system == "without")
        assert not out.exists()
    run("patch", pair / "base", pair / "tuned", *SALIENCE, "-o", tmp_path / "out")
    assert not list(tmp_path.rglob("*.lock*"))


@pytest.mark.parametrize("command", ["calibrate", "probe", "finetune", "patch", "merge-multi", "sweep"])
def test_a_run_that_is_refused_leaves_no_folder(pair, tmp_path, command):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    base, tuned = pair / "base", pair / "tuned"
    tasks = ("--task", f"old={pair / 'old.jsonl'}:text", "--task", f"new={empty}:text", "--origin", "old")
    given = {
        "calibrate": (tuned, "--data", empty),
        "probe": (base, "--data", empty),
        "finetune": (base, "--data", empty),
        "patch": (base, tuned, "--method", "graft", "--graft-data", empty),
        "merge-multi": (tuned, pair / "patch.safetensors", pair / "patch.safetensors", "--method", "patches"),
        "sweep": (base, tuned, *tasks, "--target", "new", "--method", "magnitude"),
    }
    refused(command, *given[command], "-o", tmp_path / "results" / "first" / "out")
    assert list(tmp_path.iterdir()) == [empty]


def test_a_file_of_the_users_own_beside_a_patch_file_is_no_lock(pair, tmp_path):
    file = tmp_path / "p.safetensors"
    own = [tmp_path / "p.safetensors.lock", tmp_path / ".p.safetensors.lock"]
    for path in own:
        path.write_text("mine")
    for more in ((), ("--resume",), ("--overwrite",)):
        run("patch", pair / "base", pair / "tuned", *SALIENCE, "--patch-file", file, *more)
        assert sorted(tmp_path.iterdir()) == sorted([file, *own])
        assert [path.read_text() for path in own] == ["mine", "mine"]


def test_a_killed_run_leaves_no_lock(tmp_path):
    """The lock's file stays, and the next run takes it over."""
    code = "import os, sys, pathlib; from tailorcli.guard import OutputLock\n"
    code += "OutputLock(pathlib.Path(sys.argv[1]), folder=True); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert (tmp_path / "out" / LOCK).exists()
    OutputLock(tmp_path / "out", folder=True).release()
    assert not (tmp_path / "out" / LOCK).exists()


def test_many_threads_take_turns(tmp_path):
    """A lock file that goes while another waits to open it does not let two in."""
    inside, most, taken = [0], [0], [0]
    guard = threading.Lock()

    def worker():
        for _ in range(40):
            try:
                with OutputLock(tmp_path / "out", folder=True):
                    with guard:
                        inside[0] += 1
                        taken[0] += 1
                        most[0] = max(most[0], inside[0])
                    with guard:
                        inside[0] -= 1
            except OutputError:
                pass

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert taken[0] > 10


# --- inputs that change while they are read ---------------------------------------------------------------------


@pytest.fixture
def moving(pair, tmp_path):
    """A copy of all inputs, to be written to."""
    shutil.copytree(pair, tmp_path / "in")
    return tmp_path / "in"


def rewrite(file):
    """The same bytes again, in place, later than before."""
    content = file.read_bytes()
    with file.open("r+b") as stream:
        stream.write(content)
    os.utime(file, ns=(1, 1))  # whatever the clock's resolution


CHANGED = {
    "patch": ["base/model.safetensors", "tuned/model.safetensors", "stats/hessians.safetensors", "tuned/config.json"],
    "apply": ["base/model.safetensors", "patch.safetensors"],
    "merge": ["base/model.safetensors", "patch.safetensors"],
    "calibrate": ["tuned/model.safetensors", "data.jsonl"],
}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in CHANGED.items() for file in files])
def test_an_input_that_changes_meanwhile_is_noticed(moving, tmp_path, monkeypatch, name, file):
    import tailorcli.checkpoint.writer as writer_module
    from tailorcli.calibration.stats_writer import StatsWriter

    place = StatsWriter if name == "calibrate" else writer_module.CheckpointWriter
    method = "store_samples" if name == "calibrate" else "drain"
    if name == "calibrate":
        place, method = StatsWriter, "write"
    original = getattr(place, method)

    def changing(self, *arguments):
        rewrite(moving / file)
        return original(self, *arguments)

    monkeypatch.setattr(place, method, changing)
    out = tmp_path / "out"
    refused(*commands(moving)[name][0], "-o", out, mentions=[moving / file, "changed while it was read"], output=out)
    assert not list(tmp_path.glob("out/*.part"))
    monkeypatch.undo()
    run(*commands(moving)[name][0], "-o", out)


def test_a_patch_file_of_moving_inputs_is_not_left(moving, tmp_path, monkeypatch):
    import tailorcli.patchfile.writer as writer_module

    original = writer_module.PatchWriter.drain
    monkeypatch.setattr(
        writer_module.PatchWriter,
        "drain",
        lambda self: rewrite(moving / "tuned" / "model.safetensors") or original(self),
    )
    file = tmp_path / "p.safetensors"
    refused(*commands(moving)["patch"][0], "--patch-file", file, mentions=["changed while it was read"])
    assert not list(tmp_path.glob("p.*"))


def test_verify_notices_a_change(moving, monkeypatch):
    import tailorcli.patching.verify as verify_module

    run("patch", moving / "base", moving / "tuned", *SALIENCE, "-o", moving / "out")
    original = verify_module._part_of

    def changing(*arguments):
        rewrite(moving / "out" / "model.safetensors")
        return original(*arguments)

    monkeypatch.setattr(verify_module, "_part_of", changing)
    refused("verify", moving / "out", "--base", moving / "base", mentions=["changed while it was read"])


# --- a kill while an old output is cleared ----------------------------------------------------------------------


@pytest.mark.parametrize("shard", [None, 9_000], ids=["one file", "shards"])
def test_killed_at_every_step_of_the_clearing(pair, tmp_path, monkeypatch, shard):
    """Nothing loads that is not whole; --resume and --overwrite end with the bytes of an uninterrupted run."""
    inputs = (pair / "base", pair / "tuned")
    options = {"omega": 1.0, "solver": "none"}
    patch_checkpoint(*inputs, tmp_path / "whole", None, PatchOptions(**options))
    expected = folder_digest(tmp_path / "whole")
    patch_checkpoint(*inputs, tmp_path / "old", None, PatchOptions(**options, density=0.3, max_shard_size=shard))
    earlier = folder_digest(tmp_path / "old")
    steps = 0
    while steps < 200:
        for again in ("resume", "overwrite"):
            out = tmp_path / f"{again}{steps}"
            shutil.copytree(tmp_path / "old", out)
            killed = clear_until(
                monkeypatch,
                out,
                steps,
                lambda o=out: patch_checkpoint(*inputs, o, None, PatchOptions(**options, overwrite=True)),
            )
            try:
                Checkpoint.open(out).close()
            except TailorError:
                pass
            else:  # as it was before, or finished
                assert folder_digest(out).items() >= {k: v for k, v in earlier.items() if "model" in k}.items() or (
                    folder_digest(out) == expected
                )
            if killed and (out / "tailor_run.json").exists():
                with pytest.raises(TailorError, match="another run"):  # nothing is lost yet: it is the old output still
                    patch_checkpoint(*inputs, out, None, PatchOptions(**options, resume=True))
                continue
            patch_checkpoint(*inputs, out, None, PatchOptions(**options, **{again: True}))
            assert folder_digest(out) == expected, (steps, again)
            shutil.rmtree(out)
        if not killed:
            break
        steps += 1
    assert steps >= 5


def clear_until(monkeypatch, out, steps, work):
    """Run ``work``, of which the step after so many removals within the clearing is a kill; whether it came to that."""
    left, real_clear = [steps], outputs._clear
    with monkeypatch.context() as patched:

        def step(real):
            def counted(*arguments, **options):
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return real(*arguments, **options)

            return counted

        def clear(folder):
            with monkeypatch.context() as inner:
                for name in ("unlink", "rmdir", "mkdir"):
                    inner.setattr(os, name, step(getattr(os, name)))
                real_clear(folder)
                if left[0] == 0:  # behind the last of them
                    left[0] = -1
                    raise KeyboardInterrupt

        patched.setattr(outputs, "_clear", clear)
        try:
            work()
        except KeyboardInterrupt:
            return True
    return False


def test_a_finished_output_whose_weights_are_gone_is_made_again(pair, tmp_path):
    inputs = (pair / "base", pair / "tuned", tmp_path / "out", None)
    options = PatchOptions(omega=1.0, solver="none", max_shard_size=9_000)
    patch_checkpoint(*inputs, options)
    expected = folder_digest(tmp_path / "out")
    next(iter(sorted((tmp_path / "out").glob("model-*.safetensors")))).unlink()
    patch_checkpoint(*inputs, PatchOptions(omega=1.0, solver="none", max_shard_size=9_000, resume=True))
    assert folder_digest(tmp_path / "out") == expected


# --- paths that are no UTF-8 ------------------------------------------------------------------------------------


def test_paths_that_are_no_utf8_are_stored_safely(pair, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    for name in ("base", "tuned"):
        shutil.copytree(pair / name, folder / name)
    shutil.copy(pair / "data.jsonl", folder)
    calibrate_model(pair / "tuned", folder / "data.jsonl", folder / "stats")
    Stats.open(folder / "stats").close()
    command = ("patch", folder / "base", folder / "tuned", "--stats", folder / "stats")
    run(*command, "-o", folder / "out")
    for number, file in enumerate((tmp_path / "p.safetensors", folder / "p.safetensors")):
        run(*command, "--patch-file", file)
        assert (
            json.loads(run("inspect", file, "--json").stdout)["report"]["inputs"]["base"]["path"]
            == f"{tmp_path}/caf\\xe9/base"
        )
        run("apply", folder / "base", file, "-o", tmp_path / f"applied{number}")
        run("verify", tmp_path / f"applied{number}", "--base", folder / "base", "--patch", file)
    run("inspect", folder / "out")
    run("inspect", folder / "stats")
    refused("calibrate", folder / "tuned", "--data", folder / "data.jsonl", "-o", folder / "s", mentions=["tokenizer"])
    assert path_text("/tmp/ü") == "/tmp/ü"


def test_what_lies_in_a_folder_is_watched(tmp_path):
    from tailorcli.guard import Watch

    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.jsonl").write_text("one")
    watch = Watch([tmp_path])
    watch.require_unchanged()
    (tmp_path / "deep" / "d.jsonl").write_text("more")
    with pytest.raises(TailorError, match="was changed while it was read"):
        watch.require_unchanged()
