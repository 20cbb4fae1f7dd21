"""The page of `python -m benchmarks.sparse`: every claim is told as the figures have it."""

from benchmarks import sparse
from benchmarks.sparse import Result


def results():
    """Two seeds; with the second SPIDER is behind full."""
    found = []
    for seed, spider in ((0, 45.0), (1, 30.0)):
        rows = [("", "zero-shot", 60.0, 10.0), ("all", "full", 40.0, 50.0), ("all", "spider", 59.0, spider)]
        rows += [("all", "dowser", 59.0, 30.0), ("all", sparse.OURS, 59.0, 49.0)]
        found += [Result(depth, name, seed, old, new, 0.1, 10.0, 10**9) for depth, name, old, new in rows]
    return [*found, Result("last third", "full", 0, 50.0, 40.0, 0.1)]


def test_the_page_says_what_was_seen_and_with_how_many_seeds():
    page = sparse.page(results())
    rows = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in page.splitlines() if line[:1] == "|"}
    claims = {row[:2]: row[2:] for row in rows if len(row) == 4}
    assert claims["SPIDER beats full", "all"][1] == "with 1 of 2 seeds"
    assert claims["(ours, not claimed) our patch of full beats SPIDER", "all"][1] == "yes"
    assert not any(row[0] == "SPIDER beats half" for row in rows)
    lines = page[page.index("## All layers") : page.index("## The last third")].splitlines()
    table = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines if line[:1] == "|"}
    assert table["zero-shot"] == "60.0 ± 0.0"
    assert table["full"] == "40.0 ± 0.0"
    assert "all: 2 seeds, last third: 1 seed" in page
