"""The evidence: what is forgotten, what each method gives back, on three benchmarks, over several seeds."""
