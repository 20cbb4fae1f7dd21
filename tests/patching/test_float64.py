"""Float64 pairs end to end: a change too small for float32 beside its weight is a change all the same."""

import pytest
import torch
from helpers import make_pair, read_tensors, run


@pytest.fixture(scope="module")
def tiny_changes(tmp_path_factory):
    """A float64 pair whose tensors moved by about 1e-9, with both statistics; ``other`` moved elsewhere."""
    from safetensors.torch import load_file, save_file

    folder = make_pair(tmp_path_factory.mktemp("float64"), dtype=torch.float64)
    base = load_file(folder / "base" / "model.safetensors")
    for seed, name in enumerate(("tuned", "other")):
        generator = torch.Generator().manual_seed(seed)
        moved = {
            key: value + 1e-9 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            for key, value in base.items()
        }
        if name == "other":
            (folder / name).mkdir()
            for file in (folder / "tuned").iterdir():
                (folder / name / file.name).write_bytes(file.read_bytes())
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})
    for model in ("base", "tuned", "other"):
        run("calibrate", folder / model, "--data", folder / "data.jsonl", "-o", folder / f"{model}-stats")
    return folder


WAYS = {
    "joint": [],
    "sequential": ["--solver", "sequential"],
    "magnitude": ["--method", "magnitude"],
    "global": ["--method", "magnitude", "--threshold", "global"],
    "dare": ["--method", "dare"],
    "interpolate": ["--method", "interpolate", "--weight", "1"],
}


@pytest.mark.parametrize("way", WAYS)
def test_density_one_gives_the_tuned_model_to_the_bit(tiny_changes, tmp_path, way):
    options = [*WAYS[way], *(["--density", "1"] if way != "interpolate" else [])]
    stats = ["--stats", tiny_changes / "tuned-stats"] if way in ("joint", "sequential") else []
    run("patch", tiny_changes / "base", tiny_changes / "tuned", *stats, *options, "-o", tmp_path / "out")
    expected = read_tensors(tiny_changes / "tuned")
    for name, value in read_tensors(tmp_path / "out").items():
        assert torch.equal(value, expected[name]), name


def test_propagation_keeps_the_change(tiny_changes, tmp_path):
    pair = tiny_changes / "base", tiny_changes / "tuned"
    both = "--stats", tiny_changes / "tuned-stats", "--retain", tiny_changes / "base-stats"
    run("patch", *pair, *both, "--density", "1", "--retain-weight", "0", "-o", tmp_path / "out")
    base, tuned, found = (read_tensors(path) for path in (*pair, tmp_path / "out"))
    for name, value in found.items():
        change = tuned[name] - base[name]
        assert float((value - tuned[name]).norm() / change.norm()) < 0.05, name


def test_score_and_graft_see_the_change(tiny_changes, tmp_path):
    pair = tiny_changes / "base", tiny_changes / "tuned"
    shown = run("score", *pair, "--stats", tiny_changes / "tuned-stats")
    assert "did not change" not in shown.output
    data = "--graft-data", tiny_changes / "data.jsonl", "--graft-steps", "1"
    run("patch", *pair, "--method", "graft", *data, "--density", "0.2", "-o", tmp_path / "out")
    base, tuned, found = (read_tensors(path) for path in (*pair, tmp_path / "out"))
    for name, value in found.items():
        kept = value != base[name]
        assert int(kept.sum()) == round(0.2 * kept.numel())
        assert torch.equal(value[kept], tuned[name][kept])


@pytest.mark.parametrize("method", ["joint", "average", "patches"])
def test_merging_keeps_the_changes(tiny_changes, tmp_path, method):
    files, sources = [], []
    for name in ("tuned", "other"):
        pair = tiny_changes / "base", tiny_changes / name
        files.append(tmp_path / f"{name}.safetensors")
        run("patch", *pair, "--stats", tiny_changes / f"{name}-stats", "--density", "1", "--patch-file", files[-1])
        sources += ["--tuned", pair[1], "--stats", tiny_changes / f"{name}-stats"] if method != "patches" else []
    run("merge-multi", tiny_changes / "base", *files, *sources, "--method", method, "-o", tmp_path / "out")
    base, one, two, found = (
        read_tensors(path) for path in (*(tiny_changes / n for n in ("base", "tuned", "other")), tmp_path / "out")
    )
    for name, value in found.items():
        mean = (one[name] + two[name]) / 2
        change = float((mean - base[name]).norm())
        assert change > 0
        assert float((value - mean).norm()) < (1e-3 if method != "joint" else 2.0) * change, name
        assert not torch.equal(value, base[name])
