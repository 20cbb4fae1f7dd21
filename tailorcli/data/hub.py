"""Datasets of the Hub, and those that ``datasets`` saved to a folder, as rows; the extra ``data`` reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailorcli.data.formats import COMPRESSIONS, EXTRA, KINDS, Source, without_nulls
from tailorcli.errors import DataError, first_line
from tailorcli.files import digest_of, file_digest

_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval|all)(\W.*)?|.*\[.*", re.IGNORECASE)
_DATASET = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:.*)?")
_MOST_ROWS = 256  # at a time


def parse_dataset(name: str) -> tuple[str, str | None, str | None]:
    """Repository, config and split of NAME[:CONFIG][:SPLIT]; one part alone is a split if it is called like one."""
    repository, *parts = name.split(":", 2) if "[" not in name else _before_slice(name)
    if len(parts) == 1 and _SPLIT.fullmatch(parts[0]):
        return repository, None, parts[0]
    config, split = [*parts, "", ""][:2]
    return repository, config or None, split or None


def dataset_id(name: str) -> str | None:
    """The repository, ORG/NAME, of the dataset of the Hub that ``name`` stands for; None of anything else."""
    if not is_dataset(name):
        return None
    repository = parse_dataset(name)[0]
    return repository if "/" in repository and not Path(repository).exists() else None


def _before_slice(name: str) -> list[str]:
    """The parts of a name whose split takes a slice of it, [10:20], which has a colon of its own."""
    head, bracket, rest = name.partition("[")
    *parts, split = head.split(":", 2)
    return [*parts, split + bracket + rest]


def open_dataset(name: str, is_folder: bool = False) -> Source:
    """A dataset of the Hub, from its cache where it is there, or of a folder of ``save_to_disk``. Raises DataError.

    Only tables are read: no code of a dataset runs. Without a split it is train, or the only one.
    """
    try:
        import datasets
    except ImportError as error:
        what = f"{name} is no file or folder here, and to take it for a dataset of the Hub takes datasets"
        what = f"{name} was saved by datasets" if is_folder else what
        raise DataError(f"{what}, which is not installed", EXTRA) from error
    repository, config, split = (name, None, None) if is_folder else parse_dataset(name)
    try:
        found = datasets.load_from_disk(name) if is_folder else _loaded(repository, config, split)
    except Exception as error:  # whatever datasets, its readers and the network raise
        why = f"{type(error).__name__}: {first_line(error)}"
        if is_folder:
            raise DataError(f"cannot read the dataset of {name}: {why}", "save it again: save_to_disk(DIR)") from error
        raise DataError(
            f"{name} is no file or folder here, and no dataset of the Hub can be read by that name: {why}",
            f"check NAME[:CONFIG][:SPLIT]; fetch it beforehand with: hf download --repo-type dataset {repository}",
        ) from error
    if isinstance(found, dict):
        found = _only_split(name, found)
    if not isinstance(found, datasets.Dataset):
        raise DataError(f"{name} is a {type(found).__name__}, expected a dataset of rows", "name another split")
    arrow = found.with_format("arrow")  # images stay the bytes that they are stored as

    def read() -> Iterator[tuple[str, Any, Path]]:
        number = 0
        for table in arrow.iter(_MOST_ROWS):
            for row in table.to_pylist():
                yield f"{name}, record {number}", without_nulls(row), Path()
                number += 1

    def digest() -> str:
        files = sorted(Path(file["filename"]) for file in found.cache_files)
        parts = [file_digest(file).encode() for file in files] or [str(found._fingerprint).encode()]
        return digest_of(str(found.num_rows).encode(), str(split).encode(), *parts)[:32]

    return Source(name, read, digest)


def _loaded(repository: str, config: str | None, split: str | None) -> Any:
    """A dataset of the Hub, of the cache of ``datasets``, or of that of ``hf download``. Raises what they raise."""
    import datasets
    from huggingface_hub import snapshot_download

    try:
        return datasets.load_dataset(repository, config, split=split)
    except Exception:  # whatever it raises: without a network it knows only what it has prepared itself
        try:
            folder = snapshot_download(repository, repo_type="dataset", local_files_only=True)
        except Exception:  # whatever huggingface_hub raises: it is not there either
            folder = ""
        if not folder:
            raise
        return datasets.load_dataset(folder, config, split=split)


def _only_split(name: str, splits: dict[str, Any]) -> Any:
    """The split train, or the only one. Raises DataError."""
    if "train" in splits or len(splits) == 1:
        return splits["train"] if "train" in splits else next(iter(splits.values()))
    hint = "name one behind a colon; of a folder, name the folder of a split"
    raise DataError(f"{name} has the splits {', '.join(splits)}, and none is train", hint)


def is_dataset(name: str) -> bool:
    """Whether a name can be that of a dataset of the Hub, NAME[:CONFIG][:SPLIT], and is none of a file of data."""
    suffixes = Path(name.partition(":")[0]).suffixes
    return _DATASET.fullmatch(name) is not None and not {*suffixes}.intersection((*KINDS, *COMPRESSIONS))
