"""Parameters that no layer holds: what they are is told by the operations that they enter while the model runs.

Fused experts, routers, class tokens, query tokens, layer scales: a model holds them as bare parameters and uses
them in its own forward. A watch on torch's functions sees each use, with the other operand: the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)
_REPEATS = (Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.cat)


@dataclass(frozen=True)
class Use:
    """One use of a bare parameter: as a ``linear`` layer, a table (``embedding``), a ``norm`` (scale) or a ``bias``.

    ``part`` is the slice of a parameter of three dimensions, one expert's; ``transposed`` says that it is held
    as (I, O). ``inputs`` (..., I) are what it multiplies, or the rows (...) that are looked up; None for a constant.
    """

    parameter: str
    role: str
    part: int | None = None
    transposed: bool = False
    inputs: Tensor | None = None


class ProductWatch(TorchFunctionMode):
    """Calls ``report`` for every recognised use of one of ``parameters`` while it is active."""

    def __init__(self, parameters: Mapping[str, Tensor], tables: Container[str], report: Callable[[Use], None]) -> None:
        super().__init__()
        self._tables = tables  # parameters of embeddings
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
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
            **dict.fromkeys(_SUMS, self._constant),
            **dict.fromkeys(_REPEATS, self._constant),
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the operation's operands, then run it as it is."""
        handler = self._handlers.get(func)
        if handler is not None:
            handler(args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _report_use(self, use: Use) -> None:
        """Report a use; a parameter of an embedding counts as an embedding only, even if it is the output layer too."""
        if use.role == "embedding" or use.parameter not in self._tables:
            self._report(use)

    def _held(self, value: Any) -> tuple[str, Tensor] | None:
        """The watched parameter in whose memory a tensor lies."""
        if not isinstance(value, Tensor) or value.device.type == "meta":
            return None
        for name, whole in self._by_storage.get(value.untyped_storage().data_ptr(), ()):
            if 0 <= value.storage_offset() - whole.storage_offset() < whole.numel():
                return name, whole
        return None

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

    def _scale(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """X times a vector of one factor a channel."""
        if len(args) != 2:
            return
        for value, other in ((args[0], args[1]), (args[1], args[0])):
            found = self._held(value)
            whole = found is not None and value.dim() == 1 and value.shape == found[1].shape
            if found is not None and whole and isinstance(other, Tensor) and other.shape[-1:] == value.shape:
                self._report_use(Use(found[0], "norm", inputs=other))

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
