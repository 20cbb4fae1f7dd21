"""The journal vouches for nothing that is not on the disk yet."""

import os
from threading import Event

import pytest

from tailorcli.checkpoint import journal as journal_module
from tailorcli.checkpoint.journal import Journal
from tailorcli.errors import OutputError


def test_a_line_is_only_written_after_its_data_is_synced(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.start({"run": 1})
    first = journal.path.read_text()
    seen = []
    monkeypatch.setattr(journal_module, "sync_data", lambda file: seen.append((file, journal.path.read_text())))
    with (tmp_path / "data").open("wb") as data:
        journal.add({"name": "a", "record": {}}, 4, data.fileno())
        assert journal.path.read_text() == first  # lines wait until many bytes are synced at once
        journal.sync()
        assert seen == [(data.fileno(), first)]
        assert journal.path.read_text().count("\n") == 2


def test_data_that_cannot_be_synced_is_not_vouched_for(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.start({"run": 1})
    first = journal.path.read_text()

    def fail(file):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(journal_module, "sync_data", fail)
    with (tmp_path / "data").open("wb") as data:
        journal.add({"name": "a", "record": {}}, 4, data.fileno())
        with pytest.raises(OutputError, match="no space"):
            journal.sync()
    assert journal.path.read_text() == first


def test_much_data_is_synced_while_more_is_written(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.start({"run": 1})
    first, on_disk = journal.path.read_text(), Event()
    monkeypatch.setattr(journal_module, "_SYNC_BYTES", 4)
    monkeypatch.setattr(journal_module, "sync_data", lambda file: on_disk.wait(30))
    with (tmp_path / "data").open("wb") as data:
        journal.add({"name": "a", "record": {}}, 4, data.fileno())
        journal.add({"name": "b", "record": {}}, 3, data.fileno())  # does not wait for the disk
        assert journal.path.read_text() == first
        on_disk.set()
        journal.sync()
    assert [line["name"] for line in journal.load({"run": 1}, tmp_path)] == ["a", "b"]


def test_what_could_not_be_synced_beside_is_told_with_the_next(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.start({"run": 1})
    failures = [OSError(28, os.strerror(28))]

    def fail_once(file):
        if failures:
            raise failures.pop()

    monkeypatch.setattr(journal_module, "_SYNC_BYTES", 4)
    monkeypatch.setattr(journal_module, "sync_data", fail_once)
    with (tmp_path / "data").open("wb") as data:
        journal.add({"name": "a", "record": {}}, 4, data.fileno())
        with pytest.raises(OutputError, match="no space"):
            journal.sync()
        journal.add({"name": "b", "record": {}}, 3, data.fileno())
        journal.sync()
    assert [line["name"] for line in journal.load({"run": 1}, tmp_path)] == ["b"]
