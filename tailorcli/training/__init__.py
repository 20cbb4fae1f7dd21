"""Train the kept entries of a patch."""
