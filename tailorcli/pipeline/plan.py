"""What a whole job will do and cost, told before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tailorcli.pipeline.ranks import RankPlan
from tailorcli.runs.plan import Plan


@dataclass(frozen=True)
class Step:
    """One step of a job in words; ``done`` where an earlier run's result serves.

    ``seconds`` is an estimate, None where there is none.
    """

    what: str
    done: bool = False
    seconds: float | None = None


@dataclass(frozen=True)
class JobPlan:
    """The steps of a job, what its last does to each tensor, and what all of them need at their fullest.

    ``stats_bytes`` are those of statistics that are yet to be written, ``kept`` says that they stay. In ``one_pass``
    none are: both models are calibrated and patched block by block; else ``why`` says why they are not, if that is
    not plain. ``ranks`` is what the steps cost on many devices, where that was asked.
    """

    steps: tuple[Step, ...]
    patch: Plan
    stats_bytes: int
    kept: bool
    peak_bytes: int
    one_pass: bool = False
    why: str = ""
    ranks: RankPlan | None = None

    @property
    def seconds(self) -> float | None:
        """An estimate of the whole; None where a step has none."""
        left = [step.seconds for step in self.steps if not step.done]
        known = [seconds for seconds in left if seconds is not None]
        return sum(known) if len(known) == len(left) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--dry-run --json``: those of the patch, and the job's own."""
        own = {
            "steps": [asdict(step) for step in self.steps],
            "seconds": self.seconds,
            "statistics_bytes": self.stats_bytes,
            "statistics_stay": self.kept,
            "one_pass": self.one_pass,
            **({"not_in_one_pass": self.why} if self.why else {}),
            "peak_memory_bytes": self.peak_bytes,
        }
        return self.patch.to_dict() | own | ({} if self.ranks is None else {"on_ranks": self.ranks.to_dict()})
