"""How the tensors of a LoRA adapter act on those of its base: every name, shape and dtype checked, on headers alone."""

from __future__ import annotations

import re
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailorcli.adapters.config import CONFIG_FILE, MERGE_HINT, LoraSettings
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, TensorInfo, read_header
from tailorcli.errors import CheckpointError
from tailorcli.files import read_json

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor that PEFT saves
_SAVE_AGAIN = "save the adapter again with PEFT's save_pretrained"
_OTHER_BASE = "pass the base that the adapter was trained on, saved in full and not quantized"
_OTHER_NAMES = f"{_OTHER_BASE}; if it is, its names differ too much: {MERGE_HINT}"

# Endings of an adapter's tensor names after the module's own name.
_DOWN, _UP, _BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_TABLE_DOWN, _TABLE_UP = "lora_embedding_A", "lora_embedding_B"
_MAGNITUDE, _TOKENS = "lora_magnitude_vector", "token_adapter.trainable_tokens_delta"
_BASE_WEIGHT, _BASE_BIAS = "base_layer.weight", "base_layer.bias"
# With bias="all" PEFT saves the biases of a module that is trained whole under its wrapper's names, too.
_TRAINED_COPY, _UNTRAINED_COPY = ".modules_to_save.", ".original_module."
_PARTS = (_DOWN, _UP, _BIAS, _TABLE_DOWN, _TABLE_UP, _MAGNITUDE, _TOKENS, _BASE_WEIGHT, _BASE_BIAS)

# transformers' Conv1D stores (I, O): the models that have it and the names of those modules. Where a matrix is
# square its shape does not tell, and neither does fan_in_fan_out, which PEFT overwrites with every layer it meets.
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
_CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}

_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "decoder.weight", "output_projection.weight")
_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tokens_embed.weight")
_WITH_HEAD = re.compile("ForCausalLM|LMHead|ForConditionalGeneration|ForMaskedLM|ForPreTraining")


@dataclass(frozen=True)
class Formula:
    """How one tensor comes about: W + scale * B A, for DoRA scaled row by row; or W + shift; or W with new rows.

    ``weight`` is W, in the base or (where the adapter saved it) in the adapter. ``down`` is A (R, I), ``up`` B (O, R).
    ``transposed``: W is stored as (I, O), as embeddings and GPT-2's layers are.
    """

    weight: TensorInfo
    scale: float = 1.0
    down: TensorInfo | None = None
    up: TensorInfo | None = None
    transposed: bool = False
    magnitude: TensorInfo | None = None  # DoRA's length of every output's row, (O,)
    shift: TensorInfo | None = None  # added to a bias, times the scale
    row_values: TensorInfo | None = None
    rows: tuple[int, ...] = ()

    @property
    def parts(self) -> list[TensorInfo]:
        """The adapter's tensors in it, besides W."""
        return [part for part in (self.down, self.up, self.magnitude, self.shift, self.row_values) if part is not None]


LoadedNames = Callable[[Checkpoint, Iterable[str]], dict[str, str]]  # of a model's tensors, once it is loaded


def fit_adapter(
    folder: Path, base: Checkpoint, settings: LoraSettings, loaded_names: LoadedNames | None = None
) -> tuple[dict[str, Formula], dict[str, TensorInfo]]:
    """What the adapter in ``folder`` does to ``base``: formulas of the tensors to form, and tensors that it replaces.

    Both are keyed by the base's names. Raises CheckpointError for whatever does not fit or has no place in the base.
    """
    return _Fit(folder, base, settings, loaded_names).fit()


class _Fit:
    """Fits an adapter's tensors to its base, by names and shapes."""

    def __init__(
        self, folder: Path, base: Checkpoint, settings: LoraSettings, loaded_names: LoadedNames | None
    ) -> None:
        self.loaded_names = loaded_names
        self.folder = folder
        self.base = base
        self.settings = settings
        self.file = folder / WEIGHTS_FILE
        self.config = _base_config(base.path)
        self.modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)  # module -> ending -> tensor
        self.whole: dict[str, TensorInfo] = {}  # tensors saved as they are

    def fit(self) -> tuple[dict[str, Formula], dict[str, TensorInfo]]:
        """Check everything and decide how each tensor is formed.

        Raises CheckpointError for what the base or the adapter's config does not bear out.
        """
        self._sort_tensors()
        self.settings = self.settings.match(self.modules)
        targets = [f"{module}.weight" for module, parts in self.modules.items() if parts.keys() - {_BIAS, _BASE_BIAS}]
        targets += [f"{module}.bias" for module, parts in self.modules.items() if parts.keys() & {_BIAS, _BASE_BIAS}]
        repeated = [name for name in targets if name in self.whole]
        if repeated:
            raise self._error(f"it both adapts and replaces {repeated[0]!r}")
        found = self._match([*targets, *self.whole])
        formulas: dict[str, Formula] = {}
        saved = {found[name]: self._check_saved(info, found[name]) for name, info in self.whole.items()}
        for module, parts in self.modules.items():
            self._check_parts(module, parts)
            if _BIAS in parts:
                name = found[f"{module}.bias"]
                formulas[name] = self._bias(module, parts, name)
            elif _BASE_BIAS in parts:
                name = found[f"{module}.bias"]
                saved[name] = self._check_saved(parts[_BASE_BIAS], name)
            if _TOKENS in parts:
                name = found[f"{module}.weight"]
                formulas[name] = self._tokens(module, parts, name)
            elif parts.keys() & {_DOWN, _TABLE_DOWN}:
                name = found[f"{module}.weight"]
                formulas[name] = self._lora(module, parts, name)
            elif _BASE_WEIGHT in parts:
                name = found[f"{module}.weight"]
                saved[name] = self._check_saved(parts[_BASE_WEIGHT], name)
        self._check_tying(formulas, saved)
        return formulas, saved

    def _error(self, what: str, hint: str = MERGE_HINT) -> CheckpointError:
        return CheckpointError(f"{self.file}: {what}", hint)

    def _sort_tensors(self) -> None:
        """Every tensor by its module and its part there."""
        if not self.file.is_file() and (self.folder / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{self.folder} holds a pickled adapter, which is never loaded",
                "convert it where you trust it: load it with PEFT and save_pretrained(NEW_DIR)",
            )
        if not self.file.is_file():
            raise CheckpointError(f"{self.folder} holds an adapter without {self.file.name}", _SAVE_AGAIN)
        tensors, _ = read_header(self.file)
        if not tensors:
            raise self._error("it holds no tensors", _SAVE_AGAIN)
        again: dict[str, TensorInfo] = {}  # what PEFT saves once more under the names of its own wrapper
        for info in tensors.values():
            if _UNTRAINED_COPY in info.name:
                continue
            if info.dtype not in PATCHABLE_DTYPES:
                raise self._error(f"tensor {info.name!r} is {info.dtype}, expected a plain floating-point dtype")
            if info.numel == 0:
                raise self._error(f"tensor {info.name!r} has no entries", _SAVE_AGAIN)
            name = info.name.removeprefix(PREFIX)
            if _TRAINED_COPY in name:
                again[name.replace(_TRAINED_COPY, ".")] = info
                continue
            ending = next((part for part in _PARTS if name.endswith(f".{part}")), None)
            if ending is not None:
                module = self.modules[name.removesuffix(f".{ending}")]
                if ending in module:
                    raise self._error(f"it has tensor {name!r} twice, with and without {PREFIX!r}", _SAVE_AGAIN)
                module[ending] = info
            elif "lora_" in name or "token_adapter" in name:
                raise self._error(f"tensor {info.name!r} is no part of a LoRA adapter that is known here")
            elif name in self.whole:
                raise self._error(f"it has tensor {name!r} twice, with and without {PREFIX!r}", _SAVE_AGAIN)
            else:
                self.whole[name] = info
        self.whole = again | self.whole

    def _match(self, names: list[str]) -> dict[str, str]:
        """The base's name of each tensor: the same, or that of the same parameter of the loaded model.

        Or all that are left have one and the same prefix more or less.
        """
        found = {name: name for name in names if name in self.base.tensors}
        missing = [name for name in names if name not in found]
        if missing and self.loaded_names is not None:
            found |= self._by_loaded_names(missing, self.loaded_names)
            missing = [name for name in names if name not in found]
        if not missing:
            return found
        shifts = self._shifts(missing)
        unknown = [name for name, options in zip(missing, shifts, strict=True) if not options]
        if unknown:
            raise self._unknown(unknown)
        common = set.intersection(*shifts)
        if len(common) != 1:
            what = "more than one way" if common else "no single way"
            raise self._error(f"there is {what} to fit {_some(missing)} to the names in {self.base.path}", _OTHER_NAMES)
        dropped, added = common.pop()
        found |= {name: added + name.removeprefix(dropped) for name in missing}
        counts: dict[str, list[str]] = defaultdict(list)
        for name, target in found.items():
            counts[target].append(name)
        twice = next((sources for sources in counts.values() if len(sources) > 1), None)
        if twice:
            raise self._error(f"{_some(twice)} are the same tensor of {self.base.path}", _OTHER_BASE)
        return found

    def _by_loaded_names(self, names: list[str], loaded_names: LoadedNames) -> dict[str, str]:
        """The base's tensors that become the same parameters of the loaded model as these, one each."""
        loaded = loaded_names(self.base, [*names, *self.base.tensors])
        stored: dict[str, list[str]] = defaultdict(list)
        for name in self.base.tensors:
            stored[loaded[name]].append(name)
        return {name: stored[loaded[name]][0] for name in names if len(stored[loaded[name]]) == 1}

    def _shifts(self, names: list[str]) -> list[set[tuple[str, str]]]:
        """For each name the prefixes (dropped, added) that turn it into a name of the base."""
        prefixes: dict[str, set[str]] = defaultdict(set)  # of the base's names, by what follows
        for other in self.base.tensors:
            for i, letter in enumerate(other):
                if letter == ".":
                    prefixes[other[i + 1 :]].add(other[: i + 1])
        own = {other.partition(".")[0] for other in self.base.tensors}
        shifts = []
        for name in names:
            options = {("", prefix) for prefix in prefixes.get(name, ())}
            if name.partition(".")[0] not in own:  # a base with names under this prefix does not lack it
                cuts = [i + 1 for i, letter in enumerate(name) if letter == "."]
                options |= {(name[:cut], "") for cut in cuts if name[cut:] in self.base.tensors}
            shifts.append(options)
        return shifts

    def _unknown(self, names: list[str]) -> CheckpointError:
        what = f"{len(names)} of its tensors are not in the base ({self.base.path}): {_some(names)}"
        if any(name.endswith(_HEADS) for name in names) and not any(n.endswith(_HEADS) for n in self.base.tensors):
            hint = "the base has no output layer of its own (it ties it to the embedding): save it untied first"
            return self._error(what, f"{hint}, or {MERGE_HINT}")
        return self._error(what, _OTHER_NAMES)

    def _check_parts(self, module: str, parts: Mapping[str, TensorInfo]) -> None:
        """The parts of one module belong together."""
        pairs = [(_DOWN, _UP), (_TABLE_DOWN, _TABLE_UP)]
        for first, second in pairs:
            for here, other in ((first, second), (second, first)):
                if here in parts and other not in parts:
                    raise self._error(f"module {module!r} has {here} without {other}", _SAVE_AGAIN)
        kinds = [kind for kind in (_DOWN, _TABLE_DOWN, _TOKENS) if kind in parts]
        if len(kinds) > 1 or (_TOKENS in parts and _BASE_WEIGHT in parts):
            raise self._error(f"module {module!r} is adapted in two ways")
        if (_BIAS in parts or _MAGNITUDE in parts) and not parts.keys() & {_DOWN, _TABLE_DOWN}:
            raise self._error(f"module {module!r} has {_BIAS if _BIAS in parts else _MAGNITUDE} alone", _SAVE_AGAIN)
        if _BIAS in parts and _DOWN not in parts:
            raise self._error(f"module {module!r} has {_BIAS}, but is an embedding")
        flags = [("use_dora", self.settings.dora, _MAGNITUDE), ("lora_bias", self.settings.lora_bias, _BIAS)]
        for flag, wanted, part in flags:
            if kinds not in ([], [_TOKENS]) and wanted != (part in parts):
                what = f"{'lacks' if wanted else 'has'} {part}, but {CONFIG_FILE} says {flag} {str(wanted).lower()}"
                raise self._error(f"module {module!r} {what}", _SAVE_AGAIN)

    def _check_saved(self, info: TensorInfo, name: str) -> TensorInfo:
        """A tensor that takes the place of the base's, under the base's name."""
        base = self.base.tensors[name]
        if base.dtype not in PATCHABLE_DTYPES:
            raise self._error(f"it replaces {name!r}, which is {base.dtype} in the base ({self.base.path})")
        self._check_shape(info, base.shape, name)
        return TensorInfo(name, info.dtype, info.shape, info.file, info.offset, info.nbytes)

    def _check_shape(self, info: TensorInfo, expected: tuple[int, ...], name: str) -> None:
        if info.shape == expected:
            return
        what = f"tensor {info.name!r} has shape {list(info.shape)}, {name!r} of the base asks for {list(expected)}"
        raise self._error(what, self._shape_hint(name, info.shape))

    def _shape_hint(self, name: str, shape: tuple[int, ...]) -> str:
        """A token table with another number of rows is a resized vocabulary."""
        rows = self.base.tensors[name].shape[:1]
        if name.endswith((*_TABLES, *_HEADS)) and rows and rows[0] not in shape:
            return "this looks like a resized vocabulary: resize the base first, with resize_token_embeddings"
        return _OTHER_BASE

    def _base_matrix(self, module: str, name: str) -> TensorInfo:
        info = self.base.tensors[name]
        if info.dtype not in PATCHABLE_DTYPES:
            what = f"module {module!r} is stored as {info.dtype} in the base ({self.base.path})"
            raise self._error(what, "pass the base as it was before it was quantized")
        if len(info.shape) != 2:
            raise self._error(f"module {module!r} has a weight of shape {list(info.shape)}, which is no matrix")
        return info

    def _lora(self, module: str, parts: Mapping[str, TensorInfo], name: str) -> Formula:
        """W + scale * B A, every shape checked."""
        base = self._base_matrix(module, name)
        table = _TABLE_DOWN in parts
        down, up = (parts[_TABLE_DOWN], parts[_TABLE_UP]) if table else (parts[_DOWN], parts[_UP])
        rank = self.settings.rank_of(module)
        if len(down.shape) != 2 or len(up.shape) != 2:
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise self._error(f"module {module!r} has factors of shapes {shapes}, which are no matrices")
        if down.shape[0] != rank or up.shape[1] != rank:
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise self._error(f"module {module!r} has factors of shapes {shapes}, but rank {rank}", _SAVE_AGAIN)
        outputs, inputs = up.shape[0], down.shape[1]
        if base.shape not in ((outputs, inputs), (inputs, outputs)) or (table and base.shape != (inputs, outputs)):
            what = f"module {module!r} takes {inputs} to {outputs} channels, {name!r} is {list(base.shape)} in the base"
            raise self._error(what, self._shape_hint(name, (inputs, outputs)))
        magnitude = parts.get(_MAGNITUDE)
        if magnitude is not None and magnitude.shape != (outputs,):
            what = f"tensor {magnitude.name!r} has shape {list(magnitude.shape)}, expected [{outputs}]"
            raise self._error(what, _SAVE_AGAIN)
        weight = base
        if _BASE_WEIGHT in parts:
            self._check_shape(parts[_BASE_WEIGHT], base.shape, name)
            weight = parts[_BASE_WEIGHT]
        square = base.shape[0] == base.shape[1]
        transposed = table or (self._is_conv1d(module) if square else base.shape == (inputs, outputs))
        return Formula(weight, self.settings.scale_of(module), down, up, transposed, magnitude)

    def _is_conv1d(self, module: str) -> bool:
        """Whether a square matrix is stored as (I, O)."""
        kind = self.config.get("model_type")
        if isinstance(kind, str) and kind in _CONV1D_MODELS:
            return module.rpartition(".")[2] in _CONV1D_MODULES
        return self.settings.fan_in_fan_out

    def _bias(self, module: str, parts: Mapping[str, TensorInfo], name: str) -> Formula:
        """A bias plus scale times the bias of B."""
        base = self.base.tensors[name]
        if base.dtype not in PATCHABLE_DTYPES:
            raise self._error(f"the bias of module {module!r} is {base.dtype} in the base ({self.base.path})")
        weight = parts.get(_BASE_BIAS, base)
        for info in (weight, parts[_BIAS]):
            self._check_shape(info, base.shape, name)
        return Formula(weight, self.settings.scale_of(module), shift=parts[_BIAS])

    def _tokens(self, module: str, parts: Mapping[str, TensorInfo], name: str) -> Formula:
        """W with the rows of some tokens replaced."""
        base, values = self._base_matrix(module, name), parts[_TOKENS]
        rows = self.settings.tokens_of(module)
        if values.shape != (len(rows), base.shape[1]) or max(rows, default=0) >= base.shape[0]:
            what = f"tensor {values.name!r} of shape {list(values.shape)} and {len(rows)} trainable_token_indices"
            raise self._error(f"{what} do not fit {name!r} of shape {list(base.shape)}", _OTHER_BASE)
        return Formula(base, row_values=values, rows=rows)

    def _check_tying(self, formulas: Mapping[str, Formula], saved: Mapping[str, TensorInfo]) -> None:
        """In a tied base a change of the input embedding alone has no place: the output layer would change with it.

        PEFT trains such an adapter on the input alone. Rows of trainable tokens are tied by PEFT, too, also where the
        base stores the output layer as a copy, which would stay behind.
        """
        if not self._ties():
            self._check_copies(formulas, saved)
            return
        vocabulary = _text_field(self.config, "vocab_size")
        for name in (*formulas, *saved):
            shape = self.base.tensors[name].shape
            rows_fit = len(shape) == 2 and type(vocabulary) is int and shape[0] == vocabulary
            if (rows_fit or name.endswith(_TABLES)) and not (name in formulas and formulas[name].rows):
                hint = "untie the base and save it (tie_word_embeddings=False, lm_head a copy of the embedding)"
                what = f"it changes the embedding {name!r} of a base that ties its output layer to it"
                raise self._error(f"{what} ({self.base.path})", f"{hint}, then pass that as BASE")

    def _check_copies(self, formulas: Mapping[str, Formula], saved: Mapping[str, TensorInfo]) -> None:
        if not self._asks_to_tie():
            return
        heads = [name for name in self.base.tensors if name.endswith(_HEADS) and name not in (*formulas, *saved)]
        for name in (name for name, formula in formulas.items() if formula.rows):
            if any(self.base.are_equal(name, head) for head in heads):
                what = f"it trains tokens of {name!r}, which is one with the output layer, and the base stores it twice"
                hint = "save the base again, which stores it once: AutoModelForCausalLM.from_pretrained(BASE)"
                raise self._error(f"{what} ({self.base.path})", f"{hint}.save_pretrained(NEW_BASE)")

    def _ties(self) -> bool:
        """Whether the base's output layer is its embedding: it has none of its own, and its config asks for one."""
        if any(name.endswith(_HEADS) for name in self.base.tensors):
            return False
        return self._asks_to_tie()

    def _asks_to_tie(self) -> bool:
        flag = _text_field(self.config, "tie_word_embeddings")
        names = self.config.get("architectures")
        return bool(flag) if isinstance(flag, bool) else bool(_WITH_HEAD.search(str(names)))


def _base_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _text_field(config: dict[str, Any], name: str) -> Any:
    """A field of the config, or of its language model's."""
    text = config.get("text_config")
    return config.get(name, text.get(name) if isinstance(text, dict) else None)


_SHORT = reprlib.Repr()
_SHORT.maxstring = 160


def _some(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(map(_SHORT.repr, found[:3])) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
