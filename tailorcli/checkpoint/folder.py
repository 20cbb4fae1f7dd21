"""Safetensors checkpoints: open by their headers, read tensor by tensor, fingerprint.

Files are read with ``pread`` into fresh buffers rather than mapped, so that resident memory is what is in use
and not what the kernel has cached. Nothing here unpickles anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import threading
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tailorcli.checkpoint.bits import bit_type_of
from tailorcli.checkpoint.header import SAVE_AGAIN, TensorInfo, damaged, read_header, torch_dtype
from tailorcli.errors import CheckpointError
from tailorcli.files import PathLike, read_json, require_file, unreadable
from tailorcli.system import open_for_reading, read_at

if TYPE_CHECKING:
    from torch import Tensor

    from tailorcli.checkpoint.bits import Bits

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PIECE_BYTES = 1 << 24  # of a tensor that is worked on in pieces
WORK_FOLDER = ".tailorcli"  # there while an output of ours is unfinished

_SAMPLE_BYTES = 4096  # read at the start, the middle and the end of a tensor for its fingerprint


class Checkpoint:
    """A folder with ``model.safetensors``, or shards and their index, opened by headers alone.

    ``tensors`` maps every name to its TensorInfo in file order; ``shards`` lists the files. Use it as a context
    manager, or call ``close``. Reading is safe from several threads.
    """

    is_found = True  # whether from_pretrained finds the tensors in the folder
    absent: frozenset[str] = frozenset()  # names of its counterpart's tensors that it lacks and need not have
    dequantized = False  # whether tensors read as other numbers than their files hold

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], shards: list[Path]) -> None:
        self.path = path
        self.tensors = tensors
        self.shards = shards
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()
        self._fingerprint: str | None = None
        self._equal: dict[tuple[str, str], bool] = {}  # what are_equal found

    @classmethod
    def open(cls, path: PathLike) -> Checkpoint:
        """Open the checkpoint in folder ``path``. Raises CheckpointError with what is wrong and where."""
        folder = Path(path)
        try:
            if not folder.is_dir():
                if folder.suffix.lower() == GGUF and folder.is_file():
                    raise gguf_error(folder)
                kind = "a file, not a folder" if folder.exists() else "not there"
                raise CheckpointError(f"{folder} is {kind}", "pass the folder that save_pretrained wrote")
            if (folder / SINGLE_FILE).exists():
                tensors, _ = read_header(folder / SINGLE_FILE)
                return cls(folder, tensors, [folder / SINGLE_FILE])
            if (folder / INDEX_FILE).exists():
                return cls(folder, *_open_shards(folder))
            if (shards := _shards_without_index(folder)) is not None:
                checkpoint = cls(folder, _in_all(shards), shards)
                checkpoint.is_found = False
                return checkpoint
            raise _no_weights(folder)
        except OSError as error:
            raise unreadable(folder, error) from error

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def output_tensors(self) -> dict[str, TensorInfo]:
        """The tensors as an output with this base stores them, which ``read_into`` knows, too."""
        return self.tensors

    @property
    def scales(self) -> frozenset[str]:
        """Names of tensors that say what the codes of quantised weights stand for: never to be patched."""
        return frozenset()

    def rounded(self, name: str, value: Tensor, mask: Tensor) -> Tensor:
        """What ``value`` is once it is stored: the value itself unless the output is quantised."""
        return value

    def encode(self, name: str, value: Tensor, mask: Tensor) -> Tensor:
        """What an output stores for ``value``: the value itself unless it is quantised."""
        return value

    def decoded(self, name: str, stored: Tensor) -> Tensor:
        """The value of what ``encode`` gave."""
        return stored

    def read_cost(self, name: str) -> int:
        """Bytes that ``read`` takes from the disk."""
        return self.tensors[name].nbytes

    def read(self, name: str, pinned: bool = False) -> Tensor:
        """One tensor in its stored dtype, on the CPU, in memory of its own; ``pinned`` for faster copies to a GPU.

        Raises CheckpointError.
        """
        import torch

        info = self.tensors[name]
        dtype = torch_dtype(info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"tensor {name!r} has dtype {info.dtype}, which torch cannot hold", "leave it out with --exclude"
            )
        raw = torch.empty(info.nbytes, dtype=torch.uint8, pin_memory=pinned)
        if info.nbytes:
            self.read_into(info, raw.numpy().data, 0)
        return raw.view(dtype).view(info.shape)

    def read_bits(self, name: str) -> Bits:
        """The entries of one tensor (numel,) as integers of their width, in memory of their own: torch is not needed.

        Raises CheckpointError.
        """
        import numpy as np

        info = self.tensors[name]
        kind = bit_type_of(info)
        raw = np.empty(info.nbytes, np.uint8)
        if info.nbytes:
            self.read_into(info, raw.data, 0)
        return raw.view(kind)

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``start`` on.

        Raises CheckpointError for a file that cannot be read or is cut off.
        """
        done = 0
        while done < len(buffer):
            try:
                count = read_at(self._descriptor(info.file), buffer[done:], info.offset + start + done)
            except OSError as error:
                raise unreadable(info.file, error) from error
            if count == 0:
                raise damaged(info.file, f"it ends inside tensor {info.name!r}")
            done += count

    def fingerprint(self) -> str:
        """A hash over every tensor's name, dtype, shape and a sample of its bytes; the sharding does not matter.

        It tells models apart (fine-tuning moves nearly every tensor) without reading all of their bytes; it is
        no proof of equality.
        """
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            for name in sorted(self.tensors):
                info = self.tensors[name]
                digest.update(json.dumps([name, info.dtype, info.shape]).encode())
                digest.update(self.sample_bytes(info))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def tensor_fingerprint(self, info: TensorInfo) -> str:
        """A hash of one tensor's name, dtype, shape and a sample of its bytes."""
        digest = hashlib.blake2b(json.dumps([info.name, info.dtype, info.shape]).encode(), digest_size=16)
        digest.update(self.sample_bytes(info))
        return digest.hexdigest()

    def pieces(self, info: TensorInfo, size: int = PIECE_BYTES) -> Iterator[memoryview]:
        """A tensor's bytes in order, up to ``size`` at a time, in a buffer that the next piece overwrites."""
        buffer = bytearray(min(size, info.nbytes))
        for start in range(0, info.nbytes, size):
            piece = memoryview(buffer)[: min(size, info.nbytes - start)]
            self.read_into(info, piece, start)
            yield piece

    def sample_bytes(self, info: TensorInfo) -> bytes:
        """Up to 4 KiB from the start, the middle and the end of a tensor."""
        length = min(_SAMPLE_BYTES, info.nbytes)
        starts = sorted({0, (info.nbytes - length) // 2, info.nbytes - length})
        sample = bytearray()
        for start in starts:
            part = bytearray(length)
            self.read_into(info, memoryview(part), start)
            sample += part
        return bytes(sample)

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are of one dtype and shape and hold the same bytes; found out once."""
        first, second = self.tensors[name], self.tensors[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        pair = (name, other)
        if pair not in self._equal:
            if type(self).read is Checkpoint.read:
                pieces = zip(self.pieces(first), self.pieces(second), strict=True)
                alike = self.sample_bytes(first) == self.sample_bytes(second)
                self._equal[pair] = alike and all(mine == theirs for mine, theirs in pieces)
            else:  # formed as a whole
                self._equal[pair] = self.read(name).equal(self.read(other))
        return self._equal[pair]

    def _descriptor(self, file: Path) -> int:
        with self._opening:  # two threads that read a file first would open it twice, and close it once
            if file not in self._descriptors:
                self._descriptors[file] = open_for_reading(file)
            return self._descriptors[file]

    def close(self) -> None:
        """Close the files."""
        with self._opening:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shards_without_index(folder: Path) -> list[Path] | None:
    """All of model-00001-of-00002.safetensors and its kin, where the index was lost; None where any is missing.

    An output that is being written, or cleared for another, is none.
    """
    if (folder / WORK_FOLDER).exists():
        return None
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    count = len(shards)
    complete = [folder / f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return shards if count and shards == complete else None


def _in_all(shards: list[Path]) -> dict[str, TensorInfo]:
    """The tensors of shards that no index tells about. Raises CheckpointError for a name that is in two of them."""
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(shard)[0].items():
            if name in tensors:
                what = (
                    f"{tensors[name].file} and {shard} both hold tensor {name!r}, and no {INDEX_FILE} says which counts"
                )
                raise CheckpointError(what, SAVE_AGAIN)
            tensors[name] = info
    return tensors


def _open_shards(folder: Path) -> tuple[dict[str, TensorInfo], list[Path]]:
    """Every tensor that the index maps, from the shard that it names."""
    index_path = folder / INDEX_FILE
    index = read_json(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map", SAVE_AGAIN)
    for file_name in weight_map.values():
        if not _is_shard_name(file_name):
            what = f"{reprlib.repr(file_name)}, which is no .safetensors file inside its folder"
            raise CheckpointError(f"{index_path} names {what}", SAVE_AGAIN)
    tensors: dict[str, TensorInfo] = {}
    shards: list[Path] = []
    for file_name in dict.fromkeys(weight_map.values()):
        shard = folder / file_name
        if not shard.is_file():
            raise CheckpointError(f"{index_path} names {file_name!r}, which is missing", "download it again")
        found, _ = read_header(shard)
        for name in found:
            if weight_map.get(name) != file_name:
                raise CheckpointError(
                    f"{shard} holds tensor {name!r}, which {INDEX_FILE} does not place there", SAVE_AGAIN
                )
        tensors.update(found)
        shards.append(shard)
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{index_path} lists tensor {missing[0]!r}, which no shard holds ({len(missing)} such)", SAVE_AGAIN
        )
    return tensors, shards


def _is_shard_name(value: Any) -> bool:
    """A .safetensors file in the folder or below it: no absolute path, no "..", nothing hidden."""
    if not isinstance(value, str):
        return False
    path = PurePosixPath(value)
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix == ".safetensors" and not path.is_absolute() and not hidden


def _no_weights(folder: Path) -> CheckpointError:
    """The error for a folder without safetensors weights, by what it holds instead."""
    names = {entry.name for entry in folder.iterdir()}
    if "adapter_config.json" in names:
        return CheckpointError(
            f"{folder} holds an adapter, not a checkpoint",
            "an adapter can be TUNED, after its BASE; for a checkpoint of its own merge it into its base: "
            "PeftModel.merge_and_unload(), then save_pretrained",
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return CheckpointError(
            f"{folder} holds pickled weights, which are never loaded",
            "convert once, where you trust the file: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR, safe_serialization=True)",
        )
    if any(name.endswith(".part") for name in names):
        return CheckpointError(
            f"{folder} is an unfinished output of tailorcli", "finish it with the same command and --resume"
        )
    quantised = sorted(name for name in names if name.lower().endswith(GGUF))
    if quantised:
        return gguf_error(folder / quantised[0])
    weights = (SINGLE_FILE, INDEX_FILE, "adapter_model.safetensors")
    inside = [at for at in folder.glob("checkpoint-*") if any((at / name).exists() for name in weights)]
    hint = "pass the folder that save_pretrained wrote"
    if inside:  # a Trainer's output folder
        last = max(inside, key=lambda at: (len(at.name), at.name))
        hint = f"pass {last}" if len(inside) == 1 else f"pass one of its {len(inside)} checkpoints, such as {last}"
    return CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}", hint)


def gguf_error(file: Path) -> CheckpointError:
    """A GGUF file is not what is patched, but what is made of the result."""
    return CheckpointError(
        f"{file} is a GGUF file, which tailorcli does not read",
        "pass the safetensors checkpoint that it was made from; llama.cpp's convert_hf_to_gguf.py converts the result",
    )


GGUF = ".gguf"
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".part"),
    *(".safetensors.index.json", ".bin.index.json"),
)
_STATE_SUFFIXES = (*WEIGHT_SUFFIXES, ".distcp", ".onnx_data", ".ot", ".tflite", ".pkl")
# The card of what lies in a folder, and those of the models that it was made of.
CARDS = (CARD, TUNED_CARD, BASE_CARD) = ("README.md", "TUNED_README.md", "BASE_README.md")
_TRAINING_STATE = ("trainer_state.json", "tailor_run.json", "tailor_report.json", "tailor_evaluation.json")
_SKIPPED_FOLDERS = ("checkpoint-", "global_step", "runs", "original", "__pycache__", ".")

# What the loaders of transformers and its kin look for beside weights, and what a reader of the folder does.
_SIDE_FILES = (
    *("*config*.json", "modules.json", "normalizer.json", "*processor*.json", "*.py", "requirements*.txt"),
    *("chat_template*", "*.jinja", "*.jinja2", "speaker_embeddings_path.json"),
    *("tokenizer*", "*vocab*", "merges*", "special_tokens_map*.json", "added_tokens*.json", "tekken.json", "dict*.txt"),
    *("*.model", "*.spm", "*.tiktoken", "*.bpe", "*.bpe.*", "bpe.codes", "spiece*", "sentencepiece*", "word_*.json"),
    *("README*", "LICEN[CS]E*", "COPYING*", "NOTICE*", "USE_POLICY*"),
)


def side_files(folder: Path) -> Iterator[Path]:
    """Config, tokenizer, templates, custom code, licence: relative paths of what a loader, or a reader, looks for.

    Nothing else is taken along: no weights in any format, no training state, no statistics; and nothing of a folder
    inside that holds weights of its own, as an export to another format.
    Raises CheckpointError where a pipe or a device lies among them: whoever copies it would wait without end.
    """
    for place in other_files(folder):
        if any(fnmatchcase(place.name, pattern) for pattern in _SIDE_FILES):
            require_file(folder / place)
            yield place


def other_files(folder: Path) -> Iterator[Path]:
    """Relative paths of all that is no weight and no training state."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(_SKIPPED_FOLDERS))
        if Path(root) != folder and any(name.endswith(_STATE_SUFFIXES) for name in files):
            folders[:] = []
            continue
        for name in sorted(files):
            if not name.endswith(_STATE_SUFFIXES) and name not in _TRAINING_STATE and not name.startswith("."):
                yield (Path(root) / name).relative_to(folder)
