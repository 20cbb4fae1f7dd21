"""``tailorcli patch --data`` in one pass beside the three commands that it replaces: time, memory, disk, bytes.

Every command runs in a process of its own, turn by turn. *Processor* is user and system time, which is what the wall
comes to on a machine that does nothing else. Memory is the kernel's ru_maxrss. The demo's pair is trained first, or
taken from ``--demo``; the other one is random, in the shapes of a Llama.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import describe, environment, markdown, parser, run_python, say, use_threads, write_json
from benchmarks.pages import reflow
from tailorcli.units import counted

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results" / "one-pass.md"
WAYS = ("three commands", "one pass")

HEAD = """# One pass

Written by `python -m benchmarks.onepass`: `patch --data`, which calibrates and patches block by block
with no statistics on disk, beside `calibrate` twice and `patch --stats --retain`, turn by turn. Of
the three commands memory is that of the one that takes most. *Written* is what lies on the disk
besides the output while it is made.

"""


def timed(words: list[str], scratch: Path) -> dict[str, float]:
    """Wall seconds, processor seconds and peak memory of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_python(["-m", "tailorcli", *words, "--quiet", "--device", "cpu"], scratch)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": done.seconds, "processor": used, "peak": done.peak_bytes}


def folder_bytes(*folders: Path) -> int:
    """Bytes of all files in these folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def one_pass(pair: dict[str, Any], more: list[str], scratch: Path) -> dict[str, float]:
    """The whole job in one command."""
    retained = ["--retain-data", str(pair["data"])] if pair["retain_data"] else []
    words = ["patch", str(pair["base"]), str(pair["tuned"]), "--data", str(pair["data"]), *retained, *pair["size"]]
    return timed([*words, *more, "-o", str(scratch / "one")], scratch) | {"written": 0}


def three_commands(pair: dict[str, Any], more: list[str], scratch: Path) -> dict[str, float]:
    """The same, step by step."""
    stats, retained = scratch / "stats", scratch / "base-stats"
    data = ["--data", str(pair["data"])]
    whose = data if pair["retain_data"] else ["--synthetic"]
    commands = [
        ["calibrate", str(pair["tuned"]), *data, *pair["size"], "-o", str(stats)],
        ["calibrate", str(pair["base"]), *whose, *pair["size"], "-o", str(retained)],
        ["patch", str(pair["base"]), str(pair["tuned"]), "--stats", str(stats), "--retain", str(retained), *more],
    ]
    commands[-1] += ["-o", str(scratch / "three")]
    steps = [timed(words, scratch) for words in commands]
    sums = {name: sum(step[name] for step in steps) for name in ("wall", "processor")}
    return sums | {"peak": max(step["peak"] for step in steps), "written": folder_bytes(stats, retained)}


def measure(pair: dict[str, Any], more: list[str], rounds: int, scratch: Path) -> dict[str, Any]:
    """Both ways in each round, turn by turn, and whether they give the same bytes."""
    found: dict[str, Any] = {way: [] for way in WAYS}
    equal = True
    for number in range(rounds):
        for way, run in zip(WAYS, (three_commands, one_pass), strict=True):
            say(f"{pair['name']}, round {number}: {way}")
            found[way].append(run(pair, more, scratch))
        weights = [scratch / name / "model.safetensors" for name in ("three", "one")]
        equal = equal and weights[0].read_bytes() == weights[1].read_bytes()
        for name in ("three", "one", "stats", "base-stats"):
            shutil.rmtree(scratch / name)
    return {"rounds": found, "equal": equal, "checkpoint": folder_bytes(pair["base"])}


def pairs(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """The demo's pair, whose base writes its samples, and a random one that is calibrated on the same data twice."""
    from benchmarks.synthetic import LlamaShape, write_pair, write_samples, write_tokenizer

    demo = args.demo
    if demo is None:
        say("the demo's pair is trained")
        demo = scratch / "demo"
        run_python(["-m", "tailorcli", "demo", "-o", str(demo), "--quiet"], scratch)
    size = ["--num-samples", str(2 * args.samples), "--seq-len", str(args.seq_len)]
    own = {"name": "the demo's pair", "base": demo / "base", "tuned": demo / "tuned", "retain_data": False}
    shape = LlamaShape(args.layers, args.hidden, args.intermediate, args.vocab)
    base, tuned = write_pair(scratch, shape, "fp32")
    for folder in (base, tuned):
        write_tokenizer(folder, args.vocab)
    data = scratch / "data.jsonl"
    write_samples(data, args.vocab, args.samples, args.seq_len, args.seq_len)
    named = f"{args.layers} layers of hidden {args.hidden}"
    made = {"name": named, "base": base, "tuned": tuned, "data": data, "retain_data": True}
    return [
        own | {"data": demo / "calibration.jsonl", "size": size},
        made | {"size": ["--num-samples", str(args.samples), "--seq-len", str(args.seq_len)]},
    ]


def render(figures: dict[str, Any]) -> str:
    """The table, and whether the bytes were the same."""
    rows = []
    for name, result in figures["results"].items():
        rounds = result["rounds"]
        for way in WAYS:
            ratios = [
                median(r[what] / first[what] for r, first in zip(rounds[way], rounds[WAYS[0]], strict=True))
                for what in ("wall", "processor", "peak")
            ]
            values = {what: median(r[what] for r in rounds[way]) for what in ("wall", "processor", "peak", "written")}
            cells = [f"{values['wall']:.1f} s", f"{ratios[0]:.2f}", f"{values['processor']:.1f} s", f"{ratios[1]:.2f}"]
            cells += [f"{values['peak'] / 1e6:.0f} MB", f"{ratios[2]:.2f}", f"{values['written'] / 1e6:.1f} MB"]
            rows.append([name, way, *cells])
    columns = ["pair", "way", "wall", "ratio", "processor", "ratio", "memory", "ratio", "written"]
    equal = all(result["equal"] for result in figures["results"].values())
    said = "The weights were equal to the byte." if equal else "The weights DIFFER."
    table = markdown(columns, rows, text=(0, 1))
    facts = "\n".join(f"- {fact}" for fact in describe(figures["environment"]).split(", "))
    return "\n\n".join([table, said, *figures["about"], facts])


def main() -> None:
    """Measure, print the table and write the page."""
    options = parser("benchmarks.onepass", __doc__)
    options.add_argument("--demo", type=Path, help="a folder that tailorcli demo wrote")
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--intermediate", type=int, default=1408)
    options.add_argument("--vocab", type=int, default=2048)
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--seq-len", type=int, default=128)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--dir", type=Path, help="where the temporary folder goes")
    options.add_argument("--page", type=Path, default=DOCUMENT)
    args = options.parse_args()
    use_threads(args.threads or 1)
    results = {}
    with TemporaryDirectory(prefix="tailorcli-onepass-", dir=args.dir) as name:
        scratch = Path(name)
        for pair in pairs(args, scratch):
            results[pair["name"]] = measure(pair, [], args.rounds, scratch)
            plain = ["--no-propagate"]
            results[f"{pair['name']}, not propagated"] = measure(pair, plain, args.rounds, scratch)
    about = [
        f"Medians of {counted(args.rounds, 'round')}. Where other work runs on the machine the wall tells little: the "
        f"load average was {os.getloadavg()[0]:.0f} in the end.",
        f"The demo's pair is calibrated on {2 * args.samples} samples of {args.seq_len} tokens, its base on as "
        "many that it writes itself; the random pair on half as many, twice.",
    ]
    figures = {"results": results, "about": about, "environment": environment()}
    write_json(args.json, figures)
    table = render(figures)
    print(table)
    args.page.write_text(reflow(HEAD + table), encoding="utf-8")


if __name__ == "__main__":
    main()
