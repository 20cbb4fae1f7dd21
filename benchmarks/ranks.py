"""``tailorcli patch`` by one process and by two ranks of one thread each, and whether the bytes are the same.

Wall seconds are of the whole command: python -m tailorcli, or torchrun --nproc-per-node. They hold on a machine that
has a core free for each rank. *Busiest rank* is the processor time (user and system) of the rank that took the most,
which is what the wall comes to on such a machine, whatever else this one did meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import (
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
from benchmarks.pages import reflow

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results" / "ranks.md"
TARGET = 0.6  # of the time of one process, by two

HEAD = """# Several ranks

Written by `python -m benchmarks.ranks`: the same patch by one process and by several that `torchrun`
started, a thread each, turn by turn. *Wall* is of the whole command. *Busiest rank* is the processor
time of the rank that took the most: what the wall comes to where every rank has a core to itself.
Both ratios are to one process, medians over the rounds.

"""


def child(facts: Path, arguments: list[str]) -> None:
    """The command line, as one of the ranks; its processor seconds go into a file of its own."""
    import resource

    from tailorcli.cli import main as command_line

    sys.argv = ["tailorcli", *arguments]
    try:
        command_line()
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF)
        own = facts / f"{os.environ.get('RANK', '0')}.json"
        own.write_text(json.dumps(used.ru_utime + used.ru_stime), encoding="utf-8")


def timed(ranks: int, words: list[str], output: Path, scratch: Path) -> dict[str, Any]:
    """Wall seconds, processor seconds of each rank, and what each did."""
    facts = scratch / "facts"
    for folder in (facts, output):
        shutil.rmtree(folder, ignore_errors=True)
    facts.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [*launcher, "-m", "benchmarks.ranks", "--child", str(facts), *words, "-o", str(output), "--quiet"]
    done = run_python(command, scratch)
    used = [json.loads((facts / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    run = json.loads((output / "tailor_run.json").read_text(encoding="utf-8"))
    return {"wall": done.seconds, "processor": used, "load": os.getloadavg()[0], "shares": run["ranks"]}


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two outputs have the same files but for their run records."""
    import filecmp

    names = {path.name for path in one.iterdir()} - {"tailor_run.json"}
    equal, _, _ = filecmp.cmpfiles(one, other, names, shallow=False)
    return len(equal) == len(names) and names == {path.name for path in other.iterdir()} - {"tailor_run.json"}


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every number of ranks in each round, turn by turn, after one round that does not count."""
    from benchmarks.synthetic import LlamaShape, write_inputs

    made = write_inputs(scratch / "inputs", LlamaShape(args.layers, args.hidden, args.intermediate, args.vocab))
    words = ["patch", str(made.base), str(made.tuned), "--stats", str(made.stats)]
    found: dict[str, Any] = {str(ranks): [] for ranks in args.ranks}
    equal = True
    for number in range(args.rounds + args.warm_up):
        for ranks in args.ranks:
            say(f"round {number}, {ranks} ranks")
            result = timed(ranks, words, scratch / f"out-{ranks}", scratch)
            if number >= args.warm_up:
                found[str(ranks)].append(result)
            equal = equal and same_bytes(scratch / f"out-{args.ranks[0]}", scratch / f"out-{ranks}")
    return {"rounds": found, "equal": equal}


def render(figures: dict[str, Any]) -> str:
    """The table, and what it says of the target."""
    rounds, rows = figures["rounds"], []
    first, *_ = rounds
    ratios = {}
    for ranks, results in rounds.items():
        walls, busiest = [r["wall"] for r in results], [max(r["processor"]) for r in results]
        of_wall = median(r["wall"] / one["wall"] for r, one in zip(results, rounds[first], strict=True))
        of_busiest = median(
            max(r["processor"]) / max(one["processor"]) for r, one in zip(results, rounds[first], strict=True)
        )
        ratios[ranks] = of_busiest
        every = f"{median(sum(r['processor']) for r in results):.1f} s"
        cells = [f"{median(walls):.1f} s", f"{of_wall:.2f}", f"{median(busiest):.1f} s", f"{of_busiest:.2f}", every]
        rows.append([ranks, *cells, f"{median(r['load'] for r in results):.1f}"])
    columns = ["ranks", "wall", "ratio", "busiest rank", "ratio", "all ranks' processor time", "load average"]
    said = []
    if "2" in ratios:
        outcome = verdict(ratios["2"] <= TARGET)
        said.append(f"The busiest of two ranks took {ratios['2']:.2f} of one process; at most {TARGET}: {outcome}.")
    loads = [result["load"] for results in rounds.values() for result in results]
    if median(loads) > figures["environment"]["cores"]:
        said.append("Other work ran beside it, more than the cores could take: the wall is not to be compared.")
    said.append("The outputs were equal to the byte." if figures["equal"] else "The outputs DIFFER.")
    said += [
        describe(figures["environment"]) + ".",
        "The pair has random values in bfloat16; the patch is the default.",
    ]
    pair = figures["pair"]
    shape = markdown([*pair], [[f"{value:,}" for value in pair.values()]], text=())
    return "\n\n".join([markdown(columns, rows), "\n".join(f"- {line}" for line in said), shape])


def main() -> None:
    """Measure, print the table and write the page."""
    options = parser("benchmarks.ranks", __doc__)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--intermediate", type=int, default=2816)
    options.add_argument("--vocab", type=int, default=4096)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--warm-up", type=int, default=1, help="rounds before, which do not count")
    options.add_argument("--dir", type=Path, help="where the temporary folder goes")
    options.add_argument("--page", type=Path, default=DOCUMENT)
    options.add_argument("--earlier", type=Path, metavar="FILE", help="write the page of what --json kept in FILE")
    args = options.parse_args()
    use_threads(args.threads or 1)
    if args.earlier is not None:
        args.page.write_text(reflow(HEAD + render(json.loads(args.earlier.read_text(encoding="utf-8")))), "utf-8")
        return
    with TemporaryDirectory(prefix="tailorcli-ranks-", dir=args.dir) as name:
        figures = measure(args, Path(name))
    figures["pair"] = {name: getattr(args, name) for name in ("layers", "hidden", "intermediate", "vocab", "rounds")}
    figures["environment"] = environment()
    write_json(args.json, figures)
    table = render(figures)
    print(table)
    args.page.write_text(reflow(HEAD + table), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
