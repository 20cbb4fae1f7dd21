"""What the teachers say of every sample: their last hidden states, worked out once; their heads make logits of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.core.distillation import divergence, kept_accuracy
from tailorcli.errors import CheckpointError, NumericalError
from tailorcli.models.blockwise import run_blockwise
from tailorcli.models.generation import end_token_ids
from tailorcli.models.running import differentiable, forward, output_head, to_device

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs

LOGITS_BYTES = 1 << 28  # float32 logits that are in memory at a time; about five arrays of them are
CPU_LOGITS_BYTES = 1 << 25  # no less quick there


@dataclass
class Teacher:
    """One teacher: the last hidden states of its samples, and what makes logits of them."""

    states: list[Tensor]  # of each sample, (T, I), on the CPU; of one that another rank runs, empty
    head: Callable[[Tensor], Tensor]  # (N, I) -> (N, V)
    ends: Sequence[int] = ()  # the tokens behind which nothing follows
    bare: bool = False  # whether its logits are those of the output layer, whatever its config names (``logits_of``)


def head_of(network: Any) -> nn.Linear:
    """The output layer. Raises CheckpointError for a model that has none over its vocabulary."""
    head = output_head(network)
    if head is None:
        raise CheckpointError(
            f"{type(network).__name__} has no linear output layer over its vocabulary, whose answers could be learned",
            "leave --distill, or --target, out",
        )
    return head


def logits_of(network: Any, weight: Tensor, bias: Tensor | None, bare: bool = False) -> Callable[[Tensor], Tensor]:
    """A function from last hidden states (N, I) to logits (N, V), with what the model's class does to them after.

    ``bare``: it does nothing, as classes that see around a text model (PaliGemma 2, Aya Vision) leave out the cap or
    the scale that the text's config names.
    """
    config = None if bare else network.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0

    def logits(hidden: Tensor) -> Tensor:
        raw = nn.functional.linear(hidden, weight, bias) * (factor / divisor)
        return torch.tanh(raw / cap) * cap if cap else raw

    return logits


def hidden_states(network: Any, batch: Inputs, grad: bool = False) -> Tensor:
    """What goes into the output layer, (B, T, I); no logits are made but of the last token."""
    held: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> Any:
        held.append(args[0])
        return (args[0][:, -1:], *args[1:])

    handle = head_of(network).register_forward_pre_hook(take)
    try:
        (differentiable if grad else forward)(network, batch)
    finally:
        handle.remove()
    return held[0]


def check_head(network: Any, sample: Inputs) -> bool:
    """Whether the model's logits are ``bare``: ``logits_of`` gives what the model itself gives, with that or without.

    Raises CheckpointError where its class does something else.
    """
    return _is_bare(network, hidden_states(network, sample), forward(network, sample).logits)


def _is_bare(network: Any, states: Tensor, wanted: Tensor) -> bool:
    head = head_of(network)
    found = [logits_of(network, head.weight, head.bias, bare)(states) for bare in (False, True)]
    far = [float((each.float() - wanted.float()).detach().abs().max()) for each in found]
    bare = far[1] < far[0]
    require_known_logits(network, found[bare], wanted)
    return bare


def require_known_logits(network: Any, found: Tensor, wanted: Tensor) -> None:
    """Raise CheckpointError where logits that were ``found`` by ``logits_of`` are not those of the model itself.

    Raises NumericalError where these are no numbers.
    """
    if not bool(wanted.isfinite().all()):
        what = f"the logits of {type(network).__name__} are no numbers in {str(wanted.dtype).removeprefix('torch.')}"
        raise NumericalError(what, "calibrate with another --dtype, such as bfloat16 or float32, and use that")
    far = (found.float() - wanted.float()).abs().max()
    if not bool(far <= 1e-2 * wanted.float().abs().max()):
        raise CheckpointError(
            f"{type(network).__name__} makes its logits in a way that is not known here", "leave --distill out"
        )


def predicted(batch: Inputs, media: tuple[int, ...], ends: Sequence[int] = ()) -> Tensor:
    """Where the next token is predicted, (B, T) bool: everywhere but before placeholders of images or sound.

    The last position counts, too, unless the text has come to one of its ``ends`` there: a divergence needs no label,
    and there it is told whether an answer ends.
    """
    ids = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"]
    after = ids[:, 1:]
    wanted = torch.ones_like(after, dtype=torch.bool)
    for token in media:
        wanted &= after != token
    last = torch.ones_like(ids[:, -1:], dtype=torch.bool)
    for token in ends:
        last &= ids[:, -1:] != token
    return torch.cat([wanted, last], dim=1)


def teach(
    network: Any,
    samples: list[Inputs],
    device: torch.device,
    advance: Callable[[int], object],
    keep: Callable[[Tensor], Tensor] = lambda states: states.cpu(),
    bare: bool = False,
) -> Teacher:
    """The teacher that ``network`` is: every sample run once; ``bare`` as ``check_head`` tells it.

    Its hidden states are kept in its dtype where ``keep`` puts them, in host memory or in a file's.
    """
    states = []
    for sample in samples:
        states.append(keep(hidden_states(network, to_device(sample, device))[0]))
        advance(1)
    return Teacher(states, _head_alone(network, bare), end_token_ids(network), bare)


def teach_blockwise(
    network: Any,
    stored: Checkpoint,
    tuned: Checkpoint,
    samples: list[Inputs],
    device: torch.device,
    scratch: Path,
    advance: Callable[[int], object],
    keep: Callable[[Tensor], Tensor] = lambda states: states.cpu(),
) -> Teacher:
    """``teach`` for a ``network`` without weights, which do not fit: ``run_blockwise``; the states are the same.

    Raises CheckpointError where its logits are not those of its output layer alone, as ``check_head`` does.
    """
    seen = threading.local()  # every sample goes through in a thread of its own
    bare: list[bool] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> Any:
        seen.states = args[0]
        return (args[0][:, -1:], *args[1:])

    def call(number: int) -> Tensor:
        found = forward(network, to_device(samples[number], device)).logits
        states, seen.states = seen.states, None
        if number == 0:
            bare.append(_is_bare(network, states[:, -1:], found))
        return keep(states[0])

    handle = head_of(network).register_forward_pre_hook(take)
    try:
        states = run_blockwise(network, stored, tuned, len(samples), call, device, scratch, advance)
    finally:
        handle.remove()
    return Teacher(states, _head_alone(network, any(bare)), end_token_ids(network), any(bare))


def _head_alone(network: Any, bare: bool) -> Callable[[Tensor], Tensor]:
    """What makes logits of last hidden states, without the rest of the model."""
    head = head_of(network)
    bias = None if head.bias is None else head.bias.detach().clone()
    return logits_of(network, head.weight.detach().clone(), bias, bare)


def loss(student: Any, teacher: Teacher, batch: Inputs, states: Tensor, wanted: Tensor, grad: bool) -> Tensor:
    """The mean divergence KL(teacher || student) over the predicted tokens of a batch, in nats, a scalar.

    ``states`` (B, T, I) are what the teacher's output layer takes, ``wanted`` (B, T) says which tokens count; both may
    lie on the CPU. With ``grad`` the result can be differentiated by the student's parameters. Logits are made of so
    many tokens at a time, and their gradients at once: no (N, V) array of a whole batch is ever held.
    """
    head = head_of(student)
    hidden, taught = _at_predicted(student, batch, states, wanted, grad)
    if grad:
        given = (hidden, head.weight, head.bias, student, teacher, taught)
        summed: Tensor = _Divergence.apply(*given)  # type: ignore[no-untyped-call]
        return summed / max(len(hidden), 1)
    total = hidden.new_zeros((), dtype=torch.float32)
    own = logits_of(student, head.weight, head.bias, teacher.bare)
    for x, y in _pieces(hidden, taught, head):
        total += divergence(teacher.head(y), own(x)).sum()
    return total / max(len(hidden), 1)


def kept_accuracy_of(
    student: Any, teacher: Teacher, batch: Inputs, states: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """``kept_accuracy`` over the predicted tokens of a batch, two scalars; arguments as of ``loss``."""
    head = head_of(student)
    hidden, taught = _at_predicted(student, batch, states, wanted, False)
    own = logits_of(student, head.weight, head.bias, teacher.bare)
    kept, whole = (hidden.new_zeros((), dtype=torch.float32) for _ in range(2))
    for x, y in _pieces(hidden, taught, head):
        parts = kept_accuracy(teacher.head(y), own(x))
        kept += parts[0]
        whole += parts[1]
    return kept, whole


def _at_predicted(student: Any, batch: Inputs, states: Tensor, wanted: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
    """Both last hidden states, the student's and the teacher's (N, I), at the N tokens that count, on one device."""
    hidden = hidden_states(student, batch, grad).flatten(0, 1)  # (B * T, I)
    places = wanted.reshape(-1).nonzero().squeeze(1)  # (N,), on the CPU: a GPU need not be waited for
    hidden = hidden.index_select(0, places.to(hidden.device))  # (N, I)
    return hidden, states.flatten(0, 1).index_select(0, places.to(states.device)).to(hidden.device)


def _pieces(hidden: Tensor, taught: Tensor, head: nn.Linear) -> list[tuple[Tensor, Tensor]]:
    """Both cut into as many tokens as may have their logits in memory."""
    most = LOGITS_BYTES if hidden.is_cuda else CPU_LOGITS_BYTES
    size = max(1, most // (4 * head.weight.shape[0]))
    return list(zip(torch.split(hidden, size), torch.split(taught, size), strict=True))


class _Divergence(torch.autograd.Function):
    """The sum of the divergences of N tokens, whose gradients are worked out together with it, piece by piece.

    Plain autograd would keep every piece's logits until backward, and checkpoints make them twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, student: Any, teacher: Teacher, taught: Tensor
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wanted = [part for part, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True) if needed]
        sums = [torch.zeros_like(part, dtype=torch.float32) for part in wanted if part is not None]
        start = 0
        for x, y in _pieces(hidden, taught, head_of(student)):
            answer = teacher.head(y)
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(by_hidden is not None)
                value = divergence(answer, logits_of(student, weight, bias, teacher.bare)(leaf)).sum()
                inputs = [*([leaf] if by_hidden is not None else []), *(part for part in wanted if part is not None)]
                found = list(torch.autograd.grad(value, inputs)) if inputs else []
            total += value.detach()
            if by_hidden is not None:
                by_hidden[start : start + len(x)] = found.pop(0)
            for each, part in zip(sums, found, strict=True):
                each += part
            start += len(x)
            del found, value
        ctx.found = (by_hidden, [each.to(hidden.dtype) for each in sums])
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        by_hidden, sums = ctx.found
        del ctx.found
        scale = outputs[0]
        given = [None if not needed else sums.pop(0).mul_(scale) for needed in ctx.needs_input_grad[1:3]]
        return None if by_hidden is None else by_hidden.mul_(scale), *given, None, None, None
