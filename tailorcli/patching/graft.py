"""A mask trained on the task: ``patch --method graft`` (Panigrahi et al. 2023, arXiv 2302.06600).

The values are base + sigmoid(S) * (tuned - base). S starts high on the largest changes and low elsewhere, gradient
descent on the task's loss moves it (and nothing else), and the highest S make the mask. The whole model is in memory
for that; the masks then lie packed in a file, from which the streaming loop takes one tensor's at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import config_folder, tokenizer_folder
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.grown import GrownCheckpoint
from tailorcli.checkpoint.header import read_header
from tailorcli.data.records import Record, read_records
from tailorcli.data.samples import draw_samples, make_batches
from tailorcli.distributed import ranks, wait_for_all
from tailorcli.errors import CheckpointError, NumericalError, OptionsError, OutputError
from tailorcli.files import PathLike, beside, given_path, parse_json
from tailorcli.models.config import processor_folder, read_config
from tailorcli.models.empty import check_shapes, empty_on_meta, most_tokens
from tailorcli.models.loading import load_encoder, load_model
from tailorcli.models.names import aliases, expected_names
from tailorcli.models.places import Place, guessed_places, map_names
from tailorcli.models.running import differentiable, to_device
from tailorcli.options import CalibrateOptions, KeepOptions, PatchOptions
from tailorcli.runs.plan import Plan, TensorPlan
from tailorcli.terminal import Progress
from tailorcli.typed import read_object
from tailorcli.units import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tailorcli.data.samples import Inputs

SUFFIX = ".graft"  # after the output's name: the trained masks, until the run has finished
_METADATA = "tailorcli_graft"
_START = 5.0  # sigmoid(5) = 0.993
_BY_SIZE = 0.01  # how far |delta| moves the start: it decides between entries that training has left alone
_SEQ_LEN = 2048


class MaskFile:
    """Trained masks as packed bits, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def beside(cls, output: Path) -> MaskFile:
        """The one that belongs to an output folder or a patch file. Raises OutputError if it is something else."""
        file = cls(beside(output, SUFFIX))
        if file.path.exists() and file.identity() is None:
            raise OutputError(f"{file.path} exists and holds no masks of tailorcli", "move it away")
        return file

    def identity(self) -> dict[str, Any] | None:
        """Of which run its masks are; None if it is no file of masks."""
        try:
            _, metadata = read_header(self.path)
            return read_object(parse_json(metadata[_METADATA]))
        except (CheckpointError, KeyError, ValueError):
            return None

    def write(self, masks: dict[str, Tensor], identity: dict[str, Any]) -> None:
        """Store the masks whole or not at all. Raises OutputError."""
        import numpy as np
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        packed = {n: torch.from_numpy(np.packbits(mask.reshape(-1).numpy())) for n, mask in masks.items()}
        part = self.path.with_name(self.path.name + ".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(packed, part, {_METADATA: json.dumps(identity)})
            part.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {self.path}: {error}", "free some disk") from error

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """One tensor's mask."""
        import numpy as np
        import torch
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as opened:
            bits = np.unpackbits(opened.get_tensor(name).numpy())
        mask = torch.empty(tuple(shape), dtype=torch.bool)
        mask.view(-1)[:] = torch.from_numpy(bits[: mask.numel()]).view(torch.bool)
        return mask

    def mask_of(self, tensor: TensorPlan, base: Tensor, tuned: Tensor) -> Tensor:
        """The mask of a planned tensor, as the streaming loop asks for it; the values do not matter."""
        return self.read(tensor.name, tensor.shape)

    def remove(self) -> None:
        """Take it away once the run has finished."""
        self.path.unlink(missing_ok=True)


def check_graft(data: PathLike | None, options: KeepOptions) -> None:
    """There is something to train on. Raises OptionsError."""
    if data is None or not given_path(data).is_file():
        what = "--method graft trains its mask on the task" if data is None else f"{data} is no file"
        raise OptionsError(what, "pass the fine-tuning data: --graft-data FILE.jsonl")
    if options.resized_vocab:
        raise OptionsError("--method graft does not train the masks of new rows", "leave --resized-vocab out")


def trained_masks(
    output: Path,
    plan: Plan,
    base: Checkpoint,
    tuned: Checkpoint,
    samples: list[Inputs],
    options: PatchOptions,
    identity: dict[str, Any],
    device: torch.device,
    progress: bool,
) -> MaskFile:
    """The masks beside ``output``: trained now on ``samples``, or before this very run (``identity``) was interrupted.

    Of several ranks the first trains them. Raises TailorError.
    """
    masks = MaskFile.beside(output)
    if ranks().first and (not options.resume or masks.identity() != identity):
        masks.write(train_masks(plan.patched, base, tuned, samples, options, device, progress), identity)
    wait_for_all("graft's masks to be trained")
    return masks


@dataclass
class _Trained:
    """One tensor in training: ``logits`` is S, float32; the others are as stored."""

    tensor: TensorPlan
    parameter: torch.nn.Parameter
    base: Tensor
    tuned: Tensor
    logits: Tensor

    def delta(self) -> Tensor:
        """Tuned minus base, float32."""
        import torch

        return self.tuned.to(torch.float32) - self.base.to(torch.float32)


def train_masks(
    tensors: Sequence[TensorPlan],
    base: Checkpoint,
    tuned: Checkpoint,
    samples: list[Inputs],
    options: PatchOptions,
    device: torch.device,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The trained masks of ``tensors`` by name, on the CPU.

    ``graft_steps`` steps of gradient descent, each on ``batch_size`` of ``samples`` with the causal-LM loss on the
    response's tokens, where there is a prompt, else on all; the gradient of S is divided by its root mean square over
    all entries, so that ``graft_rate`` has no unit.
    With ``threshold`` "tensor" each tensor keeps exactly round(density * numel) entries, with "global" all together.
    """
    import torch

    settings, folder = _settings(options), _folder(base, tuned)
    config = read_config(folder)
    check_shapes(base, config, settings, folder)
    network = load_model(base, config, settings, folder)
    places = _places(tensors, network, base)
    network.to(device).requires_grad_(False)
    trained = _start(tensors, places, network, base, tuned, options, device)
    batches = _batches(samples, options.batch_size)
    with Progress("grafting", options.graft_steps, "steps", shown=progress) as bar:
        for _ in range(options.graft_steps):
            _mix(trained)
            _backward(network, next(batches), device)
            _step(trained, options.graft_rate)
            bar.update()
    with torch.no_grad():
        return _top(trained, options)


def check_trainable(
    tensors: Sequence[TensorPlan], base: Checkpoint, tuned: Checkpoint, data: Path, options: PatchOptions
) -> list[Inputs]:
    """The samples of ``data`` that ``train_masks`` can train these masks on, as is seen without weights.

    Raises TailorError.
    """
    settings, folder = _settings(options), _folder(base, tuned)
    config = read_config(folder)
    samples = _samples(data, base, tuned, config, settings)
    check_shapes(base, config, settings, folder)
    network = empty_on_meta(base, config, settings, folder)
    if not network.can_generate():
        what = f"{type(network).__name__} predicts no next token"
        raise CheckpointError(what, "graft is for models that write text; choose another --method")
    _named(tensors, guessed_places(expected_names(network, base.tensors)), network)
    return samples


def _settings(options: PatchOptions) -> CalibrateOptions:
    """How samples are drawn, and the model is loaded."""
    return CalibrateOptions(
        num_samples=options.graft_steps * options.batch_size or 1,
        seq_len=_SEQ_LEN,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )


def _folder(base: Checkpoint, tuned: Checkpoint) -> Path:
    """Whose config what is patched will run under: the tuned model's, unless that is of another vocabulary."""
    return base.path if isinstance(base, GrownCheckpoint) else config_folder(tuned)


def _places(tensors: Sequence[TensorPlan], network: Any, base: Checkpoint) -> dict[str, str]:
    """The parameter that each tensor is, alone and whole. Raises CheckpointError for those that are none."""
    expected = expected_names(network, base.tensors)
    return _named(tensors, map_names(base, dict(network.named_parameters()), aliases(network), expected), network)


def _named(tensors: Sequence[TensorPlan], known: Mapping[str, Place], network: Any) -> dict[str, str]:
    parameters = dict(network.named_parameters())
    found: dict[str, str] = {}
    taken: set[str] = set()
    why: dict[str, str] = {}
    for tensor in tensors:
        place = known.get(tensor.name, Place(reason="transformers does not load it"))
        name = place.parameters[0] if len(place.parameters) == 1 and place.part is None else ""
        if name not in parameters or name in taken or tuple(parameters[name].shape) != tensor.shape:
            why[tensor.name] = place.reason or "the model holds it tied, fused or split"
        else:
            found[tensor.name] = name
            taken.add(name)
    if why:
        name, reason = next(iter(why.items()))
        more = f", nor those of {counted(len(why) - 1, 'other tensor')}" if len(why) > 1 else ""
        globs = dict.fromkeys(re.sub(r"\b\d+\b", "*", name) if len(why) > 1 else name for name in why)
        hint = " ".join(f"--exclude '{glob}'" for glob in globs)
        raise CheckpointError(f"graft cannot train the mask of tensor {name!r}: {reason}{more}", f"leave out: {hint}")
    return found


def _samples(
    data: Path, base: Checkpoint, tuned: Checkpoint, config: dict[str, Any], settings: CalibrateOptions
) -> list[Inputs]:
    """Samples with a token to predict, as the tuned model's tokenizer or processor makes them, with their labels."""
    from tailorcli.training.examples import encode_example

    records = read_records(data)
    has_media = records.has_media
    folder = processor_folder(tokenizer_folder(tuned), base.path, has_media)
    encoder = load_encoder(folder, base.path, has_media, settings)
    if encoder.start_token is not None:
        what = f"{base.path} is an encoder-decoder, and graft trains causal language models"
        raise OptionsError(what, "choose another --method")
    length = min(settings.length, most_tokens(base, config, settings))

    def encode(record: Record, seq_len: int) -> Inputs | None:
        return encode_example(record, encoder, min(seq_len, length))

    return draw_samples(data, records, encode, settings).inputs


def _batches(samples: list[Inputs], size: int) -> Iterator[list[Inputs]]:
    """Batches of ``size`` samples, round and round."""
    position = 0
    while True:
        yield [samples[(position + i) % len(samples)] for i in range(size)]
        position += size


def _start(
    tensors: Sequence[TensorPlan],
    places: dict[str, str],
    network: Any,
    base: Checkpoint,
    tuned: Checkpoint,
    options: KeepOptions,
    device: torch.device,
) -> list[_Trained]:
    """Every tensor with its parameter and the S that it starts from: high on the largest changes."""
    import torch

    parameters = dict(network.named_parameters())
    trained = []
    for tensor in tensors:
        values = [checkpoint.read(tensor.name).to(device) for checkpoint in (base, tuned)]
        parameter = parameters[places[tensor.name]].requires_grad_(True)
        part = _Trained(tensor, parameter, values[0], values[1], torch.empty(0))
        part.logits = part.delta().abs()
        if not bool(part.logits.isfinite().all()):
            raise NumericalError(f"tensor {tensor.name!r}: NaN or infinity in base or tuned", "check the checkpoints")
        trained.append(part)
    masks = _top(trained, options)  # of |delta|
    for part in trained:
        high = masks[part.tensor.name].to(device)
        part.logits.mul_(_BY_SIZE / max(float(part.logits.max()), 1e-30)).add_(torch.where(high, _START, -_START))
    return trained


def _mix(trained: list[_Trained]) -> None:
    """Every parameter becomes base + sigmoid(S) * delta."""
    import torch

    with torch.no_grad():
        for part in trained:
            change = part.delta().mul_(part.logits.sigmoid())
            part.parameter.copy_(change.add_(part.base.to(torch.float32)))
            part.parameter.grad = None


def _backward(network: Any, samples: list[Inputs], device: torch.device) -> None:
    """The gradient of the mean loss over the samples' tokens that are learnt; nothing is padded."""
    from tailorcli.training.examples import count_learnt

    tokens = sum(count_learnt(inputs) for inputs in samples)
    for batch in make_batches(samples, len(samples)):
        loss = differentiable(network, to_device(batch, device)).loss
        if loss is None:
            what = f"{type(network).__name__} has no causal-LM loss"
            raise CheckpointError(what, "graft is for causal language models; choose another --method")
        if loss.requires_grad:  # not where no trained tensor lies on the way
            (loss * (count_learnt(batch) / tokens)).backward()


def _step(trained: list[_Trained], rate: float) -> None:
    """S moves against the gradient: that of the weight, times delta, times the slope of the sigmoid."""
    import torch

    with torch.no_grad():
        square, count = 0.0, 0
        for part in trained:
            gradient = _gradient(part)
            square += float(gradient.square().sum(dtype=torch.float64))
            count += gradient.numel()
        scale = (square / count) ** 0.5
        if scale > 0.0:  # NaN, too: let the loss's overflow show
            for part in trained:
                part.logits.add_(_gradient(part), alpha=-rate / scale)
        elif scale != scale:
            raise NumericalError("the gradient of graft's loss is NaN", "check the data and the checkpoints")


def _gradient(part: _Trained) -> Tensor:
    import torch

    share = part.logits.sigmoid()
    slope = part.delta().mul_(share * (1.0 - share))
    gradient = part.parameter.grad
    return torch.zeros_like(slope) if gradient is None else slope.mul_(gradient.to(torch.float32))


def _top(trained: list[_Trained], options: KeepOptions) -> dict[str, Tensor]:
    """The masks of the highest ``logits``: so many of each tensor, or of all together; on the CPU."""
    import torch

    from tailorcli.core.scores import count_kept, select_mask

    def chosen(logits: Tensor) -> Tensor:
        return select_mask(logits - logits.min(), count_kept(options.density, logits.numel())).cpu()

    if options.threshold == "tensor":
        return {part.tensor.name: chosen(part.logits) for part in trained}
    every = chosen(torch.cat([part.logits.reshape(-1) for part in trained]))
    masks = torch.split(every, [part.logits.numel() for part in trained])
    return {part.tensor.name: mask.view(part.tensor.shape) for part, mask in zip(trained, masks, strict=True)}
