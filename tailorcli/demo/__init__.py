"""The embedded demo: a small model forgets and is patched."""
