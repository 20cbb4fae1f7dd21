"""How transformers is called: quietly, and where a model is built, by one thread at a time."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tailorcli._version import __version__
from tailorcli.device import Held
from tailorcli.errors import CheckpointError, first_line
from tailorcli.options import LoadOptions


def cannot_load(path: Path, config: dict[str, Any], error: Exception, options: LoadOptions) -> CheckpointError:
    """The user's error for a model that transformers refuses."""
    hint = "see that its config.json belongs to these weights and names an architecture of transformers"
    if "auto_map" in config and not options.trust_remote_code:
        hint = "pass --trust-remote-code if you trust its code"
    elif isinstance(error, ImportError):
        hint = "install the packages that it needs"
    elif "auto_map" in config:
        hint = "see that its own code fits this version of transformers, and its config.json these weights"
    return CheckpointError(f"transformers cannot load {path}: {first_line(error)}", hint)


def _hold_quiet() -> Callable[[], object]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def put_back() -> None:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

    return put_back


quiet_transformers = Held(_hold_quiet)
"""No progress bars and no warnings of transformers between ours."""


_building = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Within it a model is built, quietly, by one thread at a time.

    While it is, transformers replaces its ``tie_weights`` and torch's default dtype for the whole process: calls that
    overlapped left the one that ties nothing behind, and every later model without its output layer.
    """
    with _building, quiet_transformers():
        yield


def package_versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import torch
    import transformers

    return {
        "tailorcli": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
