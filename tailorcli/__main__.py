"""``python -m tailorcli``."""

from tailorcli.cli import main

if __name__ == "__main__":
    main()
