"""Copies of x in the column order of each half of an act-ordered weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.weights import PackedWeight
from quant_moelora.kernels.common.launch import options, overlaps

_BLOCK = 1024  # columns of a program, at most


def by_half(
    x: Tensor,  # (M, columns)
    weight: PackedWeight,
    routing: Routing,
    plan: Plan,
    out: Tensor,  # (halves, P, k_pad) of x's dtype
) -> Tensor:
    """Write each token's row once for every sorted row and half, with columns where k_perm has them, padding 0.

    A GEMM that looked up single columns would do so again for each tile of rows of the weight.
    """
    assert weight.k_perm is not None  # the caller asks only then
    if not routing.num_pairs:
        return out
    from quant_moelora.kernels.by_half.kernel import by_half_kernel

    kernel: Any = by_half_kernel  # Triton's launcher has no types

    block = min(_BLOCK, 1 << (weight.k_pad - 1).bit_length())
    overlap = overlaps(out.device)
    kernel[(routing.num_pairs, -(-weight.k_pad // block), weight.halves)](
        x,
        x.stride(0),
        weight.k_perm,
        plan.rows,
        routing.topk_ids.contiguous(),
        out,
        weight.num_experts,
        routing.num_pairs,
        routing.top_k,
        K=weight.k_pad,
        HALVES=weight.halves,
        BLOCK=block,
        OVERLAP=overlap,
        **options(overlap),
    )
    return out
