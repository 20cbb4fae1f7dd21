"""``python -m tailorcli``."""

if __name__ == "__main__":
    try:
        from tailorcli.cli import main

        main()
    except KeyboardInterrupt:  # before a command has begun, or after it: there is nothing to tell
        raise SystemExit(130) from None
