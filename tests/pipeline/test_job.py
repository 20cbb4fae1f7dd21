"""The whole job in one command: the bytes of its steps, what it leaves, and how it goes on."""

import json
import shutil

import pytest
from families import make_family_pair
from helpers import (
    assert_nothing_loads,
    broken_off,
    folder_digest,
    make_adapter,
    make_pair,
    read_tensors,
    refused,
    report_of,
    run,
)

from tailorcli import CalibrateOptions, DistillOptions, PatchFile, PatchOptions, plan_job, tailor
from tailorcli.calibration.expected import expected_stats
from tailorcli.calibration.stats import Stats
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.writer import CheckpointWriter

SMALL = ("--num-samples", 12, "--seq-len", 24)
OPTIONS = CalibrateOptions(num_samples=12, seq_len=24)
_slow = pytest.mark.slow
REPORTS = ("tailor_run.json", "tailor_report.json", "README.md")  # which name the command


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def steps(pair):
    """The three commands: a folder with stats, base-stats, out and a patch file."""
    run("calibrate", pair / "tuned", "--data", pair / "data.jsonl", "-o", pair / "stats", *SMALL)
    run("calibrate", pair / "base", "--synthetic", "-o", pair / "base-stats", *SMALL)
    stats = ("--stats", pair / "stats", "--retain", pair / "base-stats")
    run("patch", pair / "base", pair / "tuned", *stats, "-o", pair / "out", "--patch-file", pair / "out.safetensors")
    return pair


def patch(pair, *arguments, **options):
    return run("patch", pair / "base", pair / "tuned", "--data", pair / "data.jsonl", *SMALL, *arguments, **options)


def test_it_gives_the_bytes_of_its_steps_and_leaves_nothing_else(steps, tmp_path):
    shown = patch(steps, "-o", tmp_path / "out", "--patch-file", tmp_path / "out.safetensors")
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(steps / "out", REPORTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.safetensors"]
    whole, alone = report_of(tmp_path / "out"), report_of(steps / "out")
    inputs = whole.pop("inputs")
    known = alone.pop("inputs")
    assert whole == alone
    models = ("base", "tuned")
    assert [known[role]["fingerprint"] for role in models] == [inputs[role]["fingerprint"] for role in models]
    assert inputs.keys() == {*models, "new data", "retain data"}  # no statistics were ever written
    assert inputs["new data"]["path"] == str(steps / "data.jsonl")
    command = "tailorcli patch base tuned --data data.jsonl --num-samples 12 --seq-len 24 -o OUT"
    assert command in (tmp_path / "out" / "README.md").read_text()
    with PatchFile.open(tmp_path / "out.safetensors") as mine, PatchFile.open(steps / "out.safetensors") as theirs:
        assert mine.tensors.keys() == theirs.tensors.keys()
        for name in mine.tensors:
            assert mine.mask(name).equal(theirs.mask(name))
            assert mine.values(name).equal(theirs.values(name))
    for told in (
        "1. let the base write 12 samples of 24 tokens",
        "2. block by block in one pass, without statistics on disk: calibrate the tuned model on",
        "calibrate the base on what it wrote, patch 21 tensors, propagated",
    ):
        assert told in shown.stderr


def test_the_empty_folder_that_one_is_in_can_be_the_output(steps, tmp_path, monkeypatch):
    """Its name is not in the path, and what it works in lies beside it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    patch(steps, "--no-retain", "-o", ".")
    assert read_tensors(folder).keys() == read_tensors(steps / "base").keys()
    stats = ("--stats", steps / "stats", "--retain", steps / "base-stats", "--distill", "--distill-steps", 1)
    run("patch", steps / "base", steps / "tuned", *stats, "-o", ".", "--overwrite")
    assert report_of(folder)["distillation"]
    assert list(tmp_path.iterdir()) == [folder]


def test_the_papers_way_and_data_of_ones_own_are_the_steps_too(steps, tmp_path):
    patch(steps, "-o", tmp_path / "paper", "--preset", "paper")
    run("patch", steps / "base", steps / "tuned", "--stats", steps / "stats", "--preset", "paper", "-o", tmp_path / "p")
    assert folder_digest(tmp_path / "paper", REPORTS) == folder_digest(tmp_path / "p", REPORTS)
    patch(steps, "-o", tmp_path / "none", "--no-retain")
    run("patch", steps / "base", steps / "tuned", "--stats", steps / "stats", "-o", tmp_path / "n")
    assert folder_digest(tmp_path / "none", REPORTS) == folder_digest(tmp_path / "n", REPORTS)
    data = ("--data", steps / "data.jsonl", *SMALL)
    run("calibrate", steps / "base", *data, "-o", tmp_path / "old")
    both = ("--stats", steps / "stats", "--retain", tmp_path / "old", "--no-propagate")
    run("patch", steps / "base", steps / "tuned", *both, "-o", tmp_path / "o")
    patch(steps, "-o", tmp_path / "own", "--retain-data", steps / "data.jsonl", "--no-propagate")
    assert folder_digest(tmp_path / "own", REPORTS) == folder_digest(tmp_path / "o", REPORTS)


# A table outside the blocks that no module holds; pictures in some samples alone; fused experts; an encoder that is
# calibrated first, as what it shares with its decoder is summed in another order; an output layer whose bias is bare.
KINDS = {"gemma3-text": True, "llava": True, "qwen3-moe": True, "t5": False, "jina-v3": True}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in ("qwen3-moe", "jina-v3") else _slow) for k in KINDS])
def test_other_families_have_the_bytes_of_their_steps_too(tmp_path, kind):
    folder = make_family_pair(tmp_path / "pair", kind)
    arguments = (folder / "base", folder / "tuned")
    given = {"retain_data": folder / "data.jsonl", "calibration": OPTIONS}
    plan = plan_job(*arguments, tmp_path / "out", folder / "data.jsonl", **given)
    assert plan.one_pass == KINDS[kind], plan.why
    tailor(*arguments, tmp_path / "out", folder / "data.jsonl", **given)
    tailor(*arguments, tmp_path / "steps", folder / "data.jsonl", keep_stats=tmp_path / "kept", **given)
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(tmp_path / "steps", REPORTS)


def test_a_model_that_comes_back_to_a_block_is_calibrated_first(tmp_path, monkeypatch, caplog):
    """As one does that runs the same layers again and again: what is written by then is given up."""
    from transformers.models.llama import modeling_llama

    folder = make_pair(tmp_path / "pair")
    original = modeling_llama.LlamaModel.forward

    def twice(self, input_ids=None, inputs_embeds=None, **options):
        first = original(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **options)
        return original(self, inputs_embeds=first.last_hidden_state, **options)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", twice)
    arguments = (folder / "base", folder / "tuned")
    given = {"retain_data": folder / "data.jsonl", "calibration": OPTIONS, "options": PatchOptions(propagate=False)}
    tailor(*arguments, tmp_path / "out", folder / "data.jsonl", **given)
    assert "model.layers.0 more than once: both models are calibrated first" in caplog.text
    tailor(*arguments, tmp_path / "steps", folder / "data.jsonl", keep_stats=tmp_path / "kept", **given)
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(tmp_path / "steps", REPORTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out", "pair", "steps"]


def test_distillation_is_part_of_it(steps, tmp_path):
    distill = ("--distill", "--distill-steps", 3, "--distill-batch-size", 4)
    patch(steps, "-o", tmp_path / "out", *distill)
    stats = ("--stats", steps / "stats", "--retain", steps / "base-stats")
    run("patch", steps / "base", steps / "tuned", *stats, "-o", tmp_path / "alone", *distill)
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(tmp_path / "alone", REPORTS)
    assert report_of(tmp_path / "out")["distillation"] == report_of(tmp_path / "alone")["distillation"]
    again = patch(steps, "-o", tmp_path / "out", *distill, "--resume")
    assert "already finished" in again.stdout


def test_kept_statistics_serve_a_second_density(steps, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    shown = patch(steps, "-o", tmp_path / "first", "--keep-stats", kept, "--teacher-weight", 1)  # tuned itself
    assert f"statistics kept in {kept}" in shown.stdout
    assert sorted(path.name for path in kept.iterdir()) == ["base", "tuned"]
    Stats.open(kept / "tuned").close()
    monkeypatch.setattr("tailorcli.pipeline.sides.calibrate_model", None)  # nothing is measured again
    shown = patch(steps, "-o", tmp_path / "second", "--keep-stats", kept, "--density", "0.3")
    assert shown.stderr.count("there already") == 2
    stats = ("--stats", steps / "stats", "--retain", steps / "base-stats", "--density", "0.3")
    run("patch", steps / "base", steps / "tuned", *stats, "-o", tmp_path / "alone")
    assert folder_digest(tmp_path / "second", REPORTS) == folder_digest(tmp_path / "alone", REPORTS)


def test_kept_statistics_of_anything_else_are_refused_and_kept(steps, tmp_path):
    kept = tmp_path / "kept"
    patch(steps, "-o", tmp_path / "first", "--keep-stats", kept)
    before = folder_digest(kept)
    pair = ("patch", steps / "base", steps / "tuned", "--keep-stats", kept, "-o", tmp_path / "out")
    (tmp_path / "other.jsonl").write_text((steps / "data.jsonl").read_text()[:-40])
    few = ("--num-samples", 12, "--seq-len", 25)
    refused(*pair, "--data", steps / "data.jsonl", *few, mentions=["seq-len", kept / "tuned"])
    (tmp_path / "other.jsonl").write_text("".join((steps / "data.jsonl").read_text().splitlines(True)[:20]))
    refused(*pair, "--data", tmp_path / "other.jsonl", *SMALL, mentions=["other data"], output=tmp_path / "out")
    swapped = ("patch", steps / "tuned", steps / "base", "--keep-stats", kept, "-o", tmp_path / "out")
    refused(*swapped, "--data", steps / "data.jsonl", *SMALL, mentions=["another model"])
    assert folder_digest(kept) == before
    run(*pair, "--data", tmp_path / "other.jsonl", *SMALL, "--overwrite")
    assert folder_digest(kept) != before


def test_another_config_is_another_run(tmp_path):
    """An epsilon that is mended in between is no reason to go on with layers that were fitted under the old one."""
    pair, out, kept = make_pair(tmp_path), tmp_path / "out", tmp_path / "kept"
    patch(pair, "-o", tmp_path / "first", "--keep-stats", kept)
    with broken_off(CheckpointWriter, 8):
        tailor(pair / "base", pair / "tuned", out, pair / "data.jsonl", calibration=OPTIONS)
    file = pair / "tuned" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"transformers_version": "0"}))  # says nothing of the model
    patch(pair, "-o", tmp_path / "second", "--keep-stats", kept)
    assert folder_digest(tmp_path / "second", (*REPORTS, file.name)) == folder_digest(
        tmp_path / "first", (*REPORTS, file.name)
    )
    file.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    whole = ("patch", pair / "base", pair / "tuned", "--data", pair / "data.jsonl", *SMALL)
    refused(*whole, "-o", out, "--resume", mentions=["cannot resume", "tuned config"], output=out)
    refused(*whole, "-o", tmp_path / "third", "--keep-stats", kept, mentions=[kept / "tuned", "another config", file])


class StoppedError(Exception):
    pass


def stop_at_calibration(monkeypatch, number):
    """The so many-th calibration of a job ends in the middle."""
    from tailorcli.pipeline import sides

    original, count = sides.calibrate_model, [0]

    def failing(*arguments, **options):
        count[0] += 1
        if count[0] == number:
            raise StoppedError
        return original(*arguments, **options)

    monkeypatch.setattr(sides, "calibrate_model", failing)


def stop_at_samples(monkeypatch):
    """A job ends when the base shall write its samples."""

    def failing(*_):
        raise StoppedError

    monkeypatch.setattr("tailorcli.pipeline.sides.self_written", failing)


ENDED = [  # tensors that are written: of what lies before the blocks, in either, behind them
    *[pytest.param(after, True, marks=() if after == 14 else _slow) for after in (0, 1, 8, 14, 20)],
    *[pytest.param(after, False, marks=() if after == 8 else _slow) for after in (0, 1, 8, 14, 20)],
]


@pytest.mark.parametrize(("after", "propagate"), ENDED)
def test_one_pass_that_was_ended_goes_on_to_the_same_bytes(steps, tmp_path, monkeypatch, after, propagate):
    options = () if propagate else ("--no-propagate",)
    with broken_off(CheckpointWriter, after):
        arguments = (steps / "base", steps / "tuned", tmp_path / "out", steps / "data.jsonl")
        tailor(*arguments, options=PatchOptions(propagate=None if propagate else False), calibration=OPTIONS)
    assert_nothing_loads(tmp_path / "out")
    assert [str(path.relative_to(tmp_path / "out.work")) for path in (tmp_path / "out.work").rglob("*.*")] == [
        "base/samples.safetensors"
    ]
    stop_at_samples(monkeypatch)  # what the base wrote is there
    shown = patch(steps, "-o", tmp_path / "out", "--resume", *options)
    assert "1. let the base write 12 samples of 24 tokens (there already)" in shown.stderr
    expected = steps / "out"
    if not propagate:
        stats, expected = ("--stats", steps / "stats", "--retain", steps / "base-stats"), tmp_path / "alone"
        run("patch", steps / "base", steps / "tuned", *stats, "-o", expected, *options)
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(expected, REPORTS)
    assert not (tmp_path / "out.work").exists()


def test_samples_of_another_run_or_damaged_ones_are_written_again(steps, tmp_path, monkeypatch):
    arguments = (steps / "base", steps / "tuned", tmp_path / "out", steps / "data.jsonl")
    with broken_off(CheckpointWriter, 5):
        tailor(*arguments, calibration=OPTIONS)
    kept = tmp_path / "out.work" / "base" / "samples.safetensors"
    sound = kept.read_bytes()
    kept.write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
    with monkeypatch.context() as patched:
        stop_at_samples(patched)
        with pytest.raises(StoppedError):
            tailor(*arguments, options=PatchOptions(resume=True), calibration=OPTIONS)
        kept.write_bytes(sound)
        others = CalibrateOptions(num_samples=12, seq_len=24, seed=5)
        with pytest.raises(StoppedError):
            tailor(*arguments, options=PatchOptions(resume=True), calibration=others)
    kept.write_bytes(sound[:50])
    patch(steps, "-o", tmp_path / "out", "--resume")
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(steps / "out", REPORTS)


@pytest.mark.parametrize("stage", ["tuned", "base", "patch"])
def test_a_job_in_steps_that_was_ended_in_any_stage_goes_on_to_the_same_bytes(steps, tmp_path, monkeypatch, stage):
    arguments = (steps / "base", steps / "tuned", tmp_path / "out", steps / "data.jsonl")
    calibration = CalibrateOptions(num_samples=12, seq_len=24, blockwise="never")
    if stage == "patch":
        with broken_off(CheckpointWriter, 5):
            tailor(*arguments, calibration=calibration)
    else:
        with monkeypatch.context() as patched:
            stop_at_calibration(patched, ["tuned", "base"].index(stage) + 1)
            with pytest.raises(StoppedError):
                tailor(*arguments, calibration=calibration)
    assert_nothing_loads(tmp_path / "out")
    assert_nothing_loads(tmp_path / "out.work")
    if stage != "tuned":
        command = ("patch", steps / "base", steps / "tuned", "--data", steps / "data.jsonl", *SMALL)
        shown = refused(*command, "-o", tmp_path / "out", output=tmp_path / "out")
        assert "--resume" in shown
        stop_at_calibration(monkeypatch, 1 if stage == "patch" else 2)  # what was measured is not measured again
    shown = patch(steps, "-o", tmp_path / "out", "--resume", "--blockwise", "never")
    assert "not in one pass: " in shown.stderr
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(steps / "out", REPORTS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_finished_job_is_known_without_its_statistics(steps, tmp_path):
    patch(steps, "-o", tmp_path / "out")
    before = folder_digest(tmp_path / "out", ())
    (tmp_path / "out" / ".tailorcli.lock").touch()  # what a kill at the very end leaves
    assert "already finished" in patch(steps, "-o", tmp_path / "out", "--resume").stdout
    assert folder_digest(tmp_path / "out", ()) == before
    command = ("patch", steps / "base", steps / "tuned", "--data", steps / "data.jsonl", "-o", tmp_path / "out")
    refused(*command, *SMALL, "--seed", 1, "--resume", mentions=["another run"])
    refused(*command, *SMALL, "--density", 0.2, "--resume", mentions=["another run"])
    refused(*command, *SMALL, mentions=["not empty"])
    assert folder_digest(tmp_path / "out", ()) == before


def test_a_patch_file_alone_is_resumed_and_known(steps, tmp_path):
    file = tmp_path / "out.safetensors"
    patch(steps, "--patch-file", file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    before = file.read_bytes()
    assert "already finished" in patch(steps, "--patch-file", file, "--resume").stdout
    assert file.read_bytes() == before
    run("apply", steps / "base", file, "-o", tmp_path / "applied")
    assert (tmp_path / "applied" / "model.safetensors").read_bytes() == (steps / "out/model.safetensors").read_bytes()


def test_the_tuned_model_may_be_an_adapter(tmp_path):
    folder = make_adapter(tmp_path)
    make_pair(tmp_path / "data")
    data = ("--data", tmp_path / "data" / "data.jsonl", *SMALL)
    run("patch", folder / "base", folder / "adapter", *data, "-o", tmp_path / "out")
    run("calibrate", folder / "adapter", "--base", folder / "base", *data, "-o", tmp_path / "stats")
    run("calibrate", folder / "base", "--synthetic", *SMALL, "-o", tmp_path / "base-stats")
    stats = ("--stats", tmp_path / "stats", "--retain", tmp_path / "base-stats")
    run("patch", folder / "base", folder / "adapter", *stats, "-o", tmp_path / "alone")
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(tmp_path / "alone", REPORTS)
    assert read_tensors(tmp_path / "out").keys() == read_tensors(folder / "base").keys()


def test_a_dry_run_tells_all_and_writes_nothing(steps, tmp_path):
    shown = patch(steps, "-o", tmp_path / "out", "--dry-run")
    assert "2. block by block in one pass, without statistics on disk" in shown.stdout
    told = json.loads(patch(steps, "-o", tmp_path / "out", "--dry-run", "--json").stdout)
    assert (told["one_pass"], told["statistics_bytes"]) == (True, 0)
    assert [step["done"] for step in told["steps"]] == [False, False]
    kept = ("-o", tmp_path / "out", "--keep-stats", tmp_path / "kept", "--dry-run")
    shown = " ".join(patch(steps, *kept).stdout.split())
    assert "1. calibrate the tuned model" in shown
    assert "of statistics, which stay" in shown
    assert "not in one pass: --keep-stats writes the statistics" in shown
    told = json.loads(patch(steps, *kept, "--json").stdout)
    assert told["not_in_one_pass"]
    assert [step["done"] for step in told["steps"]] == [False, False, False]
    assert (
        told["statistics_bytes"]
        >= sum((steps / name / "hessians.safetensors").stat().st_size for name in ("stats", "base-stats")) - 20_000
    )  # the headers
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_plan_before_any_statistics_is_that_with_them(tmp_path, kind):
    folder = make_pair(tmp_path, kind)
    data = ("--data", folder / "data.jsonl", *SMALL)
    run("calibrate", folder / "tuned", *data, "-o", folder / "stats")
    with Checkpoint.open(folder / "tuned") as tuned:
        known, told = Stats.open(folder / "stats"), expected_stats(folder, tuned, tuned, OPTIONS, 12, 200)
    assert {name: bool(entry.hessians) for name, entry in told.tensors.items()} == {
        name: bool(entry.hessians) for name, entry in known.tensors.items()
    }
    for name, entry in known.tensors.items():
        mine = [told.hessians[hessian] for hessian in told.tensors[name].hessians]
        theirs = [known.hessians[hessian] for hessian in entry.hessians]
        assert [(i.size, i.kind) for i in mine] == [(i.size, i.kind) for i in theirs], name
    known.close()


def test_one_clear_error_where_options_contradict_one_another(steps, tmp_path):
    command = ("patch", steps / "base", steps / "tuned", "-o", tmp_path / "out")
    data = ("--data", steps / "data.jsonl")
    refused(*command, *data, "--stats", steps / "stats", mentions=["--data and --stats"])
    refused(*command, *data, "--retain", steps / "base-stats", mentions=["--data and --retain"])
    refused(*command, "--keep-stats", tmp_path / "k", "--stats", steps / "stats", mentions=["--keep-stats"])
    refused(*command, *data, "--method", "interpolate", mentions=["--method interpolate"])
    refused(*command, *data, "--no-retain", "--distill", mentions=["--distill"])
    assert "--no-retain" in refused(*command, *data, "--resized-vocab", mentions=["new rows"])
    refused(*command, *data, "--no-retain", "--retain-data", steps / "data.jsonl", mentions=["--no-retain"])
    assert "tailorcli check" in refused(*command, "--dry-run", mentions=["no statistics"])
    refused(*command, *data, "--keep-stats", steps / "base", mentions=["replace an input"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", [".work", ".distill"])
def test_statistics_are_not_kept_in_a_folder_that_goes_at_the_end(steps, tmp_path, end):
    given = ("patch", steps / "base", steps / "tuned", "--data", steps / "data.jsonl", "-o", tmp_path / "out")
    refused(*given, "--keep-stats", tmp_path / f"out{end}", mentions=["where this job works"])


def test_a_work_folder_that_is_not_ours_is_left_alone(steps, tmp_path):
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "thesis.txt").write_text("mine")
    command = ("patch", steps / "base", steps / "tuned", "--data", steps / "data.jsonl", *SMALL, "-o", tmp_path / "out")
    for more in ((), ("--resume",), ("--overwrite",)):
        refused(*command, *more, mentions=["thesis.txt"])
    assert (work / "thesis.txt").read_text() == "mine"
    shutil.rmtree(work)
    (work / "tuned").mkdir(parents=True)
    (work / "tuned" / "thesis.txt").write_text("mine")
    refused(*command, "--resume", mentions=["thesis.txt"])
    refused(*command, "--overwrite", mentions=["thesis.txt"])
    assert (work / "tuned" / "thesis.txt").read_text() == "mine"


def test_an_overwritten_output_stays_until_the_new_one_is_written(steps, tmp_path, monkeypatch):
    patch(steps, "-o", tmp_path / "out", "--density", 0.3)
    before = folder_digest(tmp_path / "out", ())
    arguments = (steps / "base", steps / "tuned", tmp_path / "out", steps / "data.jsonl")
    with monkeypatch.context() as patched:
        stop_at_samples(patched)
        with pytest.raises(StoppedError):
            tailor(*arguments, options=PatchOptions(overwrite=True), calibration=OPTIONS)
        stop_at_calibration(patched, 2)
        steps_of = CalibrateOptions(num_samples=12, seq_len=24, blockwise="never")
        with pytest.raises(StoppedError):
            tailor(*arguments, options=PatchOptions(overwrite=True), calibration=steps_of)
    assert folder_digest(tmp_path / "out", ()) == before
    patch(steps, "-o", tmp_path / "out", "--overwrite")
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(steps / "out", REPORTS)


def test_python_plans_and_runs_it_in_one_call(steps, tmp_path):
    arguments = (steps / "base", steps / "tuned", tmp_path / "out", steps / "data.jsonl")
    plan = plan_job(*arguments, calibration=OPTIONS, distill=DistillOptions(steps=2))
    assert [step.what.split()[0] for step in plan.steps] == ["calibrate", "let", "patch", "train"]
    plans, lines = [], []
    report = tailor(*arguments, calibration=OPTIONS, announce=plans.append, tell=lines.append)
    assert len(plans) == 1
    assert len(lines) == 2
    assert lines[1].startswith("the base wrote 12 samples, 288 tokens")
    assert report.stages.keys() >= {"write samples", "hessian", "solve"}
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(steps / "out", REPORTS)


def test_a_job_that_distils_draws_512_samples_and_tells_their_steps(steps, tmp_path):
    data = tmp_path / "many.jsonl"
    data.write_text((steps / "data.jsonl").read_text() * 60)
    arguments = (steps / "base", steps / "tuned", tmp_path / "out", data)
    lines = []
    plan = plan_job(*arguments, distill=DistillOptions(), retain_data=data, tell=lines.append)
    assert "drawn 512, " in lines[0]
    assert plan.steps[-1].what == "train the kept entries: at most 400 steps"
    many = plan_job(
        *arguments, distill=DistillOptions(), retain_data=data, calibration=CalibrateOptions(num_samples=600)
    )
    assert many.steps[-1].what == "train the kept entries: at most 433 steps"
    assert "128 samples" in plan_job(*arguments).steps[0].what


def test_data_may_come_from_standard_input(steps, tmp_path, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((steps / "data.jsonl").read_bytes())))
    tailor(steps / "base", steps / "tuned", tmp_path / "out", "-", calibration=OPTIONS)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (steps / "out/model.safetensors").read_bytes()


def test_the_plan_estimates_the_time_of_every_step(steps, tmp_path):
    arguments = (steps / "base", steps / "tuned", tmp_path / "out", steps / "data.jsonl")
    plan = plan_job(*arguments, calibration=OPTIONS, distill=DistillOptions(steps=2))
    assert all(step.seconds is not None and 0.0 < step.seconds < 60.0 for step in plan.steps)
    assert plan.seconds == sum(step.seconds for step in plan.steps)
    longer = plan_job(*arguments, calibration=CalibrateOptions(num_samples=40, seq_len=60))
    assert longer.steps[1].seconds > plan.steps[1].seconds  # more text to be written


def test_a_narrow_block_does_not_tell_the_time_of_a_wide_layer(tmp_path):
    """Its calls took a millisecond each, which by channels cubed made minutes of a patch embedding."""
    import torch

    from tailorcli.pipeline import trial

    folder = make_family_pair(tmp_path, "qwen2.5-vl")  # 32 channels wide, and 1,176 into its patch embedding
    with Checkpoint.open(folder / "tuned") as tuned:
        rates = trial.measure(tuned, tuned, OPTIONS, torch.device("cpu"))
    assert 0.0 < rates.prepare * 1176**3 < 15.0


def test_a_model_that_takes_no_text_alone_has_no_estimate(steps, monkeypatch):
    import torch

    from tailorcli.pipeline import trial

    def refuse(*_):
        raise ValueError("no text")

    with Checkpoint.open(steps / "tuned") as tuned:
        assert trial.measure(tuned, tuned, OPTIONS, torch.device("cpu")) is not None
        monkeypatch.setattr(trial, "forward", refuse)
        assert trial.measure(tuned, tuned, OPTIONS, torch.device("cpu")) is None


@pytest.mark.parametrize("kind", ["checkpoint", pytest.param("adapter", marks=_slow)])
def test_the_model_that_is_patched_towards_may_lie_between_the_two(steps, tmp_path, kind):
    base, tuned = steps / "base", steps / "tuned"
    if kind == "adapter":
        make_adapter(tmp_path)
        base, tuned = tmp_path / "base", tmp_path / "adapter"
    weight, data = ("--teacher-weight", 0.6), ("--data", steps / "data.jsonl", *SMALL)
    kept = ("--keep-stats", tmp_path / "kept")
    run("patch", base, tuned, *data, *weight, *kept, "-o", tmp_path / "out")
    run("calibrate", tuned, "--base", base, *data, *weight, "-o", tmp_path / "stats")
    stats = ("--stats", tmp_path / "stats", "--retain", tmp_path / "kept" / "base")
    run("patch", base, tuned, *stats, "-o", tmp_path / "alone")
    assert folder_digest(tmp_path / "out", REPORTS) == folder_digest(tmp_path / "alone", REPORTS)
    again = ("patch", base, tuned, *data, *weight, *kept, "-o", tmp_path / "out")
    assert "already finished" in run(*again, "--resume").stdout
    assert run(*again, "--overwrite").stderr.count("there already") == 2
    refused("patch", base, tuned, *data, *kept, "-o", tmp_path / "other", mentions=[tmp_path / "kept" / "tuned"])


@pytest.mark.parametrize("column", ["text", "body", "other"])
def test_retained_data_without_the_named_columns_has_the_usual_names(pair, tmp_path, caplog, column):
    texts = [json.loads(line)["text"] for line in (pair / "data.jsonl").read_text().splitlines()]
    for name, called in (("new", "body"), ("old", column)):
        records = [json.dumps({called: text, "body ": "x"}) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(records))
    given = ("patch", pair / "base", pair / "tuned", "--data", tmp_path / "new.jsonl", "--text-column", "body", *SMALL)
    command = (*given, "--retain-data", tmp_path / "old.jsonl", "-o", tmp_path / "out")
    if column == "other":
        refused(*command, mentions=["old.jsonl:1 has the fields ['body ', 'other']"])
        return
    run(*command)
    assert ("has no column body: its records are taken by the usual names" in caplog.text) == (column == "text")
    data = {role: facts.get("text_column") for role, facts in report_of(tmp_path / "out")["inputs"].items()}
    assert (data["new data"], data["retain data"]) == ("body", "body" if column == "body" else None)
    same = ("--data", pair / "data.jsonl", "--retain-data", pair / "data.jsonl", *SMALL, "-o", tmp_path / "same")
    run("patch", pair / "base", pair / "tuned", *same)
    for name, value in read_tensors(tmp_path / "same").items():
        assert read_tensors(tmp_path / "out")[name].equal(value)


def test_a_report_names_no_folder_of_statistics_that_goes_at_the_end(pair, tmp_path):
    training = ("--distill", "--distill-steps", 2)
    for name, more in (("gone", ()), ("there", ("--keep-stats", tmp_path / "kept"))):
        patch(pair, *training, *more, "-o", tmp_path / name, "--patch-file", tmp_path / f"{name}.safetensors")
    gone, there = (report_of(tmp_path / name)["inputs"] for name in ("gone", "there"))
    for role, folder in (("stats", "tuned"), ("retain", "base")):
        assert gone[role]["path"] == "measured for this patch and not kept"
        assert there[role] == {"path": str(tmp_path / "kept" / folder), "fingerprint": gone[role]["fingerprint"]}
    with PatchFile.open(tmp_path / "gone.safetensors") as file:
        assert file.manifest.inputs["stats"] == gone["stats"]
    before = folder_digest(tmp_path / "gone")
    patch(pair, *training, "-o", tmp_path / "gone", "--resume")  # whose statistics are not there to compare
    assert folder_digest(tmp_path / "gone") == before
    assert "measured for" not in (tmp_path / "gone" / "README.md").read_text()
