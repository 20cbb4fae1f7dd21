"""Sparse fine-tuning beside patching: the harness on tiny models, and a page that tells claims as figures have them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_family_pair
from helpers import make_pair, read_tensors

from benchmarks.evidence import pairs
from benchmarks.quick import data as quick_data
from benchmarks.sparse import bench, masks, render, run, setting, summary
from benchmarks.sparse.cells import TEST, VALIDATION, Cell, cell_file, folder_of, joined, read_kept, read_part
from benchmarks.sparse.setting import BASE, MASKS, PARTS, ROWS, TUNED_AT, Row
from benchmarks.sparse.summary import CLAIMS, DOWSER, FULL, OURS, SPIDER, THIRD, Table
from tailorcli.evaluation.metrics import TaskScores

DEPTHS = {THIRD: 1, "last 2": 2, TUNED_AT: 4}


def scored(share, hits, items=40):
    """Items of ten tokens; those of an even number have ``hits`` more right tokens."""
    correct = np.array([10 * share + (hits if number % 2 == 0 else 0) for number in range(items)], float)
    return TaskScores(correct, np.full(items, 10.0), np.full(items, np.nan))


def cell(row, depth, seed, old, new, rate=1e-3):
    scores = {"english": scored(old, 0), "python": scored(old, 1), "unicode": scored(new, 0)}
    layers = DEPTHS.get(depth, 0)
    return Cell("unicode", seed, depth, layers, row, rate, {TEST: scores, VALIDATION: scores}, 0.1, 10.0, 10**9)


def cells():
    """Two seeds with every row, and a third with full alone; SPIDER is ahead of full, and Model-Dowser is not."""
    found = [cell(BASE, "", seed, 0.6, 0.1, 0.0) for seed in (0, 1, 2)]
    for seed in (0, 1):
        for depth in DEPTHS:
            values = dict.fromkeys(ROWS, (0.4, 0.5)) | {SPIDER: (0.6, 0.4 + seed / 100), DOWSER: (0.6, 0.1)}
            found += [cell(row, depth, seed, *value) for row, value in values.items()]
        found += [cell(Row(mask), TUNED_AT, seed, 0.5, 0.3) for mask in MASKS]
    found.append(cell(OURS[0], TUNED_AT, 0, 0.1, 0.1, rate=3e-3))
    del found[-1].scores[TEST]
    return [*found, cell(FULL, TUNED_AT, 2, 0.9, 0.5)]


def rows_of(text):
    """Tables' lines as tuples of cells."""
    lines = [line for line in text.splitlines() if line[:1] == "|"]
    return [tuple(item.strip() for item in line.strip("|").split("|")) for line in lines]


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(summary, "RESAMPLES", 100)


@pytest.mark.usefixtures("few_resamples")
def test_the_page_says_what_was_seen_what_it_is_of_and_what_is_missing(tmp_path):
    found = [replace(one, machine=f"chip {min(one.seed, 1)}") for one in cells()]
    page = render.page({"quick": found, "text": [], "multimodal": []}, tmp_path)
    assert "chip 0; chip 1 " in page
    claims = {row[:2]: row for row in rows_of(page) if len(row) == 6 and row[0] != "claim"}
    assert claims["SPIDER beats full", TUNED_AT][-1] == "yes"
    assert claims["Model-Dowser beats full", TUNED_AT][-2:] == ("2", "no")
    assert claims["ours on full beats full alone", TUNED_AT][-1] == "not told apart"
    assert claims["SPIDER's mask beats that by random", TUNED_AT][-1] == "yes"
    assert next(row for row in rows_of(page) if row[0] == "quick-unicode")[:3] == ("quick-unicode", "3", "full 52.3")
    title = f"### quick-unicode: {TUNED_AT}"
    table = {row[0]: row for row in rows_of(page[page.index(title) :].split("###")[1])}
    assert (table["full"][1], table["full"][7]) == ("59.2", "3")
    assert (table["half"][1], table["half"][7]) == ("42.5", "2")
    assert table["zero-shot"][3] == "36.2"
    assert [name for name in table if name in {row.title for row in ROWS}] == [row.title for row in ROWS]
    best = page[page.index(title) :].split("\n\n")[1]
    assert best == "The highest H of the rows with 3 seeds has *full*: 52.3."
    assert page.count("mean of 2 seeds") == 2
    assert f"- {TUNED_AT}: 2 of 3 seeds of half, l2, graft, dare," in page
    assert f"- {THIRD}: 2 of 3 seeds of every row." in page
    assert "- Other masks in SPIDER's place: 2 of 3 seeds." in page
    assert "--part text" in page
    memory = {row[0]: row[1:] for row in rows_of(page[page.index("## Memory") :])}
    assert memory["full"] == ("16", "8", "")
    assert memory["spider"] == ("24", "14", "base's copy 4, accumulated gradient 4")
    assert memory["dowser"] == ("16.125", "8.125", "mask 0.125")
    rates = next(row for row in rows_of(page[page.index(": the rates") :]) if row[0] == "ours on full")
    assert rates[-1] == "0.001"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "sparse-depths-quick-unicode.png",
        "sparse-masks-quick-unicode.png",
    ]


def test_intervals_are_paired_over_the_items():
    """What both rows find hard is no spread of their difference."""
    table = Table("unicode", tuple(cells()))
    hard = {task: scored(0.2, 6) for task in ("english", "python", "unicode")}
    for one in table.cells:
        if one.row in (FULL, SPIDER) and TEST in one.scores:
            ahead = {task: replace(scores, correct=scores.correct + 1) for task, scores in hard.items()}
            one.scores[TEST] = ahead if one.row == SPIDER else hard
    value, low, high = table.gap(next(claim for claim in CLAIMS if claim.ahead == (SPIDER, TUNED_AT)))
    single = np.quantile(table.figure((SPIDER, TUNED_AT), "h_score")[1:], (0.025, 0.975))
    assert (value, low, high) == pytest.approx((10, 10, 10), abs=0.3)
    assert single[1] - single[0] > 2


def test_masks_are_half_of_the_entries_and_what_they_say():
    generator = torch.Generator().manual_seed(0)
    base, gradient = torch.randn(8, 6, generator=generator), torch.randn(8, 6, generator=generator)
    found = {name: rule("w", base, gradient) for name, rule in masks.RULES.items()}
    assert set(found) == set(MASKS)
    assert {int(mask.sum()) for mask in found.values()} == {24}
    assert base[found["magnitude"]].abs().max() <= base[~found["magnitude"]].abs().min()
    assert gradient[found["gradient"]].abs().min() >= gradient[~found["gradient"]].abs().max()
    assert torch.equal(masks.at_random("w", base, gradient), found["random"])
    assert not torch.equal(masks.at_random("v", base, gradient), found["random"])


def tiny_part(name, folder, kind):
    """A part of the table whose pair of two seeds is ``folder``'s, with the same few records for every task."""
    lines = (folder / "data.jsonl").read_text().splitlines(keepends=True)
    lines = [line for line in lines if kind == "text" or '"response"' in line]
    for task in ("old", "new"):
        for part in (VALIDATION, TEST):
            (folder / f"{task}-{part}.jsonl").write_text("".join(lines))

    def make(cache, bases_only):
        assert bases_only
        where = (folder / "base", folder / "none", folder / "data.jsonl", folder / "data.jsonl", folder)
        return [pairs.Pair("new", seed, *where, {"old": kind, "new": kind}, ("old",), ("new",), 8) for seed in (0, 1)]

    few = {"steps": 2, "batch": 2, "seq_len": 16, "samples": 4, "items": 2}
    return replace(PARTS[name], make=make, **few, rates=PARTS[name].rates[:1], wider=())


LARGER = [
    ("text", "text", [FULL, OURS[0]]),
    pytest.param("text", "text", [FULL, OURS[0], SPIDER, DOWSER], marks=pytest.mark.slow),
    pytest.param("multimodal", "generate", [FULL, OURS[0], SPIDER, DOWSER], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "kind", "rows"), LARGER)
def test_the_larger_parts_go_through_on_tiny_models(tmp_path, monkeypatch, name, kind, rows):
    folder = tmp_path / "models"
    make_pair(folder) if name == "text" else make_family_pair(folder, "llava")
    kept, other = [], ("random",) if SPIDER in rows else ()
    monkeypatch.setattr(bench, "ProbeOptions", lambda seq_len: run_probe_options(seq_len))
    monkeypatch.setattr(bench.Bench, "measure_memory", lambda bench, rows: kept.append(bench.pair.seed))
    assert setting.depths_of(folder / "base") == {THIRD: 1, "last 2": 2, TUNED_AT: 2}
    part = tiny_part(name, folder, kind)
    plan = run.Plan(["new"], 1, rows, [TUNED_AT], other)
    assert run.run_part(part, tmp_path, plan, lambda: None) == []
    found = {(cell.row, cell.depth): cell for cell in read_part(tmp_path)}
    made = [(row, TUNED_AT) for row in (*rows, *map(Row, other))]
    assert set(found) == {(BASE, ""), *made}
    assert all(TEST in cell.scores for cell in found.values())
    assert 0 < found[OURS[0], TUNED_AT].moved < 0.11 < found[FULL, TUNED_AT].moved
    if DOWSER in rows:
        assert 0.01 < found[DOWSER, TUNED_AT].moved < 0.1
    assert kept == [0]
    assert not (tmp_path / "sparse" / "new-0" / "models").exists()
    monkeypatch.setattr(bench, "evaluate_models", None)
    monkeypatch.setattr(bench, "finetune_model", None)
    assert run.run_part(part, tmp_path, plan, lambda: None) == []  # nothing is made twice


class Pretended:
    """A bench of four layers whose units reach an H that grows with the rate, up to a rate that is best."""

    def __init__(self, seed, best):
        self.part, self.pair = PARTS["quick"], type("Pair", (), {"name": "unicode", "seed": seed})()
        self.best = best if isinstance(best, dict) else dict.fromkeys(DEPTHS, best)
        self.depths, self.done = DEPTHS, {}

    def units(self, depth, wanted, part):
        missing = [(row, rate) for row, rate in wanted if (depth, row, rate) not in self.done]
        return [bench.Unit(depth, *fine, tuple(rows)) for fine, rows in bench.grouped(missing)]

    def validated(self, depth):
        found = {}
        for other, row, rate in self.done:
            if other == depth:
                found.setdefault(row, {})[rate] = -abs(np.log(rate / self.best[depth]))
        return found


def made_of(benches, plan):
    """What is made in which order: the name of the phase, and seed, depth, row and rate of each."""
    found = []
    for name, units in run.phases(benches, plan):
        for one, unit in units:
            for row in unit.rows:
                one.done[unit.depth, row, unit.rate] = None
                found.append((name, one.pair.seed, unit.depth, row, unit.rate))
    return found


def test_what_tells_most_is_made_first_and_rates_are_sought_beyond_the_edge():
    benches = [Pretended(seed, best=dict.fromkeys(DEPTHS, 1e-2) | {THIRD: 3e-3}) for seed in range(3)]
    found = made_of(benches, run.Plan(["unicode"], 3))
    assert len(found) == len(set(found))
    first = [row for row in found if row[0] == "all layers, first rates" and row[3] not in setting.LATE]
    early = [row for row in ROWS if row not in setting.LATE]
    assert found[: len(first)] == first
    assert len(first) == 3 * len(early)
    assert {(row[3].fine, row[4]) for row in first} == {
        *(("full", 1e-3), ("half", 1e-3), ("l2", 1e-3), ("spider", 3e-3), ("dowser", 3e-3))
    }
    assert {seed for _, seed, *_ in found[: 3 * 5]} == {0, 1, 2}
    beyond = [row for row in found if row[0] == "all layers, beyond the edge"]
    assert {(seed, rate) for _, seed, _, _, rate in beyond} == {(0, 1e-2), (0, 3e-2)}  # 1e-2 was at the edge, too
    assert {row for *_, row, _ in beyond} == set(ROWS)
    tested = {(seed, depth, row) for _, seed, depth, row, rate in found if rate == benches[0].best[depth]}
    assert tested >= {(seed, depth, row) for seed in range(3) for depth in DEPTHS for row in ROWS}
    assert {rate for name, *_, rate in found if name == f"{THIRD}, first rates"} == {1e-2}  # best with all layers
    assert {(seed, rate) for name, seed, *_, rate in found if name == f"{THIRD}, other rates"} == {(0, 1e-3), (0, 3e-3)}
    assert {row.fine for name, *_, row, _ in found if name == "other masks"} == set(MASKS)


@pytest.mark.parametrize("best", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
def test_what_is_run_again_makes_no_more(best):
    for rates in (PARTS["quick"].rates, (1e-3,)):
        benches = [Pretended(0, best)]
        benches[0].part = replace(benches[0].part, rates=rates)
        plan = run.Plan(["unicode"], 1, [FULL, OURS[0]], [TUNED_AT], ())
        assert made_of(benches, plan)
        assert made_of(benches, plan) == []


def test_a_plan_of_few_rows_makes_no_others():
    benches = [Pretended(seed, best=1e-3) for seed in range(2)]
    found = made_of(benches, run.Plan(["unicode"], 2, [FULL, OURS[0]], [TUNED_AT], ()))
    assert {row for *_, row, _ in found} == {FULL, OURS[0]}
    assert {depth for _, _, depth, *_ in found} == {TUNED_AT}
    assert {rate for *_, rate in found} == {3e-4, 1e-3, 3e-3}


def fails():
    raise ValueError("no luck")


@pytest.mark.parametrize("at_a_time", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_job_that_fails_is_told_and_ends_no_other(tmp_path, at_a_time):
    jobs = [("one", fails), ("two", partial(Path.touch, tmp_path / "two"))]
    assert run.run_all(jobs, at_a_time) == ["one: no luck"]
    assert (tmp_path / "two").exists()


@pytest.mark.usefixtures("few_resamples")
def test_the_page_is_of_the_rate_that_ran_most_and_says_which_was_better():
    found = [replace(one, scores={**one.scores}) for one in cells() if one.row != OURS[0]]
    found += [cell(OURS[0], TUNED_AT, seed, 0.5, 0.5) for seed in (0, 1)]
    found.append(cell(OURS[0], TUNED_AT, 0, 0.6, 0.6, rate=3e-3))
    table = Table("unicode", tuple(found))
    assert [one.rate for one in table.of((OURS[0], TUNED_AT))] == [1e-3, 1e-3]
    assert f"not run with as many seeds: *ours on full* ({TUNED_AT})" in render._rates(table)
    assert f"better, and not run with as many seeds: *ours on full* ({TUNED_AT})" in render._claims(table)
    more = Table("unicode", (*found, cell(OURS[0], TUNED_AT, 1, 0.6, 0.6, rate=3e-3)))
    assert [one.rate for one in more.of((OURS[0], TUNED_AT))] == [3e-3, 3e-3]
    assert "was better" not in render._claims(more)
    not_validated = cell(OURS[0], THIRD, 0, 0.5, 0.5)
    del not_validated.scores[VALIDATION]
    deeper = Table("unicode", (*more.cells, not_validated))
    assert [one.rate for one in deeper.of((OURS[0], THIRD))] == [1e-3]
    assert [one.rate for one in deeper.of((OURS[0], TUNED_AT))] == [3e-3, 3e-3]
    assert f"*ours on full* ({THIRD})" in render._claims(deeper)


@pytest.mark.usefixtures("few_resamples")
def test_a_rate_is_picked_at_its_own_depth_where_it_was_validated_there():
    rates = {TUNED_AT: {1e-3: 0.6, 3e-3: 0.4}, THIRD: {1e-3: 0.4, 3e-3: 0.6}, "last 2": {1e-3: 0.4, 3e-3: 0.6}}
    found = [
        cell(FULL, depth, seed, right, right, rate=rate)
        for depth, of_depth in rates.items()
        for rate, right in of_depth.items()
        for seed in (0, 1)
    ]
    for one in found:
        if one.depth == "last 2":
            one.scores.pop(VALIDATION, None)
    table = Table("unicode", tuple(found))
    taken = {depth: table.taken[FULL, depth] for depth in rates}
    assert taken == {TUNED_AT: 1e-3, THIRD: 3e-3, "last 2": 1e-3}  # the last was not validated
    assert table.better() == {}
    shown = [row[-1] for row in rows_of(render._rates(table)) if row[0] == "full"]
    assert shown == ["0.001", "0.003"]


def store(found, part):
    """Write cells as a run leaves them."""
    for one in found:
        scores = {
            part: {task: [value.correct.tolist(), value.count.tolist()] for task, value in tasks.items()}
            for part, tasks in one.scores.items()
        }
        file = cell_file(folder_of(part, one.task, one.seed), one.depth, one.row, one.rate)
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"depth": one.depth, "layers": one.layers, "row": [one.row.fine, one.row.patch], "rate": one.rate}
        more = {"moved": one.moved, "seconds": one.seconds, "peak": one.peak, "scores": scores}
        file.write_text(json.dumps(facts | more))


@pytest.mark.usefixtures("few_resamples")
def test_results_of_another_machine_make_the_page(tmp_path):
    for name in ("stored", "cache"):
        store([one for one in cells() if one.row in (BASE, FULL)], tmp_path / name / "text")
        (tmp_path / name / "text" / "sparse" / "machine.json").write_text(f'{{"gpu": "that of {name}"}}')
    render.write([tmp_path / "stored", tmp_path / "cache"], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "that of stored" in page
    assert "| full " in page
    assert "3 of 3" not in page
    assert "every row.\n" not in page.replace("seeds of every row", "")
    store([one for one in cells() if one.depth in ("", TUNED_AT)], tmp_path / "few" / "text")
    render.write([tmp_path / "few"], tmp_path / "few" / "page.md")
    assert "- last 2: every row.\n- last third: every row.\n" in (tmp_path / "few" / "page.md").read_text()
    render.write([tmp_path / "nothing", tmp_path / "cache"], tmp_path / "page.md")
    assert "that of cache" in (tmp_path / "page.md").read_text()
    written = (tmp_path / "page.md").read_text()
    render.write([tmp_path / "nothing"], tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == written
    (tmp_path / "data" / "sparse-text.jsonl").unlink()
    render.write([tmp_path / "nothing"], tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == written  # a part that is not there stays


@pytest.mark.usefixtures("few_resamples")
def test_a_run_adds_to_what_earlier_ones_left_beside_the_page(tmp_path):
    found = cells()
    store(found, tmp_path / "whole" / "quick")
    for seed in (0, 1, 2):
        store([one for one in found if one.seed == seed], tmp_path / f"only-{seed}" / "quick")
    for folder, roots in (("at-once", ["whole"]), ("in-turn", ["only-0", "only-1", "only-2"])):
        (tmp_path / folder).mkdir()
        for root in roots:
            render.write([tmp_path / root], tmp_path / folder / "page.md")
    for name in ("page.md", "data/sparse-quick.jsonl"):
        assert (tmp_path / "in-turn" / name).read_text() == (tmp_path / "at-once" / name).read_text()
    again = read_kept(tmp_path / "at-once" / "data" / "sparse-quick.jsonl")
    assert [one.key for one in again] == sorted(one.key for one in found)
    one, other = (next(c for c in of if c.key == again[0].key) for of in (again, found))
    assert np.array_equal(one.scores[TEST]["python"].correct, other.scores[TEST]["python"].correct)
    later = replace(again[0], scores={VALIDATION: {}}, machine="new", peak=None)
    [both] = (c for c in joined(again, [later]) if c.key == later.key)
    assert both.machine == "new"
    assert both.peak == again[0].peak == 10**9
    assert both.scores == {TEST: again[0].scores[TEST], VALIDATION: {}}


def run_probe_options(seq_len):
    from tailorcli.training.settings import ProbeOptions

    return ProbeOptions(seq_len=seq_len, num_samples=2, rademacher=1)


def test_another_mask_trains_its_own_half(tmp_path):
    from tailorcli.training.finetune import finetune_model
    from tailorcli.training.settings import FinetuneOptions

    pair = make_pair(tmp_path)
    options = FinetuneOptions(method="spider", steps=2, batch_size=4, learning_rate=1e-2)
    with masks.masked_by(masks.smallest_weights):
        finetune_model(pair / "base", pair / "data.jsonl", tmp_path / "out", options)
    base, out = read_tensors(pair / "base"), read_tensors(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    moved = base[name] != out[name]
    assert moved.any()
    assert not moved[~masks.smallest_weights(name, base[name], base[name])].any()


def test_a_part_that_makes_its_bases_makes_no_fine_tune(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs.quick_data, "write_parts", lambda tasks, folder: None)
    monkeypatch.setattr(pairs.quick_data, "load_tasks", dict)
    made = []
    monkeypatch.setattr(pairs.quick_model, "make_base", lambda tasks, seed, folder: made.append(folder) or folder)
    found = setting.pairs_of(PARTS["quick"], tmp_path, ["unicode"], 2)
    assert [(pair.name, pair.seed, pair.base) for pair in found] == [("unicode", seed, made[seed]) for seed in (0, 1)]
    assert len(made) == 2
    assert found[0].origin == quick_data.OLD_TASKS
    assert isinstance(found[0].tuned, Path)


@pytest.mark.usefixtures("few_resamples")
def test_a_section_is_not_replaced_by_one_with_fewer_rows(tmp_path):
    """A run that was cut short keeps its cells for a later one, and the page its rows."""
    document = tmp_path / "docs" / "sparse-tuning.md"
    document.parent.mkdir()
    document.write_text(render.reflow(render.page({"quick": cells(), "text": [], "multimodal": []}, document.parent)))
    before = document.read_text()
    root = tmp_path / "cache"
    some = [replace(one, rate=1e-2) for one in cells() if one.row in (BASE, FULL, SPIDER)]
    for one in some:
        store([one], root / "quick")
    assert render.write([root], document) == {"quick": [row.title for row in ROWS if row not in (FULL, SPIDER)]}
    told, *rest = [text for text in document.read_text().split("\n\n") if text not in before.split("\n\n")]
    assert (told.startswith("*quick* has its section of an earlier run."), rest) == (True, [])
    assert len(read_kept(document.parent / "data" / "sparse-quick.jsonl")) == len(some)
    for one in cells():
        store([one], root / "quick")
    assert render.write([root], document) == {}
    assert "0.01" in document.read_text()
    assert "earlier run." not in document.read_text()
