"""Sort the pairs of a forward by (expert, adapter)."""
