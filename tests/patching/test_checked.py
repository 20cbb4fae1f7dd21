"""patch --check-propagation: kept where it helps on samples that it was not fitted on."""

import json

import pytest
from helpers import broken_off, folder_digest, invoke, make_pair, refused, run, with_statistics

from tailorcli import PatchFile
from tailorcli.checkpoint.writer import CheckpointWriter
from tailorcli.data.samples import fitted_on, held_out
from tailorcli.guard import lock_file

REPORTS = ("tailor_run.json", "tailor_report.json", "README.md")  # which name the options


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return with_statistics(make_pair(tmp_path_factory.mktemp("pair")))


def command(pair, *more):
    stats = ("--stats", pair / "stats", "--retain", pair / "retain")
    return ("patch", pair / "base", pair / "tuned", *stats, "--density", 0.3, *more)


def losing(monkeypatch, name):
    """The patch of this name is the worse one; what is measured is real but for that."""
    from tailorcli.training.run import Teaching

    measure = Teaching.divergences

    def measured(teaching, file, materials):
        found = measure(teaching, file, materials)
        assert all(value > 0 for value in found.values())
        return {kind: value + 9.0 * (file.path.stem == name) for kind, value in found.items()}

    monkeypatch.setattr(Teaching, "divergences", measured)


def test_every_tenth_sample_is_held_out_and_the_others_are_fitted_on():
    assert held_out([*range(21)]) == [0, 10, 20]
    assert fitted_on([*range(21)]) == [n for n in range(21) if n % 10]
    assert fitted_on([5]) == [5]


def test_where_it_loses_the_plain_patch_is_written(pair, tmp_path, monkeypatch):
    losing(monkeypatch, "propagated")
    shown = run(*command(pair, "--check-propagation", "-o", tmp_path / "out"))
    assert "given up: each layer keeps its plain patch" in " ".join(shown.stdout.split())
    run(*command(pair, "--no-propagate", "-o", tmp_path / "plain"))
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(tmp_path / "plain", REPORTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]
    report = json.loads((tmp_path / "out" / "tailor_report.json").read_text())
    assert report["propagation"]["kept"] is False
    assert report["options"]["check_propagation"]
    assert "propagated" not in report["totals"]
    assert "--check-propagation" in (tmp_path / "out" / "README.md").read_text()


def test_where_it_helps_it_is_kept_and_has_not_seen_what_it_was_measured_on(pair, tmp_path, monkeypatch):
    import tailorcli.patching.propagate as module

    losing(monkeypatch, "plain")
    with broken_off(CheckpointWriter, 5):
        raise invoke(*command(pair, "--check-propagation", "-o", tmp_path / "out")).exception
    assert sorted(path.name for path in (tmp_path / "out.check").iterdir()) == [
        "plain.safetensors",
        "propagated.safetensors",
    ]
    for name in ("plain", "propagated"):  # of a kill while these were written
        lock_file(tmp_path / "out.check" / f"{name}.safetensors", folder=False).touch()
    (tmp_path / "out.check" / "hidden-0a.part").touch()  # of one while hidden states were put into a file
    run(*command(pair, "--check-propagation", "-o", tmp_path / "out", "--resume"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    report = json.loads((tmp_path / "out" / "tailor_report.json").read_text())
    assert report["propagation"]["kept"] is True
    assert report["totals"]["propagated"] > 0
    assert "already finished" in run(*command(pair, "--check-propagation", "-o", tmp_path / "out", "--resume")).stdout
    run(*command(pair, "-o", tmp_path / "all"))
    assert folder_digest(tmp_path / "out", REPORTS) != folder_digest(tmp_path / "all", REPORTS)
    monkeypatch.setattr(module, "fitted_on", lambda samples: samples)
    run(*command(pair, "--check-propagation", "-o", tmp_path / "same", "--patch-file", tmp_path / "p.safetensors"))
    assert folder_digest(tmp_path / "same", REPORTS) == folder_digest(tmp_path / "all", REPORTS)
    with PatchFile.open(tmp_path / "p.safetensors") as file:
        assert file.report().propagation == json.loads(json.dumps(file.report().propagation))


def test_what_it_cannot_check_is_one_error(pair, tmp_path):
    refused(*command(pair, "--check-propagation", "--no-propagate", "-o", tmp_path / "o"), mentions=["propagated"])
    (tmp_path / "o.check").mkdir()
    (tmp_path / "o.check" / "thesis.txt").write_text("mine")
    for how in ((), ("--dry-run",), ("--distill", "--dry-run")):
        refused(*command(pair, "--check-propagation", "-o", tmp_path / "o", *how), mentions=["o.check"])
    assert (tmp_path / "o.check" / "thesis.txt").read_text() == "mine"


def test_the_whole_job_takes_it_in_steps(pair, tmp_path):
    data = ("--data", pair / "data.jsonl", "--num-samples", 12, "--seq-len", 24, "--check-propagation")
    job = ("patch", pair / "base", pair / "tuned", *data, "-o", tmp_path / "out", "--dry-run")
    shown = run(*job)
    assert "not in one pass: --check-propagation" in shown.stdout
    assert "and plainly, to write the better of both" in " ".join(shown.stdout.split())
    (tmp_path / "out.check").write_text("mine")
    refused(*job, mentions=["out.check"])
