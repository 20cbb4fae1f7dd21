"""Running a model block by block: what it reads, what it holds, when it chooses to, how it ends."""

import threading
from collections import Counter

import pytest
import torch
from helpers import count_mapped_files, make_pair
from torch import nn

from tailorcli import CalibrateOptions, Checkpoint, Stats, TailorError, calibrate_model
from tailorcli.calibration.stats import HESSIANS, MANIFEST, SAMPLES
from tailorcli.models.lockstep import Lockstep, find_blocks
from tailorcli.models.spill import Spill

STREAMED = CalibrateOptions(blockwise="always", batch_size=4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = make_pair(tmp_path_factory.mktemp("blocks"), layers=4)
    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats")
    return folder


def same_statistics(one, other):
    ours, theirs = Stats.open(one), Stats.open(other)
    for name, entry in theirs.tensors.items():
        for mine, yours in zip(ours.tensors[name].hessians, entry.hessians, strict=True):
            expected = theirs.load(yours)
            torch.testing.assert_close(ours.load(mine), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_every_weight_is_read_once_whatever_the_number_of_batches(pair, tmp_path, monkeypatch):
    read = Counter()
    original = Checkpoint.read

    def counting(self, name, pinned=False):
        read[name] += 1
        return original(self, name, pinned)

    monkeypatch.setattr(Checkpoint, "read", counting)
    options = CalibrateOptions(blockwise="always", batch_size=1)
    calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / "stats", options)
    checkpoint = Checkpoint.open(pair / "tuned")
    assert read == dict.fromkeys(checkpoint.tensors, 1)


@pytest.mark.parametrize("free", [None, 10_000])
def test_the_next_block_is_read_while_one_is_run_where_memory_is_plenty(pair, tmp_path, monkeypatch, free):
    from tailorcli.calibration import passes
    from tailorcli.models import parts

    ahead, original = set(), parts.Parts._read

    def noting(self, part):
        if threading.current_thread().name == "weights":
            ahead.add(part.rpartition(".")[2])
        return original(self, part)

    ready, visit = [], passes._through_block

    def waiting(*arguments):
        for thread in [thread for thread in threading.enumerate() if thread.name == "weights"]:
            thread.join()
        ready.append(set(ahead))
        return visit(*arguments)

    monkeypatch.setattr(parts.Parts, "_read", noting)
    monkeypatch.setattr(passes, "_through_block", waiting)
    monkeypatch.setattr(parts, "free_memory", lambda device: free)
    calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / "stats", STREAMED)
    assert ready == ([{"1"}, {"1", "2"}, {"1", "2", "3"}, {"1", "2", "3"}] if free is None else [set()] * 4)
    same_statistics(tmp_path / "stats", pair / "stats")


def test_what_cannot_be_read_ahead_is_one_error_and_ends_its_thread(pair, tmp_path, monkeypatch):
    original = Checkpoint.read

    def failing(self, name, pinned=False):
        if ".2." in name:
            raise TailorError("cannot read it", "look")
        return original(self, name, pinned)

    monkeypatch.setattr(Checkpoint, "read", failing)
    with pytest.raises(TailorError, match="cannot read it"):
        calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / "stats", STREAMED)
    assert not [thread for thread in threading.enumerate() if thread.name == "weights"]


def test_only_one_block_is_there_at_a_time(pair, tmp_path, monkeypatch):
    from tailorcli.calibration import passes

    most = []
    original = passes.Run.write

    def counting(self, collector):
        network = collector.model
        most.append(sum(any(p.device.type != "meta" for p in b.parameters()) for b in find_blocks(network).values()))
        original(self, collector)

    monkeypatch.setattr(passes.Run, "write", counting)
    calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / "stats", STREAMED)
    assert most == [1, 1, 1, 1, 0]  # each block's Hessians are written while it is there; then the rest's


def test_a_model_that_does_not_fit_goes_block_by_block_by_itself(pair, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("tailorcli.device.free_memory", lambda device: 200_000)
    report = calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / "stats", announce=said.append)
    assert report.blockwise
    assert "block by block" in said[1]  # behind what there is to tell of the data
    assert "are free on cpu" in said[1]
    monkeypatch.setattr("tailorcli.device.free_memory", lambda device: 30_000_000)
    report = calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / "whole", announce=said.append)
    assert not report.blockwise
    assert ["block by block" in line for line in said] == [False, True, False]
    same_statistics(tmp_path / "stats", tmp_path / "whole")


def test_hidden_states_can_wait_in_files(pair, tmp_path, monkeypatch):
    files = count_mapped_files(monkeypatch)
    monkeypatch.setattr("tailorcli.models.spill.HIDDEN_SHARE", 0.0)
    calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / "stats", STREAMED)
    assert len(files) >= 4 * 10  # blocks, lanes
    assert sorted(path.name for path in (tmp_path / "stats").iterdir()) == [HESSIANS, MANIFEST, SAMPLES]
    same_statistics(tmp_path / "stats", pair / "stats")


def test_an_error_inside_a_block_ends_every_thread(pair, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise TailorError("broken on purpose")

    before = threading.active_count()
    monkeypatch.setattr("tailorcli.calibration.accumulators.accumulate_", broken)
    with pytest.raises(TailorError, match="broken on purpose"):
        calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / "stats", STREAMED)
    assert threading.active_count() == before
    assert not (tmp_path / "stats" / "manifest.json").exists()


def test_only_chosen_layers_are_calibrated(pair, tmp_path):
    options = CalibrateOptions(blockwise="always", include=("*layers.2.mlp*",))
    report = calibrate_model(pair / "tuned", pair / "data.jsonl", tmp_path / "stats", options)
    assert report.calibrated == 3
    same = Stats.open(tmp_path / "stats")
    found = same.load(same.tensors["model.layers.2.mlp.down_proj.weight"].hessian)
    theirs = Stats.open(pair / "stats")
    expected = theirs.load(theirs.tensors["model.layers.2.mlp.down_proj.weight"].hessian)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


class Twice(nn.Module):
    """Two lists of blocks, the first of them run twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(2))
        self.second = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(3))

    def forward(self, x):
        for block in (*self.first, *self.first, *self.second):
            x = torch.tanh(block(x)) + x
        return x


def lockstep(model, inputs, found):
    def runner(position):
        def run():
            found[position] = model(inputs[position])

        return run

    return Lockstep(find_blocks(model), [(runner(position), 1) for position in range(len(inputs))])


def test_lanes_give_the_model_s_own_outputs_and_visit_blocks_in_turn():
    model = Twice()
    inputs = [torch.randn(2, 3) for _ in range(3)]
    expected = [model(x).detach() for x in inputs]
    found, visits = [None] * 3, []

    def visit(block, lanes):
        visits.append((block, len(lanes)))
        for lane in lanes:
            lane.compute()
            lane.advance()

    lockstep(model, inputs, found).run(lambda lane: None, visit)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    first = [("first.0", 3), ("first.1", 3)]
    assert visits == first * 2 + [("second.0", 3), ("second.1", 3), ("second.2", 3)]
    assert not any("forward" in vars(block) for block in find_blocks(model).values())  # nothing is left behind


def test_spilled_states_come_back_the_same(tmp_path):
    spill = Spill(torch.device("cpu"), tmp_path, limit=100)
    small, large = torch.randn(5), torch.randn(4, 50)
    for tensor in (small, large):
        before = tensor.clone()
        tensor.data = spill.out(tensor)
        assert torch.equal(tensor, before)
        tensor.data = spill.back(tensor)
        assert torch.equal(tensor, before)
    assert not list(tmp_path.iterdir())


def test_a_model_without_blocks_says_so(tmp_path):
    folder = make_pair(tmp_path, layers=1)
    with pytest.raises(TailorError, match="no list of blocks") as caught:
        calibrate_model(folder / "tuned", folder / "data.jsonl", tmp_path / "stats", STREAMED)
    assert "never" in caught.value.hint
    report = calibrate_model(folder / "tuned", folder / "data.jsonl", tmp_path / "stats")
    assert not report.blockwise


class Stack(nn.Module):
    """Blocks in a row; what enters the first is kept by name and added at the end."""

    def __init__(self, depth=3, size=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(size, size)) for _ in range(depth))

    def forward(self, inputs):
        embedded = inputs * 2
        hidden = embedded
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden + embedded


def run_stack(model, batches, spill):
    outputs, left_behind = [], []

    def runner(batch):
        return lambda: outputs.append(model(batch))

    def visit(block, lanes):
        for lane in lanes:
            lane.move(spill.back)
            lane.compute()
            held = lane.advance()
            left_behind.append((block, len(held)))
            for tensor in held:
                tensor.data = spill.leave(tensor)
            lane.move(spill.out)

    Lockstep(find_blocks(model), [(runner(batch), len(batch)) for batch in batches]).run(lambda _: None, visit, spill)
    return outputs, left_behind


def test_states_that_a_model_keeps_by_name_are_told_and_may_wait_in_files(tmp_path):
    model = Stack()
    batches = [torch.randn(2, 4), torch.randn(3, 4)]
    for limit in (0, 48, 1 << 20):
        spill = Spill(torch.device("cpu"), tmp_path, limit)
        outputs, left_behind = run_stack(model, batches, spill)
        with torch.no_grad():
            assert all(torch.equal(out, model(batch)) for out, batch in zip(outputs, batches, strict=True))
        assert not any(tmp_path.iterdir())
        # What the model still holds of a block's inputs is told: here the embeddings, behind the first block.
        assert [count for block, count in left_behind if block == "layers.0"] == [1, 1]
        assert not any(count for block, count in left_behind if block != "layers.0")
