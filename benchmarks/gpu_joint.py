"""Joint on single layers: before and now, in one run; the parts of an iteration; Hessians of halves; selection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import earlier
from benchmarks.common import markdown, say, verdict
from benchmarks.solver import Layer, make_layer
from tailorcli.core import accumulate_, decorate_joint, gradients, products, select_mask
from tailorcli.core.gradients import conjugate_gradients
from tailorcli.core.products import System, multiplies_halves, product_of_halves
from tailorcli.core.solvers import Decoration
from tailorcli.options import PatchOptions

DEFAULT = PatchOptions().tolerance
TARGETS = (4.0, 4.0, 6.0)  # times as fast as before, by shape
GAP = 1e-4  # of the gain
_ORACLE_ROWS = 16
Figures = dict[str, Any]
Timed = Callable[[Callable[[], object], int], float]


def measure(
    shapes: list[tuple[int, int]], density: float, device: torch.device, timed: Timed, free: Callable[[], None]
) -> Figures:
    """Seconds, iterations and what is lacking of the gain, for each (O, I)."""
    found: Figures = {"halves": multiplies_halves(device), "rows": [], "hessian": []}
    found["kernel"], found["reason"] = False, ""
    if device.type == "cuda":
        kernel, found["reason"] = gradients.kernel_or_reason(device)
        found["kernel"] = kernel is not None
    for outputs, inputs in shapes:
        for power in (1.0, 2.0) if outputs == inputs else (1.0,):
            say(f"joint, {outputs} x {inputs}, spectrum 1/j^{power:g}")
            layer = make_layer(inputs, density, power, device, outputs)
            found["rows"].append({"shape": [outputs, inputs], "power": power} | _compare(layer, timed))
            if (outputs, inputs) == shapes[-1] or power == 2.0:
                found["rows"][-1]["iteration"] = _iteration(layer, timed)
            if power == 1.0:
                score = layer.delta.abs()
                count = int(layer.mask.sum())
                found["rows"][-1]["select"] = timed(partial(select_mask, score, count), 3)
                del score
            del layer
            free()
    for inputs in sorted({inputs for _, inputs in shapes}):
        found["hessian"].append(_products(inputs, 256 if inputs < 2048 else 16384, device, timed))
        free()
    return found


def _solve(layer: Layer, tolerance: float = DEFAULT) -> Decoration:
    return decorate_joint(layer.delta, layer.mask, layer.hessian, layer.amount, tolerance=tolerance)


def _compare(layer: Layer, timed: Timed) -> Figures:
    """Before, now, and now with one part of it taken away."""

    def without(what: str, value: object) -> Decoration:
        module = products if what == "multiplies_halves" else gradients
        with patch.object(module, what, value):
            return _solve(layer)

    ways: dict[str, Callable[[], Decoration]] = {
        "now": lambda: _solve(layer),
        "now, to 1e-4": lambda: _solve(layer, 1e-4),
        "without the kernel": lambda: without("_kernel", lambda device: None),
        "in float32": lambda: without("multiplies_halves", lambda device: False),
    }
    gain = _gain(layer)
    found: Figures = {"before": {"seconds": timed(partial(earlier.joint, layer), 2), "gap": gain(earlier.joint(layer))}}
    for name, way in ways.items():
        solved = way()
        found[name] = {"gap": gain(solved.decorator), "steps": solved.iterations, "residual": solved.residual}
        found[name]["seconds"] = timed(way, 3 if name.startswith("now") else 1)
    return found


def _gain(layer: Layer) -> Callable[[Tensor], float]:
    """What a decorator lacks of the optimum's gain over the bare mask, on the first rows, in float64."""
    kept, rows = layer.mask[:_ORACLE_ROWS], slice(0, _ORACLE_ROWS)
    right = torch.where(kept, 0.0, layer.delta[rows].double()) @ layer.hessian.double()
    best = torch.zeros_like(right)
    for row in range(kept.shape[0]):
        index = kept[row].nonzero().squeeze(1)
        system = layer.hessian[index][:, index].double()
        system.diagonal().add_(layer.amount)
        best[row, index] = torch.linalg.solve(system, right[row, index])

    def gain(x: Tensor) -> float:
        x = x.double()
        return float((2 * x * right - (x @ layer.hessian.double() + layer.amount * x) * x).sum())

    most = gain(best)
    return lambda decorator: 1.0 - gain(decorator[rows]) / most


def _iteration(layer: Layer, timed: Timed) -> Figures:
    """Seconds of the two halves of an iteration over one chunk of rows, and over how many."""
    chunk = slice(0, max(1, min(layer.delta.shape[0], (1 << 24) // layer.delta.shape[1])))
    kept, target = layer.mask[chunk], torch.where(layer.mask[chunk], layer.delta[chunk], 0.0)
    system = System.of(layer.hessian, layer.amount, DEFAULT, halves=True)
    assert system.half is not None
    half = system.half
    state = gradients._start(target, kept, system, torch.zeros(kept.shape[0], device=target.device))
    q = product_of_halves(state.p, half)
    step_ = gradients._step_of(state.p)
    found = {"rows": kept.shape[0], "product": timed(partial(product_of_halves, state.p, half), 5)}
    found["float32"] = timed(lambda: target @ layer.hessian, 3)
    found["split"] = timed(partial(System.of, layer.hessian, layer.amount, DEFAULT, True), 3)
    found["step"] = timed(lambda: step_(q.clone() if target.device.type == "cpu" else q, state), 5)
    found["whole"] = timed(partial(conjugate_gradients, target, kept, system, DEFAULT, 300), 3)
    return found


def _products(inputs: int, tokens: int, device: torch.device, timed: Timed) -> Figures:
    """The Hessian of bfloat16 inputs: in float32 products, and as it is now."""
    x = torch.randn(tokens, inputs, device=device).to(torch.bfloat16)
    plain, now = (torch.zeros(inputs, inputs, device=device) for _ in range(2))
    found: Figures = {"inputs": inputs, "tokens": tokens}
    found["before"] = timed(lambda: accumulate_(plain, x.float(), 0), 3)
    found["now"] = timed(lambda: accumulate_(now, x, 0), 3)
    found["difference"] = float((now.tril() - plain.tril()).abs().max() / plain.abs().max())
    return found


def render(found: Figures) -> str:
    """Before, now, and the targets."""
    rows, parts, verdicts = [], [], []
    for row in found["rows"]:
        before = row["before"]["seconds"]
        shape = "{} x {}".format(*row["shape"]) + ("" if row["power"] == 1.0 else ", 1/j^2")
        for name in ("before", "now", "now, to 1e-4", "without the kernel", "in float32"):
            way = row[name]
            cells = [f"{way['seconds']:.4f}", f"{before / way['seconds']:.2f}"]
            cells += [f"{way['gap']:.1e}" if "gap" in way else "", str(way.get("steps", ""))]
            rows.append([f"{shape}, {name}", *cells, f"{way['residual']:.1e}" if "residual" in way else ""])
        if "iteration" in row:
            one = row["iteration"]
            parts.append(
                f"{shape}: an iteration over {one['rows']} rows takes {1e3 * one['product']:.2f} ms for the product "
                f"(float32 {1e3 * one['float32']:.2f}) and {1e3 * one['step']:.2f} ms for the rest; preparing H "
                f"{1e3 * one['split']:.2f} ms; that chunk's descent {1e3 * one['whole']:.1f} ms"
            )
        if "select" in row:
            parts.append(f"{shape}: selection {1e3 * row['select']:.2f} ms")
    firsts = [row for row in found["rows"] if row["power"] == 1.0]
    for row, target in zip(firsts, TARGETS, strict=False):
        times = row["before"]["seconds"] / row["now"]["seconds"]
        verdicts.append(
            "{} x {}: ".format(*row["shape"]) + f"{target:g} times {verdict(times >= target)} ({times:.1f})"
        )
    gap = max(row["now"]["gap"] for row in found["rows"])
    verdicts.append(f"gap at most {GAP:g} {verdict(gap <= GAP)} ({gap:.1e})")
    for one in found["hessian"]:
        parts.append(
            f"Hessian of {one['inputs']} channels, {one['tokens']} tokens: {one['before']:.4f} s in float32, "
            f"{one['now']:.4f} s now ({one['before'] / one['now']:.1f} times), difference {one['difference']:.0e}"
        )
    head = f"products of halves: {found['halves']}; Triton kernel: {found['kernel']} {found['reason']}".rstrip()
    columns = ("layer, O x I", "seconds", "times as fast", "gap of the gain", "iterations", "residual")
    return "\n\n".join((head, markdown(columns, rows), "\n".join(parts), "; ".join(verdicts)))
