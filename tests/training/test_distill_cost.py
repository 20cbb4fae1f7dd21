"""What distillation is told to need."""

import json

import torch
import transformers

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import TensorInfo
from tailorcli.options import CalibrateOptions
from tailorcli.training.cost import training_bytes

SEVEN_B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "dtype": "bfloat16",
}


def test_a_7b_at_a_tenth_takes_less_than_40_gb_on_the_device(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    options = CalibrateOptions()
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SEVEN_B))
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    infos = {
        name: TensorInfo(name, "BF16", shape, tmp_path / "model.safetensors", 0, 2 * torch.Size(shape).numel())
        for name, shape in shapes.items()
    }
    base = Checkpoint(tmp_path, infos, [])
    kept = [(name, info.numel // 10) for name, info in infos.items()]
    kinds = [[{"input_ids": torch.zeros(1, 512, dtype=torch.long)}] * 128] * 2
    device, host = training_bytes(base, tmp_path, kept, kinds, options, 8, True)
    weights, entries = 2 * 6.74e9, 20 * 0.674e9
    assert weights + entries < device < 40e9
    states, best = 256 * 512 * 4096 * 2, 2 * 0.674e9
    assert states + best < host < states + best + weights + 1e7
