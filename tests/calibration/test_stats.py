"""Statistics folders: what is sound opens, what is malformed is refused before anything reads it."""

import errno
import json
import random
import shutil
import time

import pytest
import torch
from helpers import mutate_bytes, mutate_json, write_stats
from safetensors.torch import load_file, save_file

from tailorcli.calibration.stats import HESSIANS, MANIFEST, SAMPLES, HessianInfo, Stats, TensorStats
from tailorcli.calibration.stats_writer import StatsWriter, check_folder
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.display.inspection import inspect_path
from tailorcli.errors import NumericalError, OutputError, StatsError, TailorError
from tailorcli.options import PatchOptions
from tailorcli.patching.checks import check_stats
from tailorcli.patching.planner import build_plan

FACTS = {"model": {"path": "model", "fingerprint": "0123"}, "data": {"file": "data.jsonl"}, "versions": {}}


@pytest.fixture
def folder(tmp_path):
    """Two Hessians, three tensors."""
    hessians = [
        ("a.weight", HessianInfo(3, "full", 10, 2.0), torch.arange(6.0)),
        ("norm.weight", HessianInfo(4, "diagonal", 10, 1.0, 1), torch.tensor([1.0, 0.0, 1.0, 2.0])),
    ]
    tensors = {
        "a.weight": TensorStats("a.weight", "linear"),
        "norm.weight": TensorStats("norm.weight", "norm"),
        "other": TensorStats(None, reason="it is a buffer, no parameter"),
    }
    target = tmp_path / "stats"
    target.mkdir()
    write_stats(target, hessians, tensors, FACTS)
    return target


def change(folder, edit):
    """Edit the manifest in place, or put what ``edit`` returns in its stead."""
    manifest = json.loads((folder / MANIFEST).read_text())
    result = edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(result if result is not None else manifest))


def refusal(folder, *mentions):
    with pytest.raises(StatsError) as caught:
        Stats.open(folder)
    for word in mentions:
        assert str(word) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def test_what_was_written_is_read(folder):
    stats = Stats.open(folder)
    assert stats.load("a.weight").tolist() == [0, 1, 2, 3, 4, 5]
    assert stats.nbytes("norm.weight") == 16
    assert stats.model_fingerprint == "0123"
    assert stats.tensors["other"].reason == "it is a buffer, no parameter"
    before = stats.fingerprint()
    stats.close()
    change(folder, lambda manifest: manifest["model"].update(fingerprint="4567"))
    again = Stats.open(folder)
    assert again.fingerprint() != before
    again.close()


def test_folders_that_hold_no_statistics(tmp_path, folder):
    assert "tailorcli calibrate" in refusal(tmp_path / "nowhere", "nowhere").hint
    refusal(tmp_path, MANIFEST)
    refusal(folder / MANIFEST, MANIFEST)
    (folder / HESSIANS).unlink()
    refusal(folder, HESSIANS)
    (folder / MANIFEST).unlink()
    refusal(folder, MANIFEST)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '"x"', "{}", "\ufeff{}", "[" * 100_000])
def test_a_manifest_that_is_none(folder, text):
    (folder / MANIFEST).write_text(text)
    refusal(folder, folder / MANIFEST)


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5, True, [1]])
def test_another_format_version(folder, version):
    change(folder, lambda manifest: manifest.update(format_version=version))
    assert "calibrate again" in refusal(folder, folder / MANIFEST, "format_version").hint


@pytest.mark.parametrize("key", ["model", "tensors", "hessians"])
@pytest.mark.parametrize("value", [None, 5, "x", [], [1], {"a.weight": 5}, {"a.weight": None}, {"a.weight": {"b": 1}}])
def test_a_part_of_the_wrong_type(folder, key, value):
    change(folder, lambda manifest: manifest.update({key: value}))
    refusal(folder, folder / MANIFEST)
    change(folder, lambda manifest: manifest.pop(key) and None)
    refusal(folder, folder / MANIFEST)


@pytest.mark.parametrize("value", [None, 5, "x", [1]])
@pytest.mark.parametrize("key", ["data", "versions"])
def test_facts_of_the_wrong_type(folder, key, value):
    change(folder, lambda manifest: manifest.update({key: value}))
    refusal(folder, folder / MANIFEST, key)


HESSIAN_FIELDS = {
    "size": [None, "3", 3.0, True, -3, [3], 1 << 70, 10**4000],
    "kind": [None, "half", 5, ["full"]],
    "tokens": [None, "10", -1, 1.5, {}],
    "mean_diagonal": [None, "2", [], float("nan"), float("inf")],
    "dead": [None, "1", -1, 0.5],
}


@pytest.mark.parametrize(
    ("field", "value"), [(key, value) for key, values in HESSIAN_FIELDS.items() for value in values]
)
def test_a_hessian_with_an_absurd_field(folder, field, value):
    change(folder, lambda manifest: manifest["hessians"]["a.weight"].update({field: value}))
    refusal(folder, folder / MANIFEST, "a.weight")


TENSOR_FIELDS = {
    "hessian": [5, ["a.weight"], {}, "ghost", ""],
    "role": [None, 5, ["linear"]],
    "transposed": [None, "no", 1],
    "reason": [None, 5],
}


@pytest.mark.parametrize(
    ("field", "value"), [(key, value) for key, values in TENSOR_FIELDS.items() for value in values]
)
def test_a_tensor_with_an_absurd_field(folder, field, value):
    change(folder, lambda manifest: manifest["tensors"]["a.weight"].update({field: value}))
    refusal(folder, folder / MANIFEST, "a.weight")


def test_a_hessian_of_another_size_than_stored(folder):
    change(folder, lambda manifest: manifest["hessians"]["a.weight"].update(size=4))
    refusal(folder, HESSIANS, "a.weight", "[10]")
    change(folder, lambda manifest: manifest["hessians"]["a.weight"].update(size=3, kind="diagonal"))
    refusal(folder, HESSIANS, "a.weight", "[3]")


def test_a_hessian_that_is_not_stored(folder):
    stored = load_file(folder / HESSIANS)
    save_file({"a.weight": stored["a.weight"]}, folder / HESSIANS)
    refusal(folder, HESSIANS, "norm.weight")
    save_file(stored | {"a.weight": stored["a.weight"].double()}, folder / HESSIANS)
    refusal(folder, HESSIANS, "a.weight", "F64")


def test_truncated_hessians(folder):
    whole = (folder / HESSIANS).read_bytes()
    for length in (0, 7, 8, 50, len(whole) - 1):
        (folder / HESSIANS).write_bytes(whole[:length])
        refusal(folder, HESSIANS)


def test_no_manifest_breaks_the_reader(folder):
    """Damaged manifests and Hessians: each opens and shows its figures, or raises StatsError, quickly."""
    manifest, hessians = (folder / MANIFEST).read_bytes(), (folder / HESSIANS).read_bytes()
    generator = random.Random(0)
    opened = 0
    for number in range(600):
        if number % 4 == 0:
            (folder / MANIFEST).write_bytes(mutate_bytes(manifest, generator, len(manifest)))
        elif number % 4 == 1:
            (folder / HESSIANS).write_bytes(mutate_bytes(hessians, generator, len(hessians)))
        else:
            value = mutate_json(json.loads(manifest), generator)
            (folder / MANIFEST).write_text(json.dumps(value))
        started = time.process_time()
        try:
            stats = Stats.open(folder)
        except StatsError:
            pass
        else:
            opened += 1
            assert [stats.load(name).shape for name in stats.hessians] == [
                (info.stored_numel,) for info in stats.hessians.values()
            ]
            stats.fingerprint()
            stats.close()
            json.dumps(inspect_path(folder).to_dict())
        assert time.process_time() - started < 2, number
        (folder / MANIFEST).write_bytes(manifest)
        (folder / HESSIANS).write_bytes(hessians)
    assert 0 < opened < 500


# --- statistics and the pair they are for ---------------------------------------------------------------------


@pytest.fixture
def copied(llama_pair, tmp_path):
    """A copy of the statistics of the shared pair, to damage."""
    shutil.copytree(llama_pair / "stats", tmp_path / "stats")
    return tmp_path / "stats"


NAME = "model.layers.0.mlp.down_proj.weight"


def fits(pair, folder):
    with Checkpoint.open(pair / "base") as base, Checkpoint.open(pair / "tuned") as tuned:
        stats = Stats.open(folder)
        try:
            check_stats(base, tuned, stats)
            return build_plan(base, tuned, stats, PatchOptions())
        finally:
            stats.close()


def test_sound_statistics_fit(llama_pair, copied):
    assert len(fits(llama_pair, copied).patched) == 21


def test_statistics_that_do_not_mention_a_tensor(llama_pair, copied):
    change(copied, lambda manifest: manifest["tensors"].pop(NAME) and None)
    with pytest.raises(StatsError, match="does not mention") as caught:
        fits(llama_pair, copied)
    assert NAME in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (NAME, {"hessian": "model.layers.0.self_attn.q_proj.weight"}),  # 32 channels where there are 48
        (NAME, {"transposed": True}),
        (NAME, {"role": "bias"}),
        ("model.norm.weight", {"transposed": True}),
        ("model.norm.weight", {"hessian": "model.embed_tokens.weight"}),
        ("model.embed_tokens.weight", {"transposed": False}),
    ],
)
def test_statistics_of_another_shape(llama_pair, copied, name, fields):
    change(copied, lambda manifest: manifest["tensors"][name].update(fields))
    with pytest.raises(StatsError) as caught:
        fits(llama_pair, copied)
    assert name in caught.value.message
    assert caught.value.hint


# --- the folder -----------------------------------------------------------------------------------------------


def test_where_statistics_may_be_written(tmp_path, folder):
    check_folder(tmp_path / "new" / "deep", overwrite=False)
    assert not (tmp_path / "new").exists()
    with pytest.raises(OutputError, match="already holds statistics"):
        check_folder(folder, overwrite=False)
    assert Stats.open(folder).load("a.weight").numel() == 6
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        check_folder(folder, overwrite=True)
    (folder / "notes.txt").unlink()
    check_folder(folder, overwrite=True)
    assert Stats.open(folder).load("a.weight").numel() == 6  # until the new ones are there
    write_stats(folder, [("h", HessianInfo(1, "diagonal", 1), torch.ones(1))], {}, FACTS)
    assert list(Stats.open(folder).hessians) == ["h"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file"):
        check_folder(tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "x"


def test_hessians_written_one_at_a_time_can_be_read_back_and_replaced(tmp_path):
    values = {name: torch.rand(count) for name, count in (("a", 6), ("b", 3), ("c", 10))}
    infos = {"a": HessianInfo(3, "full", 1), "b": HessianInfo(3, "diagonal", 2), "c": HessianInfo(4, "full", 3)}
    with StatsWriter(tmp_path, values) as writer:
        assert writer.read("a") is None
        for name, value in values.items():
            writer.write(name, infos[name], torch.zeros_like(value) if name == "b" else value)
        writer.write("b", infos["b"], values["b"])
        info, found = writer.read("a")
        assert info == infos["a"]
        assert torch.equal(found, values["a"])
        assert writer.count == 3
        writer.finish({}, FACTS)
    stats = Stats.open(tmp_path)
    assert stats.hessians == infos
    assert all(torch.equal(stats.load(name), value) for name, value in values.items())
    assert torch.equal(load_file(tmp_path / HESSIANS)["c"], values["c"])


def test_a_failed_write_leaves_no_statistics(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tailorcli.calibration.stats_writer.sync_path", full)
    with pytest.raises(OutputError, match="no space left"):
        write_stats(tmp_path, [("h", HessianInfo(1, "diagonal", 1), torch.ones(1))], {}, FACTS)
    refusal(tmp_path, MANIFEST)
    monkeypatch.undo()
    check_folder(tmp_path, overwrite=False)
    write_stats(tmp_path, [("h", HessianInfo(1, "diagonal", 1), torch.ones(1))], {}, FACTS)
    with pytest.raises(TailorError):
        check_folder(tmp_path, overwrite=False)


@pytest.mark.parametrize("room", [0, 1, 1000])
def test_names_longer_than_expected_move_the_data_up(tmp_path, monkeypatch, room):
    monkeypatch.setattr("tailorcli.calibration.stats_writer._MOVED_BYTES", 16)
    names = [f"a.much.longer.name.than.was.expected.{number}.weight" * 20 for number in range(5)]
    with StatsWriter(tmp_path, ["h"] * room) as writer:
        for number, name in enumerate(names):
            writer.write(name, HessianInfo(9, "diagonal", 1), torch.full((9,), float(number)))
        assert writer.read(names[3])[1].tolist() == [3.0] * 9
        writer.finish({}, FACTS)
    stats = Stats.open(tmp_path)
    assert [stats.load(name).tolist() for name in names] == [[float(number)] * 9 for number in range(5)]
    assert set(load_file(tmp_path / HESSIANS)) == set(names)  # by the library, too


def test_a_full_disk_while_samples_are_saved_is_told(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    for error in (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left")):

        def full(*_, error=error):
            raise error

        monkeypatch.setattr("safetensors.torch.save_file", full)
        with StatsWriter(tmp_path, []) as writer, pytest.raises(OutputError, match=SAMPLES) as found:
            writer.store_samples([{"input_ids": torch.ones(1, 3, dtype=torch.int64)}])
        assert "space" in found.value.message
        assert found.value.hint
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "place"), [("a.weight", 1), ("a.weight", 5), ("norm.weight", 2)])
def test_a_number_that_is_not_finite_in_a_stored_hessian_is_named(folder, name, place):
    """Off the diagonal, too, where a factorisation might miss it."""
    stats = Stats.open(folder)
    packed = stats.load(name)
    assert stats.unpack(name, packed).shape == ((3, 3) if name == "a.weight" else (4,))
    packed[place] = float("nan")
    with pytest.raises(NumericalError, match=f"Hessian '{name}' of {folder}"):
        stats.unpack(name, packed)
    stats.close()
