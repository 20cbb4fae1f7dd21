"""Safetensors folders: read a tensor at a time, written at offsets that are known beforehand."""

from tailorcli.checkpoint.folder import Checkpoint
from tailorcli.checkpoint.header import TensorInfo

__all__ = ["Checkpoint", "TensorInfo"]
