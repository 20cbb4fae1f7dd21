"""One script for a machine with a GPU: correctness against the CPU, speed and device memory, distance from the floors.

It makes all it needs (a random pair in the shapes of Llama-2-7B, statistics, samples), works in this one process so
that device memory can be measured, and prints its tables last. FILE, or ``$OUT/gpu.md``, gets the same as Markdown
after every section, so that a run that is cut short leaves what it had. A section that fails says so, and the next
one begins; one for which ``--budget`` leaves no time is passed over.

- joint       single layers: the float32 conjugate gradients of before beside what is there now, and what each part
              gives; the gap to the optimum in float64. Targets: 4 times as fast, 6 times with a wide input.
- propagate   both models calibrated, patched and propagated, two layers. Target: 15 s.
- patch       the pair with all statistics, against plainly reading the same files and writing the output, and
              against the paper's 1260 s for 2.7e9 parameters on a V100. Targets: 35 s, twice the plain copy, 8 GB.
              It has as many layers as the disk and the seconds that are left take; a timeline of its threads.
- floors      the stages of that run over the least bytes and multiply-adds at this machine's rates.
- job         patch --data in one pass beside its three steps, two layers; tokens that a model writes a second.
- correct     a small model: calibrate (whole and block by block), score and patch on the device against the CPU.
- calibrate   128 samples of 2048 tokens, 4 layers, against a bare forward pass. Target: within 1.5 times.
- distill     a step of distillation against a plain training step. Targets: 1.25 times, 200 in 300 s, 40 GB.

Only where they are asked for, with ``--sections``:
- layers      joint against the sequential sweep on single layers. Target: at least 5 times as fast.
- variants    batched Cholesky for joint.

``--device cpu --tiny`` goes through every line of it on small shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, gettempdir
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks import distillation, gpu_job, gpu_joint, gpu_propagation, gpu_timeline
from benchmarks.common import describe, environment, markdown, parser, say, use_threads, verdict, write_json
from benchmarks.pages import reflow
from benchmarks.solver import Layer, joint, layer_error, make_layer, sequential
from benchmarks.synthetic import LlamaShape, correlated_hessian, write_pair, write_samples, write_stats, write_tokenizer
from benchmarks.throughput import FLOORS, Rates, batches_of, floors, forward_pass, plain_read, plain_write, weights
from tailorcli import PatchFile, calibrate_model, patch_checkpoint, score_checkpoint
from tailorcli.calibration.stats import HESSIANS, Stats
from tailorcli.core.chunks import row_chunks
from tailorcli.device import exact_float32
from tailorcli.options import Blockwise, CalibrateOptions, PatchOptions, Solver

SECTIONS = ("joint", "propagate", "patch", "floors", "job", "correct", "calibrate", "distill")  # least sure first
FURTHER = ("layers", "variants")  # only where they are asked for
NEEDED = {  # seconds on an H100
    "joint": 30,
    "propagate": 60,
    "patch": 60,
    "floors": 8,
    "job": 45,
    "correct": 25,
    "calibrate": 20,
    "distill": 20,
    "layers": 45,
    "variants": 30,
}
PAPER_SECONDS_A_PARAMETER = 1260 / 2.7e9  # on one V100
PATCH_SECONDS, PLAIN_RATIO, PEAK_BYTES, SPEEDUP, CALIBRATE_RATIO = 35.0, 2.0, 8e9, 5.0, 1.5
DENSITY = 0.1
CALIBRATED_LAYERS = 4
DISK_SHARE = 0.45  # of the seconds that are left
SYSTEM_ENTRIES = 1 << 27  # of small systems factorised together
Figures = dict[str, Any]


@dataclass
class Bench:
    """What every section needs, and what the earlier ones found."""

    args: argparse.Namespace
    device: torch.device
    scratch: Path
    shape: LlamaShape
    started: float = field(default_factory=perf_counter)
    found: Figures = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return float(self.args.budget) - (perf_counter() - self.started)

    def timed(self, action: Callable[[], object], rounds: int = 1, warm: bool = True) -> float:
        """Median seconds of a call, all its kernels included."""
        if warm:
            action()
        seconds = []
        for _ in range(rounds):
            synchronise(self.device)
            started = perf_counter()
            action()
            synchronise(self.device)
            seconds.append(perf_counter() - started)
        return median(seconds)

    def free(self) -> None:
        """Give back what earlier sections hold on the device, and start its peak anew."""
        correlated_hessian.cache_clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak(self) -> int:
        """Most bytes of tensors on the device since ``free``; 0 on a CPU."""
        return int(torch.cuda.max_memory_allocated(self.device)) if self.device.type == "cuda" else 0


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


# Correctness.


def measure_correct(bench: Bench) -> Figures:
    """A small float32 model: statistics, scores, masks and weights of both devices."""
    shape = LlamaShape(2, 128, 352, 512) if bench.args.tiny else LlamaShape(2, 512, 1408, 2048)
    folder = bench.scratch / "small"
    base, tuned = write_pair(folder, shape, "fp32")
    for model in (base, tuned):
        write_tokenizer(model, shape.vocab)
    data = folder / "data.jsonl"
    write_samples(data, shape.vocab, 16, 64, 256)
    here = str(bench.device)
    runs: dict[str, tuple[str, Blockwise | str]] = {"cpu": ("cpu", "never"), "whole": (here, "never")}
    runs["blocks"] = (here, "always")
    for name, (device, blockwise) in runs.items():
        run = CalibrateOptions(device=device, dtype="float32", blockwise=blockwise)
        calibrate_model(tuned, data, folder / name, run)
    found: Figures = {name: compare_stats(folder / "cpu", folder / name) for name in ("whole", "blocks")}
    options = PatchOptions(density=DENSITY)
    scores = [score_checkpoint(base, tuned, folder / "cpu", replace(options, device=d)) for d in ("cpu", here)]
    sums = [[t.sensitivity_kept for t in s.tensors if t.sensitivity_kept] for s in scores]
    found["score"] = max(abs(a - b) / abs(a) for a, b in zip(*sums, strict=True))
    solvers: tuple[Solver | str, ...] = ("joint", "sequential", "none")
    for solver in solvers:
        found[solver] = compare_patches(folder, base, tuned, replace(options, solver=solver), here)
    calibrate_model(base, data, folder / "retain", CalibrateOptions(device="cpu", dtype="float32"))
    found["propagated"] = compare_patches(folder, base, tuned, options, here, folder / "retain")
    shutil.rmtree(folder)
    return found


def compare_stats(first: Path, second: Path) -> float:
    """The largest difference of two folders' Hessians, over the largest entry of each; layers that share may differ."""
    worst = 0.0
    ours, theirs = Stats.open(first), Stats.open(second)
    for name, entry in ours.tensors.items():
        a, b = (stats.load(str(e.hessian)) for stats, e in ((ours, entry), (theirs, theirs.tensors[name])))
        worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    ours.close()
    theirs.close()
    return worst


def compare_patches(
    folder: Path, base: Path, tuned: Path, options: PatchOptions, device: str, retain: Path | None = None
) -> Figures:
    """Entries in which masks differ; and the largest difference of weights where both keep, over the largest change."""
    files = [folder / f"{name}.safetensors" for name in ("first", "second")]
    for file, name in zip(files, ("cpu", device), strict=True):
        file.unlink(missing_ok=True)
        chosen = replace(options, device=name)
        patch_checkpoint(base, tuned, None, folder / "cpu", chosen, patch_file=file, retain=retain)
    differing, entries, worst = 0, 0, 0.0
    with PatchFile.open(files[0]) as ours, PatchFile.open(files[1]) as theirs:
        for name in ours.tensors:
            masks = [patch.mask(name) for patch in (ours, theirs)]
            held = [torch.zeros(mask.shape) for mask in masks]
            for values, mask, patch in zip(held, masks, (ours, theirs), strict=True):
                values[mask] = patch.values(name).float()
            both = masks[0] & masks[1]
            differing += int((masks[0] ^ masks[1]).sum())
            entries += both.numel()
            if bool(both.any()):
                worst = max(worst, float((held[0] - held[1])[both].abs().max() / held[0][both].abs().max()))
    return {"differing": differing, "entries": entries, "weights": worst}


def render_correct(found: Figures) -> str:
    """Differences between the two devices."""
    rows = [[f"statistics, {name}", "", f"{found[name]:.1e}"] for name in ("whole", "blocks")]
    rows.append(["score: sensitivity kept", "", f"{found['score']:.1e}"])
    for kind in ("joint", "sequential", "none", "propagated"):
        part = found[kind]
        rows.append([f"patch, {kind}", f"{part['differing']} of {part['entries']}", f"{part['weights']:.1e}"])
    return markdown(("device against CPU, float32, TF32 off", "mask entries that differ", "largest difference"), rows)


# Single layers.


def layer_shapes(bench: Bench) -> list[tuple[int, int]]:
    """(O, I) of the query, gate and down projections."""
    hidden, intermediate = bench.shape.hidden, bench.shape.intermediate
    return [(hidden, hidden), (intermediate, hidden), (hidden, intermediate)]


def measure_layers(bench: Bench) -> Figures:
    """The joint solver against the sweep, and its factor, on each shape."""
    rows = []
    for outputs, inputs in layer_shapes(bench):
        say(f"layer {outputs} x {inputs}")
        layer = make_layer(inputs, DENSITY, 1.0, bench.device, outputs)
        errors = {name: layer_error(layer, solve(layer)) for name, solve in (("joint", joint), ("seq", sequential))}
        seconds = [bench.timed(partial(f, layer), 3, warm=False) for f in (joint, sequential)]
        rows.append({"shape": [outputs, inputs], "joint": seconds[0], "sequential": seconds[1], "errors": errors})
        del layer
        bench.free()
    return {"rows": rows}


def render_layers(found: Figures) -> str:
    """Seconds a layer."""
    rows = [
        [
            "{} x {}".format(*row["shape"]),
            f"{row['joint']:.3f}",
            f"{row['sequential']:.3f}",
            f"{row['sequential'] / row['joint']:.2f}",
            f"{row['errors']['joint'] / row['errors']['seq']:.2f}",
        ]
        for row in found["rows"]
    ]
    least = min(row["sequential"] / row["joint"] for row in found["rows"])
    table = markdown(("layer, O x I", "joint, s", "sequential, s", "seq./joint", "error joint/seq."), rows)
    return f"{table}\n\njoint at least {SPEEDUP:g}x as fast: {verdict(least >= SPEEDUP)} ({least:.2f}x)"


# Other kernels.


def measure_variants(bench: Bench) -> Figures:
    """Batched Cholesky against ``decorate_joint``."""
    found: Figures = {"joint": []}
    for outputs, inputs in layer_shapes(bench):
        say(f"variants, {outputs} x {inputs}")
        rows = min(outputs, 4096)
        layer = make_layer(inputs, DENSITY, 1.0, bench.device, rows)
        expected, solved = joint(layer), batched_cholesky(layer)
        difference = float((expected - solved).norm() / expected.norm())
        del expected, solved
        seconds = [bench.timed(partial(f, layer), 3, warm=False) for f in (joint, batched_cholesky)]
        found["joint"].append({"shape": [rows, inputs], "seconds": seconds, "difference": difference})
        del layer
        bench.free()
    return found


def batched_cholesky(layer: Layer) -> Tensor:
    """The decorator by factorising every row's system, many rows at once, short ones filled up with the identity."""
    decorator = torch.zeros_like(layer.delta)
    counts = layer.mask.sum(1)  # (O,)
    for chunk in row_chunks(*layer.delta.shape):
        target = torch.where(layer.mask[chunk], 0.0, layer.delta[chunk]) @ layer.hessian  # (R, I)
        order = counts[chunk].argsort()
        done = 0
        while done < order.numel():
            size = max(1, int(counts[chunk][order[done:]].max()))
            rows = order[done : done + max(1, SYSTEM_ENTRIES // size**2)]
            done += rows.numel()
            most = max(1, int(counts[chunk][rows].max()))
            kept = layer.mask[chunk][rows]
            index = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, n)
            held = kept.gather(1, index)
            systems = layer.hessian[index.unsqueeze(2), index.unsqueeze(1)]  # (B, n, n)
            systems.mul_(held.unsqueeze(2)).mul_(held.unsqueeze(1))
            systems.diagonal(dim1=1, dim2=2).add_(torch.where(held, layer.amount, 1.0))
            right = (target[rows].gather(1, index) * held).unsqueeze(2)
            values = torch.cholesky_solve(right, torch.linalg.cholesky_ex(systems).L).squeeze(2)
            decorator[chunk.start + rows] = torch.zeros_like(target[rows]).scatter_(1, index, values * held)
    return decorator


def render_variants(found: Figures) -> str:
    """What each would save."""
    rows = [
        [
            "joint, {} x {}".format(*row["shape"]),
            f"{row['seconds'][0]:.3f}",
            f"batched Cholesky {row['seconds'][1]:.3f}",
            f"{row['seconds'][0] / row['seconds'][1]:.2f}",
            f"{row['difference']:.1e}",
        ]
        for row in found["joint"]
    ]
    return markdown(("step", "now, s", "instead, s", "gain", "difference"), rows, text=(0, 2))


# The pair.


def fitting_shape(bench: Bench) -> LlamaShape:
    """As many layers as the disk takes: in bytes, and in ``DISK_SHARE`` of the time at the rate at which it writes."""
    probe = 1 << (26 if bench.args.tiny else 30)
    seconds = bench.timed(lambda: plain_write(bench.scratch / "probe", probe), warm=False)
    (bench.scratch / "probe").unlink()
    free = shutil.disk_usage(bench.scratch).free
    bench.found["disk"] = {"write_rate": probe / seconds, "free": free}
    shape = bench.shape
    pair, stats = 4 * numel(shape), stats_bytes(shape)
    most = bench.left * DISK_SHARE * probe / seconds  # pair and statistics are written twice in all
    while shape.layers > 2 and (1.5 * pair + stats + 2e9 > free or 2 * (pair + stats) > most):
        shape = replace(shape, layers=shape.layers - 1)
        pair, stats = 4 * numel(shape), stats_bytes(shape)
    say(f"{shape.layers} layers: a pair of {gb(pair)}, statistics of {gb(stats)}, {gb(free)} of disk are free")
    return shape


def numel(shape: LlamaShape) -> int:
    """Parameters, without the norms."""
    attention = shape.hidden**2 * (2 + 2 * shape.kv_heads // shape.heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.intermediate) + 2 * shape.vocab * shape.hidden


def stats_bytes(shape: LlamaShape) -> int:
    """Packed Hessians of all linear layers."""
    return shape.layers * (6 * shape.hidden**2 + 2 * shape.intermediate**2) + 2 * shape.hidden**2


def write_large(bench: Bench) -> tuple[Path, Path]:
    """The pair, on the first call."""
    folder = bench.scratch / "pair"
    if not folder.exists():
        bench.shape = fitting_shape(bench)
        say("writing the pair")
        started = perf_counter()
        write_pair(folder, bench.shape, device=str(bench.device))
        bench.found["disk"]["pair_seconds"] = perf_counter() - started
    return folder / "base", folder / "tuned"


def measure_patch(bench: Bench) -> Figures:
    """The default patch of the whole pair, with statistics for every tensor."""
    base, tuned = write_large(bench)
    stats, output = bench.scratch / "stats", bench.scratch / "patched"
    say("writing the statistics")
    write_stats(stats, bench.shape, tuned, device=str(bench.device))
    bench.free()
    files = [weights(base), weights(tuned), stats / HESSIANS]
    nbytes = files[0].stat().st_size

    def plain() -> None:
        plain_read(files)
        plain_write(bench.scratch / "plain", nbytes)

    os.sync()  # what is timed does not wait for what was written before
    say("plainly reading and writing the same")
    plain_seconds = bench.timed(plain, warm=False)
    (bench.scratch / "plain").unlink()
    os.sync()
    say("patch")
    options = PatchOptions(density=DENSITY, device=str(bench.device))
    with gpu_timeline.watched() as spans:
        report = patch_checkpoint(base, tuned, output, stats, options, progress=True)
    shutil.rmtree(output)
    shutil.rmtree(stats)
    patched = [tensor for tensor in report.tensors if tensor.patched]
    return {
        "layers": bench.shape.layers,
        "layers_asked": bench.args.layers,
        "parameters": sum(tensor.numel for tensor in patched),
        "seconds": report.seconds,
        "plain_seconds": plain_seconds,
        "stages": report.stages,
        "peak_bytes": bench.peak,
        "checkpoint_bytes": nbytes,
        "iterations": {tensor.name: tensor.iterations or 0 for tensor in report.tensors},
        "timeline": gpu_timeline.render(spans),
        "spans": gpu_timeline.totals(spans),
    }


def render_patch(found: Figures) -> str:
    """The targets one by one."""
    seconds, plain, peak = found["seconds"], found["plain_seconds"], found["peak_bytes"]
    scaled = seconds * found["layers_asked"] / found["layers"]
    share, times = seconds / found["parameters"] / PAPER_SECONDS_A_PARAMETER, seconds / plain
    rows = [
        (f"seconds, {found['layers_asked']} layers", f"{scaled:.1f}", f"{PATCH_SECONDS:g}", scaled <= PATCH_SECONDS),
        ("over plainly reading and writing", f"{times:.2f}", f"{PLAIN_RATIO:g}", times <= PLAIN_RATIO),
        ("peak device memory", gb(peak), gb(PEAK_BYTES), peak <= PEAK_BYTES),
        ("seconds a parameter over the paper's", f"{share:.4f}", "", True),
    ]
    table = markdown(
        ("patch, all tensors, density 0.1", "found", "target", ""),
        [[title, value, target, verdict(ok) if target else ""] for title, value, target, ok in rows],
    )
    spans = found["spans"]
    waits = sum(spans[name] for name in gpu_timeline.WAITS)
    return (
        f"{table}\n\n{found['layers']} layers, {found['parameters'] / 1e9:.2f}e9 parameters in {seconds:.1f} s, plain "
        f"{plain:.1f} s; at most {max(found['iterations'].values())} iterations a tensor\nfrom the first read to the "
        f"last write {spans['whole']:.1f} s: work {spans['work']:.1f}, waits for the disk {waits:.1f}, neither "
        f"{spans['whole'] - spans['work'] - waits:.1f}\n\n{found['timeline']}"
    )


# Floors.


def measure_floors(bench: Bench) -> Figures:
    """The rates of device and disk, and the least seconds of each stage of the patch that ran before."""
    patch = bench.found["patch"]
    base, tuned = write_large(bench)
    size = 1024 if bench.args.tiny else 8192
    left, right = (torch.randn(size, size, device=bench.device) for _ in range(2))
    halves = left.to(torch.bfloat16), right.to(torch.bfloat16)
    source = torch.ones(1 << (22 if bench.args.tiny else 28), device=bench.device)
    target = torch.empty_like(source)
    host = torch.ones(1 << (20 if bench.args.tiny else 26), pin_memory=bench.device.type == "cuda")
    product, half = bench.timed(lambda: left @ right, 3), bench.timed(lambda: halves[0] @ halves[1], 3)
    copied, moved = bench.timed(lambda: target.copy_(source), 3), bench.timed(lambda: host.to(bench.device), 3)
    files = [weights(base), weights(tuned)]
    read = bench.timed(lambda: plain_read(files), warm=False)
    write_rate = bench.found["disk"]["write_rate"]
    nbytes = sum(file.stat().st_size for file in files)
    rates = Rates(nbytes / read, write_rate, 2 * source.nbytes / copied, size**3 / product)
    least = floors(bench.shape, "bf16", DENSITY, patch["iterations"], rates)
    to_device = host.nbytes / max(moved, 1e-9)
    least["transfer"] = nbytes / to_device
    extra = {"bfloat16": size**3 / half, "to_device": to_device}
    return {"rates": rates.__dict__ | extra, "floors": least, "stages": patch["stages"]}


def render_floors(found: Figures) -> str:
    """Stages over floors."""
    least, stages = found["floors"], found["stages"]
    texts = FLOORS | {"transfer": "bytes of base and tuned, at the rate to the device from pinned memory"}
    rows = [
        [name, f"{stages[name]:.2f}", f"{least[name]:.3f}", f"{stages[name] / least[name]:.1f}", text]
        for name, text in texts.items()
        if name in stages
    ]
    rows += [[name, f"{seconds:.2f}", "", "", ""] for name, seconds in stages.items() if name not in texts]
    rates = found["rates"]
    return (
        markdown(("stage of patch", "seconds", "floor", "/ floor", "the floor"), rows, text=(0, 4))
        + f"\n\nrates: read {rates['read'] / 1e9:.2f} GB/s, write with fsync {rates['write'] / 1e9:.2f} GB/s, copy on "
        f"the device {rates['copy'] / 1e9:.0f} GB/s, to the device {rates['to_device'] / 1e9:.1f} GB/s, products "
        f"{rates['gemm'] / 1e12:.2f} T multiply-adds/s in float32, {rates['bfloat16'] / 1e12:.1f} T in bfloat16"
    )


# Calibration.


def measure_calibrate(bench: Bench) -> Figures:
    """The tuned model over samples against a bare forward pass; then one block's statistics block by block."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, samples = bench.scratch / "calibrated", bench.args.samples
    shape = replace(bench.shape, layers=min(bench.args.layers, CALIBRATED_LAYERS))
    _, tuned = write_pair(folder, shape, device=str(bench.device))
    write_tokenizer(tuned, shape.vocab)
    data = folder / "data.jsonl"
    write_samples(data, shape.vocab, samples, bench.args.seq_len, bench.args.seq_len)
    options = CalibrateOptions(
        num_samples=samples,
        seq_len=bench.args.seq_len,
        device=str(bench.device),
        blockwise="never",
        include=("*proj.weight", "lm_head.weight"),
        overwrite=True,
    )
    batches = batches_of(tuned, data, options)
    batches = [{name: value.to(bench.device) for name, value in batch.items()} for batch in batches]
    network = LlamaForCausalLM.from_pretrained(tuned, dtype="auto", local_files_only=True).eval().to(bench.device)
    forward_pass(network, batches[:1])
    forward = bench.timed(partial(forward_pass, network, batches), warm=False)
    del network, batches
    bench.free()
    say(f"calibrate, {samples} samples")
    report = calibrate_model(tuned, data, folder / "stats", options, progress=True)
    found: Figures = {
        "layers": shape.layers,
        "tokens": report.tokens,
        "samples": samples,
        "forward": forward,
        "seconds": report.seconds,
    }
    found |= {"stages": report.stages, "peak_bytes": bench.peak}
    bench.free()
    say("calibrate, block by block")
    few = replace(options, num_samples=8, blockwise="always", include=("*layers.0.*proj.weight",))
    blockwise = calibrate_model(tuned, data, folder / "stats", few)
    found |= {"block_seconds": blockwise.seconds, "block_tokens": blockwise.tokens, "block_peak_bytes": bench.peak}
    shutil.rmtree(folder)
    return found


def render_calibrate(found: Figures) -> str:
    """Seconds over the bare forward pass."""
    forward, stages = found["forward"], found["stages"]
    parts = (("bare forward pass", forward), ("its pass over the data", stages["run"]), ("calibrate", found["seconds"]))
    rows = [[what, f"{seconds:.2f}", f"{seconds / forward:.2f}"] for what, seconds in parts]
    table = markdown(
        (
            f"calibrate, {found['layers']} layers, {found['samples']} samples, {found['tokens']:,} tokens",
            "seconds",
            "/ forward",
        ),
        rows,
    )
    ratio = stages["run"] / forward
    return (
        f"{table}\n\nthe pass within {CALIBRATE_RATIO:g}x of the forward pass: {verdict(ratio <= CALIBRATE_RATIO)} "
        f"({ratio:.2f}x); stages: {', '.join(f'{name} {took:.1f}' for name, took in stages.items())}; peak device "
        f"memory {gb(found['peak_bytes'])}\nblock by block, {found['block_tokens']:,} tokens, one block's statistics: "
        f"{found['block_seconds']:.1f} s, peak device memory {gb(found['block_peak_bytes'])}"
    )


# Distillation.


def measure_distill(bench: Bench) -> Figures:
    """A step on a model of random weights in the shapes that were asked for, whatever the disk takes."""
    shape = replace(bench.shape, layers=bench.args.layers)
    timed, peak = partial(bench.timed, warm=True), lambda: bench.peak
    return distillation.measure(shape, bench.device, DENSITY, bench.args.tiny, timed, bench.free, peak)


# Joint and propagation.


def measure_joint(bench: Bench) -> Figures:
    """Before and now, on each shape."""

    def timed(action: Callable[[], object], rounds: int) -> float:
        return bench.timed(action, rounds)

    return gpu_joint.measure(layer_shapes(bench), DENSITY, bench.device, timed, bench.free)


def measure_propagate(bench: Bench) -> Figures:
    """Two layers, as many samples of each kind as were asked for, of a quarter of their length."""
    shape, length = replace(bench.shape, layers=2), max(32, bench.args.seq_len // 4)
    folder, device, samples = bench.scratch / "propagated", str(bench.device), bench.args.samples
    found = (bench.free, lambda: bench.peak, lambda: bench.left)
    return gpu_propagation.measure(shape, folder, device, samples, length, *found)


def measure_job(bench: Bench) -> Figures:
    """Two layers, half as many samples as were asked for, of a quarter of their length."""
    shape, length = replace(bench.shape, layers=2), max(32, bench.args.seq_len // 4)
    given = (shape, bench.scratch / "job", str(bench.device), max(8, bench.args.samples // 2), length)
    return gpu_job.measure(*given, bench.free, lambda: bench.peak)


# All of it.

MEASURE: dict[str, Callable[[Bench], Figures]] = {
    "correct": measure_correct,
    "layers": measure_layers,
    "variants": measure_variants,
    "patch": measure_patch,
    "floors": measure_floors,
    "calibrate": measure_calibrate,
    "distill": measure_distill,
    "joint": measure_joint,
    "propagate": measure_propagate,
    "job": measure_job,
}
RENDER: dict[str, Callable[[Figures], str]] = {
    "correct": render_correct,
    "layers": render_layers,
    "variants": render_variants,
    "patch": render_patch,
    "floors": render_floors,
    "calibrate": render_calibrate,
    "distill": distillation.render,
    "joint": gpu_joint.render,
    "propagate": gpu_propagation.render,
    "job": gpu_job.render,
}


def run_section(bench: Bench, name: str) -> None:
    """Measure one section; what goes wrong is what it found."""
    if not bench.args.tiny and bench.left < NEEDED[name]:
        bench.found[name] = {"failed": f"passed over: {bench.left:.0f} s were left"}
        return
    say(f"{name}: {bench.left:.0f} s left")
    started = perf_counter()
    try:
        bench.free()
        with exact_float32():
            bench.found[name] = MEASURE[name](bench)
    except Exception as error:  # the sections after it can still tell something
        bench.found[name] = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
        say(traceback.format_exc())
    bench.found[name]["section_seconds"] = perf_counter() - started


def listed(text: str) -> str:
    """Tables and drawings as they are, and every other line as an item of a list."""
    blocks = [
        "\n".join(lines if as_it_is else (f"- {line}" for line in lines if line))
        for as_it_is, lines in groupby(text.splitlines(), lambda line: line.startswith(("|", "```", "  ")))
    ]
    return "\n\n".join(block for block in blocks if block)


def in_short(bench: Bench) -> str:
    """A line for each section."""
    return "\n".join(section_in_short(bench, name) for name in (*SECTIONS, *FURTHER) if name in bench.found)


def section_in_short(bench: Bench, name: str) -> str:
    """Its seconds, and what is met and missed."""
    found = bench.found[name]
    told = found.get("failed") or "; ".join(verdicts_in(rendered(name, found))) or "measured"
    return f"{name}, {found.get('section_seconds', 0.0):.0f} s: {told}"


def verdicts_in(text: str) -> list[str]:
    """What a section says of its targets, in its table or below it."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    below = [part for line in text.splitlines() if line[:1] != "|" for part in line.split("; ")]
    judged = [f"{row[0]} {row[1]} {row[-1]}" for row in rows if row[-1] in ("met", "missed")]
    return judged + [part for part in below if re.search(r"\b(met|missed)\b", part)]


def rendered(name: str, found: Figures) -> str:
    """A section's text; figures that no table was made for are still in the JSON."""
    try:
        return RENDER[name](found)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def document(bench: Bench) -> str:
    """The page as far as it is known."""
    parts = ["# On a GPU\n\nWritten by `python -m benchmarks.gpu` (`make bench-gpu`).", listed(in_short(bench))]
    for name in (*SECTIONS, *FURTHER):
        if name not in bench.found:
            continue
        found = bench.found[name]
        parts.append(f"## {name.capitalize()}")
        parts.append(found["failed"] if "failed" in found else listed(rendered(name, found)))
    cuda = bench.device.type == "cuda"
    device = f"{torch.cuda.get_device_name(bench.device)}, CUDA {torch.version.cuda}" if cuda else "cpu"
    shape = bench.shape
    parts.append(
        f"device {device}; hidden {shape.hidden}, intermediate {shape.intermediate}, vocabulary {shape.vocab}, "
        f"{shape.layers} of {bench.args.layers} layers, bf16, density {DENSITY}, one run of "
        f"{perf_counter() - bench.started:.0f} s; {describe(environment())}"
    )
    parts[-1] = listed("\n".join(parts[-1].split("; ")))
    return reflow("\n\n".join(parts) + "\n")


def parse() -> argparse.Namespace:
    options = parser("benchmarks.gpu", __doc__)
    options.add_argument("file", type=Path, nargs="?", metavar="FILE", help="Markdown; $OUT/gpu.md without it")
    options.add_argument("--device", default="cuda")
    choices = (*SECTIONS, *FURTHER)
    options.add_argument("--sections", "--only", nargs="+", choices=choices, default=list(SECTIONS))
    options.add_argument("--tiny", action="store_true", help="small shapes: to try the script itself")
    options.add_argument("--budget", type=float, default=510.0, help="seconds; later sections are passed over")
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--hidden", type=int, default=4096)
    options.add_argument("--intermediate", type=int, default=11008)
    options.add_argument("--vocab", type=int, default=32000)
    options.add_argument("--samples", type=int, default=128)
    options.add_argument("--seq-len", type=int, default=2048)
    options.add_argument("--dir", type=Path, help="where the temporary folder goes")
    args = options.parse_args()
    if args.tiny:
        args.layers, args.hidden, args.intermediate, args.vocab = 2, 256, 704, 1024
        args.samples, args.seq_len = 16, 128
    return args


def main() -> None:
    """Measure section by section, write the page after each, print it last."""
    args = parse()
    use_threads(args.threads)
    out = os.environ.get("OUT")
    target = args.file or (Path(out) / "gpu.md" if out else None)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"this torch ({torch.__version__}) sees no CUDA device; --device cpu --tiny tries the script")
    shape = LlamaShape(args.layers, args.hidden, args.intermediate, args.vocab, head_size=128, sharing=1)
    with TemporaryDirectory(prefix="tailorcli-gpu-", dir=args.dir or gettempdir()) as scratch:
        bench = Bench(args, device, Path(scratch), shape)
        for name in args.sections:
            run_section(bench, name)
            say(section_in_short(bench, name))
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(document(bench), encoding="utf-8")
                write_json(args.json or target.with_suffix(".json"), json.loads(json.dumps(bench.found, default=str)))
    print(document(bench))


if __name__ == "__main__":
    main()
