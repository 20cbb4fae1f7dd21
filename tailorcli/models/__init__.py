"""Models of transformers: loaded, run, and taken apart into layers and blocks."""
