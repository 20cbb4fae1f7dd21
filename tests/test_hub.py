"""Models by their names on the Hub: from a cache that the tests lay out, without a network."""

import json
import os
import shutil

import pytest
from helpers import make_adapter, make_pair, read_tensors, refused, run

from tailorcli import TailorError, hub
from tailorcli.checkpoint.folder import Checkpoint

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


def lay_out(cache, name, folder, commit=COMMIT, ref="main"):
    """``folder`` as the Hub's cache holds it: blobs, and a snapshot of links to them."""
    root = cache / ("models--" + name.replace("/", "--"))
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for file in folder.iterdir():
        blob = root / "blobs" / f"{commit[:8]}-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pair and an adapter on the same base, as folders and as the Hub's cache."""
    folder = make_pair(tmp_path_factory.mktemp("models"))
    make_adapter(folder / "lora")
    cache = folder / "cache"
    for name in ("base", "tuned"):
        lay_out(cache, f"org/{name}", folder / name)
    lay_out(cache, "org/tuned", folder / "base", OTHER, "first")
    config = json.loads((folder / "lora/adapter/adapter_config.json").read_text())
    (folder / "lora/adapter/adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "org/lora-base"})
    )
    lay_out(cache, "org/lora", folder / "lora" / "adapter")
    lay_out(cache, "org/lora-base", folder / "lora" / "base")
    return folder


@pytest.fixture
def cached(models, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(models / "cache"))
    monkeypatch.chdir(tmp_path)
    return models


def test_a_name_is_the_folder_of_its_revision(cached):
    assert hub.local_folder("org/tuned").name == COMMIT
    assert hub.local_folder("org/tuned@first").name == OTHER
    assert hub.local_folder(f"org/tuned@{OTHER}").name == OTHER
    assert hub.hub_origin(hub.local_folder("org/tuned@first")) == f"org/tuned@{OTHER}"
    assert hub.hub_origin(cached / "tuned") == ""


def test_a_path_that_is_there_wins(cached, tmp_path):
    (tmp_path / "org" / "tuned").mkdir(parents=True)
    assert hub.local_folder("org/tuned") == hub.Path("org/tuned")
    assert hub.local_folder(tmp_path / "org" / "tuned") == tmp_path / "org" / "tuned"


def test_a_tilde_is_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.local_folder("~/model") == tmp_path / "model"
    assert hub.local_folder("~nobody-of-this-name/model") == hub.Path("~nobody-of-this-name/model")


@pytest.mark.parametrize("text", ["model", "a/b/c", "/a/b", "./a", "../b", "a/b.safetensors", "a/report.json", "a/b@"])
def test_what_is_no_name_of_the_hub_stays_a_path(text):
    assert not hub.is_id(text)
    assert hub.local_folder(text) == hub.Path(text)


SMALL = ("--num-samples", 6, "--seq-len", 20)


def test_every_command_takes_names_and_gives_the_bytes_that_paths_give(cached, tmp_path):
    data = ("--data", cached / "data.jsonl", *SMALL)
    run("calibrate", "org/tuned", *data, "-o", "stats")
    manifest = json.loads((tmp_path / "stats" / "manifest.json").read_text())
    assert manifest["model"]["hub"] == f"org/tuned@{COMMIT}"
    run("calibrate", cached / "tuned", *data, "-o", "plain-stats")
    assert "hub" not in json.loads((tmp_path / "plain-stats" / "manifest.json").read_text())["model"]
    run("score", "org/base", "org/tuned", "--stats", "stats")
    file = tmp_path / "patch.safetensors"
    run("patch", "org/base", "org/tuned@main", "--stats", "stats", "-o", "out", "--patch-file", file)
    run("patch", cached / "base", cached / "tuned", "--stats", "plain-stats", "-o", "plain")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    report = json.loads((tmp_path / "out" / "tailor_report.json").read_text())
    assert report["inputs"]["base"]["hub"] == f"org/base@{COMMIT}"
    assert (
        json.loads((tmp_path / "out" / "tailor_run.json").read_text())["identity"]["tuned hub"] == f"org/tuned@{COMMIT}"
    )
    plain = json.loads((tmp_path / "plain" / "tailor_report.json").read_text())
    assert all(entry.keys() == {"path", "fingerprint"} for entry in plain["inputs"].values())
    assert (
        "already finished"
        in run(
            "patch", "org/base", "org/tuned", "--stats", "stats", "-o", "out", "--patch-file", file, "--resume"
        ).stdout
    )
    run("apply", "org/base", file, "-o", "applied")
    run("verify", "applied", "--base", "org/base", "--patch", file)
    run("merge-multi", "org/base", file, file, "--method", "patches", "-o", "merged")
    run("merge-multi", "org/base", file, file, "--tuned", "org/tuned", "--tuned", "org/tuned", "-o", "averaged")
    merged = json.loads((tmp_path / "averaged" / "tailor_report.json").read_text())["inputs"]
    hubs = {role: entry["hub"] for role, entry in merged.items() if "hub" in entry}
    assert hubs == {"base": f"org/base@{COMMIT}", "tuned 1": f"org/tuned@{COMMIT}", "tuned 2": f"org/tuned@{COMMIT}"}
    task = ("--task", f"new={cached / 'data.jsonl'}:text", "--limit", 3, "--seq-len", 20)
    run("evaluate", "org/base", "org/tuned", "out", *task)
    assert "21 tensors" in run("inspect", "org/base").stdout
    ends = ("--origin", "old", "--target", "new", "--density", 0.2, "--solver", "none", "--omega", 1)
    both = ("--task", f"old={cached / 'data.jsonl'}:text", *task)
    run("sweep", "org/base", "org/tuned", *both, *ends, "-o", "swept")
    run("patch", "org/base", "org/tuned", *data, "-o", "whole", "--no-retain")
    assert read_tensors(tmp_path / "whole").keys() == read_tensors(cached / "base").keys()


def test_an_adapter_finds_its_base_by_the_name_in_its_config(cached, tmp_path):
    run("calibrate", "org/lora", "--data", cached / "data.jsonl", *SMALL, "-o", "stats")
    run("patch", "org/lora-base", "org/lora", "--stats", "stats", "-o", "out")
    with Checkpoint.open(tmp_path / "out") as found, Checkpoint.open(cached / "lora" / "base") as base:
        assert found.tensors.keys() == base.tensors.keys()


def test_what_is_not_in_the_cache_is_one_error_with_the_command_that_helps(cached):
    for name, command in (
        ("org/other", "hf download org/other"),
        ("org/tuned@second", "hf download org/tuned --revision second"),
    ):
        shown = refused("inspect", name, mentions=[name, "not in the Hub's cache"])
        assert command in shown
        refused("patch", "org/base", name, "--method", "interpolate", "-o", "out", mentions=[name], output="out")
        refused("calibrate", name, "--data", cached / "data.jsonl", "-o", "stats", mentions=[name])


def test_part_of_a_model_and_pickles_alone_are_refused(cached, models, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.json").write_text("{}")
    lay_out(cache, "org/config-alone", part)
    assert "hf download org/config-alone" in refused("inspect", "org/config-alone", mentions=["no safetensors here"])
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    lay_out(cache, "org/part", part)
    assert "hf download org/part" in refused("inspect", "org/part", mentions=["only partly", "model-1.safetensors"])
    (part / "model.safetensors.index.json").unlink()
    (part / "pytorch_model.bin").write_bytes(b"")
    lay_out(cache, "org/pickled", part)
    assert "save_pretrained" in refused("inspect", "org/pickled", mentions=["pickled"])


@pytest.mark.parametrize(
    ("kind", "said", "hint"),
    [
        ("GatedRepoError", "gated", "hf auth login"),
        ("RepositoryNotFoundError", "knows no such model", "hf auth login"),
        ("RevisionNotFoundError", "no revision", "commits/main"),
        ("LocalEntryNotFoundError", "cannot be reached", "hf download org/model --revision v2"),
        ("OSError", "cannot fetch", "hf download org/model --revision v2"),
    ],
)
def test_each_failure_of_the_hub_is_one_error(monkeypatch, kind, said, hint):
    from huggingface_hub import errors

    asked = {}

    def fail(repo, **settings):
        asked.update(settings)
        if kind == "OSError":
            raise OSError("no space left")
        made = getattr(errors, kind)
        raise made.__new__(made)  # without the response of a server

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(TailorError) as caught:
        hub.local_folder("org/model@v2")
    assert said in caught.value.message
    assert hint in caught.value.hint
    assert asked["revision"] == "v2"
    assert "*.py" not in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".pkl")) for pattern in asked["allow_patterns"])
    with pytest.raises(TailorError):
        hub.local_folder("org/model@v2", code=True)
    assert "*.py" in asked["allow_patterns"]
