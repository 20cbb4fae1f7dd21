"""Hidden states that do not fit in memory wait in files."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tailorcli.errors import TailorError
from tailorcli.system import reserve


class Spill:
    """Where hidden states wait: in host memory, or in files once they are more than ``limit`` bytes.

    ``back`` brings them to the device before a block is run. What is counted are storages, so that several views of
    one count once, and a storage that its model has given up meanwhile counts no longer.
    """

    def __init__(self, device: torch.device, folder: Path, limit: int) -> None:
        self._device = device
        self._folder = folder
        self._room = limit
        self._files = 0
        self._in_memory: dict[StorageWeakRef, int] = {}  # bytes that each takes of the limit
        self._in_files: set[StorageWeakRef] = set()
        self._until_swept = 0

    def out(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor that waits. Raises TailorError where no file can be had."""
        storage = _storage_of(tensor)
        if storage in self._in_memory or storage in self._in_files:  # another view of it waits there
            return tensor
        size = tensor.untyped_storage().nbytes() if tensor.device.type == "cpu" else tensor.nbytes
        if size > self._room:
            self._sweep()
        if size <= self._room:
            waiting = tensor.cpu()
            self._in_memory[_storage_of(waiting)] = size
            self._room -= size
            return waiting
        mapped = self._mapped(tensor)
        self._in_files.add(_storage_of(mapped))
        return mapped.view(tensor.shape).copy_(tensor)

    def leave(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor that no block waits for, but the model may still use: it stays on its device."""
        return self.out(tensor) if self._device.type == "cpu" else tensor

    def back(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor that is worked on; one in a file stays there where files can be worked on."""
        storage = _storage_of(tensor)
        self._room += self._in_memory.pop(storage, 0)
        return tensor.to(self._device)

    def _mapped(self, tensor: Tensor) -> Tensor:
        """A file's memory with room for the tensor's entries."""
        self._files += 1
        path = self._folder / f"hidden-{self._files}.part"
        try:
            reserve(path, tensor.numel() * tensor.itemsize)
            return torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except (OSError, RuntimeError) as error:
            raise TailorError(f"cannot keep hidden states in {path}: {error}", "free some space") from error
        finally:
            with suppress(PermissionError):  # Windows removes no file that is mapped
                path.unlink(missing_ok=True)  # the mapping keeps it until the tensor is gone

    def _sweep(self) -> None:
        """Forget storages that are gone; not before as many more have come as there were, so that it costs little."""
        self._until_swept -= 1
        if self._until_swept > 0:
            return
        for storage in [storage for storage in self._in_memory if _is_gone(storage)]:
            self._room += self._in_memory.pop(storage)
        self._in_files = {storage for storage in self._in_files if not _is_gone(storage)}
        self._until_swept = len(self._in_memory) + len(self._in_files)


def _storage_of(tensor: Tensor) -> StorageWeakRef:
    """What all views of a tensor's memory have in common; it does not keep the memory, and its number never recurs."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]
