"""The page of sparse fine-tuning: tables, pictures, and what the papers claim against what was seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from benchmarks.common import markdown
from benchmarks.pages import reflow
from benchmarks.sparse.cells import TEST, Cell, joined, read_kept, read_part, write_kept
from benchmarks.sparse.pictures import draw_depths, draw_masks
from benchmarks.sparse.setting import BASE, DEPTHS, FINE_TUNES, MASKS, PARTS, ROWS, TUNED_AT, Part, Row
from benchmarks.sparse.summary import CLAIMS, FIGURES, FULL, OF_OURS, Claim, Side, Table, tables_of, verdict
from tailorcli.evaluation.metrics import estimate
from tailorcli.training.outcome import memory_of
from tailorcli.units import counted

SEEDS = 3  # that the evidence asks for


def write(roots: Sequence[Path], document: Path) -> dict[str, list[str]]:
    """Write the page and its pictures from all that is there of all parts, each from the first root that has it.

    Every cell is kept in a file beside the page, data/sparse-PART.jsonl, and those of earlier runs stay in both. The
    section of a part stays as it was while the cells lack rows that it has: these are returned, by part.
    """
    found = {}
    for name in PARTS:
        kept = document.parent / "data" / f"sparse-{name}.jsonl"
        measured = next(filter(None, (read_part(root / name) for root in roots)), [])
        found[name] = joined(read_kept(kept), measured)
        if measured:
            write_kept(found[name], kept)
    before = document.read_text(encoding="utf-8") if document.exists() else ""
    lacking = {name: rows for name, cells in found.items() if cells and (rows := _lacking(name, cells, before))}
    shown = {name: [] if name in lacking else cells for name, cells in found.items()}
    document.write_text(reflow(page(shown, document.parent, before, lacking)), encoding="utf-8")
    return lacking


def _lacking(name: str, cells: Sequence[Cell], before: str) -> list[str]:
    """The rows with all layers that a page has of a part and its cells lack."""
    table = _part_of(before, name).partition(f": {TUNED_AT} (")[2].partition("\n###")[0]
    have = {cell.row for cell in cells if cell.depth == TUNED_AT and TEST in cell.scores}
    return [row.title for row in ROWS if row not in have and f"\n| {row.title} " in table]


def page(
    found: dict[str, list[Cell]],
    folder: Path,
    before: str = "",
    lacking: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """The whole page; its pictures go into ``folder``. A part without cells stays as it was in the page ``before``.

    ``lacking`` are the rows for want of which a part has none.
    """
    told = [
        f"*{name}* has its section of an earlier run. The scores of a later one, with other texts or steps, are in the "
        f"data, but not yet all rows: {', '.join(rows)} with all layers."
        for name, rows in lacking.items()
    ]
    parts: list[str] = []
    for name, cells in found.items():
        parts += _section(PARTS[name], cells, folder) if cells else [_as_before(PARTS[name], before)]
    return "\n\n".join([HEAD, *told, *_short(found, before), *parts, _memory()]) + "\n"


def _short(found: dict[str, list[Cell]], before: str) -> list[str]:
    """The rows with the highest H at all layers, of those with the most seeds, for each test; nothing without any.

    A part without cells has its lines of the page ``before``.
    """
    lines = []
    for name, cells in found.items():
        if not cells:
            known = re.findall(rf"^\| ({name}-.*?) *\|$", before, re.MULTILINE)
            lines += [[cell.strip() for cell in line.split("|")] for line in known]
        for table in tables_of(cells):
            seeds = {row: len(table.of((row, TUNED_AT))) for row in ROWS}
            most = max(seeds.values())
            h = {row: table.figure((row, TUNED_AT), "h_score") for row in (BASE, *ROWS) if seeds.get(row, most) == most}
            shown = {row: f"{row.title} {values[0]:.1f}" for row, values in h.items() if values is not None}
            if not most or not {BASE, FULL} <= shown.keys():
                continue
            ranked = sorted(shown.keys() - {BASE}, key=lambda row: -float(shown[row].rpartition(" ")[2]))
            best = [shown[row] for row in ranked[:3]]
            ends = [shown[row].rpartition(" ")[2] for row in (FULL, BASE)]
            lines.append([f"{name}-{table.task}", str(most), *best, *[""] * (3 - len(best)), *ends])
    columns = ("test", "seeds", "highest H", "second", "third", "full", "zero-shot")
    told = "All layers, the rows with the most seeds; how far these can be told apart is below."
    return [f"{told}\n\n{markdown(columns, lines, text=(0, 2, 3, 4))}"] if lines else []


def _memory() -> str:
    """Bytes a trained entry by method, as the plan of a fine-tune counts them."""
    entries = 8  # a byte of a mask
    kinds = {"float32": 4, "bfloat16": 2}
    costs = {
        method: [
            memory_of(method, entries * size, entries, size, 2 * entries * size, puts_back=False)
            for size in kinds.values()
        ]
        for method in FINE_TUNES
    }
    ours = {"weights", "gradients", "optimiser"}
    rows = [
        (
            method,
            *(f"{sum(cost.values()) / entries:g}" for cost in of_method),
            ", ".join(f"{part} {of_method[0][part] / entries:g}" for part in of_method[0] if part not in ours),
        )
        for method, of_method in costs.items()
    ]
    columns = ("method", *(f"weights in {kind}" for kind in kinds), "beside full (float32)")
    return f"""## Memory

Bytes for each entry that is trained, as `finetune --dry-run` counts them: weights, gradients, AdamW's moments and what
the method adds. Activations come on top, the same for all. What is frozen takes its weights alone; method *dowser*
has gradients and moments of whole tensors, for the tenth that moves and the rest.

{markdown(columns, rows, text=(0, 3))}"""


HEAD = """# Sparse fine-tuning

Written by `python -m benchmarks.sparse`. The methods of [finetune](../how-to/finetune.md), and patches on top of
them: the same base, data, steps and layers for all.

- **old**, **new**: accuracy in percent on the test parts; **average** is their mean, **H** their harmonic mean.
- **Intervals** (95%) are a bootstrap over the test items, of the mean over the seeds; **±** is the deviation of H
  between the seeds. Differences are paired: of the same items and seeds. Of one seed
  neither says how another fine-tune would differ. Rows of a table with other numbers of seeds are not to be compared.
- **The rate** of each row is that with the best H on the validation parts, with the first seed and the same layers, of
  those that ran with the most seeds there. A patch has the fine-tune below it at the rate that suits the patch.
  Where a row was not validated with fewer layers, it has the rate that is best with all, though a higher one can
  suit it better.
- **graft**, **dare** and **tailor (paper)** stand on the full fine-tune. **ours** is the default of `patch`, with
  statistics of what the base writes itself.
- **entries** is the share of all entries that differ from the base's.
- **seconds** are of everything from the base on: the probe, the statistics, the fine-tune below a patch. On a CPU they
  are those that one core worked, on a GPU those that passed while others ran on it: compare them within a table only.
- **peak MB** is that of the fine-tune, or of patching: on a GPU what its tensors took; on a CPU that of a process of
  three steps, with Python and torch in it. Of several runs it is the least, as what ran before can hold some.
- Scores lie item by item in `data/sparse-PART.jsonl` beside this page: a later run adds its own to them.

*quick* is a small model, trained briefly: an indication of what holds for large ones, no more."""


def _as_before(part: Part, page: str) -> str:
    """The section of a part in an earlier page, else that it was not measured."""
    return (
        _part_of(page, part.name)
        or f"""## {part.name}

Not measured: {part.model} wants a GPU. `python -m benchmarks.sparse --part {part.name}` runs it and adds it here."""
    )


def _part_of(page: str, name: str) -> str:
    """The section of a part in a page; empty where it has none."""
    sections = (f"## {text}".strip() for text in page.split("\n## ")[1:])
    return next((text for text in sections if text.startswith(f"## {name}\n")), "")


def _section(part: Part, cells: Sequence[Cell], folder: Path) -> list[str]:
    """A part: its setting, and for each task its tables, pictures and claims."""
    tables = tables_of(cells)
    texts = [f"## {part.name}", _setting(part, cells)]
    for table in tables:
        name = f"{part.name}-{table.task}"
        texts += [f"### {name}: what is missing", missing] if (missing := _missing(table)) else []
        for depth, layers in table.depths.items():
            if table.of((FULL, depth)):
                texts += [f"### {name}: {depth} ({counted(layers, 'layer')})", _figures(table, depth)]
        depths, masks = f"sparse-depths-{name}.png", f"sparse-masks-{name}.png"
        if seeds := draw_depths(table, folder / depths):
            texts += [
                f"### {name}: H over the depth of fine-tuning",
                f"As in Model-Dowser's Figure 1; mean of {counted(seeds, 'seed')}.\n\n"
                f"![H over the layers that are fine-tuned]({depths})",
            ]
        if seeds := draw_masks(table, folder / masks):
            texts += [
                f"### {name}: other masks in SPIDER's place",
                "As in SPIDER's Table 3: half of the entries of each tensor, those with the smallest weights, the "
                f"largest gradients, or drawn, at SPIDER's rate; mean of {counted(seeds, 'seed')}.\n\n"
                f"![Old, new and H by mask]({masks})",
            ]
        texts += [f"### {name}: what the papers claim, and what was seen", _claims(table)]
        texts += [f"### {name}: the rates", _rates(table)]
    return texts


def _setting(part: Part, cells: Sequence[Cell]) -> str:
    limit = "" if part.items is None else f", the first {part.items} items of a task"
    trained = f"{part.steps} steps of {part.batch} samples of at most {part.seq_len} tokens, AdamW, passes in bfloat16"
    machines = sorted({cell.machine for cell in cells if cell.machine})
    rows = [
        ("models", part.model),
        ("training", trained),
        ("frozen", part.frozen),
        ("statistics", f"{part.samples} samples of each kind"),
        ("test and validation", f"those of [{part.name}](evidence-{part.name}.md){limit}"),
        ("update ratio, density", "0.1"),
        ("ran on", "; ".join(machines)),
    ]
    return markdown(("setting", "value"), rows, text=(0, 1))


def _missing(table: Table) -> str:
    """What was not measured, in words; empty where all was."""
    lines = [f"- {depth}: every row." for depth in DEPTHS if depth not in table.depths]
    for depth in table.depths:
        seeds = {row.title: len(table.of((row, depth))) for row in ROWS}
        for count in sorted(set(seeds.values()) - {SEEDS}):
            rows = [title for title, found in seeds.items() if found == count]
            named = "every row" if len(rows) == len(ROWS) else ", ".join(rows)
            lines.append(f"- {depth}: {count or 'none'} of {SEEDS} seeds of {named}.")
    masks = min(len(table.of((Row(mask), TUNED_AT))) for mask in MASKS)
    if masks < SEEDS:
        lines.append(f"- Other masks in SPIDER's place: {masks or 'none'} of {SEEDS} seeds.")
    if not any(cell.peak for cell in table.cells):
        lines.append("- Peak memory.")
    return "\n".join(lines)


def _figures(table: Table, depth: str) -> str:
    """A row a line, in the order of the rows."""
    columns = ["method", "old", "new", "average", "H", "95% interval", "±", "seeds", "entries", "seconds", "peak MB"]
    rows = []
    for row in (BASE, *ROWS):
        side = (row, depth)
        values = [estimate(figure) for name in FIGURES if (figure := table.figure(side, name)) is not None]
        if len(values) < len(FIGURES):
            continue
        moved, seconds, peak = table.cost(side)
        interval, spread = values[-1].interval, table.between_seeds(side)
        cells = [f"{value.value:.1f}" for value in values]
        cells.append("" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}")
        cells.append("" if spread is None else f"{spread:.1f}")
        cells += [
            str(len(table.of(side))),
            f"{100 * moved:.1f}%",
            f"{seconds:.0f}" if row.fine else "",
            f"{peak / 1e6:.0f}" if peak else "",
        ]
        rows.append([row.title, *cells])
    most = max(int(cells[7]) for cells in rows)
    best = max((cells for cells in rows if int(cells[7]) == most), key=lambda cells: float(cells[4]))
    of = "" if all(int(cells[7]) == most for cells in rows) else f" of the rows with {counted(most, 'seed')}"
    filled = [number for number in range(len(columns)) if any(cells[number] for cells in rows)]
    columns, rows = [columns[n] for n in filled], [[cells[n] for n in filled] for cells in rows]
    return f"The highest H{of} has *{best[0]}*: {best[4]}.\n\n{markdown(columns, rows)}"


def _claims(table: Table) -> str:
    """Every claim with how far it holds."""
    texts = []
    for title, claims in (("The papers'", CLAIMS), ("Ours, which no paper claims", OF_OURS)):
        rows = [row for claim in claims if (row := _claim(table, claim))]
        if not rows:
            continue
        seen = [row[-1] for row in rows]
        told = ", ".join(f"{seen.count(word)} {word}" for word in ("yes", "no", "not told apart") if word in seen)
        columns = ("claim", "layers", "ahead in H", "95% interval", "seeds", "seen here")
        texts.append(f"{title} ({told}):\n\n{markdown(columns, rows, text=(0, 1, 5))}")
    if better := table.better():
        texts.append(
            "These hold at the rates taken. Of some rows another was better, and not run with as many seeds: "
            f"{_named(better)}."
        )
    return "\n\n".join(texts)


def _named(better: Iterable[Side]) -> str:
    return ", ".join(f"*{row.title}* ({depth})" for row, depth in better)


def _claim(table: Table, claim: Claim) -> list[str]:
    gap = table.gap(claim)
    if gap is None:
        return []
    depths = list(dict.fromkeys((claim.ahead[1], claim.behind[1])))
    figures = (f"{gap[0]:+.1f}", f"{gap[1]:+.1f} to {gap[2]:+.1f}", str(len(table.both(claim))))
    return [claim.text, ", ".join(depths), *figures, verdict(gap)]


def _rates(table: Table) -> str:
    """H at each rate that was tried, on the validation and the test part, the one taken, and what that leaves open."""
    texts = [
        "H with the first seed on the validation part, in brackets on the test part; the rate taken.",
        *(text for depth in reversed(table.depths) if (text := _rates_at(table, depth))),
    ]
    if better := table.better():
        texts.insert(1, f"Better on validation, but not run with as many seeds: {_named(better)}.")
    return "\n\n".join(texts)


def _rates_at(table: Table, depth: str) -> str:
    """The rates that were tried at a depth; empty where none was scored on validation."""
    found, tested, better = table.rates(depth), table.rates(depth, TEST), table.better()
    if not found:
        return ""
    tried = sorted({rate for of_row in found.values() for rate in of_row})

    def shown(row: Row, rate: float) -> str:
        on_test = tested.get(row, {}).get(rate)
        return f"{found[row][rate]:.1f}" + ("" if on_test is None else f" ({on_test:.1f})")

    rows, edges = [], []
    for row, of_row in found.items():
        taken = table.taken[row, depth]
        rows.append([row.title, *(shown(row, rate) if rate in of_row else "" for rate in tried), f"{taken:g}"])
        if (row, depth) not in better and taken in (min(of_row), max(of_row)):
            edges.append(row.title)
    at_edge = ""
    if edges:
        at_edge = f"At the edge of what was tried, so that a better one may lie beyond it: {', '.join(edges)}."
    columns = ("method", *(f"{rate:g}" for rate in tried), "taken")
    return f"{depth[0].upper()}{depth[1:]}. {at_edge}\n\n{markdown(columns, rows)}"
