"""What is only copied into a checkpoint: infinities may be, NaN may not."""

import pytest
import torch
from safetensors.torch import save_file

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.writer import _pieces
from tailorcli.errors import NumericalError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16])
def test_nan_of_either_sign_is_refused_and_infinity_is_copied(tmp_path, dtype):
    limits = (torch.iinfo if dtype == torch.int16 else torch.finfo)(dtype)
    sound = torch.tensor([0, 1, limits.max, limits.min], dtype=dtype)
    if dtype.is_floating_point:
        sound = torch.cat((sound, torch.tensor([torch.inf, -torch.inf, -0.0, limits.tiny], dtype=dtype)))
    for name, nan in (("sound", None), ("nan", torch.nan), ("minus", -torch.nan)):
        value = sound if nan is None else torch.cat((sound, torch.tensor([nan], dtype=torch.float64).to(dtype)))
        (tmp_path / name).mkdir()
        save_file({"a": value}, tmp_path / name / "model.safetensors")
        with Checkpoint.open(tmp_path / name) as source:
            pieces = _pieces(source, source.tensors["a"], None)
            if nan is None or not dtype.is_floating_point:
                assert b"".join(map(bytes, pieces)) == value.view(torch.uint8).numpy().tobytes()
            else:
                with pytest.raises(NumericalError, match="NaN in tensor 'a'"):
                    list(pieces)
