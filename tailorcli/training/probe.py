"""Model-Dowser's scores of a base: what its layers do to its answers, on samples that it writes itself.

The whole model is in memory with what backward needs, and a float32 number for each entry that is scored; where that
does not fit, it goes block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailorcli.calibration.sources import Source, drawn, self_written
from tailorcli.calibration.synthetic import require_writer, write_samples
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.core import dowser
from tailorcli.data.samples import Samples, count_tokens, make_batches
from tailorcli.device import device_errors, exact_float32, resolve_device
from tailorcli.errors import CheckpointError
from tailorcli.files import PathLike, ScratchFolder, optional_path
from tailorcli.guard import OutputLock, Watch, path_text, protect
from tailorcli.hub import local_folder
from tailorcli.models.calling import package_versions
from tailorcli.models.config import read_config
from tailorcli.models.empty import check_shapes, most_tokens
from tailorcli.models.loading import load_encoder, load_model
from tailorcli.models.lockstep import find_blocks
from tailorcli.models.running import check_ids, to_device
from tailorcli.options import CalibrateOptions
from tailorcli.terminal import Progress
from tailorcli.training.choice import sample_digest
from tailorcli.training.gains import Calls, Gain, answers, fold, frozen, noting, scored_layers, scores_of
from tailorcli.training.importance import SCORES, prepare, write
from tailorcli.training.probe_blocks import Probed, probe_blocks, skeleton_for_probe
from tailorcli.training.settings import ProbeOptions

if TYPE_CHECKING:
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
        source = Source(stored, stored, config, drawing, optional_path(data), None)
        skeleton = skeleton_for_probe(stored, config, drawing, options.batch_size, device)
        smaller = "a smaller --batch-size or --seq-len" + ("" if skeleton else ", or --blockwise always")
        with exact_float32(), device_errors(smaller):
            if skeleton is None:
                samples, found = _probe_whole(source, options, device, progress)
            else:
                samples, found = _probe_blocks(skeleton, source, options, device, progress)
        watch.require_unchanged()
        scores = found.scores
        manifest = {
            "base": {"path": path_text(stored.path), "fingerprint": stored.fingerprint()},
            "data": samples.facts,
            "options": options.to_dict(),
            "versions": package_versions(),
            "parameters": found.digests,
            "unscored": found.unscored,
        }
        write(folder, scores, manifest)
    entries = sum(score.numel() for score in scores.values())
    size = (folder / SCORES).stat().st_size
    seconds = perf_counter() - started
    counts = (len(samples.inputs), samples.num_tokens, len(scores), entries)
    return ProbeReport(str(folder), *counts, found.unscored, size, seconds)


def _probe_whole(source: Source, options: ProbeOptions, device: torch.device, progress: bool) -> tuple[Samples, Probed]:
    """The ordinary way: the whole model on the device."""
    network = load_model(source.stored, source.config, source.options).to(device)
    samples = drawn(source) if source.data is not None else _written_by(network, source, device, progress)
    check_ids(samples.inputs, network)
    batches = list(make_batches(samples.inputs, options.batch_size))
    with Progress("probing", samples.num_tokens, "tokens", shown=progress) as bar:
        gains = probe_network(network, batches, options.rademacher, options.seed, bar.update)
    scores, unscored = scores_of(network, gains, options.rademacher)
    parameters = dict(network.named_parameters())
    return samples, Probed(scores, {name: sample_digest(parameters[name]) for name in scores}, unscored)


def _probe_blocks(
    skeleton: Any, source: Source, options: ProbeOptions, device: torch.device, progress: bool
) -> tuple[Samples, Probed]:
    """Block by block; without data the whole model has to fit all the same while it writes the samples."""
    samples = drawn(source) if source.data is not None else self_written(source, device, progress)[0]
    check_ids(samples.inputs, skeleton)
    batches = list(make_batches(samples.inputs, options.batch_size))
    with (
        Progress("probing", 2 * len(find_blocks(skeleton)), "blocks", shown=progress) as bar,
        ScratchFolder() as scratch,
    ):
        how = (options.rademacher, options.seed, device, scratch, bar.update)
        return samples, probe_blocks(skeleton, source.stored, batches, *how)


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
        blockwise=options.blockwise,
    )


def _written_by(network: Any, source: Source, device: torch.device, progress: bool) -> Samples:
    """Samples that the network writes itself."""
    require_writer(network)
    stored, drawing = source.stored, source.options
    length = min(drawing.length, most_tokens(stored, source.config, drawing))
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
    layers = scored_layers(network)
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    gains: dict[str, Gain] = {}
    with frozen(network):
        for batch in batches:
            calls: Calls = {}
            with _from_embeddings(network) as leaves, noting(layers, calls):
                inputs = {n: _grown(value, leaves) for n, value in to_device(batch, device).items()}
                outputs = answers(network, inputs)
                for draw in range(draws):
                    signs = dowser.random_signs(outputs, generator)
                    torch.autograd.grad(outputs, leaves, signs, retain_graph=draw + 1 < draws, allow_unused=True)
                del outputs
                fold(gains, calls)
            advance(count_tokens(batch))
    return gains


@contextmanager
def _from_embeddings(network: Any) -> Iterator[list[Tensor]]:
    """While it lasts every embedding's output grows from a leaf of the graph; gives the leaves."""
    leaves: list[Tensor] = []

    def begin(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return _grown(output, leaves)

    handles = [m.register_forward_hook(begin) for m in network.modules() if isinstance(m, nn.Embedding)]
    try:
        yield leaves
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
