"""BaseInjection: the activation and the weighted sum of a layer without adapters."""

from __future__ import annotations

from torch import Tensor

from quant_moelora.core.injection import ActivationCallable, MoeSumCallable
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.workspace import Workspace
from quant_moelora.kernels.activation import reference as activation_reference
from quant_moelora.kernels.activation.op import activation_out
from quant_moelora.kernels.moe_sum import reference as moe_sum_reference
from quant_moelora.kernels.moe_sum.op import moe_sum_out


class BaseInjection:
    """The injection of the base model; it has no context."""

    ctx: MoELoRAContext | None = None
    activation: ActivationCallable
    moe_sum: MoeSumCallable

    def __init__(self, info: MoEQuantInfo) -> None:
        def activation(x: Tensor, gate_up: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
            """The base's activation."""
            activate = launched_activation if gate_up.is_cuda else activation_reference.activate
            return activate(gate_up, info, routing, plan, out)

        def weighted_sum(h: Tensor, y: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
            """The base's sum."""
            moe_sum = launched_moe_sum if y.is_cuda else moe_sum_reference.moe_sum
            return moe_sum(y, info, routing, plan, out)

        self.activation = activation
        self.moe_sum = weighted_sum

    def begin(self, x: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> None:
        """Nothing to start without adapters."""


def launched_activation(
    gate_up: Tensor,  # (P, halves*inter_pad) float
    info: MoEQuantInfo,
    routing: Routing,
    plan: Plan,
    out: Tensor,  # (P, inter_pad) activation dtype
) -> Tensor:
    """The reference's arguments, to the operator."""
    function = info.activation
    activation_out(
        gate_up,
        routing.topk_ids,
        routing.topk_weights if info.router_weight == "input" else None,
        plan.rows,
        function.name,
        function.gated,
        function.alpha,
        function.limit,
        info.num_experts,
        info.intermediate_size,
        info.inter_pad,
        out.dtype,
        out,
    )
    return out


def launched_moe_sum(
    y: Tensor,  # (P, H) float
    info: MoEQuantInfo,
    routing: Routing,
    plan: Plan,
    out: Tensor,  # (M, H) activation dtype
) -> Tensor:
    """The reference's arguments, to the operator."""
    weights = routing.topk_weights if info.router_weight == "output" else None
    moe_sum_out(y, routing.topk_ids, weights, plan.inverse, info.num_experts, info.hidden_size, out.dtype, out)
    return out
