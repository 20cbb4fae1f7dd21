"""Run all benchmarks but the real models' and write what they print into docs/results/speed.md.

``large`` needs much disk and time, ``dare`` the pair of ``benchmarks.real`` and mergekit from PyPI: they run only when
they are named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.pages import reflow

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results" / "speed.md"

HEAD = """# Speed and memory

Written by `python -m benchmarks` (`make bench`): what each part printed on its last run. Times are of one machine and
hold only as ratios within a run; each part names its baseline. A target that was missed says so.
"""

PARTS = {
    "solver": (
        "Solvers",
        "The three ways to compensate, on one layer and one mask. *Published* is SparseGPT's sweep in its usual layout "
        "(columns of a row-major matrix, Cholesky of the full inverse), *sequential* is ours (columns as contiguous "
        "rows, a triangular inverse); both give the same weights. `joint` has to form `e H`, I² multiply-adds a row, "
        "where the sweep needs half of that and a factorisation that all rows share: on a CPU, with O = I, no joint "
        "solver can be three times as fast as a good sweep. It is the default for the layer error it reaches.",
    ),
    "memory": (
        "Memory",
        "Peak resident memory of `tailorcli patch` in a process of its own, on pairs that differ only in depth, and on "
        "one whose embedding is by far its largest tensor.",
    ),
    "patchfile": (
        "Patch files and stitching",
        "The size of a patch over densities; `apply` and `verify` against plainly reading and writing the same bytes; "
        "a patch file instead of a checkpoint as the output of `patch`; the peak memory of a joint merge of two tasks.",
    ),
    "throughput": (
        "Throughput",
        "`patch` by salience alone against reading both checkpoints and writing one; the default `patch` by stage, "
        "each against its floor; `calibrate` against a bare forward pass and the Hessians' multiply-adds.",
    ),
    "finetuning": (
        "Sparse fine-tuning",
        "`probe` against the passes that it needs, and a step of each method of `finetune` beside one of full "
        "fine-tuning.",
    ),
    "dare": (
        "DARE beside mergekit",
        "`patch --method dare` against mergekit's `dare_linear` on SmolLM2-135M and the fine-tune of `benchmarks.real` "
        "(`python -m benchmarks --only dare`), each a process of its own, turn by turn. *Changed* is the share of the "
        "entries that the fine-tune moved. *Scale* is the slope of the change over the fine-tune's on the kept "
        "entries, 1 / density by DARE; *change² / delta²* is that, too, on average. mergekit divides by the share of "
        "|delta| that its draw has kept, and computes in bfloat16.",
    ),
    "large": (
        "A pair larger than memory",
        "Two random checkpoints in the shapes of Llama-2-7B (`make bench-large`: 55 GB of disk). Peak is the kernel's "
        "ru_maxrss of a command in a process of its own. The bound of `calibrate` is what torch and transformers take, "
        "embeddings and head, one block's weights twice, its Hessians and the largest of them once more, packed; that "
        "of `patch` is the plan's own estimate.",
    ),
}
ON_REQUEST = ("dare", "large")


def section(name: str, text: str) -> str:
    """One part of the page, from what it printed on standard output."""
    title, introduction = PARTS[name]
    return f"## {title}\n\n{introduction}\n\n{remarks_listed(text.strip())}\n"


def remarks_listed(text: str) -> str:
    """What a part printed, each line outside its tables an item of a list."""
    lines = text.splitlines()
    return "\n".join(f"- {line.strip()}" if line.strip() and not line.startswith("|") else line for line in lines)


def document(outputs: dict[str, str], earlier: str) -> str:
    """The page: a part that did not run keeps its section of the earlier page."""
    sections = []
    for name, (title, _) in PARTS.items():
        _, found, rest = earlier.partition(f"## {title}\n")
        if name in outputs:
            sections.append(section(name, outputs[name]))
        elif found:
            sections.append(f"## {title}\n{rest.partition(chr(10) + '## ')[0].rstrip()}\n")
    return reflow("\n".join([HEAD, *sections]))


def main() -> None:
    """Run the parts, one after the other; arguments that are not known here go to each of them.

    With ``--parts``, some of a part's tables, the page stays as it is, for they would replace all of that part's.
    """
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument(
        "--only",
        nargs="+",
        choices=tuple(PARTS),
        default=[name for name in PARTS if name not in ON_REQUEST],
        help="leave the others as they are",
    )
    chosen, rest = made.parse_known_args()
    outputs = {}
    for name in chosen.only:
        command = [sys.executable, "-m", f"benchmarks.{name}", *rest]
        outputs[name] = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        print(outputs[name])
    if "--parts" in rest:
        return
    earlier = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    DOCUMENT.write_text(document(outputs, earlier), encoding="utf-8")


if __name__ == "__main__":
    main()
