"""A model without weights, and the weights that are put into it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import DTYPES, TensorInfo, torch_dtype
from tailorcli.errors import CheckpointError
from tailorcli.models.calling import cannot_load, one_at_a_time, quiet_transformers
from tailorcli.models.config import read_config
from tailorcli.models.empty import described, empty_on_meta, model_class_of, prepared
from tailorcli.models.names import aliases
from tailorcli.options import LoadOptions

if TYPE_CHECKING:
    import torch


def empty_model(
    checkpoint: Checkpoint, config: dict[str, Any], options: LoadOptions, folder: Path | None = None
) -> Any:
    """The model without its weights: parameters take no memory, buffers are real.

    ``config`` is read from ``folder``, which is the checkpoint's own unless it is given. Raises CheckpointError where
    transformers cannot build it.
    """
    import torch
    import transformers

    model_class = model_class_of(config, options)
    own = described(checkpoint, config, options, folder)
    with one_at_a_time():
        try:
            dtype = run_dtype(checkpoint, own, options)
            with _parameters_on_meta(torch):
                if issubclass(model_class, transformers.PreTrainedModel):
                    network = model_class._from_config(own, dtype=dtype)
                else:
                    network = model_class.from_config(own, dtype=dtype, trust_remote_code=options.trust_remote_code)
            _write_as_saved(network, folder or checkpoint.path)
            return prepared(network)
        except Exception as error:  # transformers raises whatever its parts raise
            raise cannot_load(checkpoint.path, config, error, options) from error


def _write_as_saved(network: Any, folder: Path) -> None:
    """Give a model the settings that its folder has for writing, the ends of a text among them.

    As ``from_pretrained`` does, which looks into config.json where there is no generation_config.json.
    """
    import transformers

    if not (hasattr(network, "can_generate") and network.can_generate()):
        return
    for name in ("generation_config.json", "config.json"):
        with suppress(OSError):
            how = {"_from_model_config": True} if name == "config.json" else {}
            found = transformers.GenerationConfig.from_pretrained(folder, name, local_files_only=True, **how)
            network.generation_config = found
            return


def run_dtype(checkpoint: Checkpoint, config: Any, options: LoadOptions) -> torch.dtype:
    """The dtype in which the model runs: as asked for, as its config says, or as it is stored."""
    import torch

    if options.dtype != "auto":
        found = getattr(torch, options.dtype)
    else:
        stored = (i.dtype for i in checkpoint.tensors.values() if i.dtype in ("F32", "BF16", "F16"))
        found = getattr(config, "dtype", None) or torch_dtype(next(stored, "F32"))
    assert isinstance(found, torch.dtype)
    return found


@contextmanager
def _parameters_on_meta(torch: Any) -> Iterator[None]:
    """Parameters that are made within give up their memory as soon as a module takes them, and get no first values."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = type(parameter)(parameter.detach().to("meta"), requires_grad=False)
        if parameter is not None:
            parameter._is_hf_initialized = True  # as transformers marks it; drawing for no memory takes its time, too
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def load_weights(network: Any, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Fill the parameters of an empty model that these checkpoint tensors belong to, as transformers converts them.

    Raises CheckpointError where they do not fit.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    dtype = next(network.parameters()).dtype
    settings = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=network._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(network),
    )
    with quiet_transformers():
        info, _ = convert_and_load_state_dict_in_model(network, tensors, settings)
    if info.conversion_errors or info.mismatched_keys:
        problem = next(iter((*info.conversion_errors.values(), *map(str, info.mismatched_keys))))
        raise CheckpointError(f"transformers cannot convert a tensor of this checkpoint: {problem}")


def fill_computed(network: Any, names: Iterable[str], device: torch.device) -> None:
    """Work out those empty parameters that a model never stores (sinusoidal positions), as it does on loading."""
    import torch

    patterns = network._keys_to_ignore_on_load_missing or ()
    for name in names:
        if any(re.search(pattern, name) for pattern in patterns):
            module, short = network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            empty = torch.empty_like(module._parameters[short], device=device)
            module._parameters[short] = torch.nn.Parameter(empty, requires_grad=False)
            with torch.no_grad():
                network._init_weights(module)


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt")


def is_config_alone(folder: Path) -> bool:
    """Whether a folder says what a model is like and holds no weights of it, nor an adapter."""
    if not (folder / "config.json").is_file() or (folder / "adapter_config.json").exists():
        return False
    return not any(file.name.endswith(_WEIGHTS) or file.name.endswith(".index.json") for file in folder.iterdir())


class DescribedCheckpoint(Checkpoint):
    """A checkpoint that is not there: names, dtypes and shapes of the tensors that its config.json describes.

    It serves a plan. ``whose`` tells it from another of the same config; reading it raises CheckpointError.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], whose: str) -> None:
        super().__init__(path, tensors, [])
        self._whose = whose

    def fingerprint(self) -> str:
        """No content is known: whose it is stands for it."""
        return f"described {self._whose}"

    def sample_bytes(self, info: TensorInfo) -> bytes:
        """No content is known: no tensor is a copy of another."""
        return f"{self._whose} {info.name}".encode()

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int) -> None:
        """Raise CheckpointError: there is nothing to read."""
        raise CheckpointError(f"{self.path} holds no weights, but a config.json alone", "pass the folder of the model")


def describe_checkpoint(folder: Path, options: LoadOptions, whose: str) -> DescribedCheckpoint:
    """What transformers would save for the config in ``folder``: experts one by one, tied tensors once.

    The dtype is that of the config, float32 where it names none. Raises CheckpointError where transformers cannot
    build the model.
    """
    from transformers.core_model_loading import revert_weight_conversion

    empty = Checkpoint(folder, {}, [])
    network = empty_on_meta(empty, read_config(folder), options)
    dtype = run_dtype(empty, network.config, options)
    tied = aliases(network)
    held = {name: value for name, value in network.state_dict().items() if name not in tied}
    with quiet_transformers():
        saved = revert_weight_conversion(network, held)
    names = {torch_name: name for name, (_, torch_name) in DTYPES.items() if torch_name is not None}
    tensors = {}
    for name in sorted(saved, key=_by_number):
        stored = dtype if saved[name].is_floating_point() else saved[name].dtype
        shape = tuple(saved[name].shape)
        nbytes = saved[name].numel() * stored.itemsize
        code = names[str(stored).removeprefix("torch.")]
        tensors[name] = TensorInfo(name, code, shape, folder / "model.safetensors", 0, nbytes)
    return DescribedCheckpoint(folder, tensors, whose)


def _by_number(name: str) -> tuple[tuple[str, int], ...]:
    """A key that puts layers.2 before layers.10."""
    return tuple((text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", name))
