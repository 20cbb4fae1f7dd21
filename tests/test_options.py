"""The options: their parts, their choices, and which of them an interrupted run must be resumed under."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from helpers import broken_off

import tailorcli
from tailorcli import (
    CalibrateOptions,
    DistillOptions,
    EvaluateOptions,
    FinetuneOptions,
    MergeOptions,
    PatchOptions,
    TailorError,
    patch_checkpoint,
)
from tailorcli.checkpoint.writer import CheckpointWriter
from tailorcli.errors import OptionsError
from tailorcli.options import GraftOptions, KeepOptions, OutputOptions, PatchMethod, Solver, SolverOptions
from tailorcli.patchfile.report import load_report, options_shown


def test_patch_options_are_flat_and_made_of_parts_by_purpose():
    options = PatchOptions(density=0.2, solver="none", graft_steps=3, task="mine")
    assert (options.density, options.solver, options.graft_steps, options.task) == (0.2, "none", 3, "mine")
    parts = [{field.name for field in fields(part)} for part in (KeepOptions, SolverOptions, GraftOptions)]
    parts.append({field.name for field in fields(OutputOptions)})
    assert (
        sum(map(len, parts)) == len(set.union(*parts)) == len(fields(PatchOptions)) - 3
    )  # fp8_output, trust_remote_code and teacher_weight are its own
    assert fields(PatchOptions)[0].name == "density"  # PatchOptions(0.2)
    with pytest.raises(TypeError):
        PatchOptions(densty=0.2)


def test_a_choice_is_taken_as_a_word_or_as_a_member():
    assert PatchOptions(solver="none") == PatchOptions(solver=Solver.NONE)
    assert isinstance(PatchOptions(method="dare").method, PatchMethod)
    assert hash(PatchOptions(solver="none")) == hash(PatchOptions(solver=Solver.NONE))
    assert json.dumps(PatchOptions(method=PatchMethod.DARE).to_dict()["method"]) == '"dare"'
    assert type(PatchOptions().to_dict()["solver"]) is type(MergeOptions().to_dict()["method"]) is str


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: PatchOptions(solver="exact"), "solver must be one of joint, sequential, none, got 'exact'"),
        (lambda: PatchOptions(method="ties"), "method must be one of tailor, interpolate, dare, magnitude, graft,"),
        (lambda: PatchOptions(threshold="all"), "threshold must be one of tensor, global"),
        (lambda: PatchOptions(score="size"), "score must be one of paper, sum"),
        (lambda: PatchOptions(fp8_output="fp4"), "fp8-output must be one of fp8, bf16"),
        (lambda: MergeOptions(method="mean"), "method must be one of average, joint, patches"),
        (lambda: CalibrateOptions(text_mode="page"), "text-mode must be one of line, chunk"),
        (lambda: CalibrateOptions(blockwise="yes"), "blockwise must be one of auto, always, never"),
        (lambda: EvaluateOptions(dtype="int8"), "dtype must be one of auto, float32, bfloat16, float16"),
    ],
)
def test_a_word_that_is_no_choice_is_refused_with_those_that_are(make, what):
    with pytest.raises(TailorError, match=what):
        make()


WRONG = {  # by what an annotation begins with: values of other kinds, which Python compares, counts or takes for true
    "int": ("3", 3.5, [3], True, float("nan")),
    "float": ("0.1", [0.1], True, 1j, 1 << 2000),
    "bool": ("no", 1, [True]),
    "str": (3, True, b"cpu"),
    "tuple": (3, (3j,), {"*mlp*": 1}),
    "DataColumns": ("text", {"text": "text"}),
}
EVERY = [getattr(tailorcli, name) for name in tailorcli.__all__ if name.endswith("Options")] + [tailorcli.DataColumns]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_a_value_of_another_kind_is_refused(kind):
    """ "no" was taken for yes, and a number of 3.5 samples failed after the model was loaded."""
    for field in fields(kind):
        annotation = str(field.type)
        wrong = next((values for start, values in WRONG.items() if annotation.startswith(start)), (3, True, b"x"))
        for value in (*wrong, *(() if "None" in annotation else (None,))):
            if isinstance(value, str) and "str" in annotation:
                continue
            with pytest.raises(OptionsError, match=f"{field.name.replace('_', '-')} must be "):
                kind(**{field.name: value})


def test_a_number_of_numpy_and_a_list_are_taken_as_pythons_own():
    options = PatchOptions(density=np.float32(0.5), seed=np.int64(3), include=["*mlp*"], omega=1)
    assert options == PatchOptions(density=0.5, seed=3, include=("*mlp*",), omega=1.0)
    assert hash(options) == hash(PatchOptions(density=0.5, seed=3, include=("*mlp*",), omega=1.0))
    assert json.dumps(options.to_dict()).count('"density": 0.5') == 1
    assert MergeOptions(weights=[1, np.float64(2.0)]).weights == (1.0, 2.0)


def test_one_glob_is_no_row_of_letters(llama_pair):
    """Of "*mlp*" the first letter alone lets every tensor through."""
    assert CalibrateOptions(include="*mlp*") == CalibrateOptions(include=("*mlp*",))
    assert FinetuneOptions(trainable="*mlp*") == FinetuneOptions(trainable=("*mlp*",))
    options = PatchOptions(include="*mlp*", solver="none", omega=1.0)
    plan = tailorcli.plan_patch(llama_pair / "base", llama_pair / "tuned", options=options)
    assert len(plan.patched) == 6


def test_a_seed_that_numpy_does_not_take_is_refused():
    for kind in (CalibrateOptions, DistillOptions, EvaluateOptions, FinetuneOptions, PatchOptions):
        with pytest.raises(OptionsError, match="seed must be from 0"):
            kind(seed=-1)


def test_the_report_holds_every_option_but_how_an_earlier_output_is_met():
    names = {field.name for field in fields(PatchOptions)} - {"resume", "overwrite"}
    rarely = {"fp8_output": "bf16", "trust_remote_code": True, "teacher_weight": 0.5, "check_propagation": True}
    rarely["score"] = "sum"
    told = PatchOptions(**rarely).to_dict().keys()
    own = {"alpha", "beta", "threshold_scale"}  # told of by their own methods alone
    assert told == names - own
    assert PatchOptions(method="lines").to_dict().keys() - told == {"alpha", "beta"}
    assert PatchOptions(method="dg-hard").to_dict().keys() - told == {"threshold_scale"}
    assert told - PatchOptions().to_dict().keys() == rarely.keys()  # which most runs do not know
    names = {field.name for field in fields(MergeOptions)} - {"resume", "overwrite"}
    assert set(MergeOptions().to_dict()) == names


# A way to patch, and for each option in turn a value that makes another output of it (True) or the same (False).
SAME = {"device": "cpu", "trust_remote_code": True, "allow_dtype_mismatch": True}
GRAFTS = {"graft_steps": 3, "graft_rate": 0.2, "batch_size": 2}
IDENTITIES = {
    "joint": (
        {},
        {"density": 0.2, "omega": 1.0, "solver": "none", "damping": 0.1, "tolerance": 1e-3, "max_iterations": 9}
        | {"weight": 0.5, "include": ("*mlp*",), "exclude": ("*norm*",), "max_shard_size": 100, "task": "a"}
        | {"license": "mit", "resized_vocab": True, "fp8_output": "bf16", "score": "sum"},
        {"block_size": 64, "seed": 1, "threshold": "global", "retain_weight": 0.5, "score": "paper", **GRAFTS, **SAME},
    ),
    "sequential": ({"solver": "sequential"}, {"block_size": 64, "damping": 0.1}, {"tolerance": 1e-3, "seed": 1}),
    "no Hessian": (
        {"solver": "none", "omega": 1.0},
        {"density": 0.2, "omega": 0.5},
        {"damping": 0.1, "tolerance": 1e-3, "max_iterations": 9, "block_size": 64},
    ),
    "dare": ({"method": "dare"}, {"density": 0.2, "seed": 1}, {"omega": 1.0, "solver": "none", "damping": 0.1}),
    "magnitude": ({"method": "magnitude"}, {"density": 0.2, "threshold": "global"}, {"seed": 1, **GRAFTS}),
    "interpolate": ({"method": "interpolate"}, {"weight": 0.3}, {"density": 0.2, "weight": 0.5, "seed": 1}),
    "fapm": ({"method": "fapm"}, {"density": 0.2, "weight": 0.5}, {"alpha": 0.3, "seed": 1, "threshold": "global"}),
    "lines": ({"method": "lines"}, {"alpha": 0.3, "beta": 0.4}, {"density": 0.2, "threshold_scale": 2.0, "seed": 1}),
    "dg-hard": ({"method": "dg-hard"}, {"threshold_scale": 2.0, "weight": 0.5}, {"density": 0.2, "alpha": 0.3}),
    "changed": ({"method": "changed"}, {"weight": 0.5}, {"density": 0.2, "seed": 1, "omega": 1.0}),
    "graft": ({"method": "graft"}, {"density": 0.2, "seed": 1, "threshold": "global", **GRAFTS}, {"omega": 1.0}),
}


@pytest.mark.parametrize("kind", IDENTITIES)
def test_a_run_is_told_by_the_options_that_change_its_output_and_by_no_others(kind):
    way, other, same = IDENTITIES[kind]
    options = PatchOptions(**way)
    identity = options.resolved(False).identity(False)
    for name, value in other.items():
        assert replace(options, **{name: value}).resolved(False).identity(False) != identity, name
    for name, value in same.items():
        assert replace(options, **{name: value}).resolved(False).identity(False) == identity, name


@pytest.mark.parametrize(("samples", "steps"), [(2, 400), (512, 400), (1024, 566), (2048, 800)])
def test_more_samples_are_trained_on_for_more_steps(samples, steps):
    assert DistillOptions().for_samples(samples).known_steps == steps
    assert DistillOptions(steps=7).for_samples(samples).known_steps == 7


def test_a_job_draws_more_samples_where_it_trains_on_them():
    assert CalibrateOptions.of_job(distilled=False) == CalibrateOptions()
    assert CalibrateOptions.of_job(distilled=True) == CalibrateOptions(num_samples=512)


def test_what_the_retain_term_adds_to_a_run_counts_only_with_it():
    def identity(retained, **options):
        return PatchOptions(**options).resolved(retained).identity(retained)

    assert identity(True, retain_weight=0.5) != identity(True)
    assert identity(True, propagate=False) != identity(True)
    assert identity(True, damping=0.1) == identity(True)  # which is its damping anyway
    assert identity(False, propagate=False) == identity(False)


@pytest.mark.parametrize(
    ("options", "propagated"),
    [({}, False), ({"propagate": True}, True), ({"check_propagation": True}, True), ({"propagate": False}, False)],
)
def test_what_is_trained_is_propagated_only_where_that_is_asked_for(options, propagated):
    assert PatchOptions().resolved(True).propagate
    assert PatchOptions(**options).resolved(True, distilled=True).propagate is propagated


def test_a_merge_is_told_by_its_shares_and_by_what_its_method_uses():
    average = MergeOptions().identity(2)
    assert MergeOptions(weights=(2.0, 2.0), device="cpu", damping=0.1).identity(2) == average
    assert MergeOptions(weights=(2.0, 1.0)).identity(2) != average
    assert MergeOptions(task="both").identity(2) != average
    joint = MergeOptions("joint")
    for changed in ({"damping": 0.1}, {"tolerance": 1e-3}, {"max_iterations": 9}):
        assert replace(joint, **changed).identity(2) != joint.identity(2)


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_goes_on_under_options_that_change_nothing(llama_pair, tmp_path, finished):
    out, file = tmp_path / "out", tmp_path / "p.safetensors"
    arguments = (llama_pair / "base", llama_pair / "tuned", out, llama_pair / "stats")
    if finished:
        patch_checkpoint(*arguments, patch_file=file)
    else:
        with broken_off(CheckpointWriter, 4):
            patch_checkpoint(*arguments, patch_file=file)
    free = {"device": "cpu", "graft_steps": 3, "seed": 5, "block_size": 64, "allow_dtype_mismatch": True}
    again = PatchOptions(resume=True, **free)
    report = patch_checkpoint(*arguments, again, patch_file=file)
    assert report.totals["tensors_patched"] == 21
    earlier = json.loads((out / "tailor_run.json").read_text())["tensors_from_an_earlier_run"]
    assert earlier == (0 if finished else 4)
    assert options_shown(load_report(out / "tailor_report.json"))["density"] == 0.1
    with pytest.raises(TailorError, match=r"another run|cannot resume"):
        patch_checkpoint(*arguments, replace(again, omega=1.0), patch_file=file)
    if not finished:
        with pytest.raises(TailorError, match="another run"):
            patch_checkpoint(*arguments, replace(again, tolerance=1e-3), patch_file=file)
