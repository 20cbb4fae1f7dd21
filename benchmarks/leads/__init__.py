"""What was tried to make the method better, on the pairs of `quick`: the tables of docs/results/research.md."""
