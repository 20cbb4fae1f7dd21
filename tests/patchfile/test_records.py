"""Reports read back: every value is checked in one place, and written again as it was."""

import json
import random
from copy import deepcopy

import pytest
from helpers import mutate_json

from tailorcli.errors import CheckpointError
from tailorcli.patchfile.records import TensorRecord, read_record
from tailorcli.patchfile.report import load_report

AT_BASE = {
    **{"name": "a.bias", "status": "base", "reason": "no statistics", "role": "bias", "shape": [4], "dtype": "BF16"},
    **{"hessian": None, "kind": None, "tokens": None},
}
PATCHED = {
    **{"name": "a.weight", "status": "patched", "reason": "", "role": "linear", "shape": [3, 4], "dtype": "F32"},
    **{"hessian": "a.weight", "kind": "full", "tokens": 128, "note": "of few tokens", "retain": "a.weight"},
    **{"numel": 12, "kept": 3, "zero_delta": 1, "delta_sq": 2.0, "delta_sq_kept": 1.5, "distance_tuned": 4.0},
    **{"distance_before": 2.0, "distance_after": 2.25, "salience_quantiles": [0.0, 0.5, 1.0]},
    **{"sensitivity_sum": 1.0, "sensitivity_kept": 0.5, "sensitivity_quantiles": None, "dead_channels": 0},
    **{"damping": 0.01, "output_energy": 3, "error_before": 0.5, "error_after": 0.25, "drift_energy": 1.0},
    **{"drift": 0.125, "iterations": 7, "residual": 1e-4, "damped_further": False, "propagated": True},
    **{"input_shift": 0.1, "retained_input_shift": 0.2},
}
MERGED = {
    **{"name": "a.weight", "status": "patched", "reason": "", "method": "joint", "role": "linear", "shape": [3, 4]},
    **{"dtype": "F32", "hessian": "a.weight", "kind": "full", "errors": [0.5, 0.25], "numel": 12, "kept": 5},
    **{"kept_by": [3, 3], "kept_by_all": 1, "jaccard": 0.2, "pairs": [0.2], "shared": 1, "sign_conflicts": 0},
    **{"iterations": 7, "residual": 1e-4, "damping": 0.01, "damped_further": False},
}
OPTIONS = {"density": 0.1, "omega": 0.5, "solver": "joint", "damping": 0.01, "method": "tailor", "retain_weight": 0.3}


def fused(record):
    two = {"experts": ["a.0", "a.1"], "retain": ["a.0", "a.1"], "hessian": None, "note": "of few tokens"}
    keys = [key for key in record if key not in two]
    cut = keys.index("kind") + 2  # behind kind and tokens
    order = [*keys[:cut], "experts", "note", "retain", *keys[cut:]]
    order.insert(order.index("kind"), "hessian")
    return {key: two.get(key, record.get(key)) for key in order}


@pytest.mark.parametrize(
    "record", [AT_BASE, PATCHED, fused(PATCHED), MERGED], ids=["base", "patched", "fused", "merged"]
)
def test_a_record_is_written_again_as_it_was_read(record):
    assert json.dumps(read_record(deepcopy(record)).to_dict()) == json.dumps(record)


WRONG = {
    "a count that is no whole number": ({"kept": 1.5}, "kept"),
    "a count that is true": ({"kept": True}, "kept"),
    "more kept than there is": ({"kept": 13}, "12 entries"),
    "a negative count": ({"zero_delta": -1}, "zero_delta"),
    "entries that the shape has not": ({"numel": 11}, "its shape has 12"),
    "a size that is none": ({"shape": [3, -4]}, "shape"),
    "too many entries": ({"shape": [1 << 40, 1 << 40]}, "shape"),
    "NaN": ({"error_after": float("nan")}, "error_after"),
    "infinity": ({"drift": float("inf")}, "drift"),
    "a number that no float holds": ({"error_before": 10**400}, "error_before"),
    "a negative sum of squares": ({"delta_sq": -1.0}, "delta_sq"),
    "a list for a number": ({"damping": []}, "damping"),
    "half a character": ({"note": "\ud800"}, "note"),
    "a status of its own": ({"status": "half"}, "status"),
    "a quantile that is none": ({"salience_quantiles": [0.0, None]}, "salience_quantiles"),
    "no shift": ({"input_shift": None}, "shift"),
    "no method": (
        {"method": None, **{key: MERGED[key] for key in ("errors", "kept_by", "kept_by_all", "pairs")}},
        "method|lacks",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_value_of_the_wrong_kind_is_named(case):
    change, word = WRONG[case]
    with pytest.raises(ValueError, match=word) as error:
        read_record({**PATCHED, **change})
    assert "a.weight" in str(error.value)


@pytest.mark.parametrize("key", [key for key in PATCHED if key not in ("note", "retain", "drift", "drift_energy")])
def test_a_record_without_one_of_its_fields_is_refused(key):
    lacking = {name: value for name, value in PATCHED.items() if name != key}
    if key == "propagated":
        assert not read_record(lacking).propagated
        return
    with pytest.raises(ValueError, match=r"lacks|shift"):
        read_record(lacking)


def report_of(tensors, command="patch", options=OPTIONS):
    from tailorcli.patchfile.report import PatchReport

    records = [read_record(tensor) for tensor in tensors]
    roles = ["base", "patch 1", "patch 2"] if command == "merge-multi" else ["base", "tuned", "stats", "retain"]
    inputs = {role: {"path": role, "fingerprint": "0"} for role in roles}
    return PatchReport(command, deepcopy(options), inputs, records, {}, 0.0).to_dict()


MERGE_OPTIONS = {"method": "joint", "tasks": ["one", "two"], "weights": [0.5, 0.5], "damping": 0.01}
REPORTS = {
    "patch": ([AT_BASE, PATCHED], "patch", OPTIONS),
    "merge": ([MERGED], "merge-multi", MERGE_OPTIONS),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_whatever_becomes_of_a_report_it_is_read_or_refused_and_then_shown(tmp_path, kind):
    """A mutated report is either refused with one clear error, or can be drawn as a table."""
    from tailorcli.display.inspection import inspect_path
    from tailorcli.display.tables import inspection_parts

    generator = random.Random(5)
    file, outcomes = tmp_path / "report.json", {"shown": 0, "refused": 0}
    for _ in range(600):
        file.write_text(json.dumps(mutate_json(deepcopy(report_of(*REPORTS[kind])), generator)))
        try:
            inspection = inspect_path(file)
        except CheckpointError as error:
            outcomes["refused"] += str(file) in error.message and error.message.isprintable()
            continue
        inspection_parts(inspection)
        json.dumps(inspection.to_dict(), allow_nan=False, ensure_ascii=False).encode()
        outcomes["shown"] += 1
    assert sum(outcomes.values()) == 600, "an error that does not name the file, or cannot be printed"
    assert min(outcomes.values()) > 40, outcomes


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda report: report["tensors"].append(report["tensors"][0]), "twice"),
        (lambda report: report.update(command="apply"), "merge-multi"),
        (lambda report: report["inputs"].pop("base"), "inputs"),
        (lambda report: report["options"].update(density="half"), "density"),
        (lambda report: report.update(format_version=True), "format_version"),
        (lambda report: report["options"].pop("omega"), "omega"),
        (lambda report: report["totals"].pop("kept"), "kept"),
        (lambda report: (report.pop("totals"), report.update(command="sweep")), "report of sweep"),
        (lambda report: report.pop("tensors"), "report of patch: "),
        (lambda report: (report.pop("tensors"), report.update(command=[2])), "no report of tailorcli"),
        (lambda report: report.update(more=[[[[]]]] * 2 + [float("-inf")]), "finite"),
    ],
)
def test_a_report_that_does_not_hold_together_is_refused(tmp_path, change, word):
    report = report_of([AT_BASE, PATCHED])
    change(report)
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match=word):
        load_report(file)


def test_numel_of_a_tensor_at_base_is_that_of_its_shape():
    record = read_record(AT_BASE)
    assert isinstance(record, TensorRecord)
    assert (record.numel, record.kept, record.patched) == (4, 0, False)


def test_the_totals_are_worked_out_again_from_the_tensors(tmp_path):
    report = report_of([AT_BASE, PATCHED])
    file = tmp_path / "report.json"
    file.write_text(json.dumps({**report, "totals": report["totals"] | {"kept": "many"}}))
    assert load_report(file).to_dict() == report
