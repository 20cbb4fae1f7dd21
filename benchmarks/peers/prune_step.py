"""Run by llm-compressor's Python: its sweep on the layer of a file, once for each line that is read.

python prune_step.py LAYER.safetensors RESULT.safetensors SPARSITY BLOCK DAMPING THREADS
"""

from __future__ import annotations

import json
import sys
import time

import torch
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
from safetensors.torch import load_file, save_file


def main(layer: str, result: str, sparsity: str, block: str, damping: str, threads: str) -> None:
    """Prune delta (O, I) under its Hessian (I, I); print the seconds of each round, write what is left of delta."""
    torch.set_num_threads(int(threads))
    held = load_file(layer)
    delta, hessian = held["delta"], held["hessian"]
    module = torch.nn.Linear(delta.shape[1], delta.shape[0], bias=False)
    for _ in sys.stdin:
        module.weight.data = delta.clone()
        hessians = {module: hessian.clone()}  # it overwrites them
        wall, processor = time.perf_counter(), time.process_time()
        with torch.no_grad():
            _, pruned = sparsify_weight(module, hessians, float(sparsity), 0, 0, int(block), float(damping), False)
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}
        save_file({"pruned": pruned.contiguous()}, result)
        print("round", json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
