"""`python -m benchmarks.sparse`: sparse fine-tuning beside patching, on the models of the benchmark `quick`.

Every method of `tailorcli finetune` on the same base, data and steps, at two depths, and the patch on top of the full
fine-tune. Everything lies in the cache and is made once; the page is written from all that is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from benchmarks.common import cache_root, markdown, processor, run_python
from benchmarks.pages import reflow
from benchmarks.quick import data as quick_data
from benchmarks.quick import model as quick_model
from benchmarks.real.setting import say
from tailorcli import (
    CalibrateOptions,
    EvaluateOptions,
    PatchOptions,
    calibrate_model,
    evaluate_models,
    patch_checkpoint,
)
from tailorcli.evaluation.metrics import h_score
from tailorcli.units import counted

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results" / "sparse-tuning.md"
METHODS = ("full", "half", "l2", "spider", "dowser")
STEPS, BATCH, RATE = 100, 16, 1e-3
NEW = "unicode"
DEPTHS = {"all": quick_model.LAYERS, "last third": max(1, round(quick_model.LAYERS / 3))}
PATCHES = {
    "patch (the paper's) of full": PatchOptions(solver="sequential"),
    "patch (ours) of full": PatchOptions(),
}


@dataclass(frozen=True)
class Result:
    """What one model reached: accuracies in percent, the share of entries that differ from the base, and its cost."""

    depth: str
    name: str
    seed: int
    old: float
    new: float
    moved: float
    seconds: float | None = None
    peak: int | None = None

    @property
    def h(self) -> float:
        """The harmonic mean of both."""
        return h_score(self.old, self.new)


def main() -> None:
    """Train, patch and evaluate what is missing, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="only the first so many (%(default)s)")
    parser.add_argument("--depths", nargs="*", default=[*DEPTHS], choices=[*DEPTHS], help="of what is missing (all)")
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=METHODS, help="of what is missing (all)")
    parser.add_argument("--cache", type=Path, default=cache_root(), help="folder for weights and results (%(default)s)")
    options = parser.parse_args()
    cache = options.cache.expanduser().resolve() / "quick"
    tasks = quick_data.load_tasks()
    if not (cache / "data" / f"{NEW}-train.jsonl").exists():
        quick_data.write_parts(tasks, cache / "data")
    for seed in range(options.seeds):
        base = quick_model.make_base(tasks, seed, cache / f"seed{seed}" / "base")
        run_seed(seed, base, cache / "data", cache / f"seed{seed}" / "sparse", options.depths, options.methods)
    results = [result for seed in range(options.seeds) for result in read(cache / f"seed{seed}" / "sparse")]
    DOCUMENT.write_text(reflow(page(results)), encoding="utf-8")
    say(f"wrote {DOCUMENT}")


def run_seed(seed: int, base: Path, data: Path, folder: Path, depths: Sequence[str], methods: Sequence[str]) -> None:
    """The models of one seed, and the figures of each in ``folder``/results.json; "full" must be among the methods."""
    if (folder / "results.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    train = data / f"{NEW}-train.jsonl"
    probe_cost = _command(folder / "importance", "probe", str(base), "--seq-len", str(quick_data.WINDOW))
    retained = _stats(base, None, folder / "stats-base")
    models: dict[str, tuple[str, str, float | None, int | None]] = {"base": ("", "zero-shot", None, None)}
    paths = {"base": base}
    for depth in depths:
        layers = DEPTHS[depth]
        for method in methods:
            name = f"{depth.replace(' ', '-')}-{method}"
            say(f"seed {seed}: {name}")
            given = ["--data", str(train), "--method", method, "--steps", str(STEPS), "--batch-size", str(BATCH)]
            given += [
                "--learning-rate",
                str(RATE),
                "--warmup",
                "0.05",
                "--seed",
                str(seed),
                "--last-layers",
                str(layers),
            ]
            if method == "dowser":
                given += ["--importance", str(folder / "importance")]
            paths[name] = folder / name
            seconds, peak = _command(folder / name, "finetune", str(base), *given)
            models[name] = (depth, method, seconds + (probe_cost[0] if method == "dowser" else 0.0), peak)
        full = paths[f"{depth.replace(' ', '-')}-full"]
        stats = _stats(full, train, folder / f"stats-{full.name}")
        for title, how in PATCHES.items():
            name = f"{full.name}-{'paper' if how.solver == 'sequential' else 'ours'}"
            paths[name] = folder / name
            if not paths[name].exists():
                say(f"seed {seed}: {name}")
                retain = None if how.solver == "sequential" else retained
                patch_checkpoint(base, full, paths[name], stats, how, retain=retain)
            models[name] = (depth, title, None, None)
    kinds = dict.fromkeys((*quick_data.OLD_TASKS, NEW), "text")
    specs = [f"{task}={data / f'{task}-test.jsonl'}:{kind}" for task, kind in kinds.items()]
    found = evaluate_models(
        list(paths.values()), specs, EvaluateOptions(batch_size=32), origin=quick_data.OLD_TASKS, target=(NEW,)
    )
    by_path = {entry["path"]: found.scores[name] for name, entry in found.models.items()}
    rows = []
    for name, (depth, method, took, most) in models.items():
        scores = by_path[str(paths[name])]
        old = mean(scores[task].accuracy for task in quick_data.OLD_TASKS)
        rows.append([depth, method, seed, old, scores[NEW].accuracy, _moved(base, paths[name]), took, most])
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _command(output: Path, *arguments: str) -> tuple[float, int]:
    """Run a command of tailorcli in a process of its own unless its output is there: its seconds and peak memory."""
    facts = output.with_name(output.name + ".cost.json")
    if not facts.exists():
        done = run_python(["-m", "tailorcli", *arguments, "-o", str(output), "--json"], output.parent)
        facts.write_text(json.dumps([json.loads(done.stdout)["seconds"], done.peak_bytes]), encoding="utf-8")
    seconds, peak = json.loads(facts.read_text(encoding="utf-8"))
    return float(seconds), int(peak)


def _stats(model: Path, data: Path | None, folder: Path) -> Path:
    """Statistics of a model on data, or on what it writes itself; made once."""
    if not (folder / "manifest.json").exists():
        length = quick_data.WINDOW if data is None else 256
        options = CalibrateOptions(
            num_samples=128, seq_len=length, batch_size=16, synthetic=data is None, overwrite=True
        )
        calibrate_model(model, data, folder, options)
    return folder


def _moved(base: Path, model: Path) -> float:
    """The share of entries in which a model differs from the base."""
    from tailorcli import Checkpoint

    with Checkpoint.open(base) as one, Checkpoint.open(model) as other:
        changed = sum(int((one.read(name) != other.read(name)).count_nonzero()) for name in one.tensors)
        return changed / sum(info.numel for info in one.tensors.values())


def read(folder: Path) -> list[Result]:
    """The results of one seed; none where it was not run."""
    file = folder / "results.json"
    if not file.exists():
        return []
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [Result(*row) for row in rows]


# --- The page --------------------------------------------------------------------------------------------------------


def page(results: Sequence[Result]) -> str:
    """The tables, and what they say."""
    seeds = sorted({result.seed for result in results})
    means = (
        ", means over the seeds with the deviation between them behind ± (without one a figure is of one seed)"
        if len(seeds) > 1
        else ""
    )
    parts = [
        "# Sparse fine-tuning",
        "Written by `python -m benchmarks.sparse`. Every method of [finetune](../how-to/finetune.md) on the models of "
        "[quick](evidence-quick.md): byte-level Llamas that know Python and English and learn the names of Unicode "
        "characters. All have the same data, steps and rate, and frozen embeddings. Old and new are next bytes guessed "
        f"right on the test parts, in percent{means}; H is their harmonic mean.",
        "It is a small model at one learning rate: an indication, not evidence. What it shows of large models is for "
        "them to show.",
        markdown(
            ("setting", "value"),
            [
                ("parameters", f"3 million, {quick_model.LAYERS} layers"),
                ("training", f"{STEPS} steps of {BATCH} samples of {quick_data.WINDOW} bytes, AdamW, rate {RATE:g}"),
                ("seeds", ", ".join(f"{depth}: {_seeds(results, depth)}" for depth in DEPTHS)),
                ("update ratio, density", "0.1"),
            ],
            text=(0, 1),
        ),
    ]
    for depth, layers in DEPTHS.items():
        title = "All layers" if depth == "all" else f"The last third: {layers} of {quick_model.LAYERS} layers"
        within = {result.seed for result in results if result.depth == depth}
        rows = [r for r in results if r.depth == depth or (r.depth == "" and r.seed in within)]
        parts += [f"## {title}", _table(rows)]
    parts += [
        "## What the papers claim, and what was seen",
        "SPIDER's claims are of its Tables 5 and 6, Model-Dowser's of its Table 1 and its first figure. How far the "
        "first is ahead of the second is told in points of H. No rate was tuned for any method, and a tenth of the "
        "entries at the rate of all of them learns less: a higher one may suit Model-Dowser.",
        markdown(("claim", "depth", "ahead in H", "seen here"), _claims(results), text=(0, 1, 3)),
        "Seconds are of the whole command, the time of `probe` included with dowser; peaks are of the whole process, "
        "most of which is activations and libraries here. The commands ran beside other work on "
        f"{processor()}: compare seconds within a table at best.",
    ]
    return "\n\n".join(parts) + "\n"


def _seeds(results: Sequence[Result], depth: str) -> str:
    return counted(len({result.seed for result in results if result.depth == depth}), "seed")


def _table(results: Sequence[Result]) -> str:
    """A method a line, in the order of the runs."""
    columns = ("method", "old", "new", "average", "H", "entries moved", "seconds", "peak MB")
    rows = []
    for name in dict.fromkeys(result.name for result in results):
        found = [result for result in results if result.name == name]
        average = [(r.old + r.new) / 2 for r in found]
        took = [r.seconds for r in found if r.seconds is not None]
        peaks = [r.peak for r in found if r.peak is not None]
        figures = [_spread([r.old for r in found]), _spread([r.new for r in found]), _spread(average)]
        figures += [_spread([r.h for r in found]), f"{100 * mean(r.moved for r in found):.1f}%"]
        figures += [f"{mean(took):.0f}" if took else "", f"{mean(peaks) / 1e6:.0f}" if peaks else ""]
        rows.append([name, *figures])
    return markdown(columns, rows)


def _spread(values: Sequence[float]) -> str:
    """Mean and deviation."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


PAPER, OURS = PATCHES
CLAIMS = (  # what is said to be ahead of what, at which depth
    ("SPIDER beats full", "spider", "full", "all"),
    ("SPIDER beats half", "spider", "half", "all"),
    ("SPIDER beats L2", "spider", "l2", "all"),
    ("SPIDER beats a patch by the paper", "spider", PAPER, "all"),
    ("Model-Dowser beats full", "dowser", "full", "all"),
    ("Model-Dowser beats SPIDER", "dowser", "spider", "all"),
    ("Model-Dowser beats SPIDER", "dowser", "spider", "last third"),
    ("a patch by the paper collapses at full depth: full beats it", "full", PAPER, "all"),
    ("(ours, not claimed) our patch of full beats SPIDER", OURS, "spider", "all"),
    ("(ours, not claimed) our patch of full beats Model-Dowser", OURS, "dowser", "all"),
)


def _claims(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """Each claim with how far it holds, seed by seed."""
    rows = []
    for claim, one, other, depth in CLAIMS:
        first, second = ({r.seed: r.h for r in results if r.depth == depth and r.name == name} for name in (one, other))
        gaps = [first[seed] - second[seed] for seed in first if seed in second]
        if gaps:
            ahead = sum(gap > 0 for gap in gaps)
            seen = "yes" if ahead == len(gaps) else "no" if not ahead else f"with {ahead} of {len(gaps)} seeds"
            rows.append((claim, depth, f"{mean(gaps):+.1f}", seen))
    return rows


if __name__ == "__main__":
    main()
