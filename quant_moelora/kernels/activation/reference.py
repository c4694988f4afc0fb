"""The activation between the two GEMMs in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Plan, Routing


def activate(
    gate_up: Tensor,  # (P, halves*inter_pad) float
    info: MoEQuantInfo,
    routing: Routing,
    plan: Plan,
    out: Tensor,  # (P, inter_pad) activation dtype
) -> Tensor:
    """Write act(gate_up) of every sorted row that has an expert; the columns of the padding become 0."""
    held = int(plan.expert_offsets[-1])
    rows = gate_up[:held].to(torch.float32)
    if info.router_weight == "input":
        rows = rows * routing.topk_weights.reshape(-1)[plan.rows[:held].to(torch.int64), None]
    h = info.activation(rows)
    h[:, info.intermediate_size :] = 0
    out[:held] = h.to(out.dtype)
    return out
