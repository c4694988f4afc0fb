"""moe_sum in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Plan, Routing


def moe_sum(
    y: Tensor,  # (P, H) float, in sorted order
    info: MoEQuantInfo,
    routing: Routing,
    plan: Plan,
    out: Tensor,  # (M, H) activation dtype
) -> Tensor:
    """Sum weight * y over the pairs of a token in float32, in the order of its top-k, and round once.

    Pairs without an expert are left out by their id, since 0 * NaN is NaN.
    """
    weights = routing.topk_weights if info.router_weight == "output" else None
    return weighted_sum(y, routing.topk_ids, weights, plan.inverse, info.num_experts, out)


def weighted_sum(
    y: Tensor,  # (any, H) float
    topk_ids: Tensor,  # (M, k) int32 or int64
    topk_weights: Tensor | None,  # (M, k) float32; None for weights of 1
    inverse: Tensor,  # (P,) int32, row of y of each pair
    num_experts: int,
    out: Tensor,  # (M, H)
) -> Tensor:
    """`moe_sum` of tensors, as the operator has it."""
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    rows = inverse.to(torch.int64).unflatten(0, topk_ids.shape)
    for slot in range(topk_ids.shape[1]):
        held = valid[:, slot, None]
        row = y[rows[:, slot]] if len(y) else y.new_zeros(out.shape)  # nothing is held then
        row = torch.where(held, row.to(torch.float32), 0.0)
        if topk_weights is not None:
            row = row * torch.where(held, topk_weights[:, slot, None], 0.0)
        total = total + row
    return out.copy_(total)
