"""A LoRA adapter seen as a checkpoint."""
