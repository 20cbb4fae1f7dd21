"""Model Tailor on a real language model, from the weights to what the patched models know."""
