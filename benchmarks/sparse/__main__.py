"""`python -m benchmarks.sparse`: sparse fine-tuning beside patching, at several depths, on the same data and steps.

Every method of `tailorcli finetune`, and patches on top of them, with a rate for each that was picked on validation
data. Scores lie in the cache and are made once; the page is written from all that is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import transformers

from benchmarks.common import cache_root
from benchmarks.real.setting import say
from benchmarks.sparse import render
from benchmarks.sparse.run import run_part
from benchmarks.sparse.setting import PARTS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "results" / "sparse-tuning.md"


def main() -> None:
    """Run what is missing of the parts that are asked for, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--part", choices=[*PARTS], default="quick", help="text and multimodal want a GPU (%(default)s)"
    )
    parser.add_argument("--tasks", nargs="*", help="new tasks (all of the part's)")
    parser.add_argument("--seeds", type=int, default=3, help="only the first so many (%(default)s)")
    parser.add_argument("--cache", type=Path, default=cache_root(), help="folder for weights and results (%(default)s)")
    parser.add_argument("--page-only", action="store_true", help="run nothing: the page of what was measured")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    cache, part = options.cache.expanduser().resolve(), PARTS[options.part]

    def rendered() -> None:
        render.write(cache, DOCUMENT)
        say(f"wrote {DOCUMENT.name}")

    if not options.page_only:
        (cache / part.name).mkdir(parents=True, exist_ok=True)
        run_part(part, cache / part.name, options.seeds, options.tasks or part.tasks, rendered)
    rendered()


if __name__ == "__main__":
    main()
