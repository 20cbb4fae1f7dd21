"""Patch files and the report of a patch: coding, reader, writer."""
