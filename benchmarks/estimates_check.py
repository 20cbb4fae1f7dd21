"""The estimate of ``--dry-run --ranks`` beside a run: a patch by 1, 2 and 4 ranks of one thread each.

    python -m benchmarks.estimates_check

Seconds are of the processor: those of the rank that took the most, less those of the same command with ``--dry-run``,
and rates measured the same way. So they hold on a machine that is busy, and are what a rank takes that has a core to
itself; what ranks wait for one another is in neither.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any
from unittest.mock import patch

from benchmarks.common import describe, environment, markdown, parser, run_python, say, use_threads, write_json
from benchmarks.pages import reflow
from benchmarks.ranks import timed
from benchmarks.real.render import between
from benchmarks.synthetic import LlamaShape, write_pair, write_samples, write_tokenizer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "many-devices.md"
MARK = "estimates-check"


def estimated(words: dict[str, Path], ranks: int) -> dict[str, Any]:
    """The plan's own estimate for so many ranks, each with a core to itself."""
    from tailorcli import PatchOptions, plan_patch
    from tailorcli.pipeline import trial
    from tailorcli.pipeline.estimate import ranks_of_patch
    from tailorcli.pipeline.ranks import Fleet

    base, tuned, stats, retain = (words.get(name) for name in ("base", "tuned", "--stats", "--retain"))
    assert base is not None and tuned is not None  # noqa: PT018
    options = PatchOptions(device="cpu")
    plan = plan_patch(base, tuned, None, stats, options, retain=retain)
    with patch.object(trial, "perf_counter", process_time):
        found = ranks_of_patch(base, tuned, stats, plan, options, retain, None, Fleet(ranks, 1))
    assert found is not None
    return found.steps[0].to_dict()


def command(words: dict[str, Path]) -> list[str]:
    """The command line of a patch of these inputs."""
    given = [text for name, path in words.items() if name.startswith("--") for text in (name, str(path))]
    return ["patch", str(words["base"]), str(words["tuned"]), *given]


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Each way by each number of ranks, once."""
    shape = LlamaShape(args.layers, args.hidden, args.intermediate, args.vocab)
    base, tuned = write_pair(scratch, shape)
    for number, model in enumerate((base, tuned)):
        write_tokenizer(model, args.vocab)
        write_samples(scratch / f"{number}.jsonl", args.vocab, args.samples, args.length, args.length)
        size = ["--num-samples", str(args.samples), "--seq-len", str(args.length), "--device", "cpu"]
        say(f"calibrate {model.name}")
        said = ["calibrate", str(model), "--data", str(scratch / f"{number}.jsonl"), "-o", str(scratch / f"s{number}")]
        run_python(["-m", "tailorcli", *said, *size, "--quiet"], scratch)
    plain = {"base": base, "tuned": tuned, "--stats": scratch / "s1"}
    ways = {"plain": plain, "propagated": plain | {"--retain": scratch / "s0"}}
    found: dict[str, Any] = {}
    for way, words in ways.items():
        start = min(timed_start(command(words), scratch) for _ in range(args.starts))
        for ranks in args.ranks:
            say(f"{way}, {ranks} ranks")
            used = max(timed(ranks, command(words), scratch / "out", scratch)["processor"])
            found[f"{way} {ranks}"] = {"run": used - start, "estimate": estimated(words, ranks)}
    return found


def timed_start(words: list[str], scratch: Path) -> float:
    """Processor seconds of the same command that only plans."""
    facts = scratch / "facts"
    facts.mkdir(exist_ok=True)
    child = ["-m", "benchmarks.ranks", "--child", str(facts), *words, "--dry-run", "--json", "-o", str(scratch / "no")]
    run_python(child, scratch)
    return float(json.loads((facts / "0.json").read_text(encoding="utf-8")))


def render(figures: dict[str, Any]) -> str:
    """The table, and of what."""
    rows: list[list[str]] = []
    first: dict[str, tuple[float, float]] = {}
    for name, found in figures["found"].items():
        way, ranks = name.split()
        estimate = found["estimate"]
        both = (found["run"], estimate["seconds"])
        first.setdefault(way, both)
        share = (f"{seconds:.1f} s ({seconds / one:.2f})" for seconds, one in zip(both, first[way], strict=True))
        rows.append([way, ranks, *share, f"{both[1] / both[0]:.2f}", estimate["bound"]])
    columns = ["patch", "ranks", "busiest rank", "estimate", "estimate / run", "bound by"]
    return "\n\n".join([markdown(columns, rows), f"- {figures['pair']} {describe(figures['environment'])}."])


def main() -> None:
    """Measure, print the table and put it into the page."""
    options = parser("benchmarks.estimates_check", __doc__)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--intermediate", type=int, default=1408)
    options.add_argument("--vocab", type=int, default=2048)
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--starts", type=int, default=2)
    options.add_argument("--dir", type=Path, help="where the temporary folder goes")
    args = options.parse_args()
    use_threads(args.threads or 1)
    with TemporaryDirectory(prefix="tailorcli-estimates-", dir=args.dir) as name:
        found = measure(args, Path(name))
    figures: dict[str, Any] = {"found": found, "environment": environment()}
    figures["pair"] = (
        f"{args.layers} layers of hidden {args.hidden}, {args.intermediate} and {args.vocab} tokens, bfloat16; "
        f"{args.samples} samples of {args.length} tokens of each kind; in brackets the share of one rank's."
    )
    write_json(args.json, figures)
    table = render(figures)
    print(table)
    if PAGE.exists():
        PAGE.write_text(reflow(between(PAGE.read_text(), MARK, table)), encoding="utf-8")


if __name__ == "__main__":
    main()
