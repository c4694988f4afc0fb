"""Activations in Triton: the same formulas as `core.activations`, in float32."""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl

from quant_moelora.kernels.common.kernel import follow


@triton.jit
def function(x, NAME: tl.constexpr):
    """The activation of one value, float32."""
    if NAME == "silu":
        return x / (1.0 + tl.exp(-x))
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))  # 0.5 * (1 + tanh(a)) = 1 / (1 + exp(-2a))
    else:
        tl.static_assert(NAME == "relu2")
        positive = tl.maximum(x, 0.0)
        return positive * positive


@triton.jit
def gated(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, NAME: tl.constexpr):
    """act(gate) * up, or the clamped swiglu of gpt-oss, in float32."""
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if NAME == "swigluoai":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
    else:
        return function(gate, NAME) * up


@triton.jit
def summed(parts, stride, mask, PARTS: tl.constexpr, dtype: tl.constexpr):
    """A value, or the sum of its parts in their order, rounded to ``dtype`` as a GEMM without parts does; float32."""
    total = tl.load(parts, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * stride, mask=mask, other=0.0)
    return total.to(dtype).to(tl.float32) if PARTS > 1 else total


@triton.jit
def activate_kernel(
    gate_up,  # (P, halves * inter_pad), or PARTS of it
    part_stride,
    h,  # (P, inter_pad)
    rows,  # (P,) int32, pair of each sorted row; None where rows are pairs
    ids,  # (P,) of the router
    weights,  # (P,) float32, of the router
    num_experts,
    inter,
    INTER_PAD: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NAME: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """h of one sorted row with an expert; WEIGHTED multiplies gate_up by the router's weight first."""
    follow(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    pair = row if rows is None else tl.load(rows + row)
    expert = tl.load(ids + pair)
    if (expert >= 0) & (expert < num_experts):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        real = column < inter
        at = gate_up + row * (INTER_PAD * (1 + GATED)) + column
        gate = summed(at, part_stride, real, PARTS, h.dtype.element_ty)
        up = summed(at + INTER_PAD, part_stride, real, PARTS, h.dtype.element_ty) if GATED else gate
        if WEIGHTED:
            weight = tl.load(weights + pair)
            gate, up = gate * weight, up * weight
        value = gated(gate, up, ALPHA, LIMIT, NAME) if GATED else function(up, NAME)
        value = tl.where(real, value, 0.0)  # not every activation is 0 at 0
        tl.store(h + row * INTER_PAD + column, value.to(h.dtype.element_ty), mask=column < INTER_PAD)
