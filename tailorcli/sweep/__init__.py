"""Many patches of one pair, each evaluated: which settings no other beats."""
