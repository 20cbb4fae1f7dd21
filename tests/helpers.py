"""Tiny random checkpoints, and a dense float64 reading of the paper to compare with."""

import atexit
import functools
import hashlib
import json
import os
import random
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

CHARACTERS = [chr(code) for code in range(32, 127)]


def make_tokenizer(chat_template=None):
    """One token a character; 0 is padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<unk>": 1} | {c: i + 2 for i, c in enumerate(CHARACTERS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>")),
        pad_token="<pad>",
        unk_token="<unk>",
    )
    if chat_template:
        tokenizer.chat_template = chat_template
    return tokenizer


def make_model(kind="llama", *, tied=False, seed=0, layers=2):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config)
    config = GPT2Config(
        vocab_size=100, n_embd=32, n_layer=layers, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config)


def perturb(model, *, seed=1, scale=0.02):
    """A stand-in for fine-tuning: every parameter moves a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


@functools.cache
def _made_once(make, settings):
    """A folder that ``make`` filled, and the state of the random numbers that it left."""
    folder = Path(tempfile.mkdtemp(prefix="tailorcli-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make(folder, *settings)
    return folder, torch.get_rng_state()


def copy_of(make, folder, *settings):
    """``folder`` as ``make(folder, *settings)`` fills it, which is done once in a process."""
    made, state = _made_once(make, settings)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    torch.set_rng_state(state)
    return Path(folder)


def make_pair(folder, kind="llama", *, dtype=torch.float32, shard=None, tied=False, layers=2):
    """``folder``/base, ``folder``/tuned and ``folder``/data.jsonl."""
    return copy_of(_make_pair, folder, kind, dtype, shard, tied, layers)


def _make_pair(folder, kind, dtype, shard, tied, layers):
    tokenizer = make_tokenizer()
    sharding = {"max_shard_size": shard} if shard else {}
    model = make_model(kind, tied=tied, layers=layers)
    model.to(dtype).save_pretrained(folder / "base", **sharding)
    model = perturb(make_model(kind, tied=tied, layers=layers)).to(dtype)
    model.save_pretrained(folder / "tuned")
    for name in ("base", "tuned"):
        tokenizer.save_pretrained(folder / name)
    write_data(folder / "data.jsonl")


def with_statistics(folder):
    """``folder`` with statistics of both models over 12 samples each: stats, and retain of what the base writes."""
    from tailorcli import CalibrateOptions, calibrate_model

    calibrate_model(folder / "tuned", folder / "data.jsonl", folder / "stats", CalibrateOptions(12, 24))
    calibrate_model(folder / "base", None, folder / "retain", CalibrateOptions(12, 24, synthetic=True))
    return folder


def swap_two_letters(folder):
    """A model's tokenizer gives "a" and "b" each other's number."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))


def write_data(path, count=40, seed=0):
    generator = random.Random(seed)
    with Path(path).open("w") as stream:
        for _ in range(count):
            text = "".join(generator.choice(CHARACTERS[33:90]) for _ in range(generator.randrange(5, 50)))
            stream.write(json.dumps({"text": text}) + "\n")


def read_tensors(folder):
    """Every tensor of a checkpoint folder, by the safetensors library itself."""
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def report_of(folder):
    """The report of a patch, as it lies in its output."""
    return json.loads((folder / "tailor_report.json").read_text())


def shares_moved(before, after):
    """Of each tensor, the share of entries that are not the same in both."""
    return {name: float((before[name] != after[name]).double().mean()) for name in before}


def folder_digest(folder, skip=("tailor_run.json",)):
    """A hash of every file of a folder, by relative name; the run record holds times and is left out."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file() and file.name not in skip
    }


def bits(tensor):
    """The bytes of a tensor, for comparisons to the bit."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def random_hessian(size, tokens=None, seed=0, decay=0.5):
    """A Gram matrix of correlated inputs, float32, as calibration would give."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    x = torch.randn(tokens or 4 * size, size, generator=generator, dtype=torch.float64) * spectrum @ basis
    return (2.0 / x.shape[0] * x.T @ x).float()


def random_layer(rows, columns, seed):
    """The weights (rows, columns) of base and tuned."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator)
    return base, base + 0.1 * torch.randn(rows, columns, generator=generator)


def do_not_wait_for_the_disk():
    """Let what is flushed go no further than the system for the rest of this process, which holds it until it crashes.

    Only a failure of the power would show the difference, and each flush waits for milliseconds.
    """

    def flush(file):
        os.fstat(file if isinstance(file, int) else file.fileno())  # raises where it is not open, as a flush does

    for name in ("fsync", "fdatasync"):
        if hasattr(os, name):
            setattr(os, name, flush)


@contextmanager
def broken_off(writer, after):
    """Within it, a writer's class (``CheckpointWriter``, ``PatchWriter``) fails after so many tensors."""
    import tailorcli.checkpoint.journal

    original, count = writer._write_now, [0]

    def failing(self, *arguments):
        count[0] += 1
        if count[0] > after:
            raise RuntimeError("stop")
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tailorcli.checkpoint.journal, "_SYNC_BYTES", 1)  # small tensors: journal each of them
        patched.setattr(writer, "_write_now", failing)
        with pytest.raises(RuntimeError, match="stop"):
            yield


def count_mapped_files(monkeypatch):
    """The files in which tensors are mapped from now on: a list that grows."""
    files, original = [], torch.from_file

    def counting(name, **options):
        files.append(Path(name))
        return original(name, **options)

    monkeypatch.setattr(torch, "from_file", counting)
    return files


class Oracle:
    """Dense float64 NumPy versions of the equations, written for plainness and not for speed."""

    @staticmethod
    def damped(hessian, damping):
        h = np.asarray(hessian, dtype=np.float64)
        return h + damping * np.mean(np.diag(h)) * np.eye(len(h))

    @staticmethod
    def sensitivity(delta, hessian, damping):
        inverse = np.linalg.inv(Oracle.damped(hessian, damping))
        return np.asarray(delta, np.float64) ** 2 / (2 * np.diag(inverse))

    @staticmethod
    def fused(delta, hessian, damping, omega):
        def minmax(score):
            return (score - score.min()) / (score.max() - score.min())

        salience = np.abs(np.asarray(delta, np.float64))
        return omega * minmax(salience) + (1 - omega) * minmax(Oracle.sensitivity(delta, hessian, damping))

    @staticmethod
    def mask(score, count):
        order = np.argsort(-score.reshape(-1), kind="stable")
        mask = np.zeros(score.size, dtype=bool)
        mask[order[:count]] = True
        return mask.reshape(score.shape)

    @staticmethod
    def joint(delta, mask, hessian, damping):
        """The optimal change of the layer, row by row, by a dense solve."""
        a, d = Oracle.damped(hessian, damping), np.asarray(delta, np.float64)
        change = np.zeros_like(d)
        for row in range(d.shape[0]):
            kept = np.flatnonzero(mask[row])
            if kept.size:
                change[row, kept] = np.linalg.solve(a[np.ix_(kept, kept)], (d[row] @ a)[kept])
        return change

    @staticmethod
    def sequential(delta, mask, hessian, damping):
        """Theorem 4.5 column by column: OBS updates with the inverse of what is still free."""
        a, d = Oracle.damped(hessian, damping), np.array(delta, np.float64)
        inverse = np.linalg.inv(a)
        for column in range(d.shape[1]):
            error = np.where(mask[:, column], 0.0, d[:, column]) / inverse[column, column]
            d -= np.outer(error, inverse[column])  # W -= error * H^-1, only columns still free are nonzero
            inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        return np.where(mask, d, 0.0)

    @staticmethod
    def error(change, delta, hessian, damping=0.0):
        """The layer objective, Eq. 5, on the (damped) Hessian."""
        gap = np.asarray(change, np.float64) - np.asarray(delta, np.float64)
        return float(np.einsum("oi,ij,oj->", gap, Oracle.damped(hessian, damping), gap))


def invoke(*arguments):
    """Run a command within this process; whatever it does is in the result."""
    from typer.testing import CliRunner

    from tailorcli.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments, expect=0):
    """Run a command that must end with the exit code ``expect``."""
    result = invoke(*arguments)
    assert result.exit_code == expect, result.output + repr(result.exception)
    return result


def refused(*arguments, mentions=(), output=None):
    """Run a command that must fail with one clear error; returns what it wrote to standard error."""
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1, result.output
    shown = result.stderr
    assert shown.count("error: ") == 1, shown
    assert "Traceback" not in shown
    message, _, hint = shown.partition("error: ")[2].partition("\n  try: ")
    for word in mentions:
        assert str(word) in message, shown
    assert hint.strip() or "must" in message, f"no hint: {shown}"  # "density must lie between 0 and 1" says it all
    assert result.stdout == ""
    if output is not None:
        assert_nothing_loads(output)
    return shown


def mutate_json(value, generator):
    """The same JSON value with one place in it replaced, removed, or given another name."""
    places = []

    def walk(node):
        if isinstance(node, dict | list):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                walk(node[key])

    walk(value)
    node, key = generator.choice(places)
    action = generator.random()
    if action < 0.7:
        node[key] = deepcopy(generator.choice(ODD_VALUES))  # which the next mutation may change
    elif action < 0.85:
        del node[key]
    elif isinstance(node, dict):
        node[generator.choice(["dtype", "shape", "__metadata__", "extra", ""])] = node.pop(key)
    else:
        node.append(node[key])
    return value


def mutate_bytes(content, generator, within):
    """The same bytes with a few of the first ``within`` flipped, or cut, or with some put in."""
    data = bytearray(content)
    action = generator.random()
    if action < 0.6:
        for _ in range(generator.randrange(1, 5)):
            data[generator.randrange(within)] = generator.randrange(256)
    elif action < 0.8:
        del data[generator.randrange(len(data)) :]
    elif action < 0.9:
        start = generator.randrange(within)
        del data[start : start + generator.randrange(1, 30)]
    else:
        start = generator.randrange(within)
        data[start:start] = generator.randbytes(generator.randrange(1, 30))
    return bytes(data)


def make_adapter(folder, kind="llama", *, dtype=torch.float32, tied=False, layers=2, shard=None, seed=2, **settings):
    """``folder``/base, ``folder``/adapter and ``folder``/merged: PEFT's own merge, in float32."""
    from peft import LoraConfig, get_peft_model

    folder = Path(folder)
    model = make_model(kind, layers=layers, tied=tied).to(dtype)
    if kind == "gpt2":
        perturb(model)  # biases and norms start as zeros and ones
    sharding = {"max_shard_size": shard} if shard else {}
    model.save_pretrained(folder / "base", **sharding)
    make_tokenizer().save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model.float(), LoraConfig(**({"r": 4} | settings)))
        randomize(adapted, seed)
        adapted.save_pretrained(folder / "adapter")
        adapted.merge_and_unload().save_pretrained(folder / "merged")
    make_tokenizer().save_pretrained(folder / "merged")
    return folder


def assert_nothing_loads(folder):
    from tailorcli import Checkpoint, Stats, TailorError

    for opener in (Checkpoint, Stats):
        with pytest.raises(TailorError):
            opener.open(folder)


ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 4, 7, 1 << 31, 1 << 61, 1 << 64, 1 << 200, -(1 << 70), 0.0, 1.5, 1e300),
    *(float("nan"), float("inf"), "", "F32", "BF16", "F4", "BOOL", "\0", "\ud800", "é", [], {}, [0], [0, 0]),
    *([0, 4], [4, 0], [1 << 61] * 3, [[]], [None], ["0", "4"], {"a": {}}, {"dtype": "F32"}),
]


def randomize(model, seed=2):
    """What training would do to a fresh adapter, whose B is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


FP8_BLOCK = 16  # rows and columns that share a scale


def scales_of(weight, kind):
    """float32 scales in the layout of ``kind``, and the same spread over every entry (O, I)."""
    rows, columns = weight.shape
    if kind == "tensor":
        scale = (weight.abs().amax() / 448).reshape(1)
        return scale, scale.expand(rows, columns)
    if kind == "channel":
        scale = weight.abs().amax(1, keepdim=True) / 448
        return scale, scale.expand(rows, columns)
    padded = torch.zeros(-(-rows // FP8_BLOCK) * FP8_BLOCK, -(-columns // FP8_BLOCK) * FP8_BLOCK)
    padded[:rows, :columns] = weight.abs()
    scale = padded.reshape(-(-rows // FP8_BLOCK), FP8_BLOCK, -(-columns // FP8_BLOCK), FP8_BLOCK).amax((1, 3)) / 448
    spread = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)[:rows, :columns]
    return scale, spread


def quantise(folder, kind):
    """The linear weights of a checkpoint as FP8 codes with scales; gives what each then stands for, in float32."""
    from safetensors.torch import save_file

    stored, values = {}, {}
    for name, weight in read_tensors(folder).items():
        if not name.endswith("proj.weight"):
            stored[name] = weight
            continue
        scale, spread = scales_of(weight.float(), kind)
        codes = (weight.float() / spread).to(torch.float8_e4m3fn)
        stored[name] = codes
        stored[name + ("_scale_inv" if kind == "block" else "_scale")] = scale
        values[name] = codes.float() * spread
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = (
        {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK], "activation_scheme": "dynamic"}
        if kind == "block"
        else {"quant_method": "compressed-tensors", "format": "float-quantized"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return values


def write_stats(folder, hessians, tensors, facts):
    """A whole folder of statistics: Hessians (name, info, values) already packed, what each tensor uses, the facts."""
    from tailorcli.calibration.stats_writer import StatsWriter

    ready = list(hessians)
    with StatsWriter(folder, [name for name, _, _ in ready]) as writer:
        for name, info, values in ready:
            writer.write(name, info, values)
        writer.finish(tensors, facts)


@contextmanager
def interrupted_when_saved(monkeypatch, at=lambda state: True):
    """Ctrl-C as soon as ``finetune`` has marked a state as whole, the first that ``at`` is true of."""
    from tailorcli.training.trainer import Guard

    original = Guard.on_save

    def broken(self, args, state, control, **given):
        original(self, args, state, control, **given)
        if at(state):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Guard, "on_save", broken)
        yield
