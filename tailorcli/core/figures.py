"""The figures of one tensor: what its mask captures and how far its outputs are from the tuned layer's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailorcli.core.chunks import map_rows, row_chunks, row_slices
from tailorcli.core.hessian import PreparedHessian
from tailorcli.core.largest import Salient
from tailorcli.core.precision import gap, working_dtype
from tailorcli.core.products import in_parts, product
from tailorcli.core.scores import salience, sensitivity
from tailorcli.core.solvers import Decoration
from tailorcli.errors import NumericalError

_FORM_BLOCK = 256  # columns of a quadratic form's product at a time
_GPU_FORM_BLOCK = 2048  # narrower products leave most of a GPU idle
_SAMPLE = 1 << 14  # entries from which quantiles are estimated
_TOO_LARGE = "check that both checkpoints belong together, or leave the tensor at base: --exclude"
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class LayerFigures:
    """What the mask and the compensation of one tensor amount to; sums run over its entries.

    ``error_*`` is the relative layer error ||(W - W_tuned) X||^2 / ||delta X||^2 over the calibration tokens:
    ``before`` of the masked weights, ``after`` of the values that are stored. None without a Hessian.
    """

    numel: int
    kept: int
    zero_delta: int  # entries that fine-tuning did not change
    delta_sq: float  # ||delta||^2
    delta_sq_kept: float
    distance_tuned: float  # sum |W_tuned - W_base|
    distance_before: float  # sum |W_patched - W_base| before compensation (Fig. 6)
    distance_after: float | None  # and after it
    salience_quantiles: list[float]  # at QUANTILES, from an evenly strided sample
    sensitivity_sum: float | None = None
    sensitivity_kept: float | None = None
    sensitivity_quantiles: list[float] | None = None
    dead_channels: int | None = None
    damping: float | None = None  # relative, as used
    output_energy: float | None = None  # (2/N) ||delta X||^2, the denominator of the errors
    error_before: float | None = None
    error_after: float | None = None
    drift_energy: float | None = None  # (2/N) ||delta X_r||^2 over the retained tokens
    drift: float | None = None  # ||(W - W_base) X_r||^2 / ||delta X_r||^2, of the values that are stored
    iterations: int = 0
    residual: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return dict(vars(self))  # asdict copies every number by itself: a thirtieth of a patch by salience


def combine_figures(
    parts: Sequence[LayerFigures], tokens: Sequence[float] = (), retained_tokens: Sequence[float] = ()
) -> LayerFigures:
    """The figures of a tensor from those of its slices: sums, errors over all outputs, quantiles as their means.

    An energy is divided by its slice's own N. With the ``tokens`` of each slice, and the ``retained_tokens`` for the
    drift, the combined one is divided by their sum, so that a slice counts by its tokens; alike without.
    """
    if sum(tokens) > 0:
        parts = [_scaled(part, "output_energy", count / sum(tokens)) for part, count in zip(parts, tokens, strict=True)]
    if sum(retained_tokens) > 0:
        shares = [count / sum(retained_tokens) for count in retained_tokens]
        parts = [_scaled(part, "drift_energy", share) for part, share in zip(parts, shares, strict=True)]
    first = parts[0]
    total: dict[str, Any] = {name: sum(getattr(p, name) for p in parts) for name in _SUMMED}
    for name in _SUMMED_OR_NONE:
        total[name] = None if getattr(first, name) is None else sum(getattr(p, name) for p in parts)
    for name in ("salience_quantiles", "sensitivity_quantiles"):
        levels = getattr(first, name)
        total[name] = None if levels is None else np.mean([getattr(p, name) for p in parts], axis=0).tolist()
    energy = total["output_energy"]
    for name in ("error_before", "error_after"):
        if getattr(first, name) is not None:
            weighted = sum(getattr(p, name) * (p.output_energy or 0.0) for p in parts)
            total[name] = weighted / energy if energy else 0.0
    if first.drift is not None:
        moved = sum((p.drift or 0.0) * (p.drift_energy or 0.0) for p in parts)
        total["drift"] = moved / total["drift_energy"] if total["drift_energy"] else 0.0
    damping = None if first.damping is None else max(p.damping or 0.0 for p in parts)
    iterations, residual = max(p.iterations for p in parts), max(p.residual for p in parts)
    return LayerFigures(**total, damping=damping, iterations=iterations, residual=residual)


def _scaled(part: LayerFigures, name: str, factor: float) -> LayerFigures:
    value = getattr(part, name)
    return part if value is None else replace(part, **{name: value * factor})


_SUMMED = ("numel", "kept", "zero_delta", "delta_sq", "delta_sq_kept", "distance_tuned", "distance_before")
_SUMMED_OR_NONE = (
    *("distance_after", "sensitivity_sum", "sensitivity_kept", "dead_channels", "output_energy", "drift_energy"),
)


def slice_broadcast(inverse: Tensor, delta: Tensor, rows: slice) -> Tensor:
    """The part of a vector (O, 1) that belongs to ``rows`` of ``delta``; a vector (1, I) whole."""
    return inverse[rows] if inverse.shape[0] == delta.shape[0] > 1 else inverse


def measure(
    delta: Tensor,
    mask: Tensor,
    *,
    tuned: Tensor,
    patched: Tensor | None,
    inverse: Tensor | None = None,
    prepared: PreparedHessian | None = None,
    transposed: bool = False,
    decoration: Decoration | None = None,
    moved: bool = False,
    goal: Tensor | None = None,
) -> LayerFigures:
    """All figures of one tensor, chunk by chunk; matrices are in the stored orientation. Raises NumericalError.

    ``moved`` says that kept entries may differ from tuned's for another reason than a decoration; ``goal`` is what
    the kept ones change by before it, and what is scored, where that is not ``delta``.
    """
    term = prepared.retain_term if prepared is not None else None
    moved = moved or decoration is not None
    scored = delta if term is None or goal is None else goal
    sums = _mask_sums(delta, mask)
    if scored is not delta:
        sums["distance_before"] = _kept_distance(scored, mask)
    unit = prepared.unit if prepared is not None else 1.0
    scores = _sensitivity_sums(scored, mask, inverse, unit) if inverse is not None else {}
    errors: dict[str, Any] = {}
    distance_after = None
    if patched is not None:
        distance_after = sums["distance_before"]
        if moved:
            distance_after = _distance(patched, tuned, delta)
        if prepared is not None:
            hessian = prepared.hessian if term is None else term.hessian
            goal = None if term is None else goal
            errors = layer_errors(delta, mask, patched, tuned, hessian, transposed, decoration, moved, goal)
            errors["output_energy"] *= unit
        if term is not None:
            errors |= drift(delta, patched, tuned, term.retained, transposed)
            errors["drift_energy"] *= term.unit
    if decoration is not None:
        errors.update(iterations=decoration.iterations, residual=decoration.residual)
    if prepared is not None:
        errors.update(dead_channels=prepared.num_dead, damping=prepared.damping)
    figures = LayerFigures(
        numel=delta.numel(),
        distance_after=distance_after,
        **sums,
        **_quantiles(scored, inverse, unit),
        **scores,
        **errors,
    )
    return _require_finite(figures)


def figures_of_salience(base: Tensor, tuned: Tensor, salient: Salient, patched: bool) -> LayerFigures:
    """``measure`` of a mask by salience alone, whose kept entries are tuned's; ``base`` and ``tuned`` are (n, 1)."""
    stride = -(-base.numel() // _SAMPLE)
    sample = gap(tuned[::stride], base[::stride])
    figures = LayerFigures(
        numel=base.numel(),
        kept=int(np.count_nonzero(salient.mask.numpy())),
        zero_delta=base.numel() - salient.changed,
        delta_sq=salient.square,
        delta_sq_kept=salient.square_kept,
        distance_tuned=salient.total,
        distance_before=salient.total_kept,
        distance_after=salient.total_kept if patched else None,
        salience_quantiles=_levels(salience(sample)),
    )
    return _require_finite(figures)


def _require_finite(figures: LayerFigures) -> LayerFigures:
    values = (value for value in vars(figures).values() if isinstance(value, float))
    if _left_float32(list(values)):
        raise NumericalError("what is patched differs from base or tuned by more than float32 holds", _TOO_LARGE)
    return figures


def _mask_sums(delta: Tensor, mask: Tensor) -> dict[str, Any]:
    """Entries and norms in and out of the mask."""
    norm = torch.linalg.vector_norm

    def sums(rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        d = delta[rows].to(dtype)
        kept = d * mask[rows].view(torch.uint8)  # half the time of a product with bool
        values = (d.count_nonzero(), norm(d).square(), norm(kept).square(), d.abs().sum(), kept.abs().sum())
        return torch.stack([value.double() for value in values])

    parts = map_rows(delta, sums)
    found = torch.stack(parts).sum(0).tolist() if parts else [0.0] * 5
    if _left_float32(found) or (found[0] and not found[1]):
        found = torch.stack(map_rows(delta, partial(sums, dtype=torch.float64))).sum(0).tolist()
    changed, square, square_kept, distance, distance_kept = found
    return {
        "kept": int(mask.count_nonzero()),
        "zero_delta": delta.numel() - int(changed),
        "delta_sq": square,
        "delta_sq_kept": square_kept,
        "distance_tuned": distance,
        "distance_before": distance_kept,
    }


def _left_float32(sums: Sequence[float]) -> bool:
    """Whether a sum of squares has overflowed, so that it must be taken in float64."""
    return not all(map(math.isfinite, sums))


def _kept_distance(change: Tensor, mask: Tensor) -> float:
    def distance(rows: slice) -> float:
        return _sum_of_sizes(change[rows] * mask[rows].view(torch.uint8))

    return sum(map_rows(change, distance))


def _sum_of_sizes(change: Tensor) -> float:
    """The sum of |entry|, in float64 where float32 overflows."""
    total = float(change.abs().sum())
    return total if math.isfinite(total) else float(change.double().abs().sum())


def _sensitivity_sums(delta: Tensor, mask: Tensor, inverse: Tensor, unit: float) -> dict[str, Any]:
    """The sums over all entries and over the kept ones; ``inverse`` is of the Hessian divided by ``unit``."""

    def sums(rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        score = sensitivity(delta[rows].to(dtype), slice_broadcast(inverse, delta, rows))
        return torch.stack((score.sum(), (score * mask[rows].view(torch.uint8)).sum())).double()

    parts = map_rows(delta, sums)
    total = torch.stack(parts).sum(0).tolist() if parts else [0.0, 0.0]
    if _left_float32(total) or not total[0]:
        total = torch.stack(map_rows(delta, partial(sums, dtype=torch.float64))).sum(0).tolist() if parts else total
    return {"sensitivity_sum": total[0] * unit, "sensitivity_kept": total[1] * unit}


def _quantiles(delta: Tensor, inverse: Tensor | None, unit: float) -> dict[str, Any]:
    """Quantiles of both scores from an evenly strided sample: exact for small tensors, close for large ones."""
    if delta.numel() == 0:
        return {"salience_quantiles": []}
    columns = delta.shape[1]
    stride = -(-delta.numel() // _SAMPLE)
    index = torch.arange(0, delta.numel(), stride, device=delta.device)
    row, column = index // columns, index % columns
    sample = delta[row, column]
    found: dict[str, Any] = {"salience_quantiles": _levels(salience(sample))}
    if inverse is not None:
        inverse_sample = inverse.expand(delta.shape)[row, column]
        score = sensitivity(sample.double(), inverse_sample)  # few entries, whose squares may leave float32
        found["sensitivity_quantiles"] = [level * unit for level in _levels(score)]
    return found


def _levels(sample: Tensor) -> list[float]:
    """The sample at QUANTILES: by selection, where torch's own quantile sorts."""
    return [float(value) for value in np.quantile(sample.cpu().numpy(), QUANTILES)]


def _distance(patched: Tensor, tuned: Tensor, delta: Tensor) -> float:
    """The sum of |W_patched - W_base|, with W_base = W_tuned - delta so that the base need not be held any longer."""

    def distance(rows: slice) -> float:
        return _sum_of_sizes(_moved(patched[rows], tuned[rows], delta[rows]))

    return sum(map_rows(delta, distance))


def _moved(patched: Tensor, tuned: Tensor, delta: Tensor) -> Tensor:
    """W_patched - W_base in float32, with W_base = W_tuned - delta."""
    dtype = working_dtype(patched, tuned)
    return gap(patched, tuned.to(dtype) - delta)


def layer_errors(
    delta: Tensor,
    mask: Tensor,
    patched: Tensor,
    tuned: Tensor,
    hessian: Tensor,
    transposed: bool,
    decoration: Decoration | None,
    moved: bool,
    goal: Tensor | None,
) -> dict[str, float]:
    """Relative layer errors (Eq. 5) with the undamped Hessian, before and after compensation."""
    if transposed:
        delta, mask, patched, tuned = delta.T, mask.T, patched.T, tuned.T
        goal = goal.T if goal is not None else None
    energy, before, after = 0.0, 0.0, 0.0
    for rows in row_chunks(*delta.shape):
        d = delta[rows]  # (R, I)
        energy += quadratic_form(d, hessian)
        if goal is not None:
            before += quadratic_form(torch.where(mask[rows], d - goal[rows], d), hessian)
        elif decoration is None or decoration.energy_before is None:
            before += quadratic_form(torch.where(mask[rows], 0.0, d), hessian)
        if moved:
            after += quadratic_form(gap(patched[rows], tuned[rows]), hessian)
    if goal is None and decoration is not None and decoration.energy_before is not None:
        before = decoration.energy_before
    if not moved:
        after = before
    if energy <= 0.0:
        return {"output_energy": 0.0, "error_before": 0.0, "error_after": 0.0}
    return {"output_energy": energy, "error_before": before / energy, "error_after": after / energy}


def drift(delta: Tensor, patched: Tensor, tuned: Tensor, retained: Tensor, transposed: bool) -> dict[str, float]:
    """How much of fine-tuning's change to the outputs on retained data is left: 0 is the base, 1 the tuned model."""
    if transposed:
        delta, patched, tuned = delta.T, patched.T, tuned.T
    left, whole = 0.0, 0.0
    for rows in row_chunks(*delta.shape):
        d = delta[rows]  # (R, I)
        whole += quadratic_form(d, retained)
        left += quadratic_form(_moved(patched[rows], tuned[rows], d), retained)
    return {"drift_energy": whole, "drift": left / whole if whole > 0 else 0.0}


def figures_after_fit(
    plain: LayerFigures,
    base: Tensor,
    tuned: Tensor,
    patched: Tensor,
    hessian: Tensor,
    retained: Tensor,
    transposed: bool,
) -> LayerFigures:
    """The figures of a plain patch after its kept entries were fitted again; tensors are in the stored orientation.

    ``hessian`` and ``retained`` (I, I) are those of the unpatched models' inputs.
    """
    base, tuned, patched = (t.T if transposed else t for t in (base, tuned, patched))
    after, left, distance = 0.0, 0.0, 0.0
    for rows in row_chunks(*base.shape):
        after += quadratic_form(gap(patched[rows], tuned[rows]), hessian)
        moved = gap(patched[rows], base[rows])  # (R, I)
        left += quadratic_form(moved, retained)
        distance += _sum_of_sizes(moved)
    figures = replace(
        plain,
        error_after=after / plain.output_energy if plain.output_energy else 0.0,
        drift=left / plain.drift_energy if plain.drift_energy else 0.0,
        distance_after=distance,
    )
    return _require_finite(figures)


def quadratic_form(rows: Tensor, hessian: Tensor) -> float:
    """sum_i r_i H r_i^T over rows (R, I): (2/N) times the squared change of the layer's outputs.

    H is symmetric, so the blocks on one side of its diagonal count twice: half the multiply-adds, and work arrays
    of (R, block) instead of (R, I). Where that leaves float32, it is worked out in float64.
    """
    total = _quadratic_form(rows, hessian)
    if math.isfinite(total) and (total != 0.0 or not bool(rows.any())):
        return total
    wide = hessian.double()
    parts = row_slices(rows.shape[0], rows.shape[1], _FORM_BLOCK * rows.shape[1])
    return sum((_quadratic_form(rows[part].double(), wide) for part in parts), 0.0)


def _quadratic_form(rows: Tensor, hessian: Tensor) -> float:
    if hessian.dim() == 1:
        return float((rows * hessian).mul_(rows).sum(dtype=torch.float64))
    if in_parts(rows, hessian):
        return float(product(rows, hessian).mul_(rows).sum(dtype=torch.float64))
    width = _FORM_BLOCK if hessian.device.type == "cpu" else _GPU_FORM_BLOCK
    total = torch.zeros((), dtype=torch.float64, device=rows.device)  # on the device: it need not be waited for
    for start in range(0, hessian.shape[0], width):
        stop = min(start + width, hessian.shape[0])
        block = rows[:, start:stop]  # (R, B)
        part = block @ hessian[start:stop, start:stop]
        part.addmm_(rows[:, :start], hessian[:start, start:stop], alpha=2.0)
        total += part.mul_(block).sum(dtype=torch.float64)
    return float(total)
