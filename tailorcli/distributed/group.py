"""The ranks of one job: joined once, then sums, copies and waiting that end when another rank fails."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tailorcli.distributed.launch import Ranks, launched
from tailorcli.distributed.shares import shares
from tailorcli.distributed.watch import Ended, Failure, Watch
from tailorcli.errors import OutputError, RankError, note

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Tell = Callable[[BaseException, Failure], None]

_CONNECT = timedelta(seconds=60)
_JOIN_SECONDS = 180.0  # machines of a cluster differ in how fast they import torch from a shared disk
_SLOW_SECONDS = 15.0  # then it is said for whom the others wait
_FOREVER = timedelta(days=7)  # the watch ends what would wait in vain
_SEEN_SECONDS = 30.0  # a shared file system may show another machine's files late


@dataclass
class _Job:
    here: Ranks
    watch: Watch


_job: _Job | None = None


def ranks() -> Ranks:
    """The place of this process in the job that ``joined`` has joined; outside of that a process is alone."""
    return Ranks() if _job is None else _job.here


@contextmanager
def joined(what_runs: Mapping[str, object] | None = None, tell: Tell | None = None) -> Iterator[Ranks]:
    """Join the other ranks that torchrun started, and work as one job with them; free in a process that is alone.

    ``what_runs`` must be the same on all ranks: the versions, the options, what the inputs are. Sums go over NCCL on
    GPUs, over gloo elsewhere. When a rank raises, ends or stops, all of them leave this context within a minute.

    With ``tell`` one rank is given the error to tell, with the ``Failure`` that all ranks agree on, and every rank
    raises Ended, with the exit code; without it every rank raises the error. Raises RankError where the ranks differ,
    or where one is missing or lost.
    """
    global _job
    here = launched()
    if here.alone or _job is not None:
        yield ranks()
        return
    watch = Watch(here, _store(here), ends_itself=tell is not None)
    watch.give_up = lambda failure: _give_up(watch, failure, tell)
    watch.start()
    job, group = _Job(here, watch), False
    try:
        _wait_until_here(watch)
        group = _join_group(here)
        _job = job
        _require_same(what_runs or {})
        yield here
        wait_for_all("the end")
        watch.leave()
    except BaseException as error:
        failure, tells = watch.settle(error)
        shown = _shown(error, failure, here)
        if tells and tell is not None:
            tell(shown, failure)
        if tells:
            watch.told()
        watch.wait_for_ends()
        if tell is not None:
            raise Ended(failure.code) from error
        if shown is error:
            raise
        raise shown from error
    finally:
        _job = None
        _leave_group(watch, group)
        watch.stop()


def _shown(error: BaseException, failure: Failure, here: Ranks) -> BaseException:
    """What a user is shown: this rank's own error as it is where it is of no tensor, or a bug; else who failed."""
    if failure.kind in ("interrupt", "terminated"):
        return KeyboardInterrupt(failure.message)
    is_own = failure.rank == here.rank and not isinstance(error, Ended)
    return error if is_own and (failure.kind != "error" or not failure.on) else failure.error(here.size)


def _give_up(watch: Watch, failure: Failure, tell: Tell | None) -> None:
    """End a process that does not end by itself."""
    import os

    if tell is not None and failure.by == watch.here.rank:
        tell(failure.error(watch.here.size), failure)
        watch.told()
    os._exit(failure.code)


def _store(here: Ranks, is_watch: bool = True) -> Any:
    """A connection to the store that torchrun's agent holds; without one rank 0 holds it. Raises RankError."""
    import os

    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(
            address,
            port,
            here.size,
            is_master=not held and here.first,
            timeout=_CONNECT,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {here.rank} of {here.size} cannot reach {address}:{port}, where the ranks meet",
            "see that its machine can be reached by that name, and that the port is open between the machines",
        ) from error
    run = os.environ.get("TORCHELASTIC_RUN_ID", "run"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore("/".join(("tailorcli", *run, "watch" if is_watch else "group")), store)


def _wait_until_here(watch: Watch) -> None:
    """Until every rank has come. Raises RankError for those that do not."""
    until, told = time.monotonic() + _JOIN_SECONDS, time.monotonic() + _SLOW_SECONDS
    missing = list(range(watch.here.size))
    while missing := [rank for rank in missing if not watch.is_here(rank)]:
        watch.check()
        listed = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}"
        if time.monotonic() > until:
            raise RankError(
                f"{listed} of {watch.here.size} did not come",
                "for a single process start without torchrun, and with RANK and WORLD_SIZE unset",
            )
        if time.monotonic() > told and watch.here.first:
            note(f"waiting for {listed}")
        time.sleep(0.02)


def _join_group(here: Ranks) -> bool:
    """Make torch's process group, if there is none yet: whether it is ours."""
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return False
    on_gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=_store(here, is_watch=False),
        rank=here.rank,
        world_size=here.size,
        timeout=_FOREVER,
    )
    return True


def _leave_group(watch: Watch, is_ours: bool) -> None:
    from torch import distributed

    if not is_ours or not distributed.is_initialized():
        return
    if watch.failure is not None:  # what is under way would be waited for
        with suppress(Exception):
            distributed.distributed_c10d._abort_process_group()
        return
    if watch.here.first:  # whoever holds the store leaves last
        until = time.monotonic() + 10
        with suppress(RuntimeError):
            while time.monotonic() < until and not watch.have_left():
                time.sleep(0.01)
    distributed.destroy_process_group()


def _require_same(what_runs: Mapping[str, object]) -> None:
    """Raise RankError for the first thing in which the ranks differ."""
    found = gathered({name: str(value) for name, value in what_runs.items()})
    for name in dict.fromkeys(name for each in found for name in each):
        values = [each.get(name, "missing") for each in found]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise RankError(
                f"the ranks differ in {name}: {values[0]} on rank 0, {values[other]} on rank {other}",
                "start the same command, in the same environment and on the same files, on every machine",
            )


def require_shared(path: Path) -> None:
    """See that all ranks see ``path``, which rank 0 has made. Raises OutputError, on all ranks."""
    if _job is None:
        return
    wait_for_all(f"{path}")
    until = time.monotonic() + _SEEN_SECONDS
    while not (seen := path.exists()) and time.monotonic() < until:
        with suppress(OSError):
            next(path.parent.iterdir(), None)  # asks a network file system anew
        time.sleep(0.2)
    blind = [rank for rank, sees in enumerate(gathered(seen)) if not sees]
    if blind:
        raise OutputError(
            f"{path} of rank 0 is not there for rank {blind[0]}",
            "write to a folder that all machines share",
        )


def require_alone(what: str) -> None:
    """Raise RankError where there are several ranks: ``what`` runs in a single process."""
    if not ranks().alone:
        raise RankError(f"{what} runs in a single process, and {ranks().size} were started", "start without torchrun")


def mine(weights: Sequence[int | float]) -> list[int]:
    """The positions in ``weights`` that this rank takes, in ascending order; see ``shares``."""
    return shares(weights, ranks().size)[ranks().rank]


def now_on(name: str) -> None:
    """Note what this rank works on, which errors name; "" when what was divided is done.

    Raises Ended, an interrupt, when another rank has failed.
    """
    if _job is not None:
        _job.watch.now_on(name)


def summed_(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors of one shape, in place: float32, float64 or int64. The same bytes on all ranks."""
    return _together(tensor, lambda group, dense: group.all_reduce(dense, async_op=True), "a sum")


def summed_at(tensor: Tensor, rank: int) -> Tensor:
    """``summed_`` for one rank alone, at half the traffic: the other ranks' tensors hold nothing of use after it."""
    return _together(tensor, lambda group, dense: group.reduce(dense, rank, async_op=True), f"a sum on rank {rank}")


def sent(tensor: Tensor, source: int = 0) -> Tensor:
    """The tensor of rank ``source``, in place of the others' of the same shape, dtype and device."""
    return _together(tensor, lambda group, dense: group.broadcast(dense, source, async_op=True), f"rank {source}")


def _together(tensor: Tensor, begin: Callable[[Any, Tensor], Any], what: str) -> Tensor:
    """What all ranks do with a tensor, in place, which ``begin`` starts with torch.distributed; nothing where alone."""
    if _job is None:
        return tensor
    from torch import distributed

    dense = tensor.contiguous()
    _finish(begin(distributed, dense), what)
    if dense is not tensor:
        tensor.copy_(dense)
    return tensor


def gathered(value: T) -> list[T]:
    """Every rank's plain object, in the order of the ranks."""
    if _job is None:
        return [value]
    import torch
    from torch import distributed

    size = _job.here.size
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    _finish(distributed.all_gather(lengths, torch.tensor([data.numel()]), async_op=True), "all ranks")
    most = max(int(length) for length in lengths)
    padded = torch.zeros(most, dtype=torch.uint8)
    padded[: data.numel()] = data
    found = [torch.zeros(most, dtype=torch.uint8) for _ in range(size)]
    _finish(distributed.all_gather(found, padded, async_op=True), "all ranks")
    return [pickle.loads(each[: int(length)].numpy().tobytes()) for each, length in zip(found, lengths, strict=True)]


def first_of_all(position: int | None) -> int | None:
    """The first position at which a rank's batches wait; None when all ranks are through."""
    now_on("")
    return min((found for found in gathered(position) if found is not None), default=None)


def told(value: T, source: int = 0) -> T:
    """The plain object of rank ``source``, on all ranks."""
    if _job is None:
        return value
    import torch

    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    length = sent(torch.tensor([data.numel()]), source)
    if _job.here.rank == source:
        sent(data, source)
        return value
    data = sent(torch.zeros(int(length), dtype=torch.uint8), source)
    found: T = pickle.loads(data.numpy().tobytes())
    return found


def wait_for_all(what: str) -> None:
    """Go on when every rank is here; ``what`` says what is waited for."""
    if _job is None:
        return
    import torch
    from torch import distributed

    _finish(distributed.all_reduce(torch.zeros(1), async_op=True), what)


def _finish(work: Any, what: str) -> None:
    """Wait for what all ranks do together. Raises Ended when one of them has failed."""
    assert _job is not None
    watch, pause = _job.watch, 0.0
    watch.waits(what)
    try:
        while not work.is_completed():
            watch.check()
            time.sleep(pause)
            pause = min(pause + 0.0001, 0.005)
        work.wait()
    except RuntimeError:  # a connection broke; who is gone is known a moment later
        watch.lost()
        raise
    finally:
        watch.goes_on()
