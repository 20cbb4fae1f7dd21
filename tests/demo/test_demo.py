"""The demo in its reduced form; in full it is marked slow."""

from pathlib import Path

import pytest

from tailorcli import Checkpoint, TailorError
from tailorcli.demo.demo import follow_up_commands, render_demo, run_demo
from tailorcli.patchfile.report import REPORT_FILE, load_report


def check(report, folder):
    from rich.console import Console

    names = " ".join(row.title for row in report.rows).lower()
    for model in ("base", "tuned", "interpolation", "patched"):
        assert model in names
    for row in report.rows:
        assert 0.0 < row.h_score <= 100.0
    for name in ("base", "tuned"):
        with Checkpoint.open(folder / name) as checkpoint:
            assert checkpoint.tensors
    console = Console(width=160, record=True)
    console.print(render_demo(report))
    assert "interpolation" in console.export_text().lower()
    assert all(line.startswith(("tailorcli ", "python -c ")) for line in follow_up_commands(report))


def test_quick_demo(tmp_path):
    report = run_demo(tmp_path / "demo", quick=True, progress=False, distill=True)
    check(report, tmp_path / "demo")
    distilled = report.rows[-1]
    assert (distilled.title, distilled.note) == ("patched, distilled, density 0.1", "the default, --distill")
    assert load_report(Path(distilled.path) / REPORT_FILE).distillation is not None
    rows = {row.model: row for row in reversed(report.rows)}  # of the patched, the default
    base, tuned, patched = (rows[name] for name in ("base", "tuned", "patched"))
    # Five standard errors and more, in every one of five seeds that were tried.
    assert tuned.old < base.old - 4.0
    assert tuned.new > base.new + 8.0
    assert patched.old > tuned.old + 3.0
    assert patched.new > base.new + 4.0
    with pytest.raises(TailorError, match="demo"):
        run_demo(tmp_path / "demo", quick=True, progress=False)


@pytest.mark.slow
def test_full_demo_shows_forgetting(tmp_path):
    report = run_demo(tmp_path / "demo", progress=False)
    check(report, tmp_path / "demo")
    rows = {row.model: row for row in report.rows}
    assert rows["tuned"].old <= rows["base"].old - 5.0
    assert rows["tuned"].new >= rows["base"].new + 10.0
