"""What ``finetune`` must not do to a base or to its user: the cases that went wrong once."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import make_family_pair
from helpers import bits, interrupted_when_saved, make_model, make_pair, read_tensors, refused, run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from tailorcli import Checkpoint
from tailorcli.errors import NumericalError, OptionsError
from tailorcli.patchfile.report import FINETUNE_FILE
from tailorcli.runs.card import is_ours
from tailorcli.training import SparseTuning
from tailorcli.training.carded import Given, side_files_of
from tailorcli.training.outcome import FinetuneReport, TensorChange, memory_of, write_outcome
from tailorcli.training.resuming import SUFFIX
from tailorcli.training.settings import FinetuneOptions

FAST = ("--steps", 4, "--batch-size", 4, "--learning-rate", 1e-2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("care"), layers=2)


@pytest.fixture(scope="module")
def importance(pair):
    run("probe", pair / "base", "-o", pair / "importance", "--num-samples", 4, "--seq-len", 12)
    return pair / "importance"


def finetune(folder, out, *more, expect=0):
    return run("finetune", folder / "base", "--data", folder / "data.jsonl", "-o", out, *FAST, *more, expect=expect)


def shares(base, out):
    one, two = read_tensors(base), read_tensors(out)
    return {name: float((one[name] != two[name]).double().mean()) for name in one}


def test_a_run_in_fewer_bits_leaves_what_is_frozen_as_it_is(pair, importance, tmp_path):
    more = ("--dtype", "bfloat16", "--method", "dowser", "--importance", importance)
    found = json.loads(finetune(pair, tmp_path / "out", *more, "--json").stdout)
    moved = shares(pair / "base", tmp_path / "out")
    assert moved["model.embed_tokens.weight"] == moved["lm_head.weight"] == moved["model.norm.weight"] == 0
    assert all(share <= 0.101 for share in moved.values())
    assert 0.01 < found["moved"] / found["numel"] <= 0.1


def test_tensors_of_another_dtype_than_the_run_stay_where_they_are_frozen(pair, tmp_path):
    folder = shutil.copytree(pair, tmp_path / "pair")
    tensors = load_file(folder / "base" / "model.safetensors")
    wide = ("embed", "norm", "layers.0")
    kept = {n: v if any(word in n for word in wide) else v.bfloat16() for n, v in tensors.items()}
    save_file(kept, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "base" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    finetune(folder, tmp_path / "out", "--last-layers", 1)
    moved = shares(folder / "base", tmp_path / "out")
    assert {name for name, share in moved.items() if share} <= {n for n in moved if "layers.1." in n}
    assert moved["model.layers.1.mlp.up_proj.weight"] > 0.5


def written(base, trained, folder, name="model.safetensors"):
    """What ``write_outcome`` makes of tensors before and after training: its report and the tensors in its folder."""
    for role, tensors in (("base", base), ("trained", trained)):
        (folder / role).mkdir()
        save_file(tensors, folder / role / name, metadata={"format": "pt"})
    facts = {"base": "b", "method": "full", "trained": [], "unscored": {"n": "no scores"}, "losses": [(2, 1.5)]}
    facts |= {"steps": 2, "examples": 3, "tokens": 50, "learnt_tokens": 40, "seconds": 1.5}
    facts |= {"peak_memory_bytes": 7, "peak_cuda_bytes": None}
    with Checkpoint.open(folder / "base") as opened:
        how = (opened, {}, FinetuneOptions(), folder / "trained", folder / "out")
        report = write_outcome(*how, {"run": "r"}, facts, {})
    return report, load_file(folder / "out" / name)


def test_an_outcome_is_the_bases_but_for_what_training_moved(tmp_path):
    base = {
        "moved": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "sign": torch.tensor([-0.0, 1.0], dtype=torch.bfloat16),
        "coarse": torch.tensor([256.0], dtype=torch.bfloat16),
        "finer": torch.tensor([1 + 2**-20, 1 + 2**-20, 2.0]),  # than bfloat16, in which it was trained
        "endless": torch.tensor([torch.inf, 2.0]),
        "count": torch.tensor([1, 2]),
        "empty": torch.zeros(0),
    }
    trained = {
        "moved": torch.tensor([1.0, 2.0, 3.0, 7.0]),
        "sign": torch.tensor([0.0, 1.0]),
        "coarse": torch.tensor([1 + 2**-7]),
        "finer": torch.tensor([1.0, 1.5, 2.0], dtype=torch.bfloat16),
        "endless": torch.tensor([torch.inf, 5.0]),
        "count": torch.tensor([3, 4]),
        "empty": torch.zeros(0),
    }
    report, out = written(base, trained, tmp_path)
    wanted = base | {"moved": trained["moved"], "endless": trained["endless"]}
    wanted |= {name: trained[name].bfloat16() for name in ("sign", "coarse")}
    wanted["finer"] = torch.tensor([1 + 2**-20, 1.5, 2.0])
    assert {name: (value.dtype, bits(value)) for name, value in out.items()} == {
        name: (value.dtype, bits(value)) for name, value in wanted.items()
    }
    found = {change.name: change for change in report.tensors}
    assert found.keys() == base.keys() - {"count"}
    assert found["moved"] == TensorChange("moved", 4, moved=1, change=pytest.approx(9.0), base=pytest.approx(30.0))
    assert (found["moved"].share, found["moved"].drift) == (0.25, pytest.approx(0.3**0.5))
    assert (found["sign"].moved, found["sign"].change) == (1, 0.0)
    assert found["coarse"].change == pytest.approx((255 - 2**-7) ** 2, rel=1e-9)
    assert (found["finer"].moved, found["finer"].change) == (1, pytest.approx((0.5 - 2**-20) ** 2))
    assert (found["endless"].moved, found["endless"].change, found["endless"].base) == (1, 9.0, 4.0)
    assert (found["empty"].share, found["empty"].drift) == (0.0, 0.0)


def test_the_report_in_an_output_is_that_of_its_run(tmp_path):
    base = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}
    report, _ = written(base, {"a": torch.tensor([3.0, 7.0]), "b": torch.tensor([16.0])}, tmp_path)
    read = FinetuneReport.read(tmp_path / "out" / FINETUNE_FILE)
    assert read.to_dict() | {"losses": [[2, 1.5]]} == report.to_dict()
    assert (report.moved, report.numel, report.drift) == (2, 3, pytest.approx(5 / 13))
    assert (report.steps, report.examples, report.tokens, report.learnt_tokens) == (2, 3, 50, 40)
    assert (report.losses, report.unscored, report.seconds) == ([[2, 1.5]], {"n": "no scores"}, 1.5)
    assert (report.peak_memory_bytes, report.peak_cuda_bytes, report.identity) == (7, None, {"run": "r"})


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3.3e38])
def test_a_trained_value_that_the_bases_dtype_cannot_hold_is_refused(tmp_path, value):
    with pytest.raises(NumericalError, match="NaN or infinity in tensor 'a'"):
        written({"a": torch.ones(2, dtype=torch.float16)}, {"a": torch.tensor([1.0, value])}, tmp_path)


def test_the_memory_of_a_fine_tune_is_counted_by_what_takes_it():
    """Of 10 trained entries in bfloat16, in a model of 40 bytes, with an optimiser that holds 80."""
    common = {"weights": 40, "gradients": 20, "optimiser": 80}
    wanted = {
        "full": {},
        "spider": {"base's copy": 20, "accumulated gradient": 40},
        "l2": {"base's copy": 20},
        "dowser": {"mask": 2, "copy for a step": 20},
    }
    for method, more in wanted.items():
        assert memory_of(method, 40, 10, 2, 80, puts_back=True) == common | more
    assert memory_of("dowser", 40, 10, 2, None, puts_back=False) == {"weights": 40, "gradients": 20, "mask": 2}


def test_a_base_in_float16_is_trained_in_float32(tmp_path):
    pair = make_pair(tmp_path / "pair", dtype=torch.float16)
    found = json.loads(finetune(pair, tmp_path / "out", "--json").stdout)
    assert found["losses"][-1][1] < found["losses"][0][1]
    assert {value.dtype for value in read_tensors(tmp_path / "out").values()} == {torch.float16}
    data = ("--data", pair / "data.jsonl", "-o", tmp_path / "again")
    refused("finetune", pair / "base", *data, *FAST, "--dtype", "float16", mentions=["epsilon"])


def test_a_state_that_is_no_numbers_is_not_kept(pair, tmp_path, monkeypatch):
    from tailorcli.training import trainer

    original = trainer.Guard.on_step_end

    def spoilt(self, args, state, control, **given):
        if state.global_step == 3:
            next(given["model"].parameters()).data[0] = float("nan")
        original(self, args, state, control, **given)

    monkeypatch.setattr(trainer.Guard, "on_step_end", spoilt)
    command = ("finetune", pair / "base", "--data", pair / "data.jsonl", "-o", tmp_path / "out", *FAST)
    shown = refused(*command, "--save-every", 1, mentions=["weights are no numbers in step 3", "of step 2"])
    assert "--resume" not in shown
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / f"out{SUFFIX}")
    shown = refused(*command, mentions=["no state was saved before it"])  # at the end alone
    assert str(tmp_path / f"out{SUFFIX}") not in shown
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "hub_token: hf_secret": "hub_token",
    "push_to_hub: true": "uploads nothing",
    "save_only_model: true": "no run could go on",
    "disable_tqdm: false": "progress",
    "eval_strategy: steps": "refuses these TrainingArguments",
    "lr_scheduler_type: cosine_with_min_lr": "refuses these TrainingArguments",
    "optim: galore_adamw": "refuses these TrainingArguments",
    "max_grad_norm: abc": "refuses these TrainingArguments",
    "optim: foo": "refuses these TrainingArguments",
}


@pytest.mark.parametrize("text", REFUSED)
def test_arguments_that_are_refused_late_leave_nothing_behind(pair, tmp_path, text):
    (tmp_path / "args.yaml").write_text(text + "\n")
    command = ("finetune", pair / "base", "--data", pair / "data.jsonl", "-o", tmp_path / "out", *FAST)
    shown = refused(*command, "--training-args", tmp_path / "args.yaml", mentions=[REFUSED[text]])
    assert "hf_secret" not in shown
    assert [file.name for file in tmp_path.iterdir()] == ["args.yaml"]


def test_the_plan_is_of_the_dtype_that_runs_and_counts_the_steps_that_are_made(tmp_path):
    pair = make_pair(tmp_path / "pair", dtype=torch.bfloat16)
    entries = sum(value.numel() for value in read_tensors(pair / "base").values())
    command = ("finetune", pair / "base", "--data", pair / "data.jsonl", "-o", tmp_path / "out")
    more = ("--epochs", 0.25, "--batch-size", 8, "--json")
    plan = json.loads(run(*command, *more, "--dry-run").stdout)
    assert plan["memory"]["weights"] == 2 * entries
    assert plan["steps"] == json.loads(run(*command, *more).stdout)["steps"] == 2
    shutil.rmtree(tmp_path / "out")
    for name, said in (("foo", "foo"), ("galore_adamw_layerwise", "moves weights outside of its steps")):
        (tmp_path / "args.yaml").write_text(f"optim: {name}\n")
        more = ("--training-args", tmp_path / "args.yaml", "--method", "half")
        refused(*command, *more, "--dry-run", mentions=[said])


HELD = {
    "": "adamw_torch",
    "optim: sgd": "sgd",
    "optim: sgd\noptim_args: momentum=0.9": "sgd",
    "optim: adafactor": "adafactor",
    "optim: adagrad": "adagrad",
    "optim: rmsprop": "rmsprop",
}


@pytest.mark.parametrize("text", HELD)
def test_the_plan_counts_what_the_optimiser_holds(pair, importance, tmp_path, text):
    """As much as that of a Trainer after a step; dowser has a copy of the weights beside those that it puts back."""
    (tmp_path / "args.yaml").write_text(text or "lr_scheduler_type: constant\n")
    command = ("finetune", pair / "base", "--data", pair / "data.jsonl", "-o", tmp_path / "out", *FAST, "--dry-run")
    more = ("--training-args", tmp_path / "args.yaml", "--json", "--dtype", "bfloat16")
    plan = json.loads(run(*command, *more).stdout)
    network = AutoModelForCausalLM.from_pretrained(pair / "base", dtype=torch.bfloat16)
    arguments = {"optim_args": "momentum=0.9"} if "momentum" in text else {}
    made = TrainingArguments(
        str(tmp_path / "t"), optim=HELD[text], max_steps=1, report_to="none", use_cpu=True, **arguments
    )
    row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    trainer = Trainer(network, made, train_dataset=[row])
    SparseTuning("full").attach(trainer)
    trainer.train()
    held = [value for state in trainer.optimizer.state.values() for value in state.values()]
    expected = sum(value.nbytes for value in held if isinstance(value, torch.Tensor) and value.dim())
    assert plan["memory"]["optimiser"] == expected
    assert plan["uncounted"] == ""
    plan = json.loads(run(*command, *more, "--method", "dowser", "--importance", importance).stdout)
    numel = plan["memory"]["gradients"] // 2
    copy = {} if HELD[text] in ("adamw_torch", "sgd") else {"copy for a step": 2 * numel}
    assert {name: size for name, size in plan["memory"].items() if name == "copy for a step"} == copy


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "adagrad"])
def test_the_plan_says_where_it_is_not_known_what_the_optimiser_holds(pair, tmp_path, monkeypatch, name):
    """As of one whose kernels run on one device alone."""

    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.optim.Adagrad, "step", fail)
    (tmp_path / "args.yaml").write_text(f"optim: {name}\noptim_target_modules: all-linear\n")
    command = ("finetune", pair / "base", "--data", pair / "data.jsonl", "-o", tmp_path / "out", *FAST, "--dry-run")
    more = ("--training-args", tmp_path / "args.yaml")
    plan = json.loads(run(*command, *more, "--json").stdout)
    assert (plan["uncounted"], plan["memory"].keys()) == (name, {"weights", "gradients"})
    shown = " ".join(run(*command, *more).stdout.split())
    assert f"and activations and what the optimiser {name} holds: weights" in shown


def test_values_out_of_range_are_refused(pair, importance, tmp_path):
    command = ("finetune", pair / "base", "--data", pair / "data.jsonl")
    out = ("-o", tmp_path / "out")
    for seed in (-1, 1 << 32):
        refused(*command, *out, "--seed", seed, mentions=["seed must be from 0"])
    refused("probe", pair / "base", *out, "--seed", 1 << 64, mentions=["seed must be from 0"])
    refused(*command, "-o", "/", mentions=["cannot be an output's folder"])
    refused(*command, "-o", ".", mentions=["exists and is not empty"])
    dowser = ("--method", "dowser", "--importance", importance)
    refused(*command, *out, *dowser, "--update-ratio", 1e-9, mentions=["no entry to train"])
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_masked_words_is_refused(tmp_path):
    pair = make_family_pair(tmp_path, "bert")
    data = ("--data", pair / "data.jsonl", "-o", tmp_path / "out")
    refused("finetune", pair / "base", *data, mentions=["MaskedLM"])


def test_a_classifier_is_refused(tmp_path):
    """Its loss is of classes: tokens as labels ended in a traceback."""
    pair = make_family_pair(tmp_path, "bert")
    config = AutoConfig.from_pretrained(pair / "base")
    BertForSequenceClassification(config).save_pretrained(pair / "base")
    data = ("--data", pair / "data.jsonl", "-o", tmp_path / "out")
    shown = refused("finetune", pair / "base", *data, mentions=["BertForSequenceClassification"])
    assert "train classifiers" in shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_that_hears_is_frozen(tmp_path, dtype):
    pair = make_family_pair(tmp_path, "whisper", dtype)
    plan = json.loads(finetune(pair, tmp_path / "out", "--dry-run", "--json").stdout)
    assert plan["tokens"] >= plan["learnt_tokens"]
    finetune(pair, tmp_path / "out")
    moved = shares(pair / "base", tmp_path / "out")
    assert not any(share for name, share in moved.items() if ".encoder." in name)
    assert any(share for name, share in moved.items() if ".decoder.layers" in name)


def test_sound_without_what_is_said_in_it_is_refused(tmp_path):
    """The decoder would learn to write nothing."""
    pair = make_family_pair(tmp_path, "whisper")
    records = [json.loads(line) for line in (pair / "data.jsonl").read_text().splitlines()]
    lines = [json.dumps({"audio": record["audio"], "sentence": record["response"]}) for record in records]
    (pair / "named.jsonl").write_text("\n".join(lines))
    what = ("finetune", pair / "base", "--steps", 1, "--data")
    refused(*what, pair / "named.jsonl", "-o", tmp_path / "out", mentions=["no response"])
    refused("calibrate", pair / "base", "--data", pair / "named.jsonl", "-o", tmp_path / "s", mentions=["no response"])
    run(*what, pair / "data.jsonl", "-o", tmp_path / "response")
    for option in ("--response-column", "--text-column"):
        run(*what, pair / "named.jsonl", option, "sentence", "-o", tmp_path / option)
        for name, value in read_tensors(tmp_path / "response").items():
            assert bits(read_tensors(tmp_path / option)[name]) == bits(value)


def test_pictures_without_a_text_are_not_learnt(tmp_path):
    """Else the line end behind a picture's mark would be."""
    pytest.importorskip("PIL")
    pair = make_family_pair(tmp_path, "llava")
    (pair / "named.jsonl").write_text(json.dumps({"image": "images/0.png", "caption": "A cup."}))
    what = ("finetune", pair / "base", "--steps", 1, "--data", pair / "named.jsonl", "-o", tmp_path / "out")
    refused(*what, mentions=["no record has a token to train on"])
    run(*what, "--text-column", "caption", "--dry-run")


def test_a_trainer_that_makes_its_model_anew_is_refused(pair, tmp_path):
    arguments = TrainingArguments(tmp_path / "run", report_to="none", use_cpu=True)
    trainer = Trainer(model_init=lambda: AutoModelForCausalLM.from_pretrained(pair / "base"), args=arguments)
    with pytest.raises(OptionsError, match="model_init"):
        SparseTuning("half").attach(trainer)


def test_the_card_says_what_was_done_and_how_to_do_it_again(tmp_path):
    pair = make_pair(tmp_path / "pair")
    run("probe", pair / "base", "--num-samples", "2", "--seq-len", "8", "-o", tmp_path / "importance")
    how = ("--method", "dowser", "--update-ratio", "0.2", "--steps", "2", "--seq-len", "16", "--learning-rate", "0.01")
    given = ("--data", pair / "data.jsonl", "--importance", tmp_path / "importance", *how)
    run("finetune", pair / "base", *given, "-o", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert is_ours(card.encode())
    assert "This model is `base` after fine-tuning on `data.jsonl`. Of each layer the 20% of the entries" in card
    report = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert f"40 records of data.jsonl, {report['learnt_tokens']} of {report['tokens']} tokens learnt" in card
    _, *words = shlex.split(card.split("```sh\n")[1].split("```")[0].replace("\\\n", ""))
    paths = {"base": pair / "base", "data.jsonl": pair / "data.jsonl", "importance": tmp_path / "importance"}
    run(*(str(paths.get(word, word)) for word in words[:-1]), tmp_path / "again")
    assert read_tensors(tmp_path / "again").keys() == read_tensors(tmp_path / "out").keys()
    for name, value in read_tensors(tmp_path / "again").items():
        assert value.equal(read_tensors(tmp_path / "out")[name])


def test_a_dataset_of_the_hub_is_named_in_front(pair):
    facts = {"steps": 1, "examples": 2, "tokens": 3, "learnt_tokens": 3}
    with Checkpoint.open(pair / "base") as base:
        for data, front, command in (
            ("org/data:train", "datasets:\n- org/data\n", "--data org/data:train"),
            ("-", "", "--data -"),
            (pair / "data.jsonl", "", "--data data.jsonl"),
        ):
            card = bytes(side_files_of(base, FinetuneOptions(trainable=("*mlp*",)), Given(data), facts)["README.md"])
            assert front.encode() in card
            assert (b"datasets" in card) == bool(front)
            assert f"tailorcli finetune base {command} --trainable '*mlp*' -o OUT".encode() in card


def test_inspect_shows_what_was_trained(pair, tmp_path):
    finetune(pair, tmp_path / "out", "--trainable", "*up_proj*")
    shown = json.loads(run("inspect", tmp_path / "out", "--json", "--html", tmp_path / "page.html").stdout)
    report = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert shown["kind"] == "fine-tuned"
    assert shown["facts"]["share moved"] == report["moved"] / report["numel"]
    assert [shown["facts"][f"loss at {end}"] for end in ("first", "last")] == [
        report["losses"][0][1],
        report["losses"][-1][1],
    ]
    moved = {each["name"]: each["moved"] for each in shown["tensors"]}
    assert {name for name, share in moved.items() if share > 0} == {name for name in moved if "up_proj" in name}
    assert "fine-tuned by the method full for 4 steps" in (tmp_path / "page.html").read_text()
    words = run("inspect", tmp_path / "out", "--tensors").stdout
    assert re.search(r"0\.mlp\.up_proj +F32 +48×32 +6\.1 kB +100\.0% +\d", words)


def test_the_card_of_the_base_is_not_that_of_what_was_trained(tmp_path):
    pair = make_pair(tmp_path / "pair")
    card = "---\nbase_model: some/ancestor\nlicense: mit\n---\n# The base\n"
    (pair / "base" / "README.md").write_text(card)
    finetune(pair, tmp_path / "out")
    own = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in own
    assert "ancestor" not in own
    assert (tmp_path / "out" / "BASE_README.md").read_text() == card
    run("patch", pair / "base", tmp_path / "out", "--method", "changed", "-o", tmp_path / "patched")
    said = (tmp_path / "patched" / "README.md").read_text()
    assert "tailorcli patch base out --method changed" in said
    assert "license: mit" in said
    assert "ancestor" not in said


def test_one_glob_may_be_a_string(tmp_path):
    arguments = TrainingArguments(tmp_path / "run", report_to="none", use_cpu=True)
    tuning = SparseTuning("half", trainable="*layers.1.mlp*").attach(Trainer(make_model("llama"), arguments))
    assert tuning.names
    assert all("layers.1.mlp" in name for name in tuning.names)


def test_losses_of_a_run_that_went_on_are_those_of_an_unbroken_one(pair, tmp_path, monkeypatch):
    more = ("--steps", 12, "--save-every", 8)
    whole = json.loads(finetune(pair, tmp_path / "whole", *more, "--json").stdout)
    with interrupted_when_saved(monkeypatch, lambda state: state.global_step == 8):
        finetune(pair, tmp_path / "out", *more, expect=130)
    found = json.loads(finetune(pair, tmp_path / "out", *more, "--resume", "--json").stdout)
    assert found["losses"] == whole["losses"]
    assert [step for step, _ in found["losses"]] == [1, 8, 10, 12]


def test_a_second_run_is_told_of_the_one_that_is_at_work(pair, tmp_path):
    command = ["finetune", pair / "base", "--data", pair / "data.jsonl", "-o", tmp_path / "out", *FAST]
    words = [sys.executable, "-m", "tailorcli", *map(str, [*command, "--steps", 5000])]
    with subprocess.Popen(words, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL) as first:
        try:
            while not (tmp_path / f"out{SUFFIX}" / "run.json").exists():
                assert first.poll() is None
                time.sleep(0.05)
            refused(*command, "--steps", 5000, mentions=["another run is writing"])
        finally:
            first.kill()


def test_pictures_are_made_when_they_are_asked_for(tmp_path):
    from tailorcli.data.records import read_records
    from tailorcli.models.loading import load_encoder
    from tailorcli.options import CalibrateOptions
    from tailorcli.training.examples import encode_examples

    pair = make_family_pair(tmp_path, "llava")
    encoder = load_encoder(pair / "base", pair / "base", True, CalibrateOptions())
    records = read_records(pair / "data.jsonl")
    found = encode_examples(records, encoder, 512)
    assert all({"input_ids", "labels"} == set(tokens) for tokens in found.tokens)
    seen = [inputs for inputs in found.inputs if "pixel_values" in inputs]
    assert len(seen) == sum(record.has_media for record in records) > 0
    first = next(place for place, record in enumerate(records) if record.has_media)
    again = encoder.encode(records[first], 512)
    assert torch.equal(found.inputs[first]["pixel_values"], again["pixel_values"])
    ids = again["input_ids"]
    assert torch.equal(found.inputs[first]["input_ids"][:, : ids.shape[1]], ids)  # an end of text may follow


def test_a_run_is_not_taken_up_with_another_picture(tmp_path, monkeypatch):
    pair = make_family_pair(tmp_path, "llava")
    command = ("--steps", 3, "--batch-size", 2, "--save-every", 1)
    with interrupted_when_saved(monkeypatch):
        finetune(pair, tmp_path / "out", *command, expect=130)
    image, *others = pair.rglob("*.png")
    image.write_bytes(next(file.read_bytes() for file in others if file.read_bytes() != image.read_bytes()))
    data = ("--data", pair / "data.jsonl", "-o", tmp_path / "out", *FAST, *command)
    refused("finetune", pair / "base", *data, "--resume", mentions=["other options, inputs or versions"])


def test_what_is_trained_may_be_named_as_it_is_stored_or_tied(tmp_path):
    pair = make_family_pair(tmp_path / "llava", "llava")
    name = next(n for n in read_tensors(pair / "base") if "layers.1.mlp.up_proj" in n and "vision" not in n)
    finetune(pair, tmp_path / "out", "--trainable", name.replace("up_proj", "*"))
    moved = {n for n, share in shares(pair / "base", tmp_path / "out").items() if share}
    assert moved == {name.replace("up_proj", part) for part in ("up_proj", "gate_proj", "down_proj")}
    pair = make_pair(tmp_path / "tied", tied=True)
    finetune(pair, tmp_path / "table", "--trainable", "lm_head*")
    moved = {n for n, share in shares(pair / "base", tmp_path / "table").items() if share}
    assert moved == {"model.embed_tokens.weight"}


def test_a_run_that_was_ended_behind_its_last_step_makes_no_further_one(pair, tmp_path, monkeypatch):
    more = ("--method", "spider", "--save-every", 2)
    finetune(pair, tmp_path / "whole", *more)
    with interrupted_when_saved(monkeypatch, lambda state: state.global_step == state.max_steps):
        finetune(pair, tmp_path / "out", *more, expect=130)
    finetune(pair, tmp_path / "out", *more, "--resume")
    one, two = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "out")
    assert all(bits(one[name]) == bits(two[name]) for name in one)
    whole, found = (json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("whole", "out"))
    assert (found["steps"], found["losses"]) == (whole["steps"], whole["losses"])
