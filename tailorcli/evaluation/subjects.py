"""What can be evaluated: a checkpoint's folder, an adapter on its base, a patch file on its base.

None of them is merged on the disk: a network is loaded from the base, and what changes is formed in memory.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailorcli.adapters.checkpoint import AdaptedCheckpoint, is_adapter, named_base, tokenizer_folder
from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.quantized import DequantizedCheckpoint, fp8_scales, open_checkpoint
from tailorcli.errors import CheckpointError, OptionsError
from tailorcli.files import PathLike, ScratchFolder, as_output_error
from tailorcli.models.config import processor_folder, read_config
from tailorcli.models.loading import load_model
from tailorcli.models.names import aliases, expected_names
from tailorcli.models.naming import open_for
from tailorcli.models.parts import adapt
from tailorcli.models.places import map_names
from tailorcli.options import LoadOptions
from tailorcli.patchfile.reader import SUFFIX, PatchFile
from tailorcli.patchfile.view import PatchedCheckpoint, side_sources, write_side_files


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: ``checkpoint`` is the model itself, ``stored`` what its network is loaded from.

    They are the same but for an adapter, whose changes are applied to the network of its base.
    """

    path: Path  # as it was named
    checkpoint: Checkpoint
    stored: Checkpoint

    def encoder_folder(self, has_media: bool) -> Path:
        """Where its tokenizer or processor lies: it may lie with an adapter."""
        return processor_folder(tokenizer_folder(self.checkpoint), self.stored.path, has_media)

    def load(self, options: LoadOptions) -> Any:
        """The network on the CPU. Raises CheckpointError."""
        network = load_model(self.stored, read_config(self.stored.path), options)
        if isinstance(self.checkpoint, AdaptedCheckpoint):
            expected = expected_names(network, self.stored.tensors)
            places = map_names(self.stored, dict(network.named_parameters()), aliases(network), expected)
            adapt(network, self.checkpoint, places)
        return network


def open_subject(path: PathLike, base: PathLike | None, stack: ExitStack) -> Subject:
    """A model by its path, open as long as ``stack``; ``base`` is what adapters and patch files are on.

    An adapter without ``base`` takes the local folder that it names. Raises TailorError.
    """
    model = Path(path)
    if is_patch(model):
        if base is None:
            raise OptionsError(f"{model} is a patch file: its base is needed", "pass its base: --base BASE")
        return _patched(model, Path(base), stack)
    if is_adapter(model):
        stored = stack.enter_context(open_checkpoint(named_base(model) if base is None else base))
        return Subject(model, stack.enter_context(open_for(stored, model)), stored)
    if not model.is_dir():
        hint = "pass the folder that save_pretrained wrote, an adapter's, or a patch file"
        raise CheckpointError(f"there is no model folder {model}", hint)
    checkpoint = stack.enter_context(Checkpoint.open(model))
    if scales := fp8_scales(checkpoint):  # what is quantised in another way is transformers' to load
        checkpoint = DequantizedCheckpoint(checkpoint, scales)
    return Subject(model, checkpoint, checkpoint)


def is_patch(path: Path) -> bool:
    """Whether a path is a file as patch files are."""
    return path.suffix == SUFFIX and path.is_file()


def needs_base(path: PathLike) -> bool:
    """Whether a model is nothing without its base: an adapter, or a patch file."""
    return is_patch(Path(path)) or is_adapter(path)


def _patched(path: Path, base: Path, stack: ExitStack) -> Subject:
    """A base with a patch file in place; its side files, config and tokenizer go into a temporary folder."""
    file = stack.enter_context(PatchFile.open(path))
    opened = stack.enter_context(Checkpoint.open(base))
    file.check_base(opened)
    file.check()
    folder = stack.enter_context(ScratchFolder())
    side, _ = side_sources(opened, file)
    try:
        write_side_files(side, folder)
    except OSError as error:
        raise as_output_error(folder, error) from error
    view = PatchedCheckpoint(folder, opened, file)
    return Subject(path, view, view)
