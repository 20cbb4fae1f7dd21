"""The recommended way on two layers in the shapes of a 7B: calibrate both models, patch, propagate."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import markdown, say, verdict
from benchmarks.synthetic import LlamaShape, write_pair, write_samples, write_tokenizer
from benchmarks.throughput import weights
from tailorcli import calibrate_model, patch_checkpoint
from tailorcli.device import attention_without_cudnn
from tailorcli.files import file_digest
from tailorcli.models import spill
from tailorcli.options import CalibrateOptions, PatchOptions

SECONDS = 15.0
FURTHER = 75.0  # seconds that must be left for the comparison with pinned memory
Figures = dict[str, Any]


def measure(
    shape: LlamaShape, folder: Path, device: str, samples: int, length: int, free: Callable[[], None],
    peak: Callable[[], int], left: Callable[[], float],
) -> Figures:  # fmt: skip
    """Seconds and stages with states where they fit, and the same bytes with fewer samples in pinned memory."""
    import transformers  # noqa: F401  # so that no stage waits for it

    say("writing the pair")
    base, tuned = write_pair(folder, shape, device=device)
    for number, model in enumerate((base, tuned)):
        write_tokenizer(model, shape.vocab)
        write_samples(folder / f"{number}.jsonl", shape.vocab, samples, length, length)
    found: Figures = {"layers": shape.layers, "samples": samples, "length": length}
    found["threads"] = list(_of_new_threads(device).items())
    few = max(8, samples // 4)
    for count in (samples, few):
        if count == few and left() < FURTHER:
            break
        options = CalibrateOptions(device=device, num_samples=count, seq_len=length, blockwise="never", overwrite=True)
        for number, model in enumerate((base, tuned)):
            say(f"calibrate {model.name}, {count} samples")
            report = calibrate_model(model, folder / f"{number}.jsonl", folder / f"stats-{number}", options)
            found[f"{model.name} {count}"] = {"seconds": report.seconds, "stages": report.stages}
        # The second run finds the device's memory mapped already, as all blocks of a deep model but the first do.
        ways = {"on the device": spill.DEVICE_SHARE, "again": spill.DEVICE_SHARE}
        if count == few:
            ways = {"on the device": spill.DEVICE_SHARE, "in pinned memory": 0.0}
        digests = []
        free()
        for way, share in ways.items():
            name = f"{count} samples, states {way}"
            say(f"patch, {name}")
            with patch.object(spill, "DEVICE_SHARE", share):
                found[name] = _patch(folder, base, tuned, device) | {"peak": peak()}
            digests.append(file_digest(weights(folder / "patched")))
        found[f"same {count}"] = len(set(digests)) == 1
    shutil.rmtree(folder)
    return found


def _of_new_threads(device: str) -> dict[str, float]:
    """Seconds of what a batch's thread does first: a product, attention as the models run it, and as torch chooses."""
    x = torch.ones(4, 8, 512, 128, dtype=torch.bfloat16, device=device)

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    def attend_as_models_do() -> None:
        with attention_without_cudnn():
            attend()

    works = {"product": lambda: x @ x.mT, "attention": attend_as_models_do, "attention as torch chooses": attend}
    return {name: median(_in_living_threads(work, device)) for name, work in works.items()}


def _in_living_threads(work: Callable[[], object], device: str) -> list[float]:
    """Seconds of a call in each of several threads, one after another, which all live on; the first does not count."""
    seconds: list[float] = []
    over = threading.Event()

    def timed(done: threading.Event) -> None:
        begun = perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - begun)
        done.set()
        over.wait()

    threads = []
    for _ in range(4):
        done = threading.Event()
        threads.append(threading.Thread(target=timed, args=(done,)))
        threads[-1].start()
        done.wait(60)
    over.set()
    for thread in threads:
        thread.join()
    return seconds[1:]


def _patch(folder: Path, base: Path, tuned: Path, device: str) -> Figures:
    options = replace(PatchOptions(device=device), overwrite=True)
    output, retain = folder / "patched", folder / "stats-0"
    report = patch_checkpoint(base, tuned, output, folder / "stats-1", options, retain=retain)
    return {"seconds": report.seconds, "stages": report.stages}


def render(found: Figures) -> str:
    """Seconds by stage."""
    runs = {name: value for name, value in found.items() if isinstance(value, dict)}
    rows = [
        [
            name,
            f"{run['seconds']:.1f}",
            ", ".join(f"{stage} {took:.1f}" for stage, took in run["stages"].items() if took >= 0.05),
            f"{run['peak'] / 1e9:.1f} GB" if "peak" in run else "",
        ]
        for name, run in runs.items()
    ]
    whole = found[f"{found['samples']} samples, states on the device"]["seconds"]
    table = markdown(
        (f"{found['layers']} layers, samples of {found['length']}", "seconds", "stages", "peak"), rows, text=(0, 2)
    )
    few = max(8, found["samples"] // 4)
    samples, layers = found["samples"], found["layers"]
    again = found[f"{samples} samples, states again"]["seconds"]
    same, pinned = found[f"same {samples}"], found.get(f"same {few}", "not tried")
    firsts = ", ".join(f"{name} {1e3 * took:.1f} ms" for name, took in found["threads"])
    return (
        f"a new thread's first calls: {firsts}\n\n{table}\n\nat most {SECONDS:g} s: {verdict(whole <= SECONDS)} "
        f"({whole:.1f}, again {again:.1f}); 32 layers at most {32 * again / layers:.0f} s by the second run; the same "
        f"bytes again: {same}, and from pinned memory: {pinned}"
    )
