"""moe_sum in Triton."""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl

from quant_moelora.core import lora_context
from quant_moelora.kernels.activation.kernel import summed
from quant_moelora.kernels.common.kernel import follow

DOWN = tl.constexpr(lora_context.DOWN)


@triton.jit
def moe_sum_kernel(
    y,  # (P, H), or PARTS of it
    part_stride,
    inverse,  # (P,) int32, sorted row of each pair; None where rows are pairs
    ids,  # (M, k)
    weights,  # (M, k) float32
    delta,  # (P, delta_columns), added to y where an adapter has a rank; None without adapters
    slots,  # (M,) int32
    rank,  # (slots, 3, E) int32 of the LoRA context
    delta_begin,  # column of y that delta begins at
    delta_columns,
    out,  # (M, H)
    num_experts,
    num_slots,
    hidden,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
    SOME: tl.constexpr,  # whether delta has fewer columns than y
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Weighted sum over the pairs of one token that have an expert, in the order of its top-k."""
    follow(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    if delta is not None:
        adapter = tl.load(slots + token).to(tl.int64)
        has = (adapter >= 0) & (adapter < num_slots)
        own = (column >= delta_begin) & (column < delta_begin + delta_columns) if SOME else real
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(ids + pair)
        held = (expert >= 0) & (expert < num_experts)
        if inverse is None:  # every pair has a row: loads need not wait for the id
            value = summed(y + pair * hidden + column, part_stride, real, PARTS, out.dtype.element_ty)
            value = tl.where(held, value, 0.0)
            row = pair
        else:
            row = tl.load(inverse + pair).to(tl.int64)
            value = summed(y + row * hidden + column, part_stride, real & held, PARTS, out.dtype.element_ty)
        if delta is not None:
            ranks = tl.load(rank + (adapter * 3 + DOWN) * num_experts + expert, mask=has & held, other=0)
            # Loaded without waiting for the rank: what nobody wrote is left out afterwards.
            at = delta + row * delta_columns + column - delta_begin if SOME else delta + row * hidden + column
            added = tl.load(at, mask=own & held & has, other=0.0).to(tl.float32)
            value += tl.where(ranks > 0, added, 0.0)
        if WEIGHTED:
            value *= tl.load(weights + pair, mask=held, other=0.0)
        total += value
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=real)
