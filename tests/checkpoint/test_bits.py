"""What is told of numbers by their bits is what torch tells of them."""

import numpy as np
import pytest
import torch

from tailorcli.checkpoint.bits import bit_type, has_nan, is_finite, number

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def as_bits(tensor, dtype):
    return tensor.view(torch.uint8).numpy().view(bit_type(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_by_their_bits(dtype):
    largest = torch.finfo(DTYPES[dtype]).max
    tensor = torch.tensor([0.0, -0.0, 1.5, -3.25, 1e-40, largest, -largest], dtype=DTYPES[dtype]).repeat(1 << 17)
    bits = as_bits(tensor, dtype)
    assert is_finite(bits, dtype)
    assert not has_nan(bits, dtype)
    assert [number(bits[place:], dtype) for place in range(7)] == tensor[:7].tolist()
    for bad in (float("inf"), -float("inf"), float("nan")):
        for place in (0, -1):
            other = tensor.clone()
            other[place] = bad
            assert not is_finite(as_bits(other, dtype), dtype)
            assert has_nan(as_bits(other, dtype), dtype) == (bad != bad)


def test_of_no_entries_all_is_well():
    nothing = np.empty(0, "<u2")
    assert is_finite(nothing, "BF16")
    assert not has_nan(nothing, "BF16")


def test_integers_have_no_nan_and_half_bytes_no_integers():
    assert is_finite(np.full(3, 0xFFFFFFFF, "<u4"), "I32")
    assert not has_nan(np.full(3, 0xFFFFFFFF, "<u4"), "I32")
    with pytest.raises(ValueError, match="F4"):
        bit_type("F4")
