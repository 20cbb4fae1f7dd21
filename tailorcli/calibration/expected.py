"""Statistics that are yet to be measured: which Hessians there will be, told by a model's shape alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tailorcli.adapters.interpolated import InterpolatedCheckpoint
from tailorcli.calibration.stats import BIAS_HESSIAN, HessianInfo, Stats, TensorStats, expert_name
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, TensorInfo
from tailorcli.errors import OptionsError
from tailorcli.models.config import read_config
from tailorcli.models.empty import empty_on_meta
from tailorcli.models.names import expected_names
from tailorcli.options import CalibrateOptions, matches

if TYPE_CHECKING:
    from tailorcli.data.samples import Inputs
    from tailorcli.models.layers import Layer

Item = TypeVar("Item")


class ExpectedStats(Stats):
    """What a plan asks of statistics before there are any; Hessians have their sizes and no values."""

    def __init__(
        self,
        path: Path,
        model: Checkpoint,
        tensors: dict[str, TensorStats],
        hessians: dict[str, HessianInfo],
        samples: int,
        tokens: int,
        batch_size: int,
    ) -> None:
        weight = model.weight if isinstance(model, InterpolatedCheckpoint) else 1.0
        manifest = {
            "model": {"path": str(model.path), "fingerprint": model.fingerprint(), "teacher_weight": weight},
            "data": {"tokens": tokens},
            "samples": {"count": samples},
            "options": {"batch_size": batch_size},
        }
        super().__init__(path, manifest, tensors, hessians, Checkpoint(path, {}, []))

    @property
    def total_bytes(self) -> int:
        """Bytes of all of them on disk, at most."""
        return sum(self.nbytes(name) for name in self.hessians)

    def nbytes(self, name: str) -> int:
        """Bytes that a Hessian will take on disk."""
        return 4 * self.hessians[name].stored_numel

    def fingerprint(self) -> str:
        """None can be told yet."""
        return ""

    def samples(self) -> list[Inputs]:
        """None yet; a plan only asks whether there will be any."""
        return []


def require_any(found: Sequence[Item]) -> Sequence[Item]:
    """The layers of a model that can be calibrated, or their names. Raises OptionsError where there are none."""
    if not found:
        raise OptionsError("no tensor of this model can be calibrated", "check --include and --exclude")
    return found


def expected_stats(
    path: Path, stored: Checkpoint, model: Checkpoint, options: CalibrateOptions, samples: int, tokens: int
) -> ExpectedStats:
    """The statistics that a calibration of ``model`` will write, before it has run.

    ``stored`` is the checkpoint that the network is loaded from: ``model`` itself, or an adapter's base. ``path`` is
    what notes name them by. Which layers share an input is guessed by their names. Raises CheckpointError
    where transformers cannot build the model.
    """
    from tailorcli.models.layers import find_layers

    network = empty_on_meta(stored, read_config(stored.path), options)
    layers = find_layers(network)
    places = expected_names(network, stored.tensors)
    users: dict[str, int] = {}  # checkpoint tensors that become one parameter, counted
    pieces = Counter(places.values())
    tensors: dict[str, TensorStats] = {}
    hessians: dict[str, HessianInfo] = {}
    for name, info in stored.tensors.items():
        layer = layers.get(places[name])
        bias = name.endswith("bias") and layer is None
        chosen = info.dtype in PATCHABLE_DTYPES and matches(name, options.include, options.exclude)
        if not chosen or not info.shape or (layer is None and not bias):
            tensors[name] = TensorStats(None, reason="it has no statistics")
            continue
        if layer is None:
            tensors[name] = TensorStats(BIAS_HESSIAN, "bias")
            hessians[BIAS_HESSIAN] = HessianInfo(1, "diagonal", tokens)
            continue
        part = users.get(layer.name, 0)
        users[layer.name] = part + 1
        tensors[name], found = _entry(info, layer, network, (part, pieces[places[name]]), tokens)
        hessians |= found
    return ExpectedStats(path, model, tensors, hessians, samples, tokens, options.batch_size)


def _entry(
    info: TensorInfo, layer: Layer, network: Any, part: tuple[int, int], tokens: int
) -> tuple[TensorStats, dict[str, HessianInfo]]:
    """A tensor's entry and its Hessians; ``part`` numbers it among so many that become one parameter."""
    from tailorcli.models.layers import likely_input

    if len(info.shape) == 3 and not layer.modules:
        names = [expert_name(layer.name, number) for number in range(info.shape[0])]
        each = HessianInfo(info.shape[2], "full", tokens)
        return TensorStats(None, "linear", experts=names), dict.fromkeys(names, each)
    if len(info.shape) == 2 and not layer.modules and network.get_parameter(layer.name).dim() == 3:
        experts = network.get_parameter(layer.name).shape[0]
        name = expert_name(layer.name, part[0] * experts // part[1])  # of two matrices that are fused, both see one
        return TensorStats(name, "linear"), {name: HessianInfo(info.shape[1], "full", tokens)}
    transposed = layer.transposed and len(info.shape) == 2
    size = info.shape[0] if transposed or len(info.shape) == 1 else info.numel // max(info.shape[0], 1)
    if not layer.modules and len(info.shape) == 2:  # a bare matrix, as a router is: what it does shows in use
        return TensorStats(layer.name, "linear"), {layer.name: HessianInfo(info.shape[1], "full", tokens)}
    if layer.role == "linear":
        name, kind = " ".join(map(str, likely_input(layer))), "full"
    else:
        name, kind = layer.name, "diagonal"
    return TensorStats(name, layer.role, transposed), {name: HessianInfo(size, kind, tokens)}
