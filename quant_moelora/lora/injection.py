"""LoRAInjection: the base injection with both of its callables wrapped by closures that add the adapters' deltas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant_moelora.core.injection import ActivationCallable, Injection, MoeSumCallable
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.workspace import Workspace
from quant_moelora.kernels.lora.launch import Buffers, LayerFacts, LoRAForward, LoRATables, alone
from quant_moelora.kernels.lora.reference import expand2, expand13, shrink2, shrink13
from quant_moelora.kernels.moe_sum.launch import moe_sum as launched_moe_sum

_V13 = "lora_v13"  # workspace buffer that carries v = x A13^T from `begin` to the activation
_V2 = "lora_v2"
_LAUNCHED = (torch.bfloat16, torch.float16)


class LoRAInjection:
    """Adds B13 (A13 x) to gate_up before the activation and B2 (A2 h) to y before the weighted sum.

    The deltas are added in float32 to the values that the GEMMs stored, so that a row without an adapter is bitwise
    the row of the base. Built when adapters are attached, never in a forward. On a GPU, in bfloat16 and float16, the
    closures launch fused kernels, which compute the base's activation and sum too; elsewhere they are plain torch
    around the base's own callables.
    """

    ctx: MoELoRAContext | None
    activation: ActivationCallable
    moe_sum: MoeSumCallable

    def __init__(self, base: Injection, ctx: MoELoRAContext, info: MoEQuantInfo) -> None:
        self.ctx = ctx
        self._launches = _launches(ctx, info)
        self.activation = _with_expand13(base.activation, ctx, self._launches)
        self.moe_sum = _with_expand2(base.moe_sum, ctx, self._launches, weigh_input=info.router_weight == "input")

    def begin(self, x: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> None:
        """Shrink x for gate and up together."""
        assert self.ctx is not None  # __init__
        if plan.segments is None or not routing.num_pairs:
            return
        if _on_gpu(x):
            alone(self._launches(x, routing, plan, ws.buffer).shrink_rider(x))
        else:
            shrink13(x, self.ctx, plan, routing.top_k, _buffer(ws, _V13, plan, self.ctx.v13_width))


Launches = Callable[[Tensor, Routing, Plan, Buffers], LoRAForward]


def _launches(ctx: MoELoRAContext, info: MoEQuantInfo) -> Launches:
    """What makes the launches of a forward, from any tensor of its activation dtype and hidden size."""
    tables = LoRATables.of(ctx)
    facts = LayerFacts(info.activation, info.intermediate_size, info.inter_pad, info.router_weight == "input")

    def make(x: Tensor, routing: Routing, plan: Plan, buffers: Buffers) -> LoRAForward:
        ids, weights, slots = routing.topk_ids.contiguous(), routing.topk_weights.contiguous(), routing.slots
        held = torch.full_like(ids[:, 0], -1, dtype=torch.int32) if slots is None else slots.contiguous()
        return LoRAForward.new(x, tables, facts, ids, weights, held, plan.rows, plan.segments, buffers)

    return make


def _with_expand13(base: ActivationCallable, ctx: MoELoRAContext, launches: Launches) -> ActivationCallable:
    """The base activation of gate_up + delta."""

    def activation(x: Tensor, gate_up: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
        if plan.segments is None or not routing.num_pairs:
            return base(x, gate_up, out, routing, plan, ws)
        if _on_gpu(x):
            return launches(x, routing, plan, _last(ws)).activate(gate_up, out)
        return base(x, expand13(ws.last(_V13), ctx, plan, gate_up.to(torch.float32, copy=True)), out, routing, plan, ws)

    return activation


def _with_expand2(
    base: MoeSumCallable, ctx: MoELoRAContext, launches: Launches, *, weigh_input: bool
) -> MoeSumCallable:
    """The base sum of y + delta."""

    def moe_sum(h: Tensor, y: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
        if plan.segments is None or not routing.num_pairs:
            return base(h, y, out, routing, plan, ws)
        if _on_gpu(out):
            lora = launches(out, routing, plan, _last(ws))
            alone(lora.expand_rider())
            weights = None if weigh_input else lora.topk_weights
            return launched_moe_sum(
                y, lora.topk_ids, weights, plan.inverse, out, lora.deltas, num_experts=ctx.num_experts
            )
        v = shrink2(h, ctx, plan, _buffer(ws, _V2, plan, ctx.v2_width))
        return base(h, expand2(v, ctx, plan, y.to(torch.float32, copy=True)), out, routing, plan, ws)

    return moe_sum


def _on_gpu(x: Tensor) -> bool:
    """Whether there are kernels for it."""
    return x.is_cuda and x.dtype in _LAUNCHED


def _last(ws: Workspace) -> Buffers:
    """The buffers that `begin` made."""
    return lambda name, shape, dtype: ws.last(name)


def _buffer(ws: Workspace, name: str, plan: Plan, width: int) -> Tensor:
    """The float32 buffer [P, width] of a v."""
    return ws.buffer(name, (plan.rows.shape[0], width), torch.float32)
