"""Options of each command as frozen dataclasses that check their own ranges."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

from tailorcli.errors import OptionsError

Solver = Literal["joint", "sequential", "none"]
Method = Literal["average", "joint", "patches"]
TextMode = Literal["line", "chunk"]
Blockwise = Literal["auto", "always", "never"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


def _require(condition: bool, message: str, hint: str = "") -> None:
    if not condition:
        raise OptionsError(message, hint)


def _require_fraction(name: str, value: float) -> None:
    ok = isinstance(value, (int, float)) and math.isfinite(value) and 0.0 <= value <= 1.0
    _require(ok, f"{name} must lie between 0 and 1, got {value}", f"pass --{name} as a fraction, such as 0.1")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _require_solver(damping: float, tolerance: float, max_iterations: int) -> None:
    ok = math.isfinite(damping) and damping >= 0.0
    _require(ok, f"damping must be zero or positive, got {damping}", "the usual range is 0.001 to 0.1")
    _require(0.0 < tolerance < 1.0, f"tolerance must lie between 0 and 1, got {tolerance}")
    _require(max_iterations >= 1, f"max-iterations must be at least 1, got {max_iterations}")


def _require_labels(*labels: str | None) -> None:
    for label in labels:
        ok = label is None or is_label(label)
        _require(ok, f"task and license must be one printable line, got {label!r}", "at most 200 characters")


def is_label(text: str) -> bool:
    """Whether a text can be the name of a task or of a licence: one printable line."""
    return text.isprintable() and 0 < len(text) <= 200


def _require_output(max_shard_size: int | None, resume: bool, overwrite: bool) -> None:
    if max_shard_size is not None:
        _require(max_shard_size >= 1, f"max-shard-size must be positive, got {max_shard_size}")
    _require(not (resume and overwrite), "--resume and --overwrite exclude each other", "pass the one that you mean")


@dataclass(frozen=True)
class CalibrateOptions:
    """What ``calibrate`` runs over the model: how many samples, how long, chosen with which seed."""

    num_samples: int = 128
    seq_len: int = 2048
    batch_size: int = 8
    device: str = "auto"
    dtype: DTypeName = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_mode: TextMode = "line"
    seed: int = 0
    trust_remote_code: bool = False
    blockwise: Blockwise = "auto"  # auto: where the model does not fit the device
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len", "batch_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require_choice("dtype", self.dtype, get_args(DTypeName))
        _require_choice("blockwise", self.blockwise, get_args(Blockwise))
        _require_choice("text-mode", self.text_mode, get_args(TextMode))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)


class LoadOptions(Protocol):
    """What loading a model asks of a command's options."""

    @property
    def dtype(self) -> DTypeName:
        """What the model runs in."""

    @property
    def trust_remote_code(self) -> bool:
        """Whether the model's own code may run."""


@dataclass(frozen=True)
class EvaluateOptions:
    """How ``evaluate`` runs models over the items of tasks, and how its intervals are drawn."""

    batch_size: int = 8
    seq_len: int = 2048  # longer texts are cut, other items left out
    limit: int | None = None  # of a file's records, the first so many
    max_new_tokens: int = 32
    device: str = "auto"
    dtype: DTypeName = "auto"
    trust_remote_code: bool = False
    resamples: int = 2000
    seed: int = 0  # of the resamplings

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "max_new_tokens", "resamples"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self.limit is None or self.limit >= 1, f"limit must be at least 1, got {self.limit}")
        _require_choice("dtype", self.dtype, get_args(DTypeName))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report."""
        return asdict(self)


@dataclass(frozen=True)
class PatchOptions:
    """Which entries ``score`` and ``patch`` keep (Eq. 11) and how ``patch`` compensates them (Eq. 13)."""

    density: float = 0.1
    omega: float = 0.5
    solver: Solver = "joint"
    damping: float = 0.01
    block_size: int = 128
    tolerance: float = 1e-4
    max_iterations: int = 300
    device: str = "auto"
    max_shard_size: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_dtype_mismatch: bool = False
    resized_vocab: bool = False  # tuned has more rows than base, which are taken over
    task: str | None = None  # what a patch file says of itself
    license: str | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require_fraction("density", self.density)
        _require_fraction("omega", self.omega)
        _require_choice("solver", self.solver, get_args(Solver))
        _require(self.block_size >= 1, f"block-size must be at least 1, got {self.block_size}")
        _require_solver(self.damping, self.tolerance, self.max_iterations)
        _require_output(self.max_shard_size, self.resume, self.overwrite)
        _require_labels(self.task, self.license)

    @property
    def needs_hessians(self) -> bool:
        """Whether any step reads a Hessian: sensitivity scores do, and so does every compensation."""
        return self.solver != "none" or self.omega < 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the run record: only what decides the bytes of the output."""
        values = asdict(self)
        del values["resume"], values["overwrite"]
        return values


@dataclass(frozen=True)
class MergeOptions:
    """How ``merge-multi`` stitches the patches of several tasks (Eq. 14, 15)."""

    method: Method = "average"
    weights: tuple[float, ...] = ()  # one a task, in any unit; none: all tasks alike
    damping: float = 0.01
    tolerance: float = 1e-4
    max_iterations: int = 300
    device: str = "auto"
    max_shard_size: int | None = None
    task: str | None = None
    license: str | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require_choice("method", self.method, get_args(Method))
        sound = all(weight > 0 for weight in self.weights) and math.isfinite(sum(self.weights))
        given = ", ".join(map(str, self.weights))
        _require(sound, f"weights must be positive and finite, got {given}", "leave a task out instead of zero")
        _require_labels(self.task, self.license)
        _require_solver(self.damping, self.tolerance, self.max_iterations)
        _require_output(self.max_shard_size, self.resume, self.overwrite)

    def shares(self, num_tasks: int) -> tuple[float, ...]:
        """The tasks' weights with the sum 1."""
        weights = self.weights or (1.0,) * num_tasks
        return tuple(weight / sum(weights) for weight in weights)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the run record: only what decides the bytes of the output."""
        values = asdict(self)
        del values["resume"], values["overwrite"]
        return values


_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*$", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in a size such as ``5GB`` (decimal, as transformers counts) or ``512MiB`` (binary)."""
    match = _SIZE.match(text)
    if match is None or len(text) > 40:  # more digits than that would leave the floats
        raise OptionsError(f"not a size: {text!r}", "write it like 5GB, 500MB or 512MiB")
    number, unit, binary = match.groups()
    power = " KMGT".index(unit.upper() or " ")
    return int(float(number) * (1024 if binary else 1000) ** power)
