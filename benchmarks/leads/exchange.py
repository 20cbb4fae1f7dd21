"""`python -m benchmarks.leads.exchange PAIR...`: a mask that changes while its values are trained.

As RigL and SpIEL do it: now and then the kept entries that have moved least go back to the base, and as many that were
left out come in, those with the largest gradients of the loss. PAIR is TASK-SEED of the benchmark `quick`. Short runs
from the plain closed form, on the first samples of the statistics that `python -m benchmarks.evidence quick` made;
held-out divergences, and accuracies on validation data. Writes a table of docs/results/research.md.
"""

from __future__ import annotations

import argparse
import json
import math
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import cache_root, say
from benchmarks.evidence.pairs import Pair, quick
from benchmarks.leads.__main__ import DOCUMENT
from benchmarks.quick.data import WINDOW, read_texts
from benchmarks.real.render import between, table
from tailorcli import Checkpoint, PatchFile, PatchOptions, Stats, h_score, patch_checkpoint
from tailorcli.core.distillation import rate_at
from tailorcli.demo.text import encode
from tailorcli.options import DistillOptions
from tailorcli.training.distill import WARMUP, Material, held_out, step_losses
from tailorcli.training.entries import Entries, Trained
from tailorcli.training.run import Teaching

MARK = "exchange"
CPU = torch.device("cpu")
COUNT = 48  # samples of each kind
OPTIONS = DistillOptions(steps=60, rate=0.1, weight=2.0, batch_size=4)
EVERY, UNTIL = 10, 0.7  # steps between two exchanges, and the share of all steps after which there are none
EVALUATE = 20  # steps
VARIANTS = {"fixed": 0.0, "exchanged": 0.3, "exchanged, more": 0.6}  # share of the entries at first; it falls to none


def exchange(
    entries: list[Entries], network: Any, base: dict[str, Tensor], gradients: dict[str, Tensor], share: float
) -> None:
    """Let the ``share`` of each tensor's entries go that moved least, and take in as many with the largest gradients.

    ``base`` and ``gradients`` hold whole parameters, flat.
    """
    for each in entries:
        count = int(share * len(each.positions))
        if count == 0:
            continue
        origin, wanted = base[each.parameter], gradients[each.parameter].abs()
        gone = torch.topk((each.values - origin[each.positions]).abs(), count, largest=False).indices
        wanted[each.positions] = -1
        come = torch.topk(wanted, count).indices
        stay = torch.ones(len(each.positions), dtype=torch.bool)
        stay[gone] = False
        with torch.no_grad():
            network.get_parameter(each.parameter).data.view(-1)[each.positions[gone]] = origin[each.positions[gone]]
        none = torch.zeros(count)
        each.values = torch.cat([each.values[stay], origin[come]])
        each.first = torch.cat([each.first[stay], none])
        each.second = torch.cat([each.second[stay], none + each.second[stay].mean()])
        each.gradient = torch.cat([each.gradient[stay], none])
        each.positions = torch.cat([each.positions[stay].long(), come]).int()


def step_with_exchange(
    trained: Trained, materials: dict[str, Material], base: dict[str, Tensor], step: int, share: float
) -> Trained:
    """The gradients of a step, whole; then the exchange. The same entries, to be stepped."""
    trained.close()  # its hooks would free what is not kept
    step_losses(trained.network, materials, OPTIONS, CPU, (), step)
    whole = {}
    for name, parameter in trained.network.named_parameters():
        if parameter.grad is not None:
            whole[name], parameter.grad = parameter.grad.reshape(-1), None
    for each in trained.entries:
        each.gradient.add_(whole[each.parameter][each.positions])
    exchange(trained.entries, trained.network, base, whole, share)
    return Trained(trained.network, trained.entries)


def measure(pair: Pair, cache: Path, density: float, names: list[str]) -> list[dict[str, Any]]:
    """Train variants; their held-out divergences as they went, and their accuracies at the end."""
    folder = cache / f"{pair.name}-{pair.seed}"
    found = []
    with ExitStack() as stack:
        base, tuned = (stack.enter_context(Checkpoint.open(path)) for path in (pair.base, pair.tuned))
        stats, retain = (stack.enter_context(closing(Stats.open(folder / name))) for name in ("stats", "stats-written"))
        for each in (stats, retain):  # the Hessians are of all samples
            setattr(each, "samples", lambda samples=each.samples()[:COUNT]: samples)  # noqa: B010
        file = folder / f"exchange-{density:g}.safetensors"
        if not file.exists():
            options = PatchOptions(density=density, propagate=False)
            patch_checkpoint(pair.base, pair.tuned, None, stats.path, options, patch_file=file, retain=retain.path)
        patch = stack.enter_context(PatchFile.open(file))
        teaching = Teaching(base, [(tuned, stats)], retain, CPU)
        materials = teaching.materials(OPTIONS)
        for name in names:
            trained, _, _ = teaching.student(patch)
            curve = train(trained, base, materials, VARIANTS[name])
            old = sum(accuracy(trained.network, pair, task) for task in pair.origin) / len(pair.origin)
            new = accuracy(trained.network, pair, pair.target[0])
            found.append(
                {"pair": folder.name, "name": name, "density": density, "curve": curve, "old": old, "new": new}
            )
            say(json.dumps(found[-1]))
    return found


def train(
    trained: Trained, base: Checkpoint, materials: dict[str, Material], share: float
) -> list[tuple[float, float]]:
    """Train in place; the held-out divergences, new and retained, of every so many steps."""
    flat = {name: base.read(name).reshape(-1) for name, _ in trained.network.named_parameters()}
    curve = []
    warmup = max(1, round(WARMUP * OPTIONS.known_steps))
    for step in range(OPTIONS.known_steps):
        if share > 0 and step % EVERY == 0 and 0 < step < UNTIL * OPTIONS.known_steps:
            now = share * 0.5 * (1 + math.cos(math.pi * step / (UNTIL * OPTIONS.known_steps)))
            trained = step_with_exchange(trained, materials, flat, step, now)
        else:
            step_losses(trained.network, materials, OPTIONS, CPU, (), step)
        trained.step(step + 1, OPTIONS.rate * rate_at(step + 1, OPTIONS.known_steps, warmup))
        if (step + 1) % EVALUATE == 0:
            tasks, retained = held_out(trained.network, materials, (), CPU)
            curve.append((tasks[0], retained))
    return curve


def accuracy(network: Any, pair: Pair, task: str) -> float:
    """The percentage of next bytes guessed right on validation data."""
    texts = read_texts(pair.tasks / f"{task}-validation.jsonl")
    ids = torch.stack([row for row in (encode([text])[0][:WINDOW] for text in texts) if len(row) == WINDOW])
    with torch.no_grad():
        right = network(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    return 100.0 * float(right.float().mean())


def write(found: list[dict[str, Any]]) -> None:
    """Write the table of what was measured."""
    rows = []
    for one in found:
        new, retained = one["curve"][-1]
        objective = new + OPTIONS.weight * retained
        figures = (f"{new:.3f}", f"{retained:.3f}", f"{objective:.3f}", f"{one['old']:.1f}", f"{one['new']:.1f}")
        rows.append([f"{one['pair']}, density {one['density']:g}: {one['name']}", *figures])
        rows[-1].append(f"{h_score(one['old'], one['new']):.1f}")
    text = table(["mask", "held-out KL, new", "retained", "objective", "old", "new", "H"], rows)
    DOCUMENT.write_text(between(DOCUMENT.read_text(encoding="utf-8"), MARK, text), encoding="utf-8")
    print(text)


def main() -> None:
    """Measure the pairs and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leads.exchange", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("pairs", nargs="*", help="TASK-SEED of the benchmark quick")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS)[:2], choices=VARIANTS)
    parser.add_argument("--density", type=float, nargs="*", default=[0.02])
    parser.add_argument("--cache", type=Path, default=cache_root() / "quick", help="of the evidence (%(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="takes every figure, and has those of earlier runs")
    options = parser.parse_args()
    found = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else []
    for name in options.pairs:
        task, _, seed = name.rpartition("-")
        pair = next(each for each in quick(options.cache, [int(seed)]) if each.name == task)
        for density in options.density:
            found += measure(pair, options.cache, density, options.variants)
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write(found)


if __name__ == "__main__":
    main()
