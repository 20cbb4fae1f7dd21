"""Two checkpoints of one model under different names: matched by the names that transformers loads their tensors to.

A fine-tune may be saved by another version of transformers, in the loaded model's names, or by a trainer that left
its wrapper's prefix; a base may hold more than the model needs (rotary frequencies, attention masks, further heads).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, open_tuned
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.renamed import RenamedCheckpoint
from tailorcli.errors import TailorError
from tailorcli.files import PathLike
from tailorcli.models.config import read_config
from tailorcli.models.empty import empty_on_meta
from tailorcli.models.names import aliases, expected_names, unwrapped
from tailorcli.options import CalibrateOptions

Key = tuple[str, ...]  # the parameter that a tensor becomes, and which part of it where several become one


def open_for(base: Checkpoint, path: PathLike, form: str = "fp8") -> Checkpoint:
    """The tuned model in ``path``, a checkpoint or an adapter on ``base``, under the names of ``base``.

    ``base`` must stay open meanwhile. Where the names of a full checkpoint cannot be matched they stay as they are.
    Raises CheckpointError for what cannot be opened.
    """
    return aligned(base, open_tuned(path, base, form, loaded_names))


def loaded_names(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """The parameter that each name stands for in the model of this folder; the name itself where there is none."""
    network = _network(checkpoint)
    return {name: name for name in names} if network is None else expected_names(network, names)


def aligned(base: Checkpoint, tuned: Checkpoint) -> Checkpoint:
    """``tuned`` under the base's names, without what transformers ignores; as it is where they cannot be matched."""
    if isinstance(tuned, AdaptedCheckpoint) or base.tensors.keys() == tuned.tensors.keys():
        return tuned
    wrapped = {unwrapped(name): name for name in tuned.tensors}
    plain = {name: wrapped.get(unwrapped(name), "") for name in base.tensors}
    if all(plain.values()) and len({*plain.values()}) == len(tuned.tensors):
        return RenamedCheckpoint(tuned, plain, frozenset())
    network = _network(tuned)
    match = None if network is None else _match(base, tuned, network)
    if match is None:
        return tuned
    return RenamedCheckpoint(tuned, match, frozenset(base.tensors.keys() - match.keys()))


def _network(checkpoint: Checkpoint) -> Any:
    """The folder's model without weights; None where transformers cannot build it."""
    try:
        return empty_on_meta(checkpoint, read_config(checkpoint.path), CalibrateOptions())
    except TailorError:  # whoever loads the model says why
        return None


def _match(base: Checkpoint, tuned: Checkpoint, network: Any) -> dict[str, str] | None:
    """Names of the base's tensors with those of tuned's.

    None where tuned lacks a tensor that the model needs, or holds one besides that transformers does not expect.
    """
    held = {*dict(network.named_parameters(remove_duplicate=False)), *network.state_dict()}
    tied = aliases(network)

    def first(key: Key) -> Key:  # of tied parameters the one that holds the values
        return (tied.get(key[0], key[0]), *key[1:])

    ours = _keys(base.tensors, network)
    theirs = _keys((name for name in tuned.tensors if name not in tuned.scales), network)
    exactly = {key: name for name, key in theirs.items()}
    by_tie: dict[Key, list[str]] = {}
    for name, key in theirs.items():
        by_tie.setdefault(first(key), []).append(name)
    names: dict[str, str] = {}
    missing = set()
    for name, key in ours.items():
        other = exactly.get(key) or next(iter(by_tie.get(first(key), ())), None)
        if other is not None:
            names[name] = other
        elif key[0] in held:
            missing.add(key[0])
    used = {*names.values()}
    surplus = set()
    for name in theirs.keys() - used:
        twins = [other for other in by_tie[first(theirs[name])] if other in used]
        if theirs[name][0] not in held or not any(tuned.are_equal(name, other) for other in twins):
            surplus.add(theirs[name][0])
    return names if names and not _told(network, missing, surplus) else None


def _told(network: Any, missing: set[str], surplus: set[str]) -> bool:
    """Whether transformers would say of a checkpoint that it lacks these parameters, or holds these names besides."""
    keys = SimpleNamespace(missing_keys=missing, unexpected_keys=surplus)
    network._adjust_missing_and_unexpected_keys(keys)
    return bool(keys.missing_keys or keys.unexpected_keys)


def _keys(names: Iterable[str], network: Any) -> dict[str, Key]:
    """What each tensor becomes; where several become one parameter, the words in its name that tell them apart."""
    expected = expected_names(network, names)
    users = Counter(expected.values())
    return {
        name: (parameter, *_left(unwrapped(name), parameter)) if users[parameter] > 1 else (parameter,)
        for name, parameter in expected.items()
    }


def _left(name: str, parameter: str) -> list[str]:
    """The words of a name that are not in the parameter's: experts.3.w1 of experts.gate_up_proj leaves 3, w1."""
    known = Counter(parameter.split("."))
    left = []
    for word in name.split("."):
        if known[word] > 0:
            known[word] -= 1
        else:
            left.append(word)
    return left


def tied_copies(base: Checkpoint, tuned: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Tensors that the model holds as one, stored more than once and equal in both: each with its further names.

    Older versions saved an output layer that is tied to the embedding as a copy of it. A copy that differs in either
    is none: transformers unties it.
    """
    common = [info for name, info in base.tensors.items() if name in tuned.tensors and len(info.shape) > 1]
    seen: dict[tuple[str, tuple[int, ...], bytes], list[str]] = {}
    for info in common:
        if info.numel:
            seen.setdefault((info.dtype, info.shape, base.sample_bytes(info)), []).append(info.name)
    alike = [names for names in seen.values() if len(names) > 1]
    samples = [{tuned.sample_bytes(tuned.tensors[name]) for name in names} for names in alike]
    if all(len(found) == len(names) for names, found in zip(alike, samples, strict=True)):
        return {}
    network = _network(tuned.base if isinstance(tuned, AdaptedCheckpoint) else tuned)
    if network is None:
        return {}
    tied, expected = aliases(network), expected_names(network, tuned.tensors)
    groups: dict[str, list[str]] = {}
    for name in base.tensors:
        if name in expected:
            parameter = tied.get(expected[name], expected[name])
            groups.setdefault(parameter, []).append(name)
    found: dict[str, tuple[str, ...]] = {}
    for parameter, names in groups.items():
        if parameter not in tied.values() or len(names) == 1:
            continue
        names.sort(key=lambda name: expected[name] != parameter)  # the embedding before what is tied to it
        copies = [n for n in names[1:] if all(source.are_equal(n, names[0]) for source in (base, tuned))]
        if copies:
            found[names[0]] = tuple(copies)
    return found
