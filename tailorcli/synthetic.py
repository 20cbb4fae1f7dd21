"""Samples that a model writes itself: for what it must not forget, where its training data are not at hand.

Each starts from a random token of the vocabulary and is continued by the model's own sampling (Model-Dowser, "Synthetic
Prompt Generation").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tailorcli.data import Samples
from tailorcli.errors import CheckpointError, DataError, NumericalError, first_line
from tailorcli.loading import sampling_generation
from tailorcli.options import CalibrateOptions

if TYPE_CHECKING:
    import torch

    from tailorcli.data import Inputs

_TOGETHER = 32  # samples written at a time, whatever the batch size: the random numbers follow it
_HINT = "calibrate on data of your own that stand for what it must not forget: --data FILE"


def write_samples(network: Any, tokenizer: Any, options: CalibrateOptions, device: torch.device, bar: Any) -> Samples:
    """Let ``network`` write ``num_samples`` texts of ``seq_len`` tokens each, the first of them drawn at random.

    Sampled at temperature 1 from the whole vocabulary. The token that ends a text ends no sample: what the model
    goes on with is a new text, as in its training. The same seed, device and versions give the same samples.
    Raises DataError for a tokenizer of special tokens alone, NumericalError where the model cannot be sampled from.
    """
    import torch

    first = _plain_tokens(tokenizer, network.get_input_embeddings().weight.shape[0])
    samples: list[Inputs] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(options.seed)
        chosen = first[torch.randint(len(first), (options.num_samples, 1))]  # (B, 1)
        for starts in torch.split(chosen, _TOGETHER):
            samples += [{"input_ids": ids.clone().unsqueeze(0)} for ids in _continued(network, starts, options, device)]
            bar.update(len(starts) * (options.length - 1))
    facts = {
        "file": None,
        "synthetic": True,
        "samples": len(samples),
        "tokens": len(samples) * options.length,
        "seed": options.seed,
        "seq_len": options.length,
    }
    return Samples(samples, facts)


def require_writer(network: Any) -> None:
    """Raises CheckpointError for a model that continues no text."""
    if not getattr(network, "can_generate", lambda: False)() or getattr(network.config, "is_encoder_decoder", False):
        name = type(network).__name__
        raise CheckpointError(f"{name} continues no text, so that it cannot write its own samples", _HINT)


def _plain_tokens(tokenizer: Any, rows: int) -> torch.Tensor:
    """The ids of the vocabulary that are no special tokens and have an embedding."""
    import torch

    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    plain = [token for token in ids if token < rows]
    if not plain:
        raise DataError("the tokenizer has no ordinary tokens to start samples from", _HINT)
    return torch.tensor(plain)


def _continued(network: Any, starts: torch.Tensor, options: CalibrateOptions, device: torch.device) -> torch.Tensor:
    """Token ids (B, T) on the CPU: the first tokens (B, 1), continued to ``seq_len``."""
    if options.length == 1:
        return starts
    ids = starts.to(device)
    try:
        with sampling_generation(network, options.length - 1) as settings:
            written: torch.Tensor = network.generate(
                input_ids=ids, attention_mask=ids.new_ones(ids.shape), generation_config=settings
            )
    except (RuntimeError, ValueError, IndexError) as error:
        what = f"the model cannot be sampled from: {first_line(error)}"
        raise NumericalError(what, f"pass --dtype float32, or {_HINT}") from error
    return written.cpu()
