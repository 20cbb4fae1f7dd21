"""Patch files and the report of a patch: coding, reader, writer."""

from tailorcli.patchfile.reader import PatchFile

__all__ = ["PatchFile"]
