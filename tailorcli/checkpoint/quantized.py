"""Quantised checkpoints: FP8 weights read as what they stand for, and a refusal of every other kind.

A quantised weight is a tensor of codes and, beside it, their scales: W = codes * scale. Neither means anything
without the other, so that a patch of the scales alone would give a model that nobody made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import PATCHABLE_DTYPES, TensorInfo
from tailorcli.errors import CheckpointError
from tailorcli.files import PathLike, read_json

if TYPE_CHECKING:
    from torch import Tensor


_SAID = "quantization_config"  # in config.json
_CODES = "F8_E4M3"
_SCALES = ("_scale_inv", "_scale")  # after the weight's own name: block by block, or a channel or tensor each
_SCALE_DTYPES = ("F32", "BF16", "F16")
_ANY_SCALE_DTYPES = (*PATCHABLE_DTYPES, "U8", "F8_E4M3", "F8_E8M0")  # those of MXFP4 and its kin are powers of two
# Floating-point tensors that say what the codes beside them stand for, in the formats of GPTQ, AWQ, bitsandbytes,
# HQQ, quanto, compressed-tensors and NVFP4.
_SCALE_NAME = re.compile(r"(^|[._])(q?scales?|scale_inv|scale_2|global_scale|absmax|quant_map|SCB|zeros?)$")
_CACHE_SCALE = re.compile(r"(^|\.)(k|v|q|kv|prob)_scale$")  # of what attention keeps, not of a weight
_CODE_NAME = re.compile(r"(^|\.)(qweight|W_q|weight|weight_packed|weight\._data|.*_proj|.*_blocks)$")
_WAY_OUT = (
    "patch the two models as they were before they were quantised, and quantise the result; or load both with "
    "transformers, call model.dequantize() where the method has it, and save them in bfloat16"
)


class DequantizedCheckpoint(Checkpoint):
    """A checkpoint whose FP8 weights read as codes * scale, the product in float32.

    ``form`` "fp8" is for a patched model in the base's own scheme: a weight is listed and read as F32, its scales stay
    in the list as the base's, and ``encode`` gives the codes to store. "bf16" is for one in bfloat16: a weight is
    listed and read as BF16, and no scales are listed.
    """

    dequantized = True

    def __init__(self, stored: Checkpoint, scales: dict[str, str], form: str = "fp8") -> None:
        self.stored = stored
        self.form = form
        self.scale_of = scales  # of each quantised weight
        self._given = _given_block(stored.path)
        dropped = _of_scales(stored, scales) if form == "bf16" else set()
        dtype, size = ("F32", 4) if form == "fp8" else ("BF16", 2)
        tensors = {
            name: replace(info, dtype=dtype, nbytes=info.numel * size) if name in scales else info
            for name, info in stored.tensors.items()
            if name not in dropped
        }
        super().__init__(stored.path, tensors, stored.shards)
        of_caches = {name for name in tensors if _CACHE_SCALE.search(name)}
        self._scales = frozenset((_of_scales(stored, scales) | of_caches) & tensors.keys())

    @property
    def output_tensors(self) -> dict[str, TensorInfo]:
        """The stored tensors for "fp8", the listed ones for "bf16"."""
        return self.stored.tensors if self.form == "fp8" else self.tensors

    @property
    def scales(self) -> frozenset[str]:
        """Names of the listed tensors that are scales: no weights, and never to be patched."""
        return self._scales

    def read_cost(self, name: str) -> int:
        """Bytes that ``read`` takes from the disk: of a quantised weight those of its codes and scales."""
        names = [name, self.scale_of[name]] if name in self.scale_of else [name]
        return sum(self.stored.tensors[part].nbytes for part in names)

    def read(self, name: str, pinned: bool = False) -> Tensor:
        """One tensor on the CPU, in memory of its own; a quantised weight as ``form`` says."""
        import torch

        if name not in self.scale_of:
            return self.stored.read(name, pinned)
        value = self._decode(name, self.stored.read(name))
        value = value if self.form == "fp8" else value.to(torch.bfloat16)
        return value.pin_memory() if pinned else value

    def rounded(self, name: str, value: Tensor, mask: Tensor) -> Tensor:
        """``value`` as it reads once ``encode``'s codes are stored."""
        if self.form != "fp8" or name not in self.scale_of:
            return value
        return self._decode(name, self.encode(name, value, mask)).to(value.device)

    def encode(self, name: str, value: Tensor, mask: Tensor) -> Tensor:
        """The codes to store for ``value`` (the weight's shape): rounded where ``mask`` holds, the base's elsewhere.

        The scales are the base's. What lies beyond their range becomes the largest code.
        """
        import torch

        if self.form != "fp8" or name not in self.scale_of:
            return value
        codes = self.stored.read(name)
        largest = torch.finfo(codes.dtype).max
        spread = self._spread(name, codes.shape)
        spread = spread.where(spread != 0, 1.0)  # of a block of zeros
        kept = (value.float().cpu() / spread).clamp_(-largest, largest).to(codes.dtype)
        raw, new = codes.view(torch.uint8), kept.view(torch.uint8)
        return torch.where(mask.cpu(), new, raw).view(codes.dtype)

    def decoded(self, name: str, stored: Tensor) -> Tensor:
        """The weight that codes of ``encode`` stand for."""
        return self._decode(name, stored) if self.form == "fp8" and name in self.scale_of else stored

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with bytes of the tensor as ``info`` lists it: stored, or worked out as a whole."""
        import torch

        stored = self.stored.tensors[info.name]
        if info.dtype == stored.dtype:
            self.stored.read_into(stored, buffer, start)
            return
        raw = self.read(info.name).view(-1).view(torch.uint8)
        buffer[:] = raw[start : start + len(buffer)].numpy().data

    def fingerprint(self) -> str:
        """That of the checkpoint as it is stored."""
        return self.stored.fingerprint()

    def close(self) -> None:
        """Close the files."""
        self.stored.close()
        super().close()

    def _decode(self, name: str, codes: Tensor) -> Tensor:
        """The weight (..., O, I): codes * scale in float32, on the CPU."""
        return codes.float().mul_(self._spread(name, codes.shape))

    def _spread(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The scale of every entry of a weight (..., O, I), float32, to broadcast against it."""
        scale = self.stored.read(self.scale_of[name]).float()
        if scale.numel() == 1:
            return scale.reshape(())
        rows, columns = _block(shape, tuple(scale.shape), self._given)
        if rows > 1:
            scale = scale.repeat_interleave(rows, dim=-2)[..., : shape[-2], :]
        if columns > 1:
            scale = scale.repeat_interleave(columns, dim=-1)[..., : shape[-1]]
        return scale


class UnroundedCheckpoint(Checkpoint):
    """``quantised`` as if it were stored in the dtypes that it lists: what is written of it is not rounded to codes."""

    dequantized = True  # transformers loads it from what it reads as

    def __init__(self, quantised: Checkpoint) -> None:
        super().__init__(quantised.path, quantised.tensors, quantised.shards)
        self.quantised = quantised

    @property
    def scales(self) -> frozenset[str]:
        """Those of the quantised checkpoint."""
        return self.quantised.scales

    def read_cost(self, name: str) -> int:
        """Bytes that ``read`` takes from the disk."""
        return self.quantised.read_cost(name)

    def read(self, name: str, pinned: bool = False) -> Tensor:
        """One tensor, as the quantised checkpoint reads it."""
        return self.quantised.read(name, pinned)

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with bytes of the tensor as ``info`` lists it."""
        self.quantised.read_into(info, buffer, start)

    def fingerprint(self) -> str:
        """That of the quantised checkpoint."""
        return self.quantised.fingerprint()


def _given_block(folder: Path) -> tuple[int, ...]:
    """Rows and columns that share a scale, as config.json gives them; () where it does not."""
    given = quantization_config(folder).get("weight_block_size")
    sound = isinstance(given, list) and len(given) == 2 and all(type(n) is int and n > 0 for n in given)
    return tuple(given) if sound and given is not None else ()


def _block(shape: tuple[int, ...], scale: tuple[int, ...], given: tuple[int, ...] = ()) -> tuple[int, int]:
    """Rows and columns that share a scale: ``given``, a power of two, or all of them. (0, 0) if none fits."""
    if len(scale) != len(shape) or len(shape) < 2 or scale[:-2] != shape[:-2]:
        return 0, 0
    sizes = []
    for axis, (entries, parts) in enumerate(zip(shape[-2:], scale[-2:], strict=True)):
        likely = (*given[axis : axis + 1], entries, *(1 << power for power in range(10)))
        sizes.append(next((size for size in likely if -(-entries // size) == parts), 0))
    rows, columns = sizes
    return (rows, columns) if rows and columns else (0, 0)


def open_checkpoint(path: PathLike, form: str = "fp8") -> Checkpoint:
    """The checkpoint in folder ``path``; FP8 weights read as what they stand for (see DequantizedCheckpoint).

    Raises CheckpointError for what ``Checkpoint.open`` refuses, and for weights quantised in another way.
    """
    stored = Checkpoint.open(path)
    try:
        return readable(stored, form)
    except BaseException:
        stored.close()
        raise


def readable(stored: Checkpoint, form: str = "fp8") -> Checkpoint:
    """``stored`` itself, or the view of it in which FP8 weights can be patched. Raises CheckpointError."""
    found = fp8_scales(stored)
    refuse_scales(stored, stored.tensors.keys() - found.keys() - _of_scales(stored, found))
    return DequantizedCheckpoint(stored, found, form) if found else stored


def refuse_scales(stored: Checkpoint, names: Collection[str]) -> None:
    """Raise CheckpointError where a tensor among ``names`` scales codes beside it."""
    for name, info in stored.tensors.items():
        if name not in names or info.dtype not in _ANY_SCALE_DTYPES or not _SCALE_NAME.search(name):
            continue
        codes = _codes_beside(stored, name)
        if codes is not None:
            raise CheckpointError(
                f"{stored.path} is quantised{_method(stored.path)}: tensor {name!r} ({info.dtype}) scales the "
                f"{stored.tensors[codes].dtype} codes in {codes!r}, and neither can be patched without the other",
                _WAY_OUT,
            )


def fp8_scales(stored: Checkpoint) -> dict[str, str]:
    """The scales' name for each FP8 weight whose scales lie beside it in a layout that is read."""
    found, given = {}, _given_block(stored.path)
    for name, info in stored.tensors.items():
        if info.dtype != _CODES:
            continue
        for suffix in _SCALES:
            scale = stored.tensors.get(name + suffix)
            if scale is None or scale.dtype not in _SCALE_DTYPES:
                continue
            if prod(scale.shape) == 1 or all(_block(info.shape, scale.shape, given)):
                found[name] = scale.name
                break
    return found


def _of_scales(stored: Checkpoint, scales: dict[str, str]) -> set[str]:
    """The scales, and those of activations beside the same weights."""
    places = {f"{name.rpartition('.')[0]}." for name in scales} | {f"{name}_" for name in scales}  # those of experts
    beside = {place + short for place in places for short in ("input_scale", "activation_scale", "output_scale")}
    return {*scales.values(), *(beside & stored.tensors.keys())}


def _codes_beside(stored: Checkpoint, scale: str) -> str | None:
    """A tensor of codes in the module of a scale, or the one that the scale's name continues."""
    module = scale.rpartition(".")[0]
    for name, info in stored.tensors.items():
        if info.dtype in PATCHABLE_DTYPES or info.dtype in ("BOOL", "C64") or not _CODE_NAME.search(name):
            continue
        in_module = name.rpartition(".")[0] == module and name != scale
        if in_module or scale.startswith((f"{name}.", f"{name}_")):
            return name
    return None


def _method(folder: Path) -> str:
    """The name of the method in config.json, in brackets, where it stands there."""
    found = quantization_config(folder).get("quant_method")
    return f" ({found[:40]})" if isinstance(found, str) else ""


def config_of_output(base: Checkpoint, tuned: Checkpoint, folder: Path) -> bytes | None:
    """``folder``'s config.json with what it must say of quantisation for an output with this ``base``.

    ``tuned`` may be quantised in another way than the base, or where the base is not. None where it fits as it is.
    """
    if not (base.dequantized or tuned.dequantized) or not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    in_codes = isinstance(base, DequantizedCheckpoint) and base.form == "fp8"
    wanted = quantization_config(base.path) if in_codes else {}
    if (config.pop(_SAID, None) or {}) == wanted:
        return None
    return (json.dumps(config | ({_SAID: wanted} if wanted else {}), indent=2) + "\n").encode()


def quantization_config(folder: Path) -> dict[str, Any]:
    """What config.json says of quantisation; empty where there is nothing."""
    if not (folder / "config.json").is_file():
        return {}
    found = read_json(folder / "config.json").get(_SAID)
    return found if isinstance(found, dict) else {}
