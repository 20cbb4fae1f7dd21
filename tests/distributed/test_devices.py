"""One GPU a rank; on a machine without any, torch is told that there are some."""

import pytest
import torch

from tailorcli import device
from tailorcli.distributed import Ranks
from tailorcli.errors import DeviceError


@pytest.fixture
def of_rank(monkeypatch):
    """The device that a name stands for, on one rank of a machine with four GPUs."""
    chosen, notes = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(device, "note", notes.append)

    def resolve(name, here):
        monkeypatch.setattr(device, "ranks", lambda: here)
        chosen.clear()
        notes.clear()
        return str(device.resolve_device(name)), [*chosen], [*notes]

    return resolve


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_rank_has_the_gpu_of_its_local_number(of_rank, name):
    assert of_rank(name, Ranks(6, 8, 2, 4)) == ("cuda:2", [2], [])
    assert of_rank("cpu", Ranks(6, 8, 2, 4)) == ("cpu", [], [])


@pytest.mark.parametrize(
    ("name", "here", "expected"),
    [
        ("auto", Ranks(6, 8, 6, 8), "8 ranks run on this machine, which has 4 GPUs"),
        ("cuda:1", Ranks(1, 2, 1, 2), "cuda:1 is one GPU, and 2 ranks run"),
    ],
)
def test_gpus_that_do_not_fit_the_ranks(of_rank, name, here, expected):
    with pytest.raises(DeviceError, match=expected):
        of_rank(name, here)


def test_a_gpu_that_is_named_is_the_current_one(of_rank):
    assert of_rank("cuda:1", Ranks()) == ("cuda:1", [torch.device("cuda:1")], [])
    assert of_rank("cpu", Ranks())[1] == []


def test_a_single_process_is_told_of_gpus_that_lie_idle(of_rank):
    found, _, notes = of_rank("auto", Ranks())
    assert found == "cuda"
    assert notes == ["4 GPUs are here, and one is used: torchrun --nproc-per-node 4 -m tailorcli ... uses all"]
    assert of_rank("cuda:1", Ranks()) == ("cuda:1", [torch.device("cuda:1")], [])  # it was asked for
