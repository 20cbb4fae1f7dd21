"""``patch --data`` in one pass beside its three steps, and what a model writes a second, two layers of a 7B's shape."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.common import markdown, say
from benchmarks.synthetic import LlamaShape, write_pair, write_samples, write_tokenizer
from benchmarks.throughput import weights
from tailorcli import tailor
from tailorcli.files import file_digest
from tailorcli.options import CalibrateOptions, PatchOptions

Figures = dict[str, Any]
WRITTEN = 128  # tokens of a sample that is written


def measure(
    shape: LlamaShape, folder: Path, device: str, samples: int, length: int, free: Callable[[], None],
    peak: Callable[[], int],
) -> Figures:  # fmt: skip
    """Seconds and peak of both ways, whether their bytes are the same, and tokens written a second."""
    say("writing the pair")
    base, tuned = write_pair(folder, shape, device=device)
    for model in (base, tuned):
        write_tokenizer(model, shape.vocab)
    data = folder / "data.jsonl"
    write_samples(data, shape.vocab, samples, length, length)
    found: Figures = {"layers": shape.layers, "samples": samples, "length": length}
    found["writing"] = _writing(base, device, samples)
    free()
    digests = []
    # What a process does once, such as compiling kernels, is in neither: the first run is not counted.
    for way, kept, count in (("", None, 8), ("one pass", None, samples), ("three steps", folder / "kept", samples)):
        say(way or "once, not counted")
        output = folder / "patched"
        given: dict[str, Any] = {
            "retain_data": data,
            "options": PatchOptions(device=device),
            "calibration": CalibrateOptions(num_samples=count, seq_len=length),
        }
        report = tailor(base, tuned, output, data, keep_stats=kept, **given)
        if way:
            found[way] = {"seconds": report.seconds, "stages": report.stages, "peak": peak()}
            digests.append(file_digest(weights(output)))
        shutil.rmtree(output)
        free()
    found["same"] = digests[0] == digests[1]
    shutil.rmtree(folder)
    return found


def _writing(base: Path, device: str, samples: int) -> Figures:
    """Tokens a second of transformers' own ``generate``, 32 samples at a time, and of what calibrate does."""
    import torch
    import transformers

    from tailorcli.calibration.synthetic import write_samples as write
    from tailorcli.models.generation import samples_together, sampling_generation
    from tailorcli.terminal import Progress

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    network = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto").to(device).eval()
    where = torch.device(device)
    options = CalibrateOptions(synthetic=True, num_samples=samples, seq_len=WRITTEN)

    def plain() -> None:
        for start in range(0, samples, 32):
            ids = torch.full((min(32, samples - start), 1), 5, device=device)
            with torch.no_grad(), sampling_generation(network, WRITTEN - 1) as settings:
                mask = torch.ones_like(ids)
                network.generate(input_ids=ids, attention_mask=mask, generation_config=settings).cpu()

    def ours() -> None:
        with Progress("writing", 1, "tokens", shown=False) as bar:
            write(network, tokenizer, options, where, bar)

    found: Figures = {"together": samples_together(network, where, WRITTEN)}
    for name, work in (("generate", plain), ("calibrate", ours)):
        say(f"{samples} samples written by {name}")
        begun = perf_counter()
        work()
        found[name] = samples * (WRITTEN - 1) / (perf_counter() - begun)
    return found


def render(found: Figures) -> str:
    """Both ways by stage, and the tokens."""
    rows = []
    for way in ("three steps", "one pass"):
        run = found[way]
        stages = ", ".join(f"{stage} {took:.1f}" for stage, took in run["stages"].items() if took >= 0.05)
        ratio = run["seconds"] / found["three steps"]["seconds"]
        rows.append([way, f"{run['seconds']:.1f}", f"{ratio:.2f}", f"{run['peak'] / 1e9:.1f} GB", stages])
    columns = (f"{found['layers']} layers, {found['samples']} samples of {found['length']}", "seconds", "ratio")
    table = markdown((*columns, "peak", "stages"), rows, text=(0, 4))
    written = found["writing"]
    return (
        f"{table}\n\nthe same bytes: {found['same']}\n"
        f"tokens a second that the base writes: {written['calibrate']:,.0f}, up to {written['together']} samples at a "
        f"time; transformers' generate, 32 at a time, {written['generate']:,.0f}"
    )
