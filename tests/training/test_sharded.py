"""Sparse fine-tuning under FSDP on two processes: what is frozen stays the base's, and the method is the same."""

import subprocess
import sys

import pytest
import torch
from helpers import bits, make_model, make_tokenizer, read_tensors, run

from tailorcli.core.dowser import least_important
from tailorcli.training.importance import Importance

# accelerate shards on GPUs alone, so the model is sharded before the Trainer has it. To that each process is the only
# one: both have the same batches, and FSDP's mean of their gradients is the gradient of one process.
WORKER = """
import os
import sys
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from tailorcli.training import SparseTuning

method, base, importance, output, rank = sys.argv[1:]
rows = [{"input_ids": (row := [(3 * n + 7 * i) % 90 + 2 for i in range(12)]), "labels": row} for n in range(24)]
model = LlamaForCausalLM.from_pretrained(base)
arguments = TrainingArguments(
    output,
    max_steps=4,
    learning_rate=1e-2,
    weight_decay=0.1,
    per_device_train_batch_size=4,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
trainer = Trainer(model, arguments, train_dataset=rows)
given = {"importance": importance} if method == "dowser" else {}
SparseTuning(method, **given).attach(trainer)
if rank != "alone":
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{os.getcwd()}/{output}.store", rank=int(rank), world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
trainer.train()
whole = {}
for name, value in model.named_parameters():
    assert hasattr(value, "to_local") == (rank != "alone")
    whole[name] = value.detach() if rank == "alone" else value.full_tensor().detach()
if rank in ("alone", "0"):
    os.makedirs(output, exist_ok=True)
    save_file(whole, f"{output}/model.safetensors")
if rank != "alone":
    destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    make_model(layers=2).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    run("probe", folder / "base", "-o", folder / "importance", "--num-samples", 4, "--seq-len", 12)
    (folder / "worker.py").write_text(WORKER)
    return folder


def train(folder, method, ranks):
    """The weights after a run in a process for each of ``ranks``."""
    output = folder / f"{method}-{len(ranks)}"
    command = [sys.executable, "worker.py", method, "base", "importance", output.name]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    started = [subprocess.Popen([*command, rank], **pipes) for rank in ranks]
    for process in started:
        _, told = process.communicate(timeout=500)
        assert process.returncode == 0, told[-3000:]
    return read_tensors(output)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dowser", "spider", "half", "l2"])
def test_two_processes_train_as_one_does_and_freeze_the_same(folder, method):
    base = read_tensors(folder / "base")
    one, two = (train(folder, method, ranks) for ranks in (["alone"], ["0", "1"]))
    scores = Importance.open(folder / "importance")
    for name in base:
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=2e-4), name
        still = base[name] == one[name]
        assert (still == (base[name] == two[name])).double().mean() > 0.999, name
        if method == "dowser" and name in scores.digests:
            mask = least_important(scores.read(name), 0.1)
            assert bits(base[name][~mask]) == bits(two[name][~mask]), name
            assert (base[name] != two[name])[mask].double().mean() > 0.9, name
    assert any(not torch.equal(base[name], two[name]) for name in base)
