"""Options of each command as frozen dataclasses that check their own ranges."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, get_args

from tailorcli.errors import OptionsError

Solver = Literal["joint", "sequential", "none"]
DAMPING = 0.01  # SparseGPT's
RETAINED_DAMPING = 0.1  # with a retain term: docs/research.md
PatchMethod = Literal["tailor", "interpolate", "dare", "magnitude", "graft", "tailor-released"]
Threshold = Literal["tensor", "global"]
Method = Literal["average", "joint", "patches"]
TextMode = Literal["line", "chunk"]
Blockwise = Literal["auto", "always", "never"]
Fp8Output = Literal["fp8", "bf16"]
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


def _require_weight(method: str, weight: float | None) -> None:
    if weight is None:
        return
    low, high = (0.0, 1.0) if method == "interpolate" else (0.0, 2.0)
    ok = isinstance(weight, (int, float)) and low <= weight <= high and (weight > 0.0 or method == "interpolate")
    allowed = "lie between 0 and 1" if method == "interpolate" else "be positive and at most 2"
    _require(ok, f"weight must {allowed} with method {method}, got {weight}", "1 takes the entries over as they are")


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
    seq_len: int | None = None  # tokens; None: 2048, of samples that the model writes itself 256
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
    synthetic: bool = False  # the model writes its own samples
    keep_samples: bool = True  # beside the statistics, for a patch that propagates

    def __post_init__(self) -> None:
        for name in ("num_samples", "length", "batch_size"):
            shown = "seq_len" if name == "length" else name
            _require(getattr(self, name) >= 1, f"{shown} must be at least 1, got {getattr(self, name)}")
        _require_choice("dtype", self.dtype, get_args(DTypeName))
        _require_choice("blockwise", self.blockwise, get_args(Blockwise))
        _require_choice("text-mode", self.text_mode, get_args(TextMode))

    @property
    def length(self) -> int:
        """Tokens of a sample at most."""
        return self.seq_len if self.seq_len is not None else 256 if self.synthetic else 2048

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self) | {"seq_len": self.length}


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
    damping: float | None = None  # None: 0.1 with a retain term, 0.01 without
    block_size: int = 128
    tolerance: float = 1e-4
    max_iterations: int = 300
    method: PatchMethod = "tailor"
    retain_weight: float = 0.3  # beta of the retain term, where there are retained statistics
    propagate: bool | None = None  # fit layers from the patched model's inputs; None: where there is a retain term
    weight: float | None = None  # the share of the way that the kept entries go; None: the method's own
    seed: int = 0  # of dare's draws and of graft's samples
    threshold: Threshold = "tensor"  # of magnitude and graft: one for each tensor, or one for all
    graft_steps: int = 100
    graft_rate: float = 0.1
    batch_size: int = 8  # samples of a step of graft
    device: str = "auto"
    max_shard_size: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_dtype_mismatch: bool = False
    fp8_output: Fp8Output = "fp8"  # of FP8 weights: the base's own scheme, or bfloat16
    resized_vocab: bool = False  # tuned has more rows than base, which are taken over
    task: str | None = None  # what a patch file says of itself
    license: str | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require_fraction("density", self.density)
        _require_fraction("omega", self.omega)
        _require_choice("solver", self.solver, get_args(Solver))
        ok = math.isfinite(self.retain_weight) and self.retain_weight >= 0.0
        _require(ok, f"retain-weight must be zero or positive, got {self.retain_weight}", "the usual range is 0.1 to 3")
        offered = ", ".join(name for name in get_args(PatchMethod) if name != "tailor-released")
        _require(self.method in get_args(PatchMethod), f"method must be one of {offered}, got {self.method!r}")
        _require_choice("threshold", self.threshold, get_args(Threshold))
        _require_choice("fp8-output", self.fp8_output, get_args(Fp8Output))
        _require_weight(self.method, self.weight)
        what = "propagate is for the method tailor with the solver joint and weight 1"
        _require(self._can_propagate or not self.propagate, what, "pass --no-propagate")
        _require(self.graft_steps >= 0, f"graft-steps must be zero or positive, got {self.graft_steps}")
        _require(self.batch_size >= 1, f"batch-size must be at least 1, got {self.batch_size}")
        sound = math.isfinite(self.graft_rate) and self.graft_rate > 0
        _require(sound, f"graft-rate must be positive, got {self.graft_rate}")
        _require(self.seed >= 0, f"seed must be zero or positive, got {self.seed}")
        _require(self.block_size >= 1, f"block-size must be at least 1, got {self.block_size}")
        _require_solver(self.effective_damping, self.tolerance, self.max_iterations)
        _require_output(self.max_shard_size, self.resume, self.overwrite)
        _require_labels(self.task, self.license)

    def resolved(self, retained: bool) -> PatchOptions:
        """The same with a value for what depends on whether there are ``retained`` statistics."""
        has_term = retained and self.retain_weight > 0.0 and self.method == "tailor"
        damping = self.damping if self.damping is not None else RETAINED_DAMPING if has_term else DAMPING
        propagate = self.propagate if self.propagate is not None else has_term and self._can_propagate
        return replace(self, damping=damping, propagate=propagate)

    @property
    def _can_propagate(self) -> bool:
        return self.method == "tailor" and self.solver == "joint" and self.effective_weight == 1.0

    @property
    def effective_damping(self) -> float:
        """Lambda; before ``resolved`` as without a retain term."""
        return DAMPING if self.damping is None else self.damping

    @property
    def needs_hessians(self) -> bool:
        """Whether any step reads a Hessian: sensitivity scores do, and so does every compensation."""
        if self.method == "tailor":
            return self.solver != "none" or self.omega < 1.0
        return self.method == "tailor-released"

    @property
    def needs_factor(self) -> bool:
        """Whether columns are swept with the factor of H^-1."""
        return self.method == "tailor-released" or (self.method == "tailor" and self.solver == "sequential")

    @property
    def effective_weight(self) -> float:
        """The share of the way from base that the kept entries go: 1, and 0.5 for ``interpolate``."""
        if self.weight is not None:
            return float(self.weight)
        return 0.5 if self.method == "interpolate" else 1.0

    @property
    def counts_first(self) -> bool:
        """Whether one threshold for all tensors has to be found before any tensor is patched."""
        return self.method == "magnitude" and self.threshold == "global" and 0.0 < self.density < 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the run record: only what decides the bytes of the output."""
        values = asdict(self) | {"weight": self.effective_weight, "damping": self.effective_damping}
        values["propagate"] = bool(self.propagate)
        del values["resume"], values["overwrite"]
        if self.fp8_output == "fp8":  # the default says nothing of all the other checkpoints
            del values["fp8_output"]
        return values


# Table 1's setting of the paper: its sweep, a tenth of the entries, both scores alike, no retain term.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"density": 0.1, "omega": 0.5, "solver": "sequential", "damping": 0.01, "block_size": 128},
}


def with_preset(preset: str | None, **given: Any) -> dict[str, Any]:
    """The options given (not None), then those of a preset; what neither says keeps the default of PatchOptions."""
    if preset is not None:
        _require_choice("preset", preset, tuple(PRESETS))
    return PRESETS.get(preset or "", {}) | {name: value for name, value in given.items() if value is not None}


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


def matches(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a tensor name passes the globs: any of ``include`` (all, if there are none), none of ``exclude``."""
    chosen = not include or any(fnmatch.fnmatchcase(name, glob) for glob in include)
    return chosen and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)
