"""The activation between the two GEMMs on the GPU."""

from __future__ import annotations

from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.kernels.common.launch import launch, overlaps

_BLOCK = 1024  # columns of a program, at most


def activate(
    gate_up: Tensor,  # (P, halves*inter_pad) float in sorted order, or (parts, P, halves*inter_pad) float32
    activation: Activation,
    topk_ids: Tensor,  # (M, k) int32 or int64, contiguous
    topk_weights: Tensor | None,  # (M, k) float32, contiguous, multiplied with gate_up first; None for none
    rows: Tensor | None,  # (P,) int32, pair of each sorted row; None where rows are pairs
    out: Tensor,  # (P, inter_pad) activation dtype
    *,
    num_experts: int,
    inter: int,
) -> Tensor:
    """Write act(gate_up) of every row that has an expert; the columns of the padding become 0.

    Parts are summed in their order and rounded to the dtype of ``out`` first, as if there were none.
    """
    if not len(out):
        return out
    from quant_moelora.kernels.activation.kernel import activate_kernel

    inter_pad = out.shape[1]
    block = min(_BLOCK, 1 << (inter_pad - 1).bit_length())
    overlap = overlaps(out.device)
    launch(
        activate_kernel,
        (len(out), -(-inter_pad // block)),
        out,
        gate_up,
        gate_up.stride(0) if gate_up.ndim == 3 else 0,
        out,
        rows,
        topk_ids,
        topk_weights,
        num_experts,
        inter,
        INTER_PAD=inter_pad,
        GATED=activation.gated,
        WEIGHTED=topk_weights is not None,
        NAME=activation.name,
        ALPHA=activation.alpha or 0.0,
        LIMIT=activation.limit or 0.0,
        PARTS=gate_up.shape[0] if gate_up.ndim == 3 else 1,
        BLOCK=block,
        OVERLAP=overlap,
        overlap=overlap,
    )
    return out
