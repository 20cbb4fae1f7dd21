"""tailorcli beside its peers: the same layer, pair and adapter, turn by turn in one run.

Parts: layer (SparseGPT's published sweep, llm-compressor), merges (mergekit), dg-hard (its own tool), adapter (PEFT).
Peers are installed from PyPI into virtual environments of their own, which stay in the cache; a part whose peer cannot
be had says so. Each part's figures stay in the cache too, and the page has those of all parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import cache_root, describe, environment, kept_figures, parser, say, use_threads, write_json
from benchmarks.pages import publish
from benchmarks.peers import adapter, checkpoints, layer
from benchmarks.peers.environments import LLM_COMPRESSOR, MERGEKIT, UnavailableError
from benchmarks.synthetic import LlamaShape

PARTS = ("layer", "merges", "dg-hard", "adapter")
PAGE = Path(__file__).parents[2] / "docs" / "results" / "peers.md"
HEAD = """# Beside its peers

Written by `python -m benchmarks.peers`: other programs for the same work, on the same inputs, turn
by turn in one run, each in the environment that pip makes for it. Where a machine does other work
too, its seconds say little: processor seconds and the peak of resident memory are compared.
"""
TITLES = {"layer": "One layer", "merges": "mergekit", "dg-hard": "DG-Hard's own tool", "adapter": "PEFT"}
TEXTS = {
    "layer": f"""A layer of random changes under a Hessian with a power-law spectrum. *Published* is SparseGPT's
sweep in its usual layout, on the mask that `joint` and `sequential` have; *llm-compressor* is the sweep of its
SparseGPTModifier ({LLM_COMPRESSOR}) on the change, with the mask that it chooses itself. The error is that of the
layer's outputs over that of the base's.""",
    "merges": f"""`patch --method dare`, `magnitude` (TIES of one model) and `interpolate` beside {MERGEKIT}'s
`dare_linear`, `ties` and `linear`, on one random pair. mergekit works out the change in
bfloat16 and adds it again, where `magnitude` takes the fine-tuned entry itself; its DARE scales by the share of the
change that its draw kept.""",
    "dg-hard": """`patch --method dg-hard` beside `dghard repair` (0.1.0, from its repository), on a pair whose changes
are of low rank but for noise. dghard rounds the change to bfloat16 and then its sum with the base, where ours rounds
the sum once.""",
    "adapter": """`patch --method changed` beside `merge_and_unload`, a LoRA adapter of rank 8 on three kinds of
layers. *Exact* is the sum in float64 rounded once to the base's dtype; the products of factors in float32 have
rounded before.""",
}


def parse() -> argparse.Namespace:
    """The options."""
    made = parser("benchmarks.peers", __doc__)
    made.add_argument(
        "--only", nargs="*", choices=PARTS, default=PARTS, metavar="PART", help="all; none: the page alone"
    )
    made.add_argument("--cache", type=Path, default=cache_root(), help="folder for peers and figures (%(default)s)")
    made.add_argument("--page", type=Path, default=PAGE, help="the page to write (%(default)s)")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048], help="I = O of the layer")
    made.add_argument("--density", type=float, default=0.1)
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--hidden", type=int, default=1024)
    made.add_argument("--dghard", type=Path, metavar="FOLDER", help="a copy of DG-Hard's repository")
    return made.parse_args()


def measure(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """A part's figures, or why there are none."""
    shape = LlamaShape(args.layers, args.hidden, 11 * args.hidden // 4, 8192)
    small = LlamaShape(args.layers // 2, args.hidden // 2, 11 * args.hidden // 8, 8192)  # it takes an SVD a matrix
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "layer": lambda: layer.measure(args.cache, args.sizes, args.density, args.rounds),
        "merges": lambda: checkpoints.measure_merges(args.cache, shape, args.density, args.rounds),
        "dg-hard": lambda: checkpoints.measure_dg_hard(args.cache, small, args.dghard, args.rounds),
        "adapter": lambda: adapter.measure(args.cache, shape, args.rounds),
    }
    used = small if part == "dg-hard" else shape
    facts = {"environment": environment(), "layers": used.layers, "hidden": used.hidden, "at_density": args.density}
    try:
        return {**facts, **work[part]()}
    except UnavailableError as missing:
        say(str(missing))
        return {**facts, "unavailable": str(missing)}


def section(part: str, figures: dict[str, Any]) -> str:
    """A part of the page."""
    renders = {
        "layer": layer.render,
        "merges": checkpoints.render_merges,
        "dg-hard": checkpoints.render_dg_hard,
        "adapter": adapter.render,
    }
    head = f"## {TITLES[part]}\n\n{TEXTS[part]}"
    if "unavailable" in figures:
        return f"{head}\n\nNot measured: {figures['unavailable']}."
    size = "" if part == "layer" else f"{figures['layers']} layers of hidden {figures['hidden']}"
    size = f"bf16, {size}, density {figures['at_density']:g}, " if part == "merges" else f"{size}, " if size else ""
    rounds = "one round" if figures["rounds"] == 1 else f"median of {figures['rounds']} rounds"
    end = f"- {size}{rounds}; {describe(figures['environment'])}"
    return f"{head}\n\n{renders[part](figures)}\n\n{end}"


def main() -> None:
    """Measure the parts asked for, and write the page of all that are in the cache."""
    args = parse()
    use_threads(args.threads)
    args.cache.mkdir(parents=True, exist_ok=True)
    kept = args.cache / "peers.json"
    found = kept_figures(kept)
    for part in args.only:
        found[part] = measure(part, args)
        write_json(kept, found)
    publish("\n".join([HEAD, *(section(part, found[part]) + "\n" for part in PARTS if part in found)]), args.page)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
