"""Patch files: the codings of masks, apply and verify to the bit, interrupted runs, malformed files."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import bits, broken_off, folder_digest, invoke, make_pair, read_tensors, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from launcher import completed
from safetensors.torch import save_file

from tailorcli import PatchOptions, TailorError, calibrate_model, inspect_path, patch_checkpoint
from tailorcli.checkpoint.writer import CheckpointWriter
from tailorcli.patchfile import coding as maskcode
from tailorcli.patchfile import view
from tailorcli.patchfile.reader import PatchFile
from tailorcli.patchfile.writer import PatchWriter
from tailorcli.patching import verify
from tailorcli.patching.apply import apply_patch
from tailorcli.patching.verify import verify_checkpoint

ROOT = Path(__file__).parent.parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SALIENCE = PatchOptions(solver="none", omega=1.0)


# --- The coding of a mask --------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 3000),
    st.floats(0, 1),
    st.integers(0, 7),
    st.integers(0, 2**32 - 1),
    st.sampled_from([(7, 2, 5), (64, 48, 100), (1 << 20, 1 << 16, 1 << 18)]),
)
def test_a_mask_survives_its_coding(size, density, padding, seed, sizes):
    chunk, num_bytes, step = sizes
    mask = np.random.default_rng(seed).random(size) < density**3  # dense ones and very sparse ones
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(maskcode, "_CHUNK", chunk)
        patched.setattr(maskcode, "_BYTES", num_bytes)
        coding, codes = maskcode.encode(mask)
        padded = np.append(codes, np.full(padding, maskcode.pad_byte(coding), np.uint8))
        assert maskcode.check(coding, padded, size) == mask.sum()
        assert np.array_equal(maskcode.decode_mask(coding, padded, size), mask)
        assert codes.size <= -(-size // 8)
        parts = [(places, places.astype(np.uint16)) for places in maskcode.decode(coding, padded)]
        steps = list(maskcode.cut_in_steps(iter(parts), size, step))
        assert len(steps) == -(-size // step)
        for number, kept in enumerate(steps):
            expected = np.flatnonzero(mask[number * step : (number + 1) * step])
            assert [*chain.from_iterable(places for places, _ in kept)] == expected.tolist()
            assert [*chain.from_iterable(values for _, values in kept)] == (expected + number * step).tolist()


@pytest.mark.parametrize("coding", maskcode.CODINGS)
def test_a_mask_that_does_not_fit_is_refused(coding):
    mask = np.zeros(100, dtype=bool)
    mask[[3, 97]] = True
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(maskcode, "CODINGS", (coding,))
        found, codes = maskcode.encode(mask)
    assert found == coding
    assert maskcode.check(coding, codes, 100) == 2
    for size in (0, 50, 97, *((120, 200) if coding == "bits" else ())):
        with pytest.raises(ValueError, match="mask"):
            maskcode.check(coding, codes, size)


@pytest.mark.parametrize(("density", "bits_an_entry"), [(0.01, 0.09), (0.05, 0.38), (0.1, 0.51), (0.5, 1.001)])
def test_the_coding_is_near_the_entropy(density, bits_an_entry):
    mask = np.random.default_rng(0).random(200_000) < density
    _, codes = maskcode.encode(mask)
    assert 8 * codes.size / mask.size <= bits_an_entry


# --- Apply and verify ------------------------------------------------------------------------------------------


def patch_both(folder, **changes):
    """``folder``/out and ``folder``/patch.safetensors in one run."""
    options = PatchOptions(task="poems", license="CC-BY-4.0", **changes)
    arguments = (folder / "base", folder / "tuned", folder / "out", folder / "stats", options)
    patch_checkpoint(*arguments, patch_file=folder / "patch.safetensors")
    return folder


@pytest.fixture
def patched(llama_pair, tmp_path):
    """A copy of the tiny pair with out and patch.safetensors, to damage."""
    for name in ("base", "tuned", "stats"):
        shutil.copytree(llama_pair / name, tmp_path / name)
    return patch_both(tmp_path)


EACH_ONCE = [("llama", None, "float32"), ("llama", "20KB", "bfloat16"), ("gpt2", "20KB", "float16")]
EVERY = [(*model, dtype) for model in (("llama", None), ("llama", "20KB"), ("gpt2", "20KB")) for dtype in DTYPES]
OTHERS = [pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in EACH_ONCE]


@pytest.mark.parametrize(("kind", "shard", "dtype"), EACH_ONCE + OTHERS)
def test_apply_gives_the_bytes_of_patch(tmp_path, kind, shard, dtype):
    folder = make_pair(tmp_path, kind, dtype=DTYPES[dtype], shard=shard)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    (folder / "tuned" / "chat_template.jinja").write_text("{{ messages }}")  # a side file that the base lacks
    patch_both(folder)
    result = invoke("apply", folder / "base", folder / "patch.safetensors", "-o", folder / "applied")
    assert result.exit_code == 0, result.stderr
    expected = folder_digest(folder / "out")
    assert "chat_template.jinja" in expected
    assert folder_digest(folder / "applied") == expected
    for extra in ([], ["--patch", folder / "patch.safetensors"]):
        shown = invoke("verify", folder / "applied", "--base", folder / "base", *extra)
        assert shown.exit_code == 0, shown.output
    arguments = (folder / "base", folder / "tuned", None, folder / "stats")
    options = PatchOptions(task="poems", license="CC-BY-4.0")
    patch_checkpoint(*arguments, options, patch_file=folder / "alone.safetensors")  # without -o: the same file
    assert (folder / "alone.safetensors").read_bytes() == (folder / "patch.safetensors").read_bytes()


def test_apply_and_verify_do_without_torch_and_without_the_other_commands(patched):
    """Bytes are all that they move and compare: a start of half a second in place of two."""
    run = (
        "import sys; from tailorcli.cli.app import app; app(sys.argv[1:], standalone_mode=False); "
        "print([name for name in ('torch', 'transformers', 'tailorcli.cli.patching') if name in sys.modules])"
    )
    for command in (
        ("apply", patched / "base", patched / "patch.safetensors", "-o", patched / "applied"),
        ("verify", patched / "applied", "--base", patched / "base", "--patch", patched / "patch.safetensors"),
    ):
        done = subprocess.run([sys.executable, "-c", run, *command], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"
    assert folder_digest(patched / "applied") == folder_digest(patched / "out")


@pytest.mark.parametrize("density", [0.0, 0.003, 0.05, 0.6, 1.0])
def test_apply_at_other_densities_and_shard_sizes(llama_pair, tmp_path, density):
    options = PatchOptions(density=density, max_shard_size=9_000)
    arguments = (llama_pair / "base", llama_pair / "tuned", tmp_path / "out", llama_pair / "stats", options)
    patch_checkpoint(*arguments, patch_file=tmp_path / "patch.safetensors")
    apply_patch(llama_pair / "base", tmp_path / "patch.safetensors", tmp_path / "applied", max_shard_size=9_000)
    assert folder_digest(tmp_path / "applied") == folder_digest(tmp_path / "out")


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_lines_of_numpy_apply_a_patch(tmp_path, dtype):
    folder = make_pair(tmp_path, "gpt2", dtype=DTYPES[dtype])
    options = PatchOptions(solver="none", omega=1.0, density=0.03)
    patch_checkpoint(
        folder / "base", folder / "tuned", folder / "out", None, options, patch_file=folder / "p.safetensors"
    )
    script = ROOT / "scripts" / "apply_patch.py"
    files = (folder / "base" / "model.safetensors", folder / "p.safetensors", folder / "simple" / "model.safetensors")
    (folder / "simple").mkdir()
    done = completed((script, *files))
    assert done.returncode == 0, done.stderr.decode()
    simple, out = read_tensors(folder / "simple"), read_tensors(folder / "out")
    assert {name: bits(tensor) for name, tensor in simple.items()} == {n: bits(t) for n, t in out.items()}
    assert verify_checkpoint(folder / "simple", folder / "base", folder / "p.safetensors").ok


def test_all_codings_in_one_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(64, 50, generator=generator) for name in ("dense", "sparse", "tenth")}
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    tuned = {name: tensor + 0.1 for name, tensor in base.items()}
    save_file(tuned, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    codings = set()
    for number, density in enumerate((0.5, 0.1, 0.005)):
        options = PatchOptions(solver="none", omega=1.0, density=density)
        file, out = tmp_path / f"{number}.safetensors", tmp_path / f"out{number}"
        patch_checkpoint(tmp_path / "base", tmp_path / "tuned", out, None, options, patch_file=file)
        with PatchFile.open(file) as patch:
            codings |= {tensor.coding for tensor in patch.tensors.values()}
        assert verify_checkpoint(out, tmp_path / "base", file).ok
    assert codings == set(maskcode.CODINGS)


def test_the_size_of_a_patch(tmp_path):
    """At density 0.1 in bfloat16 at most 0.18 of the checkpoint; the gaps bring it near 0.13."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        tensors = {f"t{i}": torch.randn(300, 1000, generator=generator).bfloat16() for i in range(4)}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    patch_checkpoint(tmp_path / "base", tmp_path / "tuned", None, None, SALIENCE, patch_file=tmp_path / "p.safetensors")
    whole = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert (tmp_path / "p.safetensors").stat().st_size < 0.14 * whole


def test_the_report_says_what_the_patch_is(patched):
    file = patched / "patch.safetensors"
    inspection = inspect_path(file)
    assert (inspection.kind, inspection.facts["task"], inspection.facts["license"]) == ("patch", "poems", "CC-BY-4.0")
    assert inspection.to_dict()["report"] == json.loads((patched / "out" / "tailor_report.json").read_text())
    shown = invoke("inspect", file, "--plot", patched / "plot.png")
    assert shown.exit_code == 0, shown.stderr
    assert "poems" in shown.stdout
    assert (patched / "plot.png").stat().st_size > 10_000
    with PatchFile.open(file) as patch:
        mask, values = patch.mask("lm_head.weight"), patch.values("lm_head.weight")
        out = read_tensors(patched / "out")["lm_head.weight"]
        assert torch.equal(out[mask], values)


# --- Verify ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """A checkpoint of 100 tensors in three shards, patched."""
    folder = tmp_path_factory.mktemp("hundred")
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        (folder / name).mkdir()
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        tensors = {f"t{i}": torch.randn(6, 7, generator=generator).to(dtypes[i % 3]) for i in range(97)}
        tensors |= {"count": torch.tensor([7]), "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}
        names = list(tensors)
        index = {}
        for shard in range(3):
            part = {key: tensors[key] for key in names[shard::3]}
            file = f"model-0000{shard + 1}-of-00003.safetensors"
            save_file(part, folder / name / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
        (folder / name / "model.safetensors.index.json").write_text(text)
    arguments = (folder / "base", folder / "tuned", folder / "out", None, SALIENCE)
    patch_checkpoint(*arguments, patch_file=folder / "patch.safetensors")
    assert verify_checkpoint(folder / "out", folder / "base", folder / "patch.safetensors").ok
    return folder


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_verify_catches_one_flipped_bit_anywhere(hundred, count):
    files = sorted((hundred / "out").glob("model*"))
    assert len(files) == 4
    chance = random.Random(count)
    for number in range(count):
        file = files[number % 4]
        check_flipped(hundred, file, chance.randrange(8 * file.stat().st_size))


def check_flipped(hundred, file, place):
    original = file.read_bytes()
    changed = bytearray(original)
    changed[place // 8] ^= 1 << place % 8
    file.write_bytes(changed)
    try:
        arguments = ("verify", hundred / "out", "--base", hundred / "base", "--patch", hundred / "patch.safetensors")
        result = invoke(*arguments)
    finally:
        file.write_bytes(original)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1, (file.name, place)


def test_apply_and_verify_work_in_pieces(hundred, patched, monkeypatch):
    for module in (view, verify):
        monkeypatch.setattr(module, "STEP_BYTES", 16)
    monkeypatch.setattr(maskcode, "_BYTES", 4)
    for folder in (hundred, patched):
        apply_patch(folder / "base", folder / "patch.safetensors", patched / f"from-{folder.name}")
        assert folder_digest(patched / f"from-{folder.name}") == folder_digest(folder / "out")
        assert verify_checkpoint(folder / "out", folder / "base", folder / "patch.safetensors").ok
    test_verify_catches_one_flipped_bit_anywhere(hundred, 8)
    test_verify_names_what_is_wrong(patched)


def test_verify_names_what_is_wrong(patched):
    file = patched / "out" / "model.safetensors"
    tensors = read_tensors(patched / "out")
    with PatchFile.open(patched / "patch.safetensors") as patch:
        mask = patch.mask("lm_head.weight")
    inside, outside = mask.view(-1).nonzero()[3].item(), (~mask).view(-1).nonzero()[5].item()
    tensors["lm_head.weight"].view(-1)[inside] += 1
    tensors["lm_head.weight"].view(-1)[outside] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    command = ("verify", patched / "out", "--base", patched / "base")
    assert "\n  try: check that BASE" in invoke(*command, "--patch", patched / "patch.safetensors").stderr
    shown = invoke(*command, "--patch", patched / "patch.safetensors", "--json")
    found = json.loads(shown.stdout)
    assert shown.exit_code == 1
    assert (found["ok"], found["wrong_tensors"], found["tensors"]) == (False, 1, 21)
    problem = found["problems"][0]
    assert problem["tensor"] == "lm_head.weight"
    assert problem["problem"].startswith("1 entries outside the mask differ from the base, 1 kept ones from the patch")
    assert problem["index"] == min(inside, outside)
    assert problem["found"] == pytest.approx(problem["expected"] + 1, abs=1e-6)
    shown = invoke(*command)  # by the report alone: one entry too many
    assert shown.exit_code == 1
    assert "321 entries differ from the base, its mask kept 320" in shown.stdout


def test_verify_sees_missing_foreign_and_misshapen_tensors(patched):
    tensors = read_tensors(patched / "out")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    del tensors["lm_head.weight"]
    tensors["ghost"] = torch.zeros(2)
    save_file(tensors, patched / "out" / "model.safetensors", metadata={"format": "pt"})
    report = verify_checkpoint(patched / "out", patched / "base", patched / "patch.safetensors")
    assert {problem["tensor"] for problem in report.problems} == {"model.norm.weight", "lm_head.weight", "ghost"}


def test_verify_without_a_report_asks_for_the_patch(patched):
    (patched / "out" / "tailor_report.json").unlink()
    assert "--patch" in refused("verify", patched / "out", "--base", patched / "base")
    shutil.copytree(patched / "tuned", patched / "other")
    shown = refused("verify", patched / "out", "--base", patched / "other", "--patch", patched / "patch.safetensors")
    assert "another base" in shown


# --- The wrong base --------------------------------------------------------------------------------------------


def apply_refused(folder, *extra, mentions=(), base="base"):
    """``apply`` fails with one clear error and leaves nothing behind."""
    output = folder / "applied"
    shown = refused("apply", folder / base, folder / "patch.safetensors", "-o", output, *extra, mentions=mentions)
    assert not output.exists()
    return shown


def test_another_base_is_refused(patched):
    apply_refused(patched, base="tuned", mentions=["another base", "holds other values"])
    shutil.copytree(patched / "base", patched / "less")
    tensors = read_tensors(patched / "less")
    save_file(tensors | {"ghost": torch.zeros(1)}, patched / "less" / "model.safetensors", metadata={"format": "pt"})
    apply_refused(patched, base="less", mentions=["also has tensor 'ghost'"])
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, patched / "less" / "model.safetensors", metadata={"format": "pt"})
    apply_refused(patched, base="less", mentions=["model.norm.weight", "F64", "F32"])
    del tensors["model.norm.weight"]
    save_file(tensors, patched / "less" / "model.safetensors", metadata={"format": "pt"})
    apply_refused(patched, base="less", mentions=["has no tensor 'model.norm.weight'"])


def test_a_base_that_differs_where_no_sample_looks_is_refused(tmp_path):
    for name, value in (("base", 1.0), ("tuned", 2.0)):
        (tmp_path / name).mkdir()
        tensors = {"first": torch.full((9, 9), value), "large": torch.full((100, 100), value)}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "patch.safetensors"
    patch_checkpoint(tmp_path / "base", tmp_path / "tuned", None, None, SALIENCE, patch_file=file)
    tensors["first"], tensors["large"] = torch.full((9, 9), 1.0), torch.full((100, 100), 1.0)
    tensors["large"].view(-1)[2000] = 1.5  # between the samples
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    apply_refused(tmp_path, mentions=["another base", "'large'"])
    (tmp_path / "applied").mkdir()
    with pytest.raises(TailorError, match="another base"):
        apply_patch(tmp_path / "base", file, tmp_path / "applied")
    assert list((tmp_path / "applied").iterdir()) == []


def test_a_base_that_lost_its_side_files_is_noted(patched):
    (patched / "base" / "tokenizer.json").unlink()
    (patched / "base" / "config.json").write_text((patched / "base" / "config.json").read_text() + " ")
    shown = invoke("apply", patched / "base", patched / "patch.safetensors", "-o", patched / "applied")
    assert shown.exit_code == 0
    assert "tokenizer.json is missing" in shown.stderr
    assert "config.json is the base's own" in shown.stderr


# --- Where a patch file may be written -------------------------------------------------------------------------


def test_where_a_patch_file_may_be_written(patched):
    def command(file, *extra):
        return (
            "patch",
            patched / "base",
            patched / "tuned",
            "--stats",
            patched / "stats",
            "--patch-file",
            file,
            *extra,
        )

    assert invoke(*command(patched / "p.safetensors")[:5]).exit_code == 2  # neither -o nor --patch-file
    refused(*command(patched / "p.bin"), mentions=[".safetensors"])
    refused(*command(patched / "patch.safetensors"), mentions=["exists"])
    refused(*command(patched / "base" / "p.safetensors"), mentions=["base"])
    refused(*command(patched / "new" / "p.safetensors", "-o", patched / "new"), mentions=["new"])
    weights = patched / "mine.safetensors"
    save_file({"a": torch.zeros(1)}, weights)
    before = weights.read_bytes()
    refused(*command(weights, "--overwrite"), mentions=["no patch file"])
    assert weights.read_bytes() == before
    original = (patched / "patch.safetensors").read_bytes()
    assert invoke(*command(patched / "patch.safetensors", "--overwrite")).exit_code == 0
    assert len(original) > 0
    assert json.loads(invoke(*command(patched / "dry.safetensors", "--dry-run", "--json")).stdout)["patch_bytes"] > 0
    assert not (patched / "dry.safetensors").exists()


def test_the_estimate_of_a_patch_file_is_an_upper_bound(patched):
    from tailorcli import plan_patch

    arguments = (patched / "base", patched / "tuned", None, patched / "stats", PatchOptions())
    plan = plan_patch(*arguments, patch_file=patched / "q.safetensors")
    assert (patched / "patch.safetensors").stat().st_size <= plan.patch_bytes


# --- Interrupted runs ------------------------------------------------------------------------------------------


WRITERS = [(CheckpointWriter, True), (PatchWriter, True), (PatchWriter, False)]
MOMENTS = [(*writer, after) for writer, after in zip(WRITERS, (0, 5, 20), strict=True)]
ALL_MOMENTS = [(*writer, after) for writer in WRITERS for after in (0, 1, 5, 20)]
OTHER_MOMENTS = [pytest.param(*case, marks=pytest.mark.slow) for case in ALL_MOMENTS if case not in MOMENTS]


@pytest.mark.parametrize(("writer", "with_folder", "after"), MOMENTS + OTHER_MOMENTS)
def test_an_interrupted_run_is_resumed_to_the_same_bytes(llama_pair, tmp_path, writer, after, with_folder):
    inputs = (llama_pair / "base", llama_pair / "tuned")

    def patch(name, **changes):
        out = tmp_path / name if with_folder else None
        file = tmp_path / f"{name}.safetensors"
        options = PatchOptions(**changes)
        patch_checkpoint(*inputs, out, llama_pair / "stats", options, patch_file=file)
        return file

    expected = patch("whole").read_bytes()
    with broken_off(writer, after):
        patch("cut")
    assert not (tmp_path / "cut.safetensors").exists()
    with pytest.raises(TailorError, match=r"begun|not empty"):
        patch("cut")
    with pytest.raises(TailorError, match=r"cannot resume.*density"):
        patch("cut", resume=True, density=0.2)
    assert patch("cut", resume=True).read_bytes() == expected
    if with_folder:
        assert folder_digest(tmp_path / "cut") == folder_digest(tmp_path / "whole")
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob("*.journal"))
    patch("cut", resume=True)  # finished: nothing to do
    with pytest.raises(TailorError, match="another run"):
        patch("cut", resume=True, density=0.2)


def test_cut_off_between_the_patch_file_and_the_folder(llama_pair, tmp_path, monkeypatch):
    arguments = (llama_pair / "base", llama_pair / "tuned", tmp_path / "out", llama_pair / "stats")
    file = tmp_path / "p.safetensors"

    def stop(*_):
        raise RuntimeError("stop")

    with monkeypatch.context() as broken:
        broken.setattr(CheckpointWriter, "finish", stop)
        with pytest.raises(RuntimeError, match="stop"):
            patch_checkpoint(*arguments, patch_file=file)
    before = file.read_bytes()
    patch_checkpoint(*arguments, PatchOptions(resume=True), patch_file=file)
    assert file.read_bytes() == before
    assert verify_checkpoint(tmp_path / "out", llama_pair / "base", file).ok
    file.unlink()
    with pytest.raises(TailorError, match="is finished"):
        patch_checkpoint(*arguments, PatchOptions(resume=True), patch_file=file)


def test_apply_is_resumed_too(patched):
    arguments = (patched / "base", patched / "patch.safetensors", patched / "applied")
    with broken_off(CheckpointWriter, 7):
        apply_patch(*arguments)
    with pytest.raises(TailorError, match="not empty"):
        apply_patch(*arguments)
    apply_patch(*arguments, resume=True)
    assert folder_digest(patched / "applied") == folder_digest(patched / "out")
    assert apply_patch(*arguments, resume=True).totals["kept"] == 2191
    apply_patch(*arguments, overwrite=True)
    assert folder_digest(patched / "applied") == folder_digest(patched / "out")


def test_resumed_under_longer_or_shorter_paths(llama_pair, tmp_path, monkeypatch):
    """The header's room depends on the paths as typed; a resumed run keeps the one that was left."""
    for number, (first, second) in enumerate([(".", str(llama_pair)), (str(llama_pair), ".")]):
        monkeypatch.chdir(llama_pair)
        file = tmp_path / f"{number}.safetensors"

        def patch(folder, file=file, **changes):
            inputs = (f"{folder}/base", f"{folder}/tuned", None, f"{folder}/stats", PatchOptions(**changes))
            patch_checkpoint(*inputs, patch_file=file)

        with broken_off(PatchWriter, 7):
            patch(first)
        patch(second, resume=True)
        apply_patch(llama_pair / "base", file, tmp_path / f"out{number}")
        assert verify_checkpoint(tmp_path / f"out{number}", llama_pair / "base", file).ok


def test_resumed_under_paths_too_long_for_the_header_is_refused_before_the_work(llama_pair, tmp_path, monkeypatch):
    monkeypatch.chdir(llama_pair)
    file = tmp_path / "patch.safetensors"

    def patch(folder, **changes):
        inputs = (f"{folder}/base", f"{folder}/tuned", None, f"{folder}/stats", PatchOptions(**changes))
        patch_checkpoint(*inputs, patch_file=file)

    with broken_off(PatchWriter, 7):
        patch(".")
    step = f"../{llama_pair.name}"
    longer = "/".join([step] * (3000 // len(step)))
    with monkeypatch.context() as watched:
        watched.setattr(PatchWriter, "_write_now", None)
        with pytest.raises(TailorError, match="much longer paths"):
            patch(longer, resume=True)
    patch(".", resume=True)
    apply_patch(llama_pair / "base", file, tmp_path / "out")


def test_what_was_written_before_an_error_is_kept(llama_pair, tmp_path):
    """Not only what filled the journal: closing takes down the rest."""
    import tailorcli.checkpoint.journal

    arguments = (llama_pair / "base", llama_pair / "tuned", tmp_path / "out", llama_pair / "stats")
    with broken_off(CheckpointWriter, 9), pytest.MonkeyPatch.context() as patched:
        patched.setattr(tailorcli.checkpoint.journal, "_SYNC_BYTES", 1 << 28)
        patch_checkpoint(*arguments)
    patch_checkpoint(*arguments, PatchOptions(resume=True))
    assert json.loads((tmp_path / "out" / "tailor_run.json").read_text())["tensors_from_an_earlier_run"] == 9


def test_a_full_disk_at_any_moment_is_one_clear_error(patched, monkeypatch):
    import errno

    import tailorcli.checkpoint.journal

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("pwrite", "fdatasync"):
        for output in (["-o", patched / f"full-{name}"], ["--patch-file", patched / f"full-{name}.safetensors"]):
            command = ["patch", patched / "base", patched / "tuned", "--stats", patched / "stats", *output]
            with monkeypatch.context() as broken:
                broken.setattr(tailorcli.checkpoint.journal.os, name, full)
                refused(*command, mentions=["no space left"])
            assert invoke(*command, "--resume").exit_code == 0


def test_overwriting_with_the_wrong_base_loses_nothing(patched):
    apply_patch(patched / "base", patched / "patch.safetensors", patched / "applied")
    before = folder_digest(patched / "applied", skip=())
    shutil.copytree(patched / "base", patched / "near")
    tensors = read_tensors(patched / "near")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, patched / "near" / "model.safetensors", metadata={"format": "pt"})
    command = ("apply", patched / "near", patched / "patch.safetensors", "-o", patched / "applied", "--overwrite")
    result = invoke(*command)
    assert result.exit_code == 1
    assert folder_digest(patched / "applied", skip=()) == before


def test_a_tensor_left_at_base_is_compared_to_the_bit(tmp_path):
    """Also where the patch holds nothing of it, and where no sample looks."""
    for name, value in (("base", 1.0), ("tuned", 2.0)):
        (tmp_path / name).mkdir()
        tensors = {"patched": torch.full((9, 9), value), "left": torch.full((100, 100), value)}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    options = PatchOptions(solver="none", omega=1.0, exclude=("left",))
    file = tmp_path / "patch.safetensors"
    patch_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", None, options, patch_file=file)
    tensors = {"patched": torch.full((9, 9), 1.0), "left": torch.full((100, 100), 1.0)}
    tensors["left"].view(-1)[2000] = 1.5
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    apply_refused(tmp_path, mentions=["another base", "'left'"])
    refused("verify", tmp_path / "out", "--base", tmp_path / "base", "--patch", file, mentions=["'left'"])


def test_a_tensor_that_did_not_change_stays_out_of_the_patch(tmp_path):
    for name, value in (("base", 1.0), ("tuned", 2.0)):
        (tmp_path / name).mkdir()
        tensors = {"changed": torch.full((9, 9), value), "frozen": torch.full((9, 9), 3.0)}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "patch.safetensors"
    report = patch_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", None, SALIENCE, patch_file=file)
    records = {record["name"]: record for record in report.to_dict()["tensors"]}
    assert (records["frozen"]["status"], records["frozen"]["reason"]) == ("base", "fine-tuning did not change it")
    with PatchFile.open(file) as patch:
        assert list(patch.tensors) == ["changed"]
    apply_patch(tmp_path / "base", file, tmp_path / "applied")
    assert folder_digest(tmp_path / "applied") == folder_digest(tmp_path / "out")


def test_names_are_shown_as_they_are(patched):
    command = ("patch", patched / "base", patched / "tuned", "--stats", patched / "stats", "--overwrite")
    file = patched / "patch.safetensors"
    assert invoke(*command, "--patch-file", file, "--task", "qa [v2] [/x] $a_{$").exit_code == 0
    shown = invoke("inspect", file, "--plot", patched / "plot.png")
    assert shown.exit_code == 0, shown.output
    assert "qa [v2] [/x] $a_{$" in shown.stdout
    for label in ("two\nlines", "", "x" * 300, "\ud800"):
        refused(*command, "--patch-file", file, "--task", label, mentions=["printable"])


# --- Malformed patch files -------------------------------------------------------------------------------------


def read_parts(file):
    """The header as JSON, its metadata as JSON, and the data of a patch file."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    manifest = json.loads(header.pop("__metadata__")["tailorcli_patch"])
    return header, manifest, raw[8 + length :]


def write_parts(file, header, manifest, data):
    text = json.dumps({"__metadata__": {"tailorcli_patch": json.dumps(manifest)}, **header}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


NORM, HEAD = "model.norm.weight", "lm_head.weight"


def rename(mapping, old, new):
    return {new if key == old else key: value for key, value in mapping.items()}


def _set(path, value):
    """A change of the metadata at a path of keys."""

    def change(header, manifest, data):
        place = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value(place[path[-1]]) if callable(value) else value
        return header, manifest, data

    return change


def _drop(path):
    def change(header, manifest, data):
        place = manifest
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        return header, manifest, data

    return change


def _damage_data(start, byte=0xFF):
    def change(header, manifest, data):
        begin = header[start]["data_offsets"][0]
        return header, manifest, data[:begin] + bytes([data[begin] ^ byte]) + data[begin + 1 :]

    return change


def _resize(name, by):
    """Make one tensor of the file longer or shorter, everything behind it moved along."""

    def change(header, manifest, data):
        begin, end = header[name]["data_offsets"]
        width = (end - begin) // header[name]["shape"][0]
        place = max(begin, end + by * width)
        data = data[:place] + data[end:] if by < 0 else data[:end] + bytes(by * width) + data[end:]
        for entry in header.values():
            entry["data_offsets"] = [o + by * width if o >= end else o for o in entry["data_offsets"]]
        header[name]["data_offsets"] = [begin, end + by * width]
        header[name]["shape"] = [header[name]["shape"][0] + by]
        return header, manifest, data

    return change


MALFORMED = {
    "another version": (_set(["format_version"], 2), "format_version 2, expected 1"),
    "no version": (_drop(["format_version"]), "malformed"),
    "a version of another type": (_set(["format_version"], True), "format_version True"),
    "a longer mask": (_resize("mask:" + HEAD, 500), "keeps an entry"),
    "a shorter mask": (_resize("mask:" + HEAD, -20), HEAD),
    "more values than the mask keeps": (_resize("values:" + HEAD, 1), HEAD),
    "fewer values than the mask keeps": (_resize("values:" + HEAD, -1), HEAD),
    "another number of kept entries": (_set(["tensors", HEAD, "kept"], lambda n: n + 1), HEAD),
    "more kept entries than entries": (_set(["tensors", HEAD, "kept"], 10**9), HEAD),
    "a negative number of kept entries": (_set(["tensors", HEAD, "kept"], -1), "wrong type or range"),
    "kept entries that are no number": (_set(["tensors", HEAD, "kept"], "many"), "wrong type or range"),
    "an unknown coding": (_set(["tensors", HEAD, "coding"], "zip"), "wrong type or range"),
    "the wrong coding": (_set(["tensors", HEAD, "coding"], "bits"), HEAD),
    "a digest that is none": (_set(["tensors", HEAD, "content"], "x"), "wrong type or range"),
    "another digest": (_set(["tensors", HEAD, "content"], "0" * 64), "not those that were written"),
    "a damaged mask": (_damage_data("mask:" + HEAD), HEAD),
    "a damaged value": (_damage_data("values:" + HEAD, 1), "not those that were written"),
    "a damaged side file": (_damage_data("file:tailor_report.json", 1), "tailor_report.json"),
    "a foreign tensor": (
        lambda h, m, d: ({**h, "ghost": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, m, d),
        "ghost",
    ),
    "a tensor of another name": (lambda h, m, d: (rename(h, "mask:" + HEAD, "mask:ghost"), m, d), "mask:"),
    "a tensor that the base does not have": (
        lambda h, m, d: (
            rename(rename(h, "mask:" + HEAD, "mask:g"), "values:" + HEAD, "values:g"),
            {**m, "tensors": rename(m["tensors"], HEAD, "g")},
            d,
        ),
        "base does not have",
    ),
    "values of another dtype": (
        lambda h, m, d: ({**h, "values:" + HEAD: h["values:" + HEAD] | {"dtype": "I32"}}, m, d),
        "I32",
    ),
    "a mask of another dtype": (
        lambda h, m, d: ({**h, "mask:" + HEAD: h["mask:" + HEAD] | {"dtype": "I8"}}, m, d),
        "I8",
    ),
    "a negative shape": (_set(["base", "tensors", HEAD, "shape"], [-100, -32]), "wrong type or range"),
    "an absurd shape": (_set(["base", "tensors", HEAD, "shape"], [1 << 40, 1 << 40]), "wrong type or range|expected"),
    "a shape of no numbers": (_set(["base", "tensors", HEAD, "shape"], "wide"), "wrong type or range"),
    "another shape": (_set(["base", "tensors", HEAD, "shape"], [32, 100]), "expected"),
    "an integer base": (_set(["base", "tensors", HEAD, "dtype"], "I32"), "I32"),
    "an unknown dtype": (_set(["base", "tensors", HEAD, "dtype"], "F7"), "F7"),
    "no base": (_drop(["base"]), "malformed"),
    "no fingerprint of the base": (_drop(["base", "fingerprint"]), "malformed"),
    "another fingerprint of a base tensor": (_set(["base", "tensors", NORM, "fingerprint"], "0" * 32), "another base"),
    "another digest of a base tensor": (_set(["base", "tensors", NORM, "sha256"], "0" * 64), "another base"),
    "no tensors": (_drop(["tensors"]), "malformed"),
    "tensors that are a list": (_set(["tensors"], []), "malformed"),
    "a field too few": (_drop(["tensors", HEAD, "content"]), "malformed"),
    "a field too many": (
        _set(["tensors", HEAD, "more"], 5),
        "malformed",
    ),
    "a side file above the folder": (
        lambda h, m, d: (
            rename(h, "file:tailor_report.json", "file:../x"),
            {**m, "side_files": rename(m["side_files"], "tailor_report.json", "../x")},
            d,
        ),
        "side file",
    ),
    "an absolute side file": (
        _set(["side_files"], lambda s: s | {"/etc/passwd": {"digest": "0" * 64, "stored": False}}),
        "side file",
    ),
    "a hidden side file": (
        _set(["side_files"], lambda s: s | {".bashrc": {"digest": "0" * 64, "stored": False}}),
        "side file",
    ),
    "weights as a side file": (
        _set(["side_files"], lambda s: s | {"model.safetensors": {"digest": "0" * 64, "stored": False}}),
        "side file",
    ),
    "a side file that is not there": (
        _set(["side_files"], lambda s: s | {"new.txt": {"digest": "0" * 64, "stored": True}}),
        "new.txt",
    ),
    "a side file below another": (
        _set(["side_files"], lambda s: s | {n: {"digest": "0" * 64, "stored": False} for n in ("a", "a/b")}),
        "side file",
    ),
    "a side file with a long name": (
        _set(["side_files"], lambda s: s | {"x" * 300: {"digest": "0" * 64, "stored": False}}),
        "side file",
    ),
    "a task of two lines": (_set(["task"], "a\nb"), "task"),
    "a text that cannot be printed": (_set(["inputs", "base", "path"], "\ud800"), "text"),
    "no report": (lambda h, m, d: (h, {**m, "side_files": {}}, d), "tailor_report.json"),
    "a task that is no text": (_set(["task"], 5), "task"),
    "metadata that is no object": (lambda h, m, d: (h, [], d), "malformed"),
    "no inputs": (_drop(["inputs"]), "malformed"),
    "an input without a path": (_drop(["inputs", "tuned", "path"]), "path of the tuned"),
    "an input with a number as fingerprint": (
        _set(["inputs", "base", "fingerprint"], 5),
        "fingerprint of the base",
    ),
    "a run that is no object": (_set(["run"], [1]), "run: it is [1], expected an object"),
    "no run": (_drop(["run"]), "it lacks 'run'"),
    "merged from what is no list": (lambda h, m, d: (h, {**m, "merged_from": 5}, d), "merged_from"),
    "merged from a patch without a fingerprint": (
        lambda h, m, d: (h, {**m, "merged_from": [{"task": "a", "license": None}]}, d),
        "it lacks 'fingerprint'",
    ),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_patch_is_refused(patched, what):
    change, message = MALFORMED[what]
    file = patched / "patch.safetensors"
    write_parts(file, *change(*read_parts(file)))
    shown = apply_refused(patched, mentions=["patch"])
    assert any(part in shown for part in message.split("|")), shown
    refused("verify", patched / "out", "--base", patched / "base", "--patch", file, mentions=["patch"])


def test_files_that_are_no_patch(patched):
    file = patched / "patch.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        apply_refused(patched, mentions=["patch.safetensors"])
    file.write_bytes(whole + b"x")
    apply_refused(patched, mentions=["longer"])
    twice = whole.replace(b'"mask:model.norm.weight"', b'"mask:lm_head.weight"  ', 1)
    file.write_bytes(twice)
    apply_refused(patched, mentions=["twice"])
    save_file({"a": torch.zeros(3)}, file)
    assert "no patch file" in apply_refused(patched)
    file.unlink()
    assert "does not exist" in apply_refused(patched)
    file.mkdir()
    assert "folder" in apply_refused(patched)


def mutate(value, generator):
    """Another JSON value in place of one somewhere inside ``value``."""
    odd = [None, True, -1, 0, 1 << 70, 1.5, "", "x" * 50, "0" * 32, [], {}, [[]], {"a": 1}, float("inf"), "\ud800"]
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(list(value))
        action = generator.random()
        if action < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.16:
            return rename(value, key, key + generator.choice(["x", "", ".", "/", "\0"]))
        return {**value, key: mutate(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.7:
        place = generator.randrange(len(value))
        return [*value[:place], mutate(value[place], generator), *value[place + 1 :]]
    if type(value) is int and generator.random() < 0.6:
        return value + generator.choice([-1000, -8, -1, 1, 8, 1000])
    return generator.choice(odd)


@pytest.mark.parametrize("count", [400, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_headers(tmp_path, count):
    """One clear error each, or a mutation that decides nothing; never a traceback, never an output that is wrong."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        tensors = {f"t{i}": torch.randn(5, 6, generator=generator) for i in range(3)}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps({"of": name}))
    file, out = tmp_path / "patch.safetensors", tmp_path / "applied"
    patch_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", None, SALIENCE, patch_file=file)
    header, manifest, data = read_parts(file)
    expected = {name: bits(tensor) for name, tensor in read_tensors(tmp_path / "out").items()}
    chance = random.Random(0)
    refused_count = 0
    for _ in range(count):
        parts = [json.loads(json.dumps(part)) for part in (header, manifest)]
        which = chance.random() < 0.7
        parts[which] = mutate(parts[which], chance)
        if not isinstance(parts[0], dict):
            continue
        write_parts(file, *parts, data)
        try:
            apply_patch(tmp_path / "base", file, out)
        except TailorError as error:
            refused_count += bool(error.message and error.hint)
            assert not out.exists()
        else:
            assert {name: bits(tensor) for name, tensor in read_tensors(out).items()} == expected
            shutil.rmtree(out)
    assert refused_count > count * 2 // 3


def test_thousands_of_flipped_bytes(tmp_path, patched):
    file, out = patched / "patch.safetensors", patched / "applied"
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    expected = {name: bits(tensor) for name, tensor in read_tensors(patched / "out").items()}
    chance = random.Random(1)
    refused_count = 0
    for number in range(400):
        place = chance.randrange(8 + length if number % 2 else len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :])
        try:
            apply_patch(patched / "base", file, out)
        except TailorError:
            refused_count += 1
            assert not out.exists()
        else:
            assert {name: bits(tensor) for name, tensor in read_tensors(out).items()} == expected
            shutil.rmtree(out)
    assert refused_count > 200


def test_os_errors_are_clear(patched):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (patched / "patch.safetensors").chmod(0)
    apply_refused(patched, mentions=["patch.safetensors"])
