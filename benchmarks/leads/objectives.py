"""Ways to say how far a student is from its teacher."""

from __future__ import annotations

from torch import Tensor


def divergences(taught: Tensor, student: Tensor, loss: str) -> Tensor:
    """How far a student is from its teacher at each token, in nats (N,), from logits (N, V).

    ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher), ``both`` their mean; ``confident`` is
    forward, each token weighed by the probability of the teacher's first choice over the mean of that.
    """
    teacher, own = taught.log_softmax(-1), student.log_softmax(-1)  # (N, V)
    forward = (teacher.exp() * (teacher - own)).sum(-1)
    if loss == "forward":
        return forward
    if loss == "confident":
        sure = teacher.amax(-1).exp()
        return forward * (sure / sure.mean())
    reverse = (own.exp() * (own - teacher)).sum(-1)
    return reverse if loss == "reverse" else (forward + reverse) / 2
