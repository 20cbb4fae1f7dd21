"""The H-score of result files that lm-evaluation-harness wrote."""

import json
import math

import pytest
from helpers import run

from tailorcli import TailorError, read_results

RESULTS = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "acc,none": 0.5,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.6,
            "acc_norm_stderr,none": 0.02,
        },
        "boolq": {"alias": "boolq", "acc,none": 0.8, "acc_stderr,none": 0.03, "sample_len": 100},
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.3,
            "exact_match_stderr,strict-match": 0.04,
            "exact_match,flexible-extract": 0.4,
            "exact_match_stderr,flexible-extract": 0.04,
        },
        "wikitext": {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"},
        "odd": {"acc,none": 0.9, "acc_stderr,none": "N/A"},
        "brier": {"brier_score,none": 0.2},
    },
    "groups": {"mmlu": {"alias": "mmlu", "acc,none": 0.45, "acc_stderr,none": 0.004}},
    "higher_is_better": {"brier": {"brier_score": False}, "arc_easy": {"acc": True, "acc_norm": True}},
    "model_name": "some/model",
}


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results_1.json"
    path.write_text(json.dumps(RESULTS))
    return path


def test_averages_h_and_errors(results):
    (row,) = read_results([results], ["arc_easy", "mmlu"], ["boolq"]).rows
    assert row.model == "some/model"
    assert {name: (r.metric, r.value) for name, r in row.tasks.items()} == {
        "arc_easy": ("acc_norm,none", 60.0),
        "mmlu": ("acc,none", 45.0),
        "boolq": ("acc,none", 80.0),
    }
    old, old_error = (60 + 45) / 2, math.hypot(2, 0.4) / 2
    assert row.summary["origin"] == pytest.approx((old, old_error))
    assert row.summary["target"] == pytest.approx((80, 3))
    assert row.summary["average"] == pytest.approx(((60 + 45 + 80) / 3, math.hypot(2, 0.4, 3) / 3))
    h, error = row.summary["h_score"]
    assert h == pytest.approx(2 * old * 80 / (old + 80))
    step = 1e-4  # the derivatives by differences
    by_old = (2 * (old + step) * 80 / (old + step + 80) - h) / step
    by_new = (2 * old * (80 + step) / (old + 80 + step) - h) / step
    assert error == pytest.approx(math.hypot(by_old * old_error, by_new * 3), rel=1e-4)


def test_metrics_are_chosen_for_all_or_for_one(results):
    (row,) = read_results([results], ["arc_easy"], ["boolq"], ["acc"]).rows
    assert row.tasks["arc_easy"].value == 50
    chosen = ["gsm8k=exact_match,flexible-extract", "acc"]
    (row,) = read_results([results], ["arc_easy"], ["gsm8k"], chosen).rows
    assert (row.tasks["arc_easy"].value, row.tasks["gsm8k"].value) == (50, 40)


def test_a_missing_error_is_none(results):
    (row,) = read_results([results], ["odd"], ["boolq"]).rows
    assert row.tasks["odd"].stderr is None
    assert row.summary["h_score"][1] is None
    assert row.summary["target"][1] == pytest.approx(3)


@pytest.mark.parametrize(
    ("origin", "target", "metrics", "message"),
    [
        (["gone"], ["boolq"], [], "no task 'gone'"),
        (["gsm8k"], ["boolq"], [], "several filters"),
        (["wikitext"], ["boolq"], [], "no metric"),
        (["wikitext"], ["boolq"], ["wikitext=word_perplexity"], "no share"),
        (["brier"], ["boolq"], ["brier=brier_score"], "less is better"),
        (["arc_easy"], ["boolq"], ["f1"], "no metric f1"),
        (["arc_easy"], ["boolq"], ["gone=acc"], "not named"),
        (["arc_easy"], ["boolq"], ["acc", "acc"], "nothing new"),
        (["arc_easy"], ["arc_easy"], [], "both old and new"),
    ],
)
def test_what_cannot_be_averaged_says_so(results, origin, target, metrics, message):
    with pytest.raises(TailorError, match=message) as caught:
        read_results([results], origin, target, metrics)
    assert caught.value.hint


def test_the_command(results, tmp_path):
    roles = ("--origin", "arc_easy", "--origin", "mmlu", "--target", "boolq")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(RESULTS | {"model_name": None}))
    report = json.loads(run("hscore", results, other, *roles, "--json").stdout)
    assert [row["model"] for row in report["results"]] == ["some/model", "other"]
    assert report["results"][0]["summary"]["h_score"]["value"] == pytest.approx(63.396, abs=1e-3)
    shown = run("hscore", results, *roles, "--metric", "acc").stdout
    assert "50.00 ± 1.00" in shown
    run("hscore", results, expect=2)
    for bad, message in ((tmp_path, "is a folder"), (tmp_path / "gone.json", "gone.json")):
        assert message in run("hscore", bad, *roles, expect=1).stderr
    other.write_text("{}")
    assert 'no "results"' in run("hscore", other, *roles, expect=1).stderr
