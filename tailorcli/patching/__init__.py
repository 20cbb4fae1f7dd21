"""Give a model back what it forgot: plan, patch, apply, verify."""
