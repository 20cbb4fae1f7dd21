"""Options of ``finetune`` and ``probe``, checked; nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from tailorcli.options import Blockwise, DataColumns, DTypeName, check_kinds, require, require_choice, require_seed

_USUAL = DataColumns()


class TuningMethod(StrEnum):
    """How a fine-tune keeps a base from forgetting."""

    FULL = "full"
    HALF = "half"
    L2 = "l2"
    SPIDER = "spider"
    DOWSER = "dowser"


class Accumulate(StrEnum):
    """How SPIDER gathers gradients: with the paper's momentum, or added up as its released code does."""

    MOMENTUM = "momentum"
    SUM = "sum"


def _require_positive(**values: float | None) -> None:
    for name, value in values.items():
        shown = name.replace("_", "-")
        require(value is None or (math.isfinite(value) and value > 0), f"{shown} must be positive, got {value}")


@dataclass(frozen=True)
class TuningOptions:
    """How entries are chosen and held back while a model is fine-tuned."""

    method: TuningMethod | str = TuningMethod.FULL
    update_ratio: float = 0.1  # of each layer's entries, dowser
    trainable: tuple[str, ...] = ()  # globs of parameters; none: all but embeddings and towers
    last_layers: int | None = None
    accumulate: Accumulate | str = Accumulate.MOMENTUM  # of gradients, spider
    strength: float = 1e-3  # lambda, l2
    round_steps: int = 1  # steps between two draws, half
    seed: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        require_choice(self, "method", TuningMethod)
        ratio = self.update_ratio
        ok = 0.0 < ratio <= 1.0
        require(ok, f"update-ratio must be above 0 and at most 1, got {ratio}", "the paper's is 0.1")
        require_choice(self, "accumulate", Accumulate)
        ok = math.isfinite(self.strength) and self.strength >= 0
        require(ok, f"strength must be zero or positive, got {self.strength}", "the usual one is 0.001")
        _require_positive(round_steps=self.round_steps, last_layers=self.last_layers)
        require_seed(self.seed)

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
    columns: DataColumns = _USUAL  # of the data
    blockwise: Blockwise | str = Blockwise.AUTO  # auto: where the model does not fit with what backward needs

    def __post_init__(self) -> None:
        check_kinds(self)
        _require_positive(
            num_samples=self.num_samples,
            rademacher=self.rademacher,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
        )
        require_seed(self.seed)
        require_choice(self, "dtype", DTypeName)
        require_choice(self, "blockwise", Blockwise)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self) | {"dtype": str(self.dtype), "overwrite": False, "blockwise": str(self.blockwise)}


@dataclass(frozen=True)
class FinetuneOptions(TuningOptions):
    """A whole fine-tune: the method, and how long, how fast and in what portions it trains."""

    epochs: float = 1.0
    steps: int | None = None  # instead of epochs
    learning_rate: float = 2e-5
    batch_size: int = 8  # samples a device
    gradient_accumulation: int = 1
    seq_len: int = 2048
    warmup: float = 0.0  # share of the steps
    weight_decay: float = 0.0
    save_every: int = 500  # steps
    resume: bool = False
    device: str = "auto"
    dtype: DTypeName | str = DTypeName.AUTO
    trust_remote_code: bool = False
    columns: DataColumns = _USUAL  # of the data

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(
            epochs=self.epochs,
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            seq_len=self.seq_len,
            save_every=self.save_every,
        )
        ok = math.isfinite(self.warmup) and 0.0 <= self.warmup < 1.0
        require(ok, f"warmup must be at least 0 and below 1, got {self.warmup}", "it is a share of the steps")
        ok = math.isfinite(self.weight_decay) and self.weight_decay >= 0.0
        require(ok, f"weight-decay must be zero or positive, got {self.weight_decay}")
        require(self.device in ("auto", "cpu", "cuda"), f"device must be auto, cpu or cuda, got {self.device!r}", _ONE)
        require_choice(self, "dtype", DTypeName)

    def identity(self) -> dict[str, Any]:
        """What decides the result: a run is only resumed under the same."""
        return asdict(self) | {"dtype": str(self.dtype), "trainable": list(self.trainable), "resume": False}

    def trainer_arguments(self) -> dict[str, Any]:
        """What the options say in the words of transformers' TrainingArguments."""
        return {
            "num_train_epochs": self.epochs,
            "max_steps": -1 if self.steps is None else self.steps,
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation,
            "warmup_steps": self.warmup,
            "weight_decay": self.weight_decay,
            "save_steps": self.save_every,
            "seed": self.seed,
        }


# The options by the names that TrainingArguments has for them, and what no file may say.
OWN_ARGUMENTS = {
    "num_train_epochs": "--epochs",
    "max_steps": "--steps",
    "learning_rate": "--learning-rate",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation",
    "warmup_steps": "--warmup",
    "weight_decay": "--weight-decay",
    "save_steps": "--save-every",
    "seed": "--seed",
    "output_dir": "-o",
    "resume_from_checkpoint": "--resume",
    "use_cpu": "--device",
}
# Further ones that no file may set, each with the reason; those that begin with PUBLISHING neither.
REFUSED_ARGUMENTS = {
    "save_only_model": "from states without an optimiser no run could go on",
    "ignore_data_skip": "a run that goes on would see other data than an unbroken one",
    "disable_tqdm": "finetune shows its own progress",
    "logging_nan_inf_filter": "finetune stops at a loss that is no number",
}
PUBLISHING = ("push_to_hub", "hub_", "trackio_")
_ONE = "CUDA_VISIBLE_DEVICES chooses among several; torchrun takes all"
