"""The command line: ``app`` and the console script ``main``."""

try:
    from tailorcli.cli.app import app, main
except KeyboardInterrupt:  # Ctrl-C before anything has begun: there is nothing to tell
    raise SystemExit(130) from None

__all__ = ["app", "main"]
