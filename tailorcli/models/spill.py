"""Hidden states wait on the device while they fit there, then in host memory, then in files."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tailorcli.device import free_memory
from tailorcli.errors import TailorError
from tailorcli.files import HIDDEN
from tailorcli.system import reserve

HIDDEN_SHARE = 0.25  # of the free host memory that waiting hidden states may fill
DEVICE_SHARE = 0.5  # of the free memory of a GPU; the rest is for a block's weights, its Hessians and the solver


class Spill:
    """Where hidden states wait: on the device up to ``on_device`` bytes, in host memory up to ``limit``, then in files.

    ``back`` brings them to the device before a block is run; copies to and from a GPU's host memory, which is pinned,
    go on beside its work. What is counted are storages, so that several views of one count once, and a storage that
    its model has given up meanwhile counts no longer.
    """

    def __init__(self, device: torch.device, folder: Path, limit: int, on_device: int = 0) -> None:
        self._device = device
        self._folder = folder
        self._room = {"device": on_device, "host": limit}
        self._held: dict[StorageWeakRef, tuple[str, int]] = {}  # where each waits, and its bytes of the room there
        self._copied: dict[StorageWeakRef, torch.cuda.Event] = {}  # when what waits in host memory has arrived there
        self._in_files: set[StorageWeakRef] = set()
        self._until_swept = 0
        cuda = device.type == "cuda"
        self._keeps = on_device > 0
        streams = [torch.cuda.Stream(device) if cuda else None for _ in range(2)]  # type: ignore[no-untyped-call]
        self._outward, self._inward = streams

    @classmethod
    def measured(cls, device: torch.device, folder: Path) -> Spill:
        """With the shares of the memory that is free now; what is still to be loaded has to fit into the rest."""
        host = free_memory(torch.device("cpu")) or 1 << 40
        free = free_memory(device) if device.type == "cuda" else 0
        return cls(device, folder, int(host * HIDDEN_SHARE), int((free or 0) * DEVICE_SHARE))

    def out(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor that waits. Raises TailorError where no file can be had."""
        storage = _storage_of(tensor)
        if storage in self._held or storage in self._in_files:  # another view of it waits there
            return tensor
        whole = tensor.untyped_storage().nbytes()
        if self._keeps and tensor.device.type == self._device.type and self._takes("device", whole):
            self._held[storage] = ("device", whole)
            return tensor
        size = whole if tensor.device.type == "cpu" else tensor.nbytes
        if self._takes("host", size):
            waiting = self._to_host(tensor)
            self._held[_storage_of(waiting)] = ("host", size)
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
        if storage in self._held:
            place, size = self._held.pop(storage)
            self._room[place] += size
        return (
            tensor
            if tensor.device.type == self._device.type
            else self._to_device(tensor, self._copied.pop(storage, None))
        )

    def _takes(self, place: str, size: int) -> bool:
        """Whether there is room for so many bytes; then they are taken."""
        if size > self._room[place]:
            self._sweep()
        if size > self._room[place]:
            return False
        self._room[place] -= size
        return True

    def _to_host(self, tensor: Tensor) -> Tensor:
        """The tensor in host memory; from a GPU a copy that may still be under way."""
        if self._outward is None or tensor.device.type == "cpu":
            return tensor.cpu()
        waiting = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            waiting.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._outward)
        self._copied[_storage_of(waiting)] = self._outward.record_event()
        return waiting

    def _to_device(self, tensor: Tensor, copied: torch.cuda.Event | None) -> Tensor:
        """The tensor on the device; on a GPU what is queued there from now on waits for the copy, and nothing else."""
        if self._inward is None:
            return tensor.to(self._device)
        if copied is not None:
            self._inward.wait_event(copied)
        with torch.cuda.stream(self._inward):
            moved = tensor.to(self._device, non_blocking=copied is not None)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._inward)
        moved.record_stream(current)
        return moved

    def _mapped(self, tensor: Tensor) -> Tensor:
        """A file's memory with room for the tensor's entries; the mapping keeps it until the tensor is gone.

        The file loses its name before it takes any room: a kill leaves none that is large.
        """
        try:
            with NamedTemporaryFile(dir=self._folder, prefix=HIDDEN, suffix=".part", delete=False) as file:
                try:
                    memory = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
                finally:
                    with suppress(PermissionError):  # Windows removes no file that is mapped
                        Path(file.name).unlink()
                reserve(file, tensor.numel() * tensor.itemsize)
        except (OSError, RuntimeError) as error:
            what = f"cannot keep hidden states in a file in {self._folder}: {error}"
            raise TailorError(what, "free some space") from error
        return memory

    def _sweep(self) -> None:
        """Forget storages that are gone; not before as many more have come as there were, so that it costs little."""
        self._until_swept -= 1
        if self._until_swept > 0:
            return
        for storage in [storage for storage in self._held if _is_gone(storage)]:
            place, size = self._held.pop(storage)
            self._room[place] += size
            self._copied.pop(storage, None)
        self._in_files = {storage for storage in self._in_files if not _is_gone(storage)}
        self._until_swept = len(self._held) + len(self._in_files)


def _storage_of(tensor: Tensor) -> StorageWeakRef:
    """What all views of a tensor's memory have in common; it does not keep the memory, and its number never recurs."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]
