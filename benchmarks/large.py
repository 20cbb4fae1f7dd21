"""A pair of checkpoints larger than this machine's memory: calibrate block by block, patch, verify.

A random pair in the shapes of Llama-2-7B is written shard by shard (two checkpoints of 13.5 GB), then commands run in
processes of their own, each with its peak resident memory (the kernel's ru_maxrss; the page cache is not in it):

- calibrate   with ``--blockwise auto``, all linear layers of all blocks; it has to find out by itself that the model
              and its Hessians do not fit. The bound on its memory: what torch and transformers take, embeddings and
              head, one block's weights twice, its Hessians, and the largest of them once more, packed.
- patch       the default solver on all layers of a few blocks (``--patch-blocks``) with these statistics; the other
              tensors stay at base. Its bound is the plan's own estimate (``--dry-run --json``).
- salience    ``patch --solver none --omega 1`` on every tensor of the pair.

Each output is checked: by ``tailorcli verify``, and entry by entry on a few tensors. Everything lies in a temporary
folder; if the disk is too small for all of it, the model gets fewer layers, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch

from benchmarks.common import (
    Finished,
    describe,
    environment,
    markdown,
    parser,
    run_python,
    say,
    use_threads,
    verdict,
    write_json,
)
from benchmarks.synthetic import LlamaShape, parameters, write_pair, write_samples, write_tokenizer
from tailorcli.checkpoint.folder import Checkpoint

ITEM = 2  # bytes of a bfloat16
SHARD = 5 * 10**9
SPARE_DISK = 3 * 10**9  # left free
CALIBRATE_RUNTIME = 800 * 10**6  # an interpreter with torch and transformers loaded, and what a forward pass needs
SALIENCE = ("--solver", "none", "--omega", "1")

# calibrate's own command prints no announcement beside --json.
_CALIBRATE = """
import json, sys
from tailorcli import calibrate_model
from tailorcli.options import CalibrateOptions
model, data, output, options = sys.argv[1:]
tell = lambda text: print(text, file=sys.stderr)
report = calibrate_model(model, data, output, CalibrateOptions(**json.loads(options)), announce=tell)
print(json.dumps(report.to_dict()))
"""


def checkpoint_bytes(shape: LlamaShape) -> int:
    """Bytes of one checkpoint."""
    return ITEM * sum(parameter.numel for parameter in parameters(shape))


def hessian_bytes(shape: LlamaShape, block: str = "") -> list[int]:
    """Bytes of each distinct Hessian of the linear layers in memory, of all blocks or of one."""
    found = {p.hessian: 4 * p.shape[1] ** 2 for p in parameters(shape) if p.role == "linear" and block in p.name}
    return list(found.values())


def disk_bytes(shape: LlamaShape) -> int:
    """Disk that everything takes at once: the pair, one output, packed Hessians."""
    return 3 * checkpoint_bytes(shape) + sum(hessian_bytes(shape)) // 2 + SPARE_DISK


def calibrate_bound(shape: LlamaShape) -> int:
    """What a calibration block by block may need: nothing in it grows with the number of layers."""
    block = ITEM * sum(p.numel for p in parameters(shape) if ".layers.0." in p.name)
    around = ITEM * sum(p.numel for p in parameters(shape) if ".layers." not in p.name)
    hessians = hessian_bytes(shape, ".layers.0.")
    head = 4 * shape.hidden**2  # the output head's own Hessian
    return CALIBRATE_RUNTIME + around + head + 2 * block + sum(hessians) + max(hessians) // 2


def fit_disk(shape: LlamaShape, free: int) -> LlamaShape:
    """The shape with as many layers as the disk has room for, not more than asked for."""
    layers = shape.layers
    while layers > 2 and disk_bytes(replace(shape, layers=layers)) > free:
        layers -= 1
    fitting = replace(shape, layers=layers)
    say(f"{layers} of {shape.layers} layers: {gb(disk_bytes(fitting))} of disk are needed, {gb(free)} are free")
    if disk_bytes(fitting) > free:
        raise SystemExit("not enough disk")
    return fitting


def memory_total() -> int:
    """Bytes of this machine's memory."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))


def gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def write_inputs(folder: Path, shape: LlamaShape, args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """The pair, with a tokenizer, and the samples."""
    say(f"writing two checkpoints of {gb(checkpoint_bytes(shape))}")
    base, tuned = write_pair(folder, shape, max_shard_size=SHARD)
    for path in (base, tuned):
        write_tokenizer(path, shape.vocab)
    data = folder / "data.jsonl"
    write_samples(data, shape.vocab, args.samples, args.seq_len, args.seq_len)
    return base, tuned, data


def calibrate(tuned: Path, data: Path, stats: Path, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All linear layers; block by block even where the machine is so large that ``auto`` sees no need for it."""
    options: dict[str, Any] = {"num_samples": args.samples, "seq_len": args.seq_len, "dtype": args.calibrate_dtype}
    options |= {"include": ["*proj.weight", "lm_head.weight"], "device": "cpu", "overwrite": True}
    found: dict[str, Any] = {}
    for blockwise in ("auto", "always"):
        say(f"calibrate, blockwise {blockwise}")
        command = ["-c", _CALIBRATE, str(tuned), str(data), str(stats), json.dumps(options | {"blockwise": blockwise})]
        done = run_python(command, scratch)
        report = json.loads(done.stdout)
        found = outcome(done, report) | {key: report[key] for key in ("tokens", "hessians", "calibrated", "blockwise")}
        found |= {"asked": blockwise, "stats_bytes": report["bytes"], "announced": done.stderr.strip()}
        if report["blockwise"]:
            break
    return found


def outcome(done: Finished, report: dict[str, Any]) -> dict[str, Any]:
    """What every command has: seconds, peak, stages."""
    return {"seconds": done.seconds, "peak_bytes": done.peak_bytes, "stages": report["stages"]}


def patch(pair: Sequence[Path], options: Sequence[str], names: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Plan, patch, verify with ``tailorcli verify``, look at ``names`` entry by entry, remove the output."""
    output = scratch / "patched"
    command = ["-m", "tailorcli", "patch", *map(str, pair), "-o", str(output), "--device", "cpu", "--json", *options]
    plan = json.loads(run_python([*command, "--dry-run"], scratch).stdout)
    say(f"patch {' '.join(options[-4:])}: up to {gb(plan['peak_memory_bytes'])} by its plan")
    done = run_python(command, scratch)
    report = json.loads(done.stdout)
    say("verify")
    verified = run_python(["-m", "tailorcli", "verify", str(output), "--base", str(pair[0]), "--json"], scratch)
    checks = {name: check_tensor(name, *pair, output) for name in names}
    shutil.rmtree(output)
    patched = [tensor for tensor in report["tensors"] if tensor["status"] == "patched"]
    errors = [tensor["error_after"] / tensor["error_before"] for tensor in patched if tensor.get("error_before")]
    return outcome(done, report) | {
        "estimated_bytes": plan["peak_memory_bytes"],
        "read_bytes": plan["read_bytes"],
        "write_bytes": plan["write_bytes"],
        "patched": len(patched),
        "kept": sum(tensor["kept"] for tensor in patched),
        "error_after_over_before": sum(errors) / len(errors) if errors else None,
        "verify_seconds": verified.seconds,
        "verify_peak_bytes": verified.peak_bytes,
        "checks": checks,
    }


def check_tensor(name: str, *folders: Path) -> dict[str, float]:
    """One tensor in base, tuned and output: entries that are of neither, and the least salience that was kept."""
    values = []
    for folder in folders:
        with Checkpoint.open(folder) as checkpoint:
            values.append(checkpoint.read(name))
    before, after, out = values
    moved = out != before
    delta = (after.float() - before.float()).abs()
    return {
        "changed": int(moved.sum()) / moved.numel(),
        "neither": int((moved & (out != after)).sum()) / moved.numel(),
        "least_kept": float(delta[moved].min()) if bool(moved.any()) else 0.0,
        "most_put_back": float(delta[~moved].max()),
    }


def measure(shape: LlamaShape, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every step, one after the other."""
    base, tuned, data = write_inputs(scratch, shape, args)
    stats = scratch / "stats"
    blocks = sorted({round(i * (shape.layers - 1) / max(1, args.patch_blocks - 1)) for i in range(args.patch_blocks)})
    include = [part for block in blocks for part in ("--include", f"model.layers.{block}.*")]
    query, norm = (f"model.layers.{blocks[0]}.{part}.weight" for part in ("self_attn.q_proj", "input_layernorm"))
    figures: dict[str, Any] = {"shape": asdict(shape), "blocks": blocks, "checkpoint_bytes": checkpoint_bytes(shape)}
    figures["calibrate"] = calibrate(tuned, data, stats, args, scratch) | {"bound_bytes": calibrate_bound(shape)}
    figures["patch"] = patch((base, tuned), ["--stats", str(stats), *include], [query, norm], scratch)
    shutil.rmtree(stats)
    figures["salience"] = patch((base, tuned), SALIENCE, [query, norm, "lm_head.weight"], scratch)
    return figures


def render(figures: dict[str, Any]) -> str:
    """The tables, and how the bounds came out."""
    shape, found = figures["shape"], figures["calibrate"]
    pair, memory = 2 * figures["checkpoint_bytes"], figures["memory_total"]
    rows = [
        _row(f"calibrate, {found['tokens']} tokens, {found['calibrated']} tensors", found, found["bound_bytes"], pair)
    ]
    for name, what in (("patch", "patch, joint"), ("salience", "patch --solver none --omega 1")):
        part = figures[name]
        rows.append(_row(f"{what}, {part['patched']} tensors", part, part["estimated_bytes"], pair))
        rows.append(["its output: verify", f"{part['verify_seconds']:.0f}", gb(part["verify_peak_bytes"]), "", ""])
    table = markdown(("command", "seconds", "peak", "its bound", "peak / pair"), rows)
    return "\n".join(
        (
            f"the pair: {gb(pair)}, {pair / memory:.2f} times the machine's memory of {gb(memory)}; statistics "
            f"{gb(found['stats_bytes'])}",
            "",
            table,
            "",
            *_remarks(figures),
            *(_stages(name, figures[name]) for name in ("calibrate", "patch", "salience")),
            f"hidden {shape['hidden']}, intermediate {shape['intermediate']}, {shape['layers']} of "
            f"{figures['layers_asked']} layers (as the disk allows), heads of {shape['head_size']}, vocabulary "
            f"{shape['vocab']}, bf16, density 0.1, one run; {describe(figures['environment'])}",
        )
    )


def _row(title: str, part: dict[str, Any], bound: int, pair: int) -> list[str]:
    peak = part["peak_bytes"]
    return [title, f"{part['seconds']:.0f}", gb(peak), gb(bound), f"{peak / pair:.3f}"]


def _remarks(figures: dict[str, Any]) -> list[str]:
    """One line a finding."""
    found, joint, salience = figures["calibrate"], figures["patch"], figures["salience"]
    within = found["peak_bytes"] <= found["bound_bytes"]
    covered = all(part["peak_bytes"] <= part["estimated_bytes"] for part in (joint, salience))
    chosen = "by itself" if found["asked"] == "auto" else "only when told to"
    sound = all(c["neither"] == 0.0 and c["least_kept"] >= c["most_put_back"] for c in salience["checks"].values())
    untouched = joint["kept"] > 0 and all(c["changed"] <= 0.101 for c in joint["checks"].values())
    return [
        f"calibrate went block by block {chosen}: {found['announced'] or 'no announcement'}",
        f"calibrate below runtime + embeddings and head + 2 x a block + its Hessians + one packed: {verdict(within)}",
        f"patch below its plan's estimate: {verdict(covered)}",
        f"salience: every changed entry of the tensors looked at is the tuned model's, and none put back was moved "
        f"further than one kept: {verdict(sound)}",
        f"joint, blocks {', '.join(map(str, figures['blocks']))}: at most the density of the tensors looked at has "
        f"changed: {verdict(untouched)}; layer error after / before compensation "
        f"{joint['error_after_over_before']:.2f}",
        "",
    ]


def _stages(name: str, part: dict[str, Any]) -> str:
    return f"stages of {name}, seconds: " + ", ".join(f"{key} {value:.1f}" for key, value in part["stages"].items())


def parse() -> argparse.Namespace:
    options = parser("benchmarks.large", __doc__)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--hidden", type=int, default=4096)
    options.add_argument("--intermediate", type=int, default=11008)
    options.add_argument("--vocab", type=int, default=32000)
    options.add_argument("--samples", type=int, default=4)
    options.add_argument("--seq-len", type=int, default=128)
    options.add_argument("--calibrate-dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    options.add_argument("--patch-blocks", type=int, default=2, help="blocks that the joint patch works on")
    options.add_argument("--dir", type=Path, help="where the temporary folder goes")
    return options.parse_args()


def main() -> None:
    """Measure, print the table, write the JSON."""
    args = parse()
    use_threads(args.threads)
    asked = LlamaShape(args.layers, args.hidden, args.intermediate, args.vocab, head_size=128, sharing=1)
    shape = fit_disk(asked, shutil.disk_usage(args.dir or gettempdir()).free)
    with TemporaryDirectory(prefix="tailorcli-large-", dir=args.dir) as scratch:
        figures = measure(shape, args, Path(scratch))
    figures |= {"layers_asked": args.layers, "memory_total": memory_total(), "environment": environment()}
    figures["torch"] = torch.__version__
    write_json(args.json, figures)
    print(render(figures))


if __name__ == "__main__":
    main()
