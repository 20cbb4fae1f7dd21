"""A model without weights, and the weights that are put into it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import torch_dtype
from tailorcli.errors import CheckpointError
from tailorcli.models.loading import cannot_load, described, model_class_of, prepared, quiet_transformers
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
    with quiet_transformers():
        try:
            dtype = run_dtype(checkpoint, own, options)
            with _parameters_on_meta(torch):
                if issubclass(model_class, transformers.PreTrainedModel):
                    return prepared(model_class._from_config(own, dtype=dtype))
                return prepared(model_class.from_config(own, dtype=dtype, trust_remote_code=options.trust_remote_code))
        except Exception as error:  # transformers raises whatever its parts raise
            raise cannot_load(checkpoint.path, config, error, options) from error


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
    """Parameters that are made within give up their memory as soon as a module takes them."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = type(parameter)(parameter.detach().to("meta"), requires_grad=False)
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
