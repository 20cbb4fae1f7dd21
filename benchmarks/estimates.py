"""Estimates for models that are on no machine of ours: the table of ``docs/how-to/many-devices.md``.

    python -m benchmarks.estimates

Shapes come from configs, through transformers without memory; rates are those that were measured on GPUs.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pages import reflow
from benchmarks.real.render import between
from tailorcli.options import CalibrateOptions, PatchOptions
from tailorcli.pipeline.estimate import NETWORK, NVLINK, DescribedJob, Estimate
from tailorcli.pipeline.plan import JobPlan
from tailorcli.pipeline.ranks import Device, Fleet
from tailorcli.units import format_bytes

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "many-devices.md"
MARK = "estimates"

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
MODELS: dict[str, dict[str, Any]] = {
    "7B (Llama 2)": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000},
    "70B (Llama 3)": _LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "405B (Llama 3.1)": _LLAMA
    | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "671B, 37B of it a token (DeepSeek-V3)": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
}
FLEETS = (Fleet(1, 1), Fleet(1, 8), Fleet(4, 8))

_LAYER = 4 * 4096**2 + 3 * 4096 * 11008  # weights of a block of the 7B, on which all of this was measured
_ROWS_BY_SQUARES = 4096**3


def h100(fleet: Fleet) -> Device:
    """An H100 of 80 GB by docs/results/gpu.md; what that lacks is an H200's, by docs/results/time-and-memory.md.

    The links between devices are not measured: what NVLink and a network of 400 Gb/s a device usually give.
    """
    return Device(
        product=0.96 / (262_144 * 4 * _LAYER),  # "bare forward pass", 4 layers
        gather=0.0035 / (16_384 * 11_008**2),  # "Hessian of 11008 channels"
        prepare=3.0 / (32 * (3 * 4096**3 + 11_008**3)),  # H200: "factorise", 32 layers
        solve=0.0656 / _ROWS_BY_SQUARES,  # "4096 x 4096, now"
        entry=(3.3 + 1.3) / 6.74e9,  # H200: "measure" and "select"
        step=(15.9 - 8.3) / (4 * 255 * 2),  # H200: what writing 128 samples of 256 tokens adds, 2 layers
        passage=5.8 / (131_072 * 2 * _LAYER) / 2.3,  # "run" of the propagated patch, 2 layers
        load=0.4 / (2 * (4 * _LAYER + 2 * 32_000 * 4096)),  # "load" of calibrate, 4 layers
        part=3.7 / (3 * 2 * (2 * _LAYER + 2 * 32_000 * 4096)),  # "load" of the propagated patch
        read=1 / 7.7e9,  # H200's disk
        write=1 / 1.0e9,
        link=NVLINK if fleet.machines == 1 else NETWORK,
        memory=80_000_000_000,
    )


def job_of(config: dict[str, Any], *, propagate: bool = True) -> DescribedJob:
    """The whole job: 128 samples of 2,048 tokens, and of what the base must keep 128 that it writes, of 256.

    A base that does not fit a device cannot write: then they are data, of 2,048 tokens.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        writes = config["num_hidden_layers"] == 32  # the 7B
        options = PatchOptions(propagate=None if propagate else False)
        return DescribedJob.of(folder, folder, options, CalibrateOptions(), True, writes)


def plan_on(job: DescribedJob, config: dict[str, Any], fleet: Fleet) -> JobPlan:
    """What it costs on H100s."""
    return job.on(Estimate(h100(fleet), fleet, config, ()))


def duration(seconds: float) -> str:
    """Minutes below two hours."""
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def row(name: str, plan: JobPlan) -> list[str]:
    """One line of the table."""
    ranks = plan.ranks
    assert ranks is not None
    longest = max(ranks.steps, key=lambda step: step.seconds)
    read, written = (sum(getattr(step, f) for step in ranks.steps) for f in ("read_bytes", "write_bytes"))
    held = format_bytes(ranks.device_bytes) + ("" if ranks.fits else " (does not fit)")
    bound = f"{longest.bound} ({longest.what.split()[0]})"
    sizes = (format_bytes(read), format_bytes(written), format_bytes(plan.stats_bytes), held)
    return [name, str(ranks.fleet.size), *sizes, duration(ranks.seconds), bound]


def table() -> str:
    """All models on all fleets, propagated and plain."""
    head = ["model", "devices", "read", "written", "of it statistics", "a device holds", "time", "bound by"]
    rows = []
    for name, config in MODELS.items():
        job = job_of(config)
        plans = [plan_on(job, config, fleet) for fleet in FLEETS]
        rows += [row(name, plan) for plan in plans]
        if not all(plan.ranks is not None and plan.ranks.fits for plan in plans):
            job = job_of(config, propagate=False)
            rows += [row(f"{name}, `--no-propagate`", plan_on(job, config, fleet)) for fleet in FLEETS]
    lines = [head, ["---"] + ["---:"] * 6 + ["---"], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Print the table, and put it into the page."""
    text = table()
    print(text)
    if PAGE.exists():
        PAGE.write_text(reflow(between(PAGE.read_text(), MARK, text)))


if __name__ == "__main__":
    main()
