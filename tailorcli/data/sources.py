"""Where data come from: a file, a folder of files, standard input, or a dataset of the Hub."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tailorcli.data.formats import COMPRESSIONS, FORMATS, KINDS, DataFile, Source, data_file, rows, spooled
from tailorcli.data.forms import is_known
from tailorcli.data.hub import is_dataset, open_dataset
from tailorcli.errors import DataError, note
from tailorcli.files import digest_of, file_digest
from tailorcli.options import DataColumns

STDIN = "-"
_HINT = f"pass {FORMATS}, a folder of such files, - for standard input, or the name of a dataset of the Hub"
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # beside a dataset's files
_SPLITS = {"train": "train", "test": "test", "eval": "test", "validation": "validation", "valid": "validation"}
_SPLITS |= {"val": "validation", "dev": "validation"}
_SPLIT = re.compile(rf"({'|'.join(_SPLITS)})(?![A-Za-z])")


def open_source(name: str, whole: bool = False, columns: DataColumns = DataColumns()) -> Source:
    """The data of a name; what is there on the disk comes before a dataset of the Hub.

    With ``whole`` a plain text is one row. Raises DataError.
    """
    if name == STDIN:
        file = spooled("standard input", sys.stdin.buffer, partial(is_known, named=columns))
        return Source(file.name, partial(_rows_of, [file], whole), partial(_digest_of, [file]))
    path = Path(name)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}", _HINT) from error
    if is_folder and not any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        files = _files_of(path)
        return Source(name, partial(_rows_of, files, whole), partial(_digest_of, files), len(files))
    if is_folder or (not is_there and is_dataset(name)):
        return open_dataset(name, is_folder)
    if not is_there:
        raise DataError(f"cannot read {name}: No such file or directory", _HINT)
    file = data_file(path)
    return Source(name, partial(_rows_of, [file], whole), partial(file_digest, path))


def _rows_of(files: list[DataFile], whole: bool) -> Iterator[tuple[str, Any, Path]]:
    for file in files:
        for where, value in rows(file, whole):
            yield where, value, file.folder


def _digest_of(files: list[DataFile]) -> str:
    """A hash of the files' bytes in their order."""
    import hashlib

    def digest(file: DataFile) -> bytes:
        with file.open() as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest()

    return digest_of(*(digest(file) for file in files))[:32]


def _files_of(folder: Path) -> list[DataFile]:
    """The data files of a folder and of those in it, by name; of several splits those of train. Raises DataError."""
    try:
        inside = sorted(path for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}", _HINT) from error
    shown = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found = [path for path in shown if _kind(path) in KINDS and path.name not in _NO_DATA]
    found = [path for path in found if _kind(path) != ".txt"] or found  # a licence or a note beside the data
    if not found:
        raise DataError(f"{folder} holds no data files", f"it needs {FORMATS}")
    splits: dict[str, list[Path]] = {}
    for path in found:
        named = next((m for part in path.relative_to(folder).parts if (m := _SPLIT.match(part.lower()))), None)
        splits.setdefault(_SPLITS[named[1]] if named else "", []).append(path)
    others = sorted(splits.keys() - {"train", ""})
    if "train" in splits and others:
        kept = {*splits["train"], *splits.get("", ())}
        taken = "train, and what names no split, is taken" if "" in splits else "train is taken"
        left = " and ".join(others)
        note(f"{folder} holds several splits: {taken}, {left} is left; name a file or a folder for another")
        found = [path for path in found if path in kept]
    return [data_file(path) for path in found]


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
