"""Tiny random checkpoints of many model families, with their processors and calibration data.

Every model is built to run in milliseconds: two layers a part, 32 wide, images of 28 by 28. What is saved
beside them is a complete folder, which ``AutoProcessor`` (or ``AutoTokenizer``, ``AutoImageProcessor``) reads
without a network and without torchvision.
"""

import json
import random
import wave
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers as tr
from helpers import CHARACTERS, copy_of, make_tokenizer, perturb, write_data
from torch import Tensor

VOCAB = 116
IMAGE = 28  # pixels; Qwen2.5-VL takes multiples of it
QUERIES = 4  # tokens of InstructBLIP's Q-Former
RATE = 16000
BYTES = [chr(288) if c == " " else c for c in CHARACTERS]  # byte-level tokenizers write a space as "Ġ"

# How each processor marks an image in a prompt; InstructBLIP's puts its tokens in front by itself.
IMAGE_MARKS = {
    "llava": "<image>",
    "qwen2.5-vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3-vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "paligemma": "<image>",
}
SOUND_MARK = "<|audio_bos|><|AUDIO|><|audio_eos|>"  # Qwen2-Audio's
PALIGEMMA_VOCAB = 1280  # its processor adds 1,024 places and 128 segments to the tokenizer

LLAVA_TEMPLATE = """\
{%- for message in messages %}{{ message['role'] | upper }}: \
{%- if message['content'] is string %}{{ message['content'] }}{% else %}\
{%- for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}\
{%- endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""

QWEN_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message['role'] }}{{ '\\n' }}\
{%- if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{%- if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{%- endfor %}{% endif %}<|im_end|>{{ '\\n' }}{% endfor %}\
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"""

GEMMA_TEMPLATE = """\
{%- for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\
{{ '\\n' }}{%- if message['content'] is string %}{{ message['content'] }}{% else %}\
{%- for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}\
{%- endif %}{% endfor %}{% endif %}<end_of_turn>{{ '\\n' }}{% endfor %}\
{%- if add_generation_prompt %}<start_of_turn>model{{ '\\n' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """One model family; the caller of ``make`` sets the seed before."""

    name: str
    kind: str  # "text", "encoder-decoder", "vision", "multimodal", "speech", "hearing"
    make: Callable[[], tr.PreTrainedModel]
    save_processor: Callable[[Path], object]
    inputs: Callable[[], dict[str, Tensor]]


# Tokenizers: one token a character, as in helpers, and special tokens behind them.


def tokenizer_with(extra=(), *, named=None, chat_template=None, **roles):
    """``extra`` are plain special tokens, ``named`` ones get an attribute, ``roles`` are ``eos_token`` and the like."""
    from tokenizers import Tokenizer, models

    every = ["<pad>", "<unk>", *CHARACTERS, "\n", *roles.values(), *(named or {}).values(), *extra]
    assert len(every) <= VOCAB
    tokenizer = tr.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({t: i for i, t in enumerate(every)}, [], unk_token="<unk>")),
        pad_token="<pad>",
        unk_token="<unk>",
        **roles,
        extra_special_tokens=named or {},
    )
    if extra:
        tokenizer.add_tokens(list(extra), special_tokens=True)
    tokenizer.chat_template = chat_template
    return tokenizer


def qwen2_tokenizer():
    """Qwen's own class, which is what ``AutoTokenizer`` makes of a Qwen2 folder whatever was saved."""
    every = ["<pad>", "<unk>", *BYTES, "<|endoftext|>"]
    return tr.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(every)}, merges=[], pad_token="<pad>", unk_token="<unk>"
    )


def bert_tokenizer():
    return tokenizer_with(cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def seq2seq_tokenizer():
    return tokenizer_with(eos_token="</s>")


def llava_tokenizer():
    return tokenizer_with(
        named={"image_token": "<image>"}, chat_template=LLAVA_TEMPLATE, bos_token="<s>", eos_token="</s>"
    )


def instructblip_tokenizer():
    return tokenizer_with(["<image>"], bos_token="<s>", eos_token="</s>")


def qwen_tokenizer():
    return tokenizer_with(
        ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"],
        named={"image_token": "<|image_pad|>"},
        chat_template=QWEN_TEMPLATE,
        eos_token="<|im_end|>",
    )


def gemma_tokenizer():
    return tokenizer_with(
        ["<start_of_turn>", "<end_of_turn>"],
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        chat_template=GEMMA_TEMPLATE,
        bos_token="<bos>",
        eos_token="<eos>",
    )


def paligemma_tokenizer():
    return tokenizer_with(named={"image_token": "<image>"}, bos_token="<bos>", eos_token="<eos>")


def qwen_audio_tokenizer():
    extra = ["<|im_start|>", "<|audio_bos|>", "<|audio_eos|>"]
    return tokenizer_with(extra, named={"audio_token": "<|AUDIO|>"}, eos_token="<|im_end|>")


def whisper_tokenizer():
    """Whisper's own class: byte-level, its special tokens behind ``<|endoftext|>``."""
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    tokenizer = tr.WhisperTokenizer(
        vocab={token: i for i, token in enumerate(BYTES + special)}, merges=[], pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(special[1:], special_tokens=True)
    return tokenizer


# Processors


def save_tokenizer(build=make_tokenizer):
    return lambda folder: build().save_pretrained(folder)


def save_vit_processor(folder):
    tr.ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE}).save_pretrained(folder)


def save_dinov2_processor(folder):
    tr.BitImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}).save_pretrained(
        folder
    )


def save_llava_processor(folder):
    pixels = tr.CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}, do_center_crop=True
    )
    tokenizer = llava_tokenizer()
    tr.LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


def save_instructblip_processor(folder):
    tr.InstructBlipProcessor(
        tr.BlipImageProcessorPil(size={"height": IMAGE, "width": IMAGE}),
        instructblip_tokenizer(),
        bert_tokenizer(),
        num_query_tokens=QUERIES,
    ).save_pretrained(folder)


def save_qwen_processor(folder):
    pixels = tr.Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, size={"shortest_edge": IMAGE**2, "longest_edge": 4 * IMAGE**2}
    )
    tokenizer = qwen_tokenizer()
    if find_spec("torchvision") is None:
        # Qwen's own needs a video processor, which needs torchvision. This one treats images alike.
        processor = tr.PaddleOCRVLProcessor(pixels, tokenizer, chat_template=tokenizer.chat_template)
    else:
        video = tr.Qwen2VLVideoProcessor(patch_size=14, merge_size=2)
        processor = tr.Qwen2_5_VLProcessor(pixels, tokenizer, video, chat_template=tokenizer.chat_template)
    processor.save_pretrained(folder)


def save_gemma_processor(folder):
    tokenizer = gemma_tokenizer()
    tr.Gemma3Processor(
        tr.Gemma3ImageProcessorPil(size={"height": IMAGE, "width": IMAGE}),
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=4,
    ).save_pretrained(folder)


def save_paligemma_processor(folder):
    pixels = tr.SiglipImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
    pixels.image_seq_length = 4
    tr.PaliGemmaProcessor(pixels, paligemma_tokenizer()).save_pretrained(folder)


def save_whisper_processor(folder):
    features = tr.WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, chunk_length=1)
    tr.WhisperProcessor(features, whisper_tokenizer()).save_pretrained(folder)


def save_qwen_audio_processor(folder):
    features = tr.WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, chunk_length=1)
    tr.Qwen2AudioProcessor(features, qwen_audio_tokenizer()).save_pretrained(folder)  # its class has a chat template


# Models

DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = DECODER | {"num_key_value_heads": 2}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": 14,
}
GEMMA = GROUPED | {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


def make_gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return tr.GPT2LMHeadModel(tr.GPT2Config(vocab_size=VOCAB, **sizes, bos_token_id=None, eos_token_id=None))


def make_opt():
    sizes = {k: v for k, v in DECODER.items() if k != "intermediate_size"}
    return tr.OPTForCausalLM(tr.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32))


def make_lfm2():
    layers = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    return tr.Lfm2ForCausalLM(tr.Lfm2Config(**(GROUPED | layers), block_auto_adjust_ff_dim=False))


def make_qwen3_5():
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    heads |= {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    return tr.Qwen3_5ForCausalLM(tr.Qwen3_5TextConfig(**(GROUPED | layers), **heads))


def make_qwen3_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return tr.Qwen3MoeForCausalLM(tr.Qwen3MoeConfig(**GROUPED, head_dim=8, **experts))


def make_gpt_oss():
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tr.GptOssForCausalLM(
        tr.GptOssConfig(**GROUPED, head_dim=8, sliding_window=16, rope_parameters=rope, **experts)
    )


def make_jina():
    """With a bias of its output layer, and one of the fused qkv in the checkpoint, that are not zeros."""
    model = tr.JinaEmbeddingsV3ForMaskedLM(tr.JinaEmbeddingsV3Config(**DECODER, type_vocab_size=1))
    return perturb(model, scale=0.01)


def make_deepseek():
    """Projections of low rank (MLA), a dense layer and one of experts, of which one is shared."""
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
    sizes = {"moe_intermediate_size": 24, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    return tr.DeepseekV3ForCausalLM(tr.DeepseekV3Config(**DECODER | ranks | experts | sizes))


def make_t5():
    config = tr.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=98,
        decoder_start_token_id=0,
    )
    return tr.T5ForConditionalGeneration(config)


def make_bart():
    config = tr.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=98,
        forced_eos_token_id=None,
        decoder_start_token_id=98,
    )
    return tr.BartForConditionalGeneration(config)


def make_llava():
    tokenizer = llava_tokenizer()
    config = tr.LlavaConfig(
        vision_config=tr.CLIPVisionConfig(**TOWER, projection_dim=32),
        text_config=tr.LlamaConfig(**GROUPED),
        image_token_id=tokenizer.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=4,
    )
    return tr.LlavaForConditionalGeneration(config)


def make_instructblip():
    config = tr.InstructBlipConfig(
        vision_config=tr.InstructBlipVisionConfig(**TOWER, initializer_range=0.02),
        qformer_config=tr.InstructBlipQFormerConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        ),
        text_config=tr.LlamaConfig(**GROUPED),
        num_query_tokens=QUERIES,
        image_token_index=instructblip_tokenizer().convert_tokens_to_ids("<image>"),
    )
    return tr.InstructBlipForConditionalGeneration(config)


def make_qwen_vl():
    tokenizer = qwen_tokenizer()
    mrope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = tr.Qwen2_5_VLConfig(
        text_config=tr.Qwen2_5_VLTextConfig(**GROUPED, rope_parameters=mrope).to_dict(),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 2 * IMAGE,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return tr.Qwen2_5_VLForConditionalGeneration(config)


def make_qwen3_vl():
    tokenizer = qwen_tokenizer()
    mrope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = tr.Qwen3VLConfig(
        text_config=tr.Qwen3VLTextConfig(**GROUPED, head_dim=8, rope_parameters=mrope).to_dict(),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return tr.Qwen3VLForConditionalGeneration(config)


def make_gemma():
    tokenizer = gemma_tokenizer()
    config = tr.Gemma3Config(
        text_config=tr.Gemma3TextConfig(**GEMMA),
        vision_config=tr.SiglipVisionConfig(**(TOWER | {"patch_size": 7}), vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = tr.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # else zeros
    return model


def make_paligemma():
    tokenizer = paligemma_tokenizer()
    text = GROUPED | {"vocab_size": PALIGEMMA_VOCAB}
    config = tr.PaliGemmaConfig(
        text_config=tr.Gemma2Config(**text, head_dim=8, query_pre_attn_scalar=8, sliding_window=16).to_dict(),
        vision_config=tr.SiglipVisionConfig(**TOWER, vision_use_head=False, projection_dim=32).to_dict(),
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
        pad_token_id=0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tr.PaliGemmaForConditionalGeneration(config)


def make_whisper():
    tokenizer = whisper_tokenizer()
    config = tr.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=50,  # a second of sound
        max_target_positions=64,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
    )
    return tr.WhisperForConditionalGeneration(config)


def make_qwen_audio():
    tower = {
        "num_mel_bins": 16,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "max_source_positions": 50,  # a second of sound
    }
    config = tr.Qwen2AudioConfig(
        audio_config=tower,
        text_config=tr.Qwen2Config(**GROUPED).to_dict(),
        audio_token_index=qwen_audio_tokenizer().audio_token_id,
    )
    return tr.Qwen2AudioForConditionalGeneration(config)


# Inputs to compare outputs on


def token_ids(length=12, batch=2, seed=3):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def with_image(before, image, after):
    """Rows of tokens with the image's in the middle."""
    ids = token_ids(length=8, batch=2)
    middle = torch.tensor([[*before, *image, *after]]).expand(2, -1)
    return torch.cat([ids[:, :3], middle, ids[:, 3:]], dim=1)


def text_inputs():
    ids = token_ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seq2seq_inputs():
    return text_inputs() | {"decoder_input_ids": token_ids(length=7, seed=5)}


def vision_inputs():
    return {"pixel_values": noise(2, 3, IMAGE, IMAGE)}


def llava_inputs():
    ids = with_image([], [llava_tokenizer().image_token_id] * 4, [])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | vision_inputs()


def instructblip_inputs():
    image = instructblip_tokenizer().convert_tokens_to_ids("<image>")
    ids = torch.cat([torch.full((2, QUERIES), image), token_ids()], dim=1)
    asked = token_ids()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "qformer_input_ids": asked,
        "qformer_attention_mask": torch.ones_like(asked),
    } | vision_inputs()


def qwen_vl_inputs():
    """Two images of 28 by 56 pixels: 2 by 4 patches, merged to 2 tokens."""
    tokenizer = qwen_tokenizer()
    start, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    ids = with_image([start], [tokenizer.image_token_id] * 2, [end])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == tokenizer.image_token_id).int(),
        "pixel_values": noise(2 * 8, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2, 4], [1, 2, 4]]),
    }


def gemma_inputs():
    tokenizer = gemma_tokenizer()
    ids = with_image([tokenizer.boi_token_id], [tokenizer.image_token_id] * 4, [tokenizer.eoi_token_id])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (ids == tokenizer.image_token_id).long(),
    } | vision_inputs()


def paligemma_inputs():
    """The image and a prompt, which see one another, and an answer of three tokens."""
    ids = with_image([], [paligemma_tokenizer().image_token_id] * 4, [])
    kinds = torch.zeros_like(ids)
    kinds[:, -3:] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": kinds} | vision_inputs()


def whisper_inputs():
    return {"input_features": noise(2, 16, 100), "decoder_input_ids": token_ids(length=7, seed=5)}


def qwen_audio_inputs():
    heard = torch.full((2, 25), qwen_audio_tokenizer().audio_token_id)  # of 100 frames
    ids = torch.cat([token_ids(length=3), heard, token_ids(length=7, seed=5)], dim=1)
    mask = torch.ones(2, 100, dtype=torch.int32)
    return {"input_ids": ids, "input_features": noise(2, 16, 100), "feature_attention_mask": mask}


def _text(name, make, save=None, inputs=text_inputs):
    return Family(name, "text", make, save or save_tokenizer(), inputs)


_ALL = [
    _text("llama", lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPED))),
    _text("qwen2", lambda: tr.Qwen2ForCausalLM(tr.Qwen2Config(**GROUPED)), save_tokenizer(qwen2_tokenizer)),
    _text("qwen3", lambda: tr.Qwen3ForCausalLM(tr.Qwen3Config(**GROUPED, head_dim=8))),
    _text("gemma3-text", lambda: tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**GEMMA))),
    _text("qwen3.5-text", make_qwen3_5),
    _text("lfm2", make_lfm2),
    _text("gpt2", make_gpt2),
    _text("gpt-neox", lambda: tr.GPTNeoXForCausalLM(tr.GPTNeoXConfig(**DECODER))),
    _text("opt", make_opt),
    _text("phi3", lambda: tr.Phi3ForCausalLM(tr.Phi3Config(**GROUPED))),
    _text("bert", lambda: tr.BertForMaskedLM(tr.BertConfig(**DECODER)), save_tokenizer(bert_tokenizer)),
    _text("mixtral", lambda: tr.MixtralForCausalLM(tr.MixtralConfig(**GROUPED, num_local_experts=4))),
    _text("qwen3-moe", make_qwen3_moe),
    _text("gpt-oss", make_gpt_oss),
    _text("deepseek-v3", make_deepseek),
    _text("jina-v3", make_jina, save_tokenizer(bert_tokenizer)),
    Family("t5", "encoder-decoder", make_t5, save_tokenizer(seq2seq_tokenizer), seq2seq_inputs),
    Family("bart", "encoder-decoder", make_bart, save_tokenizer(seq2seq_tokenizer), seq2seq_inputs),
    Family(
        "vit",
        "vision",
        lambda: tr.ViTForImageClassification(tr.ViTConfig(**TOWER, num_labels=5)),
        save_vit_processor,
        vision_inputs,
    ),
    Family(
        "dinov2",
        "vision",
        lambda: tr.Dinov2Model(tr.Dinov2Config(**(TOWER | {"patch_size": 7}), mlp_ratio=2)),
        save_dinov2_processor,
        vision_inputs,
    ),
    Family("llava", "multimodal", make_llava, save_llava_processor, llava_inputs),
    Family("instructblip", "multimodal", make_instructblip, save_instructblip_processor, instructblip_inputs),
    Family("qwen2.5-vl", "multimodal", make_qwen_vl, save_qwen_processor, qwen_vl_inputs),
    Family("qwen3-vl", "multimodal", make_qwen3_vl, save_qwen_processor, qwen_vl_inputs),
    Family("gemma3", "multimodal", make_gemma, save_gemma_processor, gemma_inputs),
    Family("paligemma", "multimodal", make_paligemma, save_paligemma_processor, paligemma_inputs),
    Family("whisper", "speech", make_whisper, save_whisper_processor, whisper_inputs),
    Family("qwen2-audio", "hearing", make_qwen_audio, save_qwen_audio_processor, qwen_audio_inputs),
]
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


# Data


def _words(generator):
    return "".join(generator.choice(CHARACTERS[33:90]) for _ in range(generator.randrange(5, 41)))


def _write_images(folder, count=4):
    from PIL import Image

    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(count):
        height, width = [(28, 28), (30, 40), (28, 56), (61, 33)][i % 4]
        names.append(f"images/{i}.png")
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / names[-1])
    return names


def _write_audio(folder):
    generator = np.random.default_rng(0)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(12):
        names.append(f"audio/{i}.wav")
        time = np.arange(int(RATE * (0.2 + 0.8 * i / 11))) / RATE
        sound = 0.4 * np.sin(2 * np.pi * 220 * (i + 1) * time) + 0.1 * generator.standard_normal(time.size)
        with wave.open(str(folder / names[-1]), "wb") as stream:
            stream.setnchannels(1)
            stream.setsampwidth(2)
            stream.setframerate(RATE)
            stream.writeframes((sound.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return names


def _multimodal_records(name, images, generator):
    """Half of the prompts leave the image's token out; InstructBLIP takes no other and no text alone."""
    asked = [
        {"prompt": _words(generator), "response": _words(generator), "images": [images[i % len(images)]]}
        for i in range(7)
    ]
    if name not in IMAGE_MARKS:
        return asked + [asked[0] | {"response": _words(generator)} for _ in range(5)]
    marked = [
        {"prompt": IMAGE_MARKS[name] + _words(generator), "response": _words(generator), "images": [images[i]]}
        for i in range(3)
    ]
    chats = []
    for i in range(0 if name == "paligemma" else 2):  # it has no chat template
        parts = [{"type": "image", "path": images[i + 1]}, {"type": "text", "text": _words(generator)}]
        answer = [{"type": "text", "text": _words(generator)}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        chats.append({"messages": messages})
    return asked + marked + chats + [{"text": _words(generator)} for _ in range(2)]


def _heard_records(sounds, generator):
    """Sound in the middle of a text: half of the prompts leave its mark out, which then comes first."""
    asked = [{"audio": sound, "prompt": _words(generator), "response": _words(generator)} for sound in sounds[:5]]
    marked = [record | {"prompt": SOUND_MARK + record["prompt"]} for record in asked[:3]]
    two = {"audio": sounds[:2], "question": _words(generator), "answer": _words(generator)}
    chats = []
    for sound in sounds[5:7]:
        parts = [{"type": "audio", "path": sound}, {"type": "text", "text": _words(generator)}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": _words(generator)}]
        chats.append({"messages": messages})
    return [*asked, *marked, two, *chats, {"text": _words(generator)}]


def write_family_data(folder, name):
    """``folder``/data.jsonl for a family, and the files that it names."""
    folder, kind, generator = Path(folder), FAMILIES[name].kind, random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "text":
        write_data(folder / "data.jsonl", count=14)
        return folder / "data.jsonl"
    if kind == "encoder-decoder":
        records = [{"prompt": _words(generator), "response": _words(generator)} for _ in range(14)]
    elif kind == "vision":
        records = [{"images": [image]} for image in _write_images(folder, 12)]
    elif kind == "speech":
        records = [{"audio": sound, "response": _words(generator)} for sound in _write_audio(folder)]
    elif kind == "hearing":
        records = _heard_records(_write_audio(folder), generator)
    else:
        records = _multimodal_records(name, _write_images(folder), generator)
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "data.jsonl"


def make_family_model(name):
    torch.manual_seed(0)
    return FAMILIES[name].make().eval()


def make_family_pair(folder, name, dtype=torch.float32):
    """``folder``/base, ``folder``/tuned, and ``folder``/data.jsonl with its images or sounds."""
    return copy_of(_make_family_pair, folder, name, dtype)


def _make_family_pair(folder, name, dtype):
    for part in ("base", "tuned"):
        model = make_family_model(name)
        if part == "tuned":
            perturb(model)
            if name == "qwen2-audio":  # its tower's positions are sines, which no training moves, and stay at base
                fixed = make_family_model(name).model.audio_tower.embed_positions
                model.model.audio_tower.embed_positions.load_state_dict(fixed.state_dict())
        model.to(dtype).save_pretrained(folder / part)
        FAMILIES[name].save_processor(folder / part)
    write_family_data(folder, name)


def outputs(model, family):
    """The logits, or the last hidden state of a model without a head."""
    inputs = {
        key: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for key, value in family.inputs().items()
    }
    with torch.no_grad():
        result = model.eval()(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state
