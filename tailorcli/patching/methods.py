"""What ``patch --method`` offers besides the paper: each tensor by its method, and one threshold over all tensors.

The threshold (``--method magnitude --threshold global``) takes two passes before the work. It is exact, in the
memory of one tensor: the passes count the upper and then the lower 16 bits of |delta|.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.grown import numel_of_base
from tailorcli.device import StageTimer
from tailorcli.distributed import gathered, mine, ranks, summed_
from tailorcli.errors import NumericalError
from tailorcli.options import RELEASED, PatchOptions
from tailorcli.runs.plan import TensorPlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tailorcli.core.hessian import PreparedHessian
    from tailorcli.core.tailor import LayerResult

    MaskOf = Callable[[TensorPlan, Tensor, Tensor], Tensor]  # of a tensor, its base and its tuned values


def patch_by_method(
    tensor: TensorPlan,
    base: Tensor,
    tuned: Tensor,
    prepared: PreparedHessian | None,
    options: PatchOptions,
    given: MaskOf | None,
    timer: StageTimer,
) -> LayerResult:
    """One tensor by another method than the paper's, with the mask that is ``given`` where there is one."""
    from tailorcli.core.baselines import baseline_layer, released_layer

    density = options.density
    weight = options.effective_weight if tensor.weight is None else tensor.weight
    if options.method == RELEASED:
        assert prepared is not None
        size, transposed = options.block_size, tensor.transposed
        return released_layer(
            base, tuned, prepared, density=density, transposed=transposed, block_size=size, weight=weight, timer=timer
        )
    with timer.stage("select"):
        mask = given(tensor, base, tuned).to(base.device) if given is not None else None
    seed = tensor_seed(options.seed, tensor.name)
    return baseline_layer(
        base,
        tuned,
        method=options.method,
        density=density,
        weight=weight,
        seed=seed,
        mask=mask,
        threshold_scale=options.threshold_scale,
        timer=timer,
    )


_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<number>\d+)\.")  # the first number in a name is its layer's


def weights_by_depth(names: Iterable[str], alpha: float, beta: float) -> dict[str, float]:
    """LiNeS' weight of each tensor: alpha in the first layer of its stack, alpha + beta in the last, evenly between.

    Layers count in the order of their numbers. What lies in no layer (embeddings, the last norm, the head) has
    alpha, as in the authors' code, and so has a stack of one layer.
    """
    from tailorcli.core.rivals import line_weight

    found = {name: _LAYER.match(name) for name in names}
    numbers: dict[str, set[int]] = {}
    for match in found.values():
        if match is not None:
            numbers.setdefault(match["stack"], set()).add(int(match["number"]))
    layers = {stack: sorted(own) for stack, own in numbers.items()}

    def depth(match: re.Match[str] | None) -> float:
        own = [] if match is None else layers[match["stack"]]
        return 0.0 if match is None or len(own) < 2 else own.index(int(match["number"])) / (len(own) - 1)

    return {name: line_weight(alpha, beta, depth(match)) for name, match in found.items()}


def tensor_seed(seed: int, name: str) -> int:
    """A tensor's own seed: its draws depend neither on the tensors before it nor on where a run was resumed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest(), "big")


@dataclass
class GlobalCut:
    """The threshold, and how many of the entries that equal it are still to be kept, in the order of the tensors.

    ``ties`` says it for each tensor, where not all of them are gone through in order.
    """

    threshold: float
    ties_left: int
    ties: dict[str, int] | None = None

    def mask(self, tensor: TensorPlan, base: Tensor, tuned: Tensor) -> Tensor:
        """The mask of the next tensor, or with ``ties`` of any."""
        from tailorcli.core.baselines import mask_above

        delta = _delta(base, tuned)
        if self.ties is not None:
            mask, _ = mask_above(delta, self.threshold, self.ties[tensor.name])
        else:
            mask, self.ties_left = mask_above(delta, self.threshold, self.ties_left)
        return mask.view(base.shape)


def find_cut(
    tensors: Sequence[TensorPlan],
    done: Collection[str],
    base: Checkpoint,
    tuned: Checkpoint,
    density: float,
    device: torch.device,
) -> GlobalCut:
    """The threshold above which round(density * all entries) lie, counting those that equal it as far as needed.

    Some of ``tensors`` may be ``done`` by an earlier run, or their counting divided over ranks: all are then read once
    more, to tell how many of the equal entries each keeps. ``density`` must lie between 0 and 1, and not at the ends.
    Raises NumericalError.
    """
    from tailorcli.core.baselines import count_ties, digit_counts, no_counts, value_of_digits
    from tailorcli.core.scores import count_kept, digit_of_rank

    count = count_kept(density, sum(numel_of_base(base, tensor.name) for tensor in tensors))
    if count == 0:
        return GlobalCut(float("inf"), 0)
    own = [tensors[position] for position in mine([tensor.nbytes for tensor in tensors])]
    digits: list[int] = []  # the upper half of the threshold's bits, then the lower
    for _ in range(2):
        counts = no_counts()
        for delta in _deltas(own, base, tuned, device):
            counts += digit_counts(delta, *digits)
        digit, count = digit_of_rank(summed_(counts), count)
        digits.append(digit)
    cut = GlobalCut(value_of_digits(*digits), count)
    if done or not ranks().alone:
        deltas = zip(own, _deltas(own, base, tuned, device), strict=True)
        each = gathered({tensor.name: count_ties(delta, cut.threshold) for tensor, delta in deltas})
        found = {name: ties for part in each for name, ties in part.items()}
        cut.ties = shares_in_order([(tensor.name, found[tensor.name]) for tensor in tensors], count)
    return cut


def shares_in_order(counts: Sequence[tuple[str, int]], total: int) -> dict[str, int]:
    """How many of ``total`` fall to each name that takes up to its count, those that come first before the others.

    >>> shares_in_order([("a", 2), ("b", 3), ("c", 1)], 4)
    {'a': 2, 'b': 2, 'c': 0}
    """
    shares = {}
    for name, count in counts:
        shares[name] = min(count, total)
        total -= shares[name]
    return shares


def _deltas(
    tensors: Sequence[TensorPlan], base: Checkpoint, tuned: Checkpoint, device: torch.device
) -> Iterator[Tensor]:
    """Tuned minus base, tensor by tensor."""
    for tensor in tensors:
        before, after = (checkpoint.read(tensor.name).to(device) for checkpoint in (base, tuned))
        try:
            yield _delta(before, after)
        except NumericalError as error:
            raise NumericalError(f"tensor {tensor.name!r}: {error.message}", error.hint) from error


def _delta(base: Tensor, tuned: Tensor) -> Tensor:
    """Tuned minus base as a matrix, finite."""
    from tailorcli.core.tailor import difference, matrix_shape, require_finite_inputs

    shape = matrix_shape(base, None)
    base_2d, tuned_2d = base.reshape(shape), tuned.reshape(shape)
    delta = difference(tuned_2d, base_2d)
    require_finite_inputs(delta, base_2d, tuned_2d)
    return delta
