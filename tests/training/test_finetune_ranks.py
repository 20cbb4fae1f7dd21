"""Fine-tuning by several ranks is that of one process with as large a batch."""

import json

import pytest
import torch
from helpers import make_model, make_tokenizer, read_tensors, run, write_data
from ranked import ranked_cli


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "spider"])
def test_two_ranks_train_as_one_process_does(tmp_path, method):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    write_data(tmp_path / "data.jsonl", 24)
    command = ("finetune", tmp_path / "base", "--data", tmp_path / "data.jsonl", "--steps", 4, "--method", method)
    command += ("--device", "cpu", "--learning-rate", 1e-3)
    run(*command, "--batch-size", 4, "-o", tmp_path / "one")
    ends = ranked_cli(2, *command, "--batch-size", 2, "-o", tmp_path / "two", timeout=300)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.stderr for end in ends)
    assert ends[0].stdout
    assert not ends[1].stdout
    base, one, two = (read_tensors(tmp_path / name) for name in ("base", "one", "two"))
    for name, value in base.items():
        torch.testing.assert_close(two[name] - value, one[name] - value, rtol=1e-2, atol=2e-5)
    assert any(not value.equal(one[name]) for name, value in base.items())
    reports = [next((tmp_path / name).glob("*report*.json"), None) for name in ("one", "two")]
    losses = [json.loads(report.read_text())["losses"] for report in reports if report is not None]
    if losses:
        assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]
