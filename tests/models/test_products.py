"""Parameters that no layer holds: what each multiplies, by a dense oracle from the outputs alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tailorcli.calibration.collector import Collector
from tailorcli.device import StageTimer
from tailorcli.models.layers import find_layers

CPU = torch.device("cpu")
CHANNELS, PLACES = 6, 5


class GatedNorm(nn.Module):
    """A root-mean-square norm with a gate, in ``groups``, as Mamba2 and Qwen3.5 have."""

    def __init__(self, groups):
        super().__init__()
        self.weight, self.eps, self.groups = nn.Parameter(torch.rand(CHANNELS) + 0.5), 1e-6, groups

    def forward(self, x, gate=None):
        x = (x * functional.silu(gate)).unflatten(-1, (self.groups, -1))
        scaled = self.weight.view(self.groups, -1) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))
        return scaled.flatten(-2)


class Depthwise(nn.Module):
    """A causal convolution of each channel by itself: as a module, or by its weight alone, as fast kernels take it."""

    def __init__(self, called):
        super().__init__()
        self.conv, self.called = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=2, groups=CHANNELS), called

    def forward(self, x):
        x = x.transpose(1, 2)  # (B, C, T)
        if self.called:
            return self.conv(x)
        conv = self.conv
        return functional.conv1d(x, conv.weight.squeeze(1).unsqueeze(1), conv.bias, padding=2, groups=CHANNELS)


class Patches(nn.Module):
    """A depthwise convolution in two dimensions, with steps."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(
            CHANNELS, CHANNELS, (2, 3), stride=(1, 2), padding=(0, 1), dilation=(2, 1), groups=CHANNELS
        )

    def forward(self, x):
        return self.conv(x.transpose(1, 2).unsqueeze(2).expand(-1, -1, 4, -1))


class Scales(nn.Module):
    """A factor for each of the heads, as it is or as a function of the parameter, in which it need not be linear."""

    def __init__(self, of):
        super().__init__()
        self.factor, self.of = nn.Parameter(torch.rand(3)), of

    def forward(self, x):
        return self.of(self.factor) * x.unflatten(-1, (3, 2))


def oracle(model, batches, name):
    """H_jj of one parameter: (2/N) sum over outputs of (d output / d entry)^2, N what each entry multiplies."""
    parameter, total, count = model.get_parameter(name), 0.0, 0
    for x in batches:
        outputs = model(*x).double().flatten()
        rows = [torch.autograd.grad(one, parameter, retain_graph=True)[0].flatten() for one in outputs]
        total = total + torch.stack(rows).double().square().sum(0)
        count += len(outputs)
    return total, count


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: GatedNorm(1), "weight"),
        (lambda: GatedNorm(2), "weight"),
        (lambda: Depthwise(True), "conv.weight"),
        (lambda: Depthwise(False), "conv.weight"),
        (Patches, "conv.weight"),
        (lambda: Scales(lambda p: p[:, None]), "factor"),
        (lambda: Scales(lambda p: -torch.exp(p.double().float())[:, None]), "factor"),
        (lambda: Scales(lambda p: functional.softplus(p.to(torch.float64), beta=2.0).unsqueeze(-1)), "factor"),
    ],
)
def test_what_an_entry_moves_is_its_hessian(make, name):
    torch.manual_seed(0)
    model = make()
    both = isinstance(model, GatedNorm)
    batches = [tuple(torch.randn(size, PLACES, CHANNELS) for _ in range(1 + both)) for size in (2, 1)]
    layers = find_layers(model)
    collector = Collector(list(layers.values()), model, CPU, StageTimer(CPU))
    with torch.no_grad():
        for batch in batches:
            with collector.folding():
                model(*batch)
    found = {key: (info, value) for key, info, value in collector.results()}
    assert (layers[name].role, layers[name].reason) == ("norm", "")
    info, value = found[layers[name].group]
    total, outputs = oracle(model, batches, name)
    entries = model.get_parameter(name).numel()
    uses = outputs * (model.get_parameter(name)[0].numel()) / entries  # every output is moved by one kernel
    assert info.kind == "diagonal"
    assert info.tokens == uses
    torch.testing.assert_close(value.double(), 2 / uses * total, rtol=1e-5, atol=1e-6)
    if isinstance(model, (Depthwise, Patches)):
        assert (layers["conv.bias"].role, layers["conv.bias"].reason) == ("bias", "")


def test_a_parameter_that_two_ways_lead_through_is_left_with_its_reason():
    """RWKV mixes by m and by 1 - m: what m multiplies is neither operand."""

    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.rand(CHANNELS))

        def forward(self, x):
            return x * self.mix + x.roll(1, 1) * (1 - self.mix)

    model = Mix()
    layers = find_layers(model)
    collector = Collector(list(layers.values()), model, CPU, StageTimer(CPU))
    with torch.no_grad(), collector.folding():
        model(torch.randn(2, PLACES, CHANNELS))
    assert list(collector.results()) == []
    assert "more than one way" in layers["mix"].reason


def test_tensors_without_memory_of_their_own_are_looked_past():
    """Masks are made within torch.vmap."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(CHANNELS))

        def forward(self, x):
            mask = torch.vmap(lambda i: (i - 1) * 2 + 1)(torch.arange(x.shape[1]))
            return self.scale * x * mask[:, None]

    model = Masked()
    layers = find_layers(model)
    collector = Collector(list(layers.values()), model, CPU, StageTimer(CPU))
    with torch.no_grad(), collector.folding():
        model(torch.randn(2, PLACES, CHANNELS))
    assert [info.tokens for _, info, _ in collector.results()] == [2 * PLACES]
