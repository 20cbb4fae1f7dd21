"""`python -m benchmarks.sparse`: sparse fine-tuning beside patching, on the models of the benchmark `quick`.

Every method of `tailorcli finetune` on the same base, data and steps, at two depths, and the patch on top of the full
fine-tune. Everything lies in the cache and is made once; the page is written from all that is there.
"""

from __future__ import annotations

import argparse
import json
import math
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
    parser.add_argument("--cache", type=Path, default=cache_root(), help="folder for weights and results (%(default)s)")
    options = parser.parse_args()
    cache = options.cache.expanduser().resolve() / "quick"
    tasks = quick_data.load_tasks()
    if not (cache / "data" / f"{NEW}-train.jsonl").exists():
        quick_data.write_parts(tasks, cache / "data")
    for seed in range(options.seeds):
        base = quick_model.make_base(tasks, seed, cache / f"seed{seed}" / "base")
        run_seed(seed, base, cache / "data", cache / f"seed{seed}" / "sparse")
    results = [result for seed in range(options.seeds) for result in read(cache / f"seed{seed}" / "sparse")]
    DOCUMENT.write_text(reflow(page(results)), encoding="utf-8")
    say(f"wrote {DOCUMENT}")


def run_seed(seed: int, base: Path, data: Path, folder: Path) -> None:
    """All models of one seed, and the figures of each in ``folder``/results.json."""
    if (folder / "results.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    train = data / f"{NEW}-train.jsonl"
    probe_cost = _command(folder / "importance", "probe", str(base), "--seq-len", str(quick_data.WINDOW))
    retained = _stats(base, None, folder / "stats-base")
    models: dict[str, tuple[str, str, float | None, int | None]] = {"base": ("", "zero-shot", None, None)}
    paths = {"base": base}
    for depth, layers in DEPTHS.items():
        for method in METHODS:
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
    parts = [
        "# Sparse fine-tuning",
        f"Written by `python -m benchmarks.sparse`. Every method of [finetune](../how-to/finetune.md) on the models of "
        f"[quick](evidence-quick.md): byte-level Llamas of 3 million parameters in {quick_model.LAYERS} layers, which "
        f"know Python and English and learn the names of Unicode characters. All have the same data, {STEPS} steps of "
        f"{BATCH} samples of {quick_data.WINDOW} bytes at a rate of {RATE:g} with AdamW, and frozen embeddings.",
        f"Figures are next bytes guessed right on the test parts, in percent: means over {len(seeds)} "
        f"seed{'' if len(seeds) == 1 else 's'}, with the deviation between them behind ±. A small model at one "
        "learning rate: what it shows of large ones is for them to show.",
    ]
    for depth in DEPTHS:
        layers = DEPTHS[depth]
        title = "All layers" if depth == "all" else f"The last third: {layers} of {quick_model.LAYERS} layers"
        parts += [f"## {title}", _table([r for r in results if r.depth in ("", depth)])]
    parts += ["## What the papers claim, and what was seen", *_claims(results)]
    facts = f"Processor: {processor()}, one thread, beside other work: seconds compare within a table at best."
    return "\n\n".join([*parts, facts]) + "\n"


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


def _claims(results: Sequence[Result]) -> list[str]:
    """The papers' claims, each with the figures that bear on it."""
    return [
        f"- **SPIDER beats full, half and L2 on old and new together** (its Tables 5 and 6). H at all layers: "
        f"{_compare(results, 'all', 'spider', ('full', 'half', 'l2'))}",
        f"- **Model-Dowser beats SPIDER, and most so at full depth** (its Table 1 and Figure 1). H at all layers: "
        f"{_compare(results, 'all', 'dowser', ('spider', 'full'))} At the last third: "
        f"{_compare(results, 'last third', 'dowser', ('spider', 'full'))}",
        f"- **Patches after the fact collapse at full depth** (Model-Dowser's Figure 1). H at all layers: "
        f"{_compare(results, 'all', 'patch (ours) of full', ('full', 'spider', 'dowser'))} The paper's patch: "
        f"{_compare(results, 'all', 'patch (the paper' + chr(39) + 's) of full', ('full',))}",
        f"- **Model-Dowser needs no memory beside full fine-tuning, SPIDER three copies.** Peaks of the whole process: "
        f"{_peaks(results)}",
    ]


def _compare(results: Sequence[Result], depth: str, name: str, others: Sequence[str]) -> str:
    """How far one method is from others in H, seed by seed."""

    def h(which: str) -> dict[int, float]:
        return {r.seed: r.h for r in results if r.depth == depth and r.name == which}

    own, told = h(name), []
    for other in others:
        gaps = [own[seed] - value for seed, value in h(other).items() if seed in own]
        ahead = sum(gap > 0 for gap in gaps)
        told.append(f"{mean(gaps):+.1f} against {other} (ahead with {ahead} of {len(gaps)} seeds)")
    return f"{name} is {', '.join(told)}." if told and not any(math.isnan(v) for v in own.values()) else "not measured."


def _peaks(results: Sequence[Result]) -> str:
    """The peaks at full depth by method."""
    found = {m: [r.peak for r in results if r.depth == "all" and r.name == m and r.peak] for m in METHODS}
    return ", ".join(f"{name} {mean(peaks) / 1e6:.0f} MB" for name, peaks in found.items() if peaks) + "."


if __name__ == "__main__":
    main()
