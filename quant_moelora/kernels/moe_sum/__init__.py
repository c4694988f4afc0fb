"""Weighted sum of each token's pairs."""
