"""The steps of a forward, for backends that take one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant_moelora.core.backend import Prepared
from quant_moelora.core.injection import Injection
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.workspace import Workspace


def apply_by_steps(
    x: Tensor,  # (M, H) prepared.dtype
    prepared: Prepared,
    routing: Routing,
    plan: Plan,
    injection: Injection,
    workspace: Workspace,
    w13: Callable[[Tensor], Tensor],  # (M, H) -> (P, halves*inter_pad)
    w2: Callable[[Tensor], Tensor],  # (P, inter_pad) -> (P, H)
) -> Tensor:  # (M, H) prepared.dtype
    """Compute a layer from a backend's two grouped GEMMs and the injection around them.

    What the GEMMs take besides their rows they hold already; their results are in sorted order, as `Injection` says.
    """
    injection.begin(x, routing, plan, workspace)
    gate_up = w13(x)
    h = x.new_empty(routing.num_pairs, prepared.info.inter_pad)
    h = injection.activation(x, gate_up, h, routing, plan, workspace)
    return injection.moe_sum(h, w2(h), torch.empty_like(x), routing, plan, workspace)
