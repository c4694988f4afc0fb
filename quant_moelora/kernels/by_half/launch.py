"""Copies of x in the column order of each half of an act-ordered weight."""

from __future__ import annotations

from torch import Tensor

from quant_moelora.kernels.common.launch import launch, overlaps
from quant_moelora.kernels.dequant.prepare import PreparedWeight

_BLOCK = 1024  # columns of a program, at most


def by_half(
    x: Tensor,  # (M, columns)
    weight: PreparedWeight,
    topk_ids: Tensor,  # (M, k) int32 or int64, contiguous
    rows: Tensor,  # (P,) int32, pair of each sorted row
    out: Tensor,  # (halves, P, k_pad) of x's dtype
) -> Tensor:
    """Write each token's row once for every sorted row and half, with columns where k_perm has them, padding 0.

    A GEMM that looked up single columns would do so again for each tile of rows of the weight.
    """
    assert weight.k_perm is not None  # the caller asks only then
    pairs = len(rows)
    if not pairs:
        return out
    from quant_moelora.kernels.by_half.kernel import by_half_kernel

    block = min(_BLOCK, 1 << (weight.k_pad - 1).bit_length())
    overlap = overlaps(out.device)
    launch(
        by_half_kernel,
        (pairs, -(-weight.k_pad // block), weight.halves),
        out,
        x,
        x.stride(0),
        weight.k_perm,
        rows,
        topk_ids,
        out,
        weight.num_experts,
        pairs,
        topk_ids.shape[1],
        K=weight.k_pad,
        HALVES=weight.halves,
        BLOCK=block,
        OVERLAP=overlap,
        overlap=overlap,
    )
    return out
