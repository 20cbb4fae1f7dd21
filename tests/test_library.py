"""A call from Python leaves the process as it was: its generators, its switches, what it prints, what is open."""

import json
import random
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import folder_digest, make_pair, with_statistics
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from tailorcli import (
    CalibrateOptions,
    Checkpoint,
    DistillOptions,
    EvaluateOptions,
    FinetuneOptions,
    MergeOptions,
    PatchOptions,
    ProbeOptions,
    TailorError,
    apply_patch,
    calibrate_model,
    compare_models,
    distill_checkpoint,
    evaluate_models,
    finetune_model,
    inspect_path,
    merge_patches,
    patch_checkpoint,
    plan_finetune,
    plan_job,
    plan_patch,
    probe_model,
    run_sweep,
    settings_of,
    tailor,
    verify_checkpoint,
)
from tailorcli.device import attention_without_cudnn, deterministic_algorithms, exact_float32
from tailorcli.models.calling import quiet_transformers
from tailorcli.models.config import read_config
from tailorcli.models.loading import load_model
from tailorcli.models.skeleton import empty_model

SMALL = CalibrateOptions(12, 24)
WRITTEN = CalibrateOptions(12, 24, synthetic=True)
BY_GRAFT = PatchOptions(method="graft", graft_steps=2)
SPIDER = FinetuneOptions(method="spider", steps=2, batch_size=2)
TOO_FAST = FinetuneOptions(steps=3, batch_size=2, learning_rate=1e30)
QUICK = EvaluateOptions(limit=4, resamples=20)
TASKS = ("a", "b")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = with_statistics(make_pair(tmp_path_factory.mktemp("library")))
    for name, options in (("one", PatchOptions(method="magnitude")), ("two", PatchOptions(method="dare"))):
        patch_checkpoint(
            folder / "base", folder / "tuned", None, None, options, patch_file=folder / f"{name}.safetensors"
        )
    return folder


CALLS = {
    "calibrate": lambda f, out: calibrate_model(f / "tuned", f / "data.jsonl", out, SMALL),
    "calibrate to the bit": lambda f, out: calibrate_model(
        f / "tuned", f / "data.jsonl", out, CalibrateOptions(12, 24, deterministic=True)
    ),
    "write samples": lambda f, out: calibrate_model(f / "base", None, out, WRITTEN),
    "no data": lambda f, out: calibrate_model(f / "tuned", f / "nothing.jsonl", out, SMALL),
    "compare": lambda f, out: compare_models(f / "base", f / "tuned"),
    "plan a patch": lambda f, out: plan_patch(f / "base", f / "tuned", out, f / "stats"),
    "patch": lambda f, out: patch_checkpoint(f / "base", f / "tuned", out, f / "stats", retain=f / "retain"),
    "patch into an input": lambda f, out: patch_checkpoint(f / "base", f / "tuned", f / "base", f / "stats"),
    "graft": lambda f, out: patch_checkpoint(f / "base", f / "tuned", out, None, BY_GRAFT, graft_data=f / "data.jsonl"),
    "distill": lambda f, out: distill_checkpoint(
        f / "base", f / "tuned", out, f / "stats", f / "retain", distill=DistillOptions(steps=2)
    ),
    "merge": lambda f, out: merge_patches(
        f / "base", [f / "one.safetensors", f / "two.safetensors"], out, options=MergeOptions("patches")
    ),
    "apply": lambda f, out: apply_patch(f / "base", f / "one.safetensors", out),
    "verify": lambda f, out: verify_checkpoint(f / "tuned", f / "base", f / "one.safetensors"),
    "look": lambda f, out: inspect_path(f / "one.safetensors"),
    "plan a job": lambda f, out: plan_job(f / "base", f / "tuned", out, f / "data.jsonl", calibration=SMALL),
    "job": lambda f, out: tailor(f / "base", f / "tuned", out, f / "data.jsonl", calibration=SMALL),
    "plan a fine-tune": lambda f, out: plan_finetune(f / "base", f / "data.jsonl", out, SPIDER),
    "fine-tune": lambda f, out: finetune_model(f / "base", f / "data.jsonl", out, SPIDER),
    "fine-tune to NaN": lambda f, out: finetune_model(f / "base", f / "data.jsonl", out, TOO_FAST),
    "probe": lambda f, out: probe_model(f / "base", out, ProbeOptions(4, 2, 16)),
    "evaluate": lambda f, out: evaluate_models([f / "base", f / "tuned"], [f"a={f / 'data.jsonl'}:text"], QUICK),
    "sweep": lambda f, out: run_sweep(
        *(f / "base", f / "tuned", settings_of(PatchOptions())),
        [f"{name}={f / 'data.jsonl'}:text" for name in TASKS],
        *(out,),
        origin=TASKS[:1],
        target=TASKS[1:],
        stats=f / "stats",
        options=QUICK,
    ),
}
RAISE = {"no data", "patch into an input", "fine-tune to NaN"}


def switches():
    """Settings of the whole process that a call may have reason to change."""
    return {
        "float32": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "transformers": (logging.get_verbosity(), logging.is_progress_bar_enabled()),
    }


def process():
    """What a call finds, and shall leave, of the rest."""
    version, keys, place, *_ = np.random.get_state()
    return switches() | {
        "random": random.getstate(),
        "numpy": (version, keys.tobytes(), place),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "folder": Path.cwd(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


@pytest.fixture
def own_settings():
    """Settings as a user has them who wants speed, and not torch's own."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_the_process_alone_prints_nothing_and_gives_plain_values(
    pair, tmp_path, own_settings, capfd, name
):
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before = process()
    raised = False
    try:
        values = CALLS[name](pair, tmp_path / "out").to_dict()
        assert repr(json.loads(json.dumps(values, allow_nan=False))) == repr(values)
    except TailorError:
        raised = True
    assert raised == (name in RAISE)
    after = process()
    assert {what for what in before if before[what] != after[what]} == set()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "held", [exact_float32, quiet_transformers, attention_without_cudnn, lambda: deterministic_algorithms(True)]
)
def test_settings_of_the_process_come_back_after_the_last_of_overlapping_calls(own_settings, monkeypatch, held):
    """The second found what the first had set, and left that behind; the first took it from the second."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    before = switches()
    first, second = held(), held()
    first.__enter__()
    within = switches()
    assert within != before
    second.__enter__()
    first.__exit__(None, None, None)
    assert switches() == within
    second.__exit__(None, None, None)
    assert switches() == before


def test_samples_that_models_write_in_threads_side_by_side_are_those_of_one_after_another(pair, tmp_path):
    """Torch has one generator for all threads."""

    def write(name):
        with suppress(TailorError):
            calibrate_model(pair / "base", None, tmp_path / name, WRITTEN)

    threads = [threading.Thread(target=write, args=(name,)) for name in ("first", "second", "third")]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), before)
    expected = folder_digest(pair / "retain")
    assert all(folder_digest(tmp_path / name) == expected for name in ("first", "second", "third"))


def test_models_that_threads_build_side_by_side_leave_transformers_and_torch_as_they_were(pair):
    """While it builds a model, transformers replaces ``tie_weights`` for the whole process."""
    config, options = read_config(pair / "base"), CalibrateOptions()
    before = PreTrainedModel.tie_weights, torch.nn.Module.register_parameter, torch.get_default_dtype()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds: calls overlap in every way

    def build():
        with Checkpoint.open(pair / "base") as checkpoint:
            for _ in range(8):
                load_model(checkpoint, config, options)
                empty_model(checkpoint, config, options)

    threads = [threading.Thread(target=build) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    found = PreTrainedModel.tie_weights, torch.nn.Module.register_parameter, torch.get_default_dtype()
    PreTrainedModel.tie_weights, torch.nn.Module.register_parameter, _ = before  # for the tests behind this one
    assert found == before
