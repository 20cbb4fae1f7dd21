"""Patch files and stitching: how large a patch is, what apply and verify cost, what memory a merge takes.

On random Llama-shaped pairs, patched by salience alone. The size target is 0.18 of the checkpoint at density 0.1 in
bfloat16. ``apply`` and ``verify`` are timed as whole processes against plainly reading the same files (and writing
and syncing the output); ``merge-multi --method joint`` of two tasks is compared with ``patch`` by peak memory, which
is the kernel's ru_maxrss.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

from benchmarks.common import (
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
from benchmarks.synthetic import DTYPES, LlamaShape, write_pair, write_stats
from benchmarks.throughput import plain_read, plain_write, weights
from tailorcli import PatchFile

SIZE_TARGET = 0.18
TIME_TARGETS = {"apply": 3.0, "verify": 8.0}  # the whole process over plainly reading and writing the same
SALIENCE = ("--solver", "none", "--omega", "1")


def tailor(scratch: Path, *arguments: object) -> Any:
    """Run the command in a process of its own; its JSON and its figures."""
    return run_python(["-m", "tailorcli", *map(str, arguments), "--json"], scratch)


def measure_sizes(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Patch files over densities and dtypes."""
    shape = LlamaShape(1, args.hidden, args.intermediate, args.vocab)
    rows = []
    for dtype in DTYPES:
        base, tuned = write_pair(scratch / dtype, shape, dtype)
        whole = weights(base).stat().st_size
        for density in args.densities:
            say(f"size: {dtype}, density {density}")
            file = scratch / "size.safetensors"
            tailor(scratch, "patch", base, tuned, "--patch-file", file, *SALIENCE, "--density", density, "--overwrite")
            with PatchFile.open(file) as patch:
                codings = Counter(tensor.coding for tensor in patch.tensors.values())
                kept = sum(tensor.kept for tensor in patch.tensors.values())
                values = kept * (2 if dtype == "bf16" else 4)
            found = {"dtype": dtype, "density": density, "share": file.stat().st_size / whole, "codings": dict(codings)}
            entries = whole / (2 if dtype == "bf16" else 4)
            rows.append(found | {"mask_bits": 8 * (file.stat().st_size - values) / entries})
        shutil.rmtree(scratch / dtype)
    return rows


def measure_apply(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """``apply`` and ``verify`` against their floors, and ``patch`` with and without a patch file."""
    shape = LlamaShape(args.layers, args.hidden, args.intermediate, args.vocab)
    base, tuned = write_pair(scratch / "pair", shape, "bf16")
    patch_file, out, copy = scratch / "patch.safetensors", scratch / "out", scratch / "copy"
    nbytes = weights(base).stat().st_size
    tailor(scratch, "patch", base, tuned, "--patch-file", patch_file, *SALIENCE)

    processor: dict[str, list[float]] = {}

    def spent(name: str, seconds: float) -> None:
        processor.setdefault(name, []).append(seconds)

    def apply() -> None:
        done = tailor(scratch, "apply", base, patch_file, "-o", out, "--overwrite")
        spent("apply", done.processor_seconds)

    def verify() -> None:
        done = tailor(scratch, "verify", out, "--base", base, "--patch", patch_file)
        spent("verify", done.processor_seconds)

    def patch_out() -> None:
        tailor(scratch, "patch", base, tuned, "-o", scratch / "patched", *SALIENCE, "--overwrite")

    def patch_to_file() -> None:
        tailor(scratch, "patch", base, tuned, "--patch-file", scratch / "again.safetensors", *SALIENCE, "--overwrite")

    def apply_floor() -> None:
        began = process_time()
        plain_read([weights(base), patch_file])
        plain_write(copy, nbytes)
        spent("apply floor", process_time() - began)

    def verify_floor() -> None:
        began = process_time()
        plain_read([weights(base), weights(out), patch_file])
        spent("verify floor", process_time() - began)

    def start() -> None:
        spent("start", run_python(["-m", "tailorcli", "--version"], scratch).processor_seconds)

    say("apply and verify")
    actions: dict[str, Callable[[], object]] = {
        "start": start,
        "apply": apply,
        "apply floor": apply_floor,
        "verify": verify,
        "verify floor": verify_floor,
        "patch -o": patch_out,
        "patch --patch-file": patch_to_file,
    }
    seconds = interleaved(actions, args.rounds)
    shutil.rmtree(scratch / "pair")
    medians = {name: median(found[1:]) for name, found in processor.items()}
    return {"bytes": nbytes, "layers": args.layers, "seconds": seconds, "processor_seconds": medians}


def measure_merge(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Peak memory of a joint merge of two tasks at several depths, and of ``patch``, each with the plan's estimate."""
    rows = []
    for layers in args.depths:
        say(f"merge: {layers} layers")
        shape = LlamaShape(layers, args.hidden, args.intermediate, args.vocab)
        folder = scratch / "merge"
        base, one = write_pair(folder / "first", shape, "bf16", seed=0)
        _, two = write_pair(folder / "second", shape, "bf16", seed=1)
        # The same base for both: the second fine-tune differs from it by more, which is all the same here.
        command: list[object] = ["merge-multi", base]
        models: list[object] = []
        for name, tuned in (("one", one), ("two", two)):
            file, stats = folder / f"{name}.safetensors", write_stats(folder / f"{name}-stats", shape, tuned)
            tailor(scratch, "patch", base, tuned, "--patch-file", file, *SALIENCE, "--density", 0.05)
            command.append(file)
            models += ["--tuned", tuned, "--stats", stats]
        command += models
        command += ["-o", folder / "out", "--method", "joint"]
        single = ["patch", base, one, "--stats", folder / "one-stats", "-o", folder / "single"]
        for label, arguments in (("patch", single), ("merge-multi", command)):
            estimate = json.loads(tailor(scratch, *arguments, "--dry-run").stdout)["peak_memory_bytes"]
            done = tailor(scratch, *arguments)
            rows.append({"command": label, "layers": layers, "peak": done.peak_bytes, "estimate": estimate})
        shutil.rmtree(folder)
    return rows


def render(figures: dict[str, Any]) -> str:
    """The tables."""
    sizes = [
        [
            row["dtype"],
            f"{row['density']:g}",
            f"{row['share']:.3f}",
            f"{row['mask_bits']:.3f}",
            ", ".join(f"{coding} {count}" for coding, count in row["codings"].items()),
        ]
        for row in figures["sizes"]
    ]
    target = next(r["share"] for r in figures["sizes"] if (r["dtype"], r["density"]) == ("bf16", 0.1))
    applied = figures["apply"]
    seconds = applied["seconds"]
    rows, judged = [["start: --version", f"{median(seconds['start']):.2f}", "", "", ""]], []
    for name, floor in (("apply", "apply floor"), ("verify", "verify floor"), ("patch --patch-file", "patch -o")):
        times = [f"{median(seconds[which]):.2f}" for which in (name, floor)]
        found = ratio(seconds[name], seconds[floor])
        rows.append([name, times[0], floor, times[1], f"{found:.2f}"])
        if name in TIME_TARGETS:
            least = TIME_TARGETS[name]
            judged.append(f"{name} within {least:g}x: {verdict(found <= least)} ({found:.2f}x)")
    merged = [
        [row["command"], str(row["layers"]), f"{row['peak'] / 1e6:.0f}", f"{row['estimate'] / 1e6:.0f}"]
        for row in figures["merge"]
    ]
    spent = ", ".join(f"{name} {found:.2f}" for name, found in applied["processor_seconds"].items())
    parts = [
        markdown(["dtype", "density", "patch / checkpoint", "mask, bits an entry", "tensors by coding"], sizes, (0, 4)),
        f"bf16 at density 0.1: {target:.3f} of the checkpoint, at most {SIZE_TARGET}: {verdict(target <= SIZE_TARGET)}",
        markdown(["command", "seconds", "baseline", "seconds", "ratio"], rows, (0, 2)),
        f"{applied['layers']} layers, {applied['bytes'] / 1e9:.2f} GB in bf16; whole processes, "
        "floors plainly read and write the same",
        "; ".join(judged),
        f"in the processor's seconds: {spent}",
        *_beside(figures["environment"]),
        markdown(["command", "layers", "peak, MB", "estimate of --dry-run, MB"], merged),
        describe(figures["environment"]),
    ]
    return "\n\n".join(parts)


def _beside(facts: dict[str, Any]) -> list[str]:
    """A remark where other programs ran: a floor is one thread that never waits for another, a command is several."""
    if facts["load_average"] <= 1:
        return []
    return [
        f"other programs kept the {facts['cores']} cores busy: a load average of {facts['load_average']} before this "
        "began; it weighs more on commands of several threads than on floors of one"
    ]


def main() -> None:
    """Measure and print."""
    made = parser("benchmarks.patchfile", __doc__)
    made.add_argument("--densities", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.2, 0.5])
    made.add_argument("--layers", type=int, default=16)
    made.add_argument("--depths", type=int, nargs="+", default=[2, 8])
    made.add_argument("--hidden", type=int, default=1024)
    made.add_argument("--intermediate", type=int, default=2816)
    made.add_argument("--vocab", type=int, default=4096)
    made.add_argument("--rounds", type=int, default=3)
    args = made.parse_args()
    use_threads(args.threads)
    with TemporaryDirectory(prefix="tailorcli-") as name:
        scratch = Path(name)
        figures = {
            "environment": environment(),
            "sizes": measure_sizes(args, scratch),
            "apply": measure_apply(args, scratch),
            "merge": measure_merge(args, scratch),
        }
    write_json(args.json, figures)
    print(render(figures))


if __name__ == "__main__":
    main()
