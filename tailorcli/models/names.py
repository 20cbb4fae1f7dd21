"""The names of a network's parameters, and those under which a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(name: str) -> str:
    """A tensor's name without what torch's wrappers put into it: compiled, sharded and parallel modules."""
    words = name.removeprefix("module.").split(".")
    return ".".join(word for word in words if word not in _WRAPPERS)


def expected_names(network: Any, names: Iterable[str]) -> dict[str, str]:
    """The parameter in which each checkpoint tensor should be found, by transformers' conversion tables.

    A first guess: where this version of transformers has no such tables, the name itself.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return {name: unwrapped(name) for name in names}
    mapping = get_model_conversion_mapping(network)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    held = dict.fromkeys((*dict(network.named_parameters(remove_duplicate=False)), *network.state_dict()), True)
    found = {}
    for name in names:
        plain = name if name in held else unwrapped(name)
        renamed, _ = rename_source_key(plain, renamings, converters, network.base_model_prefix, held)
        if renamed not in held and plain in held:
            renamed = plain
        elif renamed not in held:
            bare, _ = rename_source_key(plain, [], [], network.base_model_prefix, held)
            renamed = bare if bare in held else renamed
        found[name] = renamed
    return found


def aliases(network: Any) -> dict[str, str]:
    """Further names of tied parameters, each with the name that ``named_parameters`` gives it first."""
    parameters = dict(network.named_parameters())
    first = {id(value): name for name, value in parameters.items()}
    every = dict(network.named_parameters(remove_duplicate=False))
    return {name: first[id(value)] for name, value in every.items() if name not in parameters}
