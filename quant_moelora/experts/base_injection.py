"""BaseInjection: the activation and the weighted sum of a layer without adapters."""

from __future__ import annotations

from torch import Tensor

from quant_moelora.core.injection import ActivationCallable, MoeSumCallable
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.workspace import Workspace
from quant_moelora.kernels.activation import launch as activation_kernel
from quant_moelora.kernels.activation import reference as activation_reference
from quant_moelora.kernels.moe_sum import launch as moe_sum_kernel
from quant_moelora.kernels.moe_sum import reference as moe_sum_reference


class BaseInjection:
    """The injection of the base model; it has no context."""

    ctx: MoELoRAContext | None = None
    activation: ActivationCallable
    moe_sum: MoeSumCallable

    def __init__(self, info: MoEQuantInfo) -> None:
        def activation(x: Tensor, gate_up: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
            if gate_up.is_cuda:
                return activation_kernel.activate(gate_up, info, routing, plan.rows, out)
            return activation_reference.activate(gate_up, info, routing, plan, out)

        def weighted_sum(h: Tensor, y: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
            if y.is_cuda:
                return moe_sum_kernel.moe_sum(y, info, routing, plan.inverse, out)
            return moe_sum_reference.moe_sum(y, info, routing, plan, out)

        self.activation = activation
        self.moe_sum = weighted_sum

    def begin(self, x: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> None:
        """Nothing to start without adapters."""
