"""Which layers share a Hessian, and that it is right whatever the order of their calls."""

import pytest
import torch
from helpers import make_pair
from torch import nn

from tailorcli import CalibrateOptions, Stats, TailorError, calibrate_model
from tailorcli.calibration.accumulators import Accumulators
from tailorcli.calibration.collector import Collector
from tailorcli.core.hessian import pack_triangle, unpack_triangle
from tailorcli.device import StageTimer
from tailorcli.models.layers import find_layers

CPU = torch.device("cpu")


class Pair(nn.Module):
    """Two layers that see x and y in the order that ``calls`` gives: (layer, input) after (layer, input)."""

    def __init__(self, calls, size=5):
        super().__init__()
        self.q, self.k = nn.Linear(size, 4), nn.Linear(size, 3)
        self.calls = calls

    def forward(self, batch):
        inputs = {"x": batch + 0.0, "y": batch.flip(-1) * 2}
        return [getattr(self, layer)(inputs[which]) for layer, which in self.calls]


def hessians_of(model, batches):
    """The Hessian of each weight, (I, I), as a calibration of whole batches collects them."""
    layers = find_layers(model)
    collector = Collector(list(layers.values()), model, CPU, StageTimer(CPU))
    with torch.no_grad():
        with collector.trial():
            model(batches[0][:1])
        collector.allocate()
        for batch in batches:
            with collector.folding():
                model(batch)
    found = {name: unpack_triangle(values, info.size) for name, info, values in collector.results()}
    return {name: found[layer.group] for name, layer in layers.items()}, len(found)


def oracle(inputs):
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs]).double()
    return 2 / len(rows) * rows.T @ rows


def make_batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 7, 5, generator=g) for rows in (3, 1, 2)]


@pytest.mark.parametrize(
    "calls",
    [
        "qx kx qy ky",
        "qx qy kx ky",
        "qx qy ky kx",
        "qx kx ky qy",
        "kx ky qx qy",
        "qx qx ky kx qy ky kx",  # not all of one as all of the other: no Hessian is shared
    ],
)
def test_layers_that_see_the_same_inputs_have_their_hessian_in_any_order(calls):
    order = [tuple(call) for call in calls.split()]
    batches = make_batches()
    found, _ = hessians_of(Pair(order), batches)
    for layer in "qk":
        seen = [{"x": b, "y": b.flip(-1) * 2}[which] for b in batches for name, which in order if name == layer]
        torch.testing.assert_close(found[f"{layer}.weight"].double(), oracle(seen), rtol=1e-5, atol=1e-6)


def test_one_hessian_serves_both_in_the_same_order():
    for calls, count in (("qx qy kx ky", 1), ("qx kx", 1), ("qx ky", 2)):
        assert hessians_of(Pair([tuple(call) for call in calls.split()]), make_batches())[1] == count


class Changing(nn.Module):
    """Two layers that share their input in the first call and, as ``then`` says, no longer behind it."""

    def __init__(self, then):
        super().__init__()
        self.q, self.k = nn.Linear(5, 4), nn.Linear(5, 3)
        self.then, self.count = then, 0

    def forward(self, batch):
        self.count += 1
        x = batch + 1.0
        self.q(x)
        if self.count == 1:
            return self.k(x)
        if self.then == "left out":
            return None
        if self.then == "another at the same address":
            del x
            x = batch * 3.0  # the allocator gives the memory again where it is free
        else:
            x.mul_(3.0)  # the same memory, other values
        return self.k(x)


@pytest.mark.parametrize("then", ["left out", "another at the same address", "changed in place"])
def test_layers_that_stop_sharing_their_input_are_an_error(then):
    with pytest.raises(TailorError, match=r"k\.weight and q\.weight shared their input in a trial run") as caught:
        hessians_of(Changing(then), make_batches())
    assert "--include" in caught.value.hint


@pytest.mark.parametrize("way", ["never", "always"])
def test_a_model_that_calls_its_layers_twice_in_turn_is_calibrated(tmp_path, monkeypatch, way):
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        other = x.flip(-1)
        gates = [self.gate_proj(part) for part in (x, other)]
        ups = [self.up_proj(part) for part in (x, other)]
        return self.down_proj(sum(self.act_fn(g) * u for g, u in zip(gates, ups, strict=True)))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    make_pair(tmp_path)
    options = CalibrateOptions(blockwise=way, batch_size=4)
    report = calibrate_model(tmp_path / "tuned", tmp_path / "data.jsonl", tmp_path / "stats", options)
    assert not report.uncalibrated
    stats = Stats.open(tmp_path / "stats")
    network, seen = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval(), {}
    names = [f"model.layers.{number}.mlp.{name}_proj" for number in range(2) for name in ("gate", "up", "down")]
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0])
        )
    with torch.no_grad():
        for inputs in stats.samples():
            network(**inputs)
    for name in names:
        hessian = stats.tensors[f"{name}.weight"].hessian
        found = unpack_triangle(stats.load(hessian), stats.hessians[hessian].size)
        torch.testing.assert_close(found.double(), oracle(seen[name]), rtol=1e-4, atol=1e-6)
    shared = {stats.tensors[f"model.layers.0.mlp.{name}_proj.weight"].hessian for name in ("gate", "up")}
    assert len(shared) == 1


def test_layers_that_nothing_reaches_have_a_reason():
    """As those of a block of a vision tower, where one pass has data of text alone: it tries and runs nothing."""
    model = Pair([])
    layers = find_layers(model)
    assert list(Collector(list(layers.values()), model, CPU, StageTimer(CPU)).results()) == []
    assert {layer.group for layer in layers.values()} == {None}
    assert all("not called" in layer.reason for layer in layers.values())


def test_tables_are_looked_up_as_often_as_there_are_samples():
    """Positions stand there once for all samples, as do the distances of two places; ids stand there for each."""
    found = Accumulators(CPU).get("table", False, 6)
    distances = [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    looked_up = [
        (torch.tensor([[5, 1, 1], [0, 1, 2]]), 2, 1),
        (torch.tensor([[0, 1, 2, 3]]), 5, 5),
        (torch.tensor([0, 1]), 3, 3),
        (torch.tensor(distances), 4, 4),
        (torch.tensor([[0, 1, 2]] * 3), 3, 1),  # three samples of as many tokens
    ]
    counts, tokens = torch.zeros(6, dtype=torch.float64), 0
    for ids, samples, times in looked_up:
        found.add_ids(ids, samples)
        counts += times * torch.bincount(ids.flatten(), minlength=6)
        tokens += times * ids.numel()
    assert found.tokens == tokens == 6 + 20 + 6 + 36 + 9
    torch.testing.assert_close(found.hessian.double(), 2 / tokens * counts)


def folded(*parts):
    """Accumulators with a full Hessian of each of ``parts``, (N, 3) each, by the names a, b and so on."""
    found = Accumulators(CPU)
    for name, rows in zip("abc", parts, strict=False):
        found.get(name, True, 3).add_rows(rows)
    return found


def test_pooled_and_resumed_hessians_weigh_by_their_tokens():
    first, second = torch.randn(2, 3), torch.randn(7, 3)
    found = folded(first, second)
    found.pool("both", ["a", "b", "none"], 3)
    [(name, info, hessian)] = found.give({"both"})
    assert (name, info.tokens, info.kind) == ("both", 9, "full")
    torch.testing.assert_close(hessian.tril().double(), oracle([first, second]).tril())
    [(_, info, hessian)] = folded(first).give({"a"})
    again = Accumulators(CPU)
    again.resume("a", info, pack_triangle(hessian))
    again.get("a", True, 3).add_rows(second)
    [(_, info, hessian)] = again.give({"a"})
    assert info.tokens == 9
    torch.testing.assert_close(hessian.tril().double(), oracle([first, second]).tril())


def test_ranks_have_a_share_of_what_all_have_by_their_tokens():
    rows = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, -1.0]])
    found = folded(rows)
    for counts in (found.counts(), {"a": (3, 3, 6)}):  # this rank's two tokens, and six of another
        found.join_counts(counts)
    found.pool("both", ["a", "none"], 3)
    assert found.tokens_of("a") == found.tokens_of("both") == 8
    [(_, info, packed)] = found.give_joint({"a"})
    torch.testing.assert_close(unpack_triangle(packed, 3).double(), 2 / 8 * (rows.T @ rows).double())
    assert (info.tokens, info.dead) == (8, 1)
    assert info.mean_diagonal == pytest.approx(2 / 8 * (10 + 0 + 5) / 3)


def test_channels_are_squared_wider_and_what_is_infinite_is_told():
    found = Accumulators(CPU)
    rows = torch.tensor([[300.0, 0.0], [-300.0, 0.0]], dtype=torch.float16)  # 90,000 is more than it holds
    found.get("scale", False, 2).add_channels(rows)
    [(_, info, diagonal)] = found.give({"scale"})
    assert diagonal.tolist() == [2 * 300.0**2, 0.0]
    assert (info.mean_diagonal, info.dead, info.kind) == (300.0**2, 1, "diagonal")
    bad = folded(torch.tensor([[1.0, float("inf"), 0.0]]))
    assert [*bad.give(set())] == []
    with pytest.raises(TailorError, match="NaN or infinity in the activations that reach a"):
        next(folded(torch.tensor([[1.0, float("inf"), 0.0]])).give({"a"}))
