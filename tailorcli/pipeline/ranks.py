"""Time and memory of a job on many devices, from what one device does in a second and what there is to do.

Each step takes as long as its fullest rank: its samples, or its tensors by groups of one Hessian, heaviest first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tailorcli.distributed import shares
from tailorcli.errors import OptionsError
from tailorcli.pipeline.work import Piece, Work
from tailorcli.runs.plan import RUNTIME_BYTES
from tailorcli.units import counted

TOGETHER = 32  # samples that a model writes at a time
_MARGIN = 0.8  # of a device's memory that a whole model may fill before it goes block by block
_MOST = 1 << 12


@dataclass(frozen=True)
class Fleet:
    """So many machines with so many ranks each; a rank has a device of its own, or a share of the cores."""

    machines: int = 1
    each: int = 1

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.machines * self.each

    @property
    def passed(self) -> float:
        """How often each byte of a sum over all ranks goes over a rank's link: to the others, and back."""
        return 2.0 * (self.size - 1) / self.size

    def __str__(self) -> str:
        on = f" on each of {self.machines} machines" if self.machines > 1 else ""
        return counted(self.each, "rank") + on


def parse_fleet(text: str) -> Fleet:
    """``8`` is 8 ranks on one machine, ``4x8`` so many on each of 4. Raises OptionsError."""
    match = re.fullmatch(r"\s*(?:(\d{1,7})\s*[x*]\s*)?(\d{1,7})\s*", text)
    fleet = Fleet(int(match[1] or 1), int(match[2])) if match else Fleet(0, 0)
    if not 0 < fleet.size <= _MOST:
        raise OptionsError(f"--ranks must be a number of ranks, got {text!r}", "write 8, or 4x8 for 4 machines of 8")
    return fleet


@dataclass(frozen=True)
class Device:
    """Seconds that one device needs for a unit of each kind of work, and its memory.

    ``product`` is of a multiply-add of a forward pass, ``gather`` of one of a Hessian, ``prepare`` of a channel cubed,
    ``solve`` of a row times its channels squared, ``entry`` of an entry that is scored, selected and measured,
    ``step`` of a block through which a token of each of 32 samples is written, ``passage`` of a multiply-add of one
    of propagation's models, ``load`` of a byte that a rank takes in, ``part`` of one that propagation loads, ``read``
    and ``write`` of a byte on a machine's disk, which its ranks share, ``link`` of a byte between ranks.
    ``share`` is what a rank has of the cores that were measured, where ranks share them.
    """

    product: float
    gather: float
    prepare: float
    solve: float
    entry: float
    step: float
    passage: float
    load: float
    part: float
    read: float
    write: float
    link: float
    memory: int | None = None
    share: float = 1.0


@dataclass(frozen=True)
class RankStep:
    """One step of a job: what its fullest rank spends its seconds on, and bytes of all ranks together."""

    what: str
    parts: dict[str, float]
    read_bytes: int
    write_bytes: int
    device_bytes: int  # of the fullest rank
    blockwise: bool = False

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """What takes the most of it."""
        return max(self.parts, key=self.parts.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self) | {"seconds": self.seconds, "bound": self.bound}


@dataclass(frozen=True)
class RankPlan:
    """The steps of a job on a fleet; ``assumed`` says in words what of it was not measured here."""

    fleet: Fleet
    steps: tuple[RankStep, ...]
    memory: int | None  # of a device
    assumed: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def device_bytes(self) -> int:
        """Of the fullest rank, at its fullest."""
        return max(step.device_bytes for step in self.steps)

    @property
    def fits(self) -> bool:
        """Whether a device holds that."""
        return self.memory is None or self.device_bytes <= self.memory

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--dry-run --json``."""
        return {
            "ranks": self.fleet.size,
            "machines": self.fleet.machines,
            "seconds": self.seconds,
            "device_bytes": self.device_bytes,
            "device_memory": self.memory,
            "steps": [step.to_dict() for step in self.steps],
            "assumed": list(self.assumed),
        }


def repeated(what: str, steps: Sequence[tuple[RankStep, int]]) -> RankStep:
    """Steps that are each taken so many times, as one."""
    parts: dict[str, float] = {}
    for step, times in steps:
        for name, seconds in step.parts.items():
            parts[name] = parts.get(name, 0.0) + times * seconds
    read, write = (
        sum(n * size for (_, n), size in zip(steps, sizes, strict=True))
        for sizes in ([s.read_bytes for s, _ in steps], [s.write_bytes for s, _ in steps])
    )
    return RankStep(what, parts, read, write, max(step.device_bytes for step, _ in steps))


def _fullest(weights: Sequence[float], size: int) -> float:
    return max((sum(weights[i] for i in part) for part in shares(weights, size)), default=0.0)


def calibrating(
    what: str,
    work: Work,
    device: Device,
    fleet: Fleet,
    samples: int,
    tokens: int,
    written: int | None = None,
) -> RankStep:
    """Gather the statistics of a model: samples divided over the ranks, Hessians summed over them, written once.

    ``written`` is the length of the samples where the model writes them first.
    """
    mine, slow = -(-samples // fleet.size), 1.0 / device.share
    share = tokens * mine / max(1, samples)
    once = max(slow * device.load, device.read) * work.model_bytes
    parts = {
        "reading": once,
        "the forward pass": slow * device.product * work.products * share,
        "Hessians": slow * device.gather * work.gathered * share,
        "sums over ranks": device.link * fleet.passed * work.hessian_bytes,
        "writing": device.write * work.stats_bytes,
    }
    if written is not None:
        blocks = sum(1 for block in work.block_bytes if block)
        parts["reading"] += once
        parts["writing samples"] = slow * device.step * blocks * -(-mine // TOGETHER) * max(0, written - 1)
    whole = work.model_bytes + work.hessian_bytes
    blockwise = device.memory is not None and whole > _MARGIN * device.memory
    held = max(work.block_bytes.values()) + work.widest_bytes if blockwise else whole
    read = work.model_bytes * fleet.machines * (2 if written is not None else 1)
    return RankStep(what, parts, read, work.stats_bytes, RUNTIME_BYTES + held, blockwise)


def picking(what: str, work: Work, device: Device, fleet: Fleet, samples: int, tokens: int, models: int) -> RankStep:
    """Run so many models between base and tuned, each made of both, over the samples."""
    slow, share = 1.0 / device.share, tokens * -(-samples // fleet.size) / max(1, samples)
    parts = {
        "reading": 2 * models * max(slow * device.load, device.read) * work.model_bytes,
        "the forward pass": models * slow * device.product * work.products * share,
    }
    return RankStep(
        what, parts, 2 * models * work.model_bytes * fleet.machines, 0, RUNTIME_BYTES + 2 * work.model_bytes
    )


def _solving(group: Sequence[Piece], device: Device, kinds: int) -> dict[str, float]:
    """Seconds of a group by what they are spent on, with statistics of so many ``kinds`` of data."""
    full = [piece for piece in group if piece.full]
    factors = sum(p.hessians * p.channels**3 for p in full if p.hessians > 1 or p is full[0])
    return {
        "solving": device.solve * sum(piece.numel * piece.channels for piece in full),
        "factors": device.prepare * kinds * factors,
        "passes over entries": device.entry * sum(piece.numel for piece in group),
    }


def _hessian_bytes(group: Sequence[Piece]) -> int:
    return sum(2 * p.hessians * p.channels**2 for p in group if p.full and (p.hessians > 1 or p is group[0]))


def patching(
    what: str,
    work: Work,
    device: Device,
    fleet: Fleet,
    kinds: int,
    held_bytes: int,
    write_bytes: int,
    propagated: int | None = None,
    samples: int = 1,
) -> RankStep:
    """Patch all tensors: groups divided over the ranks, or, propagated over so many tokens, those of each block.

    ``kinds`` are the statistics, new and retained; ``held_bytes`` what a rank holds at its fullest.
    """
    slow, groups = 1.0 / device.share, work.groups
    costs = [_solving(group, device, kinds) for group in groups]
    taken = [2 * sum(p.nbytes for p in group) + kinds * _hessian_bytes(group) for group in groups]
    rest = 2 * work.model_bytes - sum(2 * piece.nbytes for piece in work.pieces)  # tensors that stay at base
    read = sum(taken) + max(0, rest)
    weights = [slow * (sum(cost.values()) + device.load * size) for cost, size in zip(costs, taken, strict=True)]
    if propagated is None:
        busiest = max(shares(weights, fleet.size), key=lambda part: sum(weights[i] for i in part))
        parts = {name: slow * sum(costs[i][name] for i in busiest) for name in costs[0]} if costs else {}
        own = slow * device.load * sum(taken[i] for i in busiest)
        parts["reading"] = max(own, device.read * read / fleet.machines)
    else:
        parts = _propagating(work, device, fleet, kinds, weights, (propagated, samples))
        read += 3 * work.model_bytes * fleet.machines
    parts["writing"] = device.write * write_bytes / fleet.machines
    return RankStep(what, parts, read, write_bytes, RUNTIME_BYTES + held_bytes)


def _propagating(
    work: Work,
    device: Device,
    fleet: Fleet,
    kinds: int,
    weights: Sequence[float],
    data: tuple[int, int],
) -> dict[str, float]:
    """Block after block: its groups patched plainly, then run, its moments summed, its layers fitted group by group.

    ``weights`` are the seconds of each group's plain patch, ``data`` the tokens and samples of all kinds.
    """
    slow, (tokens, samples) = 1.0 / device.share, data
    blocks: dict[str, list[int]] = {}
    for position, group in enumerate(work.groups):
        blocks.setdefault(group[0].block, []).append(position)
    once = fitted = moments = 0.0
    shared = 0  # bytes
    for block, members in blocks.items():
        once += _fullest([weights[i] for i in members], fleet.size)
        for group in (work.groups[i] for i in members if block):
            layers = [piece for piece in group if piece.full and piece.hessians == 1 and piece.reached == 1.0]
            fitted += slow * _fullest(
                [p.numel * (device.solve * p.channels + device.entry) for p in layers], fleet.size
            )
            moments += 2.0 * layers[0].channels ** 2 if layers else 0.0
            shared += sum(piece.nbytes for piece in layers)
    share = tokens * -(-samples // fleet.size) / max(1, samples)
    return {
        "the plain patch": once,
        "fitting layers": fitted,
        "reading": 3 * max(slow * device.part, device.read) * work.model_bytes,
        "the forward pass": slow * 2.3 * device.passage * work.products * share,
        "moments": slow * device.gather * moments * share,
        "sums over ranks": device.link * fleet.passed * (4 * kinds * moments + shared),
    }


def distilling(
    what: str, work: Work, device: Device, fleet: Fleet, steps: int, batch: int, tokens: int, kept: int, held: int
) -> RankStep:
    """Train ``kept`` entries: a batch of samples of ``tokens`` each and of both kinds is divided over the ranks."""
    mine, slow = -(-batch // fleet.size), 1.0 / device.share
    parts = {
        "forward and backward": slow * device.product * work.products * tokens * mine * 2 * 3.5 * steps,
        "sums over ranks": device.link * fleet.passed * 4 * kept * steps,
        "reading": 2 * max(slow * device.load, device.read) * work.model_bytes,
    }
    return RankStep(what, parts, 2 * work.model_bytes * fleet.machines, 0, RUNTIME_BYTES + held)
