"""Files read and written with care: JSON, digests, synced and atomic writes, errors that name the file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tailorcli.errors import CheckpointError, OutputError
from tailorcli.system import sync_path

PathLike = str | os.PathLike[str]

_NO_MORE_FILES = (errno.EMFILE, errno.ENFILE)
_MORE_FILES = "allow more of them (ulimit -n 4096), or save the checkpoints in fewer shards"
_NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # a system may know no quotas


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The user's error for a failed read."""
    if error.errno in _NO_MORE_FILES:
        return CheckpointError(f"cannot read {path}: too many files are open", _MORE_FILES)
    return CheckpointError(f"cannot read {path}: {error.strerror or error}", "check the path and its permissions")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "download or save it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object", "download or save it again")
    return value


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    sync_path(temporary)
    temporary.replace(path)


def as_output_error(path: Path, error: OSError) -> OutputError:
    """The user's error for a failed write."""
    if error.errno in _NO_MORE_FILES:
        return OutputError(f"cannot write {path}: too many files are open", _MORE_FILES)
    if error.errno in _NO_SPACE:
        return OutputError(
            f"no space left on the device while writing {path}",
            "free some and run it again, with --resume where the command has it",
        )
    return OutputError(f"cannot write {path}: {error.strerror or error}", "check the path and its permissions")


def file_digest(path: Path) -> str:
    """A hash of a data file's bytes, by which a manifest or a report names it. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_of(*parts: Any) -> str:
    """SHA-256 of all the bytes of ``parts``, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
