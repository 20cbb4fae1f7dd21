"""Parameters that no layer holds: what they are is told by the operations that they enter while the model runs.

Fused experts, routers, class tokens, query tokens, layer scales: a model holds them as bare parameters and uses
them in its own forward; so it may do with the weights of depthwise convolutions. A watch on torch's functions sees each
use, with the other operand: the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tailorcli.core.unfold import unfold

_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)
_DIFFERENCES = (torch.sub, torch.rsub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__)
_CASTS = (Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.bfloat16, Tensor.half)
_FUNCTIONS = (
    *(torch.exp, Tensor.exp, torch.neg, Tensor.neg, Tensor.__neg__, torch.nn.functional.softplus),
    *(torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh),
)
_FOLLOWED = 16  # values of functions of parameters that are held, as a use follows them at once
_FOLLOWED_ENTRIES = 1 << 24  # of each at most
_CONVOLUTIONS = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
_REPEATS = (Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.cat)


@dataclass(frozen=True)
class Use:
    """One use of a bare parameter: as a ``linear`` layer, a table (``embedding``), a ``norm`` (scale) or a ``bias``.

    ``part`` is the slice of a parameter of three dimensions, one expert's; ``transposed`` says that it is held
    as (I, O). ``inputs`` (..., I) are what it multiplies, or the rows (...) that are looked up; None for a constant.
    A scale has as many inputs as entries: each multiplies one. Where a model scales by a function of a parameter, as
    Mamba does by -exp(A_log), its slope belongs to the inputs: a change of the parameter moves the product by both.
    """

    parameter: str
    role: str
    part: int | None = None
    transposed: bool = False
    inputs: Tensor | None = None


@dataclass(frozen=True)
class _Function:
    """The value of a function of a parameter, entry by entry, and its slope there; none for a cast."""

    parameter: str
    value: Tensor  # held, or its memory could be another's
    slope: Tensor | None  # (entries,)


class ProductWatch(TorchFunctionMode):
    """Calls ``report`` for every recognised use of one of ``parameters`` while it is active."""

    def __init__(self, parameters: Mapping[str, Tensor], tables: Container[str], report: Callable[[Use], None]) -> None:
        super().__init__()
        self._tables = tables  # parameters of embeddings
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        self._functions: dict[int, _Function] = {}  # by their memory
        for name, parameter in parameters.items():
            self._by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))
        self._report = report
        self._handlers: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], None]] = {
            torch.nn.functional.linear: self._linear,
            torch.nn.functional.embedding: self._table,
            Tensor.__getitem__: self._rows,
            torch.bmm: self._batched,
            Tensor.bmm: self._batched,
            **dict.fromkeys(_MATMULS, self._matmul),
            **dict.fromkeys(_PRODUCTS, self._scale),
            **dict.fromkeys((*_SUMS, *_DIFFERENCES), self._constant),
            **dict.fromkeys(_CONVOLUTIONS, self._convolution),
            **dict.fromkeys(_REPEATS, self._constant),
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the operation's operands, then run it as it is."""
        handler = self._handlers.get(func)
        if handler is not None:
            handler(args, kwargs or {})
        found = func(*args, **(kwargs or {}))
        if func in _CASTS or func in _FUNCTIONS:
            self._follow(func, args, kwargs or {}, found)
        return found

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        """Remember the value of a function of a parameter, entry by entry, and its slope; of a cast the value alone."""
        source = self._source(args[0]) if args else None
        if source is None or not isinstance(value, Tensor) or value.numel() > _FOLLOWED_ENTRIES:
            return
        name, whole, slope = source
        if value.numel() != whole.numel() or not _is_all_of(args[0], whole) or _memory(value) == _memory(whole):
            return
        if func not in _CASTS:
            with torch.enable_grad():
                leaf = args[0].detach().to(torch.float32, copy=True).requires_grad_()
                steps = torch.autograd.grad(func(leaf, *args[1:], **kwargs).sum(), leaf)[0].flatten()
            slope = steps if slope is None else steps * slope
        self._functions[_memory(value)] = _Function(name, value.view(whole.shape), slope)
        if len(self._functions) > _FOLLOWED:
            del self._functions[next(iter(self._functions))]

    def _report_use(self, use: Use) -> None:
        """Report a use; a parameter of an embedding counts as an embedding only, even if it is the output layer too."""
        if use.role == "embedding" or use.parameter not in self._tables:
            self._report(use)

    def _held(self, value: Any) -> tuple[str, Tensor] | None:
        """The watched parameter in whose memory a tensor lies, or in that of its copy in another dtype."""
        source = self._source(value)
        return None if source is None or source[2] is not None else source[:2]

    def _source(self, value: Any) -> tuple[str, Tensor, Tensor | None] | None:
        """(parameter, its values or a function's, the function's slope) in whose memory a tensor lies."""
        if not isinstance(value, Tensor) or value.device.type == "meta":
            return None
        try:
            place = _memory(value)
        except RuntimeError:  # within torch.vmap, in which masks are made, tensors have no memory of their own
            return None
        for name, whole in self._by_storage.get(place, ()):
            if 0 <= value.storage_offset() - whole.storage_offset() < whole.numel():
                return name, whole, None
        function = self._functions.get(place)
        return None if function is None else (function.parameter, function.value, function.slope)

    def _matrix(self, value: Any) -> tuple[str, int | None, bool] | None:
        """(parameter, part, whether transposed) of a matrix that is a parameter or one of its slices, whole."""
        found = self._held(value)
        if found is None or value.dim() != 2:
            return None
        name, whole = found
        if whole.dim() not in (2, 3):
            return None
        rows, columns = whole.shape[-2:]
        strides = whole.stride()[-2:]
        transposed = value.shape == (columns, rows) and value.stride() == strides[::-1]
        if not transposed and (value.shape != (rows, columns) or value.stride() != strides):
            return None
        part = value.storage_offset() - whole.storage_offset()
        return name, (part // whole.stride(0) if whole.dim() == 3 else None), transposed

    def _linear(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """X W^T + b."""
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        inputs, weight, bias = given["input"], given["weight"], given.get("bias")
        found = self._matrix(weight)
        if found is not None:
            name, part, transposed = found
            self._report_use(Use(name, "linear", part, transposed, inputs))
        if (held := self._held(bias)) is not None:
            self._report_use(Use(held[0], "bias"))

    def _matmul(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """X W with W (I, O), or x W^T with a transposed W."""
        if len(args) == 2 and (found := self._matrix(args[1])) is not None:
            name, part, transposed = found
            self._report_use(Use(name, "linear", part, not transposed, args[0]))
        elif len(args) == 2 and isinstance(args[1], Tensor) and args[1].dim() == 3:
            self._batched(args, kwargs)

    def _batched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """x[e] W[e] for all experts at once; rows of zeros are tokens that were not routed to one."""
        if len(args) != 2 or (found := self._held(args[1])) is None:
            return
        name, whole = found
        inputs = args[0]
        if args[1].shape != whole.shape or args[1].stride() != whole.stride() or inputs.dim() != 3:
            return
        for part in range(whole.shape[0]):
            rows = inputs[part]
            self._report_use(Use(name, "linear", part, True, rows[rows.any(-1)]))

    def _table(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Rows looked up by ids."""
        given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        if (found := self._held(given["weight"])) is not None and found[1].dim() == 2:
            self._report_use(Use(found[0], "embedding", None, True, given["input"]))

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A run of rows taken out of a table, as some models take their positions."""
        found = self._held(args[0])
        if found is None or found[0] not in self._tables or args[0].shape != found[1].shape:
            return
        if isinstance(args[1], (slice, Tensor)):
            rows = torch.arange(found[1].shape[0], device=found[1].device)[args[1]]
            self._report_use(Use(found[0], "embedding", None, True, rows))

    def _whole(self, value: Any) -> tuple[str, Tensor | None] | None:
        """The parameter, no matrix, whose entries a tensor is, whatever its shape, or a function of them; its slope."""
        source = self._source(value)
        if source is None or source[1].dim() == 2 or value.numel() < 2 or not _is_all_of(value, source[1]):
            return None
        return source[0], source[2]

    def _scale(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """X times a factor for each channel, or for each head or group of channels."""
        if len(args) != 2:
            return
        for value, other in ((args[0], args[1]), (args[1], args[0])):
            found = self._whole(value)
            if found is not None and isinstance(other, Tensor) and self._source(other) is None:
                rows, (name, slope) = _rows_along(value, other), found
                if rows is not None:
                    self._report_use(Use(name, "norm", inputs=rows if slope is None else rows * slope))

    def _convolution(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """X under a kernel of its own for each channel: every entry is the factor of one place under the kernel."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, args, strict=False)) | kwargs
        inputs, weight = given["input"], given["weight"]
        if (held := self._held(given.get("bias"))) is not None:
            self._report_use(Use(held[0], "bias"))
        found = self._whole(weight)
        kernel = weight.shape[2:]
        padding = _each_side(given.get("padding", 0), kernel)
        channels = inputs.shape[-len(kernel) - 1]
        depthwise = weight.shape[0] == channels == given.get("groups", 1) > 1
        if found is None or found[1] is not None or padding is None or not depthwise:
            return
        stride, dilation = (_of_each(given.get(each, 1), len(kernel)) for each in ("stride", "dilation"))
        batched = inputs if inputs.dim() == len(kernel) + 2 else inputs.unsqueeze(0)
        for sample in batched.split(1):  # unfolded they are as many times as large as the kernel
            self._report_use(Use(found[0], "norm", inputs=unfold(sample, kernel, stride, padding, dilation)))

    def _constant(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Added, repeated or put beside other inputs: a bias, that is, a layer whose only input is 1."""
        values = args[0] if args and isinstance(args[0], (tuple, list)) else args
        for value in values:
            found = self._held(value)
            if found is None:
                continue
            row = found[1].dim() == 2 and value.dim() == 1 and value.shape[0] == found[1].shape[1]  # an expert's
            if row or value.numel() == found[1].numel():
                self._report_use(Use(found[0], "bias"))


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _is_all_of(value: Tensor, whole: Tensor) -> bool:
    """Whether a tensor that lies in the memory of ``whole`` has all its entries in their order."""
    alike = value.numel() == whole.numel() and value.storage_offset() == whole.storage_offset()
    return alike and value.is_contiguous() and whole.is_contiguous()


def _rows_along(value: Tensor, other: Tensor) -> Tensor | None:
    """What each entry of ``value`` multiplies, (N, entries), where the product has the other's shape; else None."""
    shape = (1,) * (other.dim() - value.dim()) + tuple(value.shape)
    if len(shape) != other.dim() or any(size not in (1, whole) for size, whole in zip(shape, other.shape, strict=True)):
        return None
    repeated = [dim for dim, size in enumerate(shape) if size == 1]
    own = [dim for dim, size in enumerate(shape) if size > 1]
    return other.permute(*repeated, *own).reshape(-1, value.numel())


def _of_each(value: Any, count: int) -> tuple[int, ...]:
    """A setting of a convolution for each of its dimensions."""
    return tuple(int(each) for each in ((value,) * count if isinstance(value, int) else (*value,) * count)[:count])


def _each_side(padding: Any, kernel: Any) -> list[tuple[int, int]] | None:
    """Zeros before and after each dimension; None where they are told by a word."""
    if isinstance(padding, str):
        return [(0, 0)] * len(kernel) if padding == "valid" else None
    return [(each, each) for each in _of_each(padding, len(kernel))]
