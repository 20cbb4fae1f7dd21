"""What the metadata of a patch file says, every value checked (docs/reference/formats.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tailorcli.options import is_label
from tailorcli.patchfile.coding import CODINGS
from tailorcli.patchfile.report import read_inputs
from tailorcli.typed import (
    Reader,
    field_of,
    list_of,
    maybe,
    one_of,
    read_count,
    read_flag,
    read_object,
    read_shape,
    read_text,
    wrong,
)

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class PatchTensor:
    """One patched tensor: how many entries it keeps, how its mask is coded, the digest of mask and values."""

    kept: int
    coding: str
    content: str


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base as it must be: dtype, shape, a sample's fingerprint, and the digest of all its bytes."""

    dtype: str
    shape: tuple[int, ...]
    fingerprint: str
    digest: str

    @property
    def numel(self) -> int:
        """Entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SideFile:
    """A file beside the weights: its digest, and whether the patch holds it (or else the base has the same)."""

    digest: str
    stored: bool


@dataclass(frozen=True)
class Ingredient:
    """A patch that went into a merged one."""

    task: str
    license: str | None
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """The metadata of a patch file; ``base``, ``tensors`` and ``side_files`` map names to their entries."""

    task: str | None
    license: str | None
    base_fingerprint: str
    base: dict[str, BaseTensor]
    tensors: dict[str, PatchTensor]
    side_files: dict[str, SideFile]
    inputs: dict[str, dict[str, str]]  # what it was made from: path and fingerprint
    run: dict[str, Any]  # the identity under which it is resumed
    merged_from: tuple[Ingredient, ...] = ()


def read_manifest(value: Any) -> Manifest:
    """The metadata of a patch file. Raises ValueError that names the entry and the field."""
    base = field_of(value, "base", read_object)
    return Manifest(
        task=_read_label("task", value.get("task")),
        license=_read_label("license", value.get("license")),
        base_fingerprint=field_of(base, "fingerprint", read_text),
        base=_read_entries(base, "tensors", _read_base_tensor),
        tensors=_read_entries(value, "tensors", read_patch_tensor),
        side_files=_read_entries(value, "side_files", _read_side_file),
        inputs=read_inputs(value.get("inputs")),
        run=field_of(value, "run", read_object),
        merged_from=field_of({"merged_from": [], **value}, "merged_from", list_of(_read_ingredient)),
    )


def read_patch_tensor(value: Any) -> PatchTensor:
    """The entry of a patched tensor. Raises ValueError that names the field."""
    _require_only(value, "kept", "coding", "content")
    kept, coding = field_of(value, "kept", read_count), field_of(value, "coding", one_of(*CODINGS))
    return PatchTensor(kept, coding, field_of(value, "content", _read_sha256))


def _read_base_tensor(value: Any) -> BaseTensor:
    return BaseTensor(
        dtype=field_of(value, "dtype", read_text),
        shape=field_of(value, "shape", read_shape),
        fingerprint=field_of(value, "fingerprint", _hex(32)),
        digest=field_of(value, "sha256", _read_sha256),
    )


def _read_side_file(value: Any) -> SideFile:
    _require_only(value, "digest", "stored")
    return SideFile(field_of(value, "digest", _read_sha256), field_of(value, "stored", read_flag))


def _read_ingredient(value: Any) -> Ingredient:
    task, digest = field_of(value, "task", read_text), field_of(value, "fingerprint", read_text)
    return Ingredient(task, field_of(value, "license", maybe(read_text)), digest)


def _read_entries(value: Any, key: str, read: Callable[[Any], Entry]) -> dict[str, Entry]:
    """The entries of an object by their names, each as ``read`` takes it."""
    found = {}
    for name, entry in field_of(value, key, read_object).items():
        try:
            found[name] = read(entry)
        except ValueError as error:
            what = f"the entry of {ascii(name)[:100]} has a field of the wrong type or range"
            raise ValueError(f"{what}: {error}") from error
    return found


def _require_only(value: Any, *keys: str) -> None:
    more = sorted(read_object(value).keys() - {*keys})
    if more:
        raise ValueError(f"it has a field {ascii(more[0])[:60]}, which is none of {', '.join(keys)}")


def _read_label(key: str, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and is_label(value)):
        raise ValueError(f"its {key} is no plain text")
    return value


def _hex(length: int) -> Reader:
    def read(value: Any) -> str:
        if not re.fullmatch(f"[0-9a-f]{{{length}}}", read_text(value)):
            raise wrong(value, f"{length} hexadecimal digits")
        return str(value)

    return read


_read_sha256 = _hex(64)
