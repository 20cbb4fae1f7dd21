"""One LoRA adapter put into its base: PEFT's merge_and_unload against `patch --method changed`.

What is exact is worked out in float64 from the adapter's two factors; each result is held against it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import markdown, say
from benchmarks.peers.checkpoints import middle
from benchmarks.peers.environments import measured, rounds_of
from benchmarks.synthetic import DTYPES, LlamaShape, write_pair

RANK, ALPHA, TARGETS = 8, 16, ["q_proj", "v_proj", "down_proj"]
MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def measure(cache: Path, shape: LlamaShape, rounds: int) -> dict[str, Any]:
    """Both merges of one adapter onto a base in float32 and in bfloat16."""
    found = {}
    with TemporaryDirectory(prefix="tailorcli-", dir=cache) as name:
        for dtype in ("fp32", "bf16"):
            folder = Path(name) / dtype
            base, _ = write_pair(folder, shape, dtype)
            adapter = _write_adapter(base, folder / "adapter")
            found[dtype] = _both(base, adapter, folder, DTYPES[dtype][2], rounds)
    return {"rounds": rounds, "rank": RANK, "dtypes": found}


def _write_adapter(base: Path, folder: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder


def _both(base: Path, adapter: Path, folder: Path, dtype: str, rounds: int) -> dict[str, Any]:
    ours, theirs = folder / "ours", folder / "peft"
    patch: list[str | Path] = ["patch", base, adapter, "-o", ours, "--method", "changed", "--overwrite", "--quiet"]
    commands: dict[str, list[str | Path]] = {
        "tailorcli": [sys.executable, "-m", "tailorcli", *patch],
        "peft": [sys.executable, "-c", MERGE, base, adapter, theirs, dtype],
    }
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in commands}
    for number in rounds_of(rounds):
        say(f"adapter, {dtype}: round {number} of {rounds}")
        for key, command in commands.items():
            figures = measured(command, folder)
            runs[key] += [figures] if number else []
    return {"runs": runs, "compared": _compared(base, adapter, ours, theirs)}


def _compared(base: Path, adapter: Path, ours: Path, theirs: Path) -> dict[str, float]:
    """Over the entries of the adapted tensors: equal to the bit, and the exact value as each rounds it."""
    from safetensors.torch import load_file

    from tailorcli import Checkpoint

    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    counts = {"entries": 0, "equal": 0, "exact_ours": 0, "exact_theirs": 0, "others_equal": 1}
    with Checkpoint.open(base) as before, Checkpoint.open(ours) as one, Checkpoint.open(theirs) as other:
        for name in before.tensors:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            start, a, b = before.read(name), one.read(name), other.read(name)
            if f"{key}.lora_A.weight" not in factors:
                counts["others_equal"] &= int(bool((a == start).all() and (b == start).all()))
                continue
            down, up = (factors[f"{key}.lora_{part}.weight"].double() for part in "AB")  # (R, I), (O, R)
            exact = (start.double() + scale * up @ down).to(start.dtype)
            counts["entries"] += start.numel()
            for kind, found in (("equal", a == b), ("exact_ours", a == exact), ("exact_theirs", b == exact)):
                counts[kind] += int(found.sum())
    shares = {key: counts[key] / counts["entries"] for key in ("equal", "exact_ours", "exact_theirs")}
    return {**shares, "others_equal": counts["others_equal"]}


def render(figures: dict[str, Any]) -> str:
    """The table."""
    columns = ["base", "", "seconds", "processor seconds", "peak, MB", "exact, rounded once", "equal in both"]
    rows, others = [], True
    for dtype, one in figures["dtypes"].items():
        same = one["compared"]
        others = others and bool(same["others_equal"])
        for name, key in (("tailorcli", "exact_ours"), ("peft", "exact_theirs")):
            found = middle(one["runs"][name])
            values = [f"{found['seconds']:.1f}", f"{found['cpu_seconds']:.1f}", f"{found['peak_bytes'] / 1e6:.0f}"]
            equal = f"{same['equal']:.4%}" if name == "tailorcli" else ""
            rows.append([dtype, name, *values, f"{same[key]:.4%}", equal])
    told = "all equal the base" if others else "do not all equal the base"
    return f"{markdown(columns, rows, (0, 1))}\n\n- tensors that the adapter leaves alone: {told} in both"
