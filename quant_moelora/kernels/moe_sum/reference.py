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
    ids, weights = routing.topk_ids, routing.topk_weights
    valid = (ids >= 0) & (ids < info.num_experts)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    rows = y[plan.inverse.to(torch.int64)].unflatten(0, ids.shape)
    for slot in range(routing.top_k):
        held = valid[:, slot, None]
        row = torch.where(held, rows[:, slot].to(torch.float32), 0.0)
        if info.router_weight == "output":
            row = row * torch.where(held, weights[:, slot, None], 0.0)
        total = total + row
    return out.copy_(total)
