"""Going block by block: lanes end when they are told to, hidden states take no more memory than they may."""

import threading
import time

import pytest
import torch
from helpers import count_mapped_files, make_pair
from torch import nn

from tailorcli import CalibrateOptions, Stats, TailorError, calibrate_model
from tailorcli.calibration.stats import HESSIANS, MANIFEST, SAMPLES
from tailorcli.calibration.stats_writer import check_folder
from tailorcli.device import attention_without_cudnn
from tailorcli.errors import CheckpointError
from tailorcli.models.lockstep import Lockstep, find_blocks
from tailorcli.models.spill import Spill
from tailorcli.system import reserve


def test_a_lane_that_is_stopped_while_it_runs_ends_at_its_next_block():
    """As by Ctrl-C: told between two blocks, it must not miss it."""
    started, going_on = threading.Event(), threading.Event()
    block = nn.Linear(2, 2)

    def run():
        started.set()
        going_on.wait()
        block(torch.zeros(1, 2))

    lockstep = Lockstep({"0": block}, [(run, 1)])
    with lockstep._waiting_blocks():
        lane = lockstep.lanes[0]
        lane._thread.start()
        lane._go.set()
        started.wait()
        stopper = threading.Thread(target=lane.stop, daemon=True)
        stopper.start()
        time.sleep(0.1)
        going_on.set()
        stopper.join(timeout=5)
        assert not stopper.is_alive()


def test_a_block_that_does_not_run_by_itself_is_named():
    class Failing(nn.Module):
        def forward(self, hidden):
            raise ValueError("a cache that is not there\nand more")

    block = Failing()
    lockstep = Lockstep({"layers.0": block}, [(lambda: block(torch.zeros(1, 2)), 1)])
    with lockstep._waiting_blocks():
        lockstep.lanes[0].advance()
        with pytest.raises(CheckpointError, match=r"block layers\.0 does not run by itself: a cache") as caught:
            lockstep.lanes[0].compute()
        assert "--blockwise never" in caught.value.hint
        lockstep.lanes[0].stop()


def test_hidden_states_in_files_leave_the_limit_as_it_is(tmp_path, monkeypatch):
    files = count_mapped_files(monkeypatch)
    spill = Spill(torch.device("cpu"), tmp_path, limit=400)
    for block in range(3):
        tensors = [torch.full((100,), float(number)) for number in range(4)]
        for tensor in tensors:
            tensor.data = spill.out(tensor)
        assert len(files) == 3 * (block + 1)
        for number, tensor in enumerate(tensors):
            tensor.data = spill.back(tensor)
            assert (tensor == number).all()
    assert not list(tmp_path.iterdir())


def test_a_file_of_hidden_states_has_a_name_of_its_own_and_none_when_it_takes_room(tmp_path, monkeypatch):
    """Of a killed run nothing large is left, and runs that write into one folder are not in each other's way."""
    files, named = count_mapped_files(monkeypatch), []

    def reserving(*arguments):
        named.extend(tmp_path.iterdir())
        return reserve(*arguments)

    monkeypatch.setattr("tailorcli.models.spill.reserve", reserving)
    waiting = [Spill(torch.device("cpu"), tmp_path, limit=0).out(torch.full((9,), value)) for value in (1.0, 2.0)]
    assert [tensor.tolist() for tensor in waiting] == [[1.0] * 9, [2.0] * 9]
    assert len({*files}) == 2
    assert not named


def test_views_of_a_storage_that_waits_in_a_file_give_back_no_room_that_was_not_taken(tmp_path, monkeypatch):
    files = count_mapped_files(monkeypatch)
    spill = Spill(torch.device("cpu"), tmp_path, limit=100)
    whole = torch.arange(100.0)
    whole.data = spill.out(whole)
    assert len(files) == 1
    views = [whole[:50], whole.view(10, 10)]
    for view in views:
        view.data = spill.back(view)
    spill.out(torch.zeros(100))  # more than there ever was room for
    assert len(files) == 2
    for _ in range(3):  # in step with the storage, they need no files of their own
        for view in views:
            view.data = spill.out(view)
        for view in views:
            view.data = spill.back(view)
    assert len(files) == 2
    assert torch.equal(views[1].flatten(), torch.arange(100.0))


def test_views_of_a_storage_take_its_room_once_and_give_it_back(tmp_path, monkeypatch):
    files = count_mapped_files(monkeypatch)
    spill = Spill(torch.device("cpu"), tmp_path, limit=400)
    filler, whole = torch.zeros(100), torch.arange(100.0)
    spill.out(filler)
    whole.data = spill.leave(whole)
    spill.back(filler)
    assert len(files) == 1
    other = torch.arange(100.0)
    for views in ([whole[:50], whole.view(10, 10)], [other[:50], other[:50].view(5, 10), other]):
        for _ in range(3):
            for view in views:
                view.data = spill.out(view)
            for view in views:
                view.data = spill.back(view)
    fits = spill.out(torch.zeros(100))
    assert len(files) == 1
    spill.out(fits[:1].clone())
    assert len(files) == 2


def test_states_that_a_model_gave_up_leave_their_room(tmp_path, monkeypatch):
    files = count_mapped_files(monkeypatch)
    spill = Spill(torch.device("cpu"), tmp_path, limit=400)
    for _ in range(5):
        left = spill.leave(torch.zeros(100))
        del left
    assert not files


def test_a_run_that_was_given_up_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = make_pair(tmp_path)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    before = Stats.open(folder / "stats").fingerprint()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tailorcli.models.lockstep.Lane.compute", interrupted)
    options = CalibrateOptions(blockwise="always", overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats", options)
    assert {path.name for path in (folder / "stats").iterdir()} == {HESSIANS, MANIFEST, SAMPLES}
    assert Stats.open(folder / "stats").fingerprint() == before


def test_hidden_states_of_a_killed_run_are_no_foreign_files(tmp_path):
    (tmp_path / "hidden-3.part").touch()
    check_folder(tmp_path, overwrite=False)


@pytest.mark.parametrize("kind", ["MarianMTModel"])
def test_positions_that_a_model_works_out_are_filled_in(tmp_path, kind):
    """Marian stores no sinusoidal positions."""
    import transformers
    from families import VOCAB, seq2seq_tokenizer, write_family_data

    torch.manual_seed(0)
    parts = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "eos_token_id": 98, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    config = transformers.MarianConfig(vocab_size=VOCAB, decoder_vocab_size=VOCAB, **parts, **sizes, **tokens)
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "model")
    seq2seq_tokenizer().save_pretrained(tmp_path / "model")
    data = write_family_data(tmp_path, "bart")
    for way in ("never", "always"):
        calibrate_model(tmp_path / "model", data, tmp_path / way, CalibrateOptions(blockwise=way))
    ours, theirs = Stats.open(tmp_path / "always"), Stats.open(tmp_path / "never")
    name = "model.decoder.layers.1.fc2.weight"
    expected = theirs.load(theirs.tensors[name].hessian)
    torch.testing.assert_close(ours.load(ours.tensors[name].hessian), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_without_blocks_that_does_not_fit_takes_the_ordinary_way(tmp_path, monkeypatch, layers):
    folder = make_pair(tmp_path, layers=layers)
    monkeypatch.setattr("tailorcli.device.free_memory", lambda _: 1 << 20)
    monkeypatch.setattr("tailorcli.calibration.placement._MARGIN", 1e-3)
    report = calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    assert report.blockwise == (layers > 1)


@pytest.mark.parametrize("way", ["never", "always"])
def test_a_checkpoint_of_other_names_is_told_by_what_it_lacks(tmp_path, way):
    from safetensors.torch import load_file, save_file

    folder = make_pair(tmp_path)
    tensors = load_file(folder / "tuned" / "model.safetensors")
    renamed = {f"wrapped.{name}": value for name, value in tensors.items()}
    save_file(renamed, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TailorError, match="it lacks tensor"):
        calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats", CalibrateOptions(blockwise=way))


class Residual(nn.Module):
    """A block with two layers inside: its input is held by name until the end."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, hidden):
        return hidden + self.second(torch.tanh(self.first(hidden)))


def test_a_lane_can_enter_a_block_and_wait_inside_and_what_it_holds_may_wait_in_files(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), Residual())
    stations = {
        name: module for name, module in model.named_modules() if name and not isinstance(module, nn.Sequential)
    }
    batches = [torch.randn(3, 4), torch.randn(2, 4)]
    outputs, visits, moved = {}, [], []
    spill = Spill(torch.device("cpu"), tmp_path, limit=0)

    def keep(tensor):
        moved.append(tuple(tensor.shape))
        return spill.out(tensor)

    def runner(batch):
        return lambda: outputs.update({len(batch): model(batch.clone())})

    lockstep = Lockstep(stations, [(runner(batch), len(batch)) for batch in batches])
    lockstep.passed = {"0.first", "1.second"}

    def visit(station, lanes):
        visits.append((station, len(lanes)))
        for lane in lanes:
            lane.move(spill.back)
            if station == "1.first":  # worked out elsewhere
                lane.set_result(torch.zeros(len(lane.held[0]), 6))
            else:
                lane.run_inside()
            lane.advance()
            lane.move(keep)

    lockstep.run(lambda lane: lane.move(spill.out), visit)
    assert visits == [("0", 2), ("0.second", 2), ("1", 2), ("1.first", 2)]
    with torch.no_grad():
        for batch in batches:
            middle = model[0](batch)
            torch.testing.assert_close(outputs[len(batch)], middle + model[1].second(torch.zeros(len(batch), 6)))
    # Inside the first block both what its second layer takes and the block's own input have to wait.
    assert {(3, 6), (3, 4), (2, 6), (2, 4)} <= set(moved)
    assert not any(tmp_path.iterdir())


def test_hidden_states_stay_on_the_device_while_they_fit_then_in_memory_then_in_files(tmp_path, monkeypatch):
    files = count_mapped_files(monkeypatch)
    spill = Spill(torch.device("cpu"), tmp_path, limit=800, on_device=800)
    copied = []
    monkeypatch.setattr(spill, "_to_host", lambda tensor: copied.append(tensor[0].item()) or tensor.clone())
    for _ in range(3):  # the room is given back each time
        copied.clear()
        tensors = [torch.full((100,), float(number)) for number in range(5)]
        for tensor in tensors:
            tensor.data = spill.out(tensor)
        assert copied == [2.0, 3.0]
        for number, tensor in enumerate(tensors):
            tensor.data = spill.back(tensor)
            assert (tensor == number).all()
    assert len(files) == 3


def test_batches_in_their_own_threads_leave_torchs_attention_as_it_was(monkeypatch):
    """Whatever the order in which they begin and end: the setting is one for the whole process."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    asked = torch.backends.cuda.cudnn_sdp_enabled()
    first, second = attention_without_cudnn(), attention_without_cudnn()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.cuda.cudnn_sdp_enabled() is asked


def test_the_towers_blocks_come_before_the_language_models_wherever_these_are_held():
    """Gemma 4 holds its language model first: samples of text alone would pass it before those with pictures."""
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4}
    text = transformers.Gemma4TextConfig(
        **sizes, vocab_size=9, vocab_size_per_layer_input=9, num_key_value_heads=1, global_head_dim=4
    )
    vision = sizes | {"num_key_value_heads": 2, "position_embedding_size": 4}
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    with torch.device("meta"):
        network = transformers.Gemma4ForConditionalGeneration(config)
    assert [name.split(".")[1] for name in find_blocks(network)] == ["vision_tower"] * 2 + ["language_model"] * 2


def test_single_layers_and_shared_ones_are_no_blocks():
    """Gemma 3n's list of projections would be called as blocks, past their hooks; Zamba2's blocks share weights."""

    def layer():
        return nn.Sequential(nn.Linear(2, 2))

    model = nn.Module()
    model.layers, model.heads = nn.ModuleList([layer(), layer()]), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert list(find_blocks(model)) == ["layers.0", "layers.1"]
    model.layers[1][0].weight = model.layers[0][0].weight
    assert list(find_blocks(model)) == []
    model.layers = nn.ModuleList([layer(), layer()])
    model.layers[1].append(model.layers[1][0])  # called twice within
    assert list(find_blocks(model)) == ["layers.0", "layers.1"]
