"""Run a model on a batch, and look at what goes into its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tailorcli.device import attention_without_cudnn, is_out_of_memory
from tailorcli.errors import DataError, TailorError, first_line

if TYPE_CHECKING:
    import torch

    from tailorcli.data.samples import Inputs


def forward(network: Any, inputs: Inputs) -> Any:
    """Run the model without a graph and give its outputs.

    Raises DataError where it cannot run on these inputs, as the data may not be what it takes.
    """
    import torch

    with torch.no_grad(), attention_without_cudnn():  # batches wait for one another in threads of their own
        return differentiable(network, inputs)


def differentiable(network: Any, inputs: Inputs) -> Any:
    """Run the model and give its outputs, with the graph of what asks for gradients.

    Raises DataError where it cannot run on these inputs, as the data may not be what it takes.
    """
    with telling_inputs(inputs):
        return network(**in_dtype_of(network, inputs))


@contextmanager
def telling_inputs(inputs: Inputs) -> Iterator[None]:
    """Within it a model runs on these inputs: what its own code raises becomes a DataError that tells their shapes."""
    try:
        yield
    except TailorError:
        raise
    except Exception as error:  # whatever a model's own code raises
        if is_out_of_memory(error):
            raise
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise DataError(
            f"the model cannot run on a sample of this data ({shapes}): {first_line(error)}",
            "see that its records hold what the model takes: text, images, or sound",
        ) from error


@contextmanager
def in_use(network: nn.Module) -> Iterator[None]:
    """The network with no module in training; each has its own mode back afterwards, whatever the whole is in."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def in_dtype_of(network: Any, inputs: Inputs) -> Inputs:
    """The inputs with pictures and sound in the dtype of the model's weights, which not every model sees to itself."""
    dtype = getattr(network, "dtype", None)
    if dtype is None or not dtype.is_floating_point:
        return inputs
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """A batch's inputs, moved to a device."""
    return {name: value.to(device) for name, value in inputs.items()}


def samples_in(batch: Inputs) -> int:
    """Samples of a batch: those of its text, or else of whatever it holds."""
    return len(
        next((batch[name] for name in ("input_ids", "decoder_input_ids") if name in batch), next(iter(batch.values())))
    )


def check_ids(samples: list[Inputs], network: Any) -> None:
    """Raise DataError where the tokenizer's ids do not fit the model's embedding, before it crashes far inside."""
    import torch

    try:
        table = network.get_input_embeddings()
    except NotImplementedError:  # CLIP has two towers, a convolutional network has no table at all
        return
    ids = [inputs["input_ids"] for inputs in samples if "input_ids" in inputs]
    if not isinstance(table, torch.nn.Embedding) or not ids:
        return
    highest = max(int(tensor.max()) for tensor in ids)
    if highest >= table.num_embeddings:
        raise DataError(
            f"the tokenizer gives token id {highest}, the model has {table.num_embeddings} embedding rows",
            "the model folder holds a tokenizer of another model",
        )


def output_head(model: Any) -> nn.Linear | None:
    """The linear layer that makes logits over the vocabulary; None for a model that has none."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return head if isinstance(head, nn.Linear) else None


@contextmanager
def last_logits_only(model: nn.Module) -> Iterator[None]:
    """Give the output head only the last token of each sample while this lasts: no one reads its logits.

    Enter it after the hooks that look at the head's inputs, which then see all of them.
    """
    head = output_head(model)
    handle = head.register_forward_pre_hook(_last_position) if head is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _last_position(_: nn.Module, args: tuple[Any, ...]) -> Any:
    if args and isinstance(args[0], Tensor) and args[0].dim() == 3:
        return (args[0][:, -1:], *args[1:])
    return None


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The module's input: its first tensor argument. Raises TypeError where there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("a calibrated module was called without a tensor")


def identity_of_input(tensor: Tensor) -> tuple[int, ...]:
    """What tells one live tensor from another, and from itself after a change in place."""
    return (tensor.data_ptr(), *tensor.shape, *tensor.stride(), tensor._version)
