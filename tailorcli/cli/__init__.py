"""The command line: ``app`` and the console script ``main``."""

from tailorcli.cli.commands import app, main

__all__ = ["app", "main"]
