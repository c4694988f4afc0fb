"""moe_sum in Triton."""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl

from quant_moelora.kernels.activation.kernel import summed
from quant_moelora.kernels.common.kernel import follow


@triton.jit
def moe_sum_kernel(
    y,  # (P, H), or PARTS of it
    part_stride,
    inverse,  # (P,) int32, sorted row of each pair; None where rows are pairs
    ids,  # (M, k)
    weights,  # (M, k) float32
    out,  # (M, H)
    num_experts,
    hidden,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Weighted sum over the pairs of one token that have an expert, in the order of its top-k."""
    follow(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(ids + pair)
        held = (expert >= 0) & (expert < num_experts)
        if inverse is None:  # every pair has a row: loads need not wait for the id
            value = summed(y + pair * hidden + column, part_stride, real, PARTS, out.dtype.element_ty)
            value = tl.where(held, value, 0.0)
        else:
            row = tl.load(inverse + pair).to(tl.int64)
            value = summed(y + row * hidden + column, part_stride, real & held, PARTS, out.dtype.element_ty)
        if WEIGHTED:
            value *= tl.load(weights + pair, mask=held, other=0.0)
        total += value
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=real)
