"""Stitch the patches of several tasks into one."""
