"""Two fine-tunes of one base: patches stitched into one model, and a LoRA adapter as the tuned model."""
