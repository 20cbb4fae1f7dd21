"""`python -m benchmarks.sparse`: sparse fine-tuning beside patching, at several depths, on the same data and steps.

Every method of `tailorcli finetune`, and patches on top of them, with a rate for each that was picked on validation
data. Scores lie in the cache and are made once; the page is written from all that is there. What a run elsewhere left
in its cache (the JSON files in PART/sparse) is enough for the page: `--stored FOLDER`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import transformers

from benchmarks.common import cache_root, say
from benchmarks.real.setting import environment
from benchmarks.sparse import render
from benchmarks.sparse.cells import slug
from benchmarks.sparse.run import Plan, run_part
from benchmarks.sparse.setting import DEPTHS, MASKS, PARTS, ROWS
from tailorcli.files import write_text_atomically

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "results" / "sparse-tuning.md"
METHODS = {slug(row.title): row for row in ROWS}
DEPTH_NAMES = {slug(name): name for name in DEPTHS}


def main() -> None:
    """Run what is missing of the parts that are asked for, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--part", choices=[*PARTS], default="quick", help="text and multimodal want a GPU (%(default)s)"
    )
    parser.add_argument("--tasks", nargs="+", help="new tasks (all of the part's)")
    parser.add_argument("--seeds", type=int, default=3, help="only the first so many (%(default)s)")
    parser.add_argument("--depths", nargs="+", choices=[*DEPTH_NAMES], help="layers that are fine-tuned (all three)")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], metavar="METHOD", help=f"of {' '.join(METHODS)}")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates that are tried (those of the part)")
    parser.add_argument("--no-masks", action="store_true", help="no other masks in SPIDER's place")
    parser.add_argument("--jobs", type=int, default=1, help="fine-tunes at a time, each in a process of its own")
    parser.add_argument("--cache", type=Path, default=cache_root(), help="folder for weights and results (%(default)s)")
    parser.add_argument("--page-only", action="store_true", help="run nothing: the page of what was measured")
    parser.add_argument("--stored", type=Path, help="run nothing: parts in FOLDER are taken from there for the page")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    cache, part = options.cache.expanduser().resolve(), PARTS[options.part]

    def rendered() -> None:
        for name, rows in render.write([options.stored, cache] if options.stored else [cache], DOCUMENT).items():
            say(f"{name} stays as it was on the page, as these rows were not run again: {', '.join(rows)}")
        say(f"wrote {DOCUMENT.name}")

    failed: list[str] = []
    if not (options.page_only or options.stored):
        if options.rates:
            part = replace(part, rates=tuple(options.rates), wider=())
        plan = Plan(
            options.tasks or part.tasks,
            options.seeds,
            [METHODS[name] for name in options.methods or METHODS],
            [DEPTH_NAMES[name] for name in options.depths] if options.depths else None,
            () if options.no_masks else MASKS,
            options.jobs,
        )
        folder = cache / part.name
        (folder / "sparse").mkdir(parents=True, exist_ok=True)
        machine = environment() | {"jobs": options.jobs}
        write_text_atomically(folder / "sparse" / "machine.json", json.dumps(machine, indent=1) + "\n")
        failed = run_part(part, folder, plan, rendered)
    rendered()
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
