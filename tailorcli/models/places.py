"""Which parameter of a loaded model is which tensor of its checkpoint: found by value, never by hope.

transformers renames tensors when it loads some checkpoints, stacks experts, joins gate and up, splits what other
checkpoints fuse. Its own tables of such conversions give a first guess (``expected``); the values decide.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, TensorInfo, torch_dtype

if TYPE_CHECKING:
    import torch

_SAMPLE = 1024  # entries compared at the start, the middle and the end
_KEY = 16  # entries by which slices of parameters are looked up
_ABSENT = "the loaded model holds it under another shape or with other values, or not at all"


@dataclass(frozen=True)
class Place:
    """Where a checkpoint tensor went in the model, or the ``reason`` why that is not known.

    Most are one parameter as it is. A tensor can also be rows of a larger one (gate or up of a joined pair), lie in
    slice ``part`` of one of three dimensions (an expert), be ``transposed`` in it, or have been split over several.
    ``start`` entries of the parameter lie before it.
    """

    parameters: tuple[str, ...] = ()
    part: int | None = None
    transposed: bool = False
    reason: str = ""
    start: int = 0


class Parameters:
    """A model's parameters as candidates, by shape and by their first values."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self.by_name = parameters
        self.by_numel: dict[int, list[str]] = {}
        self._samples: dict[str, torch.Tensor] = {}
        self.given: set[tuple[str, int, int]] = set()  # slices that have a tensor: parameter, number, entries
        self._slices: dict[tuple[int, ...], dict[bytes, list[tuple[str, int]]]] = {}
        for name, value in parameters.items():
            self.by_numel.setdefault(value.numel(), []).append(name)

    def sample(self, name: str) -> torch.Tensor:
        """Values of a parameter at the places that are compared."""
        if name not in self._samples:
            self._samples[name] = _sample(self.by_name[name].detach().reshape(-1))
        return self._samples[name]

    def slices(self, shape: tuple[int, int], transposed: bool) -> dict[bytes, list[tuple[str, int]]]:
        """(parameter, number) of every slice of this matrix shape in a larger parameter, by its first values.

        Number counts slices of so many entries from the parameter's start.
        """
        key = (*shape, int(transposed))
        if key not in self._slices:
            found: dict[bytes, list[tuple[str, int]]] = {}
            held = shape[::-1] if transposed else shape
            for name, value in self.by_name.items():
                if value.dim() in (2, 3) and value.shape[-1] == held[1] and value.numel() > shape[0] * shape[1]:
                    whole = value.shape[-2] == held[0]
                    if value.shape[-2] % held[0] == 0 and (whole or not transposed):
                        stacked = value.detach().reshape(-1, *held)
                        first = stacked[:, :_KEY, 0] if transposed else stacked.flatten(1)[:, :_KEY]
                        for number, values in enumerate(first.cpu()):
                            found.setdefault(_key(values), []).append((name, number))
            self._slices[key] = found
        return self._slices[key]


def guessed_places(expected: dict[str, str]) -> dict[str, Place]:
    """The places that transformers' tables give, before any weight is loaded."""
    return {tensor: Place((parameter,)) for tensor, parameter in expected.items()}


def map_names(
    checkpoint: Checkpoint,
    parameters: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str],
    expected: Mapping[str, str],
) -> dict[str, Place]:
    """The place of each checkpoint tensor that ``expected`` names, among a model's ``parameters``.

    ``expected`` gives the parameter in which a tensor should be found, by transformers' tables; ``aliases`` the
    further names of tied parameters. A candidate has the same sampled values after the cast to the model's dtype. Of
    several, the expected one wins, or a slice of it, then the one that shares the longest ending with it. Each
    parameter and each slice is given out once, in the order of the numbers in the names: so experts with equal values
    get the slices in which they are stacked.
    """
    candidates = Parameters(parameters)
    tied = {name: name for name in parameters} | dict(aliases)
    places: dict[str, Place] = {}
    taken: set[str] = set()
    # Expected names first, so that equal values (norms of ones, biases of zeros) cannot take each other's place.
    for name in sorted(expected, key=lambda n: (expected[n] not in tied, _in_order(n))):
        info = checkpoint.tensors[name]
        if info.dtype not in PATCHABLE_DTYPES or info.numel == 0:
            places[name] = Place(reason=f"{info.dtype} is no floating-point dtype that can be patched")
            continue
        guess = tied.get(expected[name], expected[name])
        places[name] = _find(checkpoint, info, guess, candidates, taken)
        if places[name].part is None and len(places[name].parameters) == 1:
            taken.add(places[name].parameters[0])
    return places


def _in_order(name: str) -> tuple[tuple[str, int], ...]:
    """A key that puts experts.2 before experts.10."""
    return tuple((text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d{0,18})", name))


def _find(checkpoint: Checkpoint, info: TensorInfo, guess: str, candidates: Parameters, taken: set[str]) -> Place:
    alike = [name for name in candidates.by_numel.get(info.numel, ()) if _fits(info, candidates.by_name[name])]
    if guess in alike and _equal(checkpoint, info, candidates.sample(guess)):
        return Place((guess,))
    if len(info.shape) == 2 and guess in candidates.by_name:
        found = _find_slice(checkpoint, info, guess, candidates, {guess})
        if found is not None:
            return found
    free = [n for n in alike if n not in taken and _equal(checkpoint, info, candidates.sample(n))]
    if free:
        return Place((max(free, key=lambda name: _common_ending(name, guess)),))
    found = _find_slice(checkpoint, info, guess, candidates) if len(info.shape) == 2 else None
    if found is None and len(info.shape) in (1, 2):
        found = _find_pieces(checkpoint, info, guess, candidates)
    return found or Place(reason=_ABSENT)


def _fits(info: TensorInfo, parameter: torch.Tensor) -> bool:
    """Whether both have one shape, or one number of rows and the rest flattened, as a convolution's weight may be."""
    shape = tuple(parameter.shape)
    return shape == info.shape or (
        len(shape) > 1 and shape[:1] == info.shape[:1] and 2 in (len(shape), len(info.shape))
    )


def _find_slice(
    checkpoint: Checkpoint, info: TensorInfo, guess: str, candidates: Parameters, among: Collection[str] = ()
) -> Place | None:
    """A matrix inside a larger parameter (one of those ``among``, if given): as rows of it, or of one stacked in it.

    Of several with its values, the first that was not given out before.
    """
    given: Place | None = None
    size = info.shape[0] * info.shape[1]
    for transposed in (False, True):
        for dtype in {value.dtype for value in candidates.by_name.values()}:
            first = _read(checkpoint, info, [(0, min(_KEY, info.numel))], dtype)
            hits = candidates.slices((info.shape[0], info.shape[1]), transposed).get(_key(first), [])
            new = {hit: (*hit, size) not in candidates.given for hit in hits}
            for name, number in sorted(hits, key=lambda hit: (not new[hit], -_common_ending(hit[0], guess))):
                value = candidates.by_name[name]
                if value.dtype != dtype or (among and name not in among):
                    continue
                start = number * size
                flat = value.detach().reshape(-1)[start : start + size]
                held = flat.view(info.shape[::-1]).T.reshape(-1) if transposed else flat
                if _equal(checkpoint, info, _sample(held)):
                    matrix = value.shape[-1] * value.shape[-2]
                    part = start // matrix if value.dim() == 3 else None
                    place = Place((name,), part, transposed, start=start)
                    if new[name, number]:
                        candidates.given.add((name, number, size))
                        return place
                    given = given or place
    return given


def _find_pieces(checkpoint: Checkpoint, info: TensorInfo, guess: str, candidates: Parameters) -> Place | None:
    """A matrix whose rows, or a bias whose entries, were split over several parameters, one after the other.

    Of several with such values, as biases of zeros have, those nearest to ``guess`` in the model.
    """
    rows, columns = info.shape[0], info.numel // info.shape[0]
    near = sorted(candidates.by_name.items(), key=lambda item: -_common_ending(item[0][::-1], guess[::-1]))
    pieces: list[str] = []
    start = 0
    while start < rows:
        found = None
        for name, value in near:
            fits = value.dim() == len(info.shape) and value.numel() == value.shape[0] * columns
            fits = fits and value.shape[0] <= rows - start
            if not fits or name in pieces:
                continue
            offset = start * columns
            spots = [(offset + begin, length) for begin, length in _positions(value.numel())]
            if _same(_read(checkpoint, info, spots, value.dtype), candidates.sample(name)):
                found = name
                break
        if found is None:
            return None
        pieces.append(found)
        start += candidates.by_name[found].shape[0]
    return Place(tuple(pieces))


def _common_ending(a: str, b: str) -> int:
    equal = [x == y for x, y in zip(reversed(a), reversed(b), strict=False)]
    return equal.index(False) if False in equal else len(equal)


def _positions(numel: int) -> list[tuple[int, int]]:
    """(start, length) of the parts that are compared."""
    length = min(_SAMPLE, numel)
    return [(start, length) for start in sorted({0, (numel - length) // 2, numel - length})]


def _sample(flat: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([flat[start : start + length] for start, length in _positions(flat.numel())]).cpu()


def _key(values: torch.Tensor) -> bytes:
    import torch

    return values.contiguous().view(torch.uint8).numpy().tobytes()


def _read(
    checkpoint: Checkpoint, info: TensorInfo, spots: list[tuple[int, int]], as_dtype: torch.dtype
) -> torch.Tensor:
    """The checkpoint tensor's values at (start, length) places, cast to a dtype."""
    import torch

    dtype = torch_dtype(info.dtype)
    assert dtype is not None  # one of PATCHABLE_DTYPES
    parts = []
    for start, length in spots:
        raw = torch.empty(length * dtype.itemsize, dtype=torch.uint8)
        checkpoint.read_into(info, raw.numpy().data, start * dtype.itemsize)
        parts.append(raw.view(dtype))
    return torch.cat(parts).to(as_dtype)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return torch.equal(a, b) or bool(torch.equal(a.nan_to_num(), b.nan_to_num()))


def _equal(checkpoint: Checkpoint, info: TensorInfo, sample: torch.Tensor) -> bool:
    """Whether the checkpoint's tensor has these values where it is sampled, in the sample's dtype."""
    return _same(_read(checkpoint, info, _positions(info.numel), sample.dtype), sample)
