"""How a network generates: greedy or sampled, with its own settings put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOGETHER = 32  # samples that are written at a time where their size is not known, and behind prompts and pictures
_MOST_TOGETHER = 256
_CPU_ROOM = 2 << 30  # bytes of keys, values and logits on a CPU: a fixed number, as what is free may change the samples
_DEVICE_SHARE = 0.5  # of a GPU's memory beside the weights


@contextmanager
def greedy_generation(network: Any, max_new_tokens: int) -> Iterator[Any]:
    """A configuration to generate with: always the likeliest token, whatever the model's own settings ask for."""
    import transformers

    own = network.generation_config
    tokens = {name: value for name, value in own.to_dict().items() if name.endswith("_token_id")}
    config = transformers.GenerationConfig(**tokens, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
    if config.pad_token_id is None:
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    with _generating_by(network, config):
        yield config


def samples_together(network: Any, device: torch.device, length: int) -> int:
    """How many samples of ``length`` tokens a model writes at a time: as many as fit, up to 256.

    It follows the model and the device, not what is free there just now: the drawn tokens follow it.
    """
    needed = _bytes_of_sample(network, length)
    if needed is None:
        return TOGETHER
    room = _CPU_ROOM
    if device.type == "cuda":
        import torch

        weights = sum(parameter.nbytes for parameter in network.parameters())
        whole = torch.cuda.get_device_properties(device).total_memory
        room = int(_DEVICE_SHARE * max(0, whole - weights))
    return max(1, min(_MOST_TOGETHER, room // needed))


def _bytes_of_sample(network: Any, length: int) -> int | None:
    """Bytes of a sample's keys and values, and of its logits in float32 a few times; None where a config is odd."""
    config = network.config.get_text_config(decoder=True)
    layers, vocab = _number(config, "num_hidden_layers"), _number(config, "vocab_size")
    if getattr(config, "is_heterogeneous", False):  # Gemma 4's layers have heads of two sizes
        kept = sum(map(_kept_of_token, config.per_layer_config))
    else:
        kept = layers * _kept_of_token(config)
    return 2 * kept * length * network.dtype.itemsize + 16 * vocab if kept and vocab else None


def _kept_of_token(config: Any) -> int:
    """The entries of a token's keys in a layer of this config."""
    heads = _number(config, "num_attention_heads")
    size = _number(config, "head_dim") or _number(config, "hidden_size") // max(1, heads)
    return (_number(config, "num_key_value_heads") or heads) * size


def _number(config: Any, name: str) -> int:
    """A positive number that a config holds; else 0."""
    found = getattr(config, name, None)
    return found if isinstance(found, int) and found > 0 else 0


def _holds_static_cache(network: Any) -> bool:
    """Whether keys and values may lie in memory that is allocated once: what transformers says of its own models."""
    return bool(getattr(network, "_can_compile_fullgraph", False)) and not network.config.is_encoder_decoder


@contextmanager
def sampling_generation(
    network: Any, new_tokens: int, barred: Sequence[int] = (), *, static: bool = False
) -> Iterator[Any]:
    """A configuration to sample so many tokens with, at temperature 1 from the whole vocabulary.

    The ``barred`` token ids are never drawn, and none ends a row. With ``static`` keys and values lie in memory that is
    allocated once, where the model can do with that.
    """
    import transformers

    held = (
        {"cache_implementation": "static", "disable_compile": True} if static and _holds_static_cache(network) else {}
    )

    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=list(barred) or None,
        **held,
    )
    with _generating_by(network, config):
        yield config


class GivenTokens:
    """A logits processor for rows that begin with more or fewer tokens: each writes its own before it is sampled.

    So no row is padded, which a model with a state would see. ``begun`` are the token ids (T,) of each row.
    """

    def __init__(self, begun: Sequence[torch.Tensor], device: torch.device) -> None:
        import torch

        self.ids = torch.nn.utils.rnn.pad_sequence(list(begun), batch_first=True, padding_value=-1).to(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores (B, V), of one token alone where a row has yet to begin with it."""
        import torch

        place = input_ids.shape[1]
        if place >= self.ids.shape[1]:
            return scores
        wanted = self.ids[:, place : place + 1]
        alone = torch.full_like(scores, -torch.inf).scatter_(1, wanted.clamp(min=0), 0.0)
        return torch.where(wanted < 0, scores, alone)


class Answered:
    """A stopping criterion: a row is done at the first of the ``ends`` behind the tokens that it was given."""

    def __init__(self, begun: Sequence[torch.Tensor], ends: Sequence[int], device: torch.device) -> None:
        import torch

        self.lengths = torch.tensor([len(ids) for ids in begun], device=device)
        self.ends = torch.tensor(list(ends), device=device)
        self.done = torch.zeros(len(begun), dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows (B,) are done."""
        import torch

        self.done |= torch.isin(input_ids[:, -1], self.ends) & (self.lengths < input_ids.shape[1])
        return self.done


@contextmanager
def _generating_by(network: Any, config: Any) -> Iterator[None]:
    """The network's own configuration, from which comes what a call leaves open, is this one within."""
    own, network.generation_config = network.generation_config, config
    try:
        yield
    finally:
        network.generation_config = own


def end_token_ids(network: Any) -> list[int]:
    """The ids of the tokens with which the model ends a text."""
    config = getattr(network, "generation_config", None)  # a class that does not generate may have none
    ends = None if config is None else config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())


def media_token_ids(network: Any) -> list[int]:
    """The ids that the model itself takes for places of images, which its processor need not know by this name."""
    names = [f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index")]
    return [value for name in names if isinstance(value := getattr(network.config, name, None), int)]
