"""What ``adapter_config.json`` says about a LoRA adapter, and a refusal of all that is no plain LoRA on this base.

A setting that decides the weights and is not known here is refused rather than ignored: a tuned model that is
slightly wrong would go unnoticed.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tailorcli.adapters.patterns import first_matches
from tailorcli.errors import CheckpointError
from tailorcli.files import read_json

CONFIG_FILE = "adapter_config.json"
MERGE_HINT = "merge it with PEFT: PeftModel.from_pretrained(model, DIR).merge_and_unload(), then save_pretrained"
_SAVE_AGAIN = "save the adapter again with PEFT's save_pretrained"
_MAX_RANK = 1 << 20
_MAX_TOKENS = 1 << 24

# Initialisations that leave the base as it is. The others move a part of the base into the adapter, so that the
# adapter only fits a base changed in the same way.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

# Settings under which the tuned model is no W + scale * B A, with what they do.
_REFUSED = {
    "alora_invocation_tokens": "acts on some tokens only (aLoRA)",
    "arrow_config": "routes between adapters at run time (Arrow)",
    "kasa_config": "truncates the base's weights (KaSA)",
    "layer_replication": "repeats layers of the base",
    "megatron_config": "was made for Megatron's parallel layers",
    "monteclora_config": "samples its weights at run time (MonteCLoRA)",
    "target_parameters": "adapts parameters that belong to no layer",
    "use_bdlora": "has block-diagonal factors",
    "use_qalora": "pools the inputs of its layers (QA-LoRA)",
    "velora_config": "was trained with VeLoRA",
}
# Settings that decide nothing once the adapter's tensors are there.
_IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *("lora_ga_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config", "target_modules", "task_type"),
}
_READ = {
    *("alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "peft_type", "r"),
    *("rank_pattern", "trainable_token_indices", "use_dora", "use_rslora"),
}


@dataclass(frozen=True)
class LoraSettings:
    """The settings of an adapter that decide its weights, checked for type and range."""

    file: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None = None
    base_name: str | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)  # of the modules that a pattern names
    alphas: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank R of one module, named as in the network."""
        return int(self.ranks.get(module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor before B A for one module: alpha / R, for rsLoRA alpha / sqrt(R)."""
        rank, alpha = self.rank_of(module), float(self.alphas.get(module, self.alpha))
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def match(self, modules: Iterable[str]) -> LoraSettings:
        """These settings with the ranks and alphas of ``modules`` worked out: do so before asking for one's.

        Raises CheckpointError for a pattern that does not end.
        """
        found = {}
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            try:
                first = first_matches(list(patterns), modules)
            except (TimeoutError, ValueError) as error:
                what = f"{name} of {reprlib.repr(list(patterns))}: {error}"
                raise CheckpointError(
                    f"{self.file}: {what}", f"write the modules' names out, or {MERGE_HINT}"
                ) from error
            found[name] = {module: patterns[key] for module, key in first.items() if key is not None}
        return replace(self, ranks=found["rank_pattern"], alphas=found["alpha_pattern"])

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The token ids whose rows were trained in the table ``module``. Raises CheckpointError where it is unclear."""
        if isinstance(self.token_indices, tuple):
            return self.token_indices
        matching = [ids for key, ids in (self.token_indices or {}).items() if module.endswith(key)]
        if len(matching) != 1:
            what = f"trainable_token_indices names {len(matching)} lists for {module!r}, expected one"
            raise CheckpointError(f"{self.file}: {what}", MERGE_HINT)
        return matching[0]


def read_settings(folder: Path) -> LoraSettings:
    """The settings of the adapter in ``folder``. Raises CheckpointError for all but plain LoRA and DoRA."""
    file = folder / CONFIG_FILE
    config = read_json(file)
    _refuse_other_kinds(file, config)
    return LoraSettings(
        file=file,
        rank=_checked(file, config, "r", 8, _is_rank, "a positive whole number"),
        alpha=_checked(file, config, "lora_alpha", 8, _is_alpha, "a number"),
        rank_pattern=_pattern(file, config, "rank_pattern", _is_rank, "positive whole numbers"),
        alpha_pattern=_pattern(file, config, "alpha_pattern", _is_alpha, "numbers"),
        rslora=_flag(file, config, "use_rslora"),
        dora=_flag(file, config, "use_dora"),
        lora_bias=_flag(file, config, "lora_bias"),
        fan_in_fan_out=_flag(file, config, "fan_in_fan_out"),
        token_indices=_token_indices(file, config.get("trainable_token_indices")),
        base_name=config["base_model_name_or_path"] if isinstance(config.get("base_model_name_or_path"), str) else None,
    )


def _refuse_other_kinds(file: Path, config: dict[str, Any]) -> None:
    """Whatever is not W + scale * B A relative to the base as it was published."""
    kind = config.get("peft_type")
    if kind != "LORA":
        what = "names no peft_type" if kind is None else f"is of type {reprlib.repr(kind)}"
        raise CheckpointError(f"{file} {what}: only LoRA adapters are read", MERGE_HINT)
    init = config.get("init_lora_weights")
    if not isinstance(init, str | bool | None) or init not in _PLAIN_INITS:
        what = f"init_lora_weights is {reprlib.repr(init)}, which may change the base's own weights"
        raise CheckpointError(
            f"{file}: {what}",
            "convert it to plain LoRA (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)), or "
            + MERGE_HINT,
        )
    for name, why in _REFUSED.items():
        if config.get(name) not in (None, False, [], {}):
            raise CheckpointError(f"{file} sets {name}: this adapter {why}, which is not read", MERGE_HINT)
    _checked(file, config, "bias", "none", lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only")
    if _flag(file, config, "lora_bias") and _flag(file, config, "use_dora"):
        raise CheckpointError(f"{file} sets both lora_bias and use_dora, which have no meaning together", _SAVE_AGAIN)
    known = _READ | _IGNORED | _REFUSED.keys()
    unknown = [name for name, value in config.items() if name not in known and value not in (None, False, "", [], {})]
    if unknown:
        raise CheckpointError(
            f"{file} sets {reprlib.repr(unknown[0])}, which this version of tailorcli does not know",
            f"take it out of the file if it leaves the weights alone, or {MERGE_HINT}",
        )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # also refuses NaN


def _checked(file: Path, config: dict[str, Any], name: str, default: Any, check: Callable[[Any], bool], a: str) -> Any:
    value = config.get(name, default)
    if not check(value):
        raise CheckpointError(f"{file}: {name} must be {a}, not {reprlib.repr(value)}", _SAVE_AGAIN)
    return value


def _flag(file: Path, config: dict[str, Any], name: str) -> bool:
    """A setting that is on or off; null is off, as it is to PEFT."""
    return bool(_checked(file, config, name, False, lambda value: isinstance(value, bool | None), "true or false"))


def _pattern(
    file: Path, config: dict[str, Any], name: str, check: Callable[[Any], bool], values: str
) -> dict[str, Any]:
    """A map from regular expressions over module names to numbers."""
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict) or not all(check(value) for value in pattern.values()):
        what = f"must map names to {values}, not {reprlib.repr(pattern)}"
        raise CheckpointError(f"{file}: {name} {what}", _SAVE_AGAIN)
    for key in pattern:
        try:
            first_matches([key], ())
        except ValueError as error:
            raise CheckpointError(f"{file}: {name} has {reprlib.repr(key)}: {error}", _SAVE_AGAIN) from error
    return pattern


def _token_indices(file: Path, value: Any) -> dict[str, tuple[int, ...]] | tuple[int, ...] | None:
    if value is None:
        return None
    lists = list(value.values()) if isinstance(value, dict) else [value]
    if not all(isinstance(ids, list) and all(_is_token(i) for i in ids) and len(set(ids)) == len(ids) for ids in lists):
        what = f"must list distinct token ids, not {reprlib.repr(value)}"
        raise CheckpointError(f"{file}: trainable_token_indices {what}", _SAVE_AGAIN)
    return {key: tuple(ids) for key, ids in value.items()} if isinstance(value, dict) else tuple(value)


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_TOKENS
