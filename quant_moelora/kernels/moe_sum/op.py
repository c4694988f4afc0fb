"""The operator `quant_moelora::moe_sum`: the weighted sum of each token's pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.kernels.common.library import define
from quant_moelora.kernels.moe_sum import launch

_ARGUMENTS = (
    "Tensor y, Tensor topk_ids, Tensor? topk_weights, Tensor? inverse, int num_experts, int hidden, ScalarType dtype"
)


def _results(
    y: Tensor,  # as of `_write`, and so the others
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    inverse: Tensor | None,
    num_experts: int,
    hidden: int,
    dtype: torch.dtype,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [((topk_ids.shape[0], hidden), dtype)]


def _write(
    y: Tensor,  # (P, H) float in sorted order, or (parts, P, H) float32
    topk_ids: Tensor,  # (M, k) int32 or int64
    topk_weights: Tensor | None,  # (M, k) float32
    inverse: Tensor | None,  # (P,) int32
    num_experts: int,
    hidden: int,
    dtype: torch.dtype,
    out: Tensor,  # (M, H) dtype
) -> None:
    """See `launch.moe_sum`."""
    weights = None if topk_weights is None else topk_weights.contiguous()
    with torch.cuda.device_of(y):  # Triton launches on the current device, whichever the tensors are on
        launch.moe_sum(y.contiguous(), topk_ids.contiguous(), weights, inverse, out, num_experts=num_experts)


moe_sum, moe_sum_out = define("moe_sum", _ARGUMENTS, ("out",), _results, _write)
