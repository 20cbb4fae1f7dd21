"""The command line: ``app`` and the console script ``main``."""

from tailorcli.cli.app import app, main

__all__ = ["app", "main"]
