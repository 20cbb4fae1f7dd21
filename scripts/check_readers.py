"""Whether an output of tailorcli is read where people use it: transformers, PEFT, llama.cpp's converter, vLLM.

    python scripts/check_readers.py OUT [--llama-cpp DIR] [--work DIR]
    python scripts/check_readers.py --tiny [--llama-cpp DIR]

OUT is a checkpoint that patch, apply or merge-multi wrote; with --tiny outputs of several families are made, of tiny
random models with a SentencePiece tokenizer (that needs the sentencepiece package). DIR is a checkout of llama.cpp.
A line is printed for each check: ok, not checked and why, or FAILED. The exit code is 1 if anything failed.

What is checked:

- transformers: every weight is taken, none is missing, each has the file's very value; saved anew it is the same.
- PEFT: a LoRA adapter is put on it, trained a step, saved, loaded onto it again: the same outputs, merged, too.
- llama.cpp: convert_hf_to_gguf.py takes it, and gives tensor for tensor, bit for bit, what it gives of the copy that
  transformers saved.
- vLLM: its config takes it, it knows the architecture, and its reader of weights yields every tensor once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class NotCheckedError(Exception):
    """A check that cannot be made here, and why."""


def load_all(out: Path) -> Any:
    """The model, every weight of it from the files and no file's weight left over."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(out)
    kind = getattr(transformers, config.architectures[0])
    model, told = kind.from_pretrained(out, dtype="auto", output_loading_info=True)
    wrong = {name: found for name, found in told.items() if found}
    if wrong:
        raise AssertionError(f"not all weights are read: {wrong}")
    torch.manual_seed(0)
    return model.eval()


def stored(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint folder, by the safetensors library itself."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def raw(tensor: Any) -> bytes:
    """A tensor's bytes."""
    import torch

    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def check_transformers(out: Path, work: Path) -> str:
    """Load, compare with the files, save anew into ``work``/copy, compare again."""
    model = load_all(out)
    files = stored(out)
    held = {name: value for name, value in model.state_dict().items() if name in files}
    for name, value in held.items():
        assert raw(value) == raw(files[name]), f"{name} is not the file's"
    model.save_pretrained(work / "copy")
    copy = stored(work / "copy")
    assert copy.keys() == files.keys(), sorted(copy.keys() ^ files.keys())
    for name, value in copy.items():
        assert raw(value) == raw(files[name]), f"{name} changed when it was saved anew"
    for file in out.iterdir():
        if file.is_file() and not (work / "copy" / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, work / "copy")
    (work / "copy" / "model.safetensors.index.json").unlink(missing_ok=True)
    return f"{type(model).__name__}, {len(files)} tensors, {len(held)} of them compared by name"


def check_peft(out: Path, work: Path) -> str:
    """A LoRA adapter on the output: trained a step, saved, loaded again, merged."""
    import torch

    if importlib.util.find_spec("peft") is None:
        raise NotCheckedError("peft is not installed")
    from peft import LoraConfig, PeftModel, get_peft_model

    model = load_all(out).float()
    tokens = torch.arange(8).remainder(model.config.get_text_config().vocab_size)[None]
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2))
    loss = adapted(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01).step()
    with torch.no_grad():
        wanted = adapted(input_ids=tokens).logits
        adapted.save_pretrained(work / "adapter")
        again = PeftModel.from_pretrained(load_all(out).float(), work / "adapter")
        assert torch.equal(again(input_ids=tokens).logits, wanted), "the adapter loaded again gives other outputs"
        merged = again.merge_and_unload()(input_ids=tokens).logits
        assert torch.allclose(merged, wanted, atol=1e-3), "merged it gives other outputs"
    return f"LoRA on {sum('lora_A' in name for name, _ in adapted.named_parameters())} layers"


def gguf_of(folder: Path, file: Path, llama_cpp: Path) -> dict[str, tuple[Any, ...]]:
    """What llama.cpp's converter makes of a folder: each tensor's type, shape and bytes."""
    converter = llama_cpp / "convert_hf_to_gguf.py"
    command = [sys.executable, str(converter), str(folder), "--outfile", str(file), "--outtype", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"it does not convert {folder.name}: {done.stderr.strip().splitlines()[-1]}")
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    from gguf import GGUFReader

    return {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in GGUFReader(file).tensors}


def check_llama_cpp(out: Path, work: Path, llama_cpp: Path | None) -> str:
    """Converted, it has the same tensors as the copy that transformers saved."""
    if llama_cpp is None:
        raise NotCheckedError("no checkout of llama.cpp was named: --llama-cpp DIR")
    ours = gguf_of(out, work / "ours.gguf", llama_cpp)
    copy = gguf_of(work / "copy", work / "copy.gguf", llama_cpp)
    assert ours.keys() == copy.keys(), sorted(ours.keys() ^ copy.keys())
    for name, value in ours.items():
        assert value == copy[name], f"{name} differs"
    return f"{len(ours)} tensors in GGUF, equal to those of the copy"


def check_vllm(out: Path, work: Path) -> str:
    """What vLLM does before a GPU is asked for: config, architecture, and its reader of the weights."""
    if importlib.util.find_spec("vllm") is None:
        raise NotCheckedError("vllm is not installed")
    from vllm import ModelRegistry
    from vllm.config import ModelConfig
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    config = ModelConfig(model=str(out), tokenizer=str(out), skip_tokenizer_init=True)
    _, name = ModelRegistry.inspect_model_cls(config.architectures, config)
    files = [str(file) for file in sorted(out.glob("*.safetensors"))]
    found = [(name, raw(value)) for name, value in safetensors_weights_iterator(files, use_tqdm_on_load=False)]
    wanted = {name: raw(value) for name, value in stored(out).items()}
    assert len(found) == len(wanted), "a tensor is there twice"
    assert dict(found) == wanted, "its reader gives other weights"
    return f"{name}, {len(found)} tensors read"


def tiny_outputs(work: Path) -> Iterator[tuple[str, Path]]:
    """Patched tiny models of families whose tokenizers are SentencePiece models, with one that is trained here."""
    import random

    try:
        import sentencepiece
    except ImportError:
        raise SystemExit("--tiny trains tokenizers: pip install sentencepiece") from None
    import torch
    import transformers as tr

    from tailorcli import PatchOptions, patch_checkpoint

    words = ["".join(random.Random(n).choices("abcdefghij", k=5)) for n in range(400)]
    (work / "text").write_text("\n".join(" ".join(words[n : n + 8]) for n in range(0, 400, 4)))
    settings = {"vocab_size": 120, "model_type": "bpe", "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(work / "text"), model_prefix=str(work / "tokenizer"), **settings)
    size = sentencepiece.SentencePieceProcessor(model_file=str(work / "tokenizer.model")).vocab_size()
    common = {"vocab_size": size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    common |= {"max_position_embeddings": 128, "pad_token_id": 0}
    families = {
        "Llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**common)),
        "Llama, tied": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**common, tie_word_embeddings=True)),
        "Mistral": lambda: tr.MistralForCausalLM(tr.MistralConfig(**common)),
        "Mixtral": lambda: tr.MixtralForCausalLM(tr.MixtralConfig(**common, num_local_experts=4)),
        "Gemma 2": lambda: tr.Gemma2ForCausalLM(tr.Gemma2Config(**common, head_dim=16)),
        "Phi-3": lambda: tr.Phi3ForCausalLM(tr.Phi3Config(**common)),
    }
    for title, make in families.items():
        folder = work / title.replace(" ", "-").replace(",", "")
        for name, seed in (("base", 0), ("tuned", 1)):
            torch.manual_seed(0)
            model = make()
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(seed * 0.02 * torch.randn(parameter.shape))
            model.to(torch.bfloat16).save_pretrained(folder / name)
            shutil.copy(work / "tokenizer.model", folder / name)
        options = PatchOptions(solver="none", omega=1.0, max_shard_size=100_000)
        patch_checkpoint(folder / "base", folder / "tuned", folder / "out", options=options)
        yield title, folder / "out"


def check_all(title: str, out: Path, work: Path, llama_cpp: Path | None) -> dict[str, str]:
    """Every check of one output, each told in a line; gives what each said."""
    checks: dict[str, Callable[[], str]] = {
        "transformers": lambda: check_transformers(out, work),
        "PEFT": lambda: check_peft(out, work),
        "llama.cpp": lambda: check_llama_cpp(out, work, llama_cpp),
        "vLLM": lambda: check_vllm(out, work),
    }
    told = {}
    for name, check in checks.items():
        try:
            told[name] = f"ok: {check()}"
        except NotCheckedError as reason:
            told[name] = f"not checked: {reason}"
        except Exception as error:  # whatever a reader raises is what this is to find
            told[name] = f"FAILED: {type(error).__name__}: {error}"
        print(f"{title}: {name}: {told[name]}", flush=True)
    return told


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    if (given.out is None) != given.tiny:
        parser.error("pass OUT or --tiny")
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        outputs = tiny_outputs(work) if given.tiny else iter([(given.out.name, given.out)])
        told = {}
        for number, (title, out) in enumerate(outputs):
            (work / f"checks-{number}").mkdir()
            told[title] = check_all(title, out, work / f"checks-{number}", given.llama_cpp)
    failed = sum(line.startswith("FAILED") for lines in told.values() for line in lines.values())
    print(json.dumps({"failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
