"""The whole job in one call: statistics of both models, then the patch."""
