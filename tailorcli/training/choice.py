"""Which parameters a fine-tune trains: not the embeddings and the towers of pictures and sound, unless it is asked to.

So it is in the papers of SPIDER and Model-Dowser, which train the connector and blocks of the language model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from tailorcli.errors import OptionsError
from tailorcli.models.names import unwrapped
from tailorcli.models.running import output_head

_SENSE = "vision|visual|image|video|audio|speech"
_TOWER = re.compile(
    rf"(^|[._])({_SENSE}|vq)(_?(tower|model|encoder|backbone|transformer))?(\.|$)"
    r"|(^|\.)(img_processor|(acoustic|semantic)_tokenizer_encoder)\."
)
_CONNECTOR = re.compile(r"merger|project|connector|adapter|resampler|aligner")
_COPIES = ("modules_to_save", "token_adapter.trainable_tokens_delta", "trainable_tokens_delta", "ln_tuning_layers")
_SEEN = re.compile(rf"^(?!text|decoder|language|thinker|talker|qformer).*({_SENSE}|encoder|vq|tokenizer).*_config$")


def named_parameters(network: Any) -> dict[str, nn.Parameter]:
    """A network's parameters by the names that they have without the wrappers of torch and accelerate."""
    return {unwrapped(name): parameter for name, parameter in network.named_parameters()}


def choose(network: Any, trainable: Sequence[str] = (), last_layers: int | None = None) -> list[str]:
    """The names of the parameters to train.

    ``trainable`` are globs: what matches one of them, embeddings and towers included; without them all but these, and
    of these what PEFT has copied to train it.
    ``last_layers`` takes of that what lies in so many of the language model's last blocks. Raises OptionsError where
    a glob matches nothing, there are fewer blocks, or nothing is left.
    """
    parameters = {name: value for name, value in named_parameters(network).items() if value.is_floating_point()}
    if trainable:
        for glob in trainable:
            if not any(fnmatchcase(name, glob) for name in parameters):
                raise OptionsError(f"--trainable {glob} matches no parameter", f"a name is {next(iter(parameters))}")
        chosen = [name for name in parameters if any(fnmatchcase(name, glob) for glob in trainable)]
    else:
        frozen, towers, named = _tables(network) | _senses(network), _towers(network), beside_own(network, copies=True)
        left = [name for name, value in parameters.items() if id(value) not in frozen and not in_tower(name, towers)]
        chosen = [name for name in parameters if name in named.union(left)]
    if last_layers is not None:
        inside = _last_blocks(network, last_layers)
        chosen = [name for name in chosen if name.startswith(inside)]
    if not chosen:
        raise OptionsError("no parameter is left to train", "see --trainable and --last-layers")
    return chosen


def beside_own(network: Any, *, copies: bool) -> set[str]:
    """The parameters that PEFT has put beside a model's own: ``copies`` of these to train, else what adapters add."""
    parts = tuple(
        f"{unwrapped(f'{name}.{part}')}."
        for name, module in network.named_modules()
        for part in getattr(module, "adapter_layer_names", ())
        if (part in _COPIES) == copies
    )
    return {name for name in named_parameters(network) if name.startswith(parts)}


def in_tower(name: str, towers: Sequence[str] = ()) -> bool:
    """Whether a parameter lies in a tower for pictures or sound, and not in what connects it to the text.

    ``towers`` are those of a network that their names do not tell. A connector is a part of the tower itself; what a
    layer in it calls a projection is none.
    """
    inside = [name[len(tower) + 1 :] for tower in towers if name.startswith(f"{tower}.")]
    if (found := _TOWER.search(name)) is not None:
        inside.append(name[found.end() :])
    return any(_CONNECTOR.search(rest.partition(".")[0]) is None for rest in inside)


def _towers(network: Any) -> list[str]:
    """Modules made from a config for pictures or sound, by their names: towers that are not called so."""
    if getattr(network.config, "is_encoder_decoder", False):
        return []
    text = type(network.config.get_text_config())
    parts = {name: value for name, value in vars(network.config).items() if _SEEN.match(name)}
    kinds = {type(value) for value in parts.values() if isinstance(value, PreTrainedConfig)} - {text}
    found: list[str] = []
    for name, module in network.named_modules():
        own = type(getattr(module, "config", None)) in kinds and name and not _CONNECTOR.search(name)
        if own and not any(name.startswith(f"{tower}.") for tower in found):
            found.append(unwrapped(name))
    return found


def _tables(network: Any) -> set[int]:
    """The parameters of all embeddings, of the tables of positions, and of the output layer, tied to one or not."""
    modules = [module for module in network.modules() if isinstance(module, nn.Embedding)]
    head = output_head(network)
    return {id(value) for module in [*modules, *([] if head is None else [head])] for value in module.parameters()}


def _senses(network: Any) -> set[int]:
    """The parameters of an encoder-decoder's encoder where it hears or sees, and does not read."""
    if not getattr(network.config, "is_encoder_decoder", False):
        return set()
    encoder = network.get_encoder()
    if getattr(encoder, "main_input_name", "input_ids") == "input_ids":
        return set()
    return {id(value) for value in encoder.parameters()}


def _last_blocks(network: Any, count: int) -> tuple[str, ...]:
    """What the names of all parameters in the last ``count`` blocks of the language model begin with."""
    name, blocks = _blocks_of_text(network)
    if not blocks:
        raise OptionsError(f"{type(network).__name__} has no list of blocks to count", "choose with --trainable")
    if not 1 <= count <= len(blocks):
        raise OptionsError(f"--last-layers must lie between 1 and {len(blocks)}, the blocks of {name}, got {count}")
    return tuple(f"{name}.{number}." for number in range(len(blocks) - count, len(blocks)))


def _blocks_of_text(network: Any) -> tuple[str, nn.ModuleList | list[nn.Module]]:
    """The language model's list of blocks, of an encoder-decoder the decoder's: the longest that lies in no other."""
    decoder = network.get_decoder() if hasattr(network, "get_decoder") else None
    towers = _towers(network)
    lists = {
        unwrapped(name): module
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and all(any(True for _ in child.parameters()) for child in module)
    }
    outer = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists) and not in_tower(f"{name}.", towers)
    }
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    chosen = {name: module for name, module in outer.items() if id(module) in inside} or outer
    if getattr(network.config, "is_encoder_decoder", False):
        chosen = {name: module for name, module in chosen.items() if "encoder" not in name.split(".")} or chosen
    name = max(chosen, key=lambda name: len(chosen[name]), default="")
    return name, chosen.get(name, [])


def trained_numel(network: Any, names: Sequence[str]) -> int:
    """Entries of these parameters."""
    parameters = named_parameters(network)
    return sum(parameters[name].numel() for name in names)


def freeze_others(network: Any, names: Sequence[str]) -> list[str]:
    """Train these parameters alone; those of them that are frozen already stay so. The names that are left.

    Raises OptionsError where that is none.
    """
    parameters = named_parameters(network)
    wanted = set(names)
    for name, parameter in parameters.items():
        if name not in wanted:
            parameter.requires_grad_(False)
    left = [name for name in names if parameters[name].requires_grad]
    if not left:
        raise OptionsError("every parameter to train is frozen already", "set requires_grad where it shall train")
    return left


def sample_digest(parameter: torch.Tensor) -> str:
    """A hash of the shape and of some values in bfloat16: the same for a model loaded in another dtype."""
    import hashlib

    flat = parameter.detach().reshape(-1)
    length = min(256, flat.numel())
    starts = sorted({0, (flat.numel() - length) // 2, flat.numel() - length})
    values = torch.cat([flat[start : start + length] for start in starts]).to("cpu", torch.bfloat16)
    digest = hashlib.blake2b(str(tuple(parameter.shape)).encode(), digest_size=16)
    digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
