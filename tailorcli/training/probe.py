"""Model-Dowser's scores of a base: what its layers do to its answers, on samples that it writes itself.

The whole model is in memory with what backward needs, and a float32 number for each entry that is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailorcli.calibration.sources import Source, drawn
from tailorcli.calibration.synthetic import require_writer, write_samples
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.core import dowser
from tailorcli.data.samples import Samples, count_tokens, make_batches
from tailorcli.device import device_errors, exact_float32, resolve_device
from tailorcli.errors import CheckpointError, NumericalError
from tailorcli.files import PathLike
from tailorcli.guard import OutputLock, Watch, path_text, protect
from tailorcli.hub import local_folder
from tailorcli.models.config import read_config
from tailorcli.models.layers import find_layers
from tailorcli.models.loading import check_shapes, load_encoder, load_model, most_tokens, package_versions
from tailorcli.models.running import check_ids, differentiable, output_head, to_device
from tailorcli.options import CalibrateOptions
from tailorcli.terminal import Progress
from tailorcli.training.choice import sample_digest
from tailorcli.training.importance import SCORES, prepare, write
from tailorcli.training.settings import ProbeOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tailorcli.data.samples import Inputs


@dataclass(frozen=True)
class ProbeReport:
    """What a probe scored; ``unscored`` maps the names of other parameters to the reason."""

    output: str
    samples: int
    tokens: int
    scored: int
    entries: int
    unscored: dict[str, str]
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


@dataclass
class Gain:
    """The gains of one weight, and over how many tokens they were summed."""

    total: Tensor  # (O, I), float32
    tokens: int = 0


def probe_model(
    base: PathLike,
    output: PathLike,
    options: ProbeOptions = ProbeOptions(),
    data: PathLike | None = None,
    progress: bool = False,
) -> ProbeReport:
    """Score the weights of ``base`` and write the importance folder ``output``, which ``finetune`` takes.

    The samples are what the base writes itself, from random tokens, or records of ``data``, pictures included. The
    cost is a forward pass and ``rademacher`` backward passes over each. Raises TailorError.
    """
    started = perf_counter()
    folder = Path(output)
    with ExitStack() as stack:
        stored = stack.enter_context(open_plain(base))
        device = resolve_device(options.device)
        protect([folder], [stored.path, data], "choose another folder for -o")
        watch = Watch([*stored.shards, *([] if data is None else [Path(data)])])
        prepare(folder, options.overwrite)
        stack.enter_context(OutputLock(folder, folder=True))
        config = read_config(stored.path)
        drawing = _drawing(options, synthetic=data is None)
        check_shapes(stored, config, drawing)
        network = load_model(stored, config, drawing).to(device)
        smaller = "a smaller --batch-size or --seq-len"
        with exact_float32(), device_errors(smaller):
            samples = _samples(network, stored, config, drawing, data, device, progress)
            check_ids(samples.inputs, network)
            batches = list(make_batches(samples.inputs, options.batch_size))
            with Progress("probing", samples.num_tokens, "tokens", shown=progress) as bar:
                found = probe_network(network, batches, options.rademacher, options.seed, bar.update)
            scores, unscored = scores_of(network, found, options.rademacher)
        watch.require_unchanged()
        parameters = dict(network.named_parameters())
        manifest = {
            "base": {"path": path_text(stored.path), "fingerprint": stored.fingerprint()},
            "data": samples.facts,
            "options": options.to_dict(),
            "versions": package_versions(),
            "parameters": {name: sample_digest(parameters[name]) for name in scores},
            "unscored": unscored,
        }
        write(folder, scores, manifest)
    entries = sum(score.numel() for score in scores.values())
    size = (folder / SCORES).stat().st_size
    seconds = perf_counter() - started
    counts = (len(samples.inputs), samples.num_tokens, len(scores), entries)
    return ProbeReport(str(folder), *counts, unscored, size, seconds)


def open_plain(base: PathLike) -> Checkpoint:
    """Open a checkpoint that can be trained. Raises CheckpointError, also for one with quantised weights."""
    from tailorcli.checkpoint.quantized import open_checkpoint

    stored = open_checkpoint(local_folder(base))
    packed = sorted({info.dtype for info in stored.tensors.values()} - _PLAIN)
    if stored.dequantized or packed:
        stored.close()
        what = "FP8 weights" if stored.dequantized else f"tensors of dtype {packed[0]}"
        problem = f"{base} is quantised ({what}): its weights cannot be trained"
        raise CheckpointError(problem, "pass it in full precision")
    return stored


_PLAIN = {"F64", "F32", "F16", "BF16", "BOOL", "I64"}


def _drawing(options: ProbeOptions, *, synthetic: bool) -> CalibrateOptions:
    """How samples are made, in calibrate's words."""
    return CalibrateOptions(
        num_samples=options.num_samples,
        seq_len=options.seq_len,
        dtype=options.dtype,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        synthetic=synthetic,
        columns=options.columns,
    )


def _samples(
    network: Any,
    stored: Checkpoint,
    config: dict[str, Any],
    drawing: CalibrateOptions,
    data: PathLike | None,
    device: torch.device,
    progress: bool,
) -> Samples:
    """Samples of the data, or such as the network writes itself."""
    if data is not None:
        return drawn(Source(stored, stored, config, drawing, Path(data), None))
    require_writer(network)
    length = min(drawing.length, most_tokens(stored, config, drawing))
    writing = replace(drawing, seq_len=length)
    tokenizer = load_encoder(stored.path, stored.path, False, drawing).tokenizer
    with Progress("writing", drawing.num_samples * (length - 1), "tokens", shown=progress) as bar:
        return write_samples(network, tokenizer, writing, device, bar)


def probe_network(
    network: Any,
    batches: Sequence[Inputs],
    draws: int,
    seed: int,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[str, Gain]:
    """The gains of every linear layer but the output layer, by its weight's name, summed over tokens and ``draws``.

    A batch takes one forward pass, ``draws`` backward passes from random signs on the logits of all its tokens, and
    one product a layer; no gradient of a weight is made. The draws are those of ``seed``. Raises NumericalError for
    gradients that are no numbers.
    """
    head = output_head(network)
    own = set() if head is None else {id(value) for value in head.parameters()}
    parameters = dict(network.named_parameters())
    layers = {
        name: layer.modules
        for name, layer in find_layers(network).items()
        if layer.role == "linear" and parameters[name].dim() == 2 and id(parameters[name]) not in own
    }
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    gains: dict[str, Gain] = {}
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    try:
        for batch in batches:
            with _watched(network, layers) as (leaves, calls):
                inputs = {n: _grown(value, leaves) for n, value in to_device(batch, device).items()}
                outputs = _run(network, inputs)
                for draw in range(draws):
                    signs = dowser.random_signs(outputs, generator)
                    torch.autograd.grad(outputs, leaves, signs, retain_graph=draw + 1 < draws, allow_unused=True)
                del outputs
                for name, seen in calls.items():
                    for call in seen:
                        _add(gains, name, call)
            advance(count_tokens(batch))
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])
    return gains


class _Call:
    """One call of a layer: its inputs (N, I), and the absolute gradients at its outputs (N, O), summed over draws."""

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        self.inputs = inputs.detach()
        self.backward: Tensor | None = None
        outputs.register_hook(self._take)  # type: ignore[no-untyped-call]

    def _take(self, gradient: Tensor) -> None:
        if self.backward is None:
            self.backward = gradient.abs().float()
        else:
            self.backward += gradient.abs()


@contextmanager
def _watched(
    network: Any, layers: Mapping[str, Sequence[nn.Module]]
) -> Iterator[tuple[list[Tensor], dict[str, list[_Call]]]]:
    """While it lasts every embedding's output is a leaf of the graph, and every call of a layer is noted."""
    leaves: list[Tensor] = []
    calls: dict[str, list[_Call]] = {}

    def begin(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return _grown(output, leaves)

    def note(name: str) -> Callable[..., None]:
        def take(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(output, Tensor) and output.requires_grad:
                calls.setdefault(name, []).append(_Call(args[0], output))

        return take

    handles = [m.register_forward_hook(begin) for m in network.modules() if isinstance(m, nn.Embedding)]
    handles += [module.register_forward_hook(note(name)) for name, modules in layers.items() for module in modules]
    try:
        yield leaves, calls
    finally:
        for handle in handles:
            handle.remove()


def _grown(value: Tensor, leaves: list[Tensor]) -> Tensor:
    """A tensor of numbers as a branch of the graph that grows from a leaf of its own; any other as it is."""
    if not value.is_floating_point():
        return value
    leaf = value.detach().requires_grad_()
    leaves.append(leaf)
    return leaf * 1  # no leaf itself: models write image features into their embeddings in place


def _run(network: Any, inputs: Inputs) -> Tensor:
    """The model's answers f, with their graph: its logits, or what else it gives."""
    outputs = differentiable(network, inputs)
    logits = getattr(outputs, "logits", None)
    found: Tensor = logits if logits is not None else outputs[0]
    return found


def _add(gains: dict[str, Gain], name: str, call: _Call) -> None:
    """Add one call's product to the gains of its weight."""
    if call.backward is None:
        return
    rows = call.inputs.flatten(0, -2)
    gain = dowser.gains(call.backward.flatten(0, -2), rows)
    if not bool(gain.isfinite().all()):
        raise NumericalError(f"the gradients at {name!r} are no finite numbers", "pass --dtype float32")
    if name not in gains:
        gains[name] = Gain(torch.zeros_like(gain))
    gains[name].total += gain
    gains[name].tokens += len(rows)


def scores_of(network: Any, gains: Mapping[str, Gain], draws: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The scores by parameter, in its shape and on the CPU, and why other parameters have none."""
    layers, scores, unscored = find_layers(network), {}, {}
    for name, parameter in network.named_parameters():
        gain = gains.get(name)
        if gain is not None:
            total = gain.total.T if layers[name].transposed else gain.total
            scores[name] = dowser.scores(parameter, total, gain.tokens * draws).cpu()
        elif name in layers and layers[name].role == "linear" and parameter.dim() == 2:
            unscored[name] = "its layer was not run on these samples, or is the output layer"
        else:
            unscored[name] = "it is no weight of a linear layer"
    return scores, unscored
