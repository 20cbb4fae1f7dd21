"""The command line: ``app`` and the console script ``main``."""

from tailorcli.cli import evaluate  # noqa: F401  # its commands join the others
from tailorcli.cli.commands import app, main

__all__ = ["app", "main"]
