"""A model's weights part by part: each of its blocks, and the rest; one part at a time is in memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint
from tailorcli.adapters.config import MERGE_HINT
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.device import StageTimer, free_memory, resolve_device
from tailorcli.errors import CheckpointError
from tailorcli.models.empty import require_all
from tailorcli.models.names import aliases, expected_names, unwrapped
from tailorcli.models.places import Place, map_names
from tailorcli.models.skeleton import empty_model, fill_computed, load_weights
from tailorcli.options import LoadOptions
from tailorcli.system import give_back_memory

if TYPE_CHECKING:
    import torch


_READERS = 4  # threads that read one part: copies out of the system's cache go on side by side
_PLENTY = 8  # times the bytes of a block that must be free for the next to be read ahead


class Parts:
    """The weights of an empty ``network`` by the part that holds them: each of ``blocks``, and the rest, under "".

    ``stored`` is the checkpoint that they come from, ``tuned`` the same, or an adapter on it.
    """

    def __init__(
        self,
        network: Any,
        blocks: Sequence[str],
        stored: Checkpoint,
        tuned: Checkpoint,
        device: torch.device,
        timer: StageTimer,
    ) -> None:
        self._network = network
        self._blocks = blocks
        self._stored = stored
        self._tuned = tuned
        self._device = device
        self._timer = timer
        self._ahead: tuple[str, Future[dict[str, torch.Tensor]], threading.Thread] | None = None
        self.expected = expected_names(network, stored.tensors)
        self._tied = aliases(network)
        held = {name: self.part_of(name) for name in dict(network.named_parameters())}
        self._parameters = {part: [n for n, p in held.items() if p == part] for part in ("", *blocks)}
        self.tensors: dict[str, list[str]] = {part: [] for part in ("", *blocks)}  # of the checkpoint
        for tensor, parameter in self.expected.items():
            self.tensors[self.part_of(self._tied.get(parameter, parameter))].append(tensor)
        for name, buffer in network.named_buffers():
            owner = network.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = buffer.to(device)

    def part_of(self, parameter: str) -> str:
        """The block in which a parameter lies."""
        return next((block for block in self._blocks if parameter.startswith(f"{block}.")), "")

    def read_behind(self, block: str) -> None:
        """Begin to read what comes behind a block on a thread of its own, where memory is plenty, for ``load``."""
        following = self._blocks[self._blocks.index(block) + 1 :][:1]
        free = free_memory(resolve_device("cpu")) if following else 0
        nbytes = sum(self._stored.tensors[name].nbytes for part in following for name in self.tensors[part])
        if self._ahead is not None or not following or (free is not None and _PLENTY * nbytes > free):
            return
        found: Future[dict[str, torch.Tensor]] = Future()

        def read() -> None:
            try:
                found.set_result(self._read(following[0]))
            except BaseException as error:  # raised where it is waited for
                found.set_exception(error)

        thread = threading.Thread(target=read, name="weights", daemon=True)
        self._ahead = (following[0], found, thread)
        thread.start()

    def end_reading(self) -> None:
        """Give up what was read ahead, once its thread has ended."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[2].join()

    def _read(self, part: str) -> dict[str, torch.Tensor]:
        """The stored weights of a part, by the names that transformers knows."""
        names = [name for name in self.tensors[part] if name not in self._stored.scales]
        pinned = self._device.type == "cuda"  # from which a GPU copies at full speed
        with ThreadPoolExecutor(_READERS, "reading") as pool:
            values = pool.map(lambda name: self._stored.read(name, pinned), names)
            return {unwrapped(name): value for name, value in zip(names, values, strict=True)}

    def load(self, part: str) -> dict[str, Place]:
        """Read the part's weights, prove and give where each tensor went, and apply an adapter's changes."""
        network, stored = self._network, self._stored
        with self._timer.stage("load"):
            ahead = self._ahead
            if ahead is not None and ahead[0] == part:
                self._ahead = None
            weights = ahead[1].result() if ahead is not None and ahead[0] == part else self._read(part)
            load_weights(network, weights, self._device)
            del weights, ahead
            if part == "":
                network.tie_weights()
            every = dict(network.named_parameters())
            inside = {name: every[name] for name in self._parameters[part] if name in every}
            empty = [name for name, value in inside.items() if value.device.type == "meta"]
            fill_computed(network, empty, self._device)
            inside = {name: network.get_parameter(name) for name in inside}
            require_all(stored.path, [name for name, value in inside.items() if value.device.type == "meta"])
            expected = {name: self.expected[name] for name in self.tensors[part]}
            found = map_names(stored, inside, self._tied, expected)
            if isinstance(self._tuned, AdaptedCheckpoint):
                adapt(network, self._tuned, found)
        return found

    def drop(self, part: str) -> None:
        """Give up the memory of a part's weights."""
        import torch

        for name in self._parameters[part]:
            owner, _, short = name.rpartition(".")
            module = self._network.get_submodule(owner)
            empty = torch.nn.Parameter(module._parameters[short].to("meta"), requires_grad=False)
            module._parameters[short] = empty
        give_back_memory()


def load_from_view(
    checkpoint: Checkpoint, config: dict[str, Any], options: LoadOptions, folder: Path | None = None
) -> Any:
    """The model on the CPU, with every weight as ``checkpoint`` reads it rather than as its files hold it."""
    import torch

    network = empty_model(checkpoint, config, options, folder)
    Parts(network, (), checkpoint, checkpoint, torch.device("cpu"), StageTimer()).load("")
    return network


def adapt(network: Any, tuned: AdaptedCheckpoint, places: dict[str, Place]) -> None:
    """Overwrite each parameter that the adapter changes, in place and in the network's dtype.

    Raises CheckpointError for a tensor that the network holds fused, split or tied.
    """
    import torch

    users = Counter(parameter for place in places.values() for parameter in place.parameters)
    parameters = dict(network.named_parameters())
    for name in sorted(tuned.changed & places.keys()):
        place = places[name]
        if len(place.parameters) != 1 or parameters[place.parameters[0]].shape != tuned.tensors[name].shape:
            reason = place.reason or "transformers holds it fused or split"
            raise CheckpointError(f"the adapter {tuned.path} changes tensor {name!r}, but {reason}", MERGE_HINT)
        parameter = place.parameters[0]
        if users[parameter] > 1:
            other = next(n for n, p in places.items() if parameter in p.parameters and n != name)
            raise CheckpointError(
                f"the adapter {tuned.path} changes tensor {name!r}, which the network ties to {other!r}",
                f"set tie_word_embeddings to false in {tuned.base.path / 'config.json'}, where both are stored",
            )
        with torch.no_grad():
            parameters[parameter].copy_(tuned.read(name))
