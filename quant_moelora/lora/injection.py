"""LoRAInjection: the base injection with both of its callables wrapped by closures that add the adapters' deltas."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.injection import ActivationCallable, Injection, MoeSumCallable
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.workspace import Workspace
from quant_moelora.kernels.lora.reference import expand2, expand13, shrink2, shrink13

_V13 = "lora_v13"  # workspace buffer that carries v = x A13^T from `begin` to the activation
_V2 = "lora_v2"


class LoRAInjection:
    """Adds B13 (A13 x) to gate_up before the activation and B2 (A2 h) to y before the weighted sum.

    The deltas are added in float32 to the values that the GEMMs stored, so that a row without an adapter is bitwise
    the row of the base. Built when adapters are attached, never in a forward.
    """

    ctx: MoELoRAContext | None
    activation: ActivationCallable
    moe_sum: MoeSumCallable

    def __init__(self, base: Injection, ctx: MoELoRAContext) -> None:
        self.ctx = ctx
        self.activation = _with_expand13(base.activation, ctx)
        self.moe_sum = _with_expand2(base.moe_sum, ctx)

    def begin(self, x: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> None:
        """Shrink x for gate and up together."""
        assert self.ctx is not None  # __init__
        shrink13(x, self.ctx, plan, routing.top_k, _buffer(ws, _V13, plan, self.ctx.v13_width))


def _with_expand13(base: ActivationCallable, ctx: MoELoRAContext) -> ActivationCallable:
    """The base activation of gate_up + delta."""

    def activation(x: Tensor, gate_up: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
        return base(x, expand13(ws.last(_V13), ctx, plan, gate_up.to(torch.float32, copy=True)), out, routing, plan, ws)

    return activation


def _with_expand2(base: MoeSumCallable, ctx: MoELoRAContext) -> MoeSumCallable:
    """The base sum of y + delta."""

    def moe_sum(h: Tensor, y: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
        v = shrink2(h, ctx, plan, _buffer(ws, _V2, plan, ctx.v2_width))
        return base(h, expand2(v, ctx, plan, y.to(torch.float32, copy=True)), out, routing, plan, ws)

    return moe_sum


def _buffer(ws: Workspace, name: str, plan: Plan, width: int) -> Tensor:
    """The float32 buffer [P, width] of a v."""
    return ws.buffer(name, (plan.rows.shape[0], width), torch.float32)
