"""The pages of the evidence and their short tables; every figure and every verdict comes from the sweeps."""

from __future__ import annotations

from benchmarks.evidence.run import OWN_DATA, SMALL
from benchmarks.evidence.summary import (
    AFTER_PROPAGATION,
    AT_FIFTIETH,
    AT_TENTH,
    BASELINES,
    DISTILLED,
    FIRST,
    PAPER,
    PROPAGATED,
    RETAINED,
    Group,
    lines_of,
)
from benchmarks.real.render import table
from tailorcli.evaluation.metrics import Estimate, estimate

_SHORT_FAMILIES = ("base", "tuned", *BASELINES[:-1])  # of docs/results/what-to-expect.md


def section(name: str, group: Group, setting: str, picture: str, curves: str = "", decorations: str = "") -> str:
    """One benchmark's part of the document for one new task; ``curves`` and ``decorations`` are of Fig. 5 and 6."""
    pair = group.outcomes[0].pair
    seeds = len(group.outcomes)
    return "\n\n".join(
        part.strip()
        for part in (
            f"## {name}: {group.name}",
            setting,
            f"Old tasks: {', '.join(pair.origin)}. New task: {', '.join(pair.target)}. {_seeds(seeds)}.",
            main_table(group),
            f"![Old against new performance of every setting, mean of the seeds]({picture})",
            "### Against each other method at its best",
            difference_table(group, group.distilled()),
            difference_table(group, group.ours()),
            _READ_DIFFERENCES,
            verdict(group),
            "### The bar" if group.distilled() else "",
            bar(group, *BARS.get(name, BARS["quick"])),
            "### Area under the frontier",
            area_table(group),
            "### Density, retain weight and omega",
            grid_table(group),
            curves,
            "### What compensation moves" if decorations else "",
            decorations,
        )
        if part
    )


def _seeds(count: int) -> str:
    return f"Mean over {count} seeds of the fine-tuning" if count > 1 else "One seed"


def main_table(group: Group) -> str:
    """What each method keeps and gains."""
    rows = []
    best = max(float(group.mean(family, label, "h_score")[0]) for _, family, label in lines_of(group))
    for title, family, label in lines_of(group):
        h = estimate(group.mean(family, label, "h_score"))
        size = group.patch_bytes(family, label)
        cells = [
            title,
            *(f"{group.value(family, label, key):.1f}" for key in ("origin", "target")),
            f"{h.value:.1f}",
            _interval(h),
            f"{group.share(family, label, 'origin')[0]:.1f}",
            f"{group.share(family, label, 'target')[0]:.1f}",
            f"{group.share(family, label, 'gain')[0]:.1f}",
            "–" if family in ("base", "tuned") else f"{group.seconds(family, label):.0f}",
            "–" if size is None else f"{size / 1e6:.1f}",
        ]
        bold = h.value is not None and h.value >= best
        rows.append([f"**{cell}**" if bold and cell != "–" else cell for cell in cells])
    header = ["model", "old", "new", "H", "95%", "old kept, %", "new kept, %", "gain kept, %", "patch, s", "patch, MB"]
    return table(header, rows)


def _interval(found: Estimate, digits: str = ".1f") -> str:
    return "–" if found.interval is None else f"{found.interval[0]:{digits}} to {found.interval[1]:{digits}}"


def rivals(group: Group) -> list[tuple[str, str]]:
    """(family, label) of what the default is compared with: each other method at its best, and the paper."""
    found = [(family, label) for family in BASELINES if (label := group.best(family)) is not None]
    found += [(family, label) for family in ("none", "sequential", "joint") if (label := group.best(family))]
    if ("sequential", PAPER) in group.labels and ("sequential", PAPER) not in found:
        found.append(("sequential", PAPER))
    return found


_READ_DIFFERENCES = """H of the columns' settings minus H of the rows'; intervals are over the items, and paired. Each
method of a row has the setting with the best mean H on validation data."""


def difference_table(group: Group, ours: list[tuple[str, str, str]]) -> str:
    """H of each of our settings minus H of each rival, paired; empty without settings."""
    if not ours:
        return ""
    rows = []
    for rival in rivals(group):
        cells = [rival[1]]
        for _, *setting in ours:
            difference, seeds = group.difference((setting[0], setting[1]), rival)
            each = ", ".join(f"{value:+.1f}" for value in seeds)
            cells += [f"{difference.value:+.2f}", _interval(difference, ".2f"), each]
        rows.append(cells)
    header = ["minus"]
    for title, *_ in ours:
        header += [title, "95%", "each seed"]
    return table(header, rows)


BARS = {  # percent of the old, of the new
    **dict.fromkeys(("quick", "text", SMALL), (99.0, 97.0)),
    "multimodal": (90.0, 95.0),
}


def bar(group: Group, old_kept: float, new_kept: float) -> str:
    """Whether the distilled default is ahead of all, and keeps enough of old and new; empty where there is none."""
    found = {title: (family, label) for title, family, label in group.distilled()}
    less = [title for title in found if title.startswith(AT_FIFTIETH)]
    lines = []
    for title, tenth in found.items():
        if title in less:
            continue
        how = title.removeprefix(AT_TENTH)
        others = [one for one in rivals(group) if outcome_of(group, tenth, one) != "ahead of"]
        names = ", ".join(f"*{label}* ({_ahead(group, tenth, (of, label))})" for of, label in others)
        missed = f"missed against {names}" if others else "met"
        lines.append(f"A higher H than every other method at its best, at density 0.1{how}: {missed}.")
        for name, least, what in (("origin", old_kept, "old"), ("target", new_kept, "new")):
            share = float(group.share(*tenth, name)[0])
            lines.append(f"At least {least:g}% of the {what}{how}: {_met(share >= least)} ({share:.1f}%).")
    if found and not lines:
        lines.append("At density 0.1: not measured in this run.")
    best = group.best("interpolate")
    if less and best is not None:
        fiftieth, how = found[less[0]], f"{FIRST}," if less[0].endswith(FIRST) else ""
        rival = ("interpolate", best)
        ahead = outcome_of(group, fiftieth, rival) == "ahead of"
        by = _ahead(group, fiftieth, rival)
        lines.append(f"At density 0.02{how} a higher H than *{best}*: {_met(ahead)} ({by}).")
    return "\n".join(f"- {line}" for line in lines)


def _met(ok: bool) -> str:
    return "met" if ok else "missed"


def _ahead(group: Group, ours: tuple[str, str], rival: tuple[str, str]) -> str:
    """H of a distilled setting minus that of a rival, with its interval."""
    difference, _ = group.difference(ours, rival)
    return f"{difference.value:+.2f}, {_interval(difference, '.2f')}"


def outcome_of(group: Group, ours: tuple[str, str], rival: tuple[str, str]) -> str:
    """Ahead, behind or level: beyond the interval, and in every seed."""
    difference, seeds = group.difference(ours, rival)
    low, high = difference.interval or (0.0, 0.0)
    if low > 0 and all(value > 0 for value in seeds):
        return "ahead of"
    return "behind" if high < 0 and all(value < 0 for value in seeds) else "level with"


def verdict(group: Group) -> str:
    """Where our settings win and lose, and how near the frontier comes to keeping both."""
    ours = [*group.distilled(), *group.ours()]
    found = [*(_ranking(group, *one) for one in ours), *_nearest(group)]
    return "\n".join(f"- {sentence}" for sentence in found)


def _ranking(group: Group, title: str, family: str, label: str) -> str:
    words: dict[str, list[str]] = {}
    for rival in rivals(group):
        if rival != (family, label):
            words.setdefault(outcome_of(group, (family, label), rival), []).append(f"*{rival[1]}*")
    ranking = "; ".join(f"{word} {', '.join(names)}" for word, names in words.items())
    how = FIRST if title.endswith(FIRST) else ""
    names = {
        "default": "The default is",
        AT_TENTH: f"The default, distilled{how}, is",
        AT_FIFTIETH: f"At density 0.02, distilled{how}, it is",
        "picked on validation data": f"The setting picked on validation data ({_weight_of(label)}) is",
    }
    kind = title.removesuffix(FIRST)
    if kind.startswith(AT_TENTH) and kind.endswith(" samples"):
        return f"The default, distilled on {kind.removeprefix(f'{AT_TENTH}, ')}{how}, is {ranking}."
    return f"{names.get(kind, f'With the {title} it is')} {ranking}."


def _nearest(group: Group) -> list[str]:
    """How much of the gain comes with 99% of the old, at densities below 1."""
    near = []
    for family in (DISTILLED, AFTER_PROPAGATION, PROPAGATED, RETAINED, OWN_DATA):
        points = [
            (label, group.share(family, label, "origin")[0], group.share(family, label, "gain")[0])
            for of, label in group.labels
            if of == family and ", density 1," not in label
        ]
        enough = [point for point in points if point[1] >= 99.0]
        if enough:
            label, old, new = max(enough, key=lambda point: point[2])
            near.append(
                f"With at least 99% of the base's old performance, *{family}* keeps at most {new:.1f}% of the gain "
                f"({_settings(label)}; old {old:.1f}%)."
            )
        elif points:
            label, old, new = max(points, key=lambda point: point[1])
            near.append(
                f"No setting of *{family}* below density 1 keeps 99% of the old; {_settings(label)} "
                f"keeps {old:.1f}% and {new:.1f}% of the gain."
            )
    return near


def short_table(group: Group) -> str:
    """What to expect: the ends, the baselines, the paper, ours at density 0.1, and our best at any density."""
    ours = {(family, label): title for title, family, label in (*group.distilled(), *group.ours())}
    rows: list[tuple[list[str], bool, list[str]]] = []  # names, whether ours, figures
    for title, family, label in lines_of(group):
        is_ours = (family, label) in ours
        shown = is_ours or family in _SHORT_FAMILIES or label == PAPER
        if not shown and not (family == PROPAGATED and label == group.best(PROPAGATED)):
            continue
        setting = f" ({_weight_of(label)})" if family == PROPAGATED else ""
        name = f"{ours[family, label]}{setting}" if is_ours else title
        h = estimate(group.mean(family, label, "h_score"))
        values = [f"{group.value(family, label, key):.1f}" for key in ("origin", "target")]
        figures = [*values, f"{h.value:.1f}", _interval(h)]
        alike = next((names for names, other, known in rows if is_ours and other and known == figures), None)
        if alike is None:
            rows.append(([name], is_ours, figures))
        else:
            alike.append(name)
    cells = [[_named(names) if is_ours else names[0], *figures] for names, is_ours, figures in rows]
    return table(["model", "old", "new", "H", "95%"], cells)


def _named(names: list[str]) -> str:
    """Our settings of a row, in bold; without a density of its own it is the default's."""
    density = "" if "density" in names[0] else "density 0.1: "
    return f"**{density}{'; '.join(names)}**"


def _weight_of(label: str) -> str:
    return _settings(label).removeprefix("density 0.1, ")


def _settings(label: str) -> str:
    """A label of our families without the family."""
    return (
        label.removeprefix(f"{DISTILLED}, ")
        .removeprefix(f"{AFTER_PROPAGATION}, ")
        .removeprefix(f"{PROPAGATED}, ")
        .removeprefix(f"{RETAINED}, ")
    )


def area_table(group: Group) -> str:
    """Each family's area, and how many settings it was given."""
    rows = []
    for family in group.families():
        area = group.area(family)
        count = sum(1 for of, _ in group.labels if of == family)
        rows.append([family, str(count), "–" if area.value is None else f"{area.value:.3f}", _interval(area, ".3f")])
    return table(["family", "settings", "area", "95%"], sorted(rows, key=lambda row: row[2], reverse=True))


def grid_table(group: Group) -> str:
    """Every setting of the paper's method and of ours."""
    rows = []
    for family, label in group.labels:
        if family in BASELINES or family == label:
            continue
        values = [f"{group.value(family, label, name):.1f}" for name in ("origin", "target", "h_score")]
        rows.append([label.replace(RETAINED, family) if family == OWN_DATA else label, *values])
    return table(["setting", "old", "new", "H"], rows)
