"""What `probe` and the methods of `finetune` cost beside what each cannot do without.

- probe       ``probe_network`` against the passes that it needs, turn by turn on the same batches: one forward pass
              and a backward pass for each draw of signs, with no gradient of a weight. Target: within 1.5 times.
- steps       a step of every method beside one of full fine-tuning: the processor's seconds of two processes that
              differ only in their steps, over the steps between them, and the peak resident memory of the longer one
              (the kernel's ru_maxrss). Training is in float32. Target of dowser's memory: at most full's and a bit
              for each entry.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    Finished,
    describe,
    environment,
    interleaved,
    markdown,
    parser,
    ratio,
    run_python,
    say,
    use_threads,
    verdict,
    write_json,
)
from benchmarks.synthetic import LlamaShape, parameters
from benchmarks.throughput import batches_of, write_model
from tailorcli.options import CalibrateOptions
from tailorcli.training.probe import probe_model, probe_network
from tailorcli.training.settings import ProbeOptions, TuningMethod

PROBE_TARGET = 1.5
DRAWS = ProbeOptions().rademacher


def passes(network: Any, batches: list[dict[str, Tensor]]) -> None:
    """A forward pass and DRAWS backward passes a batch, from random signs on all logits to the embeddings alone."""
    for batch in batches:
        leaf = network.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = network(inputs_embeds=leaf, attention_mask=batch.get("attention_mask"), use_cache=False).logits
        for draw in range(DRAWS):
            signs = torch.randint(2, logits.shape, dtype=logits.dtype).mul_(2).sub_(1)
            torch.autograd.grad(logits, leaf, signs, retain_graph=draw < DRAWS - 1)


def measure_probe(args: argparse.Namespace, model: Path, data: Path) -> dict[str, Any]:
    """The probe against its passes."""
    from transformers import LlamaForCausalLM

    batches = batches_of(model, data, CalibrateOptions(num_samples=args.samples, seq_len=args.seq_len, batch_size=4))
    network = LlamaForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True).eval().requires_grad_(False)
    actions: dict[str, Callable[[], object]] = {
        "passes": lambda: passes(network, batches),
        "probe": lambda: probe_network(network, batches, DRAWS, 0),
    }
    seconds = interleaved(actions, args.rounds)
    return {
        "samples": args.samples,
        "seconds": {name: median(found) for name, found in seconds.items()},
        "ratio": ratio(seconds["probe"], seconds["passes"]),
    }


def steps_of(command: list[str], count: int, scratch: Path) -> Finished:
    """So many steps of a fine-tune, which is removed."""
    done = run_python([*command, "--steps", str(count)], scratch)
    shutil.rmtree(scratch / "tuned")
    return done


def measure_steps(args: argparse.Namespace, model: Path, data: Path, scratch: Path) -> dict[str, Any]:
    """Processor seconds a step and peak bytes of every method."""
    importance = scratch / "importance"
    probe_model(model, importance, ProbeOptions(num_samples=8, seq_len=args.seq_len, rademacher=2), data)
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(args.rounds + 1):
        for method in TuningMethod:
            say(f"{method}, {turn} of {args.rounds}" if turn else f"{method}, warm-up")
            command = ["-m", "tailorcli", "finetune", str(model), "--data", str(data), "--method", method, "--json"]
            command += ["--batch-size", "4", "--seq-len", str(args.seq_len), "-o", str(scratch / "tuned")]
            command += ["--importance", str(importance)] if method == "dowser" else []
            short, long = (steps_of(command, count, scratch) for count in (2, 2 + args.steps))
            if turn:
                kept = found.setdefault(method, {"seconds": [], "peak": []})
                kept["seconds"].append((long.processor_seconds - short.processor_seconds) / args.steps)
                kept["peak"].append(long.peak_bytes)
    full = found["full"]
    return {
        method: {
            "seconds": median(kept["seconds"]),
            "peak": median(kept["peak"]),
            "of_seconds": ratio(kept["seconds"], full["seconds"]),
            "of_peak": ratio(kept["peak"], full["peak"]),
        }
        for method, kept in found.items()
    }


def render(figures: dict[str, Any], args: argparse.Namespace) -> str:
    """Both tables and whether the targets were met."""
    probe, steps, entries = figures["probe"], figures["steps"], figures["entries"]
    seconds, times = probe["seconds"], probe["ratio"]
    rows = [
        [f"its passes: 1 forward, {DRAWS} backward", f"{seconds['passes']:.2f}", "1.00"],
        ["probe", f"{seconds['probe']:.2f}", f"{times:.2f}"],
    ]
    table = markdown((f"probe, {probe['samples']} samples", "seconds", "/ passes"), rows)
    costs = [
        [name, f"{one['seconds']:.2f}", f"{one['of_seconds']:.2f}", f"{one['peak'] / 1e9:.2f}", f"{one['of_peak']:.2f}"]
        for name, one in steps.items()
    ]
    columns = ("method", "processor seconds a step", "/ full", "peak GB", "/ full")
    most = steps["full"]["peak"] + entries / 8
    fits = verdict(steps["dowser"]["peak"] <= most)
    return (
        f"{table}\n\nwithin {PROBE_TARGET:g}x of its passes: {verdict(times <= PROBE_TARGET)} ({times:.2f}x)\n\n"
        f"{markdown(columns, costs)}\n\n"
        f"dowser's peak at most full's and a bit an entry: {fits} "
        f"({steps['dowser']['peak'] / 1e6:.0f} MB of {most / 1e6:.0f} MB)\n\n"
        f"{entries / 1e6:.1f} million parameters in float32, {args.layers} layers, batches of 4 samples of "
        f"{args.seq_len // 2} to {args.seq_len} tokens, median of {args.rounds} rounds; "
        f"{describe(figures['environment'])}"
    )


def main() -> None:
    """Measure and print."""
    made = parser("benchmarks.finetuning", __doc__)
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--hidden", type=int, default=512)
    made.add_argument("--intermediate", type=int, default=1408)
    made.add_argument("--vocab", type=int, default=4096)
    made.add_argument("--samples", type=int, default=16)
    made.add_argument("--seq-len", type=int, default=128)
    made.add_argument("--steps", type=int, default=8, help="between the two runs whose difference is taken")
    made.add_argument("--rounds", type=int, default=3)
    args = made.parse_args()
    use_threads(args.threads)
    shape = LlamaShape(args.layers, args.hidden, args.intermediate, args.vocab)
    with TemporaryDirectory(prefix="tailorcli-") as name:
        scratch = Path(name)
        model, data = write_model(scratch / "model", shape, "fp32", max(args.samples, 16), args.seq_len)
        figures = {
            "environment": environment(),
            "entries": sum(parameter.numel for parameter in parameters(shape)),
            "probe": measure_probe(args, model, data),
            "steps": measure_steps(args, model, data, scratch),
        }
    write_json(args.json, figures)
    print(render(figures, args))


if __name__ == "__main__":
    main()
