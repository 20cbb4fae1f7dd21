"""What the manifest of the statistics says of each checkpoint tensor."""

from __future__ import annotations

from dataclasses import replace

from tailorcli.calibration.passes import Subject
from tailorcli.calibration.stats import BIAS_HESSIAN, TensorStats
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, TensorInfo
from tailorcli.models.layers import Layer
from tailorcli.models.places import Place
from tailorcli.options import matches

_NO_CHOICE = "not chosen by --include and --exclude at calibration"


def entry_of(tensor: str, run: Subject, layers: dict[str, Layer]) -> TensorStats:
    """The manifest's entry for a checkpoint tensor."""
    info, place = run.stored.tensors[tensor], run.places.get(tensor, Place(reason="transformers does not load it"))
    if not matches(tensor, run.options.include, run.options.exclude):
        return TensorStats(None, reason=_NO_CHOICE)
    if info.dtype not in PATCHABLE_DTYPES:
        return TensorStats(None, reason=f"{info.dtype} is no floating-point dtype that can be patched")
    if tensor in run.buffers:
        return TensorStats(None, reason="it is a buffer, no parameter")
    if place.reason:
        return TensorStats(None, reason=place.reason)
    name = place.parameters[0]
    if name not in layers:
        weight = layers.get(name.removesuffix("bias") + "weight") if name.endswith("bias") else None
        if weight is None:
            return TensorStats(None, reason="no layer holds it")
        return TensorStats(BIAS_HESSIAN if weight.group else None, "bias", reason=weight.reason)
    layer = layers[name]
    entry = _of_layer(layer)
    if len({layers[n].group if n in layers else None for n in place.parameters}) > 1:
        return TensorStats(None, reason="transformers splits it into layers that do not share their inputs")
    if layer.experts:
        return _expert_entry(layer, entry, place, info)
    return replace(entry, transposed=entry.transposed != place.transposed) if place.transposed else entry


def _expert_entry(layer: Layer, entry: TensorStats, place: Place, info: TensorInfo) -> TensorStats:
    """One expert's tensor of those that transformers fuses, or all of them where the checkpoint fuses them, too."""
    if place.part is None:
        if len(info.shape) == 3:
            return entry
        return TensorStats(None, reason="it holds several experts in a layout that is not known")
    hessian = entry.experts[place.part]
    note = "too few tokens reached this expert: the Hessian of all tokens of its layer serves for it"
    note = note if place.part in layer.pooled else ""
    return TensorStats(hessian, entry.role, entry.transposed != place.transposed, note=note)


def _of_layer(layer: Layer) -> TensorStats:
    """The manifest's entry for a layer's weight."""
    return TensorStats(layer.group, layer.role, layer.transposed, layer.reason, list(layer.experts), layer.note)
