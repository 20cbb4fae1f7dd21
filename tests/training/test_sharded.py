"""Sparse fine-tuning under FSDP on two processes: what is frozen stays the base's, and the method is the same."""

import subprocess
import sys

import pytest
import torch
from helpers import bits, make_model, make_tokenizer, read_tensors, run

from tailorcli.core.dowser import least_important
from tailorcli.training.importance import Importance

WORKER = """
import sys
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from tailorcli.training import SparseTuning

method, base, importance, output, sharded = sys.argv[1:]
rows = [{"input_ids": (row := [(3 * n + 7 * i) % 90 + 2 for i in range(12)]), "labels": row} for n in range(24)]
model = LlamaForCausalLM.from_pretrained(base)
wrapped = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
more = {"fsdp": True, "fsdp_config": wrapped, "ddp_backend": "gloo"} if sharded == "yes" else {}
arguments = TrainingArguments(
    output,
    max_steps=4,
    learning_rate=1e-2,
    weight_decay=0.1,
    per_device_train_batch_size=2 if sharded == "yes" else 4,
    train_sampling_strategy="sequential",
    save_strategy="steps",
    save_steps=4,
    save_only_model=False,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    **more,
)
trainer = Trainer(model, arguments, train_dataset=rows)
given = {"importance": importance} if method == "dowser" else {}
SparseTuning(method, **given).attach(trainer)
trainer.train()
assert hasattr(next(trainer.model.parameters()), "to_local") == (sharded == "yes")
trainer.save_model(output)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    make_model(layers=2).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    run("probe", folder / "base", "-o", folder / "importance", "--num-samples", 4, "--seq-len", 12)
    (folder / "worker.py").write_text(WORKER)
    return folder


def train(folder, method, sharded):
    output = folder / f"{method}-{sharded}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if sharded == "yes" else []
    command = [sys.executable, *torchrun, "worker.py", method, "base", "importance", output.name, sharded]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_tensors(output)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dowser", "spider", "half", "l2"])
def test_two_processes_train_as_one_does_and_freeze_the_same(folder, method):
    base = read_tensors(folder / "base")
    one, two = (train(folder, method, sharded) for sharded in ("no", "yes"))
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
