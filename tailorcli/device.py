"""Devices, and float32 products that really are float32."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tailorcli.distributed import launched, ranks
from tailorcli.errors import DeviceError, first_line, note
from tailorcli.system import available_memory

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """``auto`` is a CUDA device where there is one, else the CPU; among ranks ``auto`` and ``cuda`` are one GPU a rank.

    Raises DeviceError for one that is absent.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
        return _of_this_rank(device, count)
    return device


def _of_this_rank(device: torch.device, count: int) -> torch.device:
    """One of the machine's ``count`` GPUs for each rank; alone, the one that was asked for."""
    import torch

    here = ranks()
    index: Any = device.index  # None where no GPU was named, which torch's types do not know
    if here.alone:
        if count > 1 and index is None and launched().alone:
            note(f"{count} GPUs are here, and one is used: torchrun --nproc-per-node {count} -m tailorcli ... uses all")
        if index is not None:
            torch.cuda.set_device(device)  # where kernels of a model's own are launched
        return device
    if index is not None:
        raise DeviceError(f"{device} is one GPU, and {here.size} ranks run", "pass --device cuda, which gives each one")
    if here.local_size > count:
        raise DeviceError(
            f"{here.local_size} ranks run on this machine, which has {count} GPUs",
            f"start torchrun with --nproc-per-node {count}, or pass --device cpu",
        )
    torch.cuda.set_device(here.local_rank)
    return torch.device("cuda", here.local_rank)


class Held:
    """A setting of the whole process that is another one while any thread is within.

    ``hold`` changes it and gives what puts it back. Calls of several threads may overlap in any order; the caller's
    setting comes back after the last.
    """

    def __init__(self, hold: Callable[[], Callable[[], object]]) -> None:
        self._hold = hold
        self._lock = threading.Lock()
        self._inside = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within it the setting is held."""
        with self._lock:
            if self._inside == 0:
                self._put_back = self._hold()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._put_back()


def _hold_float32() -> Callable[[], object]:
    import torch

    # cuDNN has a switch of its own for convolutions, and it is on by default.
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False

    def put_back() -> None:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions

    return put_back


exact_float32 = Held(_hold_float32)
"""TF32 and other reduced-precision shortcuts are off for float32 products within."""


def _hold_attention() -> Callable[[], object]:
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    return lambda: torch.backends.cuda.enable_cudnn_sdp(before)


_without_cudnn = Held(_hold_attention)


def attention_without_cudnn() -> AbstractContextManager[None]:
    """A GPU's attention by other kernels than cuDNN's, which plans anew in every thread: a tenth of a second each."""
    import torch

    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return _without_cudnn() if is_used else nullcontext()


def _hold_deterministic() -> Callable[[], object]:
    import torch

    # cuBLAS reads it when it is first used; it decides nothing elsewhere.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    return lambda: torch.use_deterministic_algorithms(before[0], warn_only=before[1])


_deterministic = Held(_hold_deterministic)


def deterministic_algorithms(wanted: bool) -> AbstractContextManager[None]:
    """Torch's deterministic algorithms, where they are ``wanted``; what has none goes on with torch's own warning."""
    return _deterministic() if wanted else nullcontext()


@contextmanager
def kept_random_numbers(devices: Sequence[int] = ()) -> Iterator[None]:
    """Python's, NumPy's and torch's generators, on the CPU and ``devices``, come back as they were."""
    import random

    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


_CPU_ALLOCATOR = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")  # torch's words on a CPU
# The words of CUDA itself and of its libraries, which take memory past torch's allocator.
_CUDA_ALLOCATORS = ("_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in (*_CPU_ALLOCATOR, *_CUDA_ALLOCATORS)
    )


@contextmanager
def device_errors(smaller: str = "") -> Iterator[None]:
    """Raise DeviceError, which says what to try, in place of an out-of-memory error.

    ``smaller`` names the options that make the work smaller, as in "a smaller --batch-size".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        import torch  # waits until here: a command that needs none of it starts quickly

        where, way_out = "this machine", "free some memory, or use a machine with more"
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _CUDA_ALLOCATORS):
            where, way_out = "the device", "pass --device cpu"
        hint = f"pass {smaller}; or {way_out}" if smaller else way_out
        raise DeviceError(f"{where} ran out of memory: {first_line(error)}", hint) from error


class StageTimer:
    """Seconds spent in each named stage of a run; on a GPU a stage ends when its kernels have."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device if device is not None and device.type == "cuda" else None
        self._queued: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

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
                for queued, begun, ended in self._queued:
                    self._add(queued, begun.elapsed_time(ended) / 1000)
                self._queued.clear()
            self._add(name, perf_counter() - started)

    @contextmanager
    def queued(self, name: str) -> Iterator[None]:
        """``stage`` for a small part of another stage: on a GPU the time between its marks there, not waited for."""
        if self._device is None:
            with self.stage(name):
                yield
            return
        import torch

        with torch.cuda.device(self._device):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begun.record()
            try:
                yield
            finally:
                ended.record()
                self._queued.append((name, begun, ended))

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, where the system tells; a container's limit counts as its own.

    The ranks of one machine share its memory alike.
    """
    if device.type == "cuda":
        import torch

        # What torch keeps of tensors that are gone is not free for the system, but it is for the next tensor.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    free = available_memory()
    return None if free is None else free // ranks().local_size
