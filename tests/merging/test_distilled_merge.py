"""merge-multi --distill: several teachers, each on its own task's samples, and the base on the retained ones."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import (
    folder_digest,
    make_model,
    make_pair,
    make_tokenizer,
    perturb,
    read_tensors,
    refused,
    run,
    write_data,
)

from tailorcli import (
    DistillOptions,
    MergeOptions,
    PatchFile,
    PatchOptions,
    TailorError,
    calibrate_model,
    distill_merge,
    patch_checkpoint,
    verify_checkpoint,
)
from tailorcli.errors import OutputError
from tailorcli.options import CalibrateOptions

DISTILL = DistillOptions(steps=6, batch_size=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A base with two tasks: fine-tuned models, statistics, patches; and the base's own statistics."""
    folder = make_pair(tmp_path_factory.mktemp("tasks"))
    (folder / "tuned").rename(folder / "tuned-a")
    perturb(make_model(), seed=7).save_pretrained(folder / "tuned-b")
    make_tokenizer().save_pretrained(folder / "tuned-b")
    write_data(folder / "data-b.jsonl", seed=5)
    (folder / "data.jsonl").rename(folder / "data-a.jsonl")
    options = CalibrateOptions(num_samples=12, seq_len=24)
    for task in ("a", "b"):
        calibrate_model(folder / f"tuned-{task}", folder / f"data-{task}.jsonl", folder / f"stats-{task}", options)
        pair = (folder / "base", folder / f"tuned-{task}", None, folder / f"stats-{task}")
        patch_checkpoint(*pair, PatchOptions(density=0.1), patch_file=folder / f"{task}.safetensors")
    calibrate_model(folder / "base", None, folder / "retain", CalibrateOptions(12, 24, synthetic=True))
    return folder


def inputs(tasks):
    both = [[tasks / f"{role}-{task}" for task in ("b", "a")] for role in ("tuned", "stats")]
    return [tasks / "a.safetensors", tasks / "b.safetensors"], *both


@pytest.mark.parametrize("method", ["joint", "patches", pytest.param("average", marks=pytest.mark.slow)])
def test_the_union_of_the_masks_is_trained_towards_all_teachers(tasks, tmp_path, method):
    patches, tuned, stats = inputs(tasks)
    options = MergeOptions(method=method)
    report = distill_merge(
        *(tasks / "base", patches, tmp_path / "out", tuned, stats, tasks / "retain", options, DISTILL),
        patch_file=tmp_path / "merged.safetensors",
    )
    found = report.distillation
    assert [len(each) for each in found["by_task"]] == [2] * len(found["steps"])
    assert found["new"] == [pytest.approx(sum(each) / 2) for each in found["by_task"]]
    objective = [a + b for a, b in zip(found["new"], found["retained"], strict=True)]
    assert objective[found["steps"].index(found["best"])] < objective[0]
    base, out = read_tensors(tasks / "base"), read_tensors(tmp_path / "out")
    files = [PatchFile.open(file) for file in patches]
    for name, value in out.items():
        union = files[0].mask(name) | files[1].mask(name)
        assert torch.equal(value[~union], base[name][~union])
    [file.close() for file in files]
    assert verify_checkpoint(tmp_path / "out", tasks / "base", tmp_path / "merged.safetensors").ok
    assert report.command == "merge-multi"


def test_a_merge_that_was_broken_off_is_finished_to_the_same_bytes(tasks, tmp_path, monkeypatch):
    import tailorcli.patching.distilled as module

    patches, tuned, stats = inputs(tasks)

    def merge(output, **more):
        options = MergeOptions(method="patches", **more)
        distill_merge(tasks / "base", patches, output, tuned, stats, tasks / "retain", options, DISTILL)

    def broken(*_, **__):
        raise KeyboardInterrupt

    merge(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_patched", broken)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "out")
    merge(tmp_path / "out", resume=True)
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "whole")


def test_a_finished_merge_is_one_of_the_same_samples_and_options(tasks, tmp_path):
    patches, tuned, stats = inputs(tasks)

    def merge(retain=tasks / "retain", output=tmp_path / "out", distill=DISTILL, **more):
        options = MergeOptions(method="patches", **more)
        return distill_merge(tasks / "base", patches, output, tuned, stats, retain, options, distill)

    assert not merge().is_earlier
    assert merge(resume=True).is_earlier
    calibrate_model(tasks / "base", tasks / "data-a.jsonl", tmp_path / "other", CalibrateOptions(12, 24))
    calibrate_model(tasks / "base", tasks / "data-a.jsonl", tmp_path / "one", CalibrateOptions(1, 24))
    for how in ({"retain": tmp_path / "other"}, {"distill": replace(DISTILL, weight=1.0)}, {"weights": (1.0, 3.0)}):
        with pytest.raises(OutputError, match="another run"):
            merge(**how, resume=True)
    for retain, what in ((stats[0], "from another model"), (tmp_path / "one", "has 1 sample")):
        with pytest.raises(TailorError, match=what):
            merge(retain, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_command_and_what_it_needs(tasks, tmp_path):
    patches, tuned, stats = inputs(tasks)
    named = [word for each in tuned for word in ("--tuned", each)]
    sampled = [word for each in stats for word in ("--stats", each)]
    how = (
        "--method",
        "patches",
        "--distill",
        "--retain",
        tasks / "retain",
        "--distill-steps",
        2,
        "-o",
        tmp_path / "out",
    )
    dry = run("merge-multi", tasks / "base", *patches, *named, *sampled, *how, "--dry-run")
    assert "at most 2 steps" in dry.stdout
    result = run("merge-multi", tasks / "base", *patches, *named, *sampled, *how, "--weight", 3, "--weight", 1)
    assert "distilled in 2 steps" in result.stdout
    found = json.loads((tmp_path / "out" / "tailor_report.json").read_text())["distillation"]
    assert found["new"] == [pytest.approx(0.75 * one + 0.25 * other) for one, other in found["by_task"]]
    assert "(the mean of 2 tasks by their weights)" in " ".join(result.stdout.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--retain retain --distill --distill-steps 2" in " ".join(card.replace("\\\n", " ").split())
    assert "and trained towards all of these models" in card
    run("inspect", tmp_path / "out")
    refused("merge-multi", tasks / "base", *patches, *named, *how, "--overwrite", mentions=["samples"])
