"""The embedded demo: a small model forgets and is patched."""

from tailorcli.demo.demo import evaluate_checkpoint, run_demo

__all__ = ["evaluate_checkpoint", "run_demo"]
