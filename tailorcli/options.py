"""Options of each command as frozen dataclasses that check their own kinds and ranges.

``PatchOptions`` is put together from parts by what they are for: what to keep, how to solve, graft's training, what to
write. A function that needs one part asks for that. Choices are enums whose members are strings: a plain string does
as well, and is checked.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, Protocol

from tailorcli.errors import OptionsError

DAMPING = 0.01  # SparseGPT's
AUTO = "auto"  # of a teacher's weight: by the loss on data of the new task
RETAINED_DAMPING = 0.1  # with a retain term: docs/results/research.md


class Solver(StrEnum):
    """How the kept entries are compensated: the exact optimum, the paper's column sweep, not at all."""

    JOINT = "joint"
    SEQUENTIAL = "sequential"
    NONE = "none"


class PatchMethod(StrEnum):
    """The paper's method, and those that it is compared with."""

    TAILOR = "tailor"
    INTERPOLATE = "interpolate"
    DARE = "dare"
    MAGNITUDE = "magnitude"
    GRAFT = "graft"
    FAPM = "fapm"
    LINES = "lines"
    DG_HARD = "dg-hard"
    CHANGED = "changed"


RELEASED = "tailor-released"  # a method besides: the paper's as its released code has it, to compare with it

_USES_DENSITY = ("tailor", "dare", "magnitude", "graft", "fapm", RELEASED)
DENSE = ("interpolate", "lines", "dg-hard", "changed")  # methods that may change every entry: their density is 1
_OWN = {"alpha": "lines", "beta": "lines", "threshold_scale": "dg-hard"}  # options of one method, told of with it alone
_USES_SEED = ("dare", "graft")
_USES_THRESHOLD = ("magnitude", "graft")


class Score(StrEnum):
    """By what entries are chosen: the paper's score (Eq. 11), or its sum with salience."""

    PAPER = "paper"
    SUM = "sum"


class Threshold(StrEnum):
    """Whether each tensor keeps its own largest entries, or all tensors together keep the largest of all."""

    TENSOR = "tensor"
    GLOBAL = "global"


class MergeMethod(StrEnum):
    """How entries that several tasks keep are put together."""

    AVERAGE = "average"
    JOINT = "joint"
    PATCHES = "patches"


class TextMode(StrEnum):
    """What counts as a document of a text file: a line, or a chunk of so many tokens."""

    LINE = "line"
    CHUNK = "chunk"


class Blockwise(StrEnum):
    """Whether one block of a model is loaded at a time; auto: where it does not fit the device."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Fp8Output(StrEnum):
    """How FP8 weights are written: in the base's own scheme, or in bfloat16."""

    FP8 = "fp8"
    BF16 = "bf16"


class DTypeName(StrEnum):
    """What a model runs in; auto: as it is stored."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class DistillOn(StrEnum):
    """Which tokens count in distillation: all that are predicted, or those of a record's response alone."""

    ALL = "all"
    RESPONSES = "responses"


class Preset(StrEnum):
    """Options that belong together."""

    PAPER = "paper"


def require_seed(seed: int) -> None:
    """Raise OptionsError for a seed that NumPy does not take, which takes the fewest."""
    require(0 <= seed < 1 << 32, f"seed must be from 0 to 4294967295, got {seed}")


def require(condition: bool, message: str, hint: str = "") -> None:
    """Raise OptionsError, with its hint, where a condition on options is not met."""
    if not condition:
        raise OptionsError(message, hint)


_KINDS = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a text", "None": "None"}
_KINDS |= {"tuple[str, ...]": "texts", "tuple[float, ...]": "numbers", "DataColumns": "DataColumns"}


def check_kinds(options: Any) -> None:
    """Make each field of frozen options what its annotation says. Raises OptionsError where it is something else.

    A whole number does for a number, one of NumPy for Python's, a list for a tuple, and a text for a tuple of one.
    """
    for field in fields(options):
        kinds, value = str(field.type).split(" | "), getattr(options, field.name)
        found = [made for kind in kinds for made in _of_kind(kind, value)]
        shown = field.name.replace("_", "-")
        allowed = " or ".join(_KINDS[kind] for kind in kinds if kind in _KINDS)  # members of enums are texts, too
        require(bool(found), f"{shown} must be {allowed}, got {value!r}")
        object.__setattr__(options, field.name, found[0])


def _of_kind(kind: str, value: Any) -> tuple[Any, ...]:
    """``value`` as an annotation has it; nothing where it is of another kind."""
    if kind.startswith("tuple"):
        each = (value,) if isinstance(value, str) else value if isinstance(value, (list, tuple)) else (None,)
        made = [_of_kind(kind[len("tuple[") :].partition(",")[0], one) for one in each]
        return (tuple(one for (one,) in made),) if all(made) else ()
    if isinstance(value, bool):
        return (value,) if kind == "bool" else ()
    if kind == "int":
        return (int(value),) if isinstance(value, Integral) else ()
    if kind == "float":
        try:
            return (float(value),) if isinstance(value, Real) else ()
        except OverflowError:
            return ()
    named: dict[str, type] = {"str": str, "None": type(None), "DataColumns": DataColumns}
    return (value,) if kind in named and isinstance(value, named[kind]) else ()


def _require_fraction(name: str, value: float) -> None:
    ok = math.isfinite(value) and 0.0 <= value <= 1.0
    require(ok, f"{name} must lie between 0 and 1, got {value}", f"pass --{name} as a fraction, such as 0.1")


def require_choice(options: Any, name: str, choices: type[StrEnum], *more: str) -> None:
    """Make the field ``name`` of frozen options a member of ``choices``. Raises OptionsError for another word."""
    value = getattr(options, name)
    if value in more:
        return
    shown = name.replace("_", "-")
    require(value in list(choices), f"{shown} must be one of {', '.join(choices)}, got {value!r}")
    object.__setattr__(options, name, choices(value))


def _require_solver(damping: float, tolerance: float, max_iterations: int) -> None:
    ok = math.isfinite(damping) and damping >= 0.0
    require(ok, f"damping must be zero or positive, got {damping}", "the usual range is 0.001 to 0.1")
    require(0.0 < tolerance < 1.0, f"tolerance must lie between 0 and 1, got {tolerance}")
    require(max_iterations >= 1, f"max-iterations must be at least 1, got {max_iterations}")


def _require_weight(method: str, weight: float | None) -> None:
    if weight is None:
        return
    require(method != "lines", "the method lines has a weight for each layer", "pass --alpha and --beta, no --weight")
    low, high = (0.0, 1.0) if method == "interpolate" else (0.0, 2.0)
    ok = low <= weight <= high and (weight > 0.0 or method == "interpolate")
    allowed = "lie between 0 and 1" if method == "interpolate" else "be positive and at most 2"
    require(ok, f"weight must {allowed} with method {method}, got {weight}", "1 takes the entries over as they are")


def _require_line(alpha: float, beta: float) -> None:
    for name, value in (("alpha", alpha), ("alpha + beta", alpha + beta)):
        ok = math.isfinite(value) and 0.0 <= value <= 2.0
        require(ok, f"{name} must lie between 0 and 2, got {value:g}", "0 is the base, 1 the tuned model")


def _require_teacher(weight: float | str | None) -> None:
    sound = weight is None or (isinstance(weight, (int, float)) and 0.0 < weight <= 2.0)
    require(sound, f"teacher-weight must be positive and at most 2, got {weight}", "1 is TUNED itself")


def _require_labels(*labels: str | None) -> None:
    for label in labels:
        ok = label is None or is_label(label)
        require(ok, f"task and license must be one printable line, got {label!r}", "at most 200 characters")


def is_label(text: str) -> bool:
    """Whether a text can be the name of a task or of a licence: one printable line."""
    return text.isprintable() and 0 < len(text) <= 200


def _plain(options: Any) -> dict[str, Any]:
    """The fields of options as JSON has them: choices as their words."""
    return {name: value.value if isinstance(value, StrEnum) else value for name, value in asdict(options).items()}


@dataclass(frozen=True)
class DataColumns:
    """Which columns of a data file hold a text, or a prompt and its response; None: those of the usual names."""

    text: str | None = None
    prompt: str | None = None
    response: str | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        alone = self.text is None or (self.prompt is None and self.response is None)
        require(alone, "--text-column excludes --prompt-column and --response-column", "a record is one or the other")

    @property
    def any(self) -> bool:
        """Whether a column is named at all."""
        return bool(self.shown)

    @property
    def shown(self) -> str:
        """The named columns in words."""
        return " and ".join(name for name in (self.text, self.prompt, self.response) if name is not None)


@dataclass(frozen=True)
class CalibrateOptions:
    """What ``calibrate`` runs over the model: how many samples, how long, chosen with which seed."""

    num_samples: int = 128
    seq_len: int | None = None  # tokens; None: 2048, of samples that the model writes itself 256
    batch_size: int = 8
    device: str = "auto"
    dtype: DTypeName | str = DTypeName.AUTO
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_mode: TextMode | str = TextMode.LINE
    seed: int = 0
    trust_remote_code: bool = False
    blockwise: Blockwise | str = Blockwise.AUTO  # auto: where the model does not fit the device
    overwrite: bool = False
    synthetic: bool = False  # the model writes its own samples
    keep_samples: bool = True  # beside the statistics, for a patch that propagates
    teacher_weight: float | str | None = None  # the model so far on the way from base to tuned; "auto": picked by loss
    columns: DataColumns = DataColumns()  # of the data
    deterministic: bool = False  # each sample by itself, sums in float64: no bit depends on the batch size

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("num_samples", "length", "batch_size"):
            shown = "seq_len" if name == "length" else name
            require(getattr(self, name) >= 1, f"{shown} must be at least 1, got {getattr(self, name)}")
        require_choice(self, "dtype", DTypeName)
        require_choice(self, "blockwise", Blockwise)
        require_choice(self, "text_mode", TextMode)
        if self.teacher_weight != AUTO:
            _require_teacher(self.teacher_weight)
        require_seed(self.seed)
        both = self.synthetic and self.teacher_weight is not None
        require(not both, "teacher-weight is for the new task, and --synthetic for the base", "leave one out")

    @classmethod
    def of_job(cls, *, distilled: bool) -> CalibrateOptions:
        """How a whole job calibrates by default: on more samples where it trains on them, too."""
        return cls(num_samples=DISTILL_SAMPLES) if distilled else cls()

    @property
    def length(self) -> int:
        """Tokens of a sample at most."""
        return self.seq_len if self.seq_len is not None else 256 if self.synthetic else 2048

    @property
    def together(self) -> int:
        """Samples that go through the model together."""
        return 1 if self.deterministic else self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest; of columns only those that are named, of a teacher only one that is."""
        values = _plain(self) | {"seq_len": self.length}
        columns = {name: column for name, column in values.pop("columns").items() if column is not None}
        values |= {"columns": columns} if columns else {}
        values = {name: value for name, value in values.items() if name != "deterministic" or value}
        return {name: value for name, value in values.items() if name != "teacher_weight" or value is not None}


class LoadOptions(Protocol):
    """What loading a model asks of a command's options."""

    @property
    def dtype(self) -> DTypeName | str:
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
    dtype: DTypeName | str = DTypeName.AUTO
    trust_remote_code: bool = False
    resamples: int = 2000
    seed: int = 0  # of the resamplings

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("batch_size", "seq_len", "max_new_tokens", "resamples"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(self.limit is None or self.limit >= 1, f"limit must be at least 1, got {self.limit}")
        require_choice(self, "dtype", DTypeName)
        require_seed(self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report."""
        return _plain(self)


@dataclass(frozen=True)
class HarnessOptions:
    """Which tasks of lm-evaluation-harness ``evaluate`` runs, and how."""

    tasks: tuple[str, ...] = ()  # names of tasks, groups or tags
    include: str | None = None  # a folder with definitions of tasks of one's own
    shots: int | None = None  # examples in the prompt; None: as each task says
    chat: bool = False  # the prompt goes through the model's chat template
    metrics: tuple[str, ...] = ()  # METRIC, or TASK=METRIC; none: the first usual one that a task has

    def __post_init__(self) -> None:
        check_kinds(self)
        require(self.shots is None or self.shots >= 0, f"harness-shots must be 0 or more, got {self.shots}")
        require(len(set(self.tasks)) == len(self.tasks), "--harness names a task twice", "name every task once")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report."""
        return _plain(self)


@dataclass(frozen=True)
class KeepOptions:
    """What is kept of the tuned model: by which method, how much, of which tensors."""

    density: float = 0.1
    omega: float = 0.5
    score: Score | str | None = None  # None: "sum" where the kept entries are then trained, else "paper"
    method: PatchMethod | str = PatchMethod.TAILOR
    weight: float | None = None  # the share of the way that the kept entries go; None: the method's own
    seed: int = 0  # of dare's draws and of graft's samples
    threshold: Threshold | str = Threshold.TENSOR  # of magnitude and graft: one for each tensor, or one for all
    alpha: float = 0.5  # of lines: the share of the way that the first layer goes, and what lies outside of layers
    beta: float | None = None  # of lines: how much further the last layer goes; None: all the way, 1 - alpha
    threshold_scale: float = 1.0  # of dg-hard: what its threshold is multiplied by
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allow_dtype_mismatch: bool = False
    resized_vocab: bool = False  # tuned has more rows than base, which are taken over

    def __post_init__(self) -> None:
        check_kinds(self)
        _require_fraction("density", self.density)
        _require_fraction("omega", self.omega)
        require_choice(self, "method", PatchMethod, RELEASED)
        if self.score is not None:
            require_choice(self, "score", Score)
        ok = self.score != Score.SUM or self.method == "tailor"
        require(ok, "score sum is for the method tailor", "leave --score or --method out")
        require_choice(self, "threshold", Threshold)
        _require_weight(self.method, self.weight)
        _require_line(self.alpha, self.effective_beta)
        ok = math.isfinite(self.threshold_scale) and self.threshold_scale >= 0.0
        require(ok, f"threshold-scale must be zero or positive, got {self.threshold_scale}", "0 drops nothing")
        require_seed(self.seed)

    @property
    def effective_weight(self) -> float:
        """The share of the way from base that the kept entries go: 1, and 0.5 for ``interpolate``."""
        if self.weight is not None:
            return float(self.weight)
        return 0.5 if self.method == "interpolate" else 1.0

    @property
    def effective_score(self) -> Score:
        """By what entries are chosen; before ``resolved`` as without training."""
        return Score.PAPER if self.score is None else Score(self.score)

    @property
    def effective_beta(self) -> float:
        """How much further the last layer goes than the first with ``lines``; without one given to tuned itself."""
        return 1.0 - self.alpha if self.beta is None else float(self.beta)

    @property
    def is_dense(self) -> bool:
        """Whether the method changes every entry, so that its density is 1."""
        return self.method in DENSE

    @property
    def counts_first(self) -> bool:
        """Whether one threshold for all tensors has to be found before any tensor is patched."""
        return self.method == "magnitude" and self.threshold == "global" and 0.0 < self.density < 1.0


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """How the kept entries are compensated (Eq. 13), and where that is computed."""

    solver: Solver | str = Solver.JOINT
    damping: float | None = None  # None: 0.1 with a retain term, 0.01 without
    block_size: int = 128
    tolerance: float = 2e-4
    max_iterations: int = 300
    retain_weight: float = 0.3  # of the retain term, where there are retained statistics
    # Fit layers from the patched model's inputs; None: where there is a retain term, and nothing is trained after it.
    propagate: bool | None = None
    check_propagation: bool = False  # propagate on nine tenths of the samples, and only if it helps on the rest
    device: str = "auto"

    def __post_init__(self) -> None:
        check_kinds(self)
        require_choice(self, "solver", Solver)
        ok = math.isfinite(self.retain_weight) and self.retain_weight >= 0.0
        require(ok, f"retain-weight must be zero or positive, got {self.retain_weight}", "the usual range is 0.1 to 3")
        require(self.block_size >= 1, f"block-size must be at least 1, got {self.block_size}")
        _require_solver(self.effective_damping, self.tolerance, self.max_iterations)

    @property
    def effective_damping(self) -> float:
        """Lambda; before ``resolved`` as without a retain term."""
        return DAMPING if self.damping is None else self.damping


@dataclass(frozen=True, kw_only=True)
class GraftOptions:
    """How the method graft trains its mask."""

    graft_steps: int = 100
    graft_rate: float = 0.1  # how far a step moves the mask's logits, root mean square
    batch_size: int = 8  # samples of a step

    def __post_init__(self) -> None:
        check_kinds(self)
        require(self.graft_steps >= 0, f"graft-steps must be zero or positive, got {self.graft_steps}")
        require(self.batch_size >= 1, f"batch-size must be at least 1, got {self.batch_size}")
        sound = math.isfinite(self.graft_rate) and self.graft_rate > 0
        require(sound, f"graft-rate must be positive, got {self.graft_rate}")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written, and over what."""

    max_shard_size: int | None = None  # bytes; None: the base's shards
    task: str | None = None  # what a patch file says of itself
    license: str | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_kinds(self)
        size = self.max_shard_size
        require(size is None or size >= 1, f"max-shard-size must be positive, got {size}")
        both = self.resume and self.overwrite
        require(not both, "--resume and --overwrite exclude each other", "pass the one that you mean")
        _require_labels(self.task, self.license)


DISTILL_SAMPLES = 512  # of each kind that a job draws whose entries are trained
DISTILL_STEPS = 400  # for so many samples


@dataclass(frozen=True)
class DistillOptions:
    """How the kept entries of a patch are trained towards their teachers.

    ``rate`` is in units of the root mean square by which the patch moved a tensor's kept entries, so that it means
    the same in every tensor, and for models of every size. ``weight`` is that of the retained samples. Without
    ``steps`` it depends on the number of samples how many there are: see ``for_samples``.
    """

    steps: int | None = None
    rate: float = 0.1
    weight: float = 2.0
    batch_size: int = 8  # samples of each kind in a step
    seed: int = 0
    on: DistillOn | str = DistillOn.ALL  # which tokens count, where the records had responses

    def __post_init__(self) -> None:
        check_kinds(self)
        require_choice(self, "on", DistillOn)
        require(self.steps is None or self.steps >= 1, f"distill-steps must be at least 1, got {self.steps}")
        require(self.batch_size >= 1, f"distill-batch-size must be at least 1, got {self.batch_size}")
        require_seed(self.seed)
        for name in ("rate", "weight"):
            value = getattr(self, name)
            ok = math.isfinite(value) and value > 0
            require(ok, f"distill-{name} must be positive, got {value}", "the usual range is 0.02 to 0.3 and 0.5 to 4")

    def for_samples(self, count: int) -> DistillOptions:
        """With a known number of steps, for at most ``count`` samples of a kind.

        Unless it is given, that is 400 for up to 512 samples, and grows with the root of their number: 800 for 2,048.
        """
        if self.steps is not None:
            return self
        return replace(self, steps=round(DISTILL_STEPS * max(1.0, math.sqrt(count / DISTILL_SAMPLES))))

    @property
    def known_steps(self) -> int:
        """The steps of options that ``for_samples`` gave."""
        assert self.steps is not None
        return self.steps


# The fields of PatchOptions in the order of the report, which is older than their parts.
_REPORTED = (
    *("density", "omega", "score", "solver", "damping", "block_size", "tolerance", "max_iterations"),
    *("method", "retain_weight", "propagate", "check_propagation", "weight", "seed", "threshold"),
    *("alpha", "beta", "threshold_scale", "graft_steps", "graft_rate", "batch_size", "device"),
    *("max_shard_size", "include", "exclude", "allow_dtype_mismatch"),
    *("fp8_output", "trust_remote_code", "resized_vocab", "task", "license", "teacher_weight"),
)


@dataclass(frozen=True)
class PatchOptions(OutputOptions, GraftOptions, SolverOptions, KeepOptions):
    """Which entries ``score`` and ``patch`` keep (Eq. 11), how ``patch`` compensates them (Eq. 13) and what it writes.

    Every option of the parts is one of its keyword arguments. Raises OptionsError for a value out of its range.
    """

    fp8_output: Fp8Output | str = Fp8Output.FP8  # of FP8 weights: the base's own scheme, or bfloat16
    trust_remote_code: bool = False  # run the models' own code, where they are run
    # Patch towards base + w * (tuned - base); None: as the statistics were made; "auto": picked first, by the loss.
    teacher_weight: float | str | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        require_choice(self, "fp8_output", Fp8Output)
        if self.teacher_weight != AUTO:
            _require_teacher(self.teacher_weight)
        for part in (KeepOptions, SolverOptions, GraftOptions, OutputOptions):
            part.__post_init__(self)
        what = "propagate is for the method tailor with the solver joint and weight 1"
        require(self._can_propagate or not self.propagate, what, "leave --propagate out")

    def resolved(self, retained: bool, distilled: bool = False) -> PatchOptions:
        """These options with a value for what depends on whether there are ``retained`` statistics.

        And on whether the kept entries are ``distilled``, trained after they are chosen: another score suits that, and
        propagation before it is not missed. Raises OptionsError for check_propagation of what is not propagated.
        """
        has_term = retained and self.retain_weight > 0.0 and self.method == "tailor"
        damping = self.damping if self.damping is not None else RETAINED_DAMPING if has_term else DAMPING
        usual = has_term and self._can_propagate and (self.check_propagation or not distilled)
        propagate = usual if self.propagate is None else self.propagate
        what = "check-propagation is for a patch that is propagated"
        require(propagate or not self.check_propagation, what, "pass --retain STATS and no --no-propagate")
        trained = distilled and self.score is None and self.method == "tailor"
        return replace(self, damping=damping, propagate=propagate, score=Score.SUM if trained else self.score)

    @property
    def known_teacher(self) -> float | None:
        """The teacher's weight, if it is a number."""
        return None if self.teacher_weight is None or self.teacher_weight == AUTO else float(self.teacher_weight)

    @property
    def before_teacher(self) -> PatchOptions:
        """These options as long as a weight that is "auto" has not been picked: what a plan is made with."""
        return replace(self, teacher_weight=None) if self.teacher_weight == AUTO else self

    @property
    def _can_propagate(self) -> bool:
        return self.method == "tailor" and self.solver == "joint" and self.effective_weight == 1.0

    @property
    def needs_hessians(self) -> bool:
        """Whether any step reads a Hessian: sensitivity scores do, and so does every compensation."""
        if self.method == "tailor":
            return self.solver != "none" or self.omega < 1.0
        return self.method == RELEASED

    @property
    def fits_statistics(self) -> bool:
        """Whether statistics decide what is written; others lend their samples to distillation alone."""
        return self.method == "tailor" and self.needs_hessians

    @property
    def needs_factor(self) -> bool:
        """Whether columns are swept with the factor of H^-1."""
        return self.method == RELEASED or (self.method == "tailor" and self.solver == "sequential")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report: all but how an output that is there already is met."""
        values = _plain(self) | {"weight": self.effective_weight, "damping": self.effective_damping}
        values["propagate"] = bool(self.propagate)
        values["beta"] = self.effective_beta
        values = {name: value for name, value in values.items() if _OWN.get(name, self.method) == self.method}
        if self.effective_score == Score.PAPER:  # as in reports that are older than the choice
            del values["score"]
        if self.is_dense:
            values["density"] = 1.0
        if self.fp8_output == "fp8":  # the default says nothing of all the other checkpoints
            del values["fp8_output"]
        for name in ("trust_remote_code", "check_propagation"):  # which no report of the others names
            if not values[name]:
                del values[name]
        if self.teacher_weight is None:  # tuned itself is not named, but where the statistics have another weight
            del values["teacher_weight"]
        return {name: values[name] for name in _REPORTED if name in values}

    def identity(self, retained: bool) -> dict[str, Any]:
        """The options that decide what is written: an interrupted run goes on only under the same.

        Those of other methods and solvers are left out, and so is what only says how the work is done, such as the
        device. Of options as ``resolved`` gives them for ``retained``.
        """
        used = {"method", "weight", "include", "exclude", "fp8_output", "resized_vocab"}
        used |= {"max_shard_size", "task", "license", "teacher_weight"}
        if self.method == "tailor":
            used |= {"omega", "score", "solver", "propagate", "check_propagation"}
            if self.solver == "joint":
                used |= {"tolerance", "max_iterations"}
        for names, is_used in (
            (("density",), self.method in _USES_DENSITY),
            (("damping",), self.needs_hessians),
            (("retain_weight",), self.needs_hessians and retained),
            (("block_size",), self.needs_factor),
            (("seed",), self.method in _USES_SEED),
            (("threshold",), self.method in _USES_THRESHOLD),
            (("alpha", "beta", "threshold_scale"), True),  # which only its own method's options have
            (("graft_steps", "graft_rate", "batch_size"), self.method == "graft"),
        ):
            if is_used:
                used |= set(names)
        return {name: value for name, value in self.to_dict().items() if name in used}


def options_in_report(values: Mapping[str, Any]) -> PatchOptions:
    """The options that a report names, as ``PatchOptions.to_dict`` put them there.

    Raises OptionsError for values out of their ranges.
    """
    known = {each.name for each in fields(PatchOptions)}
    found: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if found.get("method") == PatchMethod.LINES:  # which has one for each layer
        found.pop("weight", None)
    return PatchOptions(**{name: value for name, value in found.items() if name in known})


# Table 1's setting of the paper: its sweep, a tenth of the entries, both scores alike, no retain term.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"density": 0.1, "omega": 0.5, "solver": "sequential", "damping": 0.01, "block_size": 128},
}


def with_preset(preset: str | None, **given: Any) -> dict[str, Any]:
    """The options given (not None), then those of a preset; what neither says keeps the default of PatchOptions."""
    require(preset is None or preset in PRESETS, f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS.get(preset or "", {}) | {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class MergeOptions(OutputOptions):
    """How ``merge-multi`` stitches the patches of several tasks (Eq. 14, 15)."""

    method: MergeMethod | str = MergeMethod.AVERAGE
    weights: tuple[float, ...] = ()  # one a task, in any unit; none: all tasks alike
    damping: float = 0.01
    tolerance: float = 2e-4
    max_iterations: int = 300
    device: str = "auto"

    def __post_init__(self) -> None:
        OutputOptions.__post_init__(self)
        require_choice(self, "method", MergeMethod)
        sound = all(weight > 0 for weight in self.weights) and math.isfinite(sum(self.weights))
        given = ", ".join(map(str, self.weights))
        require(sound, f"weights must be positive and finite, got {given}", "leave a task out instead of zero")
        _require_solver(self.damping, self.tolerance, self.max_iterations)

    def shares(self, num_tasks: int) -> tuple[float, ...]:
        """The tasks' weights with the sum 1."""
        weights = self.weights or (1.0,) * num_tasks
        return tuple(weight / sum(weights) for weight in weights)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report: all but how an output that is there already is met."""
        values = _plain(self)
        first = ("method", "weights", "damping", "tolerance", "max_iterations", "device")
        return {name: values[name] for name in (*first, "max_shard_size", "task", "license")}

    def identity(self, num_tasks: int) -> dict[str, Any]:
        """The options that decide what is written: an interrupted run goes on only under the same."""
        used = {"method", "max_shard_size", "task", "license"}
        if self.method == "joint":
            used |= {"damping", "tolerance", "max_iterations"}
        chosen = {name: value for name, value in self.to_dict().items() if name in used}
        return chosen | {"shares": self.shares(num_tasks)}  # weights of one unit or another are the same


def matches(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a tensor name passes the globs: any of ``include`` (all, if there are none), none of ``exclude``."""
    chosen = not include or any(fnmatch.fnmatchcase(name, glob) for glob in include)
    return chosen and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)
