"""The main job end to end on tiny models, through the API and through the installed command."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import bits, broken_off, folder_digest, invoke, make_pair, read_tensors, run, swap_two_letters
from launcher import completed

from tailorcli import (
    CalibrateOptions,
    Checkpoint,
    PatchOptions,
    TailorError,
    calibrate_model,
    inspect_path,
    patch_checkpoint,
    plan_patch,
    score_checkpoint,
)
from tailorcli.checkpoint.writer import CheckpointWriter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def installed(*arguments):
    """Run the installed command; returns its standard output."""
    done = completed(("-m", "tailorcli", *arguments))
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done.stdout.decode()


def check_patched(folder, report):
    """Outside the mask base to the bit; exactly round(density * numel) entries may differ."""
    base, tuned, out = (read_tensors(folder / name) for name in ("base", "tuned", "out"))
    assert list(out) == list(base)
    for record in report["tensors"]:
        name = record["name"]
        assert out[name].dtype == base[name].dtype
        changed = out[name] != base[name]
        assert changed.sum() <= record["kept"] == round(0.1 * base[name].numel())
        if record["kind"] == "diagonal":
            assert bits(out[name][changed]) == bits(tuned[name][changed])


EACH_ONCE = [("llama", None, "float32"), ("llama", "20KB", "bfloat16"), ("gpt2", None, "float16")]
EVERY = [(kind, shard, dtype) for kind in ("llama", "gpt2") for shard in (None, "20KB") for dtype in DTYPES]
OTHERS = [pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in EACH_ONCE]


@pytest.mark.parametrize(("kind", "shard", "dtype"), EACH_ONCE + OTHERS)
def test_the_main_job(tmp_path, kind, dtype, shard):
    check_the_main_job(tmp_path, kind, dtype, shard, lambda *arguments: run(*arguments).stdout)


@pytest.mark.parametrize(
    ("kind", "dtype", "shard"),
    [("gpt2", "bfloat16", "20KB"), pytest.param("llama", "float32", None, marks=pytest.mark.slow)],
)
def test_the_main_job_through_the_installed_command(tmp_path, kind, dtype, shard):
    check_the_main_job(tmp_path, kind, dtype, shard, installed)


def check_the_main_job(folder, kind, dtype, shard, tailorcli):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_pair(folder, kind, dtype=DTYPES[dtype], shard=shard)
    base, tuned, stats, out = (folder / name for name in ("base", "tuned", "stats", "out"))
    tailorcli("calibrate", tuned, "--data", folder / "data.jsonl", "-o", stats)
    if dtype == "float32":  # the same code for every dtype: one is enough for these two
        assert "weights (10.0%)" in tailorcli("score", base, tuned, "--stats", stats, "-o", folder / "score.json")
        assert json.loads((folder / "score.json").read_text())["command"] == "score"
    report = json.loads(tailorcli("patch", base, tuned, "--stats", stats, "-o", out, "--json"))
    check_patched(folder, report)
    assert report["totals"]["error_after"] < report["totals"]["error_before"]
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(p.name for p in base.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]


@pytest.mark.parametrize("solver", ["none", "sequential", "joint"])
@pytest.mark.parametrize(("density", "same_as"), [(0.0, "base"), (1.0, "tuned")])
def test_the_ends_of_the_density_scale_are_the_two_models(llama_pair, tmp_path, solver, density, same_as):
    options = PatchOptions(density=density, solver=solver)
    patch_checkpoint(llama_pair / "base", llama_pair / "tuned", tmp_path / "out", llama_pair / "stats", options)
    out, expected = read_tensors(tmp_path / "out"), read_tensors(llama_pair / same_as)
    assert {name: bits(tensor) for name, tensor in out.items()} == {n: bits(t) for n, t in expected.items()}


def test_sharding_of_the_inputs_and_of_the_output_changes_nothing(llama_pair, tmp_path):
    make_pair(tmp_path, shard="15KB")  # the same weights, with the base in shards
    results = []
    for base, size in ((llama_pair / "base", None), (tmp_path / "base", None), (llama_pair / "base", 9_000)):
        out = tmp_path / f"out{len(results)}"
        patch_checkpoint(base, llama_pair / "tuned", out, llama_pair / "stats", PatchOptions(max_shard_size=size))
        results.append({name: bits(tensor) for name, tensor in read_tensors(out).items()})
        with Checkpoint.open(out) as checkpoint:
            assert set(checkpoint.tensors) == set(results[0])
    assert results[0] == results[1] == results[2]
    assert len(list((tmp_path / "out2").glob("*.safetensors"))) > 5
    index = json.loads((tmp_path / "out2" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(b) for b in results[2].values())


def test_side_files_come_from_the_tuned_model_byte_for_byte(tmp_path):
    folder = make_pair(tmp_path)
    extra = {"chat_template.jinja": "{{ messages }}", "modeling_own.py": "x = 1\n", "sub/vocab.txt": "a\nb"}
    extra |= {"README.md": "# mine\r\n", "NOTICE": "n"}
    for name, text in extra.items():
        (folder / "tuned" / name).parent.mkdir(exist_ok=True)
        (folder / "tuned" / name).write_text(text)
    for skipped in ("training_args.bin", "optimizer.pt", "checkpoint-10/config.json"):
        (folder / "tuned" / skipped).parent.mkdir(exist_ok=True)
        (folder / "tuned" / skipped).write_text("no")
    options = PatchOptions(solver="none", omega=1.0)
    patch_checkpoint(folder / "base", folder / "tuned", folder / "out", None, options)
    tuned, out = folder_digest(folder / "tuned"), folder_digest(folder / "out")
    assert out.pop("TUNED_README.md") == tuned.pop("README.md")  # README.md is the patched model's own card
    ours = {"model.safetensors", "tailor_report.json", "README.md"}
    weights = {"model.safetensors", "training_args.bin", "optimizer.pt", "checkpoint-10/config.json"}
    assert {k: v for k, v in out.items() if k not in ours} == {k: v for k, v in tuned.items() if k not in weights}
    assert extra.keys() <= out.keys()


def test_what_has_no_statistics_stays_at_base_and_is_listed(llama_pair, tmp_path):
    options = PatchOptions(exclude=("*norm*",))
    report = patch_checkpoint(llama_pair / "base", llama_pair / "tuned", tmp_path / "o", llama_pair / "stats", options)
    base, out = read_tensors(llama_pair / "base"), read_tensors(tmp_path / "o")
    left = [record for record in report.to_dict()["tensors"] if record["status"] == "base"]
    assert {record["name"] for record in left} == {name for name in base if "norm" in name}
    assert all(record["reason"] for record in left)
    assert all(bits(out[record["name"]]) == bits(base[record["name"]]) for record in left)
    assert report.totals["tensors_at_base"] == len(left)


def test_a_plan_says_what_stays_at_base_for_its_statistics_alone(llama_pair, tmp_path):
    how = CalibrateOptions(num_samples=4, seq_len=16, exclude=("*up_proj*",))
    calibrate_model(llama_pair / "tuned", llama_pair / "data.jsonl", tmp_path / "stats", how)
    for method in ("tailor", "tailor-released"):
        options = PatchOptions(method=method, exclude=("*down_proj*",))
        plan = plan_patch(llama_pair / "base", llama_pair / "tuned", None, tmp_path / "stats", options)
        may_change = {tensor.name for tensor in plan.left_at_base if tensor.by_statistics}
        assert {tensor.name for tensor in plan.left_at_base} - may_change == names_with(plan, "down_proj")
        others = () if method == "tailor" else ("norm", "embed_tokens")
        assert may_change == names_with(plan, "up_proj", *others)
        assert all("by_statistics" not in tensor for tensor in plan.to_dict()["tensors"])


def names_with(plan, *parts):
    return {tensor.name for tensor in plan.tensors if any(part in tensor.name for part in parts)}


def test_integer_buffers_and_unknown_tensors_pass_through(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_pair(tmp_path)
    for name, offset in (("base", 0), ("tuned", 1)):
        tensors = load_file(folder / name / "model.safetensors")
        tensors["extra.counter"] = torch.arange(5) + offset
        tensors["extra.conv.weight"] = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(offset))
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    report = patch_checkpoint(folder / "base", folder / "tuned", folder / "out", folder / "stats")
    reasons = {r["name"]: r["reason"] for r in report.to_dict()["tensors"] if r["status"] == "base"}
    assert set(reasons) == {"extra.counter", "extra.conv.weight"}
    assert "I64" in reasons["extra.counter"]
    base, out = read_tensors(folder / "base"), read_tensors(folder / "out")
    assert bits(out["extra.counter"]) == bits(base["extra.counter"])
    assert bits(out["extra.conv.weight"]) == bits(base["extra.conv.weight"])


def test_tokens_under_other_ids_are_told(tmp_path, caplog):
    folder = make_pair(tmp_path)
    swap_two_letters(folder / "tuned")
    shown = invoke("check", folder / "base", folder / "tuned")
    assert "Some tokens have other ids" in " ".join(shown.stdout.split())
    options = PatchOptions(method="interpolate")
    patch_checkpoint(folder / "base", folder / "tuned", folder / "out", options=options)
    assert "2 tokens have other ids in tuned's tokenizer" in caplog.text


def test_statistics_under_another_config_are_told(tmp_path, caplog):
    folder = make_pair(tmp_path)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    given = (folder / "base", folder / "tuned")
    patch_checkpoint(*given, folder / "one", folder / "stats")
    assert "has changed since" not in caplog.text
    file = folder / "tuned" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))
    patch_checkpoint(*given, folder / "two", folder / "stats")
    assert f"{file} has changed since {folder / 'stats'} was measured" in caplog.text


def test_tied_embeddings_stay_one_tensor(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_pair(tmp_path, tied=True)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    report = patch_checkpoint(folder / "base", folder / "tuned", folder / "out", folder / "stats")
    assert "lm_head.weight" not in read_tensors(folder / "out")
    embedding = next(r for r in report.to_dict()["tensors"] if r["name"] == "model.embed_tokens.weight")
    assert embedding["status"] == "patched"
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_another_stored_dtype_is_only_taken_when_allowed(tmp_path):
    folder = make_pair(tmp_path, dtype=torch.bfloat16)
    wide = make_pair(tmp_path / "wide")
    options = PatchOptions(solver="none", omega=1.0)
    with pytest.raises(TailorError, match="BF16 in base"):
        patch_checkpoint(folder / "base", wide / "tuned", folder / "out", None, options)
    options = PatchOptions(solver="none", omega=1.0, allow_dtype_mismatch=True)
    patch_checkpoint(folder / "base", wide / "tuned", folder / "out", None, options)
    assert all(tensor.dtype == torch.bfloat16 for tensor in read_tensors(folder / "out").values())


def test_score_says_what_patch_will_keep(llama_pair, tmp_path):
    arguments = (llama_pair / "base", llama_pair / "tuned")
    scored = score_checkpoint(*arguments, llama_pair / "stats", PatchOptions(solver="none"))
    patched = patch_checkpoint(*arguments, tmp_path / "out", llama_pair / "stats")
    keys = ("kept", "delta_sq_kept", "sensitivity_kept", "zero_delta", "dead_channels", "salience_quantiles")
    for ours, theirs in zip(scored.to_dict()["tensors"], patched.to_dict()["tensors"], strict=True):
        assert [ours[key] for key in keys] == [theirs[key] for key in keys]


def test_the_plan_is_what_happens(llama_pair, tmp_path):
    arguments = (llama_pair / "base", llama_pair / "tuned", tmp_path / "out", llama_pair / "stats")
    plan = plan_patch(*arguments, PatchOptions(exclude=("lm_head*",)))
    assert not (tmp_path / "out").exists()
    report = patch_checkpoint(*arguments, PatchOptions(exclude=("lm_head*",)))
    assert {t.name: t.action == "patch" for t in plan.tensors} == {
        r["name"]: r["status"] == "patched" for r in report.to_dict()["tensors"]
    }
    assert plan.write_bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))


def test_runs_repeat_to_the_bit(llama_pair, tmp_path):
    for name in ("one", "two"):
        patch_checkpoint(llama_pair / "base", llama_pair / "tuned", tmp_path / name, llama_pair / "stats")
    assert folder_digest(tmp_path / "one") == folder_digest(tmp_path / "two")


# --- Interrupted runs ------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from tailorcli import patch_checkpoint, PatchOptions
from tailorcli.checkpoint import journal
journal._SYNC_BYTES = 1  # small tensors: journal each of them, so that there is something to resume
folder = sys.argv[1]
if len(sys.argv) > 3:
    sync, left = journal.Journal._sync, [int(sys.argv[3])]

    def counting(*what):
        sync(*what)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    journal.Journal._sync = counting
print("ready", flush=True)
options = PatchOptions(max_shard_size=30_000)
arguments = (folder + "/base", folder + "/tuned", sys.argv[2], folder + "/stats", options)
patch_checkpoint(*arguments, patch_file=sys.argv[2] + ".safetensors")
"""


@pytest.fixture(scope="module")
def deep_pair(tmp_path_factory):
    folder = make_pair(tmp_path_factory.mktemp("deep"), layers=10)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    return folder


def start_child(folder, out):
    """A process that is about to patch."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", CHILD, *map(str, (folder, out))]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    child.stdout.readline()
    return child


@pytest.fixture(scope="module")
def whole(deep_pair):
    """What an uninterrupted run writes: the folder's digest and the patch file's bytes; and its seconds."""
    started = start_child(deep_pair, deep_pair / "whole")
    begin = time.perf_counter()
    started.communicate()
    duration = time.perf_counter() - begin
    return folder_digest(deep_pair / "whole"), (deep_pair / "whole.safetensors").read_bytes(), duration


def resume_killed(folder, out, whole):
    """Nothing loads, and --resume ends with the bytes of an uninterrupted run; how many tensors it had already."""
    from transformers import AutoModelForCausalLM

    if not (out / "model.safetensors.index.json").exists():
        with pytest.raises(TailorError):
            Checkpoint.open(out)
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out)
    options, file = PatchOptions(max_shard_size=30_000, resume=True), out.with_name(out.name + ".safetensors")
    patch_checkpoint(folder / "base", folder / "tuned", out, folder / "stats", options, patch_file=file)
    assert folder_digest(out) == whole[0]
    assert file.read_bytes() == whole[1]
    return json.loads((out / "tailor_run.json").read_text())["tensors_from_an_earlier_run"]


@pytest.mark.parametrize("syncs", [1, 70, 180])
def test_killed_in_the_middle_and_resumed_to_the_same_bytes(deep_pair, tmp_path, whole, syncs):
    done = completed(("-c", CHILD, deep_pair, tmp_path / "out", syncs))
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    from_earlier = resume_killed(deep_pair, tmp_path / "out", whole)
    assert syncs // 3 <= from_earlier <= syncs  # two journals, one of the folder and one of the patch file


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_to_the_same_bytes(deep_pair, tmp_path, whole):
    moments, duration = random.Random(0), whole[2]
    cut_short, from_earlier, attempts = 0, 0, 0
    while cut_short < 20:
        attempts += 1
        assert attempts < 100, "the runs end before they can be killed"
        out = tmp_path / f"killed{attempts}"
        child = start_child(deep_pair, out)
        time.sleep(moments.uniform(0, duration))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if (out / "model.safetensors.index.json").exists():
            duration *= 0.9  # the machine is less busy than during the first run
        else:
            cut_short += 1
        from_earlier += resume_killed(deep_pair, out, whole) > 0
    assert from_earlier >= 5  # or resuming was hardly tried


def interrupt(folder, out, after):
    """Break a run off after some tensors, as an exception in the middle would."""
    with broken_off(CheckpointWriter, after):
        patch_checkpoint(folder / "base", folder / "tuned", out, folder / "stats")


@pytest.mark.parametrize(
    ("change", "what"), [({"density": 0.2}, "density"), ({"solver": "none"}, "solver"), ({"damping": 0.1}, "damping")]
)
def test_resume_refuses_other_options(llama_pair, tmp_path, change, what):
    out = tmp_path / "out"
    interrupt(llama_pair, out, after=4)
    arguments = (llama_pair / "base", llama_pair / "tuned", out, llama_pair / "stats")
    assert inspect_path(out).kind == "unfinished"
    with pytest.raises(TailorError, match=rf"cannot resume.*{what}"):
        patch_checkpoint(*arguments, PatchOptions(resume=True, **change))
    with pytest.raises(TailorError, match="not empty"):
        patch_checkpoint(*arguments)
    report = patch_checkpoint(*arguments, PatchOptions(resume=True))
    assert json.loads((out / "tailor_run.json").read_text())["tensors_from_an_earlier_run"] == 4
    again = patch_checkpoint(*arguments, PatchOptions(resume=True))  # finished: nothing to do
    assert again.tensors == report.tensors


def test_resume_refuses_other_inputs(llama_pair, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_pair(tmp_path)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    interrupt(folder, folder / "out", after=3)
    tensors = load_file(folder / "base" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TailorError, match=r"cannot resume.*base fingerprint"):
        patch_checkpoint(folder / "base", folder / "tuned", folder / "out", folder / "stats", PatchOptions(resume=True))


def test_a_torn_last_journal_line_is_dropped(llama_pair, tmp_path):
    out = tmp_path / "out"
    interrupt(llama_pair, out, after=6)
    with (out / ".tailorcli" / "journal.jsonl").open("a") as stream:
        stream.write('{"name": "model.norm.wei')
    arguments = (llama_pair / "base", llama_pair / "tuned")
    patch_checkpoint(*arguments, out, llama_pair / "stats", PatchOptions(resume=True))
    patch_checkpoint(*arguments, tmp_path / "whole", llama_pair / "stats")
    assert folder_digest(out) == folder_digest(tmp_path / "whole")


def test_overwrite_replaces_our_output_and_nothing_else(llama_pair, tmp_path):
    out = tmp_path / "out"
    arguments = (llama_pair / "base", llama_pair / "tuned", out, llama_pair / "stats")
    patch_checkpoint(*arguments, PatchOptions(max_shard_size=9_000))
    (out / "notes.txt").write_text("mine")
    patch_checkpoint(*arguments, PatchOptions(overwrite=True))
    assert [p.name for p in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert (out / "notes.txt").read_text() == "mine"
