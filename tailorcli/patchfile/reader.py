"""Patch files: the mask of every patched tensor and the final values of its kept entries, in one safetensors file.

The header's metadata says what the patch is of, for which base, and how it was made (docs/reference/formats.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.bits import is_finite
from tailorcli.checkpoint.folder import WEIGHT_SUFFIXES, Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, bits_of, read_header
from tailorcli.errors import CheckpointError, PatchError, other_base
from tailorcli.files import PathLike, digest_of, given_path, on_threads, parse_json
from tailorcli.patchfile.coding import Places, check, cut_in_steps, decode, decode_mask
from tailorcli.patchfile.manifest import read_manifest
from tailorcli.patchfile.report import REPORT_FILE, PatchReport, read_report
from tailorcli.typed import field_of, read_object, require_plain

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tailorcli.checkpoint.bits import Bits
    from tailorcli.patchfile.coding import Mask

FORMAT_VERSION = 1
METADATA_KEY = "tailorcli_patch"
SUFFIX = ".safetensors"
MASK, VALUES, FILE = "mask:", "values:", "file:"  # before the name of a tensor, or of a side file
_MAKE_AGAIN = "download it again, or make it again: tailorcli patch BASE TUNED --patch-file FILE"


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


class PatchFile:
    """An opened patch file; masks and values are read tensor by tensor.

    ``tensors`` maps each patched tensor to its PatchTensor, ``base`` every tensor of the base to its BaseTensor,
    ``side_files`` the config, tokenizer and report to theirs. ``manifest`` is all of the metadata, typed.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], store: Checkpoint) -> None:
        self.path = path
        self._metadata = metadata
        self._store = store
        try:
            self.manifest = read_manifest(metadata)
        except ValueError as error:
            raise self._damaged(f"its metadata is malformed: {error}") from error
        self.tensors, self.base = self.manifest.tensors, self.manifest.base
        self.side_files = self.manifest.side_files
        self._check_names()

    @classmethod
    def open(cls, path: PathLike) -> PatchFile:
        """Open the file ``path`` by its header. Raises PatchError with what is wrong with it."""
        file = given_path(path)
        if file.is_dir():
            raise PatchError(f"{file} is a folder, not a patch file", "pass the .safetensors file of --patch-file")
        if not file.exists():
            raise PatchError(f"{file} does not exist", "make it: tailorcli patch BASE TUNED --patch-file FILE")
        try:
            infos, metadata = read_header(file)
        except CheckpointError as error:
            raise PatchError(error.message, _MAKE_AGAIN) from error
        if METADATA_KEY not in metadata:
            raise PatchError(
                f"{file} is no patch file: its metadata has no {METADATA_KEY!r}",
                "pass a file that tailorcli patch --patch-file wrote",
            )
        try:
            manifest = read_object(parse_json(metadata[METADATA_KEY]))
            require_plain(manifest)
            version = field_of(manifest, "format_version", lambda value: value)
        except ValueError as error:
            what = f"{file} is a damaged patch file: its metadata is malformed: {error}"
            raise PatchError(what, _MAKE_AGAIN) from error
        if type(version) is not int or version != FORMAT_VERSION:
            raise PatchError(
                f"{file} has format_version {version!r}, expected {FORMAT_VERSION}",
                "use the version of tailorcli that made it, or make it again with this one",
            )
        return cls(file, manifest, Checkpoint(file, infos, [file]))

    def _damaged(self, why: str) -> PatchError:
        return PatchError(f"{self.path} is a damaged patch file: {why}", _MAKE_AGAIN)

    def _check_names(self) -> None:
        """The entries fit each other, and the file holds just the tensors that the metadata announces."""
        expected: dict[str, tuple[str, int | None]] = {}  # dtype and number of entries, where the metadata tells
        for name, tensor in self.tensors.items():
            base = self.base.get(name)
            if base is None:
                raise self._damaged(f"it patches {name!r}, which its base does not have")
            if base.dtype not in PATCHABLE_DTYPES or tensor.kept > base.numel:
                raise self._damaged(f"it keeps {tensor.kept} entries of {name!r}, {base.dtype} {list(base.shape)}")
            expected[MASK + name] = ("U8", None)
            expected[VALUES + name] = (base.dtype, tensor.kept)
        for name, side in self.side_files.items():
            if not _is_side_name(name) or any(parent in self.side_files for parent in _parents(name)):
                raise self._damaged(f"it names {name!r}, which is no side file inside a model's folder")
            if side.stored:
                expected[FILE + name] = ("U8", None)
        if REPORT_FILE not in self.side_files or not self.side_files[REPORT_FILE].stored:
            raise self._damaged(f"it holds no {REPORT_FILE}")
        found = self._store.tensors
        for name in (*found, *expected):
            if name not in expected:
                raise self._damaged(f"it holds a tensor {name!r} that its metadata does not announce")
            if name not in found:
                raise self._damaged(f"it lacks {name!r}")
            dtype, numel = expected[name]
            info = found[name]
            if info.dtype != dtype or len(info.shape) != 1 or numel not in (None, info.numel):
                wanted = f"{dtype} [{'any' if numel is None else numel}]"
                raise self._damaged(f"{name!r} is {info.dtype} {list(info.shape)}, expected {wanted}")

    @property
    def nbytes(self) -> int:
        """Bytes of masks, values and side files."""
        return self._store.nbytes

    @property
    def base_nbytes(self) -> int:
        """Bytes of the base's tensors."""
        return sum(-(-tensor.numel * bits_of(tensor.dtype) // 8) for tensor in self.base.values())

    @property
    def name(self) -> str:
        """The task's name, or else the file's."""
        return self.manifest.task or self.path.stem

    def fingerprint(self) -> str:
        """A hash of the metadata, which holds the digests of everything else."""
        return digest_of(json.dumps(self._metadata, sort_keys=True).encode())

    def input_fingerprint(self, role: str) -> str | None:
        """The fingerprint of the ``tuned`` checkpoint or the ``stats`` that the patch was made from."""
        entry = self.manifest.inputs.get(role)
        return None if entry is None else entry["fingerprint"]

    def mask(self, name: str) -> Tensor:
        """The mask of one tensor, bool, in the tensor's shape."""
        import torch

        return torch.from_numpy(self.flat_mask(name)).view(self.base[name].shape)

    def flat_mask(self, name: str) -> Mask:
        """The mask of one tensor (numel,), bool, in NumPy."""
        return decode_mask(self.tensors[name].coding, self._bytes(MASK + name), self.base[name].numel)

    def places(self, name: str) -> Iterator[Places]:
        """The positions of a tensor's kept entries in row-major order, chunk by chunk."""
        return decode(self.tensors[name].coding, self._bytes(MASK + name))

    def values(self, name: str) -> Tensor:
        """The final values of the kept entries (kept,), in row-major order and in the base's dtype."""
        return self._store.read(VALUES + name)

    def bits(self, name: str) -> Bits:
        """The ``values`` as integers of their width."""
        return self._store.read_bits(VALUES + name)

    def kept_entries(self, name: str, step: int) -> Iterator[list[tuple[Places, Bits]]]:
        """Of each ``step`` entries of a tensor in turn the kept ones: where they are among these, and their values.

        Of values the ``bits``. They come in chunks, so that what is made of them stays in the processor's cache.
        """
        return cut_in_steps(self._kept_entries(name), self.base[name].numel, step)

    def _kept_entries(self, name: str) -> Iterator[tuple[Places, Bits]]:
        bits, done = self.bits(name), 0
        for places in self.places(name):
            yield places, bits[done : done + places.size]
            done += places.size

    def side_file(self, name: str) -> bytes:
        """A side file that the patch holds."""
        return self._bytes(FILE + name).tobytes()

    def report(self) -> PatchReport:
        """The report of the run that made the patch. Raises PatchError where it is damaged."""
        try:
            report = parse_json(self.side_file(REPORT_FILE).decode("utf-8"))
        except ValueError as error:
            raise self._damaged("its report is not JSON") from error
        if not isinstance(report, dict):
            raise self._damaged("its report is no JSON object")
        try:
            return read_report(report, self.path)
        except CheckpointError as error:
            raise PatchError(error.message, _MAKE_AGAIN) from error

    def kept_of(self, name: str) -> int:
        """How many entries of a tensor the patch keeps; none of one that it leaves alone."""
        return self.tensors[name].kept if name in self.tensors else 0

    def nbytes_of(self, name: str) -> int:
        """Bytes of one tensor's mask and values in the file."""
        return self._store.tensors[MASK + name].nbytes + self._store.tensors[VALUES + name].nbytes

    def _bytes(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._store.read_bits(name)

    def check(self, names: Iterable[str] | None = None) -> None:
        """Read everything once: digests are right, masks fit their tensors and keep what the metadata says.

        Of tensors only those with these ``names``, where they are given. Raises PatchError where they do not.
        """
        for _ in on_threads(self._check_tensor, self.tensors if names is None else names):
            pass
        for name, side in self.side_files.items():
            if side.stored and digest_of(self._bytes(FILE + name)) != side.digest:
                raise self._damaged(f"its side file {name!r} is not the one that was written")
        self.report()

    def _check_tensor(self, name: str) -> None:
        tensor = self.tensors[name]
        codes = self._bytes(MASK + name)
        try:
            kept = check(tensor.coding, codes, self.base[name].numel)
        except ValueError as error:
            raise self._damaged(f"tensor {name!r}: {error}") from error
        if kept != tensor.kept:
            raise self._damaged(f"tensor {name!r}: its mask keeps {kept} entries, it has {tensor.kept} values")
        values = self.bits(name)
        if digest_of(codes, values) != tensor.content:
            raise self._damaged(f"tensor {name!r}: its mask or values are not those that were written")
        if not is_finite(values, self.base[name].dtype):
            raise self._damaged(f"tensor {name!r}: NaN or infinity among its values")

    def check_base(self, base: Checkpoint, *, thorough: bool = False) -> None:
        """``base`` has the tensors of the patch's base, as far as their samples tell; to the bit with ``thorough``.

        Raises PatchError where it has not.
        """
        hint = "pass the checkpoint that the patch was made from: tailorcli inspect PATCH names it"
        for name, wanted in self.base.items():
            info = base.tensors.get(name)
            if info is None:
                raise PatchError(f"{self.path} is for another base: {base.path} has no tensor {name!r}", hint)
            if (info.dtype, info.shape) != (wanted.dtype, wanted.shape):
                found = f"{info.dtype} {list(info.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
                raise PatchError(f"{self.path} is for another base: tensor {name!r} of {base.path} is {found}", hint)
            if base.tensor_fingerprint(info) != wanted.fingerprint:
                what = f"tensor {name!r} of {base.path} holds other values"
                raise PatchError(f"{self.path} is for another base: {what}", hint)
        more = [name for name in base.tensors if name not in self.base]
        if more:
            raise PatchError(f"{self.path} is for another base: {base.path} also has tensor {more[0]!r}", hint)
        if thorough:
            digests = on_threads(lambda name: digest_of(*base.pieces(base.tensors[name])), self.base)
            for (name, wanted), found in zip(self.base.items(), digests, strict=True):
                if found != wanted.digest:
                    raise other_base(name, base.path)

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    def __enter__(self) -> PatchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_side_name(name: str) -> bool:
    """A file inside the folder that is no weight: no absolute path, no "..", nothing hidden."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or len(part.encode("utf-8", "replace")) > 255 for part in path.parts)
    odd = not name or path.is_absolute() or hidden or "\\" in name or not name.isprintable() or len(name) > 1000
    return not odd and not any(part.endswith(WEIGHT_SUFFIXES) for part in path.parts) and path.as_posix() == name


def _parents(name: str) -> list[str]:
    """The folders above a side file: none of them may be a side file itself."""
    return [parent.as_posix() for parent in PurePosixPath(name).parents]
