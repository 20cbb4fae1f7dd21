"""Model Tailor for one tensor: score, select, compensate, put the rest back (Eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tailorcli.core.chunks import map_rows
from tailorcli.core.figures import LayerFigures, combine_figures, figures_of_salience, measure, slice_broadcast
from tailorcli.core.hessian import PreparedHessian
from tailorcli.core.largest import most_salient
from tailorcli.core.precision import extent, gap, in_units, unit_of, working_dtype
from tailorcli.core.retain import retained_goal
from tailorcli.core.scores import count_kept, fuse, minmax, salience, select_mask, sensitivity
from tailorcli.core.solvers import Decoration, decorate_joint, decorate_sequential
from tailorcli.errors import NumericalError


class Timer(Protocol):
    """Anything whose ``stage(name)`` gives a context that measures a stage's time."""

    def stage(self, name: str) -> AbstractContextManager[object]:
        """A context that adds its duration to the stage ``name``."""


Store = Callable[[Tensor, Tensor], Tensor]  # of values and their mask


class NoTimer:
    """Measures nothing."""

    def stage(self, name: str) -> AbstractContextManager[object]:
        """A context that does nothing."""
        return nullcontext()


@dataclass(frozen=True)
class LayerResult:
    """The patched tensor in the base's dtype, its mask, and its figures; all in the stored shape."""

    patched: Tensor | None  # None where only the scores were asked for
    mask: Tensor
    figures: LayerFigures


def tailor_layer(
    base: Tensor,
    tuned: Tensor,
    prepared: PreparedHessian | None,
    *,
    density: float,
    omega: float,
    solver: str,
    score_by: str = "paper",
    transposed: bool = False,
    block_size: int = 128,
    tolerance: float = 2e-4,
    max_iterations: int = 300,
    weight: float = 1.0,
    score_only: bool = False,
    timer: Timer | None = None,
    store: Store | None = None,
) -> LayerResult:
    """The whole paper for one tensor: Eq. 9 to 11 choose the mask, Eq. 12 and 13 compensate, Eq. 3 assembles.

    ``base`` and ``tuned`` have one shape: (O, I), or (I, O) with ``transposed`` (Conv1D weights, embedding
    tables), or (O, ...) for a convolution, or any with I entries for a scale of each, or any for a bias, whose Hessian
    has one channel. ``prepared`` is the tensor's Hessian; without one only salience counts and nothing is compensated
    (``omega=1``, ``solver="none"``). With ``score_by="sum"`` salience is added to Eq. 11. With a retain term in
    ``prepared`` the goal of every entry is not tuned's value but that of ``core.retain``. The kept entries go the share
    ``weight`` of the way from base to their final values. Outside the mask the result is bit for bit the base.
    ``store`` gives the values as they read once they are stored, where that is coarser than the base's dtype; the
    figures are of these. Raises NumericalError on NaN or infinity.

    Example: a quarter of the entries, without a Hessian.

    >>> base, tuned = torch.zeros(2, 2), torch.tensor([[1.0, 4.0], [2.0, 3.0]])
    >>> result = tailor_layer(base, tuned, None, density=0.25, omega=1.0, solver="none")
    >>> result.patched.tolist()
    [[0.0, 4.0], [0.0, 0.0]]
    >>> result.mask.tolist()
    [[False, True], [False, False]]

    With the Hessian of inputs whose two channels are alike, what is put back in the first (here all of it) moves
    into the second: the layer's outputs stay tuned's.

    >>> inputs = torch.tensor([[1.0, 1.0], [2.0, 2.0]])  # (N, I)
    >>> from tailorcli.core.hessian import prepare
    >>> prepared = prepare(2 * inputs.T @ inputs / len(inputs), 1e-4, sensitivity=False, sequential=False)
    >>> base, tuned = torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])
    >>> result = tailor_layer(base, tuned, prepared, density=0.5, omega=1.0, solver="joint")
    >>> [round(value, 3) for value in result.patched.flatten().tolist()]
    [0.0, 4.0]
    """
    timer = timer or NoTimer()
    if prepared is None and weight == 1.0 and base.device.type == "cpu" and store is None:
        found = _by_salience(base, tuned, count_kept(density, base.numel()), score_only, timer)
        if found is not None:
            return found
    shape = matrix_shape(base, prepared)
    base_2d, tuned_2d = base.reshape(shape), tuned.reshape(shape)
    with timer.stage("score"):
        delta = difference(tuned_2d, base_2d)
        require_finite_inputs(delta, base_2d, tuned_2d)
        inverse = _along_inputs(prepared, transposed)
        goal = _goal(delta, prepared, transposed)
        score = fused_score(goal, inverse, omega, unit_of(extent(goal)))
        if score_by == "sum":
            add_salience_(score, delta)
    with timer.stage("select"):
        mask = select_mask(score, count_kept(density, delta.numel()))
        del score
    patched, decoration = None, None
    if not score_only:
        with timer.stage("solve"):
            decoration = _decorate(goal, mask, prepared, solver, transposed, block_size, tolerance, max_iterations)
        with timer.stage("assemble"):
            wanted = tuned_2d if goal is delta else torch.add(goal, base_2d)
            patched = assemble(base_2d, wanted, mask, decoration.decorator if decoration else None, weight)
            del base_2d, wanted
            _require_finite_result(patched, tuned_2d, weight)
            if store is not None:
                patched = store(patched.view(base.shape), mask.view(base.shape)).view(shape)
    with timer.stage("measure"):
        moved = weight != 1.0 or goal is not delta or store is not None
        figures = measure(
            delta,
            mask,
            inverse=inverse,
            patched=patched,
            tuned=tuned_2d,
            prepared=prepared,
            transposed=transposed,
            decoration=decoration,
            moved=moved,
            goal=goal,
        )
    return LayerResult(None if patched is None else patched.view(base.shape), mask.view(base.shape), figures)


def _by_salience(base: Tensor, tuned: Tensor, count: int, score_only: bool, timer: Timer) -> LayerResult | None:
    """``tailor_layer`` without a Hessian in one pass and the assembly; None where that is not to be had."""
    with timer.stage("score"):
        salient = most_salient(base, tuned, count)
    if salient is None:
        return None
    flat_base, flat_tuned = base.reshape(-1, 1), tuned.reshape(-1, 1)
    patched = None
    if not score_only:
        with timer.stage("assemble"):
            patched = assemble(flat_base, flat_tuned, salient.mask.view(-1, 1), None)
            if base.dtype != tuned.dtype:
                _require_finite_result(patched, flat_tuned, 1.0)
    with timer.stage("measure"):
        figures = figures_of_salience(flat_base, flat_tuned, salient, patched is not None)
    return LayerResult(None if patched is None else patched.view(base.shape), salient.mask.view(base.shape), figures)


def tailor_experts(
    base: Tensor,
    tuned: Tensor,
    prepared: Iterable[PreparedHessian],
    tokens: Sequence[float] = (),
    retained_tokens: Sequence[float] = (),
    **options: Any,
) -> LayerResult:
    """A tensor (E, ...) of E fused experts: each slice is a layer with a Hessian of its own.

    ``prepared`` gives them in order and may make each as it is asked for. Every expert keeps the same density, so
    the result is the same whether a checkpoint fuses its experts or stores them one by one. An expert counts in the
    errors by its ``tokens``, and by its ``retained_tokens`` in the drift.
    """
    mask = torch.empty(base.shape, dtype=torch.bool, device=base.device)
    patched = None if options.get("score_only") else torch.empty_like(base)
    figures = []
    for expert, hessian in enumerate(prepared):
        result = tailor_layer(base[expert], tuned[expert], hessian, **options)
        mask[expert] = result.mask
        if patched is not None and result.patched is not None:
            patched[expert] = result.patched
        figures.append(result.figures)
    return LayerResult(patched, mask, combine_figures(figures, tokens, retained_tokens))


def matrix_shape(tensor: Tensor, prepared: PreparedHessian | None) -> tuple[int, int]:
    """The two dimensions under which a tensor is a layer: a bias is (O, 1), a scale of each channel or entry (1, I)."""
    return layer_shape(tensor, None if prepared is None else prepared.hessian.shape[0])


def layer_shape(tensor: Tensor, num_inputs: int | None) -> tuple[int, int]:
    """The two dimensions of a tensor as a layer, given its Hessian's channels, or None without one."""
    if tensor.dim() == 2:
        return tensor.shape[0], tensor.shape[1]
    if num_inputs is not None and (tensor.dim() <= 1 or num_inputs in (1, tensor.numel())):
        return tensor.numel() // num_inputs, num_inputs
    rows = tensor.shape[0] if tensor.dim() > 1 else 1
    return rows, tensor.numel() // max(rows, 1)


def difference(tuned: Tensor, base: Tensor) -> Tensor:
    """Tuned minus base in float32, chunk by chunk: no other full-size array. Of float64 weights it is rounded last."""
    delta = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    wide = working_dtype(base, tuned) == torch.float64

    def subtract(rows: slice) -> None:
        if wide:
            delta[rows] = gap(tuned[rows], base[rows])
        else:
            delta[rows].copy_(tuned[rows]).sub_(base[rows].to(torch.float32))

    map_rows(base, subtract)
    return delta


def fused_score(delta: Tensor, inverse: Tensor | None, omega: float, unit: float = 1.0) -> Tensor:
    """Eq. 11 over a whole tensor, chunk by chunk: the only full-size array is the result.

    ``inverse`` is [H^-1]_jj shaped to broadcast against ``delta``, or None where only salience counts. With
    omega 1 or 0 the remaining score is returned as it is: normalising it would not change its order. The scores are
    those of ``delta`` / ``unit``, whose squares must stay within float32.
    """
    score = torch.empty_like(delta)
    if inverse is None:
        omega = 1.0

    def salience_of(rows: slice) -> Tensor:
        return salience(in_units(delta[rows], unit))

    def sensitivity_of(rows: slice) -> Tensor:
        assert inverse is not None
        return sensitivity(in_units(delta[rows], unit), slice_broadcast(inverse, delta, rows))

    def extremes(rows: slice) -> Tensor:
        return torch.stack((*salience_of(rows).aminmax(), *sensitivity_of(rows).aminmax()))

    if 0.0 < omega < 1.0:
        found = torch.stack(map_rows(delta, extremes))  # (chunks, 4)
        low, high = found.amin(0).tolist(), found.amax(0).tolist()

    def fill(rows: slice) -> None:
        if omega == 1.0:
            score[rows] = salience_of(rows)
        elif omega == 0.0:
            score[rows] = sensitivity_of(rows)
        else:
            normalised = minmax(salience_of(rows), low[0], high[1]), minmax(sensitivity_of(rows), low[2], high[3])
            score[rows] = fuse(*normalised, omega)

    map_rows(delta, fill)
    return score


def add_salience_(score: Tensor, delta: Tensor) -> None:
    """Make of a score its sum with the salience of ``delta``, each over its largest value in the tensor, in place.

    Better than Eq. 11 alone where the kept entries are trained (docs/results/research.md, 11): entries that fine-tuning
    moved far and that the retain term's goal leaves are of use then. ``score`` must not be negative.

    >>> score = torch.tensor([[4.0, 1.0, 0.0]])
    >>> add_salience_(score, torch.tensor([[0.0, -2.0, 1.0]]))
    >>> score.tolist()
    [[1.0, 1.25, 0.5]]
    """
    highest, farthest = extent(score), extent(delta)
    unit = unit_of(farthest)

    def add(rows: slice) -> None:
        moved = minmax(salience(in_units(delta[rows], unit)), 0.0, farthest / unit)
        score[rows] = minmax(score[rows], 0.0, highest).add_(moved)

    map_rows(score, add)


def assemble(base: Tensor, tuned: Tensor, mask: Tensor, decorator: Tensor | None, weight: float = 1.0) -> Tensor:
    """Eq. 3: mask * (tuned + C) + (1 - mask) * base, in the base's dtype; where C is zero, tuned to the bit.

    With another ``weight`` than 1 a kept entry is base + weight * (tuned + C - base), rounded once.
    """
    patched = torch.empty_like(base)
    dtype = working_dtype(base, tuned)

    def fill(rows: slice) -> None:
        kept = tuned[rows].to(base.dtype)
        if weight != 1.0:
            start, change = base[rows].to(dtype), tuned[rows].to(dtype)
            change = change + decorator[rows] - start if decorator is not None else change - start
            kept = torch.add(start, change, alpha=weight).to(base.dtype)
        elif decorator is not None:
            compensation = decorator[rows]
            moved = (tuned[rows].to(dtype) + compensation).to(base.dtype)
            kept = torch.where(compensation != 0, moved, kept)
        _blend_(patched[rows], mask[rows], kept, base[rows])

    map_rows(base, fill)
    return patched


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: Tensor) -> Tensor:
    """A view of the tensor as integers of its width, for copies and comparisons to the bit."""
    return tensor.view(_BITS[tensor.element_size()])


def _blend_(patched: Tensor, mask: Tensor, kept: Tensor, base: Tensor) -> None:
    """``torch.where(mask, kept, base)`` into ``patched`` by bits, on a CPU by NumPy: in a third of its time."""
    result, kept_bits, base_bits = as_bits(patched), as_bits(kept), as_bits(base)
    chosen = mask.view(torch.int8).to(base_bits.dtype).neg_()  # all ones where True
    if base.device.type != "cpu":
        result.copy_((kept_bits ^ base_bits).bitwise_and_(chosen).bitwise_xor_(base_bits))
        return
    ours, bits = result.numpy(), base_bits.numpy()
    np.bitwise_xor(kept_bits.numpy(), bits, out=ours)
    np.bitwise_and(ours, chosen.numpy(), out=ours)
    np.bitwise_xor(ours, bits, out=ours)


def _decorate(
    delta: Tensor,
    mask: Tensor,
    prepared: PreparedHessian | None,
    solver: str,
    transposed: bool,
    block_size: int,
    tolerance: float,
    max_iterations: int,
) -> Decoration | None:
    """The decorator in the stored orientation; None where nothing can be compensated (a diagonal Hessian)."""
    if solver == "none" or prepared is None or prepared.is_diagonal:
        return None
    delta_rows, mask_rows = (delta.T, mask.T) if transposed else (delta, mask)  # (O, I)
    if solver == "sequential":
        if prepared.inverse_factor is None:
            raise ValueError("the sequential solver needs prepare(..., sequential=True)")
        found = decorate_sequential(delta_rows, mask_rows, prepared.inverse_factor, block_size)
    else:
        found = decorate_joint(
            delta_rows,
            mask_rows,
            prepared.hessian,
            prepared.amount,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
    return replace(found, decorator=found.decorator.T) if transposed else found


def _goal(delta: Tensor, prepared: PreparedHessian | None, transposed: bool) -> Tensor:
    """What every entry is to change by, in the stored orientation: delta itself, unless there is a retain term."""
    if prepared is None or prepared.retain_term is None:
        return delta
    goal = retained_goal(delta.T if transposed else delta, prepared)
    if not is_finite(goal):
        raise NumericalError("the retain term's goal overflows float32", "check both statistics, or leave --retain out")
    return goal.T.contiguous() if transposed else goal


def _along_inputs(prepared: PreparedHessian | None, transposed: bool) -> Tensor | None:
    """[H^-1]_jj shaped to broadcast along the input dimension of the stored matrix."""
    if prepared is None or prepared.inverse_diagonal is None:
        return None
    return prepared.inverse_diagonal.unsqueeze(1 if transposed else 0)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, in one pass and without a temporary."""
    return math.isfinite(extent(tensor))


def _require_finite_result(patched: Tensor, tuned: Tensor, weight: float) -> None:
    """Raises NumericalError on a value that its dtype does not hold, and says what made it so large."""
    if is_finite(patched):
        return
    if not is_finite(tuned.to(patched.dtype)):
        raise NumericalError(f"tuned's values overflow {patched.dtype}, the base's dtype", "leave it out: --exclude")
    hint = "pass --solver none" if weight == 1.0 else "pass a smaller --weight, or --solver none"
    raise NumericalError(f"a compensated value overflows {patched.dtype}", hint)


def require_finite(tensor: Tensor) -> None:
    """Raises NumericalError on NaN or infinity."""
    if not is_finite(tensor):
        raise NumericalError("NaN or infinity", "check the checkpoints")


def require_finite_inputs(delta: Tensor, base: Tensor, tuned: Tensor) -> None:
    """Raises NumericalError that names the input with NaN or infinity, if ``delta`` is not finite."""
    if is_finite(delta):
        return
    for tensor, where in ((base, "base"), (tuned, "tuned")):
        if not is_finite(tensor):
            raise NumericalError(f"NaN or infinity in the {where} weights", f"check the {where} checkpoint")
    raise NumericalError("tuned minus base overflows float32", "check that both checkpoints belong together")
