"""How a network generates: greedy or sampled, with its own settings put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


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


@contextmanager
def sampling_generation(
    network: Any, new_tokens: int, barred: Sequence[int] = (), ends: Sequence[int] = ()
) -> Iterator[Any]:
    """A configuration to sample so many tokens with, at temperature 1 from the whole vocabulary.

    The ``barred`` token ids are never drawn; one of the ``ends`` ends a row, which is then filled with zeros.
    """
    import transformers

    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        suppress_tokens=list(barred) or None,
    )
    with _generating_by(network, config):
        yield config


@contextmanager
def _generating_by(network: Any, config: Any) -> Iterator[None]:
    """The network's own configuration, from which comes what a call leaves open, is this one within."""
    own, network.generation_config = network.generation_config, config
    try:
        yield
    finally:
        network.generation_config = own


def media_token_ids(network: Any) -> list[int]:
    """The ids that the model itself takes for places of images, which its processor need not know by this name."""
    names = [f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index")]
    return [value for name in names if isinstance(value := getattr(network.config, name, None), int)]
