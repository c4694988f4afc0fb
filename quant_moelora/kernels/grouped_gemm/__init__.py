"""out[pair] = x[row of the pair] W[expert of the pair]^T over the packed layout."""
