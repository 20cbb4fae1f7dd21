"""Hidden states that do not fit in memory wait in files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from tailorcli.errors import TailorError


class Spill:
    """Where hidden states wait: in host memory, or in files once they are more than ``limit`` bytes.

    ``back`` brings them to the device before a block is run.
    """

    def __init__(self, device: torch.device, folder: Path, limit: int) -> None:
        self._device = device
        self._folder = folder
        self._left = limit
        self._files = 0
        self._in_files: set[int] = set()  # addresses of what waits in files: it takes no part of the limit

    def out(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor that waits."""
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            return tensor.cpu()
        self._files += 1
        path = self._folder / f"hidden-{self._files}.part"
        try:
            _reserve(path, tensor.nbytes)
            mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except (OSError, RuntimeError) as error:
            raise TailorError(f"cannot keep hidden states in {path}: {error}", "free some space") from error
        finally:
            path.unlink(missing_ok=True)  # the mapping keeps it until the tensor is gone
        self._in_files.add(mapped.data_ptr())
        return mapped.view(tensor.shape).copy_(tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor that no block waits for, but the model may still use: it stays on its device."""
        return self.out(tensor) if self._device.type == "cpu" else tensor

    def back(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor that is worked on."""
        if tensor.data_ptr() in self._in_files:
            self._in_files.remove(tensor.data_ptr())
        else:
            self._left += tensor.nbytes
        return tensor.to(self._device)


def _reserve(path: Path, size: int) -> None:
    """Make a file with room on the disk: a mapping of one without would kill the process where the disk is full."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
