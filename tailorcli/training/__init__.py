"""What trains weights: the kept entries of a patch, and a model on a new task so that it forgets less."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["SparseTuning"]

if TYPE_CHECKING:
    from tailorcli.training.sparse import SparseTuning


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tailorcli.training import sparse  # waits: it imports torch and transformers

    return getattr(sparse, name)
