"""Random Llama-shaped checkpoints and statistics of any size, written tensor by tensor.

Never more than one tensor is in memory. Base weights are normal with deviation 0.02, the fine-tuned ones differ
from them by a deviation of 0.002; the Hessians have the power-law spectrum 1/j in a random orthogonal basis, each
with channel scales of its own. The folders are sound: ``tailorcli patch`` takes them without a calibration, and
``from_pretrained`` loads them. ``python -m benchmarks.synthetic OUT`` writes a set to try things on.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from benchmarks.common import parser
from tailorcli.calibration.stats import FORMAT_VERSION, HESSIANS, MANIFEST, HessianInfo, TensorStats
from tailorcli.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint
from tailorcli.checkpoint.layout import split_shards
from tailorcli.core import pack_triangle

DTYPES = {"bf16": (torch.bfloat16, "BF16", "bfloat16"), "fp32": (torch.float32, "F32", "float32")}
HEAD_SIZE = 64
TOKENS = 100_000  # what the statistics claim to average


@dataclass(frozen=True)
class LlamaShape:
    """The dimensions of a Llama; ``sharing`` query heads share a key and value head, where they divide evenly."""

    layers: int
    hidden: int
    intermediate: int
    vocab: int
    head_size: int = HEAD_SIZE
    sharing: int = 4

    @property
    def heads(self) -> int:
        """Query heads."""
        return max(1, self.hidden // self.head_size)

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.heads // self.sharing if self.heads % self.sharing == 0 else self.heads


@dataclass(frozen=True)
class Parameter:
    """One tensor: its shape, its role and the Hessian that it uses (named after the first that does)."""

    name: str
    shape: tuple[int, ...]
    role: str
    hessian: str

    @property
    def numel(self) -> int:
        """Entries."""
        return prod(self.shape)


@dataclass(frozen=True)
class Inputs:
    """The folders of one synthetic pair and its statistics."""

    base: Path
    tuned: Path
    stats: Path


def parameters(shape: LlamaShape) -> list[Parameter]:
    """Every tensor of the model, in the order in which it is stored."""
    hidden, kv = shape.hidden, shape.kv_heads * (shape.hidden // shape.heads)
    found = [
        Parameter("lm_head.weight", (shape.vocab, hidden), "linear", "lm_head.weight"),
        Parameter("model.embed_tokens.weight", (shape.vocab, hidden), "embedding", "model.embed_tokens.weight"),
    ]
    for number in range(shape.layers):
        at = f"model.layers.{number}."
        q, o, gate, down = (
            at + part for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
        )
        found += [
            Parameter(f"{at}input_layernorm.weight", (hidden,), "norm", f"{at}input_layernorm.weight"),
            Parameter(f"{down}.weight", (hidden, shape.intermediate), "linear", f"{down}.weight"),
            Parameter(f"{gate}.weight", (shape.intermediate, hidden), "linear", f"{gate}.weight"),
            Parameter(f"{at}mlp.up_proj.weight", (shape.intermediate, hidden), "linear", f"{gate}.weight"),
            Parameter(
                f"{at}post_attention_layernorm.weight", (hidden,), "norm", f"{at}post_attention_layernorm.weight"
            ),
            Parameter(f"{at}self_attn.k_proj.weight", (kv, hidden), "linear", f"{q}.weight"),
            Parameter(f"{o}.weight", (hidden, hidden), "linear", f"{o}.weight"),
            Parameter(f"{q}.weight", (hidden, hidden), "linear", f"{q}.weight"),
            Parameter(f"{at}self_attn.v_proj.weight", (kv, hidden), "linear", f"{q}.weight"),
        ]
    return [*found, Parameter("model.norm.weight", (hidden,), "norm", "model.norm.weight")]


def config(shape: LlamaShape, dtype: str) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": DTYPES[dtype][2],
    }


def write_header(stream: BinaryIO, entries: Sequence[tuple[str, str, tuple[int, ...], int]]) -> None:
    """The header of a safetensors file for tensors (name, dtype, shape, bytes) that follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)


def _raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def write_pair(
    folder: Path,
    shape: LlamaShape,
    dtype: str = "bf16",
    seed: int = 0,
    max_shard_size: int | None = None,
    device: str = "cpu",
) -> tuple[Path, Path]:
    """A base and a fine-tuned checkpoint in ``folder``, each in one file, or in shards of ``max_shard_size`` bytes.

    The values are drawn on ``device``, and differ between kinds of device.
    """
    torch_dtype, stored_dtype, _ = DTYPES[dtype]
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {parameter.name: parameter for parameter in parameters(shape)}
    sizes = [(p.name, p.numel * torch_dtype.itemsize) for p in tensors.values()]
    shards = [list(tensors)] if max_shard_size is None else split_shards(sizes, max_shard_size)
    base, tuned = folder / "base", folder / "tuned"
    for path in (base, tuned):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config(shape, dtype), indent=1) + "\n", encoding="utf-8")
        _write_index(path, shards, sum(nbytes for _, nbytes in sizes))
    for file, names in zip(_shard_names(len(shards)), shards, strict=True):
        held = [tensors[name] for name in names]
        entries = [(p.name, stored_dtype, p.shape, p.numel * torch_dtype.itemsize) for p in held]
        with (base / file).open("wb") as first, (tuned / file).open("wb") as second:
            write_header(first, entries)
            write_header(second, entries)
            for parameter in held:
                before, after = _random_weights(parameter, generator)
                first.write(_raw(before.to(torch_dtype).cpu()))
                second.write(_raw(after.to(torch_dtype).cpu()))
    return base, tuned


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_index(path: Path, shards: list[list[str]], nbytes: int) -> None:
    """The index of a checkpoint of more than one file."""
    if len(shards) == 1:
        return
    files = _shard_names(len(shards))
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (path / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _random_weights(parameter: Parameter, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def normal(deviation: float) -> Tensor:
        return torch.randn(parameter.shape, generator=generator, device=generator.device).mul_(deviation)

    before = normal(0.02)
    if parameter.role == "norm":
        before += 1.0
    return before, normal(0.002).add_(before)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer of one token a word: w1, w2, and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def write_samples(file: Path, vocab: int, samples: int, shortest: int, longest: int) -> None:
    """Calibration data: samples of random words."""
    generator = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(samples):
            count = generator.randint(shortest, longest)
            text = " ".join(f"w{generator.randrange(1, vocab)}" for _ in range(count))
            stream.write(json.dumps({"text": text}) + "\n")


@cache
def correlated_hessian(size: int, power: float = 1.0, seed: int = 0, device: str = "cpu") -> Tensor:
    """H (I, I), float32, with eigenvalues j^-power in a random orthogonal basis, and mean(diag H) = 2."""
    generator = torch.Generator(device).manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, device=device)).Q  # (I, I)
    spectrum = torch.arange(1, size + 1, dtype=torch.float32, device=device) ** -power
    hessian = (basis * (2.0 * size * spectrum / spectrum.sum())) @ basis.T
    symmetric: Tensor = (hessian + hessian.T) / 2
    return symmetric


def write_stats(folder: Path, shape: LlamaShape, tuned: Path, seed: int = 0, device: str = "cpu") -> Path:
    """A statistics folder for ``tuned``, in the format that ``tailorcli calibrate`` writes."""
    folder.mkdir(parents=True)
    hessians, tensors = _stats_of(parameters(shape))
    with (folder / HESSIANS).open("wb") as stream:
        sizes = {name: info.stored_numel for name, info in hessians.items()}
        write_header(stream, [(name, "F32", (numel,), 4 * numel) for name, numel in sizes.items()])
        for values in _random_hessians(hessians, seed, device):
            stream.write(_raw(values.cpu()))
    with Checkpoint.open(tuned) as checkpoint:
        model = {"path": str(tuned), "fingerprint": checkpoint.fingerprint(), "run_in": "nothing: synthetic"}
    manifest = {
        "format_version": FORMAT_VERSION,
        "model": model,
        "data": {"file": "none: synthetic", "samples": 0, "tokens": TOKENS, "seed": seed},
        "options": {},
        "versions": {"torch": torch.__version__},
        "hessians": {name: asdict(info) for name, info in hessians.items()},
        "tensors": {name: asdict(entry) for name, entry in tensors.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder


def _stats_of(tensors: Sequence[Parameter]) -> tuple[dict[str, HessianInfo], dict[str, TensorStats]]:
    hessians: dict[str, HessianInfo] = {}
    entries: dict[str, TensorStats] = {}
    for parameter in tensors:
        transposed = parameter.role == "embedding"
        size = parameter.shape[0] if transposed or len(parameter.shape) == 1 else parameter.shape[1]
        kind = "full" if parameter.role == "linear" else "diagonal"
        hessians[parameter.hessian] = HessianInfo(size, kind, TOKENS, mean_diagonal=2.0)
        entries[parameter.name] = TensorStats(parameter.hessian, parameter.role, transposed)
    return hessians, entries


def _random_hessians(hessians: dict[str, HessianInfo], seed: int, device: str) -> Iterator[Tensor]:
    """What is stored of each Hessian, in order: a scaled power-law matrix's triangle, or a positive diagonal."""
    generator = torch.Generator().manual_seed(seed)
    for info in hessians.values():
        scale = (0.3 * torch.randn(info.size, generator=generator)).exp().to(device)
        if info.kind == "full":
            hessian = correlated_hessian(info.size, device=device) * scale * scale.unsqueeze(1)
            yield pack_triangle(hessian)
        else:
            yield 2.0 * scale


def write_inputs(folder: Path, shape: LlamaShape, dtype: str = "bf16", seed: int = 0) -> Inputs:
    """A pair with its statistics, all in ``folder``."""
    base, tuned = write_pair(folder, shape, dtype, seed)
    return Inputs(base, tuned, write_stats(folder / "stats", shape, tuned, seed))


def main() -> None:
    """Write a set of inputs to a folder."""
    options = parser("benchmarks.synthetic", __doc__)
    options.add_argument("output", type=Path)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--intermediate", type=int, default=1408)
    options.add_argument("--vocab", type=int, default=4096)
    options.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    shape = LlamaShape(args.layers, args.hidden, args.intermediate, args.vocab)
    made = write_inputs(args.output, shape, args.dtype, args.seed)
    print(f"tailorcli patch {made.base} {made.tuned} --stats {made.stats} -o {args.output / 'patched'}")


if __name__ == "__main__":
    main()
