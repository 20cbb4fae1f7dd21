"""``patch --method graft``: a mask trained on the task's loss, kept beside the output until the run has finished."""

import json
import re
from itertools import islice

import pytest
import torch
from families import make_family_pair
from helpers import (
    bits,
    broken_off,
    folder_digest,
    invoke,
    make_model,
    make_pair,
    make_tokenizer,
    read_tensors,
    refused,
    run,
)

from tailorcli import CalibrateOptions, Checkpoint, PatchOptions, TailorError, apply_patch, patch_checkpoint, plan_patch
from tailorcli.checkpoint.writer import CheckpointWriter
from tailorcli.models.config import read_config
from tailorcli.models.loading import load_encoder
from tailorcli.patching.graft import MaskFile, _backward, _batches, _mix, _samples, _step, _Trained

PHRASES = ["the cat sat", "a dog ran off", "hello world", "tailor the coat", "stitch by stitch"]
FAST = {"method": "graft", "graft_steps": 30, "batch_size": 4}


@pytest.fixture(scope="module")
def task_pair(tmp_path_factory):
    """A tiny pair whose tuned model has really learned what lies in its data; read only."""
    folder = make_pair(tmp_path_factory.mktemp("task"))
    texts = [" ".join(PHRASES[i * k % 5] for k in range(1, 4)) for i in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    network = make_model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(4):
        for text in texts:
            optimizer.zero_grad()
            loss_of(network, [text]).backward()
            optimizer.step()
    network.save_pretrained(folder / "tuned")
    return folder


def loss_of(network, texts):
    tokenizer = make_tokenizer()
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    return sum(network(input_ids=x, labels=x).loss for x in ids) / len(ids)


def task_loss(folder, data):
    from transformers import AutoModelForCausalLM

    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    with torch.no_grad():
        return float(loss_of(AutoModelForCausalLM.from_pretrained(folder), texts))


def graft(folder, out, **changes):
    """Graft ``folder``'s pair; gives the report."""
    options = PatchOptions(**(FAST | changes))
    return patch_checkpoint(folder / "base", folder / "tuned", out, None, options, graft_data=folder / "data.jsonl")


def in_training():
    """Two tensors in the middle of training, each with a gradient."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for shape in ((3, 4), (5,)):
        base, change, logits, gradient = (torch.randn(shape, generator=generator) for _ in range(4))
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = gradient
        parts.append(_Trained(None, parameter, base, base + change, logits))
    return parts


def test_a_step_goes_against_the_gradient_over_its_root_mean_square_of_all_tensors():
    parts = in_training()
    before = [part.logits.double().requires_grad_() for part in parts]
    loss = torch.zeros((), dtype=torch.float64)
    for part, logits in zip(parts, before, strict=True):
        mixed = part.base.double() + logits.sigmoid() * (part.tuned.double() - part.base.double())
        loss = loss + (part.parameter.grad.double() * mixed).sum()
    loss.backward()
    size = torch.cat([logits.grad.flatten() for logits in before]).square().mean().sqrt()
    _step(parts, 0.3)
    for part, logits in zip(parts, before, strict=True):
        torch.testing.assert_close(
            part.logits.double(), logits.detach() - 0.3 * logits.grad / size, rtol=1e-5, atol=1e-6
        )


def test_what_runs_is_the_base_plus_the_share_of_the_change_that_the_mask_has():
    parts = in_training()
    _mix(parts)
    for part in parts:
        expected = part.base + part.logits.sigmoid() * (part.tuned - part.base)
        torch.testing.assert_close(part.parameter.detach(), expected)
        assert part.parameter.grad is None


def test_the_gradient_is_that_of_the_mean_over_all_tokens_whatever_their_lengths():
    network = make_model().eval()
    samples = [{"input_ids": (ids := torch.arange(2, 2 + n).unsqueeze(0)), "labels": ids} for n in (4, 9, 4, 6)]
    losses = []
    for sample in samples:
        logits = network(input_ids=sample["input_ids"]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, sample["input_ids"][0, 1:], reduction="none"))
    torch.cat(losses).mean().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    _backward(network, samples, torch.device("cpu"))
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_batches_go_round_and_round():
    assert list(islice(_batches(["a", "b", "c"], 2), 3)) == [["a", "b"], ["c", "a"], ["b", "c"]]


@pytest.mark.parametrize("threshold", ["tensor", "global"])
def test_the_trained_mask_does_the_task_better_than_the_largest_changes(task_pair, tmp_path, threshold):
    report = graft(task_pair, tmp_path / "graft", threshold=threshold)
    graft(task_pair, tmp_path / "start", threshold=threshold, graft_steps=0)
    options = PatchOptions(method="magnitude", threshold=threshold)
    magnitude = patch_checkpoint(task_pair / "base", task_pair / "tuned", tmp_path / "top", None, options)
    base, tuned, out, start, top = (
        read_tensors(f)
        for f in (*(task_pair / n for n in ("base", "tuned")), *(tmp_path / n for n in ("graft", "start", "top")))
    )
    assert {n: bits(t) for n, t in start.items()} == {n: bits(t) for n, t in top.items()}  # untrained: the same mask
    before, after = (task_loss(tmp_path / n, task_pair / "data.jsonl") for n in ("top", "graft"))
    assert after < before - 0.2
    assert report.totals["kept"] == magnitude.totals["kept"]
    if threshold == "global":
        assert report.totals["kept"] == round(0.1 * report.totals["numel"])
    for record in report.to_dict()["tensors"]:
        n = record["name"]
        if threshold == "tensor":
            assert record["kept"] == round(0.1 * base[n].numel())
        changed = out[n] != base[n]
        assert changed.sum() <= record["kept"]
        assert bits(out[n][changed]) == bits(tuned[n][changed])
    assert not list(tmp_path.glob("*.graft"))


def test_it_repeats_to_the_bit_and_other_data_gives_another(task_pair, tmp_path):
    graft(task_pair, tmp_path / "one")
    graft(task_pair, tmp_path / "two")
    assert folder_digest(tmp_path / "one") == folder_digest(tmp_path / "two")
    lines = (task_pair / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_text("".join(lines[:3]))
    arguments = (task_pair / "base", task_pair / "tuned", tmp_path / "three", None, PatchOptions(**FAST))
    report = patch_checkpoint(*arguments, graft_data=tmp_path / "half.jsonl")
    assert read_tensors(tmp_path / "three")["lm_head.weight"].ne(read_tensors(tmp_path / "one")["lm_head.weight"]).any()
    assert report.inputs["data"]["path"] == str(tmp_path / "half.jsonl")


@pytest.mark.parametrize("masks", ["there", "lost", "of another run"])
def test_a_run_broken_off_trains_again_only_where_it_must(task_pair, tmp_path, monkeypatch, masks):
    import tailorcli.patching.graft

    graft(task_pair, tmp_path / "whole")
    out = tmp_path / "out"
    with broken_off(CheckpointWriter, 4):
        graft(task_pair, out)
    kept = tmp_path / "out.graft"
    assert MaskFile(kept).identity()["method"] == "graft"
    if masks == "lost":
        kept.unlink()
    elif masks == "of another run":
        MaskFile(kept).write({"lm_head.weight": torch.zeros(100, 32, dtype=torch.bool)}, {"method": "other"})
    else:
        monkeypatch.setattr(tailorcli.patching.graft, "train_masks", lambda *_: pytest.fail("it trains again"))
    graft(task_pair, out, resume=True)
    assert folder_digest(out) == folder_digest(tmp_path / "whole")
    assert not kept.exists()


def test_samples_are_drawn_once(task_pair, tmp_path, monkeypatch):
    import tailorcli.patching.graft as module

    drawn, draw = [], module.draw_samples
    monkeypatch.setattr(module, "draw_samples", lambda *given: drawn.append(given) or draw(*given))
    graft(task_pair, tmp_path / "out", graft_steps=1)
    assert len(drawn) == 1


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float32)])
def test_through_the_command_and_a_patch_file(tmp_path, kind, dtype):
    folder = make_pair(tmp_path, kind, dtype=dtype, tied=kind == "llama")
    file = tmp_path / "patch.safetensors"
    arguments = (
        "--method",
        "graft",
        "--graft-data",
        folder / "data.jsonl",
        "--graft-steps",
        "2",
        "--graft-batch-size",
        "3",
    )
    pair = (folder / "base", folder / "tuned")
    planned = invoke("patch", *pair, "-o", tmp_path / "out", "--patch-file", file, *arguments, "--dry-run", "--json")
    assert json.loads(planned.stdout)["peak_memory_bytes"] > 700 << 20
    shown = invoke("patch", *pair, "-o", tmp_path / "out", "--patch-file", file, *arguments)
    assert shown.exit_code == 0, shown.output
    apply_patch(folder / "base", file, tmp_path / "applied")
    assert folder_digest(tmp_path / "applied") == folder_digest(tmp_path / "out")
    assert "graft" in invoke("inspect", tmp_path / "out").stdout


def test_what_it_reads_is_announced(llama_pair):
    pair, data = (llama_pair / "base", llama_pair / "tuned"), llama_pair / "data.jsonl"
    one = plan_patch(*pair, options=PatchOptions(method="magnitude"))
    assert plan_patch(*pair, options=PatchOptions(**FAST), graft_data=data).read_bytes == 2 * one.read_bytes


def scored(folder, records, **chosen):
    """Which tokens the loss is on, as text."""
    (folder / "some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    opened = [Checkpoint.open(folder / name) for name in ("base", "tuned")]
    settings = CalibrateOptions(num_samples=len(records), **chosen)
    samples = _samples(folder / "some.jsonl", *opened, read_config(folder / "base"), settings)
    tokenizer = load_encoder(folder / "base", folder / "base", False, settings).tokenizer
    assert all((x["labels"] == x["input_ids"])[x["labels"] != -100].all() for x in samples)
    return {"".join(tokenizer.convert_ids_to_tokens(x["labels"][x["labels"] != -100].tolist())) for x in samples}


def test_the_loss_is_on_the_response(tmp_path):
    folder = make_pair(tmp_path)
    records = [{"prompt": "ask", "response": "yes"}, {"text": "plain"}, {"prompt": "alone", "response": ""}]
    assert scored(folder, records) == {"yes", "plain"}  # without an end of text there is nothing to learn of the last
    assert scored(
        folder, [{"prompt": "ask", "response": "yes"}, {"prompt": "x" * 9, "response": "yes"}], seq_len=9
    ) == {
        "yes"  # of the other one no token of the response is left
    }


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2.5-vl", "gemma3")]


@pytest.mark.parametrize("family", ["llava", *SLOW])
def test_a_model_that_sees_trains_on_its_pictures(family, tmp_path):
    folder = make_family_pair(tmp_path, family)
    report = graft(folder, tmp_path / "out", graft_steps=2, graft_rate=20.0)
    start = graft(folder, tmp_path / "start", graft_steps=0)
    assert report.totals["kept"] == start.totals["kept"]
    found, before = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "start")
    vision = [name for name in found if ("vision" in name or "visual" in name) and "weight" in name]
    assert any(bits(found[name]) != bits(before[name]) for name in vision)  # its gradient arrives


def refusal(folder, tmp_path, data=None, **changes):
    arguments = (folder / "base", folder / "tuned", tmp_path / "out", None, PatchOptions(**(FAST | changes)))
    with pytest.raises(TailorError) as caught:
        patch_checkpoint(*arguments, graft_data=data)
    assert not (tmp_path / "out" / "config.json").exists()
    return caught.value.message


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
USER, ASSISTANT = {"role": "user", "content": "how much"}, {"role": "assistant", "content": "four"}


@pytest.mark.parametrize(
    ("record", "learnt"),
    [
        ({"question": "how much", "answer": "four"}, {"four|"}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {"four|"}),
        ({"messages": [USER, ASSISTANT, USER]}, {"four|"}),
        ({"prompt": "ask", "response": "yes"}, {"yes</s>"}),
    ],
    ids=["framed", "turns", "messages", "plain"],
)
def test_an_answer_is_learnt_with_what_ends_it(tmp_path, record, learnt):
    folder = make_pair(tmp_path)
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    for name in ("base", "tuned"):
        tokenizer.save_pretrained(folder / name)
    assert {text.replace("Ġ", "") for text in scored(folder, [record])} == learnt


def test_what_it_cannot_train_on_is_refused(llama_pair, tmp_path):
    data = llama_pair / "data.jsonl"
    assert "trains its mask" in refusal(llama_pair, tmp_path)
    assert "is no file" in refusal(llama_pair, tmp_path, tmp_path / "none.jsonl")
    assert "new rows" in refusal(llama_pair, tmp_path, data, resized_vocab=True)
    (tmp_path / "images.jsonl").write_text('{"text": "a", "images": ["a.png"]}\n')
    assert "processor" in refusal(llama_pair, tmp_path, tmp_path / "images.jsonl")
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    assert "no record" in refusal(llama_pair, tmp_path / "second", tmp_path / "short.jsonl")
    (tmp_path / "out.graft").write_text("mine")
    assert "no masks of tailorcli" in refusal(llama_pair, tmp_path, data, overwrite=True)
    assert (tmp_path / "out.graft").read_text() == "mine"


@pytest.mark.parametrize("change", [{"graft_steps": -1}, {"graft_rate": 0.0}, {"batch_size": 0}])
def test_wrong_options_are_refused(change):
    with pytest.raises(TailorError, match=next(iter(change)).replace("_", "-")):
        PatchOptions(method="graft", **change)


def test_a_tensor_that_the_model_holds_otherwise_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_pair(tmp_path)
    for name in ("base", "tuned"):
        tensors = load_file(folder / name / "model.safetensors")
        extra = torch.randn(3, 3, generator=torch.Generator().manual_seed(len(name)))
        save_file(tensors | {"extra.weight": extra}, folder / name / "model.safetensors", {"format": "pt"})
    assert "extra.weight" in refusal(folder, tmp_path, folder / "data.jsonl")
    report = graft(folder, tmp_path / "rest", exclude=("extra.*",), graft_steps=1)
    assert report.totals["tensors_at_base"] == 1


def test_all_tensors_that_it_cannot_train_are_named_before_anything_is_written(tmp_path):
    folder = make_family_pair(tmp_path, "mixtral")
    arguments = (folder / "base", folder / "tuned", "-o", tmp_path / "out", "--method", "graft")
    said = refused("patch", *arguments, "--graft-data", folder / "data.jsonl", mentions=["other tensors"])
    assert not (tmp_path / "out").exists()
    globs = re.findall(r"--exclude '([^']*)'", said.replace("\n", " "))
    assert 1 <= len(globs) <= 8
    given = [word for glob in globs for word in ("--exclude", glob)]
    run("patch", *arguments, "--graft-data", folder / "data.jsonl", *given, "--graft-steps", 1)


@pytest.mark.parametrize(("family", "said"), [("bert", "no next token"), ("t5", "encoder-decoder")])
def test_models_that_it_is_not_for_are_refused_before_anything_is_written(tmp_path, family, said):
    folder = make_family_pair(tmp_path, family)
    arguments = ("--method", "graft", "--graft-data", folder / "data.jsonl")
    refused("patch", folder / "base", folder / "tuned", "-o", tmp_path / "out", *arguments, mentions=[said])
    assert not (tmp_path / "out").exists()


def test_masks_are_trained_under_the_config_that_the_output_gets(task_pair, tmp_path, monkeypatch):
    import shutil

    import tailorcli.patching.graft as graft_module

    shutil.copytree(task_pair / "tuned", tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    ran, load = [], graft_module.load_model
    monkeypatch.setattr(graft_module, "load_model", lambda *a: ran.append(load(*a)) or ran[-1])
    arguments = (task_pair / "base", tmp_path / "tuned", tmp_path / "out", None, PatchOptions(**FAST))
    patch_checkpoint(*arguments, graft_data=task_pair / "data.jsonl")
    assert ran[0].config.rope_parameters["rope_theta"] == 1e6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 1e6
