"""Which parameter of a loaded model is which tensor of its checkpoint: found by value, never by hope.

transformers renames tensors when it loads some checkpoints (a base model without its prefix, older layouts), so
equal names are only a first guess; a sample of the values decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint import PATCHABLE_DTYPES, Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

_SAMPLE = 1024  # entries compared at the start, the middle and the end


def map_names(checkpoint: Checkpoint, model: Any) -> dict[str, tuple[str, str]]:
    """For every checkpoint tensor: (its parameter's name in ``model``, "") or ("", the reason why there is none).

    A candidate has the same shape and the same sampled values (after the cast to the model's dtype). Of several,
    the one of the same name wins, then the one that shares the longest ending with it; each is given out once.
    """
    parameters = dict(model.named_parameters())
    samples = {name: _sample_parameter(value) for name, value in parameters.items()}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, value in parameters.items():
        by_shape.setdefault(tuple(value.shape), []).append(name)
    tied = {name: name for name in parameters} | _aliases(model, parameters)
    mapping: dict[str, tuple[str, str]] = {}
    taken: set[str] = set()
    # Exact names first, so that equal values (norms of ones, biases of zeros) cannot take each other's place.
    for name in sorted(checkpoint.tensors, key=lambda n: n not in tied):
        info = checkpoint.tensors[name]
        if info.dtype not in PATCHABLE_DTYPES or info.numel == 0:
            mapping[name] = ("", f"{info.dtype} is no floating-point dtype that can be patched")
            continue
        mapping[name] = _find(checkpoint, info, tied, samples, by_shape.get(info.shape, []), taken)
        taken.add(mapping[name][0])
    return mapping


def _find(
    checkpoint: Checkpoint,
    info: TensorInfo,
    tied: dict[str, str],
    samples: dict[str, torch.Tensor],
    same_shape: list[str],
    taken: set[str],
) -> tuple[str, str]:
    exact = tied.get(info.name)
    if exact is not None and exact in same_shape and _equal(checkpoint, info, samples[exact]):
        return exact, ""
    free = [name for name in same_shape if name not in taken and _equal(checkpoint, info, samples[name])]
    if free:
        return max(free, key=lambda name: _common_ending(name, info.name)), ""
    return "", "the loaded model holds it under another shape or with other values, or not at all"


def _aliases(model: Any, parameters: dict[str, torch.Tensor]) -> dict[str, str]:
    """Further names of tied parameters, each with the name that ``named_parameters`` gives it first."""
    first = {id(value): name for name, value in parameters.items()}
    every = dict(model.named_parameters(remove_duplicate=False))
    return {name: first[id(value)] for name, value in every.items() if name not in parameters}


def _common_ending(a: str, b: str) -> int:
    equal = [x == y for x, y in zip(reversed(a), reversed(b), strict=False)]
    return equal.index(False) if False in equal else len(equal)


def _positions(numel: int) -> list[tuple[int, int]]:
    """(start, length) of the parts that are compared."""
    length = min(_SAMPLE, numel)
    return [(start, length) for start in sorted({0, (numel - length) // 2, numel - length})]


def _sample_parameter(value: torch.Tensor) -> torch.Tensor:
    import torch

    flat = value.detach().reshape(-1)
    return torch.cat([flat[start : start + length] for start, length in _positions(flat.numel())]).cpu()


def _equal(checkpoint: Checkpoint, info: TensorInfo, sample: torch.Tensor) -> bool:
    """Whether the checkpoint's tensor has these values where it is sampled, in the sample's dtype."""
    import torch

    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}[info.dtype]
    parts = []
    for start, length in _positions(info.numel):
        raw = torch.empty(length * dtype.itemsize, dtype=torch.uint8)
        checkpoint.read_into(info, raw.numpy().data, start * dtype.itemsize)
        parts.append(raw.view(dtype))
    found = torch.cat(parts).to(sample.dtype)
    return torch.equal(found, sample) or bool(torch.equal(found.nan_to_num(), sample.nan_to_num()))
