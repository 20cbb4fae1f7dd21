"""Run a model that does not fit in memory: block by block, all samples through one block before the next is loaded.

Nothing is assumed about the model but that its blocks lie in lists of modules. Each batch runs the model's own
forward in a thread of its own, a lane, which waits wherever a block is called; once all lanes wait, the block's
weights are loaded, every lane is taken through it, and the weights are dropped. Hidden states stay in the lanes, and
every weight is read once, whatever the number of samples. Only one thread runs at a time.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tailorcli.device import is_out_of_memory
from tailorcli.errors import CheckpointError, TailorError, first_line
from tailorcli.models.running import output_head
from tailorcli.models.spill import Spill


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost lists of two or more modules of one class: decoder layers, vision layers, Q-Former layers.

    A list of single layers (Gemma 3n's projections, the heads of codebooks) is none: a block is what holds layers. Nor
    is one whose parameters another module holds, too (Zamba2's shared blocks): they come and go with their block.
    """
    blocks: dict[str, nn.Module] = {}
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if inside or not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if len({type(child) for child in module}) == 1 and all(_is_block(child, holders) for child in module):
            blocks |= {f"{name}.{number}": child for number, child in enumerate(module)}
    return in_call_order(model, blocks)


def in_call_order(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """A model's ``modules``, those of its decoder behind the others and its output layer last.

    Some models hold their language model before their towers (Gemma 4): samples without pictures would be through it
    before those with some have come to it.
    """
    decoder = getattr(model, "get_decoder", lambda: None)()
    if not isinstance(decoder, nn.Module) or decoder is getattr(model, "base_model", model):
        return modules
    inside, head = {id(module) for module in decoder.modules()}, output_head(model)
    places = {name: 2 if module is head else int(id(module) in inside) for name, module in modules.items()}
    return {name: modules[name] for name in sorted(modules, key=places.__getitem__)}


def _is_block(module: nn.Module, holders: Mapping[int, int]) -> bool:
    """Whether it holds layers, and alone has their parameters; ``holders`` counts who holds each in the model."""
    own = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    return any(True for _ in module.children()) and bool(own) and all(holders[one] == own[one] for one in own)


_ENTER = object()  # instead of a block's value: the lane works it out itself


class _Stopped(BaseException):
    """Unwinds a lane whose run was given up."""


class Lane:
    """One batch on its way through the model, in a thread that only runs between ``advance`` and the next block."""

    def __init__(self, run: Callable[[], Any], size: int) -> None:
        self.size = size  # samples
        self.wanted: str | None = None  # the block that it waits for; None once it is through
        self._call: Callable[[], Any] | None = None
        self._held: list[Tensor] = []  # what it hands to the block
        self._earlier: list[weakref.ref[Tensor]] = []  # what it handed to blocks that its own thread has entered
        self._value: Any = None
        self._error: BaseException | None = None
        self._go, self._back = threading.Event(), threading.Event()
        self._stop = False
        self._run = run
        self._thread = threading.Thread(target=self._main, daemon=True)

    def _main(self) -> None:
        self._go.wait()
        try:
            if not self._stop:
                with torch.no_grad():
                    self._run()
        except _Stopped:
            pass
        except BaseException as error:  # handed to the thread that waits in advance
            self._error = error
        self.wanted = None
        self._back.set()

    def wait_for(self, block: str, call: Callable[[], Any], tensors: list[Tensor]) -> Any:
        """Called in the lane's own thread where the model calls a block: wait until someone ran it.

        Raises _Stopped once the lane is to end.
        """
        context = contextvars.copy_context()
        held = {id(tensor): tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)}
        self.wanted, self._call, self._held = block, lambda: context.run(call), list(held.values())
        self._go.clear()
        if self._stop:  # it was asked to stop while it ran; the line above cleared that signal
            raise _Stopped
        self._back.set()
        self._go.wait()
        if self._stop:
            raise _Stopped
        value, self._value = self._value, None
        return value

    def advance(self) -> list[Tensor]:
        """Let it run up to its next block, or to the end. Raises what the model raised.

        Returns what it handed to the block before and the model still holds: often the embeddings, which a model's
        forward keeps by name.
        """
        handed = [weakref.ref(tensor) for tensor in self._held]
        if self._value is _ENTER:
            self._earlier = [*self._earlier, *handed]
        self._call, self._held = None, []
        self._back.clear()
        if not self._thread.is_alive():
            self._thread.start()
        self._go.set()
        self._back.wait()
        _release_workspaces()
        if self._error is not None:
            raise self._error
        return [t for ref in handed if (t := ref()) is not None and not any(t is other for other in self._held)]

    def compute(self) -> None:
        """Run the block that it waits for, in the thread of the caller; ``advance`` goes on behind it.

        Raises CheckpointError where the model's own code cannot do that: XLM's blocks fill a cache that all share.
        """
        assert self._call is not None
        try:
            self._value = self._call()
        except TailorError:
            raise
        except Exception as error:  # whatever a model's own code raises
            if is_out_of_memory(error):
                raise
            what = f"the model's block {self.wanted} does not run by itself: {first_line(error)}"
            raise CheckpointError(what, "calibrate with --blockwise never, patch with --no-propagate") from error

    def set_result(self, value: Any) -> None:
        """Give what the block returns, worked out elsewhere, instead of ``compute``."""
        self._value = value

    def run_inside(self) -> None:
        """Let the lane's own thread run this block when it is next advanced; it may stop again at a layer inside."""
        self._value = _ENTER

    @property
    def held(self) -> list[Tensor]:
        """What it hands to the block that it waits for."""
        return list(self._held)

    def move(self, place: Callable[[Tensor], Tensor]) -> None:
        """Put the memory of its hidden states elsewhere; whoever holds them sees the same tensors."""
        self._earlier = [ref for ref in self._earlier if ref() is not None]
        alive = [*self._held, *(tensor for ref in self._earlier if (tensor := ref()) is not None)]
        for tensor in {id(tensor): tensor for tensor in alive}.values():
            tensor.data = place(tensor)

    def stop(self) -> None:
        """End the thread."""
        if self._thread.is_alive():
            self._stop = True
            self._go.set()
            self._thread.join()


def _release_workspaces() -> None:
    """Give back what cuBLAS keeps for each thread that has multiplied, up to 32 MiB: a pass has hundreds of lanes.

    The memory goes to torch's own allocator, in the order of the device's work.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        clear()


_current = threading.local()


class Lockstep:
    """A model whose blocks wait for one another: ``blocks`` by name, ``batches`` as calls of the model.

    ``others`` are the same blocks of further models that go in step with it.
    """

    def __init__(
        self,
        blocks: dict[str, nn.Module],
        batches: Iterable[tuple[Callable[[], Any], int]],
        others: Iterable[dict[str, nn.Module]] = (),
    ) -> None:
        self._blocks = [(name, block) for of_model in (blocks, *others) for name, block in of_model.items()]
        self._order = {name: position for position, name in enumerate(blocks)}
        self.passed: set[str] = set()  # blocks at which no lane waits
        self.lanes = [Lane(self._enter(number, run), size) for number, (run, size) in enumerate(batches)]

    def _enter(self, number: int, run: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            _current.lane = self.lanes[number]
            return run()

        return inside

    @contextmanager
    def _waiting_blocks(self) -> Iterator[None]:
        """Within it a call of a block waits; outside lanes (a trial run of the block) it runs at once."""

        def stand_in(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def wait(*args: Any, **kwargs: Any) -> Any:
                lane = getattr(_current, "lane", None)
                if lane is None or name in self.passed:
                    return forward(*args, **kwargs)
                value = lane.wait_for(name, lambda: forward(*args, **kwargs), _tensors((args, kwargs)))
                return forward(*args, **kwargs) if value is _ENTER else value

            return wait

        for name, block in self._blocks:
            block.forward = stand_in(name, block.forward)
        try:
            yield
        finally:
            for _, block in self._blocks:
                del block.forward

    def _next(self) -> int | None:
        """The position of the first block at which a lane waits; None when all are through."""
        return min((self._order[str(lane.wanted)] for lane in self.lanes if lane.wanted is not None), default=None)

    def run(
        self,
        start: Callable[[Lane], None],
        visit: Callable[[str, list[Lane]], None],
        spill: Spill | None = None,
        agree: Callable[[int | None], int | None] = lambda position: position,
    ) -> None:
        """Take all lanes through the model.

        ``start(lane)`` is called before a lane's first step. ``visit(block, lanes)`` gets the lanes that wait for a
        block and has to ``compute`` and ``advance`` each; a block that the model calls again is visited again.
        ``agree`` is given the position of the next block, None at the end, and may say that it is another one, where
        lanes of other processes wait: it is then visited without lanes.
        """
        try:
            with self._waiting_blocks(), torch.no_grad():  # blocks run in this thread, not in the lanes
                for lane in self.lanes:
                    start(lane)
                    lane.advance()
                    if spill is not None:
                        lane.move(spill.out)
                names = list(self._order)
                while (position := agree(self._next())) is not None:
                    block = names[position]
                    visit(block, [lane for lane in self.lanes if lane.wanted == block])
        finally:
            for lane in self.lanes:
                lane.stop()


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested arguments: the hidden states."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
