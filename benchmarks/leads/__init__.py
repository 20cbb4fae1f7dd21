"""What was tried to make the method better, on the pairs of the benchmark `quick`: the tables of docs/research.md."""
