"""What the project promises about speed, memory and accuracy, measured: run each as ``python -m benchmarks.NAME``."""
