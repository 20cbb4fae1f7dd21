"""tailorcli beside its peers: the same layer, the same pair, the same adapter."""
