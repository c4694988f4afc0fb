"""moe_sum on the GPU."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from quant_moelora.kernels.common.launch import launch, overlaps

_BLOCK = 1024  # columns of a program, at most
_PROGRAMS = 264  # below which columns are divided further: two for each of an H200's multiprocessors


class Deltas(NamedTuple):
    """What adapters add to y.

    Attributes:
        delta: of the activation dtype; rows whose adapter has no rank are not read.
        slots: of the routing.
        rank: of the LoRA context.
        begin: column of y that the first column of delta belongs to.
    """

    delta: Tensor  # (P, H), or fewer columns
    slots: Tensor  # (M,) int32
    rank: Tensor  # (slots, 3, E) int32
    begin: int = 0


def moe_sum(
    y: Tensor,  # (P, H) float in sorted order, or (parts, P, H) float32
    topk_ids: Tensor,  # (M, k) int32 or int64, contiguous
    topk_weights: Tensor | None,  # (M, k) float32, contiguous; None for weights of 1
    inverse: Tensor | None,  # (P,) int32, sorted row of each pair; None where rows are pairs
    out: Tensor,  # (M, H) activation dtype
    deltas: Deltas | None = None,
    *,
    num_experts: int,
) -> Tensor:
    """Sum weight * (y + delta) over the pairs of a token in float32, in the order of its top-k, and round once.

    Pairs without an expert are left out by their id. Parts are summed in their order and rounded to the dtype of
    ``out`` first, as if there were none.
    """
    tokens, hidden = out.shape
    if not tokens:
        return out
    from quant_moelora.kernels.moe_sum.kernel import moe_sum_kernel

    block = min(_BLOCK, 1 << (hidden - 1).bit_length())
    while block > 128 and tokens * -(-hidden // block) < _PROGRAMS:
        block //= 2
    overlap = overlaps(out.device)
    launch(
        moe_sum_kernel,
        (tokens, -(-hidden // block)),
        out,
        y,
        y.stride(0) if y.ndim == 3 else 0,
        inverse,
        topk_ids,
        topk_weights,
        *(deltas or (None, None, None, 0)),
        deltas.delta.shape[1] if deltas else 0,
        out,
        num_experts,
        deltas.rank.shape[0] if deltas else 0,
        hidden,
        TOP_K=topk_ids.shape[1],
        WEIGHTED=topk_weights is not None,
        PARTS=y.shape[0] if y.ndim == 3 else 1,
        SOME=deltas is not None and deltas.delta.shape[1] < hidden,
        BLOCK=block,
        OVERLAP=overlap,
        overlap=overlap,
        num_warps=4 if block >= 512 else 1,
    )
    return out
