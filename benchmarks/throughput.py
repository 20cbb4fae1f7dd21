"""How far patch and calibrate are from what the machine can do at all.

- salience    ``tailorcli patch --solver none --omega 1``, which reads two checkpoints and writes one, against a program
              that does just that: plain reads of 16 MiB into one buffer, plain writes, one fsync. Turn by turn on the
              same files, both after a warm-up, so that the page cache serves both alike. Target: within 4 times.
- stages      the default ``patch``: the seconds of each stage over its floor, the least bytes or multiply-adds that
              the stage needs at the rates measured just before (FLOORS below gives each formula). Target: the whole
              run within 3 times the sum of the floors.
- calibrate   ``calibrate_model`` on a small random Llama against a bare forward pass over the same batches (without
              the output head but for the last position, as in calibrate) plus the Hessians' products alone: X^T X in
              float32, the lower triangle in blocks of 512 columns, over the same tokens. Target: within 1.5 times.
              Block by block, as where a model does not fit: against plainly reading its weights and the pass over the
              data of the model as a whole. Target: within 1.3 times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    describe,
    environment,
    interleaved,
    markdown,
    parser,
    ratio,
    run_python,
    say,
    seconds_of,
    use_threads,
    verdict,
    write_json,
)
from benchmarks.synthetic import (
    DTYPES,
    Inputs,
    LlamaShape,
    parameters,
    write_inputs,
    write_pair,
    write_samples,
    write_tokenizer,
)
from tailorcli import calibrate_model
from tailorcli.data.encoder import Encoder
from tailorcli.data.records import read_records
from tailorcli.data.samples import draw_samples, make_batches
from tailorcli.device import exact_float32
from tailorcli.options import CalibrateOptions

PARTS = ("salience", "stages", "calibrate")
SALIENCE_TARGET, CALIBRATE_TARGET, BLOCKS_TARGET, STAGES_TARGET = 4.0, 1.5, 1.3, 3.0
PIECE = 1 << 24  # bytes of a plain read or write
TRIANGLE_BLOCK = 512  # columns

# n entries of a tensor (O, I), b bytes of a stored one, H of its input (I, I), k = density I kept entries a row.
FLOORS = {
    "read": "bytes of base, tuned and packed H, at the plain read rate",
    "unpack": "2 I^2 read + 4 I^2 written a Hessian, at the copy rate",
    "factorise": "I^3/6 (Cholesky) + I^3/6 (its inverse) multiply-adds a Hessian",
    "score": "n (2 b read + 4 written for delta + 4 read for its range + 4 written for the score)",
    "select": "n (4 read to find the threshold + 4 read to compare + 1 written)",
    "solve": "O I^2 (right side) + O k^3/6 (Cholesky) or O I^2 an iteration, the less, multiply-adds",
    "assemble": "n (2 b + 1 + 4 read + b written)",
    "measure": "O I^2 multiply-adds: two quadratic forms by half of H (the error before comes with the solve)",
    "write": "bytes of the output, at the plain write rate with fsync",
}


@dataclass(frozen=True)
class Rates:
    """What the machine does at best: bytes a second, multiply-adds a second."""

    read: float
    write: float
    copy: float  # bytes read plus bytes written
    gemm: float  # float32


def plain_read(files: list[Path]) -> None:
    """Read files in pieces into one buffer."""
    buffer = memoryview(bytearray(PIECE))
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def plain_write(target: Path, nbytes: int) -> None:
    """Write ``nbytes`` of one buffer again and again to a new file, synced."""
    buffer = memoryview(bytearray(os.urandom(PIECE)))
    target.unlink(missing_ok=True)
    with target.open("wb", buffering=0) as stream:
        for start in range(0, nbytes, PIECE):
            stream.write(buffer[: min(PIECE, nbytes - start)])
        os.fsync(stream.fileno())


def weights(folder: Path) -> Path:
    """The one file of a synthetic checkpoint."""
    return folder / "model.safetensors"


def measure_salience(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """``patch --solver none --omega 1`` against plain reads and writes of the same bytes."""
    shape = LlamaShape(args.salience_layers, args.hidden, args.intermediate, args.vocab)
    base, tuned = write_pair(scratch / "pair", shape, args.dtype)
    files = [weights(base), weights(tuned)]
    nbytes = files[0].stat().st_size
    output, copy = scratch / "salience", scratch / "floor"
    inside: list[float] = []
    processor: dict[str, list[float]] = {"floor": [], "patch": [], "start": []}

    def patch() -> None:
        shutil.rmtree(output, ignore_errors=True)
        command = ["-m", "tailorcli", "patch", str(base), str(tuned), "-o", str(output)]
        done = run_python([*command, "--solver", "none", "--omega", "1", "--device", "cpu", "--json"], scratch)
        inside.append(json.loads(done.stdout)["seconds"])
        processor["patch"].append(done.processor_seconds)

    def floor() -> None:
        began = process_time()
        plain_read(files)
        plain_write(copy, nbytes)
        processor["floor"].append(process_time() - began)

    def start() -> None:
        processor["start"].append(run_python(["-c", "import torch"], scratch).processor_seconds)

    seconds = interleaved({"floor": floor, "patch": patch, "start": start}, args.rounds)
    for folder in (output, scratch / "pair"):
        shutil.rmtree(folder)
    copy.unlink()
    without_start = [p - s for p, s in zip(seconds["patch"], seconds["start"], strict=True)]
    return {
        "layers": shape.layers,
        "checkpoint_bytes": nbytes,
        "floor_seconds": median(seconds["floor"]),
        "patch_seconds": median(seconds["patch"]),
        "inside_seconds": median(inside[1:]),  # what the run itself reports; it includes the import of torch
        "start_seconds": median(seconds["start"]),
        "processor_seconds": {name: median(found[1:]) for name, found in processor.items()},
        "ratio": ratio(seconds["patch"], seconds["floor"]),
        "ratio_without_start": ratio(without_start, seconds["floor"]),
    }


def measure_rates(inputs: Inputs, scratch: Path, rounds: int) -> Rates:
    """The machine's rates, on the files and in the array sizes at hand."""
    files = [weights(inputs.base), weights(inputs.tuned)]
    nbytes = files[0].stat().st_size
    source, target = torch.ones(1 << 25), torch.empty(1 << 25)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    with exact_float32():
        seconds = interleaved(
            {
                "read": lambda: plain_read(files),
                "write": lambda: plain_write(scratch / "rate", nbytes),
                "copy": lambda: target.copy_(source),
                "gemm": lambda: left @ right,
            },
            rounds,
        )
    (scratch / "rate").unlink()
    best = {name: median(times) for name, times in seconds.items()}
    return Rates(
        read=sum(file.stat().st_size for file in files) / best["read"],
        write=nbytes / best["write"],
        copy=2 * 4 * source.numel() / best["copy"],
        gemm=2048**3 / best["gemm"],
    )


def floors(shape: LlamaShape, dtype: str, density: float, iterations: dict[str, int], rates: Rates) -> dict[str, float]:
    """The least seconds of each stage, by the formulas of FLOORS; ``iterations`` are those that each tensor took."""
    b = DTYPES[dtype][0].itemsize
    tensors = parameters(shape)
    n = sum(tensor.numel for tensor in tensors)
    linear = [tensor for tensor in tensors if tensor.role == "linear"]
    sizes = list({tensor.hessian: tensor.shape[1] for tensor in linear}.values())
    products = sum(tensor.shape[0] * tensor.shape[1] ** 2 for tensor in linear)
    solve = 0.0
    for tensor in linear:
        rows, channels = tensor.shape
        direct = (density * channels) ** 3 / 6
        steps = iterations[tensor.name]
        solve += rows * (channels**2 + (min(direct, steps * channels**2) if steps else direct))
    return {
        "read": (2 * b * n + sum(2 * size * (size + 1) for size in sizes)) / rates.read,
        "unpack": sum(6 * size**2 for size in sizes) / rates.copy,
        "factorise": sum(size**3 / 3 for size in sizes) / rates.gemm,
        "score": n * (2 * b + 12) / rates.copy,
        "select": n * 9 / rates.copy,
        "solve": solve / rates.gemm,
        "assemble": n * (3 * b + 5) / rates.copy,
        "measure": products / rates.gemm,
        "write": b * n / rates.write,
    }


def measure_stages(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The default patch, stage by stage, against the floors."""
    shape = LlamaShape(args.layers, args.hidden, args.intermediate, args.vocab)
    inputs = write_inputs(scratch / "inputs", shape, args.dtype)
    output = scratch / "patched"
    rates = measure_rates(inputs, scratch, args.rounds)
    command = ["-m", "tailorcli", "patch", str(inputs.base), str(inputs.tuned), "--stats", str(inputs.stats)]
    reports, processor = [], []
    for number in range(args.rounds + 1):
        say(f"default patch, {number} of {args.rounds}" if number else "default patch, warm-up")
        done = run_python([*command, "-o", str(output), "--device", "cpu", "--json"], scratch)
        reports.append(json.loads(done.stdout))
        processor.append(done.processor_seconds)
        shutil.rmtree(output)
    shutil.rmtree(scratch / "inputs")
    reports = reports[1:]
    iterations = {tensor["name"]: tensor["iterations"] for tensor in reports[0]["tensors"]}
    density = reports[0]["options"]["density"]
    stages = {name: median(report["stages"][name] for report in reports) for name in reports[0]["stages"]}
    return {
        "layers": shape.layers,
        "rates": rates.__dict__,
        "floors": floors(shape, args.dtype, density, iterations, rates),
        "stages": stages,
        "seconds": median(report["seconds"] for report in reports),
        "processor_seconds": median(processor[1:]),  # with starting Python and torch
        "largest_iterations": max(iterations.values()),
    }


def write_model(folder: Path, shape: LlamaShape, dtype: str, samples: int, length: int) -> tuple[Path, Path]:
    """A random Llama with a tokenizer of one token a word, and data: samples of half to full ``length`` words."""
    model, _ = write_pair(folder, shape, dtype)
    write_tokenizer(model, shape.vocab)
    data = folder / "data.jsonl"
    write_samples(data, shape.vocab, samples, length // 2, length)
    return model, data


def batches_of(model: Path, data: Path, options: CalibrateOptions) -> list[dict[str, Tensor]]:
    """The very batches that calibrate runs: token ids (B, T), without padding."""
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(model, local_files_only=True))
    samples = draw_samples(data, read_records(data), encoder.encode, options)
    return list(make_batches(samples.inputs, options.batch_size))


def forward_pass(network: Any, batches: list[dict[str, Tensor]]) -> None:
    """A bare forward pass: no hooks, logits of the last position alone."""
    with torch.no_grad():
        for batch in batches:
            network(**batch, use_cache=False, logits_to_keep=1)


def triangle_product(hessian: Tensor, inputs: Tensor) -> None:
    """Add the lower triangle of X^T X in blocks of columns; inputs (N, I)."""
    for start in range(0, hessian.shape[0], TRIANGLE_BLOCK):
        stop = min(start + TRIANGLE_BLOCK, hessian.shape[0])
        hessian[start:stop, :stop].addmm_(inputs[:, start:stop].T, inputs[:, :stop])


def full_product(hessian: Tensor, inputs: Tensor) -> None:
    """Add X^T X; inputs (N, I)."""
    hessian.addmm_(inputs.T, inputs)


def hessian_products(
    shape: LlamaShape, batches: list[dict[str, Tensor]], product: Callable[[Tensor, Tensor], None]
) -> Callable[[], None]:
    """A call that does the products of all Hessians over all tokens, on random inputs made beforehand."""
    sizes = [channels for _, channels in hessian_sizes(shape)]
    counts = [batch["input_ids"].numel() for batch in batches]
    hessians = {size: torch.zeros(size, size) for size in set(sizes)}
    inputs = {size: torch.randn(max(counts), size) for size in set(sizes)}

    def call() -> None:
        for tokens in counts:
            for size in sizes:
                product(hessians[size], inputs[size][:tokens])

    return call


def hessian_sizes(shape: LlamaShape) -> Iterator[tuple[str, int]]:
    """Each distinct Hessian of a linear layer with its channels."""
    linear = [tensor for tensor in parameters(shape) if tensor.role == "linear"]
    yield from {tensor.hessian: tensor.shape[1] for tensor in linear}.items()


def measure_calibrate(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """``calibrate_model`` against a bare forward pass and the products of the Hessians."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = LlamaShape(args.calibrate_layers, args.hidden, args.intermediate, args.vocab)
    model, data = write_model(scratch / "model", shape, args.calibrate_dtype, args.samples, args.seq_len)
    options = CalibrateOptions(num_samples=args.samples, seq_len=args.seq_len, device="cpu", overwrite=True)
    batches = batches_of(model, data, options)
    network = LlamaForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True).eval()
    reports, by_blocks = [], []
    blockwise = replace(options, blockwise="always")
    with exact_float32():
        seconds = interleaved(
            {
                "forward": lambda: forward_pass(network, batches),
                "products": hessian_products(shape, batches, triangle_product),
                "calibrate": lambda: reports.append(calibrate_model(model, data, scratch / "stats", options)),
                "read": lambda: plain_read([weights(model)]),
                "blocks": lambda: by_blocks.append(calibrate_model(model, data, scratch / "stats", blockwise)),
            },
            args.rounds,
        )
        full = median(seconds_of(hessian_products(shape, batches, full_product)) for _ in range(args.rounds))
    shutil.rmtree(scratch / "model")
    stages = {name: median(report.stages[name] for report in reports[1:]) for name in reports[0].stages}
    baseline = [f + p for f, p in zip(seconds["forward"], seconds["products"], strict=True)]
    passes = [report.stages["run"] for report in reports[1:]]
    read_and_pass = [read + run for read, run in zip(seconds["read"], passes, strict=True)]
    return {
        "layers": shape.layers,
        "tokens": reports[0].tokens,
        "batches": len(batches),
        "calibrate_seconds": median(seconds["calibrate"]),
        "forward_seconds": median(seconds["forward"]),
        "triangle_products_seconds": median(seconds["products"]),
        "full_products_seconds": full,
        "stages": stages,
        "ratio": ratio(seconds["calibrate"], baseline),
        "ratio_of_run": ratio(passes, baseline),
        "read_and_pass_seconds": median(read_and_pass),
        "blocks_seconds": median(seconds["blocks"]),
        "ratio_of_blocks": ratio(seconds["blocks"], read_and_pass),
    }


def render(figures: dict[str, Any], args: argparse.Namespace) -> str:
    """The tables and the targets of the parts that ran."""
    renderers = {"salience": _render_salience, "stages": _render_stages, "calibrate": _render_calibrate}
    parts = [renderers[part](figures[part]) for part in PARTS if part in figures]
    parts.append(
        f"hidden {args.hidden}, intermediate {args.intermediate}, vocabulary {args.vocab}, {args.dtype}, "
        f"median of {args.rounds} rounds; {describe(figures['environment'])}"
    )
    return "\n\n".join(parts)


def _render_salience(found: dict[str, Any]) -> str:
    nbytes = found["checkpoint_bytes"] / 1e9
    without = f"{found['patch_seconds'] - found['start_seconds']:.2f}"
    rows = [
        [f"floor: read 2 x {nbytes:.2f} GB, write {nbytes:.2f} GB, fsync", f"{found['floor_seconds']:.2f}", "1.00"],
        ["patch --solver none --omega 1, the whole process", f"{found['patch_seconds']:.2f}", f"{found['ratio']:.2f}"],
        ["the same less starting Python and torch", without, f"{found['ratio_without_start']:.2f}"],
    ]
    spent = found["processor_seconds"]
    rows += [
        ["in the processor's seconds: floor", f"{spent['floor']:.2f}", "1.00"],
        ["  patch", f"{spent['patch']:.2f}", f"{spent['patch'] / spent['floor']:.2f}"],
        ["  starting Python and torch", f"{spent['start']:.2f}", f"{spent['start'] / spent['floor']:.2f}"],
    ]
    table = markdown((f"salience alone, {found['layers']} layers", "seconds", "/ floor"), rows)
    met = verdict(found["ratio"] <= SALIENCE_TARGET)
    return f"{table}\n\nwithin {SALIENCE_TARGET:g}x the floor, the whole process: {met} ({found['ratio']:.2f}x)"


def _render_stages(found: dict[str, Any]) -> str:
    stages, least = found["stages"], found["floors"]
    rows = [
        [name, f"{stages[name]:.2f}", f"{least[name]:.3f}", f"{stages[name] / least[name]:.1f}", formula]
        for name, formula in FLOORS.items()
        if name in stages
    ]
    rows += [[name, f"{seconds:.2f}", "", "", ""] for name, seconds in stages.items() if name not in FLOORS]
    overlap = "stages on threads of their own overlap"
    rows.append(["the whole run", f"{found['seconds']:.2f}", f"{sum(least.values()):.3f}", "", overlap])
    rates, times = found["rates"], found["seconds"] / sum(least.values())
    title = f"default patch, {found['layers']} layers"
    return (
        markdown((title, "seconds", "floor", "/ floor", "the floor"), rows, text=(0, 4))
        + f"\n\nrates: read {rates['read'] / 1e9:.2f} GB/s, write with fsync {rates['write'] / 1e9:.2f} GB/s, "
        f"copy {rates['copy'] / 1e9:.1f} GB/s, float32 products {rates['gemm'] / 1e9:.0f} G multiply-adds/s; "
        f"at most {found['largest_iterations']} iterations a tensor\nthe whole run within {STAGES_TARGET:g}x the sum "
        f"of the floors: {verdict(times <= STAGES_TARGET)} ({times:.2f}x); the process takes "
        f"{found['processor_seconds']:.1f} of the processor's seconds"
    )


def _render_calibrate(found: dict[str, Any]) -> str:
    floor = found["forward_seconds"] + found["triangle_products_seconds"]
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found["stages"].items())
    rows = [
        ["bare forward pass", f"{found['forward_seconds']:.2f}", ""],
        ["products of the Hessians, lower triangle", f"{found['triangle_products_seconds']:.2f}", ""],
        ["  (whole X^T X instead)", f"{found['full_products_seconds']:.2f}", ""],
        ["floor: forward + lower triangle", f"{floor:.2f}", "1.00"],
        ["calibrate's pass over the data", f"{found['stages']['run']:.2f}", f"{found['ratio_of_run']:.2f}"],
        ["calibrate as a whole: load, pass, pack, write", f"{found['calibrate_seconds']:.2f}", f"{found['ratio']:.2f}"],
        ["plainly reading the weights, and that pass", f"{found['read_and_pass_seconds']:.2f}", ""],
        ["calibrate block by block, over that", f"{found['blocks_seconds']:.2f}", f"{found['ratio_of_blocks']:.2f}"],
    ]
    title = f"calibrate, {found['layers']} layers, {found['tokens']:,} tokens"
    return (
        markdown((title, "seconds", "/ floor"), rows)
        + f"\n\nits stages: {stages}\nwithin {CALIBRATE_TARGET:g}x the floor, as a whole: "
        f"{verdict(found['ratio'] <= CALIBRATE_TARGET)} ({found['ratio']:.2f}x)\nblock by block within "
        f"{BLOCKS_TARGET:g}x reading the weights plus the pass: {verdict(found['ratio_of_blocks'] <= BLOCKS_TARGET)} "
        f"({found['ratio_of_blocks']:.2f}x)"
    )


def parse() -> argparse.Namespace:
    options = parser("benchmarks.throughput", __doc__)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--salience-layers", type=int, default=48, help="1.2 GB a checkpoint: starting torch is small")
    options.add_argument("--layers", type=int, default=8, help="of the pair that the default patch gets")
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--intermediate", type=int, default=2816)
    options.add_argument("--vocab", type=int, default=4096)
    options.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    options.add_argument("--calibrate-layers", type=int, default=4)
    options.add_argument("--calibrate-dtype", choices=sorted(DTYPES), default="fp32")
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--seq-len", type=int, default=256)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--dir", type=Path, help="where the temporary folder goes")
    return options.parse_args()


def main() -> None:
    """Measure, print the tables, write the JSON."""
    args = parse()
    use_threads(args.threads)
    figures: dict[str, Any] = {"options": {**vars(args), "json": str(args.json), "dir": str(args.dir)}}
    with TemporaryDirectory(prefix="tailorcli-throughput-", dir=args.dir) as name:
        scratch = Path(name)
        if "salience" in args.parts:
            say("salience")
            figures["salience"] = measure_salience(args, scratch)
        if "stages" in args.parts:
            say("stages")
            figures["stages"] = measure_stages(args, scratch)
        if "calibrate" in args.parts:
            say("calibrate")
            figures["calibrate"] = measure_calibrate(args, scratch)
    figures["environment"] = environment()
    write_json(args.json, figures)
    print(render(figures, args))


if __name__ == "__main__":
    main()
