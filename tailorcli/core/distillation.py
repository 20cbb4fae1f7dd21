"""Distillation into the kept entries of a patch: the loss of a token, and a step of Adam on the entries alone.

With the mask fixed, the kept entries theta_S are trained on

    KL(p_tuned || p_theta) on samples of the new task  +  B * KL(p_base || p_theta) on what the base must keep,

means over the tokens that are predicted, in nats. No labels enter, and nothing outside the mask moves.
"""

from __future__ import annotations

from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(p_teacher || p_student) of each token in nats, (N,), from logits (N, V); float32 whatever theirs are.

    A student may know further tokens, behind the teacher's: to the teacher they have no probability.
    """
    teacher = teacher_logits.float().log_softmax(-1)  # (N, V)
    student = student_logits.float().log_softmax(-1)[..., : teacher.shape[-1]]  # (N, V)
    return (teacher.exp() * (teacher - student)).sum(-1)


def kept_accuracy(teacher_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """How likely the teacher holds the student's first choice to be right, and its own: sums over tokens, scalars.

    Logits are (N, V). The first over the second is the share that the student keeps of the teacher's accuracy, were the
    tokens drawn from the teacher; at most 1.
    """
    teacher = teacher_logits.float().softmax(-1)  # (N, V)
    choice = student_logits[..., : teacher.shape[-1]].argmax(-1, keepdim=True)  # (N, 1)
    return teacher.gather(-1, choice).sum(), teacher.amax(-1).sum()


def adam_step_(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, rate: float) -> None:
    """One step of Adam in place, the ``step``-th from 1, on entries (K,) in float32 with their two moments."""
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    spread = (second / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
    values.addcdiv_(first, spread, value=-rate / (1 - BETAS[0] ** step))


def rate_at(step: int, steps: int, warmup: int) -> float:
    """The share of the rate in the ``step``-th of ``steps`` steps from 1: up over ``warmup``, then down to nothing."""
    if step <= warmup:
        return step / warmup
    return (steps - step + 1) / (steps - warmup + 1)


def root_mean_square(values: Tensor) -> float:
    """The root of the mean square of all values; 0 where there are none."""
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0
