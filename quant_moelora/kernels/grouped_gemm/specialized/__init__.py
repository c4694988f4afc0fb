"""The grouped GEMM for many rows on sm_90: a block whose warps have different programs."""
