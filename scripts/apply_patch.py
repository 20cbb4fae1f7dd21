"""Apply a patch file with numpy and safetensors alone: how little the format asks for.

    python apply_patch.py BASE.safetensors PATCH.safetensors OUT.safetensors

`tailorcli apply` also checks that the base is the right one, streams, keeps shards and brings the side files.
"""

import json
import sys

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def as_rows(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of each entry, (entries, bytes of one), in the tensor's own memory: NumPy knows no bfloat16."""
    return tensor.reshape(-1, 1).view(torch.uint8).numpy()


base, patch = load_file(sys.argv[1]), load_file(sys.argv[2])
with safe_open(sys.argv[2], "pt") as file:
    entries = json.loads(file.metadata()["tailorcli_patch"])["tensors"]
for name, entry in entries.items():
    codes, tensor, values = patch["mask:" + name].numpy(), as_rows(base[name]), as_rows(patch["values:" + name])
    if entry["coding"] == "bits":
        tensor[np.unpackbits(codes, count=len(tensor), bitorder="little").astype(bool)] = values
        continue
    escape = {"gaps4": 15, "gaps8": 255}[entry["coding"]]
    if escape == 15:
        codes = np.stack([codes & 15, codes >> 4], axis=1).ravel()
    keeps = codes < escape
    tensor[(np.cumsum(codes.astype(np.int64) + keeps) - 1)[keeps]] = values
save_file(base, sys.argv[3], metadata={"format": "pt"})
