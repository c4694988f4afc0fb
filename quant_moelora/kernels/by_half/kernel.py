"""Copies of x in the column order of each half of an act-ordered weight, in Triton."""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl

from quant_moelora.kernels.common.kernel import follow


@triton.jit
def by_half_kernel(
    x,  # (M, columns)
    stride_x,
    k_perm,  # (E, HALVES, K) int32, -1 = padding
    rows,  # (P,) int32, pair of each sorted row
    ids,  # (P,) of the router
    out,  # (HALVES, P, K)
    num_experts,
    num_pairs,
    top_k,
    K: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One sorted row with an expert, in the order of half program_id(2) of its expert."""
    follow(OVERLAP)
    row, half = tl.program_id(0).to(tl.int64), tl.program_id(2)
    pair = tl.load(rows + row)
    expert = tl.load(ids + pair).to(tl.int64)
    if (expert >= 0) & (expert < num_experts):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        source = tl.load(k_perm + (expert * HALVES + half) * K + column, mask=column < K, other=-1)
        value = tl.load(x + (pair // top_k).to(tl.int64) * stride_x + source, mask=source >= 0, other=0.0)
        tl.store(out + (half * num_pairs + row) * K + column, value, mask=column < K)
