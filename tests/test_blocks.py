import torch
from torch import nn

from tailorcli.blocks import Lockstep, Spill, find_blocks


class Stack(nn.Module):
    """Blocks in a row; what enters the first is kept by name and added at the end."""

    def __init__(self, depth=3, size=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(depth))

    def forward(self, inputs):
        embedded = inputs * 2
        hidden = embedded
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden + embedded


def run(model, batches, spill):
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
                tensor.data = spill.keep(tensor)
            lane.move(spill.out)

    Lockstep(find_blocks(model), [(runner(batch), len(batch)) for batch in batches]).run(lambda _: None, visit, spill)
    return outputs, left_behind


def test_hidden_states_in_files_give_the_same_outputs(tmp_path):
    model = Stack()
    batches = [torch.randn(2, 4), torch.randn(3, 4)]
    for limit in (0, 48, 1 << 20):
        spill = Spill(torch.device("cpu"), tmp_path, limit)
        outputs, left_behind = run(model, batches, spill)
        with torch.no_grad():
            assert all(torch.equal(out, model(batch)) for out, batch in zip(outputs, batches, strict=True))
        assert not any(tmp_path.iterdir())
        # What the model still holds of a block's inputs is told: here the embeddings, behind the first block.
        assert [count for block, count in left_behind if block == "layers.0"] == [1, 1]
        assert not any(count for block, count in left_behind if block != "layers.0")
