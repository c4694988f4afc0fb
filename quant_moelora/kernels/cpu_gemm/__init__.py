"""out[pair] = x[row of the pair] W[expert of the pair]^T on a CPU, in plain torch, a block of rows of W at a time."""
