"""Sparse fine-tuning beside patching: the same data and steps for all, at several depths of fine-tuning."""
