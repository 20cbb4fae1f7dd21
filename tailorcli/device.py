"""Devices, and float32 products that really are float32."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from tailorcli.errors import DeviceError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """``auto`` is a CUDA device where there is one, else the CPU. Raises DeviceError for one that is absent."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"not a device: {name!r}", "use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not supported", "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceError(
                f"{name} was asked for, and this torch ({torch.__version__}) sees {count} CUDA devices",
                "pass --device cpu, or install a CUDA build of torch",
            )
    return device


@contextmanager
def exact_float32() -> Iterator[None]:
    """TF32 and other reduced-precision shortcuts off for float32 products; the caller's setting comes back after."""
    import torch

    # cuDNN has a switch of its own for convolutions, and it is on by default.
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn the device's out-of-memory error into one that says what to try."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"the device ran out of memory: {str(error).splitlines()[0]}", "pass --device cpu") from error


def give_back_memory() -> None:
    """Hand the memory of freed tensors back to the system, where the C library can be asked to (glibc).

    It keeps arrays below 32 MB on its heap, where small objects come to lie between them: after many blocks of a
    model the holes can be larger than the blocks.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library, or another system
        ctypes.CDLL(None).malloc_trim(0)


class StageTimer:
    """Seconds spent in each named stage of a run; on a GPU a stage ends when its kernels have."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device if device is not None and device.type == "cuda" else None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of this context to stage ``name``."""
        started = perf_counter()
        try:
            yield
        finally:
            if self._device is not None:
                import torch

                torch.cuda.synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - started


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, where the system tells."""
    if device.type == "cuda":
        # What torch keeps of tensors that are gone is not free for the system, but it is for the next tensor.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
