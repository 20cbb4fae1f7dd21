"""Names of models on the Hub, ``org/name`` or ``org/name@revision``: the local folder that each stands for.

What is there as a path is that path. Of a repository the weights in safetensors come, and what a loader reads beside
them; never a pickle, and code only where it is asked for. Without a network the Hub's own cache serves.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from tailorcli.errors import CheckpointError, first_line, note
from tailorcli.files import PathLike, expanded_path

_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(@(?P<revision>[\w./-]{{1,255}}))?", re.ASCII)
_FILES = (".json", ".jsonl", ".safetensors", ".gguf", ".bin", ".pt", ".pth", ".txt")  # how no repository's name ends
_CACHED = re.compile(r"models--(.+?)--(.+)")  # a folder of the Hub's cache
_COMMIT = re.compile(r"[0-9a-f]{40}")

# Weights, configurations, tokenizers and processors, templates, and what a person reads.
_WANTED = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.bpe", "*.spm", "*.jinja2"),
    *("README.md", "LICEN[CS]E*", "COPYING*", "NOTICE*", "USE_POLICY*"),
)
# The same weights once more: in another layout, in half precision, of a training run.
_UNWANTED = ("*/*.safetensors", "consolidated*.safetensors", "*.fp16.safetensors", "original/*", "onnx/*", "runs/*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def is_id(path: PathLike) -> bool:
    """Whether a text that is no path here could name a model of the Hub."""
    text = os.fspath(path)
    return _ID.fullmatch(text) is not None and not text.lower().endswith(_FILES)


def local_folder(path: PathLike, *, code: bool = False) -> Path:
    """The folder that a path or an id of the Hub stands for, fetched where it is not there yet; ``~`` is expanded.

    A path that exists wins over an id; what is neither stays as it is, for whoever opens it to refuse. ``code``: the
    repository's Python files come, too. Raises CheckpointError with the ``hf`` command that helps, and
    OptionsError for a path that is none.
    """
    place = expanded_path(path)
    if os.path.lexists(place) or not is_id(path):
        return place
    found = _ID.fullmatch(os.fspath(path))
    assert found is not None
    folder = _fetched(found["repo"], found["revision"], code)
    _require_whole(folder, os.fspath(path), found["repo"], found["revision"])
    return folder


def local_folders(paths: Iterable[PathLike], *, code: bool = False) -> list[Path]:
    """``local_folder`` of each. Raises CheckpointError."""
    return [local_folder(path, code=code) for path in paths]


def hub_origin(folder: Path) -> str:
    """The id and the commit, ``org/name@commit``, of a folder in the Hub's cache; empty for any other."""
    parts = folder.absolute().parts
    for at, part in enumerate(parts[:-2]):
        found = _CACHED.fullmatch(part)
        if found and parts[at + 1] == "snapshots" and _COMMIT.fullmatch(parts[at + 2]):
            return f"{found[1]}/{found[2]}@{parts[at + 2]}"
    return ""


def model_name(folder: Path) -> str:
    """What a folder is called in a table: its name, or its model's on the Hub."""
    found = hub_origin(folder)
    return found.partition("@")[0].partition("/")[2] if found else folder.name


def hub_facts(folder: Path) -> dict[str, str]:
    """What a manifest or a report says besides of a model that comes from the Hub; nothing of any other."""
    found = hub_origin(folder)
    return {"hub": found} if found else {}


def _fetched(repo: str, revision: str | None, code: bool) -> Path:
    """The snapshot of a repository: from the Hub, or from its cache. Raises CheckpointError."""
    import huggingface_hub
    from huggingface_hub import constants

    offline = bool(constants.HF_HUB_OFFLINE)
    if not offline and not sys.stderr.isatty():
        note(f"taking {repo} from the Hub, or from its cache")
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[*_WANTED, *(["*.py"] if code else [])],
            ignore_patterns=list(_UNWANTED),
            local_files_only=offline,
            **({} if sys.stderr.isatty() else {"tqdm_class": _silent()}),
        )
    except Exception as error:  # of huggingface_hub, of its HTTP client, of the disk
        _refuse(repo, revision, offline, error)
    return Path(str(folder))


def _silent() -> Any:
    """A progress bar that is never shown, for output that is no terminal."""
    from tqdm.auto import tqdm

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            settings.pop("name", None)  # huggingface_hub's own
            super().__init__(*arguments, **(settings | {"disable": True}))

    return Silent


def _refuse(repo: str, revision: str | None, offline: bool, error: Exception) -> NoReturn:
    """Raise the user's error for what huggingface_hub raised."""
    from huggingface_hub import errors

    shown = f"{repo}@{revision}" if revision else repo
    fetch = _command(repo, revision)
    if isinstance(error, errors.GatedRepoError):
        raise CheckpointError(
            f"{shown} is gated: its authors ask you to accept their conditions first",
            f"accept them at https://huggingface.co/{repo}, then: hf auth login",
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise CheckpointError(
            f"{repo} has no revision {revision!r}", f"leave it out, or see https://huggingface.co/{repo}/commits/main"
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise CheckpointError(
            f"{shown} is no path here, and the Hub knows no such model, or not for you",
            "check the name; for a private one: hf auth login",
        ) from error
    if isinstance(error, errors.HFValidationError):
        what = f"{shown} is no path here, and no name of the Hub"
        raise CheckpointError(what, "pass a folder, or org/name") from error
    if offline or isinstance(error, errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        raise CheckpointError(
            f"{shown} is no path here, and not in the Hub's cache ({why})", f"where there is a network: {fetch}"
        ) from error
    what = f"cannot fetch {shown} from the Hub: {first_line(error)}"
    raise CheckpointError(what, f"try it by itself: {fetch}") from error


def _require_whole(folder: Path, shown: str, repo: str, revision: str | None) -> None:
    """A snapshot has weights in safetensors, all that its index names. Raises CheckpointError."""
    weights = {path.name for path in folder.glob("*.safetensors")}
    fetch = f"where there is a network: {_command(repo, revision)}"
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        missing = sorted({str(name) for name in index["weight_map"].values()} - weights)
    except FileNotFoundError:
        missing = []
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # whoever opens the folder says what is wrong
        missing = []
    if missing:
        raise CheckpointError(f"{shown} is only partly in the Hub's cache: it lacks {missing[0]}", fetch)
    if weights:
        return
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise CheckpointError(f"{shown} has no safetensors, and pickled weights are never loaded", _convert(repo))
    raise CheckpointError(
        f"{shown} has no safetensors here ({folder})",
        f"{fetch}; if it has pickled weights or GGUF alone, take one that has safetensors",
    )


def _convert(repo: str) -> str:
    return (
        "take a revision that has them, or convert once, where you trust the file: "
        f'AutoModelForCausalLM.from_pretrained("{repo}").save_pretrained(DIR, safe_serialization=True)'
    )


def _command(repo: str, revision: str | None) -> str:
    return f"hf download {repo}" + (f" --revision {revision}" if revision else "")
