"""The journal vouches for nothing that is not on the disk yet."""

import os

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
