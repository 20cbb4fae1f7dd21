"""Data files, and their records as samples of token ids."""

from tailorcli.data.records import Record, read_records

__all__ = ["Record", "read_records"]
