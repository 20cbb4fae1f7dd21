"""A base with a patch file in place, seen as the checkpoint that ``apply`` would write; no weight of it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tailorcli.checkpoint.bits import STEP_BYTES, bit_type
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import TensorInfo
from tailorcli.errors import other_base
from tailorcli.files import digest_of, read_bytes
from tailorcli.patchfile.reader import PatchFile, raw_bytes
from tailorcli.patchfile.report import REPORT_FILE

if TYPE_CHECKING:
    from torch import Tensor

    from tailorcli.checkpoint.bits import Bits


class PatchedCheckpoint(Checkpoint):
    """The tensors of ``base`` with the entries of ``file`` in place, formed one at a time.

    ``path`` is a folder with its side files, its config and tokenizer among them (``write_side_files``). Both inputs
    stay open as long as this is in use and belong to the caller.
    """

    is_found = False

    def __init__(self, path: Path, base: Checkpoint, file: PatchFile) -> None:
        super().__init__(path, base.tensors, [*base.shards, file.path])
        self.base = base
        self.file = file

    def read_cost(self, name: str) -> int:
        """Bytes that ``read`` takes from the disk."""
        patched = name in self.file.tensors
        return self.base.read_cost(name) + (self.file.nbytes_of(name) if patched else 0)

    def read(self, name: str, pinned: bool = False) -> Tensor:
        """One tensor on the CPU, in memory of its own. Raises PatchError where the base is another one."""
        if name not in self.file.tensors:
            return self.base.read(name, pinned)
        formed = self.base.read(name, pinned)
        patch_(formed, self.file, name, self.base.path)
        return formed

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``start`` on; a patched one is formed for it as a whole."""
        if info.name not in self.file.tensors:
            self.base.read_into(info, buffer, start)
            return
        buffer[:] = self.read_bits(info.name).view("u1").data[start : start + len(buffer)]

    def read_bits(self, name: str) -> Bits:
        """The entries of one tensor, patched, as integers of their width."""
        if name not in self.file.tensors:
            return super().read_bits(name)
        return read_patched(self.base, self.file, name)

    def fingerprint(self) -> str:
        """A hash of the base's fingerprint and the patch's."""
        if self._fingerprint is None:
            both = f"{self.base.fingerprint()} {self.file.fingerprint()}"
            self._fingerprint = hashlib.blake2b(both.encode(), digest_size=16).hexdigest()
        return self._fingerprint


def patched_tensor(base: Tensor, file: PatchFile, name: str, path: Path) -> Tensor:
    """A copy of the base's tensor ``name`` with the patch's entries in place; ``path`` is where the base lies.

    Raises PatchError if a single bit of the base's tensor differs from that which the patch was made for.
    """
    patched = base.clone()
    patch_(patched, file, name, path)
    return patched


def read_patched(base: Checkpoint, file: PatchFile, name: str, is_checked: bool = False) -> Bits:
    """The entries of the base's tensor ``name`` with the patch's in place (numel,), as integers of their width.

    Read, hashed and patched in one pass over pieces that the processor's cache has room for. A base that
    ``is_checked`` is not hashed. Raises PatchError if a single bit of the base's tensor differs from that which the
    patch was made for.
    """
    import numpy as np

    info = base.tensors[name]
    patched = np.empty(info.numel, bit_type(info.dtype))
    step, digest = STEP_BYTES // patched.itemsize, hashlib.sha256()
    for number, kept in enumerate(file.kept_entries(name, step)):
        piece = patched[number * step : (number + 1) * step]
        base.read_into(info, piece.view(np.uint8).data, number * STEP_BYTES)
        if not is_checked:
            digest.update(piece.data)
        for places, values in kept:
            piece[places] = values
    if not is_checked and digest.hexdigest() != file.base[name].digest:
        raise other_base(name, base.path)
    return patched


def patch_(base: Tensor, file: PatchFile, name: str, path: Path) -> None:
    """Put the patch's entries of the tensor ``name`` in their places in ``base``, which is on the CPU, in place.

    ``path`` is where the base lies. Raises PatchError if a single bit of it differs from that which the patch was
    made for.
    """
    import numpy as np

    if digest_of(raw_bytes(base)) != file.base[name].digest:
        raise other_base(name, path)
    bits = np.frombuffer(raw_bytes(base), bit_type(file.base[name].dtype))
    step = STEP_BYTES // bits.itemsize
    for number, kept in enumerate(file.kept_entries(name, step)):
        for places, values in kept:
            bits[number * step : (number + 1) * step][places] = values


def side_sources(base: Checkpoint, file: PatchFile) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """Every side file of the output: from the patch, or from the base where it had the same; and what is amiss."""
    side: dict[str, Path | bytes] = {}
    notes = []
    for name, entry in file.side_files.items():
        if name == REPORT_FILE:
            continue
        if entry.stored:
            side[name] = file.side_file(name)
            continue
        source = base.path / name
        if not source.is_file():
            notes.append(f"side file {name} is missing: the base had it when the patch was made")
            continue
        if digest_of(source.read_bytes()) != entry.digest:
            notes.append(f"side file {name} is the base's own, which has changed since the patch was made")
        side[name] = source
    return side, tuple(notes)


def write_side_files(side: Mapping[str, Path | bytes], folder: Path) -> None:
    """Put side files into a folder of their own, from which a model is built and its tokenizer read. Raises OSError."""
    for name, source in side.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source if isinstance(source, bytes) else read_bytes(source))
