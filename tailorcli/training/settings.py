"""Options of ``finetune`` and ``probe``, checked; nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from tailorcli.errors import OptionsError
from tailorcli.options import DTypeName

METHODS = ("full", "half", "l2", "spider", "dowser")
ACCUMULATE = ("momentum", "sum")


def _require(condition: bool, message: str, hint: str = "") -> None:
    if not condition:
        raise OptionsError(message, hint)


def _require_positive(**values: float | None) -> None:
    for name, value in values.items():
        shown = name.replace("_", "-")
        _require(value is None or (math.isfinite(value) and value > 0), f"{shown} must be positive, got {value}")


@dataclass(frozen=True)
class TuningOptions:
    """How entries are chosen and held back while a model is fine-tuned."""

    method: str = "full"
    update_ratio: float = 0.1  # of each layer's entries, dowser
    trainable: tuple[str, ...] = ()  # globs of parameters; none: all but embeddings and towers
    last_layers: int | None = None
    accumulate: str = "momentum"  # of gradients, spider
    strength: float = 1e-3  # lambda, l2
    round_steps: int = 1  # steps between two draws, half
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.method in METHODS, f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        ratio = self.update_ratio
        ok = isinstance(ratio, (int, float)) and 0.0 < ratio <= 1.0
        _require(ok, f"update-ratio must be above 0 and at most 1, got {ratio}", "the paper's is 0.1")
        choices = ", ".join(ACCUMULATE)
        _require(self.accumulate in ACCUMULATE, f"accumulate must be one of {choices}, got {self.accumulate!r}")
        ok = math.isfinite(self.strength) and self.strength >= 0
        _require(ok, f"strength must be zero or positive, got {self.strength}", "the usual one is 0.001")
        _require_positive(round_steps=self.round_steps, last_layers=self.last_layers)

    @property
    def momentum(self) -> float:
        """What SPIDER keeps of the gradient accumulated before."""
        return 0.85 if self.accumulate == "momentum" else 1.0


@dataclass(frozen=True)
class ProbeOptions:
    """What ``probe`` runs: samples, draws of random signs for each, and how."""

    num_samples: int = 64
    rademacher: int = 8
    seq_len: int | None = None  # tokens; None: 256 of samples that the model writes, 2048 of data
    batch_size: int = 4
    seed: int = 0
    device: str = "auto"
    dtype: DTypeName | str = DTypeName.AUTO
    trust_remote_code: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require_positive(
            num_samples=self.num_samples,
            rademacher=self.rademacher,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
        )
        names = [each.value for each in DTypeName]
        _require(self.dtype in names, f"dtype must be one of {', '.join(names)}, got {self.dtype!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self) | {"dtype": str(self.dtype), "overwrite": False}
