"""The loop that patch and merge share: read ahead, work on one tensor at a time, free it before the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from tailorcli.checkpoint.readahead import ReadAhead
from tailorcli.device import StageTimer, device_errors, exact_float32
from tailorcli.distributed import now_on
from tailorcli.errors import NumericalError
from tailorcli.runs.plan import TensorPlan

Loaded = TypeVar("Loaded")
Result = TypeVar("Result")
Prepared = TypeVar("Prepared")


def worked_on(
    tensors: Sequence[TensorPlan],
    load: Callable[[TensorPlan, tuple[str, ...]], Loaded],
    nbytes: Callable[[TensorPlan, tuple[str, ...]], int],
    work: Callable[[TensorPlan, list[Loaded]], Result],
    timer: StageTimer,
) -> Iterator[tuple[TensorPlan, Result | None]]:
    """Each tensor with what ``work`` makes of it, in order; None for one that stays at base.

    ``load`` reads a tensor and the Hessians that are named, on a thread of its own; ``nbytes`` says how many bytes
    that takes. A Hessian is named for the first alone of those that share it. ``work`` takes what was loaded out of
    a list, so that it decides when that is freed. Float32 is exact while it works, and the caller's own setting holds
    in between. Raises NumericalError, which names the tensor, and DeviceError.
    """
    patched = [tensor for tensor in tensors if tensor.action == "patch"]
    shared = [tensor.shared_hessians for tensor in patched]
    needed = [() if i and names == shared[i - 1] else names for i, names in enumerate(shared)]
    sizes = [(tensor.held_bytes, nbytes(tensor, names)) for tensor, names in zip(patched, needed, strict=True)]
    reader = ReadAhead(lambda position: load(patched[position], needed[position]), sizes)
    loads = iter(reader)
    try:
        for tensor in tensors:
            now_on(tensor.name)
            if tensor.action != "patch":
                yield tensor, None
                continue
            with exact_float32(), device_errors():
                with timer.stage("wait for read"):
                    loaded = [next(loads)]
                try:
                    result = work(tensor, loaded)
                except NumericalError as error:
                    raise NumericalError(f"tensor {tensor.name!r}: {error.message}", error.hint) from error
            yield tensor, result
            del result
        now_on("")
    finally:
        reader.close()
        timer.seconds["read"] = timer.seconds.get("read", 0.0) + reader.seconds


class LastPrepared(Generic[Prepared]):
    """What was prepared from a tensor's Hessians, for the tensors after it that share them."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._value: Prepared | None = None

    def of(self, names: tuple[str, ...], prepare: Callable[[], Prepared]) -> Prepared | None:
        """What ``prepare`` makes of the Hessians ``names``; of none, None."""
        if names != self._names:
            self._value = None  # freed before the next one is unpacked
            self._value = prepare() if names else None
            self._names = names
        return self._value
