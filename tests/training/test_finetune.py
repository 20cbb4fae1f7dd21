"""``tailorcli finetune``: a base learns new data, and is a checkpoint like any other afterwards."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_family_pair
from helpers import bits, make_pair, make_tokenizer, quantise, read_tensors, refused, run, shares_moved
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tailorcli.core.dowser import least_important
from tailorcli.data.encoder import Encoder
from tailorcli.data.records import check_record, read_records
from tailorcli.errors import DataError
from tailorcli.training import SparseTuning
from tailorcli.training.examples import IGNORED, Collate, encode_examples
from tailorcli.training.importance import Importance
from tailorcli.training.resuming import SUFFIX

ROOT = Path(__file__).parents[2]
STEPS = ("--steps", 6, "--batch-size", 4, "--learning-rate", 1e-2, "--weight-decay", 0.1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = make_pair(tmp_path_factory.mktemp("finetune"), layers=3, shard="40KB")
    run("probe", folder / "base", "-o", folder / "importance", "--num-samples", 8, "--seq-len", 16)
    return folder


def finetune(pair, out, *more, method="full", expect=0):
    given = ("--importance", pair / "importance") if method == "dowser" else ()
    data = ("--data", pair / "data.jsonl")
    return run("finetune", pair / "base", *data, "-o", out, "--method", method, *given, *STEPS, *more, expect=expect)


@pytest.mark.parametrize("method", ["full", "half", "l2", "spider", "dowser"])
def test_every_method_writes_a_checkpoint_and_its_report(pair, tmp_path, method):
    shown = finetune(pair, tmp_path / "out", method=method).stdout
    base, out = read_tensors(pair / "base"), read_tensors(tmp_path / "out")
    assert out.keys() == base.keys()
    report = json.loads((tmp_path / "out" / "finetune.json").read_text())
    shares = shares_moved(base, out)
    assert {entry["name"]: entry["share"] for entry in report["tensors"]} == shares
    assert shares["model.embed_tokens.weight"] == shares["lm_head.weight"] == 0
    share = shares["model.layers.1.mlp.up_proj.weight"]
    low, high = {"dowser": (0.09, 0.1007), "spider": (0.2, 0.8)}.get(method, (0.9, 1.0))
    assert low <= share <= high
    assert report["losses"][-1][0] == report["steps"] == 6
    assert report["losses"][-1][1] < report["losses"][0][1]
    assert report["seconds"] > 0
    change = sum(float((out[n].double() - base[n].double()).square().sum()) for n in base)
    size = sum(float(value.double().square().sum()) for value in base.values())
    assert report["drift"] == pytest.approx((change / size) ** 0.5)
    assert "moved" in shown
    assert not (tmp_path / f"out{SUFFIX}").exists()
    files = {file.name for file in (pair / "base").iterdir()} | {"finetune.json", "README.md"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("method", ["dowser", "spider"])
def test_the_callback_on_a_plain_trainer_gives_the_commands_weights(pair, tmp_path, method):
    finetune(pair, tmp_path / "out", method=method)
    model = AutoModelForCausalLM.from_pretrained(pair / "base")
    encoder = Encoder(make_tokenizer())
    rows = encode_examples(read_records(pair / "data.jsonl"), encoder, 2048).inputs
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        optim="adamw_torch",
        seed=0,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=Collate(0))
    SparseTuning(method, importance=pair / "importance" if method == "dowser" else None).attach(trainer)
    trainer.train()
    written = read_tensors(tmp_path / "out")
    assert all(bits(written[name]) == bits(value.detach()) for name, value in model.named_parameters())


def test_the_callback_on_trls_trainer_gives_the_commands_weights(pair, tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    finetune(pair, tmp_path / "out", method="dowser")
    model = AutoModelForCausalLM.from_pretrained(pair / "base")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<pad>"
    texts = [record.fields["text"] for record in read_records(pair / "data.jsonl")]
    rows = Dataset.from_list([{"input_ids": make_tokenizer()(text)["input_ids"]} for text in texts])
    arguments = SFTConfig(
        str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        optim="adamw_torch",
        seed=0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        loss_type="nll",
    )
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    SparseTuning("dowser", importance=pair / "importance").attach(trainer)
    trainer.train()
    written = read_tensors(tmp_path / "out")
    for name, value in model.named_parameters():
        assert torch.allclose(written[name], value.detach(), rtol=1e-4, atol=1e-5), name
        base = read_tensors(pair / "base")[name]
        assert torch.equal(written[name] == base, value.detach() == base), name


def examples_of(page):
    """The Python examples of a page, in their order."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("number", "needs"), [(0, "transformers"), (1, "trl")])
def test_the_documented_example_runs_as_it_stands(pair, tmp_path, monkeypatch, number, needs):
    pytest.importorskip(needs)
    for name in ("base", "importance"):
        shutil.copytree(pair / name, tmp_path / name)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(tmp_path / "base")
    shutil.copy(pair / "data.jsonl", tmp_path / "new.jsonl")
    examples = examples_of("docs/how-to/finetune.md")
    assert len(examples) == 2
    assert f"from {needs} import" in examples[number]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # a CPU has it too
    monkeypatch.chdir(tmp_path)
    exec(compile(examples[number], "example", "exec"), {"__name__": "example"})
    tuned = read_tensors(tmp_path / "tuned")
    base = {name: value.to(tuned[name].dtype) for name, value in read_tensors(pair / "base").items()}
    assert {value.dtype for value in tuned.values()} == {torch.float32 if needs == "trl" else torch.bfloat16}
    scores = Importance.open(pair / "importance")
    for name, value in base.items():
        still = least_important(scores.read(name), 0.1).logical_not() if name in scores.digests else ...
        assert torch.equal(tuned[name][still], value[still]), name
    assert any(shares_moved(base, tuned).values())


def test_a_base_in_bfloat16_is_trained_in_it_or_in_float32_and_written_in_it(tmp_path):
    pair = make_pair(tmp_path / "pair", dtype=torch.bfloat16)
    run("probe", pair / "base", "-o", pair / "importance", "--num-samples", 4, "--seq-len", 12)
    base = read_tensors(pair / "base")
    for dtype in ("auto", "float32"):
        finetune(pair, tmp_path / dtype, "--dtype", dtype, method="dowser")
        out = read_tensors(tmp_path / dtype)
        assert {value.dtype for value in out.values()} == {torch.bfloat16}
        share = shares_moved(base, out)["model.layers.0.mlp.up_proj.weight"]
        assert 0.05 < share <= 0.1007


def test_tied_tables_that_are_stored_once_or_twice(tmp_path):
    pair = make_pair(tmp_path / "pair", tied=True)
    finetune(pair, tmp_path / "frozen")
    assert (
        shares_moved(read_tensors(pair / "base"), read_tensors(tmp_path / "frozen"))["model.embed_tokens.weight"] == 0
    )
    finetune(pair, tmp_path / "trained", "--trainable", "*embed_tokens*")
    shares = shares_moved(read_tensors(pair / "base"), read_tensors(tmp_path / "trained"))
    assert [name for name, share in shares.items() if share] == ["model.embed_tokens.weight"]


def test_a_sparse_fine_tune_is_a_small_patch_without_loss(pair, tmp_path):
    finetune(pair, tmp_path / "out", method="dowser")
    patch = tmp_path / "small.safetensors"
    run("patch", pair / "base", tmp_path / "out", "--method", "changed", "--patch-file", patch)
    run("apply", pair / "base", patch, "-o", tmp_path / "again")
    one, two = (read_tensors(tmp_path / name) for name in ("out", "again"))
    assert all(bits(one[name]) == bits(two[name]) for name in one)
    run("merge-multi", pair / "base", patch, patch, "--method", "patches", "-o", tmp_path / "merged")


def test_the_last_layers_alone(pair, tmp_path):
    finetune(pair, tmp_path / "out", "--last-layers", 1)
    shares = shares_moved(read_tensors(pair / "base"), read_tensors(tmp_path / "out"))
    assert all(bool(share) == ("layers.2." in name) for name, share in shares.items())


def test_dry_run_writes_nothing_and_counts_what_it_takes(pair, tmp_path):
    found = json.loads(finetune(pair, tmp_path / "out", "--dry-run", "--json", method="spider").stdout)
    assert list(tmp_path.iterdir()) == []
    trained = sum(v.numel() for n, v in read_tensors(pair / "base").items() if "embed" not in n and "head" not in n)
    assert found["entries"] == trained
    assert found["steps"] == 6
    assert found["memory"]["base's copy"] == found["memory"]["accumulated gradient"] == 4 * trained
    shown = finetune(pair, tmp_path / "out", "--dry-run", method="dowser")
    assert "mask" in shown.stdout
    assert "dry run: nothing was written" in shown.stderr


def test_training_arguments_of_a_file_reach_the_trainer(pair, tmp_path):
    kinds = ("activation", "gradient")  # its name since transformers 5.23, and before
    saving = next(f"{kind}_checkpointing" for kind in kinds if hasattr(TrainingArguments, f"{kind}_checkpointing"))
    (tmp_path / "args.yaml").write_text(f"lr_scheduler_type: constant\n{saving}: true\n")
    finetune(pair, tmp_path / "constant", "--training-args", tmp_path / "args.yaml")
    finetune(pair, tmp_path / "linear")
    assert read_tensors(tmp_path / "constant").keys() == read_tensors(tmp_path / "linear").keys()
    one, two = (read_tensors(tmp_path / name)["model.norm.weight"] for name in ("constant", "linear"))
    assert not torch.equal(one, two)
    for text, mentions in (
        ("max_steps: 3", "--steps"),
        ("no_such: 3", "no_such"),
        ("- a", "list"),
        ("a: [", "cannot read"),
    ):
        (tmp_path / "args.yaml").write_text(text + "\n")
        data = ("--data", pair / "data.jsonl", "-o", tmp_path / "out", "--training-args", tmp_path / "args.yaml")
        shown = refused("finetune", pair / "base", *data, output=tmp_path / "out")
        assert mentions in shown


def test_what_cannot_be_trained_is_refused(pair, tmp_path):
    base, data = pair / "base", ("--data", pair / "data.jsonl")
    out = ("-o", tmp_path / "out")
    refused("finetune", base, *data, *out, "--method", "dowser", mentions=["--importance"])
    refused("finetune", base, *data, *out, "--importance", pair / "importance", mentions=["full"])
    for ratio in (0, 1.5):
        given = ("--method", "dowser", "--importance", pair / "importance", "--update-ratio", ratio)
        refused("finetune", base, *data, *out, *given, mentions=["update-ratio"])
    other = ("--method", "dowser", "--importance", pair / "importance")
    refused("finetune", pair / "tuned", *data, *out, *other, mentions=["another base"])
    refused("finetune", base, *data, "-o", pair / "tuned", mentions=["not empty"])
    refused("finetune", base, *data, "-o", base, mentions=["replace an input"])
    refused("finetune", base, *data, *out, "--last-layers", 9, mentions=["last-layers"])
    refused("finetune", base, *data, *out, "--trainable", "nothing*", mentions=["nothing*"])
    refused("finetune", base, *data, *out, "--resume", mentions=["no run"])
    (tmp_path / "empty.jsonl").write_text('{"prompt": "abc", "response": ""}\n{"text": "a"}\n')
    refused("finetune", base, "--data", tmp_path / "empty.jsonl", *out, mentions=["no record has a token to train on"])
    assert [file.name for file in tmp_path.iterdir()] == ["empty.jsonl"]


def test_without_accelerate_the_error_names_it(pair, tmp_path, monkeypatch):
    from tailorcli.training import finetune as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    data = ("--data", pair / "data.jsonl", "-o", tmp_path / "out")
    refused("finetune", pair / "base", *data, mentions=["accelerate", "[train]"])


def test_a_quantised_base_is_refused(tmp_path):
    pair = make_pair(tmp_path / "pair")
    quantise(pair / "base", "block")
    data = ("--data", pair / "data.jsonl", "-o", tmp_path / "out")
    refused("finetune", pair / "base", *data, mentions=["quantised"])
    refused("probe", pair / "base", "-o", tmp_path / "importance", mentions=["quantised"])


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(pair, tmp_path, monkeypatch):
    from tailorcli.training import trainer

    original, calls = trainer.Trainer.compute_loss, [0]

    def spoilt(self, model, inputs, *args, **given):
        calls[0] += 1
        loss = original(self, model, inputs, *args, **given)
        return loss * float("nan") if calls[0] == 4 else loss

    monkeypatch.setattr(trainer.Trainer, "compute_loss", spoilt)
    data = ("--data", pair / "data.jsonl", "-o", tmp_path / "out")
    shown = refused(
        "finetune", pair / "base", *data, *STEPS, mentions=["nan in step 4", "step 3"], output=tmp_path / "out"
    )
    kept = tmp_path / f"out{SUFFIX}" / "checkpoint-3"
    assert str(kept) in shown.replace("\n", "")
    assert all(bool(value.isfinite().all()) for value in read_tensors(kept).values())
    monkeypatch.setattr(trainer.Trainer, "compute_loss", original)
    finetune(pair, tmp_path / "out", "--resume")
    finetune(pair, tmp_path / "whole")
    assert all(
        bits(a) == bits(b)
        for a, b in zip(*(read_tensors(tmp_path / n).values() for n in ("out", "whole")), strict=True)
    )


def test_a_gradient_that_is_no_number_stops_before_it_spoils_the_weights(pair, tmp_path, monkeypatch):
    from tailorcli.training import trainer

    original = trainer.Guard.on_pre_optimizer_step

    def spoilt(self, args, state, control, **given):
        if state.global_step == 2:
            next(p for p in given["model"].parameters() if p.grad is not None).grad[0] = float("inf")
        original(self, args, state, control, **given)

    monkeypatch.setattr(trainer.Guard, "on_pre_optimizer_step", spoilt)
    data = ("--data", pair / "data.jsonl", "-o", tmp_path / "out")
    refused("finetune", pair / "base", *data, *STEPS, mentions=["gradient is inf in step 3", "of step 2"])


@pytest.mark.parametrize("made", ["os", "safetensors", "torch"])
def test_a_full_disk_is_one_error_and_the_run_goes_on_when_there_is_room(pair, tmp_path, monkeypatch, made):
    from safetensors import SafetensorError

    from tailorcli.training import trainer

    told = {
        "os": OSError(28, "No space left on device"),
        "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "torch": RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed"),
    }
    original = trainer.GuardedTrainer._save_checkpoint

    def full(self, model, trial):
        if self.state.global_step == 4:
            raise told[made]
        original(self, model, trial)

    monkeypatch.setattr(trainer.GuardedTrainer, "_save_checkpoint", full)
    command = ["finetune", pair / "base", "--data", pair / "data.jsonl", "-o", tmp_path / "out", *STEPS]
    refused(*command, "--save-every", 2, mentions=[f"out{SUFFIX}"], output=tmp_path / "out")
    monkeypatch.setattr(trainer.GuardedTrainer, "_save_checkpoint", original)
    finetune(pair, tmp_path / "out", "--save-every", 2, "--resume")
    assert (tmp_path / "out" / "finetune.json").exists()


def test_an_output_whose_shards_have_no_index_yet_is_finished(pair, tmp_path, monkeypatch):
    """The report lies there before: it does not say that all is written."""
    from tailorcli.checkpoint import writer

    original = writer.write_text_atomically

    def full(path, text):
        if path.name == "model.safetensors.index.json":
            raise OSError(28, "No space left on device")
        original(path, text)

    monkeypatch.setattr(writer, "write_text_atomically", full)
    finetune(pair, tmp_path / "out", expect=1)
    assert (tmp_path / "out" / "finetune.json").exists()
    monkeypatch.setattr(writer, "write_text_atomically", original)
    finetune(pair, tmp_path / "out", "--resume")
    assert read_tensors(tmp_path / "out").keys() == read_tensors(pair / "base").keys()
    work = tmp_path / f"out{SUFFIX}"
    assert not work.exists()
    work.mkdir()  # as a run that was ended at its very end leaves it
    (work / "checkpoint-6").mkdir()
    finetune(pair, tmp_path / "out", "--resume")
    assert not work.exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spider", "dowser"])
def test_a_killed_run_goes_on_to_the_same_weights(pair, tmp_path, method):
    """Killed in the middle of its steps, at the first state that is there whole."""
    finetune(pair, tmp_path / "whole", "--save-every", 2, method=method)
    given = ["--importance", pair / "importance"] if method == "dowser" else []
    command = ["finetune", pair / "base", "--data", pair / "data.jsonl", "-o", tmp_path / "out", "--method", method]
    command = [sys.executable, "-m", "tailorcli", *command, *given, *STEPS, "--save-every", 2]
    work = tmp_path / f"out{SUFFIX}"
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(work.glob("checkpoint-*/complete")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert work.exists()
    refused(*[str(word) for word in command[3:]], mentions=["interrupted run"])
    refused(*[str(word) for word in command[3:]], "--resume", "--seed", "1", mentions=["other options"])
    finetune(pair, tmp_path / "out", "--save-every", 2, "--resume", method=method)
    one, two = (read_tensors(tmp_path / name) for name in ("whole", "out"))
    assert all(bits(one[name]) == bits(two[name]) for name in one)
    again = finetune(pair, tmp_path / "out", "--save-every", 2, "--resume", method=method).stdout
    assert "moved" in again


def labels_of(record, tokenizer, seq_len=200):
    encoder = Encoder(tokenizer)
    example = encode_examples([check_record("here", record, Path())], encoder, seq_len).inputs[0]
    learnt = example["labels"][0] != IGNORED
    assert torch.equal(example["labels"][0][learnt], example["input_ids"][0][learnt])
    return "".join(tokenizer.convert_ids_to_tokens(example["input_ids"][0][learnt])), example


def test_the_loss_is_on_the_responses_where_records_have_them():
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    assert labels_of({"text": "hello you"}, tokenizer)[0] == "hello you"
    assert labels_of({"prompt": "2+2=", "response": "4"}, tokenizer)[0] == "4"
    talk = [("system", "be brief"), ("user", "hi"), ("assistant", "hey"), ("user", "bye"), ("assistant", "so long")]
    messages = [{"role": role, "content": content} for role, content in talk]
    assert labels_of({"messages": messages}, tokenizer)[0] == "hey</>so long</>"
    assert labels_of({"messages": messages[:3]}, tokenizer, seq_len=46)[0] == "hey</>"[: 46 - 41]
    with pytest.raises(DataError, match="no record has a token"):
        labels_of({"messages": messages[:2]}, tokenizer)


def test_a_response_is_ended_where_the_tokenizer_has_an_end():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<unk>"
    _, example = labels_of({"prompt": "2+2=", "response": "4"}, tokenizer)
    assert example["labels"][0, -1] == example["input_ids"][0, -1] == tokenizer.eos_token_id
    assert labels_of({"text": "hello"}, tokenizer)[0] == "hello"
    assert labels_of({"prompt": "2+2=", "response": "4"}, tokenizer, seq_len=5)[0] == "4"


@pytest.mark.parametrize(
    "name", ["llava", "t5", "mixtral", "qwen2-audio", pytest.param("qwen2.5-vl", marks=pytest.mark.slow)]
)
def test_families_are_trained_through_their_own_processors(tmp_path, name):
    """Towers and embeddings stay, what connects them to the text and the language model move."""
    pair = make_family_pair(tmp_path, name)
    finetune(pair, tmp_path / "out", "--batch-size", 5)
    shares = shares_moved(read_tensors(pair / "base"), read_tensors(tmp_path / "out"))
    frozen = [n for n, share in shares.items() if not share and shares]
    still = (
        "embed",
        "vision",
        "audio_tower",
        "visual.patch",
        "visual.blocks",
        "shared",
        "lm_head",
        "relative_attention_bias",
    )
    assert all(any(word in n for word in still) for n in frozen), frozen
    trained = [n for n, share in shares.items() if share]
    assert not any(word in n for word in ("_tower", "visual.blocks", "embed_tokens") for n in trained)
    if FAMILIES[name].kind in ("multimodal", "hearing"):
        assert any("projector" in n or "merger" in n for n in trained)


def test_a_picture_is_probed_with_its_tower_and_text_without(tmp_path):
    pair = make_family_pair(tmp_path, "llava")
    run("probe", pair / "base", "-o", tmp_path / "text", "--num-samples", 4, "--seq-len", 12)
    run("probe", pair / "base", "-o", tmp_path / "pictures", "--num-samples", 4, "--data", pair / "data.jsonl")
    text, pictures = (Importance.open(tmp_path / name).digests for name in ("text", "pictures"))
    assert not any("vision_tower" in n or "projector" in n for n in text)
    assert any("vision_tower" in n for n in pictures)
    assert any("projector" in n for n in pictures)
    assert set(text) < set(pictures)
