"""Reports, statistics and results as tables and pictures."""
