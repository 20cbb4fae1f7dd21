"""The paper's Fig. 5 and Fig. 6 of one group, and what is seen in them in words; every word from their own figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import say
from benchmarks.evidence.pairs import Pair
from benchmarks.evidence.summary import DEFAULT, PAPER, PROPAGATED, Curve, Group, curves_of
from tailorcli import Checkpoint, PatchOptions, Stats, TailorError, patch_checkpoint
from tailorcli.display.plots import AFTER, BEFORE, TUNED, draw_bars, layers_of, new_figure, save_figure
from tailorcli.files import write_text_atomically
from tailorcli.patchfile.records import TensorRecord
from tailorcli.patchfile.report import REPORT_FILE, PatchReport, load_report
from tailorcli.sweep.settings import Setting

DECORATED = (Setting(PatchOptions(solver="sequential")), Setting(PatchOptions(), retained=True))
TITLES = {
    "sequential": "sequential (the paper)",
    PROPAGATED: f"{PROPAGATED}, retain weight {PatchOptions().retain_weight:g} (default)",
}
_LINES = (("origin", "old", BEFORE, "o"), ("target", "new", AFTER, "s"), ("h_score", "H", "black", "^"))
_WIDE = 12  # layers of which two panels fit beside each other


def curves_part(part: str, group: Group, docs: Path) -> str:
    """Draw Fig. 5 into ``docs``; return its Markdown, empty where no option has enough points."""
    curves = curves_of(group)
    if not curves:
        return ""
    picture = f"density-omega-{part}-{group.name}.png"
    ends = {name: group.value(end, end, name) for end, name in (("base", "origin"), ("tuned", "target"))}
    plot_curves(curves, ends, docs / picture)
    return f"![Old, new and H along density and omega, mean of the seeds]({picture})\n\n{curves_seen(curves)}"


def plot_curves(curves: Sequence[Curve], ends: dict[str, float], file: Path) -> None:
    """Draw a panel for every curve; ``ends`` are the base's old and the tuned model's new performance."""
    families = [family for family in TITLES if any(curve.family == family for curve in curves)]
    options = list(dict.fromkeys(curve.option for curve in curves))
    figure = new_figure(1.5 + 4.5 * len(options), 1.2 + 3.2 * len(families))
    panels = figure.subplots(len(families), len(options), sharey=True, squeeze=False)
    for row, family in enumerate(families):
        for column, option in enumerate(options):
            found = [curve for curve in curves if (curve.family, curve.option) == (family, option)]
            axes = panels[row][column]
            if found:
                _draw_curve(axes, found[0], ends)
            else:
                axes.set_axis_off()
    handles, labels = next(axes for axes in panels.flat if axes.lines).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3 * len(options))
    figure.supylabel("% (test)")
    save_figure(figure, file)


def _draw_curve(axes: Any, curve: Curve, ends: dict[str, float]) -> None:
    for name, label, color, marker in _LINES:
        axes.plot(curve.values, curve.figures[name], marker=marker, ms=5, color=color, label=label)
    axes.axhline(ends["origin"], color=BEFORE, lw=1, ls=(0, (2, 4)), label="base's old")
    axes.axhline(ends["target"], color=AFTER, lw=1, ls=(3, (2, 4)), label="tuned's new")  # in the other's gaps
    axes.axvline(PatchOptions().to_dict()[curve.option], color=TUNED, lw=1, ls="--", zorder=0, label="default value")
    if curve.option == "density":
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(curve.values, [f"{value:g}" for value in curve.values])
    axes.tick_params(labelleft=True)
    axes.grid(axis="y", color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)
    axes.set(title=TITLES[curve.family], xlabel=curve.option)


def curves_seen(curves: Sequence[Curve]) -> str:
    """Where H is highest along each option, and what the ends of omega do to old and new."""
    seen = [
        f"H is highest at {c.option} {c.values[c.best]:g} with *{c.family}* ({max(c.figures['h_score']):.1f}, "
        f"lowest {min(c.figures['h_score']):.1f})."
        for c in curves
    ]
    for c in curves:
        if c.option == "omega":
            seen.append(
                f"From omega {c.values[0]:g} to {c.values[-1]:g}, old and new move by "
                f"{_change(c, 'origin'):+.1f} and {_change(c, 'target'):+.1f} with *{c.family}*; "
                "in the paper old falls and new rises."
            )
    return "\n".join(f"- {sentence}" for sentence in seen)


def _change(curve: Curve, name: str) -> float:
    return curve.figures[name][-1] - curve.figures[name][0]


@dataclass(frozen=True)
class Decoration:
    """What one patch's compensation does to the decoder (Fig. 6)."""

    label: str
    layers: tuple[str, ...]
    tuned: tuple[float, ...]  # sum |W_tuned - W_base| over each layer
    before: tuple[float, ...]  # of the kept entries before compensation; with a retain term of its goal
    after: tuple[float, ...]
    errors: tuple[float, float]  # mean relative layer error before and after, over all linear layers

    def share(self, when: tuple[float, ...]) -> float:
        """Percent of the tuned model's distance."""
        return 100 * sum(when) / sum(self.tuned)


def decorations_part(part: str, group: Group, folder: Path, docs: Path) -> str:
    """Patch the group's first pair, draw Fig. 6 into ``docs`` and return its Markdown; ``folder`` is the pair's."""
    pair = group.outcomes[0].pair
    found = [decoration_of(setting.label, make_report(pair, setting, folder)) for setting in DECORATED]
    picture = f"decorator-{part}-{group.name}.png"
    plot_decorations(found, docs / picture)
    seen = decorations_seen(found, pair.seed)
    return f"![Distance from base by layer, before and after compensation]({picture})\n\n{seen}"


def make_report(pair: Pair, setting: Setting, folder: Path) -> PatchReport:
    """The report of a patch of ``pair`` from the statistics in ``folder``; kept there, where the patch is not."""
    file = folder / "reports" / f"{setting.options.solver}{'-retained' if setting.retained else ''}.json"
    inputs = {"base": pair.base, "tuned": pair.tuned, "stats": folder / "stats"}
    if setting.retained:
        inputs["retain"] = folder / "stats-written"
    if not _is_of(file, setting, inputs):
        say(f"{setting.label}: how far it is from base")
        work = folder / "reports" / "work"
        shutil.rmtree(work, ignore_errors=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            options = (pair.base, pair.tuned, work, inputs["stats"], setting.resolved)
            patch_checkpoint(*options, retain=inputs.get("retain"))
            write_text_atomically(file, (work / REPORT_FILE).read_text(encoding="utf-8"))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return load_report(file)


def _is_of(file: Path, setting: Setting, inputs: dict[str, Path]) -> bool:
    """Whether a file is the report of this setting on these very inputs."""
    try:
        report = load_report(file)
    except TailorError:
        return False
    known = {name: entry["fingerprint"] for name, entry in report.inputs.items()}
    expected = {name: _fingerprint(name, path) for name, path in inputs.items()}
    return known == expected and report.options == json.loads(json.dumps(setting.resolved.to_dict()))


def _fingerprint(name: str, path: Path) -> str:
    opened = Checkpoint.open(path) if name in ("base", "tuned") else Stats.open(path)
    try:
        return opened.fingerprint()
    finally:
        opened.close()


def decoration_of(label: str, report: PatchReport) -> Decoration:
    """Sum a report's distances over each layer of the decoder."""
    patched = [tensor for tensor in report.tensors if tensor.patched]
    labels, groups = layers_of(_decoder(patched))

    def distances(key: str) -> tuple[float, ...]:
        return tuple(sum(getattr(tensor, f"distance_{key}") for tensor in group) for group in groups)

    errors = (report.totals["error_before"], report.totals["error_after"])
    return Decoration(label, tuple(labels), distances("tuned"), distances("before"), distances("after"), errors)


def _decoder(tensors: list[TensorRecord]) -> list[TensorRecord]:
    """The tensors of the stack of layers that has the most entries: a vision tower has layers of its own."""
    stacks: dict[str, list[TensorRecord]] = {}
    for tensor in tensors:
        labels, _ = layers_of([tensor])
        if labels != ["other"]:
            stacks.setdefault(tensor.name.partition(f".{labels[0]}.")[0], []).append(tensor)
    return max(stacks.values(), key=lambda stack: sum(tensor.numel for tensor in stack))


def plot_decorations(found: Sequence[Decoration], file: Path) -> None:
    """Draw a panel for every patch: three bars a layer."""
    columns = len(found) if len(found[0].layers) <= _WIDE else 1
    rows = -(-len(found) // columns)
    figure = new_figure(11, 1.0 + 3.4 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, one in zip(panels.flat, found, strict=True):
        kinds = [
            ("before compensation", BEFORE, list(one.before)),
            ("after compensation", AFTER, list(one.after)),
            ("tuned", TUNED, list(one.tuned)),
        ]
        draw_bars(axes, list(one.layers), kinds)
        axes.set(title=_title(one.label), xlabel="decoder layer")
    figure.supylabel("Σ|W − W_base|")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    save_figure(figure, file)


def _title(label: str) -> str:
    return label + {PAPER: " (the paper)", DEFAULT: " (default)"}.get(label, "")


def decorations_seen(found: Sequence[Decoration], seed: int) -> str:
    """How far compensation takes each patch from base, and what that does to the layer error."""
    each = [
        f"- from {one.share(one.before):.0f}% to {one.share(one.after):.0f}% of the tuned model's with *{one.label}* "
        f"(layer error {one.errors[0]:.2f} to {one.errors[1]:.2f})"
        for one in found
    ]
    return "\n\n".join(
        [
            f"Compensation takes the distance of the decoder's layers (seed {seed}):",
            "\n".join(each),
            "The kept entries start at the tuned model's values (with the retain term at its goal), so that a longer "
            "bar is no nearer weight; how near the outputs are, the layer error says.",
        ]
    )
