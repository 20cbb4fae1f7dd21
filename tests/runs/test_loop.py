"""The loop that patch and merge share."""

import pytest
import torch

from tailorcli.device import StageTimer
from tailorcli.errors import NumericalError
from tailorcli.runs.loop import LastPrepared, worked_on
from tailorcli.runs.plan import TensorPlan


def plan(name, hessian=None, action="patch", retained=(), tasks=()):
    shape = (2, 2)
    return TensorPlan(
        name, "F32", shape, 16, action, hessian=hessian, retained_hessians=retained, task_hessians=tasks, held_bytes=64
    )


def looped(tensors, work=lambda tensor, held: held.pop()):
    return worked_on(tensors, lambda tensor, names: (tensor.name, names), lambda *_: 16, work, StageTimer())


def test_the_callers_float32_setting_holds_between_tensors():
    before = torch.get_float32_matmul_precision()
    seen = []

    def work(tensor, held):
        seen.append(torch.get_float32_matmul_precision())
        return held.pop()

    try:
        torch.set_float32_matmul_precision("medium")
        for _ in looped([plan("a"), plan("b", action="base"), plan("c")], work):
            seen.append(torch.get_float32_matmul_precision())
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest", "medium", "medium", "highest", "medium"]


def test_hessians_are_read_for_the_first_of_those_that_share_them():
    tensors = [
        *(plan("a", "h"), plan("left", action="base"), plan("b", "h"), plan("c", "h", retained=("r",)), plan("d")),
        *(plan("e", "h", tasks=("h", "k")), plan("f", "h", tasks=("h", "k")), plan("g", "h", tasks=("h", "l"))),
    ]
    found = {tensor.name: result for tensor, result in looped(tensors)}
    assert found.pop("left") is None
    assert {name: names for name, (_, names) in found.items()} == {
        **{"a": ("h",), "b": (), "c": ("h", "r"), "d": ()},
        **{"e": ("h", "k"), "f": (), "g": ("h", "l")},
    }
    assert all(own == name for name, (own, _) in found.items())


def test_a_numerical_error_names_the_tensor():
    def work(tensor, held):
        raise NumericalError("NaN in it", "calibrate again")

    with pytest.raises(NumericalError, match="tensor 'a': NaN in it"):
        list(looped([plan("a")], work))


def test_what_is_prepared_is_kept_for_those_that_share_it_and_freed_before_the_next():
    class Value:
        alive = 0

        def __init__(self):
            assert Value.alive == 0
            Value.alive += 1

        def __del__(self):
            Value.alive -= 1

    last = LastPrepared()
    first = id(last.of(("h",), Value))
    assert id(last.of(("h",), pytest.fail)) == first
    assert last.of(("k",), Value) is not None
    assert last.of((), pytest.fail) is None
    assert Value.alive == 0
