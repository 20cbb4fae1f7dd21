"""Data files, and their records as samples of token ids."""
