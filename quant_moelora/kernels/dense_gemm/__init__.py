"""The grouped GEMM of unquantised weights; `grouped_gemm.reference` is its meaning, as of packed ones."""
